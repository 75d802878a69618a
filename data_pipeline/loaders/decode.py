"""From the bytes of a photo to pixels: torchvision decodes JPEG and plain WebP, PIL all else.

torchvision's PNG decoder ends the whole process on what libpng calls an error, as in a header with one row too many.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from data_pipeline.dataset.formats import FORMATS, WORDS
from data_pipeline.dataset.probe import PARSE_ERRORS, is_extended_webp
from data_pipeline.dataset.tar import TarMember
from data_pipeline.files import read_regular


def decode_photo(path: str) -> Tensor:
    """[3, H, W] uint8: a file, or a member of a shard, as the camera stored it.

    Raises:
        RuntimeError: it cannot be decoded.
        OSError: it cannot be read.
    """
    data = bytearray(path.read()) if isinstance(path, TarMember) else read_regular(path)
    if data.startswith(b"\xff\xd8") or (data.startswith(b"RIFF") and not is_extended_webp(data)):
        return decode_image(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB)
    if not data:
        raise RuntimeError("empty file")
    return torch.from_numpy(decode_by_pil(data)).permute(2, 0, 1)


def decode_by_pil(data: bytes | bytearray) -> NDArray[np.uint8]:
    """[H, W, 3]: the first picture of a file, as PIL turns it into RGB.

    Raises:
        RuntimeError: it cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on metadata and size
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return np.array(image.convert("RGB"))
    except Image.UnidentifiedImageError:
        raise RuntimeError(f"not a {WORDS} image") from None
    except (OSError, Image.DecompressionBombError, *PARSE_ERRORS) as error:
        raise RuntimeError(f"damaged: {error}") from None
