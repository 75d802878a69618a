"""Several ranks' gradients added up: the joint batch's step, recorded and replayed with its collectives, on all ranks
or on none."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from fastnet.training.cuda_graph import WARMUP_STEPS, CudaRecorder, Outputs
from fastnet.training.distributed import Ranks, _lost_a_peer, sync_batch_norm
from fastnet.training.gradients import GradientAllReduce
from fastnet.training.step import TrainStep
from tests.fastnet.training.test_step import MIX, batch, everything, make_step
from tests.tape import OperationTape

WORLD, SHARE, STEPS = 2, 4, WARMUP_STEPS + 4


def parallel_step(ranks: Ranks, *, sync_bn: bool = False, in_order: bool = False, **options: Any) -> TrainStep:
    """A step of `SHARE` images on each rank, in buckets of some 4 KB."""
    step = make_step(reduce_found_inf=ranks.all_reduce_max_, images=SHARE * ranks.size, **options)
    if sync_bn:
        sync_batch_norm(step.model)
    step._all_reduce = GradientAllReduce(step.model.parameters(), in_order=in_order, bucket_bytes=4096)
    return step


def share(seed: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    images, labels = batch(seed, SHARE * ranks.size)
    return images.chunk(ranks.size)[ranks.rank], labels.chunk(ranks.size)[ranks.rank]


def one_equals_another(expected: dict[str, Tensor], found: dict[str, Tensor]) -> bool:
    assert expected.keys() == found.keys()
    return [name for name in expected if not torch.equal(expected[name], found[name])] == []


def take_steps(steps: list[TrainStep], ranks: Ranks, device: torch.device, bad: int, scale: float) -> list[Tensor]:
    """Losses of each step in turn; in step `bad` an image of the last rank is not finite."""
    losses = []
    for seed in range(STEPS):
        images, labels = (t.to(device) for t in share(seed, ranks))
        if seed == bad and ranks.rank == ranks.size - 1:
            images[0, 0, 0, 0] = float("nan")
        for step in steps:
            step.loss_scale.clamp_(max=scale)  # this model overflows fp16 at the usual one
            torch.manual_seed(seed * ranks.size + ranks.rank)
            losses.append(step(images, labels, None, torch.tensor(MIX, device=device))[0].clone())
    return losses


def replays_are_the_steps(ranks: Ranks, sync_bn: bool, amp: str) -> None:
    """On any rank, to the bit: state, losses and the flag, though only the last rank's batch is bad."""
    plain, graphed = (parallel_step(ranks, sync_bn=sync_bn, amp=amp, grad_accum_steps=2) for _ in range(2))
    tape = OperationTape()
    graphed.use_graph(tape, agree=ranks.first_failure)
    losses = take_steps([plain, graphed], ranks, torch.device("cpu"), bad=STEPS - 2, scale=1.0)
    assert torch.equal(torch.stack(losses[::2]).nan_to_num(7), torch.stack(losses[1::2]).nan_to_num(7))
    assert (tape.ran, tape.recorded, tape.replayed) == (WARMUP_STEPS, 1, STEPS - WARMUP_STEPS)
    assert one_equals_another(everything(plain), everything(graphed))
    bad_steps = 1 if amp == "fp16" else 2  # without a loss scale the run is over
    assert plain.health() == graphed.health() == (bad_steps, STEPS - 1, 0.5 if amp == "fp16" else graphed.loss_scale)

    # One order of operations: both parts' backward, the buckets on their way, the flag, the update.
    sums = [i for i, name in enumerate(tape.names) if name == "c10d.allreduce_.default"]
    buckets = len(graphed._all_reduce._buckets)  # type: ignore[attr-defined]
    assert len(sums) == buckets + 1
    backward = [i for i, name in enumerate(tape.names) if "convolution_backward" in name]
    assert backward[len(backward) // 2 - 1] < sums[0] < backward[-1] < sums[-1]
    assert ("_c10d_functional.all_reduce.default" in tape.names) == sync_bn

    weights = {name: value for name, value in everything(graphed).items() if "running" not in name}
    first, *others = ranks.all_gather_object(weights)
    assert all(one_equals_another(first, other) for other in others)


def ranks_are_one_process(ranks: Ranks, sync_bn: bool) -> None:
    """In fp64 but for the loss: with joint batch norm as one batch, without as one process whose parts they are."""
    options: dict[str, Any] = {"clip_grad_norm": 0.1, "capturable": False}
    alone = make_step(grad_accum_steps=1 if sync_bn else ranks.size, **options)
    together = parallel_step(ranks, sync_bn=sync_bn, **options)
    scales = torch.rand(7, SHARE * ranks.size, dtype=torch.float64).round()
    for step in (alone, together):
        step.model.double()
        step.model.dropout.p = 0.0  # type: ignore[union-attr]
    together._all_reduce = GradientAllReduce(together.model.parameters(), bucket_bytes=4096)
    images, labels = batch(3, SHARE * ranks.size)
    alone(images.double(), labels, scales)
    images, labels = share(3, ranks)
    together(images.double(), labels, scales.chunk(ranks.size, 1)[ranks.rank])
    for (name, p), mine in zip(alone.model.named_parameters(), together.model.parameters(), strict=True):
        assert p.grad is not None
        assert mine.grad is not None
        assert mine.grad.stride() == mine.stride()
        assert (mine.grad - p.grad).norm() <= 1e-6 * p.grad.norm() + 1e-9, name


def refuse_to_replay() -> None:
    raise AssertionError("another rank has nothing to replay")


class Unrecordable(OperationTape):
    """Fails to record on one rank. On the other nothing runs meanwhile, as with CUDA: it waits for nobody."""

    def __init__(self, here: bool, error: Exception) -> None:
        super().__init__()
        self.here, self.error = here, error

    def record(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        if self.here:
            raise self.error
        return refuse_to_replay, ()


def all_fall_back(ranks: Ranks) -> None:
    """Where one fails to record all go on without, say the same and compute the same."""
    plain, graphed = parallel_step(ranks), parallel_step(ranks)
    said: list[str] = []
    tape = Unrecordable(ranks.rank == 1, RuntimeError("operation not permitted when stream is capturing"))
    graphed.use_graph(tape, on_failure=lambda error: said.append(str(error)), agree=ranks.first_failure)
    take_steps([plain, graphed], ranks, torch.device("cpu"), bad=-1, scale=1.0)
    assert said == ["operation not permitted when stream is capturing"]
    assert one_equals_another(everything(plain), everything(graphed))


def nobody_waits_for_one_without_memory(ranks: Ranks) -> None:
    """The last thing: rank 1 ends."""
    step = parallel_step(ranks)
    tape = Unrecordable(ranks.rank == 1, torch.OutOfMemoryError("CUDA out of memory"))
    step.use_graph(tape, on_failure=lambda error: None, agree=ranks.first_failure)
    with pytest.raises(RuntimeError) as caught:
        take_steps([step], ranks, torch.device("cpu"), bad=-1, scale=1.0)
    assert isinstance(caught.value, torch.OutOfMemoryError) if ranks.rank == 1 else _lost_a_peer(caught.value)


def meet(rank: int, folder: str, world: int, backend: str = "gloo") -> Ranks:
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    return Ranks(rank, world, rank, world)


def worker(rank: int, folder: str) -> None:
    ranks = meet(rank, folder, WORLD)
    for sync_bn, amp in ((False, "off"), (True, "off"), (False, "fp16")):
        replays_are_the_steps(ranks, sync_bn, amp)
    for sync_bn in (False, True):
        ranks_are_one_process(ranks, sync_bn)
    all_fall_back(ranks)
    nobody_waits_for_one_without_memory(ranks)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on CPUs")
def test_two_ranks_record_and_replay_one_step(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=WORLD)


def sums(rank: int, folder: str) -> None:
    """Three ranks' gradients of a small model: which are sent, and in which order they are added."""
    ranks = meet(rank, folder, 3)
    for in_order, bucket_bytes in product((False, True), (1, 64, 1 << 20)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5, 7), nn.Linear(7, 2))
        model.to(memory_format=torch.channels_last)
        if bucket_bytes == 64:  # backward then comes as a whole
            model.compile(backend="aot_eager")
        model[3].requires_grad_(False)
        unused, wide = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))
        all_reduce = GradientAllReduce(
            [*model.parameters(), unused, wide], in_order=in_order, bucket_bytes=bucket_bytes
        )

        def lose(x: Tensor, model: nn.Module = model, wide: Tensor = wide) -> Tensor:
            return model(x).sum() + (wide * rank).sum()

        torch.manual_seed(rank)
        first, second = torch.randn(2, 4, 3, 3, 3)
        for again in range(3):
            for p in (*model.parameters(), unused, wide):
                p.grad = None
            lose(first).backward()  # not sent
            own = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            with all_reduce():
                lose(second).backward()
            found = [p.grad for p in model.parameters() if p.grad is not None]
            assert unused.grad is not None
            assert wide.grad is not None
            assert unused.grad.tolist() == [0.0] * 3
            assert wide.grad.tolist() == [2.0 * (0 + 1 + 2)] * 3
            if again == 0:
                for p in model.parameters():
                    p.grad = None
                lose(second).backward()
                expected: list[Tensor] = []
                for p, grad in zip([p for p in model.parameters() if p.requires_grad], own, strict=True):
                    assert p.grad is not None
                    one, *others = ranks.all_gather_object(grad + p.grad)
                    for other in others:
                        one = one + other
                    expected.append(one)
            for mine, sum_ in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, sum_, rtol=1e-5, atol=1e-5)
                assert torch.equal(mine, sum_) or not in_order
            assert [p.grad is None for p in model[3].parameters()] == [True, True]
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="three processes on CPUs")
def test_what_is_added_up_and_in_which_order(tmp_path: Path) -> None:
    multiprocessing.spawn(sums, (str(tmp_path),), nprocs=3)


