"""The one kind of error a user is meant to read, and how a command line shows it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO


class UserError(Exception):
    """Something the user can fix. The message is one sentence that names the file or flag and the remedy.

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
    """Run a CLI's body; print a user's error, or Ctrl-C, as one sentence on stderr and return the exit status.

    What the operating system refuses, and memory that ends, is a user's error wherever it was met.
    """
    from data_pipeline import DataError
    from data_pipeline.errors import refused, silence, write_any_name

    # OpenMP threads that spin while they wait starve the loader's workers and each other as soon as the cores are
    # shared. Read when torch is imported, which a command does in its body.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # --profile: what the profiler says of itself is no user's to read.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    write_any_name()
    try:
        if reason := foreign_kernels():
            raise UserError(reason)
        status = command()
        sys.stdout.flush()
        return status
    except UserError as error:
        message, status = str(error), error.exit_status
    except DataError as error:
        message, status = str(error), 1
    except KeyboardInterrupt:
        message, status = "interrupted.", 130
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        silence(sys.stdout)
        return 141
    except OSError as error:
        message, status = refused(error), 1
        silence(sys.stdout)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        message, status = "out of memory: choose a smaller --batch-size or --resolution, or a GPU with more.", 1
    with suppress(OSError):
        print(f"error: {message}", file=sys.stderr)
    return status


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = ("can't allocate memory", "STATUS_ALLOC_FAILED", "[CUDA]: out of memory")
"""Of a CPU's allocator, of libraries and of Triton, which have no exception of their own for it."""


class Lenient:
    """A stream whose failure is not worth a run: a closed pipe, a full disk, a terminal that is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._silence()

    def _silence(self) -> None:
        from data_pipeline.errors import silence

        silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
