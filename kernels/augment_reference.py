"""`kernels.augment` in plain PyTorch: the oracle in fp64, and what runs wherever Triton does not.

Nothing here is shared with the Triton kernel: each image is two products with dense matrices of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resize_matrix(start: Tensor, length: Tensor, size: int, side: int, margin: int, dtype: torch.dtype) -> Tensor:
    """[side, taps]: row i weighs the pixels from floor(start) to ceil(start + length), within an image of `size`.

    The triangle of `torch.nn.functional.interpolate(mode="bilinear", antialias=True)`: as wide as two source pixels
    or, shrinking, two output pixels, over the pixels that the window touches, its weights adding up to one.
    """
    first = int(start.floor())
    last = min(int((start.double() + length.double()).ceil()), size)
    scale = length.to(dtype) / (side + 2 * margin)
    centres = (start.to(dtype) - first) + (torch.arange(side, device=start.device).to(dtype) + (margin + 0.5)) * scale
    pixels = torch.arange(last - first, device=start.device).to(dtype) + 0.5
    weights = (1 - (pixels - centres[:, None]).abs() / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def augment(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    table: Tensor,
    *,
    resolution: int,
    margin: int,
    dtype: torch.dtype,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """[B, 3, resolution, resolution] channels_last of `dtype`, computed in `compute`; as `kernels.augment.augment`."""
    count = len(offsets)
    images = torch.empty_strided(
        (count, 3, resolution, resolution),
        (3 * resolution**2, 1, 3 * resolution, 3),
        dtype=dtype,
        device=pixels.device,
    )
    for i, (offset, (width, height), row) in enumerate(
        zip(offsets.tolist(), sizes.tolist(), table.to(compute), strict=True)
    ):
        x, y, w, h = table[i, :4]
        left, top = int(x.floor()), int(y.floor())
        across = resize_matrix(x, w, width, resolution, margin, compute)
        down = resize_matrix(y, h, height, resolution, margin, compute)
        image = pixels[offset : offset + 3 * width * height].view(height, width, 3)
        seen = image[top : top + down.shape[1], left : left + across.shape[1]].permute(2, 0, 1).to(compute)
        planes = down @ seen @ across.T
        if row[4] != 0:
            planes = planes.flip(-1)
        affine, low, high = row[5:17].view(3, 4), row[17:20], row[20:23]
        planes = torch.addmm(affine[:, 3:], affine[:, :3], planes.flatten(1)).unflatten(1, (resolution, resolution))
        planes = planes.clamp(low[:, None, None], high[:, None, None])
        left, top, width, height = (int(v) for v in row[23:27])
        planes[:, top : top + height, left : left + width] = row[27:30, None, None]
        images[i] = planes if dtype.is_floating_point else (planes + 0.5).floor()
    return images
