"""What is trained and how it moves: freezing, parameter groups, optimizers, and their state by name.

Every optimizer here follows torch's protocol for mixed precision: where its attribute `found_inf` (float32, on the
device) is not zero, `step()` leaves parameters and state as they are, bit for bit, without the host having to look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastnet.config import OptimizerOptions
from fastnet.errors import UserError
from fastnet.forms import computes_natively
from fastnet.model import EfficientNet
from kernels.cpu import update


class RMSprop(torch.optim.Optimizer):
    """RMSprop in torch's definition: g is the gradient plus weight_decay times p, and

    v <- decay v + (1 - decay) g^2,  v_0 = 0
    m <- momentum m + g / (sqrt(v) + eps)
    p <- p - lr m

    torch's own can't be gated on the device. capturable: nothing waits for the device, so that a CUDA graph can hold
    the step (any device; needed on CUDA, slower on a CPU). native: in C++, on a CPU, in one pass over all parameters
    (`kernels.cpu.update`). lr is a number or a tensor.
    """

    initial_square = 0.0
    tensorflow = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        decay: float = 0.9,
        momentum: float = 0.9,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        capturable: bool = False,
        native: bool = False,
    ) -> None:
        if lr < 0 or eps < 0 or not 0 <= decay < 1 or not 0 <= momentum < 1:
            raise ValueError(f"{type(self).__name__} cannot work with {lr=}, {decay=}, {momentum=}, {eps=}.")
        super().__init__(params, dict(lr=lr, decay=decay, momentum=momentum, eps=eps, weight_decay=weight_decay))
        self.capturable, self.native = capturable, native
        self.found_inf: Tensor | None = None
        self._step_supports_amp_scaling = True

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
        # A CPU's flag can be read for nothing.
        if not self.capturable and self.found_inf is not None and self.found_inf:
            return loss
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["square_avg"] = torch.full_like(p, self.initial_square)
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if self.native:
                params = self._update_natively(params, group)
            # All at once is few launches on a GPU. On a CPU one tensor at a time stays in the cache between operations:
            # 17 ms instead of 43 for B0 (one thread of an AMD EPYC).
            for chosen in [params] if self.capturable and params else [[p] for p in params]:
                self._update(chosen, group)
        return loss

    def _update_natively(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Returns what is left: parameters that are not fp32, or lie otherwise than their gradients."""
        rows: list[Any] = []
        for p in params:
            state = self.state[p]
            rows.append((p, p.grad, state["square_avg"], state["momentum_buffer"]))
        options = {name: group[name] for name in ("weight_decay", "decay", "momentum", "eps")}
        left = update.rmsprop_(rows, float(group["lr"]), **options, tensorflow=self.tensorflow)
        return [params[i] for i in left]

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """One group, or one tensor. To skip is to see no gradient, with every decay one and every rate zero."""
        grads = [p.grad for p in params if p.grad is not None]
        squares = [self.state[p]["square_avg"] for p in params]
        moments = [self.state[p]["momentum_buffer"] for p in params]
        decay, momentum, skip = group["decay"], group["momentum"], None
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        if self.capturable:
            found_inf = params[0].new_zeros(()) if self.found_inf is None else self.found_inf
            skip = found_inf.reshape(()) != 0
            decay, momentum = unless(skip, decay, 1.0), unless(skip, momentum, 1.0)
            clear(grads, skip)
        torch._foreach_mul_(squares, decay)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - group["decay"])
        torch._foreach_mul_(moments, momentum)
        self._move(params, grads, squares, moments, group["lr"], group["eps"], skip)

    def _move(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        squares: list[Tensor],
        moments: list[Tensor],
        lr: float | Tensor,
        eps: float,
        skip: Tensor | None,
    ) -> None:
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, eps)
        torch._foreach_addcdiv_(moments, grads, roots)
        torch._foreach_sub_(params, torch._foreach_mul(moments, lr if skip is None else unless(skip, lr, 0.0)))


class RMSpropTF(RMSprop):
    """RMSprop as TensorFlow defines it, which the paper's learning rates were tuned for (Tan & Le 2019, section 5.2).

        v <- decay v + (1 - decay) g^2,  v_0 = 1
        m <- momentum m + lr g / sqrt(v + eps)
        p <- p - m

    It differs from torch's in three ways: eps stands inside the root, v starts at 1, and the learning rate enters the
    momentum buffer (a later change of lr does not rescale the momentum gathered so far).
    """

    initial_square = 1.0
    tensorflow = True

    def _move(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        squares: list[Tensor],
        moments: list[Tensor],
        lr: float | Tensor,
        eps: float,
        skip: Tensor | None,
    ) -> None:
        roots = torch._foreach_add(squares, eps)
        torch._foreach_sqrt_(roots)
        if skip is None:
            torch._foreach_addcdiv_(moments, grads, roots, value=float(lr))
            torch._foreach_sub_(params, moments)
            return
        # A rate that is a tensor can't be a scalar argument without a look at it.
        steps = torch._foreach_div(grads, roots)
        torch._foreach_mul_(steps, lr)
        torch._foreach_add_(moments, steps)
        torch._foreach_sub_(params, torch._foreach_mul(moments, unless(skip, 1.0, 0.0)))


