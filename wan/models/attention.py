"""NABLA in the transformer of any family: put in, take out."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nabla import InputError, NablaConfig
from wan.attention import apply
from wan.attention.spec import TransformerSpec
from wan.models.registry import FAMILIES


def apply_attention(transformer: nn.Module | Iterable[nn.Module], config: NablaConfig) -> None:
    """Replace the self-attention of a diffusers transformer by NABLA, in place; `remove_attention` undoes it.

    Given several at once, such as the two experts of a Wan2.2 pipeline, their sampling steps are counted together for
    `config.dense_steps`; one given alone is counted alone. See `wan.attention.apply.apply_attention`, also for errors.
    """
    transformers = _each(transformer)
    specs = [spec_of(one) for one in transformers]
    # Several are the experts of one pipeline, and so of one family.
    if transformers:
        apply.apply_attention(transformers, config, specs[0])


def remove_attention(transformer: nn.Module | Iterable[nn.Module]) -> None:
    """Give transformers back the attention that they had before `apply_attention`; nothing happens to others."""
    for one in _each(transformer):
        apply.remove_attention(one)


def spec_of(transformer: nn.Module) -> TransformerSpec:
    """What the machinery has to know of a transformer; raises `InputError` for one of no family."""
    specs = [spec for family in FAMILIES for spec in family.load_transformer_specs()]
    for spec in specs:
        if isinstance(transformer, spec.kind):
            return spec
    known = " or a ".join(spec.kind.__name__ for spec in specs)
    raise InputError(f"{type(transformer).__name__} is not a {known}; the attention fits only those")


def _each(transformer: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """One or several transformers, each out of the wrapper that `torch.compile(model)` puts around it."""
    several = [transformer] if isinstance(transformer, nn.Module) else transformer
    return [getattr(one, "_orig_mod", one) for one in several]
