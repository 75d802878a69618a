"""The models that are compared, and a training step of each: same optimizer, loss, batch, precision, regularisation."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.measure import sample, synchronise
from bench.shapes import activations
from fastnet.arch import Kernels
from fastnet.config import OptimizerOptions
from fastnet.device import Amp
from fastnet.model import efficientnet
from fastnet.scaling import architecture
from fastnet.training.cuda_graph import CudaRecorder
from fastnet.training.optim import make_optimizer
from fastnet.training.step import TrainStep

NUM_CLASSES = 101
OURS = "fastnet"
TIMM, TIMM_TF, TORCHVISION = "timm efficientnet", "timm tf_efficientnet", "torchvision"
PEERS = (TIMM, TIMM_TF, TORCHVISION)
# Another network, torchvision's: what users of EfficientNet compare it with, at ten times its arithmetic.
RESNET50 = "torchvision resnet50"
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Peer(nn.Module):
    """Another library's model behind our call: it draws its own drop-connect."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, drop_scales: Tensor | None = None) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


def available_peers() -> tuple[list[str], list[str]]:
    """(names that can be built here, sentences about those that can't)."""
    there, missing = [], []
    for name in PEERS:
        package = name.split()[0]
        if importlib.util.find_spec(package) is None:
            missing.append(f"{name}: {package} is not installed")
        else:
            there.append(name)
    return there, missing


