"""The block's operations as an Arm CPU with NEON computes them, in an emulator; nothing is timed.

pip install ziglang unicorn && python -m pytest tests/kernels/cpu/test_arm.py
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.cpu.library import Library, using
from tests.kernels.block.test_mbconv import Block, inputs, run
from tests.kernels.cpu.test_ops import BLOCKS
from tests.parity import Outcome, hold

pytest.importorskip("ziglang", reason="no ziglang, which compiles for other machines: pip install ziglang unicorn")
pytest.importorskip("unicorn", reason="no unicorn, which emulates them: pip install ziglang unicorn")

pytestmark = pytest.mark.full
DRAWS = 8


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.arm import compiled

    return compiled(tmp_path_factory.mktemp("arm"))


@pytest.fixture
def neon(program: Path) -> Library:
    from tests.arm import Emulated

    return Emulated(program)


def held(block: Block, neon: Library) -> None:
    @functools.cache
    def outcome(seed: int) -> Outcome:
        values = inputs(block, seed)
        with using(neon):
            kernel = run(block, values.to(None), "native")
        return Outcome(kernel, run(block, values.to(None), "torch"), run(block, values.to(torch.float64), "torch"), [])

    hold(outcome, draws=DRAWS)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_parity(block: Block, neon: Library) -> None:
    held(block, neon)


def test_a_fault_is_seen(neon: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = neon.call

    def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
        inner(name, dtype, *arguments)
        if name == "project":
            arguments[-1].mul_(1.0001)

    monkeypatch.setattr(neon, "call", call)
    with pytest.raises(AssertionError):
        held(BLOCKS[0], neon)
