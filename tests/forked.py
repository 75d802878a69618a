"""Training runs in forked children of a process that has imported everything once, alone or as ranks of one another.

`python -m tests.forked serve` answers lines of JSON (a `Request`) with lines of JSON: every rank's exit status.
`python -m tests.forked EVENT LOG FLAG...` is one process of a run, for torchrun.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.networks import NARROW

# By a run on its way, at seconds each.
IMPORTED_LATE = (
    "torch._inductor", "torch.distributed.fsdp", "torchvision.transforms.v2", "matplotlib.backends.backend_agg",
    "fastnet.training.trainer", "fastnet.analysis.figures", "fastnet.train", "tyro", "tyro.conf",
    "data_pipeline.dataset.download", "data_pipeline.loaders.torch_loader", "data_pipeline.loaders.cached_loader",
    "PIL.Image",
)  # fmt: skip
ROOT = Path(__file__).parents[1]


def fork(body: Callable[[], int], output: Path) -> int:
    """Start `body` in a child whose words go to the end of a file, and whose status is what it returns; its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        status = body()
    except SystemExit as done:
        status = int(done.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int) -> int:
    """Exit status of a child; the negative of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def prepare() -> None:
    """What every run would import."""
    for late in IMPORTED_LATE:
        import_module(late)
    import torch

    torch.set_num_threads(1)


def watch(event: str, log: str) -> None:
    """Write down the (epoch, step, image) that this rank trains on to `log`.<process id>, and the files that it decodes
    into a cache to `log`.decoded.

    event: "kill RANK STEP": that rank ends without a word where the step would begin. "stop RANK STEP": it is asked to
    stop there. "hang RANK STEP": it hangs there. "unrecordable RANK 0": steps are recorded as on a GPU, which fails on
    that rank.
    """
    from data_pipeline.loaders.pixel_store import PixelStore
    from fastnet.training import peers
    from fastnet.training.trainer import Trainer

    what, who, when = event.split() or ("", "", "")
    if what == "unrecordable":
        pretend_to_record(int(who))
    if what == "hang":
        peers.LIMIT, peers.CONFIRM, peers.EVERY = 4.0, 3.0, 0.5
    inner, decode = Trainer._drop_scales, PixelStore.decode

    def spy(trainer: Trainer) -> Any:
        progress, plan = trainer.progress, trainer.train_loader.plan
        with open(f"{log}.{os.getpid()}", "a") as file:
            for index in plan.step(progress.epoch, progress.step_in_epoch).indices:
                file.write(f"{progress.epoch} {progress.step} {index}\n")
        if (who, when) == (str(trainer.ranks.rank), str(progress.step)):
            if what == "kill" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "stop":
                trainer.stop.signal = signal.SIGTERM
            elif what == "hang":
                threading.Event().wait()
        return inner(trainer)

    def spy_decode(store: PixelStore, index: int, out: Any) -> None:
        with open(f"{log}.decoded", "a") as file:  # short lines, which several processes may append
            file.write(f"{store.split.paths[index]}\n")
        decode(store, index, out)

    Trainer._drop_scales = spy  # type: ignore[method-assign, assignment]
    PixelStore.decode = spy_decode  # type: ignore[method-assign, assignment]


def pretend_to_record(failing: int) -> None:
    """From here on runs record their step, though on a CPU; on one rank that is impossible."""
    from fastnet.training import trainer

    class Recorder:
        def __init__(self, device: Any) -> None:
            pass

        def run(self, function: Callable[[], Any]) -> Any:
            return function()

        def record(self, function: Callable[[], Any]) -> Any:
            if int(os.environ["RANK"]) == failing:
                raise RuntimeError(f"not permitted on rank {failing}\n(and more lines)")
            return None, ()  # nothing that could be replayed

    trainer.pick_cuda_graph = lambda *_, **__: True
    trainer.CudaRecorder = Recorder  # type: ignore[misc, assignment]


def once(event: str, log: str, flags: list[str]) -> int:
    from fastnet import train

    watch(event, log)
    # PyTorch's kernels, in fp32: what is measured to be faster differs from machine to machine.
    sys.argv = ["train", "--variant", NARROW, "--kernels", "torch", *flags]
    train.main()
    return 0


def answer(request: dict[str, Any]) -> list[int]:
    ranks = request["ranks"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        body = lambda: once(request["event"], request["log"], request["flags"])  # noqa: E731
        children.append(fork(body, Path(request["output"])))
    what, who, _ = request["event"].split() or ("", "", "")
    if what == "hang":  # what a hung rank's machine does when the others are gone
        hung = children[int(who)]
        statuses = {child: wait(child) for child in children if child != hung}
        os.kill(hung, signal.SIGKILL)
        return [statuses[child] if child != hung else wait(child) for child in children]
    return [wait(child) for child in children]


class Server:
    """`python -m tests.forked serve`, from the side that asks."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.forked", "serve"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, ranks: int, out: Path, *flags: str, event: str = "") -> tuple[list[int], str]:
        """Every rank's exit status, and what they said."""
        output = out.with_name(f"{out.name}.txt")
        output.write_text("")
        log = str(out.with_name(f"{out.name}.seen"))
        request = dict(ranks=ranks, event=event, log=log, output=str(output), flags=["--out", str(out), *flags])
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline()), output.read_text()

    def close(self) -> None:
        self._process.communicate()


def main() -> None:
    if sys.argv[1] != "serve":
        import torch

        torch.set_num_threads(1)
        sys.exit(once(sys.argv[1], sys.argv[2], sys.argv[3:]))
    prepare()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