class Workload(NamedTuple):
    variant: str
    resolution: int
    batch: int

    def __str__(self) -> str:
        return f"{self.variant}@{self.resolution} batch {self.batch}"

    @property
    def with_resnet50(self) -> bool:
        return self.variant == "b0"

    @property
    def byte_pass(self) -> int:
        """Bytes of a 16-bit type that every convolution's output makes up."""
        return self.batch * activations(self.variant, self.resolution) * 2

    @property
    def gigabytes(self) -> float:
        """An estimate of what a training step takes of a GPU, in 2^30 bytes: a process's context and workspaces, and
        three byte-passes, for eager PyTorch keeps the outputs of convolution, batch norm and SiLU."""
        return 2 + 3 * self.byte_pass / 2**30

    def fitting(self, device: torch.device) -> Workload:
        """With the batch halved until the step of a peer and the recordings of two of ours, half as large, may be held
        at once; as it is on a CPU."""
        work = self
        if device.type == "cuda":
            held = 0.9 * torch.cuda.get_device_properties(device).total_memory / 2**30
            while 2 * work.gigabytes - 2 > held and work.batch > 1:
                work = work._replace(batch=work.batch // 2)
        return work


class Entry(NamedTuple):
    """A contender in one mode. `options` go to torch.compile, None is eager; ours may take other kernels, replay its
    step as one CUDA graph, and make each block add its own residual."""

    model: str
    options: dict[str, Any] | None = None
    kernels: Kernels = "auto"
    graph: bool = False
    own_residual_adds: bool = False

    @property
    def label(self) -> str:
        name = self.model if self.kernels == "auto" else f"{self.model} {self.kernels}"
        name += " with own residual adds" * self.own_residual_adds
        mode = "eager" if self.options is None else self.options.get("mode", "compiled")
        return f"{name}, {mode}{', graph' * self.graph}"

    @property
    def is_peer(self) -> bool:
        return self.model in PEERS

    @property
    def is_ours(self) -> bool:
        """With the kernels that a user gets."""
        return self.model == OURS and self.kernels == "auto" and not self.own_residual_adds


def compared_peers() -> list[str]:
    """Of the peers that can be built here those that the proof times: one of timm's twins is enough."""
    return [name for name in available_peers()[0] if name in (TIMM, TORCHVISION)]


def eager_entries() -> list[Entry]:
    return [Entry(name) for name in (OURS, *compared_peers())]


def entries(peer_options: dict[str, Any] | None = None) -> list[Entry]:
    """Ours, timm's efficientnet and torchvision's in every form; what matters most comes before time runs out."""
    return [
        Entry(OURS),
        Entry(OURS, graph=True),
        *(Entry(name) for name in compared_peers()),
        Entry(OURS, {}, graph=True),
        *(Entry(name, peer_options or {}) for name in compared_peers()),
        Entry(OURS, {}),
        Entry(OURS, kernels="triton-ops"),
        Entry(OURS, kernels="torch"),
    ]


def with_resnet50() -> list[Entry]:
    """`entries()` and, where torchvision is installed, compiled ResNet-50."""
    return entries() + [Entry(RESNET50, {})] * (TORCHVISION in compared_peers())


OWN_FORMS = (
    Entry(OURS, graph=True), Entry(OURS, graph=True, own_residual_adds=True),
    Entry(OURS, kernels="triton-ops", graph=True), Entry(OURS, {}, kernels="triton-ops"),
    Entry(OURS, {}, kernels="torch"),
)  # fmt: skip


def build(name: str, variant: str = "b0", **options: Any) -> nn.Module:
    """A freshly initialised model in training mode; `options` go to ours. ImportError where a peer is not installed."""
    if name == OURS:
        return efficientnet(variant, num_classes=NUM_CLASSES, **options).train()
    arch = architecture(variant)
    if name == TORCHVISION:
        import torchvision

        make = getattr(torchvision.models, f"efficientnet_{variant}")
        return Peer(make(num_classes=NUM_CLASSES, dropout=arch.dropout)).train()
    if name == RESNET50:
        import torchvision

        return Peer(torchvision.models.resnet50(num_classes=NUM_CLASSES)).train()
    import timm

    net = timm.create_model(
        f"{'tf_' if name == TIMM_TF else ''}efficientnet_{variant}",
        num_classes=NUM_CLASSES,
        drop_rate=arch.dropout,
        drop_path_rate=arch.drop_connect_rate,
    )
    return Peer(net).train()


def make_batch(
    batch: int, resolution: int, device: torch.device, memory_format: torch.memory_format, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, resolution, resolution, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (batch,), generator=generator)
    return images.to(device, memory_format=memory_format), labels.to(device)


class StepRunner:
    """One training step on one fixed batch, as a call without arguments that does not wait for the device."""

    def __init__(
        self,
        name: str,
        variant: str,
        resolution: int,
        batch: int,
        device: torch.device,
        *,
        amp: Amp = "off",
        memory_format: str = "channels_last",
        compile_options: dict[str, Any] | None = None,
        graph: bool = False,
        own_residual_adds: bool = False,
        **options: Any,
    ) -> None:
        """compile_options: None is eager; else ours is compiled by regions and a peer whole, with those options.
        graph: the step is recorded after `fastnet.training.cuda_graph.WARMUP_STEPS` calls and then replayed.
        own_residual_adds: no block of ours leaves its residual add to the next."""
        torch.manual_seed(0)
        layout = FORMATS[memory_format]
        model = build(name, variant, **options).to(device).to(memory_format=layout)
        if own_residual_adds:
            for block in model.blocks:  # type: ignore[union-attr]
                block.defers_residual = False
        if compile_options is not None:
            # Static shapes: what each would choose for training.
            if name == OURS:
                model.compile_regions(dynamic=False, **compile_options)  # type: ignore[operator]
            else:
                model.compile(dynamic=False, **compile_options)
        optimizer = make_optimizer(model, OptimizerOptions(), lr=0.064 * batch / 256)
        self.step = TrainStep(model, optimizer, device=device, amp=amp)
        if graph:
            self.step.use_graph(CudaRecorder(device))
        self.images, self.labels = make_batch(batch, resolution, device, layout)
        self.memory_format = memory_format

    def __call__(self) -> Tensor:
        return self.step(self.images, self.labels)[0]


def best_format(make: Callable[[str], StepRunner], device: torch.device, runs: int = 3) -> StepRunner:
    """The runner in the memory format whose median step is the shorter, each tried on a few steps."""
    runners = {name: make(name) for name in FORMATS}
    medians = {
        name: statistics.median(sample(runner, device, seconds=0.0, least=runs)) for name, runner in runners.items()
    }
    synchronise(device)
    return runners[min(medians, key=lambda name: medians[name])]
