"""`--batch-size auto`: the largest batch that fits.

On a GPU steps are tried, of a model that is thrown away again, while a tenth of its memory is held back for what comes
later: the loader's, a recorded graph's, fragments. On a CPU a batch that does not fit is not refused but swapped or
killed, and a large one is no faster; there the recipe's is halved until it fits by a count.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from data_pipeline import Index
from data_pipeline.memory import available_memory
from fastnet.config import RECIPES, TrainConfig
from fastnet.device import Amp
from fastnet.errors import UserError, out_of_memory
from fastnet.scaling import architecture
from fastnet.training.build import build_model, build_step, lower_batch
from fastnet.training.distributed import ALONE, BatchLayout, Ranks

HELD_BACK = 0.1
"""Of a GPU's memory, while steps are tried."""
PER_ACTIVATION = 4 * 4
"""Bytes that a step on a CPU keeps for each element that a convolution puts out: it, normalised, activated, and one
more for gradients; fp32. An estimate on the safe side, not a measurement."""


def fitted(
    config: TrainConfig,
    index: Index,
    resolution: int,
    device: torch.device,
    amp: Amp,
    ranks: Ranks,
    log: Callable[[str], None],
) -> TrainConfig:
    """The configuration of a new run with its batch: --batch-size, or with auto what fits in every rank, lowered until
    an epoch has --min-steps. All ranks call it together. log: is told what was found.

    Raises UserError where not even a batch of two fits.
    """
    images = len(index.splits["train"])
    if config.optimizer.batch_size:
        return lower_batch(config, images, ranks.size)
    accumulated = config.optimizer.grad_accum_steps
    most = max(2, images // (accumulated * ranks.size))
    most = lower_batch(with_batch(config, most), images, ranks.size).optimizer.batch_size
    if device.type == "cuda":
        found, how = largest(Trial(config, len(index.classes), resolution, device, amp), most), "found by trying"
    else:
        recipe = RECIPES[config.recipe].optimizer.batch_size
        found, free = by_count(config, resolution, min(recipe, most), ranks.local_size)
        how = f"at most the recipe's {recipe} on a CPU, and half of the {free / 1e9:.1f} GB that are free"
    found = -ranks.all_reduce_max(-found)
    if found < 2:
        words = "lower --resolution or choose a smaller --variant"
        raise UserError(f"out of memory on {device} with a batch of 2: {words}.")
    each, limit = " in each process" if ranks.size > 1 else "", ""
    if found == most:
        steps = config.optimizer.min_steps
        limit = f"; more would leave an epoch fewer than {steps} steps" if steps > 1 else "; the data set has no more"
    log(f"--batch-size auto: {found} images{each}, {how}{limit}")
    return with_batch(config, found)


def with_batch(config: TrainConfig, batch: int) -> TrainConfig:
    return replace(config, optimizer=replace(config.optimizer, batch_size=batch))


def by_count(config: TrainConfig, resolution: int, batch: int, sharing: int) -> tuple[int, int]:
    """(`batch`, halved until a step takes at most half of the free memory; that memory in bytes). sharing: processes
    that divide it."""
    network = architecture(config.model.variant, config.model.scaling).network
    image = PER_ACTIVATION * sum(cost.activations for cost in network.costs(resolution))
    free = available_memory()
    while batch > 2 and batch * image > free / 2 / sharing:
        batch = max(2, batch // 2)
    return batch, free


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to `most` that fits, to an eighth: doubled from 8 while it fits (halved where not even that
    does), then the gap halved three times. 0: not even two images fit."""
    good, bad = 0, most + 1
    batch = min(8, most)
    while good < most and batch < bad:
        if fits(batch):
            good, batch = batch, min(2 * batch, most)
        else:
            bad = batch
    while not good and bad > 2:
        half = max(2, bad // 2)
        if fits(half):
            good = half
        else:
            bad = half
    if not good:
        return 0
    step = max(1, good // 8)
    while bad - good > step:
        middle = good + max(step, (bad - good) // 2 // step * step)
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


class Trial:
    """Whether a step of so many images fits a device's memory; what it computed is gone afterwards."""

    def __init__(self, config: TrainConfig, classes: int, resolution: int, device: torch.device, amp: Amp) -> None:
        self.config, self.classes, self.resolution = config, classes, resolution
        self.device, self.amp = device, amp

    def __call__(self, batch: int) -> bool:
        try:
            self._steps(batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    def _steps(self, batch: int) -> None:
        """Two, as the second has the optimizer's state too; in as many parts as the run's."""
        parts = self.config.optimizer.grad_accum_steps
        on: dict[str, Any] = dict(device=self.device)
        held = None
        if self.device.type == "cuda":
            _, whole = torch.cuda.mem_get_info(self.device)
            held = torch.empty(int(HELD_BACK * whole), dtype=torch.uint8, **on)
        fresh = replace(self.config, model=replace(self.config.model, pretrained=None))
        model = build_model(fresh, self.classes, self.device, None, lambda text: None).train()
        layout = BatchLayout(batch * parts, ALONE, parts)
        step = build_step(fresh, model, self.device, self.amp, layout)
        images = torch.zeros(batch * parts, 3, self.resolution, self.resolution, **on)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(batch * parts, dtype=torch.int64, **on)
        for _ in range(2):
            loss, _ = step(images, labels)
        loss.item()
        del held
