"""What first use measured is kept, shared and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastnet import forms
from fastnet.training.tuning import prepare_inference
from fastnet.training.tuning.kept import KeptResults
from fastnet.training.tuning.measure import Bench, Result
from kernels import configs, launch
from tests.tuning import (
    IMAGES,
    RESOLUTION,
    A,
    B,
    C,
    Machine,
    Other,
    block_forms,
    in_output,
    machine,
    prepare,
    raises,
    small_model,
)

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="stands in for a GPU on a CPU")
__all__ = ["machine"]


# --- what is kept ---------------------------------------------------------------------------------------------------


def refuse(*args: Any, **options: Any) -> Any:
    raise AssertionError("measured again")


def test_a_second_run_reads_what_the_first_measured(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.configs, machine.fault = {A: 3.0, B: 1.0, C: 2.0}, in_output
    first = machine.tuner()
    chosen = prepare(first)
    content = json.loads(first.kept.path.read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert len(content["entries"]) == 5  # stem, three blocks, head
    forms.forget()
    configs.forget()
    with monkeypatch.context() as patched:
        patched.setattr(Bench, "measure", refuse)
        assert prepare(machine.tuner()) == chosen == ["triton-ops", "triton", "triton"]
    assert set(configs._choices.values()) == {B}
    machine.fault = lambda channels, form, y: y
    assert prepare(machine.tuner(tune="again")) == ["triton"] * 3
    assert prepare(machine.tuner()) == ["triton"] * 3


def test_other_shapes_and_modes_are_measured_for_themselves(machine: Machine) -> None:
    tuner, model = machine.tuner(), small_model()
    for images, training in ((IMAGES, True), (2 * IMAGES, True), (IMAGES, False)):
        before = machine.now
        tuner.prepare(model, RESOLUTION, images, training=training)
        assert machine.now > before
        after = machine.now
        tuner.prepare(model, RESOLUTION, images, training=training)
        assert machine.now == after


@pytest.mark.parametrize("content", ["{", "[]", '{"environment": {}, "entries": {}}', "\udcff"])
def test_a_damaged_or_foreign_file_costs_a_sentence(content: str, machine: Machine) -> None:
    tuner = machine.tuner()
    tuner.kept.path.parent.mkdir(parents=True)
    tuner.kept.path.write_bytes(content.encode("utf-8", "surrogateescape"))
    prepare(tuner)
    assert len(machine.said) == 1
    assert str(tuner.kept.path) in machine.said[0]
    assert json.loads(tuner.kept.path.read_text())["entries"]


def test_a_damaged_entry_is_measured_again(machine: Machine) -> None:
    tuner = machine.tuner()
    prepare(tuner)
    content = json.loads(tuner.kept.path.read_text())
    name = next(name for name in content["entries"] if name.startswith("block"))
    content["entries"][name] = {"eager": 3}
    tuner.kept.path.write_text(json.dumps(content))
    before = machine.now
    prepare(machine.tuner())
    assert machine.now > before


def test_a_configuration_that_is_no_candidate_any_more_is_forgotten(machine: Machine) -> None:
    machine.configs = {A: 3.0, B: 1.0, C: 2.0}
    tuner = machine.tuner()
    prepare(tuner)
    tuner.kept.path.write_text(tuner.kept.path.read_text().replace('"letter": "B"', '"letter": "Z"'))
    configs.forget()
    assert prepare(machine.tuner()) == ["triton"] * 3
    assert not configs._choices


def test_of_two_processes_that_measured_at_once_the_first_counts(tmp_path: Path) -> None:
    said: list[str] = []
    where = {"gpu": "A B", "torch": "1"}
    first, second = (KeptResults(where, said.append, tmp_path) for _ in range(2))
    mine = {"block": {"eager": {"torch": 1.0}, "compiled": {}}}
    assert first.add(mine) == mine
    late = {"block": {"eager": {"torch": 2.0}, "compiled": {"torch": 3.0}}, "other": {"eager": {}}}
    expected = {"block": {"eager": {"torch": 1.0}, "compiled": {"torch": 3.0}}, "other": {"eager": {}}}
    assert second.add(late) == first.read() == expected
    assert second.add(late, replace=True) == first.read() == late
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".lock"]
    assert not said
    assert KeptResults({"gpu": "A B", "torch": "2"}, said.append, tmp_path).read() == {}


def test_a_cache_that_cannot_be_written_costs_a_sentence_and_determinism_believes_predictions(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    machine.torch = 0.5
    assert prepare(machine.tuner()) == ["torch"] * 3
    assert len(machine.said) == 1
    assert "can't be kept in" in machine.said[0]
    forms.forget()
    machine.said.clear()
    assert prepare(machine.tuner(deterministic=True)) == ["triton"] * 3
    assert "--deterministic wants one choice a machine" in machine.said[0]


def test_an_evaluation_takes_what_is_kept_and_measures_nothing(machine: Machine, capsys: Any) -> None:
    model = small_model().eval()
    machine.fault = raises
    prepare_inference(model, RESOLUTION, IMAGES, "off")
    assert block_forms(model, training=False) == ["triton-ops", "triton", "triton"]
    assert "inference is not fused, since it fails here" in capsys.readouterr().err
    forms.forget()
    machine.fault, machine.torch = lambda channels, form, y: y, 0.5
    machine.tuner().prepare(model, RESOLUTION, IMAGES, training=False)
    forms.forget()
    machine.torch = 10.0
    prepare_inference(model, RESOLUTION, IMAGES, "off")
    assert block_forms(model, training=False) == ["torch"] * 3


def test_predictions_are_believed_where_asked_and_nothing_is_kept(machine: Machine) -> None:
    machine.torch = 0.5
    tuner = machine.tuner(tune="off")
    assert prepare(tuner) == ["triton"] * 3
    assert not tuner.kept.path.exists()
    assert not configs._choices


# --- several ranks --------------------------------------------------------------------------------------------------


def test_ranks_with_the_same_gpu_share_the_result_of_the_first(machine: Machine) -> None:
    machine.torch = 0.5
    other = Other(lambda mine: mine if isinstance(mine, dict) and "gpu" in mine else None)
    assert prepare(machine.tuner(ranks=other)) == ["torch"] * 3


def test_another_kind_of_gpu_has_its_say(machine: Machine) -> None:
    machine.torch = 0.5

    def theirs(mine: Any) -> Any:
        if "gpu" in mine:
            return mine | {"gpu": "another"}
        return {subject: Result(eager={"triton": 9.0, "triton-ops": 20.0, "torch": 20.0}) for subject in mine}

    assert prepare(machine.tuner(ranks=Other(theirs))) == ["triton"] * 3
