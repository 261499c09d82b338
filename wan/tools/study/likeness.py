"""How like whole videos are to those of dense attention from the same noise, and whether they show what is said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from wan.shapes.measure import score
from wan.tools.quality import psnr, ssim
from wan.tools.study.bench import Bench
from wan.tools.study.settings import DENSE, Setting

# Of frames, one is looked at for structural similarity, which takes as long as to make the video.
SSIM_STRIDE = 4
# Equal videos have no finite one, and a mean needs one.
MOST_PSNR = 100.0
SHOWN = ("colour", "kind", "direction", "all")


class Likeness:
    """Videos of some sentences and seeds, with those of dense attention, made once.

    each: `map`, or that of worker processes, by which it is measured what videos show; None: it is not
    """

    def __init__(self, bench: Bench, sentences: int, seeds: int, each: Callable[..., Iterable] | None = None):
        self.bench, self.seeds, self.each = bench, seeds, each
        prompts, wanted = zip(*bench.sentences(sentences))
        self.prompts, self.wanted = list(prompts), list(wanted) * seeds
        self.reference: list[Tensor] = []

    def measure(self, setting: Setting) -> dict[str, list[float]]:
        """PSNR and SSIM to the dense videos, and whether colours, kinds and directions are right, 0 or 1."""
        if setting.rule == DENSE and setting.weights is None:
            self.reference = []
            return self._shown(self._kept(self._made(setting), self.reference))
        if not self.reference:
            self.reference.extend(self._made(Setting(DENSE)))
        found: dict[str, list[float]] = {"psnr": [], "ssim": []}
        return self._shown(self._compared(self._made(setting), found)) | found

    def _made(self, setting: Setting) -> Iterator[Tensor]:
        return self.bench.videos(self.bench.set_up(setting), self.prompts, self.seeds)

    def _shown(self, videos: Iterator[Tensor]) -> dict[str, list[float]]:
        """Uses up the videos."""
        if self.each is None:
            for _ in videos:
                pass
            return {}
        results = list(self.each(score, videos, self.wanted))
        return {name: [float(result[name]) for result in results] for name in SHOWN}

    def _kept(self, videos: Iterator[Tensor], kept: list[Tensor]) -> Iterator[Tensor]:
        for video in videos:
            kept.append(video)
            yield video

    def _compared(self, videos: Iterator[Tensor], found: dict[str, list[float]]) -> Iterator[Tensor]:
        for video, dense in zip(videos, self.reference, strict=True):
            here = [one.to(self.bench.device) for one in (video, dense)]
            found["psnr"].append(min(MOST_PSNR, psnr(*here)))
            found["ssim"].append(ssim(*(one[::SSIM_STRIDE] for one in here)))
            yield video
