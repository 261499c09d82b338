"""The controls of the page and where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import gradio as gr

from nabla.config import BACKEND_NAMES
from wan.config.checks import SOLVERS
from wan.config.geometry import DEFAULT_GEOMETRY, Geometry
from wan.config.settings import Settings
from wan.serve.limits import Limits
from wan.serve.page.form import DENSE, SHARE, THRESHOLD, WINDOW, Form, lora_choices, size_choices, to_controls, to_form
from wan.serve.page.pictures import PICTURES, pictures_taken
from wan.serve.page.status import NOTHING, STARTING
from wan.serve.presets import Presets
from wan.serve.shown import name_of

# Of a slider, unless settings go beyond.
LEAST_AMOUNT = 0.05
TITLE = "# Wan and Kandinsky-5 with NABLA\nVideos from text and pictures, with attention only where it matters."
# Jobs that are listed at first, and as many more each time that older ones are asked for.
ROWS = 20
# What is clicked in the list says what it does, and its row with which job. What ends for good is asked twice.
CLICKS = """
element.addEventListener('click', (event) => {
  const does = event.target.closest('[data-does]')?.dataset.does, row = event.target.closest('[data-job]');
  if (!does || (does === 'delete' && !confirm(`${event.target.closest('button').title} this video?`))) return;
  trigger('click', {does: does, job: row?.dataset.job});
});
"""
PROMPT = "A red circle moves from left to right on a white background"


@dataclass(frozen=True)
class PictureControls:
    """A picture that videos begin or end with: how it is added and taken away, and what it looks like."""

    add: gr.UploadButton
    drop: gr.Button
    shown: gr.Image

    @property
    def every(self) -> list[gr.components.Component]:
        return [self.add, self.drop, self.shown]


@dataclass(frozen=True)
class Controls:
    """What the events of the page read and write.

    base: the settings that the form was made of, with the pictures that were added; chosen: the preset that they are,
        or None
    told: a line on what was done last with the controls
    shown: the id of the job that is shown, or None; rows: how many are listed; seen: what the browser shows of them
    said: how far the job is that is shown; result: what there is to be seen of it; listed: the jobs of the folder
    pictures: of `PICTURES`
    form: the controls of `Form`, by its fields' names
    """

    base: gr.State
    chosen: gr.State
    preset: gr.Dropdown
    about: gr.Markdown
    form: Mapping[str, gr.components.Component]
    kind: gr.Radio
    amount: gr.Slider
    window: gr.Textbox
    pictures: Mapping[str, PictureControls]
    load_sidecar: gr.UploadButton
    add_lora: gr.UploadButton
    generate: gr.Button
    cancel: gr.Button
    told: gr.HTML
    shown: gr.State
    rows: gr.State
    seen: gr.State
    timer: gr.Timer
    said: gr.HTML
    result: gr.HTML
    listed: gr.HTML

    @property
    def values(self) -> list[gr.components.Component]:
        """The controls of the form in the order of its fields."""
        return [self.form[field.name] for field in fields(Form)]


def lay_out(presets: Presets, lora_files: Mapping[str, str], limits: Limits) -> Controls:
    """Build the controls, as the first preset sets them, into the `gr.Blocks` that is open."""
    first = presets.settings(presets.first)
    form, _ = within(to_form(first), limits, first.video.geometry)
    gr.Markdown(TITLE, elem_classes="title")
    with gr.Row(elem_classes="board"):
        with gr.Column(elem_classes="what", min_width=0):
            parts = _what(presets, first, form, limits)
            generate = gr.Button("Generate", variant="primary", elem_id="generate")
            cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel")
            told = gr.HTML("", apply_default_css=False, elem_id="told")
        with gr.Column(elem_classes="results", min_width=0):
            results = _results()
        with gr.Column(elem_classes="more", min_width=0):
            with gr.Accordion("Sampling", open=False, elem_id="sampling"):
                sampling = _sampling(form)
            with gr.Accordion("LoRA", open=bool(form.lora), elem_id="loras"):
                lora, add_lora = _lora(form, lora_choices(lora_files, first))
            with gr.Accordion("Attention", open=False, elem_id="attention"):
                attention, helpers = _attention(form)
    return Controls(
        # States stay on the server: what names its files is never a browser's to send.
        base=gr.State(first),
        chosen=gr.State(presets.first),
        form=parts.pop("form") | sampling | lora | attention,
        add_lora=add_lora,
        generate=generate,
        cancel=cancel,
        told=told,
        **parts,
        **helpers,
        **results,
    )


def _what(presets: Presets, first: Settings, form: Form, limits: Limits) -> dict:
    prompt = gr.Textbox(label="Prompt", lines=3, max_lines=8, placeholder=PROMPT, elem_id="prompt")
    with gr.Row():
        preset = gr.Dropdown(
            presets.names, value=presets.first, label="Preset", scale=3, min_width=160, elem_id="preset"
        )
        load_sidecar = gr.UploadButton(
            "Load settings", file_types=[".json"], size="md", scale=1, min_width=130, elem_id="load-record"
        )
    about = gr.Markdown(about_preset(presets, presets.first, first, limits), elem_classes="about", elem_id="about")
    taken = pictures_taken(first)
    pictures = {name: _picture(name, name in taken) for name in PICTURES}
    with gr.Row():
        size = gr.Dropdown(
            size_choices(first),
            value=form.size,
            label="Size",
            allow_custom_value=True,
            min_width=130,
            elem_id="size",
        )
        seed = gr.Textbox(form.seed, label="Seed", placeholder="drawn anew", max_lines=1, min_width=130, elem_id="seed")
    with gr.Row():
        # From 1 on, which gives 4n+1: the counts of frames that there can be.
        frames = _slider("Frames", limits.frames, form.frame_num, first.video.geometry.vae_stride[0])
        steps = _slider("Steps", limits.steps, form.steps, 1)
    controls = {"prompt": prompt, "size": size, "seed": seed, "frame_num": frames, "steps": steps}
    return {"preset": preset, "about": about, "load_sidecar": load_sidecar, "form": controls, "pictures": pictures}


def _slider(label: str, most: int, value: int | None, step: int) -> gr.Slider:
    return gr.Slider(1, most, value, step=step, label=label, min_width=150, buttons=[], elem_id=label.lower())


def _picture(name: str, is_taken: bool) -> PictureControls:
    """The controls of one of `PICTURES`, with a button where it is taken."""
    does = PICTURES[name]
    shown = gr.Image(
        label=f"{does}s with", interactive=False, visible=False, buttons=[], height=160, elem_id=f"shown-{name}"
    )
    with gr.Row():
        add = gr.UploadButton(
            f"{does} with a picture",
            file_types=[".png", ".jpg", ".jpeg", ".webp"],
            size="md",
            min_width=130,
            visible=is_taken,
            elem_id=f"add-{name}",
        )
        drop = gr.Button("Without it", size="md", min_width=110, visible=False, elem_id=f"drop-{name}")
    return PictureControls(add, drop, shown)


def within(form: Form, limits: Limits, geometry: Geometry = DEFAULT_GEOMETRY) -> tuple[Form, str]:
    """A form whose sliders are within the limits, and a sentence if they were beyond; gradio refuses such values."""
    frames = min(form.frame_num, geometry.most_frames(limits.frames))
    fitting = replace(form, frame_num=frames, steps=min(form.steps, limits.steps))
    return fitting, "" if fitting == form else f"This page makes up to {limits.frames} frames in {limits.steps} steps."


def about_preset(presets: Presets, name: str, settings: Settings, limits: Limits) -> str:
    """What a preset's file says of it, what runs, and whether that is less than the preset wants."""
    _, note = within(to_form(settings), limits, settings.video.geometry)
    return " ".join(filter(None, (presets.describe(name), note, what_runs(settings))))


