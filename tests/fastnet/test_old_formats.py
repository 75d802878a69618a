"""What earlier versions wrote is continued from the bits that it holds, or refused in one sentence; never misread."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from data_pipeline import PixelCache, build_index
from data_pipeline.dataset.index_cache import cache_file, read_cache
from fastnet.config_file import read_config
from fastnet.loading.weights import load_weights
from fastnet.training.saved import restore_run
from fastnet.training.trainer import Trainer
from tests.kill_trials import digests
from tests.networks import NARROW

KEPT = sorted((Path(__file__).parents[1] / "formats").glob("*.tar.xz"))


@pytest.fixture(params=KEPT, ids=lambda path: path.name.removesuffix(".tar.xz"))
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of run/, cache/ and data/ as an earlier version left them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(request.param) as tar:
        tar.extractall(tmp_path, filter="data")
    yield tmp_path
    torch.use_deterministic_algorithms(False)


def trainer_of(old: Path, out: Path) -> Trainer:
    config = read_config(out / "config.json")
    config = replace(config, data=replace(config.data, data=str(old / "data")))
    assert config.model.variant == NARROW
    return Trainer(config, out, Console(file=StringIO()))


def test_every_version_is_there() -> None:
    assert len(KEPT) >= 2


def test_a_run_goes_on(old: Path) -> None:
    """Its state is what the file holds, bit for bit, and it ends, twice in the same bits."""
    run, again = old / "run", old / "again"
    shutil.copytree(run, again)
    stored = load_file(run / "last.safetensors")
    trainer = trainer_of(old, run)
    restore_run(trainer)
    assert (trainer.progress.step, trainer.progress.epoch) == (3, 1)
    held = trainer.model.state_dict()
    assert {name for name in stored if not name.startswith("training/")} == set(held)
    assert all(torch.equal(stored[name], value) for name, value in held.items())
    assert len((run / "metrics.jsonl").read_text().splitlines()) == trainer.metrics_lines
    for out in (run, again):
        assert trainer_of(old, out).run() == 0
    assert digests(run) == digests(again)
    assert load_weights(run / "best.safetensors").config.num_classes == 2


def test_an_index_and_a_cache_are_what_they_were_or_made_anew(old: Path) -> None:
    """An old one is never taken for what it is not."""
    data, kept = old / "data", old / "cache" / "fastnet"
    # Their names follow from where the data lies.
    (listing,) = (kept / "index").iterdir()
    now = cache_file(data, kept)
    for path in [listing, *(kept / "pixels").iterdir()]:
        if path.name.startswith(listing.stem):
            path.rename(path.with_name(path.name.replace(listing.stem, now.stem)))
    known = read_cache(now)
    index = build_index(data, cache_dir=kept)
    for name, fields in known.items():
        split = index.splits[name.partition("/")[0]]
        at = split.paths.index(f"{data}/{name}")
        assert fields[2:] == [*split.sizes[at].tolist(), int(split.orientations[at]), int(split.kinds[at])]
    kept_pixels, anew = (PixelCache("disk", "", index, 32, folder) for folder in (kept, old / "anew"))
    for name, split in index.splits.items():
        store, bad = kept_pixels.store(name, 1)
        fresh, _ = anew.store(name, 1)
        assert bad == {}
        for at in range(len(split)):
            assert torch.equal(store.ensure(at), fresh.ensure(at))
