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
from stand_in_maker import ThreadEngine

from wan.config.config_files import read_settings
from wan.config.settings import resolve
from wan.models.wan.random_checkpoint import random_transformer
from wan.run.request import Options
from wan.serve.jobs.job import Job, Wish
from wan.serve.jobs.queue import Queue
from wan.serve.limits import Limits
from wan.serve.workers.dispatcher import Dispatcher
from wan.serve.workers.maker import Maker
from wan.serve.workers.messages import SAMPLING

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
            assert time.monotonic() < end, f"the page says {self.said!r} and {self.text('told')!r}"
            time.sleep(0.05)

    @property
    def said(self) -> str:
        return self.one("#said").text

    def hears(self, start: str) -> None:
        """Wait for what is said of a job."""
        self.until(lambda: self.said.startswith(start))

    def is_told(self, start: str) -> None:
        """Wait for what is said of the controls."""
        self.until(lambda: self.text("told").startswith(start))

    def text(self, name: str) -> str:
        # Not `text`, which is empty of what is scrolled out of sight.
        return self.one(f"#{name}").get_attribute("innerText").strip()

    def rows(self) -> list[str]:
        """What the list of videos says, a row a video."""
        return [row.get_attribute("innerText") for row in self.driver.find_elements("css selector", "#listed li")]

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

    def answer(self, yes: bool) -> None:
        """What the page asks before something ends for good."""
        question = self.driver.switch_to.alert
        question.accept() if yes else question.dismiss()

    def upload(self, name: str, path: Path) -> None:
        self.one(f"input:has(+ #{name})").send_keys(str(path))

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        events = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


class UnhurriedMaker(Maker):
    """Its steps take long enough for a browser to see some, however fast the machine is."""

    def make(self, order, tell, is_aborted):
        def tell_slowly(progress):
            tell(progress)
            if progress.stage == SAMPLING:
                time.sleep(0.1)

        return super().make(order, tell_slowly, is_aborted)


@pytest.fixture(scope="module")
def queue(random_nano, tmp_path_factory) -> Iterator[Queue]:
    queue = Queue.open(tmp_path_factory.mktemp("page") / "videos")
    with Dispatcher(queue, ThreadEngine(maker=UnhurriedMaker(Options(device="cpu"), str(random_nano)))):
        yield queue


@pytest.fixture(scope="module")
def browser(queue, random_nano, tmp_path_factory) -> Iterator[Browser]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    from wan.serve.lora_library import LoraLibrary
    from wan.serve.page.server import Address, make_page, serve
    from wan.serve.page.visible import VisibleJobs
    from wan.serve.presets import Presets

    folder = queue.files.folder
    library = LoraLibrary(folder / "loras")
    presets = Presets({"checkpoint": str(random_nano)}, "x", "nabla_0.7.yaml")
    page = make_page(VisibleJobs(queue, everyones=True), LIMITS, presets, library)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), "--window-size=1280,1000", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder.parent / "saved")})
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


def newest(queue: Queue) -> Job:
    return queue.list("", limit=1).jobs[0]


def test_a_video_is_made_with_progress_and_preview_and_its_settings_make_it_again(browser, queue):
    browser.open()
    browser.click("generate")
    browser.is_told("the prompt is empty; say what the video should show")
    browser.write(prompt="A red circle", size="64x64", seed="7", frames="5", steps="12")
    browser.click("generate")
    browser.hears("Step ")
    assert not browser.text("told")
    browser.until(lambda: browser.one("#picture"))
    browser.hears("Made in ")
    assert "64x64, 5 frames, 12 steps, nabla-0.7, seed 7" in browser.said
    steps = [line for line in browser.heard if line.startswith("Step ")]
    assert steps == sorted(steps, key=lambda line: int(line.split()[1])) and steps[-1].split(",")[0].endswith("of 12")
    play = "const v = document.querySelector('video'); return v && [v.videoWidth, v.videoHeight, v.error, v.paused]"
    browser.until(lambda: browser.driver.execute_script(play) == [64, 64, None, False])
    saved = queue.files.folder.parent / "saved"
    for name in ("save-video", "save-record"):
        browser.click(name)
    browser.until(lambda: {path.suffix for path in saved.glob("*")} == {".mp4", ".json"})
    record, video = next(saved.glob("*.json")), next(saved.glob("*.mp4"))
    assert record.stem == video.stem and video.stem.startswith("A-red-circle-")
    browser.open()
    assert browser.value("seed") == "" and browser.value("prompt") == ""
    browser.upload("load-record", record)
    browser.is_told(f"Loaded the settings of {record.name}")
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
    made = [queue.files.read(job.id, "video.mp4") for job in queue.list("").jobs]
    assert made == [video.read_bytes()] * 2
    shared, kept = read_settings(record), read_settings(queue.files.path(newest(queue).id, "video.json"))
    assert shared["checkpoint"] == Path(kept["checkpoint"]).name
    assert str(queue.files.folder.parent) not in record.read_text()
    assert resolve(shared | {"checkpoint": kept["checkpoint"]}) == resolve(kept)


