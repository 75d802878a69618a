"""The augment kernel against an fp64 oracle, torchvision and DALI's colours, on ragged images and real photos."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from data_pipeline.loaders.augment import IMAGENET_MEAN, IMAGENET_STD, Augmentation, color_matrices, train_params
from kernels import augment_reference
from kernels.augment import OUTPUTS, TABLE_WIDTH, augment, augment_table, traffic
from tests.count_kernels import count_traffic
from tests.parity import hold_one, nan_allocations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMALISE: dict[str, Any] = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)


class Store(NamedTuple):
    """Ragged images in one buffer, with bytes between them that belong to none."""

    pixels: Tensor
    offsets: Tensor
    sizes: Tensor

    def image(self, number: int) -> Tensor:
        """[3, height, width]"""
        (width, height), start = self.sizes[number].tolist(), int(self.offsets[number])
        return self.pixels[start : start + 3 * width * height].view(height, width, 3).permute(2, 0, 1)


def store(images: Iterable[Tensor]) -> Store:
    """Of images [height, width, 3]."""
    parts, offsets, sizes, at = [], [], [], 0
    for image in images:
        gap = torch.full((7,), 255, dtype=torch.uint8)
        parts += [gap, image.reshape(-1)]
        offsets.append(at + 7)
        sizes.append((image.shape[1], image.shape[0]))
        at += 7 + image.numel()
    return Store(
        torch.cat(parts).to(DEVICE),
        torch.tensor(offsets).to(DEVICE),
        torch.tensor(sizes, dtype=torch.int32).to(DEVICE),
    )


def noise(*sizes: tuple[int, int]) -> Store:
    """Images of these (width, height)."""
    generator = torch.Generator().manual_seed(5)
    return store(torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for w, h in sizes)


# Shrunk and enlarged, wider and higher, whole images and corners, one pixel, and windows between pixels.
SIZES = ((31, 17), (9, 20), (5, 3), (1, 1), (54, 40), (23, 19))
WINDOWS = ((3, 2, 20, 11), (0, 0, 9, 20), (1, 0, 4, 3), (0, 0, 1, 1), (30, 7, 24, 33), (2.3, 1.75, 11.6, 15.5))
FLIPS = (True, False, True, False, True, False)


def full_table(seed: int = 0) -> Tensor:
    """Every kind of change at once."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.eye(3, 4) + 0.2 * torch.randn(6, 3, 4, generator=generator)
    colors[:, :, 3] *= 100
    erased = torch.tensor([[0, 0, 0, 0], [2, 3, 4, 5], [0, 0, 13, 13], [10, 11, 3, 2], [1, 1, 0, 9], [0, 0, 1, 1]])
    fills = torch.randn(6, 3, generator=generator)
    made = augment_table(
        torch.tensor(WINDOWS), torch.tensor(FLIPS), colors=colors, erased=erased, fills=fills, **NORMALISE
    )
    return made.to(DEVICE)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("dtype", "margin"),
    [
        (torch.float32, 2),
        pytest.param(torch.float16, 0, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 0, marks=pytest.mark.slow),
    ],
)
def test_error_is_that_of_pytorch_and_one_rounding(dtype: torch.dtype, margin: int) -> None:
    photos, table = noise(*SIZES), full_table()
    options: dict[str, Any] = dict(resolution=13, margin=margin)
    with nan_allocations():
        kernel = augment(*photos, table, dtype=dtype, impl="triton", **options)
    pytorch = augment(*photos, table, dtype=dtype, impl="torch", **options)
    oracle = augment_reference.augment(*photos, table, dtype=torch.float64, compute=torch.float64, **options)
    for images in (kernel, pytorch):
        assert images.shape == (6, 3, 13, 13)
        assert images.dtype == dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(kernel).all(), "a pixel was not written"
    hold_one(kernel, pytorch, oracle)


