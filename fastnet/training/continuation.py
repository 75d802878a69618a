"""More epochs for a run: what its learning rate would do, and what to do where that is no good."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from fastnet.config import TrainConfig
from fastnet.errors import UserError
from fastnet.training.schedule import learning_rate
from fastnet.typed import read_object

JUMP = 2.0
"""A rate that rises by more than this undoes what a cosine's last epochs brought."""


def check_epochs(saved: TrainConfig, given: TrainConfig, folder: Path) -> None:
    """UserError where a continued run would end before it stands, or its learning rate would jump; says the rate where
    it changes. saved: as the run was started."""
    before, epochs = saved.optimizer.epochs, given.optimizer.epochs
    if before == epochs:
        return
    try:
        written = read_object(folder / "last.json")
        progress = written["progress"]
        done, step, within = (int(progress[name]) for name in ("epoch", "step", "step_in_epoch"))
        images = int(written["images_per_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # the checkpoint itself is looked at later
    trained = done + bool(within)
    if epochs < trained:
        raise UserError(
            f"--epochs {epochs} is less than the {trained} that {folder} has been trained for: name more, or leave it "
            "out.",
            exit_status=2,
        )
    if not done or step == within:
        return
    per_epoch, peak = (step - within) // done, given.peak_lr(images)
    was = learning_rate(step - 1, per_epoch, peak, saved.optimizer)
    now = learning_rate(step, per_epoch, peak, given.optimizer)
    if now > JUMP * was:
        raise UserError(
            f"--epochs {epochs}: the rate of {folder} has come down to {was:.2g} and would jump to {now:.2g}: train on "
            f"in a new, short run from its best weights, {fresh_run_command(given, folder)}",
            exit_status=2,
        )
    print(f"--epochs {epochs}: the learning rate goes on at {now:.2g} (it was {was:.2g})", file=sys.stderr)


def fresh_run_command(config: TrainConfig, folder: Path) -> str:
    """A short fine-tuning from a run's best weights, at a rate that does not undo them."""
    words = ["--recipe", "finetune", "--variant", config.model.variant, "--pretrained", str(folder)]
    words += ["--data", config.data.source, "--epochs", str(max(2, config.optimizer.epochs // 4))]
    if config.model.resolution:
        words += ["--resolution", str(config.model.resolution)]
    return "python -m fastnet.train " + shlex.join(words) + " --lr 0.0001"
