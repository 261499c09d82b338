"""Where the page's settings come from: presets, the sidecars of videos, and files of LoRA. Files of users are data."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError
from wan.checkpoints.locate import check_hub_id
from wan.checkpoints.tensor_files import weight_file
from wan.checkpoints.weights import WeightFiles
from wan.config.config_files import CONFIG_FOLDER, profile_file, read_settings
from wan.config.inputs import INPUTS, LISTS
from wan.config.settings import Settings, resolve
from wan.files.atomic import atomic_path
from wan.files.formats import SAFETENSORS
from wan.files.hashes import file_hash
from wan.files.video import make_folder
from wan.models.checkpoint import Checkpoint
from wan.run.remaking import quantizations_of
from wan.serve.pictures import PICTURES
from wan.serve.shown import name_of, names_of

OWN = "The checkpoint's own"
# A sidecar is a few hundred bytes and a prompt.
MAX_SIDECAR_BYTES = 64 * 1024
# What a page takes from a sidecar; the rest names files, of which a page has its own.
FROM_SIDECAR = ("prompt", "attention", "sampling", "video", "dtype", "vae_dtype", "fp8", "cache")

Layer = dict[str, Any]


@dataclass(frozen=True)
class Presets:
    """The settings to start from.

    flags: from the command line, which rank above every preset
    default_checkpoint: if neither flags nor a preset name one
    config: of the command line: a file, or a name in `configs/`, which is the first preset
    """

    flags: Mapping[str, Any]
    default_checkpoint: str
    config: str | None = None
    files: Mapping[str, Path] = field(init=False)

    def __post_init__(self) -> None:
        files = {path.stem: path for path in sorted(CONFIG_FOLDER.glob("*.yaml"))}
        given = self.flags.get("checkpoint")
        if given is not None and Path(given).expanduser().is_dir():
            # It stands for that of every preset, of which some are for another kind. One that is asked for by name is
            # kept, to be refused in words.
            checkpoint = Checkpoint.open(given)
            files = {name: path for name, path in files.items() if _is_for(path, checkpoint)}
        if self.config is not None:
            # For its errors alone: a wrong file is said at the start.
            read_settings(self.config)
            files = {Path(self.config).stem: Path(self.config)} | files
        object.__setattr__(self, "files", files)

    @property
    def names(self) -> list[str]:
        return [OWN, *self.files]

    @property
    def first(self) -> str:
        return OWN if self.config is None else Path(self.config).stem

    def settings(self, name: str) -> Settings:
        """The settings of a preset, without a prompt of its own.

        A checkpoint's own ones are among them if it is a directory; from a hub it is fetched when a video wants it.
        Raises `InputError` for settings that are not allowed, and a checkpoint that can be neither.
        """
        layers = self.flags, self._layer(name), self._lowest
        settings = resolve(*layers, needs_prompt=False)
        if Path(settings.checkpoint).expanduser().is_dir():
            return Checkpoint.open(settings.checkpoint).resolve(*layers, needs_prompt=False)
        check_hub_id(settings.checkpoint)
        return settings

    def describe(self, name: str) -> str:
        """The comment that a preset's file begins with."""
        if name not in self.files:
            return ""
        path = self.files[name]
        path = path if path.is_file() else CONFIG_FOLDER / path
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = [line[1:].strip() for line in lines if line.startswith("#")] if path.suffix == ".yaml" else []
        return " ".join(comment)

    def checkpoints(self) -> set[str]:
        """The checkpoints that the page may run."""
        every = (resolve(self.flags, self._layer(n), self._lowest, needs_prompt=False) for n in self.names)
        return {settings.checkpoint for settings in every}

    @property
    def _lowest(self) -> Layer:
        return {"checkpoint": self.default_checkpoint}

    def _layer(self, name: str) -> Layer:
        if name == OWN:
            return {}
        if name not in self.files:
            raise InputError(f"preset {name!r} is not known; use one of {', '.join(self.names)}")
        # Its file may have a prompt, as a sidecar does; the page's is a control that presets leave alone.
        return {key: value for key, value in read_settings(self.files[name]).items() if key != "prompt"}


def _is_for(config: Path, checkpoint: Checkpoint) -> bool:
    """Whether a config is not for another kind of checkpoint."""
    try:
        checkpoint.check_kind(read_settings(config).get("kind"))
    except CheckpointError:
        return False
    return True


