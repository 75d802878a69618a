"""The flags of timm's train.py (1.0) and of torchvision's references/classification/train.py (0.29), as ours.

Those that mean the same are taken; of the others each has a line that names the counterpart, or says why there is none.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import get_args, get_origin

from fastnet.config import TrainConfig, processes
from fastnet.errors import UserError

SAME = {
    # timm
    "--data-dir": "--data",
    "--model": "--variant",
    "--img-size": "--resolution",
    "-b": "--batch-size",
    "-j": "--workers",
    "--initial-checkpoint": "--pretrained",
    "--output": "--out",
    "--opt": "--optimizer",
    "--opt-betas": "--betas",
    "--opt-eps": "--rmsprop-eps",
    "--decay-rate": "--lr-decay",
    "--dr": "--lr-decay",
    "--smoothing": "--label-smoothing",
    "--clip-grad": "--clip-grad-norm",
    "--drop": "--dropout",
    "--drop-path": "--drop-connect-rate",
    "--drop-connect": "--drop-connect-rate",
    "--crop-pct": "--crop-fraction",
    "--reprob": "--random-erasing",
    "--log-interval": "--log-every",
    "--recovery-interval": "--save-every",
    "--log-wandb": "--wandb",
    "--eval-metric": "--best-by",
    "--amp-dtype": "--amp",
    "--torchcompile": "--compile",
    # torchvision
    "--data-path": "--data",
    "--weights": "--pretrained",
    "--wd": "--weight-decay",
    "--mixup-alpha": "--mixup",
    "--cutmix-alpha": "--cutmix",
    "--lr-scheduler": "--sched",
    "--lr-warmup-epochs": "--warmup-epochs",
    "--lr-step-size": "--decay-epochs",
    "--lr-gamma": "--lr-decay",
    "--lr-min": "--min-lr",
    "--print-freq": "--log-every",
    "--output-dir": "--out",
    "--train-crop-size": "--resolution",
    "--random-erase": "--random-erasing",
    "--ra-magnitude": "--rand-augment-magnitude",
    "--use-deterministic-algorithms": "--deterministic",
}
"""Their name -> ours, with the same meaning."""

VALUES = {
    "--amp": {"bfloat16": "bf16", "float16": "fp16"},
    "--sched": {"steplr": "step", "cosineannealinglr": "cosine"},
    "--compile": {"inductor": "whole"},
    "--optimizer": {"rmsproptf": "rmsprop_tf", "nesterov": "sgd"},
    "--batch-size": {"auto": "0"},
    "--mean": {},
}
"""Our flag -> their value, or its name, -> ours."""

BARE = {"--compile": "regional", "--amp": "auto", "--pretrained": "imagenet"}
"""Flags of ours that may stand without their value, which then is this."""

DONE_ANYWAY = {
    "--channels-last": 0,
    "--pin-mem": 0,
    "--native-amp": 0,
    "--no-prefetcher": 0,
    "--use-v2": 0,
    "--fuser": 1,
    "--fast-norm": 0,
    "--split-bn": 0,
    "--local-rank": 1,
    "--local_rank": 1,
}
"""Flags that ask for what happens here anyway, or that change nothing that is learnt, and how many values they have."""

_DATASET = "a data set is named by its folder, its .csv, its shards or its Hugging Face folder: --data"
_SPLITS = "splits are found by their folders' names (train, val, valid, validation, test), or drawn: --val-fraction"
_DECAY = "batch norm and biases have no weight decay here, and all else has --weight-decay"
_NETWORK = "EfficientNet's variants are --variant b0 to b7 and lite0 to lite4, with --dropout, --padding and --scaling"
_NORM = "batch norm's epsilon and momentum come with --pretrained weights, and are the paper's otherwise"
_PLATEAU = "--sched is step or cosine, with --lr-decay and --decay-epochs; to stop early there is --patience"
_ONE_CYCLE = "the cosine here is one half period (--sched cosine), continued by a new run from the best weights"
_NOISE = "no noise is added to the rate"
_MIX = "mixing is one draw a batch: --mixup, --cutmix, --mixup-prob, --mixup-switch-prob"
_SPLIT_BATCH = "there are no augmentation splits, hence no JSD loss and no split batch norm"
_LAUNCH = "torchrun says how many processes there are: torchrun --nproc-per-node N -m fastnet.train …"
_EMA = "the average moves with each step, on the model's device: --model-ema, --model-ema-decay, --model-ema-warmup"
_JIT = "torch.jit is deprecated: --compile"
_DISTILL = "there is no distillation here"
_ERASE = "one rectangle of a random colour is erased, with the probability --random-erasing"
_CROP = "training crops have a random area and ratio (--scale, --ratio), and a flip with --hflip"
_EVALUATE = "python -m fastnet.evaluate RUN says it of a run's weights"
_KEEP = "config.json in the run's folder holds the run's settings, and --resume RUN reads them"

ELSEWHERE = {
    # timm: data
    "--dataset": _DATASET,
    "--train-split": _SPLITS,
    "--val-split": _SPLITS,
    "--train-num-samples": "an epoch is all images",
    "--val-num-samples": "validation is on all images",
    "--dataset-download": "python -m data_pipeline prepare downloads Food-101",
    "--dataset-trust-remote-code": "no code of a data set is run",
    "--class-map": "classes are the folders' names in their order, or the labels of a .csv",
    "--input-img-mode": "pictures are read as RGB",
    "--input-key": "the columns of a table or of a Hugging Face data set are found by their names",
    "--target-key": "the columns of a table or of a Hugging Face data set are found by their names",
    # timm: model
    "--pretrained-path": "--pretrained FILE",
    "--gp": "the head pools the mean, as published",
    "--in-chans": "pictures are read as RGB",
    "--input-size": "images are square: --resolution",
    "--model-kwargs": _NETWORK,
    "--head-init-scale": "a new classifier starts as the paper's does",
    "--head-init-bias": "a new classifier starts as the paper's does",
    "--bn-momentum": _NORM,
    "--bn-eps": _NORM,
    "--drop-block": "DropBlock is not EfficientNet's: --drop-connect-rate",
    "--grad-checkpointing": "the kernels keep four raw tensors a block; for less memory --grad-accum-steps",
    "--torchscript": _JIT,
    "--torchcompile-mode": "--compile and --cuda-graph together do what reduce-overhead does",
    "--model-dtype": "parameters are fp32; --amp is the precision of the arithmetic",
    "--amp-impl": "--amp is torch's own",
    "--no-ddp-bb": "buffers are rank 0's, by design",
    "--synchronize-step": "nothing waits for the device between steps; --profile shows where time goes",
    "--device-modules": "devices are a CPU or CUDA: --device",
    "--validation-batch-size": "validation uses --batch-size",
    "-vb": "validation uses --batch-size",
    "--vb": "validation uses --batch-size",
    # timm: optimizer and schedule
    "--lr-base": "--lr is the rate itself; without it, it is in proportion to the images of a step",
    "--lr-base-size": "--lr is the rate itself; without it, it is in proportion to the images of a step",
    "--lr-base-scale": "--lr is the rate itself; without it, it is in proportion to the images of a step",
    "--clip-mode": "gradients are clipped by their norm: --clip-grad-norm",
    "--layer-decay-min-scale": "--layer-decay has no lower limit",
    "--layer-decay-no-opt-scale": "--freeze-stages leaves the first stages as they are",
    "--opt-kwargs": "--optimizer, --momentum, --betas, --rmsprop-decay and --rmsprop-eps",
    "--sched-on-updates": "the rate changes with each step anyway",
    "--lr-noise": _NOISE,
    "--lr-noise-pct": _NOISE,
    "--lr-noise-std": _NOISE,
    "--lr-cycle-mul": _ONE_CYCLE,
    "--lr-cycle-decay": _ONE_CYCLE,
    "--lr-cycle-limit": _ONE_CYCLE,
    "--lr-k-decay": _ONE_CYCLE,
    "--cooldown-epochs": _ONE_CYCLE,
    "--epoch-repeats": "give --epochs as many as you want",
    "--start-epoch": "--resume RUN goes on where the run stopped",
    "--decay-milestones": "--sched step decays every --decay-epochs",
    "--warmup-prefix": "the warm-up is part of --epochs",
    "--patience-epochs": _PLATEAU,
    "--no-resume-opt": "--pretrained RUN starts from a run's weights alone",
    # timm: augmentation
    "--no-aug": "--scale 1 1 --ratio 1 1 --hflip 0 --brightness 0 --contrast 0 --saturation 0 --hue 0",
    "--train-crop-mode": _CROP,
    "--vflip": _CROP,
    "--color-jitter": "--brightness, --contrast and --saturation, each by itself, and --hue in degrees",
    "--color-jitter-prob": "every image's colours change, by --brightness, --contrast, --saturation and --hue",
    "--grayscale-prob": "--saturation up to 1",
    "--gaussian-blur-prob": "there is no blur",
    "--aa": "--rand-augment-ops 2 and --rand-augment-magnitude (timm's m9 is 27)",
    "--aug-repeats": "each image is drawn once an epoch",
    "--aug-splits": _SPLIT_BATCH,
    "--jsd-loss": _SPLIT_BATCH,
    "--bce-loss": "the loss is cross-entropy with --label-smoothing",
    "--bce-sum": "the loss is cross-entropy with --label-smoothing",
    "--bce-target-thresh": "the loss is cross-entropy with --label-smoothing",
    "--bce-pos-weight": "the loss is cross-entropy; for lopsided classes --balance loss",
    "--remode": _ERASE,
    "--recount": _ERASE,
    "--resplit": _ERASE,
    "--train-interpolation": "training crops are resized bilinearly; --interpolation is validation's",
    "--cutmix-minmax": _MIX,
    "--mixup-mode": _MIX,
    "--mixup-off-epoch": _MIX,
    # timm: the rest
    "--dist-bn": "running statistics are rank 0's, or with --sync-bn those of all",
    "--worker-seeding": "what is drawn is a function of --seed, the epoch and the image, whatever the workers",
    "--save-images": "python -m fastnet.evaluate RUN makes a report with pictures",
    "--experiment": "--out names the run's folder",
    "--tta": "python -m fastnet.evaluate RUN --tta hflip",
    "--use-multi-epochs-loader": "loaders live as long as the run",
    "--config": _KEEP,
    "-c": _KEEP,
    "--model-ema-force-cpu": _EMA,
    "--kd-model-name": _DISTILL,
    "--kd-distill-type": _DISTILL,
    "--kd-loss-type": _DISTILL,
    "--distill-loss-weight": _DISTILL,
    "--task-loss-weight": _DISTILL,
    "--kd-temperature": _DISTILL,
    "--wandb-resume-id": "--resume RUN goes on in the same place of Weights & Biases",
    "--wandb-tags": "tag it on the page of --wandb-project",
    # torchvision
    "--norm-weight-decay": _DECAY,
    "--bias-weight-decay": _DECAY,
    "--transformer-embedding-decay": _DECAY,
    "--lr-warmup-method": "the warm-up is linear, from --warmup-lr",
    "--lr-warmup-decay": "the warm-up is linear, from --warmup-lr, a rate",
    "--lr-power": "--sched is step or cosine",
    "--cache-dataset": "the index is remembered anyway; --cache keeps decoded photos",
    "--test-only": _EVALUATE,
    "--auto-augment": "--rand-augment-ops 2 is RandAugment; AutoAugment and AugMix are not here",
    "--augmix-severity": "AugMix is not here: --rand-augment-ops",
    "--world-size": _LAUNCH,
    "--dist-url": _LAUNCH,
    "--model-ema-steps": _EMA,
    "--val-resize-size": "--crop-fraction is the crop's share of the short side: 224 of 256 are 0.875",
    "--val-crop-size": "validation is at --resolution, as training is",
    "--ra-sampler": "each image is drawn once an epoch",
    "--ra-reps": "each image is drawn once an epoch",
    "--backend": "--loader dali or torch",
}
"""Their flag -> what there is here instead."""


def translated(arguments: list[str], ours: Mapping[str, object]) -> list[str]:
    """A command line with the others' names of flags and values replaced by ours, a folder in front or at the end as
    --data, and flags that may stand bare completed. ours: our flags, with the type of what each takes.

    Raises UserError, with a line for each, where there are flags that have no equal here.
    """
    words = list(arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--data")
    unknown: list[str] = []
    found: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("-"):
            last = position == len(words) and os.path.exists(word) and "--data" not in found
            found += ["--data", word] if last else [word]
            continue
        name, equals, value = word.partition("=")
        name = name if name in SAME else name.replace("_", "-")
        name = SAME.get(name, name)
        if name in DONE_ANYWAY and name not in ours:
            position += 0 if equals else DONE_ANYWAY[name]
            continue
        if name in ELSEWHERE and name not in ours:
            unknown.append(f"{word.partition('=')[0]}: {ELSEWHERE[name]}.")
            continue
        following = words[position] if position < len(words) else "-"
        if equals:
            found.append(f"{name}={_value(name, value)}")
            continue
        found.append(name)
        if name in BARE and (following.startswith("-") or not _may_follow(ours.get(name), following)):
            found.append("whole" if word == "--torchcompile" else BARE[name])
            continue
        for _ in range(_count(ours.get(name))):
            if position < len(words) and not words[position].startswith("--"):
                found.append(_value(name, words[position]))
                position += 1
    if unknown:
        raise UserError("\n".join(dict.fromkeys(unknown)), exit_status=2)
    return _named_model(found)


def without_effect(config: TrainConfig, given: Collection[str]) -> list[str]:
    """The flags of `given` that change nothing beside the others, each with the reason."""
    optimizer, mix, run = config.optimizer, config.mix, config.run
    rmsprop = optimizer.optimizer.startswith("rmsprop")
    idle: list[tuple[bool, str, str]] = [
        (config.progressive.progressive < 2, "--progressive-start", "without --progressive"),
        (not config.ema.model_ema, "--model-ema-decay --model-ema-warmup", "without --model-ema"),
        (optimizer.sched == "cosine", "--decay-epochs --lr-decay", "with --sched cosine"),
        (optimizer.warmup_epochs == 0, "--warmup-lr", "with --warmup-epochs 0"),
        (optimizer.optimizer == "adamw", "--momentum", "with --optimizer adamw"),
        (optimizer.optimizer != "adamw", "--betas", "without --optimizer adamw"),
        (not rmsprop, "--rmsprop-decay --rmsprop-eps", f"with --optimizer {optimizer.optimizer}"),
        (not mix.enabled, "--mixup-prob --mixup-switch-prob", "without --mixup or --cutmix"),
        (
            mix.enabled and not (mix.mixup and mix.cutmix),
            "--mixup-switch-prob",
            "unless both --mixup and --cutmix are on",
        ),
        (config.augment.rand_augment_ops == 0, "--rand-augment-magnitude", "without --rand-augment-ops"),
        (config.data.cache == "none", "--cache-side", "without --cache"),
        (config.data.loader == "torch", "--dali-prefetch --dali-decode --dali-engine-share", "with --loader torch"),
        (not run.wandb, "--wandb-project", "without --wandb"),
        (config.model.kernels != "auto", "--tune", f"with --kernels {config.model.kernels}"),
        (config.model.pretrained is not None, "--padding", "with --pretrained, which brings its own"),
        (processes() == 1, "--sync-bn", "in one process"),
    ]
    return [f"{flag} {why}" for true, flags, why in idle if true for flag in flags.split() if flag in given]


def _value(flag: str, value: str) -> str:
    return VALUES.get(flag, {}).get(value, value)


def _may_follow(hint: object, word: str) -> bool:
    """Whether a word can be the value of a flag that may also stand bare."""
    choices = get_args(hint)
    theirs = {"bfloat16", "float16", "inductor"}
    return word in choices or word in theirs if get_origin(hint) is not None and str in map(type, choices) else True


def _count(hint: object) -> int:
    """How many words a flag takes."""
    if hint is bool or hint is None:
        return 0
    parts = [part for part in (hint, *get_args(hint)) if get_origin(part) is tuple]
    return len(get_args(parts[0])) if parts else 1


def _named_model(words: list[str]) -> list[str]:
    """timm's full name of a model also says whose weights a bare --pretrained means, and how convolutions pad."""
    if "--variant" not in words[:-1]:
        return words
    at = words.index("--variant") + 1
    name, _, tag = words[at].removeprefix("timm/").partition(".")
    tf = name.startswith("tf_efficientnet_")
    words[at] = name.removeprefix("tf_").removeprefix("efficientnet_")
    if "--pretrained" in words:
        given = words.index("--pretrained") + 1
        if words[given] == BARE["--pretrained"] and (tf or tag):
            words[given] = "timm/" + ".".join(filter(None, (name, tag)))
    elif tf and "--padding" not in words:
        words += ["--padding", "same"]
    return words
