"""What a run does that its user may not have meant, or may not know, though it can be done."""

from __future__ import annotations

import logging

from nabla import InputError, NablaConfig
from nabla.shares import described_layers, described_steps
from wan.checkpoints.file_errors import CheckpointError
from wan.config.attention_settings import is_untuned
from wan.config.sampling_settings import DEFAULT_NEGATIVE_PROMPT
from wan.config.settings import Settings
from wan.models.checkpoint import Checkpoint
from wan.run.ratios import measured_otherwise, profile_measured_otherwise
from wan.run.request import Request
from wan.run.sidecars import Video

log = logging.getLogger("wan")

# Weights that are not distilled for it give no picture in so few steps without guidance.
FEW_STEPS = 12
NO_GUIDANCE = "has no effect without guidance (guide_scale 1); raise --sample_guide_scale, or leave it out"


def say_what_runs(checkpoint: Checkpoint, videos: list[Video], request: Request) -> None:
    """Log what a user may not know; raises `InputError` for a negative prompt given to videos that take none."""
    every = [settings for settings, _ in videos]
    asked = request.flags.get("sampling", {}).get("negative_prompt")
    if asked and not any(settings.sampling.guided for settings in every):
        raise InputError(f"negative_prompt {asked!r} {NO_GUIDANCE}")
    if request.about_default is not None and checkpoint.name == request.default_checkpoint:
        log.info(request.about_default)
    # Videos of a list mostly have the same lines to say: each is said once.
    for line in dict.fromkeys(line for settings in every if (line := _untuned(settings.attention)) is not None):
        log.info(line)
    for line in dict.fromkeys(line for settings in every for line in unexpected(checkpoint, settings)):
        log.warning("warning: %s", line)


def unexpected(checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """What a user of a checkpoint may not have meant, though it can be done, a line each."""
    chosen, lines = settings.attention, []
    try:
        own = checkpoint.own_attention()
    # Here another algorithm was asked for: else the settings, which are resolved before, would have failed for this.
    except CheckpointError as error:
        lines.append(f"{error}; running {chosen.algorithm} as asked")
        own = None
    others = checkpoint.family.algorithms_at_other_sizes(checkpoint.layout)
    if own is not None and chosen.algorithm not in (own.algorithm, *others):
        lines.append(f"checkpoint {checkpoint.name} was made for {own.algorithm}; running {chosen.algorithm} as asked")
    dense_steps = chosen.dense_step_count(settings.sampling.steps)
    if not chosen.is_dense and dense_steps >= settings.sampling.steps:
        lines.append(
            f"the first {dense_steps} steps run dense, so all {settings.sampling.steps} steps do; "
            "lower dense_steps in a config"
        )
    others_say = (
        _hidden_picture(settings),
        _means_in_first_layer(settings),
        measured_otherwise(settings),
        profile_measured_otherwise(settings),
    )
    return [*lines, *_without_guidance(checkpoint, settings), *filter(None, others_say)]


def _untuned(chosen: NablaConfig) -> str | None:
    """What is done for weights that were not tuned for the share of blocks that they run with."""
    if not is_untuned(chosen):
        return None
    assert isinstance(chosen.dense_layers, tuple)
    beside = described_steps(chosen.dense_steps), described_layers(chosen.dense_layers)
    parts = "" if chosen.pool is None else f", blocks chosen by parts of {'x'.join(map(str, chosen.pool))} tokens"
    return (
        f"attention: {chosen.algorithm} for weights that were not tuned for it, {', '.join(beside)}{parts}; "
        "dense_steps, dense_layers or pool in a config change that"
    )


def _hidden_picture(settings: Settings) -> str | None:
    """What a window alone does to videos from pictures, of which each frame then sees only those near to it."""
    chosen, begins = settings.attention, settings.image is not None or bool(settings.src_ref_images)
    if chosen.kind != "sta" or chosen.window is None or not begins:
        return None
    near, blocks = chosen.window[0] // 2, [n // chosen.tile[0] for n in range(settings.video.token_grid[0])]
    ends = [0] if settings.last_image is None else [0, blocks[-1]]
    hidden = sum(all(abs(block - end) > near for end in ends) for block in blocks)
    if not hidden:
        return None
    return (
        f"{chosen.algorithm} is a window alone, by which {hidden} of {len(blocks)} latent frames do not see a given "
        f"picture's; add a threshold, as in nabla-0.7_{chosen.algorithm}"
    )


def _means_in_first_layer(settings: Settings) -> str | None:
    """What means in place of dropped blocks do in layer 0, whose errors go through all others."""
    chosen = settings.attention
    # A share of the layers is of the first ones.
    dense = chosen.dense_layers
    is_dense = bool(dense) if isinstance(dense, (int, float)) else 0 in dense
    if chosen.profile is not None:
        is_dense = 0 in chosen.dense_layer_numbers(chosen.profile.layers)
    if chosen.dropped == "none" or is_dense:
        return None
    return (
        f"dropped {chosen.dropped} with layer 0 sparse was measured to be far worse than nothing in their place; add 0 "
        "to dense_layers in a config, or leave dropped out"
    )


def _without_guidance(checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """What guidance 1 does that may not be meant, unless the checkpoint's own settings are so."""
    sampling = settings.sampling
    if sampling.guided:
        return []
    own, lines = checkpoint.own_sampling(), []
    if sampling.steps <= FEW_STEPS and own.guided and not (settings.lora or settings.transformer):
        lines.append(
            f"{sampling.steps} steps without guidance suit weights distilled for it, which --lora or --transformer "
            f"add; unless {checkpoint.name} itself is distilled, expect mush"
        )
    if sampling.negative_prompt not in ("", DEFAULT_NEGATIVE_PROMPT, own.negative_prompt):
        lines.append(f"negative_prompt {sampling.negative_prompt!r} {NO_GUIDANCE}")
    return lines
