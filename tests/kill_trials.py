"""Kill runs at random moments, continue them, and compare every bit with runs that were left alone.

    python -m tests.kill_trials --trials 200

A trial starts a deterministic run on a CPU in a forked child, ends it with SIGINT, SIGTERM, SIGHUP or SIGKILL at a
random time, sent to it alone or to all processes of its job, or with SIGKILL just before or after one of its writes
reaches the disk, up to three times in a row, and then lets it finish. In some trials its workers are killed instead, in
others a photo is damaged or removed while the run is down. Weights, averages, optimizer state, all other state, the
best weights, what is known of the run and its metrics must then equal those of the run that was left alone (after the
damage, where there is some); no more than --save-every steps may have been lost, and none where the run was asked to
stop.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.loaders.loader import dali_installed
from fastnet.config import FOOD101, TrainConfig
from tests.forked import fork, prepare, wait
from tests.networks import NARROW

PHASES = ("starting", "training", "saving", "evaluating", "ending")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
KILLS = 3  # in a row, at most
STEPS = 6  # of a run, in two epochs


class Case(NamedTuple):
    """What feeds a run, and what its steps hold."""

    loader: str
    cache: str
    workers: int
    save_every: int
    rich: bool

    def config(self, data: Path) -> TrainConfig:
        config = replace(
            FOOD101,
            # What auto measures to be faster may differ between two runs that each begin anew.
            model=replace(FOOD101.model, variant=NARROW, resolution=32, kernels="torch"),
            data=replace(FOOD101.data, data=str(data), loader=self.loader, cache=self.cache, workers=self.workers),  # type: ignore[arg-type]
            optimizer=replace(FOOD101.optimizer, epochs=2, batch_size=4, lr=0.02, warmup_epochs=1.0),
            ema=replace(FOOD101.ema, model_ema=True, model_ema_decay=0.8),
            run=replace(
                FOOD101.run,
                device="cpu",
                deterministic=True,
                save_every=self.save_every,
                log_every=2,
                reestimate_bn=int(self.rich),
                checkpoint_hist=1 + self.rich,
            ),
        )
        if not self.rich:
            return config
        return replace(
            config,
            optimizer=replace(config.optimizer, optimizer="adamw", lr=2e-3, batch_size=2, grad_accum_steps=2),
            mix=replace(config.mix, mixup=0.3, cutmix=1.0),
            augment=replace(config.augment, random_erasing=0.5, rand_augment_ops=1),
        )


def cases() -> list[Case]:
    sources = [("torch", "none", 0), ("torch", "none", 1), ("torch", "ram", 1), ("torch", "disk", 1)]
    if dali_installed():
        sources[2:2] = [("dali", "none", 1)]
    return [Case(*source, every, rich) for every, rich in ((1, False), (2, True), (0, True)) for source in sources]


def make_data(root: Path) -> Path:
    """15 images of two classes to train on, three steps of 4 an epoch; 5 to evaluate."""
    generator = np.random.default_rng(0)
    for split, counts in (("train", (8, 7)), ("val", (3, 2))):
        for label, name in enumerate(("dark", "bright")):
            (root / split / name).mkdir(parents=True)
            for i in range(counts[label]):
                pixels = generator.integers(0, 100, (40 + i, 48, 3), dtype=np.uint8) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.jpg")
    return root


class Seen:
    """What a child tells its parent, who may not ask: phase, finished steps, writes so far."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 24)

    def read(self) -> tuple[int, int, int]:
        phase, step, writes = struct.unpack("qqq", self._memory)
        return phase, step, writes

    def put(self, at: int, value: int) -> None:
        self._memory[8 * at : 8 * at + 8] = struct.pack("q", value)


class Kill(NamedTuple):
    """number: the signal. after: seconds from the start, or None. to: "run", "job" (its workers too) or "workers",
    who are not the run's end. write, before: the write before or after which the child ends itself."""

    number: int
    after: float | None = None
    to: str = "run"
    write: int = 0
    before: bool = True


def run(case: Case, data: Path, out: Path, cache: Path, seen: Seen, kill: Kill | None) -> int:
    """The body of a child."""
    from rich.console import Console

    from fastnet.training import trainer
    from fastnet.training.reporting import messages as words

    os.environ["XDG_CACHE_HOME"] = str(cache)
    words.draw_curves = lambda folder, kept=None: folder  # of the metrics, which are compared

    def in_phase(owner: Any, name: str, phase: int) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            before = seen.read()[0]
            seen.put(0, phase)
            try:
                return inner(*args, **options)
            finally:
                seen.put(0, before)
                if name == "_train_epoch":
                    seen.put(1, args[0].progress.step)

        setattr(owner, name, wrapped)

    for owner, name, phase in (
        (trainer.Trainer, "_train_epoch", 1),
        (trainer.Trainer, "save", 2),
        (trainer.Trainer, "_finish_epoch", 3),
        (trainer, "log_summary", 4),
    ):
        in_phase(owner, name, phase)

    draw = trainer.Trainer._drop_scales

    def count_step(self: trainer.Trainer) -> Any:
        seen.put(1, self.progress.step)
        return draw(self)

    trainer.Trainer._drop_scales = count_step  # type: ignore[method-assign]

    def count_write(inner: Any) -> Any:
        def write(*args: Any) -> Any:
            number = seen.read()[2] + 1
            if kill is not None and kill.write == number and kill.before:
                os.kill(os.getpid(), kill.number)
            result = inner(*args)
            seen.put(2, number)
            if kill is not None and kill.write == number:
                os.kill(os.getpid(), kill.number)
            return result

        return write

    os.fsync, os.replace = count_write(os.fsync), count_write(os.replace)
    return trainer.Trainer(case.config(data), out, Console(width=200)).run()


