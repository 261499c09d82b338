"""What happens when the controls of the form are used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gradio as gr

from nabla import InputError
from wan.config.config_files import read_made_with
from wan.config.settings import Settings, resolve
from wan.serve.from_clients import check_names_no_file
from wan.serve.limits import Limits
from wan.serve.lora_library import LoraLibrary
from wan.serve.page.form import Form, lora_choices, size_choices, to_algorithm, to_controls, to_form, to_layer
from wan.serve.page.job_events import QUIET, Updates
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
from wan.serve.page.status import notes_html, said_html
from wan.serve.presets import Presets


class FormEvents:
    """The events of the form over presets and LoRA files. `wire` puts them on the controls."""

    def __init__(self, limits: Limits, presets: Presets, library: LoraLibrary, controls: Controls):
        self.limits = limits
        self.presets = presets
        self.library = library
        self.controls = controls

    def wire(self, page: gr.Blocks) -> None:
        """Put the events on the controls of an open page."""
        c, told = self.controls, self._told
        picture = [control for one in c.pictures.values() for control in one.every]
        shown = [c.base, c.chosen, c.preset, c.about, *c.values, *picture, c.kind, c.amount, c.window, c.told]
        attention = [c.kind, c.amount, c.window]
        algorithm = c.form["algorithm"]
        c.preset.input(told(self.choose), [c.preset, c.chosen, c.form["prompt"], c.base], shown, **QUIET)
        c.load_sidecar.upload(told(self.load), [c.load_sidecar, c.base], shown, **QUIET)
        added = {"image": (self.begin, self.begin_without), "last_image": (self.end, self.end_without)}
        for name, (add, drop) in added.items():
            one = c.pictures[name]
            one.add.upload(told(add), [one.add, c.base], [c.base, *picture, c.told], **QUIET)
            one.drop.click(told(drop), c.base, [c.base, *picture, c.told], **QUIET)
        c.add_lora.upload(told(self.add), [c.add_lora, c.base, c.form["lora"]], [c.form["lora"], c.told], **QUIET)
        # On `input`, which people cause, not `change`, which updates cause too: `read` sets the controls of attention,
        # and `spell` would answer it.
        for control in attention:
            control.input(told(self.spell), [*attention, algorithm], [algorithm, c.amount, c.window, c.told], **QUIET)
        gr.on([algorithm.submit, algorithm.blur], told(self.read), algorithm, [*attention, c.told], **QUIET)
        page.load(self.refresh, [c.base], [c.form["lora"]], **QUIET)

    def _told(self, event: Callable[..., Updates]) -> Callable[..., Updates]:
        """An event whose `InputError` is said on the page."""

        @functools.wraps(event)
        def run(*values: Any) -> Updates:
            try:
                return {self.controls.told: ""} | event(*values)
            except InputError as error:
                return {self.controls.told: said_html(str(error), "wrong")}

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
        about = about_preset(self.presets, name, settings, self.limits)
        return self._show(settings, prompt) | {c.chosen: name, c.about: about}

    def load(self, upload: str, base: Settings) -> Updates:
        """The settings of a video's sidecar into the controls."""
        sidecar = read_sidecar(Path(upload))
        check_names_no_file(sidecar)
        self.limits.check(resolve(sidecar, {"checkpoint": base.checkpoint}, needs_prompt=False))
        files = lora_choices(self.library.files(), base)
        settings, notes = from_sidecar(sidecar, base, self.presets.flags, self.presets.checkpoints(), files)
        made_with = read_made_with(upload)
        notes += quantization_notes(made_with) + picture_notes(sidecar, made_with, settings)
        c, name = self.controls, Path(upload).name
        return self._show(settings, settings.prompt) | {
            c.preset: None,
            c.chosen: None,
            c.about: f"From `{name}`. {what_runs(settings)}",
            c.told: said_html(f"Loaded the settings of {name}", "done") + notes_html(notes),
        }

    def _show(self, settings: Settings, prompt: str) -> Updates:
        c = self.controls
        form, _ = within(to_form(settings, prompt), self.limits, settings.video.geometry)
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
            c.told: said_html(f"{PICTURES[name]}s with {path.name}", "done"),
        }

    def add(self, upload: str, base: Settings, chosen: Sequence[str]) -> Updates:
        """An uploaded LoRA into the library, and among the chosen ones."""
        name = self.library.add(Path(upload))
        files = lora_choices(self.library.files(), base)
        value = list(dict.fromkeys([*chosen, name]))
        return {
            self.controls.form["lora"]: gr.update(choices=list(files), value=value),
            self.controls.told: said_html(f"Added {name}", "done"),
        }

    def refresh(self, base: Settings) -> Updates:
        """The LoRA files that there are now."""
        files = lora_choices(self.library.files(), base)
        return {self.controls.form["lora"]: gr.update(choices=list(files))}

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

    def layer(self, base: Settings, values: Sequence[Any]) -> Mapping[str, Any]:
        """The settings that the controls ask for. Raises `InputError` for what cannot be read."""
        form = Form(**{field.name: value for field, value in zip(fields(Form), values)})
        return to_layer(form, base, lora_choices(self.library.files(), base))
