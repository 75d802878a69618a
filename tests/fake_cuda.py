"""CUDA tensors without a GPU: shapes, strides, dtypes and devices are those of a GPU, values there are none.

`fake_cuda` is torch's FakeTensorMode with a witness on top, which adds what fake tensors leave out: operations of ours
run down to the launch of their kernels and must give what `register_fake` promises, fused optimizers are looked
through, and what a CUDA graph cannot hold (a value read, a copy between host and device) is counted.
"""

from __future__ import annotations

import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import launch

CUDA = torch.device("cuda", 0)
OURS = ("fastnet", "kernels", "data_pipeline")
# What multiplies in autocast's precision.
PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm"}


@contextmanager
def fake_cuda(*, launching: bool = False) -> Iterator[Witness]:
    """Inside, tensors on "cuda" are made and computed with, but hold nothing; a value that is read is 0.

    launching: give the launches of kernels to Triton, for which there must be a driver (`tests.fake_driver`).
    """
    witness, autograd = Witness(launch.launch if launching else None), torch.autograd.function
    with ExitStack() as entered:
        for patch in (
            # Torch looks for a GPU before it turns autocast on, and leaves it off without a word.
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
            mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
            mock.patch.object(torch.Tensor, "backward", _backward),
            mock.patch.object(torch.autograd.Function, "apply", classmethod(_apply)),
            mock.patch.object(autograd.FunctionCtx, "set_materialize_grads", _set_materialize_grads),
            mock.patch.object(launch, "launch", witness.launch),
            FakeTensorMode(allow_non_fake_inputs=True),
            witness,
        ):
            entered.enter_context(patch)
        yield witness


class Witness(TorchDispatchMode):
    """Sees every operation on its way to FakeTensorMode.

    kernels: how often each was launched. products: dtypes that were convolved or multiplied. host: "what (file:line)"
    of each value read and each meeting of tensors of two devices, in order.
    """

    def __init__(self, launch: Callable[..., None] | None = None) -> None:
        super().__init__()
        self._really_launch = launch
        self.kernels: Counter[str] = Counter()
        self.products: set[torch.dtype] = set()
        self.host: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if name == "_local_scalar_dense":
            self._note("a value is read", func)
            return _zero(args[0].dtype)
        if name.startswith("_fused_"):  # no meta kernel: in place, and all beside each other
            _all_on_cuda(name, [args, kwargs])
            return None
        kwargs.pop("pin_memory", None)  # there is no driver to pin with
        if name in ("_pin_memory", "is_pinned"):
            return args[0] if name == "_pin_memory" else False
        out = func(*args, **kwargs)
        devices = {leaf.device.type for leaf in tree_leaves([args, kwargs, out]) if isinstance(leaf, Tensor)}
        if len(devices) > 1:
            self._note(" and ".join(sorted(devices)), func)
            if name.startswith("_foreach_"):  # fake tensors are not asked
                raise AssertionError(f"{name} is given tensors on {' and '.join(sorted(devices))}")
        if name in PRODUCTS:
            self.products |= {leaf.dtype for leaf in tree_leaves([args[:2]]) if isinstance(leaf, Tensor)}
        if space == "fastnet":
            self._run_really(func, args, kwargs, out)
        return out

    def _note(self, what: str, func: Any) -> None:
        frames = [(Path(f.filename), f.lineno) for f in traceback.extract_stack()]
        where = next((f"{file.name}:{line}" for file, line in reversed(frames) if file.parent.name in OURS), "?")
        self.host.append(f"{what}: {func.name()} ({where})")

    def _run_really(self, func: Any, args: Any, kwargs: Any, promised: Any) -> None:
        """The operation's own code, whose kernels are recorded and not run."""
        qualified = func.name().partition(".")[0]
        _all_on_cuda(qualified, [args, kwargs])
        with self:
            made = OPDEFS[qualified]._backend_fns["cuda"](*args, **kwargs)
        for ours, theirs in zip(tree_leaves([made]), tree_leaves([promised]), strict=True):
            if _form(ours) != _form(theirs):
                raise AssertionError(f"{qualified} makes {_form(ours)}, and register_fake promises {_form(theirs)}")

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, like: Tensor, **options: Any) -> None:
        name = kernel.fn.__name__
        _all_on_cuda(name, [args, like])
        if not all(isinstance(n, int) and n > 0 for n in grid):
            raise AssertionError(f"{name} is launched on a grid of {grid}")
        self.kernels[name] += 1
        if self._really_launch is not None:
            self._really_launch(kernel, grid, *args, like=like, **options)


