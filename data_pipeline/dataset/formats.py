"""Which files are photos: by name, those that are read, and those that are named when they are left out."""

from __future__ import annotations

import os

_READ = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "GIF": (".gif",),
    "AVIF": (".avif", ".avifs"),
}

FORMATS = tuple(_READ)
"""What is read, as PIL calls it; no other of its parsers is shown a file. MPO is among the JPEGs."""

SUFFIXES = frozenset(suffix for suffixes in _READ.values() for suffix in suffixes)

WORDS = "JPEG, PNG, WebP, BMP, TIFF, PPM, GIF or AVIF"

_UNREAD = {
    ".heic": "HEIC", ".heif": "HEIF", ".jp2": "JPEG 2000", ".j2k": "JPEG 2000", ".jpx": "JPEG 2000", ".jxl": "JPEG XL",
    ".svg": "SVG", ".psd": "PSD", ".tga": "TGA", ".ico": "ICO", ".dng": "raw", ".cr2": "raw", ".cr3": "raw",
    ".nef": "raw", ".arw": "raw", ".orf": "raw", ".rw2": "raw", ".raf": "raw", ".exr": "EXR", ".hdr": "HDR",
}  # fmt: skip
"""Pictures of kinds that are not read."""


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_read(name: str) -> bool:
    """Whether a file is a photo by its name."""
    return suffix_of(name) in SUFFIXES


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name, read or not."""
    return suffix_of(name) in _UNREAD or is_read(name)


def why_not(name: str) -> str:
    """Why a file that is not read by its name is left out."""
    suffix = suffix_of(name)
    if kind := _UNREAD.get(suffix):
        return f"{kind} is not read: convert it to JPEG or PNG"
    return f"no picture by its ending {suffix}" if suffix else "no picture: its name has no ending"
