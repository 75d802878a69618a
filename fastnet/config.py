"""Every default in one place: frozen dataclasses from which the command line is made, and named recipes.

Free of torch, so that `--help` is quick. The resolved configuration is saved with a run as `config.json`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from data_pipeline.augment import Augmentation
from fastnet.errors import UserError

Variant = Literal["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7"]


@dataclass(frozen=True)
class ModelOptions:
    variant: Variant = "b0"
    """EfficientNet variant."""
    scaling: Literal["published", "compound"] = "published"
    """Width and depth: the published coefficients, or the pure powers alpha^phi and beta^phi of the paper's eq. 3."""
    resolution: int | None = None
    """Image side in pixels. Default: gamma^phi of the variant from base 200 (b0 200, b1 232, b4 352, b7 536)."""
    padding: Literal["symmetric", "same"] = "symmetric"
    """Convolution padding: symmetric (torchvision, timm efficientnet_*) or TensorFlow's SAME (tf_efficientnet_*)."""
    dropout: float | None = None
    """Dropout before the classifier. Default: the variant's, 0.2 (b0) to 0.5 (b7)."""
    drop_connect_rate: float | None = None
    """Stochastic depth: block i of N is dropped with probability rate*i/N. Default: the variant's, 0.2 to 0.5."""
    pretrained: str | None = None
    """Weights to start from: imagenet (torchvision's published file of the variant, fetched once), or a .safetensors or
    .pth file of fastnet, torchvision or timm. Sets the padding, BN eps and momentum that they were trained with."""
    weights_style: Literal["fastnet", "torchvision", "timm", "timm_tf"] | None = None
    """Where --pretrained comes from, when the file itself does not tell."""
    kernels: Literal["auto", "triton", "triton-ops", "torch"] = "auto"
    """How MBConv runs: triton is one fused block and never falls back, triton-ops fuses between torch's convolutions,
    torch is plain; auto is triton on CUDA and torch elsewhere."""


