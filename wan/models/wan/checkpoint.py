"""A checkpoint, as a directory or a hub id, in the published or in diffusers' layout: what it is and what it says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from nabla import InputError, NablaConfig
from nabla.config import is_count
from wan.checkpoints.reading import CheckpointError, exists, read_json, unreadable
from wan.config.settings import LORA_FILE, SamplingSettings, Settings, attention_config, read_settings, resolve

TOKENIZER_FOLDER = "google/umt5-xxl"
DEFAULTS_FILE = "defaults.yaml"
TEXT_LENGTH = 512
ROTARY_POSITIONS = 1024
# Eight times Wan's; a text encoder's memory grows with its square.
MAX_TEXT_LENGTH = 4096
MAX_POSITIONS = 2**15
TRANSFORMER_CLASS = "WanTransformer3DModel"
PART_CLASSES = ("AutoencoderKLWan", "UMT5EncoderModel", "UniPCMultistepScheduler")
WAN22_FOLDERS = ("high_noise_model", "low_noise_model")
VAE_FILE = "Wan2.1_VAE.pth"
WEIGHT_ENDINGS = (".safetensors", ".gguf", ".pth", ".pt", ".ckpt", ".bin")
# What a transformer's configuration may say beyond what diffusers takes.
OWN_KEYS = ("sparse_algo", "text_len")
CONFIGURATIONS = ["config.json", "model_index.json", "transformer/config.json"]
WEIGHT_PATTERNS = ["*.json", "*.safetensors", "*.pth", f"{TOKENIZER_FOLDER}/*", "tokenizer/*", DEFAULTS_FILE]
TRANSFORMER_WEIGHTS = ["diffusion_pytorch_model*", "transformer/*.safetensors"]


@dataclass(frozen=True)
class Checkpoint:
    """Where the parts of a checkpoint lie. Build with `Checkpoint.open`; `wan.models.wan.components` loads the parts.

    name: what it was opened by, a directory made absolute
    config: of the transformer, as its JSON says
    """

    name: str
    folder: Path
    published: bool
    config: dict[str, Any]

    @classmethod
    def open(cls, name: str | Path, with_transformer: bool = True) -> Checkpoint:
        """Find a checkpoint by directory or hub id (which is downloaded unless cached) and read its configuration.

        with_transformer: the transformer's weights are needed, and worth their download
        Raises `CheckpointError` if it cannot be had, or is not a Wan2.1 text-to-video checkpoint.
        """
        folder = _directory(name)
        if folder is not None:
            return cls(str(folder), folder, *_read_configuration(folder))
        # The configuration first: a model of another kind should not cost its whole download.
        _read_configuration(_download(str(name), CONFIGURATIONS))
        left_out = None if with_transformer else TRANSFORMER_WEIGHTS
        folder = _download(str(name), CONFIGURATIONS + WEIGHT_PATTERNS, left_out)
        return cls(str(name), folder, *_read_configuration(folder))

    @property
    def text_length(self) -> int:
        """Rows of text states that the transformer sees."""
        return self.config.get("text_len", TEXT_LENGTH)

    @property
    def heads(self) -> int:
        """Attention heads of the transformer."""
        heads = self.config.get("num_heads" if self.published else "num_attention_heads")
        if not is_count(heads) or heads == 0:
            raise CheckpointError(f"{self.folder}: its configuration gives {heads!r} heads, not a positive integer")
        return heads

    @property
    def positions(self) -> int:
        """Of the transformer's rotary table, along each axis."""
        # The published layout has no word for them.
        return ROTARY_POSITIONS if self.published else self.config.get("rope_max_seq_len", ROTARY_POSITIONS)

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / (TOKENIZER_FOLDER if self.published else "tokenizer")

    @property
    def settings_layers(self) -> tuple[dict[str, Any], ...]:
        """The settings that a checkpoint brings, highest in rank first: its defaults file, and its own algorithm.

        Raises `InputError` if the file is not a mapping of settings, or names a checkpoint or a prompt.
        """
        path = self.folder / DEFAULTS_FILE
        defaults = read_settings(path) if exists(path) else {}
        if unfit := {"checkpoint", "prompt"} & defaults.keys():
            raise CheckpointError(f"{path} may not name a {sorted(unfit)[0]}; remove it")
        return defaults, self.own_algorithm

    def resolve(self, *above: Mapping[str, Any]) -> Settings:
        """The settings of layers that rank above the checkpoint's own, and of those."""
        try:
            return resolve({"checkpoint": self.name}, *above, *self.settings_layers)
        except InputError:
            # An algorithm that is not understood is no fault of the layers above; say where it stands.
            self.own_attention()
            raise

    @property
    def own_algorithm(self) -> dict[str, Any]:
        """The attention that the weights were fine-tuned for, as a layer of settings; empty if they do not say."""
        named = self.config.get("sparse_algo")
        return {} if named is None else {"attention": {"algorithm": named}}

    def own_attention(self) -> NablaConfig | None:
        """`own_algorithm` as a config; raises `CheckpointError` if it is not understood."""
        if not self.own_algorithm:
            return None
        try:
            return attention_config(self.own_algorithm["attention"])
        except InputError as error:
            raise CheckpointError(f"{self.folder}, sparse_algo of its configuration: {error}") from None

    def own_sampling(self) -> SamplingSettings:
        """How the checkpoint is sampled where nothing says else."""
        return self.resolve({"prompt": "none", "attention": {"algorithm": "dense"}}).sampling

    def require_tokenizer(self) -> None:
        """Raise `CheckpointError` if there is no tokenizer, without which a prompt cannot be encoded."""
        if not exists(self.tokenizer_folder / "tokenizer.json"):
            raise CheckpointError(
                f"{self.tokenizer_folder / 'tokenizer.json'} is missing, so prompts cannot be read; "
                "download the checkpoint again"
            )


