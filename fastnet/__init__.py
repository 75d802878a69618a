"""fastnet: EfficientNet training engineered for speed.

The names a user needs are imported on first use, so that `import fastnet` and `--help` stay free of torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
# As pip knows it: `fastnet` on PyPI is another project.
DISTRIBUTION = "fastnet-efficientnet"

_EXPORTS = {
    "CompoundScaler": "fastnet.scaling",
    "DynamicResize": "fastnet.training.resize",
    "EfficientNet": "fastnet.model",
    "FeatureExtractor": "fastnet.features",
    "architecture": "fastnet.scaling",
    "create_model": "fastnet.create",
    "efficientnet": "fastnet.model",
    "load": "fastnet.loaded",
    "load_weights": "fastnet.loading.weights",
    "save_weights": "fastnet.loading.weights",
}

__all__ = [
    "CompoundScaler",
    "DynamicResize",
    "EfficientNet",
    "FeatureExtractor",
    "architecture",
    "create_model",
    "efficientnet",
    "load",
    "load_weights",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        from fastnet.errors import foreign_kernels

        if reason := foreign_kernels():
            raise ImportError(reason)
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'fastnet' has no attribute {name!r}")
