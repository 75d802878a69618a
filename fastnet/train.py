"""`python -m fastnet.train`: from the command line to a run. The run itself is in `trainer.py`.

Torch is imported only after the command line has been read, so that `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastnet.commands import parse
from fastnet.config import RECIPES, TrainConfig, changeable, flag_types, processes
from fastnet.config_file import read_config
from fastnet.errors import Lenient, UserError, run_command
from fastnet.flags import translated, without_effect
from fastnet.training.continuation import check_epochs
from fastnet.training.run_folder import check_new
from fastnet.typed import read_object

RUNS = Path("runs")


def parse_arguments(arguments: list[str]) -> TrainConfig:
    """The configuration that a command line means: a recipe's or a continued run's, with the given flags on top."""
    arguments = translated(arguments, flag_types())
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe", default="food101")
    early.add_argument("--resume")
    early.add_argument("--out")
    known, _ = early.parse_known_args(arguments)
    # An unknown recipe is left to tyro, which lists the choices.
    default = RECIPES.get(known.recipe, RECIPES["food101"])
    folder = find_resumed(known.resume, known.out)
    if folder is not None:
        default = read_config(folder / "config.json")
    config: TrainConfig = parse(
        TrainConfig,
        prog="python -m fastnet.train",
        description="Train EfficientNet on Food-101, on a folder of images, or on a generated sample.",
        args=arguments,
        default=default,
    )
    config = _absolute(config)
    typed = {word.partition("=")[0] for word in arguments}
    size, before = config.optimizer.batch_size, default.optimizer.batch_size
    if folder is not None and not size:  # --batch-size auto, which was found when the run began
        config = replace(config, optimizer=replace(config.optimizer, batch_size=before))
    elif folder is None and size and "--batch-size" in typed and "--min-steps" not in typed:
        config = replace(config, optimizer=replace(config.optimizer, min_steps=min(1, config.optimizer.min_steps)))
    if idle := without_effect(config, typed):
        print(f"without effect: {', '.join(idle)}", file=sys.stderr)
    if folder is not None:
        _refuse_changes(_absolute(default), config, folder)
        check_epochs(default, config, folder)
        return replace(config, run=replace(config.run, resume=str(folder), out=str(folder)))
    return replace(config, run=replace(config.run, resume=None))


def _absolute(config: TrainConfig) -> TrainConfig:
    """With the data set's place from the root on, so that the run can be continued and evaluated from anywhere."""
    from data_pipeline.dataset.huggingface import HUB
    from data_pipeline.dataset.synthetic import SAMPLE
    from data_pipeline.files import expanded

    if config.run.out is not None:
        config = replace(config, run=replace(config.run, out=str(expanded(Path(config.run.out)))))
    data = config.data.data
    if data is None or data == SAMPLE or data.startswith(HUB):
        return config
    return replace(config, data=replace(config.data, data=os.path.abspath(expanded(Path(data)))))


def find_resumed(resume: str | None, out: str | None) -> Path | None:
    """The folder that --resume means, or None for a new run."""
    if resume is None:
        return None
    if resume == "auto":
        if out is not None:
            return Path(out) if (Path(out) / "last.safetensors").is_file() else None
        newest = max(RUNS.glob("*/last.safetensors"), key=lambda path: path.stat().st_mtime, default=None)
        return newest.parent if newest else None
    folder = Path(resume)
    if not (folder / "last.safetensors").is_file():
        raise UserError(f"--resume {folder}: no checkpoint there (last.safetensors); name the folder of a run.")
    return folder


def _refuse_changes(saved: TrainConfig, given: TrainConfig, folder: Path) -> None:
    def flatten(config: TrainConfig) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in dataclasses.asdict(config).items():
            values |= value if isinstance(value, dict) else {name: value}
        return values

    before, now = flatten(saved), flatten(given)
    allowed = changeable()
    if given.images_per_step * processes() == _images_per_step(saved, folder):
        # The same images in each step, in other parts: the way out of a GPU's memory.
        allowed |= {"batch_size", "grad_accum_steps"}
    for name, value in now.items():
        if name not in allowed and value != before[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {value} differs from the {before[name]} that {folder} was started with: leave it out to "
                "continue, or start a new run without --resume.",
                exit_status=2,
            )


def _images_per_step(saved: TrainConfig, folder: Path) -> int:
    """The images of a step over all the processes with which the run was started."""
    try:
        return int(read_object(folder / "last.json")["images_per_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return saved.images_per_step


def run_folder(config: TrainConfig) -> Path:
    """Where the run goes. UserError if another run, or a file of somebody else's, is there."""
    if config.run.out is None:
        from fastnet.scaling import architecture

        kind: int | str = architecture(config.model.variant, config.model.scaling).resolution
        if config.recipe == "finetune":  # the resolution is the weights'
            kind = "finetune"
        kind = config.model.resolution or kind
        return RUNS / f"{config.model.variant}-{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.run.out)
    if config.run.resume is None:
        check_new(folder)
    return folder


def resolve_config() -> tuple[TrainConfig, Path]:
    """What the command line means, and the run's folder; offers to download a data set that is not there."""
    from data_pipeline.dataset.download import offer, prepared

    config = parse_arguments(sys.argv[1:])
    if config.data.data is None and config.recipe == "food101" and (place := prepared() or offer(None)):
        config = replace(config, data=replace(config.data, data=str(place)))
    config.validate()
    folder = run_folder(config)
    offer(config.data.source)
    return config, folder


def train() -> int:
    sys.stdout, sys.stderr = Lenient(sys.stdout), Lenient(sys.stderr)
    if processes() > 1:
        return _train_together()
    config, folder = resolve_config()

    import torch
    from rich.console import Console

    from fastnet.allocator import keep_memory
    from fastnet.device import pick_device
    from fastnet.training.reporting.console import Heartbeat
    from fastnet.training.trainer import Trainer

    torch.set_flush_denormal(True)  # arithmetic on denormals is many times slower on a CPU
    keep_memory(pick_device(config.run.device, log=lambda text: None))  # the trainer says it
    console = Console()
    with Heartbeat(lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)) as doing:
        return Trainer(config, folder, console, doing=doing).run()


def _train_together() -> int:
    """One of the processes that torchrun started. The first reads the command line for all."""
    import logging

    import torch
    from rich.console import Console

    from fastnet.allocator import keep_memory
    from fastnet.device import pick_device
    from fastnet.training.distributed import init_process_group
    from fastnet.training.reporting.console import Heartbeat
    from fastnet.training.trainer import Trainer

    ranks = init_process_group()
    if not ranks.is_main:
        logging.getLogger("data_pipeline").setLevel(logging.ERROR)
    torch.set_flush_denormal(True)
    with ranks.one_report():
        config, folder = ranks.broadcast_from_main(resolve_config)
        keep_memory(pick_device(config.run.device, log=lambda text: None))
        console = Console(quiet=not ranks.is_main)
        with Heartbeat(lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)) as doing:
            return Trainer(config, folder, console, ranks, doing).run()


def _of_several() -> bool:
    try:
        return processes() > 1
    except UserError:  # which was said
        return False


def main() -> None:
    try:
        status: Any = run_command(train)
    except SystemExit as left:
        status = left.code or 0
    if _of_several() and isinstance(status, int):
        # Threads of torch that listened to the other processes may still run; the interpreter's end aborts on them.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