class LoraLibrary:
    """A folder of LoRA files: those of who runs the page, and those that users add, named by what they hold.

    It is made if it is not there; raises `InputError` if that cannot be.
    """

    def __init__(self, folder: Path):
        make_folder(folder, "lora_dir")
        self.folder = folder

    def files(self) -> dict[str, str]:
        """Paths by name."""
        return {path.name: str(path.resolve()) for path in sorted(self.folder.glob(f"*{SAFETENSORS}"))}

    def added_bytes(self) -> int:
        """What the files that were added hold on the disk; they end in a digest."""
        added = re.compile(rf".*-[0-9a-f]{{8}}{re.escape(SAFETENSORS)}")
        return sum(path.lstat().st_size for path in self.folder.iterdir() if added.fullmatch(path.name))

    def add(self, upload: Path) -> str:
        """Take in a copy of an uploaded file, and give its name.

        Raises `InputError` unless it is safetensors, of which only names and shapes are read, and if it cannot be kept;
        whether it fits a transformer is checked when it is used.
        """
        path = weight_file("lora", upload, (SAFETENSORS,))
        try:
            WeightFiles([path])
        except CheckpointError as error:
            # Visitors see the file's name, not the server's temporary folder.
            raise InputError(str(error).replace(str(path), path.name)) from None
        digest = file_hash(path)[:8]
        stem = re.sub(r"[^\w.-]+", "-", path.stem).strip("-.")[:60] or "lora"
        # A file that comes twice is one by its digest, which one that was taken from this folder has already.
        name = f"{stem.removesuffix('-' + digest)}-{digest}{SAFETENSORS}"
        try:
            with atomic_path(self.folder / name) as partial:
                shutil.copyfile(path, partial)
        except (OSError, InputError) as error:
            # `atomic_path` names the server's folder.
            reason = getattr(error.__cause__ or error, "strerror", None) or "it cannot be written"
            raise InputError(f"{path.name} cannot be kept ({reason}); see --lora_dir") from error
        return name


def read_sidecar(path: Path) -> Layer:
    """The settings of the JSON file beside a video; raises `InputError` for any other file."""
    if path.suffix != ".json":
        raise InputError(f"{path.name} is not the JSON file beside a video")
    if path.stat().st_size > MAX_SIDECAR_BYTES:
        raise InputError(
            f"{path.name} is larger than {MAX_SIDECAR_BYTES // 1024} KB; give the JSON file beside a video"
        )
    try:
        return read_settings(path)
    except RecursionError:
        raise InputError(f"{path.name} is nested too deeply; give the JSON file beside a video") from None
    except InputError as error:
        raise InputError(str(error).replace(str(path), path.name)) from None


def from_sidecar(
    sidecar: Layer, own: Settings, flags: Mapping[str, Any], checkpoints: set[str], lora_files: Mapping[str, str]
) -> tuple[Settings, list[str]]:
    """The settings of a sidecar as this page can run them, and a line for each thing that it runs otherwise.

    own: the page's settings, which give what a sidecar may not
    checkpoints, lora_files: those that the page has; a sidecar may name no others, for it may come from anyone
    """
    check_names_no_file(sidecar)
    made = resolve(sidecar)
    notes = ["the prompt is the text that it was expanded to"] if made.expanded_prompt is not None else []
    names = {name_of(own.checkpoint): own.checkpoint}
    # By full name, or by that which a shared sidecar has; of several of one name the page's own comes first.
    names = {name_of(one): one for one in checkpoints} | names | {one: one for one in checkpoints}
    checkpoint = names.get(made.checkpoint, own.checkpoint)
    if made.checkpoint not in (checkpoint, name_of(checkpoint)):
        notes.append(f"the video was made with {made.checkpoint}, and this page runs {name_of(checkpoint)}")
    then, now = (names_of(one.to_dict()["transformer"]) for one in (made, own))
    if then != now:
        notes.append(f"the video was made with transformer {then}, and this page runs {now}")
    lora = []
    for one in made.lora:
        name = Path(one.file).name
        if name in lora_files:
            lora.append({"file": lora_files[name], "scale": one.scale, "expert": one.expert})
        else:
            notes.append(f"LoRA {name} is not here; add the file")
    values = made.to_dict()
    taken = {key: values[key] for key in FROM_SIDECAR}
    # What the prompt was expanded to is the prompt here, which makes the same video.
    taken |= {"prompt": made.text, "expand_prompt": made.writes_prompt}
    # In rank: this page's LoRA files, what its operator fixed, the sidecar's values, and the page's for all else.
    settings = resolve({"lora": lora}, flags, taken, {"checkpoint": checkpoint}, own.to_dict())
    for key in flags.keys() & {"dtype"}:
        if values[key] not in (None, flags[key]):
            notes.append(f"the video was made in {values[key]}, and this page runs {flags[key]}")
    # The pictures on the page are for what its settings make; those of text alone have none, and no other files.
    kept = {name: getattr(own, name) if name in PICTURES and name in made.inputs else None for name in INPUTS}
    return replace(settings, **kept | {name: () for name in LISTS}), notes


def quantization_notes(made_with: Mapping[str, Any]) -> list[str]:
    """A line if a plan of memory quantised the weights of a recorded video, which no setting says."""
    keys = quantizations_of(made_with.get("plan"), fp8=False)
    quantized = [f"the {name} in {key}" for name, key in keys.items() if key not in (None, "fp8")]
    what = " and ".join(quantized)
    return (
        [f"the video was made with {what}, and this page packs weights only as its --memory asks"] if quantized else []
    )


def check_names_no_file(sidecar: Layer) -> None:
    """Raise `InputError` for a sidecar of which settings would be read from a file, whose path anyone may have chosen.

    Before it is resolved, which opens the file, and whose errors would tell what is there.
    """
    cache = sidecar.get("cache")
    ratios = cache.get("ratios") if isinstance(cache, Mapping) else None
    if isinstance(ratios, str) or (isinstance(cache, str) and cache.count(":") > 1):
        raise InputError("cache names a file of ratios; give the JSON file beside a video, which has the numbers")
    attention = sidecar.get("attention")
    if isinstance(attention, Mapping) and profile_file(attention) is not None:
        raise InputError("attention names a file of a profile; give the JSON file beside a video, which has it whole")
