"""python -m wan.doctor: what it finds, what it recommends for cards that are not here, and its exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tomllib

import pytest
import torch
import wan_family_sets
from places import ROOT

from nabla import backends
from wan.memory.estimates import GIB
from wan.memory.planner import MemoryBudget
from wan.tools.doctor import __main__ as doctor
from wan.tools.doctor import advice, checkpoints, examine, machine, packages, text
from wan.tools.doctor.checkpoints import LocalCheckpoint
from wan.tools.doctor.fits import memory_fits
from wan.tools.doctor.kernels import KernelStatus, check_kernels
from wan.tools.doctor.machine import Card, Machine
from wan.tools.doctor.packages import PackageStatus

# As a program the doctor, and after it what the fault is of, in one process: each takes seconds to import.
DOCTOR_AND_MODELS = """
import runpy, sys
sys.argv = ["doctor", "--quick"]
try:
    runpy.run_module("wan.doctor", run_name="__main__")
except SystemExit as ended:
    code = ended.code
print("and now the models", file=sys.stderr)
import wan, traceback
try:
    wan.WanT2V
except Exception:
    traceback.print_exc()
sys.exit(code)
"""
CPU, GPU = torch.device("cpu"), torch.device("cuda")
H200, RTX4090, RTX3060 = (
    Card("H200", 139.8, 139.0, (9, 0)),
    Card("RTX 4090", 23.5, 23.0, (8, 9)),
    Card("RTX 3060", 11.6, 11.2, (8, 6)),
)


def budget_of(*gib: float) -> MemoryBudget:
    """Free of the GPU, free of the host, and the host's."""
    return MemoryBudget(*(int(one * GIB) for one in gib))


@pytest.fixture
def run(capsys, monkeypatch):
    """The doctor in this process, its kernels taken as checked: `run(*flags)` -> (exit code, output, errors)."""
    monkeypatch.setattr(backends, "_check_against_reference", lambda *_: "")

    def run(*flags):
        monkeypatch.setattr(backends, "_verified", {})
        try:
            code = doctor.main(list(flags))
        except SystemExit as left:
            code = left.code
        return code, *capsys.readouterr()

    return run


def advised(cards=(H200,), device="cuda", lacks=(), cudnn=None, cached=(), unseen="", host=60.0):
    """The advice for a machine with these cards, whose optional packages are there but for some."""
    here = Machine(device, tuple(cards), "580.1", unseen, 8, host * 1.05, host, "3.12", "2.13", "13.0")
    budget = budget_of(here.card.free_gib, host, here.host_gib) if here.card else None
    kinds = memory_fits(budget, here.card.gib, "torchao" not in lacks) if here.card else ()
    found = [
        PackageStatus(name, "", False, "1", "", f"pip install {how}") for name, (_, how) in packages.OPTIONAL.items()
    ]
    found = [
        PackageStatus(one.name, "", False, None, "missing", one.install) if one.name in lacks else one for one in found
    ]
    known = (
        KernelStatus("cudnn", cudnn is None, cudnn or "passes its check", True),
        KernelStatus("flex", True, "", False),
    )
    return advice.advise(here, known, tuple(found), kinds, tuple(LocalCheckpoint(name, "", "") for name in cached))


def test_as_a_program_it_says_all_for_people_and_for_programs(run):
    code, said, errors = run("--device", "cpu")
    assert code == 0 and errors.startswith("checking the kernels on cpu") and errors.count("\n") == 1
    titles = [line for line in said.splitlines() if line and not line.startswith(" ")]
    assert [title.split(",")[0] for title in titles] == [
        "Machine",
        "Attention kernels",
        "Checkpoints here",
        "Packages that are needed",
        "Optional packages",
        "Run",
        "Faster",
        "Nothing that is needed is broken.",
    ]
    assert "passes its check, taken by default" in said and f"torch {torch.__version__}" in said
    assert max(map(len, said.splitlines())) < 200
    code, said, _ = run("--device", "cpu", "--json")
    facts = json.loads(said)
    assert code == 0 and facts["ok"] and facts["broken"] == []
    usable = {one["name"]: one["usable"] for one in facts["kernels"]}
    assert usable == {"cudnn": False, "flex": True, "gather": True, "reference": True}
    assert [one["name"] for one in facts["kernels"] if one["chosen"]] == ["gather"]
    assert facts["machine"]["torch"] == torch.__version__ and facts["advice"]["commands"]


