"""What the names in a LoRA file stand for: which layer, which factor, and which method if it is another than LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from nabla import InputError
from wan.checkpoints.naming import TransformerNaming

# Trainers put these before a layer's name, some of them several.
PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "module.", "dit.")
# Before names in which every dot is an underscore.
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
# peft and DiffSynth-Studio put an adapter's name between a factor and "weight".
FACTOR = re.compile(
    r"(?P<layer>.+?)\.(?:lora_(?P<kind>A|B|down|up)|lora\.(?P<old>down|up))(?:\.(?P<adapter>[^.]+))?\.(?P<of>weight|bias)"
)
DOWN = ("A", "down")
PLAIN_NAME = re.compile(r"[\w.-]+")
# Files that were extracted from whole models hold differences beside factors: their endings, and the tensors changed.
DIFFERENCES = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
MERGE = "merge it into its base model with the program that made it, and give that as --transformer"
# Pieces of names, the first that fits: what they are of, and what helps. Of other models the family knows them.
KINDS = (
    ("hada_", "LoHa, another method than LoRA", MERGE),
    ("lokr_", "LoKr, another method than LoRA", MERGE),
    ("dora_scale", "DoRA, another method than LoRA", MERGE),
    ("lora_magnitude_vector", "DoRA, another method than LoRA", MERGE),
    ("oft_", "OFT, another method than LoRA", MERGE),
    ("boft_", "OFT, another method than LoRA", MERGE),
    ("vera_lambda", "VeRA, another method than LoRA", MERGE),
    ("ia3_", "(IA)3, another method than LoRA", MERGE),
    (".on_input", "(IA)3, another method than LoRA", MERGE),
    ("lora_mid", "LoCon of three factors, of which two are read", MERGE),
    (".a1.weight", "GLoRA, another method than LoRA", MERGE),
    ("modules_to_save", "peft's whole modules beside its factors", MERGE),
    ("lora_te", "a LoRA of a text encoder too", "use one that was trained on the transformer alone"),
    ("text_encoder", "a LoRA of a text encoder too", "use one that was trained on the transformer alone"),
)


@dataclass
class Layer:
    """The names in a file that belong to one layer, by what they are."""

    down: str | None = None
    up: str | None = None
    alpha: str | None = None
    bias: str | None = None

    def names(self) -> list[str]:
        return [name for name in (self.down, self.up, self.alpha, self.bias) if name is not None]


@dataclass
class Contents:
    """What a file's names are: factors by the layer in the model, differences by the tensor in it, and the rest."""

    layers: dict[str, Layer] = field(default_factory=dict)
    differences: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def understand(path: Path, names: Sequence[str], model: nn.Module, naming: TransformerNaming) -> Contents:
    """Sort a file's names; raises `InputError` for a layer that stands in it twice."""
    table, found = _Targets(model, naming), Contents()
    for name in names:
        factor, (stem, _, last) = FACTOR.fullmatch(name), name.rpartition(".")
        kind: str | None
        if factor:
            # peft calls the layer that it wraps `base_layer`.
            target = table.weight(factor["layer"].removesuffix(".base_layer"))
            kind = "down" if (factor["kind"] or factor["old"]) in DOWN else "up"
            if factor["of"] == "bias":
                # Of the first factor none can be told from the second's.
                kind = "bias" if kind == "up" and target and table.has_bias(target) else None
        elif last == "alpha":
            target, kind = table.weight(stem), "alpha"
        elif last in DIFFERENCES:
            target, kind = table.tensor(stem, DIFFERENCES[last]), "difference"
        else:
            target = kind = None
        if target is None or kind is None:
            found.unknown.append(name)
        elif kind == "difference":
            _once(path, found.differences.get(target), name)
            found.differences[target] = name
        else:
            layer = found.layers.setdefault(target, Layer())
            _once(path, getattr(layer, kind), name)
            setattr(layer, kind, name)
    for target, layer in list(found.layers.items()):
        if layer.down is None or layer.up is None:
            found.unknown += layer.names()
            del found.layers[target]
    return found


