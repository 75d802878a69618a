"""Getting Food-101 from a server on this machine: resumed, checked, extracted safely, resized."""

from __future__ import annotations

import hashlib
import io
import socket
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline import DataError, build_index
from data_pipeline.__main__ import main
from data_pipeline.dataset import download as prepare
from data_pipeline.dataset.download import Source


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Food-101 was put is remembered in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def jpeg(number: int, size: tuple[int, int] = (90, 60), orientation: int = 1) -> bytes:
    generator = np.random.default_rng(number)
    tags = Image.Exif()
    tags[0x0112] = orientation
    out = io.BytesIO()
    pixels = generator.integers(0, 255, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(out, "JPEG", exif=tags)
    return out.getvalue()


FILES: dict[str, bytes] = {
    **{f"food-101/images/{name}/{n}.jpg": jpeg(10 * n + len(name)) for name in ("pie", "soup") for n in range(3)},
    "food-101/images/pie/3.jpg": jpeg(3, orientation=6),
    "food-101/images/soup/3.jpg": jpeg(4, (30, 20)),
    "food-101/images/soup/4.jpg": b"garbage",
    "food-101/meta/train.txt": b"pie/0\npie/1\npie/3\nsoup/0\nsoup/1\nsoup/3\nsoup/4\n",
    "food-101/meta/test.txt": b"pie/2\nsoup/2\n",
}


def archive(files: dict[str, bytes], **more: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in more.values():
            tar.addfile(member)
    return out.getvalue()


class Server:
    """Serves one archive, with byte ranges; `breaks`: bytes after which each of the first answers is cut off."""

    def __init__(self) -> None:
        self.content = archive(FILES)
        self.breaks: list[int] = []
        self.status: int | None = None
        self.first: list[tuple[int, dict[str, str]]] = []
        """Statuses of the first answers, with their headers."""
        self.kind, self.says_length = "application/gzip", True
        self.ranges = True
        self.asked: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers["Range"]
                outer.asked.append(wanted)
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and outer.ranges else 0
                status = outer.status or (206 if start else 200)
                if start >= len(outer.content):
                    status = 416
                status, headers = outer.first.pop(0) if outer.first else (status, {})
                self.send_response(status)
                if outer.says_length or status >= 400:
                    self.send_header("Content-Length", str(len(outer.content) - start if status < 400 else 0))
                self.send_header("Content-Type", outer.kind)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if status < 400:
                    end = start + outer.breaks.pop(0) if outer.breaks else None
                    self.wfile.write(outer.content[start:end])

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def source(self) -> Source:
        address = f"http://127.0.0.1:{self.http.server_address[1]}/food-101.tar.gz"
        return Source(address, hashlib.md5(self.content).hexdigest())

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it would have waited between tries."""
    found: list[float] = []
    monkeypatch.setattr(prepare, "time", SimpleNamespace(sleep=found.append))
    return found


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def fails(root: Path, source: Source, *words: str, short_side: int | None = None) -> None:
    with pytest.raises(DataError) as caught:
        prepare.prepare(root, short_side, source)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_downloaded_extracted_and_indexed(server: Server, tmp_path: Path) -> None:
    folder = prepare.prepare(tmp_path / "new" / "place", None, server.source)
    assert folder == tmp_path / "new" / "place" / "food-101"
    for name, content in FILES.items():
        assert (folder.parent / name).read_bytes() == content
    assert [path.name for path in folder.parent.iterdir()] == ["food-101"]
    for data in (folder, folder.parent):  # the folder that was asked for will do as well
        index = build_index(data, cache_dir=tmp_path / "cache")
        assert index.classes == ("pie", "soup")
        assert len(index.splits["train"]) == 6
    assert prepare.prepare(folder.parent, None, server.source) == folder
    assert server.asked == [None]


def test_a_broken_connection_is_resumed(server: Server, tmp_path: Path) -> None:
    server.breaks = [500, 700]
    prepare.prepare(tmp_path, None, server.source)
    assert server.asked == [None, "bytes=500-", "bytes=1200-"]


def test_an_interrupted_download_is_resumed_by_the_next_run(server: Server, tmp_path: Path) -> None:
    (tmp_path / "food-101.tar.gz.part").write_bytes(server.content[:900])
    prepare.prepare(tmp_path, None, server.source)
    assert server.asked == ["bytes=900-"]


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "food-101.tar.gz.part").write_bytes(b"x" * 900)
    prepare.prepare(tmp_path, None, server.source)
    assert (tmp_path / "food-101" / "meta" / "test.txt").is_file()


def test_a_complete_part_is_checked_and_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "food-101.tar.gz.part").write_bytes(server.content)
    prepare.prepare(tmp_path, None, server.source)
    assert server.asked == [f"bytes={len(server.content)}-"]


def test_an_archive_brought_by_other_means_is_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "food-101.tar.gz").write_bytes(server.content)
    prepare.prepare(tmp_path, None, server.source)
    assert server.asked == []


def test_a_wrong_checksum_is_refused(server: Server, tmp_path: Path) -> None:
    source = Source(server.source.url, "0" * 32)
    fails(tmp_path, source, "checksum", "0" * 32, "was removed")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [404, 503])
def test_a_server_that_refuses_is_named(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    fails(tmp_path, server.source, server.source.url, str(status))
    assert len(server.asked) == (1 if status == 404 else 5)


def test_no_network_is_said_at_once(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        source = Source(f"http://127.0.0.1:{silent.getsockname()[1]}/food-101.tar.gz", "0" * 32)
        fails(tmp_path, source, source.url, "refused", "by other means", str(tmp_path))


def test_too_little_space_is_found_before_the_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 2 * len(server.content)})
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: usage)
    fails(tmp_path, server.source, "GB are free", "--root")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_said_and_the_next_run_goes_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prepare.tarfile.TarFile, "extract", _full)
        fails(tmp_path, server.source, "No space left", "goes on where this one stopped")
    assert [path.name for path in tmp_path.iterdir()] == ["food-101.tar.gz"]
    prepare.prepare(tmp_path, None, server.source)
    assert server.asked == [None]


def test_a_busy_server_is_asked_again_after_a_pause(server: Server, tmp_path: Path, pauses: list[float]) -> None:
    server.first = [(503, {}), (503, {"Retry-After": "17"}), (429, {"Retry-After": "9999999"}), (500, {})]
    assert prepare.prepare(tmp_path, None, server.source).is_dir()
    assert pauses == [1.0, 17.0, 60.0, 8.0]
    server.first = [(503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"})] * 5
    fails(tmp_path / "other", server.source, "503", "run the same command again")


def test_a_page_to_sign_in_is_no_archive(server: Server, tmp_path: Path) -> None:
    server.kind = "text/html; charset=utf-8"
    fails(tmp_path, server.source, "answers with a page (text/html)", "sign in")
    assert list(tmp_path.iterdir()) == []
    assert server.asked == [None]


def test_a_server_need_not_say_how_much_there_is(server: Server, tmp_path: Path) -> None:
    server.says_length = False
    assert prepare.prepare(tmp_path, None, server.source).is_dir()


def _full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def _link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def _device(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.CHRTYPE
    return member


@pytest.mark.parametrize(
    "content",
    [
        archive({**FILES, "../outside.txt": b"x"}),
        archive({**FILES, "food-101/../../outside.txt": b"x"}),
        archive(FILES, link=_link("food-101/images/link", "../../../..")),
        archive(FILES, link=_link("food-101/images/link", "/etc")),
        archive(FILES, device=_device("food-101/null")),
    ],
    ids=["parent", "inner parent", "link out", "absolute link", "device"],
)
@pytest.mark.parametrize("filtered", [True, False], ids=["", "without Python's own filter"])
def test_an_archive_that_leads_out_of_its_folder_is_refused(
    server: Server, tmp_path: Path, content: bytes, filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = content
    if not filtered:  # as good as it is where it lets links of long paths out
        monkeypatch.setitem(tarfile._NAMED_FILTERS, "data", lambda member, path: member)  # type: ignore[attr-defined]
    fails(tmp_path / "root", server.source, "not safe to extract")
    assert not (tmp_path / "outside.txt").exists()
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["food-101.tar.gz"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"no archive", "is damaged"), (archive(FILES)[:-100], "is damaged"), (archive({"x": b"y"}), "holds no")],
    ids=["no archive", "cut off", "other files"],  # without names an archive's bytes, with its time, would be one
)
def test_an_archive_of_something_else_is_refused(server: Server, tmp_path: Path, content: bytes, words: str) -> None:
    server.content = content
    fails(tmp_path, server.source, words, "food-101.tar.gz")
    assert not (tmp_path / "food-101").exists()


def test_a_resized_copy(server: Server, tmp_path: Path) -> None:
    folder = prepare.prepare(tmp_path, 40, server.source)
    assert folder == tmp_path / "food-101-40"
    sizes = {
        str(path.relative_to(folder / "images")): Image.open(path).size
        for path in sorted(folder.glob("images/*/*"))
        if path.read_bytes() != b"garbage"
    }
    assert sizes.pop("pie/3.jpg") == (40, 60)  # upright
    assert sizes.pop("soup/3.jpg") == (30, 20)  # never enlarged
    assert set(sizes.values()) == {(60, 40)}
    original = Image.open(tmp_path / "food-101/images/pie/0.jpg").resize((60, 40), Image.Resampling.BICUBIC)
    off = np.abs(np.asarray(original, int) - np.asarray(Image.open(folder / "images/pie/0.jpg"), int))
    assert off.mean() < 6
    assert (folder / "images/soup/4.jpg").read_bytes() == b"garbage"
    assert len(build_index(folder, cache_dir=tmp_path / "cache").splits["train"]) == 6
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare.prepare(tmp_path, 40, server.source) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_interrupted_resize_leaves_nothing_that_looks_finished(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_resize_one", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(tmp_path, 40, server.source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["food-101"]
    prepare.prepare(tmp_path, 40, server.source)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("side", [0, 31, 5000])
def test_a_short_side_that_makes_no_sense(tmp_path: Path, side: int) -> None:
    fails(tmp_path, Source(), "--short-side", str(side), short_side=side)


@pytest.mark.parametrize("named", ["", "food-101"])
@pytest.mark.parametrize("answer", ["y\n", "\n", ""])
def test_a_missing_data_set_is_offered_on_a_terminal(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, answer: str
) -> None:
    source = server.source
    monkeypatch.setattr(prepare, "Source", lambda: source)
    data = tmp_path / "photos" / named
    prepare.offer(str(data))  # nobody is there
    assert not data.exists()
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    monkeypatch.setattr("sys.stderr", Terminal())
    prepare.offer("sample")
    prepare.offer(str(tmp_path))
    assert server.asked == []
    prepare.offer(str(data))
    assert data.exists() == (answer == "y\n")
    assert prepare.prepared() == (tmp_path / "photos" / "food-101" if data.exists() else None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert prepare.offer(None) == (tmp_path / "data" / "food-101" if data.exists() else None)
    if data.exists():
        assert build_index(data, cache_dir=tmp_path / "cache").root == tmp_path / "photos" / "food-101"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_command_says_how_to_train(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source: Any = server.source
    monkeypatch.setattr(prepare, "Source", lambda: source)
    assert main(["prepare", "--root", str(tmp_path), "--short-side", "40"]) == 0
    assert capsys.readouterr().out == f"ready: python -m fastnet.train --data {tmp_path / 'food-101-40'}\n"
    (tmp_path / "file").write_text("")
    assert main(["prepare", "--root", str(tmp_path / "file")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
