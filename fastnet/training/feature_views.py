"""A classifier on a fixed trunk (--freeze-stages 7, --feature-views V): what the trunk makes of V augmented views of
each photo is computed once and kept, and epochs read that.

Epoch e sees each photo as epoch e mod V draws it, so up to V epochs are those of training through the trunk. What is
kept is found again by all that it follows from: the trunk's weights, the photos, the views, seed and precision.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline import Index, Loader
from data_pipeline.dataset.index_cache import key_of
from data_pipeline.dataset.synthetic import user_cache_folder
from data_pipeline.errors import BadFiles
from data_pipeline.loaders.loader import Batch, Plan
from data_pipeline.loaders.prefetch import sent
from fastnet.arch import EFFICIENTNET
from fastnet.config import TrainConfig
from fastnet.device import Amp
from fastnet.errors import UserError
from fastnet.layers import BatchNorm
from fastnet.loading.checkpoint import write_atomically
from fastnet.model import EfficientNet
from fastnet.training.step import autocast
from fastnet.training.validate import Interrupted
from fastnet.typed import read_object

VERSION = 1  # of the files: raise it when a change alters a feature or its place
TRAINING_DTYPE = torch.float16
KEPT = 3  # files of a data set's split; the oldest goes


def check(config: TrainConfig, processes: int) -> None:
    """UserError where --feature-views stands beside what needs the trunk, or the pictures, in every step."""
    if not config.data.feature_views:
        return
    stages = len(EFFICIENTNET.stages)
    against = {
        f"needs --freeze-stages {stages}": config.optimizer.freeze_stages != stages,
        "can't mix pictures that it doesn't see: leave out --mixup and --cutmix": config.mix.enabled,
        "keeps one resolution: leave out --progressive": config.progressive.progressive > 1,
        "computes in one process: start without torchrun": processes > 1,
    }
    for words, holds in against.items():
        if holds:
            raise UserError(f"--feature-views {words}.", exit_status=2)


def hint(config: TrainConfig, processes: int) -> str:
    """What somebody who trains a head alone may not know; empty where it does not apply."""
    with_them = replace(config, data=replace(config.data, feature_views=8))
    try:
        check(with_them, processes)
    except UserError:
        return ""
    return "" if config.data.feature_views else "the trunk stays as it is: --feature-views 8 goes through it only once"


class Features(NamedTuple):
    """Of a split: [views, N, H, W, C], and the images that could not be read, by position."""

    values: NDArray[Any]
    bad: dict[int, str]


class FeatureViews(Loader):
    """Batches of features [B, C, H, W] in place of images; they are computed when the first batch is asked for.

    Args:
        source: gives the pictures: each one of an epoch, where it trains.
        plan: which images a batch has.
        compute: images → features [B, C, H, W].
        file: where they are kept, without its suffix.
    """

    backend = "features"

    def __init__(
        self,
        source: Loader,
        plan: Plan,
        compute: Callable[[Tensor], Tensor],
        views: int,
        file: Callable[[], Path],
        log: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> None:
        super().__init__(plan, source.device, 0)
        self.source, self.views = source, views
        self._compute, self._file, self._log, self._stop = compute, file, log, stop
        self._features: Features | None = None

    def _produce(self, epoch: int, numbers: Sequence[int]) -> Iterator[Batch]:
        if self._features is None:
            file = self._file()  # by a hash of all weights: asked for once
            self._features = self._read(file) or self._filled(file)
            self.source.close()
        if bad := {at: why for at, why in self._features.bad.items() if at not in self.plan.quarantined}:
            raise BadFiles(bad)
        values = self._features.values[epoch % self.views]
        for number in numbers:
            indices = self.plan.step(epoch, number).indices
            labels = torch.from_numpy(self.plan.split.labels[indices])
            features, labels = sent([torch.from_numpy(values[indices]), labels], self.device)
            yield Batch(features.float().permute(0, 3, 1, 2), labels)

    @property
    def description(self) -> str:
        return f"features of {self.views} views by {self.source.description}"

    def close(self) -> None:
        super().close()
        self.source.close()

    def _read(self, file: Path) -> Features | None:
        """None where they are not kept, or damaged."""
        try:
            known = read_object(file.with_suffix(".json"))
            values = np.memmap(file.with_suffix(".bin"), known["dtype"], "r", shape=tuple(known["shape"]))
            if zlib.crc32(values.data) != known["crc"]:
                return None
            return Features(values, {int(at): str(why) for at, why in known["bad"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _filled(self, file: Path) -> Features:
        plan = self.source.plan
        scratch = file.with_suffix(f".{os.getpid()}.tmp")
        what = "training" if plan.train else "validation"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            values: NDArray[Any] | None = None
            for view in range(self.views):
                self._log(f"computing features of {len(plan.split)} {what} photos, view {view + 1} of {self.views}")
                for at, made in self._computed(view):
                    if values is None:
                        shape = (self.views, len(plan.split), *made.shape[1:])
                        values = np.memmap(scratch, made.dtype, "w+", shape=shape)
                    values[view, at] = made
            assert values is not None
            places = {path: at for at, path in enumerate(plan.split.paths)}
            bad = {places[path]: why for path, why in self.source.quarantined}
            known = {"shape": values.shape, "dtype": str(values.dtype), "crc": zlib.crc32(values.data), "bad": bad}
            os.replace(scratch, file.with_suffix(".bin"))
            write_atomically(file.with_suffix(".json"), json.dumps(known).encode())
            _drop_oldest(file.parent)
        except OSError as error:
            raise UserError(
                f"the features cannot be kept in {file.parent} ({error.strerror or error}): free some space, set "
                "XDG_CACHE_HOME to another folder, or use fewer --feature-views."
            ) from error
        finally:
            scratch.unlink(missing_ok=True)
        return Features(values, bad)

    def _computed(self, view: int) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """(positions in the split, their features [n, H, W, C]), every one of the split that can be read."""
        plan, number = self.source.plan, 0
        dtype = TRAINING_DTYPE if plan.train else torch.float32  # what is reported is what evaluation finds
        for images, _ in self.source.batches(view):
            if self._stop():
                raise Interrupted
            while not len(indices := plan.step(view, number).indices):  # its only image cannot be read
                number += 1
            number += 1
            yield indices, self._compute(images).permute(0, 2, 3, 1).to("cpu", dtype).contiguous().numpy()


def _drop_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-KEPT]:
        file.unlink(missing_ok=True)
        file.with_suffix(".bin").unlink(missing_ok=True)


def on_features(
    config: TrainConfig,
    loaders: tuple[Loader, Loader],
    index: Index,
    model: EfficientNet,
    amp: Amp,
    log: Callable[[str], None],
    stop: Callable[[], bool],
) -> tuple[Loader, Loader]:
    """The loaders' features in place of their pictures, for the model, which from here on takes these.

    The training loader should give every image in each epoch (`Plan.filled`), whatever batches the run has; those are
    made here.
    """

    def compute(images: Tensor) -> Tensor:
        training = model.training
        model.eval()
        try:
            with torch.inference_mode(), torch.compiler.set_stance("force_eager"), autocast(images.device, amp):
                return EfficientNet.trunk(model, images)
        finally:
            model.train(training)

    made = []
    for split, source in zip(("train", "val"), loaders, strict=True):
        own = replace(source.plan)
        if own.train:
            own = replace(own, balanced=config.optimizer.balance == "sampler", filled=config.optimizer.min_steps > 0)
        views = config.data.feature_views if own.train else 1

        def file(split: str = split, source: Loader = source, views: int = views) -> Path:
            return (
                user_cache_folder()
                / "features"
                / f"{key_of(index.root)}-{split}"
                / _key(model, index, source, amp, views)
            )

        made.append(FeatureViews(source, own, compute, views, file, log, stop))
    model.trunk = MethodType(_features_as_they_are, model)  # type: ignore[method-assign]
    return made[0], made[1]


def _features_as_they_are(
    model: EfficientNet, features: Tensor, *_: Any, norms: Iterable[BatchNorm] = (), **__: Any
) -> Tensor:
    for norm in norms:
        if norm.training:
            norm.num_batches_tracked.add_(1)
    return features


def _key(model: EfficientNet, index: Index, source: Loader, amp: Amp, views: int) -> str:
    """Of all that the features follow from."""
    plan, found = source.plan, hashlib.sha256()
    how = (plan.resolution, plan.crop_fraction, plan.interpolation, plan.normalization, plan.train)
    drawn = (plan.augmentation, plan.seed, plan.batch_size, TRAINING_DTYPE) if plan.train else ()
    place = (source.backend, str(source.device), torch.__version__)
    found.update(repr((VERSION, index.content, how, drawn, place, views, amp, model.config)).encode())
    for name, value in model.state_dict().items():
        if name.startswith(("stem.", "blocks.")) and value.is_floating_point():
            found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:24]
