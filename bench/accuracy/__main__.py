"""What a fine-tune reaches: fastnet beside timm and torchvision, from the same weights, on the same photos, for the
same epochs, with several seeds.

`python -m bench.accuracy --quick` takes some ten minutes on two cores; without the flag it takes hours. What was
found is kept after every run, and the same command goes on where an earlier one stopped. Top-1 and loss are those of
the best epoch, as both report; seconds are those of training, images/s of its steps, memory the peak of the process.

`--tries="FLAGS"`, which may be given again, runs fastnet's `finetune` with those flags instead.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import ROOT, commit, photos_folder
from fastnet.errors import UserError, run_command
from fastnet.loading.checkpoint import write_atomically

RESULTS = ROOT / "bench" / "results"
Found = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """What every row gets. images: training photos; seeds: runs of each row."""

    images: int
    resolution: int
    epochs: int
    seeds: int = 3

    def __str__(self) -> str:
        return f"{self.images} photos, {self.resolution} px, {self.epochs} epochs"


@dataclass(frozen=True)
class Row:
    """by: who trains. start: "lite0", or "b0" from its convolutions. settings: flags of fastnet.train, or fields
    of `bench.accuracy.peers.Peer`."""

    name: str
    by: str = "fastnet"
    start: str = "lite0"
    settings: tuple[str, ...] | dict[str, Any] = ()


QUICK, FULL = Budget(300, 64, 4), Budget(600, 128, 20)
# torchvision's references/classification/train.py as it is; its steps of 30 epochs never come in so short a run.
TORCHVISION: dict[str, Any] = dict(batch=32, lr=0.1, weight_decay=1e-4, schedule="none", jitter=None, smoothing=0.0)
METHODS = (
    Row("fastnet finetune"),
    Row("timm defaults", "timm"),
    Row("torchvision defaults", "torchvision", settings=TORCHVISION),
)
LARGE_BATCH = Row("--batch-size 64 --lr 3e-4", settings=("--batch-size", "64", "--lr", "3e-4"))
WAYS = (
    Row("--cache ram", settings=("--cache", "ram")),
    Row("--cache disk", settings=("--cache", "disk")),
    Row("--loader dali", settings=("--loader", "dali")),
    Row("--amp bf16", settings=("--amp", "bf16")),
    Row("--kernels native", settings=("--kernels", "native")),
    Row("without the average", settings=("--no-model-ema",)),
)


def same_settings(row: Row, config: Any) -> Row:
    """timm's tools with what fastnet's recipe sets."""
    chosen = config.optimizer
    return dataclasses.replace(
        row, settings=dict(
            batch=chosen.batch_size, optimizer="adamw", lr=chosen.lr, weight_decay=chosen.weight_decay,
            layer_decay=chosen.layer_decay, warmup=chosen.warmup_epochs, scale=config.augment.scale,
            jitter=config.augment.brightness or None, dropout=config.model.dropout or 0.2, drop_path=0.2,
            clip=chosen.clip_grad_norm or None,
        ),
    )  # fmt: skip


def linked(data: Path, images: int, folder: Path) -> Path:
    """A folder in `folder` with about so many photos in train/, the same number of each class, and in val/ all others,
    as links; made where it is not there. What isn't trained on judges: more photos say more surely which is better."""
    from data_pipeline import build_index

    index = build_index(data)
    to = folder / f"{images}-and-others-{index.content[:16]}"
    if to.exists():
        return to
    taken = [0] * len(index.classes)
    for split in ("train", "val"):
        for path, label in zip(index.splits[split].paths, index.splits[split].labels.tolist(), strict=True):
            trains = split == "train" and taken[label] < images // len(index.classes)
            taken[label] += trains
            link = to / ("train" if trains else "val") / index.classes[label] / f"{split}-{Path(path).name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return to


def command(row: Row, budget: Budget, seed: int, data: Path, starts: Path, out: Path) -> list[str]:
    from bench.accuracy.starts import b0_file, lite0_file

    weights = b0_file(starts) if row.start == "b0" else lite0_file(starts)
    if row.by == "fastnet":
        assert isinstance(row.settings, tuple)
        return [
            sys.executable, "-m", "fastnet.train", "--recipe", "finetune", "--pretrained", str(weights),
            "--variant", row.start, "--data", str(data), "--resolution", str(budget.resolution),
            "--epochs", str(budget.epochs), "--seed", str(seed), "--out", str(out), *row.settings,
        ]  # fmt: skip
    settings = row.settings if isinstance(row.settings, dict) else {}
    model = {"b0": "tf_efficientnet_b0", "lite0": "tf_efficientnet_lite0"}[row.start]
    given = dict(data=str(data), weights=str(weights), model=model, resolution=budget.resolution, epochs=budget.epochs)
    return [
        sys.executable,
        "-m",
        "bench.accuracy.peers",
        json.dumps({"by": row.by, "seed": seed, **given, **settings}),
    ]


