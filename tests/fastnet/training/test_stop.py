"""Ctrl-C is acknowledged at once; a second one ends the process at once and says what is kept."""

from __future__ import annotations

import signal
import subprocess
import sys

CODE = """
import os, signal
from fastnet.training.stop import StopRequest
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
with StopRequest(kept=lambda: "run/last.safetensors of step 7 is kept.").installed() as stop:
    for _ in range(2):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException as error:  # as a compiler would, to tell at length what it was at
            print("a thousand lines", type(error))
        print("stopping:", stop(), flush=True)
"""


def test_the_first_is_answered_and_the_second_ends_it() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.stdout == "stopping: True\n"
    first, second = done.stderr.split("\n\n")
    assert first.strip() == "stopping after this step, and saving it; Ctrl-C once more stops at once"
    assert second.strip() == "stopped at once: run/last.safetensors of step 7 is kept."
    assert done.returncode == -signal.SIGINT
