"""A stand-in for a GPU to measure on: a clock that launches and PyTorch advance, and faults of kernels at will.

The fused form is PyTorch's, behind two launches of a kernel that computes nothing, so that it is quick; its candidates
are A, B and C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnet import forms, layers
from fastnet.forms import Form
from fastnet.model import EfficientNet, ModelConfig
from fastnet.training.distributed import Ranks
from fastnet.training.tuning import Tuner, measure, tuner
from fastnet.training.tuning.timers import HostTimer
from kernels import configs, launch, reference
from kernels.configs import Site
from kernels.device import REFERENCE, Gpu
from tests.networks import THREE_BLOCKS

CONFIG = ModelConfig(THREE_BLOCKS, width=0.3, num_classes=5, dropout=0.0)
RESOLUTION, IMAGES = 8, 4


@dataclass(frozen=True)
class Letter:
    letter: str


A, B, C = (Letter(letter) for letter in "ABC")


@configs.candidates_of("stand-in")
def _candidates(site: Site, gpu: Gpu) -> tuple[Letter, ...]:
    return A, B, C


@dataclass
class Machine:
    """seconds: of the configurations of a launch, and of PyTorch's form and the single operations. fault: given the
    block's channels and a form's result, which may be another one, or raise."""

    configs: dict[Letter, float] = field(default_factory=lambda: {A: 1.0, B: 1.0, C: 1.0})
    torch: float = 10.0
    operations: float = 6.0
    fault: Callable[[int, Form, Tensor], Tensor] = lambda channels, form, y: y
    broken: set[Letter] = field(default_factory=set)
    lost: bool = False
    now: float = 0.0
    launched: list[Letter] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def timer(self) -> HostTimer:
        timer = HostTimer(lambda: self.now)

        def settle() -> None:
            if self.lost:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        timer.settle = settle  # type: ignore[method-assign]
        return timer

    def tuner(self, **options: Any) -> Tuner:
        return Tuner(torch.device("cpu"), "off", self.timer(), self.said.append, **options)

    def kernel(self, site: Site) -> Any:
        """Something to launch."""
        machine = self

        class Kernel:
            @staticmethod
            def fn() -> None: ...

            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def run(*args: Any, **options: Any) -> None:
                    letter = configs.choose(site, REFERENCE)
                    if letter in machine.broken:
                        raise launch.KernelError(f"{letter} needs too much shared memory: pass impl='torch'")
                    machine.launched.append(letter)
                    machine.now += machine.configs[letter]

                return run

        return Kernel()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Machine]:
    """This CPU as a GPU whose speed and faults the test decides; its user's cache is empty."""
    made, threads = Machine(), torch.get_num_threads()
    torch.set_num_threads(1)  # these images are tiny
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "ROUNDS", 2)
    monkeypatch.setattr(tuner, "timer_for", lambda device: made.timer())
    real = layers.resolve
    monkeypatch.setattr(layers, "resolve", lambda impl, x: "torch" if impl == "torch" else "triton")
    assert real("auto", torch.empty(0)) == "torch"
    single = {name: getattr(layers, name) for name in ("bn_silu", "bn_silu_squeeze_excite", "bn_drop_connect_add")}

    def mbconv(x: Tensor, *args: Any, impl: str, **options: Any) -> Tensor:
        y = reference.mbconv(x, *args, **options)
        if impl == "torch":
            made.now += made.torch
            return y
        site = Site("stand-in", tuple(x.shape[1:]))
        for _ in range(2):
            launch.launch(made.kernel(site), (1,), like=x, num_warps=4, site=site)
        return made.fault(x.shape[1], "triton", y)

    def operation(name: str) -> Callable[..., Tensor]:
        def run(x: Tensor, *args: Any, impl: str, **options: Any) -> Tensor:
            made.now += made.operations / 3 if impl != "torch" else made.torch
            y = single[name](x, *args, impl="torch", **options)
            return y if impl == "torch" else made.fault(x.shape[1], "triton-ops", y)

        return run

    monkeypatch.setattr(layers, "mbconv", mbconv)
    for name in single:
        monkeypatch.setattr(layers, name, operation(name))
    # Joined blocks have kernels of their own.
    monkeypatch.setattr(layers.MBConv, "can_defer_residual", lambda *args: False)
    monkeypatch.setattr(tuner, "subjects", _without_pending(tuner.subjects))
    yield made
    torch.set_num_threads(threads)
    forms.forget()
    configs.forget()


def _without_pending(find: Any) -> Any:
    def found(*args: Any, **options: Any) -> Any:
        subjects = find(*args, **options)
        for occurrences in subjects.values():
            for context in list(occurrences.contexts):
                count = occurrences.contexts.pop(context)
                occurrences.contexts[context._replace(pending=None)] += count
        return subjects

    return found


def small_model(kernels: Any = "auto") -> EfficientNet:
    torch.manual_seed(0)
    config = ModelConfig(**{**vars(CONFIG), "kernels": kernels})
    return EfficientNet(config).train()


def block_forms(model: EfficientNet, *, training: bool = True, compiled: bool = False) -> list[Form]:
    """What each block would run in now."""
    side, found = RESOLUTION // 2, []
    for block in model.blocks:
        assert isinstance(block, layers.MBConv)
        found.append(forms._look_up(block.kind, side, side, torch.float32, "cpu", training, compiled))
        side = -(-side // block.shape.stride)
    return found


class Other(Ranks):
    """The first of two ranks, the other of which is told of by `theirs`."""

    def __init__(self, theirs: Callable[[Any], Any]) -> None:
        super().__init__(rank=0, size=1)
        self.theirs = theirs

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, self.theirs(value)]


def prepare(measured: Tuner, kernels: str = "auto", **options: Any) -> list[Form]:
    """The forms of the three blocks of the small model in training."""
    model = small_model(kernels)
    measured.prepare(model, RESOLUTION, IMAGES, **{"training": True} | options)
    return block_forms(model)


# --- what is right --------------------------------------------------------------------------------------------------


def in_output(channels: int, form: Form, y: Tensor) -> Tensor:
    return y + 1e-3 * y.detach().abs().max() if (channels, form) == (16, "triton") else y


def raises(channels: int, form: Form, y: Tensor) -> Tensor:
    if (channels, form) == (16, "triton"):
        raise ArithmeticError("the kernel's bounds")
    return y
