"""A run on a handful of images: files, metrics, stopping, continuing to the same bits, and one-sentence failures."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline import DataError
from fastnet.config import FOOD101, TrainConfig
from fastnet.errors import UserError
from fastnet.evaluate import evaluate_run
from fastnet.loading.trained import data_of, load_trained
from fastnet.model import efficientnet
from fastnet.training.saved import keep_best, restore_run
from fastnet.training.trainer import Trainer
from fastnet.training.validate import reestimate_batch_norm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("dark", "bright")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 100, (40, 48, 3), dtype=np.uint8) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.jpg")
    return root


def rich(folder: Path, **run: Any) -> TrainConfig:
    """Everything at once that a step may hold."""
    config = tiny(folder, **run)
    return replace(
        config,
        optimizer=replace(
            config.optimizer, optimizer="adamw", lr=1e-3, sched="cosine", batch_size=2, grad_accum_steps=2,
            layer_decay=0.9, freeze_stages=1,
        ),
        mix=replace(config.mix, mixup=0.5, cutmix=1.0),
        ema=replace(config.ema, model_ema=True, model_ema_decay=0.9),
        progressive=replace(config.progressive, progressive=2, progressive_start=32),
        model=replace(config.model, resolution=40),
    )  # fmt: skip


def tiny(folder: Path, **run: Any) -> TrainConfig:
    return replace(
        FOOD101,
        model=replace(FOOD101.model, resolution=32),
        data=replace(FOOD101.data, data=str(folder), loader="torch", workers=0),
        optimizer=replace(FOOD101.optimizer, epochs=2, batch_size=4, warmup_epochs=1.0),
        run=replace(FOOD101.run, device="cpu", log_every=2, deterministic=True, **run),
    )


def train(config: TrainConfig, out: Path, stop_at: int | None = None) -> tuple[int, str, Trainer]:
    text = StringIO()
    trainer = Trainer(config, out, Console(file=text, width=200))
    run = trainer.step.run

    def step(*inputs: Tensor | None) -> tuple[Tensor, ...]:
        if trainer.progress.step + 1 == stop_at:
            trainer.stop.signal = 2
        return run(*inputs)  # type: ignore[arg-type]

    trainer.step._call = step
    return trainer.run(), text.getvalue(), trainer


@pytest.fixture(autouse=True)
def _nondeterministic_again() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("run") / "a"
    status, text, _ = train(tiny(folder), out)
    assert status == 0
    return out, text


def without_times(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for key in ("images_per_s", "data_wait", "memory_gb"):
            line.pop(key, None)
    return lines


def test_a_run_leaves_its_files_and_says_how_to_go_on(finished: tuple[Path, str]) -> None:
    out, text = finished
    assert {p.name for p in out.iterdir()} == {
        ".fastnet.lock", "best.json", "best.safetensors", "config.json", "curves.png", "last.json", "last.safetensors",
        "metrics.jsonl",
    }  # fmt: skip
    kinds = [line["kind"] for line in without_times(out / "metrics.jsonl")]
    assert kinds == ["train", "eval", "train", "train", "eval"]
    for words in ("top-1", "top-5", "excluded files", f"fastnet.evaluate {out}", f"--resume {out}"):
        assert words in text
    assert json.loads((out / "last.json").read_text())["progress"]["step"] == 6


@pytest.mark.parametrize("stop_at", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 5))])
def test_stopped_and_continued_ends_in_the_same_bits(
    folder: Path, tmp_path: Path, finished: tuple[Path, str], stop_at: int
) -> None:
    out = tmp_path / "b"
    status, text, _ = train(tiny(folder), out, stop_at)
    assert status == 130
    assert f"stopped at step {stop_at}" in text
    torch.manual_seed(999)  # whatever the process did before
    assert train(tiny(folder), out)[0] == 0
    expected, found = (load_file(run / "last.safetensors") for run in (finished[0], out))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert without_times(out / "metrics.jsonl") == without_times(finished[0] / "metrics.jsonl")


@pytest.mark.slow
def test_a_rich_run_stopped_and_continued_ends_in_the_same_bits(folder: Path, tmp_path: Path) -> None:
    trainers = []
    for name, stops in (("a", [None]), ("b", [2, 4, None])):
        for stop_at in stops:
            torch.manual_seed(999)
            status, text, trainer = train(rich(folder), tmp_path / name, stop_at)
            assert status == (0 if stop_at is None else 130)
        trainers.append((text, trainer))
    expected, found = (load_file(tmp_path / name / "last.safetensors") for name in "ab")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert without_times(tmp_path / "b" / "metrics.jsonl") == without_times(tmp_path / "a" / "metrics.jsonl")
    lines = without_times(tmp_path / "a" / "metrics.jsonl")
    assert [line["resolution"] for line in lines if line["kind"] == "train"] == [32, 40, 40]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [line["weights"] for line in evaluations] == ["model", "ema"] * 2
    # The best file holds the better of both, and says which; of equals the first.
    best = max(evaluations, key=lambda line: line["top1"])
    notes = json.loads((tmp_path / "a" / "best.json").read_text())
    assert {key: notes[key] for key in ("weights", "epoch", "top1")} == {
        key: best[key] for key in ("weights", "epoch", "top1")
    }
    trained = load_trained(tmp_path / "a")
    _, result = evaluate_run(trained, data_of(trained, None), batch_size=4)
    assert result.loss == pytest.approx(best["loss"], rel=1e-5)
    ema = {name for name in expected if name.startswith("training/ema/")}
    assert len(ema) == len(trainers[0][1].model.state_dict())


def test_the_averages_own_weights_are_kept_when_better(folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(rich(folder), tmp_path / "a", Console(file=StringIO()))
    assert trainer.step.ema is not None
    with torch.no_grad():
        for p in trainer.step.ema.module.parameters():
            p.mul_(1.5)
    trainer.progress.evaluations.append(dict(weights="ema", epoch=0, top1=50.0, loss=1.0))
    keep_best(trainer, trainer.step.ema.module, trainer.progress.evaluations[0])
    kept = load_file(tmp_path / "a" / "best.safetensors")
    assert torch.equal(kept["classifier.weight"], trainer.step.ema.state_dict()["classifier.weight"])
    assert not torch.equal(kept["classifier.weight"], trainer.model.state_dict()["classifier.weight"])


def test_the_best_epochs_are_kept(folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(folder, checkpoint_hist=2), tmp_path / "a", Console(file=StringIO()))
    left = []
    for epoch, top1 in enumerate((10.0, 30.0, 20.0, 5.0, 30.0)):
        values = dict(weights="model", epoch=epoch, top1=top1, loss=1.0)
        trainer.progress.evaluations.append(values)
        keep_best(trainer, trainer.model, values)
        left.append(sorted(path.name for path in (tmp_path / "a").glob("checkpoint-*.safetensors")))
    names = [[f"checkpoint-{epoch}.safetensors" for epoch in kept] for kept in ([0], [0, 1], [1, 2], [1, 2], [1, 4])]
    assert left == names
    assert len(list((tmp_path / "a").glob("checkpoint-*"))) == 4  # nor a .json of one that went
    assert json.loads((tmp_path / "a" / "best.json").read_text())["epoch"] == 1


def test_fp16_keeps_its_loss_scale_over_a_stop(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder, amp="fp16")
    assert train(config, tmp_path / "a", 3)[0] == 130
    saved = load_file(tmp_path / "a" / "last.safetensors")
    assert saved["training/step/steps"] == 3
    saved["training/step/loss_scale"].fill_(1234)
    header = {"fastnet": (tmp_path / "a" / "last.json").read_text()}
    save_file(saved, tmp_path / "a" / "last.safetensors", header)
    trainer = Trainer(config, tmp_path / "a", Console(file=StringIO()))
    restore_run(trainer)
    assert trainer.step.health().loss_scale == 1234


@pytest.mark.slow
def test_save_every_writes_between_epochs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    original = Trainer.save

    def save(self: Trainer) -> None:
        steps.append(self.progress.step)
        original(self)

    monkeypatch.setattr(Trainer, "save", save)
    train(tiny(folder, save_every=2), tmp_path / "a")
    assert steps == [0, 2, 3, 4, 6]  # the last step of an epoch is saved once, with its evaluation


def test_evaluating_a_run_repeats_its_result(finished: tuple[Path, str]) -> None:
    out, _ = finished
    lines = [line for line in without_times(out / "metrics.jsonl") if line["kind"] == "eval"]
    best = max(lines, key=lambda line: line["top1"])
    trained = load_trained(out)
    _, result = evaluate_run(trained, data_of(trained, None), batch_size=4)
    assert result.images == 6
    assert result.top1 == best["top1"]
    assert result.loss == pytest.approx(best["loss"], rel=1e-5)


def test_other_data_is_refused_when_continuing(folder: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    for path in folder.rglob("*.jpg"):
        target = other / path.relative_to(folder)
        target = target.with_name(target.name).parent.with_name(target.parent.name + "X") / target.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    config = tiny(folder)
    with pytest.raises(DataError, match=r'has no class "bright" any more.*--pretrained'):
        train(replace(config, data=replace(config.data, data=str(other))), finished[0])


def test_a_batch_larger_than_the_data_is_named(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder)
    with pytest.raises(UserError, match="--batch-size 13 is more than the 12 training images"):
        Trainer(replace(config, optimizer=replace(config.optimizer, batch_size=13)), tmp_path, Console(file=StringIO()))


def test_pretrained_gets_a_new_head_aloud(folder: Path, tmp_path: Path) -> None:
    from fastnet.loading.weights import save_weights

    source = efficientnet("b0", num_classes=5, padding="same", bn_eps=1e-5)
    save_weights(tmp_path / "w.safetensors", source)
    config = tiny(folder)
    config = replace(config, model=replace(config.model, pretrained=str(tmp_path / "w.safetensors")))
    text = StringIO()
    trainer = Trainer(config, tmp_path / "a", Console(file=text, width=200))
    assert "knows 5 classes, the data has 2" in text.getvalue()
    assert trainer.model.config.padding == "same"
    assert trainer.model.config.bn_eps == 1e-5
    assert torch.equal(trainer.model.stem.conv.weight, source.stem.conv.weight)


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(folder), tmp_path / "a", Console(file=StringIO()))
    torch.nn.init.constant_(trainer.model.classifier.bias, float("nan"))
    with pytest.raises(UserError, match=r"not finite at step 1: lower --lr"):
        trainer.run()
    assert json.loads((tmp_path / "a" / "last.json").read_text())["progress"]["step"] == 0


@pytest.mark.slow
def test_a_bad_step_between_two_looks_is_named_and_leaves_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(folder, save_every=2), tmp_path / "a", Console(file=StringIO()))
    run = trainer.step.run

    def step(images: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        if trainer.progress.step == 4:
            images = images * float("inf")
        return run(images, *others)  # type: ignore[arg-type]

    trainer.step._call = step
    with pytest.raises(UserError, match=r"not finite at step 5: .*--resume") as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / "a" / "last.json").read_text())["progress"]["step"] == 4
    saved = load_file(tmp_path / "a" / "last.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
    # The weights are still those of step 4, and the next process goes on from there.
    state = trainer.model.state_dict()
    assert [n for n in state if "tracked" not in n and not torch.equal(state[n], saved[n])] == []
    assert train(tiny(folder), tmp_path / "a")[0] == 0


@pytest.mark.slow
def test_fp16_counts_what_it_skips_and_stops_where_scaling_does_not_help(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder, amp="fp16")
    trainer = Trainer(config, tmp_path / "a", Console(file=StringIO()))
    run = trainer.step.run
    trainer.step._call = lambda images, *others: run(
        images * (float("nan") if trainer.progress.step < 3 else 1.0), *others
    )
    assert trainer.run() == 0
    lines = [line for line in without_times(tmp_path / "a" / "metrics.jsonl") if line["kind"] == "train"]
    assert lines[0]["skipped"] == 2
    assert lines[-1]["skipped"] >= 3
    assert all(np.isfinite(line["loss"]) for line in lines)
    trainer = Trainer(config, tmp_path / "b", Console(file=StringIO()))
    trainer.step.loss_scale.fill_(1.0)
    torch.nn.init.constant_(trainer.model.classifier.bias, float("nan"))
    with pytest.raises(UserError, match="not finite at step 1"):
        trainer.run()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_no_memory_left_is_one_sentence_with_a_batch_to_try(folder: Path, tmp_path: Path, error: Exception) -> None:
    trainer = Trainer(tiny(folder), tmp_path / "a", Console(file=StringIO()))

    def step(*_: Tensor | None) -> tuple[Tensor, ...]:
        raise error

    trainer.step._call = step
    with pytest.raises(UserError, match=r"--batch-size 4: try --batch-size 2 --grad-accum-steps 2"):
        trainer.run()


@pytest.mark.slow
def test_a_continued_run_does_not_need_the_file_it_started_from(folder: Path, tmp_path: Path) -> None:
    from fastnet.loading.weights import save_weights

    weights = tmp_path / "w.safetensors"
    save_weights(weights, efficientnet("b0", num_classes=2, padding="same", bn_eps=1e-5))
    config = tiny(folder)
    config = replace(config, model=replace(config.model, pretrained=str(weights)))
    assert train(config, tmp_path / "a", 2)[0] == 130
    weights.unlink()
    status, _, trainer = train(config, tmp_path / "a")
    assert status == 0
    assert (trainer.model.config.padding, trainer.model.config.bn_eps) == ("same", 1e-5)


def test_reestimated_statistics_are_plain_means() -> None:
    model = efficientnet("b0", num_classes=2)
    batches = [(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)) for _ in range(3)]
    used = reestimate_batch_norm(model, batches, 3, amp="off", device=torch.device("cpu"))  # type: ignore[arg-type]
    assert used == 3
    raw = [model.stem.conv(images) for images, _ in batches]
    torch.testing.assert_close(
        model.stem.bn.running_mean, torch.stack([r.mean((0, 2, 3)) for r in raw]).mean(0), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        model.stem.bn.running_var, torch.stack([r.var((0, 2, 3)) for r in raw]).mean(0), rtol=1e-4, atol=1e-6
    )
    assert {norm.momentum for norm in model.batch_norms()} == {0.01}
    assert {int(norm.num_batches_tracked) for norm in model.batch_norms()} == {0}
