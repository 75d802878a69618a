"""Files that become unreadable and workers that die cost themselves alone, or end in one sentence."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import Augmentation, DataError, Index
from data_pipeline.dataset.index import Split
from data_pipeline.loaders.augment import epoch_order
from data_pipeline.loaders.loader import Plan
from tests.batches import same
from tests.loaders import BACKENDS, everything, make, two_folders

pytestmark = pytest.mark.slow

DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"x" * 999),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "other size": lambda path: Image.new("RGB", (9, 9)).save(path),
}


@pytest.mark.parametrize(("backend", "workers"), [("torch", 0), ("torch", 2), ("dali", 1)])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_goes_bad_is_named_and_left_out(
    tmp_path: Path, backend: str, workers: int, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """8 images in batches of 3: training leaves two over, of which the first takes the bad one's row."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    index = two_folders(tmp_path)
    made = {split: make(index, split, backend=backend, workers=workers, batch_size=3) for split in ("train", "val")}
    before = {split: everything(one) for split, one in made.items()}
    order = epoch_order(3, 0, 8)
    bad = {"train": int(order[4]), "val": 4}
    DAMAGES[damage](Path(index.splits["train"].paths[bad["train"]]))
    DAMAGES[damage](Path(index.splits["val"].paths[bad["val"]]))

    train = everything(made["train"])
    assert same(train[:1], before["train"][:1])
    assert torch.equal(train[1].images[[0, 2]], before["train"][1].images[[0, 2]])
    assert not torch.equal(train[1].images[1], before["train"][1].images[1])
    assert made["train"].plan.order(0).tolist() == [*order[:4], order[6], order[5]]
    assert train[1].labels.tolist() == index.splits["train"].labels[[order[3], order[6], order[5]]].tolist()

    val = everything(made["val"])
    assert [len(batch.labels) for batch in val] == [3, 2, 2]
    assert same([val[0], val[2]], [before["val"][0], before["val"][2]])
    assert torch.equal(val[1].images, before["val"][1].images[[0, 2]])

    for split, one in made.items():
        path = index.splits[split].paths[bad[split]]
        assert [name for name, _ in one.quarantined] == [path]
        (said,) = (record.getMessage() for record in caplog.records if path in record.getMessage())
        assert "\n" not in said
        assert same(everything(one), train if split == "train" else val)
        assert len(one.quarantined) == 1
        one.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_data_set_that_vanishes_stops_the_run_in_one_sentence(tmp_path: Path, backend: str) -> None:
    index = two_folders(tmp_path, each=12)
    made = make(index, backend=backend, batch_size=4)
    batches = made.batches(0)
    next(batches)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(DataError, match="of 24 images can no longer be decoded") as caught:
        list(batches)
    assert str(tmp_path / "train") in str(caught.value)
    assert str(caught.value).endswith("continue with --resume.")
    made.close()


@given(
    n=st.integers(1, 40), size=st.integers(1, 12), epoch=st.integers(0, 3), bad=st.sets(st.integers(0, 39), max_size=12)
)
def test_quarantine_changes_no_other_row(n: int, size: int, epoch: int, bad: set[int]) -> None:
    """Nothing is seen twice while there are images to spare, nothing but the bad ones is lost, and who is found first
    makes no difference."""
    bad = {index for index in bad if index < n}
    if 2 * len(bad) > n or n < size:
        return
    split = Split(
        ("",) * n, np.zeros(n, np.int64), np.full((n, 2), 40, np.int32), np.ones(n, np.uint8), np.zeros(n, np.uint8)
    )
    whole = Plan(split, 8, size, 1, True, Augmentation()).order(epoch)
    plan = Plan(split, 8, size, 1, True, Augmentation(), frozenset(bad))
    order = plan.order(epoch)
    good = ~np.isin(whole, list(bad))
    assert (order[good] == whole[good]).all()
    assert not set(order.tolist()) & bad
    repeats = len(order) - len(set(order.tolist()))
    assert repeats == max(0, len(order) - (n - len(bad)))
    seen: list[int] = []  # as a loader finds them, one after another
    growing = Plan(split, 8, size, 1, True, Augmentation())
    for at in range(len(order)):
        while (image := int(growing.order(epoch)[at])) in bad:
            growing.quarantined |= {image}
        seen.append(image)
    assert seen == order.tolist()


