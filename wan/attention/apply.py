"""NABLA in the self-attention of any diffusers Wan transformer: put in, take out."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn

import nabla
from nabla import InputError, NablaConfig, Plan
from nabla.attention import ReusableBlockMask
from nabla.rotary import Rotary
from wan.attention.steps import StepCounter
from wan.caches.step_cache import ran_in_full
from wan.parallel.ulysses import Sequence, attend_together, exchange_of_diffusers

# Held while a forward tells the layers what to do. Of all transformers, since locks can be neither copied nor pickled.
telling = threading.Lock()
# A compile for every size of video, dense and sparse; the default limit of 8 ends a long-lived process in an error.
many_compiles = partial(torch._dynamo.config.patch, recompile_limit=256, accumulated_recompile_limit=4096)
COMPILE_OPTIONS = {
    # Measured on Hopper: takes seconds, and norms and float8 conversions are else at a fraction of the bandwidth.
    "coordinate_descent_tuning": True,
    # What processes exchange is to be sent as soon as it is there. The order that saves memory may wait for it at
    # once, and copies that have no more in common than a list of indices would wait for each other.
    "reorder_for_peak_memory": False,
    "score_fusion_memory_threshold": 2**22,
}


def apply_attention(transformer: nn.Module | Iterable[nn.Module], config: NablaConfig) -> None:
    """Replace the self-attention of a `WanTransformer3DModel` by NABLA, in place; `remove_attention` undoes it.

    Given several transformers at once, such as the two experts of a Wan2.2 pipeline, their sampling steps are counted
    together for `config.dense_steps`; one given alone is counted alone. Over the processes of `apply_sequence`, or of
    diffusers' context parallelism by Ulysses, each attends to its own heads. Raises `InputError` for another kind of
    model, for layers that it does not have, and under diffusers' ring.
    """
    transformers = _each(transformer)
    for one in transformers:
        _check(one, config)
    steps = StepCounter()
    for one in transformers:
        remove_attention(one)
        one.nabla = AppliedAttention(one, config, steps)


def remove_attention(transformer: nn.Module | Iterable[nn.Module]) -> None:
    """Give transformers back the attention that they had before `apply_attention`; nothing happens to others."""
    for one in _each(transformer):
        if isinstance(getattr(one, "nabla", None), AppliedAttention):
            one.nabla.remove()
            del one.nabla


def compile_blocks(transformer: WanTransformer3DModel, trains: bool = False) -> None:
    """Compile the transformer's blocks, in place: one graph for all of them, whatever the step, prompt and threshold.

    With `mask_refresh` there is a second one, for the steps that take the blocks of others.
    Before any hook is put on them, which then stays outside the graph.
    trains: whether backwards are compiled as well, whose tuning takes minutes; then nothing is tuned
    """
    options = COMPILE_OPTIONS | ({"coordinate_descent_tuning": False} if trains else {})
    for block in transformer.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, options=options)


def _each(transformer: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """One or several transformers, each out of the wrapper that `torch.compile(model)` puts around it."""
    several = [transformer] if isinstance(transformer, nn.Module) else transformer
    return [getattr(one, "_orig_mod", one) for one in several]


class AppliedAttention:
    """What `apply_attention` leaves on a transformer: plans by grid, and what is needed to take it out again.

    Each self-attention module is told what to do by attributes set before every forward, outside the blocks, so that
    these can be compiled: `nabla_plan`, a plan, or None for diffusers' own attention; `nabla_kept`, a
    `ReusableBlockMask` or None; `nabla_exchange`, an `Exchange` where processes share the video, or None; and
    `nabla_share`, where the share of blocks that each of its own heads keeps is written, or None. While `switched_off`,
    all layers run dense. They are of one forward: of several at once, by threads, only the one that began last can be
    right, and others raise.
    """

    def __init__(self, transformer: WanTransformer3DModel, config: NablaConfig, steps: StepCounter):
        self.config = config
        self.plans: dict[tuple, Plan] = {}
        self.steps = steps
        self.switched_off = self.watched = False
        # Which forward the layers were told of last, and by thread which one it runs.
        self.forwards = 0
        self.own: dict[int, int] = {}
        self.patch = transformer.config.patch_size
        self.head_size = transformer.config.attention_head_dim
        self.sequence: Sequence | None = getattr(transformer, "sequence", None)
        # The video, step, plan and batch for which blocks were chosen and kept, or are being chosen now.
        self.chosen: tuple[int, int, Plan, int] | None = None
        self.choosing: tuple[int, int, Plan, int] | None = None
        modules = [block.attn1 for block in transformer.blocks]
        self.sparse = [m for n, m in enumerate(modules) if not config.is_dense and n not in config.dense_layers]
        # Where processes share the video, dense layers too have to swap tokens for heads.
        self.modules: list[WanAttention] = modules if self.sequence else self.sparse
        self.originals = [module.processor for module in self.modules]
        self.processor = NablaProcessor(self.originals[0]) if self.originals else None
        for module in self.modules:
            module.nabla_plan = module.nabla_kept = module.nabla_exchange = module.nabla_share = None
            module.set_processor(self.processor)
        self.hooks = [
            transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            transformer.register_forward_hook(self._after_forward),
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for module, original in zip(self.modules, self.originals):
            module.set_processor(original)
            del module.nabla_plan, module.nabla_kept, module.nabla_exchange, module.nabla_share

    def plan(
        self,
        latents_size: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        dense: bool = False,
        trains: bool = False,
    ) -> Plan:
        """The plan for latents of (frames, height, width), made on first use of that size; or a dense one."""
        key = tuple(n // p for n, p in zip(latents_size, self.patch)), device, dtype, dense, trains
        if key not in self.plans:
            config = NablaConfig() if dense else self.config
            self.plans[key] = nabla.plan(key[0], config, device, dtype, self.head_size, trains)
        return self.plans[key]

    def watch(self, watched: bool) -> None:
        """Have sparse layers write the share of blocks that each head keeps to `nabla_share` from now on, or not."""
        self.watched = watched
        for module in () if watched or self.sequence else self.modules:
            module.nabla_share = None

    def forget_blocks(self) -> None:
        """Free the blocks that `mask_refresh` keeps."""
        self.chosen = self.choosing = None
        for module in self.modules:
            module.nabla_kept = None

    @torch.compiler.disable
    def _before_forward(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.modules:
            with telling:
                self.forwards += 1
                self.own[threading.get_ident()] = self.forwards
                self._tell(transformer, args, kwargs)

    def _tell(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        latents = args[0] if args else kwargs["hidden_states"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        config, device = self.config, latents.device
        # Training draws timesteps at random, so they say nothing of steps.
        keeps = config.mask_refresh > 1 and not transformer.training
        counts = keeps or (config.dense_steps > 0 and not transformer.training)
        step = self.steps.see(timestep) if counts else config.dense_steps
        is_mixed = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_mixed else latents.dtype
        is_sparse = bool(self.sparse) and not self.switched_off and step >= config.dense_steps
        given = chain(args, kwargs.values(), transformer.parameters())
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in given if isinstance(x, Tensor))
        plan = self.plan(latents.shape[2:], device, dtype, trains=trains) if is_sparse else None
        self._set_exchanges(latents, dtype)
        for module in self.modules if self.sequence else ():
            module.nabla_plan = self.plan(latents.shape[2:], device, dtype, dense=True)
        for module in self.sparse if is_sparse or not self.sequence else ():
            module.nabla_plan = plan
        if is_sparse and keeps:
            self._keep_blocks(plan, step, len(latents))
        else:
            self.forget_blocks()
        if is_sparse and self.sequence and not (keeps and self.sparse[0].nabla_kept.reuse):
            self._balance(device)
        elif is_sparse and self.watched and self._shares_on(device) is None:
            self._measure_shares(self.sparse, device)

    def _set_exchanges(self, latents: Tensor, dtype: torch.dtype) -> None:
        if self.sequence:
            for module in self.modules:
                # Else memory for another size would be held while this size's is made.
                module.nabla_exchange = None
            tokens = math.prod(n // p for n, p in zip(latents.shape[2:], self.patch))
            exchanges = self.sequence.exchanges(len(latents), tokens, dtype, latents.device)
        else:
            config = self.processor._parallel_config
            exchanges = [None if config is None else exchange_of_diffusers(config)] * len(self.modules)
        for module, exchange in zip(self.modules, exchanges):
            module.nabla_exchange = exchange

    def _balance(self, device: torch.device) -> None:
        """Deal heads out to processes by what they kept in the last forward that chose blocks, and watch this one."""
        measured = self._shares_on(device)
        if measured is None:
            self._measure_shares(self.modules, device)
        else:
            self.sequence.balance(torch.stack(measured))

    def _shares_on(self, device: torch.device) -> list[Tensor] | None:
        """Where the layers write the shares that their heads keep, if they do so on a device."""
        shares = [module.nabla_share for module in self.modules]
        return None if shares[0] is None or shares[0].device != device else shares

    def _measure_shares(self, modules: list[WanAttention], device: torch.device) -> None:
        exchange, heads = modules[0].nabla_exchange, modules[0].heads
        for module in modules:
            with torch.inference_mode(False):
                module.nabla_share = torch.ones(exchange.own_heads(heads) if exchange else heads, device=device)

    def _keep_blocks(self, plan: Plan, step: int, batch: int) -> None:
        """Say whether a forward chooses its blocks or takes those of the forward that chose last."""
        if self.chosen is not None:
            video, first, *rest = self.chosen
            if video == self.steps.video and first <= step < first + self.config.mask_refresh and rest == [plan, batch]:
                for module in self.sparse:
                    module.nabla_kept = module.nabla_kept._replace(reuse=True)
                return
        self.chosen, self.choosing = None, (self.steps.video, step, plan, batch)
        layout = plan.selection.layout
        exchange, heads = self.sparse[0].nabla_exchange, self.sparse[0].heads
        shape = batch, exchange.own_heads(heads) if exchange else heads, layout.blocks, layout.blocks
        for module in self.sparse:
            kept = module.nabla_kept
            if kept is None or kept.mask.shape != shape or kept.mask.device != layout.sizes.device:
                with torch.inference_mode(False):
                    mask = torch.empty(shape, dtype=torch.bool, device=layout.sizes.device)
            else:
                mask = kept.mask
            module.nabla_kept = ReusableBlockMask(mask, reuse=False)

    @torch.compiler.disable
    def _after_forward(self, transformer: nn.Module, *_: Any) -> None:
        if self.modules and self.own.pop(threading.get_ident()) != self.forwards:
            if self.chosen or self.choosing:
                # Its last layers may have written over the blocks that the other keeps, which can be no more right.
                with telling:
                    self.forwards += 1
                    self.forget_blocks()
            raise InputError(
                "another thread began a forward of this transformer before this one ended, whose blocks were then "
                "chosen for the other; run one at a time, or give each thread a transformer of its own"
            )
        choosing, self.choosing = self.choosing, None
        # Only a forward that came to its end, through all layers, has chosen for all, and measured what they keep.
        if choosing is None and self.sequence is None or ran_in_full(transformer):
            self.chosen = choosing or self.chosen
        elif self.sequence:
            self.sequence.is_outdated = True


class NablaProcessor(WanAttnProcessor):
    """Self-attention by `nabla.attend` where the module has a plan, and diffusers' own otherwise.

    One instance, without state of its own, serves all layers.
    """

    def __init__(self, original: WanAttnProcessor):
        super().__init__()
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
        plan, exchange = attn.nabla_plan, attn.nabla_exchange
        if plan is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        rotary = Rotary(*rotary_emb)
        fused = attn.to_qkv(hidden_states).chunk(3, dim=-1) if attn.fused_projections else None
        norms, qkv = (attn.norm_q, attn.norm_k, None), [None] * 3
        # v, which is not normalised, first: each is on its way to other processes while the next one is made.
        for n in (2, 0, 1):
            x = (attn.to_q, attn.to_k, attn.to_v)[n](hidden_states) if fused is None else fused[n]
            # Autocast normalises in float32.
            x = x if norms[n] is None else norms[n](x).type_as(x)
            x = x.unflatten(2, (attn.heads, -1))
            qkv[n] = x if exchange is None else exchange.send(x, n, plan.tokens, rotary)
        how = plan, rotary, attn.nabla_kept, attn.nabla_share
        if exchange is None:
            out = nabla.attend(*qkv, *how)
        else:
            out = attend_together(qkv, len(hidden_states), attn.heads, *how, exchange)
        out = out.flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        return out


def _check(transformer: nn.Module, config: NablaConfig) -> None:
    if not isinstance(transformer, WanTransformer3DModel):
        raise InputError(f"{type(transformer).__name__} is not a WanTransformer3DModel; the attention fits only those")
    layers = len(transformer.blocks)
    if config.dense_layers and config.dense_layers[-1] >= layers:
        raise InputError(f"dense_layers {config.dense_layers[-1]} does not exist; layers are 0 to {layers - 1}")
    for block in transformer.blocks:
        processor = block.attn1.processor
        if not isinstance(processor, WanAttnProcessor):
            raise InputError(f"{type(processor).__name__} is not diffusers' WanAttnProcessor; put that back first")
        if processor._parallel_config is not None and not config.is_dense:
            exchange_of_diffusers(processor._parallel_config)
