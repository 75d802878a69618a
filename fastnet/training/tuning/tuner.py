"""The first use of a model on a device: measure what is new, share it among ranks, keep it, set it, say it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from fastnet import forms, layers
from fastnet.arch import Kernels
from fastnet.config import RunOptions
from fastnet.device import Amp
from fastnet.errors import UserError
from fastnet.forms import Form
from fastnet.model import EfficientNet
from fastnet.training.distributed import ALONE, Ranks
from fastnet.training.reporting.console import Report
from fastnet.training.step import AMP_DTYPES
from fastnet.training.tuning.kept import Entries, KeptResults, Tune, environment
from fastnet.training.tuning.measure import NO_MEMORY, Bench, DeviceLost, Result, pick, within_memory
from fastnet.training.tuning.subjects import Occurrences, Subject, subjects, unfused
from fastnet.training.tuning.timers import CudaTimer, HostTimer, Timer
from kernels import configs
from kernels.cpu.build import cpu_level, has_vectors
from kernels.cpu.library import unavailable
from kernels.device import is_gpu

Todo = Mapping[Subject, Occurrences]

MEASURING = ("on", "again")
LAUNCHING: tuple[Form, ...] = ("triton", "triton-ops")  # with kernels that are compiled before they are measured

# What may be spent on compiling for comparison, where the model is compiled; blocks that this does not reach go by
# their eager times, and are compared in a later run.
COMPILE_SECONDS = 60.0
# Of the GPU's memory, what a training step may fill with what its blocks keep for backward, where forms differ in that.
MEMORY_SHARE = 0.75


# A CPU is measured on batches of about so many pixels: its times grow with the batch.
CPU_PIXELS = 4 * 224 * 224


def candidates(kernels: Kernels, subject: Subject, native: bool = False) -> tuple[Form, ...]:
    """The forms that a model's choice of kernels leaves open, predicted best first. native: on a CPU."""
    if native:
        return ("native", "torch") if has_vectors(cpu_level()) else ("torch", "native")
    if kernels == "auto":
        return ("triton", "triton-ops", "torch") if subject.is_block else ("triton", "torch")
    return ("triton-ops",) if kernels == "triton-ops" and subject.is_block else ("triton",)


def timer_for(device: torch.device) -> Timer | None:
    """What measures on a device; None where there is nothing to choose."""
    if device.type == "cpu":
        return HostTimer()
    return CudaTimer(device) if device.type == "cuda" and torch.cuda.is_available() else None


def _timer(kernels: Kernels, device: torch.device) -> Timer | None:
    """None where there is nothing to choose: PyTorch computes everything, or the kernels were named."""
    impl = layers.resolve(layers.operation_impl(kernels), torch.empty(0, device=device))
    if impl == "torch" and (kernels != "auto" or is_gpu(device) or unavailable() is not None):
        return None
    return timer_for(device)


def make_tuner(
    options: RunOptions,
    kernels: Kernels,
    device: torch.device,
    amp: Amp,
    log: Callable[[str], None],
    ranks: Ranks = ALONE,
    table: Path | None = None,
) -> Tuner | None:
    """None where PyTorch computes everything, or where nothing can be measured."""
    timer = _timer(kernels, device)
    if timer is None:
        return None
    return Tuner(
        device, amp, timer, log, tune=options.tune, compiled=options.compile != "off",
        deterministic=options.deterministic, ranks=ranks, table=table,
    )  # fmt: skip


def prepare_inference(model: EfficientNet, resolution: int, images: int, amp: Amp) -> None:
    """Before a model is evaluated once, on its device: take what is kept, else predictions that can be run here."""
    device = model.classifier.weight.device
    timer = _timer(model.config.kernels, device)
    if timer is not None:
        tuner = Tuner(device, amp, timer, lambda text: print(text, file=sys.stderr), tune="kept")
        tuner.prepare(model, resolution, images, training=False)


