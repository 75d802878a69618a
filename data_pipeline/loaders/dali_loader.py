"""The loader on NVIDIA DALI: the GPU decodes where there is one, DALI's CPU threads elsewhere.

Order, windows and flips are ours and go in through `external_source`; so the pipeline has no state of its own, and
starts at any position. A file that DALI refuses ends the pipeline object: the file is found and quarantined, and
another pipeline goes on from the batch that was asked for.

On a GPU, baseline JPEGs are shared between its JPEG engine and nvJPEG's kernels (`dali_engine_share`), and progressive
ones go to the latter, whose threads do part of the work. PNG and plain WebP are decoded on the threads, as on a CPU;
JPEGs of four channels and rarer files come in as pixels that PIL decoded. Chroma is upsampled as libjpeg-turbo does it,
so that a photo looks the same to a model whoever decoded it.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from data_pipeline.dataset.probe import CMYK, PILLOW, probe_image
from data_pipeline.dataset.tar import TarMember, opened
from data_pipeline.errors import BadFiles, DataError
from data_pipeline.files import check_regular
from data_pipeline.loaders.augment import Interpolation
from data_pipeline.loaders.dali_options import DaliOptions
from data_pipeline.loaders.loader import Batch, Loader, Plan, Step
from data_pipeline.loaders.torch_loader import decoded

# Of each image: file name (or its bytes), anchor, shape, flip, and whether the CPU's threads decode it.
_KINDS = [types.UINT8, types.INT32, types.INT32, types.INT32, types.BOOL]
_RANKS = [1, 1, 1, 0, 0]
_READERS = 8  # files read at once where bytes are fed
_TRIES = 3  # of a batch that fails though each of its files can be read
_READ_AHEAD = 2  # batches that are read before DALI asks for them
# What DALI, CUDA, nvJPEG and the C library say where memory ends.
_NO_MEMORY = re.compile(
    r"out ?of ?memory|bad_alloc|memory ?allocation|allocat(ion|or) (failed|failure|error)|(cannot|failed to) allocate",
    re.IGNORECASE,
)

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

# A column of a batch: an array, which DALI takes at once, or rows of different lengths.
_Column = NDArray[Any] | list[NDArray[Any]]


class _Source:
    """Feeds DALI one batch of (files, anchors, shapes, flips, on threads) after another, made ahead by a thread, and
    remembers which are under way. on_gpu: the last column is fed where it says anything."""

    def __init__(self, plan: Plan, on_gpu: bool) -> None:
        self.plan = plan
        self.positions: deque[tuple[int, int]] = deque()
        self.under_way: deque[Step] = deque()
        self.on_threads = plan.split.kinds >= CMYK
        """[N]: not for the GPU."""
        self.routed = on_gpu and bool(self.on_threads.any())
        self.by_pil = (plan.split.kinds == CMYK) | (plan.split.kinds == PILLOW)
        """[N]: DALI takes a JPEG of four channels without Adobe's marker for its negative, and reads no GIF or AVIF."""
        self.fed_bytes = bool(self.by_pil.any()) or any(isinstance(path, TarMember) for path in plan.split.paths)
        """Bytes are fed, not names: DALI reads whole files only."""
        self._ahead: deque[Future[tuple[Step, tuple[_Column, ...]]]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        self._readers: ThreadPoolExecutor | None = None

    def __call__(self) -> tuple[_Column, ...]:
        self._read_ahead()
        if not self._ahead:
            raise StopIteration
        step, columns = self._ahead.popleft().result()
        self._read_ahead()
        self.under_way.append(step)
        return columns

    def _read_ahead(self) -> None:
        while self.positions and len(self._ahead) < _READ_AHEAD:
            self._thread = self._thread or ThreadPoolExecutor(1, "dali-feed")
            self._ahead.append(self._thread.submit(self._made, *self.positions.popleft()))

    def _made(self, epoch: int, number: int) -> tuple[Step, tuple[_Column, ...]]:
        step = self.plan.step(epoch, number)
        return step, self.fed(step)

    def fed(self, step: Step) -> tuple[_Column, ...]:
        paths = [self.plan.split.paths[index] for index in step.indices]
        # DALI counts rows first.
        anchors, shapes = step.params.windows[:, 1::-1], step.params.windows[:, :1:-1]
        columns: tuple[_Column, ...] = (
            self._contents(step.indices) if self.fed_bytes else _names([_regular(path) for path in paths]),
            np.ascontiguousarray(anchors),
            np.ascontiguousarray(shapes),
            step.params.flips.astype(np.int32),
        )
        return (*columns, self.on_threads[step.indices]) if self.routed else columns

    def _contents(self, indices: NDArray[np.int64]) -> list[NDArray[Any]]:
        self._readers = self._readers or ThreadPoolExecutor(_READERS, "bytes")
        return [np.frombuffer(content, np.uint8) for content in self._readers.map(self._bytes_of, indices.tolist())]

    def _bytes_of(self, index: int) -> bytes:
        """None of them where it cannot be read: DALI refuses that, and the file is looked at."""
        split = self.plan.split
        try:
            if self.by_pil[index]:
                image = decoded(split.paths[index], int(split.orientations[index]), split.sizes[index])
                _, height, width = image.shape
                return b"P6 %d %d 255\n" % (width, height) + image.permute(1, 2, 0).contiguous().numpy().tobytes()
            with opened(split.paths[index]) as file:
                return file.read()
        except (RuntimeError, OSError):
            return b""

    def forget(self) -> None:
        """Drop what was to come."""
        self.positions.clear()
        for made in self._ahead:
            made.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """Drop everything, and give back the threads; the next batch starts them again."""
        self.forget()
        self.under_way.clear()
        # In this order: the one waits for the others.
        for pool in (self._thread, self._readers):
            if pool is not None:
                pool.shutdown()
        self._thread = self._readers = None


def _names(paths: list[str]) -> NDArray[np.uint8]:
    """[B, longest]: file names, ended by zeros, which no name contains."""
    return np.array([os.fsencode(path) for path in paths], np.bytes_).view(np.uint8).reshape(len(paths), -1)


def _regular(path: str) -> str:
    """The path, or one of an empty file where reading it would block or not end: DALI refuses that, and the file is
    looked at."""
    try:
        check_regular(os.stat(path), path)
    except OSError:
        return os.devnull
    return path


def _decoded(files: Any, anchors: Any, shapes: Any, device: str, options: DaliOptions) -> Any:
    """Graph: the windows of 8-bit pixels, upright, [H, W, 3]."""
    how = {"device": device, "output_type": types.RGB}
    if device == "mixed":
        how |= {"hw_decoder_load": options.dali_engine_share, "jpeg_fancy_upsampling": True}
    if options.dali_decode == "window":
        return fn.decoders.image_slice(files, start=anchors, shape=shapes, axis_names="HW", **how)
    return fn.slice(fn.decoders.image(files, **how), start=anchors, shape=shapes, axis_names="HW")


def decoded_windows(
    files: Any,
    anchors: Any,
    shapes: Any,
    flips: Any,
    on_threads: Any = None,
    *,
    side: int,
    margin: int,
    device: str,
    options: DaliOptions,
    interpolation: Interpolation = "bilinear",
) -> Any:
    """Graph: 8-bit pixels [side, side, 3] of a window of each upright image, resized with antialiasing, flipped.

    files: the bytes of each.
    on_threads: which images a GPU leaves to the CPU's threads; None where there are none.
    margin: output pixels on each side that are resized along and cut off.
    device: "mixed" decodes on the GPU, "cpu" on DALI's threads.
    """
    if on_threads is None:
        images = _decoded(files, anchors, shapes, device, options)
    elif on_threads:
        images = _decoded(files, anchors, shapes, "cpu", options).gpu()
    else:
        images = _decoded(files, anchors, shapes, device, options)
    images = fn.resize(images, size=[side + 2 * margin] * 2, interp_type=_FILTERS[interpolation], antialias=True)
    return fn.crop_mirror_normalize(
        images, crop=[side, side], mirror=flips, dtype=types.UINT8, output_layout="HWC", mean=[0.0], std=[1.0]
    )


@pipeline_def(enable_conditionals=True)
def _pipeline(source: _Source, device: str, options: DaliOptions) -> Any:
    count = 5 if source.routed else 4
    columns = fn.external_source(source=source, num_outputs=count, dtype=_KINDS[:count], ndim=_RANKS[:count])
    plan = source.plan
    files = columns[0] if source.fed_bytes else fn.io.file.read(columns[0])
    return decoded_windows(
        files,
        *columns[1:],
        side=plan.resolution,
        margin=plan.margin,
        device=device,
        options=options,
        interpolation=plan.interpolation,
    )


class DaliLoader(Loader):
    """DALI on `workers` threads (at least one), on the GPU for a CUDA device."""

    backend = "dali"

    def __init__(
        self, plan: Plan, device: str | torch.device, workers: int, options: DaliOptions | None = None
    ) -> None:
        super().__init__(plan, device, workers)
        self.options = options or DaliOptions()
        self._source = _Source(plan, self.device.type == "cuda")
        self._pipe: Any = None
        self._failures = 0

    @property
    def description(self) -> str:
        chosen = self.options
        engine = f", {chosen.dali_engine_share:.0%} for the JPEG engine" if self.device.type == "cuda" else ""
        what = "crops" if chosen.dali_decode == "window" else "whole photos"
        return f"dali ({max(1, self.workers)} threads decode {what}{engine}, {chosen.dali_prefetch} batches ahead)"

    def _start(self) -> Any:
        on_gpu = self.device.type == "cuda"
        pipe = _pipeline(
            self._source,
            "mixed" if on_gpu else "cpu",
            self.options,
            batch_size=self.plan.batch_size,
            num_threads=max(1, self.workers),
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=self.options.dali_prefetch,
            seed=0,
        )
        try:
            pipe.build()
        except (RuntimeError, MemoryError) as error:
            if _no_memory(error):
                raise self._out_of_memory(error) from error
            reason = str(error).splitlines()[0]
            raise DataError(f"DALI cannot start on {self.device} ({reason}): use --loader torch.") from error
        return pipe

    def _produce(self, epoch: int, numbers: Sequence[int]) -> Iterator[Batch]:
        if self._pipe is None:
            self._pipe = self._start()
        else:
            self._rewind()
        source = self._source
        source.positions.extend((epoch, number) for number in numbers)
        for _ in numbers:
            pixels = self._run()
            self._failures = 0
            yield self._batch(pixels, source.under_way.popleft())

    def _run(self) -> Tensor:
        """The next batch of 8-bit pixels [B, 3, R, R] channels_last; on a CPU it is DALI's buffer, valid until the next
        call."""
        try:
            if self.device.type == "cpu":
                (output,) = self._pipe.run()
                return torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
            # In the order of torch's stream, and copied there, because DALI fills the buffer again.
            stream = torch.cuda.current_stream(self.device)
            (output,) = self._pipe.run(stream)
            return copied(output.as_tensor(), self.device, stream).permute(0, 3, 1, 2)
        except (RuntimeError, MemoryError) as error:
            # A file that cannot be decoded ends the pipeline object: the next call builds another.
            failed = list(self._source.under_way)
            self._drop()
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # A file whose size was damaged asks for any amount of memory.
            bad = self._changed(failed)
            if not bad and _no_memory(error):
                raise self._out_of_memory(error) from error
            if bad := bad or self._refused(failed):
                raise BadFiles(bad) from None
            self._failures += 1
            if self._failures < _TRIES:  # a read error, perhaps, that has passed
                raise BadFiles({}) from None
            reason = _one_line(error)
            raise DataError(f"DALI stopped ({reason}): use --loader torch, which names the file.") from error

    def _out_of_memory(self, error: BaseException) -> DataError:
        other = "--loader torch or --cache ram, which decode in the host's memory"
        if self.device.type == "cpu":
            other = "fewer --workers"
        return DataError(
            f"DALI has no memory left on {self.device} ({_one_line(error)}): try a smaller --batch-size, "
            f"--dali-prefetch 1, or {other}."
        )

    def _rewind(self) -> None:
        """Drop what an unfinished pass left under way, a few batches at most, and start over."""
        self._source.forget()
        try:
            while True:
                self._pipe.run()
        except StopIteration:
            self._pipe.reset()
            self._source.under_way.clear()
        except (RuntimeError, MemoryError):  # what was under way holds a bad file, and nobody asks for it any more
            self._drop()
            self._pipe = self._start()

    def _changed(self, steps: list[Step]) -> dict[int, str]:
        """DALI does not name the file: the images under way that are not what they were when they were indexed."""
        split, bad = self.plan.split, {}
        for index in (int(index) for step in steps for index in step.indices):
            path, (width, height) = split.paths[index], split.sizes[index]
            try:
                now = probe_image(path)[:2]
                if now != (width, height):
                    bad[index] = f"it was {width} x {height} pixels and is {now[0]} x {now[1]} now"
            except DataError as found:
                bad[index] = str(found)
        return bad

    def _refused(self, steps: Iterable[Step]) -> dict[int, str]:
        """The images that DALI cannot decode one at a time, on a CPU thread."""
        bad: dict[int, str] = {}
        for step in steps:
            for row, index in enumerate(step.indices):
                one = _One(self.plan, step, row)
                pipe = _pipeline(one, "cpu", self.options, batch_size=1, num_threads=1, device_id=None)
                try:
                    pipe.build()
                    pipe.run()
                except (RuntimeError, MemoryError) as error:
                    if _no_memory(error):
                        raise self._out_of_memory(error) from error
                    bad[int(index)] = _reason(error)
                finally:
                    one.close()
        return bad

    def close(self) -> None:
        super().close()
        self._drop()

    def _drop(self) -> None:
        self._pipe = None
        self._source.close()


class _One(_Source):
    """Feeds one image of a step, again and again."""

    def __init__(self, plan: Plan, step: Step, row: int) -> None:
        super().__init__(plan, on_gpu=False)
        self.row, self.step = row, step

    def __call__(self) -> tuple[_Column, ...]:
        return tuple(column[self.row : self.row + 1] for column in self.fed(self.step))


def copied(tensor: Any, device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    """DALI's `tensor` of 8-bit pixels as torch's own, copied in the order of `stream`.

    Not through DLPack: where such a tensor is dropped, a thread of DALI's waits for the whole device.
    """
    pixels = torch.empty(tensor.shape(), dtype=torch.uint8, device=device)
    pointer, order = (ctypes.c_void_p(address) for address in (pixels.data_ptr(), stream.cuda_stream))
    tensor.copy_to_external(pointer, order, non_blocking=True)
    return pixels


def _no_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _reason(error: BaseException) -> str:
    """The sentence of DALI's report that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next(
        (line for line in lines if "rror" in line and "pipeline" not in line.lower()), lines[0] if lines else ""
    )
    return f"DALI refuses it: {said[:200]}"
