"""A run that is stopped mid-epoch and continued ends in the same weights, whatever fed it and whatever went bad."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.loaders.loader import dali_installed
from fastnet.config import FOOD101, TrainConfig
from fastnet.training.trainer import Trainer

DALI = pytest.mark.skipif(not dali_installed(), reason="DALI is not installed")
SOURCES = [
    ("torch", "none"),
    pytest.param("dali", "none", marks=DALI),
    ("torch", "ram"),
    ("torch", "disk"),
]


@pytest.fixture
def photos_of_two_classes(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 2)):
        for label, name in enumerate(("dark", "bright")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 100, (40 + i, 48, 3), dtype=np.uint8) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def _own_cache_and_nondeterministic_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    torch.use_deterministic_algorithms(False)


def settings(data: Path, loader: Any, cache: Any, workers: int) -> TrainConfig:
    return replace(
        FOOD101,
        model=replace(FOOD101.model, resolution=32),
        data=replace(FOOD101.data, data=str(data), loader=loader, cache=cache, workers=workers),
        optimizer=replace(FOOD101.optimizer, epochs=2, batch_size=4),
        run=replace(FOOD101.run, device="cpu", deterministic=True),
    )


def run(config: TrainConfig, out: Path, stop_at: int | None = None, damage: tuple[int, Path] | None = None) -> Trainer:
    """Train; stop after step `stop_at`; spoil a file after the step that `damage` names."""
    trainer = Trainer(config, out, Console(file=StringIO()))
    inner = trainer.step.run

    def step(*inputs: Any) -> Any:
        number = trainer.progress.step + 1
        if number == stop_at:
            trainer.stop.signal = 2
        if damage is not None and number == damage[0]:
            damage[1].write_bytes(b"garbage")
        return inner(*inputs)

    trainer.step._call = step
    trainer.run()
    return trainer


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "last.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize(("loader", "cache"), SOURCES)
def test_stopped_and_continued(photos_of_two_classes: Path, tmp_path: Path, loader: str, cache: str) -> None:
    """14 images in batches of 4: 3 steps an epoch, stopped in the middle of the second with other workers."""
    run(settings(photos_of_two_classes, loader, cache, 1), tmp_path / "whole")
    run(settings(photos_of_two_classes, loader, cache, 1), tmp_path / "parts", stop_at=5)
    assert not same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    run(settings(photos_of_two_classes, loader, cache, 2), tmp_path / "parts")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_a_file_that_went_bad_before_the_stop_changes_nothing_after_it(
    photos_of_two_classes: Path, tmp_path: Path
) -> None:
    """It is met in the second epoch's first batch, the run is stopped after its second and continued: the index that is
    built then does not know the file, and all others keep their places."""
    ends = {}
    for name, stop_at in (("whole", None), ("parts", 5)):
        config = settings(photos_of_two_classes, "torch", "none", 0)
        trainer = Trainer(config, tmp_path / "probe", Console(file=StringIO()))
        bad = Path(trainer.index.splits["train"].paths[int(trainer.train_loader.plan.order(1)[1])])
        content = bad.read_bytes()
        first = run(config, tmp_path / name, stop_at=stop_at, damage=(3, bad))
        if stop_at is not None:
            assert [path for path, _ in first.train_loader.quarantined] == [str(bad)]
            last = run(config, tmp_path / name)
            assert [path for path, _ in last.train_loader.quarantined] == [str(bad)]
        ends[name] = weights(tmp_path / name)
        bad.write_bytes(content)
    assert same(ends["parts"], ends["whole"])