def unless(skip: Tensor, value: float | Tensor, skipped: float) -> Tensor:
    """`value`, or `skipped` where the flag [] is set; nothing comes from the host, so that a graph can hold it."""
    usual = value if isinstance(value, Tensor) else torch.full_like(skip, value, dtype=torch.float32)
    return usual.masked_fill(skip, skipped)


def clear(tensors: list[Tensor], skip: Tensor) -> None:
    """Zero float32 tensors, in place, if the flag [] is set. On their bits, since 0 x NaN is NaN."""
    torch._foreach_mul_([t.view(torch.int32) for t in tensors], (~skip).int())


def freeze_stages(model: EfficientNet, stages: int) -> None:
    """Freeze the stem and the first `stages` stages of blocks; 0 freezes nothing.

    Frozen parameters take no gradient, frozen batch norms keep their statistics, whatever `train()` is told, and frozen
    blocks are never dropped.
    """
    if not stages:
        return
    blocks = sum(block.stage < stages + 2 for block in model.network.blocks)
    frozen = [model.stem, *list(model.blocks)[:blocks]]
    for module in frozen:
        module.requires_grad_(False).eval()
        # Bound, so that a deep copy freezes itself and not this one.
        setattr(module, "train", MethodType(_stay, module))  # noqa: B010
    model.survival_prob[:blocks] = 1.0


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Weights of convolutions and linear layers decay, vectors (batch norm, biases) don't; frozen ones are left out.

    With layer_decay below 1, each layer (stem, every block, head with classifier) has groups of its own whose
    `lr_scale` is layer_decay^(layers above it).
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    top = 1 + max((_layer(name) or 0 for name, _ in trained), default=0)
    kinds: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in trained:
        layer = _layer(name)
        scale = layer_decay ** (0 if layer is None else top - layer)
        kinds.setdefault((scale, weight_decay if p.ndim > 1 else 0.0), []).append(p)
    return [{"params": params, "weight_decay": decay, "lr_scale": scale} for (scale, decay), params in kinds.items()]


def _layer(name: str) -> int | None:
    """0 for the stem, i + 1 for block i, None for what is above the blocks."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return int(parts[1]) + 1
    return 0 if parts[0] == "stem" else None


def make_optimizer(
    model: nn.Module, options: OptimizerOptions, lr: float, *, capturable: bool | None = None
) -> torch.optim.Optimizer:
    """The optimizer that `options` name, over the parameters of `model` that are not frozen.

    capturable (default: where the model is on CUDA): no step waits for the device. The learning rate is a tensor of
    each group, which `set_learning_rate` fills. UserError where nothing is left to train.
    """
    groups = parameter_groups(model, options.weight_decay, options.layer_decay)
    if not groups:
        raise UserError("every parameter is frozen: lower --freeze-stages.", exit_status=2)
    device = groups[0]["params"][0].device
    capturable = device.type == "cuda" if capturable is None else capturable
    for group in groups:
        group["lr"] = torch.tensor(lr * group["lr_scale"], dtype=torch.float32, device=device)
    common: dict[str, Any] = dict(lr=lr)
    if options.optimizer in ("rmsprop_tf", "rmsprop"):
        kind = RMSpropTF if options.optimizer == "rmsprop_tf" else RMSprop
        return kind(
            groups,
            decay=options.rmsprop_decay,
            momentum=options.momentum,
            eps=options.rmsprop_eps,
            capturable=capturable,
            native=not capturable and computes_natively(model),
            **common,
        )
    if options.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, betas=options.betas, fused=True, capturable=device.type == "cuda", **common
        )
        # The steps before a graph is captured are no mistake.
        optimizer._warned_capturable_if_run_uncaptured = True
        return optimizer
    optimizer = torch.optim.SGD(groups, momentum=options.momentum, nesterov=options.momentum > 0, fused=True, **common)
    if options.momentum:
        for p in (p for group in groups for p in group["params"]):
            # torch makes them in the first step, and not at all if that one is skipped.
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its `lr_scale`; tensors are filled in place, where a CUDA graph reads them."""
    for group in optimizer.param_groups:
        scaled = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


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
    """The inverse of `optimizer_tensors`; ValueError names a tensor that fits no parameter."""
    params = dict(model.named_parameters())
    for full_name, value in tensors.items():
        key, _, name = full_name.partition("/")
        if name not in params or (value.ndim and value.shape != params[name].shape):
            raise ValueError(f"optimizer state {full_name} of shape {list(value.shape)} fits no parameter.")
        p = params[name]
        # A step counter is a scalar, which fused and capturable optimizers keep beside the parameter.
        state = (
            torch.empty_like(p) if value.ndim or p.ndim == 0 else torch.empty((), dtype=value.dtype, device=p.device)
        )
        optimizer.state[p][key] = state.copy_(value)
