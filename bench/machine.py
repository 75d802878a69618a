"""What a figure must carry to mean something: the device, its clocks, the versions, the commit."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("fastnet", "kernels", "data_pipeline", "bench")
_SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw")


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Short hash of the commit, `+` and a hash of the sources where they differ from it or there is no git."""
    head = _output_of("git", "rev-parse", "--short=10", "HEAD")
    changed = _output_of("git", "status", "--porcelain", "--", *SOURCES)
    if head is not None and changed == "":
        return head
    digest = hashlib.sha256()
    for file in sorted(file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return f"{head or 'tree'}+{digest.hexdigest()[:8]}"


def gpu_state() -> dict[str, float | str]:
    """Driver, clocks (MHz), temperature (C) and power (W) now, as nvidia-smi tells them; empty where it does not."""
    line = _output_of("nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits", "--id=0")
    if not line:
        return {}
    values = [value.strip() for value in line.split(",")]
    return {
        name: float(value) if re.fullmatch(r"[\d.]+", value) and name != "driver_version" else value
        for name, value in zip(_SMI_FIELDS, values, strict=False)
    }


def free_gigabytes(device: torch.device) -> float:
    """Memory of a GPU that no process holds, in 2^30 bytes; 0 elsewhere."""
    return torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else 0.0


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """JSON-ready; `gpu` is null on a CPU."""
    about: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "gpu": None,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    for package in ("torch", "triton", "torchvision", "timm", "nvidia-dali-cuda130"):
        about[package] = version_of(package)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "state": gpu_state(),
        }
    return about


def gpu_folder(name: str) -> str:
    """The folder of a GPU's results: "h200" for "NVIDIA H200"."""
    words = [w for w in re.split(r"[^A-Za-z0-9]+", name) if w.lower() not in ("nvidia", "geforce", "tesla", "")]
    return "-".join(words).lower() or "gpu"


def photos_folder() -> Path | None:
    """Real photos in Food-101's layout: $FASTNET_PHOTOS, by default ../shared/data/food101-mini."""
    folder = Path(os.environ.get("FASTNET_PHOTOS", ROOT.parent / "shared" / "data" / "food101-mini"))
    return folder if (folder / "meta").is_dir() else None
