"""The model against its definition: sizes, stochastic depth, padding, initialisation, regional compilation."""

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnet.arch import VARIANTS, BlockShape
from fastnet.features import FeatureExtractor
from fastnet.layers import BatchNorm, Conv2d, MBConv, same_padding
from fastnet.model import EfficientNet, ModelConfig, efficientnet
from fastnet.scaling import CompoundScaler, architecture

PARAMETERS = {  # variant: (at 1000 classes, at 101 classes, blocks)
    "b0": (5_288_548, 4_136_929, 16),
    "b1": (7_794_184, 6_642_565, 23),
    "b2": (9_109_994, 7_843_303, 23),
    "b3": (12_233_232, 10_851_469, 26),
    "b4": (19_341_616, 17_729_709, 32),
    "b5": (30_389_784, 28_547_733, 39),
    "b6": (43_040_704, 40_968_509, 45),
    "b7": (66_347_960, 64_045_621, 55),
}


def tiny(**changes: Any) -> EfficientNet:
    """B0's blocks at half the width: 8 to 640 channels, every kind of block, ragged squeeze sizes."""
    return EfficientNet(ModelConfig(width=0.5, depth=1.0, num_classes=7, **changes))


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameter_counts(variant: str) -> None:
    arch = architecture(variant)
    thousand, food, blocks = PARAMETERS[variant]
    assert arch.network.parameters(1000) == thousand
    assert arch.network.parameters(101) == food
    assert len(arch.network.blocks) == blocks
    with torch.device("meta"):
        assert sum(p.numel() for p in efficientnet(variant, num_classes=101).parameters()) == food


def test_b0_is_the_papers_table() -> None:
    model = efficientnet("b0", num_classes=1000)
    shapes = [block.shape for block in model.network.blocks]
    assert shapes[0] == BlockShape(32, 16, 3, 1, 1)
    assert shapes[1] == BlockShape(16, 24, 3, 2, 6)
    assert shapes[-1] == BlockShape(192, 320, 3, 1, 6)
    squeezed = [block.se.reduce.out_features for block in model.blocks if isinstance(block, MBConv) and block.se]
    assert squeezed == [8, 4, 6, 6, 10, 10, 20, 20, 20, 28, 28, 28, 48, 48, 48, 48]  # input // 4, unrounded
    assert model.classifier.in_features == 1280


def test_config_rebuilds_the_model() -> None:
    model = efficientnet(CompoundScaler(0.5).architecture(), num_classes=5, padding="same", bn_eps=1e-5)
    config = ModelConfig(**json.loads(json.dumps(dataclasses.asdict(model.config))))
    assert config == model.config
    rebuilt = EfficientNet(config)
    rebuilt.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.eval()(x), rebuilt.eval()(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "num_classes must be 1 or more"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"drop_connect_rate": -0.1}, r"drop_connect_rate must be in \[0, 1\)"),
        ({"bn_eps": 0.0}, "bn_eps must be positive"),
        ({"bn_momentum": 1.5}, r"bn_momentum must be in \[0, 1\]"),
        ({"padding": "valid"}, "choose one of symmetric, same"),
        ({"kernels": "cuda"}, "choose one of auto, triton, triton-ops, native, torch"),
    ],
)
def test_config_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**change)


def test_initialisation_is_tensorflows() -> None:
    model = efficientnet("b0")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
            k = math.prod(module.kernel_size)
            expected = math.sqrt(2 / (k * module.out_channels / module.groups))
            assert math.isclose(module.weight.std().item(), expected, rel_tol=0.08), name
    depthwise = model.get_submodule("blocks.15.depthwise.conv")
    assert isinstance(depthwise, torch.nn.Conv2d)
    assert 0.44 < depthwise.weight.std().item() < 0.50  # a fan-out that ignores groups would give 0.014
    bound = 1 / math.sqrt(101)
    assert 0.999 * bound < model.classifier.weight.abs().max().item() <= bound
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name


def maps(model: EfficientNet, resolution: int) -> list[int]:
    """Side of the feature map after stem and after each block."""
    sides: list[int] = []
    handles = [
        m.register_forward_hook(lambda _m, _i, out: sides.append(out.shape[-1])) for m in (model.stem, *model.blocks)
    ]
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, resolution, resolution))
    for handle in handles:
        handle.remove()
    return sides


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_odd_maps(padding: Any) -> None:
    model = EfficientNet(ModelConfig(width=0.5, depth=1.1, padding=padding))
    sides = maps(model, 240)
    assert list(dict.fromkeys(sides)) == [120, 60, 30, 15, 8]
    assert len(sides) == 24


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "total"),
    [(224, 3, 2, 1), (15, 3, 2, 2), (30, 5, 2, 3), (15, 5, 2, 4), (7, 3, 1, 2), (2, 1, 2, 0)],
)
def test_same_padding_totals(size: int, kernel_size: int, stride: int, total: int) -> None:
    assert same_padding(size, kernel_size, stride) == total


