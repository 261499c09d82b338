"""Wan's transformer for the machinery: where its parts are, and its self-attention as `nabla.attend` runs it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import WanAnimateTransformer3DModel, WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.transformers import transformer_wan_animate
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from nabla.rotary import Rotary
from wan.attention.layer import LayerState
from wan.attention.spec import Argument, BlockList, ForwardInputs, TransformerSpec


class SparseWanProcessor(WanAttnProcessor):
    """Self-attention by `nabla.attend` where the layer has a plan, and diffusers' own otherwise."""

    def __init__(self, original: WanAttnProcessor, state: LayerState):
        super().__init__()
        self.state = state
        # Where this one leaves the attention to diffusers, what users have set on its processor goes on to hold.
        self._attention_backend = original._attention_backend
        self._parallel_config = original._parallel_config

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        state = self.state
        if state.plan is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        rotary = Rotary(*rotary_emb)
        fused = attn.to_qkv(hidden_states).chunk(3, dim=-1) if attn.fused_projections else None
        norms, qkv = (attn.norm_q, attn.norm_k, None), [None] * 3
        # v, which is not normalised, first: each is on its way to other processes while the next one is made.
        for n in (2, 0, 1):
            x = (attn.to_q, attn.to_k, attn.to_v)[n](hidden_states) if fused is None else fused[n]
            # Autocast normalises in float32.
            x = x if norms[n] is None else norms[n](x).type_as(x)
            # (B, own tokens, C) to (B, own tokens, heads, D), in raster order.
            qkv[n] = state.send(x.unflatten(2, (attn.heads, -1)), n, rotary)
        out = state.attend(qkv, len(hidden_states), rotary).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        return out


def grid_of(transformer: nn.Module, size: tuple[int, ...]) -> tuple[int, int, int]:
    """(frames, rows, columns) of the tokens of latents of (frames, height, width)."""
    frames, rows, columns = (n // p for n, p in zip(size, transformer.config.patch_size))
    return frames, rows, columns


def forward_inputs(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ForwardInputs:
    """Of latents (B, C, T, h, w) and a timestep, the first two arguments or by their names."""
    latents = args[0] if args else kwargs["hidden_states"]
    timestep = args[1] if len(args) > 1 else kwargs["timestep"]
    grid = grid_of(transformer, tuple(latents.shape[2:]))
    return ForwardInputs(grid, timestep, len(latents), latents.device, latents.dtype)


def velocity_of(transformer: nn.Module, latents: Tensor, timestep: Tensor, context: Tensor, **more: Any) -> Tensor:
    """The velocity in float32 of latents (B, C, T, h, w), guided by text states (B, L, C).

    timestep: (B,), or (B, tokens) with one for each token; more: what else the transformer takes, by name
    """
    return transformer(latents.to(transformer.dtype), timestep, context, return_dict=False, **more)[0].float()


# Functions with names, since a transformer that has them in its state can be pickled.
def _heads(transformer: nn.Module) -> int:
    return transformer.config.num_attention_heads


def _head_size(transformer: nn.Module) -> int:
    return transformer.config.attention_head_dim


TRANSFORMER = TransformerSpec(
    kind=WanTransformer3DModel,
    block=WanTransformerBlock,
    processor=WanAttnProcessor,
    sparse_processor=SparseWanProcessor,
    grid=grid_of,
    inputs=forward_inputs,
    heads=_heads,
    head_size=_head_size,
)
# Its own blocks run first, each on the control states that the one before it gave; what they give is added to the
# states behind some of the others, outside of these, which caches of what blocks add would add twice.
VACE_TRANSFORMER = replace(
    TRANSFORMER,
    kind=WanVACETransformer3DModel,
    blocks=(
        BlockList("vace_blocks", (Argument(0, "hidden_states"), Argument(2, "control_hidden_states"))),
        BlockList("blocks"),
    ),
    caches=frozenset({"taylorseer"}),
)
# In diffusers' own pipelines alone. Its blocks and their attention are copies of Wan's. The picture of who is animated
# is a frame of the grid; what sees faces runs behind some blocks, and takes tokens by their frame.
ANIMATE_TRANSFORMER = replace(
    TRANSFORMER,
    kind=WanAnimateTransformer3DModel,
    block=transformer_wan_animate.WanTransformerBlock,
    processor=transformer_wan_animate.WanAttnProcessor,
    caches=frozenset({"taylorseer"}),
    splits=False,
)


def blocks_of(transformer: nn.Module) -> nn.ModuleList:
    """All blocks of a transformer of either class, in the order in which they run."""
    spec = VACE_TRANSFORMER if isinstance(transformer, VACE_TRANSFORMER.kind) else TRANSFORMER
    return spec.blocks_of(transformer)
