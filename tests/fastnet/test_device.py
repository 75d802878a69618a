"""Which device a command takes, what it says where that is not the GPU, and what older GPUs train with."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastnet import device as rules
from fastnet.errors import UserError
from fastnet.train import main as train
from kernels import device as cards
from kernels import launch
from kernels.nvidia import Findings, explain, find
from tests.networks import KINDS, variant
from tests.runs import make_pictures

CPU = torch.device("cpu")
T4 = cards.Gpu("Tesla T4", (7, 5), 40, 65_536)
RTX_3090 = cards.Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 101_376)
BUILT = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
A_CARD = Findings(
    cards=("NVIDIA GeForce RTX 3090",), driver=True, node=True, build="2.15.0+cu132", cuda="13.2", architectures=BUILT
)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (replace(A_CARD, build="2.15.0+cpu", cuda=None), "torch 2.15.0.cpu is built without CUDA .* RTX 3090: install"),
        (replace(A_CARD, hidden=""), "CUDA_VISIBLE_DEVICES='' hides NVIDIA GeForce RTX 3090: unset it"),
        (replace(A_CARD, hidden="7"), "CUDA_VISIBLE_DEVICES=7 hides NVIDIA GeForce RTX 3090: unset it"),
        (replace(A_CARD, driver=False), "the driver of NVIDIA GeForce RTX 3090 is not loaded: install"),
        (replace(A_CARD, node=False, cards=("A", "B")), r"no access to A \(one of 2\): .* --gpus all"),
        (
            replace(A_CARD, said="The NVIDIA driver on your system is too old (found version 12020). Please update"),
            "the driver of NVIDIA GeForce RTX 3090 is too old, for CUDA 12.2, .* built for CUDA 13.2: update",
        ),
        (
            replace(A_CARD, said="CUDA unknown error - this may be due to. Setting\nmore"),
            r"2.15.0\+cu132 cannot use NVIDIA GeForce RTX 3090 \(CUDA unknown error - this may be due to\): see",
        ),
        (
            replace(A_CARD, usable=(("NVIDIA GeForce GTX 1080", (6, 1)),)),
            "GTX 1080 has compute capability 6.1, and torch 2.15.0.cu132 is compiled for sm_75, .*: install",
        ),
        (replace(A_CARD, usable=(("B300", (11, 0)),)), "B300 has compute capability 11.0"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_named_with_what_to_do(found: Findings, words: str) -> None:
    said = explain(found)
    assert said is not None
    assert re.search(words, said), said
    assert "\n" not in said
    assert not said.endswith(".")


@pytest.mark.parametrize(
    "found",
    [
        Findings(),
        Findings(cuda=None, hidden=""),
        replace(A_CARD, usable=(("RTX 3090", (8, 6)),)),
        replace(A_CARD, usable=(("RTX 4090", (8, 9)),)),  # runs sm_86
        replace(A_CARD, usable=(("next year's", (13, 0)),), architectures=(*BUILT, "compute_120")),
        replace(A_CARD, usable=(("H100", (9, 0)),), architectures=("sm_90a",)),
        replace(A_CARD, usable=(("RTX 3090", (8, 6)),), architectures=()),
    ],
)
def test_nothing_is_said_where_torch_can_use_it_or_there_is_none(found: Findings) -> None:
    assert explain(found) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at a machine without a GPU")
def test_cards_are_found_in_the_driver_in_dev_and_on_the_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.nvidia._listed", list)
    assert find(tmp_path, {}).cards == ()
    for number, (vendor, kind) in enumerate((("0x10de", "0x030000"), ("0x10de", "0x040300"), ("0x8086", "0x030000"))):
        place = tmp_path / "sys/bus/pci/devices" / f"0000:0{number}:00.0"
        place.mkdir(parents=True)
        (place / "vendor").write_text(vendor + "\n")
        (place / "class").write_text(kind + "\n")
    found = find(tmp_path, {"CUDA_VISIBLE_DEVICES": "3"})
    assert (found.cards, found.driver, found.node, found.hidden) == (("an NVIDIA GPU",), False, False, "3")
    (tmp_path / "dev").mkdir()
    for number in range(2):
        (tmp_path / "dev" / f"nvidia{number}").touch()
    (tmp_path / "dev/nvidiactl").touch()
    assert (found := find(tmp_path, {})).cards == ("an NVIDIA GPU",) * 2
    assert found.node
    card = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA GeForce RTX 3090\nIRQ:   17\n")
    assert (found := find(tmp_path, {})).cards == ("NVIDIA GeForce RTX 3090",)
    assert found.driver


def test_the_tool_lists_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-1)'\necho 'GPU 1: Tesla T4'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert find(tmp_path, {}).cards == ("NVIDIA GeForce RTX 4090", "Tesla T4")


def test_auto_says_why_it_takes_the_cpu_and_cuda_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "unusable", lambda: "the driver of a card is too old: update it")
    said: list[str] = []
    assert rules.pick_device("auto", said.append) == CPU
    assert said == ["using the CPU because the driver of a card is too old: update it."]
    assert rules.pick_device("cpu", said.append) == CPU
    assert len(said) == 1
    with pytest.raises(UserError, match=r"^--device cuda is impossible because the driver of a card .*\.$"):
        rules.pick_device("cuda", said.append)
    monkeypatch.setattr(rules, "unusable", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rules.pick_device("auto", said.append) == CPU
    assert len(said) == 1
    with pytest.raises(UserError, match=r"^--device cuda is impossible because there is no NVIDIA GPU here: .*\.$"):
        rules.pick_device("cuda")


def test_precision_and_kernels_follow_the_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert rules.pick_amp("auto", CPU) == "off"
    assert rules.pick_amp("bf16", CPU) == "bf16"
    rules.check_kernels("auto", CPU, said.append)
    with cards.pretend(RTX_3090):
        assert rules.pick_amp("auto", CPU) == "bf16"
        for kernels in ("auto", "triton", "triton-ops", "torch"):
            rules.check_kernels(kernels, CPU, said.append)
    assert said == []
    with cards.pretend(T4):
        assert rules.pick_amp("auto", CPU) == "fp16"
        assert rules.pick_amp("off", CPU) == "off"
        with pytest.raises(UserError, match=r"^--amp bf16 needs .* 8\.0 .*, and Tesla T4 has 7\.5: use --amp fp16\.$"):
            rules.pick_amp("bf16", CPU)
        rules.check_kernels("torch", CPU, said.append)
        assert said == []
        rules.check_kernels("auto", CPU, said.append)
        assert re.fullmatch(r"computing with PyTorch alone because .* 8\.0 .*, and Tesla T4 has 7\.5\.", said.pop())
        for kernels in ("triton", "triton-ops"):
            with pytest.raises(UserError, match=rf"^--kernels {kernels} is impossible .*Tesla T4 has 7\.5: leave it"):
                rules.check_kernels(kernels, CPU)  # type: ignore[arg-type]
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(UserError, match=r"^--kernels triton is impossible because .* cpu device: leave it out\.$"):
        rules.check_kernels("triton", CPU)


@pytest.mark.slow
def test_a_gpu_below_the_kernels_trains_on_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # CPUs are slow in fp16: four blocks instead of sixteen.
    name = variant("small-head", *KINDS, head=64)
    monkeypatch.setattr("kernels.launch.launch", lambda kernel, *_, **__: pytest.fail(f"{kernel} is launched"))
    data, out = make_pictures(tmp_path / "data", 4), tmp_path / "run"
    command = f"train --variant {name} --recipe quick --data {data} --out {out} --epochs 4 --batch-size 4 --workers 0"
    monkeypatch.setattr("sys.argv", [*command.split(), "--resolution", "32", "--reestimate-bn", "0"])
    with cards.pretend(T4):
        with pytest.raises(SystemExit) as left:
            train()
        assert left.value.code == 0
        said = capsys.readouterr().out
        assert "computing with PyTorch alone because the Triton kernels need compute capability 8.0" in said
        assert "amp fp16" in said
        monkeypatch.setattr("sys.argv", [*command.split(), "--out", f"{out}2", "--kernels", "triton"])
        with pytest.raises(SystemExit) as left:
            train()
        assert left.value.code == 2
        assert re.match(r"error: --kernels triton is impossible because .*\n$", capsys.readouterr().err)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("eval") == 4
    assert lines[-2]["skipped"] < lines[-2]["step"] == 12
