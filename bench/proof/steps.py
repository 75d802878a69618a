"""Stages of the proof that time whole models: the training step and inference, ours against timm and torchvision."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.anatomy import device_times, show_top, top_kernels
from bench.contenders import (
    OURS,
    RESNET50,
    TORCHVISION,
    Entry,
    StepRunner,
    Workload,
    available_peers,
    build,
    eager_entries,
    entries,
    make_batch,
)
from bench.measure import interleaved, median_ratio, peak_memory, summarise, synchronise
from bench.proof.caches import AUTOTUNED
from bench.shapes import activations
from bench.stages import Case, Context, Refused, Stage, attempt, free_memory, not_correct
from fastnet.device import Amp
from fastnet.training.cuda_graph import WARMUP_STEPS
from kernels.tolerance import GROSS

# Seconds that compiling a model whole may still need when its cache was filled before.
COMPILE_ALLOWANCE = 60
TINY = Workload("b0", 64, 4)  # on a CPU, once


def check_stage(context: Context) -> Iterator[tuple[str, Case]]:
    """A training step of a small model, by fused Triton blocks and by PyTorch, from the same weights and draws.

    Not correct where the fp32 gradients of the first are further from fp64's than a thousandth of their norm and than
    twice those of the second; Refused where it is a tenth: that is another computation.
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
        for name, impl, dtype in (
            ("triton", "triton", torch.float32),
            ("torch", "torch", torch.float32),
            ("exact", "torch", torch.float64),
        ):
            torch.manual_seed(0)
            model = build(OURS, "b0", kernels=impl, dropout=0.0).to(context.device, dtype)
            model = model.to(memory_format=torch.channels_last)
            images, labels = make_batch(8, 64, context.device, torch.channels_last)
            generator = torch.Generator(context.device).manual_seed(1)
            scales = model.draw_drop_scales(8, context.device, generator)  # type: ignore[operator]
            loss = torch.nn.functional.cross_entropy(model(images.to(dtype), scales), labels)
            loss.backward()
            losses[name] = loss.item()
            gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions_tf32
    exact = gradients.pop("exact")
    distances = {name: float((found - exact).norm() / exact.norm()) for name, found in gradients.items()}
    found: Case = {"gradient_distances": distances, "losses": losses}
    if not distances["triton"] <= max(1e-3, 2 * distances["torch"]):
        found["not_correct"] = (
            f"gradients of a B0 step in fp32 are {distances['triton']:.2e} of their norm from fp64's with Triton, "
            f"{distances['torch']:.2e} with PyTorch"
        )
        if not distances["triton"] <= max(GROSS, 2 * distances["torch"]):
            raise Refused(found["not_correct"])
    yield "b0@64 fp32", found


def show_check(cases: dict[str, Case]) -> str:
    return "\n".join(
        f"{case}: gradients from fp64's: "
        + ", ".join(f"{name} {distance:.1e}" for name, distance in found["gradient_distances"].items())
        + not_correct(found)
        for case, found in cases.items()
    )


def steps_stage(
    name: str, works: Sequence[Workload], contenders: Sequence[Entry]
) -> Callable[[Context], Iterator[tuple[str, Case]]]:
    """Training steps, channels_last, AMP bf16, same batch, interleaved; peak memory, time-passes, our share."""

    def run(context: Context) -> Iterator[tuple[str, Case]]:
        for sentence in available_peers()[1]:
            context.leave_out(sentence)
        used = [entry for entry in contenders if not context.tiny or _runs_on_a_cpu(entry)]
        if len(used) < len(contenders):
            others = "; ".join(entry.label for entry in contenders if entry not in used)
            context.leave_out(f"on a CPU: {others}")
        tiny = [] if any(str(TINY) in context.cases(stage) for stage in context.stages) else [TINY]
        fitting = [work.fitting(context.device) for work in works]
        for work, wanted in zip(fitting, works, strict=True):
            if work != wanted:
                context.leave_out(f"{wanted}: more than this GPU's memory holds; {work} instead")
        for work in (tiny if context.tiny else fitting) if used else ():
            if context.cases(name).get(str(work), {}).get("complete"):
                continue
            if context.has_time(60, f"training step {work}"):
                yield str(work), attempt(lambda work=work: _compare_steps(context, work, used))  # type: ignore[misc]

    return run


def _runs_on_a_cpu(entry: Entry) -> bool:
    return entry.options is None and not entry.graph and entry.kernels != "triton-ops"