@dataclass(frozen=True)
class DataOptions:
    data: str = "sample"
    """A folder in Food-101's layout, or with train/<class>/* and val/<class>/*; 'sample' is generated offline."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """Input pipeline: NVIDIA DALI (decodes on the GPU where there is one) or torchvision v2 on a DataLoader."""
    workers: int | None = None
    """Worker threads (DALI) or processes (torch). Default: the cores, at most 16; on a CPU half of them."""


@dataclass(frozen=True)
class OptimizerOptions:
    epochs: int = 100
    """Passes over the training set."""
    batch_size: int = 64
    """Images a step."""
    optimizer: Literal["rmsprop_tf", "rmsprop"] = "rmsprop_tf"
    """RMSprop as TensorFlow defines it (the paper's: sqrt(v + eps), v starts at 1) or as torch does."""
    lr: float | None = None
    """Peak learning rate. Default: 0.064 x batch_size / 256."""
    momentum: float = 0.9
    """RMSprop's momentum."""
    rmsprop_decay: float = 0.9
    """Decay of RMSprop's running mean of squared gradients."""
    rmsprop_eps: float = 1e-3
    """RMSprop's epsilon."""
    weight_decay: float = 1e-5
    """L2 penalty on convolution and linear weights; none on batch norm and biases."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up."""
    lr_decay: float = 0.96
    """The learning rate is multiplied by this every --decay-epochs epochs after the warm-up."""
    decay_epochs: float = 8.0
    """Epochs between two decays."""
    label_smoothing: float = 0.1
    """Label smoothing of the cross-entropy."""
    clip_grad_norm: float = 5.0
    """Largest gradient norm; 0 switches clipping off."""


@dataclass(frozen=True)
class RunOptions:
    out: str | None = None
    """Folder of the run. Default: runs/<variant>-<resolution>-<date>."""
    resume: str | None = None
    """Continue a run: its folder, or 'auto' for --out (without --out: the newest in runs/) if it holds a checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA if there is a GPU."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision. fp16 scales the loss; auto is bf16 on CUDA and off on a CPU."""
    compile: Literal["off", "regional", "whole"] = "off"
    """torch.compile. A bare --compile means regional (each kind of block once, shared by its repeats); whole is one
    graph."""
    seed: int = 0
    """Decides initial weights, order, augmentation, dropout and drop-connect."""
    deterministic: bool = False
    """Only deterministic algorithms: the same seed gives the same bits, at some cost in speed."""
    save_every: int = 0
    """Also write a checkpoint every so many steps; 0: at the end of each epoch only."""
    log_every: int = 20
    """Steps between two log lines."""
    reestimate_bn: int = 0
    """Before each evaluation, re-estimate batch norm's statistics on so many training batches (0: use the running
    ones). For short runs: with momentum 0.01 they lag for hundreds of steps."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run, whole."""

    recipe: Literal["food101", "quick"] = "food101"
    """Named defaults: food101 trains from scratch as the paper does; quick learns the sample in minutes on a CPU."""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    augment: Augmentation = field(default_factory=Augmentation)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def validate(self) -> None:
        """Raises UserError (exit status 2) that names the flag that can't be right."""
        limits: list[tuple[str, float | None, float, float]] = [
            ("--resolution", self.model.resolution, 32, 4096),
            ("--dropout", self.model.dropout, 0, 0.999),
            ("--drop-connect-rate", self.model.drop_connect_rate, 0, 0.999),
            ("--workers", self.data.workers, 0, 1024),
            ("--epochs", self.optimizer.epochs, 1, 1e6),
            ("--batch-size", self.optimizer.batch_size, 2, 1e6),
            ("--momentum", self.optimizer.momentum, 0, 0.9999),
            ("--rmsprop-decay", self.optimizer.rmsprop_decay, 0, 0.99999),
            ("--rmsprop-eps", self.optimizer.rmsprop_eps, 1e-12, 1),
            ("--weight-decay", self.optimizer.weight_decay, 0, 10),
            ("--warmup-epochs", self.optimizer.warmup_epochs, 0, 1e6),
            ("--lr-decay", self.optimizer.lr_decay, 1e-6, 1),
            ("--decay-epochs", self.optimizer.decay_epochs, 1e-3, 1e6),
            ("--label-smoothing", self.optimizer.label_smoothing, 0, 0.999),
            ("--clip-grad-norm", self.optimizer.clip_grad_norm, 0, 1e9),
            ("--lr", self.optimizer.lr, 1e-9, 1e3),
            ("--save-every", self.run.save_every, 0, 1e9),
            ("--log-every", self.run.log_every, 1, 1e9),
            ("--reestimate-bn", self.run.reestimate_bn, 0, 1e6),
        ]
        for flag, value, low, high in limits:
            if value is not None and not low <= value <= high:
                raise UserError(f"{flag} {value} must lie between {low:g} and {high:g}.", exit_status=2)
        if self.model.weights_style and not self.model.pretrained:
            raise UserError("--weights-style needs --pretrained FILE.", exit_status=2)

    @property
    def peak_lr(self) -> float:
        """--lr, or the paper's rule 0.064 x batch / 256."""
        return 0.064 * self.optimizer.batch_size / 256 if self.optimizer.lr is None else self.optimizer.lr

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def config_from_dict(values: dict[str, Any], source: Path) -> TrainConfig:
    """The inverse of `TrainConfig.to_json`; UserError names `source` where a key is unknown."""
    return _build(TrainConfig, values, source)


def read_config(path: Path) -> TrainConfig:
    """The configuration that a run was started with; UserError where it can't be read."""
    try:
        return config_from_dict(json.loads(path.read_text()), path)
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not the folder of a run (no {path.name}): name one with --resume.") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or start a new run.") from None


def _build(cls: type, values: dict[str, Any], source: Path) -> Any:
    hints = get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise UserError(
            f"{source} holds settings that this version does not know ({', '.join(sorted(unknown))}): "
            "continue the run with the version that wrote it."
        )
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _build(hints[name], value, source)
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return cls(**built)


FOOD101 = TrainConfig()
"""From scratch on Food-101 at 200 px x gamma^phi. Accuracy and time to expect: not yet measured."""

QUICK = replace(
    FOOD101,
    recipe="quick",
    model=replace(FOOD101.model, resolution=48, dropout=0.0, drop_connect_rate=0.0),
    augment=replace(FOOD101.augment, scale=(0.6, 1.0), brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0),
    optimizer=replace(
        FOOD101.optimizer, epochs=10, batch_size=32, lr=0.002, warmup_epochs=1.0, lr_decay=0.92, decay_epochs=1.0
    ),
    run=replace(FOOD101.run, reestimate_bn=20),
)

"""The generated sample in minutes: 88.7 % top-1 after 1:39 of training on 2 cores of an AMD EPYC (`make train`)."""

RECIPES: dict[str, TrainConfig] = {"food101": FOOD101, "quick": QUICK}
