"""An evaluation as a whole: videos made, measured and told, by a pipeline of a checkpoint or of anyone's making."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nabla import InputError
from wan.files.atomic import atomic_path
from wan.files.json_files import write_json
from wan.parallel.distributed import DistributedContext
from wan.run.remaking import quantizations_of
from wan.run.request import Options
from wan.sampling.guided import GuidedPipeline
from wan.tools.evaluate.compared import Compared
from wan.tools.evaluate.folder import Folder, manifest_of
from wan.tools.evaluate.jobs import Job, shown
from wan.tools.evaluate.making import all_tasks, check_all, make_all, still_to_make
from wan.tools.evaluate.measuring import Instruments, measure_all
from wan.tools.evaluate.pictures import draw_sheet, write_beside
from wan.tools.evaluate.results import results_of
from wan.tools.evaluate.table import table_of
from wan.tools.evaluate.vbench import write_folders

log = logging.getLogger("wan")


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    jobs: the videos of every setting; compared: the settings, the dense baseline first
    against: the setting that others are held against
    clip: a directory or hub id; shown: how many prompts are on the sheet and side by side
    made_on: what else videos depend on, such as device and weights, as plain values
    """

    jobs: Sequence[Job]
    compared: Sequence[Compared]
    against: Compared
    folder: Folder
    device: torch.device
    options: Options = Options()
    clip: str | None = None
    shown: int = 6
    made_on: Mapping[str, Any] | None = None


def evaluate(
    plan: Plan,
    open_pipe: Callable[[], GuidedPipeline],
    processes: DistributedContext | None = None,
    makes: bool = True,
) -> dict[str, Any] | None:
    """Make the videos that are not there yet, measure them and write what came out; the results, see `results_of`.

    open_pipe: loads the pipeline, and is called only if there are videos to make
    makes: else only what is there is measured and told
    Of several processes all come here; all but the first return None. Raises `InputError` for a folder of something
    else, and as `wan.run.generation.generate_all` does.
    """
    leads = processes is None or processes.rank == 0
    manifest = manifest_of(plan.jobs, plan.compared, plan.made_on or {})
    tasks = None
    if leads:
        if not makes and not plan.folder.manifest.exists():
            raise InputError(f"out {plan.folder.path} has no videos to measure; leave --only_measure out")
        plan.folder.claim(manifest)
        plan.folder.prepare(plan.compared)
        tasks = still_to_make(plan.compared, plan.jobs, plan.folder) if makes else []
        every = len(plan.compared) * len(plan.jobs)
        log.info("videos: %d of %d are made already", every - len(tasks), every) if makes else None
    if processes is not None:
        tasks = processes.broadcast_object(tasks)
    if tasks:
        _make(plan, tasks, manifest, open_pipe, processes)
    if not leads:
        return None
    instruments = Instruments.load(plan.device, plan.clip)
    measure_all(all_tasks(plan.compared, plan.jobs), plan.folder, instruments)
    return _tell(plan, instruments)


def _make(
    plan: Plan,
    tasks: Sequence[Any],
    manifest: dict[str, Any],
    open_pipe: Callable[[], GuidedPipeline],
    processes: DistributedContext | None,
) -> None:
    start = time.perf_counter()
    pipe = open_pipe()
    loading = time.perf_counter() - start
    if processes is None or processes.rank == 0:
        # Only now is it known how memory has weights packed, which changes videos.
        packed = quantizations_of(pipe.plan and pipe.plan.to_sidecar(), plan.jobs[0].settings.fp8)
        plan.folder.claim(manifest | {"packed": packed})
    videos = list(dict.fromkeys(job.settings.video for job in plan.jobs))
    check_all(pipe, [one for one in plan.compared if any(task.compared == one for task in tasks)], videos)
    make_all(pipe, tasks, plan.folder, plan.options, loading, processes)
    if processes is not None:
        processes.wait_for_each_other()
    # What measures videos needs the room.
    del pipe
    gc.collect()
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()


def _tell(plan: Plan, instruments: Instruments) -> dict[str, Any]:
    """Write all that is for people and for programs."""
    folder, compared, jobs = plan.folder, plan.compared, plan.jobs
    results = results_of(compared, jobs, folder, plan.against, instruments, plan.made_on or {})
    write_json(folder.results, results)
    with atomic_path(folder.table) as partial:
        partial.write_text(table_of(results), encoding="utf-8")
    write_folders(compared, jobs, folder)
    few = shown(jobs, plan.shown)
    said = [f"{folder.results.name}, {folder.table.name}, {folder.vbench.name}/"]
    said += [folder.sheet.name] if draw_sheet(compared, few, folder) else []
    said += [f"{folder.beside.name}/"] if write_beside(compared, few, folder) else []
    log.info("wrote %s in %s", ", ".join(said), folder.path)
    return results