def test_the_list_follows_all_jobs_of_the_folder_and_plays_and_deletes_them(browser, queue, random_nano):
    video = {"checkpoint": str(random_nano), "video": {"size": "32*32", "frame_num": 5}}
    layer = video | {"prompt": "<i>Asked</i> by a program", "sampling": {"steps": 200, "guide_scale": 1}}
    browser.open()
    others = browser.rows()
    [job] = queue.submit([Wish("small", layer)])
    browser.until(lambda: browser.rows()[1:] == others)
    browser.until(lambda: "Step" in browser.rows()[0])
    assert browser.rows()[0].startswith(layer["prompt"]) and "API" in browser.rows()[0] and browser.said == "Ready"
    browser.click("listed li [data-does=open]")
    browser.hears("Step ")
    browser.until(lambda: browser.one("#picture"))
    browser.click("listed li [data-does=delete]")
    browser.answer(yes=False)
    assert queue.get(job.id, "")
    [next_job] = queue.submit([Wish("small", layer | {"sampling": {"steps": 2}})])
    browser.until(lambda: browser.rows()[2:] == others)
    browser.click("listed li:nth-child(2) [data-does=delete]")
    browser.answer(yes=True)
    browser.hears("Ready")
    browser.until(lambda: "Made in" in browser.rows()[0] and browser.rows()[1:] == others)
    assert queue.get(job.id, "") is None
    browser.click("listed li [data-does=open]")
    browser.hears("Made in ")
    browser.until(lambda: browser.one(f"#video[src='jobs/{next_job.id}/video']"))
    # Deleted elsewhere, as through the API.
    queue.delete(next_job.id, "")
    browser.hears("This video is no longer there")
    assert browser.rows() == others and not browser.one("#video")


def test_settings_beyond_what_sliders_usually_reach_are_loaded_and_run(browser, random_nano, tmp_path):
    record = tmp_path / "long.json"
    video = {"sampling": {"steps": 200, "guide_scale": 1}, "video": {"size": "32*32", "frame_num": 485}}
    layer = {"checkpoint": str(random_nano), "prompt": "A red circle", "attention": {"algorithm": "keep-0.02"}}
    record.write_text(json.dumps({"settings": resolve(layer, video).to_dict()}))
    browser.open()
    browser.upload("load-record", record)
    browser.is_told("Loaded the settings of long.json")
    browser.expand("attention")
    browser.until(lambda: browser.value("amount") == "0.02")
    assert (browser.value("frames"), browser.value("steps")) == ("485", "200")
    browser.write(window="3-3-3")
    browser.until(lambda: browser.value("algorithm") == "keep-0.02_sta-3-3-3")
    browser.click("generate")
    browser.hears("Step ")
    assert "of 200" in browser.said
    browser.click("cancel")
    browser.is_told("Cancelled")


def test_a_preset_sets_the_controls_and_keeps_the_prompt(browser):
    browser.open()
    assert browser.one("#about").text.split()[-3:] == ["Runs", "nano", "."]
    browser.write(prompt="A red circle", steps="3")
    assert browser.value("steps") == "3"
    browser.write("\ue007", preset="turbo_8")
    browser.until(lambda: browser.value("steps") == "8")
    assert browser.value("prompt") == "A red circle"
    assert "weights that want eight steps" in browser.one("#about").text


def test_cancel_ends_a_video_after_its_step_and_leaves_no_file(browser, queue):
    browser.open()
    before = {path.name for path in queue.files.folder.glob("video_*")}
    browser.write(prompt="A red circle", size="64x64", frames="5", steps="100")
    browser.click("generate")
    browser.hears("Step ")
    browser.click("cancel")
    browser.is_told("Cancelled")
    browser.until(lambda: {path.name for path in queue.files.folder.glob("video_*")} == before)
    assert browser.said == "Ready" and not browser.one("#cancel")
    browser.write(steps="2")
    browser.click("generate")
    browser.hears("Made in ")


def test_attention_and_lora_are_chosen_on_the_page(browser, queue, tmp_path):
    factors = weight_files.draw_factors(random_transformer("nano", torch.float32, torch.device("cpu")))
    weight_files.write_lora(tmp_path / "style.safetensors", factors, "comfyui")
    (tmp_path / "bad.safetensors").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    browser.open()
    browser.write(prompt="A red circle", size="64x64", frames="5", steps="2")
    browser.expand("loras", "attention")
    browser.write(algorithm="nabla-2")
    browser.is_told("threshold 2.0 is outside (0, 1]")
    browser.write(algorithm="keep-0.5_sta-3-3-3")
    browser.until(lambda: browser.value("window") == "3-3-3" and browser.value("amount") == "0.5")
    browser.upload("add-lora", tmp_path / "bad.safetensors")
    browser.is_told("bad.safetensors is truncated or corrupt")
    browser.upload("add-lora", tmp_path / "style.safetensors")
    browser.is_told("Added style-")
    browser.write(scales="0.5")
    browser.click("generate")
    browser.hears("Made in ")
    settings = resolve(newest(queue).settings)
    assert settings.attention.algorithm == "keep-0.5_sta-3-3-3"
    assert [one.scale for one in settings.lora] == [0.5]
    assert settings.lora[0].file.startswith(str(queue.files.folder))


def test_the_page_fits_a_phone(browser):
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.open()
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") == 400
    assert browser.one("#generate").is_displayed()
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
