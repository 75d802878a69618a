"""First use on a real GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastnet import forms
from fastnet.model import efficientnet
from fastnet.training.tuning import Tuner, measure
from fastnet.training.tuning.subjects import subjects
from fastnet.training.tuning.timers import CudaTimer
from kernels import configs


@pytest.mark.gpu
def test_every_block_of_b0_is_right_and_measured_once(
    cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = efficientnet("b0").to(cuda, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    said: list[str] = []
    timer = CudaTimer(cuda)
    seconds = timer.whole(lambda: torch.cuda._sleep(10_000_000))
    assert seconds > timer.whole(lambda: None)
    try:
        tuner = Tuner(cuda, "bf16", timer, said.append)
        for training in (True, False):
            tuner.prepare(model, 96, 8, training=training)
        assert not said  # no block is wrong or can't be run
        found = subjects(model, 96, 8, torch.bfloat16, training=True)
        assert all(subject.place(cuda, compiled=False) in forms._chosen for subject in found)
        monkeypatch.setattr(measure.Bench, "measure", None)
        Tuner(cuda, "bf16", timer, said.append).prepare(model, 96, 8, training=True)
        assert not said
    finally:
        forms.forget()
        configs.forget()
