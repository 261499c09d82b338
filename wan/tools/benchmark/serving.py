"""A warm server beside `generate` of the same pipeline: what HTTP, a queue and a process of its own add to a video."""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nabla import NablaConfig
from wan.config.attention_settings import attention_to_dict
from wan.config.settings import Settings, VideoSettings
from wan.files.video import write_with_sidecar
from wan.memory.planner import MemoryPlan
from wan.models.checkpoint import Checkpoint
from wan.run.request import Options
from wan.tools.benchmark.models import MODELS
from wan.tools.benchmark.placing import clean, limited, plan_within
from wan.tools.benchmark.run import PROMPT, random_pipeline
from wan.tools.benchmark.timing import Row, label, row_of, sparse_configs

SEED = 0


@dataclass(frozen=True)
class RandomPipeline:
    """What the server's process loads in place of a checkpoint's weights: those of the benchmark's model, at random."""

    args: argparse.Namespace
    video: VideoSettings
    plan: MemoryPlan

    def __call__(
        self, checkpoint: Checkpoint, every: list[Settings], device: torch.device, options: Options, processes: None
    ) -> Any:
        return random_pipeline(self.args, self.video, device, self.plan, every[0].attention)[0]


@torch.no_grad()
def serve_mode(args: argparse.Namespace, videos: list[VideoSettings], device: torch.device) -> Iterator[Row]:
    """For each video and attention: `generate`, with its file, and from a request to the first byte of its answer.

    Each warms up by one video. An `overhead` compares with the row of the same work without a server; what a request
    takes beside the stages that the server tells is `beside_the_job_ms`.
    """
    for video in videos:
        for config in ([] if args.no_dense else [NablaConfig()]) + sparse_configs(args):
            with tempfile.TemporaryDirectory() as folder, limited(args, device, None) as budget:
                plan = plan_within(args, video, budget, device)
                yield from _rows(args, video, device, plan, config, Path(folder))


def _rows(
    args: argparse.Namespace,
    video: VideoSettings,
    device: torch.device,
    plan: MemoryPlan,
    config: NablaConfig,
    folder: Path,
) -> Iterator[Row]:
    name = f"{label(video)}, {args.steps} steps, {config.algorithm}"
    make = partial(random_pipeline, args, video, device, plan, config)
    alone, written = _generated(make, video.fps, args.repeats, folder)
    yield row_of(f"{name}: generate", alone)
    yield row_of(f"{name}: generate, and its file", written)
    clean(device)
    # Of the family, so that its settings are; its weights are never read.
    MODELS[args.model].write_small(folder / "checkpoint")
    layer = {
        "sampling": {"steps": args.steps, "seed": SEED},
        "video": video.to_dict(),
        "attention": attention_to_dict(config),
    }
    load = RandomPipeline(args, video, plan)
    asked, stages = [], []
    with served(folder, Options(device=args.device), layer, load) as port:
        for _ in range(1 + args.repeats):
            milliseconds, seconds = first_byte(port)
            asked.append(milliseconds)
            stages.append(seconds)
    making = [1000 * sum(one[stage] for stage in ("text", "sampling", "decode")) for one in stages[1:]]
    overhead = statistics.median(making) / statistics.median(alone) - 1
    yield row_of(f"{name}: the server's text, sampling and decoding", making) | {"overhead": f"{overhead:+.2%}"}
    own = [whole - 1000 * sum(one.values()) for whole, one in zip(asked[1:], stages[1:])]
    whole = statistics.median(asked[1:]) / statistics.median(written) - 1
    yield row_of(f"{name}: from a request to the first byte", asked[1:]) | {
        "beside_the_job_ms": round(statistics.median(own), 1),
        "writing_ms": round(1000 * statistics.median(one["writing"] for one in stages[1:])),
        "overhead": f"{whole:+.2%}",
        "first_s": round(asked[0] / 1000, 1),
    }


def _generated(
    make: Callable[[], tuple[Any, dict[str, Any]]], fps: int, repeats: int, folder: Path
) -> tuple[list[float], list[float]]:
    """Milliseconds of `generate`, and of the same with writing the video, after one that warms up."""
    # Made here, so that it is gone before the server's is loaded.
    pipe, given = make()
    alone, written = [], []
    for number in range(1 + repeats):
        start = time.perf_counter()
        frames = pipe.generate(PROMPT, seed=SEED, exact_size=True, **given)
        alone.append(1000 * (time.perf_counter() - start))
        write_with_sidecar(folder / f"{number}.mp4", frames, fps, {})
        written.append(1000 * (time.perf_counter() - start))
    return alone[1:], written[1:]


@contextmanager
def served(folder: Path, options: Options, layer: dict[str, Any], load: RandomPipeline) -> Iterator[int]:
    """A server of one model with settings of its own, in this process and one of its own; gives the port."""
    # Imported here: other modes need no FastAPI.
    from wan.serve.api.access import Tokens
    from wan.serve.api.metrics import MeasuredQueue, Metrics
    from wan.serve.api.models import Model, Models
    from wan.serve.api.server import listen, make_app, make_server
    from wan.serve.api.service import Service
    from wan.serve.hosts import Hosts
    from wan.serve.limits import Limits
    from wan.serve.workers.dispatcher import Dispatcher
    from wan.serve.workers.local_engine import LocalEngine
    from wan.serve.workers.maker import Maker

    checkpoint, metrics = Checkpoint.open(folder / "checkpoint"), Metrics()
    model = Model("random", checkpoint, {}, {"checkpoint": checkpoint.name} | layer)
    queue = MeasuredQueue.open(folder / "outputs", metrics=metrics)
    engine = LocalEngine(partial(Maker, options, checkpoint.name, load))
    limits = Limits.of({}, [model.resolve({}, needs_prompt=False)])
    service = Service(queue, Models([model]), limits, Tokens(), metrics)
    with closing(queue), listen("127.0.0.1", 0) as listening, Dispatcher(queue, engine):
        server = make_server(make_app(service, Hosts("127.0.0.1")))
        # Not the main thread's, whose signals it would take.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def first_byte(port: int) -> tuple[float, dict[str, float]]:
    """Milliseconds from a request for a video to the first byte of the file, and the seconds of its stages."""
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        start = time.perf_counter()
        asked = {"prompt": PROMPT}
        connection.request("POST", "/v1/videos/sync", json.dumps(asked), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        first = answer.read(1)
        milliseconds = 1000 * (time.perf_counter() - start)
        if answer.status != 200 or not first:
            raise RuntimeError(f"the server answered {answer.status}: {(first + answer.read()).decode()[:500]}")
        answer.read()
        return milliseconds, json.loads(answer.headers["X-Stage-Durations"])
