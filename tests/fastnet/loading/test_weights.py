"""Weights of torchvision and timm: same numbers in, same numbers out, by the tolerance rule; files and their errors.

The rule: ours, in fp32, may be at most twice as far from the fp64 result as the other library's own fp32 is, plus one
rounding. In fp64 the two agree but for the order of summation.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from fastnet.arch import VARIANTS
from fastnet.errors import UserError
from fastnet.loading.checkpoint import save_checkpoint
from fastnet.loading.weights import (
    LoadedWeights,
    Style,
    from_timm,
    from_torchvision,
    load_weights,
    save_weights,
    to_timm,
    to_torchvision,
)
from fastnet.model import EfficientNet, ModelConfig, efficientnet
from fastnet.scaling import SCALED

STYLES: tuple[Style, ...] = ("torchvision", "timm", "timm_tf")
FULL = [pytest.mark.slow, pytest.mark.full]
MARKS: dict[str, Any] = {"b0": (), "lite0": (), "lite2": FULL, "lite3": FULL, "lite4": FULL}
MODELS = [
    pytest.param(style, variant, marks=MARKS.get(variant, pytest.mark.slow))
    for variant in VARIANTS
    for style in STYLES
    if variant in SCALED or style == "timm_tf" or (style, variant) == ("timm", "lite0")
]


def peer(style: Style, variant: str, num_classes: int = 13) -> nn.Module:
    """The other library's model without dropout and drop-connect."""
    if style == "torchvision":
        build = getattr(torchvision.models, f"efficientnet_{variant}")
        return build(num_classes=num_classes, dropout=0.0, stochastic_depth_prob=0.0)
    name = f"{'tf_' if style == 'timm_tf' else ''}efficientnet_{variant}"
    return timm.create_model(name, num_classes=num_classes, drop_rate=0.0, drop_path_rate=0.0)


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter and statistic away from its initial value; the statistics fit, so that signals reach the end."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = norms[0].momentum
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            module.momentum = 1.0
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.5, 0.5)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 70, 64))
        for norm in norms:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            # Some channels vary little over so few images, and would be blown up on any other.
            norm.running_var.clamp_(min=norm.running_var.mean().item() / 2)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.momentum = momentum
    return model


def convert(style: Style, model: nn.Module) -> LoadedWeights:
    state = model.state_dict()
    return from_torchvision(state) if style == "torchvision" else from_timm(state, style)


def ours_of(loaded: LoadedWeights) -> EfficientNet:
    config = ModelConfig(**loaded.config.__dict__ | {"dropout": 0.0, "drop_connect_rate": 0.0})
    model = EfficientNet(config)
    model.load_state_dict(loaded.state_dict)
    return model


def exported(style: Style, model: EfficientNet) -> dict[str, Tensor]:
    return to_torchvision(model) if style == "torchvision" else to_timm(model)


def assert_as_exact(ours: Tensor, theirs: Tensor, exact: Tensor, what: str) -> None:
    """The tolerance rule, on the norm of the error."""
    rounding = torch.finfo(ours.dtype).eps * exact.norm()
    error, allowed = (ours.double() - exact).norm(), 2 * (theirs.double() - exact).norm() + rounding
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize(("style", "variant"), MODELS)
def test_eval_logits(style: Style, variant: str) -> None:
    theirs = randomised(peer(style, variant)).eval()
    ours = ours_of(convert(style, theirs)).eval()
    x = torch.randn(2, 3, 70, 64)  # odd maps on the way: 35, 18, 9, 5, 3
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(x.double())
        assert_as_exact(ours(x), theirs(x), exact, "logits")
        assert exact.std() > 1e-2  # the input and all weights still matter at the end
        assert (exact[0] - exact[1]).norm() > 1e-3 * exact.norm()
        torch.testing.assert_close(ours.double()(x.double()), exact, rtol=1e-10, atol=1e-12)


def training_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One training-mode step: gradients under their parameters' names, buffers after it, and the "logits"."""
    out = model.train()(x)
    out.float().square().mean().backward() if out.dtype == torch.bfloat16 else out.square().mean().backward()
    tensors = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(tensors) == len(list(model.parameters()))
    return tensors | dict(model.named_buffers()) | {"logits": out.detach()}


