"""`python -m fastnet.export RUN_OR_FILE --to onnx|pt2|torchvision|timm`: the model for other programs, verified.

Each file is read back by the library that it is for and compared with the original on images before it takes its
name: on the run's own validation photos, or on generated ones where there are none.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_pipeline.loaders.augment import IMAGENET, Normalization
from fastnet import DISTRIBUTION
from fastnet.arch import EFFICIENTNET, Style, Variant
from fastnet.commands import parse
from fastnet.errors import UserError, run_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from fastnet.loading.trained import Trained
    from fastnet.model import EfficientNet, ModelConfig

Target = Literal["onnx", "pt2", "torchvision", "timm"]
ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "torchvision": "-torchvision.pth", "timm": "-timm.safetensors"}
NEEDED = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "pt2": (), "torchvision": (), "timm": ("timm",)}

IMAGES = 8
TOLERANCE = 1e-3
"""Of the largest logit: two fp32 implementations of one network stay far below it, another network far above."""


def export_model(trained: Trained, to: Target, path: Path, images: Tensor) -> float:
    """Write `trained` (on the CPU) to `path` and return the largest difference of a logit on `images` [N, 3, R, R],
    N at least 3.

    The file gets its name only when the difference is at most 1e-3 of the largest logit.
    Raises UserError where that is not so, a library is missing, the format cannot hold this model, or the file cannot
    be written.
    """
    import torch

    if missing := [name for name in NEEDED[to] if importlib.util.find_spec(name) is None]:
        extra = f"'{DISTRIBUTION}[onnx]'" if to == "onnx" else " ".join(missing)
        raise UserError(f"--to {to} writes and verifies with {', '.join(missing)}: pip install {extra}.")
    if to in ("torchvision", "timm"):
        _check_expressible(trained.model.config, to)
    writers: dict[str, Callable[[EfficientNet, Path, Tensor], Callable[[Tensor], Tensor]]] = {
        "onnx": _onnx, "pt2": _pt2, "torchvision": _torchvision, "timm": _timm,
    }  # fmt: skip
    with _becoming(path) as scratch, torch.no_grad():
        expected = trained.model(images)
        found = writers[to](trained.model, scratch, images)
        # Another number of images than the example's: the batch is free.
        difference = max((found(part) - trained.model(part)).abs().max().item() for part in (images, images[:1]))
        if not difference <= TOLERANCE * expected.abs().max().item():
            raise UserError(
                f"the exported model differs by {difference:.3g} from {trained.path} on logits up to "
                f"{expected.abs().max().item():.3g}: nothing was written; please report this."
            )
    return difference


def how_to_load(config: ModelConfig, to: Target, path: Path) -> str:
    """Python that loads what was exported; images are normalised by ImageNet's mean and deviation."""
    if to == "onnx":
        return f'onnxruntime.InferenceSession("{path}").run(None, {{"images": images}})'
    if to == "pt2":
        return f'torch.export.load("{path}").module()(images)'
    if to == "torchvision":
        norm = f"functools.partial(torch.nn.BatchNorm2d, eps={config.bn_eps:g}, momentum={config.bn_momentum:g})"
        return (
            f"torchvision.models.efficientnet_{config.variant}(num_classes={config.num_classes}, norm_layer={norm})"
            f'.load_state_dict(torch.load("{path}"))'
        )
    return (
        f'timm.create_model("{_timm_name(config)}", num_classes={config.num_classes}, bn_eps={config.bn_eps:g}, '
        f'bn_momentum={config.bn_momentum:g}, checkpoint_path="{path}")'
    )


def verification_images(trained: Trained, data: str | None) -> tuple[Tensor, str]:
    """(images [8, 3, R, R], what they are): validation images of `data` or of the run's own data set; generated
    patterns where there is none."""
    from data_pipeline import DataError, build_index
    from fastnet.analysis.predictions import load_views, subset

    own = trained.config.data if trained.config else None
    source = data or (own.data if own else None)
    if source is not None:
        try:
            index = build_index(source, val_fraction=own.val_fraction if own else None)
        except DataError:
            if data is not None:
                raise
        else:
            count = len(index.splits["val"])
            rows = [i * count // IMAGES for i in range(IMAGES)]
            return load_views(trained, subset(index, rows)), f"validation images of {index.root}"
    return generated_images(trained.resolution, trained.normalization), "generated images"


def generated_images(resolution: int, normalization: Normalization = IMAGENET) -> Tensor:
    """[8, 3, R, R]: patterns of the generated sample, normalised."""
    import torch
    from torchvision.transforms.v2 import functional as F

    from data_pipeline.dataset.synthetic import PATTERNS, render

    pictures = [torch.from_numpy(render(name, 0)).permute(2, 0, 1) for name in sorted(PATTERNS)[:IMAGES]]
    pixels = torch.stack([F.resize(picture, [resolution, resolution], antialias=True) for picture in pictures])
    mean, std = (torch.tensor(values)[:, None, None] for values in normalization)
    return (pixels / 255 - mean) / std


# --- formats ---------------------------------------------------------------------------------------------------
# Each writes the file, reads it back with the library that it is for, and returns what that computes.


def _onnx(model: EfficientNet, path: Path, images: Tensor) -> Callable[[Tensor], Tensor]:
    import logging

    import onnxruntime  # type: ignore[import-untyped]
    import torch

    # The exporter tells its steps and its deprecations; none is the user's to act on.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        model,
        (images[:2].contiguous(),),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=_free_batch(images),
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.contiguous().numpy()})[0])


