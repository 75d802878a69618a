"""More epochs: a rate that jumps is refused, and fewer than were trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastnet.config import FINETUNE, FOOD101, TrainConfig
from fastnet.errors import UserError
from fastnet.training.continuation import check_epochs, fresh_run_command


def run(folder: Path, epoch: int, within: int = 0) -> Path:
    progress = {"epoch": epoch, "step": 50 * epoch + within, "step_in_epoch": within}
    (folder / "last.json").write_text(json.dumps({"progress": progress, "images_per_step": 16}))
    return folder


def with_epochs(config: TrainConfig, epochs: int) -> TrainConfig:
    data = replace(config.data, data="/my photos")
    return replace(config, data=data, optimizer=replace(config.optimizer, epochs=epochs))


def test_a_finished_cosine_is_not_extended(tmp_path: Path) -> None:
    saved = with_epochs(FINETUNE, 20)
    with pytest.raises(UserError, match=r"come down to 1e-06 and would jump to 0\.0005") as caught:
        check_epochs(saved, with_epochs(FINETUNE, 40), run(tmp_path, 20))
    command = fresh_run_command(with_epochs(FINETUNE, 40), tmp_path)
    assert command in str(caught.value)
    assert f"--pretrained {tmp_path} --data '/my photos' --epochs 10" in command
    assert caught.value.exit_status == 2


def test_a_staircase_goes_on_and_says_its_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_epochs(with_epochs(FOOD101, 20), with_epochs(FOOD101, 40), run(tmp_path, 20))
    assert "the learning rate goes on at 0.00" in capsys.readouterr().err
    check_epochs(with_epochs(FINETUNE, 20), with_epochs(FINETUNE, 22), run(tmp_path, 2, 10))
    assert "goes on at 0.00099 (it was 0.00099)" in capsys.readouterr().err


def test_fewer_epochs_than_were_trained_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--epochs 5 is less than the 8 that"):
        check_epochs(with_epochs(FOOD101, 20), with_epochs(FOOD101, 5), run(tmp_path, 7, 3))
    check_epochs(with_epochs(FOOD101, 20), with_epochs(FOOD101, 8), run(tmp_path, 7, 3))
