"""A folder of Wan, in the published or in diffusers' layout: what lies where, and what its kind means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nabla.checks import is_count
from wan.checkpoints.component_files import DIFFUSERS_STEM, TRANSFORMERS_STEM, ComponentFiles
from wan.checkpoints.locate import CONFIG, INDEX
from wan.checkpoints.saving import save_json
from wan.config.model_settings import EXPERTS
from wan.models.family import HubFiles, Layout, MediaInputs, TransformerFacts
from wan.models.wan.geometry import GEOMETRY
from wan.models.wan.kinds import KINDS, kind_of

NAME = "Wan"
TOKENIZER_FOLDER = "google/umt5-xxl"
VAE_FILE, VAE_FILE_5B = "Wan2.1_VAE.pth", "Wan2.2_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TASK_FILE = "configuration.json"
EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")
TRANSFORMER = ComponentFiles("transformer", DIFFUSERS_STEM, DIFFUSERS_STEM)
# Of the two experts, in the order in which they run.
EXPERT_FILES = tuple(
    ComponentFiles(name, DIFFUSERS_STEM, f"{folder}/{DIFFUSERS_STEM}")
    for name, folder in zip(("transformer", "transformer_2"), EXPERT_FOLDERS)
)
VAE = ComponentFiles("vae", DIFFUSERS_STEM, VAE_FILE)
VAE_5B = ComponentFiles("vae", DIFFUSERS_STEM, VAE_FILE_5B)
TEXT_ENCODER = ComponentFiles("text_encoder", TRANSFORMERS_STEM, TEXT_ENCODER_FILE)
# What transformers that see pictures have beside these.
IMAGE_ENCODER = ComponentFiles("image_encoder", TRANSFORMERS_STEM, IMAGE_ENCODER_FILE)
_FOLDERS = (*(files.name for files in EXPERT_FILES), "vae", "text_encoder", "image_encoder", "scheduler")
HUB_FILES = HubFiles(
    configurations=(CONFIG, INDEX, "transformer/config.json", *(f"{folder}/{CONFIG}" for folder in EXPERT_FOLDERS)),
    # Without xlm-roberta-large/, the tokenizer of a part of CLIP that is not used.
    others=(
        CONFIG,
        INDEX,
        TASK_FILE,
        f"{DIFFUSERS_STEM}*.json",
        *(f"{folder}/*.json" for folder in (*_FOLDERS, *EXPERT_FOLDERS)),
        "*.safetensors",
        "*.pth",
        f"{TOKENIZER_FOLDER}/*",
        "tokenizer/*",
        "defaults.yaml",
    ),
    transformer=(f"{DIFFUSERS_STEM}*", "transformer/*.safetensors"),
    experts={
        expert: (f"{files.published}*.safetensors", f"{files.name}/*.safetensors")
        for expert, files in zip(EXPERTS, EXPERT_FILES)
    },
)
TEXT_LENGTH = 512
ROTARY_POSITIONS = 1024
# Eight times Wan's; a text encoder's memory grows with its square.
MAX_TEXT_LENGTH = 4096
MAX_POSITIONS = 2**15
# What a transformer's configuration may say beyond what diffusers takes.
OWN_KEYS = ("sparse_algo", "text_len")


def components_of(layout: Layout) -> tuple[ComponentFiles, ...]:
    """See `Family.components_of`."""
    kind = kind_of(layout)
    transformers = EXPERT_FILES if kind.experts else (TRANSFORMER,)
    vae = VAE if kind.geometry == GEOMETRY else VAE_5B
    return (*transformers, vae, TEXT_ENCODER, *((IMAGE_ENCODER,) if kind.sees_pictures else ()))


def facts(layout: Layout) -> TransformerFacts:
    """See `Family.facts`."""
    config = layout.config
    return TransformerFacts(
        heads=config.get("num_heads" if layout.published else "num_attention_heads"),
        # The published layout has no word for them.
        positions=ROTARY_POSITIONS if layout.published else config.get("rope_max_seq_len", ROTARY_POSITIONS),
        text_length=config.get("text_len", TEXT_LENGTH),
        layers=_layers(layout),
    )


def _layers(layout: Layout) -> int | None:
    # VACE's own blocks count too, and its published configuration need not name them.
    hints = layout.config.get("vace_layers", None if layout.kind == "vace" else ())
    own = layout.config.get("num_layers")
    return own + len(hints) if is_count(own) and isinstance(hints, (list, tuple)) else None


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


def write_task(kind: str, folder: Path) -> None:
    """What the published layout of two transformers has at its root in place of a configuration."""
    task = "image-to-video" if KINDS[kind].inputs.taken else "text-to-video"
    save_json({"framework": "Pytorch", "task": task}, folder / TASK_FILE)
