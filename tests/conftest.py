"""What every test shares: the interpreter switch, real photos, seeds, two threads."""

import importlib.util
import os
import re
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

# Before anything imports triton: without a GPU the kernels run on CPU tensors through Triton's interpreter.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest
import torch

with suppress(ImportError):  # the tests of kernels on a GPU run without it
    from hypothesis import settings

    # No test may depend on how fast the machine is.
    settings.register_profile("fastnet", deadline=None)
    settings.load_profile("fastnet")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with suppress(ImportError):
        from tests import interpreter

        interpreter.correct()

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file of tests that imports a package which is not installed is skipped and says so: the kernels' tests run
    where only torch, triton, numpy and pytest are."""
    report = yield
    if report.outcome == "failed" and isinstance(collector, pytest.Module):
        missing = re.findall(r"ModuleNotFoundError: No module named '(\w+)", str(report.longrepr))
        if missing and not (ROOT / missing[-1]).exists() and importlib.util.find_spec(missing[-1]) is None:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: {missing[-1]} is not installed")
    return report


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    """Two threads in all, also where two processes share the tests."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _denormals_again() -> Iterator[None]:
    """A training run in this process flushes them to zero for good."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True, scope="session")
def _nothing_measured_on_a_cpu() -> Iterator[None]:
    """What `--kernels auto` and `--amp auto` compute by must not depend on how fast the machine is that tests it: by
    PyTorch, in fp32, and nothing is compiled for it. `tests.runs.measured_on_a_cpu` takes this back."""
    try:
        from fastnet import device, forms
        from fastnet.training import ema, optim, step
        from fastnet.training.tuning import precision, tuner
    except ModuleNotFoundError:  # the tests of kernels on a GPU run without what training needs
        yield
        return

    def named(model: torch.nn.Module) -> bool:
        return getattr(getattr(model, "config", None), "kernels", "") == "native" and forms.computes_natively(model)

    timer_for = tuner.timer_for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "timer_for", lambda device: None if device.type == "cpu" else timer_for(device))
        patch.setattr(tuner, "unavailable", lambda: "it is a test")
        patch.setattr(precision, "unavailable", lambda say: "it is a test")
        patch.setattr(device, "unavailable", lambda say: None)
        for module in (ema, optim, step):
            patch.setattr(module, "computes_natively", named)
        yield


@pytest.fixture(scope="session")
def photos() -> Path:
    """Real photos in Food-101's layout: $FASTNET_PHOTOS, by default ../shared/data/food101-mini."""
    folder = Path(os.environ.get("FASTNET_PHOTOS", ROOT.parent / "shared" / "data" / "food101-mini"))
    if not (folder / "meta").is_dir():
        pytest.skip(f"no real photos at {folder}: set FASTNET_PHOTOS to a folder in Food-101's layout")
    return folder


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
