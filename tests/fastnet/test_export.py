"""Exports: what other libraries compute from the files, what is in them, and that a stranger can use them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from fastnet.analysis.predictions import index_files, load_views
from fastnet.errors import UserError
from fastnet.export import becoming, export, export_model, generated_photos
from fastnet.exports import formats
from fastnet.exports.advice import three_lines
from fastnet.exports.facts import facts_of
from fastnet.exports.formats import Target
from fastnet.exports.pixels import Preprocessed
from fastnet.exports.program import program_of
from fastnet.loaded import LoadedModel
from fastnet.loading.trained import Trained, load_trained
from fastnet.model import EfficientNet, ModelConfig, efficientnet
from tests.runs import make_pictures, make_run, settle

NAMES = tuple(f'class {number} "ü"' for number in range(16))
OPENVINO = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed: pip install '.[openvino]'"
)
PROGRAMS: list[Any] = [
    pytest.param("onnx", True, id="onnx-photos"),
    pytest.param("pt2", False, id="pt2-images"),
    pytest.param("openvino", True, id="openvino-photos", marks=OPENVINO),
    *(
        pytest.param(
            to,
            given,
            id=f"{to}-{'photos' if given else 'images'}",
            marks=[pytest.mark.full, *([OPENVINO] if to == "openvino" else [])],
        )
        for to, given in (("onnx", False), ("pt2", True), ("openvino", False))
    ),
]


def trained_of(model: EfficientNet, resolution: int = 64, **options: Any) -> Trained:
    return Trained(Path("w.safetensors"), None, None, settle(model), resolution, 0.875, NAMES, **options)


@pytest.fixture(scope="module")
def tiny() -> Trained:
    """One narrow block a stage; not ImageNet's normalisation."""
    torch.manual_seed(0)
    config = ModelConfig(width=0.25, depth=0.25, num_classes=len(NAMES), kernels="torch")
    view: dict[str, Any] = dict(interpolation="bicubic", normalization=((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    return trained_of(EfficientNet(config), **view)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    return make_run(root / "run", make_pictures(root / "data"))


@pytest.fixture(scope="module")
def photo(tiny: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Turned by its EXIF tag, and the surest of some, so that half a pixel cannot change its class."""
    found = []
    for number, pixels in enumerate(generated_photos(64)):
        file = tmp_path_factory.mktemp("photo") / "photo.jpg"
        tags = Image.Exif()
        tags[0x0112] = (6, 8, 3)[number % 3]
        Image.fromarray(pixels.numpy()).save(file, quality=95, exif=tags)
        first, second = LoadedModel(tiny).predict(file, top=2)
        found.append((first["probability"] - second["probability"], file))
    return max(found)[1]


def inputs_of(trained: Trained, preprocessing: bool) -> list[torch.Tensor]:
    photos = generated_photos(trained.resolution)
    if preprocessing:
        return photos[:3]
    see = LoadedModel(trained).transform
    return [torch.stack([see(photo.permute(2, 0, 1)) for photo in photos[:2]])]


STRANGER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fastnet", "kernels", "data_pipeline"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
"""


def printed(code: str, folder: Path) -> str:
    """What `code` prints in `folder` where this project cannot be imported."""
    assert len(code.splitlines()) == 3
    command = [sys.executable, "-I", "-c", STRANGER + code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(("to", "preprocessing"), PROGRAMS)
def test_a_program_and_its_three_lines(
    tiny: Trained, photo: Path, tmp_path: Path, to: Target, preprocessing: bool
) -> None:
    path = tmp_path / f"model{formats.ENDINGS[to]}"
    difference = export_model(tiny, to, path, inputs_of(tiny, preprocessing), preprocessing=preprocessing)
    assert 0 <= difference < 1e-4
    assert sorted(file.suffix for file in tmp_path.iterdir()) == ([".bin", ".xml"] if to == "openvino" else [f".{to}"])
    compute, kept = formats.read_program(path)
    x = torch.randint(256, (45, 99, 3), dtype=torch.uint8) if preprocessing else torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        expected = program_of(tiny.model, tiny.view, preprocessing)(x)
    torch.testing.assert_close(compute(x), expected, rtol=1e-4, atol=1e-4)
    facts = facts_of(tiny, preprocessing=preprocessing)
    assert kept == facts
    assert facts["class_names"] == list(NAMES)
    assert (facts["mean"], facts["interpolation"], facts["crop_fraction"]) == ([0.5, 0.4, 0.3], "bicubic", 0.875)
    (tmp_path / "photo.jpg").write_bytes(photo.read_bytes())
    lines = three_lines(to, Path(path.name), facts, tiny.model.config, preprocessing=preprocessing)
    assert printed(lines, tmp_path) == LoadedModel(tiny).predict(photo)[0]["class"]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_the_command_writes_verifies_and_says_how_to_use_it(
    run: Path, to: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(str(run), to) == 0
    said = capsys.readouterr().out
    path = run / f"efficientnet_b0-48-{to}{'.pth' if to == 'torchvision' else ''}"
    lines = said.splitlines()
    assert lines[0].startswith(f"wrote {path} (")
    assert lines[1].startswith(f"verified with {to} on 8 validation images of")
    assert float(lines[1].rsplit(" ", 1)[1]) < 1e-4
    photo = sorted((run.parent / "data" / "val").rglob("*.jpg"))[0]
    Image.open(photo).save(tmp_path / "photo.jpg", quality=95)
    trained = LoadedModel(load_trained(run))
    assert printed("\n".join(lines[-3:]), tmp_path) == trained.predict(tmp_path / "photo.jpg")[0]["class"]
    again = load_trained(path)  # as others' files are read
    assert again.classes == trained.classes
    # timm resizes to whole pixels, before it crops.
    assert again.crop_fraction == pytest.approx(0.875, abs=0.02 if to == "timm" else 1e-6)
    assert replace(again.view, crop_fraction=0.875) == trained.trained.view
    if to == "timm":
        described = json.loads((path / "config.json").read_text())
        assert described["fastnet"]["run_id"] == "run"
        assert timm.create_model(f"local-dir:{path}", pretrained=True).pretrained_cfg["label_names"] == list(
            trained.classes
        )
        assert export(str(run), to) == 0  # over its own folder
        (path / "mine.txt").touch()
        with pytest.raises(UserError, match=r"holds mine\.txt, which is not of an export"):
            export(str(run), to)


@pytest.mark.slow
def test_timms_same_padding_is_its_other_family(tmp_path: Path) -> None:
    trained = trained_of(efficientnet("b0", num_classes=16, padding="same", bn_eps=1e-3, kernels="torch"))
    export_model(trained, "timm", tmp_path / "w", inputs_of(trained, False))
    assert load_trained(tmp_path / "w").model.config.padding == "same"
    with pytest.raises(UserError, match='torchvision has no "same" padding'):
        export_model(trained, "torchvision", tmp_path / "w.pth", inputs_of(trained, False))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_pixels_of_a_photo_are_those_that_predict_sees(
    tiny: Trained, photos: Path, tmp_path: Path, interpolation: Any
) -> None:
    files = sorted((photos / "images").rglob("*.jpg"))[::160]
    # Smaller than the view, and odd.
    Image.open(files[0]).resize((37, 51)).save(tmp_path / "small.png")
    files.append(tmp_path / "small.png")
    trained = replace(tiny, interpolation=interpolation)
    program = Preprocessed(trained.model, trained.view)
    with torch.no_grad():
        for file, expected in zip(files, load_views(trained, index_files(files)[0]), strict=True):
            pixels = torch.frombuffer(bytearray(Image.open(file).convert("RGB").tobytes()), dtype=torch.uint8)
            found = program.images(pixels.view(Image.open(file).height, Image.open(file).width, 3))[0]
            off = (found - expected) * torch.tensor(trained.normalization[1])[:, None, None] * 255
            assert (off.abs() < 1.01).double().mean() >= 0.999
            assert off.mean().abs() < 0.05


def test_an_export_that_computes_something_else_is_not_written(
    tiny: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: EfficientNet, path: Path, example: torch.Tensor, facts: Any) -> EfficientNet:
        path.write_bytes(b"another model")
        other = EfficientNet(model.config).eval()
        other.load_state_dict(model.state_dict() | {"stem.bn.bias": model.stem.bn.bias + 0.1})
        return other

    monkeypatch.setitem(formats.WRITERS, "pt2", broken)
    (tmp_path / "w.pt2").write_bytes(b"the export of yesterday")
    with pytest.raises(UserError, match=r"the exported model differs by .* nothing was written"):
        export_model(tiny, "pt2", tmp_path / "w.pt2", inputs_of(tiny, False))
    assert (tmp_path / "w.pt2").read_bytes() == b"the export of yesterday"
    assert len(list(tmp_path.iterdir())) == 1


def test_one_sentence_each(tiny: Trained, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--out .*w\.pth must end in \.onnx for --to onnx"):
        export(str(run), "onnx", out=str(tmp_path / "w.pth"))
    with pytest.raises(UserError, match="timm's file holds weights alone: use --with-preprocessing with --to onnx"):
        export(str(run), "timm", with_preprocessing=True, out=str(tmp_path / "w"))
    compound = replace(tiny, model=efficientnet("b1", scaling="compound", num_classes=2).eval())
    with pytest.raises(UserError, match="timm has no model with compound scaling"):
        export_model(compound, "timm", tmp_path / "w", inputs_of(tiny, False))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), becoming(tmp_path / "file" / "w.pt2"):
        pass
    with pytest.raises(UserError, match="does not exist"):
        export(str(tmp_path / "absent"), "pt2")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    with pytest.raises(
        UserError, match=r"with onnx, onnxruntime, onnxscript: pip install 'fastnet-efficientnet\[onnx\]'"
    ):
        export_model(tiny, "onnx", tmp_path / "w.onnx", inputs_of(tiny, False))


def test_generated_photos_are_pictures_of_many_sizes() -> None:
    photos = generated_photos(64)
    assert len({photo.shape for photo in photos}) == 8
    assert all(photo.dtype == torch.uint8 and photo.float().std() > 20 for photo in photos)
