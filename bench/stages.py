"""How a proof runs: stages that yield one case after another, a JSON file written after each, a deadline, resuming."""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.machine import ROOT, describe, gpu_folder, gpu_state
from kernels.tolerance import Errors

RESULTS = ROOT / "bench" / "results"
Case = dict[str, Any]


class Refused(RuntimeError):
    """Nothing more may be timed: something is grossly wrong. The message says what."""


@dataclass
class Context:
    """What a stage knows. `tiny` is a CPU's size: everything small, to see that it runs."""

    device: torch.device
    deadline: float  # time.monotonic()
    stages: dict[str, dict[str, Any]]
    left_out: list[str] = field(default_factory=list)

    @property
    def tiny(self) -> bool:
        return self.device.type != "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def cases(self, stage: str) -> dict[str, Case]:
        """What `stage` has found so far; what failed is not among it, and is tried again."""
        found: dict[str, Case] = self.stages.get(stage, {}).get("cases", {})
        return {case: result for case, result in found.items() if "error" not in result}

    def leave_out(self, what: str) -> None:
        """Note a sentence about something that was not run; it is printed and stored."""
        self.left_out.append(what)

    def has_time(self, seconds: float, what: str) -> bool:
        """True if `seconds` remain; else notes that `what` was left out."""
        if self.seconds_left >= seconds:
            return True
        self.leave_out(f"{what}: no time left in this part; run it again with --resume")
        return False


class Stage(NamedTuple):
    """`run` yields (case, what was found) and skips cases already in `context.cases(name)`; `table` prints them."""

    name: str
    run: Callable[[Context], Iterator[tuple[str, Case]]]
    table: Callable[[dict[str, Case]], str]


def attempt(work: Callable[[], Case]) -> Case:
    """The case, or {"error": one line} where it fails: one broken contender does not stop the others, nor does one that
    this GPU has not the memory for. Refused where a kernel's fault has taken the GPU from this process."""
    try:
        return work()
    except Refused:
        raise
    except torch.OutOfMemoryError as error:
        found: Case = {"error": f"out of memory: {str(error).split('. ')[0]}"[:300]}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        found = {"error": f"{type(error).__name__}: {lines[0]}"[:300], "traceback": traceback.format_exc(limit=-4)}
    free_memory()  # not before the exception is gone, whose frames hold tensors
    return found


def free_memory() -> None:
    """Give back what a failed case held. Refused where the GPU no longer answers."""
    gc.collect()
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise Refused(f"the GPU no longer answers this process: {str(error).splitlines()[0]}") from None


def verdict(errors: Errors) -> Case:
    """What a case keeps of a check by the tolerance rule. RuntimeError where the errors are gross: the figure would be
    that of another computation."""
    if errors.gross:
        raise RuntimeError(f"not timed: {errors}")
    return {"error_share": errors.share} | ({} if errors.right else {"not_correct": str(errors)})


def not_correct(found: Case) -> str:
    """What a line of a table says behind its figures of a case that `verdict` found wrong."""
    return f"  NOT CORRECT: {found['not_correct']}" if "not_correct" in found else ""


class ResultFile:
    """`<date>-<commit>.json` in a folder. A new run never touches an old file; a resumed one continues the newest that
    fits. Without a folder nothing is written."""

    def __init__(self, folder: Path | None, machine: dict[str, Any], *, resume: bool) -> None:
        self.path: Path | None = None
        self.content: dict[str, Any] = {"machine": machine, "stages": {}}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        earlier = self._newest_that_fits(folder, machine) if resume else None
        if earlier is not None:
            self.path, self.content = earlier
            return
        name = f"{machine['time'][:10]}-{machine['commit']}"
        taken = 1
        self.path = folder / f"{name}.json"
        while self.path.exists():
            taken += 1
            self.path = folder / f"{name}-{taken}.json"

    @staticmethod
    def _newest_that_fits(folder: Path, machine: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
        same = ("commit", "gpu", "torch", "triton")
        for file in sorted(folder.glob("*.json"), key=lambda f: f.stat().st_mtime, reverse=True):
            try:
                content = json.loads(file.read_text())
                if all(content["machine"][key] == machine[key] for key in same):
                    return file, content
            except (ValueError, KeyError, TypeError):
                continue  # some other JSON
        return None

    def write(self) -> None:
        if self.path is None:
            return
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(partial, self.path)


def newest_results(results: Path = RESULTS) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The newest file of each GPU's folder, and what it holds."""
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        contents = [(file, json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))]
        if contents:
            yield max(contents, key=lambda found: found[1]["machine"]["time"])


