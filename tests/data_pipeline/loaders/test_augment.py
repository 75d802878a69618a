"""The augmentation: randomness that depends on nothing but its keys, crops inside the image, colours by definition."""

import colorsys
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import RandomResizedCrop

from data_pipeline.loaders.augment import Augmentation, color_matrices, epoch_order, eval_params, train_params

sides = st.integers(1, 3000)
seeds = st.integers(-(2**63), 2**63 - 1)


def test_importing_it_needs_no_torch() -> None:
    code = "import sys, data_pipeline.loaders.augment; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(seed=seeds, epoch=st.integers(0, 10**6), n=st.integers(0, 300))
def test_an_epoch_visits_every_image_once(seed: int, epoch: int, n: int) -> None:
    assert sorted(epoch_order(seed, epoch, n)) == list(range(n))


def test_order_changes_with_seed_and_epoch_and_nothing_else() -> None:
    first = epoch_order(3, 5, 1000)
    assert (first == epoch_order(3, 5, 1000)).all()
    for other in (epoch_order(3, 6, 1000), epoch_order(4, 5, 1000), epoch_order(5, 3, 1000), np.arange(1000)):
        # A random permutation leaves one image in its place on average; ten has probability 1e-7.
        assert (first == other).sum() < 10


def test_order_is_uniform() -> None:
    """Every image is as likely to come first as any other: chi-square with 19 degrees of freedom."""
    first = np.array([epoch_order(0, epoch, 20)[0] for epoch in range(4000)])
    chi_square = ((np.bincount(first, minlength=20) - 200) ** 2 / 200).sum()
    assert chi_square < 43.8  # p = 0.001


def test_known_numbers() -> None:
    """A change of these breaks the resumption of every run there is."""
    assert epoch_order(7, 2, 8).tolist() == [4, 5, 3, 1, 7, 0, 6, 2]
    params = train_params(Augmentation(), 7, 2, [0, 5], [[512, 384], [300, 512]])
    assert params.windows.tolist() == [[136, 26, 215, 232], [17, 263, 282, 241]]
    assert params.flips.tolist() == [False, True]


@given(seed=seeds, epoch=st.integers(0, 1000), sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=20))
def test_draws_do_not_depend_on_the_batch(seed: int, epoch: int, sizes: list[tuple[int, int]]) -> None:
    aug, n = Augmentation(), len(sizes)
    whole = train_params(aug, seed, epoch, np.arange(n), sizes)
    order = epoch_order(seed, epoch, n)
    for index in order:
        one = train_params(aug, seed, epoch, [index], [sizes[index]])
        assert (one.windows[0] == whole.windows[index]).all()
        assert one.flips[0] == whole.flips[index]
        assert one.colors is not None
        assert whole.colors is not None
        assert (one.colors[0] == whole.colors[index]).all()


@given(
    size=st.tuples(sides, sides),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair))),
    ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(lambda pair: (min(pair), max(pair))),
    seed=seeds,
)
def test_windows_lie_inside_the_image(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], seed: int
) -> None:
    sizes = np.tile(size, (32, 1))
    x, y, w, h = train_params(Augmentation(scale=scale, ratio=ratio), seed, 0, np.arange(32), sizes).windows.T
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (w >= 1).all()
    assert (h >= 1).all()
    assert (x + w <= size[0]).all()
    assert (y + h <= size[1]).all()


@given(size=st.tuples(sides, sides), resolution=st.integers(16, 600))
def test_evaluation_looks_at_the_centre(size: tuple[int, int], resolution: int) -> None:
    params = eval_params([size], resolution)
    x, y, w, h = params.windows[0]
    assert w == h >= 1
    # The window carries one output pixel on each side that is cut off.
    assert w * resolution / (resolution + 2) == pytest.approx(0.875 * min(size), abs=0.51)
    assert x >= 0
    assert y >= 0
    assert x + w <= size[0]
    assert y + h <= size[1]
    assert abs((x + w / 2) - size[0] / 2) <= 0.5
    assert abs((y + h / 2) - size[1] / 2) <= 0.5
    assert not params.flips[0]
    assert params.colors is None


def test_crops_are_distributed_as_torchvisions() -> None:
    """Two-sample Kolmogorov-Smirnov on area, aspect and both positions, for a photo and for one that needs the
    fallback at times."""
    n = 4000
    for width, height in ((512, 384), (900, 200)):
        aug = Augmentation()
        image = torch.empty(3, height, width)
        theirs = np.array([_torchvision_window(image, aug) for _ in range(n)], float)
        ours = train_params(aug, 1, 0, np.arange(n), np.tile((width, height), (n, 1))).windows.astype(float)
        for name, a, b in zip(
            ("area", "aspect", "x", "y"), _shape(theirs, width, height), _shape(ours, width, height), strict=True
        ):
            distance = _kolmogorov_smirnov(a, b)
            assert distance < 1.95 * np.sqrt(2 / n), (width, height, name, distance)  # p = 0.001


