"""The generated data set: the same every time, real JPEG files, and its colours do not tell the classes."""

import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data_pipeline import DataError, build_index
from data_pipeline.dataset import synthetic as sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample.make_sample(tmp_path_factory.mktemp("cache"))


def test_layout_sizes_and_counts(folder: Path) -> None:
    index = build_index(folder, cache_dir=folder.parent)
    assert len(index.classes) == 10
    assert index.excluded == ()
    for split, each in (("train", sample.TRAIN_PER_CLASS), ("val", sample.VAL_PER_CLASS)):
        assert (np.bincount(index.splits[split].labels) == each).all()
    sizes = index.splits["train"].sizes
    assert sizes.min() >= 96
    assert sizes.max() <= 200
    assert len(np.unique(sizes, axis=0)) > 500
    assert (sizes[:, 0] > sizes[:, 1]).any()
    assert (sizes[:, 0] < sizes[:, 1]).any()
    with Image.open(index.splits["train"].paths[0]) as image:
        assert image.format == "JPEG"


def test_pictures_are_the_same_every_time() -> None:
    digest = hashlib.sha256()
    for name in sorted(sample.PATTERNS):
        first, again = sample.render(name, 3), sample.render(name, 3)
        assert (first == again).all()
        assert not np.array_equal(first, sample.render(name, 4))
        digest.update(first.tobytes())
    # Change VERSION along with this, or old folders will be taken for new ones.
    assert (sample.VERSION, digest.hexdigest()[:16]) == (2, "93850233fbfb411a")


def test_made_once_and_found_again(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert sample.make_sample(folder.parent) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".sample")] == []


@pytest.fixture
def one_small_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "PATTERNS", {"rings": sample.PATTERNS["rings"], "dots": sample.PATTERNS["dots"]})
    monkeypatch.setattr(sample, "TRAIN_PER_CLASS", 2)
    monkeypatch.setattr(sample, "VAL_PER_CLASS", 1)


@pytest.mark.usefixtures("one_small_class")
def test_an_interrupted_build_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sample, "render", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            sample.make_sample(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(list(sample.make_sample(tmp_path).rglob("*.jpg"))) == 6


def _interrupt(name: str, number: int) -> np.ndarray:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("one_small_class")
def test_two_at_once_agree(tmp_path: Path) -> None:
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(sample.make_sample(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [tmp_path / f"sample-v{sample.VERSION}"] * 2
    assert [path.name for path in tmp_path.iterdir()] == [made[0].name]


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="XDG_CACHE_HOME") as caught:
        sample.make_sample(tmp_path / "file" / "cache")
    assert str(tmp_path / "file") in str(caught.value)


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sample.user_cache_folder() == tmp_path / "fastnet"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/ignored")
    assert sample.user_cache_folder() == Path(os.path.expanduser("~/.cache/fastnet"))


def _histograms(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """[N, 512] shares of 8x8x8 RGB bins, and labels."""
    found = build_index(folder, cache_dir=folder.parent).splits[split]
    rows = []
    for path in found.paths:
        pixels = np.asarray(Image.open(path)).astype(int) // 32
        bins = pixels @ (64, 8, 1)
        rows.append(np.bincount(bins.ravel(), minlength=512) / bins.size)
    return torch.tensor(np.array(rows), dtype=torch.float32), torch.from_numpy(found.labels)


@pytest.mark.slow
def test_colours_do_not_tell_the_classes(folder: Path) -> None:
    """Nearest neighbours, a linear and a two-layer classifier on colour histograms, plain and sorted (which keeps
    how much of the picture each colour covers): the best of their best epochs stays at 40 % or below."""
    (train, labels), (val, expected) = _histograms(folder, "train"), _histograms(folder, "val")
    best = 0.0
    for a, b in ((train.sqrt(), val.sqrt()), (train.sort(1, True).values, val.sort(1, True).values)):
        for k in (1, 5, 15):
            votes = labels[torch.cdist(b, a).topk(k, largest=False).indices].mode(1).values
            best = max(best, (votes == expected).float().mean().item())
        a, b = (a - a.mean(0)) / (a.std(0) + 1e-6), (b - a.mean(0)) / (a.std(0) + 1e-6)
        for model in (nn.Linear(512, 10), nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))):
            optimizer = torch.optim.Adam(model.parameters(), 3e-3)
            for _ in range(100):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(a), labels).backward()
                optimizer.step()
                best = max(best, (model(b).argmax(1) == expected).float().mean().item())
    assert 0.1 < best <= 0.4
