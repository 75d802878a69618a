"""Quantisation: what stays in fp32, until the loss is small enough; and a file that computes nearly the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline import build_index
from fastnet.errors import UserError
from fastnet.export import generated_photos
from fastnet.exports import openvino
from fastnet.exports.compare import Form, recommended, table_of
from fastnet.exports.facts import facts_of
from fastnet.exports.formats import ENDINGS, WRITERS, Target, read_program
from fastnet.exports.int8 import Attempt, Layer, OnnxQuantizer, OpenvinoQuantizer, search
from fastnet.exports.measured import Judged, programs, require_int8, write_int8
from fastnet.exports.program import Compute
from fastnet.loaded import LoadedModel
from fastnet.loading.trained import Trained
from fastnet.model import EfficientNet, ModelConfig
from tests.runs import CLASSES, make_pictures, settle


class Costs:
    """A quantizer in which each layer that is not kept costs points; a program computes the sum."""

    def __init__(self, costs: dict[str, float], kinds: dict[str, str], crashing: tuple[float, ...] = ()) -> None:
        self.costs, self.crashing = costs, crashing
        self.layers = [Layer(name, kinds.get(name, "other")) for name in costs]
        self.written: dict[Path, float] = {}

    def write(self, kept: frozenset[str], path: Path) -> None:
        self.written[path] = sum(cost for name, cost in self.costs.items() if name not in kept)

    def crash(self, path: Path) -> str | None:
        return "SIGSEGV" if self.written[path] in self.crashing else None

    def run(self, path: Path) -> Compute:
        return lambda x: x + self.written[path]


def searched(costs: dict[str, float], kinds: dict[str, str], tmp_path: Path) -> tuple[str, float, list[str]]:
    said: list[str] = []

    def judge(compute: Compute) -> tuple[float, float, float]:
        lost = compute(torch.zeros(())).item()
        return 80 - lost, 100 - lost, lost

    found = search(Costs(costs, kinds), judge, 80, tmp_path, said.append)
    return found.kept, found.top1, said


def test_no_more_is_kept_than_has_to_be(tmp_path: Path) -> None:
    layers = {f"conv{i}": 0.01 for i in range(16)}
    assert searched(layers, {}, tmp_path)[:2] == ("nothing", pytest.approx(79.84))
    kinds = {"gate": "gate", "deep": "depthwise"}
    kept, top1, said = searched({**layers, "gate": 4.0, "deep": 0.1}, kinds, tmp_path)
    assert (kept, len(said)) == ("squeeze-and-excitation", 2)
    assert top1 == pytest.approx(79.74)
    assert searched({**layers, "gate": 4.0, "deep": 2.0}, kinds, tmp_path)[0].endswith("and depthwise convolutions")
    # Two parts of eight are to blame: the costliest alone does not suffice.
    kept, top1, said = searched({**layers, "gate": 1.0, "conv4": 2.0, "conv10": 3.0}, kinds, tmp_path)
    assert kept.endswith("and parts 3, 6 of 8")
    assert top1 == pytest.approx(80 - 0.12)
    assert len(said) == 3 + 8 + 1


def test_the_best_is_taken_where_nothing_suffices(tmp_path: Path) -> None:
    kept, top1, _ = searched({f"conv{i}": 9.0 for i in range(16)}, {}, tmp_path)
    assert kept.endswith("of 8")
    assert top1 == pytest.approx(80 - 2 * 9)  # all parts but one


def test_of_equals_the_one_that_keeps_least(tmp_path: Path) -> None:
    """One answer of few is lost whatever stays in fp32, but for the whole."""
    found = search(
        Costs({f"conv{i}": 1.0 for i in range(16)}, {"conv1": "depthwise"}),
        lambda compute: (80.0 if compute(torch.zeros(())) == 0 else 75.0, 90.0, compute(torch.zeros(())).item()),
        80,
        tmp_path,
        lambda text: None,
    )
    assert (found.kept, found.top1) == ("nothing", 75.0)


def test_an_attempt_that_crashes_is_said_and_left_out(tmp_path: Path) -> None:
    said: list[str] = []

    def found(crashing: tuple[float, ...]) -> Attempt:
        costs = Costs({"conv": 0.25, "deep": 0.125}, {"deep": "depthwise"}, crashing)
        return search(costs, lambda compute: (80 - compute(torch.zeros(())).item(), 100, 0), 80, tmp_path, said.append)

    assert found((0.375,)).kept == "depthwise convolutions"
    assert said[0] == "int8, nothing in fp32: the library that runs it crashes (SIGSEGV), so it is left out"
    with pytest.raises(UserError, match="crashes with each that was tried: export without --int8"):
        found((0.375, 0.25, 0.125, 0.0))


def test_a_process_that_ends_is_told_by_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, words in (
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("raise SystemExit(3)", "exit status 3"),
        ("import sys; assert sys.argv[1:] == ['m.xml', '64']", None),
    ):
        monkeypatch.setattr(openvino, "_RUN", code)
        assert openvino.crash_of(Path("m.xml"), 64) == words


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_an_int8_file_computes_nearly_the_same(tmp_path: Path, to: Target) -> None:
    if to == "openvino":
        pytest.importorskip("nncf", reason="nncf is not installed: pip install '.[int8]'")
    model = settle(EfficientNet(ModelConfig(width=0.25, depth=0.25, num_classes=3, kernels="torch")))
    weights = tmp_path / "w.safetensors"
    weights.touch()
    trained = Trained(weights, None, None, model, 64, 0.875, CLASSES)
    see = LoadedModel(trained).transform
    images = torch.stack([see(photo.permute(2, 0, 1)) for photo in generated_photos(64)])
    source, path = tmp_path / f"m{ENDINGS[to]}", tmp_path / f"m-int8{ENDINGS[to]}"
    facts = facts_of(trained)
    with torch.no_grad():
        WRITERS[to](model, source, images[:2].contiguous(), facts)
        judged = Judged(trained, build_index(make_pictures(tmp_path / "data")))
        best = write_int8(judged, to, source, path, facts, lambda text: None)
        expected = model(judged.images)
    compute, kept = read_program(path)
    assert kept == facts | {"precision": f"int8, {best.kept} in fp32"}
    # A network that was never trained suffers from rounding; another one would be off by twice the variance.
    assert (compute(judged.images) - expected).square().mean() < 0.5 * expected.var()
    quantizer = (OnnxQuantizer if to == "onnx" else OpenvinoQuantizer)(source, images)
    kinds = [layer.kind for layer in quantizer.layers]
    blocks = len(model.blocks)
    assert (kinds.count("gate"), kinds.count("depthwise"), kinds[-1]) == (2 * blocks, blocks, "other")
    forms = judged.forms(programs(to, source, path))
    assert len(forms) == (3 if to == "onnx" else 4)
    assert forms[1].agreement == 100
    assert forms[-1].bytes < forms[1].bytes
    assert all(form.rate > 0 for form in forms)


def test_the_fastest_that_is_good_enough_is_recommended() -> None:
    forms = [
        Form("PyTorch, fp32", 20_000_000, 75.0, 100.0, 100.0),
        Form("bf16", 20_000_000, 74.5, 99.0, 460.0),
        Form("int8", 5_000_000, 71.0, 80.0, 600.0),
    ]
    assert recommended(forms, 0.5).name == "bf16"
    assert recommended(forms[::2], 0.5).name == "PyTorch, fp32"
    assert table_of(forms)[2].split() == ["bf16", "20.0", "MB", "74.50", "%", "99.0", "%", "460"]


def test_what_cannot_be_quantised_is_said() -> None:
    with pytest.raises(UserError, match="--int8 quantises for --to onnx and openvino, not timm"):
        require_int8("timm")
