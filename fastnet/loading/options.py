"""Which model, and how images go through it: the flags that evaluate, predict, export and serve share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipeline.loaders.augment import Interpolation
from fastnet.arch import Kernels, Style, Variant

RunFile = Literal["best", "last"]


@dataclass(frozen=True)
class WeightsOptions:
    checkpoint: RunFile = "best"
    """Which weights of a run."""
    variant: Variant | None = None
    """Which of the published weights imagenet means; with a file, what it must hold."""
    weights_style: Style | None = None
    """Whose names the file uses, when the file itself does not tell."""
    resolution: int | None = None
    """Image side in pixels; default: the run's, or the one that the weights were published with."""
    crop_fraction: float | None = None
    """Share of the short side to look at; default: 0.875, or as the weights were published."""
    interpolation: Interpolation | None = None
    """How images are resized; default: as the file says or was published, else bilinear."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from the channels' values of 0 to 1; default: as the file says or was published."""
    std: tuple[float, float, float] | None = None
    """What they are divided by; default: as for mean."""


@dataclass(frozen=True)
class DeviceOptions:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    kernels: Kernels = "auto"
    """Operations inside MBConv."""


@dataclass(frozen=True)
class InferenceOptions(DeviceOptions):
    tta: Literal["off", "hflip", "five", "ten"] = "off"
    """Mean over views: hflip (mirrored too), five (centre and corners), ten (both)."""
    batch_size: int = 64
    """Images a batch."""
    workers: int | None = None
    """Threads or processes that decode; 0 is best for a few images."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto is bf16 on a GPU (fp16 below compute capability 8.0), on a CPU the faster one."""
