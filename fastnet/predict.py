"""`python -m fastnet.predict RUN_OR_FILE IMAGE...`: what a model sees in images or folders of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from data_pipeline.dataset.formats import WORDS, is_read
from fastnet.arch import EFFICIENTNET
from fastnet.commands import parse
from fastnet.errors import UserError, run_command
from fastnet.loading.options import InferenceOptions, WeightsOptions

if TYPE_CHECKING:
    from torch import Tensor

    from fastnet.analysis.predictions import Tta
    from fastnet.device import Amp
    from fastnet.loading.trained import Trained

FEW_IMAGES = InferenceOptions(batch_size=32, workers=0, amp="off")


def expand(images: Iterable[str]) -> list[Path]:
    """Files as they are, folders as the images below them, sorted. UserError where a folder holds none."""
    files: list[Path] = []
    for name in images:
        path = Path(name)
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.rglob("*") if is_read(file.name))
        if not found:
            raise UserError(f"{path} holds no image ({WORDS}): name another folder.")
        files += found
    return files


def predict_files(
    trained: Trained,
    files: Sequence[str | Path],
    *,
    top: int = 5,
    tta: Tta = "off",
    amp: Amp = "off",
    batch_size: int = 32,
    workers: int = 0,
) -> list[dict[str, Any]]:
    """For each file, in order: {"file", "top": [{"class", "label", "probability"}, ...]}, or {"file", "error"}.

    The images are cut, resized and normalised as validation images are.
    """
    from fastnet.analysis.predictions import collect, index_files, view_loader

    index, bad = index_files(files)
    results: dict[str, dict[str, Any]] = {path: {"file": path, "error": reason} for path, reason in bad}
    paths = index.splits["val"].paths
    if paths:
        loader = view_loader(trained, index, tta=tta, backend="torch", batch_size=batch_size, workers=workers)
        try:
            found = collect(trained, loader, tta=tta, amp=amp)
        finally:
            loader.close()
        results |= {path: {"file": path, "error": reason} for path, reason in loader.quarantined}
        best = found.probabilities.topk(min(top, trained.model.config.num_classes), 1)
        for position, values, labels in zip(found.positions.tolist(), *best, strict=True):
            results[paths[position]] = {"file": paths[position], "top": ranked(trained, values, labels)}
    return [results[str(file)] for file in files]


def ranked(trained: Trained, values: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """An image's most probable classes by name, from their probabilities and labels, best first."""
    return [
        {"class": trained.class_name(label), "label": label, "probability": probability}
        for probability, label in zip(values.tolist(), labels.tolist(), strict=True)
    ]


def write_grad_cams(trained: Trained, results: list[dict[str, Any]], stages: Sequence[int], folder: Path) -> list[Path]:
    """One PNG for each predicted file: the model's view, and where each stage highlights evidence for it. No
    file that is there is replaced."""
    import torch

    from fastnet.analysis.figures import grad_cam_grid, save
    from fastnet.analysis.gradcam import grad_cam
    from fastnet.analysis.predictions import index_files, load_views

    written: list[Path] = []
    for result in results:
        if "top" not in result:
            continue
        index, _ = index_files([result["file"]])
        best = result["top"][0]
        images = load_views(trained, index)
        _, maps = grad_cam(trained.model, images, torch.tensor([best["label"]], device=trained.device), stages=stages)
        stem, number = Path(result["file"]).stem, 2
        path = folder / f"{stem}.png"
        while os.path.lexists(path):  # the photo itself, or what an earlier call wrote
            path, number = folder / f"{stem}-{number}.png", number + 1
        save(
            grad_cam_grid(images, maps, [f"{best['class']} {100 * best['probability']:.1f} %"], trained.normalization),
            path,
        )
        written.append(path)
    return written


