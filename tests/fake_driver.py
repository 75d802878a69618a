"""Triton's own run-time path on a GPU that is not there: `JITFunction.run` binds, specialises, compiles and loads for a
card of our choice, and what would be launched is kept.

In a process without TRITON_INTERPRET. Tensors are fake CUDA tensors (`tests.fake_cuda`) whose addresses are made up:
a storage begins on 512 bytes, as PyTorch's allocator has it, and a view lies inside.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from kernels import all_specs, bn_drop_connect_add, bn_silu, bn_silu_squeeze_excite, launch
from kernels.device import Gpu, pretend
from kernels.mbconv import ConvNorm, Excite, mbconv, mbconv_training
from tests.fake_cuda import CUDA, fake_cuda

LARGEST_I32 = 2**31 - 1


class Launched(NamedTuple):
    """A launch as the driver would get it."""

    name: str
    grid: tuple[int, int, int]
    shared: int
    arguments: tuple[Any, ...]


class FakeDriver:
    """What Triton asks of a driver, for one card."""

    def __init__(self, card: Gpu) -> None:
        self.card = card
        self.launched: list[Launched] = []
        self.utils = SimpleNamespace(
            load_binary=self._load_binary,
            get_device_properties=lambda device: {
                "max_shared_mem": self.card.shared_memory, "multiprocessor_count": card.multiprocessors, "warpSize": 32,
            },
        )  # fmt: skip
        self.launcher_cls = self._launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.card.arch, 32)

    def get_current_device(self) -> int:
        return self.card.arch  # Triton keeps what it compiled by this number

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def _load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        # cuFuncSetAttribute refuses what a block cannot have; Triton looks beforehand.
        if shared > self.card.shared_memory:
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument ({name}: {shared} bytes)")
        return object(), object(), 32, 0, 1024

    def _launcher(self, source: Any, metadata: Any) -> Any:
        """Checks arguments against the signature as the C launcher does, and keeps the launch."""
        kinds = list(source.signature.values())

        def run(grid_x: int, grid_y: int, grid_z: int, *others: Any) -> None:
            arguments = others[6:]
            assert len(arguments) == len(kinds), f"{metadata.name}: {len(arguments)} arguments of {len(kinds)}"
            assert 0 < grid_x <= LARGEST_I32
            assert 0 < grid_y <= 65535
            assert 0 < grid_z <= 65535
            for kind, argument in zip(kinds, arguments, strict=True):
                if kind.startswith("*"):
                    assert argument.device.type == "cuda", f"{metadata.name}: a tensor on {argument.device}"
                elif kind == "i32":
                    assert -LARGEST_I32 <= argument <= LARGEST_I32, f"{metadata.name}: {argument} as i32"
                elif kind == "fp32":
                    assert isinstance(argument, float | int)
                else:
                    assert kind == "constexpr", f"{metadata.name}: an argument of kind {kind}"
            self.launched.append(Launched(metadata.name, (grid_x, grid_y, grid_z), metadata.shared, arguments))

        return run


@contextmanager
def fake_driver(card: Gpu) -> Iterator[FakeDriver]:
    """Triton and our kernels take every CUDA device for this card."""
    fake, before = FakeDriver(card), driver._active
    # torch.cuda.device asks the real driver.
    with (
        pretend(card), mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
        mock.patch.object(FakeTensor, "data_ptr", _address, create=True),
    ):  # fmt: skip
        driver.set_active(fake)
        try:
            yield fake
        finally:
            driver._active = before


_numbers = itertools.count(1)
_bases: dict[int, int] = {}


def _address(tensor: Tensor) -> int:
    base = _bases.setdefault(tensor.untyped_storage()._cdata, 512 * next(_numbers))
    return int(base + tensor.storage_offset() * tensor.element_size())


# --- what a child process tries ----------------------------------------------------------------------------------


def key(source: Any, options: Any) -> tuple[Any, ...]:
    """What makes one compilation another. (The launch also states that nothing is known of a constant.)"""
    known = {place: words for place, words in source.attrs.items() if words}
    asked = [options.get(name) for name in ("num_warps", "num_stages", "maxnreg")]
    return source.fn.fn.__name__, *map(str, (source.signature, sorted(source.constants.items()), known, asked))


class Compilations:
    """Stands in for Triton's compiler: keeps what it is asked for."""

    def __init__(self) -> None:
        self.keys: list[tuple[Any, ...]] = []
        self.names: list[str] = []

    def __call__(self, source: Any, target: Any, options: dict[str, Any], **_: Any) -> Any:
        self.keys.append(key(source, options))
        self.names.append(source.fn.fn.__name__)
        metadata = SimpleNamespace(name=self.names[-1], shared=0)
        return SimpleNamespace(
            run=driver.active._launcher(source, metadata), function=None, packed_metadata=None, hash=source.hash(),
            launch_metadata=lambda *_: None,
        )  # fmt: skip


# in, expanded, out, kernel, stride, side: with and without expansion and residual; channels on and off 16 bytes.
BLOCKS = ((32, 32, 16, 3, 1, 12), (16, 96, 24, 3, 2, 12), (24, 144, 24, 5, 1, 8), (6, 36, 10, 5, 2, 7))
WIDE = ((112, 672, 112, 3, 1, 8), (112, 672, 112, 3, 1, 8))  # the second makes the first one's output: 64 < K, N > 64


