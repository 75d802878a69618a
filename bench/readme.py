"""The README's table of measured results, made from bench/results: `python -m bench.readme [--write]`.

Every figure comes from the newest JSON of each GPU's folder, with GPU, versions, commit, number of runs and spread.
Without `--write` the table is printed; with it, what stands in README.md between the two markers is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from bench.stages import RESULTS

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOTHING = (
    "Not measured on a GPU yet: `bench/results/` holds no figures. `python -m bench.proof --part 1` makes them "
    "(see `bench/NOTES.md`)."
)
STEP_STAGES = ("steps", "steps, large", "steps, max-autotune", "inference")


def tables(results: Path = RESULTS) -> str:
    """Markdown of every GPU that has results; a sentence where none has."""
    parts = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        files = sorted(folder.glob("*.json"), key=lambda file: json.loads(file.read_text())["machine"]["time"])
        if files:
            parts.append(_gpu_tables(files[-1]))
    return "\n\n".join(parts) or NOTHING


def _gpu_tables(file: Path) -> str:
    content = json.loads(file.read_text())
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
                f"| {key} | {direction} | {1e6 * ours['timing']['median']:.1f} | {ours['timing']['spread']:.1%} | "
                f"{ours['of_copy_bandwidth']:.0%} | {others[0]} | {others[1]} |"
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
