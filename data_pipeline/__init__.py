"""From files to a batch on the device: `build_index`, then `make_loader`, then `Loader.batches(epoch)`.

Names load on first use, so that `import data_pipeline.augment` (which the command line is built from) needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.augment import Augmentation
    from data_pipeline.cache import PixelCache, choose_cache
    from data_pipeline.choice import make_loader
    from data_pipeline.errors import DataError
    from data_pipeline.food101 import Index, Split, build_index
    from data_pipeline.loader import Batch, Loader, Shard

__all__ = [
    "Augmentation",
    "Batch",
    "DataError",
    "Index",
    "Loader",
    "PixelCache",
    "Shard",
    "Split",
    "build_index",
    "choose_cache",
    "make_loader",
]

_HOME = {
    "Augmentation": "augment",
    "Batch": "loader",
    "DataError": "errors",
    "Index": "food101",
    "Loader": "loader",
    "PixelCache": "cache",
    "Shard": "loader",
    "Split": "food101",
    "build_index": "food101",
    "choose_cache": "cache",
    "make_loader": "choice",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
