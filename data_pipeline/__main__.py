"""`python -m data_pipeline prepare` and `verify`: getting Food-101, and looking at a data set as a whole."""

from __future__ import annotations

import sys
from pathlib import Path

from data_pipeline.errors import DataError


def _prepare(root: Path, short_side: int | None = None) -> int:
    """Download Food-101 (5 GB, and as much again while it is extracted). Interrupted, the same command goes on.

    Args:
        root: Folder that gets food-101/.
        short_side: Also write a copy whose photos have this short side in pixels, food-101-<short side>/.
    """
    from data_pipeline.prepare import prepare

    print(f"ready: python -m fastnet.train --data {prepare(root, short_side)}")
    return 0


def _verify(root: Path) -> int:
    """Decode every photo of a data set and report counts, damage, duplicates and what differs from the metadata.

    The exit status is 1 where something is wrong.

    Args:
        root: The data set, as for --data.
    """
    from rich.console import Console

    from data_pipeline.verify import show, verify

    report = verify(root)
    show(report, Console())
    return 0 if report.sound else 1


def main(arguments: list[str] | None = None) -> int:
    import tyro

    try:
        return tyro.extras.subcommand_cli_from_dict(
            {"prepare": _prepare, "verify": _verify}, prog="python -m data_pipeline", args=arguments
        )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
