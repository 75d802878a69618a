"""Only files that a run of ours wrote are replaced or removed, and one run at a time writes into a folder."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_pipeline import DataError, build_index, choose_cache
from data_pipeline.loaders.cache import cache_folder
from fastnet import train as train_command
from fastnet.analysis.report import check_folder
from fastnet.config import TrainConfig
from fastnet.errors import UserError
from fastnet.evaluate import evaluate
from fastnet.loading.checkpoint import write_atomically
from fastnet.loading.options import InferenceOptions
from fastnet.predict import predict
from fastnet.training.run_folder import LOCK, check_new, locked
from fastnet.training.tuning.kept import KeptResults
from tests.fastnet.training.test_kill import before_step, config, stopped, trainer_of
from tests.forked import fork, wait
from tests.kill_trials import digests
from tests.runs import make_pictures, make_run

pytestmark = pytest.mark.slow

__all__ = ["config"]  # the fixture


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_checkpoints_of_others_stay(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("checkpoint-12.pth.tar", "checkpoint-best.pth", "checkpoint-0.txt", "model_best.pth.tar"):
        (out / name).write_text("timm's")
    before = contents(out)
    many = replace(config, run=replace(config.run, checkpoint_hist=2), optimizer=replace(config.optimizer, epochs=3))
    assert trainer_of(many, out).run() == 0
    assert before.items() <= contents(out).items()
    assert len(list(out.glob("checkpoint-*.safetensors"))) == 2


@pytest.mark.parametrize("name", ["best.safetensors", "metrics.jsonl", "config.json", "checkpoint-3.safetensors"])
def test_a_new_run_replaces_nothing(config: TrainConfig, tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("somebody's")
    with pytest.raises(UserError, match=rf"--out .*run holds {name}, which the new run would replace"):
        check_new(tmp_path / "run")
    with pytest.raises(UserError, match="would replace"):
        trainer_of(config, tmp_path / "run").run()
    assert contents(tmp_path / "run") == {name: b"somebody's"}


def test_a_run_that_never_saved_may_begin_again(config: TrainConfig, tmp_path: Path) -> None:
    trainer = trainer_of(config, tmp_path / "run")

    def lost() -> None:
        raise KeyboardInterrupt

    trainer.save = lost  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert (tmp_path / "run" / "config.json").exists()
    assert trainer_of(config, tmp_path / "run").run() == 0


def test_two_runs_in_one_folder(config: TrainConfig, tmp_path: Path) -> None:
    """The second to come is told who is there; the first ends in the bits of one that was alone."""
    whole, both = tmp_path / "whole", tmp_path / "both"
    assert trainer_of(config, whole).run() == 0
    first, said = trainer_of(config, both), []
    other = replace(config, optimizer=replace(config.optimizer, lr=1.0))

    def second() -> None:
        state = torch.get_rng_state()  # another process has its own
        with pytest.raises(UserError) as caught:
            trainer_of(other, both).run()
        torch.set_rng_state(state)
        said.append(str(caught.value))

    before_step(first, 2, second)
    assert first.run() == 0
    assert f"another run (process {os.getpid()} on " in said[0]
    assert f"writes into {both}" in said[0]
    assert digests(both) == digests(whole)


def test_a_run_that_was_continued_elsewhere_meanwhile_is_not_torn(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped(config, out)
    late = trainer_of(config, out)
    assert trainer_of(config, out).run() == 0
    end = digests(out)
    with pytest.raises(UserError, match="another run has written"):
        late.run()
    assert digests(out) == end


def test_locks_follow_no_link(tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    out.mkdir()
    (out / LOCK).symlink_to(victim)
    with pytest.raises(UserError, match="no run can be written to"), locked(out, new=True):
        pass
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("what", ["the cache", "what was measured"])
def test_locks_of_the_users_cache_follow_no_link(tmp_path: Path, what: str) -> None:
    """Through a link, the file that it names would be made, or locked."""
    victim = tmp_path / "victim"
    if what == "the cache":
        for folder in ("train/a", "train/b", "val/a", "val/b"):
            photo = tmp_path / "photos" / folder / "1.png"
            photo.parent.mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(photo)
        index = build_index(tmp_path / "photos", cache_dir=tmp_path / "index")
        pixels = choose_cache("disk", index, 32, cache_dir=tmp_path)
        place = cache_folder(index, "train", pixels.contents["train"], tmp_path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_name(f".{place.name}.lock").symlink_to(victim)
        with pytest.raises(DataError, match="cannot be written"):
            pixels.store("train", 1)
    else:
        said: list[str] = []
        kept = KeptResults({"gpu": "none"}, said.append, tmp_path)
        kept.path.with_suffix(".lock").symlink_to(victim)
        kept.add({"a": {}})
        assert "can't be kept" in said[0]
    assert not victim.exists()


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    mine, others = out / ".last.safetensors.123-0a1b2c3d.tmp", out / ".last.safetensors.tmp"
    mine.write_text("half")
    others.write_text("whose?")
    with locked(out, new=True):
        assert not mine.exists()
    assert others.exists()


def test_two_processes_that_write_one_file_do_not_tear_it(tmp_path: Path) -> None:
    """Each writes a megabyte of its own letter, again and again; whoever was last, the file is all of one letter."""
    path = tmp_path / "file"

    def write(letter: bytes) -> int:
        for _ in range(60):
            write_atomically(path, letter * 2**20)
        return 0

    children = [fork(partial(write, letter), tmp_path.with_suffix(".said")) for letter in (b"a", b"b")]
    assert [wait(child) for child in children] == [0, 0]
    assert path.read_bytes() in (b"a" * 2**20, b"b" * 2**20)
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    write_atomically(path, b"c")
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_data_that_moved(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts, moved = tmp_path / "whole", tmp_path / "parts", tmp_path / "elsewhere" / "photos"
    assert trainer_of(config, whole).run() == 0
    stopped(config, parts)
    moved.parent.mkdir()
    (tmp_path / "data").rename(moved)
    monkeypatch.setattr(train_command, "RUNS", tmp_path)
    given = train_command.parse_arguments(["--resume", str(parts), "--data", str(moved)])
    assert given.data.data == str(moved)
    assert trainer_of(given, parts).run() == 0
    assert json.loads((parts / "config.json").read_text())["data"]["data"] == str(moved)
    assert digests(parts) == digests(whole)


# --- the other commands ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("read only")
    return make_run(root / "run", make_pictures(root / "data"))


def test_pictures_of_grad_cam_replace_no_photo(run: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (60, 60), "red").save(photo)
    before = contents(tmp_path)
    for _ in range(2):
        assert predict(str(run), (str(photo),), gradcam=True, gradcam_stages=(9,), out=str(tmp_path)) == 0
    assert before.items() <= contents(tmp_path).items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo-2.png", "photo-3.png", "photo.png"]


def test_a_report_elsewhere_leaves_the_run_alone(run: Path, tmp_path: Path, capsys: Any) -> None:
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0, "lr": 0.1}\n{"kind": "tr')
    before = contents(run)
    assert (
        evaluate(
            str(run), out=str(tmp_path / "report"), worst=1, gradcam_stages=(9,), inference=InferenceOptions(workers=0)
        )
        == 0
    )
    assert contents(run) == before
    check_folder(tmp_path / "report")  # a report of ours may be replaced
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "roc.png").write_bytes(b"the user's")
    with pytest.raises(UserError, match=r"holds roc\.png, which the report would replace"):
        evaluate(str(run), out=str(tmp_path / "photos"))