def _zero(dtype: torch.dtype) -> Any:
    return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0


def _form(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _all_on_cuda(name: str, values: Any) -> None:
    for tensor in tree_leaves(values):
        if isinstance(tensor, Tensor) and tensor.device != CUDA:
            raise AssertionError(f"{name} is given a tensor {list(tensor.shape)} on {tensor.device}")


def to_cuda(module: nn.Module) -> None:
    """What `module.to("cuda")` does, for a module on the CPU, inside `fake_cuda`."""
    for part in module.modules():
        stores: tuple[dict[str, Any], ...] = part._parameters, part._buffers
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None:
                    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
                    trained = tensor.requires_grad
                    store[name] = nn.Parameter(moved, trained) if isinstance(tensor, nn.Parameter) else moved


# --- autograd -----------------------------------------------------------------------------------------------------
# The engine asks the driver for each device's stream, so its work is done here: every node once, when all the gradients
# that it waits for are there.


@torch.no_grad()
def _backward(loss: Tensor, *_: Any, **__: Any) -> None:
    root = loss.grad_fn
    waiting: Counter[Any] = Counter()  # edges that lead to a node
    found, stack = {root}, [root]
    while stack:
        for node, _place in stack.pop().next_functions:  # type: ignore[union-attr]
            if node is not None:
                waiting[node] += 1
                if node not in found:
                    found.add(node)
                    stack.append(node)
    gradients: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    gradients[root][loss.output_nr] = torch.ones_like(loss)
    ready: list[Any] = [root]
    while ready:
        node = ready.pop()
        arrived = gradients.pop(node, None)
        results = [None] * len(node.next_functions) if arrived is None else _differentiate(node, arrived)
        for (following, place), gradient in zip(node.next_functions, results, strict=True):
            if following is None:
                continue
            if gradient is not None:
                slots = gradients[following]
                slots[place] = slots[place] + gradient if place in slots else gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


def _differentiate(node: Any, arrived: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """What one node makes of the gradients of its outputs: those of its inputs."""
    given: list[Tensor | None] = []
    for place, expected in enumerate(node._input_metadata):
        gradient = arrived.get(place)
        if gradient is not None:
            if gradient.device != expected.device:
                raise AssertionError(f"{node.name()} is given a gradient on {gradient.device}, not {expected.device}")
            gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)  # what was broadcast or cast
        given.append(gradient)
    if not _is_python(node):
        made = node(*given)
        return made if isinstance(made, tuple) else (made,)
    if not getattr(node, "keeps_none", False):
        metadata = node._input_metadata
        given = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g
                 for g, m in zip(given, metadata, strict=True)]  # fmt: skip
    results = node.apply(*given)
    results = results if isinstance(results, tuple) else (results,)
    return tuple(result for result, wanted in zip(results, node.tensor_inputs, strict=True) if wanted)


def _is_python(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


_usual_apply = torch.autograd.Function.__dict__.get("apply")  # of torch 2.11; 2.15 inherits it
_usual_materialize = torch.autograd.function.FunctionCtx.set_materialize_grads


def _apply(cls: Any, *inputs: Any, **options: Any) -> Any:
    """`Function.apply`, which leaves with the node which of the inputs are tensors."""
    usual = super(torch.autograd.Function, cls).apply if _usual_apply is None else _usual_apply.__get__(None, cls)
    outputs = usual(*inputs, **options)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        if isinstance(output, Tensor) and output.grad_fn is not None:
            output.grad_fn.tensor_inputs = [isinstance(value, Tensor) for value in inputs]  # type: ignore[attr-defined]
            break
    return outputs


def _set_materialize_grads(ctx: Any, value: bool) -> None:
    ctx.keeps_none = not value
    _usual_materialize(ctx, value)
