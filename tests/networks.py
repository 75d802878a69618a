"""Networks of a few blocks, each known as a variant of its own (`fastnet.arch.register`)."""

from __future__ import annotations

from typing import Any, cast

from fastnet.arch import Coefficients, Family, Stage, Variant, register


def variant(name: str, *stages: Stage, **family: Any) -> Variant:
    """A network of these stages, at B0's width, depth and rates."""
    return cast(Variant, register(name, Coefficients(1.0, 1.0, 224, 0.2, 0.2, Family(stages=stages, **family))))


# Three blocks: without expansion; with, k 5 and stride 2; and one with a residual that can be dropped.
THREE_BLOCKS = variant("three-blocks", Stage(1, 3, 1, 16, 1), Stage(6, 5, 2, 24, 2))
# What a run in a test trains: three blocks, of few channels.
NARROW = variant("narrow", Stage(1, 3, 1, 8, 1), Stage(2, 3, 2, 16, 2))
# Every kind of block once: without expansion, strided, with a residual, and one whose output the next makes.
KINDS = (Stage(1, 3, 1, 16, 1), Stage(6, 3, 2, 24, 2), Stage(6, 5, 2, 40, 1))
