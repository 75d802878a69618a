"""What `--amp auto` means on a CPU: the precision in which its blocks were measured to train faster.

bf16 halves the bytes, and its products take AMX half of the time or less. A CPU without bf16 dot products converts in
registers, which may cost more than the bytes; one with them may have them at fp32's rate. So three kinds of block are
timed, and the result is kept. The checks of the blocks that follow (`tuner`) hold in whichever precision it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from fastnet.arch import Kernels, ModelConfig, family
from fastnet.device import Amp, pick_amp
from fastnet.training.step import AMP_DTYPES
from fastnet.training.tuning.kept import KeptResults, Tune, environment
from fastnet.training.tuning.subjects import Context, Subject
from fastnet.training.tuning.timers import HostTimer
from fastnet.training.tuning.trial import Trial
from kernels.cpu.build import cpu_level
from kernels.cpu.library import unavailable
from kernels.device import is_gpu

ENTRY = "precision of training"
SIDES = {56: ("block", 24, 24, 3, 1, 6, "symmetric"), 14: ("block", 80, 112, 5, 1, 6, "symmetric"),
         7: ("block", 192, 192, 5, 1, 6, "symmetric")}  # fmt: skip
IMAGES, ROUNDS = 4, 3
CPU = torch.device("cpu")


def pick_precision(
    name: str, device: torch.device, kernels: Kernels, variant: str, log: Callable[[str], None], tune: Tune = "on"
) -> Amp:
    """The precision that --amp means with a choice of kernels; UserError where the device has no bf16. `log` is told of
    a compilation."""
    ours = kernels in ("auto", "native") and family(variant).has_kernels
    if name != "auto" or is_gpu(device) or not ours or unavailable(log) is not None:
        return pick_amp(name, device)
    return _faster(tune, log)


def _faster(tune: Tune, log: Callable[[str], None]) -> Amp:
    """For the blocks in C++, which must be there: as kept, or measured. As predicted where `tune` says so, and where
    nothing can be kept: two runs would choose each for itself."""
    kept = KeptResults(environment(CPU), log)
    seconds = None if tune in ("off", "again") else kept.read().get(ENTRY)
    if not isinstance(seconds, dict) or not {"off", "bf16"} <= seconds.keys():
        if tune not in ("on", "again") or not kept.writable():
            return "bf16" if cpu_level() in ("amx", "avx512-bf16") else "off"
        seconds = kept.add({ENTRY: _measure(HostTimer())}, replace=tune == "again")[ENTRY]
    return "bf16" if seconds["bf16"] < seconds["off"] else "off"


def _measure(timer: HostTimer) -> dict[Amp, float]:
    """Seconds of forward and backward of one block of each kind, by precision; in turns."""
    found: dict[Amp, float] = {"off": 0.0, "bf16": 0.0}
    for side, kind in SIDES.items():
        runs = {}
        for amp in found:
            subject = Subject(kind, IMAGES, side, side, AMP_DTYPES[amp], True)
            runs[amp] = Trial(subject, Context(), ModelConfig(), CPU, amp, 1).runner("native")
            runs[amp]()
        taken: dict[Amp, list[float]] = {amp: [] for amp in runs}
        for _ in range(ROUNDS):
            for amp, run in runs.items():
                taken[amp].append(timer.whole(run))
        for amp, times in taken.items():
            found[amp] += statistics.median(times)
    return found