def measured(row: Row, budget: Budget, seed: int, data: Path, starts: Path) -> Found:
    """One run in a process of its own. UserError with its last words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        words = command(row, budget, seed, data, starts, scratch / "run")
        environment = os.environ | {"XDG_CACHE_HOME": str(starts / "cache")}
        with open(scratch / "said", "w+") as said:
            child = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            lines = said.read().splitlines() or [""]
        if child.returncode:
            raise UserError(f"{row.name}, seed {seed}, ended with {child.returncode}: {lines[-1]}")
        found = json.loads(lines[-1]) if row.by != "fastnet" else _found_by(scratch / "run")
        return found | {"gigabytes": used.ru_maxrss * 1024 / 1e9, "commit": commit()}


def _found_by(run: Path) -> Found:
    best = json.loads((run / "best.json").read_text())
    progress = json.loads((run / "last.json").read_text())["progress"]
    seconds = progress["train_seconds"]
    return {
        "top1": best["top1"], "loss": best["loss"], "seconds": seconds,
        "images_per_second": progress["images_seen"] / seconds,
    }  # fmt: skip


class Results:
    """A JSON file of what was found: written after every run, read by the next command."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cases: dict[str, Found] = json.loads(path.read_text())["cases"] if path.is_file() else {}

    def add(self, key: str, found: Found) -> None:
        self.cases[key] = found
        write_atomically(self.path, (json.dumps({"cases": self.cases}, indent=1) + "\n").encode())

    def of(self, row: Row, budget: Budget) -> list[Found]:
        keys = [key_of(row, budget, seed) for seed in range(budget.seeds)]
        return [self.cases[key] for key in keys if key in self.cases]


def key_of(row: Row, budget: Budget, seed: int) -> str:
    settings = row.settings if isinstance(row.settings, dict) else " ".join(row.settings)
    return f"{row.name} ({row.start}; {settings}), {budget}, seed {seed}"


def table(rows: Sequence[Row], budget: Budget, results: Results) -> Iterator[str]:
    """Markdown: mean ± standard deviation over the seeds."""
    yield f"| {budget} | top-1, % | loss | training, s | images/s | memory, GB |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        found = results.of(row, budget)
        if not found:
            continue
        cells = []
        for name, digits in (("top1", 1), ("loss", 3), ("seconds", 0), ("images_per_second", 0), ("gigabytes", 1)):
            values = [one[name] for one in found]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and name in ("top1", "loss") else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        title = row.name if len(found) == budget.seeds else f"{row.name} ({len(found)} of {budget.seeds} seeds)"
        yield f"| {title} ({row.start}) | {' | '.join(cells)} |"


def rows_of(quick: bool, tried: Sequence[str]) -> list[Row]:
    from fastnet.config import FINETUNE

    if tried:
        return [Row(flags, settings=tuple(shlex.split(flags))) for flags in tried]
    rows = [*METHODS, same_settings(Row("timm, fastnet's settings", "timm"), FINETUNE), *WAYS[:2]]
    if not quick:
        rows += [LARGE_BATCH, *WAYS[2:], *(dataclasses.replace(row, start="b0") for row in METHODS)]
    return rows


def accuracy(
    quick: bool = False,
    data: str | None = None,
    images: int | None = None,
    resolution: int | None = None,
    epochs: int | None = None,
    seeds: int = 3,
    tries: tuple[str, ...] = (),
    minutes: float = 0.0,
    out: str | None = None,
) -> int:
    """Fine-tune with fastnet, timm and torchvision under one budget, and print a table.

    Args:
        quick: Small pictures, few epochs, and the rows that matter most.
        data: A data set as fastnet.train takes it; default: $FASTNET_PHOTOS, or the photos beside this folder.
        images: Training photos, at most those that there are; each class has as many.
        resolution: Image side in pixels.
        epochs: Passes over the photos.
        seeds: Runs of each row.
        tries: Instead of the usual rows, fastnet's finetune with these flags; may be given again.
        minutes: Stop after the run that is under way then; 0: go on to the end.
        out: File of the results; default: bench/results/accuracy.json.
    """
    folder = Path(data) if data else photos_folder()
    if folder is None:
        raise UserError("no real photos: name some with --data or FASTNET_PHOTOS.", exit_status=2)
    base = QUICK if quick else FULL
    given = dict(images=images, resolution=resolution, epochs=epochs)
    budget = dataclasses.replace(base, seeds=seeds, **{k: v for k, v in given.items() if v is not None})
    results = Results(Path(out) if out else RESULTS / "accuracy.json")
    rows, began = rows_of(quick, tries), time.monotonic()
    starts = Path(tempfile.gettempdir()) / "fastnet-accuracy"
    photos = linked(folder, budget.images, starts / "photos")
    for seed in range(budget.seeds):
        for row in rows:
            key = key_of(row, budget, seed)
            if key in results.cases or (minutes and time.monotonic() - began > 60 * minutes):
                continue
            results.add(key, measured(row, budget, seed, photos, starts))
            print(f"{key}: {results.cases[key]}", file=sys.stderr, flush=True)
    print("\n".join(table(rows, budget, results)))
    return 0


def main() -> None:
    import tyro

    sys.exit(
        run_command(lambda: tyro.cli(accuracy, prog="python -m bench.accuracy", config=(tyro.conf.UseAppendAction,)))
    )


if __name__ == "__main__":
    main()
