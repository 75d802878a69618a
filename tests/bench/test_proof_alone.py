"""The proof where only torch, triton, numpy, pytest and what these need are: nothing else is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.stages import ROOT

# Python imports this module before anything else, in every process of the proof's too.
SITE = '''
import importlib.metadata as metadata
import re
import sys

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

ALLOWED = set()
waiting = ["torch", "triton", "numpy", "pytest"]
while waiting:
    name = normal(waiting.pop())
    if name not in ALLOWED:
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        ALLOWED.add(name)
        waiting += [re.match(r"[\\w.-]+", line).group() for line in needed if "extra ==" not in line]

PROVIDERS = {module: {normal(d) for d in names} for module, names in metadata.packages_distributions().items()}

class Hiding:
    """A finder that finds what it found, but for modules of other packages."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        providers = PROVIDERS.get(name.partition(".")[0], ALLOWED)
        wanted = providers & (ALLOWED | PROVIDERS.get("fastnet", set()))
        return self.finder.find_spec(name, path, target) if wanted else None

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
discover = metadata.Distribution.discover  # pytest finds its plugins by it
metadata.Distribution.discover = lambda **given: (d for d in discover(**given) if normal(d.metadata["Name"]) in ALLOWED)
'''


def alone(folder: Path, *command: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python with nothing but these packages; `without` takes one of them away too."""
    site = SITE.replace(f'"{without}"', '"torch"') if without else SITE
    (folder / "sitecustomize.py").write_text(site)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    # One thread: where other tests run beside, two of OpenMP's wait for each other more than they work.
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment
    )  # fmt: skip


@pytest.mark.slow
def test_nothing_else_can_be_imported(tmp_path: Path) -> None:
    program = """
import importlib.util
import numpy, pytest, torch, triton

for name in ("torchvision", "timm", "tyro", "rich", "PIL", "hypothesis", "pytest_benchmark", "nvidia.dali", "xdist"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")
"""
    done = alone(tmp_path, "-c", program)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this would be the proof itself")
def test_first_part_runs_on_torch_triton_numpy_and_pytest_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = alone(tmp_path, "-m", "bench.proof", "--part", "1", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: torchvision: torchvision is not installed" in done.stdout
    (file,) = out.glob("*.json")
    stages = json.loads(file.read_text())["stages"]
    assert {entry["state"] for entry in stages.values()} == {"done"}
    assert stages["parity"]["cases"]["test_drop_connect"]["passed"] > 0
    assert list(stages["steps"]["cases"]["b0@64 batch 4"]["contenders"]) == ["fastnet, eager", "fastnet torch, eager"]


@pytest.mark.slow
def test_without_pytest_the_parity_stage_is_left_out(tmp_path: Path) -> None:
    program = """
import time
import torch
from bench.proof.parity import parity
from bench.stages import Context

context = Context(torch.device("cpu"), time.monotonic() + 60, {})
assert list(parity([]).run(context)) == []
print(context.left_out)
"""
    done = alone(tmp_path, "-c", program, without="pytest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the kernels' tests: pytest is not installed" in done.stdout
