"""The page as a server of this machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from nabla import InputError
from wan.page.events import Events
from wan.page.layout import lay_out
from wan.page.sources import LoraLibrary, Presets
from wan.page.studio import Studio

log = logging.getLogger("wan")

MAX_PORT = 65535
# The largest LoRA files there are.
MAX_UPLOAD = "2gb"
# Uploads and copies of videos that gradio keeps for browsers: looked at every hour, removed after a day.
CACHE_SECONDS = (3600, 86400)
CSS = Path(__file__).with_name("page.css")


@dataclass(frozen=True)
class Address:
    """Where the page is served. port: None takes the first free one from 7860; share: through a public link too.

    Raises `InputError` for a port that there cannot be.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= MAX_PORT:
            raise InputError(f"port {self.port} is not one of 1 to {MAX_PORT}; leave it out to take a free one")


def make_page(studio: Studio, presets: Presets, library: LoraLibrary) -> gr.Blocks:
    with gr.Blocks(
        analytics_enabled=False, title="Wan2.1 with NABLA", fill_width=True, delete_cache=CACHE_SECONDS
    ) as page:
        controls = lay_out(presets, library.files())
        Events(studio, presets, library, controls).wire(page)
    return page


def serve(page: gr.Blocks, studio: Studio, library: LoraLibrary, address: Address, wait: bool = True) -> str:
    """Serve a page and give its local address; waits until interrupted, unless told not to.

    Only what gradio copied for a browser, and videos by their exact name, can be fetched. Nothing is fetched from
    other machines but the tunnel of `share`. Raises `InputError` for an address that cannot be used.
    """
    try:
        _, url, public = page.launch(
            server_name=address.host,
            server_port=address.port,
            share=address.share,
            prevent_thread_lock=True,
            inbrowser=False,
            quiet=True,
            allowed_paths=[str(studio.folder.resolve())],
            blocked_paths=[str(library.folder.resolve())],
            max_file_size=MAX_UPLOAD,
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
    log.info("page: %s", url if public is None else f"{url} and, for anyone, {public}")
    if wait:
        page.block_thread()
    return url
