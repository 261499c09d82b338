"""A run says where it packs weights otherwise than the run whose video it makes again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wan.config.settings import resolve
from wan.memory.planner import MemoryPlan
from wan.run.remaking import quantized_otherwise

PLAIN = MemoryPlan(None, None, True, 0, 2, "stream", 1, False, {"sampling": 0}, 0, 1.0)
INT8, BOTH = replace(PLAIN, quantization="int8"), replace(PLAIN, quantization="int4", text_quantization="int8")
FP8 = replace(PLAIN, quantization="fp8")


def difference(then: MemoryPlan | None, now: MemoryPlan | None, fp8: bool = False) -> str | None:
    settings = resolve({"checkpoint": "x", "prompt": "a cat", "dtype": "bfloat16", "fp8": fp8})
    made_with = {"device": "cuda"} | ({} if then is None else {"memory": 12.0, "plan": then.to_sidecar()})
    return quantized_otherwise("video.json", made_with, settings, now)


@pytest.mark.parametrize(
    "then, now, fp8",
    (
        (None, None, False),
        (None, PLAIN, False),
        (PLAIN, None, False),
        (BOTH, replace(BOTH, kept=1, tiles=2), False),
        (FP8, None, True),
        (None, FP8, True),
    ),
)
def test_nothing_is_said_where_weights_are_packed_alike(then, now, fp8):
    assert difference(then, now, fp8) is None


@pytest.mark.parametrize(
    "then, now, fp8, what, back",
    (
        (INT8, None, False, "the transformer in int8 (here bfloat16)", "--memory 12.0 packs"),
        (INT8, PLAIN, False, "the transformer in int8 (here bfloat16)", "--memory 12.0 packs"),
        (INT8, FP8, True, "the transformer in int8 (here fp8)", "--memory 12.0 packs"),
        (None, INT8, False, "the transformer in bfloat16 (here int8)", "leave --memory out"),
        (None, INT8, True, "the transformer in fp8 (here int8)", "leave --memory out"),
        (
            BOTH,
            INT8,
            False,
            "the transformer in int4 (here int8) and the text encoder in int8 (here bfloat16)",
            "--memory 12.0 packs",
        ),
    ),
)
def test_a_line_says_what_differs_and_what_gives_it_back(then, now, fp8, what, back):
    line = difference(then, now, fp8)
    assert f"video.json was made with {what}, so this video will differ; {back}" in line and "\n" not in line


def test_settings_that_are_no_record_were_made_with_nothing():
    settings = resolve({"checkpoint": "x", "prompt": "a cat"})
    assert quantized_otherwise("nabla_0.7.yaml", {}, settings, INT8) is None


def test_a_record_whose_plan_is_damaged_counts_as_one_without():
    settings = resolve({"checkpoint": "x", "prompt": "a cat"})
    assert quantized_otherwise("video.json", {"plan": "whole"}, settings, None) is None


def test_a_sidecar_keeps_the_keys_that_it_always_had():
    assert BOTH.to_sidecar() == {
        "packing": "int4",
        "text_packing": "int8",
        "in_turns": True,
        "kept": 0,
        "blocks": 2,
        "text": "stream",
        "tiles": 1,
        "pinned": False,
        "stages": {"sampling": 0},
        "host": 0,
        "slowdown": 1.0,
    }
