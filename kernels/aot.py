"""Every configuration that a launch can select, as data: what is compiled ahead of time, without a GPU.

Each file of kernels lists its own in `aot_specs`; `kernels.all_specs` has them together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from kernels.launch import RAGGED_TILE, STORAGE_DTYPES, TILES

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))  # for which the kernels are built ahead of time
Kind = Literal["elementwise", "reduction", "strips", "gemm", "small"]


@dataclass(frozen=True)
class KernelSpec:
    """One configuration that a launch can select, with what `triton.compile(ASTSource(...))` needs to build it.

    `kind` is "elementwise" (reads and writes images), "reduction" (reads images, writes vectors), "strips" (walks
    images by columns, two channels a lane), "gemm" or "small" (vectors only). `attrs` states 16-byte alignment of
    every pointer, which holds for whatever PyTorch allocates. `maxnreg` is the launch's bound on registers, if any;
    `shared_bytes` bounds the shared memory that it takes on a card of a capability, where that decides whether it is
    chosen there; None is what never is.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    kind: Kind
    attrs: dict[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)
    maxnreg: int | None = None
    shared_bytes: Callable[[tuple[int, int]], int | None] | None = None


def spec(
    fn: Any,
    kind: Kind,
    dtype: str,
    constexprs: dict[str, Any],
    *,
    images: Iterable[str] = (),
    num_warps: int = 4,
    maxnreg: int | None = None,
    shared_bytes: Callable[[tuple[int, int]], int | None] | None = None,
) -> KernelSpec:
    """The specification of one compilation of `fn`: pointers named in `images` have the storage dtype, others fp32."""
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(inspect.signature(fn.fn).parameters):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}" if name in set(images) else "*fp32"
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "eps" or name.startswith("inverse_") else "i32"
    label = ",".join(f"no_{k.removesuffix('_ptr')}" if v is None else f"{k}={v}" for k, v in constexprs.items())
    label += f",WARPS={num_warps}" * (kind == "gemm") + f",MAXNREG={maxnreg}" * (maxnreg is not None)
    name = f"{fn.fn.__name__.strip('_')}[{dtype},{label}]"
    return KernelSpec(name, fn, signature, constexprs, num_warps, 1, kind, attrs, maxnreg, shared_bytes)


def tile_specs(
    fn: Any,
    kind: Literal["elementwise", "reduction"],
    images: Iterable[str],
    variants: Iterable[dict[str, Any]] = ({},),
    halved: bool = False,
) -> Iterator[KernelSpec]:
    """Every storage dtype × tile × vector width × variant of a kernel that walks tiles, or halved ones."""
    shapes = [(tile.halved() if halved else tile, 8 if tile in TILES else 1) for tile in (*TILES, RAGGED_TILE)]
    variants, images = tuple(variants), tuple(images)
    for dtype in STORAGE_DTYPES.values():
        for variant in variants:
            for tile, vec in shapes:
                constexprs = {**variant, **tile.constexprs(vec)}
                yield spec(fn, kind, dtype, constexprs, images=images, num_warps=tile.num_warps)
