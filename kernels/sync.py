"""Batch statistics of several processes: count, mean and M2 gathered and merged as Chan does, backward sums added up.

`group` is a process group's name (`torch.distributed.group.WORLD.group_name`), "" where a process stands alone. A
rank's share of the gradient through common statistics needs Σ dz and Σ dz x̂ over all ranks divided by the rows of all;
what `all_reduce_sums` returns may be divided by this rank's rows instead, as the kernels do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def group_size(group: str) -> int:
    """Ranks of the group; 1 where a process stands alone."""
    if not group:
        return 1
    size: int = _process_group(group).size()
    return size


def _process_group(name: str) -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def all_gather_stats(mean: Tensor, var: Tensor, rows: int, group: str) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean and biased variance [C] of all ranks' rows, and their number (an int where nothing is gathered)."""
    if not group:
        return mean, var, rows
    from torch.distributed import _functional_collectives as collectives

    mine = torch.cat([mean, var * rows, mean.new_full((1,), rows)])[None]
    # torch 2.15 warns of the name that torch 2.11 has for it.
    gather = getattr(collectives, "all_gather_single", collectives.all_gather_tensor)
    parts = gather(mine, 0, _process_group(group))
    means, m2, counts = parts.split([len(mean), len(mean), 1], 1)
    total = counts.sum()
    joint = (means * counts).sum(0) / total
    m2 = m2.sum(0) + ((means - joint).square() * counts).sum(0)
    return joint, m2 / total, total


def all_reduce_sums(sums: Tensor, rows: int, group: str) -> Tensor:
    """Σ over all ranks of [2, C], times this rank's rows over all ranks'."""
    if not group:
        return sums
    from torch.distributed import _functional_collectives as collectives

    mine = torch.cat([sums.flatten(), sums.new_full((1,), rows)])
    total = collectives.all_reduce(mine, "sum", _process_group(group))
    return (total[:-1] * (rows / total[-1])).view_as(sums)


class _BatchNorm(torch.autograd.Function):
    """y, and the statistics of all ranks, which have no gradient of their own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = x.numel() // x.shape[1]
        var, mean = torch.var_mean(x.to(weight.dtype), (0, 2, 3), correction=0)
        mean, var, total = all_gather_stats(mean, var, rows, group)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.group = eps, group
        total = torch.as_tensor(total, dtype=mean.dtype, device=mean.device)
        ctx.mark_non_differentiable(mean, var, total)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        rows = x.numel() // x.shape[1]
        rstd = (var + ctx.eps).rsqrt()
        x_hat = (x.to(weight.dtype) - mean[:, None, None]) * rstd[:, None, None]
        dz = dy.to(weight.dtype)
        sums = torch.stack([dz.sum((0, 2, 3)), (dz * x_hat).sum((0, 2, 3))])
        joint = all_reduce_sums(sums, rows, ctx.group) / rows
        dx = dz - joint[0][:, None, None] - x_hat * joint[1][:, None, None]
        return (dx * (weight * rstd)[:, None, None]).to(x.dtype), sums[1], sums[0], None, None


def batch_norm(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, momentum: float, eps: float,
    group: str,
) -> Tensor:  # fmt: skip
    """`F.batch_norm` in training over the batches of all ranks, in PyTorch alone; moves the running statistics."""
    y, mean, var, total = _BatchNorm.apply(x, weight, bias, eps, group)
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (total / (total - 1)), momentum)
    return y
