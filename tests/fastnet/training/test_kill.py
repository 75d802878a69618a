"""Runs that are killed, run out of disk or lose their data, and continue to the same bits."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from data_pipeline import DataError
from fastnet.config import TrainConfig
from fastnet.errors import UserError
from fastnet.loading import checkpoint
from fastnet.training.trainer import Trainer
from tests.forked import ROOT, fork, wait
from tests.kill_trials import Case, digests, make_data

pytestmark = pytest.mark.slow


def test_twenty_runs_killed_at_random_moments() -> None:
    """Of the 200 that `python -m tests.kill_trials --trials 200` makes by hand, which also damages files and kills
    workers."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_trials", "--trials", "20", "--kills-only"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 trials, 0 failed" in done.stdout


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield Case("torch", "none", 0, 1, rich=False).config(make_data(tmp_path / "data"))
    torch.use_deterministic_algorithms(False)


def trainer_of(config: TrainConfig, out: Path) -> Trainer:
    return Trainer(config, out, Console(file=StringIO()))


def before_step(trainer: Trainer, step: int, act: Any) -> None:
    """Let `act` happen where this step (from 0) would begin."""
    inner = trainer.step.run

    def call(*inputs: Any) -> Any:
        if trainer.progress.step == step:
            act()
        return inner(*inputs)

    trainer.step._call = call


def test_a_wish_to_save_is_granted_after_the_step_and_the_run_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    """Slurm sends SIGUSR1 to every process of a job, loading workers too."""
    config = replace(config, run=replace(config.run, save_every=0), data=replace(config.data, workers=1))
    saved: list[int] = []

    def body() -> int:
        trainer = trainer_of(config, tmp_path / "run")
        before_step(trainer, 1, lambda: os.killpg(0, signal.SIGUSR1))
        save = trainer.save

        def spy() -> None:
            saved.append(trainer.progress.step)
            save()

        trainer.save = spy  # type: ignore[method-assign]
        status = trainer.run()
        # At the beginning, after the step that was under way, and at the ends of both epochs.
        assert saved == [0, 2, 3, 6], saved
        return status

    said = tmp_path / "said"
    assert wait(fork(body, said)) == 0, said.read_text()
    assert "worker died" not in said.read_text()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        *(
            pytest.param(*n, marks=pytest.mark.slow)
            for n in ((errno.EROFS, "no permission"), (errno.EDQUOT, "no space"))
        ),
    ],
)
@pytest.mark.parametrize("name", ["last.safetensors", "last.json", "best.safetensors", "metrics.jsonl"])
def test_a_disk_that_fills_up_or_turns_read_only_costs_one_sentence(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, words: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert trainer_of(config, whole).run() == 0
    trainer = trainer_of(config, parts)
    real_open = open
    fails: list[bool] = []

    def refuse(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if fails and mode != "r" and re.fullmatch(rf"{name}|\.{name}\..*\.tmp", Path(path).name):
            raise OSError(number, os.strerror(number), str(path))
        return real_open(path, mode, *args, **options)

    from fastnet.training.reporting import metrics

    for module in (checkpoint, metrics):
        monkeypatch.setattr(module, "open", refuse, raising=False)
    before_step(trainer, 1, lambda: fails.append(True))
    with pytest.raises(UserError, match=words) as caught:
        trainer.run()
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    fails.clear()
    assert trainer_of(config, parts).run() == 0
    assert digests(parts) == digests(whole) | {"files": digests(parts)["files"]}


def test_data_that_vanishes_costs_one_sentence(config: TrainConfig, tmp_path: Path) -> None:
    whole, parts, data, away = (tmp_path / name for name in ("whole", "parts", "data", "away"))
    assert trainer_of(config, whole).run() == 0
    trainer = trainer_of(config, parts)
    before_step(trainer, 3, lambda: data.rename(away))
    with pytest.raises(DataError, match="continue with --resume") as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="There is no folder"):
        trainer_of(config, parts)
    away.rename(data)
    assert trainer_of(config, parts).run() == 0
    assert digests(parts) == digests(whole)


def test_what_was_written_after_the_checkpoint_is_written_once(config: TrainConfig, tmp_path: Path) -> None:
    """An evaluation is stopped, done again and lost: the checkpoint from before it is of the same step."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert trainer_of(config, whole).run() == 0
    trainer = trainer_of(config, parts)
    trainer._finish_epoch = lambda: setattr(trainer.stop, "signal", 15)  # type: ignore[method-assign]
    assert trainer.run() == 143
    trainer = trainer_of(config, parts)

    def lost() -> None:
        raise KeyboardInterrupt

    trainer.save = lost  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer_of(config, parts).run() == 0
    assert digests(parts) == digests(whole)


def test_a_run_keeps_the_images_of_its_steps(config: TrainConfig, tmp_path: Path) -> None:
    """--batch-size says in how many parts they go through the model."""
    trainer = trainer_of(config, tmp_path / "run")
    before_step(trainer, 0, lambda: setattr(trainer.stop, "signal", 2))
    assert trainer.run() == 130
    halves = replace(config, optimizer=replace(config.optimizer, batch_size=2))
    assert trainer_of(halves, tmp_path / "run").batch_layout.micro_batches == 2
    assert trainer_of(halves, tmp_path / "run").peak_lr == trainer.peak_lr


# --- files that change while a run is down --------------------------------------------------------------------------


def stopped(config: TrainConfig, out: Path, step: int = 2) -> None:
    """A run that was stopped before this step."""
    trainer = trainer_of(config, out)
    before_step(trainer, step, lambda: setattr(trainer.stop, "signal", 15))
    assert trainer.run() == 143


def damage(data: Path, how: str) -> Path:
    """A file of the training set that is not what it was, or not there."""
    path = data / "train" / "bright" / "3.jpg"
    if how == "garbage":
        path.write_bytes(b"garbage")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.unlink()
    return path


@pytest.mark.parametrize("how", ["garbage", "cut", "gone"])
def test_a_file_that_went_bad_while_the_run_was_down_is_named_and_left_out(
    config: TrainConfig, tmp_path: Path, how: str
) -> None:
    """As many other stops and starts as one likes change no bit after it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    stopped(config, whole)
    path = damage(tmp_path / "data", how)
    shutil.copytree(whole, parts)
    console = Console(file=StringIO(), width=300)
    trainer = Trainer(config, whole, console)
    assert [name for name, _ in trainer.train_loader.quarantined] == [str(path)]
    assert trainer.run() == 0
    assert str(path) in (whole / "excluded.txt").read_text()
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"excluded files\W+1\b", said), said
    for step in (3, 4):
        stopped(config, parts, step)
    assert trainer_of(config, parts).run() == 0
    assert digests(parts) == digests(whole)
    (whole / "excluded.txt").unlink()  # as a kill leaves it between the last checkpoint and the list
    assert trainer_of(config, whole).run() == 0
    assert digests(parts) == digests(whole)


