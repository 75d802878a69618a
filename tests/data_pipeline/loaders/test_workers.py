"""What worker processes print, and what a loader makes of their deaths, wherever these surface."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import Index, build_index
from data_pipeline.loaders.torch_loader import TorchLoader
from tests.batches import everything, make, same, write_photos


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(write_photos(tmp_path_factory.mktemp("photos")), cache_dir=tmp_path_factory.mktemp("index"))


def run(script: str, *arguments: object) -> tuple[str, str]:
    """What a process prints that ends well."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    "error",
    [
        EOFError(), ConnectionResetError(104, "Connection reset by peer"), FileNotFoundError(2, "No such file"),
        RuntimeError("unable to open shared memory object </torch_1> in read-write mode"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("place", ["_begin", "_next"])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_replaced(
    index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    place: str,
) -> None:
    whole = everything(make(index, "none", tmp_path, workers=0, backend="torch"))
    inner, raised = getattr(TorchLoader, place), list[bool]()

    def once(loader: TorchLoader) -> Any:
        if not raised:
            raised.append(True)
            raise error
        return inner(loader)

    monkeypatch.setattr(TorchLoader, place, once)
    assert same(everything(make(index, "none", tmp_path, workers=0, backend="torch")), whole)
    assert caplog.text.count("a data loading worker died") == 1


BOTH = """
import os, signal, sys, time
from data_pipeline import build_index, make_loader
index = build_index(sys.argv[1], cache_dir=sys.argv[2])
def children():
    return {int(pid) for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split()}
def begun(split):
    before = children()
    loader = make_loader(index, split, backend="torch", resolution=24, batch_size=2, seed=0, train=split == "train",
                         augmentation=None, workers=1)
    whole = [images.sum().item() for images, _ in loader.batches(0)]
    return loader, whole, children() - before
train, whole, own = begun("train")
val, _, others = begun("val")
doomed, inner = [own, others], train._next
def waits():
    if doomed:
        for pid in doomed.pop(0):
            os.kill(pid, signal.SIGKILL)
        time.sleep(30)  # until it is told
    return inner()
train._next = waits
print("same", [images.sum().item() for images, _ in train.batches(0)] == whole, doomed)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
def test_the_workers_of_both_loaders_are_killed(index: Index, tmp_path: Path) -> None:
    """The one that waits is told of all, one after the other."""
    said, errors = run(BOTH, index.root, tmp_path)
    assert said == "same True []\n", said + errors
    assert errors.count("others go on") == 2
    assert "Traceback" not in errors


FULL = """
import os, sys
from multiprocessing.reduction import ForkingPickler
import torch
from data_pipeline import DataError, build_index, make_loader
index = build_index(sys.argv[1], cache_dir=sys.argv[2])
loader = make_loader(index, "train", backend="torch", resolution=24, batch_size=2, seed=0, train=True,
                     augmentation=None, workers=1)
def full(storage):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")
ForkingPickler.register(torch.UntypedStorage, full)
try:
    list(loader.batches(0))
except DataError as error:
    print(error)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
def test_shared_memory_that_is_full_is_said_and_not_waited_for(index: Index, tmp_path: Path) -> None:
    said, errors = run(FULL, index.root, tmp_path)
    assert said.startswith("A data loading worker died ("), said + errors
    assert "/dev/shm" in said
    assert errors.count("cannot hand over a batch (unable to allocate shared memory(shm)") == 3
    assert "Traceback" not in errors


INHERITED = """
import gc, os, signal, sys
gc.disable()
from torch.utils.data import DataLoader
from data_pipeline import build_index, make_loader
from data_pipeline.loaders import torch_loader
inner = torch_loader.decoded
def decoded(*rest):
    gc.collect()
    with open(sys.argv[3], "a") as file:
        file.write(f"{gc.isenabled()} {signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL}\\n")
    return inner(*rest)
torch_loader.decoded = decoded
index = build_index(sys.argv[1], cache_dir=sys.argv[2])
loader = make_loader(index, "train", backend="torch", resolution=24, batch_size=2, seed=0, train=True,
                     augmentation=None, workers=1)
for _ in range(2):
    for batch in loader.batches(0):
        pass
    loader.close()
    left = [iter(DataLoader(range(4), num_workers=1))]
    left.append(left)
    del left  # uncollected
assert not gc.isenabled()
"""


@pytest.mark.slow
def test_workers_leave_alone_what_they_inherit(index: Index, tmp_path: Path) -> None:
    """A trainer's iterator that is collected in a worker would tell the trainer's other workers to end; and a death is
    not told of while processes are started."""
    _, errors = run(INHERITED, index.root, tmp_path, tmp_path / "seen")
    assert set((tmp_path / "seen").read_text().splitlines()) == {"True True"}
    assert errors == ""
