"""Stages of the proof about the input pipeline: images/s of each loader alone, and of training that is fed by it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import torch

from bench.contenders import OURS, build
from bench.machine import photos_folder
from bench.measure import synchronise
from bench.stages import Case, Context, Stage, attempt

# (variant, resolution on Food-101, batch)
WORKS = (("b0", 200, 256), ("b1", 232, 256))
TINY = ("b0", 64, 16)
SECONDS = 20.0
Backend = Literal["dali", "torch"]
BACKENDS: tuple[Backend, ...] = ("dali", "torch")


def _data(context: Context) -> Any:
    """The index of the photos, or of the generated sample where there are none."""
    from data_pipeline import build_index

    folder = photos_folder()
    if folder is None:
        context.leave_out("real photos: set FASTNET_PHOTOS; the generated sample stands in")
    return build_index("sample" if folder is None else folder)


def _loader(context: Context, index: Any, backend: Backend, resolution: int, batch: int) -> Any:
    from data_pipeline import make_loader
    from data_pipeline.augment import Augmentation

    return make_loader(
        index,
        "train",
        backend=backend,
        resolution=resolution,
        batch_size=batch,
        seed=0,
        train=True,
        augmentation=Augmentation(),
        device=context.device.type,
        workers=min(16, os.cpu_count() or 1),
    )


def _endless(loader: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        yield from loader.batches(epoch)
        epoch += 1


def loaders_stage(context: Context) -> Iterator[tuple[str, Case]]:
    """Each backend alone: nothing is done with the batches but waiting for them."""
    from data_pipeline import DataError

    index = _data(context)
    _, resolution, batch = TINY if context.tiny else WORKS[0]
    for backend in BACKENDS:
        key = f"{backend} {resolution}px batch {batch}"
        if key in context.cases("loaders") or not context.has_time(SECONDS + 15, f"loader {key}"):
            continue

        def measure(backend: Backend = backend) -> Case:
            loader = _loader(context, index, backend, resolution, batch)
            try:
                rate = _rate(context, _endless(loader), batch, 2.0 if context.tiny else SECONDS)
            finally:
                loader.close()
            return {"images_per_second": rate, "images": loader.num_images}

        try:
            yield key, measure()
        except DataError as missing:  # says what is not installed, and what to do
            context.leave_out(f"loader {backend}: {missing}")


def _rate(context: Context, batches: Iterator[Any], batch: int, seconds: float) -> float:
    for _ in islice(batches, 2):
        pass
    synchronise(context.device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        count += 1
    synchronise(context.device)
    return count * batch / (time.perf_counter() - began)


def show_rates(cases: dict[str, Case]) -> str:
    lines = []
    for key, found in cases.items():
        waited = f", {found['waited_share']:.0%} of it waiting for data" if "waited_share" in found else ""
        lines.append(f"{key:<40}{found['images_per_second']:10.1f} img/s{waited}")
    return "\n".join(lines)


def training_stage(context: Context) -> Iterator[tuple[str, Case]]:
    """Training fed by a loader, from files to updated weights: ours, compiled on a GPU."""
    from data_pipeline import DataError

    index = _data(context)
    for work in [TINY] if context.tiny else WORKS:
        for backend in BACKENDS:
            key = f"{work[0]}@{work[1]} batch {work[2]} {backend}"
            if key in context.cases("end to end") or not context.has_time(SECONDS + 90, f"training {key}"):
                continue
            try:
                yield key, attempt(lambda work=work, backend=backend: _train(context, index, backend, *work))  # type: ignore[misc]
            except DataError as missing:
                context.leave_out(f"training with {backend}: {missing}")


def _train(context: Context, index: Any, backend: Backend, variant: str, resolution: int, batch: int) -> Case:
    from fastnet.config import OptimizerOptions
    from fastnet.optim import make_optimizer
    from fastnet.step import TrainStep

    device = context.device
    model = build(OURS, variant).to(device).to(memory_format=torch.channels_last)
    if not context.tiny:
        model.compile_regions(dynamic=False)  # type: ignore[operator]
    optimizer = make_optimizer(model, OptimizerOptions(), lr=0.064 * batch / 256)
    step = TrainStep(model, optimizer, device=device, amp="off" if context.tiny else "bf16")
    loader = _loader(context, index, backend, resolution, batch)
    batches = _endless(loader)
    try:
        for images, labels in islice(batches, 2):
            step(images, labels)
        synchronise(device)
        began, waited, count = time.perf_counter(), 0.0, 0
        while time.perf_counter() - began < (2.0 if context.tiny else SECONDS):
            asked = time.perf_counter()
            images, labels = next(batches)
            waited += time.perf_counter() - asked
            step(images, labels)
            count += 1
        synchronise(device)
    finally:
        loader.close()
    seconds = time.perf_counter() - began
    return {"images_per_second": count * batch / seconds, "waited_share": waited / seconds}


LOADERS = Stage("loaders", loaders_stage, show_rates)
END_TO_END = Stage("end to end", training_stage, show_rates)
