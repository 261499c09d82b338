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
from wan.serve.lora_library import LoraLibrary
from wan.serve.page.events import Events
from wan.serve.page.guard import Guard, Presence, size_of
from wan.serve.page.layout import Controls, lay_out
from wan.serve.presets import Presets
from wan.serve.studio import Studio

log = logging.getLogger("wan")

MAX_PORT = 65535
# The largest LoRA files there are, and what all that are added may hold on the disk.
MAX_UPLOAD, MAX_HELD = 2 << 30, 20 << 30
# Uploads and copies of videos that gradio keeps for browsers: looked at every hour, removed after a day.
CACHE_SECONDS = (3600, 86400)
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

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= MAX_PORT:
            raise InputError(f"port {self.port} is not one of 1 to {MAX_PORT}; leave it out to take a free one")


class GuardedApp(App):
    """Gradio's application behind a guard, which is outermost: gradio's own layers answer foreign origins too."""

    guard: Guard

    def build_middleware_stack(self) -> Callable:
        self.guard.app = super().build_middleware_stack()
        return self.guard


@dataclass(frozen=True)
class Page:
    """The page, and who has it open."""

    blocks: gr.Blocks
    controls: Controls
    presence: Presence

    def offered(self) -> set[str]:
        """The files that visitors may fetch: the videos and pictures that were shown, and the videos' sidecars."""
        c = self.controls
        given = [one.shown for one in c.pictures.values()]
        return set().union(*(one.temp_files for one in (*given, c.picture, c.video, c.save_video, c.save_sidecar)))

    def close(self) -> None:
        self.blocks.close(verbose=False)


def make_page(studio: Studio, presets: Presets, library: LoraLibrary) -> Page:
    presence = Presence()
    with gr.Blocks(
        analytics_enabled=False, title="Wan with NABLA", fill_width=True, delete_cache=CACHE_SECONDS
    ) as blocks:
        controls = lay_out(presets, library.files(), studio.limits)
        Events(studio, presets, library, controls, presence).wire(blocks)
    return Page(blocks, controls, presence)


def serve(page: Page, library: LoraLibrary, address: Address, wait: bool = True) -> str:
    """Serve a page and give its local address; waits until interrupted, unless told not to.

    Only what the page offers can be fetched, see `Guard`. Nothing is fetched from other machines but the tunnel of
    `share`. Raises `InputError` for an address that cannot be used.
    """
    app = GuardedApp(default_response_class=ORJSONResponse)
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
        page.presence,
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
