"""Kandinsky-5's transformer for the machinery: where its parts are, and its attention, dense and by `nabla.attend`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_kandinsky import (
    Kandinsky5Attention,
    Kandinsky5AttnProcessor,
    Kandinsky5TransformerDecoderBlock,
)
from torch import Tensor, nn

from nabla.rotary import Rotary, rotate
from wan.attention.apply import applied_attention
from wan.attention.layer import LayerState
from wan.attention.spec import Argument, BlockList, ForwardInputs, TransformerSpec
from wan.sampling.solvers import TRAIN_TIMESTEPS

# diffusers' own, and norms of q and k, which are taken in float32 anyhow, with other weights by a slower kernel.
FLOAT32_MODULES = (*Kandinsky5Transformer3DModel._keep_in_fp32_modules, "query_norm", "key_norm")


# The place of `sparse_params` among the arguments of a forward.
SPARSE_PARAMS = 7


@dataclass(eq=False)
class TextMask:
    """Which rows of the padded texts of a forward are text, the same object in all layers; set before every forward.

    rows: (B, L) bool, True for text; None where no row is padding
    """

    rows: Tensor | None = None

    @contextmanager
    def of(self, rows: Tensor) -> Iterator[None]:
        """While texts are padded so; who calls the transformer without this gives it texts without padding."""
        self.rows = rows
        try:
            yield
        finally:
            self.rows = None


class KandinskyProcessor(Kandinsky5AttnProcessor):
    """Attention as diffusers has it, but for two things: rotated q and k are not rounded to bfloat16, which moves a
    float32 forward by 1.4e-3, and texts may be padded, so that compiled blocks see all of them in one shape.

    text: where the keys are text, which of them count; None where they are latents
    """

    def __init__(self, original: Kandinsky5AttnProcessor, text: TextMask | None = None):
        super().__init__()
        self.original, self.text = original, text
        self._attention_backend = original._attention_backend
        self._parallel_config = original._parallel_config

    def __call__(
        self,
        attn: Kandinsky5Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> Tensor:
        if sparse_params is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, rotary_emb, sparse_params)
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k = normalised(attn.query_norm, attn.to_query, hidden_states), normalised(attn.key_norm, attn.to_key, keys)
        v = heads_of(attn.to_value(keys), attn.query_norm)
        if rotary_emb is not None:
            rotary = rotary_of(rotary_emb)
            q, k = rotate(q, rotary), rotate(k, rotary)
        rows = None if self.text is None else self.text.rows
        out = dispatch_attention_fn(
            q,
            k,
            v,
            # (B, heads, queries, keys): the same for all heads and queries.
            attn_mask=None if rows is None else rows[:, None, None, :],
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.out_layer(out.flatten(2))


class SparseKandinskyProcessor(Kandinsky5AttnProcessor):
    """Self-attention by `nabla.attend` where the layer has a plan, and what was there before otherwise."""

    def __init__(self, original: Kandinsky5AttnProcessor, state: LayerState):
        super().__init__()
        self.original, self.state = original, state
        self._attention_backend = original._attention_backend
        self._parallel_config = original._parallel_config

    def __call__(
        self,
        attn: Kandinsky5Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> Tensor:
        state = self.state
        if state.plan is None:
            return self.original(attn, hidden_states, encoder_hidden_states, rotary_emb, sparse_params)
        rotary = rotary_of(rotary_emb)
        # v, which is not normalised, first: each is on its way to other processes while the next one is made.
        v = state.send(heads_of(attn.to_value(hidden_states), attn.query_norm), 2, rotary)
        q = state.send(normalised(attn.query_norm, attn.to_query, hidden_states), 0, rotary)
        k = state.send(normalised(attn.key_norm, attn.to_key, hidden_states), 1, rotary)
        return attn.out_layer(state.attend([q, k, v], len(hidden_states), rotary).flatten(2))


def heads_of(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """(B, tokens, C) as (B, tokens, heads, D), of the heads that a norm is for."""
    return x.unflatten(2, (-1, *norm.normalized_shape))


def normalised(norm: nn.RMSNorm, project: nn.Module, x: Tensor) -> Tensor:
    """q or k of tokens (B, tokens, C), normalised in float32: (B, tokens, heads, D)."""
    x = heads_of(project(x), norm)
    return norm(x.float()).type_as(x)


def rotary_of(rope: Tensor) -> Rotary:
    """diffusers' rotations (1 or B, tokens, 1, D / 2, 2, 2), the same for all of a batch, as nabla takes them."""
    cos, sin = rope[:1, ..., 0, 0], rope[:1, ..., 1, 0]
    return Rotary(cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1))


