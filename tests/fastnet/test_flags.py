"""timm's and torchvision's flags on our command line: as ours, or named with what there is instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastnet.config import TrainConfig, flag_types
from fastnet.errors import UserError
from fastnet.flags import DONE_ANYWAY, ELSEWHERE, SAME, translated, without_effect
from fastnet.train import parse_arguments

# `add_argument` of train.py of timm 1.0.20 and of torchvision 0.24's references/classification/train.py.
TIMM = """
--data-dir --dataset --train-split --val-split --train-num-samples --val-num-samples --dataset-download
--dataset-trust-remote-code --class-map --input-img-mode --input-key --target-key --model --pretrained
--pretrained-path --initial-checkpoint --resume --no-resume-opt --num-classes --gp --img-size --in-chans --input-size
--crop-pct --mean --std --interpolation -b --batch-size -vb --validation-batch-size --channels-last --fuser
--grad-accum-steps --grad-checkpointing --fast-norm --model-kwargs --head-init-scale --head-init-bias
--torchcompile-mode --torchscript --torchcompile --device --amp --amp-dtype --amp-impl --model-dtype --no-ddp-bb
--synchronize-step --local_rank --device-modules --opt --opt-eps --opt-betas --momentum --weight-decay --clip-grad
--clip-mode --layer-decay --layer-decay-min-scale --layer-decay-no-opt-scale --opt-kwargs --sched --sched-on-updates
--lr --lr-base --lr-base-size --lr-base-scale --lr-noise --lr-noise-pct --lr-noise-std --lr-cycle-mul --lr-cycle-decay
--lr-cycle-limit --lr-k-decay --warmup-lr --min-lr --epochs --epoch-repeats --start-epoch --decay-milestones
--decay-epochs --warmup-epochs --warmup-prefix --cooldown-epochs --patience-epochs --decay-rate --dr --no-aug
--train-crop-mode --scale --ratio --hflip --vflip --color-jitter --color-jitter-prob --grayscale-prob
--gaussian-blur-prob --aa --aug-repeats --aug-splits --jsd-loss --bce-loss --bce-sum --bce-target-thresh
--bce-pos-weight --reprob --remode --recount --resplit --mixup --cutmix --cutmix-minmax --mixup-prob
--mixup-switch-prob --mixup-mode --mixup-off-epoch --smoothing --train-interpolation --drop --drop-connect --drop-path
--drop-block --bn-momentum --bn-eps --sync-bn --dist-bn --split-bn --model-ema --model-ema-force-cpu --model-ema-decay
--model-ema-warmup --seed --worker-seeding --log-interval --recovery-interval --checkpoint-hist -j --workers
--save-images --pin-mem --no-prefetcher --output --experiment --eval-metric --tta --use-multi-epochs-loader --log-wandb
--wandb-project --wandb-tags --wandb-resume-id --config -c --kd-model-name --kd-distill-type --kd-loss-type
--distill-loss-weight --task-loss-weight --kd-temperature
"""
TORCHVISION = """
--data-path --model --device -b --batch-size --epochs -j --workers --opt --lr --momentum --wd --weight-decay
--norm-weight-decay --bias-weight-decay --transformer-embedding-decay --label-smoothing --mixup-alpha --cutmix-alpha
--lr-scheduler --lr-warmup-epochs --lr-warmup-method --lr-warmup-decay --lr-step-size --lr-gamma --lr-min --print-freq
--output-dir --resume --start-epoch --cache-dataset --sync-bn --test-only --auto-augment --ra-magnitude
--augmix-severity --random-erase --amp --world-size --dist-url --model-ema --model-ema-steps --model-ema-decay
--use-deterministic-algorithms --interpolation --val-resize-size --val-crop-size --train-crop-size --clip-grad-norm
--ra-sampler --ra-reps --weights --backend --use-v2
"""


def parsed(line: str) -> TrainConfig:
    return parse_arguments(line.split())


@pytest.mark.parametrize("theirs", [TIMM, TORCHVISION], ids=["timm", "torchvision"])
def test_every_flag_of_theirs_is_taken_or_answered(theirs: str) -> None:
    ours = flag_types()
    mute = [flag for flag in theirs.split() if not {flag, SAME.get(flag)} & {*ours, *DONE_ANYWAY, *ELSEWHERE}]
    assert mute == []
    assert [name for name in SAME.values() if name not in ours] == []
    assert [name for name in ELSEWHERE if name in ours or name in SAME] == []


def test_a_line_of_timms_train_py_means_the_same(tmp_path: Path) -> None:
    theirs = (
        f"{tmp_path} --model efficientnet_b1 --pretrained --img-size 128 -b 32 -j 2 --amp --output out "
        "--sched cosine --channels-last --pin-mem --no-prefetcher --mean 0.5 0.5 0.5 --num-classes 5"
    )
    ours = (
        f"--data {tmp_path} --variant b1 --pretrained imagenet --resolution 128 --batch-size 32 --workers 2 --amp auto "
        "--out out --sched cosine --mean 0.5 0.5 0.5 --num-classes 5"
    )
    assert parse_arguments(theirs.split()) == parse_arguments(ours.split())
    last = ["--model", "b1", "--model-ema", str(tmp_path)]
    assert parse_arguments(last) == parse_arguments(["--data", str(tmp_path), "--variant", "b1", "--model-ema"])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            "--model tf_efficientnet_b0.ap_in1k --pretrained",
            "--variant b0 --pretrained timm/tf_efficientnet_b0.ap_in1k",
        ),
        ("--pretrained --model efficientnet_b2.ra_in1k", "--pretrained timm/efficientnet_b2.ra_in1k --variant b2"),
        ("--model tf_efficientnet_lite0", "--variant lite0 --padding same"),
        ("--amp-dtype bfloat16", "--amp bf16"),
        ("--torchcompile --model b0", "--compile whole --variant b0"),
        ("--lr-scheduler=cosineannealinglr --lr-min=0.1", "--sched=cosine --min-lr=0.1"),
    ],
)
def test_values_are_translated_too(theirs: str, ours: str) -> None:
    assert translated(theirs.split(), flag_types()) == ours.split()


def test_what_has_no_equal_is_answered_in_a_line_each() -> None:
    with pytest.raises(UserError) as caught:
        parsed("--data x --aa rand-m9 --split-bn --jsd-loss --vflip 0.5 --train_split train")
    assert caught.value.exit_status == 2
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["--aa", "--jsd-loss", "--vflip", "--train_split"]
    assert "--rand-augment-ops 2" in lines[0]


def test_flags_without_effect_are_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parsed("--data x --progressive-start 64 --model-ema-decay 0.9 --decay-epochs=2 --sched cosine")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for words in ("--progressive-start without --progressive", "--model-ema-decay", "--decay-epochs with --sched"):
        assert words in said
    config = parsed("--data x --progressive 2 --progressive-start 64 --betas 0.8 0.9 --optimizer adamw")
    assert capsys.readouterr().err == ""
    assert without_effect(config, ["--lr", "--betas"]) == []
