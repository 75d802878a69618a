"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fastnet.forms import computes_natively
from fastnet.model import EfficientNet
from fastnet.training.optim import unless
from fastnet.training.schedule import ema_decay
from kernels.cpu import update


class ModelEma:
    """ema <- ema + (1 - decay) (model - ema) after each update, over parameters and batch norm's statistics.

    `module` is the averaged model: eager, in evaluation mode, ready to be evaluated or saved. Make it before the model
    is compiled. capturable: `update` waits for nothing, so that a CUDA graph can hold it (any device).
    """

    def __init__(self, model: EfficientNet, decay: float, *, warmup: bool = False, capturable: bool = False) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup, self.capturable = decay, warmup, capturable
        self.native = not capturable and computes_natively(model)
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self._averaged = [(e, m) for e, m in pairs if e.is_floating_point()]
        self._copied = [(e, m) for e, m in pairs if not e.is_floating_point()]
        self.weight = torch.zeros((), device=self._averaged[0][0].device)

    def set_update(self, update: int) -> None:
        """Say which update comes next (from 1); fills the tensor that `update` reads."""
        self.weight.fill_(1 - ema_decay(update, self.decay, self.warmup))

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Move towards the model; nothing changes where the flag [] is set."""
        if not self.capturable:
            if not found_inf:
                weight, pairs = float(self.weight), self._averaged
                if self.native:
                    pairs = [pairs[i] for i in update.move_average_(pairs, weight)]
                for e, m in pairs:  # one at a time stays in a CPU's cache
                    e.lerp_(m, weight)
                torch._foreach_copy_([e for e, _ in self._copied], [m for _, m in self._copied])
            return
        averaged, live = [e for e, _ in self._averaged], [m for _, m in self._averaged]
        steps = torch._foreach_sub(live, averaged)
        torch._foreach_mul_(steps, unless(found_inf != 0, self.weight, 0.0))
        torch._foreach_add_(averaged, steps)
        torch._foreach_copy_([e for e, _ in self._copied], [m for _, m in self._copied])

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Fill in place; KeyError or RuntimeError where the tensors are not this model's."""
        self.module.load_state_dict(tensors)
