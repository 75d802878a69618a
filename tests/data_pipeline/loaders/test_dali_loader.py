"""DALI's graph with and without a GPU, its options, and files that DALI alone refuses."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from data_pipeline import Augmentation, Batch, DataError, Index, build_index, make_loader
from data_pipeline.dataset.probe import BASELINE, OTHER, PROGRESSIVE
from data_pipeline.dataset.tar import TarMember
from data_pipeline.loaders import dali_loader as dali
from data_pipeline.loaders.augment import IMAGENET_STD
from data_pipeline.loaders.dali_loader import DaliLoader
from data_pipeline.loaders.dali_options import DaliOptions
from data_pipeline.loaders.loader import Loader, Plan
from data_pipeline.loaders.prefetch import SideStream
from tests.batches import one_sentence, same, write_photos


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(write_photos(tmp_path_factory.mktemp("photos")), cache_dir=tmp_path_factory.mktemp("index"))


def make(index: Index, **changes: Any) -> Loader:
    settings: dict[str, Any] = dict(backend="dali", resolution=24, batch_size=4, seed=3, workers=2, augmentation=None)
    return make_loader(index, "train", train=True, **{**settings, **changes})


def everything(made: Loader) -> list[Batch]:
    batches = [Batch(batch.images.clone(), batch.labels) for epoch in range(2) for batch in made.batches(epoch)]
    made.close()
    return batches


OPTIONS = (
    DaliOptions(dali_prefetch=1),
    DaliOptions(dali_prefetch=5),
    DaliOptions(dali_decode="whole"),
    DaliOptions(dali_engine_share=0),
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_option_changes_an_image(index: Index, options: DaliOptions) -> None:
    assert same(everything(make(index, dali=options)), everything(make(index)))


@pytest.mark.parametrize("change", [{"dali_prefetch": 0}, {"dali_engine_share": 1.1}, {"dali_engine_share": -0.1}])
def test_options_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        DaliOptions(**change)


def test_the_choice_is_shown(index: Index) -> None:
    options = DaliOptions(dali_prefetch=3, dali_decode="whole", dali_engine_share=0.9)
    on_cpu = make(index, dali=options).description
    assert on_cpu == "dali (2 threads decode whole photos, 3 batches ahead)"
    on_gpu = DaliLoader(plan_of(index), "cuda", 7, DaliOptions()).description
    assert on_gpu == "dali (7 threads decode crops, 65% for the JPEG engine, 2 batches ahead)"


def plan_of(index: Index, kinds: tuple[int, ...] = ()) -> Plan:
    split = index.splits["train"]
    changed = split.kinds.copy()
    changed[: len(kinds)] = kinds
    return Plan(dataclasses.replace(split, kinds=changed), 24, 4, 3, True, Augmentation())


def gpu_graph(plan: Plan, options: DaliOptions) -> list[dict[str, str]]:
    """Operator and arguments of each node of the pipeline for a GPU, which only its build needs."""
    source = dali._Source(plan, on_gpu=True)
    pipe = dali._pipeline(source, "mixed", options, batch_size=4, num_threads=2, device_id=0, prefetch_queue_depth=2)
    pipe._build_graph()
    nodes = []
    for op in pipe._ops:
        text = str(op.spec)
        arguments = dict(re.findall(r"^    (\w+): (.*)$", text, re.MULTILINE))
        nodes.append({"operator": text.split()[2].rstrip(":"), **arguments})
    return nodes


@pytest.mark.parametrize("kinds", [(), (PROGRESSIVE, BASELINE, PROGRESSIVE)])
def test_on_a_gpu_the_engine_gets_its_share_of_jpegs_and_everything_after_stays_there(
    index: Index, kinds: tuple[int, ...]
) -> None:
    nodes = gpu_graph(plan_of(index, kinds), DaliOptions(dali_engine_share=0.75))
    (decoder,) = [node for node in nodes if "decoders" in node["operator"].lower()]
    assert decoder["operator"] == "decoders__ImageSlice"
    assert decoder["device"] == "mixed"
    assert float(decoder["hw_decoder_load"]) == 0.75
    assert decoder["jpeg_fancy_upsampling"] == "True"
    later = {node["operator"]: node["device"] for node in nodes[nodes.index(decoder) + 1 :]}
    assert (later["Resize"], later["CropMirrorNormalize"]) == ("gpu", "gpu"), later
    whole = gpu_graph(plan_of(index, kinds), DaliOptions(dali_decode="whole"))
    assert [n["device"] for n in whole if n["operator"] in ("decoders__Image", "Slice")] == ["mixed", "gpu"]
    assert [n["jpeg_fancy_upsampling"] for n in whole if n["operator"] == "decoders__Image"] == ["True"]


def test_four_channel_jpegs_stay_on_the_threads_of_a_gpu_pipeline(index: Index) -> None:
    nodes = gpu_graph(plan_of(index, (BASELINE, OTHER)), DaliOptions())
    decoders = {node["device"]: node for node in nodes if node["operator"] == "decoders__ImageSlice"}
    assert set(decoders) == {"cpu", "mixed"}
    assert "hw_decoder_load" not in decoders["cpu"]
    fed = dali._Source(plan_of(index, (BASELINE, OTHER)), on_gpu=True)
    step = fed.plan.step(0, 0)
    assert [int(index) for index, cpu in zip(step.indices, fed.fed(step)[4], strict=True) if cpu] == [
        index for index in step.indices.tolist() if index == 1
    ]


def test_a_file_that_dali_alone_refuses_is_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if another decoder took it: the rest of the epoch is seen once each."""
    index = build_index(write_photos(tmp_path), cache_dir=tmp_path / "cache")
    split = index.splits["train"]
    made = make(index, batch_size=5)
    bad = int(made.plan.order(0)[6])  # in the second of two batches; the epoch leaves two images out
    Path(split.paths[bad]).write_bytes(b"\xff\xd8 not a photo")
    sizes = {split.paths[i]: tuple(split.sizes[i].tolist()) for i in range(len(split))}
    monkeypatch.setattr(dali, "probe_image", lambda path: (*sizes[path], 1))
    batches = list(made.batches(0))
    assert [len(batch.labels) for batch in batches] == [5, 5]
    ((path, reason),) = made.quarantined
    assert path == split.paths[bad]
    assert reason.startswith("DALI refuses it: ")
    assert "\n" not in reason
    seen = made.plan.order(0).tolist()
    assert bad not in seen
    assert len(set(seen)) == 10
    assert torch.cat([batch.labels for batch in batches]).tolist() == split.labels[seen].tolist()
    made.close()


