"""Under torchrun: latents and a video of Kandinsky-5 in every layout against one process's, a JSON line a case.

The checkpoint that the argument names is then loaded in several ways, by two processes also with step caches: in the
same run, since each start takes long.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))

import kandinsky_loaded
import kandinsky_set

from nabla import NablaConfig
from wan.attention.apply import apply_attention
from wan.config.settings import VideoSettings
from wan.models.kandinsky.pipeline import Kandinsky5
from wan.models.kandinsky.processor import TRANSFORMER
from wan.models.kandinsky.random_text import clip_tokenizer, qwen_tokenizer
from wan.observe.observer import Observer
from wan.parallel.distributed import DistributedContext
from wan.parallel.layout import ParallelLayout
from wan.parallel.sequence_parallel import apply_sequence_parallel
from wan.sampling.guided import make_video
from wan.sampling.request import VideoRequest

# Of the set's text encoders, and room for all bytes.
VOCABULARY = 300
CONFIGS = {
    "dense": NablaConfig(),
    "nabla": NablaConfig(threshold=0.4, dense_layers=(0,)),
    "masks kept": NablaConfig(threshold=0.4, window=(1, 1, 1), mask_refresh=2),
}
# Layouts and numbers of heads by how many processes there are.
CASES = {
    2: [(ParallelLayout(ulysses=2), 2), (ParallelLayout(ulysses=2), 7), (ParallelLayout(cfg=2), 2)],
    4: [(ParallelLayout(ulysses=4), 7), (ParallelLayout(cfg=2, ulysses=2), 3)],
}


def main(checkpoint: Path) -> None:
    with DistributedContext.join("cpu") as processes:
        for layout, heads in CASES[processes.world_size]:
            processes.init_meshes(layout)
            for name, config in CONFIGS.items():
                if layout.cfg == 2 and config.mask_refresh > 1:
                    continue
                own = sample(make(heads, config, processes))
                if processes.rank == 0:
                    alone = sample(make(heads, config, None))
                    error = ((own - alone).norm() / alone.norm()).item()
                    say(processes, layout=asdict(layout), heads=heads, attention=name, error=error)
            own = generate(make(heads, CONFIGS["nabla"], processes))
            if processes.rank == 0:
                alone = generate(make(heads, CONFIGS["nabla"], None))
                same = own is not None and np.abs(own.astype(int) - alone).max() <= 1
                say(processes, layout=asdict(layout), heads=heads, attention="generate", same=bool(same))
        for result in kandinsky_loaded.cases(processes, checkpoint):
            say(processes, what="loaded", **result)
        if processes.world_size == 2:
            for result in kandinsky_loaded.cached_cases(processes, checkpoint):
                say(processes, what="cached", **result)


def make(heads: int, config: NablaConfig, processes: DistributedContext | None) -> Kandinsky5:
    """A pipeline on all processes, or on this one alone."""
    tokenizers = qwen_tokenizer(VOCABULARY), clip_tokenizer(VOCABULARY)
    pipe = kandinsky_set.pipeline(kandinsky_set.small_transformer(heads), tokenizers, processes)
    if processes is not None and processes.layout.ulysses > 1:
        apply_sequence_parallel(pipe.transformer, processes.ulysses_mesh, TRANSFORMER)
    apply_attention([pipe.transformer], config, TRANSFORMER)
    return pipe


def sample(pipe: Kandinsky5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise, image = (torch.randn(frames, 18, 22, 4, generator=generator) for frames in (3, 1))
    texts = [torch.randn(*shape, generator=generator) for shape in ((9, 48), (1, 32), (5, 48), (1, 32))]
    return pipe.sample(*texts, noise=noise, steps=3, image_latents=image)


def generate(pipe: Kandinsky5) -> np.ndarray | None:
    """A video that begins with a picture, smaller than `pipe.generate` would have it."""
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    sampling = replace(pipe.sampling, steps=2, seed=3)
    return make_video(pipe, VideoRequest("A red circle", VideoSettings((64, 48), 5), sampling, picture), Observer())


def say(processes: DistributedContext, **result: object) -> None:
    if processes.rank == 0:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
