"""A head trained on kept features learns what it learns through the frozen trunk; they are kept while they are true."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fastnet.config import FINETUNE, TrainConfig
from fastnet.errors import UserError
from fastnet.loading.weights import save_weights
from fastnet.model import EfficientNet, efficientnet
from fastnet.training import feature_views
from fastnet.training.trainer import Trainer
from tests.runs import make_pictures, settle


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainConfig]:
    """A fine-tuning of two epochs at 32 px, with these options of data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = make_pictures(tmp_path / "data", per_class=4)
    save_weights(tmp_path / "start.safetensors", settle(efficientnet("b0", num_classes=3), 32), resolution=32)

    def config(epochs: int = 2, **options: Any) -> TrainConfig:
        return replace(
            FINETUNE,
            model=replace(FINETUNE.model, pretrained=str(tmp_path / "start.safetensors"), kernels="torch"),
            data=replace(FINETUNE.data, data=str(data), loader="torch", workers=0, **options),
            optimizer=replace(FINETUNE.optimizer, freeze_stages=7, epochs=epochs, batch_size=4, min_steps=1),
            run=replace(FINETUNE.run, device="cpu", amp="off", log_every=1),
        )

    return config


def trained(config: TrainConfig, folder: Path) -> tuple[list[float], dict[str, Any], str]:
    """(the steps' losses, the last evaluation, what was said)."""
    said = StringIO()
    assert Trainer(config, folder, Console(file=said, width=200)).run() == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (
        [line["loss"] for line in lines if line["kind"] == "train"],
        [line for line in lines if line["kind"] == "eval"][-1],
        said.getvalue(),
    )


@pytest.mark.slow
def test_the_head_learns_what_it_learns_through_the_trunk(
    configured: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, evaluated, said = trained(configured(), tmp_path / "through")
    assert "--feature-views 8 goes through it only once" in said
    with monkeypatch.context() as patch:
        patch.setattr(feature_views, "TRAINING_DTYPE", torch.float32)
        own_losses, own, said = trained(configured(feature_views=2), tmp_path / "exact")
    assert "view 2 of 2" in said
    assert own_losses == pytest.approx(losses, rel=1e-5)
    assert own["loss"] == pytest.approx(evaluated["loss"], rel=1e-5)
    assert own["images"] == evaluated["images"]
    own_losses, own, _ = trained(configured(feature_views=2), tmp_path / "features")
    assert own_losses == pytest.approx(losses, rel=1e-2)  # half precision, and a batch norm over four values

    # Again, with as many of the first views as epochs: nothing goes through the trunk any more.
    def refused(*_: Any) -> Any:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(feature_views.FeatureViews, "_filled", refused)
        assert trained(configured(feature_views=2), tmp_path / "again")[0] == own_losses
        # Other weights, other views: not these features.
        for changed in ({"feature_views": 3}, {"feature_views": 2, "crop_fraction": 0.9}):
            with pytest.raises(AssertionError, match="computed again"):
                trained(configured(**changed), tmp_path / f"changed {len(changed)}")
        weights = settle(efficientnet("b0", num_classes=3), 32)
        save_weights(tmp_path / "start.safetensors", weights, resolution=32)
        with pytest.raises(AssertionError, match="computed again"):
            trained(configured(feature_views=2), tmp_path / "other weights")


@pytest.mark.slow
def test_a_third_epoch_sees_the_first_view_again_and_a_damaged_file_is_computed_anew(
    configured: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    trainer = Trainer(configured(feature_views=2), tmp_path / "run", Console(file=StringIO()))
    loader = trainer.train_loader
    assert isinstance(loader, feature_views.FeatureViews)
    loader._log = lambda text: None

    def seen(epoch: int) -> dict[int, torch.Tensor]:
        batches = list(loader.batches(epoch))
        indices = [loader.plan.step(epoch, number).indices for number in range(len(batches))]
        return dict(zip(np.concatenate(indices).tolist(), torch.cat([batch.images for batch in batches]), strict=True))

    views = [seen(epoch) for epoch in range(3)]
    assert set(views[0]) == set(range(12))
    assert all(torch.equal(views[2][i], views[0][i]) and not torch.equal(views[1][i], views[0][i]) for i in range(12))
    # They are the trunk's, of the pictures that the epoch draws.
    images, _ = next(loader.source.batches(1))
    with torch.no_grad():
        right = EfficientNet.trunk(trainer.model.eval(), images)
    for row, index in zip(right, loader.source.plan.step(1, 0).indices, strict=True):
        assert (views[1][int(index)] - row).abs().max() <= 1e-3 * row.abs().max()
    (file,) = (tmp_path / "cache").rglob("features/*train/*.bin")
    content = np.fromfile(file, np.uint8)
    content[len(content) // 2] ^= 1
    content.tofile(file)
    loader._features = None
    assert all(torch.equal(row, views[0][i]) for i, row in seen(0).items())
    loader.close()


def test_it_stands_beside_nothing_that_needs_the_pictures() -> None:
    options = replace(FINETUNE.data, feature_views=4)
    frozen = replace(FINETUNE, data=options, optimizer=replace(FINETUNE.optimizer, freeze_stages=7))
    feature_views.check(frozen, 1)
    for config, processes, words in (
        (replace(FINETUNE, data=options), 1, "needs --freeze-stages 7"),
        (replace(frozen, mix=replace(frozen.mix, mixup=0.2)), 1, "leave out --mixup"),
        (replace(frozen, progressive=replace(frozen.progressive, progressive=2)), 1, "leave out --progressive"),
        (frozen, 2, "start without torchrun"),
    ):
        with pytest.raises(UserError, match=words):
            feature_views.check(config, processes)
