"""What happens when the page's controls are used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from nabla import InputError
from wan.config.config_files import read_made_with
from wan.config.settings import Settings, resolve
from wan.files.plain_data import read_json
from wan.sampling.loop import Cancelled
from wan.serve.from_clients import check_names_no_file
from wan.serve.limits import Visitor
from wan.serve.lora_library import LoraLibrary
from wan.serve.page.form import Form, lora_choices, size_choices, to_algorithm, to_controls, to_form, to_layer
from wan.serve.page.guard import Hearing, Presence
from wan.serve.page.layout import (
    LEAST_AMOUNT,
    Controls,
    about_preset,
    amount_label,
    has_amount,
    has_window,
    what_runs,
    within,
)
from wan.serve.page.pictures import PICTURES, picture_notes, pictures_taken, with_picture
from wan.serve.page.sidecars import from_sidecar, quantization_notes, read_sidecar
from wan.serve.page.status import READY, made_html, notes_html, progress_html, said_html
from wan.serve.presets import Presets
from wan.serve.shown import sidecar_to_share
from wan.serve.studio import Job, JobProgress, JobResult, Studio

# New values or looks of controls, by control.
Updates = dict[Any, Any]
# Private: gradio's public API would offer the events to programs, with documentation.
QUIET = {"show_progress": "hidden", "api_visibility": "private"}


class Events:
    """The page's events over a studio, its presets and its LoRA files. `wire` puts them on the controls."""

    def __init__(self, studio: Studio, presets: Presets, library: LoraLibrary, controls: Controls, presence: Presence):
        self.studio = studio
        self.presets = presets
        self.library = library
        self.controls = controls
        self.presence = presence

    def wire(self, page: gr.Blocks) -> None:
        """Put the events on the controls of an open page."""
        c, told = self.controls, self._told
        picture = [control for one in c.pictures.values() for control in one.every]
        shown = [c.base, c.chosen, c.preset, c.about, *c.values, *picture, c.kind, c.amount, c.window, c.said]
        attention = [c.kind, c.amount, c.window]
        algorithm = c.form["algorithm"]
        c.preset.input(told(self.choose), [c.preset, c.chosen, c.form["prompt"], c.base], shown, **QUIET)
        c.load_sidecar.upload(told(self.load), [c.load_sidecar, c.base], shown, **QUIET)
        added = {"image": (self.begin, self.begin_without), "last_image": (self.end, self.end_without)}
        for name, (add, drop) in added.items():
            one = c.pictures[name]
            one.add.upload(told(add), [one.add, c.base], [c.base, *picture, c.said], **QUIET)
            one.drop.click(told(drop), c.base, [c.base, *picture], **QUIET)
        c.add_lora.upload(told(self.add), [c.add_lora, c.base, c.form["lora"]], [c.form["lora"], c.said], **QUIET)
        # On `input`, which people cause, not `change`, which updates cause too: `read` sets the controls of attention,
        # and `spell` would answer it.
        for control in attention:
            control.input(told(self.spell), [*attention, algorithm], [algorithm, c.amount, c.window, c.said], **QUIET)
        gr.on([algorithm.submit, algorithm.blur], told(self.read), algorithm, [*attention, c.said], **QUIET)
        results = [c.generate, c.cancel, c.said, c.picture, c.video, c.save_video, c.save_sidecar]
        gr.on(
            [c.generate.click, c.form["prompt"].submit],
            self.generate,
            [c.base, *c.values],
            results,
            # Gradio runs one call of an event at a time by default; here the studio's line says whose turn it is.
            concurrency_limit=None,
            trigger_mode="once",
            **QUIET,
        )
        # Past gradio's queue, lest it wait there for what it is to end.
        c.cancel.click(self.cancel, queue=False, **QUIET)
        page.load(self.refresh, [c.base], [c.form["lora"], c.said], **QUIET)
        page.unload(self.leave)

    def _told(self, event: Callable[..., Updates]) -> Callable[..., Updates]:
        """An event whose `InputError` is said on the page."""

        @functools.wraps(event)
        def run(*values: Any) -> Updates:
            try:
                return event(*values)
            except InputError as error:
                return {self.controls.said: said_html(str(error), "wrong")}

        return run

    def choose(self, name: str | None, chosen: str | None, prompt: str, base: Settings) -> Updates:
        """A preset's settings into the controls; the prompt stays, and pictures where the preset takes them."""
        c = self.controls
        if name == chosen:
            # Its control was only passed by, which must not undo what the others were set to.
            return {c.chosen: chosen}
        settings = self.presets.settings(name)
        taken = pictures_taken(settings)
        settings = replace(settings, **{name: path for name, path in base.inputs.items() if name in taken})
        about = about_preset(self.presets, name, settings, self.studio.limits)
        return self._show(settings, prompt) | {c.chosen: name, c.about: about}

    def load(self, upload: str, base: Settings) -> Updates:
        """The settings of a video's sidecar into the controls."""
        sidecar = read_sidecar(Path(upload))
        check_names_no_file(sidecar)
        self.studio.limits.check(resolve(sidecar, {"checkpoint": base.checkpoint}, needs_prompt=False))
        files = lora_choices(self.library.files(), base)
        settings, notes = from_sidecar(sidecar, base, self.presets.flags, self.presets.checkpoints(), files)
        made_with = read_made_with(upload)
        notes += quantization_notes(made_with) + picture_notes(sidecar, made_with, settings)
        c, name = self.controls, Path(upload).name
        return self._show(settings, settings.prompt) | {
            c.preset: None,
            c.chosen: None,
            c.about: f"From `{name}`. {what_runs(settings)}",
            c.said: said_html(f"Loaded the settings of {name}", "done") + notes_html(notes),
        }

    def _show(self, settings: Settings, prompt: str) -> Updates:
        c = self.controls
        form, _ = within(to_form(settings, prompt), self.studio.limits, settings.video.geometry)
        updates: Updates = {c.form[field.name]: getattr(form, field.name) for field in fields(Form)}
        files = lora_choices(self.library.files(), settings)
        updates[c.form["lora"]] = gr.update(choices=list(files), value=list(form.lora))
        updates[c.form["size"]] = gr.update(choices=size_choices(settings), value=form.size)
        return updates | self._show_pictures(settings) | self.read(form.algorithm)

    def _show_pictures(self, settings: Settings) -> Updates:
        """Settings whose pictures are shown already, or taken away."""
        updates, taken = {self.controls.base: settings}, pictures_taken(settings)
        for name, one in self.controls.pictures.items():
            has = name in settings.inputs
            updates[one.add] = gr.update(visible=name in taken)
            updates[one.drop] = gr.update(visible=has)
            updates[one.shown] = gr.update(visible=True) if has else gr.update(visible=False, value=None)
        return updates

    def begin(self, upload: str, base: Settings) -> Updates:
        """An uploaded picture as what videos begin with; its path stays on the server, in the settings."""
        return self._add_picture("image", Path(upload), base)

    def begin_without(self, base: Settings) -> Updates:
        """Videos of text alone again."""
        return self._show_pictures(replace(base, image=None))

    def end(self, upload: str, base: Settings) -> Updates:
        """Likewise as what videos end with."""
        return self._add_picture("last_image", Path(upload), base)

    def end_without(self, base: Settings) -> Updates:
        """Videos that end as they may."""
        return self._show_pictures(replace(base, last_image=None))

    def _add_picture(self, name: str, path: Path, base: Settings) -> Updates:
        settings, thumbnail = with_picture(base, name, path)
        c = self.controls
        return self._show_pictures(settings) | {
            c.pictures[name].shown: gr.update(value=thumbnail, visible=True),
            c.said: said_html(f"{PICTURES[name]}s with {path.name}", "done"),
        }

    def add(self, upload: str, base: Settings, chosen: Sequence[str]) -> Updates:
        """An uploaded LoRA into the library, and among the chosen ones."""
        name = self.library.add(Path(upload))
        files = lora_choices(self.library.files(), base)
        value = list(dict.fromkeys([*chosen, name]))
        return {
            self.controls.form["lora"]: gr.update(choices=list(files), value=value),
            self.controls.said: said_html(f"Added {name}", "done"),
        }

    def refresh(self, base: Settings) -> Updates:
        """The LoRA files that there are now."""
        files = lora_choices(self.library.files(), base)
        return {self.controls.form["lora"]: gr.update(choices=list(files)), self.controls.said: READY}

    def spell(self, kind: str, amount: float | None, window: str, before: str) -> Updates:
        """The algorithm that the controls of attention spell, which said another one before."""
        algorithm = to_algorithm(kind, amount, window, before)
        c = self.controls
        return {
            c.form["algorithm"]: algorithm,
            c.amount: gr.update(label=amount_label(kind), visible=has_amount(kind)),
            c.window: gr.update(visible=has_window(kind)),
        }

    def read(self, algorithm: str) -> Updates:
        """The controls of attention as an algorithm sets them."""
        kind, amount, window = to_controls(algorithm)
        c = self.controls
        return {
            c.kind: kind,
            c.amount: gr.update(
                value=amount, minimum=min(LEAST_AMOUNT, amount), label=amount_label(kind), visible=has_amount(kind)
            ),
            c.window: gr.update(value=window, visible=has_window(kind)),
        }

    def generate(self, request: gr.Request, base: Settings, *values: Any) -> Iterator[Updates]:
        """Make the video of the controls, and show how far it is."""
        c = self.controls
        idle = {c.generate: gr.update(visible=True), c.cancel: gr.update(visible=False)}
        hidden = {c.picture: gr.update(visible=False, value=None)}
        try:
            job = self.studio.submit(self._layer(base, values), _visitor(request))
        except InputError as error:
            yield {c.said: said_html(str(error), "wrong")}
            return
        try:
            yield from self._follow(job)
            made = job.result()
        except Cancelled:
            yield idle | hidden | {c.said: said_html("Cancelled")}
        except InputError as error:
            yield idle | hidden | {c.said: said_html(str(error), "wrong")}
        # A bug: the visitor gets a line, and gradio writes the traceback to the server's output.
        except Exception:
            yield idle | hidden | {c.said: said_html("Something broke; the program's output says what", "wrong")}
            raise
        else:
            yield idle | self._show_made(made, job.progress)
        finally:
            # Who leaves the page wants no video.
            job.cancel()

    def _layer(self, base: Settings, values: Sequence[Any]) -> Mapping[str, Any]:
        form = Form(**{field.name: value for field, value in zip(fields(Form), values)})
        return to_layer(form, base, lora_choices(self.library.files(), base))

    def _follow(self, job: Job) -> Iterator[Updates]:
        """What to show while a job runs; pictures only when they are new."""
        c = self.controls
        yield {
            c.generate: gr.update(visible=False),
            c.cancel: gr.update(visible=True),
            c.save_video: gr.update(visible=False),
            c.save_sidecar: gr.update(visible=False),
        }
        shown = None
        # `leave` is of pages that are closed. Who asks by raw requests, and does not listen, has none.
        hearing = Hearing(self.presence, job.visitor.session)
        for progress in job.changes():
            if not hearing.goes_on():
                job.cancel()
            updates: Updates = {c.said: progress_html(progress)}
            # The same array would be encoded and sent again at every look.
            if progress.preview is not shown:
                shown = progress.preview
                updates |= {c.picture: gr.update(value=shown, visible=True), c.video: gr.update(visible=False)}
            yield updates

    def _show_made(self, made: JobResult, progress: JobProgress) -> Updates:
        c, is_video = self.controls, made.path.suffix == ".mp4"
        # Nothing is served from the studio's folder: visitors get a copy, in a folder that its content names.
        path = save_file_to_cache(made.path, c.video.GRADIO_CACHE)
        return {
            c.said: made_html(made, progress.notes),
            c.picture: gr.update(value=None if is_video else path, visible=not is_video),
            c.video: gr.update(value=path if is_video else None, visible=is_video),
            c.save_video: gr.update(value=path, visible=True, label="Save video" if is_video else "Save picture"),
            c.save_sidecar: gr.update(value=_shared_sidecar(made, Path(path).parent), visible=True),
        }

    def cancel(self, request: gr.Request) -> None:
        self.studio.cancel(_visitor(request))

    def leave(self, request: gr.Request) -> None:
        self.cancel(request)


def _visitor(request: gr.Request) -> Visitor:
    return Visitor.at(request.client.host if request.client else None, request.session_hash)


def _shared_sidecar(made: JobResult, folder: Path) -> str:
    """A copy of a video's sidecar that visitors may have, beside the copy of their video."""
    path = folder / made.sidecar.name
    path.write_text(sidecar_to_share(read_json(made.sidecar)), encoding="utf-8")
    return str(path)