def gpu_worker(rank: int, folder: str, world: int) -> None:
    """On one GPU a communicator of one rank, which records the same collectives."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    ranks = meet(rank, folder, world, "cpu:gloo,cuda:nccl")
    for sync_bn, amp in product((False, True), ("off", "bf16", "fp16")):
        plain, graphed = (
            parallel_step(ranks, sync_bn=sync_bn, amp=amp, grad_accum_steps=2, device=device) for _ in range(2)
        )
        failures: list[RuntimeError] = []
        graphed.use_graph(CudaRecorder(device), on_failure=failures.append, agree=ranks.first_failure)
        losses = take_steps([plain, graphed], ranks, device, bad=STEPS - 2, scale=1.0)
        assert failures == []
        torch.testing.assert_close(losses[::2], losses[1::2], rtol=1e-3, atol=1e-3, equal_nan=True)
        assert plain.health() == graphed.health()
        expected, found = everything(plain), everything(graphed)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3, msg=name)
        for name, value in found.items():
            if "running" not in name:
                first = value.clone()
                dist.broadcast(first, 0)
                assert torch.equal(first, value), name
        graphed.release_graph()
    dist.destroy_process_group()  # does not hang: no graph holds the communicator


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, 2])
def test_gpus_record_and_replay_one_step(cuda: torch.device, world: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"fewer than {world} GPUs")
    if not dist.is_nccl_available():
        pytest.skip("no NCCL")
    multiprocessing.spawn(gpu_worker, (str(tmp_path), world), nprocs=world)
