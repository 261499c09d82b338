"""A ComfyUI node: NABLA in the self-attention of ComfyUI's own Wan models. See the README beside it.

For every attention ComfyUI calls what stands in `transformer_options["optimized_attention_override"]`, with q, k and v
as (B, S, heads * D), rotated. That says nothing of the video's shape, so a wrapper around the model's forward leaves
the grid of tokens and the sampling step beside it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.patcher_extension
from torch import Tensor

import nabla
from nabla import InputError, NablaConfig, Plan

OVERRIDE = "optimized_attention_override"
FORWARD = "nabla_forward"


class NablaAttention:
    """The node. It clones the model; what the clone runs is said in ComfyUI's log once for each size of video."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "model_patches/wan"
    DESCRIPTION = "Block-sparse self-attention for Wan: each head keeps the blocks that carry most of its attention."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        blocks = {"default": 0, "min": 0, "max": 999}
        return {
            "required": {
                "model": ("MODEL",),
                "threshold": ("FLOAT", share | {"default": 0.7, "tooltip": "share of probability to keep; 0: off"}),
                "keep": ("FLOAT", share | {"default": 0.0, "tooltip": "instead, share of blocks to keep; 0: off"}),
                "window_frames": ("INT", blocks | {"tooltip": "window in blocks, kept besides; 0: none"}),
                "window_rows": ("INT", blocks),
                "window_columns": ("INT", blocks),
                "dense_steps": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1000.0,
                        "step": 0.05,
                        "tooltip": "first steps that run dense; below 1 a share of the run's steps",
                    },
                ),
            }
        }

    def apply(
        self,
        model: Any,
        threshold: float,
        keep: float,
        window_frames: int,
        window_rows: int,
        window_columns: int,
        dense_steps: float,
    ) -> tuple[Any]:
        window = window_frames, window_rows, window_columns
        # A slider cannot be empty: 0 says off, for which the config has None.
        shares = {"threshold": threshold or None, "keep": keep or None}
        # Whole numbers come as floats, and 1.0 is one step here, as in workflows that were saved as whole numbers.
        first = int(dense_steps) if float(dense_steps).is_integer() else dense_steps
        config = NablaConfig(**shares, window=window if any(window) else None, dense_steps=first)
        network = model.get_model_object("diffusion_model")
        # A network without blocks has [None], which has no self-attention either.
        if not all(hasattr(block, "self_attn") for block in getattr(network, "blocks", [None])):
            raise InputError(f"{type(network).__name__} is not one of ComfyUI's Wan models; NABLA fits only those")
        model = model.clone()
        options = model.model_options.setdefault("transformer_options", {})
        options[OVERRIDE] = override_of(config, options.get(OVERRIDE))
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "nabla", leave_grid)
        return (model,)


def leave_grid(
    executor: Any,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    clip_fea: Tensor | None = None,
    time_dim_concat: Tensor | None = None,
    transformer_options: dict[str, Any] | None = None,
    **others: Any,
) -> Tensor:
    """Around the forward of a Wan model: leave (grid, step, steps) in the options that its attentions are given."""
    options = dict(transformer_options or {})
    # x is (B, C, T, h, w); ComfyUI pads each axis to whole patches, so the counts are rounded up.
    frames, *size = (-(-n // p) for n, p in zip(x.shape[2:], executor.class_obj.patch_size))
    if time_dim_concat is not None:
        # Its tokens are put behind those of the video's frames.
        frames += -(-time_dim_concat.shape[2] // executor.class_obj.patch_size[0])
    grid = frames, *size
    # `override_of` knows self-attention by as many keys as queries, which cross-attention must not have too.
    lengths = [context.shape[1]] + ([] if clip_fea is None else [clip_fea.shape[-2]])
    if math.prod(grid) in (*lengths, sum(lengths)):
        raise InputError(
            f"a video of {math.prod(grid)} tokens cannot be told from its text or picture, which has as many; "
            "choose another size or length, or leave NABLA out"
        )
    options[FORWARD] = grid, step_of(options), len(options["sample_sigmas"]) - 1
    return executor(x, timestep, context, clip_fea, time_dim_concat, options, **others)


def step_of(options: dict[str, Any]) -> int:
    """The sampling step of a forward, from 0; one between two sigmas, as of second order, belongs to the step begun."""
    walk, now = options.get("sample_sigmas"), options.get("sigmas")
    if walk is None or now is None:
        raise InputError("this ComfyUI does not say which step runs (sample_sigmas, sigmas); update it")
    now = now.flatten()[0].to(walk)
    # `walk` falls: the sigmas not below this one are those of the steps begun. With a tolerance, as either may be
    # rounded.
    return max(0, int((walk >= now - 1e-5 * now.abs()).sum()) - 1)


def override_of(config: NablaConfig, before: Callable | None) -> Callable:
    """What ComfyUI is to call for each attention; `before` stood in its place, and does what is not sparse."""
    plans: dict[tuple, Plan] = {}

    def attend(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        grid, step, steps = kwargs["transformer_options"].get(FORWARD) or (None, 0, 1)
        is_self = q.shape[-2] == k.shape[-2]
        if config.is_dense or step < config.dense_step_count(steps) or not is_self:
            call = func if before is None else partial(before, func)
            return call(q, k, v, heads, *args, **kwargs)
        _check(q, grid, args, kwargs)
        # (B, S, heads * D) -> (B, S, heads, D), and back at the end.
        q, k, v = (x.unflatten(2, (heads, -1)) for x in (q, k, v))
        key = grid, q.device, q.dtype, q.shape[-1]
        if key not in plans:
            plans[key] = nabla.plan(grid, config, q.device, q.dtype, q.shape[-1])
            logging.info("attention: %s", plans[key].describe())
        return nabla.attend(q, k, v, plans[key]).flatten(2)

    return attend


def _check(q: Tensor, grid: tuple[int, int, int] | None, args: tuple, kwargs: dict[str, Any]) -> None:
    if grid is None:
        raise InputError("this forward does not come from one of ComfyUI's Wan models; leave NABLA out")
    if q.ndim != 3 or any(x is not None for x in (*args, kwargs.get("mask"))) or kwargs.get("skip_output_reshape"):
        raise InputError("NABLA takes (batch, tokens, width) without a mask; this ComfyUI calls attention otherwise")
    if q.shape[1] != math.prod(grid):
        raise InputError(
            f"{q.shape[1]} tokens are not the {math.prod(grid)} of the video's grid {grid}: this model adds some, "
            "as of a reference picture, which NABLA cannot place; leave it out"
        )


NODE_CLASS_MAPPINGS = {"NablaAttention": NablaAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"NablaAttention": "NABLA attention (Wan)"}
