"""What each layer of a transformer runs in each sampling step."""

from __future__ import annotations

from nabla import NablaConfig, Stretch
from nabla.checks import MAX_COUNT

# A step, and the number of steps, behind all that run otherwise than the rest.
PAST = MAX_COUNT, MAX_COUNT


class Schedule:
    """A config as it is for a transformer of so many layers.

    sparse_layers: numbers of those that are sparse in any step
    by_step: whether layers run other attention in some steps than in others
    Raises `InputError` for a config that is of other layers.
    """

    def __init__(self, config: NablaConfig, layers: int):
        self.config, self.layers = config, layers
        dense = range(layers) if config.is_dense else config.dense_layer_numbers(layers)
        self.sparse_layers = [n for n in range(layers) if n not in dense]
        several = config.profile is not None and len(config.profile.stretches) > 1
        self.by_step = not config.is_dense and (config.dense_steps > 0 or several)
        self.found: dict[Stretch | bool, tuple[NablaConfig, ...]] = {}

    def at(self, step: int, steps: int | None) -> tuple[NablaConfig, ...]:
        """The config of each layer in a step, from 0, of so many; dense ones of those that run dense.

        steps: None where nothing says how many; raises `InputError` where it takes that to know
        """
        profile = self.config.profile
        # All that the step decides, so that steps alike share configs, and these one plan.
        key = profile.stretch_at(step, steps) if profile else step < self.config.dense_step_count(steps)
        if key not in self.found:
            self.found[key] = tuple(self.config.at(n, self.layers, step, steps) for n in range(self.layers))
        return self.found[key]
