"""Trying, checking and timing one subject in its forms and configurations."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastnet.device import Amp
from fastnet.forms import Form
from fastnet.model import ModelConfig
from fastnet.training.reporting.console import Report
from fastnet.training.tuning.subjects import Context, Occurrences, Subject
from fastnet.training.tuning.timers import Timer
from fastnet.training.tuning.trial import Trial, checked_alone, distinct_images
from kernels import configs, launch, tolerance
from kernels.configs import Config, Site
from kernels.device import gpu

# Another form has to be faster by more than this: it keeps more activations. Another configuration by more than that:
# two measurements of one launch differ as much.
FORM_MARGIN, CONFIG_MARGIN = 0.05, 0.02
ROUNDS, WARM_UPS = 5, 2
DRAWS = 8  # of the images, where one breaks the rule: PyTorch may be right by luck in a gradient of few values
CPU_ROUNDS, CPU_WARM_UPS = 3, 1  # where a round takes a hundred times as long
CPU_DRAWS = 32  # of fewer images
NO_MEMORY = "there is not enough memory for it"

Picks = dict[Site, Config]


class DeviceLost(Exception):
    """A kernel has left the device unusable; `result` says of which form it was."""

    def __init__(self, subject: Subject, result: Result, reason: str) -> None:
        super().__init__(reason)
        self.subject, self.result = subject, result


@dataclass
class Result:
    """What was found out about a subject: seconds by form, eager and compiled; bytes kept for backward; why forms are
    out; and the fastest configurations of our launches, where they are not the predicted ones."""

    eager: dict[Form, float] = field(default_factory=dict)
    compiled: dict[Form, float] = field(default_factory=dict)
    kept: dict[Form, int] = field(default_factory=dict)
    refused: dict[Form, str] = field(default_factory=dict)
    configs: Picks = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        sites = [[*site, configs.to_json(config)] for site, config in self.configs.items()]
        times = {"eager": self.eager, "compiled": self.compiled}
        return times | {"kept": self.kept, "refused": self.refused, "configs": sites}

    @classmethod
    def from_json(cls, kept: Any, device: torch.device) -> Result | None:
        """None where it is not what `to_json` makes. A configuration that is no candidate any more is left out."""
        try:
            found = cls(*(dict(kept[name]) for name in ("eager", "compiled", "kept", "refused")))
            for kernel, sizes, values in kept["configs"]:
                site = Site(kernel, tuple(sizes))
                config = configs.find(site, gpu(device), values)
                if config is not None:
                    found.configs[site] = config
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        return found


def pick(results: Sequence[Result], candidates: Sequence[Form], *, compiled: bool) -> Form:
    """The form to take, on all of the GPUs whose results these are: the slowest of them decides.

    candidates: predicted best first; that one, or the next that is usable, is taken but for a clear winner.
    """
    reasons = {form: [r.refused[form] for r in results if form in r.refused] for form in candidates}
    usable = [form for form in candidates if not reasons[form]]
    if not usable:  # what has no memory for one block has none for the model, and may as well say so there
        return next((form for form in candidates if set(reasons[form]) == {NO_MEMORY}), "torch")
    for mode in ("compiled", "eager") if compiled else ("eager",):
        times: list[dict[Form, float]] = [getattr(result, mode) for result in results]
        seconds = {form: max(t[form] for t in times) for form in usable if all(form in t for t in times)}
        if seconds:
            first = next(form for form in usable if form in seconds)
            best = min(seconds, key=lambda form: seconds[form])
            return best if seconds[best] < (1 - FORM_MARGIN) * seconds[first] else first
    return usable[0]


def within_memory(
    picks: dict[Subject, Form], todo: Mapping[Subject, Occurrences], results: Mapping[Subject, Result], budget: float
) -> dict[Subject, Form]:
    """The picks, but that what they keep for backward stays within `budget` bytes: where it does not, blocks go back to
    their form that keeps least, those first that lose least time for each byte."""
    kept = {s: results[s].kept for s, form in picks.items() if form in results[s].kept}
    over = sum(todo[s].count * of[picks[s]] for s, of in kept.items()) - budget
    swaps: list[tuple[float, int, Subject, Form]] = []
    for subject, of in kept.items():
        now, least = picks[subject], min(of, key=lambda form: of[form])
        if of[now] > of[least]:
            times, saved = results[subject].eager, of[now] - of[least]
            lost = times.get(least, 0.0) - times.get(now, 0.0)
            swaps.append((lost / saved, todo[subject].count * saved, subject, least))
    found = dict(picks)
    for _, saved, subject, least in sorted(swaps, key=lambda swap: swap[:2]):
        if over <= 0:
            break
        found[subject], over = least, over - saved
    return found


class Bench:
    """Where subjects are measured: a device, its precision and its timer."""

    def __init__(
        self, device: torch.device, amp: Amp, config: ModelConfig, timer: Timer, threads: int, native: bool = False
    ) -> None:
        """native: the forms are those of a CPU, whose memory isn't counted and whose images are checked by themselves:
        no launch depends on how many there are."""
        self.device, self.amp, self.config, self.timer, self.threads = device, amp, config, timer, threads
        self.native = native
        self.rounds, self.warm_ups = (CPU_ROUNDS, CPU_WARM_UPS) if native else (ROUNDS, WARM_UPS)

    # --- compiling --------------------------------------------------------------------------------------------------

    def compile(self, todo: Iterable[tuple[Subject, Occurrences, Form, bool]], report: Report, words: str) -> None:
        """Compile what these subjects launch in these forms, side by side; the last says whether with every candidate
        configuration. What can't be compiled says so when it is tried."""
        wanted: list[launch.Launch] = []
        for subject, occurrences, form, all_candidates in todo:
            for context in _contexts(occurrences):
                with suppress(Exception):
                    trial = self._trial(subject, context)
                    found = self._launches(trial, form, {})
                    wanted += found
                    choices = self._candidates(found) if all_candidates else {}
                    for i in range(1, max(map(len, choices.values()), default=1)):
                        wanted += self._launches(trial, form, {s: c[i % len(c)] for s, c in choices.items()})
        if wanted:
            launch.compile_all(wanted, self.threads, lambda done, total: report(words, done, total))

    def _launches(self, trial: Trial, form: Form, picks: Mapping[Site, Config]) -> list[launch.Launch]:
        with configs.trying(picks), launch.dry() as found:
            trial.runner(form)()
        return found

    def _candidates(self, launches: Iterable[launch.Launch]) -> dict[Site, list[Config]]:
        """Of the sites where there is something to choose."""
        sites = dict.fromkeys(one.site for one in launches if one.site is not None)
        found = {site: list(configs.candidates(site, gpu(self.device))) for site in sites}
        return {site: some for site, some in found.items() if len(some) > 1}

    def _trial(self, subject: Subject, context: Context, seed: int = 0) -> Trial:
        distinct = distinct_images(subject)
        return Trial(subject, context, self.config, self.device, self.amp, distinct, seed)

    # --- one subject ------------------------------------------------------------------------------------------------

    def first_usable(self, subject: Subject, occurrences: Occurrences, candidates: Sequence[Form]) -> Result:
        """Only whether forms can be run at all, until one can."""
        result = Result()
        for form in candidates:
            with self._refusing(subject, form, result):
                for context in _contexts(occurrences):
                    self._trial(subject, context).runner(form)()
            if form not in result.refused:
                break
        return result

    def measure(self, subject: Subject, occurrences: Occurrences, candidates: Sequence[Form]) -> Result:
        """Configurations, rightness and eager times of every form."""
        result = Result()
        for form in candidates:
            with self._refusing(subject, form, result):
                if form == "torch":
                    self._trial(subject, Context()).runner(form)()
                    continue
                picks = {} if form == "native" else self._fastest_configs(subject, occurrences, form)
                wrong = self._why_wrong(subject, occurrences, form, picks)
                if wrong is not None and picks:
                    picks = {}
                    wrong = self._why_wrong(subject, occurrences, form, picks)
                if wrong is not None:
                    result.refused[form] = wrong
                result.configs |= picks
        if len(candidates) > 1:
            result.eager = self._times(subject, occurrences, result, candidates, compiled=False)
            result.kept = self._kept(subject, occurrences, result) if subject.training and not self.native else {}
        return result

    def measure_compiled(
        self, subject: Subject, occurrences: Occurrences, result: Result, candidates: Sequence[Form]
    ) -> None:
        """The times of the forms through torch.compile."""
        tried = replace(result, refused=dict(result.refused))  # what only fails compiled is not out
        result.compiled = self._times(subject, occurrences, tried, candidates, compiled=True)

    @contextmanager
    def _refusing(self, subject: Subject, form: Form, result: Result) -> Iterator[None]:
        """What the body raises puts the form out: training can do without it. DeviceLost where it can't."""
        try:
            yield
            self.timer.settle()
        except torch.OutOfMemoryError:
            result.refused[form] = NO_MEMORY
        except Exception as error:
            result.refused[form] = words_for(error)
            try:
                self.timer.settle()
            except RuntimeError as lost:
                raise DeviceLost(subject, result, result.refused[form]) from lost
        if form in result.refused and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _fastest_configs(self, subject: Subject, occurrences: Occurrences, form: Form) -> Picks:
        """Where another configuration than the predicted one is clearly faster."""
        trials = [self._trial(subject, context) for context in occurrences.contexts]
        launches = [one for trial in trials for one in self._launches(trial, form, {})]
        choices = self._candidates(launches)
        taken: dict[Site, dict[Config, list[float]]] = {s: {c: [] for c in some} for s, some in choices.items()}
        most = max(map(len, choices.values()), default=0)
        runs = [trial.runner(form, defer_residual=trial.context.pending is not None) for trial in trials]
        for turn in range(ROUNDS + 1):
            for i in range(most):
                for run in runs:
                    picks, seconds = self._run_with(run, choices, i)
                    for site, spent in seconds.items():
                        if turn and site in picks:  # the first turn loads and warms up
                            taken[site][picks[site]].append(spent)
        found: Picks = {}
        for site, some in choices.items():
            medians = {c: statistics.median(taken[site][c]) for c in some if taken[site][c]}
            first = configs.candidates(site, gpu(self.device))[0]
            if medians:
                best = min(medians, key=lambda config: medians[config])
                if first not in medians or medians[best] < (1 - CONFIG_MARGIN) * medians[first]:
                    found[site] = best
        return found

    def _run_with(
        self, run: Callable[[], object], choices: dict[Site, list[Config]], i: int
    ) -> tuple[Picks, Mapping[Site, float]]:
        """One run with candidate i of every site. A candidate that can't be launched is struck off, unless it is the
        last of its site."""
        while True:
            picks = {site: some[i % len(some)] for site, some in choices.items()}
            failed: list[Site | None] = []

            def watch(site: Site | None, job: Callable[[], None], failed: list[Site | None] = failed) -> None:
                try:
                    job()
                except launch.KernelError:
                    failed.append(site)
                    raise

            try:
                with configs.trying(picks):
                    return picks, self.timer.launches(run, watch)
            except launch.KernelError:
                site = failed[0] if failed else None
                if site is None or len(choices.get(site, ())) < 2:
                    raise
                choices[site].remove(picks[site])

    def _why_wrong(self, subject: Subject, occurrences: Occurrences, form: Form, picks: Picks) -> str | None:
        """By how much the form breaks the tolerance rule, in every context; None where it keeps to it."""
        with configs.trying(picks):
            for context in _contexts(occurrences):
                draws: list[dict[str, tolerance.Errors]] = []
                for seed in range(CPU_DRAWS if self.native else DRAWS):
                    draws.append(self._errors(subject, context, form, seed))
                    found = {name: tolerance.worst(draw[name] for draw in draws) for name in draws[0]}
                    worst = tolerance.most_wrong(found.values())
                    if worst.right or worst.gross:
                        break
                if not worst.right:
                    name = next(name for name, errors in found.items() if errors is worst)
                    return f"its result is wrong here ({name}: {worst})"
        return None

    def _errors(self, subject: Subject, context: Context, form: Form, seed: int) -> dict[str, tolerance.Errors]:
        """At full size, or on as many images as there is memory for; on a CPU on a few, whatever the batch."""
        few = distinct_images(subject)
        sizes = [(subject.images, few), (few, few), (1, 1)]
        if self.native:
            sizes = [(checked_alone(subject),) * 2]
        for images, distinct in sizes:
            smaller = subject._replace(images=images)
            try:
                return Trial(smaller, context, self.config, self.device, self.amp, distinct, seed).errors(form)
            except torch.OutOfMemoryError:
                if images == 1:
                    raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        raise AssertionError("unreachable")

    def _kept(self, subject: Subject, occurrences: Occurrences, result: Result) -> dict[Form, int]:
        """Bytes between forward and backward, of the forms that were timed."""
        context = occurrences.contexts.most_common(1)[0][0]
        found: dict[Form, int] = {}
        for form in result.eager:
            forward = self._trial(subject, context).runner(
                form, defer_residual=context.pending is not None, backward=False
            )
            with configs.trying(result.configs):
                before = self.timer.allocated()
                held = forward()
                found[form] = self.timer.allocated() - before
                del held
        return found

    def _times(
        self, subject: Subject, occurrences: Occurrences, result: Result, candidates: Sequence[Form], *, compiled: bool
    ) -> dict[Form, float]:
        """Medians of the forms that are not out, in turns, in the context that occurs most."""
        context = occurrences.contexts.most_common(1)[0][0]
        runs: dict[Form, Callable[[], object]] = {}
        taken: dict[Form, list[float]] = {}
        with configs.trying(result.configs):
            for form in candidates:
                if form in result.refused:
                    continue
                with self._refusing(subject, form, result):
                    # What a block saves that leaves its residual add to the next, it pays for the one before.
                    run = self._trial(subject, context).runner(
                        form, defer_residual=context.pending is not None, compiled=compiled
                    )
                    for _ in range(self.warm_ups):
                        run()
                    runs[form] = run
            for _ in range(self.rounds):
                for form, one in runs.items():
                    if form not in result.refused:
                        with self._refusing(subject, form, result):
                            taken.setdefault(form, []).append(self.timer.whole(one))
        return {form: statistics.median(t) for form, t in taken.items() if form not in result.refused}


def _contexts(occurrences: Occurrences) -> list[Context]:
    """Those that occur, and those that do where a neighbour is not fused."""
    return list(dict.fromkeys([*occurrences.contexts, *(c._replace(pending=None) for c in occurrences.contexts)]))


def words_for(error: Exception) -> str:
    """The reason in an error, without a remedy that is meant for a caller of `kernels`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = re.sub(r"(:|, or) pass impl='(torch|auto)'\.?$", "", lines[0]) if lines else ""
    if isinstance(error, launch.KernelError) and reason:
        return reason
    return f"it fails here with {type(error).__name__}{f': {reason}' if reason else ''}"