class Tuner:
    """`prepare` before a model's first step on a kind of batch.

    tune: "off" believes predictions and only finds out what can't be run; "kept" believes kept results before that;
    "on" measures what is not kept, "again" everything. deterministic: where results can't be kept, so that two runs
    would choose each for itself, predictions are believed too. table: the file that tells what was found.

    Raises UserError where the kernels that the user asked for by name can't be run or are wrong, or where one leaves
    the device unusable.
    """

    def __init__(
        self,
        device: torch.device,
        amp: Amp,
        timer: Timer,
        log: Callable[[str], None],
        *,
        tune: Tune = "on",
        compiled: bool = False,
        deterministic: bool = False,
        ranks: Ranks = ALONE,
        table: Path | None = None,
    ) -> None:
        self.device, self.amp, self.timer, self.log = device, amp, timer, log
        self.compiled, self.ranks, self.table = compiled, ranks, table
        self.kept = KeptResults(environment(device), log)
        if deterministic and tune in MEASURING and not self.kept.writable():
            log(
                f"--deterministic wants one choice a machine, and none can be kept in {self.kept.path.parent}: "
                "predictions are believed, as with --tune off"
            )
            tune = "off"
        self.native = device.type == "cpu" and layers.resolve("auto", torch.empty(0)) == "torch"
        self.tune: Tune = tune
        self.measures = tune in MEASURING
        self._rows: dict[str, str] = {}
        self._done: set[Subject] = set()
        self._said: set[str] = set()

    def prepare(
        self,
        model: EfficientNet,
        resolution: int,
        images: int,
        *,
        training: bool,
        report: Report = lambda words, done, total: None,
    ) -> None:
        """Find and set the forms and configurations for batches of `images` images, in a training step of the model as
        it is frozen now, or in evaluation. All ranks call it together."""
        kernels = model.config.kernels
        if self.native:
            images = max(1, min(images, CPU_PIXELS // resolution**2))
        found = subjects(model, resolution, images, AMP_DTYPES[self.amp], training=training)
        if self.native:
            found = {s: occurrences for s, occurrences in found.items() if s.is_block or s.training}
        todo = {subject: found[subject] for subject in found if subject not in self._done}
        self._done |= todo.keys()
        if not todo:
            return
        if training and kernels == "triton" and (count := unfused(model)):
            self.log(
                f"{count} blocks run as with --kernels triton-ops: their batch norms are frozen while gradients flow "
                "through them"
            )
        compiled = self.compiled and training  # evaluation is not
        bench = Bench(self.device, self.amp, model.config, self.timer, self._threads(), self.native)
        kinds = self.ranks.all_gather_object(self.kept.environment)
        own, everyone = self._together(kinds, lambda: self._find(bench, todo, kernels, compiled, report))
        results = {subject: [results[subject] for results in everyone] for subject in todo}
        if kernels != "auto":
            self._insist(kernels, results)
        chosen, eager = (
            {s: pick(results[s], self._candidates(kernels, s), compiled=mode) for s in todo}
            for mode in (compiled, False)
        )
        memory = min(int(kind["memory"]) for kind in kinds)
        if training and memory:
            # Beside weights, their gradients, and the optimizer's and the average's copies of them.
            budget = MEMORY_SHARE * memory - 5 * sum(4 * p.numel() for p in model.parameters())
            chosen, eager = (within_memory(picks, todo, everyone[0], budget) for picks in (chosen, eager))
        for subject in todo:
            configs.use(own[subject].configs)
            place = subject.place(self.device, compiled=False)
            forms.use({place: eager[subject], place._replace(compiled=True): chosen[subject]})
        with self.ranks.local_main_first():  # the other processes of a machine find what the first compiled
            ready = [(s, todo[s], form, False) for s, form in chosen.items() if form in LAUNCHING]
            bench.compile(ready, report, "loading kernels")
        self.timer.release()
        self._tell(todo, own, chosen)

    def _candidates(self, kernels: Kernels, subject: Subject) -> tuple[Form, ...]:
        return candidates(kernels, subject, self.native)

    def _threads(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(16, cores // self.ranks.local_size))

    # --- finding ----------------------------------------------------------------------------------------------------

    def _together(
        self, kinds: list[dict[str, str]], find: Callable[[], dict[Subject, Result]]
    ) -> tuple[dict[Subject, Result], list[dict[Subject, Result]]]:
        """(the results for this rank's GPU, those of every kind of GPU among the ranks). The first rank with a kind of
        GPU finds them."""
        leader = kinds.index(self.kept.environment)
        found = self.ranks.all_gather_object(find() if leader == self.ranks.rank else None)
        everyone = [results for results in found if results is not None]
        own = found[leader]
        assert own is not None
        return own, everyone

    def _find(
        self, bench: Bench, todo: Todo, kernels: Kernels, compiled: bool, report: Report
    ) -> dict[Subject, Result]:
        """Kept results, and new ones for the rest."""
        names = {s: _entry_name(s, occurrences, self._candidates(kernels, s)) for s, occurrences in todo.items()}
        results: dict[Subject, Result] = {}
        if self.tune in ("on", "kept"):
            entries = self.kept.read()
            for subject, name in names.items():
                result = Result.from_json(entries[name], self.device) if name in entries else None
                if result is not None:
                    results[subject] = result
        missing = {subject: todo[subject] for subject in todo if subject not in results}
        fresh: dict[Subject, Result] = {}
        try:
            self._measure(bench, missing, kernels, fresh, report)
            results |= fresh
            if compiled and self.measures:
                fresh |= self._compare_compiled(bench, todo, results, kernels, report)
        except DeviceLost as lost:
            if self.measures:
                fresh[lost.subject] = lost.result
                self._keep(fresh, names)
            raise UserError(
                f"{lost.subject.name}: {lost}, which has left the GPU unusable: "
                + ("start again, and the block is left to PyTorch." if self.measures else "use --kernels torch.")
            ) from lost
        if self.measures and fresh:
            results |= self._keep(fresh, names)
        return results

    def _measure(
        self, bench: Bench, missing: Todo, kernels: Kernels, fresh: dict[Subject, Result], report: Report
    ) -> None:
        open_to = {subject: self._candidates(kernels, subject) for subject in missing}
        for_all = [(s, o, form) for s, o in missing.items() for form in open_to[s] if form in LAUNCHING]
        wanted = for_all if self.measures else [one for one in for_all if one[2] == open_to[one[0]][0]]
        bench.compile([(*one, self.measures) for one in wanted], report, "compiling kernels")
        for done, (subject, occurrences) in enumerate(missing.items()):
            if self.measures:
                report("measuring blocks", done, len(missing))
            measure = bench.measure if self.measures else bench.first_usable
            fresh[subject] = measure(subject, occurrences, open_to[subject])
        if self.measures and missing:
            report("measuring blocks", len(missing), len(missing))

    def _compare_compiled(
        self, bench: Bench, todo: Todo, results: dict[Subject, Result], kernels: Kernels, report: Report
    ) -> dict[Subject, Result]:
        """Compiled times where they are missing, of what matters most first, as long as COMPILE_SECONDS last."""
        lacking = [s for s in todo if not results[s].compiled and len(results[s].eager) > 1]
        lacking.sort(key=lambda s: -todo[s].count * max(results[s].eager.values()))
        began, compared = self.timer.now(), {}
        for done, subject in enumerate(lacking):
            report("comparing compiled blocks", done, len(lacking))
            if self.timer.now() - began > COMPILE_SECONDS:
                break
            bench.measure_compiled(subject, todo[subject], results[subject], self._candidates(kernels, subject))
            compared[subject] = results[subject]
        return compared

    def _keep(self, fresh: Mapping[Subject, Result], names: Mapping[Subject, str]) -> dict[Subject, Result]:
        """What counts from now on: another process may have been the first to keep a result."""
        entries: Entries = {names[subject]: result.to_json() for subject, result in fresh.items()}
        kept = self.kept.add(entries, replace=self.tune == "again")
        return {s: Result.from_json(kept[names[s]], self.device) or result for s, result in fresh.items()}

    # --- telling ----------------------------------------------------------------------------------------------------

    def _insist(self, kernels: Kernels, found: Mapping[Subject, Sequence[Result]]) -> None:
        for subject, results in found.items():
            for reason in (reason for result in results for reason in result.refused.values() if reason != NO_MEMORY):
                raise UserError(
                    f"--kernels {kernels} can't run {subject.name} ({reason}): use --kernels auto or torch."
                )

    def _tell(self, todo: Todo, results: Mapping[Subject, Result], chosen: Mapping[Subject, Form]) -> None:
        """Once for each reason, which blocks are left to another form; and the table."""
        by_reason: dict[tuple[str, Form], list[str]] = {}
        for subject, result in results.items():
            first = next(iter(result.refused), None)
            if first is not None and chosen[subject] != first:
                by_reason.setdefault((result.refused[first], chosen[subject]), []).append(subject.name)
        for (reason, form), names in by_reason.items():
            if reason not in self._said:
                self._said.add(reason)
                others = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
                left_to = "PyTorch" if form == "torch" else "PyTorch's convolutions and our single operations"
                self.log(f"{names[0]}{others} not fused, since {reason}; left to {left_to}.")
        for subject, occurrences in todo.items():
            self._rows[subject.name] = _row(subject, occurrences, results[subject], chosen[subject])
        if self.table is not None and self.ranks.is_main:
            from fastnet.loading.checkpoint import write_atomically

            where = self.kept.environment
            if "level" in where:
                head = [f"{where['gpu']}, {where['level']}, {torch.get_num_threads()} threads, torch {where['torch']}"]
            else:
                head = [f"{where['gpu']}, driver {where['driver']}, torch {where['torch']}, triton {where['triton']}"]
            head += [f"--tune {self.tune}; kept in {self.kept.path}" if self.tune != "off" else "--tune off", ""]
            write_atomically(self.table, "\n".join([*head, *self._rows.values(), ""]).encode())


def _entry_name(subject: Subject, occurrences: Occurrences, forms: Sequence[Form]) -> str:
    """Of a kept result: all that it depends on beside the environment."""
    contexts = sorted(f"{'scaled' if c.scaled else 'plain'} after {c.pending}" for c in occurrences.contexts)
    return f"{subject.name}; {', '.join(contexts)}; {'/'.join(forms)}"


def _row(subject: Subject, occurrences: Occurrences, result: Result, form: Form) -> str:
    """Of the table: times, the form taken, and why others are out."""

    def times(seconds: Mapping[Form, float]) -> str:
        return ", ".join(f"{name} {1e3 * spent:.3f} ms" for name, spent in seconds.items())

    parts = [f"{occurrences.count} x {subject.name}: {form}"]
    parts += [f"  eager: {times(result.eager)}"] if result.eager else []
    parts += [f"  compiled: {times(result.compiled)}"] if result.compiled else []
    parts += [f"  not {name}: {reason}" for name, reason in result.refused.items()]
    parts += [f"  {site.kernel} {site.sizes}: {config}" for site, config in result.configs.items()]
    return "\n".join(parts)
