"""Post-training quantisation to 8 bits, on the run's own photos, and a search for what has to stay in fp32.

Quantised are convolutions and products, weights per channel; ranges of activations come from training photos. Where
that costs more than `MAX_LOSS` of top-1 on the validation photos, layers stay as they were: squeeze-and-excitation,
whose gates multiply everything; depthwise convolutions, whose channels differ most in range; then one part of the
network after another, and several in the order of what each one's rounding costs. The first attempt within the limit is
taken, or the best.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastnet.errors import UserError
from fastnet.exports.formats import run_onnx
from fastnet.exports.openvino import crash_of, run_openvino
from fastnet.exports.program import Compute

MAX_LOSS = 0.5
"""Points of top-1."""
PARTS = 8
CALIBRATION = 128
"""Training photos that ranges are taken from."""


@dataclass(frozen=True)
class Layer:
    """kind: "gate" (of squeeze-and-excitation), "depthwise" or "other"."""

    name: str
    kind: str


class Quantizer(Protocol):
    layers: list[Layer]
    """In the order in which they run."""

    def write(self, kept: frozenset[str], path: Path) -> None:
        """Quantise all layers but these."""

    def crash(self, path: Path) -> str | None:
        """What ends a process that runs a file; None where it lives."""

    def run(self, path: Path) -> Compute: ...


@dataclass(frozen=True)
class Attempt:
    """kept: what stays in fp32. top1 in percent. error: mean squared difference of a logit."""

    kept: str
    top1: float
    agreement: float
    error: float
    path: Path


def search(
    quantizer: Quantizer,
    judge: Callable[[Compute], tuple[float, float, float]],
    reference: float,
    folder: Path,
    log: Callable[[str], None],
    max_loss: float = MAX_LOSS,
) -> Attempt:
    """The first attempt whose top-1 is at most `max_loss` points below `reference`, else the best of all, of equals the
    one that keeps least.

    judge: what a program computes -> (top-1 and agreement with the original in percent, mean squared error of a logit).
    log: told each attempt. Raises UserError where no attempt can be run.
    """
    tried: list[Attempt] = []

    def attempt(words: str, kept: frozenset[str]) -> Attempt:
        path = folder / f"attempt-{len(tried)}.model"
        quantizer.write(kept, path)
        if (ended := quantizer.crash(path)) is not None:
            log(f"int8, {words} in fp32: the library that runs it crashes ({ended}), so it is left out")
            tried.append(Attempt(words, -math.inf, 0.0, math.inf, path))
            return tried[-1]
        found = Attempt(words, *judge(quantizer.run(path)), path)
        tried.append(found)
        log(f"int8, {words} in fp32: top-1 {found.top1:.2f} %, {found.agreement:.1f} % of the answers the same")
        return found

    gates = frozenset(layer.name for layer in quantizer.layers if layer.kind == "gate")
    deep = frozenset(layer.name for layer in quantizer.layers if layer.kind == "depthwise")
    plans = [("nothing", frozenset[str]())]
    plans += [("squeeze-and-excitation", gates)] if gates else []
    plans += [(f"{plans[1][0]} and depthwise convolutions" if gates else "depthwise convolutions", gates | deep)]
    for words, kept in plans:
        if reference - attempt(words, kept).top1 <= max_loss:
            return tried[-1]
    base = min(tried, key=lambda one: one.error)
    already, prefix = dict(plans)[base.kept], "" if base.kept == "nothing" else f"{base.kept} and "
    parts = list(_parts([layer for layer in quantizer.layers if layer.name not in already]))
    alone = []
    for i, part in enumerate(parts):
        alone.append(attempt(f"{prefix}part {i + 1} of {len(parts)}", already | part))
        if reference - alone[-1].top1 <= max_loss:
            return alone[-1]
    order = sorted(range(len(parts)), key=lambda i: alone[i].error)
    for count in range(2, len(parts)):
        chosen = sorted(order[:count])
        words = f"{prefix}parts {', '.join(str(i + 1) for i in chosen)} of {len(parts)}"
        if reference - attempt(words, already.union(*(parts[i] for i in chosen))).top1 <= max_loss:
            return tried[-1]
    best = max(tried, key=lambda one: one.top1)
    if best.error == math.inf:
        raise UserError("the library that runs int8 files crashes with each that was tried: export without --int8.")
    return best


def _parts(layers: Sequence[Layer]) -> Iterator[frozenset[str]]:
    """The layers in at most PARTS runs of about the same length."""
    edges = [round(i * len(layers) / PARTS) for i in range(PARTS + 1)]
    for first, end in pairwise(edges):
        if end > first:
            yield frozenset(layer.name for layer in layers[first:end])


class OnnxQuantizer:
    """ONNX Runtime's static quantisation. source: an fp32 file; calibration [N, 3, R, R]: what ranges are taken of."""

    def __init__(self, source: Path, calibration: Tensor) -> None:
        import onnx  # type: ignore[import-not-found,unused-ignore]

        logging.getLogger().addFilter(_quiet)
        self.source, self.calibration = source, calibration
        nodes = [node for node in onnx.load(source).graph.node if node.op_type in ("Conv", *_PRODUCTS)]
        self.layers = _gated([Layer(node.name, _kind(node)) for node in nodes])

    def write(self, kept: frozenset[str], path: Path) -> None:
        from onnxruntime.quantization import (  # type: ignore[import-untyped]
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        quantize_static(
            self.source,
            path,
            _Reader(self.calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(kept),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"CalibMovingAverage": True, "CalibMovingAverageConstant": 0.05},
        )

    def crash(self, path: Path) -> str | None:
        return None

    def run(self, path: Path) -> Compute:
        return run_onnx(path)


_PRODUCTS = ("Gemm", "MatMul")


def _kind(node: Any) -> str:
    """Of an ONNX node."""
    if node.op_type in _PRODUCTS:
        return "gate"
    return "depthwise" if any(one.name == "group" and one.i > 1 for one in node.attribute) else "other"


def _gated(layers: list[Layer]) -> list[Layer]:
    """Products are squeeze-and-excitation's, all but the last, which is the classifier."""
    return [*layers[:-1], Layer(layers[-1].name, "other")]


def _quiet(record: logging.LogRecord) -> bool:
    return "quantization" not in record.getMessage()  # advice on preprocessing, which the exporter has done


class _Reader:
    """Calibration photos one by one, as ONNX Runtime asks for them."""

    def __init__(self, images: Tensor) -> None:
        self._left = iter(images.split(1))

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._left, None)
        return None if image is None else {"images": image.contiguous().numpy()}