def test_a_kernel_that_fails_its_check_is_told_and_is_not_fatal(run, monkeypatch):
    monkeypatch.setattr(backends, "_check_against_reference", lambda *_: "its result is off by 70%")
    code, said, _ = run("--device", "cpu")
    assert code == 0 and "fails its check: its result is off by 70%" in said


def test_quick_checks_nothing(run, monkeypatch):
    monkeypatch.setattr(backends, "_check_against_reference", lambda *_: pytest.fail("checked"))
    imported, import_fault = [], packages._import_fault
    monkeypatch.setattr(packages, "_import_fault", lambda name: imported.append(name) or import_fault(name))
    code, said, errors = run("--quick")
    assert code == 0 and errors == "" and "installed; not checked" in said
    assert "torch" in imported and "gradio" not in imported and "gradio" in said


def test_without_ffmpeg_it_is_broken(run, monkeypatch):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", missing)
    code, said, _ = run("--quick")
    assert code == 1 and "\nRun\n" not in said
    assert "Broken\n  - videos need ffmpeg, and there is none; pip install imageio-ffmpeg, or let " in said


@pytest.mark.parametrize(
    "flags, message",
    (
        ("--device tpu", "error: device 'tpu' cannot be used"),
        ("--device meta", "error: device 'meta' cannot be used"),
        ("--devise cpu", "error: unrecognized arguments: --devise cpu"),
    ),
)
def test_wrong_flags_are_one_line(run, flags, message):
    code, said, errors = run(*flags.split())
    assert (code, said) == (2, "") and errors.startswith(message) and errors.count("\n") == 1


@pytest.mark.parametrize(
    "module, error, fault",
    (
        ("ftfy", ImportError, "ftfy: cannot be imported (cut off)"),
        ("diffusers", ImportError, "diffusers: cannot be imported"),
        # As a build of it does whose libraries are not there.
        ("torch", OSError, "torch: cannot be imported (cut off)"),
    ),
)
def test_a_needed_package_that_is_broken_is_named(module, error, fault, tmp_path):
    (tmp_path / f"{module}.py").write_text(f"raise {error.__name__}('cut off')")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", DOCTOR_AND_MODELS]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    doctors, models = done.stderr.split("and now the models\n")
    assert done.returncode == 1 and doctors == "", done.stderr[-2000:]
    assert fault in done.stdout and "\nBroken\n" in done.stdout and "pip install" in done.stdout
    assert "cut off" in models


def test_packages_that_are_old_or_missing(monkeypatch):
    versions = {"torch": "2.7.1+cu126", "tqdm": "4.100"}

    def version(name):
        if name == "peft":
            raise packages.PackageNotFoundError(name)
        return versions.get(name, "99.0")

    monkeypatch.setattr(packages, "version", version)
    monkeypatch.setattr(packages, "_import_fault", lambda module: "")
    found = packages.check_packages()
    assert packages.needed_faults(found) == ['torch: 2.7.1+cu126 is older than 2.8; pip install "torch>=2.8,<2.14"']
    assert {one.name: one.problem for one in found if one.problem and not one.needed} == {"peft": "missing"}


def test_optional_packages_say_all_that_they_are_for(run):
    said = run("--quick")[1]
    assert "int8 and 4-bit weights of --memory, any GPU; --fp8, Ada and newer" in said
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    optional = {line.partition(">=")[0] for name in extras.keys() - {"lint", "test"} for line in extras[name]}
    assert optional == packages.OPTIONAL.keys() and "gradio" in said


