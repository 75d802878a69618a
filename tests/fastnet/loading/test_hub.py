"""Weights by name on the Hugging Face hub, which is a folder here; and files that are not as they should be."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastnet.create import create_model
from fastnet.errors import UserError
from fastnet.loading.hub import hub_name
from fastnet.loading.trained import load_trained
from fastnet.loading.weights import Style, load_weights, save_weights, to_timm, to_torchvision
from fastnet.model import EfficientNet, efficientnet

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def model() -> EfficientNet:
    torch.manual_seed(0)
    return efficientnet("b0", num_classes=3)


@pytest.fixture
def hub(model: EfficientNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache as huggingface_hub lays it out: files under their hashes, and links to them."""
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({name: value.contiguous() for name, value in to_timm(model).items()}, blobs / "weights")
    named = blobs / hashlib.sha256((blobs / "weights").read_bytes()).hexdigest()
    (blobs / "weights").rename(named)
    (snapshot / "model.safetensors").symlink_to(named)
    cfg = {
        "tag": "ra4_e3600_r224_in1k",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 0.9,
        "input_size": [3, 224, 224],
    }
    config = {"architecture": "efficientnet_b0", "label_names": ["a", "b", "c"], "pretrained_cfg": cfg}
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(snapshot / file))
    return snapshot


NAME = "timm/efficientnet_b0.ra4_e3600_r224_in1k"


def test_a_model_by_its_name_on_the_hub(hub: Path, model: EfficientNet) -> None:
    made = create_model("b0", NAME, num_classes=3)
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in model.state_dict().items())
    trained = load_trained(NAME)
    assert (trained.view.mean, trained.resolution, trained.classes) == ((0.5,) * 3, 224, ("a", "b", "c"))
    assert trained.run is None
    assert load_trained(hub).path == hub / "model.safetensors"  # its folder


def test_what_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_name(NAME) == NAME
    assert hub_name("hf-hub:me/my-net") == "me/my-net"
    assert [hub_name(text) for text in ("imagenet", "runs/b0", "timm/a/b", "/timm/x")] == [None] * 4
    monkeypatch.chdir(tmp_path)
    os.makedirs("timm/here")
    assert hub_name("timm/here") is None


def test_a_damaged_file_and_no_network_are_a_sentence(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = (hub / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"is damaged .* delete it and run again"):
        load_trained(NAME)

    def offline(name: str, file: str) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the server\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"cannot be fetched .*cannot reach the server.*name a folder") as caught:
        load_trained(NAME)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'fastnet-efficientnet\[hf\]'"):
        load_trained(NAME)


def faulty(state: dict[str, Tensor], fault: str) -> dict[str, Tensor]:
    name = next(
        key for key in state if key.endswith("conv_pw.weight") or ".block.0.0.weight" in key or "project" in key
    )
    state = {key: value.clone() for key, value in state.items()}
    if fault == "missing":
        del state[name]
    elif fault == "extra":
        state["more.weight"] = torch.zeros(1)
    elif fault == "shape":
        state[name] = state[name][:-1].contiguous()
    elif fault == "type":
        state[name] = state[name].to(torch.int8)
    else:
        state[name].view(-1)[0] = float("nan")
    return state


@pytest.mark.parametrize("style", ["fastnet", "timm", "torchvision"])
@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "type", "nan"])
def test_weights_that_do_not_fit_are_a_sentence(style: Style, fault: str, model: EfficientNet, tmp_path: Path) -> None:
    path, header = tmp_path / "efficientnet_b0.safetensors", None
    states: dict[str, Any] = {"fastnet": lambda m: m.state_dict(), "timm": to_timm, "torchvision": to_torchvision}
    state = {name: value.contiguous() for name, value in states[style](model).items()}
    if style == "fastnet":
        from safetensors import safe_open

        save_weights(path, model)
        with safe_open(path, "pt") as file:
            header = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(faulty(state, fault), path, metadata=header)
    with pytest.raises((ValueError, UserError)) as caught:
        load_weights(path)
    words = str(caught.value)
    assert str(path) in words
    assert "\n" not in words
    assert words.endswith(".")
