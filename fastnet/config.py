"""Every default in one place: frozen dataclasses from which the command line is made, and named recipes.

Free of torch, so that `--help` is quick. The resolved configuration is saved with a run as `config.json`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_type_hints

from data_pipeline.dataset.folds import Folds
from data_pipeline.loaders.augment import Augmentation
from data_pipeline.loaders.dali_options import Backend, DaliOptions
from fastnet.arch import EFFICIENTNET, Kernels, Padding, Scaling, Style, Variant
from fastnet.errors import UserError
from fastnet.typed import torchrun_number

BestBy = Literal["top1", "macro-f1", "loss"]


def option(default: Any, low: float | None = None, high: float | None = None, *, changeable: bool = False) -> Any:
    """A flag: its default; what a number, or each of several, must lie between; whether a continued run may be given
    another value, since it decides nothing that is computed."""
    return field(default=default, metadata={"bounds": (low, high), "changeable": changeable})


@dataclass(frozen=True)
class ModelOptions:
    variant: Variant = "b0"
    """EfficientNet variant."""
    scaling: Scaling = "published"
    """Width and depth: the published coefficients, or the pure powers alpha^phi and beta^phi of the paper's eq. 3."""
    resolution: int | None = option(None, 32, 4096)
    """Image side in pixels. Default: of --recipe finetune that of its weights; otherwise gamma^phi of the variant from
    base 200 (b0 200, b1 232, b4 352, b7 536); Lite's as published."""
    padding: Padding = "symmetric"
    """Convolution padding: symmetric (torchvision, timm efficientnet_*) or TensorFlow's SAME (tf_efficientnet_*)."""
    dropout: float | None = option(None, 0, 0.999)
    """Dropout before the classifier. Default: the variant's, 0.2 (b0) to 0.5 (b7)."""
    drop_connect_rate: float | None = option(None, 0, 0.999)
    """Stochastic depth: block i of N is dropped with probability rate*i/N. Default: the variant's, 0.2 to 0.5."""
    pretrained: str | None = None
    """Weights to start from: imagenet (torchvision's published file of the variant, fetched once; bare --pretrained),
    a run's folder, a .safetensors or .pth file or checkpoint of fastnet, torchvision or timm, a folder of the Hugging
    Face hub or a name there, such as timm/efficientnet_b0.ra_in1k. Sets the padding, BN eps and momentum, and the mean
    and deviation, that they were trained with."""
    weights_style: Style | None = None
    """Where --pretrained comes from, when the file itself does not tell."""
    kernels: Kernels = option("auto", changeable=True)
    """How MBConv runs: triton is one fused block and never falls back, triton-ops fuses between torch's convolutions,
    native is the fused block in C++ for a CPU, compiled at first use; it never falls back either; torch is plain; auto
    is native on a CPU with a C++ compiler and triton on a GPU from compute capability 8.0 on, but for blocks that
    --tune finds wrong or slower, and torch elsewhere."""


