"""Which loader, threads, prefetch, decoder and engine share feed a model fastest on this machine: measured.

One setting is changed at a time, from the defaults on; the fastest value stays. Of several numbers of workers within
`MARGIN` of the best the smallest is taken: what it leaves idle the training step can use. The caches are not among the
candidates: after their first epoch they decode nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from data_pipeline.errors import DataError
from data_pipeline.loaders.dali_options import DaliOptions

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from data_pipeline.dataset.index import Index

MARGIN = 0.03
PREFETCH = (1, 2, 4, 8)
ENGINE_SHARES = (0.0, 0.5, 0.65, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Setting:
    loader: Literal["dali", "torch"]
    workers: int
    dali: DaliOptions = field(default_factory=DaliOptions)

    @property
    def flags(self) -> str:
        """Of fastnet.train; what is the default is left out."""
        found = [f"--loader {self.loader}", f"--workers {self.workers}"]
        for option in dataclasses.fields(self.dali):
            value = getattr(self.dali, option.name)
            if self.loader == "dali" and value != option.default:
                found.append(f"--{option.name.replace('_', '-')} {value}")
        return " ".join(found)

    def changed(self, **options: Any) -> Setting:
        return dataclasses.replace(self, dali=dataclasses.replace(self.dali, **options))


def search(measure: Callable[[Setting], float], cores: int, *, dali: bool, engine: bool) -> Setting:
    """The fastest setting; `measure` gives the images/s of one, and is asked once for each.

    dali: whether it is installed. engine: whether it has a GPU to decode on.
    """
    rate_of = functools.cache(measure)
    counts = sorted({n for n in (1, 2, 4, 8, 16, 32, 64) if n < cores} | {min(cores, 64)})
    chosen: list[Setting] = []
    for loader in ("dali", "torch") if dali else ("torch",):
        candidates = [Setting(loader, n) for n in counts]
        enough = (1 - MARGIN) * max(map(rate_of, candidates))
        best = next(s for s in candidates if rate_of(s) >= enough)
        options: list[tuple[str, tuple[Any, ...]]] = []
        if loader == "dali":
            options = [("dali_decode", ("window", "whole")), ("dali_prefetch", PREFETCH)]
            options += [("dali_engine_share", ENGINE_SHARES)] if engine else []
        for name, values in options:
            best = max((best.changed(**{name: value}) for value in values), key=rate_of)
        chosen.append(best)
    return max(chosen, key=rate_of)


def rate(
    index: Index, setting: Setting, *, resolution: int, batch_size: int, device: torch.device, seconds: float
) -> float:
    """Images a second of training batches that nothing is done with, after the first batch."""
    import torch

    from data_pipeline.loaders.choice import make_loader

    made = make_loader(
        index, "train", backend=setting.loader, resolution=resolution, batch_size=batch_size, seed=0, train=True,
        augmentation=None, device=device, workers=setting.workers, dali=setting.dali,
    )  # fmt: skip

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    try:
        began, count, epoch = 0.0, 0, 0
        while True:
            for _ in made.batches(epoch):
                if not began:
                    began = wait()
                    continue
                count += 1
                taken = time.perf_counter() - began
                if taken >= seconds:
                    return count * batch_size / (wait() - began)
            epoch += 1
    finally:
        made.close()


def tune(
    index: Index, *, resolution: int, batch_size: int, device: torch.device, seconds: float, console: Console
) -> Setting:
    """Measure, say what comes out setting by setting, and return the fastest.

    Raises:
        DataError: there are fewer images than a batch.
    """
    import os

    from data_pipeline.loaders.loader import dali_installed

    images = len(index.splits["train"])
    if batch_size > images:
        raise DataError(f"--batch-size {batch_size} is more than the {images} training images: choose a smaller one.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not dali_installed():
        console.print("DALI is not installed (pip install nvidia-dali-cuda130): only --loader torch is measured")

    def measure(setting: Setting) -> float:
        found = rate(index, setting, resolution=resolution, batch_size=batch_size, device=device, seconds=seconds)
        console.print(f"{found:8.0f} images/s  {setting.flags}", highlight=False)
        return found

    return search(measure, cores, dali=dali_installed(), engine=device.type == "cuda")
