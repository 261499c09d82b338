"""Shares of steps and layers, and keep profiles: what each layer runs in each step, and one line for what is wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

import nabla
from nabla import InputError, KeepProfile, NablaConfig, Stretch

PROFILE = KeepProfile((Stretch(0.2, (1.0, 1.0, 1.0)), Stretch(0.5, (1.0, 0.5, 0.25)), Stretch(1.0, (0.5, 0.5, 0.1))))


@pytest.mark.parametrize("share", ("0.1", "0.2", "0.25", "0.07", "0.333", "0.99", "0.001"))
def test_shares_of_steps_and_layers_are_rounded_up_exactly(share):
    for total in range(1, 101):
        # The share as it is written, which its float is not.
        exact = math.ceil(Fraction(share) * total)
        assert NablaConfig(keep=0.2, dense_steps=float(share)).dense_step_count(total) == exact
        config = NablaConfig(keep=0.2, dense_layers=float(share))
        assert config.dense_layer_numbers(total) == tuple(range(exact))


def test_whole_numbers_need_no_total():
    config = NablaConfig(keep=0.2, dense_steps=3, dense_layers=(2, 0))
    assert config.dense_step_count(None) == 3
    assert config.dense_layer_numbers(3) == (0, 2)
    assert NablaConfig(dense_steps=0.0) == NablaConfig()


def test_a_share_of_steps_that_nobody_counts_is_one_line():
    with pytest.raises(InputError, match="dense_steps 0.2 is a share of a run's steps, .* give a whole number"):
        NablaConfig(keep=0.2, dense_steps=0.2).dense_step_count(None)
    with pytest.raises(InputError, match="profile of 3 stretches needs to know how many steps"):
        PROFILE.stretch_at(0, None)
    assert KeepProfile(PROFILE.stretches[2:]).stretch_at(7, None) == PROFILE.stretches[2]


@pytest.mark.parametrize(
    "settings, message",
    (
        ({"dense_steps": 1.0}, "dense_steps 1.0: give a whole number .* or a share of them below 1"),
        ({"dense_steps": 1.5}, "dense_steps 1.5: give"),
        ({"dense_steps": -0.1}, "dense_steps -0.1: give"),
        ({"dense_steps": float("nan")}, "dense_steps nan: give"),
        ({"dense_steps": "0.2"}, "dense_steps '0.2': give"),
        ({"dense_layers": 1.0}, "dense_layers 1.0: give a list .* or a share of the layers below 1"),
        ({"dense_layers": 0}, "dense_layers 0: give a list"),
        ({"dense_layers": (0.5,)}, "dense_layers .0.5,.: give a list"),
    ),
)
def test_counts_and_shares_that_are_neither(settings, message):
    with pytest.raises(InputError, match=message):
        NablaConfig(**settings)


def by_hand(config: NablaConfig, layer: int, layers: int, step: int, steps: int) -> float | None:
    """The share of blocks that a layer keeps, of plain shares, or None where it runs dense."""
    if config.profile is None:
        first = config.dense_steps if isinstance(config.dense_steps, int) else config.dense_steps * steps
        dense = config.dense_layers
        layer_is_dense = layer in dense if isinstance(dense, tuple) else layer < dense * layers
        return None if step < first or layer_is_dense else config.keep
    stretch = next(one for one in config.profile.stretches if step < one.until * steps)
    return None if stretch.keep[layer] == 1 else stretch.keep[layer]


@pytest.mark.parametrize(
    "config",
    (
        NablaConfig(keep=0.3, dense_steps=0.25, dense_layers=0.5),
        NablaConfig(keep=0.3, dense_steps=2, dense_layers=(1,)),
        NablaConfig(keep=0.3),
        NablaConfig(profile=PROFILE),
    ),
)
def test_what_a_layer_runs_at_a_step(config):
    config = replace(config, window=(3, 3, 3), tile=(1, 4, 4), backend="reference", mask_refresh=2)
    for steps in (1, 4, 8, 13):
        for step in range(steps):
            for layer in range(3):
                keep = by_hand(config, layer, 3, step, steps)
                run = NablaConfig() if keep is None else replace(
                    config, keep=keep, profile=None, dense_steps=0, dense_layers=()
                )  # fmt: skip
                assert config.at(layer, 3, step, steps) == run


def test_dense_is_dense_at_any_step():
    assert NablaConfig(dense_steps=0.5).at(0, 3, 2, None) == NablaConfig()


def test_a_profile_counts_its_dense_steps_and_layers():
    config = NablaConfig(profile=PROFILE)
    assert [config.dense_step_count(steps) for steps in (1, 4, 10)] == [1, 1, 2]
    assert config.dense_layer_numbers(3) == ()
    first = KeepProfile((Stretch(0.5, (1.0, 0.5)), Stretch(1.0, (1.0, 0.2))))
    assert NablaConfig(profile=first).dense_layer_numbers(2) == (0,)
    assert NablaConfig(profile=first).dense_step_count(10) == 0
    assert first.mean_keep == pytest.approx((0.75 + 0.6) / 2)


def test_plain_values_both_ways():
    measured = KeepProfile(PROFILE.stretches, {"checkpoint": "wan-shapes", "layers": 3, "steps": 30})
    for profile in (PROFILE, measured):
        assert KeepProfile.from_dict(profile.to_dict()) == profile
        assert NablaConfig.from_dict({"profile": profile.to_dict(), "window": [3, 3, 3]}) == NablaConfig(
            profile=profile, window=(3, 3, 3)
        )
    assert measured != PROFILE and hash(measured) == hash(PROFILE)
    config = NablaConfig(profile=PROFILE, window=(3, 3, 3))
    assert config.selects and config.kind == "nabla_sta" and not config.is_dense
    assert config.algorithm == f"{PROFILE.name}_sta-3-3-3"
    assert KeepProfile(PROFILE.stretches[2:]).name != PROFILE.name == measured.name


def stretches(*given: tuple) -> dict:
    return {"stretches": [{"until": until, "keep": keep} for until, keep in given]}


@pytest.mark.parametrize(
    "given, message",
    (
        (stretches((0.5, [0.5])), "profile's last stretch is until 0.5, and has to be until 1"),
        (stretches((0.5, [0.5]), (0.5, [0.1]), (1, [0.1])), "until 0.5, 0.5, 1 do not rise"),
        (stretches((1, [0.5]), (0.5, [0.5])), "until 1, 0.5 do not rise"),
        (stretches((0.5, [0.5]), (1, [0.5, 0.2])), "stretches have 1, 2 layers; give each a share of every layer"),
        (stretches((1, [0.5, 0])), r"profile keep 0 of layer 1 is outside \(0, 1\]"),
        (stretches((1, [1.5])), r"profile keep 1.5 of layer 0 is outside \(0, 1\]"),
        (stretches((1, ["half"])), "profile keep 'half' of layer 0 is outside"),
        (stretches((1, [])), r"profile keep \[\] is not a list of shares"),
        (stretches((1, "0.5")), "profile keep '0.5' is not a list of shares"),
        (stretches((1, 0.5)), "profile keep 0.5 is not a list of shares"),
        (stretches((0, [0.5])), "profile until 0 is not a share of the steps"),
        (stretches((True, [0.5])), "profile until True is not a share of the steps"),
        (stretches((1.2, [0.5])), "profile until 1.2 is not a share of the steps"),
        ({"stretches": []}, "profile has no stretches"),
        ({"stretches": 3}, "profile stretches 3 is not a list"),
        ({"stretches": [3]}, "profile stretch 3 is not a mapping with until and keep"),
        ({"stretches": [{"until": 1}]}, "profile stretch has no keep"),
        ({"stretches": [{"until": 1, "keep": [0.5], "to": 2}]}, "profile stretch has an unknown key 'to'"),
        ({}, "profile has no stretches; scripts/calibrate_attention.py"),
        (stretches((1, [0.5])) | {"streches": 1}, "profile has an unknown key 'streches'"),
        (stretches((1, [0.5])) | {"measured_on": 3}, "profile measured_on 3 is not a mapping"),
        (stretches((1, [0.5])) | {"measured_on": {"layers": 30}}, "measured on 30 layers and says 1 shares"),
    ),
)
def test_profiles_that_are_none(given, message):
    with pytest.raises(InputError, match=message):
        KeepProfile.from_dict(given)


@pytest.mark.parametrize(
    "settings, message",
    (
        ({"threshold": 0.5}, "threshold 0.5 does not go with a profile"),
        ({"keep": 0.5}, "keep 0.5 does not go with a profile"),
        ({"dense_steps": 3}, "dense_steps 3 does not go with a profile"),
        ({"dense_layers": (0,)}, "dense_layers .0,. does not go with a profile"),
        ({"profile": "a.yaml"}, "profile 'a.yaml' is none"),
    ),
)
def test_what_does_not_go_with_a_profile(settings, message):
    with pytest.raises(InputError, match=message):
        NablaConfig(**{"profile": PROFILE} | settings)


def test_a_transformer_of_other_layers_is_refused_by_name():
    profile = KeepProfile(PROFILE.stretches, {"checkpoint": "Wan2.1-T2V-14B"})
    line = "profile has shares of 3 layers, those of Wan2.1-T2V-14B, and this transformer has 40"
    with pytest.raises(InputError, match=line):
        NablaConfig(profile=profile).at(0, 40, 0, 10)


def test_one_attention_alone_takes_no_profile():
    q = torch.randn(1, 32, 1, 8)
    for run in (nabla.attention, lambda q, k, v, **given: nabla.select_blocks(q, k, **given)):
        with pytest.raises(InputError, match="profile-.* is of many layers and steps; take .* NablaConfig.at"):
            run(q, q, q, grid=(2, 4, 4), config=NablaConfig(profile=PROFILE))
