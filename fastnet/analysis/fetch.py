"""Photos by their addresses on the web."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGEST = 200 * 2**20
SECONDS = 30


def is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def fetch(url: str, folder: Path) -> Path:
    """Download `url` into `folder`, under its own name as far as files have such names.

    Raises OSError, whose text says why, where it cannot be had or is larger than 200 MB.
    """
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    stem = re.sub(r"[^\w.-]", "_", Path(unquote(urlsplit(url).path)).name)[-100:] or "photo"
    path, number = folder / stem, 2
    while path.exists():
        path, number = folder / f"{number}-{stem}", number + 1
    try:
        # Some servers answer none that does not say what it is.
        with urlopen(Request(url, headers={"User-Agent": "fastnet"}), timeout=SECONDS) as answer:
            content = answer.read(LARGEST + 1)
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        code = f"HTTP {error.code} " if hasattr(error, "code") else ""
        raise OSError(f"{code}{getattr(reason, 'strerror', None) or reason}") from error
    if len(content) > LARGEST:
        raise OSError(f"larger than {LARGEST >> 20} MB")
    path.write_bytes(content)
    return path
