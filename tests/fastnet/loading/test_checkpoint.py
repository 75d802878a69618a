"""Checkpoints are whole or not there, readable, and free of pickles."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from fastnet.errors import UserError
from fastnet.loading import checkpoint
from fastnet.loading.checkpoint import load_checkpoint, save_checkpoint, write_atomically


def save(path: Path, value: float) -> None:
    weights = {"conv.weight": torch.full((2, 3, 2, 2), value).to(memory_format=torch.channels_last)}
    save_checkpoint(path, weights, {"optimizer/m/conv.weight": torch.tensor(value)}, {"progress": {"step": value}})


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run" / "last.safetensors"
    save(path, 3.5)
    weights, training, metadata = load_checkpoint(path)
    assert torch.equal(weights["conv.weight"], torch.full((2, 3, 2, 2), 3.5))
    assert training["optimizer/m/conv.weight"].item() == 3.5
    assert metadata["progress"] == {"step": 3.5}
    assert json.loads(path.with_suffix(".json").read_text())["progress"] == {"step": 3.5}


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "no permission"), (errno.EIO, "cannot write")]
)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, words: str
) -> None:
    path = tmp_path / "last.safetensors"
    save(path, 1.0)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint.os, call, fail)
    with pytest.raises(UserError, match=words) as caught:
        save(path, 2.0)
    assert str(path) in str(caught.value)
    monkeypatch.undo()
    assert load_checkpoint(path)[2]["progress"] == {"step": 1.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.json", "last.safetensors"]


def test_the_readable_file_is_that_of_the_checkpoint_again(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save(path, 1.0)
    whole = path.with_suffix(".json").read_text()
    path.with_suffix(".json").write_text("{}")
    checkpoint.write_readable(path, load_checkpoint(path)[2])
    assert path.with_suffix(".json").read_text() == whole


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save(path, 1.0)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"last\.safetensors cannot be read"):
        load_checkpoint(path)


def test_a_newer_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    save(path, 1.0)
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(path)


def test_format_1_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    metadata = {"progress": {"step": 7}, "scaler": {"scale": 512.0, "_growth_tracker": 9}}
    save_checkpoint(path, {}, {"sums": torch.zeros(3)}, metadata)
    save_checkpoint(tmp_path / "best.safetensors", {"x": torch.zeros(1)}, {}, {"model": {}})
    monkeypatch.undo()
    _, training, read = load_checkpoint(path)
    assert {k.removeprefix("step/"): v.item() for k, v in training.items() if k.startswith("step/")} == {
        "loss_scale": 512.0, "growth_tracker": 9, "steps": 7, "skipped": 0, "first_bad": 0,
    }  # fmt: skip
    assert "scaler" not in read
    assert list(load_checkpoint(tmp_path / "best.safetensors")[1]) == []


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path / "last.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no fastnet checkpoint"):
        load_checkpoint(tmp_path / "other.safetensors")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        write_atomically(tmp_path / "file" / "x", b"")
