"""The page as a server of this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
from gradio.routes import App, ORJSONResponse

from nabla import InputError
from wan.serve.hosts import LOOPBACK
from wan.serve.limits import Limits
from wan.serve.lora_library import LoraLibrary
from wan.serve.page.form_events import FormEvents
from wan.serve.page.guard import Guard, size_of
from wan.serve.page.job_events import JobEvents
from wan.serve.page.job_files import JobFilesApp
from wan.serve.page.layout import Controls, lay_out
from wan.serve.page.visible import VisibleJobs
from wan.serve.presets import Presets

log = logging.getLogger("wan")

MAX_PORT = 65535
# The largest LoRA files there are, and what all that are added may hold on the disk.
MAX_UPLOAD, MAX_HELD = 2 << 30, 20 << 30
# Uploads that gradio keeps: looked at every hour, removed after a day.
CACHE_SECONDS = (3600, 86400)
# Whose controls and jobs gradio remembers, with 0.2 MB each; whoever asks can make up as many as he likes.
MAX_SESSIONS = 1000
CSS = Path(__file__).with_name("page.css")


@dataclass(frozen=True)
class Address:
    """Where the page is served. port: None takes the first free one from 7860; share: through a public link too.

    allowed_hosts: further names that it is reached by
    Raises `InputError` for a port that there cannot be.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    allowed_hosts: tuple[str, ...] = ()

    @property
    def is_private(self) -> bool:
        """Whether none but this machine reaches it; a proxy would be one that others go through."""
        return self.host in LOOPBACK and not self.share and not self.allowed_hosts

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= MAX_PORT:
            raise InputError(f"port {self.port} is not one of 1 to {MAX_PORT}; leave it out to take a free one")


class GuardedApp(App):
    """Gradio's application behind a guard, which is outermost: gradio's own layers answer foreign origins too."""

    guard: Guard
    jobs: VisibleJobs

    def build_middleware_stack(self) -> Callable:
        self.guard.app = JobFilesApp(super().build_middleware_stack(), self.jobs)
        return self.guard


@dataclass(frozen=True)
class Page:
    """The page, and the jobs that it shows."""

    blocks: gr.Blocks
    controls: Controls
    jobs: VisibleJobs

    def offered(self) -> set[str]:
        """The files that visitors may fetch by name: the small pictures that were shown of those that they added."""
        return set().union(*(one.shown.temp_files for one in self.controls.pictures.values()))

    def close(self) -> None:
        self.blocks.close(verbose=False)


def make_page(jobs: VisibleJobs, limits: Limits, presets: Presets, library: LoraLibrary) -> Page:
    with gr.Blocks(
        analytics_enabled=False, title="Wan with NABLA", fill_width=True, delete_cache=CACHE_SECONDS
    ) as blocks:
        controls = lay_out(presets, library.files(), limits)
        form = FormEvents(limits, presets, library, controls)
        form.wire(blocks)
        JobEvents(jobs, limits, controls, form.layer).wire(blocks)
    return Page(blocks, controls, jobs)


def serve(page: Page, library: LoraLibrary, address: Address, wait: bool = True) -> str:
    """Serve a page and give its local address; waits until interrupted, unless told not to.

    Only what the page offers can be fetched, see `Guard`. Nothing is fetched from other machines but the tunnel of
    `share`. Raises `InputError` for an address that cannot be used.
    """
    app = GuardedApp(default_response_class=ORJSONResponse)
    app.jobs = page.jobs
    uploads = Path(app.uploaded_file_dir)
    app.guard = Guard(
        app,
        address.host,
        address.allowed_hosts,
        page.offered,
        # Looked at anew for each upload: gradio removes old ones by itself.
        lambda: size_of(uploads) + library.added_bytes(),
        MAX_UPLOAD,
        MAX_HELD,
    )
    try:
        _, url, public = page.blocks.launch(
            _app=app,
            server_name=address.host,
            server_port=address.port,
            share=address.share,
            # It is waited for below, once the guard knows the public link's name.
            prevent_thread_lock=True,
            inbrowser=False,
            quiet=True,
            blocked_paths=[str(library.folder.resolve())],
            max_file_size=MAX_UPLOAD,
            state_session_capacity=MAX_SESSIONS,
            # Names of fonts that visitors have: none is fetched.
            theme=gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css_paths=CSS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
        )
    except OSError:
        port = "any port from 7860" if address.port is None else f"port {address.port}"
        raise InputError(f"{port} of {address.host} cannot be served, it may be taken; choose another") from None
    if public is not None:
        app.guard.hosts.allow(urlsplit(public).netloc)
    log.info("page: %s", url if public is None else f"{url} and, for anyone, {public}")
    if wait:
        page.blocks.block_thread()
    return url
