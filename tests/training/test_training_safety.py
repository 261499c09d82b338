"""Training with files of others, full disks and signals: no code of a file runs, each is one line, nothing is lost."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch
import torch._inductor.config
import torch.distributed.checkpoint as dcp
import yaml
from places import PROGRAMS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shapes_runs import SMALL_TEXT_RUN, vae_settings_dict
from starting import Forked, finish, fork
from training_runs import settings_dict, train

from nabla import InputError
from scripts import prepare_data, train_text, train_vae
from scripts import train as train_script
from wan.files.video import write_video
from wan.training.clips import Clips
from wan.training.dcp_states import SafePlanner, SafeReader, parse_metadata
from wan.training.metrics import METRICS_FILE, read_metrics
from wan.training.shutdown import StopSignal
from wan.training.state_file import load_state

SHORT = {"steps": 1, "data": {"validation": None}, "ema": None}
SMALL_DISK = PROGRAMS / "train_small_disk.py"
STATE = {"weights": torch.arange(6.0).view(2, 3), "step": 3, "rates": [1, 2.0], "names": ("a", None)}


class Evil:
    """A pickle that leaves a mark where it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def base(random_nano, prepared, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("base") / "run"
    train(settings_dict(random_nano, prepared, out, **SHORT))
    return out


@pytest.fixture
def saved(tmp_path) -> Path:
    dcp.save({"part": STATE}, checkpoint_id=tmp_path / "state")
    return tmp_path / "state"


def write_config(path: Path, content: dict) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def read_back(folder: Path) -> dict:
    state = {"part": {"weights": torch.zeros(2, 3), "step": 0, "rates": [0, 0.0], "names": ("", None)}}
    dcp.load(state, storage_reader=SafeReader(folder), planner=SafePlanner())
    return state["part"]


def test_metadata_is_read_as_pickle_would(saved):
    content = (saved / ".metadata").read_bytes()
    ours, theirs = parse_metadata(content), pickle.loads(content)
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data
    read = read_back(saved)
    assert torch.equal(read.pop("weights"), STATE["weights"])
    assert read == {key: value for key, value in STATE.items() if key != "weights"}


def bad_metadata(mark: Path) -> dict[str, bytes]:
    size = (b"\x80\x04\x8c\x05torch\x8c\x04Size\x93", b"\x85R.")
    return {
        "code": pickle.dumps(Evil(mark)),
        "code of protocol 0": pickle.dumps(Evil(mark), 0),
        "code of protocol 2": pickle.dumps(Evil(mark), 2),
        "nothing": b"",
        "cut": pickle.dumps({"a": 1})[:-1],
        "plain": pickle.dumps({"a": 1}),
        "another call": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        "a size of its own": size[0] + b"\x8c\x01x" + size[1],
        "a memo that is not there": b"\x80\x04h\x09.",
        "bytes without end": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f",
        "a class as an object": b"\x80\x04\x8c$torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93}b.",
    }


@pytest.mark.parametrize("name", bad_metadata(Path()))
def test_metadata_of_others_runs_nothing(saved, tmp_path, name):
    mark = tmp_path / "mark"
    (saved / ".metadata").write_bytes(bad_metadata(mark)[name])
    with pytest.raises(dcp.CheckpointException):
        read_back(saved)
    assert not mark.exists()


@pytest.mark.parametrize("before, after", ((b"__0_0.distcp", b"/etc/passwd2"), (b"float32", b"os.path")))
def test_metadata_names_files_of_the_state_and_types_alone(saved, before, after):
    path = saved / ".metadata"
    assert before in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(before, after))
    with pytest.raises(dcp.CheckpointException):
        read_back(saved)