def predict(
    target: str,
    images: tuple[str, ...],
    /,
    top: int = 5,
    json: bool = False,
    csv: str | None = None,
    gradcam: bool = False,
    gradcam_stages: tuple[int, ...] = (4, 6, 9),
    out: str = "gradcam",
    weights: WeightsOptions = WeightsOptions(),
    inference: InferenceOptions = FEW_IMAGES,
) -> int:
    """Name the most probable classes of each image. A file that cannot be read is said so, and the rest go on (exit
    status 1 at the end).

    Args:
        target: A run's folder, a .safetensors or .pth file, or imagenet with --variant.
        images: Images, folders of images, or addresses of images on the web.
        top: Classes to name.
        json: Print one JSON array instead of lines.
        csv: File for a table of all images and their classes, which a spreadsheet opens.
        gradcam: Also write a picture of each image with the evidence for its class highlighted (Grad-CAM).
        gradcam_stages: Stages to look at, 1 (stem) to 9 (head), as `python -m fastnet.summary` counts them.
        out: Folder for --gradcam's pictures.
        weights: Which model, and how it sees an image.
        inference: How images go through it.
    """
    from data_pipeline.files import expanded
    from fastnet.allocator import keep_memory
    from fastnet.device import pick_device, pick_workers, tell
    from fastnet.loading.trained import load_trained
    from fastnet.training.tuning import pick_precision

    check_numbers(inference, top=top, gradcam_stages=gradcam_stages)
    if not images:
        raise UserError("name at least one image or folder after the run or file.", exit_status=2)
    where = pick_device(inference.device)
    keep_memory(where)
    trained = load_trained(target, weights, device=where, kernels=inference.kernels)
    with TemporaryDirectory(prefix="fastnet-") as downloads:
        files, missing = fetched(images, Path(downloads))
        results = predict_files(
            trained,
            list(files),
            top=top,
            tta=inference.tta,
            amp=pick_precision(inference.amp, where, inference.kernels, trained.model.config.variant, tell),
            batch_size=inference.batch_size,
            workers=pick_workers(inference.workers, where),
        )
        if gradcam:
            folder = expanded(Path(out))
            pictures = write_grad_cams(trained, results, gradcam_stages, folder)
            print(f"{len(pictures)} Grad-CAM pictures in {folder}", file=sys.stderr)
    results = [result | {"file": files[Path(result["file"])]} for result in results] + missing
    _print_json(results) if json else _print_lines(results)
    if csv is not None:
        _write_csv(results, expanded(Path(csv)))
    return int(any("error" in result for result in results))


def fetched(images: Iterable[str], folder: Path) -> tuple[dict[Path, str], list[dict[str, Any]]]:
    """({file: what it is called} of all that `images` name, addresses fetched into `folder`; {"file", "error"} of those
    that cannot be had)."""
    from fastnet.analysis.fetch import fetch, is_url

    files: dict[Path, str] = {}
    missing: list[dict[str, Any]] = []
    for name in images:
        if not is_url(name):
            files |= {path: str(path) for path in expand([name])}
            continue
        try:
            files[fetch(name, folder)] = name
        except OSError as error:
            missing.append({"file": name, "error": str(error)})
    return files, missing


def _write_csv(results: list[dict[str, Any]], path: Path) -> None:
    """A line an image: its most probable classes and their probabilities, or why it cannot be read."""
    from fastnet.analysis.page import csv_text
    from fastnet.loading.checkpoint import write_atomically

    ranks = max((len(result.get("top", ())) for result in results), default=0)
    heads = ["file", "error"]
    for rank in range(1, ranks + 1):
        heads += [f"class_{rank}", f"probability_{rank}"]
    rows = [
        [result["file"], result.get("error", "")]
        + [cell for entry in result.get("top", ()) for cell in (entry["class"], f"{entry['probability']:.6f}")]
        for result in results
    ]
    write_atomically(path, csv_text(heads, rows))


def check_numbers(
    options: InferenceOptions = FEW_IMAGES, *, top: int = 1, gradcam_stages: Sequence[int] = (9,)
) -> None:
    """UserError (exit status 2) that names the flag that can't be right."""
    numbers = (("--top", top, 1), ("--batch-size", options.batch_size, 1), ("--workers", options.workers or 0, 0))
    for flag, value, low in numbers:
        if value < low:
            raise UserError(f"{flag} {value} must be {low} or more.", exit_status=2)
    last = len(EFFICIENTNET.stages) + 2
    if not gradcam_stages or not all(1 <= stage <= last for stage in gradcam_stages):
        raise UserError(f"--gradcam-stages must be numbers from 1 (the stem) to {last} (the head).", exit_status=2)


def _print_json(results: list[dict[str, Any]]) -> None:
    print(json.dumps(results, indent=2))


def _print_lines(results: list[dict[str, Any]]) -> None:
    for result in results:
        if "error" in result:
            print(f"error: {result['file']} cannot be read ({result['error']}): it is left out.", file=sys.stderr)
            continue
        print(result["file"])
        width = max(len(entry["class"]) for entry in result["top"])
        for entry in result["top"]:
            print(f"  {entry['class']:{width}}  {100 * entry['probability']:5.1f} %")


def main() -> None:
    sys.exit(run_command(lambda: parse(predict, prog="python -m fastnet.predict")))


if __name__ == "__main__":
    main()