@dataclass(frozen=True)
class DataOptions:
    data: str | None = option(None, changeable=True)
    """A folder with a folder a class, or with train/<class>/* and val/<class>/*, or in Food-101's layout; a .csv of
    paths and labels, or its folder; webdataset shards: a folder with train*.tar and val*.tar, or a quoted pattern,
    'shards/*.tar'; 'sample' is generated offline. Default: of --recipe food101 where `python -m data_pipeline prepare`
    put it, of quick sample; others need it."""
    num_classes: int | None = option(None, 2, 1e6)
    """Refuse a data set with another number of classes."""
    val_fraction: float | None = option(None, 0.001, 0.9)
    """Share of each class that validates where the data set has no images for that, drawn by a hash of the files'
    paths, copies of a photo together. Default: 0.2."""
    folds: int = 0
    """Cross-validation of a data set without a validation split: so many parts of each class, of which --fold
    validates; copies of a photo are in one part. 0: none."""
    fold: int = 0
    """Which of --folds validates, from 0."""
    crop_fraction: float | None = None
    """Share of the short side that validation looks at. Default: 0.875, or of --recipe finetune that of its weights.
    (timm: --crop-pct)"""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """How validation images are resized. Default: bilinear, as training's crops always are, or of --recipe finetune as
    its weights want."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from the channels' values of 0 to 1. Default: as --pretrained weights were trained with, else
    ImageNet's."""
    std: tuple[float, float, float] | None = None
    """What they are then divided by. Default: as for --mean."""
    loader: Backend = option("auto", changeable=True)
    """Input pipeline: NVIDIA DALI (decodes on the GPU where there is one) or torchvision v2 on a DataLoader."""
    workers: int | None = option(None, 0, 1024, changeable=True)
    """Worker threads (DALI, cache) or processes (torch). Default: the cores, at most 16; on a CPU half of them."""
    cache: Literal["none", "disk", "ram", "gpu", "auto"] = option("none", changeable=True)
    """Decode each image once: training photos to --cache-side, validation to the view that the model sees; kept in
    RAM, on the GPU, or in a file that later runs find again; processes of one machine share RAM and file. auto takes
    the first of gpu, ram and disk that fits; what does not fit is replaced, in words: RAM may keep a part."""
    cache_side: int | None = option(None, 16, 16384)
    """Short side in pixels to which --cache shrinks training photos. Default: 2 x --resolution over the root of the
    smallest --scale, from which every crop is as sharp as from the photo."""
    feature_views: int = option(0, 0, 1000)
    """With --freeze-stages 7: compute what the frozen stages make of so many augmented views of each photo once, keep
    it in the user's cache folder, and train the head on that. 0: every epoch goes through the whole network."""

    @property
    def division(self) -> Folds | None:
        return Folds(self.folds, self.fold) if self.folds else None

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
    epochs: int = option(100, 1, 1e6, changeable=True)
    """Passes over the training set."""
    batch_size: int = option(64, 0, 1e6)
    """Images that go through the model at a time, in each process that torchrun starts; a step has --grad-accum-steps x
    processes times as many. A continued run keeps the images of its steps, whatever the number of processes. auto (or
    0): what fits the GPU, found by trying; on a CPU the recipe's, as far as memory goes."""
    min_steps: int = option(0, 0, 1e6)
    """Lower --batch-size where an epoch would have fewer steps than this, and begin the epoch's images anew to fill its
    last batch, so that none is left out; 0: neither. finetune has 10, or 1 beside --batch-size."""
    grad_accum_steps: int = option(1, 1, 1e6)
    """Batches whose gradients add up to one update; their mean counts, as in one big batch."""
    optimizer: Literal["rmsprop_tf", "rmsprop", "adamw", "sgd"] = "rmsprop_tf"
    """RMSprop as TensorFlow defines it (the paper's: sqrt(v + eps), v starts at 1) or as torch does, AdamW, or SGD with
    Nesterov momentum. (timm: --opt)"""
    lr: float | None = option(None, 1e-9, 1e3)
    """Peak learning rate. Default: 0.064 (RMSprop), 0.1 (SGD) or 0.001 (AdamW) x images a step / 256."""
    momentum: float = option(0.9, 0, 0.9999)
    """Momentum of RMSprop and SGD."""
    betas: tuple[float, float] = option((0.9, 0.999), 0, 0.999999)
    """AdamW's decays of the gradient's and its square's running means. (timm: --opt-betas)"""
    rmsprop_decay: float = option(0.9, 0, 0.99999)
    """Decay of RMSprop's running mean of squared gradients."""
    rmsprop_eps: float = option(1e-3, 1e-12, 1)
    """RMSprop's epsilon."""
    weight_decay: float = option(1e-5, 0, 10)
    """Decay of convolution and linear weights; none on batch norm and biases. An L2 penalty, and AdamW's own form."""
    layer_decay: float = option(1.0, 1e-3, 1)
    """Each layer (stem, blocks, head) learns at this times the rate of the layer above it."""
    freeze_stages: int = option(0, 0, len(EFFICIENTNET.stages))
    """Leave the stem and the first so many of the seven stages of blocks (2 to 8 in fastnet.summary) as they are, batch
    norm's statistics too."""
    sched: Literal["step", "cosine"] = "step"
    """Learning rate after the warm-up: a staircase, or half a cosine down to --min-lr at the last epoch."""
    warmup_epochs: float = option(5.0, 0, 1e6)
    """Epochs of linear warm-up."""
    warmup_lr: float = option(0.0, 0, 1e3)
    """Learning rate from which the warm-up starts."""
    min_lr: float = option(0.0, 0, 1e3)
    """The learning rate never falls below this after the warm-up."""
    lr_decay: float = option(0.96, 1e-6, 1)
    """--sched step multiplies the learning rate by this every --decay-epochs epochs. (timm: --decay-rate)"""
    decay_epochs: float = option(8.0, 1e-3, 1e6)
    """Epochs between two decays."""
    label_smoothing: float = option(0.1, 0, 0.999)
    """Label smoothing of the cross-entropy. (timm: --smoothing)"""
    balance: Literal["none", "sampler", "loss"] = "none"
    """For classes of unequal size: sampler draws a class's images as often as the root of their number, loss weighs
    each image by the inverse of it."""
    clip_grad_norm: float = option(5.0, 0, 1e9)
    """Largest gradient norm; 0 switches clipping off. (timm: --clip-grad)"""