def _once(path: Path, earlier: str | None, name: str) -> None:
    if earlier is not None:
        raise InputError(f"lora {path} holds {earlier!r} and {name!r}, of one layer; use a file of one LoRA")


class _Targets:
    """The model's tensors by the names that files have for them."""

    def __init__(self, model: nn.Module, naming: TransformerNaming):
        state = model.state_dict()
        self.own: dict[tuple[str, str], str] = {}
        for name in state:
            for spelled in (name, naming.to_published(name)):
                layer, _, kind = spelled.rpartition(".")
                # A flat name cannot be split again, since names have underscores too; so the model's are flattened.
                self.own[layer, kind] = self.own[layer.replace(".", "_"), kind] = name
        kinds = nn.Linear, nn.Conv3d
        self.layers = {name for name, module in model.named_modules() if isinstance(module, kinds)}
        self.state = state

    def weight(self, layer: str) -> str | None:
        """The layer of the model, of those that multiply, that a file calls this."""
        name = self.tensor(layer, "weight")
        target = name and name.removesuffix(".weight")
        return target if target in self.layers else None

    def tensor(self, layer: str, kind: str) -> str | None:
        tried = layer
        while True:
            # Prefixes are taken off one by one, and only while the name is not one of the model's.
            if (tried, kind) in self.own:
                return self.own[tried, kind]
            prefix = next((one for one in (*PREFIXES, *FLAT_PREFIXES) if tried.startswith(one)), None)
            if prefix is None:
                return None
            tried = tried[len(prefix) :]

    def has_bias(self, layer: str) -> bool:
        return f"{layer}.bias" in self.state


def mismatch(path: Path, count: int, unknown: Sequence[str], naming: TransformerNaming) -> InputError:
    """The error for a file of `count` weights of which `unknown` do not fit, in words for what they are."""
    sample, kind, remedy = _kind_of(unknown, naming)
    matching = count - len(unknown)
    if kind and not matching:
        return InputError(f"lora {path} is {kind}, which is not read: it holds {sample!r}; {remedy}")
    said = f", not for example {sample!r}" if sample else ""
    said += f", which is of {kind}" if kind else ""
    return InputError(f"lora {path}: {matching} of {count} weights match the transformer{said}; {remedy}")


def _kind_of(unknown: Iterable[str], naming: TransformerNaming) -> tuple[str, str, str]:
    names = list(unknown)
    for piece, kind, remedy in (*KINDS, *naming.lora_kinds):
        for name in names:
            if piece in name:
                return name, kind, remedy
    return next(iter(names), ""), "", naming.lora_remedy


def scale_by_peft(path: Path, config: Mapping[str, object], layer: str, rank: int) -> float:
    """What peft's `LoraConfig` multiplies the product of a layer's factors by; raises `InputError` if it is no LoRA."""
    if config.get("use_dora"):
        raise InputError(f"lora {path} is DoRA (use_dora), another method than LoRA, which is not read; {MERGE}")
    alpha = _by_pattern(path, config.get("alpha_pattern"), layer, config.get("lora_alpha", rank))
    # So compared, NaN is refused too; and True is an int in Python.
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
        raise InputError(f"lora {path}: lora_alpha of its configuration is {alpha!r}, but must be a number")
    # rsLoRA (Kalajdzievski 2023) divides by the root of the rank.
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _by_pattern(path: Path, patterns: object, layer: str, default: object) -> object:
    # As peft: a pattern is the end of a layer's name, from a dot on. Of those that are regular expressions one could be
    # made to take for ever.
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            plain = str(pattern).replace("\\.", ".").removeprefix("^").removesuffix("$")
            if not PLAIN_NAME.fullmatch(plain):
                raise InputError(
                    f"lora {path}: alpha_pattern of its configuration holds {pattern!r}, a regular expression, "
                    f"which is not read; {MERGE}"
                )
            if layer == plain or layer.endswith(f".{plain}"):
                return value
    return default
