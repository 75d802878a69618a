"""Where a run's numbers go beside its own file: TensorBoard and Weights & Biases, each imported only if asked for."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Protocol

from fastnet.config import TrainConfig
from fastnet.errors import UserError


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under <run>/tensorboard. What an interrupted process wrote after `resume_step` is hidden."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard", purge_step=resume_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run named after the folder. run_id: which a continued run goes on with; its folder's name may be another
    run's."""

    def __init__(self, config: TrainConfig, folder: Path, run_id: str) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise UserError("--wandb needs Weights & Biases: pip install wandb, or leave it out.") from None
        name = folder.resolve().name
        self._run = wandb.init(
            project=config.run.wandb_project,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=dataclasses.asdict(config),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


def make_trackers(config: TrainConfig, folder: Path, resume_step: int, run_id: str) -> list[Tracker]:
    """What --tensorboard and --wandb ask for; UserError where one is not installed. run_id: what the run is called
    there, the same when it is continued."""
    trackers: list[Tracker] = []
    if config.run.wandb:
        trackers.append(WeightsAndBiases(config, folder, run_id))
    if config.run.tensorboard:
        trackers.append(TensorBoard(folder, resume_step))
    return trackers
