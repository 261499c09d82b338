"""A checkpoint, as a directory or a hub id, in the published or in diffusers' layout: what it is and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from nabla import InputError, NablaConfig
from nabla.config import is_count
from wan.config import LORA_FILE, SamplingSettings, Settings, attention_config, read_settings, resolve
from wan.weights import CheckpointError, read_json

TOKENIZER_FOLDER = "google/umt5-xxl"
DEFAULTS_FILE = "defaults.yaml"
TEXT_LENGTH = 512
ROTARY_POSITIONS = 1024
# What a transformer's configuration may say beyond what diffusers takes.
OWN_KEYS = ("sparse_algo", "text_len")
CONFIGURATIONS = ["config.json", "model_index.json", "transformer/config.json"]
WEIGHT_PATTERNS = ["*.json", "*.safetensors", "*.pth", f"{TOKENIZER_FOLDER}/*", "tokenizer/*", DEFAULTS_FILE]
TRANSFORMER_WEIGHTS = ["diffusion_pytorch_model*", "transformer/*.safetensors"]


@dataclass(frozen=True)
class Checkpoint:
    """Where the parts of a checkpoint lie. Build with `Checkpoint.open`; `wan.parts` loads the parts.

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
        return self.config.get("rope_max_seq_len", ROTARY_POSITIONS)

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / (TOKENIZER_FOLDER if self.published else "tokenizer")

    @property
    def settings_layers(self) -> tuple[dict[str, Any], ...]:
        """The settings that a checkpoint brings, highest in rank first: its defaults file, and its own algorithm.

        Raises `InputError` if the file is not a mapping of settings, or names a checkpoint or a prompt.
        """
        path = self.folder / DEFAULTS_FILE
        defaults = read_settings(path) if path.is_file() else {}
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
        if not (self.tokenizer_folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{self.tokenizer_folder / 'tokenizer.json'} is missing, so prompts cannot be read; "
                "download the checkpoint again"
            )


def _directory(name: str | Path) -> Path | None:
    try:
        folder = Path(name).expanduser()
        return folder.resolve() if str(name) and folder.is_dir() else None
    except (OSError, RuntimeError):
        return None


def _read_configuration(folder: Path) -> tuple[bool, dict[str, Any]]:
    """Whether a folder is in the published layout, and its transformer's configuration; only for text-to-video."""
    index = folder / "model_index.json"
    if not index.is_file():
        if any((folder / inner / LORA_FILE).is_file() for inner in ("", "lora")):
            raise CheckpointError(
                f"{folder} holds a LoRA and no weights of a transformer; give it as --lora, and with --ckpt_dir the "
                "checkpoint that it was trained on"
            )
        config = read_json(folder / "config.json")
        if config.get("model_type", "t2v") != "t2v":
            raise CheckpointError(f"{folder} is a {config['model_type']!r} model; only 't2v' checkpoints are supported")
        _check_text_length(folder / "config.json", config)
        return True, config
    pipeline = read_json(index)
    kind = pipeline.get("_class_name")
    second = pipeline.get("transformer_2")
    if kind == "WanPipeline" and (pipeline.get("expand_timesteps") or (second not in (None, [None, None]))):
        kind = "Wan2.2 pipeline"
    if kind != "WanPipeline":
        raise CheckpointError(f"{folder} is a {kind}; only Wan2.1 text-to-video checkpoints are supported")
    config = read_json(folder / "transformer" / "config.json")
    if config.get("_class_name", "WanTransformer3DModel") != "WanTransformer3DModel" or config.get("image_dim"):
        raise CheckpointError(f"{folder / 'transformer'} is not a text-to-video WanTransformer3DModel")
    _check_text_length(folder / "transformer" / "config.json", config)
    return False, config


def _check_text_length(file: Path, config: Mapping[str, Any]) -> None:
    length = config.get("text_len", TEXT_LENGTH)
    if not is_count(length) or length == 0:
        raise CheckpointError(f"{file}: text_len is {length!r}, not a positive integer")


def check_hub_id(name: str) -> None:
    """Raise `CheckpointError` for what is not of the form owner/name; whether there is such a one is not looked up."""
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..") or name.startswith("~"):
        raise CheckpointError(f"checkpoint {name!r} is neither a directory nor a hub id of the form owner/name")


def _download(name: str, patterns: list[str], left_out: list[str] | None = None) -> Path:
    check_hub_id(name)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=left_out))
    except (HTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(". ") if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {name} is not a directory here and could not be downloaded ({reason}); get it on a connected "
            f"machine with 'hf download {name} --local-dir DIR' and pass --ckpt_dir DIR (checkpoint=DIR to training), "
            "or run without it on random weights: 'python scripts/make_random_checkpoint.py --model nano --out DIR'"
        ) from error
