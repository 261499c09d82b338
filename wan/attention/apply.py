"""NABLA in the self-attention of a diffusers transformer: put in, take out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from nabla import InputError, NablaConfig, Plan
from wan.attention.layer import LayerState
from wan.attention.mask_cache import Choice, MaskCache
from wan.attention.plans import Plans
from wan.attention.schedule import PAST, Schedule
from wan.attention.spec import ForwardInputs, TransformerSpec
from wan.attention.steps import StepCounter
from wan.caches.ran import ran_in_full
from wan.parallel.sequence_parallel import sequence_parallel_of
from wan.parallel.ulysses import UlyssesAllToAll, all_to_all_of_diffusers

# Held while a forward sets the states of layers. Of all transformers, since locks can be neither copied nor pickled.
setting = threading.Lock()


def apply_attention(transformers: Sequence[ModelMixin], config: NablaConfig, spec: TransformerSpec) -> None:
    """Replace the self-attention of transformers by NABLA, in place; `remove_attention` undoes it.

    Of those given at once, such as the experts of a pipeline, sampling steps are counted together for
    `config.dense_steps`. Over the processes of `apply_sequence_parallel`, or of diffusers' context parallelism by
    Ulysses, each attends to its own heads. Raises `InputError` for another kind of model, for layers that it does not
    have, and under diffusers' ring.
    """
    # All are checked before any is changed.
    for one in transformers:
        _check(one, config, spec)
    steps = StepCounter()
    for one in transformers:
        remove_attention(one)
        one.nabla = AppliedAttention(one, config, spec, steps)


def remove_attention(transformer: ModelMixin) -> None:
    """Give a transformer back the attention that it had before `apply_attention`; nothing happens to others."""
    applied = applied_attention(transformer)
    if applied is not None:
        applied.remove()
        del transformer.nabla


def applied_attention(transformer: nn.Module) -> AppliedAttention | None:
    """What `apply_attention` left on a transformer."""
    applied = getattr(transformer, "nabla", None)
    return applied if isinstance(applied, AppliedAttention) else None


class AppliedAttention:
    """Says to each layer, before every forward, what it is to do, and puts back what was there.

    While `switched_off`, all layers run dense. The layers' states are of one forward: of several at once, by threads,
    only the one that began last can be right, and others raise.
    """

    def __init__(self, transformer: nn.Module, config: NablaConfig, spec: TransformerSpec, steps: StepCounter):
        self.config, self.spec, self.steps = config, spec, steps
        self.switched_off = self.watched = False
        self.plans = Plans(spec.head_size(transformer))
        self.masks = MaskCache(config.mask_refresh)
        self.sequence_parallel = sequence_parallel_of(transformer)
        # Which forward the layers' states are of, and by thread which one it runs.
        self.forwards = 0
        self.own: dict[int, int] = {}
        modules = spec.attentions_of(transformer)
        self.layers = [LayerState(spec.heads(transformer)) for _ in modules]
        self.schedule = Schedule(config, len(modules))
        # Of any step: in each, some of them may run dense.
        self.sparse_layers = self.schedule.sparse_layers
        self.sparse = [self.layers[n] for n in self.sparse_layers]
        # Where processes share the video, dense layers too have to swap tokens for heads.
        patched = range(len(modules)) if self.sequence_parallel else self.sparse_layers
        self.patched = [self.layers[n] for n in patched]
        self.originals = [(modules[n], modules[n].processor) for n in patched]
        self.processors = [spec.sparse_processor(modules[n].processor, self.layers[n]) for n in patched]
        for (module, _), processor in zip(self.originals, self.processors):
            module.set_processor(processor)
        self.hooks = [
            transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            transformer.register_forward_hook(self._after_forward),
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for module, original in self.originals:
            module.set_processor(original)

    def describe(self, grid: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> str:
        """One line on what runs for a grid of (frames, rows, columns) tokens: algorithm, backend, grid and blocks."""
        # Of the last steps, since the first ones may be dense, and of any layer that is sparse there.
        sparse = [config for config in self.schedule.at(*PAST) if not config.is_dense] or [NablaConfig()]
        return self.plans.of(sparse[0], grid, device, dtype).describe(self.config)

    def watch(self, watched: bool) -> None:
        """Have sparse layers write their heads' densities from now on, or not."""
        self.watched = watched
        # Where processes share the video densities are measured in any case, to balance heads by.
        for layer in () if watched or self.sequence_parallel else self.patched:
            layer.density = None

    def measure_density(self, layers: Sequence[LayerState], device: torch.device) -> None:
        """Have layers write their own heads' densities to memory of this device."""
        for layer in layers:
            own = layer.all_to_all.own_heads(layer.heads) if layer.all_to_all else layer.heads
            # A tensor of inference mode could not be written in place by a forward outside of it. Ones stand for dense.
            with torch.inference_mode(False):
                layer.density = torch.ones(own, device=device)

    def forget_blocks(self) -> None:
        """Free the blocks that `mask_refresh` keeps."""
        self.masks.clear(self.patched)

    @torch.compiler.disable
    def _before_forward(
        self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if self.patched:
            with setting:
                self.forwards += 1
                self.own[threading.get_ident()] = self.forwards
                # Parameters too: where a LoRA is trained alone, no input requires gradients.
                given = chain(args, kwargs.values(), transformer.parameters())
                trains = torch.is_grad_enabled() and any(x.requires_grad for x in given if isinstance(x, Tensor))
                self._set_layers(self.spec.inputs(transformer, args, kwargs), trains, transformer.training)
        # Only now, since steps are counted by the timesteps of all tokens.
        if self.sequence_parallel:
            args, kwargs = self.sequence_parallel.with_own_timesteps(args, kwargs)
        return (args, kwargs) if self.spec.in_raster_order is None else self.spec.in_raster_order(args, kwargs)

    def _set_layers(self, inputs: ForwardInputs, trains: bool, training: bool) -> None:
        device = inputs.device
        # Training draws timesteps at random, so they say nothing of steps.
        refreshes = self.config.mask_refresh > 1 and not training
        counts = refreshes or (self.schedule.by_step and not training)
        # Asked only where it matters: unless the loop says the step, its timestep is read off the GPU, which is a wait.
        step, steps = (self.steps.step_of(inputs.timestep), self.steps.steps) if counts else PAST
        # Of q, k and v, which autocast makes in a dtype of its own.
        is_mixed = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_mixed else inputs.dtype
        configs = self.schedule.at(step, steps)
        plans = tuple(
            None
            if self.switched_off or configs[n].is_dense
            else self.plans.of(configs[n], inputs.grid, device, dtype, trains)
            for n in self.sparse_layers
        )
        # Before masks and densities, whose size is that of a process's own heads.
        self._set_all_to_alls(inputs, dtype)
        self._set_plans(plans, inputs, dtype)
        is_sparse, takes_over = any(plans), False
        if is_sparse and refreshes:
            takes_over = self.masks.prepare(self.sparse, Choice(self.steps.video, step, plans, inputs.batch))
        else:
            self.forget_blocks()
        # Masks that are taken over are of the heads that a process had, so these stay where they are meanwhile.
        if is_sparse and self.sequence_parallel and not takes_over:
            self._balance(device)
        elif is_sparse and self.watched and self._densities_on(device) is None:
            self.measure_density(self.sparse, device)

    def _set_plans(self, plans: Sequence[Plan | None], inputs: ForwardInputs, dtype: torch.dtype) -> None:
        """Give each layer its plan; plans: of those in `sparse`, None where one runs dense."""
        # Of one process, a layer without a plan runs diffusers' own attention.
        dense = None
        if self.sequence_parallel:
            dense = self.plans.of(NablaConfig(), inputs.grid, inputs.device, dtype)
        for layer in self.patched:
            layer.plan = dense
        for layer, plan in zip(self.sparse, plans, strict=True):
            if plan is not None:
                layer.plan = plan
            elif layer.density is not None:
                # Dense attention writes none, and what is there is of an earlier step.
                layer.density.fill_(1)

    def _set_all_to_alls(self, inputs: ForwardInputs, dtype: torch.dtype) -> None:
        all_to_alls: Sequence[UlyssesAllToAll | None]
        if self.sequence_parallel:
            for layer in self.patched:
                # Else memory for another size would be held while this size's is made.
                layer.all_to_all = None
            all_to_alls = self.sequence_parallel.all_to_alls(inputs.batch, inputs.grid, dtype, inputs.device)
        else:
            # Read in each forward, since diffusers may set it, for all alike, after this attention was put in.
            config = self.processors[0]._parallel_config
            all_to_alls = [None if config is None else all_to_all_of_diffusers(config)] * len(self.patched)
        for layer, all_to_all in zip(self.patched, all_to_alls):
            layer.all_to_all = all_to_all

    def _balance(self, device: torch.device) -> None:
        """Assign heads to processes by what they kept in the last forward that chose blocks, and watch this one."""
        measured = self._densities_on(device)
        if measured is None:
            self.measure_density(self.patched, device)
        else:
            assert self.sequence_parallel is not None
            self.sequence_parallel.rebalance(torch.stack(measured))

    def _densities_on(self, device: torch.device) -> list[Tensor] | None:
        """Where the layers write their heads' densities, if they do so on a device."""
        densities = [layer.density for layer in self.patched if layer.density is not None]
        return densities if len(densities) == len(self.patched) and densities[0].device == device else None

    # Of a forward that raises this is not called: the next one sets everything anew, and takes no masks of it.
    @torch.compiler.disable
    def _after_forward(self, transformer: nn.Module, *_: Any) -> None:
        if self.patched and self.own.pop(threading.get_ident()) != self.forwards:
            self._refuse()
        # Only a forward that came to its end, through all layers, has chosen for all, and measured what they keep.
        if self.masks.choosing is None and self.sequence_parallel is None:
            return
        if ran_in_full(transformer, self.spec.blocks_of(transformer)[0]):
            self.masks.complete()
            return
        # A step cache left blocks out, whose masks and densities are of an earlier forward or of none.
        self.masks.abandon()
        if self.sequence_parallel:
            self.sequence_parallel.is_outdated = True

    def _refuse(self) -> None:
        if self.masks.chosen or self.masks.choosing:
            # Its last layers may have written over the blocks that the other keeps, which can be no more right.
            with setting:
                self.forwards += 1
                self.forget_blocks()
        raise InputError(
            "another thread began a forward of this transformer before this one ended, whose blocks were then "
            "chosen for the other; run one at a time, or give each thread a transformer of its own"
        )


def _check(transformer: nn.Module, config: NablaConfig, spec: TransformerSpec) -> None:
    spec.check(transformer)
    modules = spec.attentions_of(transformer)
    # Called for the error that it raises for layers that are not there.
    config.dense_layer_numbers(len(modules))
    for module in modules:
        processor = module.processor
        if not isinstance(processor, spec.processor):
            raise InputError(
                f"{type(processor).__name__} is not diffusers' {spec.processor.__name__}; put that back first"
            )
        # Called for the error that it raises for a ring.
        if processor._parallel_config is not None and not config.is_dense:
            all_to_all_of_diffusers(processor._parallel_config)
