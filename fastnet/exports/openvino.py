"""OpenVINO: a model as its intermediate representation, an .xml beside a .bin of the same name."""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastnet.exports.facts import as_text, from_text
from fastnet.exports.program import Compute, exported, names_of

# With this package OpenVINO, NNCF after it, tell their maker over the network that they are used; without it they work
# as well.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

Precision = Literal["f32", "bf16"]
"""OpenVINO's INFERENCE_PRECISION_HINT: on a CPU that multiplies bf16, it takes that of its own accord."""


def converted(module: nn.Module, example: Tensor) -> Any:
    """The module as an openvino.Model whose input's free sizes stay free."""
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, not the user's to act on
        model = openvino.convert_model(exported(module, example).run_decompositions())
    given, made = names_of(module)
    model.inputs[0].get_tensor().set_names({given})
    model.outputs[0].get_tensor().set_names({made})
    return model


def save(model: Any, path: Path, facts: Mapping[str, Any]) -> None:
    """Under "model_info" of the file's rt_info, where OpenVINO's Model API looks, stand the facts."""
    import openvino

    for name, text in as_text(facts).items():
        model.set_rt_info(text, ["model_info", name])
    openvino.save_model(model, path, compress_to_fp16=False)


def facts_in(path: Path) -> dict[str, Any]:
    import openvino

    info = openvino.Core().read_model(path).get_rt_info("model_info").astype(dict)
    return from_text({name: value.astype(str) for name, value in info.items()})


def crash_of(path: Path, side: int) -> str | None:
    """What ends a process that runs the file on one and on two images of `side` pixels; None where it lives.

    OpenVINO's kernels for 8 bits have been seen to end it (2026.4: depthwise convolutions of few channels, one image at
    a time, where the CPU multiplies matrices of 8 bits), which no exception tells.
    """
    done = subprocess.run([sys.executable, "-c", _RUN, str(path), str(side)], capture_output=True)
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    return f"exit status {done.returncode}" if done.returncode else None


_RUN = """
import sys
sys.modules["openvino_telemetry"] = None
import numpy, openvino
model = openvino.compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
for count in (1, 1, 2, 1):
    model(numpy.zeros((count, 3, int(sys.argv[2]), int(sys.argv[2])), "float32"))
"""


def run_openvino(path: Path, precision: Precision = "f32", threads: int | None = None) -> Compute:
    import openvino

    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda x: torch.from_numpy(compiled(x.contiguous().numpy())[0].copy())