@dataclass(frozen=True)
class MixOptions:
    mixup: float = option(0.0, 0, 1e3)
    """Mixup: images and labels of a batch are mixed in a share drawn from Beta(this, this); 0 is off."""
    cutmix: float = option(0.0, 0, 1e3)
    """Cutmix: a box is pasted from another image, its area drawn from Beta(this, this); 0 is off."""
    mixup_prob: float = option(1.0, 0, 1)
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: float = option(0.5, 0, 1)
    """Probability of cutmix where both are on."""

    @property
    def enabled(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class EmaOptions:
    model_ema: bool = False
    """Keep an exponential moving average of the weights, and evaluate it too; the better of both is kept as best."""
    model_ema_decay: float = option(0.9998, 0, 1)
    """Decay of the average with each update."""
    model_ema_warmup: bool = False
    """Let the decay rise from 0 as 1 - (1 + updates)^(-2/3): for runs that are short for --model-ema-decay."""


@dataclass(frozen=True)
class ProgressiveOptions:
    progressive: int = option(0, 0, 8)
    """Grow the training resolution in so many equal stages of the epochs (EfficientNetV2); 0: --resolution always."""
    progressive_start: int | None = option(None, 32, 4096)
    """Resolution of the first stage. Default: half of --resolution."""


@dataclass(frozen=True)
class RunOptions:
    out: str | None = option(None, changeable=True)
    """Folder of the run; with several nodes one that all share. Default: runs/<variant>-<resolution>-<date>."""
    resume: str | None = option(None, changeable=True)
    """Continue a run: its folder, or 'auto' for --out (without --out: the newest in runs/) if it holds a checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = option("auto", changeable=True)
    """Where to train; auto takes CUDA if there is a GPU that torch can use, and says why if it cannot."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision. fp16 scales the loss; auto is bf16 on a GPU, fp16 on one below compute capability 8.0, and on
    a CPU bf16 or off, whichever was measured to train faster there (off with --kernels torch)."""
    compile: Literal["off", "regional", "whole"] = option("off", changeable=True)
    """torch.compile. A bare --compile means regional (each kind of block once, shared by its repeats); whole is one
    graph."""
    tune: Literal["on", "off", "again"] = option("on", changeable=True)
    """Before the first step of each kind of batch: check each block's kernels and measure what is fastest here, or
    read what earlier runs measured (on); believe predictions, falling back only where a kernel can't be run (off);
    measure anew (again)."""
    seed: int = option(0, 0, 2**63 - 1)
    """Decides initial weights, order, augmentation, dropout and drop-connect."""
    deterministic: bool = False
    """Only deterministic algorithms: the same seed gives the same bits, at some cost in speed."""
    cuda_graph: Literal["auto", "on", "off"] = option("auto", changeable=True)
    """Replay each step as one CUDA graph: forward, loss, backward, the gradients' all-reduce between GPUs, clipping,
    optimizer and average. auto: on CUDA, where the step can be recorded, in every process or in none."""
    save_every: int = option(0, 0, 1e9, changeable=True)
    """Also write a checkpoint every so many steps; 0: at the end of each epoch only."""
    best_by: BestBy = "top1"
    """What makes an epoch the best: top-1, the mean F1 of the classes, or the loss. (timm: --eval-metric)"""
    patience: int = option(0, 0, 1e6)
    """Stop when so many epochs in turn brought nothing better; 0: never."""
    checkpoint_hist: int = option(1, 1, 1e6, changeable=True)
    """Keep the weights of so many best epochs: best.safetensors, and with 2 or more checkpoint-<epoch>.safetensors."""
    log_every: int = option(20, 1, 1e9, changeable=True)
    """Steps between two log lines, and between two looks at whether the loss is still finite. (timm: --log-interval)"""
    profile: bool = option(False, changeable=True)
    """Record some steps after the first ones: a table of where their time goes (input, forward, backward, update, the
    longest kernels), and profile.json.gz in the run's folder, a trace that ui.perfetto.dev opens."""
    tensorboard: bool = option(False, changeable=True)
    """Also write the metrics for TensorBoard, into the run's folder."""
    wandb: bool = option(False, changeable=True)
    """Also send the metrics to Weights & Biases. (timm: --log-wandb)"""
    wandb_project: str = option("fastnet", changeable=True)
    """Project of --wandb."""
    sync_bn: bool = False
    """Under torchrun: batch norm normalises over the images of all processes. Otherwise each over its own, and the
    running statistics are those of process 0."""
    reestimate_bn: int = option(0, 0, 1e6)
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
        for name, value, low, high in bounded(self):
            if not low <= value <= high:
                raise UserError(f"--{flag_name(name)} {value} must lie between {low:g} and {high:g}.", exit_status=2)
        if self.optimizer.batch_size == 1:
            raise UserError("--batch-size 1 must be 2 or more, or auto.", exit_status=2)
        largest = self.model.resolution or 4096
        if (start := self.progressive.progressive_start) is not None and start > largest:
            raise UserError(f"--progressive-start {start} must lie between 32 and {largest}.", exit_status=2)
        if self.data.folds and not 2 <= self.data.folds <= 100:
            raise UserError(f"--folds {self.data.folds} must lie between 2 and 100.", exit_status=2)
        if not 0 <= self.data.fold <= (most := max(0, self.data.folds - 1)):
            raise UserError(f"--fold {self.data.fold} must lie between 0 and {most}.", exit_status=2)
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
    return torchrun_number("WORLD_SIZE", 1)


def flag_types() -> dict[str, Any]:
    """Every flag of the command line, with the type of what it takes."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(TrainConfig).items():
        each = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {name: hint}
        found |= {"--" + flag.replace("_", "-"): kind for flag, kind in each.items()}
    return found


def flag_name(name: str) -> str:
    """A field's name as it stands behind the two dashes."""
    return name.replace("_", "-")


def changeable() -> set[str]:
    """The fields that may change when a run is continued; all others decide what it computes."""
    loading = {each.name for each in dataclasses.fields(DaliOptions)}
    return loading | {each.name for _, each in _fields(TrainConfig()) if each.metadata.get("changeable")}


def bounded(config: TrainConfig) -> Iterator[tuple[str, float, float, float]]:
    """(name, value, low, high) of each number that has bounds and is given; of several numbers, of each."""
    for options, declared in _fields(config):
        low, high = declared.metadata.get("bounds", (None, None))
        value = getattr(options, declared.name)
        if low is not None and value is not None:
            for number in value if isinstance(value, tuple) else (value,):
                yield declared.name, number, low, high


def _fields(config: TrainConfig) -> Iterator[tuple[Any, dataclasses.Field[Any]]]:
    """Every option's field, and the object that holds it."""
    for group in dataclasses.fields(config):
        options = getattr(config, group.name)
        if dataclasses.is_dataclass(options):
            yield from ((options, each) for each in dataclasses.fields(options))


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
        min_steps=10,
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
