"""Every default in one place: frozen dataclasses from which the command line is made, and named recipes.

Free of torch, so that `--help` is quick. The resolved configuration is saved with a run as `config.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from data_pipeline.loaders.augment import Augmentation
from data_pipeline.loaders.dali_options import DaliOptions
from fastnet.arch import EFFICIENTNET, Kernels, Padding, Scaling, Style, Variant, coefficients
from fastnet.errors import UserError
from fastnet.typed import checked_fields, parse_object


@dataclass(frozen=True)
class ModelOptions:
    variant: Variant = "b0"
    """EfficientNet variant."""
    scaling: Scaling = "published"
    """Width and depth: the published coefficients, or the pure powers alpha^phi and beta^phi of the paper's eq. 3."""
    resolution: int | None = None
    """Image side in pixels. Default: gamma^phi of the variant from base 200 (b0 200, b1 232, b4 352, b7 536); Lite's as
    published."""
    padding: Padding = "symmetric"
    """Convolution padding: symmetric (torchvision, timm efficientnet_*) or TensorFlow's SAME (tf_efficientnet_*)."""
    dropout: float | None = None
    """Dropout before the classifier. Default: the variant's, 0.2 (b0) to 0.5 (b7)."""
    drop_connect_rate: float | None = None
    """Stochastic depth: block i of N is dropped with probability rate*i/N. Default: the variant's, 0.2 to 0.5."""
    pretrained: str | None = None
    """Weights to start from: imagenet (torchvision's published file of the variant, fetched once), or a .safetensors or
    .pth file of fastnet, torchvision or timm. Sets the padding, BN eps and momentum that they were trained with."""
    weights_style: Style | None = None
    """Where --pretrained comes from, when the file itself does not tell."""
    kernels: Kernels = "auto"
    """How MBConv runs: triton is one fused block and never falls back, triton-ops fuses between torch's convolutions,
    native is the fused block in C++ for a CPU, compiled at first use; it never falls back either; torch is plain; auto
    is native on a CPU with a C++ compiler and triton on a GPU from compute capability 8.0 on, but for blocks that
    --tune finds wrong or slower, and torch elsewhere."""


