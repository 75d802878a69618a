"""Which card a launch is for, and the one rule of where the Triton kernels run."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import device, launch
from kernels.device import REFERENCE, Gpu

RTX_2080 = Gpu("NVIDIA GeForce RTX 2080", (7, 5), 46, 65_536)
RTX_3090 = Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 101_376)
CPU = torch.device("cpu")


def test_a_device_without_a_driver_is_planned_for_as_the_reference() -> None:
    assert device.gpu(CPU) == REFERENCE
    assert REFERENCE.arch == 90
    if not torch.cuda.is_available():
        assert device.gpu(torch.device("cuda", 0)) == REFERENCE


def test_a_card_is_described_by_its_own_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(
        name="NVIDIA L4", major=8, minor=9, multi_processor_count=58, shared_memory_per_block_optin=101_376
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    assert device.describe(0) == Gpu("NVIDIA L4", (8, 9), 58, 101_376)


def test_a_pretended_card_is_every_threads_until_the_block_ends() -> None:
    seen: list[Gpu] = []
    with device.pretend(RTX_3090):
        thread = threading.Thread(target=lambda: seen.append(device.gpu(CPU)))
        thread.start()
        thread.join()
        with device.pretend(RTX_2080):
            seen.append(device.gpu(CPU))
        seen.append(device.gpu(CPU))
    assert seen == [RTX_3090, RTX_2080, RTX_3090]
    assert device.gpu(CPU) == REFERENCE


def test_why_the_kernels_do_not_run() -> None:
    assert device.unsupported(CPU) == "the Triton kernels need an NVIDIA GPU, and this is a cpu device"
    with device.pretend(RTX_2080):
        reason = device.unsupported(torch.device("cuda"))
        assert reason == (
            "the Triton kernels need compute capability 8.0 or higher, and NVIDIA GeForce RTX 2080 has 7.5"
        )
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        with device.pretend(Gpu("a card", capability, 100, 101_376)):
            assert device.unsupported(torch.device("cuda")) is None


def test_auto_is_pytorch_on_an_older_card_and_triton_says_why_it_cannot_run() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 8, 5, 5, device="cuda", dtype=torch.float16)
    with device.pretend(RTX_2080):
        assert launch.resolve("auto", x) == "torch"
        with pytest.raises(RuntimeError, match=r"because the Triton kernels need compute capability 8\.0 .* has 7\.5"):
            launch.resolve("triton", x)
    with device.pretend(RTX_3090):
        assert launch.resolve("auto", x) == launch.resolve("triton", x) == "triton"
