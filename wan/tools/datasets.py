"""The data sets that scripts/prepare_data.py can prepare, by the names that a config gives them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from nabla import InputError
from wan.config.checks import parse_size
from wan.config.geometry import DEFAULT_GEOMETRY
from wan.shapes.dataset import Shapes
from wan.training.video_folder import VideoFolder


def shapes(
    count: int,
    seed: int = 0,
    size: str = "256*256",
    frame_num: int = 33,
    split: str = "train",
    offset: int = 0,
    rough: float = 0.0,
    turning: float = 0.0,
    several: float = 0.0,
    alike: float = 0.0,
    brief: float = 0.0,
) -> Shapes:
    """`count` clips of `Shapes`, beginning with number `offset`."""
    width, height = parse_size(size)
    DEFAULT_GEOMETRY.check_video((width, height), frame_num)
    return Shapes(seed, count, (width, height), frame_num, split, offset, rough, turning, several, alike, brief)


# A name in a config -> what makes the data set of its options: indexable, giving (video, caption).
DATASETS: dict[str, Callable[..., Any]] = {"videos": VideoFolder, "shapes": shapes}


def open_dataset(name: str, options: dict[str, Any]) -> Any:
    """The dataset of a name in `DATASETS`; raises `InputError` for another name or options that it does not have."""
    if name not in DATASETS:
        raise InputError(f"dataset {name!r} is not known; use one of {', '.join(DATASETS)}")
    try:
        # Tried first, so that a TypeError from within a data set is not taken for a wrong option.
        inspect.signature(DATASETS[name]).bind(**options)
    except TypeError as error:
        takes = ", ".join(inspect.signature(DATASETS[name]).parameters)
        raise InputError(f"dataset {name}: {error}; its options are {takes}") from None
    return DATASETS[name](**options)