@dataclass(frozen=True)
class DataOptions:
    data: str | None = None
    """A folder with a folder a class, or with train/<class>/* and val/<class>/*, or in Food-101's layout; a .csv of
    paths and labels, or its folder; webdataset shards: a folder with train*.tar and val*.tar, or a quoted pattern,
    'shards/*.tar'; 'sample' is generated offline. Default: of --recipe food101 where `python -m data_pipeline prepare`
    put it, of quick sample; others need it."""
    num_classes: int | None = None
    """Refuse a data set with another number of classes."""
    val_fraction: float | None = None
    """Share of each class that validates where the data set has no images for that, drawn by a hash of the files'
    paths, copies of a photo together. Default: 0.2."""
    crop_fraction: float | None = None
    """Share of the short side that validation looks at. Default: 0.875. (timm: --crop-pct)"""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """How validation images are resized. Default: bilinear, as training's crops always are."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from the channels' values of 0 to 1. Default: as --pretrained weights were trained with, else
    ImageNet's."""
    std: tuple[float, float, float] | None = None
    """What they are then divided by. Default: as for --mean."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """Input pipeline: NVIDIA DALI (decodes on the GPU where there is one) or torchvision v2 on a DataLoader."""
    workers: int | None = None
    """Worker threads (DALI, cache) or processes (torch). Default: the cores, at most 16; on a CPU half of them."""
    cache: Literal["none", "disk", "ram", "gpu", "auto"] = "none"
    """Decode each image once: training photos to --cache-side, validation to the view that the model sees; kept in
    RAM, on the GPU, or in a file that later runs find again; processes of one machine share RAM and file. auto takes
    the first of gpu, ram and disk that fits; what does not fit is replaced, in words: RAM may keep a part."""
    cache_side: int | None = None
    """Short side in pixels to which --cache shrinks training photos. Default: 2 x --resolution over the root of the
    smallest --scale, from which every crop is as sharp as from the photo."""

    @property
    def source(self) -> str:
        """UserError (exit status 2) where no data set is named."""
        if self.data is None:
            raise UserError(
                "--data is missing: name a folder of photos; `python -m data_pipeline prepare --root data` downloads "
                "Food-101, which is found from then on, and --data sample works without any photos.",
                exit_status=2,
            )
        return self.data


@dataclass(frozen=True)
class OptimizerOptions:
    epochs: int = 100
    """Passes over the training set."""
    batch_size: int = 64
    """Images that go through the model at a time, in each process that torchrun starts; a step has --grad-accum-steps x
    processes times as many. A continued run keeps the images of its steps, whatever the number of processes."""
    grad_accum_steps: int = 1
    """Batches whose gradients add up to one update; their mean counts, as in one big batch."""
    optimizer: Literal["rmsprop_tf", "rmsprop", "adamw", "sgd"] = "rmsprop_tf"
    """RMSprop as TensorFlow defines it (the paper's: sqrt(v + eps), v starts at 1) or as torch does, AdamW, or SGD with
    Nesterov momentum. (timm: --opt)"""
    lr: float | None = None
    """Peak learning rate. Default: 0.064 (RMSprop), 0.1 (SGD) or 0.001 (AdamW) x images a step / 256."""
    momentum: float = 0.9
    """Momentum of RMSprop and SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decays of the gradient's and its square's running means. (timm: --opt-betas)"""
    rmsprop_decay: float = 0.9
    """Decay of RMSprop's running mean of squared gradients."""
    rmsprop_eps: float = 1e-3
    """RMSprop's epsilon."""
    weight_decay: float = 1e-5
    """Decay of convolution and linear weights; none on batch norm and biases. An L2 penalty, and AdamW's own form."""
    layer_decay: float = 1.0
    """Each layer (stem, blocks, head) learns at this times the rate of the layer above it."""
    freeze_stages: int = 0
    """Leave the stem and the first so many of the seven stages of blocks (2 to 8 in fastnet.summary) as they are, batch
    norm's statistics too."""
    sched: Literal["step", "cosine"] = "step"
    """Learning rate after the warm-up: a staircase, or half a cosine down to --min-lr at the last epoch."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up."""
    warmup_lr: float = 0.0
    """Learning rate from which the warm-up starts."""
    min_lr: float = 0.0
    """The learning rate never falls below this after the warm-up."""
    lr_decay: float = 0.96
    """--sched step multiplies the learning rate by this every --decay-epochs epochs. (timm: --decay-rate)"""
    decay_epochs: float = 8.0
    """Epochs between two decays."""
    label_smoothing: float = 0.1
    """Label smoothing of the cross-entropy. (timm: --smoothing)"""
    clip_grad_norm: float = 5.0
    """Largest gradient norm; 0 switches clipping off. (timm: --clip-grad)"""


@dataclass(frozen=True)
class MixOptions:
    mixup: float = 0.0
    """Mixup: images and labels of a batch are mixed in a share drawn from Beta(this, this); 0 is off."""
    cutmix: float = 0.0
    """Cutmix: a box is pasted from another image, its area drawn from Beta(this, this); 0 is off."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: float = 0.5
    """Probability of cutmix where both are on."""

    @property
    def enabled(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class EmaOptions:
    model_ema: bool = False
    """Keep an exponential moving average of the weights, and evaluate it too; the better of both is kept as best."""
    model_ema_decay: float = 0.9998
    """Decay of the average with each update."""
    model_ema_warmup: bool = False
    """Let the decay rise from 0 as 1 - (1 + updates)^(-2/3): for runs that are short for --model-ema-decay."""


@dataclass(frozen=True)
class ProgressiveOptions:
    progressive: int = 0
    """Grow the training resolution in so many equal stages of the epochs (EfficientNetV2); 0: --resolution always."""
    progressive_start: int | None = None
    """Resolution of the first stage. Default: half of --resolution."""


@dataclass(frozen=True)
class RunOptions:
    out: str | None = None
    """Folder of the run; with several nodes one that all share. Default: runs/<variant>-<resolution>-<date>."""
    resume: str | None = None
    """Continue a run: its folder, or 'auto' for --out (without --out: the newest in runs/) if it holds a checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA if there is a GPU that torch can use, and says why if it cannot."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision. fp16 scales the loss; auto is bf16 on a GPU, fp16 on one below compute capability 8.0, and on
    a CPU bf16 or off, whichever was measured to train faster there (off with --kernels torch)."""
    compile: Literal["off", "regional", "whole"] = "off"
    """torch.compile. A bare --compile means regional (each kind of block once, shared by its repeats); whole is one
    graph."""
    tune: Literal["on", "off", "again"] = "on"
    """Before the first step of each kind of batch: check each block's kernels and measure what is fastest here, or
    read what earlier runs measured (on); believe predictions, falling back only where a kernel can't be run (off);
    measure anew (again)."""
    seed: int = 0
    """Decides initial weights, order, augmentation, dropout and drop-connect."""
    deterministic: bool = False
    """Only deterministic algorithms: the same seed gives the same bits, at some cost in speed."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay each step as one CUDA graph: forward, loss, backward, the gradients' all-reduce between GPUs, clipping,
    optimizer and average. auto: on CUDA, where the step can be recorded, in every process or in none."""
    save_every: int = 0
    """Also write a checkpoint every so many steps; 0: at the end of each epoch only."""
    checkpoint_hist: int = 1
    """Keep the weights of so many best epochs: best.safetensors, and with 2 or more checkpoint-<epoch>.safetensors."""
    log_every: int = 20
    """Steps between two log lines, and between two looks at whether the loss is still finite. (timm: --log-interval)"""
    profile: bool = False
    """Record some steps after the first ones: a table of where their time goes (input, forward, backward, update, the
    longest kernels), and profile.json.gz in the run's folder, a trace that ui.perfetto.dev opens."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into the run's folder."""
    wandb: bool = False
    """Also send the metrics to Weights & Biases. (timm: --log-wandb)"""
    wandb_project: str = "fastnet"
    """Project of --wandb."""
    sync_bn: bool = False
    """Under torchrun: batch norm normalises over the images of all processes. Otherwise each over its own, and the
    running statistics are those of process 0."""
    reestimate_bn: int = 0
    """Before each evaluation, re-estimate batch norm's statistics on so many training batches (0: use the running
    ones). For short runs: with momentum 0.01 they lag for hundreds of steps."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run, whole."""

    recipe: Literal["food101", "quick", "finetune"] = "food101"
    """Named defaults: food101 trains from scratch as the paper does; quick learns the sample in minutes on a CPU;
    finetune adapts --pretrained weights."""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    dali: DaliOptions = field(default_factory=DaliOptions)
    augment: Augmentation = field(default_factory=Augmentation)
    mix: MixOptions = field(default_factory=MixOptions)
    progressive: ProgressiveOptions = field(default_factory=ProgressiveOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def validate(self) -> None:
        """Raises UserError (exit status 2) that names the flag that can't be right."""
        limits: list[tuple[str, float | None, float, float]] = [
            ("--resolution", self.model.resolution, 32, 4096),
            ("--dropout", self.model.dropout, 0, 0.999),
            ("--drop-connect-rate", self.model.drop_connect_rate, 0, 0.999),
            ("--val-fraction", self.data.val_fraction, 0.001, 0.9),
            ("--workers", self.data.workers, 0, 1024),
            ("--cache-side", self.data.cache_side, 16, 16384),
            ("--epochs", self.optimizer.epochs, 1, 1e6),
            ("--batch-size", self.optimizer.batch_size, 2, 1e6),
            ("--grad-accum-steps", self.optimizer.grad_accum_steps, 1, 1e6),
            ("--momentum", self.optimizer.momentum, 0, 0.9999),
            ("--rmsprop-decay", self.optimizer.rmsprop_decay, 0, 0.99999),
            ("--rmsprop-eps", self.optimizer.rmsprop_eps, 1e-12, 1),
            ("--weight-decay", self.optimizer.weight_decay, 0, 10),
            ("--betas", min(self.optimizer.betas), 0, 0.999999),
            ("--betas", max(self.optimizer.betas), 0, 0.999999),
            ("--layer-decay", self.optimizer.layer_decay, 1e-3, 1),
            ("--freeze-stages", self.optimizer.freeze_stages, 0, len(EFFICIENTNET.stages)),
            ("--warmup-lr", self.optimizer.warmup_lr, 0, 1e3),
            ("--min-lr", self.optimizer.min_lr, 0, 1e3),
            ("--warmup-epochs", self.optimizer.warmup_epochs, 0, 1e6),
            ("--lr-decay", self.optimizer.lr_decay, 1e-6, 1),
            ("--decay-epochs", self.optimizer.decay_epochs, 1e-3, 1e6),
            ("--label-smoothing", self.optimizer.label_smoothing, 0, 0.999),
            ("--clip-grad-norm", self.optimizer.clip_grad_norm, 0, 1e9),
            ("--lr", self.optimizer.lr, 1e-9, 1e3),
            ("--mixup", self.mix.mixup, 0, 1e3),
            ("--cutmix", self.mix.cutmix, 0, 1e3),
            ("--mixup-prob", self.mix.mixup_prob, 0, 1),
            ("--mixup-switch-prob", self.mix.mixup_switch_prob, 0, 1),
            ("--model-ema-decay", self.ema.model_ema_decay, 0, 1),
            ("--progressive", self.progressive.progressive, 0, 8),
            ("--progressive-start", self.progressive.progressive_start, 32, self.model.resolution or 4096),
            ("--checkpoint-hist", self.run.checkpoint_hist, 1, 1e6),
            ("--save-every", self.run.save_every, 0, 1e9),
            ("--log-every", self.run.log_every, 1, 1e9),
            ("--reestimate-bn", self.run.reestimate_bn, 0, 1e6),
            ("--seed", self.run.seed, 0, 2**63 - 1),
        ]
        for flag, value, low, high in limits:
            if value is not None and not low <= value <= high:
                raise UserError(f"{flag} {value} must lie between {low:g} and {high:g}.", exit_status=2)
        if self.recipe == "finetune" and not self.model.pretrained:
            raise UserError("--recipe finetune needs weights: add --pretrained imagenet or a file.", exit_status=2)
        if self.model.weights_style and not self.model.pretrained:
            raise UserError("--weights-style needs --pretrained FILE.", exit_status=2)
        _ = self.data.source

    @property
    def images_per_step(self) -> int:
        """Images of one process that one update of the weights sees, where a run starts."""
        return self.optimizer.batch_size * self.optimizer.grad_accum_steps

    def peak_lr(self, images: int | None = None) -> float:
        """--lr, or the optimizer's rate for 256 images (RMSprop: the paper's; SGD: Goyal et al. 2017) in proportion.

        images: those of a step over all processes (default: of one process).
        """
        if self.optimizer.lr is not None:
            return self.optimizer.lr
        images = self.images_per_step if images is None else images
        return {"sgd": 0.1, "adamw": 0.001}.get(self.optimizer.optimizer, 0.064) * images / 256

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def processes() -> int:
    """How many processes train together, as torchrun says; UserError where that is no number."""
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isascii() or not said.isdigit() or not 1 <= int(said[:9]) < 1e6:
        raise UserError(f"WORLD_SIZE is {said!r}, and torchrun sets a number: start with torchrun, or unset it.")
    return int(said)


def flag_types() -> dict[str, Any]:
    """Every flag of the command line, with the type of what it takes."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(TrainConfig).items():
        each = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {name: hint}
        found |= {"--" + flag.replace("_", "-"): kind for flag, kind in each.items()}
    return found


def config_from_dict(values: dict[str, Any], source: Path) -> TrainConfig:
    """The inverse of `TrainConfig.to_json`; UserError names `source` where a key is unknown."""
    return _build(TrainConfig, values, source)


def read_config(path: Path) -> TrainConfig:
    """The configuration that a run was started with; UserError where it can't be read."""
    try:
        return config_from_dict(parse_object(path.read_text(encoding="utf-8")), path)
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not the folder of a run (no {path.name}): name one with --resume.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or start a new run.") from None


def _build(cls: type, values: Any, source: Path) -> Any:
    hints = get_type_hints(cls)
    unknown = set(values) - set(hints) if isinstance(values, dict) else set()
    if unknown:
        raise UserError(
            f"{source} holds settings that this version does not know ({', '.join(sorted(unknown))}): "
            "continue the run with the version that wrote it."
        )
    try:
        checked_fields(cls, values)
        if cls is ModelOptions and "variant" in values:
            coefficients(values["variant"])
    except ValueError as error:
        raise UserError(f"{source} is damaged ({error}): restore it, or start a new run.") from None
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
    data=replace(FOOD101.data, data="sample"),
    model=replace(FOOD101.model, resolution=48, dropout=0.0, drop_connect_rate=0.0),
    augment=replace(FOOD101.augment, scale=(0.6, 1.0), brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0),
    optimizer=replace(
        FOOD101.optimizer, epochs=10, batch_size=32, lr=0.002, warmup_epochs=1.0, lr_decay=0.92, decay_epochs=1.0
    ),
    run=replace(FOOD101.run, reestimate_bn=20),
)
"""The generated sample in minutes: 88.7 % top-1 after 1:39 of training on 2 cores of an AMD EPYC (`make train`)."""

FINETUNE = replace(
    FOOD101,
    recipe="finetune",
    augment=replace(FOOD101.augment, scale=(0.25, 1.0)),
    optimizer=replace(
        FOOD101.optimizer,
        epochs=20,
        batch_size=16,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.02,
        layer_decay=0.9,
        sched="cosine",
        warmup_epochs=1.0,
        min_lr=1e-6,
    ),
    ema=replace(FOOD101.ema, model_ema=True, model_ema_decay=0.999, model_ema_warmup=True),
)
"""From --pretrained weights, in few epochs: AdamW with a cosine, lower rates below, averaged weights, small batches
(a few hundred photos make few updates otherwise). What it reaches: `python -m bench.accuracy`."""

RECIPES: dict[str, TrainConfig] = {"food101": FOOD101, "quick": QUICK, "finetune": FINETUNE}
