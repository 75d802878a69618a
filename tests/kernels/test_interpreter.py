"""The corrected interpreter against torch's own conversion."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.interpreter import from_bfloat16, to_bfloat16


@given(st.integers(0, 2**32 - 1))
def test_bfloat16_rounds_as_torch_does(bits: int) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    expected = torch.from_numpy(value.copy()).to(torch.bfloat16)
    found = torch.from_numpy(to_bfloat16(value).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    if not expected.isnan():
        assert torch.equal(found, expected)


@given(st.integers(0, 2**16 - 1))
def test_bfloat16_widens_exactly(bits: int) -> None:
    value = np.array([bits], np.uint16)
    expected = torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16).float()
    assert torch.equal(torch.from_numpy(from_bfloat16(value).view(np.float32)), expected) or expected.isnan()
