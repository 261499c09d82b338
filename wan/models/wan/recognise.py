"""What kind of Wan a folder or a file is: by its tensors where it has them, else by what its configuration says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nabla.checks import is_count, is_number
from wan.checkpoints.component_files import DIFFUSERS_STEM
from wan.checkpoints.file_errors import AGAIN, CheckpointError, exists, read_json_object
from wan.checkpoints.locate import CONFIG, INDEX
from wan.checkpoints.weights import WeightFiles
from wan.models.family import Layout
from wan.models.wan.geometry import GEOMETRY
from wan.models.wan.kinds import KINDS
from wan.models.wan.layout import EXPERT_FOLDERS, MAX_POSITIONS, MAX_TEXT_LENGTH
from wan.models.wan.names import NAMING

Shapes = Mapping[str, tuple[int, ...]]
TRANSFORMER_CLASSES = ("WanTransformer3DModel", "WanVACETransformer3DModel")
PIPELINES = frozenset(kind.diffusers_pipeline for kind in KINDS.values())
# Of what lies beside a transformer in diffusers' layout.
COMPONENT_CLASSES = ("AutoencoderKLWan", "UMT5EncoderModel", "UniPCMultistepScheduler", "CLIPVisionModel")
# Names of models of diffusers; of Wan's own programs they are WanModel and the like.
OF_DIFFUSERS = re.compile(r"^Autoencoder|Transformer\w*Model$")
# A transformer that is given what stands beside the noise has its mask and latents as channels.
BESIDE = KINDS["i2v"].channels[0] - KINDS["i2v"].channels[1]
SPEECH = (
    "speech-to-video (S2V), whose attention runs over noisy, reference and motion tokens together, on no single grid, "
    "so that tiles do not apply; give a text- or image-to-video checkpoint"
)
ANIMATION = (
    "an animation model (Animate), whose poses and faces other models make; run diffusers' WanAnimatePipeline with "
    "wan.apply_attention on its transformer"
)
CONTROL = "a camera or control model, which is not supported; give a text-to-video, image-to-video or VACE checkpoint"
# Parts of names of tensors that only kinds have which are not read.
FOREIGN_TENSORS = {
    "audio_": SPEECH,
    "motion_encoder": ANIMATION,
    "pose_patch_embedding": ANIMATION,
    "control_adapter": CONTROL,
    "ref_conv": CONTROL,
}
# And what configurations and pipelines call these.
FOREIGN_NAMES = {
    "s2v": SPEECH,
    "WanModel_S2V": SPEECH,
    "animate": ANIMATION,
    "WanAnimateModel": ANIMATION,
    "WanAnimatePipeline": ANIMATION,
}


class Signs(NamedTuple):
    """What tells a transformer's kind.

    channels: that it takes and gives
    pictures: how many it sees by CLIP; vace: whether it has VACE's blocks
    """

    channels: tuple[Any, Any]
    pictures: int = 0
    vace: bool = False


def signs_of(shapes: Shapes) -> Signs:
    """Of tensors by their published names."""
    taken, given = shapes[NAMING.first_weight][1], shapes["head.head.weight"][0] // math.prod(GEOMETRY.patch)
    pictures = 0 if "img_emb.proj.1.weight" not in shapes else 2 if "img_emb.emb_pos" in shapes else 1
    return Signs((taken, given), pictures, "vace_patch_embedding.weight" in shapes)


def signs_of_config(config: Mapping[str, Any], published: bool, experts: bool) -> Signs:
    """Of a configuration, for a transformer whose tensors are not here yet, or are in diffusers' layout."""
    if published:
        # A transformer of Wan2.2 of this type sees no pictures by CLIP.
        pictures = {"flf2v": 2, "i2v": 0 if experts else 1}.get(str(config.get("model_type")), 0)
        taken = "in_dim", "out_dim"
    else:
        pictures = 0 if config.get("image_dim") is None else 1 if config.get("pos_embed_seq_len") is None else 2
        taken = "in_channels", "out_channels"
    usual = BESIDE + 16 if pictures and published else 16
    vace = "vace_layers" in config or config.get("_class_name") in ("VaceWanModel", TRANSFORMER_CLASSES[1])
    return Signs((config.get(taken[0], usual), config.get(taken[1], 16)), pictures, vace)