@pytest.mark.slow
def test_8_bit_output_is_the_oracle_rounded() -> None:
    photos = noise(*SIZES)
    table = augment_table(torch.tensor(WINDOWS), torch.tensor(FLIPS)).to(DEVICE)
    oracle = augment_reference.augment(
        *photos, table, resolution=13, margin=0, dtype=torch.float64, compute=torch.float64
    )
    for impl in ("triton", "torch"):
        images = augment(*photos, table, resolution=13, dtype=torch.uint8, impl=impl)
        assert images.dtype == torch.uint8
        assert (images.double() - oracle).abs().max() <= 0.5 + 1e-4, impl


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    corner=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)),
    side=st.integers(1, 24),
    margin=st.integers(0, 2),
    flip=st.booleans(),
)
def test_oracle_is_interpolate_on_the_cut_window(
    size: tuple[int, int], corner: tuple[float, float], side: int, margin: int, flip: bool
) -> None:
    (width, height), (x, y) = size, (int(corner[0] * size[0]), int(corner[1] * size[1]))
    photos = noise(size)
    table = augment_table(torch.tensor([[x, y, width - x, height - y]]), torch.tensor([flip])).to(DEVICE)
    found = augment_reference.augment(
        *photos, table, resolution=side, margin=margin, dtype=torch.float64, compute=torch.float64
    )
    seen = photos.image(0)[:, y:, x:].double()
    expected = F.interpolate(seen[None], [side + 2 * margin] * 2, mode="bilinear", antialias=True)
    expected = expected[:, :, margin : margin + side, margin : margin + side]
    torch.testing.assert_close(found, expected.flip(-1) if flip else expected, rtol=0, atol=1e-4)


def test_a_window_between_pixels_is_what_the_enlarged_image_shows() -> None:
    """Enlarging interpolates linearly, which is exact on an image that is linear in x and y, away from the borders."""
    y, x = torch.meshgrid(torch.arange(40), torch.arange(48), indexing="ij")
    photos = store([torch.stack([3 * x, 4 * y, x + 2 * y], 2).to(torch.uint8)])
    table = augment_table(torch.tensor([[10.25, 8.5, 10.5, 9.0]]), torch.tensor([False])).to(DEVICE)
    found = augment(*photos, table, resolution=8, margin=4, impl="triton")[0].cpu()
    across = 10.25 + (torch.arange(8) + 4.5) * 10.5 / 16 - 0.5
    down = (8.5 + (torch.arange(8) + 4.5) * 9 / 16 - 0.5)[:, None]
    expected = torch.stack([(3 * across).expand(8, 8), (4 * down).expand(8, 8), across + 2 * down])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_nothing_outside_the_window_is_looked_at() -> None:
    photos = noise((40, 30))
    table = augment_table(torch.tensor([[10, 5, 20, 15]]), torch.tensor([False])).to(DEVICE)
    before = augment(*photos, table, resolution=11, impl="triton")
    inside = photos.image(0)[:, 5:20, 10:30].clone()
    photos.pixels.fill_(77)
    photos.image(0)[:, 5:20, 10:30] = inside
    assert torch.equal(augment(*photos, table, resolution=11, impl="triton"), before)


@pytest.mark.slow
def test_erasing_fills_the_rectangle_and_nothing_else() -> None:
    photos = noise((20, 20))
    erased, fills = torch.tensor([[3, 1, 4, 7]]), torch.tensor([[9.0, -8.0, 7.5]])
    window, flip = torch.tensor([[0, 0, 20, 20]]), torch.tensor([True])
    plain = augment(*photos, augment_table(window, flip).to(DEVICE), resolution=12, impl="triton")
    table = augment_table(window, flip, erased=erased, fills=fills).to(DEVICE)
    found = augment(*photos, table, resolution=12, impl="triton")
    expected = plain.clone()
    expected[:, :, 1:8, 3:7] = fills[:, :, None, None].to(DEVICE)
    assert torch.equal(found, expected)


