"""Would the tests notice? Each of these changes to the C++ sources has to break the parity of a block or a layer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from kernels.cpu import build as builds
from kernels.cpu.library import Library, using
from tests.kernels.block.test_mbconv import Block, inputs, run
from tests.kernels.cpu import test_layer
from tests.kernels.cpu.test_ops import DRAWS
from tests.parity import Outcome, hold

# Source, what is there, what is put there. Small ones: a term, an index, a bound, a count.
MUTATIONS = (
    (
        "common.h",
        "(norm.bn_scale + c) + (x - load(norm.mean + c)) *",
        "(norm.bn_scale + c) - (x - load(norm.mean + c)) *",
    ),
    ("common.h", "delta * delta * n * k / (n + k)", "delta * delta * k / (n + k)"),
    ("depthwise.cpp", "ky && oy < map.out_height;", "ky && oy < map.out_height - 1;"),
    ("depthwise.cpp", "v *= load(dsilu + ix * LANES);", "v *= load(dsilu);"),
    ("project.cpp", "mine * dsilu_sums[n * channels + c];", "dsilu_sums[n * channels + c];"),
    ("project.cpp", "(float)total[c] * open * (1.0f - open);", "(float)total[c] * open;"),
    ("pointwise.cpp", "v += load(residual + at, left);", "v += load(residual + at, left) * 1.01f;"),
    ("layer.cpp", "O* to = out + (ky * k + first) * channels;", "O* to = out + ky * k * channels;"),
    ("layer.cpp", "slanted += v * (raw - centre);", "slanted += v * raw;"),
)
BLOCK = Block(10, 10, 6, 3, 1, (5, 7))


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests' tensors are on a GPU here")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation[0]}: {mutation[2][:50]}")
def test_a_mutation_is_seen(mutation: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, before, after = mutation
    sources = tmp_path / "src"
    shutil.copytree(builds.SOURCES, sources)
    text = (sources / name).read_text()
    assert text.count(before) == 1
    (sources / name).write_text(text.replace(before, after))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = Library(builds.build("plain", ("-O1",), sources=sources))
    with using(library), pytest.raises(AssertionError):
        _hold_both()


def _hold_both() -> None:
    hold(_block, draws=DRAWS)
    hold(_layer, draws=DRAWS)


def _block(seed: int = 0) -> Outcome:
    values = inputs(BLOCK, seed)
    kernel, pytorch = run(BLOCK, values.to(None), "native"), run(BLOCK, values.to(None), "torch")
    return Outcome(kernel, pytorch, run(BLOCK, values.to(torch.float64), "torch"), [])


def _layer(seed: int = 0) -> Outcome:
    case = test_layer.CASES[0]
    exact = test_layer.run(case, "torch", torch.float64, seed)
    return Outcome(test_layer.run(case, "native", None, seed), test_layer.run(case, "torch", None, seed), exact, [])
