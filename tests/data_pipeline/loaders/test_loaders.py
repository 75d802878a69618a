"""Both loaders keep one contract: same images in the same order whatever the workers, backend and point of start."""

import io
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from data_pipeline import Augmentation, Batch, DataError, Index, Loader, build_index, make_loader
from data_pipeline.dataset.index import Split
from data_pipeline.loaders import loader
from data_pipeline.loaders.augment import IMAGENET_MEAN, IMAGENET_STD, epoch_order, train_params
from data_pipeline.loaders.loader import Plan
from data_pipeline.loaders.torch_loader import upright
from tests.batches import same

BACKENDS = [
    "torch",
    pytest.param("dali", marks=pytest.mark.skipif(not loader.dali_installed(), reason="DALI is not installed")),
]
PER_CLASS = {"train": 12, "val": 5}


def jpeg(number: int, **options: Any) -> bytes:
    """A smooth picture that only its number decides, of a size of its own."""
    width, height = 40 + 3 * (number % 7), 36 + 4 * (number % 5)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([127 + 120 * np.sin(x / (5 + number % 3) + number), 4 * y, 2 * (x + y)], 2)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=95, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = tmp_path_factory.mktemp("data")
    for split, count in PER_CLASS.items():
        for at, name in enumerate(("a", "b ü")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number:02d}.jpg").write_bytes(jpeg(at * count + number))
    return build_index(root, cache_dir=tmp_path_factory.mktemp("cache"))


def make(index: Index, split: Any = "train", **changes: Any) -> Loader:
    settings: dict[str, Any] = dict(backend="torch", resolution=24, batch_size=5, seed=3, workers=0, augmentation=None)
    return make_loader(index, split, train=split == "train", **{**settings, **changes})


def everything(made: Loader, epoch: int = 0, start: int = 0) -> list[Batch]:
    return list(made.batches(epoch, start))


@pytest.mark.parametrize("backend", BACKENDS)
def test_contract(index: Index, backend: str) -> None:
    made = make(index, backend=backend)
    assert (made.backend, made.num_images, made.steps_per_epoch) == (backend, 24, 4)
    batches = everything(made)
    assert len(batches) == 4
    for images, labels in batches:
        assert images.shape == (5, 3, 24, 24)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == (5,)
        assert labels.dtype == torch.int64
    pixels = torch.cat([batch.images for batch in batches]) * torch.tensor(IMAGENET_STD)[:, None, None]
    pixels += torch.tensor(IMAGENET_MEAN)[:, None, None]
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5
    made.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_covers_each_image_once_in_order(index: Index, backend: str) -> None:
    made = make(index, "val", backend=backend, batch_size=4)
    for _ in range(2):
        batches = everything(made)
        assert [len(batch.labels) for batch in batches] == [4, 4, 2]
        assert torch.cat([batch.labels for batch in batches]).tolist() == index.splits["val"].labels.tolist()
    one_by_one = make(index, "val", batch_size=1)
    ours = torch.cat([batch.images for batch in batches])
    expected = torch.cat([batch.images for batch in everything(one_by_one)])
    assert (ours - expected).abs().max() < 3 / 255 / 0.22  # at most three steps of an 8-bit pixel
    # No two pictures are alike, so this tells an image from its neighbour.
    distances = torch.cdist(ours.flatten(1), expected.flatten(1))
    assert distances.argmin(1).tolist() == list(range(10))
    made.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_start_continues_what_was_interrupted(index: Index, backend: str) -> None:
    whole = {epoch: everything(make(index, backend=backend), epoch) for epoch in (0, 1)}
    assert not same(whole[0], whole[1])
    for start in range(6):
        resumed = make(index, backend=backend)
        assert same(everything(resumed, 1, start), whole[1][start:])
        resumed.close()


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pass_may_be_left_and_another_begun(index: Index, backend: str, workers: int) -> None:
    whole = [everything(make(index, backend=backend), epoch) for epoch in range(3)]
    made = make(index, backend=backend, workers=workers)
    for epoch in (0, 2, 1):
        left = made.batches(0)
        assert torch.equal(next(left).images, whole[0][0].images)
        assert same(everything(made, epoch), whole[epoch])
        assert same(everything(made, epoch, 2), whole[epoch][2:])
        with pytest.raises(RuntimeError, match="another one started"):
            next(left)
    made.close()
    assert same(everything(made, 1), whole[1])
    made.close()


