"""`python -m data_pipeline prepare`, `verify` and `tune`: getting Food-101, looking at a data set as a whole, finding
the flags that load it fastest."""

from __future__ import annotations

import sys
from pathlib import Path

from data_pipeline.errors import DataError, refused, silence, write_any_name


def _prepare(root: Path, short_side: int | None = None) -> int:
    """Download Food-101 (5 GB, and as much again while it is extracted). Interrupted, the same command goes on.

    Args:
        root: Folder that gets food-101/.
        short_side: Also write a copy whose photos have this short side in pixels, food-101-<short side>/.
    """
    from data_pipeline.dataset.download import prepare

    print(f"ready: python -m fastnet.train --data {prepare(root, short_side)}")
    return 0


def _verify(root: Path) -> int:
    """Decode every photo of a data set and report counts, damage, duplicates and what differs from the metadata.

    The exit status is 1 where something is wrong.

    Args:
        root: The data set, as for --data.
    """
    from rich.console import Console

    from data_pipeline.dataset.verify import show, verify

    report = verify(root)
    show(report, Console())
    return 0 if report.sound else 1


def _tune(root: Path, resolution: int = 224, batch_size: int = 128, seconds: float = 5.0) -> int:
    """Measure loaders, threads, prefetch, decoder and JPEG engine share on this machine, and print the fastest flags.

    Args:
        root: The data set, as for --data.
        resolution: Side of the images in pixels, as for the training.
        batch_size: As for the training.
        seconds: For each of the settings, of which there are about twenty.
    """
    import torch
    from rich.console import Console

    from data_pipeline.dataset.index import build_index
    from data_pipeline.loaders.tune import tune
    from kernels.nvidia import unusable

    if resolution < 1 or batch_size < 1 or seconds < 0:
        raise DataError("--resolution and --batch-size must be positive, and --seconds not negative.")
    if reason := unusable():
        print(f"using the CPU because {reason}.", file=sys.stderr)
    device = torch.device("cuda" if reason is None and torch.cuda.is_available() else "cpu")
    best = tune(
        build_index(root), resolution=resolution, batch_size=batch_size, device=device, seconds=seconds,
        console=Console(),
    )  # fmt: skip
    print(f"fastest: python -m fastnet.train --data {root} {best.flags}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    import tyro

    write_any_name()
    try:
        return tyro.extras.subcommand_cli_from_dict(
            {"prepare": _prepare, "verify": _verify, "tune": _tune}, prog="python -m data_pipeline", args=arguments
        )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        silence(sys.stdout)
        return 141
    except OSError as error:
        silence(sys.stdout)
        print(f"error: {refused(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
