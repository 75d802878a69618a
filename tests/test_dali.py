"""DALI's graph with and without a GPU, its options, and files that DALI alone refuses."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from data_pipeline import Augmentation, Batch, Index, build_index, dali, make_loader
from data_pipeline.augment import IMAGENET_STD
from data_pipeline.dali import DaliLoader
from data_pipeline.dali_options import DaliOptions
from data_pipeline.loader import Loader, Plan
from data_pipeline.probe import BASELINE, CMYK, PROGRESSIVE
from tests.batches import same, write_photos


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
    later = {node["operator"]: node["device"] for node in nodes[nodes.index(decoder) + 1 :]}
    assert (later["Resize"], later["CropMirrorNormalize"]) == ("gpu", "gpu"), later
    whole = gpu_graph(plan_of(index, kinds), DaliOptions(dali_decode="whole"))
    assert [n["device"] for n in whole if n["operator"] in ("decoders__Image", "Slice")] == ["mixed", "gpu"]


def test_four_channel_jpegs_stay_on_the_threads_of_a_gpu_pipeline(index: Index) -> None:
    nodes = gpu_graph(plan_of(index, (BASELINE, CMYK)), DaliOptions())
    decoders = {node["device"]: node for node in nodes if node["operator"] == "decoders__ImageSlice"}
    assert set(decoders) == {"cpu", "mixed"}
    assert "hw_decoder_load" not in decoders["cpu"]
    fed = dali._Source(plan_of(index, (BASELINE, CMYK)), on_gpu=True)
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


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["window", "whole"])
def test_on_a_gpu_the_images_are_torchvisions(photos: Path, tmp_path: Path, decode: Any, cuda: torch.device) -> None:
    index = build_index(photos, cache_dir=tmp_path)
    kinds = index.splits["val"].kinds.copy()
    kinds[::5] = CMYK  # those go over the threads
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