def rotation_bytes(tokens: int, head_size: int) -> int:
    """What a forward's rotations take: four float32 numbers a pair as diffusers has them, and as many for nabla."""
    return tokens * head_size // 2 * 4 * torch.float32.itemsize * 2


def install_processors(transformer: Kandinsky5Transformer3DModel) -> TextMask:
    """Put `KandinskyProcessor` in all attentions of a transformer, in place and once; before `apply_attention`.

    Returns the mask of its texts, to be set before every forward.
    """
    if (there := getattr(transformer, "text_mask", None)) is not None:
        return there
    assert applied_attention(transformer) is None, "they would take the place of its processors"
    text = transformer.text_mask = TextMask()
    for block in transformer.text_transformer_blocks:
        _install(block.self_attention, text)
    for block in transformer.visual_transformer_blocks:
        _install(block.self_attention, None)
        _install(block.cross_attention, text)
    return text


def remove_processors(transformer: Kandinsky5Transformer3DModel) -> None:
    """Undo `install_processors`, once `apply_attention` is undone; nothing happens to others."""
    if vars(transformer).pop("text_mask", None) is None:
        return
    for module in transformer.modules():
        if isinstance(module, Kandinsky5Attention):
            module.set_processor(module.processor.original)


def _install(attention: Kandinsky5Attention, text: TextMask | None) -> None:
    attention.set_processor(KandinskyProcessor(attention.processor, text))


def all_blocks(transformer: Kandinsky5Transformer3DModel) -> nn.ModuleList:
    """Those of the text, which run first, and those of the latents: what is quantised, sharded and streamed."""
    return nn.ModuleList([*transformer.text_transformer_blocks, *transformer.visual_transformer_blocks])


def finish_transformer(model: Kandinsky5Transformer3DModel, device: torch.device | str) -> None:
    """Give a transformer that was made on the meta device what is not saved with its weights, in float32."""
    time, text, visual = model.time_embeddings, model.text_rope_embeddings, model.visual_rope_embeddings
    # Made anew by their own classes, whose tables are then the only ones with memory; these have no weights.
    with torch.device("cpu"):
        fresh_time = type(time)(time.model_dim, 1, time.max_period)
        fresh_text = type(text)(text.dim, text.max_pos, text.max_period)
        fresh_visual = type(visual)(visual.axes_dims, visual.max_pos, visual.max_period)
    time.freqs = fresh_time.freqs.to(device)
    model.text_rope_embeddings = fresh_text.to(device)
    model.visual_rope_embeddings = fresh_visual.to(device)


