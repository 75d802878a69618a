"""Two and three processes that torchrun starts: the same run as one process, stopped, lost and continued."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastnet.errors import UserError
from fastnet.training import distributed
from fastnet.training.cuda_graph import pick_cuda_graph
from fastnet.training.distributed import ALONE, Ranks, divide
from tests.forked import ROOT, Server
from tests.networks import NARROW


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 images to train on, 7 to evaluate: neither can be divided by 2 or 3 batches evenly."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, counts in (("train", (13, 13)), ("val", (4, 3))):
        for label, name in enumerate(("dark", "bright")):
            (root / split / name).mkdir(parents=True)
            for i in range(counts[label]):
                pixels = generator.integers(0, 100, (40, 48, 3), dtype=np.uint8) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.jpg")
    return root


def flags(data: Path, batch: int, *more: str) -> list[str]:
    return [
        "--data", str(data), "--loader", "torch", "--workers", "0", "--device", "cpu", "--resolution", "32",
        "--epochs", "2", "--log-every", "2", "--batch-size", str(batch), "--dropout", "0",
        "--lr", "0.01", "--model-ema", "--model-ema-decay", "0.5", "--mixup", "0.3", "--cutmix", "1", *more,
    ]  # fmt: skip


def seen(out: Path) -> list[tuple[int, ...]]:
    """(epoch, step, image) of all ranks and attempts, sorted."""
    lines = [line for path in out.parent.glob(f"{out.name}.seen.[0-9]*") for line in path.read_text().splitlines()]
    return sorted(tuple(map(int, line.split())) for line in lines)


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait", "memory_gb")} for line in lines]


def agree(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Equal lines, but for the rounding of losses."""
    for a, b in zip(mine, theirs, strict=True):
        assert a == b | {"loss": pytest.approx(b["loss"], rel=1e-3)}


def difference(a: Path, b: Path) -> float:
    """Largest difference of weights, averages and optimizer state."""
    first, second = (load_file(out / "last.safetensors") for out in (a, b))
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


@pytest.mark.slow
def test_ranks_compute_what_one_process_does_and_may_change(data: Path, tmp_path: Path, server: Server) -> None:
    """12 images a step: on one process; on two, 6 each, with joint batch norm; on two that are stopped, then three."""
    one, two, changed = (tmp_path / name for name in ("one", "two", "changed"))
    status, said = server.run(1, one, *flags(data, 12, "--cache", "ram"))
    assert status == [0], said
    # One rank fails to record the fourth step, as if on a GPU: both go on without.
    status, said = server.run(2, two, *flags(data, 6, "--sync-bn", "--cache", "ram"), event="unrecordable 1 0")
    assert status == [0, 0], said
    assert said.count("can't be recorded as a CUDA graph (not permitted on rank 1); training goes on without") == 1
    decoded = (tmp_path / "two.seen.decoded").read_text().splitlines()
    assert sorted(decoded) == sorted(set(decoded))  # each image once, though either rank trained on it
    assert len(decoded) >= 24 + 7
    assert "2 processes, 12 images a step; batch norm in each over all images" in said
    assert said.count("learning curves:") == 1  # only the main process prints
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    assert seen(one) == seen(two)
    assert len(seen(two)) == len({(epoch, image) for epoch, _, image in seen(two)}) == 2 * 24
    # The same sums in another order.
    assert difference(one, two) < 1e-3
    agree(metrics(two), metrics(one))
    assert [line["images"] for line in metrics(two) if line["kind"] == "eval"] == [7] * 4

    # One rank is signalled in the first step; both know of it after the second, in the middle of the epoch... of two
    # steps, so that the evaluation is what is left out.
    status, said = server.run(2, changed, *flags(data, 6, "--sync-bn", "--cache", "ram"), event="stop 1 0")
    assert status == [143, 143], said
    assert "stopped at step 2; continue with: torchrun --nproc-per-node 2" in said
    assert json.loads((changed / "last.json").read_text())["progress"]["images_seen"] == 24
    status, said = server.run(3, changed, "--resume", "auto")
    assert status == [0, 0, 0], said
    assert "3 processes, 12 images a step" in said
    assert seen(changed) == seen(one)
    assert difference(one, changed) < 1e-3
    agree(metrics(changed), metrics(one))