def put_value(folder: Path, name: str, content: bytes) -> None:
    """Write over a value of a state other than a tensor."""
    metadata = parse_metadata((folder / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == name)
    file = folder / place.relative_path
    raw = bytearray(file.read_bytes())
    assert len(content) <= place.length
    raw[place.offset : place.offset + len(content)] = content
    file.write_bytes(raw)


@pytest.mark.parametrize("damage", ("code in .metadata", "code in a value", "another kind", "another step"))
def test_a_run_of_others_goes_on_without_their_code_or_not_at_all(base, random_nano, prepared, tmp_path, capfd, damage):
    shutil.copytree(base, tmp_path / "run", symlinks=True)
    config = write_config(
        tmp_path / "run.yaml", settings_dict(random_nano, prepared, tmp_path / "run", **SHORT | {"steps": 2})
    )
    mark, last = tmp_path / "mark", tmp_path / "run" / "checkpoints" / "step-00000001"
    if damage == "code in .metadata":
        (last / "state" / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    elif damage == "code in a value":
        put_value(last / "state", "state.step", pickle.dumps(Evil(mark), 2))
    elif damage == "another kind":
        buffer = io.BytesIO()
        torch.save("one", buffer)
        put_value(last / "state", "state.step", buffer.getvalue())
    else:
        last = last.rename(last.with_name("step-00000003"))
    assert train_script.main(["--config", config]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: {last / 'state'} is damaged (") and said.count("\n") == 1, said
    assert f"; remove {last} to go on" in said and not mark.exists()


@pytest.mark.parametrize("name", ("text", "vae"))
def test_states_of_small_trainers_run_nothing_and_are_named_where_damaged(tmp_path, capfd, name):
    run, mark = tmp_path / "run", tmp_path / "mark"
    content = SMALL_TEXT_RUN | {"out": str(run)} if name == "text" else vae_settings_dict(run)
    main = {"text": train_text, "vae": train_vae}[name].main
    arguments = ["--config", write_config(tmp_path / "run.yaml", content | {"steps": 1})]
    assert main(arguments) == 0
    path = run / "state.pt"
    state = torch.load(path, weights_only=True)
    first = next(key for key in state if isinstance(state[key], dict))
    others = {key: torch.zeros(1) for key in state[first]}
    whole = path.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        b"",
        pickle.dumps(Evil(mark)),
        {"evil": Evil(mark)},
        {"step": 1},
        [1],
        state | {first: others},
        state | {"step": "1"},
        state | {"step": 10**9},
    ):
        if isinstance(damaged, bytes):
            path.write_bytes(damaged)
        else:
            torch.save(damaged, path)
        capfd.readouterr()
        assert main(arguments) == 2
        said = capfd.readouterr().err
        assert said.startswith(f"error: {path} is damaged, or the state of another run (") and said.count("\n") == 1
        assert "remove it to train anew" in said and not mark.exists()
    path.write_bytes(whole)
    assert main(arguments) == 0


def test_a_state_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(InputError, match="state.pt cannot be read"):
        load_state(tmp_path / "state.pt", torch.device("cpu"), lambda _: None)


@pytest.mark.parametrize("processes", (1, 2))
def test_a_disk_that_fills_up_ends_all_processes_and_leaves_no_half_checkpoint(
    base, random_nano, prepared, tmp_path, processes
):
    run = tmp_path / "run"
    shutil.copytree(base, run, symlinks=True)
    before = sorted(run.rglob("*"))
    changes = SHORT | {"steps": 2, "micro_batch": 2}
    config = write_config(tmp_path / "run.yaml", settings_dict(random_nano, prepared, run, **changes))
    # Less than a state, more than the log.
    command = SMALL_DISK, 20_000, "train", "--config", config
    process = Forked(*command, cwd=tmp_path) if processes == 1 else fork(processes, *command, cwd=tmp_path)
    code, _, said = finish(process, seconds=90)
    errors = [line for line in said.splitlines() if "error: " in line and "cannot be written" in line]
    # The launcher ends the others once one has ended, which may be before they told.
    assert 1 <= len(errors) <= processes and "free some space" in errors[0], said
    if processes == 1:
        assert code == 2 and "Traceback" not in said
    assert sorted(run.rglob("*")) == before and not list(run.rglob(".partial-*"))
    assert (run / "latest").resolve().name == "step-00000001"


@pytest.mark.parametrize("script", ("train_vae", "train_text", "prepare_data"))
def test_a_disk_that_fills_up_is_one_line_of_every_script(random_nano, tmp_path, script):
    out = tmp_path / "out"
    content = {
        "train_vae": vae_settings_dict(out, steps=1),
        "train_text": SMALL_TEXT_RUN | {"out": str(out), "steps": 1},
        "prepare_data": {
            "checkpoint": str(random_nano),
            "out": str(out),
            "dataset": "shapes",
            "options": {"count": 2, "size": "32*32", "frame_num": 5},
            "workers": 0,
        },
    }[script]
    config = write_config(tmp_path / "run.yaml", content)
    code, _, said = finish(Forked(SMALL_DISK, 7_000, script, "--config", config, cwd=tmp_path), seconds=90)
    assert code == 2 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("error: ") and "cannot be written" in said.splitlines()[-1]
    assert not list(tmp_path.rglob(".partial-*"))


def test_a_run_can_be_read_by_all_whom_the_umask_lets(base):
    files = [path for path in base.rglob("*") if path.is_file() and not path.is_symlink()]
    mask = os.umask(0)
    os.umask(mask)
    assert any(path.name.endswith(".safetensors") for path in files)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGHUP))
def test_both_signals_ask_a_run_to_end(number):
    before = signal.getsignal(number)
    asked = StopSignal()
    with asked:
        os.kill(os.getpid(), number)
    assert asked.asked and signal.getsignal(number) == before


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_leaves_no_half_shard(random_nano, tmp_path, monkeypatch, capfd, number):
    def save(tensors, path, metadata=None):
        save_file(tensors, path, metadata)
        if metadata:
            os.kill(os.getpid(), number)

    monkeypatch.setattr("wan.training.prepare.save_file", save)
    content = {"checkpoint": str(random_nano), "out": str(tmp_path / "out"), "dataset": "shapes", "workers": 0}
    content["options"] = {"count": 2, "size": "32*32", "frame_num": 5}
    assert prepare_data.main(["--config", write_config(tmp_path / "x.yaml", content)]) == 128 + number
    assert "start again to make what is missing" in capfd.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dropped.safetensors", "prepared.json"]


def test_captions_that_are_cut_are_said_once_a_shard(random_nano, tmp_path, capfd):
    (tmp_path / "v").mkdir()
    for number in range(2):
        write_video(tmp_path / "v" / f"{number}.mp4", torch.zeros(5, 32, 32, 3, dtype=torch.uint8).numpy(), 16)
    lines = [{"file": f"{number}.mp4", "caption": "a cat " * (1 if number else 2000)} for number in range(2)]
    (tmp_path / "v" / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {"checkpoint": str(random_nano), "out": str(tmp_path / "out"), "dataset": "videos", "workers": 0}
    content["options"] = {"folder": str(tmp_path / "v")}
    assert prepare_data.main(["--config", write_config(tmp_path / "x.yaml", content)]) == 0
    said = capfd.readouterr().err
    assert said.count("captions that are too long: 1 of 2; the text 'a cat") == 1 and "cut off are" in said


@pytest.mark.parametrize(
    "record",
    (
        "{",
        "[]",
        '{"clips": 1, "skipped": []}',
        '{"clips": [{"index": 0, "caption": 3}], "skipped": []}',
        '{"clips": [{"index": -1, "caption": "x"}], "skipped": []}',
        '{"clips": [{"index": 99, "caption": "x"}], "skipped": []}',
        '{"clips": [], "clips": [], "skipped": []}',
        "[" * 5000,
    ),
)
def test_a_shard_with_a_foreign_record_is_one_line(prepared, tmp_path, record):
    shutil.copytree(prepared, tmp_path / "data")
    path = next((tmp_path / "data").glob("shard-*"))
    with safe_open(path, "pt") as file:
        assert file.metadata()
    save_file(load_file(path), path, {"samples": record})
    with pytest.raises(InputError, match=f"^{path} is damaged .*; remove it and prepare the data again$"):
        Clips([str(tmp_path / "data")], 96)


@pytest.mark.parametrize("line", ("{", "[1]", '{"loss": 1}', '{"step": 1, "step": 2}', '{"step": NaN}', "[" * 5000))
def test_metrics_that_are_no_rows_are_one_line(tmp_path, line):
    path = tmp_path / METRICS_FILE
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=f"^{path} is damaged"):
        read_metrics(path)


def test_a_vae_to_start_from_is_no_pickle(tmp_path, capfd):
    run, start = tmp_path / "run", tmp_path / "start"
    config = write_config(tmp_path / "run.yaml", vae_settings_dict(run, steps=1))
    assert train_vae.main(["--config", config]) == 0
    shutil.copytree(run / "vae", start)
    (start / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"evil": Evil(tmp_path / "mark")}, start / "diffusion_pytorch_model.bin")
    capfd.readouterr()
    assert train_vae.main(["--config", config, f"out={tmp_path / 'other'}", f"start={start}"]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: start {start} cannot be read (") and not (tmp_path / "mark").exists()


def test_a_run_that_compiles_needs_a_compiler_before_anything_is_loaded(random_nano, prepared, tmp_path):
    without = torch._inductor.config.patch({"cpp.cxx": ("/none/g++",)})
    with without, pytest.raises(InputError, match="compile true needs a C"):
        train(settings_dict(random_nano, prepared, tmp_path / "run", compile=True))
    assert not (tmp_path / "run").exists()
