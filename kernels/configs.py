"""Which configuration a launch runs with: the first of its candidates, or the one that was measured to be fastest.

A kernel's file states its candidates as data, with reasons, predicted best first; all fit the card. `choose` is what
its launcher and its count of bytes call. Choices hold for the process, because autograd runs backward in threads of
its own; they never depend on a tensor's values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from kernels.device import Gpu

Config = Any  # a frozen dataclass of the kernel's file
Candidates = Callable[["Site", Gpu], tuple[Config, ...]]
C = TypeVar("C", bound=Candidates)
T = TypeVar("T")


class Site(NamedTuple):
    """A launch as far as its configuration depends on it: the kernel, then shapes, forms and dtype by name."""

    kernel: str
    sizes: tuple[int | str | bool, ...]


_candidates: dict[str, Candidates] = {}
_choices: dict[Site, Config] = {}


def candidates_of(kernel: str) -> Callable[[C], C]:
    """Decorates what gives the candidates of a kernel's sites."""

    def register(function: C) -> C:
        _candidates[kernel] = function
        return function

    return register


@functools.lru_cache(maxsize=4096)
def candidates(site: Site, gpu: Gpu) -> tuple[Config, ...]:
    """What a launch there can run with on that card, predicted best first."""
    return _candidates[site.kernel](site, gpu)


def fitting(found: tuple[T, ...], needs: Callable[[T], int], gpu: Gpu) -> tuple[T, ...]:
    """Those whose need of shared memory the card has; where none is, the smallest, whose launch will say so."""
    return tuple(config for config in found if needs(config) <= gpu.shared_memory) or (min(found, key=needs),)


def choose(site: Site, gpu: Gpu) -> Config:
    """The measured choice, or the first candidate where there is none that this card can run."""
    found = candidates(site, gpu)
    choice = _choices.get(site)
    return choice if choice in found else found[0]


def use(choices: Mapping[Site, Config]) -> None:
    """Launch with these from now on; sites that are not among them stay as they are."""
    _choices.update(choices)


def forget() -> None:
    """Back to the first candidate everywhere."""
    _choices.clear()


@contextmanager
def trying(choices: Mapping[Site, Config]) -> Iterator[None]:
    """`use`, as long as the block runs."""
    before = dict(_choices)
    use(choices)
    try:
        yield
    finally:
        forget()
        use(before)


def to_json(config: Config) -> dict[str, Any]:
    """A configuration as JSON can hold it."""
    return dataclasses.asdict(config)


def find(site: Site, gpu: Gpu, kept: Any) -> Config | None:
    """The candidate that `to_json` made `kept` of; None if it is none of today's."""
    return next((config for config in candidates(site, gpu) if to_json(config) == kept), None)
