"""Optimizer, weight-decay groups and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastnet.config import OptimizerOptions


class RMSpropTF(torch.optim.Optimizer):
    """RMSprop as TensorFlow defines it, which the paper's learning rates were tuned for (Tan & Le 2019, section 5.2).

        v <- decay v + (1 - decay) g^2,  v_0 = 1
        m <- momentum m + lr g / sqrt(v + eps)
        p <- p - m

    It differs from torch's in three ways: eps stands inside the root, v starts at 1, and the learning rate enters the
    momentum buffer (a later change of lr does not rescale the momentum gathered so far). Weight decay is an L2 term
    in g.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        decay: float = 0.9,
        momentum: float = 0.9,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or eps < 0 or not 0 <= decay < 1 or not 0 <= momentum < 1:
            raise ValueError(f"RMSpropTF cannot work with {lr=}, {decay=}, {momentum=}, {eps=}.")
        super().__init__(params, dict(lr=lr, decay=decay, momentum=momentum, eps=eps, weight_decay=weight_decay))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            # All at once is few launches on a GPU. On a CPU one tensor at a time stays in the cache between operations:
            # 17 ms instead of 43 for B0 (one thread of an AMD EPYC).
            for chosen in [params] if params[0].is_cuda else [[p] for p in params]:
                self._update(chosen, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["square_avg"] = torch.ones_like(p)
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        squares = [self.state[p]["square_avg"] for p in params]
        moments = [self.state[p]["momentum_buffer"] for p in params]
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        torch._foreach_mul_(squares, group["decay"])
        torch._foreach_addcmul_(squares, grads, grads, value=1 - group["decay"])
        roots = torch._foreach_add(squares, group["eps"])
        torch._foreach_sqrt_(roots)
        torch._foreach_mul_(moments, group["momentum"])
        torch._foreach_addcdiv_(moments, grads, roots, value=group["lr"])
        torch._foreach_sub_(params, moments)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights of convolutions and linear layers decay, vectors (batch norm, biases) don't."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, options: OptimizerOptions, lr: float) -> torch.optim.Optimizer:
    groups = parameter_groups(model, options.weight_decay)
    if options.optimizer == "rmsprop_tf":
        return RMSpropTF(groups, lr, decay=options.rmsprop_decay, momentum=options.momentum, eps=options.rmsprop_eps)
    return torch.optim.RMSprop(
        groups,
        lr,
        alpha=options.rmsprop_decay,
        momentum=options.momentum,
        eps=options.rmsprop_eps,
        foreach=True,
    )


def learning_rate(step: int, steps_per_epoch: int, peak: float, options: OptimizerOptions) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then `peak x lr_decay^k` in a staircase.

    k counts whole periods of `decay_epochs` since the warm-up ended. A pure function of the step, so that a resumed
    run needs no scheduler state.
    """
    warmup = options.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / math.ceil(warmup)
    periods = math.floor((step - warmup) / (options.decay_epochs * steps_per_epoch))
    return peak * options.lr_decay**periods


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `{"<state>/<parameter name>": tensor}`, for a file without pickles."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{key}/{names[id(p)]}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, in place; ValueError names a tensor that fits no parameter."""
    params = dict(model.named_parameters())
    for full_name, value in tensors.items():
        key, _, name = full_name.partition("/")
        if name not in params or (value.ndim and value.shape != params[name].shape):
            raise ValueError(f"optimizer state {full_name} of shape {list(value.shape)} fits no parameter.")
        # A step counter is a scalar that torch keeps on the CPU.
        like = params[name] if value.ndim else value
        optimizer.state[params[name]][key] = torch.empty_like(like).copy_(value)
