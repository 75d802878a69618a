"""Class names in figures: in any script that an installed font can draw, and told apart where none can."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

DEFAULT = "DejaVu Sans"  # comes with matplotlib


@cache
def _fonts_for(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """(families that together draw most of these characters, the characters that none draws)."""
    from matplotlib import font_manager

    chosen = [DEFAULT]
    left = {ord(c) for c in characters} - _drawn_by(font_manager.findfont(DEFAULT))
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: (entry.style != "normal", entry.name)):
        if not left:
            break
        if entry.name.startswith("Last Resort"):  # has a box for every character
            continue
        if entry.name not in chosen and (more := left & _drawn_by(entry.fname)):
            chosen.append(entry.name)
            left -= more
    return tuple(chosen), frozenset(map(chr, left))


def _drawn_by(file: str) -> set[int]:
    from matplotlib import font_manager

    try:
        return set(font_manager.get_font(file).get_charmap())
    except (OSError, RuntimeError):  # a bitmap font, as those of coloured emoji are
        return set()


def families(texts: Iterable[str]) -> list[str]:
    """Fonts for these texts, the first that has a character draws it."""
    return list(_fonts_for(_special(texts))[0])


def legible(texts: Sequence[str]) -> list[str]:
    """The texts as matplotlib is to be given them: `$` is no formula, and what no font draws is written as its code."""
    _, undrawn = _fonts_for(_special(texts))
    return ["".join(f"\\u{ord(c):04x}" if c in undrawn else r"\$" if c == "$" else c for c in text) for text in texts]


def _special(texts: Iterable[str]) -> frozenset[str]:
    """What a font may lack; a name that is no text holds surrogates."""
    characters = frozenset("".join(texts))
    return frozenset(c for c in characters if ord(c) > 126 and (c.isprintable() or "\ud800" <= c <= "\udfff"))
