"""Small examples of all that a version leaves on a disk: a run, an index, a cache of pixels.

    python -m tests.old_formats tests/formats/NAME.tar.xz

writes them as this version does. `test_old_formats` holds later versions to every one of these files, which are kept:
add one whenever a format changes.
"""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from fastnet.config import FOOD101, TrainConfig
from tests.networks import NARROW


def make_data(root: Path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("dark", "bright")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((40 + i, 48, 3), 100 + 90 * label + i, np.uint8)
                path = root / split / name / f"{i}.png"
                Image.fromarray(pixels).save(path)
                os.utime(path, (1_700_000_000, 1_700_000_000))  # what an archive can give back to the last digit
    return root


def config(data: Path) -> TrainConfig:
    return replace(
        FOOD101,
        model=replace(FOOD101.model, variant=NARROW, resolution=32),
        data=replace(FOOD101.data, data=str(data), loader="torch", cache="disk", workers=0),
        optimizer=replace(FOOD101.optimizer, epochs=2, batch_size=4, optimizer="sgd", momentum=0.0),
        run=replace(FOOD101.run, device="cpu", deterministic=True, log_every=1),
    )


def stop_at(trainer: Any, step: int) -> None:
    inner: Callable[..., Any] = trainer.step.run

    def call(*inputs: Any) -> Any:
        if trainer.progress.step == step:
            trainer.stop.signal = 15
        return inner(*inputs)

    trainer.step._call = call


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Nobody's file; a lock names a machine."""
    member.uname = member.gname = ""
    member.uid = member.gid = 0
    return None if member.name.endswith(".lock") else member


def main(target: Path) -> None:
    from safetensors.torch import load_file, save_file

    from fastnet.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "root")
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        trainer = Trainer(config(make_data(root / "data")), root / "run", Console(file=StringIO()))
        stop_at(trainer, 2)
        trainer.run()
        # Coarse numbers, which are packed well.
        for name in ("last", "best"):
            path = root / "run" / f"{name}.safetensors"
            if path.exists():
                state = {
                    key: (64 * value).round() / 64 if value.dtype == torch.float32 else value
                    for key, value in load_file(path).items()
                }
                save_file(state, path, {"fastnet": path.with_suffix(".json").read_text()})
        packed = Path(scratch, "packed.tar.xz")
        with tarfile.open(packed, "w:xz") as tar:
            for folder in ("run", "cache", "data"):
                tar.add(root / folder, folder, filter=anonymous)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(packed.read_bytes())
    print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
