"""Why torch cannot use an NVIDIA GPU that is there: what `torch.cuda.is_available()` leaves unsaid."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

VENDOR, DISPLAYS = "0x10de", "0x03"  # PCI: NVIDIA, and the class of display controllers
WSL_TOOL = Path("/usr/lib/wsl/lib/nvidia-smi")


@dataclass(frozen=True)
class Findings:
    """What bears on whether torch can use a GPU.

    cards: names of the NVIDIA GPUs that the system knows, whether or not torch does. driver: the kernel module is
    loaded. node: a GPU's file in /dev is there. build: torch's version. cuda: the CUDA version that it is built for, or
    None. architectures: what it is compiled for, as `torch.cuda.get_arch_list`. usable: (name, capability) of what it
    counts as its GPUs. said: its own words where it could not start CUDA. hidden: CUDA_VISIBLE_DEVICES.
    """

    cards: tuple[str, ...] = ()
    driver: bool = False
    node: bool = False
    build: str = torch.__version__
    cuda: str | None = torch.version.cuda
    architectures: tuple[str, ...] = ()
    usable: tuple[tuple[str, tuple[int, int]], ...] = ()
    said: str = ""
    hidden: str | None = None


@functools.cache
def unusable() -> str | None:
    """A clause that names the NVIDIA GPU that torch cannot use here, why, and what to do; None where it can use it, or
    where there is none."""
    return explain(find())


def explain(found: Findings) -> str | None:
    if found.usable:
        name, capability = found.usable[0]
        if not found.architectures or _runs_on(found.architectures, capability):
            return None
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]}, and torch {found.build} is compiled for "
            f"{', '.join(found.architectures)}: install a build of torch for it"
        )
    if not found.cards:
        return None
    card = found.cards[0] + (f" (one of {len(found.cards)})" if len(found.cards) > 1 else "")
    if found.cuda is None:
        return f"torch {found.build} is built without CUDA and cannot use {card}: install torch's build for CUDA"
    if found.hidden is not None:
        return (
            f"CUDA_VISIBLE_DEVICES={found.hidden or repr('')} hides {card}: unset it, or name the card's number there"
        )
    if not found.driver:
        return f"the driver of {card} is not loaded: install NVIDIA's driver and see that nvidia-smi lists the card"
    if not found.node:
        return f"this process has no access to {card}: start the container with its GPUs (docker: --gpus all)"
    if too_old := re.search(r"too old \(found version (\d+)\)", found.said):
        version = int(too_old[1])
        return (
            f"the driver of {card} is too old, for CUDA {version // 1000}.{version % 1000 // 10}, and torch "
            f"{found.build} is built for CUDA {found.cuda}: update the driver, or install a build of torch for the "
            "older CUDA"
        )
    reason = found.said.strip().partition("\n")[0].partition(". ")[0].rstrip(".") or "it does not say why"
    return f"torch {found.build} cannot use {card} ({reason}): see whether nvidia-smi lists it, and restart the machine"


def _runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Machine code runs on its own major version from its minor version on, PTX on all that is newer."""
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        number = int(re.match(r"\d+", digits)[0])  # type: ignore[index]
        built = number // 10, number % 10
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def find(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Findings:
    """Look around; `root` holds proc, dev and sys."""
    usable: list[tuple[str, tuple[int, int]]] = []
    said = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is said in one sentence
        try:
            for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
                card = torch.cuda.get_device_properties(index)
                usable.append((card.name, (card.major, card.minor)))
            if not usable and torch.version.cuda is not None:
                torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            usable, said = [], str(error)
    if usable:
        return Findings(usable=tuple(usable), architectures=tuple(torch.cuda.get_arch_list()))
    module = root / "proc/driver/nvidia"
    wsl = root / "dev/dxg"
    return Findings(
        cards=_cards(root),
        driver=module.exists() or wsl.exists(),
        node=wsl.exists() or any(root.glob("dev/nvidia[0-9]*")),
        said=said,
        hidden=environment.get("CUDA_VISIBLE_DEVICES"),
    )


def _cards(root: Path) -> tuple[str, ...]:
    """The names of the NVIDIA GPUs, from the first source that knows any: the driver, its tool, /dev, the PCI bus."""
    names = []
    for file in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        model = re.search(r"^Model:\s*(.+)$", _text(file), re.MULTILINE)
        names.append(model[1].strip() if model else "an NVIDIA GPU")
    names = names or _listed()
    if not names:
        nodes = list(root.glob("dev/nvidia[0-9]*"))
        devices = root.glob("sys/bus/pci/devices/*")
        on_bus = [
            device for device in devices
            if _text(device / "vendor").strip() == VENDOR and _text(device / "class").startswith(DISPLAYS)
        ]  # fmt: skip
        names = ["an NVIDIA GPU"] * max(len(nodes), len(on_bus))
    return tuple(names)


def _listed() -> list[str]:
    """The names that nvidia-smi lists."""
    tool = shutil.which("nvidia-smi") or (str(WSL_TOOL) if WSL_TOOL.exists() else None)
    if tool is None:
        return []
    try:
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", done.stdout, re.MULTILINE)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