def test_workers_and_threads_change_nothing(index: Index) -> None:
    """With different batch sizes too: 24 images in fours and in eights are the same 24 images."""
    aug = Augmentation()
    alone = everything(make(index, augmentation=aug, batch_size=8), 4)
    for workers in (1, 2):
        made = make(index, augmentation=aug, batch_size=8, workers=workers)
        assert same(everything(made, 4), alone)
        made.close()
    fours = everything(make(index, augmentation=aug, batch_size=4), 4)
    together = [torch.cat([batch.images for batch in batches]) for batches in (alone, fours)]
    assert torch.equal(*together)


def test_dali_threads_change_nothing(index: Index) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    one, three = (everything(make(index, backend="dali", workers=workers)) for workers in (1, 3))
    assert same(one, three)


def test_loading_leaves_torchs_random_state_alone(index: Index) -> None:
    before = torch.get_rng_state()
    everything(make(index))
    assert torch.equal(torch.get_rng_state(), before)


def reference(path: str, window: np.ndarray, flip: bool, color: np.ndarray | None, side: int) -> Tensor:
    """The contract said with other tools: PIL decodes and rotates, torchvision resizes in float, then step by step."""
    with Image.open(path) as image:
        x, y, w, h = window.tolist()
        way = _rotation(image)
        upright = image.convert("RGB") if way is None else image.convert("RGB").transpose(way)
        pixels = np.asarray(upright)[y : y + h, x : x + w]
    tensor = F.resize(torch.from_numpy(pixels.copy()).permute(2, 0, 1).double(), [side, side], antialias=True)
    tensor = tensor.flip(-1) if flip else tensor
    if color is not None:
        affine = torch.from_numpy(color).double()
        tensor = torch.einsum("ij,jhw->ihw", affine[:, :3], tensor) + affine[:, 3, None, None]
    return F.normalize(tensor.clamp(0, 255) / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))


