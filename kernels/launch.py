"""Which implementation runs, how a tensor is cut into tiles, and launches.

Every kernel sees a channels_last tensor `[B, C, H, W]` as the row-major matrix `[B*H*W, C]` and cuts it into tiles
`[UNROLL, ROWS, BLOCK_C]`. `ROWS * BLOCK_C` is eight elements a thread, so UNROLL loads of 16 bytes are in flight in
every thread before the first is used, and a sum over UNROLL stays within a thread. Channel counts reach the kernels
as `c_vec * VEC` with a compile-time VEC, which is how the compiler learns that a row of 24 or 40 channels keeps
16-byte accesses aligned without a compilation for every channel count.
"""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kernels.configs import Site
from kernels.device import Gpu, gpu, unsupported

try:
    import triton
    import triton.language as tl

    INTERPRETED = bool(triton.knobs.runtime.interpret)
    IN_INTERPRETER = tl.constexpr(INTERPRETED)
except ImportError:  # a machine without Triton imports `kernels` all the same and runs the PyTorch twins
    triton = tl = None
    INTERPRETED = IN_INTERPRETER = False

Impl = Literal["auto", "triton", "torch"]
STORAGE_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def jit(fn: Callable[..., Any]) -> Any:
    """`triton.jit` that compiles once for all sizes: integers that happen to be 1 or a multiple of 16 change
    nothing."""
    if triton is None:
        return fn
    names = [name for name, p in inspect.signature(fn).parameters.items() if "constexpr" not in str(p.annotation)]
    return triton.jit(do_not_specialize=[n for n in names if not n.endswith("_ptr")])(fn)


def helper(fn: Callable[..., Any]) -> Any:
    """`triton.jit` for a function that kernels call."""
    return fn if triton is None else triton.jit(fn)


