"""Which epoch is the best, when to stop waiting, and what small and lopsided data sets are given."""

from __future__ import annotations

import copy
import queue
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from data_pipeline import Augmentation, Split
from data_pipeline.loaders.augment import balanced_order
from data_pipeline.loaders.loader import Plan
from fastnet.config import FINETUNE, FOOD101, BestBy, TrainConfig
from fastnet.errors import UserError
from fastnet.train import parse_arguments
from fastnet.training.build import class_weights, lower_batch
from fastnet.training.reporting.console import Heartbeat
from fastnet.training.selection import best_of, out_of_patience
from fastnet.training.step import TrainStep
from fastnet.training.trainer import Trainer
from fastnet.training.validate import evaluate_model

EVALUATIONS = [
    {"epoch": 0, "top1": 50.0, "macro_f1": 40.0, "loss": 1.2},
    {"epoch": 1, "top1": 60.0, "macro_f1": 39.0, "loss": 1.1},
    {"epoch": 2, "top1": 60.0, "macro_f1": 38.0, "loss": 1.0},
    {"epoch": 3, "top1": 59.0, "macro_f1": 37.0, "loss": 1.05},
]


def test_the_best_epoch_and_patience() -> None:
    assert [best_of(EVALUATIONS, by)["epoch"] for by in get_args(BestBy)] == [1, 0, 2]
    assert [out_of_patience(EVALUATIONS, "top1", n) for n in (0, 1, 2, 3)] == [False, True, True, False]
    assert not out_of_patience([], "loss", 1)


def split(counts: tuple[int, ...]) -> Split:
    labels = np.repeat(np.arange(len(counts)), counts)
    n = len(labels)
    paths = tuple(map(str, range(n)))
    return Split(paths, labels, np.full((n, 2), 64, np.int32), np.ones(n, np.uint8), np.zeros(n, np.uint8))


def test_small_classes_are_drawn_by_the_root_of_their_number() -> None:
    labels = split((4, 36, 100)).labels
    epochs = [balanced_order(0, epoch, labels) for epoch in range(30)]
    for order in epochs:
        assert np.bincount(labels[order]).tolist() == [16, 46, 78]  # 140 x (2, 6, 10) / 18
    assert not np.array_equal(epochs[0], epochs[1])
    assert set(np.concatenate(epochs).tolist()) == set(range(140))
    first = labels[epochs[0]]
    assert (first[:70] == 0).sum() in range(3, 14)  # mixed, not class by class


@pytest.mark.parametrize("balanced", [False, True])
def test_the_last_batch_is_filled_and_no_image_left_out(balanced: bool) -> None:
    plan = Plan(split((5, 6)), 32, 4, 0, True, Augmentation(), filled=True, balanced=balanced)
    assert plan.steps == 3
    seen = np.concatenate([plan.step(0, batch).indices for batch in range(3)])
    assert len(seen) == 12
    if not balanced:
        assert set(seen.tolist()) == set(range(11))
    assert replace(plan, filled=False).steps == 2


@pytest.mark.parametrize(
    ("images", "processes", "batch"), [(72, 1, 7), (1000, 1, 16), (145, 1, 16), (20, 1, 4), (72, 2, 4)]
)
def test_finetune_lowers_its_batch_for_few_images(images: int, processes: int, batch: int) -> None:
    assert lower_batch(FINETUNE, images, processes).optimizer.batch_size == batch
    assert lower_batch(FOOD101, images, processes) == FOOD101


def test_a_batch_that_is_typed_stays() -> None:
    given = parse_arguments(["--recipe", "finetune", "--batch-size", "64"])
    assert lower_batch(given, 72, 1).optimizer.batch_size == 64
    assert given.optimizer.min_steps == 1


def test_the_loss_weighs_by_inverse_frequency() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    weights = torch.tensor([3.0, 0.5, 0.5])
    images, labels = torch.randn(6, 4), torch.tensor([0, 1, 1, 2, 2, 2])
    steps = []
    for given in (weights, None):
        twin = copy.deepcopy(model)
        step = TrainStep(twin, torch.optim.SGD(twin.parameters(), 0.1), device=torch.device("cpu"), class_weights=given)
        steps.append(float(step._loss(twin(images), labels, labels, None)[0]))
    each = F.cross_entropy(model(images), labels, label_smoothing=0.1, reduction="none")
    assert steps == pytest.approx([float((each * weights[labels]).mean()), float(each.mean())])