def velocity_of(
    transformer: Kandinsky5Transformer3DModel,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    pooled: Tensor,
    scale: tuple[float, float, float],
    first_frame: Tensor | None = None,
) -> Tensor:
    """The velocity in float32 of latents (B, C, T, h, w) at timesteps (B,), of 0 to 1000.

    text, pooled: states (B, L, C) and (B, P); which rows count is for the mask that `install_processors` gives
    scale: of positions, see `wan.models.kandinsky.geometry.rope_scale`
    first_frame: latents (B, C, 1, h, w) of a picture that the video begins with. The model sees them in place of the
        first latent frame, and the velocity there leads to them on a straight line, whatever the solver
    """
    dtype = transformer.dtype
    if first_frame is not None:
        first_frame = first_frame.to(latents).expand(len(latents), -1, -1, -1, -1)
    grid = grid_of(transformer, latents.shape[2:])
    out = transformer(
        model_input(transformer, latents, first_frame).to(dtype),
        text.to(dtype),
        # Kept in float32, since bfloat16 has no more than 8 bits for a number of 0 to 1000.
        timestep.float(),
        pooled.to(dtype),
        [torch.arange(size, device=latents.device) for size in grid],
        torch.arange(text.shape[1], device=latents.device),
        scale_factor=scale,
        return_dict=False,
    )
    velocity = out.float().movedim(-1, 1)
    if first_frame is None:
        return velocity
    sigma = timestep.float().view(-1, 1, 1, 1, 1) / TRAIN_TIMESTEPS
    return torch.cat(((latents[:, :, :1] - first_frame) / sigma, velocity[:, :, 1:]), dim=2)


def model_input(transformer: nn.Module, latents: Tensor, first_frame: Tensor | None) -> Tensor:
    """(B, T, h, w, channels) as the transformer takes it: latents, then, where it was made for a given picture as all
    published ones are, as many zeros and a mask that is 1 in frames that are given.
    """
    if first_frame is not None:
        latents = torch.cat((first_frame, latents[:, :, 1:]), dim=2)
    if not transformer.config.visual_cond:
        return latents.movedim(1, -1)
    given = torch.zeros_like(latents[:, :1])
    if first_frame is not None:
        given[:, :, 0] = 1
    return torch.cat((latents, torch.zeros_like(latents), given), dim=1).movedim(1, -1)


def grid_of(transformer: nn.Module, size: tuple[int, ...]) -> tuple[int, int, int]:
    """(frames, rows, columns) of the tokens of latents of (frames, height, width)."""
    frames, rows, columns = (n // p for n, p in zip(size, transformer.config.patch_size))
    return frames, rows, columns


def forward_inputs(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ForwardInputs:
    """Of latents (B, T, h, w, channels) and a timestep, the first and the third argument or by their names."""
    latents = args[0] if args else kwargs["hidden_states"]
    timestep = args[2] if len(args) > 2 else kwargs["timestep"]
    grid = grid_of(transformer, latents.shape[1:4])
    return ForwardInputs(grid, timestep, len(latents), latents.device, latents.dtype)


def in_raster_order(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a forward without those of diffusers' own NABLA, by which tokens are put into the order of tiles.

    diffusers' pipelines give them if a configuration says so, as that of the published image to video does.
    """
    if len(args) > SPARSE_PARAMS:
        args = (*args[:SPARSE_PARAMS], None, *args[SPARSE_PARAMS + 1 :])
    return args, {**kwargs, "sparse_params": None} if "sparse_params" in kwargs else kwargs


# Functions with names, since a transformer that has them in its state can be pickled.
def _heads(transformer: nn.Module) -> int:
    return transformer.config.model_dim // _head_size(transformer)


def _head_size(transformer: nn.Module) -> int:
    return sum(transformer.config.axes_dims)


TRANSFORMER = TransformerSpec(
    kind=Kandinsky5Transformer3DModel,
    block=Kandinsky5TransformerDecoderBlock,
    processor=Kandinsky5AttnProcessor,
    sparse_processor=SparseKandinskyProcessor,
    grid=grid_of,
    inputs=forward_inputs,
    heads=_heads,
    head_size=_head_size,
    blocks=(BlockList("visual_transformer_blocks", (Argument(0, "visual_embed"),)),),
    timestep=Argument(2, "timestep"),
    self_attention="self_attention",
    output="out_layer",
    output_needs_grid=True,
    in_raster_order=in_raster_order,
)
