"""What stands beside the noise of a video that begins with more than text."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nabla import InputError
from wan.parallel.distributed import DistributedContext
from wan.sampling.loop import Conditions


class Condition(Tensor):
    """A tensor like any other, unbatched, (C, T, h, w) in float32, and with it what else guides the video.

    What is computed of one is a tensor and no more; `to` and copies have all that goes with it.

    clip: states (pictures, tokens, width) of the picture tower, where the transformer sees them
    references: how many latent frames of reference pictures stand in front of the video's
    context_scale: what the tensor's part in the video is multiplied by
    """

    clip: Tensor | None = None
    references: int = 0
    context_scale: float = 1.0

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, y: Tensor, clip: Tensor | None = None, references: int = 0, context_scale: float = 1.0) -> Condition:
        """One of a tensor, with what goes with it."""
        made: Any = y.as_subclass(cls)
        made.clip, made.references, made.context_scale = clip, references, context_scale
        return made

    @property
    def y(self) -> Tensor:
        """The tensor alone."""
        return self.as_subclass(Tensor)

    def to(self, *args: Any, **options: Any) -> Condition:
        clip = None if self.clip is None else self.clip.to(*args, **options)
        return Condition.of(self.y.to(*args, **options), clip, self.references, self.context_scale)

    def __deepcopy__(self, memo: dict[int, Any]) -> Condition:
        return Condition.of(*copy.deepcopy((self.y, self.clip), memo), self.references, self.context_scale)


class Guidance(NamedTuple):
    """What a guidance branch is made by: the prompt's or the negative one's text, and what is the same in both.

    text: states (B, L, C)
    given: what a `Condition` is, (1, C, T, h, w); None where a video begins with text alone
    pictures: its states of the picture tower, in the transformer's type
    references, scale: its `references` and `context_scale`
    """

    text: Tensor
    given: Tensor | None = None
    pictures: Tensor | None = None
    references: int = 0
    scale: float = 1.0


def guidance_of(texts: Iterable[Tensor | None], condition: Condition | None, dtype: torch.dtype) -> Conditions:
    """Both branches of their text states, with what stands beside the noise, which they share."""
    shared: tuple[Any, ...] = ()
    if condition is not None:
        pictures = None if condition.clip is None else condition.clip.to(dtype)
        shared = condition.y[None], pictures, condition.references, condition.context_scale
    return Conditions(*(None if text is None else Guidance(text, *shared) for text in texts))


def both_branches(conditions: Conditions) -> Guidance:
    """The branches as one batch, the prompt's first."""
    prompt, negative = conditions[:2]
    return prompt._replace(text=torch.cat((prompt.text, negative.text)))


def fitting(
    condition: Tensor | None, shape: tuple[int, ...], device: torch.device, noise: Tensor | None = None
) -> Condition:
    """A condition, or a tensor that stands for one without states of pictures, in float32 on a device.

    shape: that it must have, (C, T, h, w), None standing for what is as in the noise (B, C, T, h, w), if there is one
    Raises `InputError` for one that is missing or of another shape.
    """
    if condition is None:
        raise InputError(
            "conditions are missing: these videos are made of more than text; give what pipe.condition gave"
        )
    if not isinstance(condition, Tensor):
        raise InputError(
            f"conditions are a {type(condition).__name__}, but must be what pipe.condition gave, or a tensor"
        )
    own, wanted = tuple(condition.shape), list(shape)
    if noise is not None:
        wanted = [size if size is not None else noise.shape[n + 1] for n, size in enumerate(shape)]
    if len(own) != len(wanted) or any(size not in (None, there) for size, there in zip(wanted, own)):
        beside = "" if noise is None else f" beside noise of {tuple(noise.shape[1:])}"
        needed = ", ".join("any" if size is None else str(size) for size in wanted)
        raise InputError(f"conditions of shape {own} do not fit: they must be ({needed}){beside}")
    whole = condition if isinstance(condition, Condition) else Condition.of(condition)
    return whole.to(device, torch.float32)


def from_leader(condition: Condition | None, processes: DistributedContext | None, device: torch.device) -> Condition:
    """The leader's condition on all processes that share a video; on the others there is none before."""
    if processes is None:
        assert condition is not None, "one process has what it makes"
        return condition
    own = None
    if condition is not None:
        clip = None if condition.clip is None else tuple(condition.clip.shape)
        own = tuple(condition.shape), clip, condition.references, condition.context_scale
    y_shape, clip_shape, references, context_scale = processes.broadcast_object_from_leader(own)

    def share(mine: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        sent = torch.empty(shape, device=device) if mine is None else mine.contiguous()
        return processes.broadcast_from_leader(sent)

    y = share(None if condition is None else condition.y, y_shape)
    clip = None if clip_shape is None else share(None if condition is None else condition.clip, clip_shape)
    return Condition.of(y, clip, references, context_scale)
