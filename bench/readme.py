"""The README's table of measured results, made from bench/results: `python -m bench.readme [--write]`.

Every figure comes from the newest JSON of each GPU's folder, with GPU, versions, commit, number of runs and spread.
Without `--write` the table is printed; with it, what stands in README.md between the two markers is replaced.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from bench.stages import RESULTS, newest_results

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOTHING = (
    "Not measured on a GPU yet: `bench/results/` holds no figures. `python -m bench.proof --part 1` makes them "
    "(see `bench/NOTES.md`)."
)
STEP_STAGES = ("steps", "steps, B1", "steps, our kernels", "steps, large", "steps, max-autotune", "inference")
BLOCK_FORMS = ("triton", "triton-ops", "torch", "compiled")


def tables(results: Path = RESULTS) -> str:
    """Markdown of every GPU that has results; a sentence where none has."""
    return "\n\n".join(_gpu_tables(file, content) for file, content in newest_results(results)) or NOTHING


def _gpu_tables(file: Path, content: dict[str, Any]) -> str:
    machine, stages = content["machine"], content["stages"]
    where = f"{file.parent.parent.name}/{file.parent.name}/{file.name}"
    parts = [
        f"**{machine['gpu']}**, torch {machine['torch']}, triton {machine['triton']}, commit `{machine['commit']}` "
        f"(`bench/{where}`)."
    ]
    bandwidth = _good(stages, "copy bandwidth").get("large copy")
    if bandwidth:
        parts[0] += f" Measured copy bandwidth: {bandwidth['bytes_per_second'] / 1e12:.2f} TB/s."
    steps = [line for stage in STEP_STAGES for line in _step_rows(stage, _good(stages, stage))]
    if steps:
        head = "| what | model | img/s | spread | runs | peak GB | time-passes |\n|---|---|---|---|---|---|---|"
        parts.append("\n".join([head, *steps]))
    parts += [line for stage in STEP_STAGES for line in _step_sentences(_good(stages, stage))]
    blocks = _block_rows(_good(stages, "blocks"), _good(stages, "blocks, compiled"))
    if blocks:
        head = (
            "| MBConv, forward and backward | ms | % of predicted | triton-ops ms | eager ms | compiled ms "
            "| peak MB | eager's |\n|---|---|---|---|---|---|---|---|"
        )
        parts.append("\n".join([head, *blocks]))
    launches = _launch_rows(_good(stages, "launches"))
    if launches:
        head = "| step of the schedule, all blocks | µs | GB/s | % of the copy's rate |\n|---|---|---|---|"
        parts.append("\n".join([head, *launches]))
    largest = _good(stages, "largest batch")
    if largest:
        head = "| largest batch in a card of 24 GB, eager, bf16 | images | MB an image |\n|---|---|---|"
        rows = [f"| {k} | {f['largest_batch']} | {f['bytes_an_image'] / 2**20:.0f} |" for k, f in largest.items()]
        parts.append("\n".join([head, *rows]))
    kernels = _kernel_rows(_good(stages, "kernels"), _good(stages, "kernels, compiled"))
    if kernels:
        head = (
            "| operation, x | direction | µs | spread | % of copy bandwidth | eager µs | compiled µs |\n"
            "|---|---|---|---|---|---|---|"
        )
        parts.append("\n".join([head, *kernels]))
    return "\n\n".join(parts)


def _good(stages: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in stages.get(name, {}).get("cases", {}).items() if "error" not in v}


def _step_rows(stage: str, cases: dict[str, Any]) -> list[str]:
    what = "inference" if stage == "inference" else "training step"
    rows = []
    for work, found in cases.items():
        for label, case in found["contenders"].items():
            if "timing" not in case:
                continue
            timing = case["timing"]
            peak = f"{case['peak_bytes'] / 1e9:.1f}" if case.get("peak_bytes") else ""
            passes = f"{case['time_passes']:.1f}" if case.get("time_passes") else ""
            rows.append(
                f"| {what} {work}, {found['amp']} | {label} | {case['images_per_second']:,.0f} | "
                f"{timing['spread']:.1%} | {timing['runs']} | {peak} | {passes} |"
            )
    return rows


def _step_sentences(cases: dict[str, Any]) -> list[str]:
    sentences = []
    for work, found in cases.items():
        if "speedup" not in found:
            continue
        sentence = f"{work}: {found['best']} is {found['speedup']:.2f} × as fast as {found['fastest_peer']}"
        memory = {name: f"{share:.2f} of {name.replace('_', ' ')}'s" for name, share in found["memory"].items()}
        if memory:
            sentence += f"; its peak memory is {' and '.join(memory.values())}"
        if "resnet50_speedup" in found:
            sentence += f"; it is {found['resnet50_speedup']:.2f} × as fast as compiled ResNet-50"
        if "anatomy" in found:
            sentence += f"; our kernels take {found['anatomy']['own_share']:.0%} of the eager step's device time"
        sentences.append(f"{sentence}.")
    return sentences


def _block_rows(cases: dict[str, Any], compiled: dict[str, Any]) -> list[str]:
    rows = []
    for key, found in cases.items():
        if "triton" not in found:
            continue
        by = {**compiled.get(key, {}), **found}
        fused, others = by["triton"], [by.get(name) for name in BLOCK_FORMS[1:]]
        cells = " | ".join(f"{1e3 * other['seconds']:.3f}" if other else "" for other in others)
        share = sum(found["predicted"].values()) / fused["seconds"]
        eager = f"{by['torch']['peak_bytes'] / 1e6:.0f}" if "torch" in by else ""
        rows.append(
            f"| {found['times']} × {key}{_mark(found)} | {1e3 * fused['seconds']:.3f} | {share:.0%} | {cells} | "
            f"{fused['peak_bytes'] / 1e6:.0f} | {eager} |"
        )
    return rows


def _mark(found: dict[str, Any]) -> str:
    """What a row that breaks the tolerance rule says behind its name."""
    return f" (not correct: {found['error_share']:.1f} times the error allowed)" if "not_correct" in found else ""


def _launch_rows(cases: dict[str, Any]) -> list[str]:
    """By step, over all blocks of the model: time, bytes over time, and predicted over measured."""
    sums: dict[str, Counter[str]] = {}
    for found in cases.values():
        for step, one in found["steps"].items():
            if "ours" in one:
                amounts = {"seconds": one["ours"]["median"], "bytes": one["bytes"], "predicted": one["predicted"]}
                sums.setdefault(step, Counter()).update({k: found["times"] * v for k, v in amounts.items()})
    return [
        f"| {step} | {1e6 * of['seconds']:.0f} | {of['bytes'] / of['seconds'] / 1e9:.0f} | "
        f"{of['predicted'] / of['seconds']:.0%} |"
        for step, of in sums.items()
    ]


def _kernel_rows(cases: dict[str, Any], compiled: dict[str, Any]) -> list[str]:
    rows = []
    for key, found in cases.items():
        for direction in ("forward", "backward"):
            by = {**compiled.get(key, {}).get(direction, {}), **found[direction]}
            ours = by["triton"]
            others = [
                f"{1e6 * by[name]['timing']['median']:.1f}" if name in by else "" for name in ("eager", "compiled")
            ]
            rows.append(
                f"| {key}{_mark(found)} | {direction} | {1e6 * ours['timing']['median']:.1f} | "
                f"{ours['timing']['spread']:.1%} | {ours['of_copy_bandwidth']:.0%} | {others[0]} | {others[1]} |"
            )
    return rows


def replaced(readme: str, table: str) -> str:
    """The README with `table` between the markers; ValueError where they are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md needs {BEGIN} and {END}, once each, where the table belongs.")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    options = parser.parse_args(arguments)
    table = tables()
    if not options.write:
        print(table)
        return 0
    file = ROOT / "README.md"
    try:
        file.write_text(replaced(file.read_text(), table))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