def test_versions_are_read_as_the_project_and_as_its_metadata_write_them():
    assert packages._split("torchao>=0.15") == ("torchao", "0.15")
    assert packages._split("diffusers>=0.42,<0.43") == packages._split("diffusers<0.43,>=0.42")
    newest = packages._look_up("PyYAML", "1.0,<2.0", "", True, "PyYAML")
    oldest = packages._look_up("PyYAML", "99.0,<100.0", "", True, "PyYAML")
    assert not newest.problem and oldest.problem.endswith("older than 99.0")
    assert oldest.install == 'pip install "PyYAML>=99.0,<100.0"'


def test_what_fits_follows_the_memory():
    def plans(free, host):
        return {(one.model, one.size[1]): one for one in memory_fits(budget_of(free, host, host), free * 1.02, True)}

    assert all(one.is_plain for one in plans(139, 200).values())
    experts = plans(46, 120)["I2V-A14B", 720]
    assert experts.plan.experts == 2 and "one at a time" in experts.plan.placement() and experts.crowded
    assert plans(23, 120)["TI2V-5B", 704].plan is not None and plans(6, 120)["VACE 14B", 720].plan is None
    large, small = plans(23, 120), plans(11.2, 60)
    assert not large["14B", 720].is_plain and large["14B", 720].plan.quantization is None
    assert large["1.3B", 480].plan is not None and small["14B", 480].plan is not None
    assert large["Kandinsky-5 Lite", 512].plan is not None and large["Kandinsky-5 Pro", 768].plan.in_turns
    assert {one.frames for one in memory_fits(budget_of(139, 200, 200), 141, True)} == {81, 121, 241}
    nothing = plans(1.0, 60)["14B", 720]
    assert nothing.plan is None and "would do" in nothing.refusal


def test_what_is_recommended():
    best = advised()
    assert best.commands == ('python generate.py --prompt "Two cats box under a spotlight" --config nabla_0.7.yaml',)
    assert "14B at 1280x720" in best.why and "downloaded on first use" in best.why
    assert "here already" in advised(cached=(advice.TUNED,)).why
    assert advised((H200,) * 8).commands[0].startswith("torchrun --nproc_per_node=8 generate.py ")
    assert advised((H200,) * 8, device="cuda:3").commands[0].endswith(" --config nabla_0.7.yaml --device cuda:3")
    assert advised((RTX4090,)).commands[0].endswith(" --config nabla_0.7.yaml --memory auto")
    assert advised((RTX3060,), host=20.0).commands[0].endswith('--task t2v-1.3B --size "832*480" --memory auto')
    assert advised((RTX3060,), host=60.0).commands[0].endswith(" --config nabla_0.7.yaml --memory auto")
    assert advised((RTX4090,), host=30.0).commands[0].endswith(" --config nabla_0.7.yaml --memory auto")
    several = advised((RTX4090,) * 2)
    assert several.commands[0].startswith("python ") and "--dit_fsdp" in several.faster[0]
    for cards, device in (((), "cpu"), ((H200,), "cpu")):
        (run,) = advised(cards, device).commands
        assert run.startswith('python generate.py --prompt "a red circle ')
        assert run.endswith(" --device cpu") == bool(cards)


def test_a_run_that_would_move_models_to_host_memory_gets_a_plan():
    # Of 50 GiB the planner leaves all on the GPU; a run without it would offload, here to a host that is too small.
    card = Card("50 GiB", 50.5, 50.0, (8, 9))
    (large,) = [
        one
        for one in memory_fits(budget_of(50.0, 20.0, 24.0), card.gib, True)
        if (one.model, one.size[1]) == ("14B", 720)
    ]
    assert not large.plan.in_turns and large.crowded and not large.is_plain
    assert advised((card,), host=20.0).commands[0].endswith(" --config nabla_0.7.yaml --memory auto")


def test_torchao_is_named_where_it_may_let_more_fit():
    for card, host in ((RTX4090, 30.0), (RTX3060, 20.0)):
        lacking = advised((card,), host=host, lacks=("torchao",))
        assert "--config nabla_0.7.yaml" not in lacking.commands[0]
        assert "--memory auto may fit" in lacking.faster[0] and "requirements-fp8.txt" in lacking.faster[0]
    assert "may fit" not in " ".join(advised(lacks=("torchao",)).faster)