class OpenvinoQuantizer:
    """NNCF's post-training quantisation of an OpenVINO file, mixed preset."""

    def __init__(self, source: Path, calibration: Tensor) -> None:
        import openvino

        self.source, self.calibration = source, calibration
        kinds = {"Convolution": "other", "GroupConvolution": "depthwise", "MatMul": "gate"}
        nodes = openvino.Core().read_model(source).get_ordered_ops()
        self.layers = _gated(
            [
                Layer(node.get_friendly_name(), kinds[node.get_type_name()])
                for node in nodes
                if node.get_type_name() in kinds
            ]
        )

    def write(self, kept: frozenset[str], path: Path) -> None:
        # It looks for CUDA's compiler, which is not needed, and warns.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        made = nncf.quantize(
            openvino.Core().read_model(self.source),
            nncf.Dataset([image.contiguous().numpy() for image in self.calibration.split(1)]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(self.calibration),
            ignored_scope=nncf.IgnoredScope(names=sorted(kept)) if kept else None,
        )
        openvino.save_model(made, path.with_suffix(".xml"), compress_to_fp16=False)

    def crash(self, path: Path) -> str | None:
        return crash_of(path.with_suffix(".xml"), self.calibration.shape[-1])

    def run(self, path: Path) -> Compute:
        return run_openvino(path.with_suffix(".xml"))


def judge_on(images: Tensor, labels: Tensor, original: Tensor, batch: int = 16) -> Callable[[Compute], Any]:
    """`search`'s judge: images [N, 3, R, R] of the validation split, and the original's logits of them [N, K]."""

    def judge(compute: Compute) -> tuple[float, float, float]:
        logits = torch.cat([compute(part) for part in images.split(batch)])
        same = logits.argmax(1) == original.argmax(1)
        right = logits.argmax(1) == labels
        error = (logits - original).square().mean().item()
        return 100 * right.double().mean().item(), 100 * same.double().mean().item(), error

    return judge
