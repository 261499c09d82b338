"""Shared by all tests: the reference checkpoint, what the reference programs compute on it, and the GPU's absence."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nabla
import wan.attention.compile
from nabla.rotary import rotate

DATA = Path(__file__).parent / "data"
# Begun first, so that workers end together.
SLOWEST = (
    "parallel",
    "ray_engine",
    "kandinsky_parallel",
    "family_parallel",
    "wan_family_names",
    "wan_family_runs",
    "kandinsky_training",
    "kandinsky_transformer",
    "kandinsky_caches",
    "benchmark",
    "training_processes",
    "doctor",
    "training",
    "wan_shapes",
    "page_browser",
    "speed_ups",
    "serve",
    "evaluate",
    "pictures_reference",
    "generate",
    "kandinsky_names",
    "apply_attention",
    "worker",
    "kandinsky_plans",
    "calibrate_attention",
    "shapes",
    "study",
)


def pytest_configure() -> None:
    """Programs of tests heed the signals that a shell or nohup around the tests may have had ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"test_{name}.py" for name in SLOWEST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))


@pytest.fixture(autouse=True, scope="session")
def many_compiles():
    """All tests compile the same functions, each for shapes of its own."""
    with wan.attention.compile.many_compiles():
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Sums in one order, and no threads that wait for each other over tiny problems; in programs of tests too."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def nano() -> Path:
    """A tiny checkpoint in the published layout. It has no tokenizer."""
    return DATA / "wan-nano" / "checkpoint"


@pytest.fixture(scope="session")
def expected() -> dict[str, torch.Tensor]:
    """What the reference programs compute on `nano`, in float32; forwards are cut to their first 6 frames."""
    return load_file(DATA / "wan-nano" / "expected.safetensors")


@pytest.fixture(scope="session")
def random_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with random weights and a tokenizer, as `make_random_checkpoint.py` writes it."""
    from wan.models.wan import random_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint") / "nano"
    random_checkpoint.write("nano", folder, torch.float32)
    return folder


@pytest.fixture(scope="session")
def kandinsky_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of Kandinsky-5 in its native layout, with random weights and tokenizers."""
    from wan.models.kandinsky import random_checkpoint

    folder = tmp_path_factory.mktemp("kandinsky") / "native"
    random_checkpoint.write("kandinsky5-nano", folder, torch.float32)
    return folder


@pytest.fixture(scope="session")
def kandinsky_diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in diffusers' layout, which names an attention."""
    from wan.models.kandinsky import random_checkpoint

    folder = tmp_path_factory.mktemp("kandinsky") / "diffusers"
    algorithm = "nabla-0.8_sta-11-3-3"
    random_checkpoint.write("kandinsky5-nano", folder, torch.float32, "diffusers", sparse_algorithm=algorithm)
    return folder


@pytest.fixture(scope="session")
def prepared(random_nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips prepared for training, of eight samples of which one is bad."""
    from training_runs import Colours

    from wan.training.encoder import Encoder
    from wan.training.models import open_components
    from wan.training.prepare import prepare
    from wan.training.prepare_settings import PrepareSettings

    out = tmp_path_factory.mktemp("prepared") / "clips"
    settings = PrepareSettings(str(random_nano), str(out), clips_per_shard=3, dtype="float32")
    encoder = Encoder(open_components(random_nano), torch.device("cpu"))
    assert prepare(Colours(8, bad=(4,)), settings, encoder) == (7, 1)
    return out


@pytest.fixture
def damaged(random_nano: Path, tmp_path: Path) -> Path:
    """A copy of `random_nano` for a test to damage."""
    return Path(shutil.copytree(random_nano, tmp_path / "damaged"))


@pytest.fixture
def chosen_blocks(monkeypatch) -> list[torch.Tensor]:
    """The blocks (B, heads, N, N) bool that sparse layers choose from here on, in the order in which they run."""
    chosen, original = [], nabla.attend

    def attend(q, k, v, plan, rotary, *kept):
        chosen.append(nabla.select_blocks(rotate(q, rotary), rotate(k, rotary), plan.grid, plan.config))
        return original(q, k, v, plan, rotary, *kept)

    monkeypatch.setattr(nabla, "attend", attend)
    return chosen


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual - exact).norm() / exact.norm()).item()
