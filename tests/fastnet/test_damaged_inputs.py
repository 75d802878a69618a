"""Damaged weights, checkpoints, configurations, metrics and lists cost one sentence that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline import DataError, build_index
from data_pipeline.__main__ import main as data_main
from fastnet.config import FOOD101
from fastnet.config_file import read_config
from fastnet.errors import UserError
from fastnet.loading.checkpoint import load_checkpoint
from fastnet.loading.weights import load_weights, save_weights
from fastnet.model import EfficientNet, ModelConfig
from fastnet.training.reporting.curves import read_metrics
from fastnet.training.reporting.metrics import MetricsFile
from fastnet.training.saved import excluded_text, read_run
from tests.sentences import Said, one_sentence, photo

# --- files of ours that are damaged ---------------------------------------------------------------------------------


FOUR = ("pie/1", "pie/2", "soup/1", "soup/2")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few kilobytes."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    model = EfficientNet(ModelConfig(width=0.1, depth=0.1, num_classes=3))
    save_weights(path, model, classes=("a", "b", "c"), resolution=32)
    return path


def changed(path: Path, to: Path, tensors: Callable[[dict[str, Any]], Any], header: Callable[[dict], Any]) -> Path:
    """A copy whose tensors and header went through these."""
    state = load_file(path)
    known = json.loads(path.with_suffix(".json").read_text())
    state, known = tensors(state) or state, header(known) or known
    save_file(state, to, {"fastnet": known if isinstance(known, str) else json.dumps(known)})
    return to


def keep(_: dict) -> None:
    return None


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


CLASSIFIER = "classifier.weight"


@pytest.mark.parametrize(
    ("tensors", "header", "words"),
    [
        (without(CLASSIFIER), keep, r"classifier\.weight .* is missing"),
        (lambda s: s | {"more": torch.zeros(1)}, keep, "it holds more, which"),
        (lambda s: s | {CLASSIFIER: torch.zeros(3, 7)}, keep, r"classifier\.weight has shape \[3, 7\]"),
        (lambda s: s | {CLASSIFIER: s[CLASSIFIER] * torch.nan}, keep, r"classifier\.weight holds values that are not"),
        (keep, lambda h: "{" * 100_000, "damaged"),
        (keep, lambda h: '{"format": 2, "model": ' + "[" * 100_000 + "]" * 100_000 + "}", "damaged"),
        (keep, lambda h: "[]", "damaged"),
        (keep, lambda h: h | {"format": "2"}, "damaged"),
        (keep, lambda h: h | {"model": 7}, "damaged"),
        (keep, lambda h: h | {"model": h["model"] | {"depth": 1e9}}, "depth must be in"),
        (keep, lambda h: h | {"model": h["model"] | {"width": "wide"}}, "width cannot be 'wide'"),
        (keep, lambda h: h | {"model": h["model"] | {"num_classes": 2.5}}, "num_classes cannot be 2.5"),
        (keep, lambda h: h | {"model": h["model"] | {"colour": 1}}, "'colour' is unknown"),
        (keep, lambda h: h | {"classes": ["a"]}, "names 1 classes and tells 3 apart"),
        (keep, lambda h: h | {"classes": {"a": 1}}, "classes or its resolution are damaged"),
    ],
)
def test_damaged_weights(
    weights: Path, tmp_path: Path, tensors: Callable[[dict], Any], header: Callable[[dict], Any], words: str
) -> None:
    path = changed(weights, tmp_path / "w.safetensors", tensors, header)
    with pytest.raises((ValueError, UserError), match=words) as caught:
        load_weights(path)
    assert "w.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fuzzed_weights(weights: Path, tmp_path: Path) -> None:
    """Flipped, cut and inserted bytes, most of them in the header, where they are not only noise in a number."""
    random, whole = np.random.default_rng(0), weights.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    path, refused = tmp_path / "w.safetensors", 0
    for number in range(400):
        content = bytearray(whole)
        for at in random.integers(0, end if number % 4 else len(content), int(random.integers(1, 4))):
            content[at] = int(random.integers(256))
        if number % 7 == 0:
            del content[int(random.integers(len(content))) :]
        path.write_bytes(content)
        for load in (load_weights, load_checkpoint):
            said = refusal(load, path)
            refused += bool(said)
            assert "\n" not in said
            assert not said or "w.safetensors" in said
    assert refused > 200


def refusal(load: Callable[[Path], Any], path: Path) -> str:
    """The sentence, or nothing where the file is good enough."""
    try:
        load(path)
    except (ValueError, UserError) as error:
        return str(error)
    return ""


def test_a_damaged_checkpoint_of_a_run(weights: Path, tmp_path: Path) -> None:
    good = {
        "progress": {"step": 3}, "data_fingerprint": "0a", "images_per_step": 4, "quarantined": [], "metrics_lines": 1,
    }  # fmt: skip
    path = changed(weights, tmp_path / "last.safetensors", keep, lambda h: h | good)
    assert read_run(path)[2]["progress"] == {"step": 3}
    for wrong in (
        {"progress": {"step": "3"}}, {"progress": [3]}, {"progress": {"leap": 3}}, {"classes": None},
        {"resolution": "x"}, {"images_per_step": 4.5}, {"quarantined": [["train"]]}, {"quarantined": "all"},
        {"metrics_lines": "x"},
    ):  # fmt: skip
        path = changed(weights, path, keep, lambda h, wrong=wrong: h | good | wrong)  # type: ignore[misc]
        with pytest.raises(UserError, match=r"last\.safetensors is damaged") as caught:
            read_run(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"7", b"\xff\xfe", b"{" * 100_000, b'{"model": []}', b'{"model": {"variant": 3}}',
        b'{"optimizer": {"epochs": "many"}}', b'{"optimizer": {"betas": [0.9]}}', b'{"run": {"seed": 1.5}}',
        b'{"run": {"deterministic": 1}}', b'{"recipe": null}', b'{"optimizer": {"lr": NaN}}',
        b'{"optimizer": {"batch_size": 0}}',
    ],
)  # fmt: skip
def test_a_damaged_configuration(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is damaged") as caught:
        read_config(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def test_a_configuration_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(FOOD101.to_json())
    assert read_config(tmp_path / "config.json") == FOOD101


def test_metrics_that_a_crash_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n[1]\n"x"\n{"step": null}\n\xff\xfe\n{"kind": "tr')
    assert [line["step"] for line in read_metrics(path) if line["step"] is not None] == [1]
    metrics = MetricsFile(path, 5)
    metrics.write("train", step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("name", ["train.json", "classes.txt", "test.txt"])
@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", b"[" * 100_000])
def test_damaged_metadata(tmp_path: Path, capsys: Said, name: str, content: bytes) -> None:
    for at in ("pie/1", "soup/1"):
        photo(tmp_path / "images" / f"{at}.jpg")
    (tmp_path / "meta").mkdir()
    for split in ("train", "test"):
        (tmp_path / "meta" / f"{split}.txt").write_text("pie/1\nsoup/1")
    (tmp_path / "meta" / name).write_bytes(content)
    if name == "classes.txt" and content.startswith(b"["):
        return  # a class of a strange name
    status = data_main(["verify", "--root", str(tmp_path)])
    assert name.partition(".")[0] in one_sentence(capsys, status)


@pytest.mark.parametrize("name", ["pie/\0", "pie/\ud800"])
@pytest.mark.parametrize("form", ["json", "csv"])
def test_names_in_a_list_that_no_file_can_have(tmp_path: Path, capsys: Said, name: str, form: str) -> None:
    for at in FOUR:
        photo(tmp_path / "images" / f"{at}.jpg")
    if form == "json":
        (tmp_path / "meta").mkdir()
        for split, number in (("train", 1), ("test", 2)):
            listed = {"pie": [f"pie/{number}"], "soup": [f"soup/{number}"]}
            if split == "train":
                listed["pie"].append(name)
            (tmp_path / "meta" / f"{split}.json").write_text(json.dumps(listed))
    else:
        lines = [f"images/{at}.jpg,{at[:3]},{split}" for split, at in zip(("train", "val") * 2, FOUR, strict=True)]
        lines.append(f"images/{name}.jpg,pie,train")
        (tmp_path / "list.csv").write_bytes("\n".join(["path,label,split", *lines]).encode("utf-8", "surrogatepass"))
        if "\ud800" in name:
            with pytest.raises(DataError, match="has no columns path and label"):
                build_index(tmp_path / "list.csv", cache_dir=tmp_path / "cache")
            return
    index = build_index(tmp_path, cache_dir=tmp_path / "cache")
    assert [reason for _, reason in index.excluded] == ["a name that no file can have"]
    assert len(index.splits["train"]) == 2
    assert excluded_text(index.excluded)
    assert len(index.known().pack()) > 0
    assert data_main(["verify", "--root", str(tmp_path)]) == 1
    assert "a name that no file can have" in capsys.readouterr().out
