"""A folder of Kandinsky-5, in the native or in diffusers' layout: what tells it, what lies where, what it was made for.

The native layout has no configuration at all: what a transformer is stands in the shapes of its tensors, and what it
was trained for in the name that its file was published by.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nabla import InputError
from nabla.checks import is_number
from wan.checkpoints.component_files import DIFFUSERS_STEM, TRANSFORMERS_STEM, ComponentFiles
from wan.checkpoints.file_errors import AGAIN, CheckpointError, exists, read_json_object
from wan.checkpoints.locate import CONFIG, INDEX
from wan.checkpoints.weights import WeightFiles
from wan.files.formats import GGUF, SAFETENSORS
from wan.models.family import Companion, HubFiles, Layout, MediaInputs, TransformerFacts
from wan.models.kandinsky.names import NAMING
from wan.models.kandinsky.sizes import FIRST_LAYER, Shapes, transformer_config

NAME = "Kandinsky-5"
TRANSFORMER_CLASS = "Kandinsky5Transformer3DModel"
PIPELINES = ("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline")
PARTS = (TRANSFORMER_CLASS, "AutoencoderKLHunyuanVideo")
PICTURE_PIPELINES = ("Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline")
# Of native transformers, of which several may lie side by side.
MODEL_FOLDER = "model"
COMPONENTS = (
    ComponentFiles("transformer", DIFFUSERS_STEM, f"{MODEL_FOLDER}/"),
    ComponentFiles("vae", DIFFUSERS_STEM, f"vae/{DIFFUSERS_STEM}"),
    ComponentFiles("text_encoder", TRANSFORMERS_STEM, f"text_encoder/{TRANSFORMERS_STEM}"),
    ComponentFiles("text_encoder_2", TRANSFORMERS_STEM, f"text_encoder2/{TRANSFORMERS_STEM}"),
)
TOKENIZERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder2"}
# As older versions of transformers saved CLIP's, and diffusers' pipelines with it.
TOKENIZER_PARTS = {"tokenizer_2": ("vocab.json", "merges.txt")}
_TEXT_FILES = ("*.json", "*.txt", "model*.safetensors")
COMPANIONS = (
    # A repository that is given in its place may have it at its root.
    Companion(
        "vae",
        "vae",
        "hunyuanvideo-community/HunyuanVideo",
        ("vae/*", CONFIG, f"{DIFFUSERS_STEM}*.safetensors"),
        inner="vae",
    ),
    Companion("text_encoder", "text_encoder", "Qwen/Qwen2.5-VL-7B-Instruct", _TEXT_FILES),
    Companion("text_encoder_2", "text_encoder2", "openai/clip-vit-large-patch14", _TEXT_FILES),
)
HUB_FILES = HubFiles(
    configurations=(INDEX, "transformer/config.json"),
    others=(
        f"{MODEL_FOLDER}/*.safetensors",
        "*.json",
        *(f"{name}/*" for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
        "defaults.yaml",
    ),
    transformer=(f"{MODEL_FOLDER}/*.safetensors", "transformer/*.safetensors"),
)
HUB_LANDMARKS = (f"{MODEL_FOLDER}/kandinsky5*.safetensors",)

TEXT_LENGTH = 256
# Along each axis, of diffusers' rotary table.
POSITIONS = 128
# (width, layers) of the published transformers.
SIZES = {"lite": (1792, 32), "pro": (4096, 60)}
KINDS = frozenset(f"kandinsky5-{size}-{task}" for size in SIZES for task in ("t2v", "i2v"))
PICTURE_KINDS = frozenset(kind for kind in KINDS if kind.endswith("i2v"))
# The names of published files, such as kandinsky5lite_t2v_sft_10s.
# Lite's from a picture leaves out its training.
FILE_NAME = re.compile(
    r"kandinsky5(?P<size>lite|pro)_(?P<task>t2v|i2v)(?:_(?P<training>[a-z]+[a-z0-9]*))?_(?P<seconds>5|10)s"
)
FPS = 24
NEGATIVE_PROMPT = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)
SD, HD = (768, 512), (1280, 768)
WINDOW = "sta-11-3-3"
# Of the native program's configurations: the threshold by size and seconds. Files that are not here run dense, as does
# Pro at small sizes for five seconds, which a config says.
THRESHOLDS = {("lite", 10): 0.9, ("pro", 5): 0.8, ("pro", 10): 0.7}
# What it has Pro run at small sizes instead, by seconds.
PRO_AT_SD = {5: "dense", 10: f"nabla-0.9_{WINDOW}"}


class Published(NamedTuple):
    """What the name of a published file says."""

    size: str
    task: str
    training: str
    seconds: int


def recognise(folder: Path) -> Layout | None:
    """See `Family.recognise`."""
    if exists(folder / INDEX):
        return _recognise_diffusers(folder)
    _check_no_part(folder)
    files = transformer_files(folder / MODEL_FOLDER)
    if len(files) > 1:
        # Each has sizes, attention and defaults of its own.
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder} holds several transformers ({names}); name one with --transformer FILE")
    return _layout_of(files[0]) if files else None


def _check_no_part(folder: Path) -> None:
    """Raise `CheckpointError` for a folder of a checkpoint that is given in its place."""
    if exists(folder / CONFIG):
        kind = read_json_object(folder / CONFIG).get("_class_name")
        if kind in PARTS:
            raise CheckpointError(f"{folder} is the {kind} of a checkpoint alone; give the folder above it")
    elif transformer_files(folder):
        raise CheckpointError(
            f"{folder} holds a transformer of {NAME} as {MODEL_FOLDER}/ of a checkpoint does; give the folder above "
            "it, or the file as --transformer"
        )


def transformer_files(folder: Path) -> list[Path]:
    """The native transformers that lie in a folder."""
    if not folder.is_dir():
        return []
    files = [folder / name for name in sorted(os.listdir(folder)) if name.endswith(SAFETENSORS)]
    return [file for file in files if FIRST_LAYER in WeightFiles([file]).shapes]


def layout_of_file(file: Path) -> Layout:
    """See `Family.layout_of_file`."""
    refuse_gguf(file)
    layout = _layout_of(file) if file.suffix == SAFETENSORS else None
    if layout is None:
        raise CheckpointError(f"{file} is not a transformer of {NAME}: it has no {FIRST_LAYER}")
    return layout


def refuse_gguf(file: Path) -> None:
    """Raise `InputError` for a file that is packed in a way which is not read for this family."""
    if file.suffix == GGUF:
        raise InputError(f"transformer {file}: gguf is not supported for {NAME}; give one that ends in {SAFETENSORS}")


def _layout_of(file: Path) -> Layout | None:
    shapes = {NAMING.published_of(name): shape for name, shape in WeightFiles([file]).shapes.items()}
    return Layout(True, _native_config(file, shapes)) if FIRST_LAYER in shapes else None


def _native_config(file: Path, shapes: Shapes) -> dict[str, Any]:
    try:
        config: dict[str, Any] = transformer_config(shapes)
    except ValueError as error:
        raise CheckpointError(f"{file}: its tensors are not those of a {TRANSFORMER_CLASS}: {error}") from None
    named = FILE_NAME.fullmatch(file.stem)
    if named:
        config["published_as"] = file.stem
        threshold = THRESHOLDS.get((named["size"], int(named["seconds"])))
        if threshold is not None:
            config["sparse_algo"] = f"nabla-{threshold}_{WINDOW}"
    return config


def _recognise_diffusers(folder: Path) -> Layout | None:
    # Of videos it is told by its transformer: the index of image to video names the pipeline of text to video.
    kind, file = read_json_object(folder / INDEX).get("_class_name"), folder / "transformer" / CONFIG
    if kind in PICTURE_PIPELINES:
        raise CheckpointError(f"{folder} is a {kind}, which makes pictures; only {NAME} checkpoints of video are read")
    if not exists(file):
        if kind in PIPELINES:
            raise CheckpointError(f"{file} is missing; {AGAIN}")
        return None
    config = read_json_object(file)
    if config.get("_class_name") != TRANSFORMER_CLASS:
        return None
    own = _diffusers_algorithm(file, config)
    return Layout(False, config if own is None else {"sparse_algo": own} | config)


def _diffusers_algorithm(file: Path, config: Mapping[str, Any]) -> str | None:
    """The attention that a configuration of diffusers names."""
    if config.get("attention_type") != "nabla":
        return None
    threshold = config.get("attention_P")
    window = [config.get(f"attention_w{axis}") for axis in "THW"]
    if not is_number(threshold) or not all(isinstance(n, int) and n > 0 for n in window):
        raise CheckpointError(f"{file}: attention_P {threshold!r} and attention_wT, _wH, _wW {window} are no NABLA's")
    return f"nabla-{threshold:g}_sta-{'-'.join(map(str, window))}"


def facts(layout: Layout) -> TransformerFacts:
    """See `Family.facts`."""
    width, axes = layout.config.get("model_dim"), layout.config.get("axes_dims") or (0,)
    whole = isinstance(width, int) and all(isinstance(axis, int) for axis in axes) and sum(axes) > 0
    heads, layers = width // sum(axes) if whole else None, layout.config.get("num_visual_blocks")
    return TransformerFacts(heads, POSITIONS, TEXT_LENGTH, layers)


def published_as(layout: Layout) -> Published | None:
    """What the name says that the transformer's file was published by, if it has such a one."""
    named = FILE_NAME.fullmatch(str(layout.config.get("published_as", "")))
    return Published(named["size"], named["task"], named["training"] or "", int(named["seconds"])) if named else None


