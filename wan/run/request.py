"""What a run is asked for, and how it is to run. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """What to make.

    flags: settings from the command line, in the schema of the YAML files, which rank above the file `config`
    task: of `wan.run.tasks`, which the checkpoint has to be for
    default_checkpoint: if nothing names one, and a line to log then
    save_file: of the one video; or prompt_file: a video a line, in folder save_dir
    """

    flags: Mapping[str, Any]
    config: str | None
    task: str | None
    default_checkpoint: str
    about_default: str | None = None
    save_file: Path | None = None
    prompt_file: Path | None = None
    save_dir: Path | None = None


@dataclass(frozen=True)
class Options:
    """How to run, which does not change the video but where a plan of memory packs weights; see generate.py's flags.
    None: by default.

    log, report: files that say what a video's generation did; named_apart: each video has its own, named after it too
    overwrite: let a video take the place of one that is finished
    again: where the settings are from, which if it is the sidecar of a video says how its weights were packed
    """

    device: str | None = None
    offload: bool | None = None
    t5_cpu: bool = False
    compile: bool | None = None
    replicas: int | None = None
    cfg_size: int | None = None
    ulysses_size: int | None = None
    dit_fsdp: bool = False
    t5_fsdp: bool = False
    memory: str | float | None = None
    log: Path | None = None
    report: Path | None = None
    named_apart: bool = False
    overwrite: bool = False
    again: str | None = None

    def of_one(self, path: Path) -> Options:
        """These options for one of several videos, its log and report named after it too."""
        files = {"log": self.log, "report": self.report}
        own: dict[str, Any] = {
            name: file.with_stem(f"{file.stem}-{path.stem}") for name, file in files.items() if file is not None
        }
        return replace(self, **own)
