"""From files to a batch on the device: `build_index`, then `make_loader`, then `Loader.batches(epoch)`.

Names load on first use, so that `import data_pipeline.loaders.augment` (which the command line is built from) needs no
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.dataset.index import Index, Split, build_index
    from data_pipeline.errors import DataError
    from data_pipeline.loaders.augment import Augmentation
    from data_pipeline.loaders.cache import PixelCache, choose_cache
    from data_pipeline.loaders.choice import make_loader
    from data_pipeline.loaders.loader import Batch, Loader, Shard

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
    "Augmentation": "loaders.augment",
    "Batch": "loaders.loader",
    "DataError": "errors",
    "Index": "dataset.index",
    "Loader": "loaders.loader",
    "PixelCache": "loaders.cache",
    "Shard": "loaders.loader",
    "Split": "dataset.index",
    "build_index": "dataset.index",
    "choose_cache": "loaders.cache",
    "make_loader": "loaders.choice",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
