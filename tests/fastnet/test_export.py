"""Exports: what other libraries compute from the files, that a wrong one is caught, and one sentence each."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from pathlib import Path

import onnxruntime  # type: ignore[import-untyped]
import pytest
import timm
import torch
import torchvision

import fastnet.export
from fastnet.errors import UserError
from fastnet.export import Target, export, export_model, generated_images, how_to_load
from fastnet.loading.trained import Trained, load_trained
from fastnet.model import EfficientNet, ModelConfig, efficientnet
from tests.runs import make_pictures, make_run, settle


def trained_of(model: EfficientNet, resolution: int = 64) -> Trained:
    return Trained(Path("w.safetensors"), None, None, settle(model), resolution, 0.875, None)


@pytest.fixture(scope="module")
def tiny() -> Trained:
    """One narrow block a stage."""
    return trained_of(EfficientNet(ModelConfig(width=0.25, depth=0.25, num_classes=3, kernels="torch")))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    return make_run(root / "run", make_pictures(root / "data"))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_programs_compute_the_same_for_any_batch(tiny: Trained, tmp_path: Path, to: Target) -> None:
    path = tmp_path / f"model.{to}"
    difference = export_model(tiny, to, path, generated_images(64))
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        expected = tiny.model(images)
    if to == "onnx":
        session = onnxruntime.InferenceSession(path)
        assert session.get_inputs()[0].shape == ["batch", 3, 64, 64]
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    else:
        found = torch.export.load(path).module()(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert 0 <= difference < 1e-4
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # one file, nothing left beside it


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_the_command_writes_verifies_and_says_how_to_load(
    run: Path, to: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(str(run), to) == 0
    said = capsys.readouterr().out.splitlines()
    path = run / f"efficientnet_b0-48-{to}{'.pth' if to == 'torchvision' else '.safetensors'}"
    assert said[0].startswith(f"wrote {path} (")
    assert said[1].startswith(f"verified with {to} on 8 validation images of")
    assert float(said[1].rsplit(" ", 1)[1]) < 1e-4
    trained = load_trained(run)
    code = how_to_load(trained.model.config, to, path)
    assert said[2] == f"load it with: {code}"
    # The line as printed; load_state_dict gives no model back.
    build, _, load = code.partition(".load_state_dict(")
    model = eval(build, {"torchvision": torchvision, "timm": timm, "torch": torch, "functools": functools})
    if load:
        model.load_state_dict(eval(load.removesuffix(")"), {"torch": torch}))
    images = generated_images(48)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), trained.model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_timms_same_padding_is_its_other_family(tmp_path: Path) -> None:
    trained = trained_of(efficientnet("b0", num_classes=3, padding="same", bn_eps=1e-3, kernels="torch"))
    export_model(trained, "timm", tmp_path / "w.safetensors", generated_images(64))
    assert load_trained(tmp_path / "w.safetensors").model.config.padding == "same"  # the header names the family
    with pytest.raises(UserError, match='torchvision has no "same" padding'):
        export_model(trained, "torchvision", tmp_path / "w.pth", generated_images(64))


def test_an_export_that_computes_something_else_is_not_written(
    tiny: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def broken(model: EfficientNet, path: Path, images: torch.Tensor) -> EfficientNet:
        path.write_bytes(b"another model")
        other = EfficientNet(model.config).eval()
        other.load_state_dict(model.state_dict() | {"stem.bn.bias": model.stem.bn.bias + 0.1})
        return other

    monkeypatch.setattr(fastnet.export, "_pt2", broken)
    (tmp_path / "w.pt2").write_bytes(b"the export of yesterday")
    with pytest.raises(UserError, match=r"the exported model differs by .* nothing was written"):
        export_model(tiny, "pt2", tmp_path / "w.pt2", generated_images(64))
    assert (tmp_path / "w.pt2").read_bytes() == b"the export of yesterday"
    assert len(list(tmp_path.iterdir())) == 1


def test_one_sentence_each(tiny: Trained, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--out .*w\.pth must end in \.onnx for --to onnx"):
        export(str(run), "onnx", out=str(tmp_path / "w.pth"))
    compound = replace(tiny, model=efficientnet("b1", scaling="compound", num_classes=2).eval())
    with pytest.raises(UserError, match="timm has no model with compound scaling"):
        export_model(compound, "timm", tmp_path / "w.safetensors", generated_images(64))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        export_model(tiny, "pt2", tmp_path / "file" / "w.pt2", generated_images(64))
    with pytest.raises(UserError, match="does not exist"):
        export(str(tmp_path / "absent"), "pt2")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    with pytest.raises(
        UserError, match=r"with onnx, onnxruntime, onnxscript: pip install 'fastnet-efficientnet\[onnx\]'"
    ):
        export_model(tiny, "onnx", tmp_path / "w.onnx", generated_images(64))


def test_generated_images_are_pictures() -> None:
    images = generated_images(64)
    assert images.shape == (8, 3, 64, 64)
    assert images.std(0).mean() > 0.3
    assert -2.2 < images.min() < images.max() < 2.7
