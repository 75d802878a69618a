"""What a user can fix costs one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

Said = pytest.CaptureFixture[str]


def one_sentence(capsys: Said, status: int, expected: int = 1) -> str:
    said = capsys.readouterr().err
    assert status == expected, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    return said


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), "red").save(path)