def _rotation(image: Image.Image) -> Image.Transpose | None:
    return {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(image.getexif().get(0x0112, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_are_what_the_augmentation_says(index: Index, backend: str) -> None:
    aug = Augmentation(brightness=0.1, contrast=0.1, saturation=0.1, hue=5.0)
    made = make(index, backend=backend, augmentation=aug, resolution=20)
    split = index.splits["train"]
    # In batches: the position in the epoch's order tells which image it is.
    for number, (images, labels) in enumerate(everything(made, 2)):
        indices = made.plan.step(2, number).indices
        params = train_params(aug, 3, 2, indices, split.sizes[indices])
        assert params.colors is not None
        for row, at in enumerate(indices):
            assert labels[row] == split.labels[at]
            args = split.paths[at], params.windows[row], bool(params.flips[row]), params.colors[row]
            off = (images[row] - reference(*args, side=20)).abs() * torch.tensor(IMAGENET_STD)[:, None, None] * 255
            assert off.mean() < 0.6, (backend, at)
            assert off.max() < 4, (backend, at)
    made.close()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("backend", BACKENDS)
def test_exif_orientation_is_applied(tmp_path: Path, backend: str, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "x.jpg").write_bytes(jpeg(3, exif=tags))
    index = build_index(tmp_path, cache_dir=tmp_path / "cache")
    made = make(index, "val", backend=backend, batch_size=2)
    (batch,) = everything(made)
    path, window = index.splits["val"].paths[0], made.plan.step(0, 0).params.windows[0]
    off = (batch.images[0] - reference(path, window, False, None, 24 + 2)[:, 1:-1, 1:-1]).abs() * 0.225 * 255
    assert off.max() < 3


def test_upright_is_pils_rotation() -> None:
    pixels = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    for orientation in range(1, 9):
        tags = Image.Exif()
        tags[0x0112] = orientation
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        image.getexif()[0x0112] = orientation
        way = _rotation(image)
        turned = image if way is None else image.transpose(way)
        assert torch.equal(upright(pixels, orientation), torch.from_numpy(np.array(turned)).permute(2, 0, 1))


def two_folders(root: Path, each: int = 4) -> Index:
    for split in ("train", "val"):
        for at, name in enumerate(("a", "b")):
            (root / split / name).mkdir(parents=True)
            for number in range(each):
                (root / split / name / f"{number}.jpg").write_bytes(jpeg(at * each + number))
    return build_index(root, cache_dir=root / "cache")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"x" * 999),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "other size": lambda path: Image.new("RGB", (9, 9)).save(path),
}


@pytest.mark.parametrize(("backend", "workers"), [("torch", 0), ("torch", 2), ("dali", 1)])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_goes_bad_is_named_and_left_out(
    tmp_path: Path, backend: str, workers: int, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """8 images in batches of 3: training leaves two over, of which the first takes the bad one's row."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    index = two_folders(tmp_path)
    made = {split: make(index, split, backend=backend, workers=workers, batch_size=3) for split in ("train", "val")}
    before = {split: everything(one) for split, one in made.items()}
    order = epoch_order(3, 0, 8)
    bad = {"train": int(order[4]), "val": 4}
    DAMAGES[damage](Path(index.splits["train"].paths[bad["train"]]))
    DAMAGES[damage](Path(index.splits["val"].paths[bad["val"]]))

    train = everything(made["train"])
    assert same(train[:1], before["train"][:1])
    assert torch.equal(train[1].images[[0, 2]], before["train"][1].images[[0, 2]])
    assert not torch.equal(train[1].images[1], before["train"][1].images[1])
    assert made["train"].plan.order(0).tolist() == [*order[:4], order[6], order[5]]
    assert train[1].labels.tolist() == index.splits["train"].labels[[order[3], order[6], order[5]]].tolist()

    val = everything(made["val"])
    assert [len(batch.labels) for batch in val] == [3, 2, 2]
    assert same([val[0], val[2]], [before["val"][0], before["val"][2]])
    assert torch.equal(val[1].images, before["val"][1].images[[0, 2]])

    for split, one in made.items():
        path = index.splits[split].paths[bad[split]]
        assert [name for name, _ in one.quarantined] == [path]
        (said,) = (record.getMessage() for record in caplog.records if path in record.getMessage())
        assert "\n" not in said
        assert same(everything(one), train if split == "train" else val)
        assert len(one.quarantined) == 1
        one.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_data_set_that_vanishes_stops_the_run_in_one_sentence(tmp_path: Path, backend: str) -> None:
    index = two_folders(tmp_path, each=12)
    made = make(index, backend=backend, batch_size=4)
    batches = made.batches(0)
    next(batches)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(DataError, match="of 24 images can no longer be decoded") as caught:
        list(batches)
    assert str(tmp_path / "train") in str(caught.value)
    assert str(caught.value).endswith("continue with --resume.")
    made.close()


@given(
    n=st.integers(1, 40), size=st.integers(1, 12), epoch=st.integers(0, 3), bad=st.sets(st.integers(0, 39), max_size=12)
)
def test_quarantine_changes_no_other_row(n: int, size: int, epoch: int, bad: set[int]) -> None:
    """Nothing is seen twice while there are images to spare, nothing but the bad ones is lost, and who is found first
    makes no difference."""
    bad = {index for index in bad if index < n}
    if 2 * len(bad) > n or n < size:
        return
    split = Split(
        ("",) * n, np.zeros(n, np.int64), np.full((n, 2), 40, np.int32), np.ones(n, np.uint8), np.zeros(n, np.uint8)
    )
    whole = Plan(split, 8, size, 1, True, Augmentation()).order(epoch)
    plan = Plan(split, 8, size, 1, True, Augmentation(), frozenset(bad))
    order = plan.order(epoch)
    good = ~np.isin(whole, list(bad))
    assert (order[good] == whole[good]).all()
    assert not set(order.tolist()) & bad
    repeats = len(order) - len(set(order.tolist()))
    assert repeats == max(0, len(order) - (n - len(bad)))
    seen: list[int] = []  # as a loader finds them, one after another
    growing = Plan(split, 8, size, 1, True, Augmentation())
    for at in range(len(order)):
        while (image := int(growing.order(epoch)[at])) in bad:
            growing.quarantined |= {image}
        seen.append(image)
    assert seen == order.tolist()


@pytest.mark.slow
def test_a_worker_that_dies_is_reported(index: Index) -> None:
    # In a process of its own: a fork of this one would inherit the threads of every backend that ran in it.
    code = f"""if True:
        import os
        from data_pipeline import DataError, build_index, make_loader
        from data_pipeline.loaders import torch_loader

        torch_loader.decoded = lambda *_: os._exit(9)
        made = make_loader(
            build_index({str(index.root)!r}), "train", train=True, backend="torch", resolution=24, batch_size=5,
            seed=3, workers=1, augmentation=None,
        )
        try:
            list(made.batches(0))
        except DataError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "worker died" in done.stdout
    assert "--workers" in done.stdout


def test_auto_is_torch_on_a_cpu(index: Index) -> None:
    assert make(index, backend="auto").backend == "torch"


def test_without_dali_auto_falls_back_and_dali_says_what_to_install(
    index: Index, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(loader, "dali_installed", lambda: False)
    assert make(index, backend="auto", device="cuda").backend == "torch"
    assert not recwarn.list
    with pytest.raises(DataError, match="pip install nvidia-dali-cuda130"):
        make(index, backend="dali")


@pytest.mark.parametrize(
    ("installed", "old"), [("2.1.0", True), ("1.53.0", True), ("2.2.0", False), ("2.10.0rc1", False)]
)
def test_a_dali_that_ignores_exif_is_not_used(
    installed: str, old: bool, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "version", lambda name: installed)
    monkeypatch.setattr(loader, "dali_installed", lambda: True)
    assert loader.old_dali() == (installed if old else None)
    if old:
        assert make(index, backend="auto", device="cuda").backend == "torch"
        with pytest.raises(DataError, match=f"needs DALI 2.2 or newer, as {installed} ignores"):
            make(index, backend="dali")


def test_without_a_gpu_dali_says_so(index: Index) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    made: Any = make(index, backend="dali", device="cuda")
    with pytest.raises(DataError, match=r"DALI cannot start on cuda .*--loader torch"):
        made._start()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_gpu_every_loader_says_so(index: Index, backend: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DataError, match=r"torch can use no GPU here .*: use --device cpu.$"):
        next(make(index, backend=backend, device="cuda").batches(0))


@pytest.mark.parametrize("change", [{"resolution": 0}, {"batch_size": 0}, {"workers": -1}, {"backend": "pil"}])
def test_settings_that_make_no_sense_are_refused(index: Index, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        make(index, **change)


INTERRUPTED = """
import os, signal, sys, time
from data_pipeline import build_index, make_loader
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
index = build_index(sys.argv[1], cache_dir=sys.argv[2])
loader = make_loader(index, "train", backend="torch", resolution=24, batch_size=2, seed=0, train=True,
                     augmentation=None, workers=2)
try:
    for number, _ in enumerate(loader.batches(0)):
        if number == 1:
            os.killpg(0, signal.SIGINT)  # what a terminal does on Ctrl-C
            time.sleep(60)
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.slow
def test_ctrl_c_leaves_no_tracebacks_of_workers(index: Index, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(index.root), str(tmp_path)],
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("stopped\n", "", 0)


def _differences(a: Loader, b: Loader) -> tuple[Tensor, Tensor]:
    """Of each image: difference of the means, and the 99th percentile of the differences; in 1/255."""
    scale = 255 * torch.tensor(IMAGENET_STD)[:, None, None]
    means, highest = [], []
    for x, y in zip(a.batches(0), b.batches(0), strict=True):
        assert torch.equal(x.labels, y.labels)
        off = ((x.images - y.images) * scale).flatten(1)
        means.append(off.mean(1).abs())
        highest.append(off.abs().quantile(0.99, dim=1))
    return torch.cat(means), torch.cat(highest)


@pytest.mark.parametrize(
    ("split", "resolution"), [("val", 64), ("val", 200), pytest.param("train", 200, marks=pytest.mark.slow)]
)
def test_backends_agree_on_real_photos(photos: Path, tmp_path: Path, split: str, resolution: int) -> None:
    """At most 0.5/255 on the mean of any image and 2/255 at its 99th percentile.

    Training windows end where the image is cut: there torch weighs the pixels that are left, DALI repeats the last one,
    which shows where a photo shrinks to a few dozen pixels. Evaluation has a margin, and agrees at any resolution.
    """
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    index = build_index(photos, cache_dir=tmp_path)
    common = dict(resolution=resolution, batch_size=50, workers=1, augmentation=Augmentation())
    means, highest = _differences(*(make(index, split, backend=backend, **common) for backend in ("torch", "dali")))
    assert len(means) == (200 if split == "val" else 600)
    assert means.max() <= 0.5
    assert highest.max() <= 2


def test_evaluation_sees_what_resize_and_centre_crop_see(photos: Path, tmp_path: Path) -> None:
    """torchvision's Resize to resolution / 0.875 and CenterCrop, on square photos: elsewhere CenterCrop rounds to a
    whole output pixel and our window to a whole source pixel."""
    index = build_index(photos, cache_dir=tmp_path)
    split = index.splits["val"]
    made = make(index, "val", resolution=112, batch_size=1)
    square = np.flatnonzero(split.sizes[:, 0] == split.sizes[:, 1])
    assert len(square) > 20
    for number in square[:20]:
        image = next(made.batches(0, int(number))).images[0]
        pixels = torch.from_numpy(np.asarray(Image.open(split.paths[number]).convert("RGB")).copy()).permute(2, 0, 1)
        theirs = F.center_crop(F.resize(pixels, [128], antialias=True), [112, 112])
        ours = (image * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]) * 255
        assert (ours - theirs).mean().abs() < 0.1
        assert (ours - theirs).abs().quantile(0.99) <= 2


BETWEEN = """
import os, signal, sys, time
from data_pipeline import build_index, make_loader
index = build_index(sys.argv[1], cache_dir=sys.argv[2])
loader = make_loader(index, "train", backend="torch", resolution=24, batch_size=2, seed=0, train=True,
                     augmentation=None, workers=1)
passes = []
for epoch in (0, 0):
    passes.append([images.sum().item() for images, _ in loader.batches(epoch)])
    for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split():
        os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.1)
print("same", passes[0] == passes[1], len(passes[1]))
os._exit(0)
"""


@pytest.mark.slow
def test_a_worker_that_dies_between_two_passes_is_replaced(index: Index, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BETWEEN, str(index.root), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert f"same True {len(index.splits['train']) // 2}" in done.stdout, done.stdout + done.stderr


STORM = """
import os, signal, subprocess, sys
from pathlib import Path
from data_pipeline import build_index, make_loader
from data_pipeline.loaders import torch_loader
inner, flag = torch_loader.decoded, Path(sys.argv[3])
def decoded(*rest):
    if not flag.exists() and sys.argv[4] == "dies":
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory ends
    return inner(*rest)
torch_loader.decoded = decoded
index = build_index(sys.argv[1], cache_dir=sys.argv[2])
loader = make_loader(index, "train", backend="torch", resolution=24, batch_size=2, seed=0, train=True,
                     augmentation=None, workers=2)
seen = 0
for number, batch in enumerate(loader.batches(0)):
    if number == 0 and sys.argv[4] == "storm":
        workers = [int(pid) for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split()]
        for pid in workers:
            for name in ("TERM", "HUP", "USR1", "INT"):
                subprocess.run(["kill", "-" + name, str(pid)], check=True)  # not from their parent
        print("workers", *workers)
        sys.stdout.flush()
    seen += len(batch.labels)
print("seen", seen, signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL)
sys.stdout.flush()
if sys.argv[4] == "storm":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["storm", "dies"])
def test_workers_outlive_signals_to_the_whole_job_and_not_their_parent(index: Index, tmp_path: Path, what: str) -> None:
    """What systemd and Slurm send to every process of a job does not take the workers from the trainer; a worker that
    is killed is replaced; and workers end with a parent that is."""
    command = [sys.executable, "-c", STORM, str(index.root), str(tmp_path), str(tmp_path / "flag"), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    images = len(index.splits["train"]) // 2 * 2
    assert f"seen {images} True" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == (-9 if what == "storm" else 0)
    if what == "dies":
        assert "a data loading worker died" in done.stderr
        return
    workers = [int(pid) for pid in done.stdout.splitlines()[0].split()[1:]]
    assert len(workers) == 2
    for _ in range(200):
        left = [pid for pid in workers if Path(f"/proc/{pid}/status").exists()]
        left = [pid for pid in left if "zombie" not in Path(f"/proc/{pid}/status").read_text()]
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(f"workers {left} outlived their parent")
