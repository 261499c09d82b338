"""Where components wait and run: as a plan of memory says, or as was asked, or by the size of the GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import wan
from wan.memory import load_plan
from wan.memory.estimates import GIB
from wan.memory.load_plan import ALL_BLOCKS, ComponentBytes, Placement, make_load_plan
from wan.memory.options import LoadOptions
from wan.memory.placement import crowds, is_crowded
from wan.memory.planner import MemoryPlan

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MESH = object()
SIZES = ComponentBytes(transformer=40 * GIB, text_encoder=16 * GIB, vae=2 * GIB)
PLAN = MemoryPlan(None, None, True, 3, 40, "stream", 1, True, {"sampling": 0}, 0, 1.0)


def context(is_leader: bool = True, sharing: int = 2) -> SimpleNamespace:
    """What is asked of processes that share a video."""
    return SimpleNamespace(is_leader=is_leader, layout=SimpleNamespace(processes_per_video=sharing), video_mesh=MESH)


@pytest.fixture
def gpu(monkeypatch):
    """Sets the memory of the GPU, in GiB."""

    def set_total(gib: float) -> None:
        properties = SimpleNamespace(total_memory=int(gib * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    return set_total


def test_weights_may_fill_six_tenths_of_a_gpu_and_a_cpu_is_never_crowded(gpu):
    assert not crowds(59 * GIB, 100 * GIB) and crowds(61 * GIB, 100 * GIB)
    gpu(100)
    assert not is_crowded(GPU, 59 * GIB) and is_crowded(GPU, 61 * GIB)
    assert not is_crowded(CPU, 10**18)


@pytest.mark.parametrize(
    "given, need",
    (
        ({}, 58),
        ({"t5_cpu": True}, 42),
        ({"distributed": context()}, 58),
        ({"distributed": context(is_leader=False)}, 40),
        ({"distributed": context(), "dit_fsdp": True}, 38),
        ({"distributed": context(), "dit_fsdp": True, "t5_fsdp": True}, 30),
        ({"distributed": context(is_leader=False), "dit_fsdp": True}, 20),
        ({"distributed": context(is_leader=False), "dit_fsdp": True, "t5_fsdp": True}, 28),
    ),
)
def test_idle_components_leave_a_gpu_that_what_a_process_holds_would_crowd(gpu, given, need):
    options = LoadOptions(GPU, **given)
    for gib, offload in ((need / 0.6 + 0.5, False), (need / 0.6 - 0.5, True)):
        gpu(gib)
        plan = make_load_plan(options, False, SIZES)
        assert plan.offload is offload
        assert plan.vae == Placement(CPU if offload else GPU, GPU)


def test_what_is_asked_for_is_done_whatever_room_there_is(gpu):
    for gib, offload in ((10, False), (1000, True)):
        gpu(gib)
        plan = make_load_plan(LoadOptions(GPU, offload=offload), False, SIZES)
        home = CPU if offload else GPU
        assert plan == load_plan.LoadPlan(*[Placement(home, GPU)] * 3, offload)
    plan = make_load_plan(LoadOptions(GPU, t5_cpu=True), True, SIZES)
    assert plan.text_encoder == Placement(CPU, CPU)
    assert plan.transformer == Placement(GPU, GPU, "fp8", asked=True) and plan.transformer.reads_to == GPU
    assert make_load_plan(LoadOptions(GPU, offload=True), True, SIZES).transformer.reads_to == GPU


def test_copies_of_idle_weights_in_each_process_are_said_aloud(gpu, caplog):
    gpu(50)
    make_load_plan(LoadOptions(GPU), False, SIZES)
    make_load_plan(LoadOptions(GPU, distributed=context(), dit_fsdp=True), False, SIZES)
    assert not caplog.text
    make_load_plan(LoadOptions(GPU, distributed=context()), False, SIZES)
    assert "a copy for each process; --dit_fsdp shards them" in caplog.text


def test_what_is_sharded_is_read_to_the_gpu():
    options = LoadOptions(GPU, offload=True, distributed=context(), dit_fsdp=True)
    plan = make_load_plan(options, False, SIZES)
    assert plan.transformer.mesh is MESH and plan.transformer.reads_to == GPU
    assert plan.text_encoder.mesh is None and plan.text_encoder.reads_to == CPU


@pytest.mark.parametrize(
    "given, transformer, text",
    (
        ({}, Placement(CPU, GPU, kept=3, pinned=True), Placement(CPU, GPU, kept=0, pinned=True)),
        ({"text": "gpu"}, Placement(CPU, GPU, kept=3, pinned=True), Placement(CPU, GPU, pinned=True)),
        ({"text": "cpu"}, Placement(CPU, GPU, kept=3, pinned=True), Placement(CPU, CPU, pinned=True)),
        (
            {"text": "gpu", "quantization": "int4", "text_quantization": "int8"},
            Placement(CPU, GPU, "int4", kept=3, pinned=True),
            Placement(CPU, GPU, "int8", kept=ALL_BLOCKS, pinned=True),
        ),
        (
            {"text": "gpu", "in_turns": False, "text_quantization": "int8"},
            Placement(GPU, GPU, pinned=True),
            Placement(GPU, GPU, "int8", pinned=True),
        ),
    ),
)
def test_a_plan_of_memory_is_followed_whatever_else_is_asked(given, transformer, text):
    planned = MemoryPlan(**{**vars(PLAN), **given})
    plan = make_load_plan(LoadOptions(GPU, offload=False, t5_cpu=True, plan=planned), True, SIZES)
    assert (plan.transformer, plan.text_encoder) == (transformer, text)
    assert plan.offload is planned.in_turns and plan.vae == Placement(CPU if planned.in_turns else GPU, GPU)


def test_a_pipeline_offloads_where_its_weights_crowd_the_device(random_nano, monkeypatch):
    assert not wan.WanT2V.from_pretrained(random_nano).offload
    needs = []
    monkeypatch.setattr(load_plan, "is_crowded", lambda _, need: needs.append(need) or True)
    pipe = wan.WanT2V.from_pretrained(random_nano)
    models = pipe.transformer, pipe.text_encoder, pipe.vae
    own = sum(tensor.numel() * 4 for model in models for tensor in model.parameters())
    assert pipe.offload and needs == [pytest.approx(own, rel=0.05)]
