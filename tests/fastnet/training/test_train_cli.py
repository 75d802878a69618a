"""The command line: quick to answer, grouped, and one sentence for each mistake."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastnet.config import FOOD101, QUICK, RECIPES
from fastnet.config_file import config_from_dict, read_config
from fastnet.errors import UserError, run_command
from fastnet.train import parse_arguments, resolve_config, run_folder


def saved_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(QUICK.to_json())
    (folder / "last.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("arguments", "meaning"),
    [
        ([], "off"),
        (["--compile"], "regional"),
        (["--compile", "--variant", "b1"], "regional"),
        (["--compile", "whole"], "whole"),
        (["--variant", "b1", "--compile"], "regional"),
    ],
)
def test_compile_may_stand_bare(arguments: list[str], meaning: str) -> None:
    assert parse_arguments(arguments).run.compile == meaning


def test_flags_are_flat_and_reach_their_place() -> None:
    config = parse_arguments(
        ["--variant", "b3", "--lr", "0.5", "--data", "x", "--amp", "bf16", "--hue", "9", "--loader", "torch"]
    )
    assert config.model.variant == "b3"
    assert config.peak_lr() == 0.5
    assert config.data.data == os.path.abspath("x")  # the run can be continued from any folder
    assert config.run.amp == "bf16"
    assert config.augment.hue == 9
    assert config.data.loader == "torch"


def test_the_recipe_gives_the_defaults_and_flags_win() -> None:
    assert parse_arguments(["--recipe", "quick"]) == QUICK
    assert parse_arguments(["--recipe", "finetune", "--lr", "0.1"]).peak_lr() == 0.1
    assert parse_arguments(["--recipe", "finetune"]).ema.model_ema
    assert parse_arguments(["--recipe", "quick", "--epochs", "3"]).optimizer.epochs == 3
    assert parse_arguments([]) == FOOD101


def test_the_default_learning_rate_follows_the_batch() -> None:
    assert parse_arguments(["--batch-size", "512"]).peak_lr() == pytest.approx(0.128)
    assert parse_arguments(["--batch-size", "128", "--grad-accum-steps", "4"]).peak_lr() == pytest.approx(0.128)
    assert parse_arguments(["--batch-size", "256", "--optimizer", "sgd"]).peak_lr() == pytest.approx(0.1)
    assert parse_arguments(["--batch-size", "256", "--optimizer", "adamw"]).peak_lr() == pytest.approx(0.001)


def test_a_user_of_timm_may_type_timms_names() -> None:
    theirs = "--opt adamw --opt-betas 0.8 0.9 --drop 0.1 --drop-path=0.3 --smoothing 0 --clip-grad 2 --decay-rate 0.9"
    ours = (
        "--optimizer adamw --betas 0.8 0.9 --dropout 0.1 --drop-connect-rate=0.3 --label-smoothing 0 "
        "--clip-grad-norm 2 --lr-decay 0.9"
    )
    same = (
        "--mixup 0.2 --cutmix 1 --mixup-prob 0.5 --mixup-switch-prob 0.4 --model-ema --model-ema-decay 0.99 "
        "--model-ema-warmup --grad-accum-steps 2 --sched cosine --min-lr 1e-6 --warmup-lr 1e-5 --warmup-epochs 3 "
        "--layer-decay 0.8 --checkpoint-hist 3 --weight-decay 0.1 --momentum 0.8 --epochs 3 --batch-size 8 --seed 4"
    )
    config = parse_arguments(f"{theirs} {same}".split())
    assert config == parse_arguments(f"{ours} {same}".split())
    assert (config.optimizer.betas, config.model.drop_connect_rate) == ((0.8, 0.9), 0.3)


def test_torch_is_not_needed_for_help() -> None:
    code = "import sys; from fastnet.train import parse_arguments\ntry: parse_arguments(['--help'])\n" + (
        "except SystemExit as e: assert e.code == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for group in ("model options", "data options", "augment options", "optimizer options", "run options"):
        assert group in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "--epochs 0 must lie between"),
        (["--resolution", "8"], "--resolution 8 must lie between"),
        (["--label-smoothing", "1"], "--label-smoothing"),
        (["--recipe", "finetune"], "--recipe finetune needs weights: add --pretrained imagenet"),
        (["--mixup-prob", "2"], "--mixup-prob 2.0 must lie between"),
        (["--layer-decay", "1.5"], "--layer-decay"),
        (["--freeze-stages", "8"], "--freeze-stages 8 must lie between 0 and 7"),
        (["--betas", "0.9", "1"], "--betas"),
        (["--resolution", "96", "--progressive-start", "128"], "--progressive-start 128 must lie between 32 and 96"),
        (["--weights-style", "timm"], "--weights-style needs --pretrained"),
    ],
)
def test_values_out_of_range(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        parse_arguments(arguments).validate()
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [["--variant", "b9"], ["--nonsense"], ["--epochs", "many"]])
def test_words_that_do_not_parse_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES)
def test_config_survives_json(recipe: str) -> None:
    config = RECIPES[recipe]
    assert config_from_dict(json.loads(config.to_json()), Path("x")) == config


def test_a_setting_from_a_newer_version_is_named(tmp_path: Path) -> None:
    values = dataclasses.asdict(FOOD101)
    values["model"]["flux"] = 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="flux"):
        read_config(tmp_path / "config.json")


def test_resume_takes_the_runs_settings_and_lets_some_change(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run")
    config = parse_arguments(["--resume", str(run), "--epochs", "20"])
    assert config.optimizer == dataclasses.replace(QUICK.optimizer, epochs=20)
    assert config.model == QUICK.model
    assert run_folder(config) == run
    with pytest.raises(UserError, match="--batch-size 7 differs from the 32") as caught:
        parse_arguments(["--resume", str(run), "--batch-size", "7"])
    assert caught.value.exit_status == 2
    # The same images in each step: the way out of a GPU's memory.
    smaller = parse_arguments(["--resume", str(run), "--batch-size", "16", "--grad-accum-steps", "2"])
    assert smaller.optimizer.batch_size == 16


def test_resume_auto_means_out_or_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_arguments(["--resume", "auto"]).run.resume is None
    Path("runs").mkdir()
    run = saved_run(Path("runs/a"))
    assert parse_arguments(["--resume", "auto"]).run.resume == str(run)
    assert parse_arguments(["--resume", "auto", "--out", "elsewhere"]).run.resume is None


def test_waiting_threads_sleep_in_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def command() -> int:
        seen.append(os.environ.get("OMP_WAIT_POLICY"))
        return 0

    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if given:
            monkeypatch.setenv("OMP_WAIT_POLICY", given)
        assert run_command(command) == 0
        assert seen[-1] == expected


def test_resume_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint there"):
        parse_arguments(["--resume", str(tmp_path)])


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):
        run_folder(parse_arguments(["--out", str(run)]))


def test_no_data_is_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.dataset.download import prepared, remember

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(UserError, match="--data is missing: name a folder") as caught:
        resolve_config()
    assert caught.value.exit_status == 2
    food = tmp_path / "data" / "food-101"
    (food / "meta").mkdir(parents=True)
    remember(food)
    assert resolve_config()[0].data.data == str(food)
    monkeypatch.setattr(sys, "argv", ["train", "--recipe", "finetune", "--pretrained", "imagenet"])
    with pytest.raises(UserError, match="--data is missing"):
        resolve_config()
    (food / "meta").rmdir()
    assert prepared() is None
    monkeypatch.setattr(sys, "argv", ["train", "--recipe", "quick"])
    assert resolve_config()[0].data.data == "sample"
