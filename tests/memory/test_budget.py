"""What memory may be asked for, and what there is of it."""

from __future__ import annotations

import pytest
import torch

import generate
from nabla import InputError
from wan.memory.budget import check_memory, host_bytes, parse_memory

CPU = torch.device("cpu")


def test_memory_is_auto_or_a_positive_number():
    assert parse_memory("auto") == "auto" and parse_memory("24") == 24 and parse_memory("7.5") == 7.5
    for wrong in ("some", "0", "-1", "nan", "inf", "24GB", ""):
        with pytest.raises(InputError, match="neither auto nor GB to stay under"):
            parse_memory(wrong)


@pytest.mark.parametrize(
    "flags, reason",
    (
        (("--memory", "auto"), "memory auto plans the memory of a GPU, and this runs on cpu; leave it out"),
        (("--memory", "24"), "memory 24.0 plans the memory of a GPU"),
        (("--memory", "24GB"), "memory '24GB' is neither auto nor GB to stay under"),
    ),
)
def test_wrong_memory_is_one_line(random_nano, capsys, flags, reason):
    given = ["--prompt", "a cat", "--ckpt_dir", str(random_nano), "--device", "cpu", *flags]
    assert generate.main(given) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1


def test_memory_does_not_go_with_several_processes_or_a_forced_offload():
    gpu = torch.device("cuda", 0)
    check_memory(None, CPU, object(), True)
    check_memory(24, gpu, None, None)
    with pytest.raises(InputError, match="torchrun starts several"):
        check_memory(24, gpu, object(), None)
    with pytest.raises(InputError, match="leave offload_model out"):
        check_memory("auto", gpu, None, False)


def test_host_memory_is_known():
    free, total = host_bytes()
    assert 0 < free <= total