# --- feeding --------------------------------------------------------------------------------------------------------


def test_dali_is_fed_arrays(index: Index) -> None:
    """A list costs DALI a call for each image."""
    source = dali._Source(plan_of(index, (BASELINE, OTHER)), on_gpu=True)
    step = source.plan.step(0, 1)
    names, anchors, shapes, flips, on_threads = source.fed(step)
    for column in (names, anchors, shapes, flips, on_threads):
        assert isinstance(column, np.ndarray)
        assert len(column) == 4
    paths = [source.plan.split.paths[at] for at in step.indices]
    assert [bytes(name).rstrip(b"\0").decode() for name in names] == paths
    windows = np.concatenate([np.asarray(anchors)[:, ::-1], np.asarray(shapes)[:, ::-1]], axis=1)
    assert (windows == step.params.windows).all()


def test_shards_are_read_ahead_by_another_thread(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, str]] = []

    def bytes_of(source: dali._Source, index: int) -> bytes:
        read.append((source.plan.split.paths[index], threading.current_thread().name))
        return b"photo"

    monkeypatch.setattr(dali._Source, "_bytes_of", bytes_of)
    split = index.splits["train"]
    members = tuple(TarMember("s.tar", f"{at}.jpg", 512, 5) for at in range(len(split)))
    plan = Plan(dataclasses.replace(split, paths=members), 24, 2, 3, True, Augmentation())
    source = dali._Source(plan, on_gpu=False)
    source.positions.extend((0, number) for number in range(5))
    order = [str(members[at]) for at in plan.order(0)]
    given = 0
    while True:
        try:
            source()
        except StopIteration:
            break
        given += 1
        for made in source._ahead:
            made.result()
        seen = sorted(path for path, _ in read)
        assert seen == sorted(order[: 2 * min(5, given + dali._READ_AHEAD)])
    assert given == 5
    assert threading.current_thread().name not in {thread for _, thread in read}
    assert [step.indices.tolist() for step in source.under_way] == [plan.step(0, n).indices.tolist() for n in range(5)]
    source.close()


def test_a_pass_that_is_left_takes_what_was_read_ahead_with_it(index: Index) -> None:
    source = dali._Source(plan_of(index), on_gpu=False)
    source.positions.extend((0, number) for number in range(3))
    source()
    source.forget()
    source.positions.append((1, 2))
    source()
    assert source.under_way[-1].indices.tolist() == source.plan.step(1, 2).indices.tolist()
    with pytest.raises(StopIteration):
        source()
    source.close()


# --- a GPU's batches and memory, with stand-ins -----------------------------------------------------------------------


