"""Views, streaming and scores: against plain computation on the same images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline import make_loader
from fastnet.analysis.predictions import (
    Predictions,
    Tta,
    as_pictures,
    collect,
    index_files,
    load_views,
    loaded_side,
    log_probabilities,
    subset,
    view_loader,
)
from fastnet.analysis.scores import most_confused, precision_recall_curves, reliability, roc_curves, score
from fastnet.errors import UserError
from fastnet.evaluate import evaluate_run
from fastnet.loading.trained import Trained, data_of, load_trained
from tests.runs import CLASSES, make_pictures, make_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("evaluated")
    return load_trained(make_run(root / "run", make_pictures(root / "data")))


@pytest.fixture(scope="module")
def images(trained: Trained) -> Tensor:
    return load_views(trained, data_of(trained, None))


def test_evaluating_is_the_model_on_the_loaders_images(trained: Trained, images: Tensor) -> None:
    found, scores = evaluate_run(trained, data_of(trained, None), batch_size=5)
    with torch.no_grad():
        expected = trained.model(images).log_softmax(1)
    torch.testing.assert_close(found.log_probabilities, expected, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.positions.tolist() == list(range(12))
    assert scores.images == 12
    assert scores.top1 == pytest.approx(100 * (expected.argmax(1) == found.labels).double().mean().item())
    assert scores.top5 == 100
    assert scores.loss == pytest.approx(torch.nn.functional.nll_loss(expected, found.labels).item(), rel=1e-4)


def test_a_file_that_went_bad_is_missing_from_the_rows(trained: Trained, images: Tensor, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.jpg" for i in range(5)]
    for i, path in enumerate(data_of(trained, None).splits["val"].paths[:5]):
        files[i].write_bytes(Path(path).read_bytes())
    index, bad = index_files(files)
    assert bad == []
    files[3].write_bytes(b"gone")
    found = collect(trained, view_loader(trained, index, backend="torch", batch_size=2, workers=0))
    assert found.positions.tolist() == [0, 1, 2, 4]
    with torch.no_grad():
        expected = trained.model(images[[0, 1, 2, 4]]).log_softmax(1)
    torch.testing.assert_close(found.log_probabilities, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tta", ["hflip", "five", "ten"])
def test_views_are_averaged_as_probabilities(trained: Trained, tta: Tta) -> None:
    side, crop_fraction = loaded_side(trained.resolution, trained.crop_fraction, tta)
    index = data_of(trained, None)
    loaded, _ = next(
        make_loader(
            index, "val", backend="torch", resolution=side, crop_fraction=crop_fraction, batch_size=12, seed=0,
            train=False, augmentation=None, workers=0,
        ).batches(0)
    )  # fmt: skip
    s = trained.resolution
    views = [loaded]
    if tta != "hflip":
        assert side == round(s / 0.875)
        rest = side - s
        centre = loaded[:, :, rest // 2 : rest // 2 + s, rest // 2 : rest // 2 + s]
        corners = [loaded[:, :, y, x] for y in (slice(s), slice(rest, None)) for x in (slice(s), slice(rest, None))]
        views = [centre, *corners]
    if tta != "five":
        views += [torch.flip(view, (3,)) for view in views]
    assert len(views) == {"hflip": 2, "five": 5, "ten": 10}[tta]
    with torch.no_grad():
        expected = torch.stack([trained.model(view).softmax(1) for view in views]).mean(0)
    found, _ = evaluate_run(trained, index, tta=tta)
    torch.testing.assert_close(found.probabilities, expected, rtol=1e-3, atol=1e-5)
    single, _ = evaluate_run(trained, index)
    assert (found.probabilities - single.probabilities).abs().max() > 1e-3


def test_the_centre_crop_is_the_usual_view(trained: Trained, images: Tensor) -> None:
    """At the same scale; half a pixel of the photo apart at most."""
    side, crop_fraction = loaded_side(trained.resolution, trained.crop_fraction, "five")
    loader = view_loader(trained, data_of(trained, None), tta="five", backend="torch", batch_size=12, workers=0)
    rest = (side - trained.resolution) // 2
    inner = slice(rest, rest + trained.resolution)
    centre = next(loader.batches(0)).images[:, :, inner, inner]
    assert crop_fraction == 1
    assert (centre - images).abs().mean() < 0.1 * images.std()


def test_crops_of_a_view_that_is_the_whole_picture_are_refused() -> None:
    with pytest.raises(UserError, match="use --tta hflip or a --crop-fraction below 1"):
        loaded_side(224, 1.0, "five")


def test_logsumexp_survives_a_probability_of_zero(trained: Trained, images: Tensor) -> None:
    model = load_trained(trained.path).model
    with torch.no_grad():
        model.classifier.weight *= 1e4
    logs = log_probabilities(model, images, 48, tta="hflip", amp="off")
    assert torch.isfinite(logs).all()


def test_subset_keeps_order_and_pictures_look_like_the_files(trained: Trained, images: Tensor) -> None:
    part = subset(data_of(trained, None), [7, 2])
    torch.testing.assert_close(load_views(trained, part), images[[7, 2]])
    assert part.splits["val"].labels.tolist() == [1, 0]
    white, black = torch.full((1, 3, 2, 2), 9.0), torch.full((1, 3, 2, 2), -9.0)
    assert as_pictures(white).tolist() == np.full((1, 2, 2, 3), 255).tolist()
    assert as_pictures(black).max() == 0
    gray = (torch.full((1, 3, 2, 2), 100 / 255) - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    assert set(as_pictures(gray).ravel()) == {100}


# --- scores ----------------------------------------------------------------------------------------------------


def predictions(probabilities: list[list[float]], labels: list[int]) -> Predictions:
    return Predictions(torch.tensor(probabilities).log(), torch.tensor(labels), torch.arange(len(labels)))


HAND = predictions(
    [[0.9, 0.08, 0.02], [0.4, 0.5, 0.1], [0.2, 0.7, 0.1], [0.3, 0.6, 0.1], [0.6, 0.3, 0.1]],
    [0, 0, 1, 1, 1],
)


def test_scores_by_hand() -> None:
    scores = score(HAND, ("a", "b", "absent"))
    assert scores.top1 == 60
    assert scores.top5 == 100
    assert scores.confusion.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    a, b, absent = scores.classes
    assert (a.precision, a.recall, a.f1) == pytest.approx((0.5, 0.5, 0.5))
    assert (b.precision, b.recall, b.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert scores.macro_f1 == pytest.approx((1 / 2 + 2 / 3) / 2)  # the absent class does not count
    # a's scores: 0.9 and 0.4 are a; 0.2, 0.3 and 0.6 are not: 5 of 6 pairs in order.
    assert a.auc == pytest.approx(5 / 6)
    assert a.average_precision == pytest.approx((1 + 2 / 3) / 2)
    assert math.isnan(absent.auc)
    assert math.isnan(absent.average_precision)
    assert scores.macro_auc == pytest.approx((a.auc + b.auc) / 2)
    assert scores.as_dict()["classes"][2]["auc"] is None
    assert most_confused(scores.confusion, ("a", "b", "absent")) == [("a", "b", 1, 1 / 2), ("b", "a", 1, 1 / 3)]


def test_calibration_bins_add_up_to_the_error() -> None:
    logits = torch.randn(400, 7) * 2
    found = Predictions(logits.log_softmax(1), torch.randint(7, (400,)), torch.arange(400))
    images, confidence, accuracy = reliability(found)
    assert images.sum() == 400
    error = ((confidence - accuracy).abs() * images / 400).nansum().item()
    assert error == pytest.approx(score(found, tuple("abcdefg")).ece, abs=1e-5)
    right = predictions([[0.99, 0.01]] * 3, [0, 0, 1])
    images, confidence, accuracy = reliability(right)
    assert images.tolist() == [0] * 14 + [3]
    assert accuracy[-1] == pytest.approx(2 / 3)


def test_curves_pass_through_their_thresholds() -> None:
    grid, rates = roc_curves(HAND, points=101)
    curve = dict(zip((100 * grid).round().int().tolist(), rates[0].tolist(), strict=True))
    # Thresholds on a: (fpr, tpr) = (0, 1/2) at 0.9, (1/3, 1/2) at 0.6, (1/3, 1) at 0.4.
    assert curve[0] == pytest.approx(0.5)
    assert curve[30] == pytest.approx(0.5)
    assert curve[34] == pytest.approx(1)
    area = torch.trapezoid(rates[1], grid).item()
    assert area == pytest.approx(score(HAND, CLASSES).classes[1].auc, abs=0.02)
    grid, precisions = precision_recall_curves(HAND, points=101)
    curve = dict(zip((100 * grid).round().int().tolist(), precisions[0].tolist(), strict=True))
    assert curve[0] == curve[50] == 1
    assert curve[51] == curve[100] == pytest.approx(2 / 3)
    assert (precisions.diff(dim=1) <= 1e-6).all()
