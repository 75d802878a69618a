"""RUN_OR_FILE: what each kind brings along, and one sentence for each that does not fit."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from data_pipeline import build_index
from fastnet.config_file import read_config
from fastnet.errors import UserError
from fastnet.loading.options import WeightsOptions
from fastnet.loading.trained import data_of, load_trained
from fastnet.loading.weights import save_weights
from fastnet.model import efficientnet
from fastnet.training.saved import pack_known
from tests.runs import CLASSES, make_pictures, make_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("data"), 2)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a", data)


def test_a_run_brings_its_view_its_classes_and_its_data(run: Path, data: Path) -> None:
    trained = load_trained(run)
    assert trained.path == run / "best.safetensors"
    assert (trained.resolution, trained.crop_fraction, trained.classes) == (48, 0.875, CLASSES)
    assert not trained.model.training
    assert data_of(trained, None).root == data
    alone = load_trained(run / "best.safetensors", WeightsOptions(resolution=96, crop_fraction=1.0))
    assert (alone.run, alone.resolution, alone.crop_fraction) == (run, 96, 1.0)


def test_a_run_is_judged_on_the_photos_that_it_was_not_trained_on(run: Path, data: Path, tmp_path: Path) -> None:
    photos, copy = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(data / "train", photos)  # class folders alone, of which a share was drawn
    shutil.copytree(run, copy)
    config = read_config(copy / "config.json")
    (copy / "config.json").write_text(replace(config, data=replace(config.data, data=str(photos))).to_json())
    began = build_index(photos, 0.5)
    save_file({"training/index": pack_known(began)}, copy / "last.safetensors")
    trained = replace(load_trained(run), run=copy, config=read_config(copy / "config.json"))
    for name in CLASSES:
        for photo in (data / "val" / name).iterdir():
            shutil.copy(photo, photos / name / f"{photo.stem} came later.jpg")
    assert data_of(trained, None).splits["val"].paths == began.splits["val"].paths
    (copy / "last.safetensors").unlink()
    assert data_of(trained, None).splits["val"].paths != began.splits["val"].paths


def test_a_file_of_torchvision_brings_the_published_view(tmp_path: Path) -> None:
    torch.save(torchvision.models.efficientnet_b1().state_dict(), tmp_path / "b1.pth")
    trained = load_trained(tmp_path / "b1.pth", WeightsOptions(variant="b1"))
    # B1's published weights are evaluated at 240 of 255 pixels.
    assert (trained.resolution, trained.crop_fraction, trained.run) == (240, 240 / 255, None)
    assert trained.classes is not None
    assert trained.class_name(0) == "tench"
    with pytest.raises(UserError, match="holds a b1: leave out --variant b3"):
        load_trained(tmp_path / "b1.pth", WeightsOptions(variant="b3"))


def test_a_file_without_names_numbers_its_classes(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", efficientnet("b0", num_classes=3))
    trained = load_trained(tmp_path / "w.safetensors")
    assert (trained.classes, trained.class_name(2), trained.resolution) == (None, "class 2", 200)


def test_one_sentence_each(run: Path, data: Path, tmp_path: Path) -> None:
    def refused(message: str, target: str | Path, **options: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_trained(target, WeightsOptions(**options))
        assert "\n" not in str(caught.value)

    refused("absent does not exist: name a run's folder or a weights file", tmp_path / "absent")
    refused("holds no best.safetensors or last.safetensors", tmp_path)
    refused("holds no last.safetensors", run, checkpoint="last")
    refused("imagenet needs --variant", "imagenet")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    refused("cannot be read as a file of plain tensors", tmp_path / "noise.pth")
    refused("--resolution 8 must lie between", run, resolution=8)
    refused("--crop-fraction 2 must lie between", run, crop_fraction=2)
    save_weights(tmp_path / "two.safetensors", efficientnet("b0", num_classes=2))
    two = load_trained(tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="belongs to no run: say with --data"):
        data_of(two, None)
    with pytest.raises(UserError, match=re.escape(f"knows 2 classes and {data} has 3")):
        data_of(two, str(data))
    other = tmp_path / "other"
    for split in ("train", "val"):
        for name in ("apple <pie>", "bread", "tea"):
            (other / split / name).mkdir(parents=True)
            (other / split / name / "0.jpg").write_bytes((data / "val" / "bread" / "0.jpg").read_bytes())
    with pytest.raises(UserError, match=r'knows the class "soup", which .* has not at that place'):
        data_of(load_trained(run), str(other))


def test_kernels_that_do_not_run_here_are_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.launch.INTERPRETED", False)
    with pytest.raises(UserError, match=r"--kernels triton is impossible because .*: leave it out"):
        load_trained(run, kernels="triton")
