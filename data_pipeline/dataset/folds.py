"""Which part of a data set validates, in a module that a configuration can import without a decoder."""

from typing import NamedTuple


class Folds(NamedTuple):
    """Cross-validation: `fold` of `parts`, from 0, validates. Each image does in one of them."""

    parts: int
    fold: int
