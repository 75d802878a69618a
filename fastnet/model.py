"""EfficientNet v1 (Tan & Le 2019) in plain torch, readable as the paper's table 1.

Convolutions are torch's; what lies between them (batch norm, SiLU, squeeze-and-excitation, drop-connect) goes
through ``kernels``, one public call per convolution. Modules hold parameters and shapes only. Whatever
differs between two blocks of one shape, such as the survival probability, lives in ``EfficientNet`` and
reaches a block as a tensor, so that equal blocks share one compiled graph.
"""

import math
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastnet.arch import Kernels, ModelConfig, Padding, Scaling
from fastnet.layers import BatchNorm, ConvBNAct, MBConv, SqueezeExcite
from fastnet.scaling import Architecture, architecture


class EfficientNet(nn.Module):
    """Stem, MBConv blocks, head and classifier, as ``config`` says."""

    survival_prob: Tensor  # [num_blocks]; 1 where there is no residual to fall back on

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not config.network.family.has_kernels:
            config = replace(config, kernels="torch")
        self.config, self.network = config, config.network
        shapes, family = [block.shape for block in self.network.blocks], self.network.family
        alone: Any = {"activation": family.activation, "alone": True}
        self.stem = ConvBNAct(config.in_chans, self.network.stem, 3, config, stride=2, **alone)
        self.blocks = nn.ModuleList(MBConv(shape, config) for shape in shapes)
        self.head = ConvBNAct(shapes[-1].out_channels, self.network.head, 1, config, **alone)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(self.network.head, config.num_classes)
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
        self._reset_classifier()

    def _reset_classifier(self) -> None:
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
        norms = self.batch_norms() if self.training else ()
        return self.classify(self.trunk(images, drop_scales, norms=norms))

    def trunk(
        self,
        images: Tensor,
        drop_scales: Tensor | None = None,
        *,
        norms: Iterable[BatchNorm] = (),
        tap: Callable[[int, Tensor], Tensor] | None = None,
        stages: Collection[int] = (),
    ) -> Tensor:
        """images [B, 3, R, R] → the last block's output [B, C, ceil(R/32), ceil(R/32)]: the one way through the blocks.

        norms: those in training, whose batches are counted; without any, nothing is dropped. tap: called with each of
        `stages` (1 is the stem) and its output, returns what to go on with.
        """
        scales = self._count_and_draw(images, drop_scales, list(norms))
        x = self.stem(images)
        if tap is not None and 1 in stages:
            x = tap(1, x)
        blocks = list(self._mbconvs())
        tapped = {} if tap is None else {i: stage for i, stage in self.network.ends.items() if stage in stages}
        for i, (block, following, drop_scale) in enumerate(zip(blocks, [*blocks[1:], None], scales, strict=True)):
            defer = following is not None and i not in tapped and block.can_defer_residual(following, x)
            x = block(x, drop_scale, defer_residual=defer)
            if tap is not None and i in tapped:
                x = tap(tapped[i], x)
        return x

    def _count_and_draw(
        self, images: Tensor, drop_scales: Tensor | None, norms: list[BatchNorm]
    ) -> Sequence[Tensor | None]:
        """Each block's row of `drop_scales`, or None for a block that is not to drop."""
        scales: list[Tensor | None] = [None] * len(self.blocks)
        if norms:
            # One launch for all layers. The kernels do not count, and only other libraries' files read it.
            torch._foreach_add_([bn.num_batches_tracked for bn in norms], 1)
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
        return scales

    def classify(self, x: Tensor) -> Tensor:
        """Last feature map [B, C, H, W] → logits [B, num_classes]: head, mean, dropout, classifier."""
        return self.forward_head(self.head(x))

    def forward_features(self, images: Tensor) -> Tensor:
        """images [B, 3, R, R] → what the head's convolution makes of them, [B, head, ceil(R/32), ceil(R/32)]."""
        norms = self.batch_norms() if self.training else ()
        return self.head(self.trunk(images, norms=norms))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives → logits [B, num_classes]: mean, dropout, classifier. With pre_logits the mean
        with dropout, [B, head]."""
        pooled = self.dropout(features.mean((2, 3)))
        return pooled if pre_logits else self.classifier(pooled)

    def get_classifier(self) -> nn.Linear:
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier for so many classes, freshly initialised; the rest of the model stays."""
        self.config = replace(self.config, num_classes=num_classes)
        old = self.classifier.weight
        self.classifier = nn.Linear(self.network.head, num_classes, device=old.device, dtype=old.dtype)
        self._reset_classifier()

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
    in_chans: int = 3,
    scaling: Scaling = "published",
    dropout: float | None = None,
    drop_connect_rate: float | None = None,
    bn_eps: float = 1e-3,
    bn_momentum: float = 0.01,
    padding: Padding = "symmetric",
    kernels: Kernels = "auto",
) -> EfficientNet:
    """A freshly initialised EfficientNet; None takes the variant's own rate.

    ``variant`` is "b0", "lite4" and so on, or an Architecture such as ``CompoundScaler(1.5).architecture()``, which
    brings its own scaling. Raises ValueError for unknown names and values out of range.
    """
    arch = variant if isinstance(variant, Architecture) else architecture(variant, scaling)
    return EfficientNet(
        ModelConfig(
            variant=arch.name,
            scaling=arch.scaling,
            width=arch.width,
            depth=arch.depth,
            num_classes=num_classes,
            in_chans=in_chans,
            dropout=arch.dropout if dropout is None else dropout,
            drop_connect_rate=arch.drop_connect_rate if drop_connect_rate is None else drop_connect_rate,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            padding=padding,
            kernels=kernels,
        )
    )
