"""Where videos, their logs and reports go: whether they can be written there, and which are made already."""

from __future__ import annotations

import logging
from collections.abc import Set
from pathlib import Path

from nabla import InputError
from wan.config.config_files import read_settings
from wan.config.settings import Settings
from wan.files.json_files import to_json
from wan.files.video import check_encoder, check_writable, make_folder, sidecar_of
from wan.observe.report import check_report
from wan.observe.run_log import check_log
from wan.run.jobs import names_of
from wan.run.request import Options, Request
from wan.run.sidecars import Video, check_free, is_made, still_to_make

log = logging.getLogger("wan")


def ending(settings: Settings) -> str:
    return ".png" if settings.video.frame_num == 1 else ".mp4"


def check_output(path: Path, settings: Settings | None = None, flag: str = "--save_file") -> None:
    """Raise `InputError` unless a video and its settings can be written to `path`, as far as can be told beforehand.

    flag: what names the path, or what to choose another of
    """
    # Without settings, as before the checkpoint is read, it is not known how many frames there will be.
    count = 0 if settings is None else settings.video.frame_num
    many = count > 1
    if path.suffix not in (".mp4", ".png") or (path.suffix == ".png" and many):
        kind = f".mp4 for {count} frames" if many else ".mp4, or in .png for one frame"
        raise InputError(f"save_file {path} must end in {kind}")
    if path.suffix == ".mp4":
        check_encoder(path.parent)
    check_writable(path, flag)
    check_writable(sidecar_of(path), flag)
    # Any .json beside it would be replaced, which may be nothing of this program's.
    if sidecar_of(path).exists():
        try:
            read_settings(sidecar_of(path))
        except InputError:
            raise InputError(
                f"{sidecar_of(path)} exists and is not the record of a video; choose another {flag}"
            ) from None
    if settings is not None:
        try:
            to_json(settings.to_dict())
        except (TypeError, ValueError) as error:
            raise InputError(f"the settings of {path} cannot be written as its record ({error}); change them") from None


def check_log_and_report(options: Options, pictures: Set[Path]) -> None:
    """Raise `InputError` unless a log and a report can be made, beside videos at absolute paths, before any is."""
    if options.log is not None:
        check_log(options.log)
    if options.report is not None:
        check_report(options.report)
        if options.report.absolute() in pictures:
            raise InputError(f"report {options.report} is the picture's own file; choose another --report")


def choose_videos(videos: list[Video], request: Request, options: Options) -> list[Video]:
    """The videos that are not made yet, each with a seed, all of them writable, with their logs and reports.

    Raises `InputError` if one would take the place of another that is finished, unless that is asked for.
    """
    if request.prompt_file is not None:
        flag = "name in the file of prompts, or --save_dir"
        folder = request.save_dir or Path()
        make_folder(folder)
        if not options.overwrite:
            # The names that settings get by themselves; any other stem is one that a line gave.
            own = names_of(settings for settings, _ in videos)
            named = [path.stem != name for (_, path), name in zip(videos, own)]
            left = still_to_make(videos, folder, named)
            log.info("prompts: %d, of which %d are made already", len(videos), len(videos) - len(left))
            videos = left
        pictures = {path.absolute() for _, path in videos}
        for _, path in videos:
            check_log_and_report(options.of_one(path), pictures)
    else:
        flag = "--save_file"
        if not options.overwrite and is_made(videos[0][1], videos[0][0]):
            log.info("made already: %s; --overwrite makes it again", videos[0][1])
            return []
    for settings, path in videos:
        check_output(path, settings, flag)
        check_free(path, settings, flag, options.overwrite)
    # Of a list, seeds are drawn only now: what is made already was to be recognised whatever seed it drew.
    return [(settings.with_seed(), path) for settings, path in videos]