class Pixels:
    """Stands in for DALI's tensor on a GPU: copies host memory, and remembers how it was asked to."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.asked = pixels, []  # type: ignore[var-annotated]

    def as_tensor(self) -> Pixels:
        return self

    def shape(self) -> list[int]:
        return list(self.pixels.shape)

    def copy_to_external(self, pointer: Any, stream: Any = None, non_blocking: bool = False) -> None:
        self.asked.append((stream.value, non_blocking))
        if pointer.value:
            ctypes.memmove(pointer, self.pixels.ctypes.data, self.pixels.nbytes)


def test_a_batch_is_copied_in_the_order_of_torchs_stream() -> None:
    pixels = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)
    theirs = Pixels(pixels)
    stream: Any = SimpleNamespace(cuda_stream=4321)
    ours = dali.copied(theirs, torch.device("cpu"), stream)
    assert theirs.asked == [(4321, True)]
    assert torch.equal(ours, torch.from_numpy(pixels.copy()))
    pixels[:] = 0  # DALI fills its buffer again
    assert ours.max() == 53


def on_a_gpu(index: Index, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> DaliLoader:
    """A loader whose pipeline is `pipe` and whose device holds no values."""
    stream = SimpleNamespace(cuda_stream=99)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    made = DaliLoader(plan_of(index), "cuda", 1, DaliOptions())
    made.device, made._pipe, made._beside = torch.device("meta"), pipe, SideStream(torch.device("cpu"))
    return made


def test_dali_fills_and_copies_on_the_same_stream_and_hands_over_nothing_of_its_own(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "from_dlpack", lambda _: pytest.fail("a tensor of DALI's is handed over"))
    theirs, ran_on = Pixels(np.zeros((4, 24, 24, 3), np.uint8)), []

    def run(stream: Any) -> tuple[Pixels]:
        ran_on.append(stream.cuda_stream)
        return (theirs,)

    pipe = SimpleNamespace(run=run)
    found = on_a_gpu(index, pipe, monkeypatch)._run()
    assert (ran_on, theirs.asked) == ([99], [(99, True)])
    assert found.shape == (4, 3, 24, 24)
    assert found.is_contiguous(memory_format=torch.channels_last)


NO_MEMORY = [
    RuntimeError(
        "Critical error in pipeline:\nError in MIXED operator `decoders.image_slice`:\nCUDA allocation failed"
    ),
    RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"),
    RuntimeError("nvJPEG error (5): allocator failure"),
    RuntimeError("Cannot allocate memory"),
    MemoryError("std::bad_alloc"),
]


def failing(error: BaseException) -> Any:
    def run(stream: Any = None) -> Any:
        raise error

    return SimpleNamespace(run=run)


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_no_memory_is_not_a_bad_file(index: Index, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    made = on_a_gpu(index, failing(error), monkeypatch)
    monkeypatch.setattr(made, "_rewind", lambda: made._source.under_way.extend([made.plan.step(0, 0)]))
    with pytest.raises(DataError) as caught:
        next(made.batches(0))
    one_sentence(caught.value, "no memory left", "--batch-size", "--dali-prefetch 1", "--cache ram")
    assert made.quarantined == []
    assert made._pipe is None


def test_torchs_own_lack_of_memory_stays_what_it_is(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    made = on_a_gpu(index, failing(torch.OutOfMemoryError("CUDA out of memory.")), monkeypatch)
    monkeypatch.setattr(made, "_changed", lambda _: pytest.fail("files are looked at"))
    with pytest.raises(torch.OutOfMemoryError):
        made._run()


def test_a_file_that_asks_for_too_much_memory_is_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build_index(write_photos(tmp_path), cache_dir=tmp_path / "cache")
    made = on_a_gpu(index, failing(NO_MEMORY[0]), monkeypatch)
    step = made.plan.step(0, 0)
    made._source.under_way.append(step)
    Path(index.splits["train"].paths[step.indices[2]]).write_bytes(b"\xff\xd8 damaged")
    with pytest.raises(dali.BadFiles) as caught:
        made._run()
    assert list(caught.value.reasons) == [step.indices[2]]


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_no_memory_to_start_with_is_said(index: Index, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> None:
        raise error

    monkeypatch.setattr(dali, "_pipeline", lambda *_, **__: SimpleNamespace(build=build))
    with pytest.raises(DataError) as caught:
        make(index)._start()  # type: ignore[attr-defined]
    one_sentence(caught.value, "no memory left", "--batch-size", "--workers")


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["window", "whole"])
def test_on_a_gpu_the_images_are_torchvisions(photos: Path, tmp_path: Path, decode: Any, cuda: torch.device) -> None:
    index = build_index(photos, cache_dir=tmp_path)
    kinds = index.splits["val"].kinds.copy()
    kinds[::5] = OTHER  # those go over the threads
    index.splits["val"] = dataclasses.replace(index.splits["val"], kinds=kinds)
    common: dict[str, Any] = dict(resolution=200, batch_size=50, seed=0, train=False, workers=4, augmentation=None)
    ours = make_loader(index, "val", backend="dali", device=cuda, dali=DaliOptions(dali_decode=decode), **common)
    theirs = make_loader(index, "val", backend="torch", **common)
    scale = 255 * torch.tensor(IMAGENET_STD)[:, None, None]
    for a, b in zip(ours.batches(0), theirs.batches(0), strict=True):
        assert a.images.is_cuda
        assert a.images.is_contiguous(memory_format=torch.channels_last)
        off = ((a.images.cpu() - b.images) * scale).flatten(1)
        assert off.mean(1).abs().max() <= 0.5
        assert off.abs().quantile(0.99, dim=1).max() <= 2