def test_the_classes_scores_are_those_of_torchmetrics() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 5), torch.randint(0, 4, (40,))  # one class never occurs
    batches: Any = [(logits[:32], labels[:32]), (logits[32:], labels[32:])]
    found = evaluate_model(nn.Identity(), batches, classes=5, device=torch.device("cpu"), amp="off")
    f1 = multiclass_f1_score(logits, labels, 5, average="none")
    assert found.macro_f1 == pytest.approx(100 * float(f1.mean()), abs=1e-4)
    recall = multiclass_accuracy(logits, labels, 5, average="none")[:4]
    assert found.balanced_accuracy == pytest.approx(100 * float(recall.mean()), abs=1e-4)


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lopsided")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (2, 9)), ("val", (2, 2))):
        for name, count in zip(("rare", "common"), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for at in range(count):
                pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{at}.png")
    return root


def config(data: Path, **run: Any) -> TrainConfig:
    return replace(
        FOOD101,
        model=replace(FOOD101.model, resolution=32),
        data=replace(FOOD101.data, data=str(data), loader="torch", workers=0),
        optimizer=replace(
            FOOD101.optimizer, epochs=5, batch_size=16, min_steps=2, warmup_epochs=0, balance="loss", lr=1e-9
        ),
        run=replace(FOOD101.run, device="cpu", **run),
    )


@pytest.mark.slow
def test_a_run_on_a_lopsided_set(lopsided: Path, tmp_path: Path) -> None:
    text = StringIO()
    heard: list[str] = []
    given = config(lopsided, patience=2, best_by="loss")
    trainer = Trainer(given, tmp_path / "run", Console(file=text, width=200), doing=heard.append)
    assert trainer.run() == 0
    begun = ["reading the data set", "building the model", "measuring kernels"]
    assert heard[:4] == [*begun, "the first step, which compiles what it needs"]
    assert set(heard[4:]) == {""}
    said = text.getvalue()
    assert "images a class: common 9, rare 2 (1 : 4.5); --balance sampler or loss makes up for it" in said
    assert "batch 10, 2 steps an epoch" in said
    assert "macro-F1" in said
    assert "balanced accuracy" in said
    # A rate of 1e-9 changes little but batch norm's statistics.
    best = best_of(trainer.progress.evaluations, "loss")["epoch"]
    assert trainer.progress.epoch == min(5, best + 3)
    weights = class_weights(trainer.config, trainer.index)
    assert weights is not None
    assert weights.tolist() == pytest.approx([11 / 18, 11 / 4])


def test_a_compiler_that_ctrl_c_ended_is_no_traceback(
    lopsided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = StringIO()
    trainer = Trainer(config(lopsided), tmp_path / "run", Console(file=text, width=200))

    def compiling(*arguments: Any) -> Any:
        trainer.stop.signal = 2
        raise RuntimeError("g++ was interrupted")

    monkeypatch.setattr(trainer.step, "run", compiling)
    monkeypatch.setattr(trainer.step, "_call", compiling)
    assert trainer.run() == 130
    assert f"stopped: {tmp_path}/run/last.safetensors of step 0 is kept; continue with:" in text.getvalue()


def test_another_number_of_classes_is_refused(lopsided: Path, tmp_path: Path) -> None:
    given = config(lopsided)
    given = replace(given, data=replace(given.data, num_classes=3))
    with pytest.raises(UserError, match=r"--num-classes 3, and .* has 2 classes"):
        Trainer(given, tmp_path / "run", Console(file=StringIO()))


def test_a_line_says_what_is_waited_for() -> None:
    heard: queue.Queue[str] = queue.Queue()
    with Heartbeat(heard.put, seconds=0.001) as doing:
        doing("reading the data set")
        assert heard.get(timeout=60) == "reading the data set: 0:00 so far"
        doing("")
    while not heard.empty():
        assert heard.get().startswith("reading")
