"""A folder of Wan2.1 text-to-video, in the published or in diffusers' layout: what tells it, what lies where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla.config import is_count
from wan.checkpoints.component_files import DIFFUSERS_STEM, TRANSFORMERS_STEM, ComponentFiles
from wan.checkpoints.file_errors import CheckpointError, exists, read_json_object
from wan.checkpoints.locate import CONFIG, INDEX
from wan.models.family import HubFiles, Layout, MediaInputs, TransformerFacts
from wan.models.wan.kinds import KINDS, kind_of

NAME = "Wan2.1 text-to-video"
TOKENIZER_FOLDER = "google/umt5-xxl"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
COMPONENTS = (
    ComponentFiles("transformer", DIFFUSERS_STEM, DIFFUSERS_STEM),
    ComponentFiles("vae", DIFFUSERS_STEM, VAE_FILE),
    ComponentFiles("text_encoder", TRANSFORMERS_STEM, TEXT_ENCODER_FILE),
)
# What transformers that see pictures have beside these.
IMAGE_ENCODER = ComponentFiles("image_encoder", TRANSFORMERS_STEM, IMAGE_ENCODER_FILE)
HUB_FILES = HubFiles(
    configurations=(CONFIG, INDEX, "transformer/config.json"),
    others=("*.json", "*.safetensors", "*.pth", f"{TOKENIZER_FOLDER}/*", "tokenizer/*", "defaults.yaml"),
    transformer=("diffusion_pytorch_model*", "transformer/*.safetensors"),
)
TEXT_LENGTH = 512
ROTARY_POSITIONS = 1024
# Eight times Wan's; a text encoder's memory grows with its square.
MAX_TEXT_LENGTH = 4096
MAX_POSITIONS = 2**15
PIPELINE_CLASS, TRANSFORMER_CLASS = "WanPipeline", "WanTransformer3DModel"
# Of what lies beside a transformer in diffusers' layout.
COMPONENT_CLASSES = ("AutoencoderKLWan", "UMT5EncoderModel", "UniPCMultistepScheduler")
WAN22_FOLDERS = ("high_noise_model", "low_noise_model")
# Names of models of diffusers; of Wan's own programs they are WanModel and the like.
OF_DIFFUSERS = re.compile(r"^Autoencoder|Transformer\w*Model$")
# What a transformer's configuration may say beyond what diffusers takes.
OWN_KEYS = ("sparse_algo", "text_len")


def recognise(folder: Path) -> Layout | None:
    """See `Family.recognise`; other kinds of Wan are refused by what they are."""
    if exists(folder / INDEX):
        return _recognise_diffusers(folder)
    if any(exists(folder / expert) for expert in WAN22_FOLDERS):
        raise CheckpointError(
            f"{folder} is Wan2.2, of two transformers ({', '.join(WAN22_FOLDERS)}); only {NAME} "
            "checkpoints are supported, such as Wan-AI/Wan2.1-T2V-1.3B"
        )
    if not exists(folder / CONFIG):
        return None
    config = read_json_object(folder / CONFIG)
    kind = config.get("_class_name")
    if isinstance(kind, str) and OF_DIFFUSERS.search(kind) and kind not in (TRANSFORMER_CLASS, *COMPONENT_CLASSES):
        return None
    _check_text_to_video(folder, config)
    _check_lengths(folder / CONFIG, config)
    return Layout(True, config, "t2v")


def _recognise_diffusers(folder: Path) -> Layout | None:
    index = read_json_object(folder / INDEX)
    if index.get("_class_name") != PIPELINE_CLASS:
        return None
    # diffusers writes a component that a pipeline does not have as [null, null].
    if index.get("expand_timesteps") or index.get("transformer_2") not in (None, [None, None]):
        raise CheckpointError(f"{folder} is a Wan2.2 pipeline; only {NAME} checkpoints are supported")
    file = folder / "transformer" / CONFIG
    config = read_json_object(file)
    if config.get("_class_name", TRANSFORMER_CLASS) != TRANSFORMER_CLASS or config.get("image_dim"):
        raise CheckpointError(f"{file.parent} is not a text-to-video {TRANSFORMER_CLASS}")
    _check_lengths(file, config)
    return Layout(False, config, "t2v")


def _check_text_to_video(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("_class_name")
    if kind == TRANSFORMER_CLASS or kind in COMPONENT_CLASSES or config.get("model_type") == "umt5":
        above = folder.parent
        found = f"give {above}" if exists(above / INDEX) else f"give the folder above, with {INDEX}"
        raise CheckpointError(f"{folder} is one part of a checkpoint in diffusers' layout; {found}")
    if kind == "VaceWanModel" or config.get("vace_layers"):
        raise CheckpointError(f"{folder} is a VACE model; only {NAME} ('t2v') checkpoints are supported")
    if config.get("model_type", "t2v") != "t2v":
        raise CheckpointError(f"{folder} is a {config['model_type']!r} model; only 't2v' checkpoints are supported")


def _check_lengths(file: Path, config: Mapping[str, Any]) -> None:
    for key, most in (("text_len", MAX_TEXT_LENGTH), ("rope_max_seq_len", MAX_POSITIONS)):
        value = config.get(key, 1)
        if not is_count(value) or value == 0:
            raise CheckpointError(f"{file}: {key} is {value!r}, not a positive integer")
        if value > most:
            raise CheckpointError(f"{file}: {key} is {value}, but can be at most {most}")


def facts(layout: Layout) -> TransformerFacts:
    """See `Family.facts`."""
    config = layout.config
    return TransformerFacts(
        heads=config.get("num_heads" if layout.published else "num_attention_heads"),
        # The published layout has no word for them.
        positions=ROTARY_POSITIONS if layout.published else config.get("rope_max_seq_len", ROTARY_POSITIONS),
        text_length=config.get("text_len", TEXT_LENGTH),
    )


def kinds_of(layout: Layout) -> frozenset[str]:
    """See `Family.kinds_of`: its tensors tell."""
    return frozenset({kind_of(layout).name})


def inputs_of(layout: Layout | None, kind: str | None) -> MediaInputs:
    """See `Family.inputs_of`."""
    if layout is not None:
        return kind_of(layout).inputs
    return KINDS[kind].inputs if kind in KINDS else MediaInputs()


def defaults_of(layout: Layout, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """See `Family.defaults`: what the published program of its kind has otherwise than this one."""
    kind = kind_of(layout)
    own = {section: dict(values) for section, values in kind.defaults.items()}
    if size in kind.shifts:
        own["sampling"]["shift"] = kind.shifts[size]
    return own
