"""The data set of the loaders' tests."""

from __future__ import annotations

import pytest

from data_pipeline import Index, build_index
from tests.loaders import PER_CLASS, jpeg


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = tmp_path_factory.mktemp("data")
    for split, count in PER_CLASS.items():
        for at, name in enumerate(("a", "b ü")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number:02d}.jpg").write_bytes(jpeg(at * count + number))
    return build_index(root, cache_dir=tmp_path_factory.mktemp("cache"))
