"""Pipes, devices and files without end in the places of files that we read: named or passed over, never waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import DataError, build_index
from data_pipeline.dataset.download import prepare, prepared
from data_pipeline.dataset.index_cache import read_cache
from data_pipeline.dataset.synthetic import user_cache_folder
from data_pipeline.dataset.tar import TarMember
from data_pipeline.loaders.cache import _open
from data_pipeline.loaders.pixel_store import Photos
from fastnet.analysis.page import is_ours
from fastnet.config import FOOD101
from fastnet.config_file import read_config
from fastnet.errors import UserError
from fastnet.exports.formats import read_program
from fastnet.loaded import Transform
from fastnet.loading.checkpoint import files_of, load_checkpoint, notes_of
from fastnet.loading.weights import load_weights
from fastnet.train import _images_per_step
from fastnet.training.continuation import check_epochs
from fastnet.training.reporting.curves import read_metrics
from fastnet.training.reporting.metrics import MetricsFile
from fastnet.training.tuning.kept import KeptResults
from tests.runs import make_pictures, make_run

KINDS = ("pipe", "device", "sparse")


def make(kind: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with open(path, "wb") as file:
            file.truncate(40 << 30)
    return path


@pytest.fixture(params=KINDS)
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """name -> such a file at that place."""
    return lambda name: make(request.param, tmp_path / name)


# Reads that must end in an error that names the file.
NAMED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a configuration": ("config.json", read_config),
    "metrics": ("metrics.jsonl", lambda path: MetricsFile(path, 0)),
    "metrics for curves": ("metrics.jsonl", read_metrics),
    "a checkpoint": ("last.safetensors", load_checkpoint),
    "weights": ("w.safetensors", load_weights),
    "pickled weights": ("w.pth", load_weights),
    "a program": ("w.pt2", read_program),
    "an ONNX program": ("w.onnx", read_program),
    "a table": ("list.csv", build_index),
    "a picture": ("photo.jpg", lambda path: Transform(32, 1.0)(path)),
}
# These may be large.
NAMED_UNLESS_LARGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a shard that changed": ("train.tar", lambda path: TarMember(str(path), "a.jpg", 0, 4).read()),
    "an archive": ("food-101.tar.gz", lambda path: prepare(path.parent)),
}
# These are looked for under other names where they are no files.
NAMED_IF_LARGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a configuration of a hub's": ("config.json", lambda path: load_weights(_hub(path))),
    "a list of photos": ("meta/train.json", lambda path: build_index(_food(path))),
    "a list of classes": ("meta/classes.txt", lambda path: build_index(_food(path))),
}
WHICH = [
    *((kind, *one) for kind in KINDS for one in NAMED.values()),
    *((kind, *one) for kind in KINDS[:2] for one in NAMED_UNLESS_LARGE.values()),
    *(("sparse", *one) for one in NAMED_IF_LARGE.values()),
]
# Reads of what may be missing: as if it were.
PASSED_OVER: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "the notes of weights": ("last.safetensors", notes_of),
    "the images of a run": ("last.safetensors", lambda path: files_of(path.parent)),
    "what was found in a data set": ("cache/index/a.json", read_cache),
    "where a data set was put": ("cache/fastnet/food-101.path", lambda path: prepared()),
    "a report": ("report.html", is_ours),
    "the JSON beside a checkpoint": ("last.json", lambda path: check_epochs(FOOD101, _twice(), path.parent)),
}


def _hub(config: Path) -> Path:
    torch.save({"conv_stem.weight": torch.zeros(1)}, config.parent / "pytorch_model.bin")
    return config.parent


def _food(listed: Path) -> Path:
    """Food-101's layout around this file of its metadata, whose .txt is left out where there is a .json."""
    root = listed.parents[1]
    (root / "images" / "pie").mkdir(parents=True)
    for name in ("train.txt", "test.txt"):
        (root / "meta" / name).write_text("pie/1\n")
    return root


def _twice() -> Any:
    from dataclasses import replace

    return replace(FOOD101, optimizer=replace(FOOD101.optimizer, epochs=2 * FOOD101.optimizer.epochs))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("kind", "name", "read"), WHICH)
def test_what_blocks_or_never_ends_is_named(
    kind: str, name: str, read: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = make(kind, tmp_path / name)
    with pytest.raises((UserError, DataError, ValueError, OSError)) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", PASSED_OVER)
def test_what_blocks_or_never_ends_is_no_note_of_ours(
    special: Callable[[str], Path], what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name, read = PASSED_OVER[what]
    assert not read(special(name))


@pytest.mark.timeout(60)
def test_caches_that_are_no_files_are_made_anew(special: Callable[[str], Path], tmp_path: Path) -> None:
    index = build_index(make_pictures(tmp_path / "data", per_class=1), cache_dir=tmp_path / "cache")
    for name in ("index.json", "pixels.bin"):
        assert _open(special(f"pixels/{name}").parent, index, "train", Photos(32)) is None
    said: list[str] = []
    kept = KeptResults({"gpu": "some"}, said.append, tmp_path / "tuning")
    special(f"tuning/{kept.path.name}")
    assert kept.read() == {}
    assert "can't be used" in said[0]


@pytest.mark.timeout(60)
def test_an_export_of_a_run_passes_over_its_checkpoint(special: Callable[[str], Path], tmp_path: Path) -> None:
    from fastnet.exports.facts import run_id
    from fastnet.loading.trained import load_trained

    make_run(tmp_path / "run", make_pictures(tmp_path / "data", per_class=1))
    special("run/last.safetensors")
    assert run_id(load_trained(tmp_path / "run")) == "run"
    assert _images_per_step(FOOD101, special("run/last.json").parent) == FOOD101.images_per_step
    assert user_cache_folder()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt2"])
def test_a_file_that_may_not_be_read_is_no_damaged_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors says that there is no such file."""
    path = tmp_path / name
    path.write_bytes(b"secret")
    inner = os.open

    def refuse(of: Any, *rest: Any, **options: Any) -> int:
        if str(of) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return inner(of, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises((UserError, ValueError), match="permission denied"):
        (read_program if name.endswith("pt2") else load_weights)(path)