def train_blocks(blocks: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    """Forward, backward and inference of each; of two alike in a row the second adds the first's residual."""
    pending: Any = None
    for c_in, channels, c_out, k, stride, side in blocks:
        x: Any = torch.empty(2, c_in, side, side, device=CUDA, dtype=dtype).to(memory_format=torch.channels_last)
        expand, depthwise, excite, project = _layers(c_in, channels, c_out, k)
        options: dict[str, Any] = dict(stride=stride, padding="symmetric", residual=stride == 1 and c_in == c_out)
        drop_scale = torch.empty(2, device=CUDA)
        defer = len(blocks) > 1 and blocks[0] == blocks[1] and pending is None
        x = pending if pending is not None else x.requires_grad_()
        common: dict[str, Any] = dict(momentum=0.1, eps=1e-3, group="")
        y: Any = mbconv_training(
            x, expand, depthwise, excite, project, drop_scale, **options, **common, defer_residual=defer
        )
        pending = y if defer else None
        if not defer:
            y.float().sum().backward()
        with torch.no_grad():
            plain = torch.empty(2, c_in, side, side, device=CUDA, dtype=dtype).to(memory_format=torch.channels_last)
            mbconv(plain, expand, depthwise, excite, project, training=False, impl="triton", **options, **common)


def _layers(c_in: int, channels: int, c_out: int, k: int) -> tuple[ConvNorm | None, ConvNorm, Excite, ConvNorm]:
    def vector(*shape: int) -> Tensor:
        return torch.empty(shape, device=CUDA, requires_grad=True)

    def layer(*shape: int) -> ConvNorm:
        n = shape[0]
        running = torch.empty(n, device=CUDA), torch.empty(n, device=CUDA)
        return ConvNorm(vector(*shape), vector(n), vector(n), *running)

    squeezed = max(1, c_in // 4)
    excite = Excite(vector(squeezed, channels), vector(squeezed), vector(channels, squeezed), vector(channels))
    expand = None if c_in == channels else layer(channels, c_in, 1, 1)
    return expand, layer(channels, 1, k, k), excite, layer(c_out, channels, 1, 1)


def operations(dtype: torch.dtype, offset: int = 0) -> None:
    """One of each of the operations between convolutions, forward and backward; x begins `offset` elements late."""
    shape, channels = (2, 24, 6, 6), 24
    count = 2 * 24 * 36
    flat = torch.empty(count + 16, device=CUDA, dtype=dtype)
    x = flat[offset : offset + count].view(2, 6, 6, 24).permute(0, 3, 1, 2).requires_grad_()
    assert x.shape == shape
    norm: Any = [torch.empty(channels, device=CUDA, requires_grad=i < 2) for i in range(4)]
    se: Any = _layers(24, 24, 24, 3)[2]
    options: dict[str, Any] = dict(training=True, momentum=0.1, eps=1e-3, impl="triton")
    for y in (
        bn_silu(x, *norm, **options),
        bn_silu_squeeze_excite(x, *norm, *se, **options),
        bn_drop_connect_add(x, x, torch.empty(2, device=CUDA), *norm, **options),
    ):
        y.float().sum().backward()


def try_binding(arch: int) -> dict[str, Any]:
    """Every launch binds, and asks the compiler for what the compile report builds and `compile_all` asks for."""
    compiled = Compilations()
    result: dict[str, Any] = {}

    def everything() -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            train_blocks(BLOCKS, dtype)
            train_blocks(WIDE, dtype)
            operations(dtype)

    with mock.patch("triton.compiler.compile", compiled), fake_driver(CARDS[arch]) as fake:
        with launch.dry() as recorded, fake_cuda(launching=True):
            everything()
        result["compiled while recorded"] = compiled.names.copy()
        launch.compile_all(recorded)
        ahead = set(compiled.keys)
        with fake_cuda(launching=True):
            everything()
            result["compiled once more"] = compiled.names[len(ahead) :]
            result["launched"] = len(fake.launched)
            result["recorded"] = len(recorded)
            result["kernels"] = sorted({name for name, *_ in fake.launched})
            before = len(compiled.keys)
            operations(torch.bfloat16)
            result["compiled again"] = compiled.names[before:]
            operations(torch.bfloat16, offset=1)
            result["compiled for a misaligned view"] = compiled.names[before:]
            misaligned = len(compiled.keys)
            operations(torch.bfloat16, offset=1)
            result["compiled for it again"] = compiled.names[misaligned:]
        built = {key(ASTSource(s.fn, s.signature, s.constexprs, s.attrs), vars(s)) for s in all_specs()}
        result["not in the compile report"] = [k for k in compiled.keys[:before] if k not in built]
    return result


def try_loading(arch: int, limit: int | None) -> dict[str, Any]:
    """Compiled for good: the shared memory of each kernel of two wide blocks; `limit`: what the driver says it has."""
    card = CARDS[arch]
    with fake_driver(card) as fake, fake_cuda(launching=True):
        if limit is not None:
            fake.card = dataclasses.replace(card, shared_memory=limit)
        try:
            train_blocks(WIDE, torch.bfloat16)
        except launch.KernelError as error:
            return {"error": str(error)}
    largest: dict[str, int] = {}
    for name, _, shared, _ in fake.launched:
        largest[name] = max(largest.get(name, 0), shared)
    return {"shared": largest, "limit": card.shared_memory}


CARDS = {
    86: Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 101_376),
    90: Gpu("NVIDIA H100", (9, 0), 132, 232_448),
}  # fmt: skip

if __name__ == "__main__":
    trial, arch, *limit = sys.argv[1:]
    if trial == "bind":
        print(json.dumps(try_binding(int(arch))))
    else:
        print(json.dumps(try_loading(int(arch), int(limit[0]) if limit else None)))
