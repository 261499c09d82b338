"""The procedural data set `shapes`: short clips of moving shapes with captions of what they show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nabla import InputError
from nabla.checks import is_number
from wan.shapes.captions import caption
from wan.shapes.drawing import render
from wan.shapes.random_scenes import sample_scene
from wan.shapes.roughen import roughened
from wan.shapes.scenes import SPLITS, Scene, chance
from wan.training.schema import check_whole


class Shapes:
    """Pairs of (video, caption): (frames, height, width, 3) uint8 and one English sentence.

    Item i depends on `seed`, `split` and i alone: not on the other items, the size, nor the process that asks.

    count: how many items; `offset` is the number of the first, so that parts of one set can be made apart
    size: (width, height) in pixels
    split: "train", or "held_out" for scenes with combinations of attributes that training never sees
    rough: the share of captions that are made rougher, with words misspelt, unknown or left out
    turning: the share of scenes that are drawn again until a shape of theirs turns, which is hardest to learn
    several: the share that are drawn again until they have more than one shape
    alike: the share, of scenes of several shapes that do not cross, whose shapes share kind, colour or motion
    brief: the share of captions that leave out the background
    device: where videos are drawn, and stay
    """

    def __init__(
        self,
        seed: int,
        count: int,
        size: tuple[int, int] = (256, 256),
        frames: int = 33,
        split: str = "train",
        offset: int = 0,
        rough: float = 0.0,
        turning: float = 0.0,
        several: float = 0.0,
        alike: float = 0.0,
        brief: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, number in (("seed", seed), ("count", count), ("offset", offset)):
            check_whole(name, number)
        if split not in SPLITS:
            raise InputError(f"split {split!r} is not known; use one of {', '.join(SPLITS)}")
        shares = {"rough": rough, "turning": turning, "several": several, "alike": alike, "brief": brief}
        for name, share in shares.items():
            if not is_number(share) or not 0 <= share <= 1:
                raise InputError(f"{name} {share!r} is not a number from 0 to 1")
        self.seed, self.count, self.size, self.frames = seed, count, size, frames
        self.split, self.offset, self.device = split, offset, device
        self.rough, self.turning, self.several, self.alike, self.brief = shares.values()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        scene, sentence = self.described(index)
        return render(scene, self.size, self.frames, self.device), sentence

    def described(self, index: int) -> tuple[Scene, str]:
        """The scene and the caption of an item, without its video."""
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} is outside the {self.count} items")
        # By its number in the whole set, so that parts that are made apart, by `offset`, are parts of it.
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), self.offset + index))
        scene = sample_scene(rng, self.split, self.alike)
        # Nothing more is drawn where a share is 0, so that items stay what they are without them.
        turns = self.turning and chance(rng, self.turning)
        least = 2 if self.several and chance(rng, self.several) else 1
        while len(scene.shapes) < least or (turns and all(shape.spin == "none" for shape in scene.shapes)):
            scene = sample_scene(rng, self.split, self.alike)
        if self.brief and chance(rng, self.brief):
            scene = replace(scene, background=replace(scene.background, said=frozenset()))
        sentence = caption(scene, rng)
        return scene, roughened(sentence, rng) if self.rough and chance(rng, self.rough) else sentence
