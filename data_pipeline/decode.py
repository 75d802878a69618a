"""From the bytes of a photo to pixels: torchvision decodes JPEG and WebP, PIL decodes PNG.

torchvision's PNG decoder ends the whole process on what libpng calls an error, as in a header with one row too many.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from data_pipeline.files import read_photo
from data_pipeline.probe import PARSE_ERRORS
from data_pipeline.tar import TarMember


def decode_photo(path: str) -> Tensor:
    """[3, H, W] uint8: a file, or a member of a shard, as the camera stored it.

    Raises:
        RuntimeError: it cannot be decoded.
        OSError: it cannot be read.
    """
    data = bytearray(path.read()) if isinstance(path, TarMember) else read_photo(path)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"\xff\xd8") or (data.startswith(b"RIFF") and data[8:12] == b"WEBP"):
        return decode_image(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB)
    raise RuntimeError("not a JPEG, PNG or WebP image" if data else "empty file")


def _png(data: bytearray) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on metadata and size
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                pixels = np.array(image.convert("RGB"))
    except (OSError, *PARSE_ERRORS) as error:
        raise RuntimeError(f"damaged PNG: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)
