"""The fused operations as things to time: inputs, a forward, a backward, and the bytes that their kernels move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

import kernels
from bench.shapes import OPS, OpShape, largest
from kernels import reference

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
        self.scale = (vector(shape.batch) > -0.8).to(vector_dtype) / 0.8 if shape.scaled else None
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
            return function(i["x"], i["residual"], self.scale, **options)
        norm = (i["weight"], i["bias"], *self.running)
        if op == "bn_drop_connect_add":
            return function(i["x"], i.get("residual"), self.scale, *norm, **BN_OPTIONS, **options)
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
