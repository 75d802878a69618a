"""How a run is asked to stop, or to save."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

WISH_TO_SAVE = 1
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _write(text: str) -> None:
    """On stderr at once, whatever else is writing there."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode(errors="replace"))


class StopRequest:
    """Turns Ctrl-C, SIGTERM and SIGHUP (the terminal is gone) into a flag that is looked at between steps, and SIGUSR1
    (what Slurm sends ahead of its time limit, if asked to) into a wish for a checkpoint. A second signal to stop acts
    at once."""

    def __init__(self, kept: Callable[[], str] = lambda: "") -> None:
        """kept: what a stop at once would leave, in words."""
        self.signal: int | None = None
        self.save = False
        self._kept = kept

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def wish(self) -> int:
        """0 none, WISH_TO_SAVE, or more: to stop. Of several the largest counts."""
        return WISH_TO_SAVE + self.signal if self.signal else int(self.save)

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        def stop(number: int, _: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, at_once if number == signal.SIGINT else signal.SIG_DFL)
            if number == signal.SIGINT:
                _write("stopping after this step, and saving it; Ctrl-C once more stops at once")

        def at_once(number: int, _: FrameType | None) -> None:
            # A compiler that is interrupted prints what it was at; nothing here is worth waiting for.
            _write(f"stopped at once: {self._kept()}")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

        def save(number: int, _: FrameType | None) -> None:
            self.save = True

        # nohup asks for SIGHUP to be ignored.
        wanted = {number: stop for number in STOPS if signal.getsignal(number) != signal.SIG_IGN}
        previous = {number: signal.signal(number, act) for number, act in (wanted | {signal.SIGUSR1: save}).items()}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