def result_folder(device: torch.device, out: Path | None) -> Path | None:
    """Where results go: `out`, or bench/results/<gpu>; None on a CPU without `out`.

    ValueError for a CPU's figures in bench/results.
    """
    if device.type == "cuda":
        return out or RESULTS / gpu_folder(torch.cuda.get_device_name(device))
    if out is not None and out.resolve().is_relative_to(RESULTS):
        raise ValueError(f"--out {out}: a CPU's figures don't belong in bench/results; name another folder.")
    return out


def run_part(
    part: int, stages: Sequence[Stage], device: torch.device, out: Path | None, *, resume: bool, minutes: float
) -> int:
    """Run one part, print what it found; 0 if all was right, 1 if something failed, was not correct or refused."""
    machine = describe(device)
    results = ResultFile(result_folder(device, out), machine, resume=resume)
    stored: dict[str, dict[str, Any]] = results.content["stages"]
    context = Context(device, time.monotonic() + 60 * minutes, stored)
    status = 0
    for stage in stages:
        entry = stored.setdefault(stage.name, {"state": "partial", "cases": {}})
        if entry["state"] == "done":
            print(f"[{stage.name}] already in {results.path}", flush=True)
            continue
        print(f"[{stage.name}] {context.seconds_left:.0f} s left", flush=True)
        context.left_out = []
        entry.pop("refused", None)
        began = time.monotonic()
        try:
            for case, found in stage.run(context):
                entry["cases"][case] = found
                results.write()
            whole = len(context.cases(stage.name)) == len(entry["cases"]) and not any(
                "--resume" in line for line in context.left_out
            )
            entry["state"] = "done" if whole else "partial"
        except Refused as refusal:
            entry["state"], entry["refused"] = "refused", str(refusal)
            print(f"refused: {refusal}")
            status = 1
        entry["part"] = part
        entry["seconds"] = entry.get("seconds", 0.0) + time.monotonic() - began
        entry["left_out"] = list(context.left_out)
        entry["gpu_state"] = gpu_state() if device.type == "cuda" else {}
        results.write()
        if status:
            break
    show(part, stages, stored, machine)
    print(f"\nresults: {results.path or 'not written (no GPU; --out FOLDER writes them)'}")
    cases = [(f"{name}: {case}", found) for name, entry in stored.items() for case, found in entry["cases"].items()]
    failed = [(what, found) for what, found in cases if "error" in found or "not_correct" in found]
    for what, found in failed:
        print(f"failed: {what}" if "error" in found else f"not correct: {what}: {found['not_correct']}")
    return 1 if status or failed else 0


def show(part: int, stages: Sequence[Stage], stored: dict[str, dict[str, Any]], machine: dict[str, Any]) -> None:
    where = machine["gpu"] or f"CPU {machine['cpu']}"
    print(f"\npart {part}: {where}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit']}")
    for stage in stages:
        entry = stored.get(stage.name)
        if entry is None:
            continue
        print(f"\n== {stage.name} ({entry['state']}, {entry.get('seconds', 0):.0f} s)")
        good = {case: found for case, found in entry["cases"].items() if "error" not in found}
        if good:
            print(stage.table(good))
        for case, found in entry["cases"].items():
            if "error" in found:
                print(f"{case}: {found['error']}")
        for line in entry.get("left_out", []):
            print(f"left out: {line}")
