"""The next batch is made beside the step: after what it needs, in memory that is free, waiting for nobody, and at most
one step ahead. On stand-ins for streams and copies; `gpu` tests ask a GPU itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from data_pipeline import Augmentation, Batch, Index, build_index, make_loader
from data_pipeline.errors import BadFiles
from data_pipeline.loaders import cached_loader, prefetch
from data_pipeline.loaders import device_loader as device_augment
from data_pipeline.loaders.augment import train_params
from data_pipeline.loaders.cache import PixelCache
from data_pipeline.loaders.loader import Loader, Plan, dali_installed
from data_pipeline.loaders.postprocess import finish
from data_pipeline.loaders.prefetch import SideStream, sent, staging
from data_pipeline.loaders.torch_loader import TorchLoader
from tests.batches import same, write_photos
from tests.cuda_stand_in import Device, Memory, stand_in, watched
from tests.data_pipeline.dataset.test_shards import split_of

CUDA = torch.device("cuda", 0)
STEPS = 8


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(write_photos(tmp_path_factory.mktemp("photos")), cache_dir=tmp_path_factory.mktemp("index"))


# --- order and memory -----------------------------------------------------------------------------------------------


def produce(device: Device, count: int) -> Iterator[list[Memory]]:
    """Batches of one tensor, which the current stream fills with the number of the batch in two pieces of work."""

    def make(number: int) -> list[Memory]:
        given = Memory(device)
        for part in (0, 1):
            value = number if part else -2 - number
            device.current[-1].put(f"make {number}.{part}", functools.partial(setattr, given.block, "value", value))
        return [given]

    for number in range(count):
        yield make(number)  # no loader keeps a batch


def step(device: Device, number: int, batch: list[Memory]) -> None:
    """Work of the consumer's that reads the batch when it runs."""
    block = batch[0].block

    def read() -> None:
        assert block.value == number, f"step {number} read {block.value}"

    for part in (0, 1):
        device.current[-1].put(f"step {number}.{part}", read)


@pytest.mark.parametrize("drops", ["late", "at once"])
@pytest.mark.parametrize("seed", range(25))
def test_a_step_reads_its_batch_and_memory_is_used_again_when_it_is_done(seed: int, drops: str) -> None:
    with stand_in(seed) as device:
        for number, batch in enumerate(SideStream(CUDA).feed(produce(device, STEPS))):  # type: ignore[type-var]
            step(device, number, batch)
            if drops == "at once":
                batch.clear()
        device.finish()
        assert len(device.ran) == 4 * STEPS
        assert device.blocks <= 3


def test_a_batch_is_made_while_the_step_before_it_runs() -> None:
    ahead = 0
    for seed in range(10):
        with stand_in(seed) as device:
            for number, batch in enumerate(SideStream(CUDA).feed(produce(device, STEPS))):  # type: ignore[type-var]
                step(device, number, batch)
            device.finish()
            at = {name: place for place, name in enumerate(device.ran)}
            ahead += sum(at[f"make {n + 1}.1"] < at[f"step {n}.1"] for n in range(STEPS - 1))
            # But no batch of three steps on, for which memory would have to be kept.
            assert all(at[f"step {n}.1"] < at[f"make {n + 3}.0"] for n in range(STEPS - 3))
    assert ahead > STEPS


def test_what_the_consumer_did_before_a_pass_is_done_before_its_first_batch() -> None:
    """A cache's buffer is made there, perhaps where something else was still read."""
    for seed in range(10):
        with stand_in(seed) as device:
            device.default.put("before", lambda: None)
            for _ in SideStream(CUDA).feed(produce(device, 1)):  # type: ignore[type-var]
                pass
            device.finish()
            assert device.ran.index("before") < device.ran.index("make 0.0")