def kind_of_signs(signs: Signs, experts: bool) -> str | None:
    """The kind, with whether there are two transformers, which none of them tells; None for what is of none."""
    (taken, given), pictures = signs.channels, signs.pictures
    if not is_count(taken) or not is_count(given):
        # What is no number is found when the model is made.
        taken, given = 16, 16
    beside = taken - given
    if beside not in (0, BESIDE) or (pictures > 0) > (beside > 0) or (signs.vace and beside):
        return None
    if experts:
        is_other = signs.vace or pictures or signs.channels == KINDS["ti2v-5B"].channels
        return None if is_other else "i2v-A14B" if beside else "t2v-A14B"
    if signs.vace:
        return "vace"
    if beside:
        return ("i2v-A14B", "i2v", "flf2v")[pictures]
    return "ti2v-5B" if signs.channels == KINDS["ti2v-5B"].channels else "t2v"


def check_names(where: Path, names: Iterable[str]) -> None:
    """Raise `CheckpointError` for tensors of a kind that is not read, in words for what it is."""
    names = list(names)
    for sign, what in FOREIGN_TENSORS.items():
        if found := [name for name in names if sign in name]:
            raise CheckpointError(f"{where} is a transformer of {what} ({min(found)!r})")


def kind_of_weights(weights: WeightFiles, experts: bool) -> str:
    """The kind of a transformer's tensors, published or diffusers' names; raises `CheckpointError` for none."""
    check_names(weights.where, weights.shapes)
    shapes = {NAMING.published_of(name): shape for name, shape in weights.shapes.items()}
    if len(shapes.get(NAMING.first_weight, ())) != 5 or not shapes.get("head.head.weight"):
        raise CheckpointError(f"{weights.where} is not a transformer of Wan: it has no {NAMING.first_weight}; {AGAIN}")
    return _known(weights.where, signs_of(shapes), experts)


def _known(where: Path, signs: Signs, experts: bool) -> str:
    # Of what comes in pairs, even where it is of another kind.
    kind = kind_of_signs(signs, experts) or kind_of_signs(signs, False)
    if kind is None:
        sees = ", and sees pictures" if signs.pictures else ""
        raise CheckpointError(
            f"{where} is of no kind of Wan that is supported: it takes {signs.channels[0]} channels and gives "
            f"{signs.channels[1]}{sees}; supported are {', '.join(KINDS)}"
        )
    return kind


def recognise(folder: Path) -> Layout | None:
    """See `Family.recognise`."""
    if exists(folder / INDEX):
        return _recognise_diffusers(folder)
    experts = any(exists(folder / expert) for expert in EXPERT_FOLDERS)
    inner = folder
    if experts:
        missing = next((name for name in EXPERT_FOLDERS if not exists(folder / name / CONFIG)), None)
        if missing is not None:
            raise CheckpointError(
                f"{folder} is Wan2.2, of two transformers ({', '.join(EXPERT_FOLDERS)}), and {missing}/{CONFIG} is "
                f"missing; {AGAIN}"
            )
        inner = folder / EXPERT_FOLDERS[0]
    if not exists(inner / CONFIG):
        return None
    if folder.name in EXPERT_FOLDERS and all(exists(folder.parent / expert / CONFIG) for expert in EXPERT_FOLDERS):
        raise CheckpointError(f"{folder} is one transformer of Wan2.2, which has two here; give the folder above it")
    config = read_json_object(inner / CONFIG)
    named = config.get("_class_name")
    known = (*TRANSFORMER_CLASSES, *COMPONENT_CLASSES)
    if isinstance(named, str) and OF_DIFFUSERS.search(named) and named not in known:
        return None
    _check_whole(folder, config)
    _check_lengths(inner / CONFIG, config)
    kind = _kind_of_folder(inner, config, experts)
    _check_count(folder, kind, experts)
    return Layout(True, config, kind, KINDS[kind].boundary)


