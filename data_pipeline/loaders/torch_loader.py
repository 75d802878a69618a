"""The loader on torchvision: worker processes decode and resize, a whole batch each; colours on the device."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.queues import Queue
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data_pipeline.dataset.index import Split
from data_pipeline.errors import BadFiles, DataError
from data_pipeline.files import words_of
from data_pipeline.loaders.augment import Interpolation
from data_pipeline.loaders.decode import decode_photo
from data_pipeline.loaders.loader import Batch, Loader, Plan, Step

_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when the thread that started it ends
# Workers that may die in turn before it is said why. Torch reports a death to whichever loader of the process waits:
# where those of training and validation are killed at once, one loader is told of both.
_DEATHS = 3

_log = logging.getLogger("data_pipeline")
T = TypeVar("T")


class _Prepared(NamedTuple):
    """What a worker hands over: 8-bit pixels [B, 3, R, R] and what they are; or the files that it could not read."""

    pixels: Tensor
    step: Step
    bad: dict[int, str]


# Epoch, batch, and the images that are quarantined, of which a worker learns no other way.
_Position = tuple[int, int, frozenset[int]]


class _Batches(Dataset[_Prepared]):
    """Maps a position to a prepared batch."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __getitem__(self, position: _Position) -> _Prepared:
        split, side, margin = self.plan.split, self.plan.resolution, self.plan.margin
        epoch, number, self.plan.quarantined = position
        step = self.plan.step(epoch, number)
        bad: dict[int, str] = {}
        # channels_last, which the last step wants.
        pixels = torch.empty(len(step.indices), side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for row, index in enumerate(step.indices):
            try:
                seen = view(split, int(index), step.params.windows[row], side, margin, self.plan.interpolation)
            except (RuntimeError, OSError) as error:
                # Handed over, not raised: DataLoader would wrap the sentence in the worker's traceback.
                bad[int(index)] = reason_of(error)
                continue
            pixels[row] = seen.flip(-1) if step.params.flips[row] else seen
        return _Prepared(pixels, step, bad)


def reason_of(error: Exception) -> str:
    """The first line of what a decoder says, or the system's words."""
    if isinstance(error, OSError):
        return words_of(error)
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def view(
    split: Split, index: int, box: NDArray[np.int32], side: int, margin: int, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """[3, side, side] uint8: `box` (x, y, width, height) of the upright image, resized with antialiasing to a square
    that is `margin` pixels larger on each side, which are cut off.

    Raises:
        RuntimeError: as `decoded`.
    """
    image = decoded(split.paths[index], int(split.orientations[index]), split.sizes[index])
    return cut(image, box, side, margin, interpolation)


def cut(
    image: Tensor, box: NDArray[np.int32], side: int, margin: int, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """`view` of an upright image [3, H, W]."""
    x, y, width, height = box.tolist()
    how = InterpolationMode(interpolation)
    found = F.resize(image[:, y : y + height, x : x + width], [side + 2 * margin] * 2, how, antialias=True)
    return found[:, margin : margin + side, margin : margin + side]


def decoded(path: str, orientation: int, size: NDArray[np.int32]) -> Tensor:
    """[3, H, W] uint8: the upright image.

    Raises:
        RuntimeError: the file cannot be decoded, or its `size` (width, height) is another one now.
    """
    image = upright(decode_photo(path), orientation)
    if image.shape[2] != size[0] or image.shape[1] != size[1]:
        raise RuntimeError(f"it was {size[0]} x {size[1]} pixels and is {image.shape[2]} x {image.shape[1]} now")
    return image


def upright(image: Tensor, orientation: int) -> Tensor:
    """[3, H, W] as the camera stored it -> as it was seen, by EXIF orientation 1 to 8.

    The index's reading of EXIF is applied, not the decoder's: they differ on damaged tags, and windows are the index's.
    """
    if orientation >= 5:
        image = image.transpose(1, 2)
    if orientation in (3, 4, 7, 8):
        image = image.flip(1)
    if orientation in (2, 3, 6, 7):
        image = image.flip(2)
    return image


def _shared_memory_words() -> str:
    """Batches are handed over in /dev/shm, of which Docker gives 64 MB."""
    with suppress(OSError):
        found = os.statvfs("/dev/shm")
        if (size := found.f_blocks * found.f_frsize) <= 1 << 30:
            return f"; /dev/shm has {size / 1e6:.0f} MB here: give Docker --shm-size 8g or --ipc host"
    return ""


class _Positions(Sampler[_Position]):
    """The positions that are asked for next; set before each pass, read by the DataLoader in this process."""

    def __init__(self) -> None:
        self.positions: list[_Position] = []

    def __iter__(self) -> Iterator[_Position]:
        return iter(self.positions)

    def __len__(self) -> int:
        return len(self.positions)


def _start_worker(_: int) -> None:
    # What is the trainer's is not collected here: at their end its iterators would speak to their own workers.
    gc.freeze()
    gc.enable()
    # Ctrl-C reaches every process of the terminal, systemd and Slurm send SIGTERM to every process of a job, and a
    # terminal that closes SIGHUP: the trainer decides, workers end with it, or when it says so.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    sys.excepthook = _report_in_worker
    Queue._on_queue_feeder_error = staticmethod(_give_up)  # type: ignore[attr-defined]
    threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _report_in_worker(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, but for what Python's thread that hands over tensors meets where the trainer hangs up: the end
    of a worker like any other."""
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _give_up(error: Exception, _: Any) -> None:
    """End this process where a batch cannot be handed over, as where /dev/shm is full: Python would print a traceback
    and drop it, and the trainer would wait for it for ever."""
    if not isinstance(error, EOFError | ConnectionError):
        sys.stderr.write(f"a data loading worker cannot hand over a batch ({reason_of(error)})\n")
    os._exit(1)


def _end_for(parent: int) -> None:
    """End this process when that one sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _as_it_is(prepared: Any) -> Any:
    return prepared


class _Deaths:
    """DataLoader's handler of SIGCHLD, which raises when a worker has died, holds while a batch is waited for alone:
    elsewhere it would raise in the middle of a step, or while processes are started, when Python drops it with a
    traceback. Where it was not called, a wait looks for the dead after seconds."""

    def __init__(self) -> None:
        self._handler: Any = None  # DataLoader sets it once a process

    @contextmanager
    def told(self, *, starting: bool = False) -> Iterator[None]:
        before = signal.getsignal(signal.SIGCHLD)
        if threading.current_thread() is not threading.main_thread() or before is None:  # one that C code has set
            yield
            return
        try:
            if self._handler is not None and not starting:
                signal.signal(signal.SIGCHLD, self._handler)
            yield
        finally:
            if (now := signal.getsignal(signal.SIGCHLD)) != before:
                self._handler = now
            signal.signal(signal.SIGCHLD, before)


_deaths = _Deaths()


class TorchLoader(Loader):
    """torchvision's decoder on `workers` processes that live until `close`."""

    backend = "torch"

    def __init__(self, plan: Plan, device: str | torch.device, workers: int) -> None:
        super().__init__(plan, device, workers)
        self._positions = _Positions()
        self._loader: DataLoader[_Prepared] | None = None
        self._passing: Iterator[_Prepared] | None = None
        self._deaths = 0

    def _start(self) -> DataLoader[_Prepared]:
        return DataLoader(
            _Batches(self.plan),
            batch_size=None,
            sampler=self._positions,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            persistent_workers=self.workers > 0,
            worker_init_fn=_start_worker if self.workers else None,
            # A generator of its own: starting a pass must not draw from the one that the model uses.
            generator=torch.Generator(),
        )

    def _produce(self, epoch: int, numbers: Sequence[int]) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = self._start()
        self._positions.positions = [(epoch, number, self.plan.quarantined) for number in numbers]
        self._of_workers(self._begin)
        for _ in range(len(self._positions)):
            prepared = self._of_workers(self._next)
            self._deaths = 0
            if prepared.bad:
                raise BadFiles(prepared.bad)
            yield self._batch(prepared.pixels, prepared.step)

    def _begin(self) -> None:
        assert self._loader is not None
        collecting = gc.isenabled()
        gc.disable()  # in workers too, until they have begun
        try:
            self._passing = iter(self._loader)
        finally:
            if collecting:
                gc.enable()

    def _next(self) -> _Prepared:
        assert self._passing is not None
        return next(self._passing)

    def _of_workers(self, asked: Callable[[], T]) -> T:
        """What `asked` gives, in which a worker may be found dead: when a pass begins as well as later.

        Raises:
            BadFiles: one died, and others take over; none is bad.
            DataError: several in a row.
        """
        try:
            with _deaths.told(starting=self._passing is None):
                return asked()
        except (RuntimeError, OSError, EOFError) as error:  # the last two: it was to hand over a batch
            reason = reason_of(error).rstrip(".")
        # Raised out here: the other error's frames hold the iterator, and its processes would be waited for.
        self._end_workers()
        self._deaths += 1
        if self._deaths < _DEATHS:
            _log.warning("a data loading worker died (%s): others go on.", reason)
            raise BadFiles({})
        raise DataError(
            f"A data loading worker died ({reason}): the usual reason is too little memory or /dev/shm, so use fewer "
            f"--workers or a smaller --batch-size{_shared_memory_words()}."
        )

    def close(self) -> None:
        super().close()
        self._end_workers()

    def _end_workers(self) -> None:
        # The last references, kept in no frame on purpose: worker processes end when the count drops, in order.
        # Left to the cycle collector, their queues may go first, and each process is waited for in vain.
        self._passing = None
        self._loader = None