def what_runs(settings: Settings) -> str:
    """A sentence for whoever opens the page, who need not know where a folder lies."""
    return f"Runs `{name_of(settings.checkpoint)}`."


def _sampling(form: Form) -> dict[str, gr.components.Component]:
    negative = gr.Textbox(form.negative_prompt, label="Negative prompt", lines=2, max_lines=6, elem_id="negative")
    with gr.Row():
        guide = gr.Textbox(form.guide_scale, label="Guidance", info="1: off, twice as fast", min_width=120)
        shift = gr.Number(form.shift, label="Shift", info="5 is usual", min_width=120, step=0.5)
        solver = gr.Dropdown(list(SOLVERS), value=form.solver, label="Solver", info="unipc is usual", min_width=120)
    with gr.Row():
        fp8 = gr.Checkbox(form.fp8, label="Float8 layers", info="Ada GPUs and newer", min_width=120, elem_id="fp8")
        cache = gr.Checkbox(form.cache, label="Step cache", info="reuses steps", min_width=120, elem_id="cache")
    controls = {"negative_prompt": negative, "guide_scale": guide, "shift": shift, "solver": solver}
    return controls | {"fp8": fp8, "cache": cache}


def _lora(form: Form, files: Mapping[str, str]) -> tuple[dict[str, gr.components.Component], gr.UploadButton]:
    lora = gr.Dropdown(
        list(files), value=list(form.lora), multiselect=True, label="Files", show_label=False, elem_id="lora"
    )
    with gr.Row():
        scales = gr.Textbox(
            form.scales,
            label="Scales",
            placeholder="1, or one each: 0.8, 1.0",
            scale=2,
            min_width=150,
            elem_id="scales",
        )
        add = gr.UploadButton(
            "Add a file", file_types=[".safetensors"], size="md", scale=1, min_width=110, elem_id="add-lora"
        )
    gr.Markdown("Packed weights are loaded again for other files or scales.", elem_classes="about")
    return {"lora": lora, "scales": scales}, add


