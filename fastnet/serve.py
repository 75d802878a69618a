"""`python -m fastnet.serve RUN_OR_EXPORT`: a page on which a photo is dropped, and its classes are seen.

With a run or weights also where in the photo the evidence lies (Grad-CAM); an exported ONNX, OpenVINO or torch.export
file that takes photos (`--with-preprocessing`) is shown as a stranger would run it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnet import DISTRIBUTION
from fastnet.commands import parse
from fastnet.errors import UserError, run_command
from fastnet.loading.options import DeviceOptions, WeightsOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Answer = tuple[dict[str, float], NDArray[np.uint8] | None]
    Answers = Callable[[NDArray[np.uint8]], Answer]
    """A photo [height, width, 3] -> (probability by class name, the photo under its heat map)."""

EXPORTS = (".onnx", ".xml", ".pt2")


def answers_of_run(
    target: str,
    stage: int | None = None,
    weights: WeightsOptions = WeightsOptions(),
    where: DeviceOptions = DeviceOptions(),
) -> Answers:
    """Of `fastnet.load(target)`; stage: whose Grad-CAM is shown, the last by default."""
    import torch

    from fastnet.analysis.gradcam import grad_cam, heat, overlay
    from fastnet.analysis.predictions import as_pictures
    from fastnet.device import pick_device
    from fastnet.loaded import LoadedModel
    from fastnet.loading.trained import load_trained

    loaded = LoadedModel(load_trained(target, weights, device=pick_device(where.device), kernels=where.kernels))
    shown = stage or loaded.model.network.last_stage

    def answer(photo: NDArray[np.uint8]) -> Answer:
        view = loaded.transform(photo)[None]
        logits, maps = grad_cam(loaded.model, view.to(loaded.trained.device), stages=(shown,))
        picture = as_pictures(view, loaded.trained.normalization)[0]
        hot = heat(maps[shown].cpu(), picture.shape[0])[0].numpy()
        probabilities = torch.softmax(logits[0].float(), 0).tolist()
        return dict(zip(loaded.classes, probabilities, strict=True)), overlay(picture, hot)

    return answer


def answers_of_export(path: Path) -> Answers:
    """Of a file that `fastnet.export --with-preprocessing` wrote, by the library that it is for.

    Raises UserError where the library is missing or the file takes no photos.
    """
    import torch

    from fastnet.exports.formats import read_program

    compute, facts = read_program(path)
    if not facts.get("input", "").startswith("uint8"):
        raise UserError(
            f"{path} does not take the pixels of a photo: export it with --with-preprocessing, or name the run."
        )

    def answer(photo: NDArray[np.uint8]) -> Answer:
        probabilities = compute(torch.tensor(photo)).tolist()
        return dict(zip(facts["class_names"], probabilities, strict=True)), None

    return answer


def make_page(answer: Answers, title: str, *, explained: bool) -> Any:
    """The page as gradio.Blocks; its programs call `/classify`."""
    import gradio

    def classify(photo: NDArray[np.uint8] | None) -> Any:
        if photo is None:
            raise gradio.Error("Drop a photo first.")
        classes, picture = answer(photo)
        return (classes, picture) if explained else classes

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            # PIL turns it upright and into RGB.
            photo = gradio.Image(label="Photo", type="numpy", image_mode="RGB", sources=["upload", "clipboard"])
            classes = gradio.Label(label="Classes", num_top_classes=5)
            seen = [gradio.Image(label="Evidence for the first class (Grad-CAM)")] if explained else []
        photo.change(classify, photo, [classes, *seen], api_name="classify", show_progress="minimal")
    return page


def serve(
    target: str,
    /,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    gradcam_stage: int | None = None,
    weights: WeightsOptions = WeightsOptions(),
    where: DeviceOptions = DeviceOptions(),
) -> int:
    """Show a page on this machine where one drops a photo and sees its classes; nothing is sent anywhere else.

    Args:
        target: A run's folder, a file of weights, imagenet with --variant, or an .onnx, .xml or .pt2 file that
            `python -m fastnet.export --with-preprocessing` wrote.
        host: Address to listen on; 0.0.0.0 lets other machines in.
        port: Port to listen on.
        open_browser: Open the page in the browser.
        gradcam_stage: Stage whose evidence is shown, 1 (stem) to 9 (head); default: 9.
        weights: Which model, and how it sees an image.
        where: Where it runs.
    """
    from fastnet.predict import check_numbers

    check_numbers(gradcam_stages=(gradcam_stage or 9,))
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"the page is made with gradio: pip install '{DISTRIBUTION}[serve]'.")
    exported = Path(target).suffix in EXPORTS
    if exported and not Path(target).is_file():
        raise UserError(f"{target} does not exist: name a run's folder, a weights file or an export.")
    answer = answers_of_export(Path(target)) if exported else answers_of_run(target, gradcam_stage, weights, where)
    page = make_page(answer, f"fastnet: {Path(target).name}", explained=not exported)
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, inbrowser=open_browser, prevent_thread_lock=True, quiet=True
        )
    except OSError as error:
        raise UserError(f"port {port} of {host} cannot be used ({error}): name another --port.") from error
    print(f"open {url} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()
    return 0


def main() -> None:
    sys.exit(run_command(lambda: parse(serve, prog="python -m fastnet.serve")))


if __name__ == "__main__":
    main()
