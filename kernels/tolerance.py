"""The tolerance rule: when a kernel is right, and by how much it is wrong.

Tensor by tensor and in the maximum norm,

    |kernel - oracle|  <=  2 |pytorch - oracle|  +  rounding  +  approximation

The oracle is the same operation by PyTorch in fp64 on the very values that the kernel was given; pytorch is the
operation by PyTorch in the kernel's own precision; rounding is one rounding to the output type, half a unit in the last
place at the oracle's largest value. No tolerance is chosen by hand.

**approximation** is what the formula owes to instructions that do not round correctly. The kernels have two of them, in
`kernels.batch_norm.sigmoid`: s = rcp(1 + ex2(t)), t = -z log2(e), which the PTX ISA documents as within EX2_ULP and
RCP_ULP units in the last place. With u = 2⁻²³, an upper bound of such a unit relative to the value, and e = exp(-z):

    t      two roundings (of log2(e) and of the product, u / 2 each) move it by |t| u, and so e by |z| u relatively
    e      |Δe| / e  <=  (EX2_ULP + |z|) u
    s      Δs / s = -Δe / (1 + e) + Δrcp, and e / (1 + e) = 1 - s:
           |Δs| / s  <=  ((EX2_ULP + |z|) (1 - s) + RCP_ULP) u            2 u at z = 0, 1 u where s is 1

(The rounding of 1 + e is PyTorch's too.) From there the error goes the way of the formula: SiLU a = z s is off by
|z Δs|, the same relative error; its derivative s + a (1 - s) by |1 + z (1 - 2 s)| |Δs|, a gate by |Δs|; a sum over
pixels by up to the sum of its terms' errors, a batch norm behind it by that over a standard deviation. How much of it
reaches a given output or gradient, and what cancels on the way, no constant says, but the formula does: `approximated`
evaluates the oracle again with every sigmoid moved by the bound above, and the term is how far its results move.
The bound gives sizes, not signs. Errors of one sign add up wherever terms do, and cancel in sums whose terms have both;
errors whose sign changes from value to value, as a table's do, add up as the root of their number in any sum. Both are
evaluated, and the larger counts. A sigmoid of the same z has the same error each time, forward and backward, as in
hardware.

The term is some 1e-7 of a value: it matters to fp32, and is lost beside one rounding of a 16-bit type. Left out, the
rule is only stricter, which is what a check of 16-bit results does to save the evaluations.

rsqrt, too, is an approximation on a GPU, but PyTorch's batch norm takes the same instruction there, so that its error
is among PyTorch's. A division (div.full, within 2 units) occurs over vectors alone, in means, which what is left of
their deviations corrects, and once in a variance, whose root halves it.

A result that breaks the rule is wrong by `Errors.share`. It is `gross` where it holds a value that is not finite, or
lies further than GROSS of the oracle's largest value from it: then it is not a matter of rounding. No chain of bf16
roundings (half a unit is 1/256 of a value, and sums are kept in fp32) nor a product in tf32 comes near that; a mask, an
index or a term gone wrong does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EX2_ULP, RCP_ULP = 2, 1
UNIT = 2.0**-23  # a unit in the last place of fp32, relative to the smallest value that has it
GROSS = 0.1
SIGNS = ("one", "changing")
T = TypeVar("T")


class Errors(NamedTuple):
    """Of one tensor, in the maximum norm; `kernel` is infinite where a value is not finite."""

    kernel: float
    pytorch: float
    rounding: float
    approximation: float
    size: float
    """The oracle's largest value."""

    @property
    def allowed(self) -> float:
        return 2 * self.pytorch + self.rounding + self.approximation

    @property
    def share(self) -> float:
        """The error as a share of what is allowed; above 1 the kernel is wrong."""
        if self.kernel <= self.allowed:
            return self.kernel / self.allowed if self.kernel else 0.0
        return self.kernel / self.allowed if self.allowed else float("inf")

    @property
    def right(self) -> bool:
        return self.kernel <= self.allowed

    @property
    def gross(self) -> bool:
        return not self.right and not self.kernel <= GROSS * self.size

    def __str__(self) -> str:
        if self.kernel == float("inf"):
            return "gross: NaN or inf"
        return (
            f"{'gross: ' * self.gross}error {self.kernel:.3e} against {self.allowed:.3e} allowed ({self.share:.2f} "
            f"times), largest value {self.size:.3e}"
        )


