"""A server of videos with OpenAI's API, by Wan or Kandinsky-5 and NABLA attention: python serve.py"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wan.observe.console import exit_with, log_to_stderr, positive, run_program, say
from wan.run.flag_types import boolean, duration, span
from wan.run.flags import ABOUT_SMALL, SMALL_CHECKPOINT, Parser, add_shared, options_of

if TYPE_CHECKING:
    from wan.serve.workers.replica import Engine

log = logging.getLogger("wan")

NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--config", action="append", metavar="NAME.yaml",
        help="a model to offer: a YAML file, by path or by name in configs/; may be given several times, the first is "
        "the usual one (default: the small checkpoint)")  # fmt: skip
    add("--ckpt_dir", help="checkpoint: a directory or a hub id, whatever the configs name")
    add_shared(parser, "--device", "--dtype")
    add("--offload_model", type=boolean, nargs="?", const=True, help="keep idle components in host memory")
    add_shared(parser, "--t5_cpu", "--memory")
    add("--host", default="127.0.0.1", help="address to serve; 0.0.0.0 for every machine that reaches this one")
    add("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    add("--allowed_host", action="append", default=[], metavar="NAME",
        help="a further name, or name:port, that the server is reached by; may be given several times")  # fmt: skip
    add(
        "--api_key_file",
        type=Path,
        metavar="FILE",
        help="tokens that are asked for, one a line; each sees its own jobs",
    )
    add("--limits", type=Path, metavar="FILE.yaml", help="what may be asked for, see docs/serving.md")
    add("--save_dir", type=Path, default=Path("outputs"), help="where jobs and videos are kept (default: outputs)")
    add("--keep_for", type=duration, metavar="TIME", help="how long they are, such as 12h or 7d (default: for ever)")
    add("--keep_gb", type=float, metavar="GB", help="how much they may hold, beyond which the first made go first")
    add("--lora_dir", type=Path, help="LoRA files that requests may name (default: SAVE_DIR/loras)")
    add("--engine", choices=("local", "ray"), default="local", help="where videos are made (default: one process)")
    add("--replicas", type=span, metavar="N", help="with ray: models that make videos side by side, or MIN-MAX of them")
    add("--gpus_per_replica", type=positive, metavar="N", help="with ray: GPUs that share each video (default: 1)")
    args = parser.parse_args(argv)
    if args.engine == "local" and (args.replicas or args.gpus_per_replica):
        parser.error("--replicas and --gpus_per_replica are for --engine ray; leave them out, or add that")
    if args.memory is not None and (args.gpus_per_replica or 1) > 1:
        parser.error("--memory plans for one GPU, and --gpus_per_replica has several share a video; leave out either")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    log_to_stderr()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        say(f"error: the server needs {', '.join(missing)}; pip install -r requirements-serve.txt")
        return 2
    if args.engine == "ray" and importlib.util.find_spec("ray") is None:
        say("error: --engine ray needs Ray; pip install -r requirements-ray.txt")
        return 2
    return run_program(run, args, interrupted="interrupted; videos that were being made wait for the next start")


def run(args: argparse.Namespace) -> None:
    """Serve what the flags ask for, until it is interrupted."""
    # Imported after parsing: --help and a mistyped flag should not wait for torch and FastAPI.
    from wan.serve.api.access import Tokens
    from wan.serve.api.metrics import MeasuredQueue, Metrics
    from wan.serve.api.models import Model, Models
    from wan.serve.api.server import listen, make_app, make_server, url_of
    from wan.serve.api.service import Service
    from wan.serve.hosts import LOOPBACK, Hosts
    from wan.serve.jobs.store import QueueLimits
    from wan.serve.limits import Limits, read_limits
    from wan.serve.lora_library import LoraLibrary
    from wan.serve.workers.making import making

    flags = {key: value for key, value in (("checkpoint", args.ckpt_dir), ("dtype", args.dtype)) if value is not None}
    hosts = Hosts(args.host, args.allowed_host)
    tokens = Tokens() if args.api_key_file is None else Tokens.read(args.api_key_file)
    models = Models(Model.open(config, flags, SMALL_CHECKPOINT) for config in args.config or [None])
    usual = [model.resolve({}, needs_prompt=False) for model in models.by_name.values()]
    limits = Limits.of({} if args.limits is None else read_limits(args.limits), usual)
    library = LoraLibrary(args.lora_dir or args.save_dir / "loras")
    counted, metrics = QueueLimits(limits.waiting, limits.waiting_of_source), Metrics()
    queue = MeasuredQueue.open(args.save_dir, limits=counted, keep_seconds=args.keep_for, metrics=metrics)
    # Once all that may be wrong with other flags is known, since Ray takes seconds to start.
    engine = make_engine(args)
    most_bytes = None if args.keep_gb is None else int(args.keep_gb * 1e9)
    with closing(queue), listen(args.host, args.port) as listening, making(queue, engine, most_bytes) as dispatcher:
        service = Service(queue, models, limits, tokens, metrics, library, dispatcher.is_alive)
        if args.config is None and args.ckpt_dir is None:
            log.info(ABOUT_SMALL)
        if not tokens and args.host not in LOOPBACK:
            log.warning("warning: whoever reaches %s can make videos; --api_key_file asks for tokens", args.host)
        url = url_of(listening)
        log.info("server: %s/v1, models: %s; what can be asked: %s/docs", url, ", ".join(models.by_name), url)
        make_server(make_app(service, hosts)).run(sockets=[listening])


def make_engine(args: argparse.Namespace) -> Engine:
    """Where videos are made, by the flags. Raises `InputError`."""
    from wan.memory.budget import check_memory
    from wan.parallel.distributed import device_named
    from wan.serve.workers.local_engine import LocalEngine
    from wan.serve.workers.maker import Maker

    # Of generate.py's, --replicas is how one run of several processes is laid out.
    options = replace(options_of(args), replicas=None)
    make_maker = partial(Maker, options, SMALL_CHECKPOINT)
    if args.engine == "ray":
        from wan.serve.workers.ray_engine import RayEngine

        return RayEngine(make_maker, args.replicas or (1, 1), args.gpus_per_replica or 1, args.device)
    check_memory(options.memory, device_named(args.device), None, args.offload_model)
    return LocalEngine(make_maker)


if __name__ == "__main__":
    exit_with(main())