def resolve(impl: Impl, x: Tensor) -> Literal["triton", "torch"]:
    """ "auto" is Triton for fp32, fp16 and bf16 where `kernels.device` says that the kernels run, and PyTorch
    elsewhere; "triton" never falls back."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    if impl == "torch":
        return "torch"
    if impl == "auto":
        return "triton" if x.dtype in STORAGE_DTYPES and why_not(x.device) is None else "torch"
    if triton is None:
        raise RuntimeError("impl='triton' needs the triton package: install it or pass impl='auto'")
    if not (x.is_cuda or INTERPRETED):
        raise RuntimeError(
            f"impl='triton' cannot run on {x.device.type} tensors: move them to CUDA, pass impl='auto', "
            "or set TRITON_INTERPRET=1 before importing triton to interpret the kernels"
        )
    if x.is_cuda and (reason := why_not(x.device)) is not None:
        raise RuntimeError(f"impl='triton' cannot run because {reason}: pass impl='auto'")
    if x.dtype not in STORAGE_DTYPES:
        raise TypeError(f"impl='triton' stores float32, float16 or bfloat16, got {x.dtype}: pass impl='torch'")
    return "triton"


@torch.compiler.assume_constant_result
def why_not(device: torch.device) -> str | None:
    """`device.unsupported`, which a compiler need not look into."""
    return unsupported(device)


def check(x: Tensor, **vectors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """One sentence for the first bad argument: `x` is [B, C, H, W] floating point, the others fp32 of a given shape."""
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got shape {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
    if x.numel() // x.shape[1] > MAX_ROWS:
        raise ValueError(f"x must have at most 2**30 pixels in a batch, got shape {tuple(x.shape)}")
    for name, (tensor, shape) in vectors.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have shape {tuple(shape)} for x of shape {tuple(x.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move one of them")
        if tensor.dtype != (torch.float64 if x.dtype == torch.float64 else torch.float32):
            raise TypeError(f"{name} must be float32 (float64 with a float64 x), got {tensor.dtype} with x {x.dtype}")


def check_residual(x: Tensor, residual: Tensor | None) -> None:
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual must match x in shape, dtype and device: {tuple(residual.shape)} {residual.dtype} on "
            f"{residual.device} against {tuple(x.shape)} {x.dtype} on {x.device}"
        )


def nhwc(x: Tensor) -> Tensor:
    """`x` in channels_last: itself where it already is, else a copy (a whole extra read and write)."""
    return x.contiguous(memory_format=torch.channels_last)


def with_strides(gradient: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A weight's gradient under the weight's own strides, where they name the same memory: they may differ in axes of
    length 1, as those of a 1×1 weight in channels_last do. PyTorch's operations on lists of tensors are one launch only
    for tensors of equal strides."""
    sizes = zip(gradient.shape, gradient.stride(), strides, strict=True)
    if all(size == 1 or mine == theirs for size, mine, theirs in sizes):
        return gradient.as_strided(gradient.shape, strides)
    return gradient


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every scratch and vector allocation; a test fills them with NaN."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def empty_image(like: Tensor) -> Tensor:
    """An uninitialised channels_last tensor of the shape and dtype of `like`."""
    return torch.empty_like(like, memory_format=torch.channels_last)


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16, as sites hold it."""
    return str(dtype).removeprefix("torch.")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Tile:
    """A tile of `unroll * rows` rows by `block_c` channels for four warps."""

    block_c: int
    rows: int
    unroll: int = 4
    num_warps: int = 4

    @property
    def height(self) -> int:
        return self.unroll * self.rows

    def halved(self) -> Tile:
        """Half the rows, for a kernel that holds two images."""
        return dataclasses.replace(self, unroll=self.unroll // 2)

    def constexprs(self, vec: int) -> dict[str, Any]:
        return {"VEC": vec, "UNROLL": self.unroll, "ROWS": self.rows, "BLOCK_C": self.block_c}


# Predicted, not measured: a block of 32 channels keeps a row's segment at 64 bytes of a 16-bit type, the unit that HBM
# transfers; 16 channels are only for tensors that have no more, where rows follow each other without a gap.
TILES = tuple(Tile(block_c=c, rows=1024 // c) for c in (16, 32, 64, 128))


# Where no access is wider than an element; a larger tile would spill in fp16. No published architecture has such
# channel counts.
RAGGED_TILE = Tile(block_c=32, rows=16, unroll=2)


def tile_for(channels: int) -> Tile:
    """The widest tile that leaves no more than an eighth more lanes idle than the best one."""
    if vector_width(channels) == 1:
        return RAGGED_TILE
    if channels <= 16:
        return TILES[0]
    waste = {t: cdiv(channels, t.block_c) * t.block_c / channels for t in TILES[1:]}
    best = min(waste.values())
    return max((t for t in waste if waste[t] <= best * 1.125), key=lambda t: t.block_c)


def vector_width(channels: int) -> int:
    """VEC: 8 where every row of a 16-bit type starts on 16 bytes, else 1."""
    return 8 if channels % 8 == 0 else 1


MAX_ROWS = 2**30  # row numbers are 32-bit in the kernels, element offsets 64-bit
MAX_PARTIALS = 1024
PROGRAMS = 8  # wanted of a reduction for each multiprocessor
MAX_STEPS = 8  # tiles a program; a partial is then a hundredth of what was read


def rows_per_program(rows: int, tile: Tile, lanes: int, card: Gpu, most: int = MAX_PARTIALS) -> int:
    """How many of `rows` one program of a reduction walks, `lanes` such walks going on side by side.

    Predicted, not measured: PROGRAMS before MAX_STEPS, and never more than `most` partials.
    """
    tiles = cdiv(rows, tile.height)
    steps = min(max(tiles * lanes // (PROGRAMS * card.multiprocessors), 1), MAX_STEPS)
    return tile.height * max(steps, cdiv(tiles, most))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class KernelError(RuntimeError):
    """A kernel could not be compiled or does not fit the card, in one sentence; the cause is chained."""


def explained(error: Exception, kernel: str, card: Gpu) -> Exception | None:
    """What to raise instead of an error that Triton raised while it compiled, loaded or launched `kernel`; None for one
    that is not of that kind, such as a fault of the running kernel, after which the device is lost."""
    remedy = "pass impl='torch'"
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | triton.runtime.InterpreterError):
        return None
    if isinstance(error, triton.OutOfResources):
        return KernelError(
            f"{kernel} needs {error.required:,} of {error.name} and {card.name} has {error.limit:,}: {remedy}"
        )
    if "C compiler" in text or isinstance(error, subprocess.CalledProcessError | FileNotFoundError):
        return KernelError(
            f"Triton needs a C compiler and Python's headers to launch {kernel} and could not use them: install gcc "
            f"and python3-dev, name a compiler in CC, or {remedy}"
        )
    if isinstance(error, OSError):
        return KernelError(
            f"Triton could not keep what it compiled ({error}): set TRITON_CACHE_DIR to a folder with room, or {remedy}"
        )
    if "Triton Error [CUDA]" in text:
        if "out of memory" in text:
            return torch.OutOfMemoryError(f"CUDA out of memory while {kernel} was loaded.")
        if not any(words in text for words in ("image", "PTX", "resources", "invalid device function", "toolchain")):
            return None
    elif not isinstance(error, triton.TritonError) and not any(
        words in text for words in ("PassManager", "ptxas", "active drivers")
    ):
        return None
    first = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), type(error).__name__)
    return KernelError(f"{kernel} could not be compiled for {card.name} ({type(error).__name__}: {first}): {remedy}")


class Launch(NamedTuple):
    """One launch of `kernel`: `device` and keywords as `launch` takes them, `options` all that goes beside `args`."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    device: torch.device
    options: dict[str, Any]
    site: Site | None

    def run(self) -> None:
        """KernelError where it cannot be compiled for this card or does not fit it."""
        try:
            with on(self.device):
                self.kernel[self.grid](*self.args, **self.options)
        except Exception as error:
            understood = explained(error, self.kernel.fn.__name__.strip("_"), gpu(self.device))
            if understood is None:
                raise
            raise understood from error


