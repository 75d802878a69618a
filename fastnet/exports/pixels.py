"""From the pixels of a photo to a model's input, as operations that ONNX, torch.export and OpenVINO all have.

Resizing with antialiasing is a product with a matrix for each direction. Its row i holds the filter around output
pixel i, stretched by the scale where that is above one, over all pixels of the photo:

    weight[i, j] ∝ f((j + ½ − centre_i) / max(scale, 1)),   centre_i = start + (i + ½) · scale,   scale = side / out

with f the triangle or Keys' cubic (a = −½), as in PIL and torchvision, over the pixels of the window alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data_pipeline.loaders.augment import Interpolation, eval_margin
from fastnet.loading.view import View


class Preprocessed(nn.Module):
    """uint8 RGB [height, width, 3] of any size, upright -> probabilities [num_classes], through the view that `predict`
    has of a photo. model: from images [1, 3, R, R] to logits [1, num_classes]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, view: View) -> None:
        super().__init__()
        assert view.resolution is not None
        self.model = model
        self.side, self.crop, self.interpolation = view.resolution, view.crop_fraction, view.interpolation
        self.margin = eval_margin(view.interpolation)
        self.register_buffer("mean", 255 * torch.tensor(view.mean)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(view.std)[:, None, None])

    def forward(self, photo: Tensor) -> Tensor:
        return self.model(self.images(photo)).softmax(1)[0]

    def images(self, photo: Tensor) -> Tensor:
        """[height, width, 3] uint8 -> [1, 3, R, R] float32, normalised."""
        height, width = photo.shape[0], photo.shape[1]
        size = torch.stack([torch.full((), width, dtype=torch.float64), torch.full((), height, dtype=torch.float64)])
        # `data_pipeline.augment.eval_params`, on tensors: a number would fix the size of the photo.
        short = size.min()
        window = (self.crop * short * (1 + 2 * self.margin / self.side)).round().clamp(min=1).minimum(short)
        left, top = ((size - window) / 2).floor().unbind()
        across = self._weights(left, window, width)
        down = self._weights(top, window, height)
        # Across first and rounded in between, as PIL and torchvision do.
        pixels = _rounded(photo.permute(2, 0, 1).float() @ across.T)
        pixels = _rounded(down @ pixels)
        return ((pixels - self.mean) / self.std)[None]

    def _weights(self, start: Tensor, window: Tensor, length: int) -> Tensor:
        """[R, length] float32: what each pixel of the photo adds to each of the view."""
        scale = window / (self.side + 2 * self.margin)
        shown = torch.arange(self.margin, self.margin + self.side, dtype=torch.float64)
        centres = start + (shown + 0.5) * scale
        places = torch.arange(length, dtype=torch.float64)
        distance = (places + 0.5 - centres[:, None]) / scale.clamp(min=1)
        weights = _filter(distance.float(), self.interpolation)
        inside = (places >= start) & (places < start + window)
        weights = torch.where(inside, weights, torch.zeros(()))
        return weights / weights.sum(1, keepdim=True)


def _filter(x: Tensor, interpolation: Interpolation) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros(())))


def _rounded(pixels: Tensor) -> Tensor:
    return (pixels + 0.5).floor().clamp(0, 255)
