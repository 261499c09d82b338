"""The page as its users have it: in a browser, without a head, on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import weight_files

from wan.config.config_files import read_settings
from wan.config.settings import resolve
from wan.models.wan.random_checkpoint import random_transformer
from wan.run.request import Options
from wan.serve.limits import Limits
from wan.serve.studio import Studio

pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-page.txt")
selenium = pytest.importorskip("selenium", reason="needs selenium: pip install selenium")
CHROMIUM, DRIVER = (shutil.which(program) for program in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)

SECONDS = 40
LIMITS = Limits(frames=485, steps=200)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --force-device-scale-factor=1"
)
# Keeps every line that the page ever said, however short it stood there.
WATCH = """
window.heard = [];
new MutationObserver(() => {
  const line = document.querySelector('#said')?.innerText;
  if (line && line !== window.heard.at(-1)) window.heard.push(line);
}).observe(document.body, {subtree: true, childList: true, characterData: true});
"""


class Browser:
    """The page in a browser; controls are named by their `elem_id`."""

    def __init__(self, driver, url: str):
        self.driver = driver
        self.url = url

    def open(self) -> None:
        self.driver.get(self.url)
        self.until(lambda: self.one("#said") and self.said == "Ready")
        self.driver.execute_script(WATCH)

    def one(self, selector: str):
        found = self.driver.find_elements("css selector", selector)
        return found[0] if found else None

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, f"the page says {self.said!r}"
            time.sleep(0.05)

    @property
    def said(self) -> str:
        return self.one("#said").text

    def hears(self, start: str) -> None:
        self.until(lambda: self.said.startswith(start))

    @property
    def heard(self) -> list[str]:
        return self.driver.execute_script("return window.heard")

    def field(self, name: str):
        return self.one(f"#{name} textarea, #{name} input[type=number], #{name} input")

    def value(self, name: str) -> str:
        return self.field(name).get_attribute("value")

    def write(self, end: str = "\ue004", **values: str) -> None:
        """Replace what stands in fields, and leave each with a key: Tab, unless told otherwise."""
        for name, value in values.items():
            self.field(name).send_keys("\ue009a\ue000", value, end)

    def click(self, name: str) -> None:
        self.until(lambda: self.one(f"#{name}") and self.one(f"#{name}").is_displayed())
        self.one(f"#{name}").click()

    def expand(self, *names: str) -> None:
        """Open groups of controls, which are not there before."""
        for name in names:
            self.click(f"{name} button")
        self.until(lambda: all(self.one(f"#{name} input") for name in names))

    def upload(self, name: str, path: Path) -> None:
        self.one(f"input:has(+ #{name})").send_keys(str(path))

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        events = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def studio(random_nano, tmp_path_factory) -> Iterator[Studio]:
    with Studio(Options(device="cpu"), tmp_path_factory.mktemp("page") / "videos", str(random_nano), LIMITS) as studio:
        yield studio


@pytest.fixture(scope="module")
def browser(studio, random_nano, tmp_path_factory) -> Iterator[Browser]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    from wan.serve.lora_library import LoraLibrary
    from wan.serve.page.server import Address, make_page, serve
    from wan.serve.presets import Presets

    library = LoraLibrary(studio.folder / "loras")
    page = make_page(studio, Presets({"checkpoint": str(random_nano)}, "x", "nabla_0.7.yaml"), library)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), "--window-size=1280,1000", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(studio.folder.parent / "saved")})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    url = serve(page, library, Address(), wait=False)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Browser(driver, url)
    finally:
        driver.quit()
        page.close()


def test_the_page_asks_nobody_else_for_anything(browser):
    browser.open()
    asked = [url for url in browser.requests() if url.startswith("http")]
    assert asked and all(url.startswith(browser.url) for url in asked)
    assert browser.url.startswith("http://127.0.0.1:")


def test_a_video_is_made_with_progress_and_preview_and_its_settings_make_it_again(browser, studio):
    browser.open()
    browser.click("generate")
    browser.hears("the prompt is empty; say what the video should show")
    browser.write(prompt="A red circle", size="64x64", seed="7", frames="5", steps="12")
    browser.click("generate")
    browser.hears("Step ")
    browser.until(lambda: browser.one("#picture img"))
    browser.hears("Made in ")
    assert "64x64, 5 frames, 12 steps, nabla-0.7, seed 7" in browser.said
    steps = [line for line in browser.heard if line.startswith("Step ")]
    assert steps == sorted(steps, key=lambda line: int(line.split()[1])) and steps[-1].split(",")[0].endswith("of 12")
    play = "const v = document.querySelector('#video video'); return v && [v.videoWidth, v.videoHeight, v.error]"
    browser.until(lambda: browser.driver.execute_script(play) == [64, 64, None])
    saved = studio.folder.parent / "saved"
    for name in ("save-video", "save-record"):
        browser.click(name)
    browser.until(lambda: {path.suffix for path in saved.glob("*")} == {".mp4", ".json"})
    record, video = next(saved.glob("*.json")), next(saved.glob("*.mp4"))
    browser.open()
    assert browser.value("seed") == "" and browser.value("prompt") == ""
    browser.upload("load-record", record)
    browser.hears(f"Loaded the settings of {record.name}")
    browser.expand("attention")
    values = {name: browser.value(name) for name in ("prompt", "seed", "steps", "frames", "size", "algorithm")}
    assert values == {
        "prompt": "A red circle",
        "seed": "7",
        "steps": "12",
        "frames": "5",
        "size": "64x64",
        "algorithm": "nabla-0.7",
    }
    browser.click("generate")
    browser.hears("Made in ")
    made = sorted(studio.folder.glob("*.mp4"))
    assert len(made) == 2 and all(path.read_bytes() == video.read_bytes() for path in made)
    shared, kept = read_settings(record), read_settings(made[0].with_suffix(".json"))
    assert shared["checkpoint"] == Path(kept["checkpoint"]).name and str(studio.folder.parent) not in record.read_text()
    assert resolve(shared | {"checkpoint": kept["checkpoint"]}) == resolve(kept)


def test_settings_beyond_what_sliders_usually_reach_are_loaded_and_run(browser, random_nano, tmp_path):
    record = tmp_path / "long.json"
    video = {"sampling": {"steps": 200, "guide_scale": 1}, "video": {"size": "32*32", "frame_num": 485}}
    layer = {"checkpoint": str(random_nano), "prompt": "A red circle", "attention": {"algorithm": "keep-0.02"}}
    record.write_text(json.dumps({"settings": resolve(layer, video).to_dict()}))
    browser.open()
    browser.upload("load-record", record)
    browser.hears("Loaded the settings of long.json")
    browser.expand("attention")
    browser.until(lambda: browser.value("amount") == "0.02")
    assert (browser.value("frames"), browser.value("steps")) == ("485", "200")
    browser.write(window="3-3-3")
    browser.until(lambda: browser.value("algorithm") == "keep-0.02_sta-3-3-3")
    browser.click("generate")
    browser.hears("Step ")
    assert "of 200" in browser.said
    browser.click("cancel")
    browser.hears("Cancelled")


def test_a_preset_sets_the_controls_and_keeps_the_prompt(browser):
    browser.open()
    assert browser.one("#about").text.split()[-3:] == ["Runs", "nano", "."]
    browser.write(prompt="A red circle", steps="3")
    assert browser.value("steps") == "3"
    browser.write("\ue007", preset="turbo_8")
    browser.until(lambda: browser.value("steps") == "8")
    assert browser.value("prompt") == "A red circle" and "For" not in browser.said
    assert "weights that want eight steps" in browser.one("#about").text


def test_cancel_ends_a_video_after_its_step_and_leaves_no_file(browser, studio):
    browser.open()
    before = set(studio.folder.iterdir())
    browser.write(prompt="A red circle", size="64x64", frames="5", steps="100")
    browser.click("generate")
    browser.hears("Step ")
    browser.click("cancel")
    browser.hears("Cancelled")
    browser.until(lambda: browser.one("#generate"))
    assert set(studio.folder.iterdir()) == before
    browser.write(steps="2")
    browser.click("generate")
    browser.hears("Made in ")


def test_attention_and_lora_are_chosen_on_the_page(browser, studio, tmp_path):
    factors = weight_files.draw_factors(random_transformer("nano", torch.float32, torch.device("cpu")))
    weight_files.write_lora(tmp_path / "style.safetensors", factors, "comfyui")
    (tmp_path / "bad.safetensors").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    browser.open()
    browser.write(prompt="A red circle", size="64x64", frames="5", steps="2")
    browser.expand("loras", "attention")
    browser.write(algorithm="nabla-2")
    browser.hears("threshold 2.0 is outside (0, 1]")
    browser.write(algorithm="keep-0.5_sta-3-3-3")
    browser.until(lambda: browser.value("window") == "3-3-3" and browser.value("amount") == "0.5")
    browser.upload("add-lora", tmp_path / "bad.safetensors")
    browser.hears("bad.safetensors is truncated or corrupt")
    browser.upload("add-lora", tmp_path / "style.safetensors")
    browser.hears("Added style-")
    browser.write(scales="0.5")
    browser.click("generate")
    browser.hears("Made in ")
    record = max(studio.folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    settings = resolve(read_settings(record))
    assert settings.attention.algorithm == "keep-0.5_sta-3-3-3"
    assert [one.scale for one in settings.lora] == [0.5] and settings.lora[0].file.startswith(str(studio.folder))


def test_a_bug_is_said_shortly_and_leaves_the_page_usable(browser, monkeypatch, capfd):
    browser.open()
    browser.write(prompt="A red circle", size="64x64", frames="5", steps="2")
    with monkeypatch.context() as patch:
        patch.setattr("wan.serve.studio.generate_video", lambda *_, **__: 1 / 0)
        browser.click("generate")
        browser.hears("Something broke; the program's output says what")
    assert "ZeroDivisionError" in capfd.readouterr().err
    browser.click("generate")
    browser.hears("Made in ")


def test_the_page_fits_a_phone(browser):
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.open()
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") == 400
    assert browser.one("#generate").is_displayed()
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
