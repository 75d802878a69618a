"""Stages of the proof that time whole models: the training step and inference, ours against timm and torchvision."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.contenders import OURS, TIMM, TORCHVISION, StepRunner, available_peers, build, make_batch
from bench.first_step import in_subprocess
from bench.measure import interleaved, median_ratio, peak_memory, summarise, synchronise
from bench.shapes import activations
from bench.stages import Case, Context, Refused, Stage, attempt
from fastnet.step import Amp

CACHES = Path(tempfile.gettempdir()) / "fastnet-proof-caches"
# Seconds that compiling a model whole may still need when its cache was filled before.
COMPILE_ALLOWANCE = 60
AUTOTUNED = "compile caches, max-autotune"


class Workload(NamedTuple):
    variant: str
    resolution: int
    batch: int

    def __str__(self) -> str:
        return f"{self.variant}@{self.resolution} batch {self.batch}"


class Entry(NamedTuple):
    """A contender in one mode. `options` go to torch.compile; None is eager."""

    model: str
    mode: str
    options: dict[str, Any] | None


def entries(compiled: bool = True, peer_options: dict[str, Any] | None = None) -> list[Entry]:
    """Ours, timm's efficientnet and torchvision's, eager first: what matters most comes before time runs out."""
    peers = [name for name in available_peers()[0] if name in (TIMM, TORCHVISION)]
    eager = [Entry(name, "eager", None) for name in (OURS, *peers)]
    if not compiled:
        return eager
    mode = (peer_options or {}).get("mode", "compiled")
    return [
        *eager,
        Entry(OURS, "compiled", {}),
        *(Entry(name, mode, peer_options or {}) for name in peers),
    ]


def check_stage(context: Context) -> Iterator[tuple[str, Case]]:
    """A training step of a small model, Triton kernels against PyTorch twins, from the same weights and draws.

    Refuses where the gradients of the two, in fp32, differ by more than a thousandth of their norm.
    """
    if context.tiny:
        context.leave_out("the step with Triton kernels against the one without: needs a GPU")
        return
    if context.cases("check"):
        return
    gradients: dict[str, Tensor] = {}
    losses: dict[str, float] = {}
    convolutions_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for impl in ("triton", "torch"):
            torch.manual_seed(0)
            model = (
                build(OURS, "b0", kernels=impl, dropout=0.0).to(context.device).to(memory_format=torch.channels_last)
            )
            images, labels = make_batch(8, 64, context.device, torch.channels_last)
            generator = torch.Generator(context.device).manual_seed(1)
            scales = model.draw_drop_scales(8, context.device, generator)  # type: ignore[operator]
            loss = torch.nn.functional.cross_entropy(model(images, scales), labels)
            loss.backward()
            losses[impl] = loss.item()
            gradients[impl] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions_tf32
    distance = float((gradients["triton"] - gradients["torch"]).norm() / gradients["torch"].norm())
    if not distance < 1e-3:
        raise Refused(f"gradients of a B0 step differ by {distance:.2e} of their norm between Triton and PyTorch")
    yield "b0@64 fp32", {"gradient_distance": distance, "losses": losses}


def show_check(cases: dict[str, Case]) -> str:
    return "\n".join(f"{case}: gradients within {found['gradient_distance']:.1e}" for case, found in cases.items())


class CacheFiller:
    """Fills the compile caches in processes of their own, some at a time, while nothing is being timed."""

    def __init__(
        self, jobs: Sequence[tuple[str, Workload]], seconds: float, *, mode: str = "default", at_once: int = 3
    ) -> None:
        self._until = time.monotonic() + seconds
        self._mode = mode
        self._pool = ThreadPoolExecutor(at_once)
        self._lock = threading.Lock()
        self.found: dict[str, Case] = {}
        self._futures = [self._pool.submit(self._fill, *job) for job in jobs]

    def _fill(self, model: str, work: Workload) -> None:
        left = self._until - time.monotonic()
        case: Case = {"error": "no time left"}
        if left > 20:
            try:
                case = in_subprocess(
                    model, CACHES, variant=work.variant, resolution=work.resolution, batch=work.batch,
                    amp="bf16", mode=self._mode, timeout=left,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                case = {"error": "not compiled in time; what is cached so far stays: run this part again with --resume"}
            except RuntimeError as error:
                case = {"error": str(error)[:300]}
        with self._lock:
            self.found[f"{model} {work}"] = case

    def wait(self) -> dict[str, Case]:
        for future in self._futures:
            future.result()
        self._pool.shutdown()
        return self.found


def caches_stage(
    name: str, works: Sequence[Workload], seconds: float, mode: str = "default"
) -> Callable[[Context], Iterator[tuple[str, Case]]]:
    """Compile everything once before anything is timed; what does not end in time is compiled later or left out."""

    def run(context: Context) -> Iterator[tuple[str, Case]]:
        if context.tiny:
            context.leave_out("compiled steps: a CPU spends minutes on each (see `pytest bench/bench_compile.py`)")
            return
        done = context.cases(name)
        models = [name for name in (OURS, TIMM, TORCHVISION) if name in (OURS, *available_peers()[0])]
        if mode != "default":
            models.remove(OURS)
        jobs = [(model, work) for work in works for model in models if f"{model} {work}" not in done]
        # Autotuning times kernels: one process at a time then.
        filler = CacheFiller(jobs, seconds, mode=mode, at_once=3 if mode == "default" else 1)
        for case, found in filler.wait().items():
            if "error" in found:
                context.leave_out(f"filling the compile cache for {case}: {found['error']}")
            else:
                yield case, found

    return run


def show_caches(cases: dict[str, Case]) -> str:
    return "\n".join(
        f"{case}: first step after {found['first_step']:.0f} s, contended" for case, found in cases.items()
    )


def steps_stage(
    name: str, works: Sequence[Workload], compiled: bool = True, peer_options: dict[str, Any] | None = None
) -> Callable[[Context], Iterator[tuple[str, Case]]]:
    """Training steps, channels_last, AMP bf16, same batch, interleaved; peak memory, time-passes, our share."""

    def run(context: Context) -> Iterator[tuple[str, Case]]:
        for sentence in available_peers()[1]:
            context.leave_out(sentence)
        tiny = Workload("b0", 64, 4)
        for work in [tiny] if context.tiny else works:
            if context.cases(name).get(str(work), {}).get("complete"):
                continue
            if context.has_time(60, f"training step {work}"):
                yield str(work), attempt(lambda work=work: _compare_steps(context, work, compiled, peer_options))  # type: ignore[misc]

    return run


def _compare_steps(context: Context, work: Workload, compiled: bool, peer_options: dict[str, Any] | None) -> Case:
    device = context.device
    amp: Amp = "off" if context.tiny else "bf16"
    runners: dict[str, StepRunner] = {}
    cases: dict[str, Case] = {}
    contenders = entries(compiled and not context.tiny, peer_options)
    for entry in contenders:
        label = f"{entry.model}, {entry.mode}"
        if not _may_compile(context, entry, work):
            continue

        def prepare(entry: Entry = entry, label: str = label) -> Case:
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            began = time.perf_counter()
            runner = StepRunner(
                entry.model, work.variant, work.resolution, work.batch, device, amp=amp, compile_options=entry.options
            )
            runner()
            synchronise(device)
            first = time.perf_counter() - began
            runner()
            peak = peak_memory(runner, device) - before
            runners[label] = runner
            return {"first_step_seconds": first, "peak_bytes": peak}

        cases[label] = attempt(prepare)
    complete = len(cases) == len(contenders)
    rounds, inner = (3, 1) if context.tiny else (12, 3)
    until = context.deadline - 20
    taken = interleaved(runners, device, rounds=rounds, inner=inner, until=until)
    # A time-pass compares with a GPU's memory; on a CPU it would mean nothing.
    bandwidth = None if context.tiny else context.cases("copy bandwidth")["large copy"]["bytes_per_second"]
    own = {label: taken[label] for label in taken if label.startswith(OURS)}
    for label, seconds in taken.items():
        timing = summarise(seconds)
        cases[label] |= {
            "timing": timing.to_json(),
            "images_per_second": work.batch / timing.median,
            "time_passes": time_passes(timing.median, work, bandwidth) if bandwidth else None,
        }
    peers = {label: seconds for label, seconds in taken.items() if not label.startswith(OURS)}
    found: Case = {"amp": amp, "contenders": cases, "complete": complete}
    if own and peers:
        best = min(own, key=lambda label: statistics.median(own[label]))
        fastest = min(peers, key=lambda label: statistics.median(peers[label]))
        found |= {"best": best, "fastest_peer": fastest, "speedup": median_ratio(peers[fastest], own[best])}
    eager = runners.get(f"{OURS}, eager")
    if eager is not None and device.type == "cuda":
        found["own_kernels_share"] = own_kernels_share(eager, device)
    return found


def _may_compile(context: Context, entry: Entry, work: Workload) -> bool:
    """False, and noted, where too little time is left, or where autotuning has not been done beforehand."""
    if entry.options is None:
        return True
    what = f"{entry.model}, {entry.mode}, {work}"
    if "mode" in entry.options and f"{entry.model} {work}" not in context.cases(AUTOTUNED):
        context.leave_out(f"{what}: its autotuning has not ended; run this part again with --resume")
        return False
    return context.has_time(COMPILE_ALLOWANCE, what)


def time_passes(seconds: float, work: Workload, bandwidth: float) -> float:
    """Step seconds times measured copy bandwidth, over the bytes of one pass: images x activations x 2 bytes."""
    return seconds * bandwidth / (work.batch * activations(work.variant, work.resolution) * 2)


def own_kernels_share(runner: Callable[[], object], device: torch.device) -> float:
    """Share of the device time of one eager step that is spent in this project's Triton kernels."""
    from torch.profiler import ProfilerActivity, profile

    from bench.cases import kernel_names

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        runner()
        synchronise(device)
    times = {event.key: event.self_device_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    own = kernel_names()
    return sum(seconds for name, seconds in times.items() if name in own) / total if total else 0.0


def show_steps(cases: dict[str, Case]) -> str:
    lines = []
    for work, found in cases.items():
        lines.append(f"{work}, AMP {found['amp']}")
        for label, case in found["contenders"].items():
            if "error" in case or "timing" not in case:
                lines.append(f"  {label:<34} {case.get('error', 'not timed')}")
                continue
            timing = case["timing"]
            passes = f"{case['time_passes']:7.1f} time-passes" if case.get("time_passes") else ""
            lines.append(
                f"  {label:<34}{1e3 * timing['median']:9.2f} ms ±{timing['spread']:5.1%}"
                f"{case['images_per_second']:10.1f} img/s{case.get('peak_bytes', 0) / 1e9:8.2f} GB {passes}"
            )
        if "speedup" in found:
            lines.append(f"  {found['best']} against {found['fastest_peer']}: {found['speedup']:.2f}x")
        if "own_kernels_share" in found:
            lines.append(f"  our kernels take {found['own_kernels_share']:.0%} of our eager step's device time")
    return "\n".join(lines)


def inference_stage(works: Sequence[Workload]) -> Callable[[Context], Iterator[tuple[str, Case]]]:
    """Forward in evaluation mode, eager and compiled, interleaved."""

    def run(context: Context) -> Iterator[tuple[str, Case]]:
        for work in [Workload("b0", 64, 4)] if context.tiny else works:
            if context.cases("inference").get(str(work), {}).get("complete"):
                continue
            if context.has_time(60, f"inference {work}"):
                yield str(work), attempt(lambda work=work: _compare_inference(context, work))  # type: ignore[misc]

    return run


def _compare_inference(context: Context, work: Workload) -> Case:
    device, amp = context.device, not context.tiny
    images, _ = make_batch(work.batch, work.resolution, device, torch.channels_last)
    runners: dict[str, Callable[[], object]] = {}
    cases: dict[str, Case] = {}
    contenders = entries(not context.tiny)
    for entry in contenders:
        label = f"{entry.model}, {entry.mode}"
        if not _may_compile(context, entry, work):
            continue

        def prepare(entry: Entry = entry, label: str = label) -> Case:
            model = build(entry.model, work.variant).eval().to(device).to(memory_format=torch.channels_last)
            if entry.options is not None:
                model.compile(dynamic=False)

            def forward() -> Tensor:
                with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
                    logits: Tensor = model(images)
                    return logits

            forward()
            synchronise(device)
            forward()
            runners[label] = forward
            return {}

        cases[label] = attempt(prepare)
    complete = len(cases) == len(contenders)
    rounds, inner = (3, 1) if context.tiny else (12, 5)
    for label, seconds in interleaved(runners, device, rounds=rounds, inner=inner).items():
        timing = summarise(seconds)
        cases[label] |= {"timing": timing.to_json(), "images_per_second": work.batch / timing.median}
    return {"amp": "bf16" if amp else "off", "contenders": cases, "complete": complete}


STEPS_B0_B1 = (Workload("b0", 224, 256), Workload("b1", 232, 256))
STEPS_LARGE = (Workload("b1", 240, 256), Workload("b4", 380, 64), Workload("b7", 600, 16))
INFERENCE = (Workload("b0", 224, 512), Workload("b4", 380, 128))

CHECK = Stage("check", check_stage, show_check)


def steps(name: str, works: Sequence[Workload], peer_options: dict[str, Any] | None = None) -> Stage:
    return Stage(name, steps_stage(name, works, peer_options=peer_options), show_steps)


def caches(name: str, works: Sequence[Workload], seconds: float, mode: str = "default") -> Stage:
    return Stage(name, caches_stage(name, works, seconds, mode), show_caches)


def inference(works: Sequence[Workload]) -> Stage:
    return Stage("inference", inference_stage(works), show_steps)
