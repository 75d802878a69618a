"""`python -m fastnet.evaluate RUN_OR_FILE`: how good a model is on a data set, in numbers and pictures."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_pipeline.loaders.dali_options import Backend
from fastnet.commands import parse
from fastnet.errors import UserError, run_command
from fastnet.loading.options import InferenceOptions, WeightsOptions
from fastnet.predict import check_numbers

# Top-1 in percent and loss by which precision and kernels may move an evaluation, and a loader's rounding.
TOP1_APART, LOSS_APART = 0.1, 0.005

if TYPE_CHECKING:
    from data_pipeline import Index
    from fastnet.analysis.predictions import Predictions, Tta
    from fastnet.analysis.scores import Scores
    from fastnet.device import Amp
    from fastnet.loading.trained import Trained


def evaluate_run(
    trained: Trained,
    index: Index,
    *,
    tta: Tta = "off",
    amp: Amp = "off",
    batch_size: int = 64,
    loader: Backend = "auto",
    workers: int = 0,
) -> tuple[Predictions, Scores]:
    """Predict the validation split of `index` once and score it; the images are streamed."""
    from fastnet.analysis.predictions import collect, view_loader
    from fastnet.analysis.scores import score

    batches = view_loader(trained, index, tta=tta, backend=loader, batch_size=batch_size, workers=workers)
    try:
        found = collect(trained, batches, tta=tta, amp=amp)
    finally:
        batches.close()
    return found, score(found, index.classes)


def evaluate(
    target: str,
    /,
    data: str | None = None,
    split: Literal["train", "val", "test"] = "val",
    report: bool = True,
    suspects: bool = False,
    out: str | None = None,
    json: bool = False,
    expect_reported: bool = False,
    worst: int = 20,
    gradcam_stages: tuple[int, ...] = (4, 6, 9),
    gradcam_images: tuple[str, ...] = (),
    loader: Backend = "auto",
    weights: WeightsOptions = WeightsOptions(),
    inference: InferenceOptions = InferenceOptions(),
) -> int:
    """Evaluate a run, or a file of weights, on the validation split: top-1, top-5, macro F1, AUC, calibration; and a
    report with curves, confusion matrix, the worst predictions and Grad-CAM. With --suspects also the images whose
    label may be wrong.

    Args:
        target: A run's folder, a .safetensors or .pth file, or imagenet with --variant.
        data: Data set; default: the one that the run was trained on.
        split: Which images: of train, on which the model was trained, it is surer than of new ones; val chose the best
            epoch; test is what the data set calls so, which had no part in the run where there is a val too.
        report: Write report.html and its pictures; --no-report prints the numbers alone.
        suspects: Rank the images by how much the model contradicts their labels: suspects.csv, and suspects.html with
            the pictures (needs the extra `suspects`).
        out: Folder of the report and the suspects; default: report/ in the run's folder, report-<split>/ for
            another split.
        json: Print the numbers, also of each class, as JSON.
        expect_reported: Fail where top-1 or loss are not those that the run reported of these weights.
        worst: Wrong predictions to show.
        gradcam_stages: Stages that Grad-CAM shows, 1 (stem) to 9 (head), as `python -m fastnet.summary` counts them.
        gradcam_images: Images that Grad-CAM explains; default: the surest right ones and the worst of the split.
        loader: Input pipeline.
        weights: Which model, and how it sees an image.
        inference: How images go through it.
    """
    from fastnet.allocator import keep_memory
    from fastnet.analysis.suspects import require_cleanlab
    from fastnet.device import pick_device, pick_workers, tell
    from fastnet.loading.trained import data_of, load_trained
    from fastnet.training.tuning import pick_precision

    check_numbers(inference, gradcam_stages=gradcam_stages)
    if expect_reported and split != "val":
        raise UserError("--expect-reported is about the validation split: leave --split out.", exit_status=2)
    if worst < 0:
        raise UserError(f"--worst {worst} must be 0 or more.", exit_status=2)
    where = pick_device(inference.device)
    keep_memory(where)
    trained = load_trained(target, weights, device=where, kernels=inference.kernels)
    if suspects:
        require_cleanlab()
    index = data_of(trained, data, test=split == "test")
    index = replace(index, splits={"val": index.splits["train" if split == "train" else "val"]})
    folder = _report_folder(trained, out, split) if report or suspects else None
    if suspects and folder is None:
        raise UserError(f"{trained.path} belongs to no run: name a folder for --suspects with --out.", exit_status=2)
    for note in index.notes:
        print(f"data: {note}", file=sys.stderr)
    if folder is not None:
        _check_images(gradcam_images)
    found, scores = evaluate_run(
        trained,
        index,
        tta=inference.tta,
        amp=pick_precision(inference.amp, where, inference.kernels, trained.model.config.variant, tell),
        batch_size=inference.batch_size,
        loader=loader,
        workers=pick_workers(inference.workers, where),
    )
    _print_json(scores) if json else _print_numbers(scores)
    if expect_reported:
        _compare(scores, trained.path)
    if suspects and folder is not None:
        from fastnet.analysis.suspects import write_suspects

        page, count = write_suspects(trained, index, found, folder, split=split)
        said = f"{count} of {scores.images} labels are suspected: {page}"
        if split == "train" and trained.run is not None:
            said += " (the model was trained on them, which hides some: --split val has none of these)"
        print(said, file=sys.stderr if json else sys.stdout)
    if folder is not None and report:
        from fastnet.analysis.report import write_report

        page = write_report(
            trained,
            index,
            found,
            scores,
            folder,
            split=split,
            tta=inference.tta,
            worst=worst,
            stages=gradcam_stages,
            explained=gradcam_images,
        )
        print(f"report: {page}", file=sys.stderr if json else sys.stdout)
    elif report and not json:
        print("for a report, name a folder with --out")
    return 0


def _compare(scores: Scores, path: Path) -> None:
    """UserError where a run reported other numbers of the weights in `path`, beyond what a kernel choice rounds."""
    from fastnet.loading.checkpoint import notes_of

    reported = notes_of(path)
    if not {"top1", "loss"} <= reported.keys():
        raise UserError(f"{path} does not tell what its run reported: leave out --expect-reported.", exit_status=2)
    top1, loss = reported["top1"], reported["loss"]
    if abs(scores.top1 - top1) > TOP1_APART + 100 / scores.images or abs(scores.loss - loss) > LOSS_APART:
        raise UserError(
            f"the run reported top-1 {top1:.2f} % and loss {loss:.4f} of {path}, not {scores.top1:.2f} % and "
            f"{scores.loss:.4f}: evaluate it on its own data and view, or report this as an error of fastnet."
        )


def _report_folder(trained: Trained, out: str | None, split: str) -> Path | None:
    """--out, else report/ or report-<split>/ in the run; None for weights of no run. UserError where it cannot be
    written, before the work starts."""
    if out is None and trained.run is None:
        return None
    from data_pipeline.files import expanded
    from fastnet.analysis.report import check_folder
    from fastnet.analysis.suspects import check_free

    name = "report" if split == "val" else f"report-{split}"
    folder = expanded(Path(out)) if out is not None else trained.run / name  # type: ignore[operator]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_folder(folder)
        check_free(folder)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"no report can be written to {folder} ({error.strerror}): name another --out.") from error
    return folder


def _check_images(files: tuple[str, ...]) -> None:
    from fastnet.analysis.predictions import index_files

    for path, reason in index_files(files)[1]:
        raise UserError(f"--gradcam-images {path} cannot be read ({reason}): name another image.", exit_status=2)


def _print_json(scores: Scores) -> None:
    print(json.dumps(scores.as_dict(), indent=2))


def _print_numbers(scores: Scores) -> None:
    print(f"top-1 {scores.top1:.2f} %  top-5 {scores.top5:.2f} %  loss {scores.loss:.4f}  ({scores.images} images)")
    print(
        f"macro F1 {scores.macro_f1:.4f}  AUC {scores.macro_auc:.4f}  average precision "
        f"{scores.mean_average_precision:.4f}  calibration error {scores.ece:.4f}"
    )


def main() -> None:
    sys.exit(run_command(lambda: parse(evaluate, prog="python -m fastnet.evaluate")))


if __name__ == "__main__":
    main()
