"""The fused operations as things to time: inputs, a forward, a backward, and the bytes that their kernels move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

import kernels
from bench.launches import Launch
from bench.shapes import OPS, OpShape, largest
from fastnet.arch import BlockShape, Kernels
from fastnet.layers import BatchNorm, MBConv
from fastnet.model import ModelConfig
from kernels import reference
from kernels.block.traffic import Block
from kernels.tolerance import Errors, approximated, measure, most_wrong, worst

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
BN_OPTIONS = {"training": True, "momentum": 0.01, "eps": 1e-3}
# B0's largest shapes at a batch that fills a large GPU; small ones where only the code path is looked at.
VARIANT, RESOLUTION, BATCH, COUNT = "b0", 224, 128, 5


def timed_shapes(*, tiny: bool = False) -> list[OpShape]:
    """The five largest B0 shapes of every operation at batch 128; tiny: the largest at 32 pixels and batch 2."""
    if tiny:
        return [shape for op in OPS for shape in largest(op, 1, VARIANT, 32, 2)]
    return [shape for op in OPS for shape in largest(op, COUNT, VARIANT, RESOLUTION, BATCH)]


class OpCase:
    """One operation on random inputs of one shape: images of `dtype`, parameters fp32 (fp64 where images are)."""

    def __init__(self, shape: OpShape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        generator = torch.Generator(device).manual_seed(seed)
        vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def image() -> Tensor:
            size = (shape.batch, shape.channels, shape.height, shape.width)
            # fp32 draws, so that every dtype sees the same numbers up to rounding.
            return torch.randn(size, generator=generator, device=device).to(dtype, memory_format=torch.channels_last)

        def vector(*size: int, spread: float = 1.0, centre: float = 0.0) -> Tensor:
            return (centre + spread * torch.randn(size, generator=generator, device=device)).to(vector_dtype)

        c, s = shape.channels, shape.squeezed
        self.gradient = image()
        self.inputs: dict[str, Tensor] = {"x": image()}
        if shape.op in ("drop_connect_add", "bn_drop_connect_add") and shape.residual:
            self.inputs["residual"] = image()
        if shape.op.startswith("bn_"):
            self.inputs |= {"weight": vector(c, spread=0.1, centre=1.0), "bias": vector(c, spread=0.1)}
        if "squeeze_excite" in shape.op:
            self.inputs |= {
                "w_reduce": vector(s, c, spread=c**-0.5),
                "b_reduce": vector(s, spread=0.1),
                "w_expand": vector(c, s, spread=s**-0.5),
                "b_expand": vector(c, spread=0.1),
            }
        for value in self.inputs.values():
            value.requires_grad_()
        self.drop_scale = (vector(shape.batch) > -0.8).to(vector_dtype) / 0.8 if shape.scaled else None
        self.running = (
            torch.zeros(c, device=device, dtype=vector_dtype),
            torch.ones(c, device=device, dtype=vector_dtype),
        )

    def forward(self, function: Callable[..., Tensor], **options: Any) -> Tensor:
        """`function` has the operation's signature: from `kernels` (with `impl`) or `kernels.reference`."""
        i, op = self.inputs, self.shape.op
        if op == "squeeze_excite":
            return function(i["x"], i["w_reduce"], i["b_reduce"], i["w_expand"], i["b_expand"], **options)
        if op == "drop_connect_add":
            return function(i["x"], i["residual"], self.drop_scale, **options)
        norm = (i["weight"], i["bias"], *self.running)
        if op == "bn_drop_connect_add":
            return function(i["x"], i.get("residual"), self.drop_scale, *norm, **BN_OPTIONS, **options)
        if op == "bn_silu":
            return function(i["x"], *norm, **BN_OPTIONS, **options)
        vectors = (i["w_reduce"], i["b_reduce"], i["w_expand"], i["b_expand"])
        return function(i["x"], *norm, *vectors, **BN_OPTIONS, **options)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """Gradients of every input, again and again on one graph."""
        return torch.autograd.grad(output, list(self.inputs.values()), self.gradient, retain_graph=True)

    def reference(self) -> Callable[..., Tensor]:
        found: Callable[..., Tensor] = getattr(reference, self.shape.op)
        return found

    def public(self) -> Callable[..., Tensor]:
        found: Callable[..., Tensor] = getattr(kernels, self.shape.op)
        return found


