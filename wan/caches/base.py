"""What step caches have in common: diffusers' hooks that reuse what a transformer's blocks added in an earlier step.

Put on after blocks are compiled, which stay one graph, and before the hooks of diffusers' context parallelism. Each
guidance branch has a state of its own, and none outlives a video.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import ModelMixin
from diffusers.hooks import HookRegistry
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import nn

from nabla import InputError
from wan.attention.spec import TransformerSpec
from wan.config.cache_settings import CacheSettings


@dataclass
class BlockArguments(TransformerBlockMetadata):
    """Finds the hidden states among a block's arguments whatever it calls them, where hooks go by the usual name."""

    def _get_parameter_from_args_kwargs(self, identifier: str, args: Any = (), kwargs: Any = None) -> Any:
        own = self.hidden_states_argument_name if identifier == "hidden_states" else identifier
        return super()._get_parameter_from_args_kwargs(own, args, kwargs)


class StepCache(ABC):
    """What `apply_cache` leaves on a transformer. A cache is a subclass in a file of its own, listed in `KINDS`.

    config_class: diffusers' configuration of it; hook: the name of its hook on the first block, which decides
    forwards, reused: how many there were in the last video, and how many of them took what an earlier one computed
    leading: how many of the first blocks run in these too
    """

    config_class: ClassVar[type]
    hook: ClassVar[str]
    leading = 0

    def __init__(self, transformer: ModelMixin, settings: CacheSettings, spec: TransformerSpec):
        spec.check_cache(settings.kind)
        self.transformer, self.settings, self.blocks = transformer, settings, spec.blocks_of(transformer)
        if len(self.blocks) < 2:
            raise InputError("a cache needs a transformer of 2 blocks or more; leave it out")
        self.forwards = self.reused = 0
        # As FSDP makes a class of its own, which diffusers does not know.
        known = TransformerBlockRegistry.get(spec.block)
        TransformerBlockRegistry.register(type(self.blocks[-1]), BlockArguments(**vars(known)))

    @classmethod
    def leader(cls, first_block: nn.Module) -> Any:
        """diffusers' hook that decides, once it is on."""
        hook = HookRegistry.check_if_exists_or_initialize(first_block).get_hook(cls.hook)
        if hook is None:
            raise InputError(
                f"{cls.config_class.__name__} of diffusers passes by the first blocks of this transformer; "
                "disable its cache"
            )
        return hook

    @classmethod
    def computes(cls, first_block: nn.Module) -> bool:
        """Whether all blocks run in the forward that is under way or ended last."""
        return cls.leader(first_block).state_manager.get_state().should_compute

    def begin(self, steps: int, dense_steps: int) -> None:
        """Forget the last video, however it ended, and prepare for one of so many steps.

        They are the video's, of which the transformer may run some alone: its first forward in each branch, whichever
        step that is, is always computed.
        """
        self.transformer._reset_stateful_cache()
        self.forwards = self.reused = 0
        # Steps that are dense, to be exact, are not left to a cache.
        self._prepare(steps, min(steps, max(round(self.settings.warmup * steps), dense_steps)))

    @abstractmethod
    def _prepare(self, steps: int, first: int) -> None:
        """Take note of a video's steps, of which the first so many are computed in any case."""

    @contextmanager
    def branch(self, name: str, step: int) -> Iterator[None]:
        """Around the forward of a guidance branch; step: of the video, in which other transformers may run too."""
        with self.transformer.cache_context(name, step_index=step):
            yield
            # Only of a forward that came to its end, and within the context, without which diffusers has no state.
            self.forwards += 1
            self.reused += not self.computes(self.blocks[0])

    def end(self) -> None:
        """Free what is kept."""
        self.transformer._reset_stateful_cache()
