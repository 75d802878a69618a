"""An export with its price: quantised to 8 bits where asked, and each form of it judged and timed on this machine."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipeline import Index
from fastnet import DISTRIBUTION
from fastnet.analysis.predictions import load_views, subset
from fastnet.errors import UserError
from fastnet.exports.compare import Form, rates, size_of
from fastnet.exports.facts import as_text
from fastnet.exports.formats import run_onnx
from fastnet.exports.int8 import CALIBRATION, Attempt, OnnxQuantizer, OpenvinoQuantizer, judge_on, search
from fastnet.exports.openvino import run_openvino, save
from fastnet.exports.program import Compute
from fastnet.loading.trained import Trained

JUDGED = 1000
"""Validation photos that a form is judged on, at most."""

Log = Callable[[str], None]


class Judged:
    """The photos of a data set that judge a model's forms, and what the model itself says of them."""

    def __init__(self, trained: Trained, index: Index) -> None:
        self.trained, self.index = trained, index
        self.images = views(trained, index, "val", JUDGED)
        picked = _spread(len(index.splits["val"]), JUDGED)
        self.labels = torch.tensor(index.splits["val"].labels[picked])
        with torch.inference_mode():
            logits = torch.cat([trained.model(part) for part in self.images.split(16)])
        self.judge = judge_on(self.images, self.labels, logits)
        self.top1 = 100 * (logits.argmax(1) == self.labels).double().mean().item()

    def forms(self, files: Mapping[str, tuple[Path, Compute]]) -> list[Form]:
        """PyTorch first, then each file by its name."""
        eager = self.trained.model
        speeds = rates([eager, *(compute for _, compute in files.values())], self.images[:1])
        made = [Form("PyTorch, fp32", self.trained.path.stat().st_size, self.top1, 100.0, speeds[0])]
        for (name, (path, compute)), speed in zip(files.items(), speeds[1:], strict=True):
            top1, same, _ = self.judge(compute)
            made.append(Form(name, size_of(path), top1, same, speed))
        return made


def views(trained: Trained, index: Index, split: Literal["train", "val"], most: int) -> Tensor:
    """[N, 3, R, R]: at most so many photos of a split, spread over it, as the model sees them in validation."""
    chosen = replace(index, splits={"val": index.splits[split]})
    return load_views(trained, subset(chosen, _spread(len(index.splits[split]), most)))


def _spread(count: int, most: int) -> list[int]:
    return [i * count // min(count, most) for i in range(min(count, most))]


def require_int8(to: str) -> None:
    """UserError where `to` is not quantised, or what does it is not installed."""
    if to not in ("onnx", "openvino"):
        raise UserError(f"--int8 quantises for --to onnx and openvino, not {to}.", exit_status=2)
    if to == "openvino" and importlib.util.find_spec("nncf") is None:
        raise UserError(f"--to openvino --int8 quantises with NNCF: pip install '{DISTRIBUTION}[int8]'.")


def write_int8(judged: Judged, to: str, source: Path, path: Path, facts: Mapping[str, Any], log: Log) -> Attempt:
    """Quantise the fp32 file `source` into `path`, on training photos, as `fastnet.exports.int8.search` finds."""
    calibration = views(judged.trained, judged.index, "train", CALIBRATION)
    quantizer = (OnnxQuantizer if to == "onnx" else OpenvinoQuantizer)(source, calibration)
    with tempfile.TemporaryDirectory(prefix=".int8-", dir=path.parent) as folder:
        best = search(quantizer, judged.judge, judged.top1, Path(folder), log)
        noted = dict(facts) | {"precision": f"int8, {best.kept} in fp32"}
        if to == "onnx":
            import onnx  # type: ignore[import-not-found,unused-ignore]

            model = onnx.load(best.path)
            del model.metadata_props[:]
            onnx.helper.set_model_props(model, as_text(noted))
            onnx.save(model, best.path)
            os.replace(best.path, path)
        else:
            import openvino

            save(openvino.Core().read_model(best.path.with_suffix(".xml")), path, noted)
    return best


def programs(to: str, path: Path, int8: Path | None) -> dict[str, tuple[Path, Compute]]:
    """By name the ways to run what was written."""
    if to == "onnx":
        found = {"ONNX Runtime, fp32": (path, run_onnx(path))}
        return found | ({"ONNX Runtime, int8": (int8, run_onnx(int8))} if int8 else {})
    found = {
        "OpenVINO, fp32": (path, run_openvino(path, "f32")),
        "OpenVINO, bf16 by hint": (path, run_openvino(path, "bf16")),
    }
    return found | ({"OpenVINO, int8": (int8, run_openvino(int8, "f32"))} if int8 else {})