def distance(value: Tensor, oracle: Tensor) -> float:
    """The largest difference; infinite where `value` has a NaN or an infinity that the oracle has not."""
    found = float(torch.linalg.vector_norm(value - oracle, float("inf"))) if oracle.numel() else 0.0
    return found if found < float("inf") else float("inf")


def measure(kernel: Tensor, pytorch: Tensor, oracle: Tensor, approximated: Iterable[Tensor] = ()) -> Errors:
    """The errors of one result. `approximated` are the oracle's under `approximated()`; without them that term is 0.

    Where PyTorch's own result is not finite it allows nothing.
    """
    size = float(torch.linalg.vector_norm(oracle, float("inf"))) if oracle.numel() else 0.0
    theirs = distance(pytorch, oracle)
    return Errors(
        distance(kernel, oracle),
        theirs if theirs < float("inf") else 0.0,
        torch.finfo(kernel.dtype).eps * size / 2,
        max((distance(moved, oracle) for moved in approximated), default=0.0),
        size,
    )


def worst(draws: Iterable[Errors]) -> Errors:
    """Each error's largest over several draws of the input: on one of them PyTorch may be right by luck, in a gradient
    of a handful of values."""
    return Errors(*map(max, zip(*draws, strict=True)))


def most_wrong(errors: Iterable[Errors]) -> Errors:
    """Of several tensors' the one with the largest share, a gross one before all others."""
    return max(errors, key=lambda found: (found.gross, found.share))


class ApproximateSigmoid(TorchDispatchMode):
    """Moves every sigmoid that PyTorch evaluates, and SiLU's and their gradients' with it, by what `sigmoid` of the
    kernels may be off; for fp64 tensors, whose own rounding is far below."""

    def __init__(self, sign: str) -> None:
        super().__init__()
        self.sign = sign
        aten = torch.ops.aten
        self.replaced: dict[Any, Callable[..., Tensor]] = {
            aten.sigmoid.default: self.sigmoid,
            aten.silu.default: self.silu,
            aten.silu_.default: lambda z: z.copy_(self.silu(z)),
            aten.silu_backward.default: self.silu_backward,
        }

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replaced = self.replaced.get(func)
        if replaced is None or args[0].dtype != torch.float64:
            return func(*args, **(kwargs or {}))
        return replaced(*args)

    def sigmoid(self, z: Tensor) -> Tensor:
        s = torch.special.expit(z)
        error = ((EX2_ULP + z.abs()) * torch.special.expit(-z) + RCP_ULP) * UNIT
        return s + s * error * self.signs(z)

    def signs(self, z: Tensor) -> Tensor | float:
        if self.sign == "one":
            return 1.0
        # Weyl's sequence over the bits of z as fp32: the sign is the highest bit of a product with 2^64 / φ.
        bits = z.float().view(torch.int32).long() * -0x61C8864680B583EB
        return torch.where(bits < 0, -1.0, 1.0).to(z.dtype)

    def silu(self, z: Tensor) -> Tensor:
        return z * self.sigmoid(z)

    def silu_backward(self, gradient: Tensor, z: Tensor) -> Tensor:
        s = self.sigmoid(z)
        return gradient * (s + z * s * (1 - s))


def approximated(run: Callable[[], T]) -> list[T]:
    """What `run`, an evaluation of the oracle in fp64, gives with its sigmoids off as a GPU's may be: once for each way
    that their signs can go."""
    found = []
    for sign in SIGNS:
        with ApproximateSigmoid(sign):
            found.append(run())
    return found
