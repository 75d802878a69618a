"""One training step: forward, loss, backward, clipping, update. The part that has to be fast."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Amp = Literal["bf16", "fp16", "off"]
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def autocast(device: torch.device, amp: Amp) -> torch.autocast:
    """Autocast for `device` at `amp`'s precision; a no-op for "off"."""
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=amp != "off")


class TrainStep:
    """Callable on a batch: `(images [B,3,R,R], labels [B]) -> (loss [], correct [])`, both on the device, not yet read.

    Nothing here waits for the device. With fp16 the loss is scaled; a step whose gradients overflow leaves the
    weights as they are and halves the scale (`torch.amp.GradScaler`).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        amp: Amp = "off",
        label_smoothing: float = 0.1,
        clip_grad_norm: float = 0.0,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.amp: Amp = amp
        self.label_smoothing = label_smoothing
        self.clip_grad_norm = clip_grad_norm
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self._params = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, images: Tensor, labels: Tensor, drop_scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with autocast(self.device, self.amp):
            logits = self.model(images, drop_scales)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self._params, self.clip_grad_norm, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        correct = (logits.detach().argmax(1) == labels).sum()
        return loss.detach(), correct