@pytest.mark.slow
def test_ranks_with_uneven_shares_stop_and_continue_in_the_same_bits(
    data: Path, tmp_path: Path, server: Server
) -> None:
    """Three ranks share 8 images a step as 3, 3 and 2 of a run that one began, three steps an epoch."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, events in ((whole, [""]), (parts, ["stop 2 1", "kill 0 4", ""])):
        assert server.run(1, out, *flags(data, 8, "--deterministic"), event="stop 0 0")[0] == [143]
        for event in events:
            status, said = server.run(3, out, "--resume", "auto", "--save-every", "1", event=event)
            assert (status == [0, 0, 0]) == (event == ""), said
            assert "Traceback" not in said
    steps = seen(parts)
    assert {(epoch, image) for epoch, _, image in steps} == {(epoch, image) for epoch, _, image in seen(whole)}
    assert set(steps) == set(seen(whole))  # what was done twice was done on the same images
    done = [(epoch, image) for epoch, _, image in seen(whole)]
    assert len(done) == len(set(done)) == 2 * 24
    assert metrics(parts) == metrics(whole)
    assert difference(parts, whole) == 0


@pytest.mark.slow
def test_torchrun_starts_a_lost_rank_again(data: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "run.seen"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--rdzv-backend",
        "c10d", "--rdzv-endpoint", "localhost:0", "-m", "tests.forked", "kill 1 2", str(log), "--out", str(out),
        "--resume", "auto", *flags(data, 4, "--save-every", "1"), "--epochs", "1",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"continuing efficientnet_{NARROW}" in done.stdout
    steps = seen(out)
    assert sorted({image for _, _, image in steps}) == sorted({image for _, step, image in set(steps)})
    assert len(set(steps)) == 24  # three steps of 8 images, each seen in one step only
    assert json.loads((out / "last.json").read_text())["progress"]["images_seen"] == 24


@pytest.mark.slow
def test_what_goes_wrong_is_said_once(data: Path, tmp_path: Path, server: Server) -> None:
    graph = "--cuda-graph on is impossible here (not permitted on rank 1): leave it out"
    for name, wrong, words, expected in (
        ("a", flags(tmp_path / "nowhere", 6), "There is no folder", 1),
        ("b", flags(data, 6, "--nonsense"), "--nonsense", 2),
        ("c", flags(data, 14), "--batch-size 14 x 2 processes is more than the 26 training images", 2),
        ("d", flags(data, 6, "--lr", "1e-9", "--epochs", "0"), "--epochs 0 must lie between", 2),
        ("e", flags(data, 6, "--cuda-graph", "on"), graph, 1),
    ):
        status, said = server.run(2, tmp_path / name, *wrong, event="unrecordable 1 0")
        assert status == [expected] * 2, said
        assert said.count(words) == 1, said
        assert "Traceback" not in said


@pytest.mark.slow
def test_a_rank_that_hangs_or_is_killed_is_named(data: Path, tmp_path: Path, server: Server) -> None:
    status, said = server.run(3, tmp_path / "hangs", *flags(data, 4), event="hang 1 2")
    assert (status[0], status[2]) == (1, 1), said  # the hung one too may end by itself, once the others are gone
    host = socket.gethostname()
    assert re.search(rf"error: rank 1 on node 0 \({host}\) has not answered for \d+ s: ", said), said
    assert said.count("error:") == 1
    status, said = server.run(3, tmp_path / "killed", *flags(data, 4), event="kill 2 2")
    assert status == [1, 1, -9], said
    assert re.search(r"error: rank 2 \(process \d+, killed from outside or out of memory", said), said
    assert said.count("error:") == 1
    assert "Traceback" not in said


def copy_of(data: Path, home: Path) -> Path:
    """A data set that a process with this working folder finds at /proc/self/cwd/data."""
    shutil.copytree(data, home / "data")
    return home / "data"


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["renamed", "missing", ""])
def test_two_agents_compare_their_data(data: Path, tmp_path: Path, wrong: str) -> None:
    """Two torchrun on one machine, each with a data set of its own at the same path: a class that is renamed, or a file
    that is missing on one of them is named by both's first word; with equal ones they train."""
    homes = [tmp_path / "first", tmp_path / "second"]
    copies = [copy_of(data, home) for home in homes]
    if wrong == "renamed":
        for split in ("train", "val"):
            (copies[1] / split / "bright").rename(copies[1] / split / "zebra")
    elif wrong == "missing":
        (copies[1] / "train" / "bright" / "3.jpg").unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for number, home in enumerate(homes):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank",
            str(number), "--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "tests.forked", "",
            str(tmp_path / "seen"), "--out", str(tmp_path / "run"),
            *flags(Path("/proc/self/cwd/data"), 4), "--epochs", "1",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        agents.append(
            subprocess.Popen(
                command, env=environment, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = "".join(agent.communicate(timeout=300)[0] for agent in agents)
    host = socket.gethostname()
    if not wrong:
        assert [agent.returncode for agent in agents] == [0, 0], said
        resume = (
            f"torchrun --nnodes 2 --nproc-per-node 1 <its --rdzv flags> -m fastnet.train --resume {tmp_path / 'run'}"
        )
        assert resume in said
        assert f"{tmp_path / 'run'} must be a folder that all of them share" in said
        return
    assert all(agent.returncode for agent in agents), said
    one, other = f"node 1 ({host})", f"node 0 ({host})"
    words = {
        "renamed": f'{one} has the class "zebra" and not "bright", which {other} has: copy the data set anew',
        "missing": f"{one} has no train/bright/3.jpg that can be read, which {other} has: copy the data set anew",
    }[wrong]
    assert said.count(words) == 1, said
    assert "step 1" not in said


def test_divisions() -> None:
    assert divide(64, ALONE, 32, 2).micro_batches == 2
    assert divide(64, Ranks(0, 2), 32, 1).micro_batches == 1
    assert divide(64, Ranks(1, 3), 32, 1).micro_batches == 1
    assert divide(64, ALONE, 20, 1).micro_batches == 4
    assert sum(len(divide(65, Ranks(rank, 3), 16, 1).shard.rows(65)) for rank in range(3)) == 65
    with pytest.raises(UserError, match="has 6 images, too few for 4 ranks"):
        divide(6, Ranks(0, 4), 6, 1)


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.init_process_group() == ALONE
    assert ALONE.all_gather_object(3) == [3]
    assert ALONE.all_reduce_max(2) == ALONE.previous_max(2) == 2
    assert ALONE.first_failure("no") == "no"
    assert ALONE.recordable


def test_a_graph_of_several_processes_needs_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for there in (True, False):
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda there=there: there)
        assert pick_cuda_graph("auto", cuda, recordable=Ranks(0, 1).recordable)
        assert pick_cuda_graph("auto", cuda, recordable=Ranks(0, 2).recordable) == there
    with pytest.raises(UserError, match="--cuda-graph on needs NCCL between several processes"):
        pick_cuda_graph("on", cuda, recordable=Ranks(0, 2).recordable)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--nproc-per-node 3 is more than the 2 GPUs"):
        Ranks(2, 3, 2, 3).device(torch.device("cuda"))