def test_a_worker_that_dies_is_reported(index: Index) -> None:
    # In a process of its own: a fork of this one would inherit the threads of every backend that ran in it.
    code = f"""if True:
        import os
        from data_pipeline import DataError, build_index, make_loader
        from data_pipeline.loaders import torch_loader

        torch_loader.decoded = lambda *_: os._exit(9)
        made = make_loader(
            build_index({str(index.root)!r}), "train", train=True, backend="torch", resolution=24, batch_size=5,
            seed=3, workers=1, augmentation=None,
        )
        try:
            list(made.batches(0))
        except DataError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "worker died" in done.stdout
    assert "--workers" in done.stdout


INTERRUPTED = """
import os, signal, sys, time
from data_pipeline import build_index, make_loader
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
index = build_index(sys.argv[1], cache_dir=sys.argv[2])
loader = make_loader(index, "train", backend="torch", resolution=24, batch_size=2, seed=0, train=True,
                     augmentation=None, workers=2)
try:
    for number, _ in enumerate(loader.batches(0)):
        if number == 1:
            os.killpg(0, signal.SIGINT)  # what a terminal does on Ctrl-C
            time.sleep(60)
except KeyboardInterrupt:
    print("stopped")
"""


def test_ctrl_c_leaves_no_tracebacks_of_workers(index: Index, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(index.root), str(tmp_path)],
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("stopped\n", "", 0)


BETWEEN = """
import os, signal, sys, time
from data_pipeline import build_index, make_loader
index = build_index(sys.argv[1], cache_dir=sys.argv[2])
loader = make_loader(index, "train", backend="torch", resolution=24, batch_size=2, seed=0, train=True,
                     augmentation=None, workers=1)
passes = []
for epoch in (0, 0):
    passes.append([images.sum().item() for images, _ in loader.batches(epoch)])
    for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split():
        os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.1)
print("same", passes[0] == passes[1], len(passes[1]))
os._exit(0)
"""


def test_a_worker_that_dies_between_two_passes_is_replaced(index: Index, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BETWEEN, str(index.root), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert f"same True {len(index.splits['train']) // 2}" in done.stdout, done.stdout + done.stderr


STORM = """
import os, signal, subprocess, sys
from pathlib import Path
from data_pipeline import build_index, make_loader
from data_pipeline.loaders import torch_loader
inner, flag = torch_loader.decoded, Path(sys.argv[3])
def decoded(*rest):
    if not flag.exists() and sys.argv[4] == "dies":
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory ends
    return inner(*rest)
torch_loader.decoded = decoded
index = build_index(sys.argv[1], cache_dir=sys.argv[2])
loader = make_loader(index, "train", backend="torch", resolution=24, batch_size=2, seed=0, train=True,
                     augmentation=None, workers=2)
seen = 0
for number, batch in enumerate(loader.batches(0)):
    if number == 0 and sys.argv[4] == "storm":
        workers = [int(pid) for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split()]
        for pid in workers:
            for name in ("TERM", "HUP", "USR1", "INT"):
                subprocess.run(["kill", "-" + name, str(pid)], check=True)  # not from their parent
        print("workers", *workers)
        sys.stdout.flush()
    seen += len(batch.labels)
print("seen", seen, signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL)
sys.stdout.flush()
if sys.argv[4] == "storm":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("what", ["storm", "dies"])
def test_workers_outlive_signals_to_the_whole_job_and_not_their_parent(index: Index, tmp_path: Path, what: str) -> None:
    """What systemd and Slurm send to every process of a job does not take the workers from the trainer; a worker that
    is killed is replaced; and workers end with a parent that is."""
    command = [sys.executable, "-c", STORM, str(index.root), str(tmp_path), str(tmp_path / "flag"), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    images = len(index.splits["train"]) // 2 * 2
    assert f"seen {images} True" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == (-9 if what == "storm" else 0)
    if what == "dies":
        assert "a data loading worker died" in done.stderr
        return
    workers = [int(pid) for pid in done.stdout.splitlines()[0].split()[1:]]
    assert len(workers) == 2
    for _ in range(200):
        left = [pid for pid in workers if Path(f"/proc/{pid}/status").exists()]
        left = [pid for pid in left if "zombie" not in Path(f"/proc/{pid}/status").read_text()]
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(f"workers {left} outlived their parent")