def test_what_would_be_faster():
    lacks = advised(
        lacks=("torchao", "nvidia-cudnn-frontend"), cudnn="not installed, see requirements-cudnn.txt"
    ).faster
    assert "pip install -r requirements-cudnn.txt" in lacks[0] and "pip install -r requirements-fp8.txt" in lacks[1]
    assert "requirements" not in " ".join(advised().faster) and advised().faster[0].startswith("--fp8: ")
    assert "cudnn" not in " ".join(advised((RTX4090,), cudnn="needs more").faster)
    assert advised((), "cpu").faster[0].startswith("a GPU: ")
    assert advised((), "cpu", unseen="driver 580.1 is there, but").faster == ("driver 580.1 is there, but",)
    assert "H200: --device cuda" in advised((H200,), "cpu").faster[0]


def test_a_card_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(machine, "_driver", lambda: "580.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA; install one with it" in machine.inspect_machine(CPU).unseen


def test_checkpoints_are_found_and_their_faults_named(random_nano, damaged, monkeypatch):
    found = checkpoints.look_at("own", random_nano)
    assert (found.problem, found.parts) == ("", ("transformer", "vae", "text_encoder"))
    (damaged / "Wan2.1_VAE.pth").unlink()
    assert checkpoints.look_at("own", damaged).problem == "Wan2.1_VAE.pth is missing"
    next(damaged.glob("*.safetensors")).unlink()
    assert "the checkpoint is incomplete" in checkpoints.look_at("own", damaged).problem
    names = {one.name: one.problem for one in checkpoints.find_checkpoints()}
    assert names["checkpoints/wan-shapes"] == ""
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda name, **_: random_nano)
    assert {"ai-forever/Wan2.1-T2V-14B-NABLA-0.7", "Wan-AI/Wan2.1-T2V-1.3B"} < {
        one.name for one in checkpoints.find_checkpoints() if one.folder == str(random_nano) and not one.problem
    }


@pytest.mark.parametrize("task", wan_family_sets.TASKS)
def test_a_checkpoint_of_each_kind_is_told_with_its_models(task, capsys):
    folder = str(wan_family_sets.checkpoint(task))
    found = checkpoints.find_checkpoints(folder)[0]
    assert (found.name, found.kind) == (folder, wan_family_sets.KIND_OF[task])
    # The sets have no tokenizer.
    assert found.problem == "without a tokenizer, so it cannot read prompts"
    assert set(found.parts) >= {"transformer", "text_encoder", "vae"}
    assert ("image_encoder" in found.parts) is (task in ("i2v", "flf2v"))
    assert ("transformer_2" in found.parts) is (task in wan_family_sets.TWO_EXPERTS)
    complete = dataclasses.replace(found, problem="")
    line = text._checkpoints((complete,))[1]
    assert f"  {found.kind}  complete: transformer, " in line


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_that_is_installed_passes():
    facts, broken = examine.examine(packages.check_packages(), None, check=True)
    assert broken == [] and facts["machine"].driver and facts["machine"].card.gib > 1
    for kernel in facts["kernels"]:
        is_missing = backends.BACKENDS[kernel.name].unsupported_reason(GPU, 64)
        assert kernel.usable if not is_missing else kernel.note == is_missing
    assert [one.name for one in check_kernels(GPU) if one.chosen] == [
        next(k.name for k in facts["kernels"] if k.usable)
    ]


def test_plans_have_the_keys_of_sidecars_in_json():
    fits = memory_fits(MemoryBudget(int(20 * GIB), int(100 * GIB), int(128 * GIB)), 24.0, can_quantize=True)
    for plain in doctor._plain(fits):
        assert plain["plan"] is None or {"packing", "text_packing", "in_turns"} <= plain["plan"].keys()
    assert any(plain["plan"] for plain in doctor._plain(fits)) and json.dumps(doctor._plain(fits))