def _compare_steps(context: Context, work: Workload, contenders: Sequence[Entry]) -> Case:
    device = context.device
    amp: Amp = "off" if context.tiny else "bf16"
    runners: dict[str, StepRunner] = {}
    cases: dict[str, Case] = {}
    for entry in contenders:
        if not _may_compile(context, entry, work):
            continue

        def prepare(entry: Entry = entry) -> Case:
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            began = time.perf_counter()
            options = {"kernels": entry.kernels} if entry.model == OURS else {}
            runner = StepRunner(
                entry.model, work.variant, work.resolution, work.batch, device, amp=amp, compile_options=entry.options,
                graph=entry.graph, own_residual_adds=entry.own_residual_adds, **options,
            )  # fmt: skip
            runner()
            synchronise(device)
            first = time.perf_counter() - began

            def settle() -> None:
                """Until everything is recorded: a replay allocates nothing that could be seen."""
                for _ in range(1 if context.tiny else WARMUP_STEPS):
                    runner()

            # Without the first step's: cuDNN tries its algorithms in it.
            peak = peak_memory(settle, device) - before
            runners[entry.label] = runner
            return {"first_step_seconds": first, "peak_bytes": peak}

        cases[entry.label] = attempt(prepare)
    _drop_what_no_longer_fits(runners, cases, device)
    rounds, inner = (3, 1) if context.tiny else (12, 3)
    taken = interleaved(runners, device, rounds=rounds, inner=inner, until=context.deadline - 20)
    bandwidth = context.cases("copy bandwidth")["large copy"]["bytes_per_second"]
    for label, seconds in taken.items():
        timing = summarise(seconds)
        cases[label] |= {
            "timing": timing.to_json(),
            "images_per_second": work.batch / timing.median,
            # A time-pass compares with a GPU's memory; on a CPU it would mean nothing.
            "time_passes": None
            if context.tiny or label.startswith(RESNET50)
            else time_passes(timing.median, work, bandwidth),
        }
    found: Case = {"amp": amp, "contenders": cases, "complete": len(cases) == len(contenders)}
    found |= ratios(taken, cases, contenders)
    eager = runners.get(Entry(OURS).label)
    if eager is not None:
        found["anatomy"] = top_kernels(device_times(eager, device), work, bandwidth)
    return found


def _drop_what_no_longer_fits(runners: dict[str, StepRunner], cases: dict[str, Case], device: torch.device) -> None:
    """Run each once more, now that the recordings of those prepared later hold their memory too."""
    for label in list(runners):

        def again(label: str = label) -> Case:
            runners[label]()
            synchronise(device)
            return {}

        cases[label] |= attempt(again)
        if "error" in cases[label]:
            del runners[label]
            free_memory()


def ratios(taken: dict[str, list[float]], cases: dict[str, Case], contenders: Sequence[Entry]) -> Case:
    """Our fastest form against the fastest peer, and its peak memory against torchvision's eager and the leanest; and
    against ResNet-50 where that ran."""
    ours = [entry.label for entry in contenders if entry.is_ours and entry.label in taken]
    peers = [entry.label for entry in contenders if entry.is_peer and entry.label in taken]
    if not ours or not peers:
        return {}
    best, fastest = (min(of, key=lambda label: statistics.median(taken[label])) for of in (ours, peers))
    found: Case = {"best": best, "fastest_peer": fastest, "speedup": median_ratio(taken[fastest], taken[best])}
    leanest = min(peers, key=lambda label: int(cases[label]["peak_bytes"]))
    peaks = {"torchvision_eager": Entry(TORCHVISION).label, "leanest_peer": leanest}
    found["memory"] = {
        name: cases[best]["peak_bytes"] / cases[label]["peak_bytes"]
        for name, label in peaks.items()
        if label in taken and cases[label]["peak_bytes"]
    }
    resnet = Entry(RESNET50, {}).label
    if resnet in taken:
        found["resnet50_speedup"] = median_ratio(taken[resnet], taken[best])
    return found


def _may_compile(context: Context, entry: Entry, work: Workload) -> bool:
    """False, and noted, where too little time is left, or where autotuning has not been done beforehand."""
    if entry.options is None:
        return True
    what = f"{entry.label}, {work}"
    if entry.options.get("mode") == "max-autotune" and f"{entry.model} {work}" not in context.cases(AUTOTUNED):
        context.leave_out(f"{what}: its autotuning has not ended; run this part again with --resume")
        return False
    return context.has_time(COMPILE_ALLOWANCE, what)


def time_passes(seconds: float, work: Workload, bandwidth: float) -> float:
    """Step seconds times measured copy bandwidth, over the bytes of one pass: images x activations x 2 bytes."""
    return seconds * bandwidth / (work.batch * activations(work.variant, work.resolution) * 2)


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
            for name, share in found["memory"].items():
                lines.append(f"  its peak memory is {share:.2f} of {name.replace('_', ' ')}'s")
            if "resnet50_speedup" in found:
                lines.append(f"  {found['best']} against compiled ResNet-50: {found['resnet50_speedup']:.2f}x")
        if "anatomy" in found:
            lines.extend(f"  {line}" for line in show_top(found["anatomy"]))
    return "\n".join(lines)


def inference_stage(works: Sequence[Workload]) -> Callable[[Context], Iterator[tuple[str, Case]]]:
    """Forward in evaluation mode, eager and compiled, interleaved."""

    def run(context: Context) -> Iterator[tuple[str, Case]]:
        for work in [TINY] if context.tiny else works:
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
    contenders = eager_entries()
    if not context.tiny:
        contenders += [entry._replace(options={}) for entry in contenders]
    for entry in contenders:
        label = entry.label
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


def steps(name: str, works: Sequence[Workload], contenders: Sequence[Entry] | None = None) -> Stage:
    return Stage(name, steps_stage(name, works, contenders or entries()), show_steps)


def inference(works: Sequence[Workload]) -> Stage:
    return Stage("inference", inference_stage(works), show_steps)