def _pt2(model: EfficientNet, path: Path, images: Tensor) -> Callable[[Tensor], Tensor]:
    import torch

    program = torch.export.export(model, (images[:2].contiguous(),), dynamic_shapes=_free_batch(images))
    with warnings.catch_warnings():
        # About weights on a GPU; these are on the CPU.
        warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
        torch.export.save(program, path)
    return torch.export.load(path).module()


def _free_batch(images: Tensor) -> Any:
    """Any number of images, as far as the kernels' index arithmetic goes: 2**30 pixels in the stem's output."""
    import torch

    from kernels.launch import MAX_ROWS

    return ({0: torch.export.Dim("batch", max=MAX_ROWS // (-(-images.shape[-1] // 2)) ** 2)},)


def _torchvision(model: EfficientNet, path: Path, images: Tensor) -> Callable[[Tensor], Tensor]:
    from functools import partial

    import torch
    import torchvision

    from fastnet.loading.weights import to_torchvision

    torch.save(to_torchvision(model), path)
    config = model.config
    build = getattr(torchvision.models, f"efficientnet_{config.variant}")
    norm = partial(torch.nn.BatchNorm2d, eps=config.bn_eps, momentum=config.bn_momentum)
    theirs = build(num_classes=config.num_classes, norm_layer=norm)
    theirs.load_state_dict(torch.load(path, weights_only=True))
    return theirs.eval()


def _timm(model: EfficientNet, path: Path, images: Tensor) -> Callable[[Tensor], Tensor]:
    import timm
    from safetensors.torch import save_file

    from fastnet.loading.weights import to_timm

    config, name = model.config, _timm_name(model.config)
    # The name tells timm's two families apart, whose keys are the same.
    save_file({k: v.contiguous() for k, v in to_timm(model).items()}, path, {"architecture": name})
    return timm.create_model(
        name,
        num_classes=config.num_classes,
        bn_eps=config.bn_eps,
        bn_momentum=config.bn_momentum,
        checkpoint_path=str(path),
    ).eval()


def _timm_name(config: ModelConfig) -> str:
    return f"{'tf_' if config.padding == 'same' else ''}efficientnet_{config.variant}"


def _check_expressible(config: ModelConfig, to: Target) -> None:
    if config.scaling != "published":
        raise UserError(f"{to} has no model with {config.scaling} scaling: use --to onnx or --to pt2.")
    if to == "torchvision" and config.network.family is not EFFICIENTNET:
        raise UserError(f"torchvision has no {config.variant}: use --to timm, onnx or pt2.")
    if to == "torchvision" and config.padding == "same":
        raise UserError('torchvision has no "same" padding: use --to timm, onnx or pt2.')


@contextmanager
def _becoming(path: Path) -> Iterator[Path]:
    """A file beside `path`, of the same suffix, that takes its place when all went well and is removed when not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
            scratch = Path(folder) / path.name
            yield scratch
            os.replace(scratch, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): name another --out.") from error


# --- command ---------------------------------------------------------------------------------------------------


def export(
    target: str,
    /,
    to: Target,
    out: str | None = None,
    data: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    variant: Variant | None = None,
    weights_style: Style | None = None,
    resolution: int | None = None,
) -> int:
    """Write a run, or a file of weights, for other programs, and verify it there against the original.

    Args:
        target: A run's folder, a .safetensors or .pth file, or imagenet with --variant.
        to: onnx (dynamic batch, needs the extra `onnx`), pt2 (torch.export), or a state dict of torchvision (.pth) or
            timm (.safetensors).
        out: File to write; default: efficientnet_<variant>-<resolution> and an ending, in the run's folder or here.
        data: Data set whose validation images it is verified on; default: the run's, else generated images.
        checkpoint: Which weights of a run.
        variant: Which of the published weights imagenet means; with a file, what it must hold.
        weights_style: Whose names the file uses, when the file itself does not tell.
        resolution: Image side in pixels; default: the run's, or the one that the weights were published with.
    """
    import torch

    from data_pipeline.files import expanded
    from fastnet.allocator import keep_memory
    from fastnet.loading.trained import load_trained

    keep_memory(torch.device("cpu"))
    # On a CPU in fp32, where the libraries can be compared to the last digits.
    trained = load_trained(
        target, which=checkpoint, variant=variant, style=weights_style, resolution=resolution, kernels="torch"
    )
    name = f"efficientnet_{trained.model.config.variant}-{trained.resolution}{ENDINGS[to]}"
    path = expanded(Path(out)) if out else (trained.run or Path()) / name
    if path.suffix != Path(name).suffix:
        raise UserError(f"--out {path} must end in {Path(name).suffix} for --to {to}.", exit_status=2)
    images, what = verification_images(trained, data)
    difference = export_model(trained, to, path, images)
    reader = {"onnx": "onnxruntime", "pt2": "torch"}.get(to, to)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    print(f"verified with {reader} on {len(images)} {what}: largest difference of a logit {difference:.2e}")
    print(f"load it with: {how_to_load(trained.model.config, to, path)}")
    return 0


def main() -> None:
    sys.exit(run_command(lambda: parse(export, prog="python -m fastnet.export")))


if __name__ == "__main__":
    main()
