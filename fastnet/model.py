"""EfficientNet v1 (Tan & Le 2019) in plain torch, readable as the paper's table 1.

Convolutions are torch's; what lies between them (batch norm, SiLU, squeeze-and-excitation, drop-connect) goes
through ``kernels``, one public call per convolution. Modules hold parameters and shapes only. Whatever
differs between two blocks of one shape, such as the survival probability, lives in ``EfficientNet`` and
reaches a block as a tensor, so that equal blocks share one compiled graph.
"""

import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastnet.layers import BatchNorm, ConvBNAct, MBConv, SqueezeExcite
from fastnet.scaling import Architecture, Scaling, architecture, round_filters, round_repeats

Padding = Literal["symmetric", "same"]
Kernels = Literal["auto", "triton", "triton-ops", "native", "torch"]


class Stage(NamedTuple):
    """One row of the paper's table 1, before scaling."""

    expand_ratio: int
    kernel_size: int
    stride: int
    channels: int
    repeats: int


STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


class BlockShape(NamedTuple):
    """What tells one MBConv from another; equal shapes share a compiled graph."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    expand_ratio: int

    @property
    def has_residual(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels


def stage_repeats(depth: float) -> tuple[int, ...]:
    """Number of blocks in each of the seven stages."""
    return tuple(round_repeats(stage.repeats, depth) for stage in STAGES)


def block_shapes(width: float, depth: float) -> tuple[BlockShape, ...]:
    """Every MBConv from stem to head."""
    shapes, channels = [], round_filters(STEM_CHANNELS, width)
    for stage, repeats in zip(STAGES, stage_repeats(depth), strict=True):
        for i in range(repeats):
            out_channels = round_filters(stage.channels, width)
            stride = stage.stride if i == 0 else 1
            shapes.append(BlockShape(channels, out_channels, stage.kernel_size, stride, stage.expand_ratio))
            channels = out_channels
    return tuple(shapes)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that rebuilds a model: ``EfficientNet(ModelConfig(**dataclasses.asdict(config)))``.

    bn_momentum is torch's: running = (1 − momentum)·running + momentum·batch (TF's 0.99 is 0.01 here).
    padding: "symmetric" is k // 2 on every side; "same" is TF's, which puts an odd pixel right and below.
    kernels: "torch" is plain PyTorch; "triton" fuses whole MBConv blocks and never falls back; "triton-ops" keeps
    PyTorch's convolutions and fuses what lies between them; "native" is "triton" in C++ on a CPU, and never falls back;
    "auto" is "torch" without CUDA and on it "triton", but for blocks that were found wrong or slower so on the GPU at
    hand (``fastnet.tuning``).
    """

    variant: str = "b0"
    scaling: Scaling = "published"
    width: float = 1.0
    depth: float = 1.0
    num_classes: int = 101
    dropout: float = 0.2
    drop_connect_rate: float = 0.2
    bn_eps: float = 1e-3
    bn_momentum: float = 0.01
    padding: Padding = "symmetric"
    kernels: Kernels = "auto"

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, got {self.num_classes}.")
        for name in ("dropout", "drop_connect_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if not self.bn_eps > 0:
            raise ValueError(f"bn_eps must be positive, got {self.bn_eps}.")
        if not 0 <= self.bn_momentum <= 1:
            raise ValueError(f"bn_momentum must be in [0, 1], got {self.bn_momentum}.")
        if self.padding not in get_args(Padding):
            raise ValueError(f"unknown padding {self.padding!r}: choose one of {', '.join(get_args(Padding))}.")
        if self.kernels not in get_args(Kernels):
            raise ValueError(f"unknown kernels {self.kernels!r}: choose one of {', '.join(get_args(Kernels))}.")


class EfficientNet(nn.Module):
    """Stem, MBConv blocks, head and classifier, as ``config`` says."""

    survival_prob: Tensor  # [num_blocks]; 1 where there is no residual to fall back on

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        shapes = block_shapes(config.width, config.depth)
        self.stem = ConvBNAct(3, round_filters(STEM_CHANNELS, config.width), 3, config, stride=2, alone=True)
        self.blocks = nn.ModuleList(MBConv(shape, config) for shape in shapes)
        features = round_filters(HEAD_CHANNELS, config.width)
        self.head = ConvBNAct(shapes[-1].out_channels, features, 1, config, alone=True)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(features, config.num_classes)
        # Linear decay (Huang et al. 2016) as the reference implementation counts it: rate·i/N from i = 0.
        survival = [
            1 - config.drop_connect_rate * i / len(shapes) if shape.has_residual else 1.0
            for i, shape in enumerate(shapes)
        ]
        self.register_buffer("survival_prob", torch.tensor(survival), persistent=False)
        self.droppable = tuple(p < 1 for p in survival)
        if not self.classifier.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The reference (TF) initialisation: normal with variance 2 / fan-out, where a convolution's fan-out
        is that of one group; classifier uniform within ±1/sqrt(out); biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(module, SqueezeExcite):
                for linear in (module.reduce, module.expand):
                    nn.init.normal_(linear.weight, std=math.sqrt(2 / linear.out_features))
                    nn.init.zeros_(linear.bias)
        bound = 1 / math.sqrt(self.classifier.out_features)
        nn.init.uniform_(self.classifier.weight, -bound, bound)
        nn.init.zeros_(self.classifier.bias)

    def batch_norms(self) -> Iterator[BatchNorm]:
        """Every batch norm, from the stem to the head."""
        return (module for module in self.modules() if isinstance(module, BatchNorm))

    def draw_drop_scales(
        self, batch: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Drop-connect's draw for one step: [num_blocks, batch] fp32, 0 (dropped) or 1/survival, on the device.

        All ones for blocks that cannot drop: no residual, rate 0, or the first block.
        """
        survival = self.survival_prob.to(device, torch.float32)[:, None]
        draw = torch.rand(len(self.blocks), batch, device=survival.device, generator=generator)
        return (draw < survival) / survival

    def forward(self, images: Tensor, drop_scales: Tensor | None = None) -> Tensor:
        """images [B, 3, R, R], normalised → logits [B, num_classes].

        drop_scales [num_blocks, B] are used in training only, and only for the blocks that can drop; drawn
        here when None. Raises ValueError where their shape does not fit.
        """
        scales: list[Tensor | None] = [None] * len(self.blocks)
        if self.training:
            # One launch for all layers. The kernels do not count, and only other libraries' files read it.
            torch._foreach_add_([bn.num_batches_tracked for bn in self.batch_norms()], 1)
            if any(self.droppable):
                if drop_scales is None:
                    drop_scales = self.draw_drop_scales(images.shape[0], images.device)
                elif drop_scales.shape != (len(self.blocks), images.shape[0]):
                    raise ValueError(
                        f"drop_scales must be [{len(self.blocks)}, {images.shape[0]}] (blocks, batch), "
                        f"got {list(drop_scales.shape)}."
                    )
                # The kernels compute in fp32, and in fp64 for a model that was moved there.
                rows = drop_scales.to(torch.promote_types(self.survival_prob.dtype, torch.float32)).unbind()
                scales = [row if can else None for row, can in zip(rows, self.droppable, strict=True)]
        x = self.stem(images)
        blocks = list(self._mbconvs())
        for block, following, scale in zip(blocks, [*blocks[1:], None], scales, strict=True):
            join = following is None or not block.leaves_its_join_to(following, x)
            x = block(x, scale, join=join)
        return self.classify(x)

    def classify(self, x: Tensor) -> Tensor:
        """Last feature map [B, C, H, W] → logits [B, num_classes]: head, mean, dropout, classifier."""
        return self.classifier(self.dropout(self.head(x).mean((2, 3))))

    def compile_regions(self, **options: Any) -> int:
        """Compile stem, blocks and classification one by one, in place; returns the number of programs.

        Blocks of one shape share a program, so cold compilation costs the distinct shapes and not the depth.
        ``options`` go to torch.compile. Each program has a code object of its own, because Dynamo counts
        recompilations (past its limit it silently runs eager) and guesses at dynamic sizes per code object:
        fourteen shapes behind one would exceed the limit and make height and width symbolic.
        """
        programs = {
            shape: compiled_copy(MBConv.forward, "mbconv_{}to{}_k{}_s{}_e{}".format(*shape), options)
            for shape in dict.fromkeys(block.shape for block in self._mbconvs())
        }
        for block in self._mbconvs():
            _bind(block, "forward", programs[block.shape])
        _bind(self.stem, "forward", compiled_copy(ConvBNAct.forward, "stem", options))
        _bind(self, "classify", compiled_copy(EfficientNet.classify, "classify", options))
        return len(programs) + 2

    def _mbconvs(self) -> Iterator[MBConv]:
        return (block for block in self.blocks if isinstance(block, MBConv))


def compiled_copy(function: Callable[..., Any], name: str, options: dict[str, Any]) -> Callable[..., Any]:
    """The function by that name through torch.compile, with a code object of its own (see `compile_regions`)."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=name)
    copy = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(copy, **options)


def _bind(module: nn.Module, method: str, function: Callable[..., Tensor]) -> None:
    # A bound method, so that copy.deepcopy rebinds it to the copied module.
    setattr(module, method, types.MethodType(function, module))


def efficientnet(
    variant: str | Architecture = "b0",
    *,
    num_classes: int = 101,
    scaling: Scaling = "published",
    dropout: float | None = None,
    drop_connect_rate: float | None = None,
    bn_eps: float = 1e-3,
    bn_momentum: float = 0.01,
    padding: Padding = "symmetric",
    kernels: Kernels = "auto",
) -> EfficientNet:
    """A freshly initialised EfficientNet; None takes the variant's own rate.

    ``variant`` is "b0" … "b7", or an Architecture such as ``CompoundScaler(1.5).architecture()``, which brings
    its own scaling. Raises ValueError for unknown names and values out of range.
    """
    arch = variant if isinstance(variant, Architecture) else architecture(variant, scaling)
    return EfficientNet(
        ModelConfig(
            variant=arch.name,
            scaling=arch.scaling,
            width=arch.width,
            depth=arch.depth,
            num_classes=num_classes,
            dropout=arch.dropout if dropout is None else dropout,
            drop_connect_rate=arch.drop_connect_rate if drop_connect_rate is None else drop_connect_rate,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            padding=padding,
            kernels=kernels,
        )
    )


def count_parameters(width: float, depth: float, num_classes: int = 1000) -> int:
    """Trainable parameters of the model scaled so; built on the meta device, where nothing is allocated."""
    with torch.device("meta"):
        model = EfficientNet(ModelConfig(width=width, depth=depth, num_classes=num_classes))
    return sum(p.numel() for p in model.parameters())