def kinds_of(layout: Layout) -> frozenset[str]:
    """See `Family.kinds_of`: by the sizes, where they are published ones, and the file's name, where it is one."""
    config, named = layout.config, published_as(layout)
    there = config.get("model_dim"), config.get("num_visual_blocks")
    sizes = [size for size, own in SIZES.items() if own == there] or list(SIZES)
    tasks = [named.task] if named else ["t2v", "i2v"]
    return frozenset(f"kandinsky5-{size}-{task}" for size in sizes for task in tasks)


def inputs_of(layout: Layout | None, kind: str | None) -> MediaInputs:
    """See `Family.inputs_of`."""
    possible = {kind} & KINDS if kind is not None or layout is None else kinds_of(layout)
    pictured, image = possible & PICTURE_KINDS, frozenset({"image"})
    if not pictured:
        return MediaInputs()
    return MediaInputs(required=image) if pictured == possible else MediaInputs(optional=image)


def algorithms_at_other_sizes(layout: Layout) -> tuple[str, ...]:
    """See `Family.algorithms_at_other_sizes`."""
    named = published_as(layout)
    if layout.config.get("model_dim") != SIZES["pro"][0] and (named is None or named.size != "pro"):
        return ()
    # In diffusers' layout nothing tells for how many seconds it is.
    return tuple(PRO_AT_SD.values()) if named is None else (PRO_AT_SD[named.seconds],)


def defaults_of(layout: Layout, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """See `Family.defaults`: what the native program's configuration of a published file says."""
    named = published_as(layout)
    is_pro = layout.config.get("model_dim") == SIZES["pro"][0]
    training = named.training if named else ""
    # Distilled weights do in 16 steps what others do in 50, and like those trained for it need no guidance.
    sampling = {
        "solver": "euler",
        "steps": 16 if training == "distilled16steps" else 50,
        "shift": 5.0,
        "guide_scale": 1.0 if training in ("distilled16steps", "nocfg") else 5.0,
        "negative_prompt": NEGATIVE_PROMPT,
    }
    seconds = named.seconds if named else 5
    return {"sampling": sampling, "video": {"size": HD if is_pro else SD, "frame_num": seconds * FPS + 1, "fps": FPS}}