def _kind_of_folder(folder: Path, config: Mapping[str, Any], experts: bool) -> str:
    try:
        weights = WeightFiles.find(folder, DIFFUSERS_STEM)
    except CheckpointError:
        # Of the hub, configurations are here first; what is incomplete or damaged is told when it is opened.
        return _known(folder, signs_of_config(config, True, experts), experts)
    if NAMING.first_weight not in weights.shapes or "head.head.weight" not in weights.shapes:
        return _known(folder, signs_of_config(config, True, experts), experts)
    return kind_of_weights(weights, experts)


def _recognise_diffusers(folder: Path) -> Layout | None:
    index = read_json_object(folder / INDEX)
    named = index.get("_class_name")
    _check_foreign(folder, named)
    if named not in PIPELINES:
        return None
    file = folder / "transformer" / CONFIG
    config = read_json_object(file)
    if config.get("_class_name", TRANSFORMER_CLASSES[0]) not in TRANSFORMER_CLASSES:
        raise CheckpointError(f"{file.parent} is no {TRANSFORMER_CLASSES[0]}; give a checkpoint of Wan")
    _check_lengths(file, config)
    # diffusers writes a component that a pipeline does not have as [null, null].
    experts = index.get("transformer_2") not in (None, [None, None])
    kind = _known(folder, signs_of_config(config, False, experts), experts)
    _check_count(folder, kind, experts)
    # Of the small one diffusers makes videos from pictures by the pipeline of those, and saves it under that name.
    others = {KINDS["i2v"].diffusers_pipeline} if kind == "ti2v-5B" else set()
    if named not in {KINDS[kind].diffusers_pipeline, *others}:
        raise CheckpointError(f"{folder} is a {named}, and its transformer one of {KINDS[kind].what}; {AGAIN}")
    return Layout(False, config, kind, _boundary(folder, index, kind))


def _check_count(folder: Path, kind: str, experts: bool) -> None:
    what = KINDS[kind].what
    if experts and not KINDS[kind].experts:
        raise CheckpointError(f"{folder} has two transformers, but those are of {what}, which has one; {AGAIN}")
    if KINDS[kind].experts and not experts:
        raise CheckpointError(f"{folder} is one transformer of {what}, which has two; give the folder above it")


def _boundary(folder: Path, index: Mapping[str, Any], kind: str) -> float | None:
    usual = KINDS[kind].boundary
    if usual is None:
        return None
    said = index.get("boundary_ratio")
    if said is None:
        return usual
    if not is_number(said) or not 0 < said < 1:
        raise CheckpointError(f"{folder / INDEX}: boundary_ratio is {said!r}, not a number between 0 and 1")
    return float(said)


def _check_foreign(folder: Path, *named: object) -> None:
    for name in named:
        if isinstance(name, str) and name in FOREIGN_NAMES:
            raise CheckpointError(f"{folder} is {FOREIGN_NAMES[name]}")


def _check_whole(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for a part of a checkpoint that is given in its place, and for what is not read."""
    named = config.get("_class_name")
    if named in (*TRANSFORMER_CLASSES, *COMPONENT_CLASSES) or config.get("model_type") == "umt5":
        above = folder.parent
        found = f"give {above}" if exists(above / INDEX) else f"give the folder above, with {INDEX}"
        raise CheckpointError(f"{folder} is one part of a checkpoint in diffusers' layout; {found}")
    _check_foreign(folder, named, config.get("model_type"))


def _check_lengths(file: Path, config: Mapping[str, Any]) -> None:
    for key, most in (("text_len", MAX_TEXT_LENGTH), ("rope_max_seq_len", MAX_POSITIONS)):
        value = config.get(key, 1)
        if not is_count(value) or value == 0:
            raise CheckpointError(f"{file}: {key} is {value!r}, not a positive integer")
        if value > most:
            raise CheckpointError(f"{file}: {key} is {value}, but can be at most {most}")