def real(photos: Path, count: int, longest: int = 512) -> tuple[Store, list[Tensor]]:
    """Photos as they are stored, and the same as [3, height, width]."""
    images = []
    for path in sorted((photos / "images").glob("*/*.jpg"))[:: 800 // count][:count]:
        with Image.open(path) as file:
            image = file.convert("RGB")
            image.thumbnail((longest, longest))
            images.append(torch.from_numpy(np.array(image)))
    return store(images), [image.permute(2, 0, 1) for image in images]


@pytest.mark.parametrize(
    ("impl", "count", "longest", "side"),
    [
        ("torch", 40, 512, 200),
        pytest.param("triton", 40 if DEVICE == "cuda" else 3, 48, 16, marks=pytest.mark.slow),
        ("auto", 40, 512, 64),
    ],
)
def test_real_photos_as_torchvision_sees_them(photos: Path, impl: Any, count: int, longest: int, side: int) -> None:
    """torchvision's own crop, resize, flip and normalise on 8-bit images: within 0.5/255 on an image's mean, and
    2/255 at the 99th percentile."""
    stored, images = real(photos, count, longest)
    params = train_params(Augmentation(), 1, 0, np.arange(count), stored.sizes.cpu().numpy())
    table = augment_table(torch.from_numpy(params.windows), torch.from_numpy(params.flips), **NORMALISE)
    found = augment(*stored, table.to(DEVICE), resolution=side, impl=impl).cpu()
    for number, (x, y, w, h) in enumerate(params.windows.tolist()):
        theirs = TF.resized_crop(images[number], y, x, h, w, [side, side], antialias=True)
        if params.flips[number]:
            theirs = TF.horizontal_flip(theirs)
        theirs = TF.normalize(TF.to_dtype(theirs, torch.float32, scale=True), list(IMAGENET_MEAN), list(IMAGENET_STD))
        off = (found[number] - theirs) * torch.tensor(IMAGENET_STD)[:, None, None] * 255
        assert off.mean().abs() <= 0.5
        assert off.abs().quantile(0.99) <= 2


def test_real_photos_in_dalis_colours(photos: Path) -> None:
    """`color_twist` on what the kernel's own resampling gives in 8 bits: rounded once more, so within one step."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from nvidia.dali import fn, pipeline_def, types

    count = 12
    stored, _ = real(photos, count, 96)
    drawn = np.random.default_rng(0).uniform(-1, 1, (4, count))
    values = [1 + 0.4 * drawn[0], 1 + 0.4 * drawn[1], 1 + 0.4 * drawn[2], 60 * drawn[3]]
    colors = torch.from_numpy(color_matrices(*values))
    window = torch.cat([torch.zeros(count, 2), stored.sizes.cpu()], 1)
    flips = torch.zeros(count, dtype=torch.bool)
    plain = augment(*stored, augment_table(window, flips).to(DEVICE), resolution=32, dtype=torch.uint8)
    found = augment(*stored, augment_table(window, flips, colors=colors).to(DEVICE), resolution=32).cpu()

    def feed() -> tuple[Any, ...]:
        columns = [list(v.astype(np.float32)) for v in values]
        return [image.permute(1, 2, 0).contiguous().numpy() for image in plain.cpu()], *columns

    @pipeline_def(batch_size=count, num_threads=1, device_id=None)
    def twist() -> Any:
        kinds = [types.UINT8, *[types.FLOAT] * 4]
        images, *fed = fn.external_source(feed, num_outputs=5, dtype=kinds, layout=["HWC"] + [""] * 4)
        names = ("brightness", "contrast", "saturation", "hue")
        return fn.color_twist(images, **dict(zip(names, fed, strict=True)))

    pipe = twist()
    pipe.build()
    (output,) = pipe.run()
    theirs = torch.from_numpy(np.stack([output.at(i) for i in range(count)])).permute(0, 3, 1, 2).float()
    off = found - theirs
    assert off.mean((1, 2, 3)).abs().max() <= 0.5
    assert off.abs().flatten(1).quantile(0.99, dim=1).max() <= 2


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="bytes are counted under the interpreter, on a CPU")
def test_bytes_written_are_the_batch_and_bytes_read_are_a_few_times_the_window() -> None:
    photos = noise((64, 50), (40, 40))
    window = torch.tensor([[0, 0, 64, 50], [4, 4, 30, 32]])
    table = augment_table(window, torch.tensor([False, True]))
    with count_traffic() as counted:
        augment(*photos, table, resolution=32, dtype=torch.float16, impl="triton")
    moved = counted.kernels["_augment_kernel"]
    written = 2 * 3 * 32 * 32 * 2
    assert moved.by_size[2] == written
    held = 3 * (64 * 50 + 30 * 32)
    stated = traffic([(64, 50), (30, 32)], 32, torch.float16)["_augment_kernel"]
    assert stated == held + written + 2 * (4 * TABLE_WIDTH + 16)
    # Each source pixel is asked for 2 max(w / R, 1) times across, and rows at the seams of tiles twice.
    assert held < moved.by_size[1] < 8 * held


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"pixels": torch.zeros(9)}, TypeError, "pixels must be torch.uint8"),
    ({"offsets": torch.zeros(6, dtype=torch.int32)}, TypeError, "offsets must be torch.int64"),
    ({"sizes": torch.zeros(6, 3, dtype=torch.int32)}, ValueError, "sizes must be contiguous of shape"),
    ({"table": torch.zeros(6, 31)}, ValueError, "table must be contiguous of shape"),
    ({"table": torch.zeros(TABLE_WIDTH, 6).T}, ValueError, "contiguous"),
    ({"resolution": 0}, ValueError, "resolution of 1"),
    ({"margin": -1}, ValueError, "margin of 0"),
    ({"dtype": torch.float64}, TypeError, "augment makes"),
    ({"impl": "cuda"}, ValueError, "impl must be"),
    ({"sizes": torch.zeros(6, 2, dtype=torch.int32, device="meta")}, ValueError, "sizes is on meta"),
]


@pytest.mark.skipif(DEVICE == "cuda", reason="the arguments are made on a CPU")
@pytest.mark.parametrize(("change", "error", "words"), BAD, ids=[words for _, _, words in BAD])
def test_bad_arguments_get_one_sentence(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {**noise(*SIZES)._asdict(), "table": full_table(), "resolution": 8, **change}
    with pytest.raises(error, match=words):
        augment(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(OUTPUTS), ids=OUTPUTS.get)
def test_real_sizes_on_a_gpu(dtype: torch.dtype, cuda: torch.device) -> None:
    """Photos of 512 x 384, the second half of them behind 2**31 bytes."""
    count, far = 16, 2**31 + 5
    pixels = torch.randint(0, 256, (far + count * 512 * 384 * 3,), dtype=torch.uint8, device=cuda)
    offsets = torch.arange(count, device=cuda) * 512 * 384 * 3
    offsets[count // 2 :] += far
    sizes = torch.tensor([[512, 384]] * count, dtype=torch.int32, device=cuda)
    params = train_params(Augmentation(), 0, 0, np.arange(count), sizes.cpu().numpy())
    assert params.colors is not None
    table = augment_table(
        torch.from_numpy(params.windows), torch.from_numpy(params.flips), colors=torch.from_numpy(params.colors)
    ).to(cuda)
    kernel = augment(pixels, offsets, sizes, table, resolution=224, dtype=dtype)
    options: dict[str, Any] = dict(resolution=224, margin=0)
    oracle = augment_reference.augment(
        pixels, offsets, sizes, table, dtype=torch.float64, compute=torch.float64, **options
    )
    if dtype == torch.uint8:
        assert (kernel.double() - oracle).abs().max() <= 0.5 + 1e-3
        return
    pytorch = augment(pixels, offsets, sizes, table, dtype=dtype, impl="torch", **options)
    hold_one(kernel, pytorch, oracle)
