"""How a run is asked to stop, or to save."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WISH_TO_SAVE = 1
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Turns Ctrl-C, SIGTERM and SIGHUP (the terminal is gone) into a flag that is looked at between steps, and SIGUSR1
    (what Slurm sends ahead of its time limit, if asked to) into a wish for a checkpoint. A second signal to stop acts
    at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.save = False

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
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

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
