"""Memory that a CPU's process keeps: what it does to page faults and peaks, and that no import does it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch

from fastnet import allocator

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

BLOCKS = """
import json, resource, sys
import torch
from fastnet import allocator, evaluate, export, predict, summary, train
from fastnet.training import trainer
if sys.argv[1] == "keep":
    allocator.keep_memory(torch.device("cpu"))

def touch():
    return len([torch.ones(size << 18) for size in (8, 40, 3, 64)])

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, allocator.kept_memory()]))
"""

EPOCHS = """
import json, re, sys
import torch
from fastnet import allocator
from fastnet.model import efficientnet
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    allocator.keep_memory(torch.device("cpu"))
model = efficientnet("b0", num_classes=3, kernels="torch").to(memory_format=torch.channels_last)

def peak():  # the child's own: getrusage's begins with what its parent had
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

def step(images):
    batch = torch.randn(images, 3, 40, 40).contiguous(memory_format=torch.channels_last)
    model.train()(batch).square().mean().backward()
    model.zero_grad()

peaks = [peak()]
for epoch in range(40):
    step(12)
    if epoch % 8 == 0:
        step(7)  # a last batch
        with torch.no_grad():
            model.eval()(torch.randn(16, 3, 40, 40))
    peaks.append(peak())
print(json.dumps(peaks))
"""


def child(program: str, mode: str) -> Any:
    found = subprocess.run([sys.executable, "-c", program, mode], capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.slow
@GLIBC
def test_blocks_that_come_again_take_no_page_faults_and_imports_change_nothing() -> None:
    pages = (8 + 40 + 3 + 64) << 20 >> 12
    faults, said = child(BLOCKS, "keep")
    assert faults < pages  # of ten rounds, less than one round's
    assert "stays with the process" in said
    faults, said = child(BLOCKS, "import")
    assert faults > 5 * pages
    assert said is None


@GLIBC
@pytest.mark.slow
def test_peak_memory_is_flat_over_40_epochs_and_grows_by_a_fifth_at_most() -> None:
    kept, given_back = child(EPOCHS, "keep"), child(EPOCHS, "off")
    assert kept[-1] <= 1.2 * given_back[-1]
    assert kept[-1] <= 1.02 * kept[8]


def test_nothing_happens_for_a_gpu_or_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_kept", None)
    allocator.keep_memory(torch.device("cuda"))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    allocator.keep_memory(torch.device("cpu"))
    assert allocator.kept_memory() is None
