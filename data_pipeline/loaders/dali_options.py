"""Which loader, and how DALI decodes; the command line is built from it. Without torch and without DALI."""

from dataclasses import dataclass
from typing import Literal

Backend = Literal["auto", "dali", "torch"]
"""DALI, torchvision in processes, or what this machine and data suggest."""


@dataclass(frozen=True)
class DaliOptions:
    """None of these changes an image on a CPU; `python -m data_pipeline tune` measures which are fastest here."""

    dali_prefetch: int = 2
    """Batches that DALI prepares ahead of the one that is asked for."""
    dali_decode: Literal["window", "whole"] = "window"
    """Decode only what the crop needs, where the decoder can, or the whole photo."""
    dali_engine_share: float = 0.65
    """Share of a batch's baseline JPEGs for the GPU's JPEG engine, where it has one; threads and kernels do the
    rest."""

    def __post_init__(self) -> None:
        if not 1 <= self.dali_prefetch <= 64:
            raise ValueError(f"dali_prefetch must lie between 1 and 64, got {self.dali_prefetch}")
        if not 0 <= self.dali_engine_share <= 1:
            raise ValueError(f"dali_engine_share must lie between 0 and 1, got {self.dali_engine_share}")