class BlockCase:
    """One MBConv of the model in training: x of `dtype`, fp32 parameters (fp64 with an fp64 x) under autocast."""

    def __init__(self, block: Block, kernels: Kernels, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        ratio = block.channels // block.in_channels if block.expands else 1
        shape = BlockShape(block.in_channels, block.out_channels, block.kernel_size, block.stride, ratio)
        torch.manual_seed(seed)
        module = MBConv(shape, ModelConfig(kernels=kernels)).train()
        for norm in module.modules():
            if isinstance(norm, BatchNorm):
                torch.nn.init.normal_(norm.weight, 1, 0.1)
                torch.nn.init.normal_(norm.bias, 0, 0.1)
        self.module = module.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        generator = torch.Generator(device).manual_seed(seed)

        def image(channels: int, height: int, width: int) -> Tensor:
            # fp32 draws, so that every dtype sees the same numbers up to rounding.
            value = torch.randn(block.images, channels, height, width, generator=generator, device=device)
            return value.to(dtype, memory_format=torch.channels_last)

        self.x = image(block.in_channels, block.height, block.width).requires_grad_()
        rows, columns = -(-block.height // block.stride), -(-block.width // block.stride)
        self.gradient = image(block.out_channels, rows, columns)
        draw = torch.rand(block.images, generator=generator, device=device)
        self.drop_scale = (draw < 0.8).float() / 0.8 if block.scaled else None
        self.run: Callable[..., Tensor] = self.module

    def exact(self, block: Block) -> BlockCase:
        """The same block on the same values in fp64, by PyTorch."""
        twin = BlockCase(block, "torch", torch.float64, self.device)
        twin.module.load_state_dict(self.module.state_dict())
        with torch.no_grad():
            twin.x.copy_(self.x)
            twin.gradient.copy_(self.gradient)
        if self.drop_scale is not None:
            twin.drop_scale = self.drop_scale.double()
        return twin

    def forward(self) -> Tensor:
        mixed = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.device.type, dtype=self.dtype if mixed else None, enabled=mixed):
            return self.run(self.x, self.drop_scale)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x and every parameter, again and again on one graph."""
        return torch.autograd.grad(output, [self.x, *self.module.parameters()], self.gradient, retain_graph=True)


FUSED_AND_TORCH: tuple[Kernels, ...] = ("triton", "torch")


def op_errors(case: OpCase) -> Errors:
    """The most wrong of an operation's output and gradients, by the tolerance rule."""
    exact = OpCase(case.shape, torch.float64, case.device)
    with torch.no_grad():
        for name, value in exact.inputs.items():
            value.copy_(case.inputs[name])
        exact.gradient.copy_(case.gradient)
    if case.drop_scale is not None:
        exact.drop_scale = case.drop_scale.double()

    def results(of: OpCase, function: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        output = of.forward(function, **options)
        return [output.detach(), *of.backward(output)]

    ours, torchs = results(case, case.public(), impl="triton"), results(case, case.reference())
    return most_wrong(_errors(ours, torchs, lambda: results(exact, exact.reference())))


def block_errors(block: Block, dtype: torch.dtype, device: torch.device, draws: int = 3) -> Errors:
    """The most wrong of the fused block's output and gradients, by the tolerance rule; over more draws where one breaks
    it: PyTorch may be right by luck in a gradient of few values."""
    found: list[list[Errors]] = []
    for seed in range(draws):
        ours, torchs = (BlockCase(block, name, dtype, device, seed) for name in FUSED_AND_TORCH)
        exact = ours.exact(block)

        def results(of: BlockCase) -> list[Tensor]:
            output = of.forward()
            return [output.detach(), *of.backward(output)]

        found.append(_errors(results(ours), results(torchs), lambda exact=exact: results(exact)))  # type: ignore[misc]
        of_tensors = [worst(of_tensor) for of_tensor in zip(*found, strict=True)]
        if all(errors.right for errors in of_tensors):
            break
    return most_wrong(of_tensors)


def launch_errors(launch: Launch) -> Errors:
    """The most wrong of what a step of the schedule gives, by the tolerance rule."""

    def doubled(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double()
        return type(value)(*map(doubled, value)) if isinstance(value, tuple) else value

    def oracle() -> list[Tensor]:
        return list(launch.job(*map(doubled, launch.arguments)))

    with torch.no_grad():
        torchs = list(launch.job(*launch.arguments))
        given = [value for value in launch.ours() if value is not None]
        # Sums [K, B, C] are left in parts [K, B, P, C], and a weight without its two axes of length 1.
        ours = [
            (own.sum(2) if own.dim() == 4 and theirs.dim() == 3 else own).view(theirs.shape)
            for own, theirs in zip(given, torchs, strict=True)
        ]
        return most_wrong(_errors(ours, torchs, oracle))


def _errors(ours: list[Tensor], torchs: list[Tensor], oracle: Callable[[], list[Tensor]]) -> list[Errors]:
    """Tensor by tensor; `oracle` is evaluated again with approximate sigmoids where that may tell, in fp32."""
    exact = oracle()
    moved = approximated(oracle) if ours[0].dtype == torch.float32 else []
    tensors = zip(ours, torchs, exact, *moved, strict=True)
    return [measure(own, other, true, more) for own, other, true, *more in tensors]


def kernel_names() -> set[str]:
    """Function names of every Triton kernel of this project, as a profiler shows them."""
    return {spec.fn.fn.__name__ for spec in kernels.all_specs()}


# Reads plus writes of a whole image by the Triton kernels, forward and backward in training; the rest of what they move
# are vectors, which stay in the caches. A test counts both under the interpreter.
_PASSES = {
    "squeeze_excite": (3, 4),
    "bn_silu": (3, 5),
    "bn_silu_squeeze_excite": (4, 5),
    "drop_connect_add": (3, 2),
    "bn_drop_connect_add": (3, 5),
}


def image_passes(shape: OpShape, direction: Direction) -> int:
    """Times that the kernels of an operation read or write a whole image."""
    passes = _PASSES[shape.op][DIRECTIONS.index(direction)]
    return passes + (shape.op == "bn_drop_connect_add" and shape.residual and direction == "forward")


def image_bytes(shape: OpShape, dtype: torch.dtype, direction: Direction) -> int:
    """Bytes of images that the kernels read and write: what GB/s and the share of copy bandwidth are counted from."""
    return image_passes(shape, direction) * shape.elements * dtype.itemsize
