"""Settings from the sidecars of videos that visitors load. Files of users are data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.config.config_files import read_settings
from wan.config.inputs import INPUTS, LISTS
from wan.config.settings import Settings, resolve
from wan.run.remaking import quantizations_of
from wan.serve.from_clients import check_names_no_file
from wan.serve.page.pictures import PICTURES
from wan.serve.shown import name_of, names_of

# A sidecar is a few hundred bytes and a prompt.
MAX_SIDECAR_BYTES = 64 * 1024
# What a page takes from a sidecar; the rest names files, of which a page has its own.
FROM_SIDECAR = ("prompt", "attention", "sampling", "video", "dtype", "vae_dtype", "fp8", "cache")

Layer = dict[str, Any]


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