def _attention(form: Form) -> tuple[dict[str, gr.components.Component], dict]:
    kind, amount, window = to_controls(form.algorithm)
    kinds = gr.Radio([DENSE, THRESHOLD, SHARE, WINDOW], value=kind, label="Blocks are kept by", elem_id="kind")
    with gr.Row():
        amounts = gr.Slider(
            min(LEAST_AMOUNT, amount),
            1,
            amount,
            step=0.05,
            label=amount_label(kind),
            min_width=150,
            buttons=[],
            visible=has_amount(kind),
            elem_id="amount",
        )
        windows = gr.Textbox(
            window,
            label="Window",
            info="frames-rows-columns, in blocks",
            placeholder="none",
            max_lines=1,
            min_width=150,
            visible=has_window(kind),
            elem_id="window",
        )
    algorithm = gr.Textbox(
        form.algorithm, label="As a string", info="nabla-0.7, keep-0.2, sta-11-3-3, nabla-0.6_sta-11-3-3, dense",
        max_lines=1, elem_id="algorithm",
    )  # fmt: skip
    with gr.Row():
        dense_steps = gr.Number(
            form.dense_steps, label="Dense steps", info="at the start; below 1 a share",
            min_width=110, elem_id="dense-steps",
        )  # fmt: skip
        refresh = gr.Number(
            form.mask_refresh, label="Mask refresh", info="every so many steps", precision=0,
            min_width=110, elem_id="mask-refresh",
        )  # fmt: skip
        backend = gr.Dropdown(
            list(BACKEND_NAMES), value=form.backend, label="Backend", info="kernel", min_width=110, elem_id="backend"
        )
    controls = {"algorithm": algorithm, "dense_steps": dense_steps, "mask_refresh": refresh, "backend": backend}
    return controls, {"kind": kinds, "amount": amounts, "window": windows}


def amount_label(kind: str | None) -> str:
    return "Share of blocks kept" if kind == SHARE else "Probability kept"


def has_amount(kind: str | None) -> bool:
    return kind in (THRESHOLD, SHARE)


def has_window(kind: str | None) -> bool:
    return kind in (THRESHOLD, SHARE, WINDOW)


def _results() -> dict:
    return {
        "said": gr.HTML(STARTING, apply_default_css=False, elem_id="said"),
        "result": gr.HTML(NOTHING, apply_default_css=False, elem_id="result"),
        "listed": gr.HTML("", apply_default_css=False, js_on_load=CLICKS, elem_id="listed"),
        "shown": gr.State(None),
        "rows": gr.State(ROWS),
        "seen": gr.State(None),
        "timer": gr.Timer(1),
    }