class StandIn:
    """What a compilation depends on of a tensor, without its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.remainder = 0 if tensor.is_meta else tensor.data_ptr() % 16

    def data_ptr(self) -> int:
        return self.remainder


Observer = Callable[[Site | None, Callable[[], None]], None]
# Of the process, not of a thread: autograd runs backward in threads of its own.
_observer: Observer | None = None
_recorded: list[Launch] | None = None


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Call `observer(site, run)` in place of each launch, as long as the block runs; it must call `run()`."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


@contextmanager
def dry() -> Iterator[list[Launch]]:
    """Launch nothing, as long as the block runs, and list what would have been, for `compile_all`. What the launches
    would have written stays as it was allocated; they keep no tensor alive."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    like: Tensor,
    num_warps: int,
    site: Site | None = None,
    **constexprs: Any,
) -> None:
    """Run `kernel` on the device of `like`; `maxnreg` may be among the keywords.

    site: where the launch's time depends on that site's configuration, also for the sums of its partial results.
    Raises KernelError where the kernel cannot be compiled or does not fit the card.
    """
    options = {"num_warps": num_warps, "num_stages": 1, **constexprs}
    if _recorded is not None:
        stand_ins = tuple(StandIn(arg) if isinstance(arg, Tensor) else arg for arg in args)
        _recorded.append(Launch(kernel, grid, stand_ins, like.device, options, site))
        return
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(
            f"a fastnet Triton operation was called on {like.device.type} tensors: set TRITON_INTERPRET=1 before "
            "importing triton, or call the public function with impl='auto'"
        )
    job = Launch(kernel, grid, args, like.device, options, site)
    if _observer is None:
        job.run()
    else:
        _observer(site, job.run)


class _Loading:
    """An executor for Triton's compilations that also loads each onto its device, which the first launch would do."""

    def __init__(self, pool: ThreadPoolExecutor, device: torch.device) -> None:
        self.pool, self.device = pool, device

    def submit(self, compilation: Callable[[], Any]) -> Future[Any]:
        return self.pool.submit(self._compile_and_load, compilation)

    def _compile_and_load(self, compilation: Callable[[], Any]) -> Any:
        kernel = compilation()
        with on(self.device):
            kernel.run  # noqa: B018 (a property that loads)
        return kernel


def compile_all(
    launches: Sequence[Launch], threads: int = 8, progress: Callable[[int, int], None] | None = None
) -> int:
    """Compile what these launches need and load it, `threads` side by side, so that they find it; returns how many
    were not compiled before. `progress(done, all)` is called after each.

    One that fails is left out: its launch will say why.
    """
    if INTERPRETED or not launches:
        return 0
    from triton.runtime._async_compile import AsyncCompileMode

    done = 0
    for device in dict.fromkeys(launch.device for launch in launches):
        with (
            ThreadPoolExecutor(threads) as pool, on(device),
            AsyncCompileMode(_Loading(pool, device), ignore_errors=True) as mode,
        ):  # fmt: skip
            for job in launches:
                if job.device == device:
                    job.kernel.warmup(*job.args, grid=job.grid, **job.options)
            for _ in as_completed(mode.raw_futures):
                done += 1
                if progress is not None:
                    progress(done, len(mode.raw_futures))
    return done
