"""`python -m fastnet.export RUN_OR_FILE --to onnx|pt2|openvino|torchvision|timm`: the model for other programs.

Each file carries what a stranger has to know (`fastnet.exports.facts`) and is read back by the library that it is for
and compared with the original on images before it takes its name: on the run's own validation photos, or on generated
ones where there are none.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastnet.commands import parse
from fastnet.errors import UserError, run_command
from fastnet.loading.options import WeightsOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from data_pipeline import Index
    from fastnet.exports.formats import Target
    from fastnet.loading.trained import Trained

IMAGES = 8
TOLERANCE = 1e-3
"""Of the largest output: two fp32 implementations of one network stay far below it, another network far above."""


def export_model(
    trained: Trained, to: Target, path: Path, inputs: Sequence[Tensor], *, preprocessing: bool = False
) -> float:
    """Write `trained` (on the CPU) to `path`, a folder for timm, and return the largest difference of an output.

    inputs: what it is compared on, the first of which is traced: images [N, 3, R, R], N at least 2, and others of
    another N; with preprocessing photos [height, width, 3] of other sizes, uint8.
    The file gets its name only when the difference is at most 1e-3 of the largest output.
    Raises UserError where that is not so, a library is missing, the format cannot hold this model, or the file cannot
    be written.
    """
    import torch

    from fastnet.exports.facts import facts_of
    from fastnet.exports.formats import WRITERS, check_expressible, require
    from fastnet.exports.program import program_of

    require(to)
    check_expressible(trained.model.config, to, preprocessing)
    module = program_of(trained.model, trained.view, preprocessing)
    with becoming(path) as scratch, torch.no_grad():
        compute = WRITERS[to](module, scratch, inputs[0], facts_of(trained, preprocessing=preprocessing))
        expected = [module(one) for one in inputs]
        largest = max(one.abs().max().item() for one in expected)
        difference = max((compute(x) - y).abs().max().item() for x, y in zip(inputs, expected, strict=True))
        if not difference <= TOLERANCE * largest:
            raise UserError(
                f"the exported model differs by {difference:.3g} from {trained.path} on outputs up to {largest:.3g}: "
                "nothing was written; please report this."
            )
    return difference


def verification_inputs(trained: Trained, index: Index | None, preprocessing: bool) -> tuple[list[Tensor], str]:
    """(inputs for `export_model`, what they are): from validation photos; generated patterns where there are none."""
    if index is None:
        made = generated_photos(trained.resolution) if preprocessing else _twice(_generated_images(trained))
        return made, "generated images"
    count = len(index.splits["val"])
    rows = [i * count // IMAGES for i in range(IMAGES)]
    what = f"validation images of {index.root}"
    if preprocessing:
        from data_pipeline.loaders.decode import decode_photo

        paths = index.splits["val"].paths
        return [decode_photo(paths[row]).permute(1, 2, 0).contiguous() for row in rows], what
    from fastnet.analysis.predictions import load_views, subset

    return _twice(load_views(trained, subset(index, rows))), what


def known_data(trained: Trained, data: str | None) -> Index | None:
    """`data`, else the run's own data set where it can still be read."""
    from data_pipeline import DataError
    from fastnet.loading.trained import data_of

    if data is None and trained.config is None:
        return None
    try:
        return data_of(trained, data)
    except (DataError, UserError):
        if data is not None:
            raise
        return None


def _twice(images: Tensor) -> list[Tensor]:
    """Another number of images too: the batch is free."""
    return [images[:2].contiguous(), images, images[:1]]


def _generated_images(trained: Trained) -> Tensor:
    """[8, 3, R, R]: patterns of the generated sample, as the model sees them."""
    import torch

    from fastnet.loaded import LoadedModel

    see = LoadedModel(trained).transform
    return torch.stack([see(photo.permute(2, 0, 1)) for photo in generated_photos(trained.resolution)])


