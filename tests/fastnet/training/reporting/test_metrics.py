"""Means over an epoch, and where its time went."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from fastnet.training.reporting.console import format_seconds
from fastnet.training.reporting.metrics import Clock, RunningMetrics


def test_sums_weigh_by_images() -> None:
    sums = RunningMetrics(torch.device("cpu"))
    sums.add(torch.tensor(1.0), torch.tensor(1), 2)
    sums.add(torch.tensor(4.0), torch.tensor(4), 4)
    assert sums.read() == (3.0, pytest.approx(100 * 5 / 6))
    assert sums.read() == (0.0, 0.0)


def test_the_clock_leaves_out_its_first_steps() -> None:
    clock = Clock(warmup=2)
    for seconds in (100.0, 50.0, 2.0, 2.0):
        clock.step(seconds, 0.5, 8)
    assert clock.rates() == (4.0, 25.0)
    assert clock.train_seconds == 154.0


def test_the_clock_counts_no_wait_for_the_device_as_one_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 7 seconds for each batch the loader spent 5 waiting for the device."""
    now = held = 0.0

    def batches() -> Iterator[int]:
        nonlocal now, held
        for number in range(3):
            now, held = now + 7, held + 5
            yield number

    monkeypatch.setattr("fastnet.training.reporting.metrics.time", SimpleNamespace(perf_counter=lambda: now))
    found = list(Clock().batches(batches(), lambda: held))
    assert found == [(0, 0.0, 2.0), (1, 7.0, 2.0), (2, 14.0, 2.0)]
    now = held = 0.0
    assert [waited for _, _, waited in Clock().batches(batches())] == [7.0, 7.0, 7.0]


def test_seconds_are_readable() -> None:
    assert (format_seconds(75), format_seconds(3700)) == ("1:15", "1:01:40")