def _directory(name: str | Path) -> Path | None:
    """The folder of this name, None for what may be a hub id; raises `CheckpointError` for any other path."""
    try:
        folder = Path(name).expanduser()
        if not str(name) or not exists(folder):
            return None
        folder = folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        return None
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {name} is a single file; give it as --transformer (transformer: in a config), and with "
            "--ckpt_dir the folder of its base checkpoint, which has the VAE, the text encoder and the tokenizer"
        )
    try:
        os.listdir(folder)
    except OSError as error:
        raise CheckpointError(unreadable(folder, error)) from None
    return folder


def _read_configuration(folder: Path) -> tuple[bool, dict[str, Any]]:
    """Whether a folder is in the published layout, and its transformer's configuration; only for text-to-video."""
    index = folder / "model_index.json"
    if not exists(index):
        _check_published_folder(folder)
        config = read_json(folder / "config.json")
        _check_text_to_video(folder, config)
        _check_lengths(folder / "config.json", config)
        return True, config
    pipeline = read_json(index)
    kind = pipeline.get("_class_name")
    second = pipeline.get("transformer_2")
    if kind == "WanPipeline" and (pipeline.get("expand_timesteps") or (second not in (None, [None, None]))):
        kind = "Wan2.2 pipeline"
    if kind != "WanPipeline":
        raise CheckpointError(f"{folder} is a {kind}; only Wan2.1 text-to-video checkpoints are supported")
    config = read_json(folder / "transformer" / "config.json")
    if config.get("_class_name", TRANSFORMER_CLASS) != TRANSFORMER_CLASS or config.get("image_dim"):
        raise CheckpointError(f"{folder / 'transformer'} is not a text-to-video {TRANSFORMER_CLASS}")
    _check_lengths(folder / "transformer" / "config.json", config)
    return False, config


def _check_published_folder(folder: Path) -> None:
    """Raise `CheckpointError` for a folder of another kind than the published one, in words for what it is."""
    if any(exists(folder / inner / LORA_FILE) for inner in ("", "lora")):
        raise CheckpointError(
            f"{folder} holds a LoRA and no weights of a transformer; give it as --lora, and with --ckpt_dir the "
            "checkpoint that it was trained on"
        )
    if any(exists(folder / expert) for expert in WAN22_FOLDERS):
        raise CheckpointError(
            f"{folder} is Wan2.2, of two transformers ({', '.join(WAN22_FOLDERS)}); only Wan2.1 text-to-video "
            "checkpoints are supported, such as Wan-AI/Wan2.1-T2V-1.3B"
        )
    if exists(folder / "config.json"):
        return
    for inner in sorted(folder.iterdir()):
        if exists(inner / "model_index.json") or (exists(inner / "config.json") and exists(inner / VAE_FILE)):
            raise CheckpointError(f"{folder} is the folder above a checkpoint; give {inner}")
    if exists(folder / VAE_FILE):
        return
    if single := sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf")):
        raise CheckpointError(
            f"{folder} has no config.json, and so is no checkpoint; it holds {single[0]!r}, which may be given as "
            "--transformer with the folder of its base checkpoint as --ckpt_dir"
        )


def _check_text_to_video(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("_class_name")
    if kind == TRANSFORMER_CLASS or kind in PART_CLASSES or config.get("model_type") == "umt5":
        above = folder.parent
        found = (
            f"give {above}" if exists(above / "model_index.json") else "give the folder above, with model_index.json"
        )
        raise CheckpointError(f"{folder} is one part of a checkpoint in diffusers' layout; {found}")
    if kind == "VaceWanModel" or config.get("vace_layers"):
        raise CheckpointError(f"{folder} is a VACE model; only Wan2.1 text-to-video ('t2v') checkpoints are supported")
    if config.get("model_type", "t2v") != "t2v":
        raise CheckpointError(f"{folder} is a {config['model_type']!r} model; only 't2v' checkpoints are supported")


def _check_lengths(file: Path, config: Mapping[str, Any]) -> None:
    for key, most in (("text_len", MAX_TEXT_LENGTH), ("rope_max_seq_len", MAX_POSITIONS)):
        value = config.get(key, 1)
        if not is_count(value) or value == 0:
            raise CheckpointError(f"{file}: {key} is {value!r}, not a positive integer")
        if value > most:
            raise CheckpointError(f"{file}: {key} is {value}, but can be at most {most}")


def check_hub_id(name: str) -> None:
    """Raise `CheckpointError` for what is not of the form owner/name; whether there is such a one is not looked up."""
    parts = name.split("/")
    if name.endswith(WEIGHT_ENDINGS):
        raise CheckpointError(
            f"checkpoint {name!r} is a name of a file of weights, which is not here; --ckpt_dir takes a folder, and "
            "--transformer such a file"
        )
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..") or name.startswith("~"):
        raise CheckpointError(f"checkpoint {name!r} is neither a directory nor a hub id of the form owner/name")


def _download(name: str, patterns: list[str], left_out: list[str] | None = None) -> Path:
    check_hub_id(name)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=left_out))
    except (HTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(". ") if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {name} is not a directory here and could not be downloaded ({reason}); get it on a connected "
            f"machine with 'hf download {name} --local-dir DIR' and pass --ckpt_dir DIR (checkpoint=DIR to training), "
            "or run without it on random weights: 'python scripts/make_random_checkpoint.py --model nano --out DIR'"
        ) from error