def digests(out: Path) -> dict[str, Any]:
    """Everything that must not depend on kills, by name."""
    from safetensors import safe_open

    found: dict[str, Any] = {"files": sorted(path.name for path in out.iterdir())}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                found[f"{path.name}/{name}"] = hashlib.sha256(file.get_tensor(name).numpy().tobytes()).hexdigest()
            known = json.loads(file.metadata()["fastnet"])
        beside = json.loads(path.with_suffix(".json").read_text())
        for one in (known, beside):
            one.get("progress", {}).pop("train_seconds", None)
            one.pop("run_id", None)
        found[f"{path.name}/metadata"] = known
        found[f"{path.stem}.json"] = beside
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [
        {k: v for k, v in line.items() if k not in ("images_per_s", "data_wait", "memory_gb")} for line in lines
    ]
    return found


@dataclass
class Baseline:
    digests: dict[str, Any]
    seconds: float
    writes: int


def processes_of(child: int, to: str) -> list[int]:
    """The processes that a signal goes to: the run first, as systemd and Slurm don't promise, or last."""
    workers: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{child}/task").iterdir():
            workers += map(int, (task / "children").read_text().split())
    return {"run": [child], "job": [*workers, child], "workers": workers}[to]


class Failure(Exception):
    """A trial that did not end in the same bits, or lost more than it may."""


