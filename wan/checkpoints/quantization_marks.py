"""What marks the weights of a safetensors file as quantised; what is not understood is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from wan.checkpoints.file_errors import CheckpointError
from wan.files.plain_data import parse_json

HEADER = "_quantization_metadata"
# What a marker may say of a layer whose values, times their scale, are its weights.
FLOAT8_FORMATS = ("float8_e4m3fn", "float8_e5m2", "F8_E4M3", "F8_E5M2")
# All that it may have; the second says how products are computed, which the weights do not depend on.
NO_MATTER = ("format", "full_precision_matrix_mult")
# Beside a layer's weight in a quantised file: of what is read, and of what is not.
SCALES = ("scale_weight", "weight_scale")
NOT_NEEDED = ("scale_input", "input_scale", "scaled_fp8")
MARKER = "comfy_quant"
# What quantises with a tensor of this name, the last piece of it, beside a layer's weight.
KINDS = {
    "weight_scale_2": "nvfp4, by two scales",
    "pre_quant_scale": "smoothed by a scale before the layer",
    "weight_scale_inv": "float8 in blocks, by inverse scales",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "qscales": "GPTQ or AWQ",
    "scales": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "wscales": "nunchaku",
    "wzeros": "nunchaku",
    "smooth_factor": "nunchaku",
}
# Within such a name: signs of what quantises in a way not listed, which is better refused than read as plain numbers.
SIGNS = ("scale", "quant", "zero_point", "convrot", "nvfp4", "absmax", "bnb", "awq", "gptq", "hadamard", "codebook")
# Has a sign in its name and is none: diffusers' name for a modulation.
OTHER_TENSORS = ("scale_shift_table",)
USE_INSTEAD = "use a file in bfloat16, float16, scaled float8 or GGUF"


def check_header(file: Path, metadata: Mapping[str, str]) -> None:
    """Raise `CheckpointError` for a file whose header says that its layers are quantised in a way not understood."""
    if HEADER not in metadata:
        return
    said = _parsed(file, HEADER, metadata[HEADER])
    layers = said.get("layers")
    if not isinstance(layers, dict):
        _refuse(file, f"{HEADER} in its header", said)
    for layer, marker in layers.items():
        _check_marker(file, f"{HEADER} of {layer[:100]!r}", marker)


def check_marker(file: Path, name: str, content: bytes) -> None:
    """Raise `CheckpointError` for a marker beside a layer, of this name, that says more than plain float8."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{file} is quantised, and {name!r} cannot be read; {USE_INSTEAD}") from None
    _check_marker(file, repr(name), _parsed(file, repr(name), text))


def check_name(file: Path, name: str) -> None:
    """Raise `CheckpointError` for a tensor whose name says that its layer is quantised in a way not understood."""
    last = name.rpartition(".")[2]
    if last in OTHER_TENSORS:
        return
    kind = KINDS.get(last)
    if kind is None and not any(sign in last.lower() for sign in SIGNS):
        return
    which = f" ({kind})" if kind else ""
    raise CheckpointError(f"{file} is quantised in a way that is not read{which}: it holds {name!r}; {USE_INSTEAD}")


def _check_marker(file: Path, where: str, marker: Any) -> None:
    if not isinstance(marker, dict) or marker.get("format") not in FLOAT8_FORMATS or set(marker) - set(NO_MATTER):
        _refuse(file, where, marker)


def _refuse(file: Path, where: str, said: Any) -> NoReturn:
    raise CheckpointError(
        f"{file} is quantised in a way that is not read: {where} says {str(said)[:200]}; {USE_INSTEAD}"
    )


def _parsed(file: Path, where: str, text: str) -> dict[str, Any]:
    try:
        said = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{file} is quantised, and {where} cannot be read ({error}); {USE_INSTEAD}") from None
    # What is no object becomes one without anything that the checks look for, so that they refuse it.
    return said if isinstance(said, dict) else {"": said}