def generated_photos(resolution: int) -> list[Tensor]:
    """Eight patterns of the generated sample, [height, width, 3] uint8, no two of one size."""
    import torch
    from torchvision.transforms.v2 import functional as F

    from data_pipeline.dataset.synthetic import PATTERNS, render

    photos = []
    for number, name in enumerate(sorted(PATTERNS)[:IMAGES]):
        pixels = torch.from_numpy(render(name, 0)).permute(2, 0, 1)
        size = [resolution * 3 // 4 + 11 * number, resolution + 7 * number]
        photos.append(F.resize(pixels, size, antialias=True).permute(1, 2, 0).contiguous())
    return photos


@contextmanager
def becoming(path: Path) -> Iterator[Path]:
    """A file or folder beside `path`, of the same name, that takes its place, with all that lies beside it, when all
    went well and is removed when not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
            scratch = Path(folder) / path.name
            yield scratch
            for made in sorted(Path(folder).iterdir(), key=lambda one: one == scratch):
                there = path.parent / made.name
                if made.is_dir() and there.is_dir():
                    _replace_folder(there, made)
                os.replace(made, there)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): name another --out.") from error


def _replace_folder(there: Path, made: Path) -> None:
    """Make room for a folder of ours; UserError where other files than its own would go with it."""
    foreign = sorted(set(os.listdir(there)) - set(os.listdir(made)))
    if foreign:
        raise UserError(f"--out {there} holds {foreign[0]}, which is not of an export: name another folder.")
    shutil.rmtree(there)


# --- command ---------------------------------------------------------------------------------------------------


def export(
    target: str,
    /,
    to: Literal["onnx", "pt2", "openvino", "torchvision", "timm"],
    with_preprocessing: bool = False,
    int8: bool = False,
    out: str | None = None,
    data: str | None = None,
    weights: WeightsOptions = WeightsOptions(),
) -> int:
    """Write a run, or a file of weights, for other programs, and verify it there against the original. Every file
    carries the names of the classes and how a photo becomes its input.

    Args:
        target: A run's folder, a .safetensors or .pth file, or imagenet with --variant.
        to: onnx (needs the extra `onnx`), pt2 (torch.export), openvino (.xml and .bin, needs the extra `openvino`),
            torchvision (a .pth as its training script writes it) or timm (a folder that timm.create_model loads).
        with_preprocessing: Take the pixels of a photo, uint8 [height, width, 3] of any size, and give probabilities,
            so that whoever runs the file need not know how to cut, resize and normalise; with onnx, pt2 and openvino.
        int8: Write a second file beside the first, quantised to 8 bits on the run's photos so that top-1 on the
            validation photos falls by at most 0.5 points, or say that it does not; with onnx and openvino (which needs
            the extra `int8`). Both are judged and timed on this machine, and what is fastest there is recommended.
        out: File or folder to write; default: efficientnet_<variant>-<resolution> and an ending, in the run's folder or
            here.
        data: Data set whose validation images it is verified on; default: the run's, else generated images.
        weights: Which model, and how it sees an image.
    """
    import torch

    from data_pipeline.files import expanded
    from fastnet.allocator import keep_memory
    from fastnet.exports.advice import three_lines
    from fastnet.exports.compare import size_of
    from fastnet.exports.facts import facts_of
    from fastnet.exports.formats import ENDINGS
    from fastnet.exports.measured import require_int8
    from fastnet.loading.trained import load_trained

    keep_memory(torch.device("cpu"))
    # On a CPU in fp32, where the libraries can be compared to the last digits.
    trained = load_trained(target, weights, kernels="torch")
    photo = "-photo" if with_preprocessing else ""
    name = f"efficientnet_{trained.model.config.variant}-{trained.resolution}{photo}{ENDINGS[to]}"
    path = expanded(Path(out)) if out else (trained.run or Path()) / name
    if int8:
        require_int8(to)
        if with_preprocessing:
            raise UserError("--int8 takes images, not photos: leave out --with-preprocessing.", exit_status=2)
    if to != "timm" and path.suffix != Path(name).suffix:
        raise UserError(f"--out {path} must end in {Path(name).suffix} for --to {to}.", exit_status=2)
    index = known_data(trained, data)
    if int8 and index is None:
        raise UserError("--int8 takes its ranges from photos: name a data set with --data.", exit_status=2)
    inputs, what = verification_inputs(trained, index, with_preprocessing)
    difference = export_model(trained, to, path, inputs, preprocessing=with_preprocessing)
    reader = {"onnx": "onnxruntime", "pt2": "torch"}.get(to, to)
    print(f"wrote {path} ({size_of(path) / 1e6:.1f} MB)")
    print(f"verified with {reader} on {IMAGES} {what}: largest difference of an output {difference:.2e}")
    facts, precision = facts_of(trained, preprocessing=with_preprocessing), "f32"
    if index is not None and (int8 or (to == "openvino" and not with_preprocessing)):
        path, precision = _measure(trained, index, to, path, facts, int8)
    print("in Python, where this project is not installed:\n")
    config = trained.model.config
    print(three_lines(to, path, facts, config, preprocessing=with_preprocessing, precision=precision))
    return 0


def _measure(
    trained: Trained, index: Index, to: Target, path: Path, facts: dict[str, Any], int8: bool
) -> tuple[Path, str]:
    """Say what each form costs and gives here, after quantising where asked; (file, OpenVINO's hint) of the best."""
    from fastnet.exports.compare import machine, recommended, table_of
    from fastnet.exports.int8 import MAX_LOSS
    from fastnet.exports.measured import Judged, programs, write_int8

    judged = Judged(trained, index)
    quantised = None
    if int8:
        quantised = path.with_name(f"{path.stem}-int8{path.suffix}")
        best = write_int8(judged, to, path, quantised, facts, print)
        print(f"wrote {quantised}")
        if judged.top1 - best.top1 > MAX_LOSS:
            photos = len(judged.images)
            print(
                f"int8 loses {judged.top1 - best.top1:.2f} points ({(judged.top1 - best.top1) * photos / 100:.0f} of "
                f"{photos} photos), more than {MAX_LOSS}: nothing tried loses less."
            )
    files = programs(to, path, quantised)
    forms = judged.forms(files)
    print(f"on {machine()}; {len(judged.images)} validation photos, speed one photo at a time:\n")
    print("\n".join(table_of(forms)))
    best_form = recommended(forms, MAX_LOSS)
    print(f"\nrecommended here: {best_form.name}")
    if best_form.name not in files:
        return path, "f32"
    return files[best_form.name][0], "bf16" if "bf16" in best_form.name else "f32"


def main() -> None:
    sys.exit(run_command(lambda: parse(export, prog="python -m fastnet.export")))


if __name__ == "__main__":
    main()
