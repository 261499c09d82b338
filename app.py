"""A web page that makes videos with Wan or Kandinsky-5 and NABLA attention: python app.py"""

from __future__ import annotations

import argparse
import importlib.util
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from wan.observe.console import exit_with, log_to_stderr, run_program, say
from wan.run.flag_types import boolean
from wan.run.flags import SMALL_CHECKPOINT, Parser, add_shared, options_of


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--ckpt_dir", help="checkpoint: a directory or a hub id, whatever a preset names (default: the small one)")
    add("--config", help="the preset to begin with: a YAML file, by path or by name in configs/")
    add_shared(parser, "--device", "--dtype")
    add("--offload_model", type=boolean, nargs="?", const=True, help="keep idle components in host memory")
    add_shared(parser, "--t5_cpu", "--memory")
    add("--save_dir", type=Path, default=Path("outputs"), help="where videos are kept (default: outputs)")
    add("--lora_dir", type=Path, help="LoRA files to offer, and where added ones are kept (default: SAVE_DIR/loras)")
    add("--host", default="127.0.0.1", help="address to serve; 0.0.0.0 for every machine that reaches this one")
    add("--port", type=int, help="default: the first free one from 7860")
    add("--allowed_host", action="append", default=[], metavar="NAME",
        help="a further name, or name:port, that the page is reached by: that of a reverse proxy, or of this machine; "
        "may be given several times")  # fmt: skip
    add("--max_frames", type=int, help="most frames of a video (default: 241, or what the presets need)")
    add("--max_pixels", type=int, help="most pixels of a frame (default: 921600, or what the presets need)")
    add("--max_steps", type=int, help="most steps of a video (default: 100, or what the presets need)")
    add("--share", action="store_true", help="serve through a public link of gradio's too, to anyone who has it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    log_to_stderr()
    if importlib.util.find_spec("gradio") is None:
        say("error: the page needs gradio; pip install -r requirements-page.txt")
        return 2
    return run_program(run, args, interrupted="interrupted")


def run(args: argparse.Namespace) -> None:
    """Serve the page that the flags ask for, until it is interrupted."""
    # Imported after parsing: --help and a mistyped flag should not wait for torch and gradio.
    from wan.files.atomic import FolderInUse
    from wan.memory.budget import check_memory
    from wan.parallel.distributed import device_named
    from wan.serve.jobs.queue import Queue
    from wan.serve.limits import Limits
    from wan.serve.lora_library import LoraLibrary
    from wan.serve.page.server import Address, make_page, serve
    from wan.serve.page.visible import VisibleJobs
    from wan.serve.presets import Presets
    from wan.serve.workers.local_engine import LocalEngine
    from wan.serve.workers.maker import Maker
    from wan.serve.workers.making import making

    flags = {key: value for key, value in (("checkpoint", args.ckpt_dir), ("dtype", args.dtype)) if value is not None}
    address = Address(args.host, args.port, args.share, tuple(args.allowed_host))
    options = options_of(args)
    check_memory(options.memory, device_named(args.device), None, args.offload_model)
    presets = Presets(flags, SMALL_CHECKPOINT, args.config)
    most = {"frames": args.max_frames, "pixels": args.max_pixels, "steps": args.max_steps}
    limits = Limits.of(most, map(presets.settings, presets.names))
    library = LoraLibrary(args.lora_dir or args.save_dir / "loras")
    with closing(Queue.open(args.save_dir)) as queue, ExitStack() as stack:
        try:
            stack.enter_context(making(queue, LocalEngine(partial(Maker, options, SMALL_CHECKPOINT))))
        except FolderInUse:
            say(f"the server of {args.save_dir} makes its videos, by its own flags of memory and device")
        jobs = VisibleJobs(queue, everyones=address.is_private)
        serve(make_page(jobs, limits, presets, library), library, address)


if __name__ == "__main__":
    exit_with(main())
