"""What changes from step to step or from epoch to epoch, as pure functions of the position in the run.

A resumed run therefore needs no scheduler's state, and computes what the uninterrupted one computes.
"""

from __future__ import annotations

import hashlib
import math

from fastnet.config import OptimizerOptions


def learning_rate(step: int, steps_per_epoch: int, peak: float, options: OptimizerOptions) -> float:
    """Learning rate of step `step` (from 0): linear warm-up from `warmup_lr`, then `sched`, never below `min_lr`.

    step: peak x lr_decay^k, where k counts whole periods of `decay_epochs` since the warm-up ended.
    cosine: min_lr + (peak - min_lr) (1 + cos(pi t)) / 2, where t goes from 0 after the warm-up to 1 after the last
    epoch (Loshchilov & Hutter 2017, eq. 5, one period).
    """
    warmup = options.warmup_epochs * steps_per_epoch
    if step < warmup:
        return options.warmup_lr + (peak - options.warmup_lr) * (step + 1) / math.ceil(warmup)
    if options.sched == "cosine":
        t = min(1.0, (step - warmup) / max(1.0, options.epochs * steps_per_epoch - warmup))
        return options.min_lr + (peak - options.min_lr) * (1 + math.cos(math.pi * t)) / 2
    periods = math.floor((step - warmup) / (options.decay_epochs * steps_per_epoch))
    return max(options.min_lr, peak * options.lr_decay**periods)


def ema_decay(update: int, decay: float, warmup: bool) -> float:
    """Decay of the averaged weights at update `update` (from 1), as timm's ModelEmaV3 counts it.

    The first update copies. With warm-up, 1 - (1 + t)^(-2/3), at most `decay`, where t counts the updates since.
    """
    since = update - 1
    if since <= 0:
        return 0.0
    return min(decay, 1 - (1 + since) ** (-2 / 3)) if warmup else decay


def progressive_resolution(epoch: int, epochs: int, resolution: int, stages: int, lowest: int | None) -> int:
    """Image side in `epoch` when training grows it in `stages` equal stages (EfficientNetV2, section 4.2).

    From `lowest` (default: half of `resolution`) linearly to `resolution`, in multiples of 8; the last stage is exact.
    """
    if stages < 2:
        return resolution
    stage = min(epoch * stages // epochs, stages - 1)
    if stage == stages - 1:
        return resolution
    first = resolution / 2 if lowest is None else lowest
    return min(resolution, round((first + (resolution - first) * stage / (stages - 1)) / 8) * 8)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """63 bits that all randomness inside a step is drawn from: a function of (seed, step), so that a resumed run draws
    what the uninterrupted one draws, whatever else used a generator in between. rank: for draws that ranks don't share.
    """
    numbers = (seed, step, rank) if rank else (seed, step)
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
