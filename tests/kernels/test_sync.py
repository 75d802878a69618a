"""Batch norm over several processes equals batch norm over the joint batch, whichever kernels compute it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from fastnet.model import EfficientNet
from tests.fastnet.test_model_kernels import SMALL

WORLD, BATCH = 2, 5  # ranks of unequal size


def gradients_and_statistics(kernels: str, dtype: torch.dtype, rank: int, world: int) -> list[Tensor]:
    """The gradient of the mean loss over all ranks' images, and the moved means and variances; one vector each."""
    torch.manual_seed(0)
    model = EfficientNet(replace(SMALL, kernels=kernels)).to(dtype)  # type: ignore[arg-type]
    for bn in model.batch_norms():
        bn.group = dist.group.WORLD.group_name if world > 1 else ""  # type: ignore[union-attr]
    images = torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine = images.contiguous(memory_format=torch.channels_last).chunk(world)[rank]
    scales = torch.tensor([[1.0, 0.0, 2.0, 1.0, 1.0]] * len(model.blocks)).chunk(world, 1)[rank]
    model(mine, scales).square().sum().div(BATCH).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    if world > 1:
        dist.all_reduce(gradient)
    means, variances = ([getattr(bn, name) for bn in model.batch_norms()] for name in ("running_mean", "running_var"))
    return [gradient, torch.cat(means), torch.cat(variances)]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    for kernels in ("torch", "triton-ops", "triton", "native"):
        found = gradients_and_statistics(kernels, torch.float32, rank, WORLD)
        if rank == 0:
            torch.save(found, f"{folder}/{kernels}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on CPUs, with interpreted kernels")
def test_two_processes_equal_one_with_the_joint_batch(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=WORLD)
    oracle = gradients_and_statistics("torch", torch.float64, 0, 1)
    alone = gradients_and_statistics("torch", torch.float32, 0, 1)
    for kernels in ("torch", "triton-ops", "triton", "native"):
        found = torch.load(tmp_path / f"{kernels}.pt")
        for of, ours, theirs, right in zip(("gradient", "mean", "variance"), found, alone, oracle, strict=True):
            rounding = torch.finfo(torch.float32).eps * right.abs().max()
            error = (ours.double() - right).abs().max()
            assert error <= 2 * (theirs - right).abs().max() + rounding, (kernels, of)