class Numbers(Loader):
    """Loads nothing: its batches hold a number each, and the images that `bad` names cannot be read."""

    backend = "numbers"

    def __init__(self, device: Any, bad: Sequence[int] = (), made: Any = None) -> None:
        super().__init__(Plan(split_of(20), 8, 4, 1, True, Augmentation()), device, 1)
        self.bad, self.made = set(bad), made

    def _produce(self, epoch: int, numbers: Sequence[int]) -> Iterator[Any]:
        for number in numbers:
            indices = self.plan.step(epoch, number).indices
            if found := self.bad & set(indices.tolist()):
                raise BadFiles(dict.fromkeys(found, "damaged"))
            yield Batch(self.made(indices), self.made(indices))


def test_passes_starts_and_quarantine_are_those_of_a_cpu() -> None:
    def seen(loader: Loader, epoch: int = 0, start: int = 0) -> list[list[int]]:
        return [batch.images.indices.tolist() for batch in loader.batches(epoch, start)]  # type: ignore[attr-defined]

    def on_cpu(indices: Any) -> Any:
        return SimpleNamespace(indices=indices)

    with stand_in(0) as device:

        def on_gpu(indices: Any) -> Any:
            made = Memory(device)
            made.indices = indices  # type: ignore[attr-defined]
            return made

        for bad in ((), (3, 11)):
            cpu, gpu = Numbers("cpu", bad, on_cpu), Numbers(CUDA, bad, on_gpu)
            for epoch, start in ((0, 0), (0, 2), (1, 0), (1, 4), (1, 5)):
                assert seen(gpu, epoch, start) == seen(cpu, epoch, start)
            assert gpu.quarantined == cpu.quarantined
            assert len(gpu.quarantined) == len(bad)
            left = gpu.batches(0)
            next(left)
            assert seen(gpu, 1) == seen(cpu, 1)
            with pytest.raises(RuntimeError, match="another one started"):
                next(left)
            left = gpu.batches(0)
            next(left)
            gpu.close()
            with pytest.raises(RuntimeError, match="was closed"):
                next(left)


def test_on_a_cpu_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: pytest.fail("a stream"))
    side = SideStream(torch.device("cpu"))
    given = [[torch.ones(1)], [torch.zeros(1)]]
    assert [batch is mine for batch, mine in zip(side.feed(iter(given)), given, strict=True)] == [True, True]
    assert side.seconds_held == 0
    parts = [torch.ones(2), torch.arange(3)]
    assert [a is b for a, b in zip(sent(parts, side.device), parts, strict=True)] == [True, True]


def test_waiting_for_the_device_is_told_from_waiting_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 5))  # each look at the clock is five seconds after the last
    with stand_in(0) as device:
        monkeypatch.setattr("data_pipeline.loaders.prefetch.time", SimpleNamespace(perf_counter=lambda: next(seconds)))
        side = SideStream(CUDA)
        for _ in side.feed(produce(device, STEPS)):  # type: ignore[type-var]
            pass
    assert side.seconds_held == 5 * (STEPS - 1)


# --- copies ---------------------------------------------------------------------------------------------------------


def test_parameters_go_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.arange(5), torch.rand(3, 2), torch.rand(4, 2).T, torch.arange(7, dtype=torch.uint8), torch.ones(0)]
    with watched() as watch:
        found = sent(parts, CUDA)
        assert (watch.copies, watch.waits) == (1, [])
    for part, there in zip(parts, found, strict=True):
        assert (there.shape, there.dtype, there.device) == (part.shape, part.dtype, CUDA)
        assert there.is_contiguous()
        assert there.storage_offset() * there.element_size() % 16 == 0
    staged: list[torch.Tensor] = []

    def zeros(shape: Any, dtype: torch.dtype, _: Any) -> torch.Tensor:
        staged.append(torch.zeros(shape, dtype=dtype))
        return staged[0]

    # Values are seen last in the memory that is copied.
    monkeypatch.setattr(prefetch, "staging", zeros)
    for part, place in zip(parts, sent(parts, torch.device("meta")), strict=True):
        start = place.storage_offset() * place.element_size()
        held = staged[0][start : start + part.numel() * part.element_size()].view(part.dtype).view(part.shape)
        assert torch.equal(held, part)


