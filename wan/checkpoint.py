"""A checkpoint, as a directory or a hub id, in the published or in diffusers' layout, to its components."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

# diffusers prints about circular imports when it comes before transformers.
from diffusers import AutoencoderKLWan, WanTransformer3DModel  # isort: skip
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from wan import names
from wan.weights import CheckpointError, WeightFiles, load, read_json

TRANSFORMER_STEM = "diffusion_pytorch_model"
TEXT_ENCODER_STEM = "model"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_FILE = "Wan2.1_VAE.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
PAD_TOKEN = "<pad>"
DEFAULTS_FILE = "defaults.yaml"
TEXT_LENGTH = 512
HUB_PATTERNS = ["*.json", "*.safetensors", "*.pth", f"{TOKENIZER_FOLDER}/*", DEFAULTS_FILE]


@dataclass(frozen=True)
class Checkpoint:
    """Where the parts of a checkpoint lie. Build with `Checkpoint.open`; the `load_*` functions read the parts."""

    name: str
    folder: Path
    published: bool
    config: dict[str, Any]

    @classmethod
    def open(cls, name: str | Path) -> Checkpoint:
        """Find a checkpoint by directory or hub id (which is downloaded unless cached) and read its configuration.

        Raises `CheckpointError` if it cannot be had, or is not a Wan2.1 text-to-video checkpoint.
        """
        folder = Path(name).expanduser()
        if not folder.is_dir():
            folder = _download(str(name))
        published = not (folder / "model_index.json").is_file()
        config = read_json(folder / "config.json" if published else folder / "transformer" / "config.json")
        if published and config.get("model_type", "t2v") != "t2v":
            raise CheckpointError(f"{folder} is a {config['model_type']!r} model; only 't2v' checkpoints are supported")
        return cls(str(name), folder, published, config)

    @property
    def sparse_algorithm(self) -> str | None:
        """The attention that the weights were fine-tuned for, if they say so."""
        return self.config.get("sparse_algo")

    @property
    def text_length(self) -> int:
        """Rows of text states that the transformer sees."""
        return int(self.config.get("text_len", TEXT_LENGTH))

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / (TOKENIZER_FOLDER if self.published else "tokenizer")

    @functools.cached_property
    def weights(self) -> dict[str, WeightFiles]:
        """The weight files of each part. Raises `CheckpointError` if one is missing, truncated or corrupt."""
        if self.published:
            return {
                "transformer": WeightFiles.find(self.folder, TRANSFORMER_STEM),
                "text_encoder": WeightFiles([self.folder / TEXT_ENCODER_FILE]),
                "vae": WeightFiles([self.folder / VAE_FILE]),
            }
        return {
            "transformer": WeightFiles.find(self.folder / "transformer", TRANSFORMER_STEM),
            "text_encoder": WeightFiles.find(self.folder / "text_encoder", TEXT_ENCODER_STEM),
            "vae": WeightFiles.find(self.folder / "vae", TRANSFORMER_STEM),
        }

    def require_tokenizer(self) -> None:
        """Raise `CheckpointError` if there is no tokenizer, without which a prompt cannot be encoded."""
        if not (self.tokenizer_folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{self.tokenizer_folder / 'tokenizer.json'} is missing, so prompts cannot be read; "
                "download the checkpoint again"
            )


def load_transformer(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> WanTransformer3DModel:
    """The transformer, its norms, modulations and time embedding in float32 as diffusers keeps them."""
    weights = checkpoint.weights["transformer"]
    config = _published_transformer_config(checkpoint.config, weights) if checkpoint.published else checkpoint.config
    rename = functools.partial(names.published, rules=names.TRANSFORMER) if checkpoint.published else str
    model = _load(WanTransformer3DModel, config, weights, rename, dtype, device)
    own = model.config
    # The rotary tables are not saved with the weights, and meta construction left them without values.
    model.rope = WanRotaryPosEmbed(own.attention_head_dim, own.patch_size, own.rope_max_seq_len).to(device)
    model.condition_embedder.timesteps_proj = PublishedTimesteps(own.freq_dim)
    return model


class PublishedTimesteps(nn.Module):
    """Sinusoids of timesteps (B,) as float32 (B, channels), their angles in float64 as in the published program.

    diffusers' float32 angles alone move a forward by 6e-6 of its size, ten times all other differences together.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.half = channels // 2

    def forward(self, timestep: Tensor) -> Tensor:
        exponent = torch.arange(self.half, dtype=torch.float64, device=timestep.device) / self.half
        angle = timestep.double()[:, None] * torch.pow(10000, -exponent)
        return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def load_vae(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKLWan:
    weights = checkpoint.weights["vae"]
    if not checkpoint.published:
        config = read_json(checkpoint.folder / "vae" / "config.json")
        return _load(AutoencoderKLWan, config, weights, str, dtype, device)
    config = _published_vae_config(weights)
    rename = functools.partial(names.published_vae, residuals=config["num_res_blocks"] + 1)
    return _load(AutoencoderKLWan, config, weights, rename, dtype, device)


def load_text_encoder(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> UMT5EncoderModel:
    weights = checkpoint.weights["text_encoder"]
    if checkpoint.published:
        config = _published_text_config(weights)
        rename = functools.partial(names.published, rules=names.TEXT_ENCODER)
    else:
        config, rename = UMT5Config(**read_json(checkpoint.folder / "text_encoder" / "config.json")), str
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    own = [name for name in model.state_dict() if name != "encoder.embed_tokens.weight"]
    tied = {rename(name): name for name in own}
    if "encoder.embed_tokens.weight" in weights.shapes:
        tied["encoder.embed_tokens.weight"] = "encoder.embed_tokens.weight"
    return load(model, weights, tied, dtype, device, tie=model.tie_weights)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerFast | None:
    """The tokenizer exactly as `tokenizer.json` states it, or None if the checkpoint has none.

    transformers' AutoTokenizer would rebuild a T5 tokenizer, with other ids for unknown and Chinese characters.
    """
    if not (checkpoint.tokenizer_folder / "tokenizer.json").is_file():
        return None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint.tokenizer_folder)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise CheckpointError(f"{checkpoint.tokenizer_folder} is damaged ({error}); download it again") from error
    tokenizer.pad_token = tokenizer.pad_token or PAD_TOKEN
    return tokenizer


def _load(
    kind: type[nn.Module],
    config: dict[str, Any],
    weights: WeightFiles,
    rename: Callable[[str], str],
    dtype: torch.dtype,
    device: torch.device | str,
) -> nn.Module:
    settings = {key: value for key, value in config.items() if not key.startswith("_") and key != "sparse_algo"}
    try:
        with torch.device("meta"):
            model = kind(**settings)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{weights.files[0].parent}: its configuration does not fit {kind.__name__}: {error}")
    files_to_own = {rename(name): name for name in model.state_dict()}
    return load(model, weights, files_to_own, dtype, device, float32=tuple(model._keep_in_fp32_modules or ()))


def _published_transformer_config(config: dict[str, Any], weights: WeightFiles) -> dict[str, Any]:
    try:
        dim, heads = config["dim"], config["num_heads"]
        return {
            "patch_size": tuple(weights.shapes["patch_embedding.weight"][2:]),
            "num_attention_heads": heads,
            "attention_head_dim": dim // heads,
            "in_channels": config["in_dim"],
            "out_channels": config["out_dim"],
            "text_dim": weights.shapes["text_embedding.0.weight"][1],
            "freq_dim": config["freq_dim"],
            "ffn_dim": config["ffn_dim"],
            "num_layers": config["num_layers"],
            "eps": config["eps"],
        }
    except KeyError as error:
        raise CheckpointError(f"{weights.files[0].parent}: {error} is missing; it is not a Wan2.1 transformer") from None


def _published_vae_config(weights: WeightFiles) -> dict[str, Any]:
    """Sizes off the tensors. The encoder's list of stages is residual blocks, then one `resample` between stages."""
    shapes = weights.shapes
    try:
        base = shapes["encoder.conv1.weight"][0]
        count = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.downsamples."))
        resamples = [n for n in range(count) if f"encoder.downsamples.{n}.resample.1.weight" in shapes]
        widths = [shapes[f"encoder.downsamples.{n}.residual.6.weight"][0] for n in [*(r - 1 for r in resamples), count - 1]]
        return {
            "base_dim": base,
            "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
            "z_dim": shapes["conv2.weight"][0],
            "dim_mult": [width // base for width in widths],
            "num_res_blocks": resamples[0],
            "temperal_downsample": [f"encoder.downsamples.{n}.time_conv.weight" in shapes for n in resamples],
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{weights.files[0]} is not a Wan2.1 VAE ({error} is missing)") from None


def _published_text_config(weights: WeightFiles) -> UMT5Config:
    shapes = weights.shapes
    try:
        vocabulary, width = shapes["token_embedding.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        return UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=shapes["blocks.0.attn.q.weight"][0] // heads,
            d_ff=shapes["blocks.0.ffn.fc1.weight"][0],
            num_layers=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
        )
    except KeyError as error:
        raise CheckpointError(f"{weights.files[0]} is not a UMT5 encoder ({error} is missing)") from None


def _download(name: str) -> Path:
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise CheckpointError(f"checkpoint {name!r} is neither a directory nor a hub id of the form owner/name")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except (HTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(". ") if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {name} is not a directory here and could not be downloaded ({reason}); get it on a connected "
            f"machine with 'hf download {name} --local-dir DIR' and pass --ckpt_dir DIR, or run without it on random "
            "weights: 'python scripts/make_random_checkpoint.py --model nano --out DIR'"
        ) from error
