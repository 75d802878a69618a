"""The one kind of error a user is meant to read, and how a command line shows it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. The message is one sentence that names the file or flag and the remedy.

    exit_status is 2 where the command line itself is wrong, 1 where the world is (files, space, data).
    """

    def __init__(self, message: str, *, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def foreign_kernels() -> str | None:
    """One sentence where another package named kernels hides ours, which lies beside this one."""
    found = find_spec("kernels")
    ours = Path(__file__).resolve().parents[1] / "kernels"
    folders = found.submodule_search_locations or [] if found else []
    places = [Path(folder).resolve() for folder in folders]
    if ours in places:
        return None
    there = places[0] if places else found and found.origin
    return (
        f"another package named kernels ({there}) stands before fastnet's own {ours}: uninstall it, or take its folder "
        "from PYTHONPATH."
    )


def run_command(command: Callable[[], int]) -> int:
    """Run a CLI's body; print a user's error, or Ctrl-C, as one sentence on stderr and return the exit status."""
    from data_pipeline import DataError

    # OpenMP threads that spin while they wait starve the loader's workers and each other as soon as the cores are
    # shared. Read when torch is imported, which a command does in its body.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # --profile: what the profiler says of itself is no user's to read.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        if reason := foreign_kernels():
            raise UserError(reason)
        return command()
    except UserError as error:
        message, status = str(error), error.exit_status
    except DataError as error:
        message, status = str(error), 1
    except KeyboardInterrupt:
        message, status = "interrupted.", 130
    print(f"error: {message}", file=sys.stderr)
    return status
