"""Stages of the proof about the input pipeline: images/s of each source of batches alone, the augment kernel by itself,
and whole epochs of training fed by each source against the same model on a batch that is already there.

The photos at hand are repeated to an epoch of IMAGES; each repetition is a file to decode or a cached image of its own.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.contenders import OURS, build
from bench.machine import photos_folder
from bench.measure import ColdCache, sample, summarise, synchronise
from bench.stages import Case, Context, Stage, attempt

# (variant, resolution on Food-101, batch)
WORKS = (("b0", 200, 256), ("b1", 232, 256))
TINY = ("b0", 64, 16)
STORED = (512, 384)  # what `--cache` keeps of most of Food-101's photos at these resolutions: all
IMAGES, TINY_IMAGES = 16_384, 64
SECONDS, TINY_SECONDS = 8.0, 0.5


class Source(NamedTuple):
    """Where batches come from; dali: fields of `DaliOptions`."""

    name: str
    backend: str = "torch"
    cache: str = "none"
    workers: int = 1
    dali: dict[str, Any] | None = None


def all_sources(cores: int, on_gpu: bool) -> list[Source]:
    """Every way to feed the model: DALI at several thread counts, and at the most threads its other options."""
    most = min(cores, 64)
    made = [
        Source(f"torchvision, {most} processes", workers=most),
        Source(f"RAM cache, {most} threads", cache="ram", workers=most),
    ]
    if on_gpu:
        made.append(Source("GPU cache, augment kernel", cache="gpu", workers=most))
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < most] + [most]
    made += [Source(f"DALI, {n} threads", "dali", workers=n) for n in (counts if on_gpu else counts[-1:])]
    options: list[dict[str, Any]] = [{"dali_decode": "whole"}, {"dali_prefetch": 4}]
    if on_gpu:
        options += [{"dali_engine_share": share} for share in (0.0, 0.9, 1.0)]
        options.append({"dali_decode": "whole", "dali_engine_share": 0.9})
    for changed in options:
        said = ", ".join(f"{name.removeprefix('dali_')} {value}" for name, value in changed.items())
        made.append(Source(f"DALI, {most} threads, {said}", "dali", workers=most, dali=changed))
    return made


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _index(context: Context) -> Any:
    """The index of the photos, or of the generated sample where there are none, its training images repeated."""
    from data_pipeline import build_index

    folder = photos_folder()
    if folder is None:
        context.leave_out("real photos: set FASTNET_PHOTOS; the generated sample stands in")
    index = build_index("sample" if folder is None else folder)
    split, count = index.splits["train"], TINY_IMAGES if context.tiny else IMAGES
    rows = np.resize(np.arange(len(split)), count)
    fields = {f.name: getattr(split, f.name) for f in dataclasses.fields(split)}
    repeated: dict[str, Any] = {
        name: tuple(value[row] for row in rows) if isinstance(value, tuple) else value[rows]
        for name, value in fields.items()
    }
    # Another content, so that no cache of the photos themselves is taken for one of these.
    train = dataclasses.replace(split, **repeated)
    return dataclasses.replace(index, splits={"train": train}, content=f"{index.content} x {count}")


def _loader(context: Context, index: Any, source: Source, resolution: int, batch: int) -> Any:
    from data_pipeline import choose_cache, make_loader
    from data_pipeline.loaders.augment import Augmentation
    from data_pipeline.loaders.dali_options import DaliOptions

    return make_loader(
        index,
        "train",
        backend=source.backend,  # type: ignore[arg-type]
        cache=choose_cache(source.cache, index, resolution, device=context.device),  # type: ignore[arg-type]
        dali=DaliOptions(**(source.dali or {})),
        resolution=resolution,
        batch_size=batch,
        seed=0,
        train=True,
        augmentation=Augmentation(),
        device=context.device.type,
        workers=source.workers,
    )


def _case(context: Context, what: str, work: Callable[[], Case]) -> Case | None:
    """What `work` found, or why it failed; None, and a note, where something is not installed or does not fit."""
    from data_pipeline import DataError

    def guarded() -> Case:
        try:
            return work()
        except (DataError, ImportError) as missing:  # says what is not installed, and what to do
            context.leave_out(f"{what}: {str(missing).splitlines()[0]}")
            return {}

    return attempt(guarded) or None


def _sources(context: Context) -> list[Source]:
    if context.tiny:
        context.leave_out("GPU cache and the JPEG engine: no GPU")
    return all_sources(min(_cores(), 2) if context.tiny else _cores(), not context.tiny)


def loaders_stage(context: Context) -> Iterator[tuple[str, Case]]:
    """Each source alone: nothing is done with the batches but waiting for them."""
    _, resolution, batch = TINY if context.tiny else WORKS[0]
    seconds = TINY_SECONDS if context.tiny else SECONDS
    index = _index(context)
    for source in _sources(context):
        key = f"{source.name}, {resolution} px, batch {batch}"
        if key in context.cases("loaders") or not context.has_time(3 * seconds, f"loader {key}"):
            continue
        found = _case(
            context,
            f"loader {source.name}",
            lambda source=source: _alone(context, index, source, resolution, batch, seconds),  # type: ignore[misc]
        )
        if found is not None:
            yield key, found


def _alone(context: Context, index: Any, source: Source, resolution: int, batch: int, seconds: float) -> Case:
    began = time.perf_counter()
    loader = _loader(context, index, source, resolution, batch)
    try:
        first = next(loader.batches(0))
        synchronise(context.device)
        found: Case = {"first_batch_seconds": time.perf_counter() - began, "how": loader.description}
        del first
        if source.cache != "none":  # filled once, at the rate of decoding
            found["filling_images_per_second"] = _rate(context, loader.batches(0), batch)
        found["images_per_second"] = _rate(context, _endless(loader, 1), batch, seconds)
    finally:
        loader.close()
    return found


def _endless(loader: Any, epoch: int) -> Iterator[Any]:
    while True:
        yield from loader.batches(epoch)
        epoch += 1


def _rate(context: Context, batches: Iterator[Any], batch: int, seconds: float = float("inf")) -> float:
    synchronise(context.device)
    began, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
        if time.perf_counter() - began > seconds:
            break
    synchronise(context.device)
    return count * batch / (time.perf_counter() - began)


def kernel_stage(context: Context) -> Iterator[tuple[str, Case]]:
    """The augment kernel on stored photos, from a cold L2: images/s, and the bytes that have to move."""
    from data_pipeline.loaders.augment import IMAGENET_MEAN, IMAGENET_STD, Augmentation, train_params
    from kernels.augment import augment, augment_table, traffic

    if context.tiny:
        context.leave_out("the augment kernel: no GPU")
        return
    for _, resolution, batch in WORKS:
        for dtype in (torch.float32, torch.bfloat16):
            key = f"augment kernel, {resolution} px, batch {batch}, {str(dtype).removeprefix('torch.')}"
            if key in context.cases("augment kernel") or not context.has_time(10, key):
                continue
            sizes = np.tile(np.array(STORED, np.int32), (batch, 1))
            params = train_params(Augmentation(), 0, 0, np.arange(batch), sizes)
            length = 3 * STORED[0] * STORED[1]
            pixels = torch.randint(0, 256, (batch * length,), dtype=torch.uint8, device=context.device)
            offsets = torch.arange(batch, device=context.device) * length
            on_device = torch.from_numpy(sizes).to(context.device)
            assert params.colors is not None
            table = augment_table(
                torch.from_numpy(params.windows),
                torch.from_numpy(params.flips),
                colors=torch.from_numpy(params.colors),
                mean=IMAGENET_MEAN,
                std=IMAGENET_STD,
            ).to(context.device)

            def run(
                given: tuple[Any, ...] = (pixels, offsets, on_device, table),
                resolution: int = resolution,
                dtype: torch.dtype = dtype,
            ) -> object:
                return augment(*given, resolution=resolution, dtype=dtype, impl="triton")

            def measure(run: Any = run, moved: int = 0, batch: int = batch) -> Case:
                timing = summarise(sample(run, context.device, cold=ColdCache(context.device)))
                return {
                    "images_per_second": batch / timing.median,
                    "bytes": moved,
                    "bytes_per_second": moved / timing.median,
                    "spread": timing.spread,
                }

            windows = [(int(w), int(h)) for _, _, w, h in params.windows]
            moved = sum(traffic(windows, resolution, dtype).values())
            yield key, attempt(lambda run=run, moved=moved, batch=batch: measure(run, moved, batch))  # type: ignore[misc]


def training_stage(context: Context) -> Iterator[tuple[str, Case]]:
    """Whole epochs from stored pixels or files to updated weights, ours, compiled on a GPU; and the same step on one
    batch that stays on the device, before and after."""
    index, seconds = _index(context), TINY_SECONDS if context.tiny else SECONDS
    sources = {source.name: source for source in _sources(context)}
    # Of DALI the fastest that the loaders stage found, or the plain one.
    rates = {name.rsplit(", ", 2)[0]: found["images_per_second"] for name, found in context.cases("loaders").items()}
    of_dali = [name for name, source in sources.items() if source.backend == "dali"]
    chosen = [name for name, source in sources.items() if source.backend != "dali"]
    chosen.append(max(of_dali, key=lambda name: rates.get(name, 0.0)))
    for work in [TINY] if context.tiny else WORKS:
        missing = [name for name in chosen if _key(work, name) not in context.cases("end to end")]
        if not missing or not context.has_time(60 + 4 * seconds, f"training {work[0]}@{work[1]}"):
            continue
        step = _step(context, work)
        for name in missing:
            key = _key(work, name)
            if not context.has_time(5 * seconds, f"training {key}"):
                continue
            found = _case(
                context,
                f"training with {name}",
                lambda name=name, step=step, work=work: _train(context, index, sources[name], step, work, seconds),  # type: ignore[misc]
            )
            if found is not None:
                yield key, found


def _key(work: tuple[str, int, int], source: str) -> str:
    return f"{work[0]}@{work[1]}, batch {work[2]}, {source}"


def _step(context: Context, work: tuple[str, int, int]) -> Any:
    from fastnet.config import OptimizerOptions
    from fastnet.training.optim import make_optimizer
    from fastnet.training.step import TrainStep

    variant, _, batch = work
    model = build(OURS, variant).to(context.device).to(memory_format=torch.channels_last)
    if not context.tiny:
        model.compile_regions(dynamic=False)  # type: ignore[operator]
    optimizer = make_optimizer(model, OptimizerOptions(), lr=0.064 * batch / 256)
    return TrainStep(model, optimizer, device=context.device, amp="off" if context.tiny else "bf16")


def _train(context: Context, index: Any, source: Source, step: Any, work: tuple[str, int, int], seconds: float) -> Case:
    _, resolution, batch = work
    loader = _loader(context, index, source, resolution, batch)
    try:
        first = next(loader.batches(0))
        kept = first.images.clone(), first.labels.clone()
        for _ in range(3):
            step(*kept)  # compiles
        if source.cache != "none":
            for _ in loader.batches(0):
                pass
        before = _model_rate(context, step, kept, seconds / 2)
        synchronise(context.device)
        began, held, waited, count, epoch = time.perf_counter(), loader.seconds_held, 0.0, 0, 0
        while time.perf_counter() - began < seconds:  # whole epochs, and the start of each
            epoch += 1
            batches = loader.batches(epoch)
            while True:
                asked = time.perf_counter()
                given = next(batches, None)
                waited += time.perf_counter() - asked
                if given is None:
                    break
                step(*given)
                count += 1
        waited -= loader.seconds_held - held  # that was for the device, not for data
        synchronise(context.device)
        spent = time.perf_counter() - began
        after = _model_rate(context, step, kept, seconds / 2)
    finally:
        loader.close()
    rate, alone = count * batch / spent, (before + after) / 2
    return {
        "images_per_second": rate,
        "epochs": epoch,
        "waited_share": waited / spent,
        "model_images_per_second": alone,
        "share_of_model": rate / alone,
        "how": loader.description,
    }


def _model_rate(context: Context, step: Any, kept: tuple[Any, Any], seconds: float) -> float:
    def repeated() -> Iterator[Any]:
        while True:
            yield step(*kept)
            if context.tiny:
                synchronise(context.device)

    # Steps are queued faster than they run: in lots of ten, of which each is waited for.
    began, count = time.perf_counter(), 0
    steps = repeated()
    while time.perf_counter() - began < seconds:
        for _ in islice(steps, 1 if context.tiny else 10):
            count += 1
        synchronise(context.device)
    return count * len(kept[1]) / (time.perf_counter() - began)


def show_rates(cases: dict[str, Case]) -> str:
    lines = []
    for key, found in cases.items():
        line = f"{key:<58}{found['images_per_second']:10.1f} img/s"
        if "filling_images_per_second" in found:
            line += f", filled at {found['filling_images_per_second']:.0f}"
        if "first_batch_seconds" in found:
            line += f", first batch after {found['first_batch_seconds']:.1f} s"
        if "bytes_per_second" in found:
            line += f", {found['bytes_per_second'] / 1e9:.0f} GB/s of {found['bytes'] / 1e6:.0f} MB"
        if "share_of_model" in found:
            line += f", {found['share_of_model']:.1%} of the model's {found['model_images_per_second']:.1f}"
            line += f", {found['waited_share']:.0%} of it waiting for data"
        lines.append(line)
    return "\n".join(lines)


LOADERS = Stage("loaders", loaders_stage, show_rates)
KERNEL = Stage("augment kernel", kernel_stage, show_rates)
END_TO_END = Stage("end to end", training_stage, show_rates)
