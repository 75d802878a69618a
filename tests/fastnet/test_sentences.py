"""What a user can fix costs one sentence: every command ends with it, and with no traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data_pipeline import DataError, build_index, make_loader
from data_pipeline.__main__ import main as data_main
from data_pipeline.dataset.synthetic import user_cache_folder
from fastnet import train as train_command
from fastnet.analysis.figures import confusion_matrix, save
from fastnet.analysis.lettering import families, legible
from fastnet.config import FOOD101, processes
from fastnet.config_file import read_config
from fastnet.errors import Lenient, UserError, run_command
from fastnet.loading.checkpoint import load_checkpoint
from fastnet.loading.weights import load_weights, save_weights
from fastnet.model import EfficientNet, ModelConfig
from fastnet.training.build import cache_memory
from fastnet.training.curves import read_metrics
from fastnet.training.metrics import MetricsFile
from fastnet.training.saved import excluded_text, read_run

Said = pytest.CaptureFixture[str]


def one_sentence(capsys: Said, status: int, expected: int = 1) -> str:
    said = capsys.readouterr().err
    assert status == expected, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    return said


# --- what the operating system refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "permission denied; check its permissions"),
        (errno.ENAMETOOLONG, "file name too long; choose a shorter name"),
        (errno.EIO, "input/output error; check the disk"),
        (errno.ENOSPC, "no space left on device; free some space"),
    ],
)
def test_any_refusal_is_a_sentence(capsys: Said, number: int, words: str) -> None:
    def body() -> int:
        raise OSError(number, os.strerror(number), "/some/where")

    assert f"/some/where: {words}" in one_sentence(capsys, run_command(body))


def test_memory_that_ends_anywhere_is_a_sentence(capsys: Said) -> None:
    def body() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    assert "--batch-size" in one_sentence(capsys, run_command(body))
    with pytest.raises(UserError, match="out of memory for --cache ram: use --cache disk"), cache_memory(ram()):
        raise MemoryError
    with pytest.raises(MemoryError), cache_memory(FOOD101):
        raise MemoryError


def ram() -> Any:
    from dataclasses import replace

    return replace(FOOD101, data=replace(FOOD101.data, cache="ram"))


def test_names_that_cannot_be(capsys: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, words in (
        (["--data", "~nosuchuser/x"], "~nosuchuser/x cannot be found, as there is no such user"),
        # Later versions of Python say of such a name that there is no file.
        (["--data", "a" * 300], "ile name too long|There is no folder"),
        (["--out", "b" * 300], "ile name too long"),
        (["--out", "~nosuchuser/x"], "~nosuchuser/x cannot be found, as there is no such user"),
        (["--resume", "c" * 300], "ile name too long|no checkpoint there"),
        (["--seed", str(2**80)], "--seed 1208925819614629174706176 must lie between 0 and"),
        (["--seed", "-1"], "--seed -1 must lie between 0 and"),
    ):
        monkeypatch.setattr(
            sys, "argv", ["train", "--recipe", "quick", "--device", "cpu", "--out", str(tmp_path / "run"), *flags]
        )
        status = run_command(train_command.train)
        assert re.search(words, one_sentence(capsys, status, status))
        assert status in (1, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("said", ["x", "", "-2", "0", "1e3", "9" * 30, "²"])
def test_a_number_of_processes_that_is_none(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", said)
    with pytest.raises(UserError, match="start with torchrun, or unset it"):
        processes()


def test_the_command_says_so_and_ends(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as left:
        train_command.main()
    assert "start with torchrun, or unset it" in one_sentence(capsys, int(str(left.value)))


def test_a_rank_beyond_the_last_one_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnet.training.distributed import join

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK is 2 and WORLD_SIZE 2, and ranks count from 0: start with torchrun"):
        join()


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "RANK"])
def test_processes_that_cannot_meet(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    from fastnet.training.distributed import join

    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2.*start with torchrun"):
        join()


@pytest.mark.parametrize("size", [64 << 20, 8 << 30])
def test_workers_that_run_out_of_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    """Docker's /dev/shm has 64 MB, and a worker that finds it full dies of SIGBUS, as does the next one."""
    from data_pipeline.loaders import torch_loader

    for path in ("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg"):
        photo(tmp_path / path)
    index = build_index(tmp_path, cache_dir=tmp_path / "cache")
    loader = make_loader(
        index, "val", backend="torch", train=False, resolution=32, batch_size=2, seed=0, workers=0, augmentation=None
    )

    def dies(_: object) -> object:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")

    monkeypatch.setattr(torch_loader.TorchLoader, "_next", dies)
    found = os.statvfs("/")
    blocks = type(found)((*tuple(found)[:2], size // found.f_frsize, *tuple(found)[3:]))
    monkeypatch.setattr(torch_loader.os, "statvfs", lambda path: blocks if path == "/dev/shm" else found)
    with pytest.raises(DataError, match=r"Bus error.*too little memory or /dev/shm.*smaller --batch-size") as caught:
        list(loader.batches(0))
    assert caplog.text.count("others go on") == 2
    assert ("; /dev/shm has 67 MB here: give Docker --shm-size 8g" in str(caught.value)) == (size < 1 << 30)


@pytest.mark.parametrize(
    "said",
    [
        "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL 2.28.3"
        "\nncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:29511",
    ],
)
def test_a_rank_that_is_lost_is_named_in_nccls_words_and_gloos(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    from fastnet.training.distributed import Ranks

    gone = subprocess.Popen(["true"])
    gone.wait()
    ranks = Ranks(rank=0, size=2, local_rank=0, local_size=2, nodes=1)
    ranks.processes = {0: os.getpid(), 1: gone.pid}
    monkeypatch.setattr(Ranks, "_fails_first", lambda _: True)
    words = rf"rank 1 \(process {gone.pid}, killed from outside or out of memory: see dmesg\) ended: .*--resume"
    with pytest.raises(UserError, match=words), ranks.one_report():
        raise torch.distributed.DistBackendError(said)
    with pytest.raises(ValueError, match=r"NCCL|gloo"), ranks.one_report():  # no loss of a peer
        raise ValueError(said)


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def none(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", none)
    with pytest.raises(DataError, match=r"no home folder here: .*XDG_CACHE_HOME"):
        user_cache_folder()


# --- where the output goes ------------------------------------------------------------------------------------------


class Broken(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, _: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        self.write("")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_output_is_not_worth_a_run(number: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=Lenient(Broken(number)))  # type: ignore[arg-type]
    console.print("words", Table("a"))
    print("words", file=Lenient(Broken(number)), flush=True)


def test_a_tracker_that_fails_is_named_and_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def log(self, step: int, values: dict[str, float]) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            raise AssertionError("it was left")

    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, [Full()])
    for step in range(3):
        metrics.write("train", step=step, loss=1.0)
    metrics.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert [record.message.count("Full failed") for record in caplog.records] == [1]


def test_a_terminal_without_letters_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)

    def body() -> int:
        print("寿司 🍣 \udcff")
        return 0

    assert run_command(body) == 0
    assert out.buffer.getvalue() == b"\\u5bff\\u53f8 \\U0001f363 \\udcff\n"


# --- files of ours that are damaged ---------------------------------------------------------------------------------


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


# --- data sets ------------------------------------------------------------------------------------------------------


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), "red").save(path)


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


FOUR = ("pie/1", "pie/2", "soup/1", "soup/2")
NFC, NFD = "caf\u00e9", "cafe\u0301"


def test_accents_stored_in_two_ways_are_one_class(tmp_path: Path) -> None:
    for path in (f"train/{NFC}/1.jpg", f"val/{NFD}/1.jpg", "train/tea/1.jpg", "val/tea/1.jpg"):
        photo(tmp_path / path)
    index = build_index(tmp_path, cache_dir=tmp_path / "cache")
    assert index.classes == (NFC, "tea")
    assert index.splits["val"].labels.tolist() == [0, 1]
    photo(tmp_path / "train" / NFD / "2.jpg")
    with pytest.raises(DataError, match="twice, under names that differ only in how their accents are stored"):
        build_index(tmp_path, cache_dir=tmp_path / "cache")
    official = tmp_path / "official"
    for name in (NFD, "tea"):
        photo(official / "images" / name / "1.jpg")
    (official / "meta").mkdir()
    for split in ("train", "test"):
        (official / "meta" / f"{split}.txt").write_text(f"{NFC}/1\ntea/1")
    index = build_index(official, cache_dir=tmp_path / "cache")
    assert index.classes == (NFC, "tea")
    assert len(index.splits["train"]) == 2


# --- figures --------------------------------------------------------------------------------------------------------


def test_class_names_in_figures(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """`$` is no formula; a script that an installed font has is drawn in it, and what none has is told apart."""
    names = ["a$b", "$$", "$\\frac{", "x_1^2", "寿司", "ラーメン", "🍣", "\udcff", NFC]
    shown = legible(names)
    assert len(set(shown)) == len(names)
    assert shown[0] == r"a\$b"
    assert shown[-1] == NFC
    save(confusion_matrix(torch.eye(len(names)), names), tmp_path / "confusion.png")
    assert Image.open(tmp_path / "confusion.png").size[0] > 200
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert families(["plain"]) == ["DejaVu Sans"]


def test_a_font_that_has_the_script_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import font_manager

    from fastnet.analysis import lettering

    class Entry:
        def __init__(self, name: str) -> None:
            self.name, self.fname, self.style = name, name, "normal"

    class Manager:
        ttflist = (Entry("Latin"), Entry("Kanji"))

    covered = {"Kanji": {ord("寿")}}
    monkeypatch.setattr(font_manager, "fontManager", Manager())
    monkeypatch.setattr(font_manager, "findfont", lambda name: name)
    monkeypatch.setattr(lettering, "_drawn_by", lambda file: covered.get(file, set(range(128, 256))))
    lettering._fonts_for.cache_clear()
    assert families(["寿司é"]) == ["DejaVu Sans", "Kanji"]
    assert legible(["寿司é"]) == ["寿\\u53f8é"]
    lettering._fonts_for.cache_clear()
