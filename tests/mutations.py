"""Breaks the kernels on purpose, one way at a time, and shows that the tests see it: `python -m tests.mutations`.

Each mutation replaces one piece of source text, which must occur exactly once, in a copy of the tree in a temporary
folder, and runs the tests named beside it there. A mutation that no test notices is a hole in the tests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("kernels", "fastnet", "data_pipeline", "bench", "tests", "pyproject.toml")


class StaleMutation(RuntimeError):
    """The text that a mutation replaces is not there exactly once: the source has moved on, so must the mutation."""


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Arguments for pytest."""

    def apply(self, source: str) -> str:
        found = source.count(self.old)
        if found != 1:
            raise StaleMutation(f"{self.name}: its text occurs {found} times in {self.file}, not once.")
        return source.replace(self.old, self.new)


BN_SILU = ("tests/kernels/ops/test_bn_silu.py", "-k", "test_bn_silu and fp32")
STATISTICS = ("tests/kernels/ops/test_bn_silu.py", "-k", "statistics")
SQUEEZE = ("tests/kernels/ops/test_squeeze_excite.py", "-k", "fp32")
DROP = ("tests/kernels/ops/test_drop_connect.py", "-k", "bn_drop_connect_add and fp32 and train")
DEPTHWISE = ("tests/kernels/block/test_depthwise.py", "-k", "sums and k3-s1-1x10")
POINTWISE = ("tests/kernels/block/test_pointwise.py", "-k", "test_pointwise and 22-6 and (forward or dgrad or wgrad)")
TOGETHER = (
    "tests/kernels/block/test_pointwise.py",
    "-k",
    "test_pointwise and bf16-3x3x5-32-8-16-walk and expansion_backward",
)