class Trials:
    def __init__(self, folder: Path, seed: int, *, kills_only: bool = False) -> None:
        self.folder, self.random, self.kills_only = folder, random.Random(seed), kills_only
        self.data = make_data(folder / "data")
        self.seen = Seen()
        self.hits: Counter[tuple[str, str]] = Counter()
        self.baselines: dict[Case, Baseline] = {}

    def baseline(self, case: Case) -> Baseline:
        if case not in self.baselines:
            out, cache = self.folder / f"whole-{len(self.baselines)}", self.folder / "cache"
            start = time.perf_counter()
            status = self._start(case, out, cache, None)
            if wait(status) != 0:
                raise Failure(f"{case} does not run: {out.with_suffix('.txt').read_text()[-2000:]}")
            seconds = time.perf_counter() - start
            self.baselines[case] = Baseline(digests(out), seconds, self.seen.read()[2])
        return self.baselines[case]

    def _start(self, case: Case, out: Path, cache: Path, kill: Kill | None, data: Path | None = None) -> int:
        for at in range(3):
            self.seen.put(at, 0)
        return fork(lambda: run(case, data or self.data, out, cache, self.seen, kill), out.with_suffix(".txt"))

    def _finish(self, case: Case, out: Path, cache: Path, data: Path, story: list[str]) -> dict[str, Any]:
        """What is left of the run, undisturbed, and its digests."""
        if (status := wait(self._start(case, out, cache, None, data))) != 0:
            raise Failure(
                f"{case}: {story}: continued, it ends with {status}: {out.with_suffix('.txt').read_text()[-2000:]}"
            )
        return digests(out)

    def _damage(self, data: Path) -> str:
        """Spoil a photo that another one can stand in for."""
        path = data / self.random.choice(["train/dark/5.jpg", "train/bright/2.jpg", "val/dark/0.jpg"])
        how = self.random.choice(["garbage", "cut", "gone"])
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(b"garbage" if how == "garbage" else path.read_bytes()[:-30])
        return f"{path.relative_to(data)} {how}"

    def trial(self, number: int, case: Case) -> str:
        """What was done; Failure where the end is another than without it."""
        expected = self.baseline(case)
        out = self.folder / f"trial-{number}"
        # A new cache is built, and that may be killed too.
        fresh = self.random.random() < 0.5
        cache = self.folder / (f"cache-{number}" if fresh else "cache")
        data, story = self.data, []
        damaged = self.random.random() < 0.25 and not self.kills_only
        if damaged:
            data = Path(shutil.copytree(self.data, self.folder / f"data-{number}"))
        for _ in range(self.random.randint(1, KILLS)):
            kill = self._draw(case, expected, self._saved(out))
            child = self._start(case, out, cache, kill, data)
            if kill.after is not None:
                time.sleep(kill.after)
                for one in processes_of(child, kill.to):
                    with suppress(ProcessLookupError):
                        os.kill(one, kill.number)
            phase, step, _ = self.seen.read()
            status = wait(child)
            if kill.after is None:
                phase, step, _ = self.seen.read()
            name = signal.Signals(kill.number).name + ("" if kill.to == "run" else f" to {kill.to}")
            if status == 0 and kill.to != "workers":
                phase = 4
            self.hits[name, PHASES[phase]] += 1
            how = "at a time" if kill.after is not None else "at a write"
            story.append(f"{name} {how} while {PHASES[phase]}, step {step}")
            self._check_loss(case, out, kill, phase, step, status, story)
            if status == 0:
                break
            if damaged and len(story) == 1:
                story.append(self._damage(data))
                self.hits["damage", "down"] += 1
                copy = self.folder / f"copy-{number}"
                if out.exists():
                    shutil.copytree(out, copy)
                expected = replace(expected, digests=self._finish(case, copy, cache, data, story))
                shutil.rmtree(copy)
        found = self._finish(case, out, cache, data, story)
        different = [name for name in expected.digests | found if expected.digests.get(name) != found.get(name)]
        if different:
            raise Failure(f"{case}: {story}: {len(different)} differ, the first {different[:5]}")
        shutil.rmtree(out)
        for made, folder in ((fresh, cache), (damaged, data)):
            if made:
                shutil.rmtree(folder, ignore_errors=True)
        return f"{case.loader}/{case.cache} save every {case.save_every}: " + "; ".join(story)

    def _draw(self, case: Case, expected: Baseline, saved: int) -> Kill:
        """A moment of what is left to do."""
        left = 1.1 - saved / STEPS
        if self.random.random() < 0.3:
            write = self.random.randint(1, max(1, round(expected.writes * left)))
            return Kill(signal.SIGKILL, write=write, before=self.random.random() < 0.5)
        after = self.random.uniform(0, expected.seconds * min(1.0, left))
        exposed = case.loader == "torch" and case.cache == "none" and case.workers and not self.kills_only
        if exposed and self.random.random() < 0.3:
            return Kill(signal.SIGKILL, after=after, to="workers")
        number = self.random.choice(SIGNALS)
        return Kill(number, after=after, to="job" if number == signal.SIGTERM else self.random.choice(["run", "job"]))

    @staticmethod
    def _saved(out: Path) -> int:
        """The step of the checkpoint; 0 where there is none."""
        from safetensors import safe_open

        if not (out / "last.safetensors").exists():
            return 0
        with safe_open(out / "last.safetensors", "np") as file:
            return int(json.loads(file.metadata()["fastnet"])["progress"]["step"])

    def _check_loss(
        self, case: Case, out: Path, kill: Kill, phase: int, step: int, status: int, story: list[str]
    ) -> None:
        """A run that was killed has lost what it did since the last save; one that was asked to stop, nothing."""
        if kill.to == "workers":
            if status != 0:
                raise Failure(f"{case}: {story}: ended with {status}: {out.with_suffix('.txt').read_text()[-2000:]}")
            return
        if phase == 0 or not (out / "last.safetensors").exists():
            return
        asked = kill.number != signal.SIGKILL and status == 128 + kill.number
        if kill.number != signal.SIGKILL and not asked and status not in (0, -kill.number):
            raise Failure(f"{case}: {story}: ended with {status}: {out.with_suffix('.txt').read_text()[-2000:]}")
        # Of three steps an epoch, all may be lost where only its end is saved.
        allowed, lost = 0 if asked else case.save_every or STEPS // 2, step - self._saved(out)
        if lost > allowed:
            raise Failure(f"{case}: {story}: {lost} steps were lost, and {allowed} may be")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: another each time, printed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no trial after so long")
    parser.add_argument("--kills-only", action="store_true", help="damage no file and kill no worker")
    arguments = parser.parse_args()
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    prepare()
    if dali_installed():
        import_module("data_pipeline.loaders.dali_loader")
    start, done, failed = time.perf_counter(), 0, []
    # A kill loses nothing that was written, on whatever disk; in memory, fsync does not wait.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        trials, all_cases = Trials(Path(folder), seed, kills_only=arguments.kills_only), cases()
        for number in range(arguments.trials):
            if time.perf_counter() - start > arguments.seconds:
                break
            done += 1
            try:
                print(f"{number}: {trials.trial(number, all_cases[number % len(all_cases)])}", flush=True)
            except Failure as error:
                failed.append(str(error))
                print(f"{number}: FAILED: {error}", flush=True)
    for (name, phase), count in sorted(trials.hits.items()):
        print(f"{count:4d} x {name} while {phase}")
    print(f"{done} trials, {len(failed)} failed, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
