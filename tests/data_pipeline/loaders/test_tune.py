"""`python -m data_pipeline tune`: what is tried, what is chosen, and that its flags are fastnet.train's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from data_pipeline import DataError, build_index
from data_pipeline.__main__ import main
from data_pipeline.loaders import loader
from data_pipeline.loaders.tune import ENGINE_SHARES, MARGIN, PREFETCH, Setting, search, tune
from fastnet.train import parse_arguments
from tests.batches import write_photos


def model(setting: Setting) -> float:
    """Images/s of a made-up machine: eight threads are enough, whole photos decode faster, the engine takes 0.8."""
    rate = 100.0 * min(setting.workers, 8) * (2 if setting.loader == "dali" else 1)
    rate *= 1.2 if setting.dali.dali_decode == "whole" else 1
    rate += setting.dali.dali_prefetch == 4
    return rate - 10 * abs(setting.dali.dali_engine_share - 0.8)


def found(measure: Callable[[Setting], float], cores: int, **there: bool) -> tuple[Setting, dict[Setting, float]]:
    """The chosen setting, and the rates of all that were tried, each once."""
    tried: dict[Setting, float] = {}

    def record(setting: Setting) -> float:
        assert setting not in tried
        tried[setting] = measure(setting)
        return tried[setting]

    return search(record, cores, **there), tried


def test_the_fastest_of_every_setting_is_kept() -> None:
    best, tried = found(model, 32, dali=True, engine=True)
    assert best.flags == "--loader dali --workers 8 --dali-prefetch 4 --dali-decode whole --dali-engine-share 0.8"
    assert tried[best] == model(best) == max(tried.values())
    assert len(tried) == 6 + 1 + (len(PREFETCH) - 1) + (len(ENGINE_SHARES) - 1) + 6


def test_workers_that_bring_next_to_nothing_are_left_to_the_step() -> None:
    def measure(setting: Setting) -> float:
        return {1: 500, 2: 1000 * (1 - MARGIN) + 1, 3: 1000}[setting.workers]

    assert found(measure, 3, dali=False, engine=False)[0] == Setting("torch", 2)


def test_torch_is_taken_where_dali_is_slower_and_no_engine_is_tried_without_a_gpu() -> None:
    best, tried = found(lambda s: 2.0 if s.loader == "torch" else 1.0, 2, dali=True, engine=False)
    assert (best, tried[best]) == (Setting("torch", 1), 2.0)
    assert {setting.dali.dali_engine_share for setting in tried} == {Setting("dali", 1).dali.dali_engine_share}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def test_the_printed_flags_train(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "dali_installed", lambda: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert main(["tune", "--root", str(root), "--resolution", "16", "--batch-size", "4", "--seconds", "0"]) == 0
    said = capsys.readouterr().out
    assert "DALI is not installed" in said
    assert "images/s  --loader torch --workers 1" in said
    flags = said.splitlines()[-1].removeprefix("fastest: python -m fastnet.train ").split()
    config = parse_arguments(flags)
    assert (config.data.loader, config.data.workers, config.data.data) == ("torch", 1, str(root))


def test_bad_input_gets_one_sentence(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="--batch-size 99 is more than the 12 training images: choose a smaller one"):
        tune(
            build_index(root), resolution=16, batch_size=99, device=torch.device("cpu"), seconds=0, console=Console()
        )  # fmt: skip
    assert main(["tune", "--root", str(root), "--resolution", "0"]) == 1
    assert (
        capsys.readouterr().err
        == "error: --resolution and --batch-size must be positive, and --seconds not negative.\n"
    )
