"""`--batch-size auto`: the largest batch that fits, by trying where memory's end is an error, else by a count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import Index, build_index
from fastnet.config import FINETUNE, FOOD101, TrainConfig
from fastnet.errors import UserError
from fastnet.train import parse_arguments
from fastnet.training import fit_batch as module
from fastnet.training.distributed import ALONE, Ranks
from fastnet.training.fit_batch import Trial, fitted, largest
from fastnet.training.step import TrainStep
from tests.runs import make_pictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = tmp_path_factory.mktemp("fitted")
    return build_index(make_pictures(root / "data", 16), cache_dir=root / "cache")


def auto(config: TrainConfig, **optimizer: Any) -> TrainConfig:
    return replace(config, optimizer=replace(config.optimizer, batch_size=0, **optimizer))


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 63, 64, 100, 127, 1000, 5000])
@pytest.mark.parametrize("most", [2, 5, 8, 90, 4096])
def test_the_largest_that_fits_to_an_eighth(limit: int, most: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found = largest(fits, most)
    best = min(limit, most)
    assert max(tried) <= most
    assert len(tried) == len(set(tried)) <= 14
    if best < 2:
        assert found == 0
    else:
        assert found <= best
        assert found > 7 / 8 * best - 1


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_steps_are_tried_until_memory_ends(index: Index, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Injected: a step of more than 11 images at a time, or a second one's optimizer beside 10."""
    run, sizes = TrainStep.run, []

    def limited(self: TrainStep, images: torch.Tensor, *rest: Any) -> Any:
        sizes.append(len(images) // self.grad_accum_steps)
        if sizes[-1] > 11 or (sizes[-1] > 9 and int(self.steps)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, images, *rest)

    monkeypatch.setattr(TrainStep, "run", limited)
    config = auto(FOOD101, grad_accum_steps=parts)
    assert largest(Trial(config, 3, 32, CPU, "off"), 24) == 9
    assert sizes == [8, 8, 16, 12, 10, 10, 9, 9]
    monkeypatch.setattr(TrainStep, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("another error")))
    with pytest.raises(RuntimeError, match="another error"):
        largest(Trial(config, 3, 32, CPU, "off"), 24)


def on_gpu(
    config: TrainConfig, index: Index, monkeypatch: pytest.MonkeyPatch, limit: int, ranks: Ranks = ALONE
) -> tuple[int, str]:
    """(batch, what was said) on a GPU that holds `limit` images."""
    said: list[str] = []
    monkeypatch.setattr(module, "Trial", lambda *_: lambda batch: batch <= limit)
    found = fitted(config, index, 32, torch.device("cuda"), "off", ranks, said.append)
    (line,) = said
    return found.optimizer.batch_size, line


def test_one_line_says_what_was_found(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_gpu(auto(FOOD101), index, monkeypatch, 20) == (20, "--batch-size auto: 20 images, found by trying")
    batch, said = on_gpu(auto(FOOD101), index, monkeypatch, 500)  # 48 images
    assert (batch, said.endswith("; the data set has no more")) == (48, True)
    assert on_gpu(auto(FOOD101, grad_accum_steps=3), index, monkeypatch, 500)[0] == 16
    # The recipe's ten steps an epoch come first: 48 images in batches of 5.
    batch, said = on_gpu(auto(FINETUNE), index, monkeypatch, 500)
    assert (batch, said.endswith("fewer than 10 steps")) == (5, True)
    with pytest.raises(UserError, match="out of memory on cuda with a batch of 2: lower --resolution"):
        on_gpu(auto(FOOD101), index, monkeypatch, 1)


def test_all_ranks_take_the_least(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "all_reduce_max", lambda self, number: max(number, -6))  # another holds 6 images
    ranks = Ranks(size=2, local_size=2)
    batch, said = on_gpu(auto(FOOD101), index, monkeypatch, 20, ranks)
    assert (batch, said) == (6, "--batch-size auto: 6 images in each process, found by trying")


def test_a_cpu_takes_the_recipes_as_far_as_memory_goes(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(free: float) -> int:
        monkeypatch.setattr(module, "available_memory", lambda: int(free))
        said: list[str] = []
        config = fitted(auto(FOOD101), index, 224, CPU, "off", ALONE, said.append)
        assert f"{free / 1e9:.1f} GB that are free" in said[0]
        return config.optimizer.batch_size

    assert found(64e9) == 48  # of the 48 images; the recipe has 64
    assert found(4e9) < 48
    assert found(1e6) == 2


def test_the_flag_and_what_a_continued_run_keeps(tmp_path: Path) -> None:
    for words in (["--batch-size", "auto"], ["-b", "auto"], ["--batch-size=auto"]):
        given = parse_arguments(["--recipe", "finetune", "--pretrained", "imagenet", "--data", "x", *words])
        given.validate()
        assert (given.optimizer.batch_size, given.optimizer.min_steps) == (0, 10)
    with pytest.raises(UserError, match="--batch-size 1 must be 2 or more, or auto"):
        parse_arguments(["--recipe", "quick", "--batch-size", "1"]).validate()
    (tmp_path / "last.safetensors").touch()
    found = replace(given, optimizer=replace(given.optimizer, batch_size=24))
    (tmp_path / "config.json").write_text(found.to_json())
    assert parse_arguments(["--resume", str(tmp_path), "--batch-size", "auto"]).optimizer.batch_size == 24