def their_names(style: Style, model: EfficientNet, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A training step's tensors as the other library calls and shapes them."""
    holder = copy.deepcopy(model)
    holder.load_state_dict({name: tensors[name] for name in model.state_dict()})
    return exported(style, holder) | {"logits": tensors["logits"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "variant"), [*((style, v) for v in ("b0", "b1", "b2") for style in STYLES), ("timm_tf", "lite0")]
)
def test_training_step_in_fp64(style: Style, variant: str) -> None:
    theirs = randomised(peer(style, variant)).double()
    ours = ours_of(convert(style, theirs)).double()
    initial = exported(style, copy.deepcopy(ours))
    x = torch.randn(3, 3, 70, 64, dtype=torch.float64)
    result, expected = their_names(style, ours, training_step(ours, x)), training_step(theirs, x)
    assert result.keys() == expected.keys()
    # A bias that the next batch norm takes out again has gradient zero but for rounding.
    largest = max(expected[name].abs().max().item() for name, _ in theirs.named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(
            result[name],
            value,
            rtol=1e-9,
            atol=1e-9 * value.abs().max().item() + 1e-12 * largest,
            msg=lambda message, name=name: f"{name}: {message}",  # type: ignore[misc]
        )
        # It moved: running statistics are new ones, gradients are not the weights.
        assert name == "logits" or not torch.equal(value, initial[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("amp", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fp32", "bf16"])
def test_training_step_is_as_exact_as_theirs(style: Style, amp: bool) -> None:
    theirs = randomised(peer(style, "b0"))
    ours = ours_of(convert(style, theirs))
    x = torch.randn(4, 3, 64, 64)
    exact = training_step(copy.deepcopy(theirs).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        result, expected = their_names(style, ours, training_step(ours, x)), training_step(theirs, x)
    largest = max(exact[name].norm() for name, _ in theirs.named_parameters())
    # A bias that the next batch norm takes out again has gradient zero, and its rounding no scale.
    parameters = [name for name, _ in theirs.named_parameters() if exact[name].norm() > 1e-9 * largest]
    statistics = [name for name in exact if name.endswith(("running_mean", "running_var"))]
    for kind, names in (("logits", ["logits"]), ("gradients", parameters), ("statistics", statistics)):
        # Relative to each tensor's size and then as one vector: with so many small tensors, which one of the two orders
        # of summation is luckier in a single tensor says nothing.
        ours_all, theirs_all, exact_all = (
            torch.cat([(step[name].double() / exact[name].norm()).flatten() for name in names])
            for step in (result, expected, exact)
        )
        assert_as_exact(ours_all, theirs_all, exact_all, kind)


@pytest.mark.parametrize(("style", "variant"), [*((style, "b1") for style in STYLES), ("timm_tf", "lite1")])
def test_names_map_both_ways_and_the_export_loads(style: Style, variant: str) -> None:
    theirs = randomised(peer(style, variant))
    state = theirs.state_dict()
    back = exported(style, ours_of(convert(style, theirs)))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    peer(style, variant).load_state_dict(back)


@pytest.mark.parametrize(("style", "variant"), MODELS)
def test_recognised_with_the_source_librarys_own_semantics(style: Style, variant: str) -> None:
    with torch.device("meta"):
        theirs = peer(style, variant, 1000)
    loaded = convert(style, theirs)
    norms = {(m.eps, m.momentum) for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {(loaded.config.bn_eps, loaded.config.bn_momentum)}
    assert (loaded.config.variant, loaded.config.scaling) == (variant, "published")
    assert loaded.config.padding == ("same" if style == "timm_tf" else "symmetric")
    assert loaded.config.num_classes == 1000


@pytest.fixture(scope="module")
def timm_state() -> dict[str, Tensor]:
    return timm.create_model("efficientnet_b0", num_classes=3).state_dict()


@pytest.fixture(scope="module")
def torchvision_state() -> dict[str, Tensor]:
    return torchvision.models.efficientnet_b0(num_classes=3).state_dict()


def test_own_file_round_trip(tmp_path: Path) -> None:
    model = efficientnet("b1", num_classes=4, padding="same", bn_eps=1e-5, bn_momentum=0.1, kernels="torch")
    save_weights(tmp_path / "best.safetensors", model)
    loaded = load_weights(tmp_path / "best.safetensors")
    assert loaded.style == "fastnet"
    assert loaded.config == ModelConfig(**model.config.__dict__ | {"kernels": "auto"})  # how to run is not kept
    assert json.loads((tmp_path / "best.json").read_text())["model"]["padding"] == "same"
    EfficientNet(loaded.config).load_state_dict(loaded.state_dict)
    assert all(torch.equal(loaded.state_dict[name], value) for name, value in model.state_dict().items())


def test_a_whole_checkpoint_is_a_weights_file(tmp_path: Path) -> None:
    model = efficientnet("b0", num_classes=3)
    metadata = {"model": model.config.__dict__, "progress": {}}
    save_checkpoint(tmp_path / "last.safetensors", model.state_dict(), {"momentum": torch.ones(2)}, metadata)
    loaded = load_weights(tmp_path / "last.safetensors")
    assert loaded.config == model.config
    assert loaded.state_dict.keys() == model.state_dict().keys()


def test_torchvision_file(tmp_path: Path, torchvision_state: dict[str, Tensor]) -> None:
    torch.save(torchvision_state, tmp_path / "w.pth")
    loaded = load_weights(tmp_path / "w.pth")
    assert (loaded.style, loaded.config.variant, loaded.config.num_classes) == ("torchvision", "b0", 3)


@pytest.mark.parametrize(
    ("file", "header", "style"),
    [
        ("tf_efficientnet_b0_ap-f262efe1.safetensors", {}, "timm_tf"),
        ("efficientnet_b0_ra-3dd342df.safetensors", {}, "timm"),
        ("models--timm--tf_efficientnet_b0.ns_jft_in1k/snapshots/1/model.safetensors", {}, "timm_tf"),
        ("models--timm--efficientnet_b0.ra_in1k/snapshots/1/model.safetensors", {}, "timm"),
        ("tf_efficientnet_b0/efficientnet_b0.safetensors", {}, "timm"),
        ("model.safetensors", {"architecture": "tf_efficientnet_b0"}, "timm_tf"),
    ],
)
def test_timm_file_whose_name_or_header_tells(
    tmp_path: Path, timm_state: dict[str, Tensor], file: str, header: dict[str, str], style: Style
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(timm_state, path, header)
    assert load_weights(path).style == style
    other: Style = "timm" if style == "timm_tf" else "timm_tf"
    assert load_weights(path, style=other).config.padding == ("same" if other == "timm_tf" else "symmetric")


def test_timm_file_that_does_not_tell(tmp_path: Path, timm_state: dict[str, Tensor]) -> None:
    torch.save({"state_dict": timm_state}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth: .* say --weights-style timm or --weights-style timm_tf\.$"):
        load_weights(tmp_path / "model.pth")
    assert load_weights(tmp_path / "model.pth", style="timm_tf").config.padding == "same"


def test_files_without_batch_counters_load(timm_state: dict[str, Tensor]) -> None:
    state = {name: v for name, v in timm_state.items() if not name.endswith("num_batches_tracked")}
    assert from_timm(state, "timm").state_dict["stem.bn.num_batches_tracked"] == 0


def edited(**changes: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def edit(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = state | {name.replace("__", "."): v for name, v in changes.items() if v is not None}
        return {name: v for name, v in state.items() if changes.get(name.replace(".", "__"), v) is not None}

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited(bn1__bias=None), "stem.bn.bias of b0 is missing: the file is incomplete"),
        (edited(classifier__weight=None), "holds no classifier.weight"),
        (edited(bn1__bias=torch.zeros(3)), r"stem.bn.bias has shape \[3\] and b0 needs \[32\]"),
        (edited(extra__weight=torch.zeros(3)), "extra.weight belongs to no timm EfficientNet"),
        (edited(conv_stem__bias=torch.zeros(3)), "holds stem.conv.bias, which b0 has not"),
        (edited(blocks__6__0__conv_pwl__weight=None), "its 16 blocks are no EfficientNet B0–B7"),
    ],
)
def test_foreign_state_that_does_not_fit(
    timm_state: dict[str, Tensor], edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        from_timm(edit(timm_state), "timm")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def refused(name: str, message: str, style: Style | None = None) -> None:
        with pytest.raises(ValueError, match=message) as error:
            load_weights(tmp_path / name, style=style)
        assert name in str(error.value)
        assert "\n" not in str(error.value)

    refused("absent.pth", "there is no weights file")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    refused("noise.safetensors", "cannot be read as safetensors")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    refused("noise.pth", "cannot be read as a file of plain tensors")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    refused("module.pth", "cannot be read as a file of plain tensors")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    refused("other.pth", "holds no state dict")
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    refused("resnet.safetensors", r"its keys \(fc.weight, …\) are not those of")
    model = efficientnet("b0", num_classes=2)
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    refused("bare.safetensors", "no model configuration: save it with")
    save_weights(tmp_path / "own.safetensors", model)
    refused("own.safetensors", "are those of fastnet, not of timm: change or drop --weights-style", "timm")


def test_save_weights_refuses(tmp_path: Path) -> None:
    model = efficientnet("b0", num_classes=2)
    with pytest.raises(ValueError, match=r"not as w\.pth: change the file's suffix"):
        save_weights(tmp_path / "w.pth", model)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        save_weights(tmp_path / "file" / "w.safetensors", model)


def test_from_timm_wants_to_know_which(timm_state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="must be 'timm' or 'timm_tf'"):
        from_timm(timm_state, "torchvision")


def test_a_file_may_carry_class_names_and_resolution(tmp_path: Path) -> None:
    model = efficientnet("b0", num_classes=2)
    save_weights(tmp_path / "w.safetensors", model)
    bare = load_weights(tmp_path / "w.safetensors")
    assert (bare.classes, bare.resolution) == (None, None)
    save_weights(tmp_path / "w.safetensors", model, classes=["pie", "soup"], resolution=64)
    loaded = load_weights(tmp_path / "w.safetensors")
    assert (loaded.classes, loaded.resolution) == (("pie", "soup"), 64)
