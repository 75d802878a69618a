"""What a user can fix costs one sentence: every command ends with it, and with no traceback."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_pipeline import DataError, build_index, make_loader
from data_pipeline.dataset.synthetic import user_cache_folder
from fastnet import train as train_command
from fastnet.analysis.figures import confusion_matrix, save
from fastnet.analysis.lettering import families, legible
from fastnet.config import FOOD101, processes
from fastnet.errors import Lenient, UserError, run_command
from fastnet.training.build import cache_memory
from fastnet.training.reporting.metrics import MetricsFile
from tests.sentences import Said, one_sentence, photo

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
    from fastnet.training.distributed import init_process_group

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK is 2 and WORLD_SIZE 2, and ranks count from 0: start with torchrun"):
        init_process_group()


@pytest.mark.parametrize("name", ["LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"])
def test_a_place_among_the_processes_that_is_no_number(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from fastnet.training.distributed import init_process_group

    for known, value in (("WORLD_SIZE", "2"), ("RANK", "0"), (name, "one")):
        monkeypatch.setenv(known, value)
    with pytest.raises(UserError, match=rf"{name} is 'one', and torchrun sets a number: start with torchrun"):
        init_process_group()


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "RANK"])
def test_processes_that_cannot_meet(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    from fastnet.training.distributed import init_process_group

    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2.*start with torchrun"):
        init_process_group()


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