@pytest.mark.parametrize("operations", [0, 2])
@pytest.mark.parametrize("erasing", [0.0, 0.5])
@pytest.mark.parametrize("hue", [0.0, 5.0])
def test_the_last_step_of_a_batch_waits_for_nobody(operations: int, erasing: float, hue: float) -> None:
    """RandAugment met a blocking copy in each operation that moves pixels, and in sharpness."""
    aug = Augmentation(
        rand_augment_ops=operations, random_erasing=erasing, brightness=0, contrast=0, saturation=0, hue=hue
    )
    params = train_params(aug, 7, 0, np.arange(60), np.full((60, 2), 100))
    if params.operations is not None:
        assert len(np.unique(params.operations)) == 14
    with watched() as watch:
        pixels = staging((60, 20, 20, 3), torch.uint8, CUDA)
        images = finish(pixels.permute(0, 3, 1, 2), params, CUDA)
    assert watch.waits == []
    assert watch.copies == 2 + bool(operations)  # pixels, parameters, and RandAugment's
    assert (images.shape, images.dtype, images.device) == ((60, 3, 20, 20), torch.float32, CUDA)
    assert images.is_contiguous(memory_format=torch.channels_last)


def plain_kernel(
    pixels: torch.Tensor, offsets: torch.Tensor, sizes: torch.Tensor, table: torch.Tensor, **how: Any
) -> Any:
    for given in (pixels, offsets, sizes, table):
        assert given.device == CUDA
    shape = len(offsets), how["resolution"], how["resolution"], 3
    return torch.empty(shape, dtype=how["dtype"], device=CUDA).permute(0, 3, 1, 2)


