"""One block or layer on random images: to run in each of its forms, and to hold to PyTorch.

The images that are checked are few, so that an fp64 copy of what a block computes on them fits beside the model. They
are repeated until the batch is as large as in training: batch statistics and gradients of the images are then those of
the few, gradients of parameters so many times as large, and the kernels run at their true size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastnet.arch import BlockShape
from fastnet.device import Amp
from fastnet.forms import Form
from fastnet.layers import BatchNorm, ConvBNAct, MBConv
from fastnet.model import ModelConfig, compiled_copy
from fastnet.training.step import autocast
from fastnet.training.tuning.subjects import Context, Subject
from kernels import tolerance
from kernels.ops.drop_connect import bn_drop_connect_add
from kernels.vectors import PendingResidual

# Elements of a block's widest tensor that are checked: 32 MB in fp64, of which an evaluation holds a dozen.
CHECKED_ELEMENTS = 1 << 22
CHECKED_ALONE_ELEMENTS, CHECKED_ALONE_PIXELS = 1 << 18, 64


def distinct_images(subject: Subject) -> int:
    """How many images of the batch are checked: the largest of its divisors that keeps to CHECKED_ELEMENTS."""
    _, wide, _ = subject.channels
    largest = max(1, CHECKED_ELEMENTS // (wide * subject.height * subject.width))
    return max(n for n in range(1, subject.images + 1) if subject.images % n == 0 and n <= largest)


def checked_alone(subject: Subject) -> int:
    """How many images are checked where the batch doesn't matter: few, but enough pixels of the output that no variance
    is near zero by luck, which would magnify any rounding."""
    _, wide, _ = subject.channels
    height, width = subject.out_size
    few = CHECKED_ALONE_ELEMENTS // (wide * subject.height * subject.width)
    return max(1, min(few, 8), -(-CHECKED_ALONE_PIXELS // (height * width)))


class Trial:
    """A block or layer on random images in one context. `distinct` of the images differ, the others repeat them."""

    def __init__(
        self,
        subject: Subject,
        context: Context,
        config: ModelConfig,
        device: torch.device,
        amp: Amp,
        distinct: int,
        seed: int = 0,
    ) -> None:
        self.subject, self.context, self.device, self.amp = subject, context, device, amp
        self.distinct, self.repeats, self.eps = distinct, subject.images // distinct, config.bn_eps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = _make(subject, config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            into, _, out = subject.channels
            self.x = self._images(into, subject.height, subject.width)
            self.residual = self._images(into, subject.height, subject.width)
            self.dy = self._images(out, *subject.out_size)
            self.drop_scale, self.prev_drop_scale = (
                (torch.rand(distinct) < 0.8).float().to(device) / 0.8 for _ in range(2)
            )
            self.prev_norm = tuple(vector.to(device) for vector in _norm(into))
        self.statistics = {name: b.clone() for name, b in self.module.named_buffers() if b.is_floating_point()}

    def _images(self, channels: int, height: int, width: int) -> Tensor:
        drawn = torch.randn(self.distinct, channels, height, width)
        return drawn.to(self.device, self.subject.dtype, memory_format=torch.channels_last)

    def _batch(self, few: Tensor) -> Tensor:
        """The few images again and again, each time in another order."""
        return few if self.repeats == 1 else torch.cat([few.roll(i, 0) for i in range(self.repeats)])

    def _block_input(self, dtype: torch.dtype) -> Tensor:
        """What the block before makes of x, where it leaves its residual to this one; else x."""
        x, pending = self.x.to(dtype), self.context.pending
        if pending is None:
            return x
        vectors = torch.promote_types(dtype, torch.float32)
        norm = [vector.to(vectors) for vector in self.prev_norm]
        residual = self.residual.to(dtype) if pending[0] else None
        drop_scale = self.prev_drop_scale.to(vectors) if pending[1] else None
        options: dict[str, Any] = {"training": False, "momentum": 0.0, "eps": self.eps, "impl": "torch"}
        return bn_drop_connect_add(x, residual, drop_scale, *norm, **options).contiguous(
            memory_format=torch.channels_last
        )

    def runner(
        self, form: Form, *, defer_residual: bool = False, compiled: bool = False, backward: bool = True
    ) -> Callable[[], dict[str, Tensor]]:
        """A call that computes the block on the whole batch: y, and in training dx and a "d" of each parameter, unless
        without `backward`, where y keeps what that needs. With `defer_residual` a fused block leaves it to the next,
        as most do in the model; no other form can."""
        block, module, pending = self.subject.is_block, self.module, self.context.pending
        drop_scale = self._batch(self.drop_scale) if self.context.scaled and self.subject.training else None
        dy = self._batch(self.dy)
        prev: list[Tensor | None] = []
        fused = form in ("triton", "native")
        defer_residual = defer_residual and fused
        if pending is not None and fused:
            x = self._batch(self.x)
            weight, bias, mean, var = self.prev_norm
            prev += [self._batch(self.residual) if pending[0] else None]
            prev += [self._batch(self.prev_drop_scale) if pending[1] else None, mean, var, weight, bias]
        else:
            x = self._batch(self._block_input(self.subject.dtype))
        names, parameters = zip(*module.named_parameters(), strict=True)

        def call(x: Tensor) -> Tensor:
            if not block:
                return module(x, form=form)
            y = module(PendingResidual(x, *prev) if prev else x, drop_scale, defer_residual=defer_residual, form=form)  # type: ignore[arg-type]
            return y.p if isinstance(y, PendingResidual) else y

        if compiled:
            call = compiled_copy(call, f"trial_{form.replace('-', '_')}", {"dynamic": False})

        def run() -> dict[str, Tensor]:
            if not self.subject.training:
                with torch.inference_mode(), autocast(self.device, self.amp):
                    return {"y": call(x)}
            given = x.detach().requires_grad_(block)
            with torch.enable_grad(), autocast(self.device, self.amp):
                y = call(given)
            if not backward:
                return {"y": y}
            gradients = torch.autograd.grad(y, [given, *parameters] if block else parameters, dy)
            named = zip(["x", *names] if block else names, gradients, strict=True)
            return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in named}

        return run

    def results(self, form: Form) -> dict[str, Tensor]:
        """What the form computes: what `runner` gives, and batch statistics."""
        buffers = {name: b for name, b in self.module.named_buffers() if name in self.statistics}
        for name, buffer in buffers.items():
            buffer.copy_(self.statistics[name])
        found = self.runner(form)()
        if self.subject.training:
            found |= {name: buffer.clone() for name, buffer in buffers.items()}
        return found

    def exact(self) -> Trial:
        """The same in fp64, on the few images."""
        twin = copy.copy(self)
        twin.subject = self.subject._replace(images=self.distinct, dtype=torch.float64)
        twin.context, twin.repeats, twin.amp = self.context._replace(pending=None), 1, "off"
        twin.x, twin.dy, twin.drop_scale = self._block_input(torch.float64), self.dy.double(), self.drop_scale.double()
        twin.module = copy.deepcopy(self.module).double()
        twin.statistics = {name: b.double() for name, b in self.statistics.items()}
        return twin

    def errors(self, form: Form) -> dict[str, tolerance.Errors]:
        """How far each result of the form is from the oracle's; of images, in the part of the batch that is worst."""
        ours, torchs, oracle = self.results(form), self.results("torch"), self.exact()
        exact = oracle.results("torch")
        # Lost beside one rounding of a 16-bit type.
        moved = tolerance.approximated(lambda: oracle.results("torch")) if self.subject.dtype == torch.float32 else []
        found = {}
        for name, true in exact.items():
            truths = [true, *(one[name] for one in moved)]
            if name in ("y", "dx"):
                parts = zip(ours[name].chunk(self.repeats), torchs[name].chunk(self.repeats), strict=True)
                rolled = ([t.roll(i, 0) for t in truths] for i in range(self.repeats))
                measured = [
                    tolerance.measure(own, other, right, others)
                    for (own, other), (right, *others) in zip(parts, rolled, strict=True)
                ]
                found[name] = tolerance.most_wrong(measured)
            else:
                right, *others = (self._of_the_batch(name, t) for t in truths)
                found[name] = tolerance.measure(ours[name], torchs[name], right, others)
        return found

    def _of_the_batch(self, name: str, value: Tensor) -> Tensor:
        """What a result of the few images is for the whole batch."""
        if name.startswith("d"):
            return value * self.repeats
        if not name.endswith("running_var"):
            return value
        height, width = self.subject.out_size
        if name.startswith("expand"):
            height, width = self.subject.height, self.subject.width
        few = self.distinct * height * width
        whole = few * self.repeats
        return value * ((few - 1) / few * whole / (whole - 1))


def _make(subject: Subject, config: ModelConfig) -> MBConv | ConvBNAct:
    kind = subject.kind
    module: MBConv | ConvBNAct
    if subject.is_block:
        config = replace(config, kernels="triton", padding=kind[6])  # type: ignore[arg-type]
        module = MBConv(BlockShape(*kind[1:6]), config)  # type: ignore[arg-type]
    else:
        into, out, size, stride = (int(n) for n in kind[1:5])
        module = ConvBNAct(into, out, size, replace(config, kernels="triton"), stride=stride, alone=True)
    for norm in module.modules():
        if isinstance(norm, BatchNorm):
            norm.momentum = 1.0  # the running statistics become the batch's
            with torch.no_grad():
                for own, value in zip(norm.tensors, _norm(len(norm.weight)), strict=True):
                    own.copy_(value)
    return module.train(subject.training)


def _norm(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, bias, mean and variance of a batch norm."""
    draw = torch.randn
    return (
        1 + 0.1 * draw(channels), 0.1 * draw(channels), 0.3 * draw(channels), 1 + torch.rand(channels),
    )  # fmt: skip