def test_a_file_that_came_back_stays_out(config: TrainConfig, tmp_path: Path) -> None:
    """What was bad from the beginning, and can be read now, would move all others."""
    path = tmp_path / "data" / "train" / "bright" / "3.jpg"
    content = path.read_bytes()
    path.write_bytes(b"garbage")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert trainer_of(config, whole).run() == 0
    stopped(config, parts)
    path.write_bytes(content)
    trainer = trainer_of(config, parts)
    assert trainer.excluded == [(str(path), "left out when the run began")]
    assert trainer.run() == 0
    assert digests(parts) == digests(whole)


def test_what_would_move_or_change_an_image_is_refused_by_name(config: TrainConfig, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    stopped(config, out)
    train = data / "train"
    wanted = [
        (train / "bright" / "25.jpg", train / "bright" / "2.jpg", "is new among the train images"),
        (
            train / "bright" / "2.jpg",
            train / "bright" / "3.jpg",
            "had 48 x 42 pixels when the run began",
        ),
        (train / "zebra" / "2.jpg", train / "bright" / "2.jpg", 'has the class "zebra", which it had not'),
    ]
    for path, source, words in wanted:
        before = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(source.read_bytes())
        with pytest.raises(DataError, match=words) as caught:
            trainer_of(config, out)
        assert (str(path) if before or "new" in words else "zebra") in str(caught.value)
        assert "\n" not in str(caught.value)
        path.unlink() if before is None else path.write_bytes(before)
    (train / "zebra").rmdir()
    assert trainer_of(config, out).run() == 0


def test_too_many_that_went_bad_are_no_accident(config: TrainConfig, tmp_path: Path) -> None:
    out, train = tmp_path / "run", tmp_path / "data" / "train"
    stopped(config, out)
    for path in sorted(train.glob("*/[0-6].jpg"))[:8]:
        path.rename(path.with_suffix(".away"))
    with pytest.raises(DataError, match=r"8 of 15 images can no longer be decoded.* continue with --resume"):
        trainer_of(config, out)
    for path in train.glob("*/*.away"):
        path.rename(path.with_suffix(".jpg"))
    assert trainer_of(config, out).run() == 0