def _shape(windows: np.ndarray, width: int, height: int) -> list[np.ndarray]:
    """Area, aspect, and where the window lies between the borders, 0 to 1, in x and y."""
    x, y, w, h = windows.T
    return [w * h, w / h, x / np.maximum(1, width - w), y / np.maximum(1, height - h)]


def _torchvision_window(image: torch.Tensor, aug: Augmentation) -> tuple[int, int, int, int]:
    drawn = RandomResizedCrop(10, aug.scale, aug.ratio).make_params([image])
    return drawn["left"], drawn["top"], drawn["width"], drawn["height"]


def _kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    at = np.concatenate([a, b])
    return float(
        np.abs(
            np.searchsorted(np.sort(a), at, "right") / len(a) - np.searchsorted(np.sort(b), at, "right") / len(b)
        ).max()
    )


def test_fallback_is_the_largest_centred_window_of_an_allowed_ratio() -> None:
    narrow = Augmentation(scale=(1, 1), ratio=(3 / 4, 4 / 3))
    windows = train_params(narrow, 0, 0, np.arange(3), [[1000, 30], [30, 1000], [40, 40]]).windows
    assert windows[0].tolist() == [480, 0, 40, 30]
    assert windows[1].tolist() == [0, 480, 30, 40]
    assert windows[2].tolist() == [0, 0, 40, 40]


def test_flips_and_colours_follow_their_settings() -> None:
    n = 10_000
    sizes = np.tile((64, 64), (n, 1))
    aug = Augmentation(hflip=0.3, brightness=0.4, contrast=0, saturation=0, hue=0)
    params = train_params(aug, 0, 0, np.arange(n), sizes)
    assert abs(params.flips.mean() - 0.3) < 0.02
    assert params.colors is not None
    factors = params.colors[:, 0, 0]
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 0.01
    assert abs(factors.std() - 0.8 / np.sqrt(12)) < 0.01
    plain = Augmentation(hflip=0, brightness=0, contrast=0, saturation=0, hue=0)
    params = train_params(plain, 0, 0, np.arange(n), sizes)
    assert not params.flips.any()
    assert params.colors is None
    assert train_params(Augmentation(hflip=1), 0, 0, np.arange(n), sizes).flips.all()


@given(b=st.floats(0, 2), c=st.floats(0, 2), s=st.floats(0, 2), color=st.tuples(*[st.integers(0, 255)] * 3))
def test_colour_affine_is_its_steps_one_after_another(b: float, c: float, s: float, color: tuple[int, ...]) -> None:
    rgb = np.array(color, float)
    gray = rgb @ (0.299, 0.587, 0.114)
    # YIQ's chroma is the difference to gray, which saturation scales; then contrast about 128, then brightness.
    expected = b * (128 + c * (gray + s * (rgb - gray) - 128))
    affine = color_matrices(b, c, s, 0.0)[0]
    # The three-digit YIQ coefficients put gray off by up to 0.31 % of 255 where saturation removes colour.
    np.testing.assert_allclose(affine[:, :3] @ rgb + affine[:, 3], expected, atol=0.8 * abs(1 - s) * b * c + 1e-3)


def test_hue_turns_colours_and_leaves_gray() -> None:
    turn = color_matrices(1.0, 1.0, 1.0, 120.0)[0]
    # Chroma of gray is 0.13, not 0, by the three-digit coefficients; turned, and mapped back by rows of norm 2.
    np.testing.assert_allclose(turn[:, :3] @ (90, 90, 90), (90, 90, 90), atol=0.52)
    there_and_back = color_matrices(1.0, 1.0, 1.0, -120.0)[0][:, :3] @ turn[:, :3]
    np.testing.assert_allclose(there_and_back, np.eye(3), atol=1e-5)
    red = np.clip(turn[:, :3] @ (255, 0, 0), 0, 255)
    assert 60 < colorsys.rgb_to_hsv(*(red / 255))[0] * 360 < 300


def test_colour_affine_is_dalis_color_twist() -> None:
    dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    rng = np.random.default_rng(0)
    n = 40
    draws = np.stack([*rng.uniform(0.2, 1.8, (3, n)), rng.uniform(-180, 180, n)]).astype(np.float32)
    pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)

    @dali.pipeline_def(batch_size=n, num_threads=1, device_id=None)
    def twist() -> object:
        images = dali.fn.external_source(lambda: [pixels] * n, layout="HWC")
        b, c, s, h = dali.fn.external_source(lambda: [list(row) for row in draws], num_outputs=4)
        return dali.fn.color_twist(images, brightness=b, contrast=c, saturation=s, hue=h, dtype=dali.types.FLOAT)

    pipe = twist()
    pipe.build()
    (out,) = pipe.run()
    affine = color_matrices(*draws)
    ours = np.einsum("nij,hwj->nhwi", affine[:, :, :3], pixels.astype(np.float32)) + affine[:, None, None, :, 3]
    np.testing.assert_allclose(ours, np.stack([np.array(out.at(i)) for i in range(n)]), atol=2e-3)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.1)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"hflip": 1.5}, "hflip"),
        ({"contrast": -0.1}, "contrast"),
        ({"hue": 400.0}, "hue"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Augmentation(**setting)
