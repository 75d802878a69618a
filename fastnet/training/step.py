"""One training step: forward, loss, backward, clipping, update. The part that has to be fast.

`TrainStep.run` is a function of tensors that waits for nothing and decides nothing on the host, so that a CUDA graph
can hold it whole (`fastnet.training.cuda_graph`). What differs from step to step reaches it in tensors: images, labels,
drop-connect scales, the mixing's numbers, the learning rate and the average's weight.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from fastnet.device import Amp
from fastnet.forms import computes_natively
from fastnet.training.cuda_graph import GraphedStep, Recorder, own_failure
from fastnet.training.ema import ModelEma
from fastnet.training.mixup import mix_images
from kernels.cpu import update
from kernels.launch import with_strides

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}

# torch.amp.GradScaler's own numbers.
INITIAL_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


def autocast(device: torch.device, amp: Amp) -> torch.autocast:
    """Autocast for `device` at `amp`'s precision; a no-op for "off"."""
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=amp != "off")


class StepHealth(NamedTuple):
    """skipped: steps left out since the start of the run. first_bad: the first of them, from 1; 0 if there is none.
    loss_scale: fp16's factor."""

    skipped: int
    first_bad: int
    loss_scale: float


class TrainStep:
    """Callable on a batch: `(images [B,3,R,R], labels [B]) -> (loss [], correct [])`, both on the device, not yet read.

    A step whose loss or gradients are not finite leaves parameters, optimizer, average and batch norm's statistics as
    they were, bit for bit. With fp16 the loss is scaled and the scale then halved, as `torch.amp.GradScaler` does;
    otherwise every later step is left out too, until someone reads `health` and stops.

    Args:
        class_weights: [classes], by which the loss of each image is multiplied.
        ema: moved towards the model after each update.
        grad_accum_steps: the batch goes through the model in so many micro-batches, equal ones where they divide it.
        capturable: nothing waits for the device (default: on CUDA). The optimizer and `ema` must be so too.
        all_reduce: entered around the last part's backward pass, after which gradients are the sums over all ranks
            (`fastnet.training.gradients.GradientAllReduce`).
        reduce_found_inf: makes the flag, float32 [], the largest of all ranks, in place.
        images: of a step, over all ranks; 0: as many as the batch has.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        amp: Amp = "off",
        label_smoothing: float = 0.1,
        class_weights: Tensor | None = None,
        clip_grad_norm: float = 0.0,
        ema: ModelEma | None = None,
        grad_accum_steps: int = 1,
        capturable: bool | None = None,
        all_reduce: Callable[[], AbstractContextManager[None]] = nullcontext,
        reduce_found_inf: Callable[[Tensor], None] | None = None,
        images: int = 0,
    ) -> None:
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.device = device
        self.amp: Amp = amp
        self.label_smoothing = label_smoothing
        self.class_weights = None if class_weights is None else class_weights.to(device)
        self.clip_grad_norm = clip_grad_norm
        self.grad_accum_steps = grad_accum_steps
        self.capturable = device.type == "cuda" if capturable is None else capturable
        self._all_reduce, self._reduce_found_inf = all_reduce, reduce_found_inf
        self._images = images
        self._native = not self.capturable and computes_natively(model)
        self._params = [p for p in model.parameters() if p.requires_grad]
        # Batch norm's statistics have moved before the loss is known.
        self._statistics = [b for b in model.buffers() if b.is_floating_point()]
        self._before = [torch.empty_like(b) for b in self._statistics]

        def number(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((), value, dtype=dtype, device=device)

        self.found_inf = number(0, torch.float32)
        self.loss_scale = number(INITIAL_SCALE, torch.float32)
        self.growth_tracker = number(0, torch.int32)
        self.steps, self.skipped, self.first_bad = (number(0, torch.int64) for _ in range(3))
        optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._call: Callable[..., tuple[Tensor, ...]] = self.run

    def use_graph(
        self,
        recorder: Recorder,
        on_failure: Callable[[RuntimeError], None] | None = None,
        agree: Callable[[str | None], str | None] = own_failure,
    ) -> None:
        """From now on replay a recording; see `fastnet.training.cuda_graph.GraphedStep`. The step must be
        capturable."""
        self._call = GraphedStep(self.run, recorder, on_failure=on_failure, agree=agree)

    def release_graph(self) -> None:
        """Free the recording, if there is one. Before its process group ends: NCCL waits for graphs that hold it."""
        self._call = self.run

    def __call__(
        self, images: Tensor, labels: Tensor, drop_scales: Tensor | None = None, mix: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        draw = getattr(self.model, "draw_drop_scales", None)
        if drop_scales is None and draw is not None:
            drop_scales = draw(len(images), self.device)
        loss, correct = self._call(images, labels, drop_scales, mix)
        return loss, correct

    def run(
        self, images: Tensor, labels: Tensor, drop_scales: Tensor | None, mix: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The step as a function of tensors: drop_scales [blocks, B] (None: drawn by the model), mix [7] as in `Mix`.

        Raises ValueError where the batch has fewer images than micro-batches.
        """
        micro_batches = self.grad_accum_steps
        if len(images) < micro_batches:
            raise ValueError(f"a batch of {len(images)} can't go through the model in {micro_batches} parts.")
        with torch.no_grad():
            if self._statistics:
                torch._foreach_copy_(self._before, self._statistics)
            opposite = labels.flip(0)
            if mix is not None:
                images = mix_images(images, mix)
        share = None if mix is None else mix[-1]
        self.optimizer.zero_grad(set_to_none=True)
        losses, hits = [], []
        scales = drop_scales.tensor_split(micro_batches, 1) if drop_scales is not None else (None,) * micro_batches
        batches = zip(*(t.tensor_split(micro_batches) for t in (images, labels, opposite)), scales, strict=True)
        for i, (some, right, other, scale) in enumerate(batches):
            with record_function("forward"):
                with autocast(self.device, self.amp):
                    logits = self.model(some, scale)
                loss, correct = self._loss(logits.float(), right, other, share)
            with record_function("backward"), self._all_reduce() if i == micro_batches - 1 else nullcontext():
                self._scaled(loss, len(some), len(images)).backward()
            weight = len(some) * micro_batches / len(images)
            losses.append(loss.detach() if weight == 1 else loss.detach() * weight)
            hits.append(correct)
        loss = losses[0] if micro_batches == 1 else torch.stack(losses).mean()
        with record_function("update"):
            self._align()
            self._update(loss)
        return loss, hits[0] if micro_batches == 1 else torch.stack(hits).sum()

    def _loss(self, logits: Tensor, labels: Tensor, other: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
        """(mean loss, right answers); a mixed image's answers count by their shares."""
        predicted = logits.detach().argmax(1)
        loss = self._cross_entropy(logits, labels)
        correct = (predicted == labels).sum()
        if share is None:
            return loss, correct
        # Cross-entropy is linear in its target: two hard targets are one soft one.
        loss = share * loss + (1 - share) * self._cross_entropy(logits, other)
        return loss, share * correct + (1 - share) * (predicted == other).sum()

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.class_weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        # PyTorch's own weights would divide by their sum in this batch, and so undo themselves where all are alike.
        each = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
        return (each * self.class_weights[labels]).mean()

    def _scaled(self, loss: Tensor, part: int, mine: int) -> Tensor:
        """The mean loss of `part` of this rank's images, weighted so that the gradients of all parts of all ranks add
        up to that of the mean over the step's images."""
        if self.amp == "fp16":
            loss = loss * self.loss_scale
        weight = part / (self._images or mine)
        return loss if weight == 1 else loss * weight

    def _align(self) -> None:
        """Give each gradient its parameter's strides, as the kernels do; PyTorch's convolutions not always."""
        for p in self._params:
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = with_strides(p.grad, p.stride())

    @torch.no_grad()
    def _update(self, loss: Tensor) -> None:
        """Clip and apply the gradients, or leave everything as it was before the step."""
        grads = [p.grad for p in self._params if p.grad is not None]
        fp16 = self.amp == "fp16"
        norm = self._norm(grads)
        factor = self.loss_scale.reciprocal() if fp16 else None
        if self.clip_grad_norm:
            if factor is not None:
                norm = norm * factor
            clip = (self.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = clip if factor is None else clip * factor
        found = (~(norm.isfinite() & loss.isfinite())).float()
        self.found_inf.copy_(found if fp16 else found.maximum(self.found_inf))
        if self._reduce_found_inf is not None:
            self._reduce_found_inf(self.found_inf)
        # Reading a CPU's number is free, and spares a pass over the gradients.
        if factor is not None and (self.capturable or factor != 1):
            torch._foreach_mul_(grads, factor)
        self.optimizer.step()
        if self._statistics:
            self._restore_statistics()
        if self.ema is not None:
            self.ema.update(self.found_inf)
        self._count()
        if fp16:
            torch._amp_update_scale_(
                self.loss_scale, self.growth_tracker, self.found_inf, GROWTH, BACKOFF, GROWTH_INTERVAL
            )

    def _norm(self, grads: list[Tensor]) -> Tensor:
        """Of all gradients, []."""
        norm = update.norm(grads) if self._native else None
        if norm is not None:
            return norm
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))

    def _restore_statistics(self) -> None:
        """Batch norm's statistics from before the step, if it is left out."""
        if not self.capturable:
            if self.found_inf:
                torch._foreach_copy_(self._statistics, self._before)
            return
        # As integers, modulo 2^32, the sum before + keep x (after - before) is exact, and no NaN spreads.
        before, after = ([t.view(torch.int32) for t in tensors] for tensors in (self._before, self._statistics))
        changes = torch._foreach_sub(after, before)
        torch._foreach_mul_(changes, (self.found_inf == 0).int())
        torch._foreach_copy_(after, torch._foreach_add(before, changes))

    def _count(self) -> None:
        self.steps += 1
        bad = self.found_inf != 0
        self.skipped += bad
        self.first_bad.copy_(torch.where(bad & (self.first_bad == 0), self.steps, self.first_bad))

    def health(self) -> StepHealth:
        """What the steps so far came to. Waits for the device."""
        values = torch.stack([self.skipped.double(), self.first_bad.double(), self.loss_scale.double()]).tolist()
        return StepHealth(int(values[0]), int(values[1]), values[2])

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, beside those of model, optimizer and average, that continuing needs."""
        names = ("loss_scale", "growth_tracker", "steps", "skipped", "first_bad")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """In place; KeyError where a tensor is missing."""
        for name, mine in self.state_dict().items():
            mine.copy_(tensors[name])
