"""Part 4 of the proof at tiny sizes: what is measured, what is left out, and with which reason."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.proof import pipeline as proof_pipeline
from bench.stages import Context
from data_pipeline import build_index
from data_pipeline.loaders import loader
from tests.batches import write_photos


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    root = write_photos(tmp_path / "photos", each=12)
    monkeypatch.setattr(proof_pipeline, "photos_folder", lambda: root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(proof_pipeline, "TINY", ("b0", 32, 8))
    monkeypatch.setattr(proof_pipeline, "TINY_SECONDS", 0.02)
    names = ("RAM cache", "DALI, 2 threads,")
    every = proof_pipeline.all_sources
    monkeypatch.setattr(
        proof_pipeline, "all_sources", lambda *given: [s for s in every(*given) if s.name.startswith(names)]
    )
    return Context(torch.device("cpu"), time.monotonic() + 300, {})


def test_sources_are_named_once_and_sweep_threads_and_options_on_a_gpu() -> None:
    sources = proof_pipeline.all_sources(16, True)
    assert len({source.name for source in sources}) == len(sources)
    assert [s.workers for s in sources if s.backend == "dali" and s.dali is None] == [1, 2, 4, 8, 16]
    tried = {tuple(s.dali.items()) for s in sources if s.dali}
    assert {(("dali_decode", "whole"),), (("dali_engine_share", 0.0),), (("dali_engine_share", 1.0),)} <= tried
    assert {s.cache for s in sources} == {"none", "ram", "gpu"}
    assert "gpu" not in {s.cache for s in proof_pipeline.all_sources(2, False)}


def test_photos_are_repeated_to_an_epoch_of_their_own(context: Context) -> None:
    index = proof_pipeline._index(context)
    photos = build_index(proof_pipeline.photos_folder() or "").splits["train"]
    train = index.splits["train"]
    assert len(train) == len(train.paths) == proof_pipeline.TINY_IMAGES
    for at in (0, 23, 24, 50):
        assert train.paths[at] == photos.paths[at % 24]
        assert np.array_equal(train.sizes[at], photos.sizes[at % 24])
    assert index.content != build_index(proof_pipeline.photos_folder() or "").content


def test_what_is_not_installed_is_left_out_with_its_reason(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "dali_installed", lambda: False)
    cases = dict(proof_pipeline.loaders_stage(context))
    assert [name.partition(" ")[0] for name in cases] == ["RAM"]
    (found,) = cases.values()
    assert found["images_per_second"] > 0
    assert found["filling_images_per_second"] > 0
    assert any("pip install nvidia-dali" in line for line in context.left_out)
    assert list(proof_pipeline.kernel_stage(context)) == []
    assert "the augment kernel: no GPU" in context.left_out


def test_a_broken_source_is_a_failed_case(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(proof_pipeline, "_alone", broken)
    for found in dict(proof_pipeline.loaders_stage(context)).values():
        assert found["error"] == "ZeroDivisionError: by nothing"


@pytest.mark.slow
def test_training_is_set_against_the_model_alone(context: Context) -> None:
    context.stages["loaders"] = {"cases": {}}
    cases = dict(proof_pipeline.training_stage(context))
    for found in cases.values():
        assert found["epochs"] >= 1
        assert 0 < found["waited_share"] < 1
        assert found["share_of_model"] == found["images_per_second"] / found["model_images_per_second"]
    assert any("RAM cache" in name for name in cases)
    assert "of the model's" in proof_pipeline.show_rates(cases)
