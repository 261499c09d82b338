"""Whether a forward runs its blocks, or a step cache stands in for them."""

from __future__ import annotations

from torch import nn

from wan.caches.applied import step_cache_of


def ran_in_full(transformer: nn.Module, first_block: nn.Module) -> bool:
    """Whether all blocks run in a forward, its first one done or all of it, rather than a cache in their place.

    Knows of caches of diffusers that others have put on, by their hooks. Raises `InputError` for one that does
    not say.
    """
    cache, config = step_cache_of(transformer), getattr(transformer, "_cache_config", None)
    if cache is not None:
        return cache.computes(first_block)
    if config is None:
        return True
    # Only here, since the caches know private names of diffusers that most runs have no need of.
    from wan.caches.apply import kind_of

    return kind_of(config).computes(first_block)


def blocks_left_out(transformer: nn.Module) -> bool:
    """Whether a step cache, if there is one, stands in for the blocks after the first of the forward that runs."""
    cache = step_cache_of(transformer)
    return cache is not None and not ran_in_full(transformer, cache.blocks[0])