class Here:
    """A pool without threads: fake tensors know one thread only."""

    def submit(self, act: Any, *given: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(act(*given))
        return done

    def shutdown(self, **_: Any) -> None:
        pass


@pytest.mark.parametrize("operations", [0, 2])
@pytest.mark.parametrize("kind", ["ram", "gpu"])
def test_a_cache_feeds_a_gpu_without_waiting(
    index: Index, tmp_path: Path, kind: Any, operations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first pass too, which puts the images where they are kept."""
    monkeypatch.setattr(device_augment, "augment", plain_kernel)
    for module in (cached_loader, device_augment):
        monkeypatch.setattr(module, "one_thread_each", lambda _: Here())
    monkeypatch.setattr(cached_loader, "resizer", lambda compiling: None)  # C++ knows no tensors without values
    pixels = PixelCache(kind, "", index, 24, tmp_path)
    if kind == "ram":
        pixels.store("train", 1)[0].complete(1)
    with watched() as watch:
        made: Any = make_loader(
            index, "train", train=True, cache=pixels, resolution=24, batch_size=5, seed=3, workers=1, device=CUDA,
            augmentation=Augmentation(rand_augment_ops=operations, random_erasing=0.5),
        )  # fmt: skip
        if kind == "gpu":
            sizes = made.store.host.sizes
            monkeypatch.setattr(made.store, "fetch", lambda at: torch.empty(*sizes[at, ::-1], 3, dtype=torch.uint8))
        made._beside = SideStream(torch.device("cpu"))
        copies = []
        for _ in range(1 if kind == "ram" else 2):
            before = watch.copies
            for batch in made.batches(0):
                assert (batch.images.device, batch.labels.device) == (CUDA, CUDA)
                assert (batch.images.shape, batch.labels.dtype) == ((5, 3, 24, 24), torch.int64)
            copies.append((watch.copies - before) / made.steps_per_epoch)
        made.close()
    assert watch.waits == []
    # RAM: pixels, labels and parameters. GPU: parameters alone; with RandAugment those of the last step and labels too.
    assert copies[-1] == (3 if kind == "ram" else 1 + 2 * bool(operations)) + bool(operations)
    assert (copies[0] > copies[-1]) == (kind == "gpu")


@pytest.mark.skipif(not dali_installed(), reason="DALI is not installed")
def test_dali_feeds_a_gpu_without_waiting(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.loaders import dali_loader as dali

    made = make_loader(
        index, "train", backend="dali", train=True, resolution=24, batch_size=4, seed=3, workers=1, device=CUDA,
        augmentation=None,
    )  # fmt: skip
    assert isinstance(made, dali.DaliLoader)
    source = made._source

    class Pipe:
        def run(self, stream: Any) -> tuple[Any]:
            source()
            return (SimpleNamespace(as_tensor=lambda: None),)

    def copied(tensor: Any, device: torch.device, stream: Any) -> torch.Tensor:
        return torch.empty(4, 24, 24, 3, dtype=torch.uint8, device=device)

    monkeypatch.setattr(dali, "copied", copied)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: None)
    monkeypatch.setattr(made, "_start", Pipe)
    with watched() as watch:
        made._beside = SideStream(torch.device("cpu"))
        for batch in made.batches(0):
            assert batch.images.device == CUDA
    made.close()
    assert (watch.waits, watch.copies) == ([], 2 * made.steps_per_epoch)


def test_torchs_workers_hand_over_pinned_memory(index: Index) -> None:
    plan = dataclasses.replace(Plan(index.splits["train"], 24, 4, 3, True, Augmentation()))
    assert TorchLoader(plan, CUDA, 1)._start().pin_memory
    assert not TorchLoader(plan, "cpu", 1)._start().pin_memory


def test_what_waits_is_seen() -> None:
    """The watch itself."""
    with watched() as watch:
        there = torch.ones(4, device=CUDA)
        torch.full((), 0.5, device=CUDA).add_(1)
        there[there > 0] = 0.0
        assert watch.waits == []
        torch.tensor([1.0, 2.0], device=CUDA)
        torch.ones(3).to(CUDA, non_blocking=True)
        staging([3], torch.uint8, CUDA).to(CUDA)
        there.to("cpu", non_blocking=True)
        assert len(watch.waits) == 4
        there[torch.tensor([0, 1])]
        assert len(watch.waits) == 5
        for wait in (lambda: there[0].item(), lambda: there[there > 0]):
            # Of a tensor without values.
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                wait()
        assert watch.waits[5:7] == ["_local_scalar_dense", "index"]
        assert watch.copies == 0


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "ram", "gpu"])
@pytest.mark.parametrize("operations", [0, 2])
def test_on_a_gpu_nothing_waits_and_every_batch_is_the_one_that_is_made_alone(
    photos: Path, tmp_path: Path, cuda: torch.device, kind: Any, operations: int
) -> None:
    index = build_index(photos, cache_dir=tmp_path)
    aug = Augmentation(rand_augment_ops=operations, random_erasing=0.25)
    pixels = PixelCache(kind, "", index, 96, tmp_path)
    made = make_loader(
        index, "train", backend="torch", train=True, cache=pixels, resolution=96, batch_size=32, seed=3, workers=2,
        device=cuda, augmentation=aug,
    )  # fmt: skip
    alone = []
    for number in range(made.steps_per_epoch):
        batch = next(made.batches(0, number))
        torch.cuda.synchronize()
        alone.append(Batch(batch.images.clone(), batch.labels.clone()))
    busy, found = torch.zeros(4096, 4096, device=cuda), []
    torch.cuda.set_sync_debug_mode("error" if kind != "none" else "default")  # DataLoader's own threads may wait
    try:
        for batch in made.batches(0):
            for _ in range(5):
                busy = busy @ busy  # the step, during which the next batch is made
            found.append(Batch(batch.images.clone(), batch.labels.clone()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    made.close()
    assert same(found, alone)
