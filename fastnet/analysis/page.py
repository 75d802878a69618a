"""The pieces of a report's page: one file of HTML that fits a phone and a desk, by day and by night."""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import escape
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.files import open_regular

_MARK = "<meta name='generator' content='fastnet'>"

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --soft: #5b6675; --line: #d8dee6; --card: #f3f5f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --paper: #14181d; --soft: #9aa7b6; --line: #333c47; --card: #20262e; }
  img.plot { filter: invert(.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 1.5rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
a { color: inherit; } p.note { color: var(--soft); } summary { cursor: pointer; }
img { max-width: 100%; height: auto; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.wide { overflow-x: auto; } .wide img { max-width: none; }
table { border-collapse: collapse; } th, td { padding: .15rem .7rem; text-align: right; }
th { border-bottom: 1px solid var(--soft); overflow-wrap: normal; } td { border-bottom: 1px solid var(--line); }
th.text, td.text { text-align: left; }
@media (max-width: 600px) { table { font-size: 12px; } th, td { padding: .1rem .25rem; } }
.numbers { display: flex; flex-wrap: wrap; gap: .8rem; } .numbers div { background: var(--card); border-radius: 8px;
  padding: .6rem 1.1rem; } .numbers b { display: block; font-size: 1.4rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 1rem; }
.cards.explained { grid-template-columns: repeat(auto-fill, minmax(min(100%, 540px), 1fr)); }
figure { margin: 0; } figure div { display: flex; gap: 4px; } figure img { flex: 1; min-width: 0; width: 100%; }
figcaption { font-size: 13px; line-height: 1.35; margin-top: .2rem; } figcaption small { color: var(--soft); }
"""


def document(title: str, parts: Iterable[str]) -> str:
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>{_MARK}\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def is_ours(page: Path) -> bool:
    """Whether `document` wrote it."""
    with suppress(OSError), open(open_regular(str(page), math.inf)[0], "rb") as file:
        return _MARK.encode() in file.read(1000)
    return False


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """The first `text` columns are text, the others numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [" class='text'" if place < text else "" for place in range(len(cells))]
        inner = "".join(f"<{tag}{kind}>{escape(c)}</{tag}>" for c, kind in zip(cells, kinds, strict=True))
        return f"<tr>{inner}</tr>"

    return f"<table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def plot(title: str, png: bytes, width: int, *, fixed: bool = False) -> str:
    """A figure of so many CSS pixels; fixed: scrolled, not shrunk, where the page is narrower."""
    shown = f"<img class='plot' width='{width}' alt='{escape(title)}' src='{_inline(png, 'png')}'>"
    return f"<div class='wide'>{shown}</div>" if fixed else shown


def card(pictures: Iterable[NDArray[np.uint8]], heading: str, file: str) -> str:
    """Pictures [R, R, 3] side by side, over what is said of them and the name of their file."""
    shown = "".join(f"<img alt='{escape(file)}' src='{_inline(_jpeg(one), 'jpeg')}'>" for one in pictures)
    return (
        f"<figure><div>{shown}</div><figcaption>{escape(heading)}<br><small>{escape(file)}</small></figcaption>"
        "</figure>"
    )


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    content = BytesIO()
    Image.fromarray(picture).save(content, "JPEG", quality=88)
    return content.getvalue()


def _inline(picture: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def csv_text(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A table that a spreadsheet takes for values: a text that it would run as a formula starts with an apostrophe.
    Rows may be shorter than `heads`."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in (heads, *rows):
        cells = [_harmless(cell) if isinstance(cell, str) else cell for cell in row]
        writer.writerow(cells + [""] * (len(heads) - len(cells)))
    return as_utf8(text.getvalue())


def as_utf8(text: str) -> bytes:
    """Readable as UTF-8 by whoever opens it: a file's name that is none has escapes, as on a terminal."""
    return text.encode("utf-8", "backslashreplace")


def _harmless(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