MUTATIONS = (
    Mutation(
        "missing channel mask on tiles",
        "kernels/batch_norm.py",
        "(rows < end) & (cols < channels)",
        "(rows < end) & (cols < BLOCK_C + c0)",
        BN_SILU,
    ),
    Mutation(
        "missing row mask in the statistics",
        "kernels/batch_norm.py",
        "tl.where(tl.reshape(mask, [UNROLL, ROWS, BLOCK_C]), deviation, 0.0)",
        "deviation",
        (*BN_SILU[:2], "statistics or test_bn_silu and fp32"),
    ),
    Mutation(
        "swapped strides of the partial sums",
        "kernels/batch_norm.py",
        "offsets = (k * partials + p).to(tl.int64) * channels + cols",
        "offsets = (p * 2 + k).to(tl.int64) * channels + cols",
        BN_SILU,
    ),
    Mutation(
        "unmerged mean: parts of unequal size weigh the same",
        "kernels/batch_norm.py",
        "tl.minimum(row_count - p * rows_per_program, rows_per_program)",
        "row_count / partials",
        STATISTICS,
    ),
    Mutation(
        "variance without the distance between means",
        "kernels/batch_norm.py",
        "m2 += tl.sum(deviation * deviation, axis=0) + delta * delta * (count * share)",
        "m2 += tl.sum(deviation * deviation, axis=0)",
        STATISTICS,
    ),
    Mutation(
        "wrong reduction: every image gets the first one's scale",
        "kernels/ops/drop_connect.py",
        "tl.load(drop_scale_ptr + rows // area,",
        "tl.load(drop_scale_ptr + rows * 0,",
        DROP,
    ),
    Mutation(
        "dropped term in backward: the mean's share of dx",
        "kernels/ops/bn_silu.py",
        "dz -= channel_vector(sums_ptr, c0, channels, BLOCK_C) * inverse_rows",
        "dz -= 0.0",
        BN_SILU,
    ),
    Mutation(
        "dropped term in backward: the variance's share of dx",
        "kernels/ops/drop_connect.py",
        "sums_ptr + channels, c0, channels, BLOCK_C) *",
        "sums_ptr + channels, c0, channels, BLOCK_C) * 0.0 *",
        DROP,
    ),
    Mutation(
        "dsilu of SiLU without its second term",
        "kernels/batch_norm.py",
        "return a, s + a * (1.0 - s)",
        "return a, s",
        BN_SILU,
    ),
    Mutation(
        "dropped term in backward: what a pixel receives through the mean",
        "kernels/ops/squeeze_excite.py",
        "d = dy * gate + channel_vector(q_ptr + image * channels, c0, channels, BLOCK_C)",
        "d = dy * gate",
        SQUEEZE,
    ),
    Mutation(
        "running variance biased",
        "kernels/batch_norm.py",
        "var * (rows / (rows - 1))",
        "var",
        ("tests/kernels/ops/test_bn_silu.py", "-k", "running"),
    ),
    Mutation(
        "padding activated: zero becomes silu(bias)",
        "kernels/block/depthwise.py",
        "x = tl.where(inside, z * sigmoid(z), 0.0)",
        "x = z * sigmoid(z)",
        DEPTHWISE,
    ),
    Mutation(
        "depthwise statistics without the distance between tiles' means",
        "kernels/block/depthwise.py",
        "all_m2 += m2 + delta * delta * (all_count * share)",
        "all_m2 += m2",
        ("tests/kernels/block/test_depthwise.py", "-k", "large_mean"),
    ),
    Mutation(
        "weight of the gradient mirrored",
        "kernels/block/depthwise_backward.py",
        "dx += d * weights[j % STRIDE + b * STRIDE]",
        "dx += d * weights[K - 1 - (j % STRIDE + b * STRIDE)]",
        DEPTHWISE,
    ),
    Mutation(
        "dropped term in backward: the variance's share of the depthwise gradient",
        "kernels/block/depthwise_backward.py",
        "(centred * grad_slope + grad_offset)",
        "grad_offset",
        DEPTHWISE,
    ),
    Mutation(
        "every image gets the first one's gate",
        "kernels/block/pointwise_operand.py",
        "tl.load(gate_ptr + (rows // area) * channels + cols,",
        "tl.load(gate_ptr + (rows * 0) * channels + cols,",
        POINTWISE,
    ),
    Mutation(
        "sums of the gate count rows of the next image",
        "kernels/block/pointwise_gemm.py",
        "end = tl.minimum(start + rows_per_program, (image + 1) * area)",
        "end = start + rows_per_program",
        POINTWISE,
    ),
    Mutation(
        "expansion's backward in one kernel without the residual's gradient",
        "kernels/block/expand_backward.py",
        "dx += tl.load(residual_ptr",
        "dx += 0.0 * tl.load(residual_ptr",
        TOGETHER,
    ),
    Mutation(
        "weight gradient of rows past the end",
        "kernels/block/pointwise_wgrad.py",
        "narrow = tl.where(row + tl.arange(0, BLOCK_M)[:, None] < end, narrow, 0.0).to(narrow.dtype)",
        "narrow = narrow",
        ("tests/kernels/block/test_pointwise.py", "-k", "test_pointwise and fp16 and 24-72-40 and projection_wgrad"),
    ),
)


def copy_tree(target: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def run_tests(folder: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """(pytest's exit status: 0 all passed, 1 some failed, others did not run; its last line)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow and not full", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode < 0:  # reading or writing out of bounds can kill the interpreter's process, which is noticed too
        return 1, f"killed by signal {-done.returncode}"
    return done.returncode, (done.stdout.strip().splitlines() or ["no output"])[-1]


def survives(mutation: Mutation) -> tuple[bool, str]:
    """(True if its tests pass all the same, pytest's last line). StaleMutation, or RuntimeError if nothing ran."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        copy_tree(folder)
        file = folder / mutation.file
        file.write_text(mutation.apply(file.read_text()))
        status, summary = run_tests(folder, mutation.tests)
    if status not in (0, 1):
        raise RuntimeError(f"{mutation.name}: its tests did not run: {summary}")
    return status == 0, summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="mutations whose name contains this")
    options = parser.parse_args(arguments)
    survivors = 0
    for mutation in (m for m in MUTATIONS if options.only in m.name):
        alive, summary = survives(mutation)
        survivors += alive
        print(f"{'SURVIVES' if alive else 'seen':<9} {mutation.name:<66} {mutation.file:<30} {summary}", flush=True)
    print(f"\n{survivors} mutations that no test sees")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
