"""What each of several processes takes of a batch: all of it together, each image once, and pairs stay together."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import Augmentation, Shard, build_index, make_loader
from data_pipeline.dataset.index import Split
from data_pipeline.loaders.augment import epoch_order
from data_pipeline.loaders.loader import Plan
from tests.runs import make_pictures


@given(count=st.integers(1, 60), ranks=st.integers(1, 5), parts=st.integers(1, 4))
def test_shares_make_up_the_batch_and_differ_by_one_at_most(count: int, ranks: int, parts: int) -> None:
    shares = [Shard(rank, ranks, parts).rows(count).tolist() for rank in range(ranks)]
    assert sorted(chain(*shares)) == list(range(count))
    assert all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(each=st.integers(1, 5), ranks=st.integers(1, 4), parts=st.integers(1, 4))
def test_opposite_rows_and_parts_stay_together(each: int, ranks: int, parts: int) -> None:
    count = 2 * each * ranks * parts
    for rank in range(ranks):
        rows = Shard(rank, ranks, parts).rows(count)
        assert (rows[::-1] == count - 1 - rows).all()
        of_part = np.split(rows // (count // parts), parts)
        assert [set(found.tolist()) for found in of_part] == [{part} for part in range(parts)]


def split_of(size: int) -> Split:
    return Split(
        paths=tuple(f"{i}.jpg" for i in range(size)),
        labels=np.zeros(size, np.int64),
        sizes=np.full((size, 2), 40, np.int32),
        orientations=np.ones(size, np.uint8),
        kinds=np.zeros(size, np.uint8),
    )


@given(
    size=st.integers(6, 60), batch=st.integers(4, 20), before=st.integers(1, 4), after=st.integers(1, 4),
    stop=st.integers(0, 15), seed=st.integers(0, 9),
)  # fmt: skip
def test_an_epoch_that_changes_its_ranks_midway_shows_every_image_once(
    size: int, batch: int, before: int, after: int, stop: int, seed: int
) -> None:
    def seen(rank: int, ranks: int, steps: range) -> list[int]:
        plan = Plan(split_of(size), 8, batch, seed, True, Augmentation(), shard=Shard(rank, ranks))
        return [int(i) for step in steps for i in plan.step(0, step).indices]

    steps = size // batch
    stop = min(stop, steps)
    first = (seen(rank, before, range(stop)) for rank in range(before))
    rest = (seen(rank, after, range(stop, steps)) for rank in range(after))
    assert sorted(chain(*first, *rest)) == sorted(epoch_order(seed, 0, size)[: steps * batch].tolist())


@given(size=st.integers(1, 40), batch=st.integers(1, 20), ranks=st.integers(1, 5))
def test_evaluation_covers_each_image_once_over_all_ranks(size: int, batch: int, ranks: int) -> None:
    plans = [Plan(split_of(size), 8, batch, 0, False, Augmentation(), shard=Shard(r, ranks)) for r in range(ranks)]
    images = [int(i) for plan in plans for n in range(plan.steps) for i in plan.step(0, n).indices]
    assert sorted(images) == list(range(size))


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_loaders_of_two_ranks_give_the_rows_of_one(backend: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    index = build_index(make_pictures(tmp_path_factory.mktemp("data")), cache_dir=tmp_path_factory.mktemp("cache"))
    for split, batch in (("train", 6), ("val", 5)):
        common: dict[str, Any] = dict(backend=backend, resolution=24, batch_size=batch, seed=1, workers=0)
        common |= dict(train=split == "train", augmentation=None)
        whole = list(make_loader(index, split, **common).batches(2))  # type: ignore[arg-type]
        for rank in range(2):
            made = make_loader(index, split, shard=Shard(rank, 2), **common)  # type: ignore[arg-type]
            found = list(made.batches(2))
            assert len(found) == len(whole)
            for mine, all_ in zip(found, whole, strict=True):
                rows = Shard(rank, 2).rows(len(all_.labels))
                assert mine.labels.tolist() == all_.labels[rows].tolist()
                assert (mine.images == all_.images[rows]).all()
            made.close()
