"""The Python interface: create_model as timm's, load as README shows it, 16-bit models."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import fastnet
from fastnet.errors import UserError
from fastnet.loading.trained import load_trained
from fastnet.loading.weights import load_weights, save_weights, to_timm
from fastnet.model import efficientnet
from fastnet.predict import predict_files
from tests.networks import THREE_BLOCKS
from tests.runs import make_pictures, make_run


def test_names_and_features_are_timms() -> None:
    for name in ("b0", "B0", "efficientnet_b0", "EfficientNet-B0"):
        with torch.device("meta"):
            assert fastnet.create_model(name).config.variant == "b0"
    with pytest.raises(ValueError, match="unknown variant 'b8': choose one of b0, "):
        fastnet.create_model("b8")
    ours = fastnet.create_model("b0", num_classes=5, in_chans=1, bn_eps=1e-5).eval()
    theirs = timm.create_model("efficientnet_b0", num_classes=5, in_chans=1).eval()
    theirs.load_state_dict(to_timm(ours))
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        features = ours.forward_features(x)
        torch.testing.assert_close(features, theirs.forward_features(x), rtol=1e-4, atol=1e-5)
        pooled = ours.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, theirs.forward_head(features, pre_logits=True))
        assert torch.equal(ours.get_classifier()(pooled), ours(x))
    ours.reset_classifier(7)
    assert (ours.config.num_classes, ours.get_classifier().out_features, ours(x).shape) == (7, 7, (2, 7))


def test_weights_survive_a_new_classifier_and_other_channels(tmp_path: Path) -> None:
    source = efficientnet(THREE_BLOCKS, num_classes=5, padding="same", bn_eps=1e-5)
    save_weights(tmp_path / "w.safetensors", source)
    said: list[str] = []
    gray = fastnet.create_model(THREE_BLOCKS, tmp_path / "w.safetensors", num_classes=2, in_chans=1, log=said.append)
    assert said == [f"new classifier: {tmp_path / 'w.safetensors'} knows 5 classes, the data has 2"]
    assert (gray.config.padding, gray.config.bn_eps, gray.config.in_chans) == ("same", 1e-5, 1)
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        same = source.eval().forward_features(x.expand(2, 3, 16, 16))
        torch.testing.assert_close(gray.eval().forward_features(x), same)
        six = fastnet.create_model(THREE_BLOCKS, tmp_path / "w.safetensors", num_classes=5, in_chans=6).eval()
        torch.testing.assert_close(six(x.expand(2, 6, 16, 16)), source(x.expand(2, 3, 16, 16)), rtol=1e-4, atol=1e-5)
    save_weights(tmp_path / "gray.safetensors", gray)
    assert load_weights(tmp_path / "gray.safetensors").config.in_chans == 1
    with pytest.raises(UserError, match=f"holds a {THREE_BLOCKS}"):
        fastnet.create_model("b0", tmp_path / "w.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bit_runs_as_any(dtype: torch.dtype) -> None:
    model = fastnet.create_model(THREE_BLOCKS, num_classes=3, drop_connect_rate=0.5)
    x = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        exact = model.eval()(x)
        found = model.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)
    model.train()(x.to(dtype)).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


@pytest.mark.slow
def test_a_run_predicts_files_pictures_and_arrays_alike(tmp_path: Path) -> None:
    data = make_pictures(tmp_path / "data")
    run = make_run(tmp_path / "run", data)
    files = sorted(data.glob("val/*/*.jpg"))[:3]
    loaded = fastnet.load(run, device="cpu")
    assert loaded.classes == ("apple <pie>", "bread", "soup")
    expected = [found["top"] for found in predict_files(load_trained(run), files, top=2)]
    pictures = [Image.open(file) for file in files]
    assert loaded.predict(files, top=2) == expected
    for picture, file, one in zip(pictures, files, expected, strict=True):
        assert [entry["label"] for entry in loaded.predict(str(file), top=2)] == [entry["label"] for entry in one]
        for same in (picture, np.array(picture), torch.from_numpy(np.array(picture)).permute(2, 0, 1)):
            assert [entry["label"] for entry in loaded.predict(same, top=2)] == [entry["label"] for entry in one]
            assert loaded.predict(same)[0]["probability"] == pytest.approx(one[0]["probability"], abs=1e-4)
    assert loaded.transform(files[0]).shape == (3, 48, 48)
    (tmp_path / "no.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no\.jpg cannot be read"):
        loaded.predict(tmp_path / "no.jpg")
    with pytest.raises(ValueError, match=r"an array \[H, W, 3\] or a tensor"):
        loaded.predict(torch.zeros(3, 8, 8))


@pytest.mark.slow
def test_the_lines_of_the_readme_run(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)
    data = make_pictures(tmp_path / "data", 1)
    run = make_run(tmp_path / "run", data)
    for shown, here in (
        ("runs/b1-232-…", run),
        ("photo.jpg", next(data.glob("val/*/*.jpg"))),
        ("imagenet", run / "best.safetensors"),
    ):
        assert shown in code
        code = code.replace(f'"{shown}"', repr(str(here)))
    names = {"images": torch.randn(1, 3, 64, 64)}
    exec(code, names)
    assert names["model"].get_classifier().out_features == 10  # type: ignore[attr-defined]
    assert names["features"].shape == (1, 1280, 2, 2)
    assert names["logits"].shape == (1, 3)


def test_another_package_named_kernels_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; "
    tail = rf"another package named kernels \({tmp_path}/kernels\) stands before fastnet's own {root}/kernels: "
    command = [sys.executable, "-c", code + "sys.argv = ['summary']; from fastnet.summary import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: {tail}.*\n", done.stderr)
    command = [sys.executable, "-c", code + "import fastnet; fastnet.create_model"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert re.search(rf"\nImportError: {tail}.*\n$", done.stderr)
