"""The tiny checkpoints of Wan's other kinds, and what the published programs compute on them in float32, for the tests.

What the keys of a set mean is told in the names of tests that use them; `loop.noise` is where a walk starts, `cond.*`
what is made of the pictures, `dit.*` forwards and their blocks, `.high` and `.low` those of two experts.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from wan.models.wan.layout import TOKENIZER_FOLDER
from wan.models.wan.random_checkpoint import small_tokenizer

DATA = Path(__file__).parent / "data"
# The kind of each set's checkpoint.
KIND_OF = {
    "i2v": "i2v",
    "flf2v": "flf2v",
    "vace": "vace",
    "wan22_t2v": "t2v-A14B",
    "wan22_i2v": "i2v-A14B",
    "ti2v_5b": "ti2v-5B",
}
TASKS = tuple(KIND_OF)
TWO_EXPERTS = ("wan22_t2v", "wan22_i2v")


def checkpoint(task: str) -> Path:
    """In the published layout; it has no tokenizer."""
    return DATA / f"{task}-nano" / "checkpoint"


def with_tokenizer(task: str, folder: Path) -> Path:
    """The same copied to a new folder, with a tokenizer of as many words as its text encoder knows."""
    shutil.copytree(checkpoint(task), folder)
    small_tokenizer(64).save_pretrained(folder / TOKENIZER_FOLDER)
    return folder


@cache
def expected(task: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{task}-nano" / "expected.safetensors")


@cache
def settings(task: str) -> dict[str, Any]:
    return json.loads((DATA / f"{task}-nano" / "settings.json").read_text())


def input_file(task: str, name: str) -> Path:
    """Such as "image.png", "first_frame.png", "reference_0.png" or "source.npz"."""
    return DATA / f"{task}-nano" / "inputs" / name


@cache
def published_keys() -> dict[str, dict[str, Any]]:
    """Of each published file of weights, by a name such as "i2v-14B": `shapes` by names, and `parameters`."""
    told = json.loads((DATA / "wan_family_keys.json").read_text())
    return {name: {"shapes": _of_all_layers(one), "parameters": one["parameters"]} for name, one in told.items()}


def _of_all_layers(told: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by names of a table that has the first layer of each kind in place of all."""
    shapes = {name: tuple(shape) for name, shape in told["keys"].items()}
    for layers, count in told["layers"].items():
        first = f"{layers}.0."
        # The first of VACE's blocks alone takes in what its others hand on.
        own = [name for name in shapes if name.startswith(first) and ".before_proj." not in name]
        shapes |= {f"{layers}.{n}.{name.removeprefix(first)}": shapes[name] for name in own for n in range(1, count)}
    assert len(shapes) == told["tensors"]
    return shapes