def taps(padding: Any, side: int) -> Tensor:
    """Columns that a stride-2 kernel with a single one in its centre picks from 0, 1, 2, …"""
    conv = Conv2d(1, 1, 3, 2, 1, padding)
    with torch.no_grad():
        conv.weight.zero_()[0, 0, 1, 1] = 1
        return conv(torch.arange(float(side)).expand(1, 1, side, side))[0, 0, 0]


def test_padding_decides_which_columns_are_seen() -> None:
    assert taps("symmetric", 6).tolist() == [0, 2, 4]
    assert taps("same", 6).tolist() == [1, 3, 5]
    assert taps("symmetric", 7).tolist() == taps("same", 7).tolist() == [0, 2, 4, 6]


def test_same_padding_of_a_map_that_is_odd_one_way_only() -> None:
    conv = Conv2d(2, 2, 3, 2, 2, "same")
    x = torch.randn(1, 2, 6, 7)
    padded = torch.nn.functional.pad(x, (1, 1, 0, 1))
    assert torch.equal(conv(x), torch.nn.functional.conv2d(padded, conv.weight, None, 2, 0, 1, 2))


def test_survival_probabilities() -> None:
    model = efficientnet("b0", drop_connect_rate=0.2)
    with_residual = [block.shape.has_residual for block in model.network.blocks]
    expected = torch.tensor([1 - 0.2 * i / 16 if residual else 1.0 for i, residual in enumerate(with_residual)])
    torch.testing.assert_close(model.survival_prob, expected)
    assert "survival_prob" not in model.state_dict()


def test_drop_scales_have_two_values_and_the_right_frequency() -> None:
    model, batch = tiny(drop_connect_rate=0.5), 20_000
    scales = model.draw_drop_scales(batch, generator=torch.Generator().manual_seed(1))
    assert scales.shape == (16, batch)
    assert scales.dtype == torch.float32
    for i, (row, survival) in enumerate(zip(scales, model.survival_prob, strict=True)):
        p = survival.item()
        assert torch.all((row == 0) | (row == 1 / survival))
        kept = (row > 0).double().mean().item()
        assert abs(kept - p) <= 5 * math.sqrt(p * (1 - p) / batch), i  # five standard deviations
    assert torch.all(scales[0] == 1)
    # Blocks and samples are drawn one by one.
    kept = (scales[[2, 14]] > 0).double()
    assert abs(torch.corrcoef(kept)[0, 1].item()) < 5 / math.sqrt(batch)


def test_drop_scales_follow_the_generator() -> None:
    model = tiny(drop_connect_rate=0.5)
    draws = [model.draw_drop_scales(64, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_no_scales_where_nothing_can_drop() -> None:
    model = tiny(drop_connect_rate=0.0)
    assert torch.all(model.draw_drop_scales(8) == 1)
    seen: list[Any] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    model.train()(torch.randn(2, 3, 32, 32))
    assert seen == [None] * 16


def test_only_blocks_that_can_drop_get_a_scale() -> None:
    model = tiny(drop_connect_rate=0.5)
    seen: list[Any] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    model.train()(torch.randn(2, 3, 32, 32))
    assert [scale is not None for scale in seen] == [block.shape.has_residual for block in model.network.blocks]
    seen.clear()
    with torch.no_grad():
        model.eval()(torch.randn(2, 3, 32, 32))
    assert seen == [None] * 16


def test_a_dropped_block_passes_its_sample_through_and_survivors_are_scaled() -> None:
    block = MBConv(BlockShape(8, 8, 5, 1, 6), ModelConfig()).double().train()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    full = block(x) - x
    scale = torch.tensor([0.0, 1.0, 1.25, 2.0], dtype=torch.float64)
    out = block(x, scale)
    assert torch.equal(out[0], x[0])
    assert full[0].abs().max() > 0.1
    torch.testing.assert_close(out - x, scale[:, None, None, None] * full)


def test_drop_scales_reach_the_blocks_and_evaluation_ignores_them() -> None:
    model = tiny(drop_connect_rate=0.5, dropout=0.0).double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    ones = torch.ones(16, 3)
    zeros_of_one = ones.clone()
    zeros_of_one[:, 1] = 0
    model.train()
    assert torch.equal(model(x, ones), model(x, ones))
    assert model(x).dtype == torch.float64  # its own draw fits the precision too
    full, dropped = model(x, ones), model(x, zeros_of_one)
    assert not torch.allclose(full[1], dropped[1])
    model.eval()
    assert torch.equal(model(x, zeros_of_one), model(x))


def test_drop_scales_of_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"must be \[16, 2\] \(blocks, batch\), got \[16, 3\]"):
        tiny().train()(torch.randn(2, 3, 32, 32), torch.ones(16, 3))


def test_training_counts_batches_and_moves_statistics_evaluation_does_not() -> None:
    model = tiny(bn_momentum=0.25)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        model.train()(x)
        stem = model.stem
        batch_mean = stem.conv(x).mean((0, 2, 3))
        torch.testing.assert_close(stem.bn.running_mean, 0.25 * batch_mean)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.eval()(x)
    norms = list(model.batch_norms())
    assert len(norms) == sum(isinstance(m, BatchNorm) for m in model.modules()) == 1 + 15 * 3 + 2 + 1
    assert {norm.num_batches_tracked.item() for norm in norms} == {1}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_channels_last_gives_the_same_and_stays() -> None:
    model = tiny(padding="same").double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    layouts: list[bool] = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _m, _i, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
        )
    out = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected)
    assert layouts == [True] * 16


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool) -> None:
    model = tiny(drop_connect_rate=0.0, dropout=0.0).train(training)
    x = torch.randn(8, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )


class CountingBackend:
    """Dynamo backend that runs the captured graph as it is and counts captures."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return module.forward


def train_once(model: EfficientNet, x: Tensor, scales: Tensor) -> Tensor:
    out: Tensor = model(x, scales)
    model.zero_grad()
    out.square().mean().backward()
    return out.detach()


@pytest.mark.slow
def test_blocks_of_one_shape_share_a_compiled_graph() -> None:
    torch._dynamo.reset()
    eager = EfficientNet(ModelConfig(width=0.5, depth=1.8, num_classes=7, dropout=0.0, drop_connect_rate=0.3)).train()
    model, backend = copy.deepcopy(eager), CountingBackend()
    shapes = {block.shape for block in eager.network.blocks}
    assert len(shapes) > 8  # Dynamo's default limit on recompilations of one code object
    assert model.compile_regions(backend=backend) == len(shapes) + 2
    assert len(model.blocks) == 32
    x, scales = torch.randn(2, 3, 64, 64), eager.draw_drop_scales(2)
    for _ in range(2):
        out = train_once(model, x, scales)
        assert backend.graphs == len(shapes) + 2  # stem and classification; nothing recompiles at the second step
        torch.testing.assert_close(out, train_once(eager, x, scales))
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, name=name: f"{name}: {m}")  # type: ignore[misc]
    assert list(model.state_dict()) == list(eager.state_dict())


@pytest.mark.slow
def test_a_copy_of_a_compiled_model_is_its_own() -> None:
    torch._dynamo.reset()
    model, backend = tiny(drop_connect_rate=0.0).eval(), CountingBackend()
    model.compile_regions(backend=backend)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        graphs = backend.graphs
        twin = copy.deepcopy(model)
        for tensor in twin.classifier.parameters():
            tensor.zero_()
        assert not twin(x).any()
        assert torch.equal(model(x), expected)
        assert len(FeatureExtractor(model)(x)) == 5  # calls stem and blocks by themselves
    assert backend.graphs == graphs


@pytest.mark.slow
def test_regional_compilation_keeps_its_gradients_through_aot_autograd() -> None:
    torch._dynamo.reset()
    eager = tiny(dropout=0.0, drop_connect_rate=0.3).double().train()
    model = copy.deepcopy(eager)
    model.compile_regions(backend="aot_eager")
    x, scales = torch.randn(2, 3, 64, 64, dtype=torch.float64), eager.draw_drop_scales(2)
    torch.testing.assert_close(train_once(model, x, scales), train_once(eager, x, scales))
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for our_buffer, their_buffer in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(our_buffer, their_buffer)


@pytest.mark.slow
def test_every_published_variant_builds() -> None:
    with torch.device("meta"):
        for variant in VARIANTS:
            model = efficientnet(variant)
            assert model.config.dropout == model.dropout.p == architecture(variant).dropout
            assert model(torch.empty(1, 3, 64, 64)).shape == (1, 101)
