"""What every kernel shares: which implementation runs, the operations' contract with PyTorch, error sentences,
tiles, addresses."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import device, launch
from tests import parity
from tests.parity import ARGUMENTS, Case, kernel_device  # noqa: F401

OPS = list(ARGUMENTS)
SHAPE = (2, 8, 5, 5)


def case_of(op: str, mode: str = "train", dtype: torch.dtype = torch.float32) -> Case:
    return Case(op, dtype, SHAPE, 4, mode if op.startswith("bn") else "plain")  # type: ignore[arg-type]


def differentiable(op: str, mode: str = "train") -> tuple[dict[str, Tensor | None], Case, list[Tensor]]:
    case = case_of(op, mode)
    values = parity.inputs(case)
    leaves = [values[n].requires_grad_() for n in ARGUMENTS[op] if n not in parity.CONSTANT]  # type: ignore[union-attr]
    return values, case, leaves


# Which implementation runs


@pytest.mark.skipif(not launch.INTERPRETED, reason="states what happens on a CPU in the interpreter")
def test_auto_is_torch_on_cpu_and_torch_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(SHAPE)
    assert launch.resolve("auto", x) == "torch"
    assert launch.resolve("torch", x) == "torch"
    assert launch.resolve("triton", x) == "triton"  # the interpreter is on
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run on cpu tensors: .*TRITON_INTERPRET=1"):
        launch.resolve("triton", x)
    monkeypatch.setattr(launch, "triton", None)
    with pytest.raises(RuntimeError, match="needs the triton package"):
        launch.resolve("triton", x)


def test_auto_on_cuda_is_triton_for_the_types_it_stores() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert launch.resolve("auto", torch.empty(SHAPE, device="cuda", dtype=dtype)) == "triton"
        assert launch.resolve("auto", torch.empty(SHAPE, device="cuda", dtype=torch.float64)) == "torch"


@pytest.mark.parametrize("op", OPS)
def test_triton_never_falls_back(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPS:
        monkeypatch.setattr(kernels.reference, name, lambda *a, **k: pytest.fail("the reference ran"))
    values, case, _ = differentiable(op)
    assert parity.call(op, values, "triton", case.options).shape == SHAPE


@pytest.mark.slow
def test_kernels_import_and_run_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "print(kernels.drop_connect_add(torch.ones(1, 8, 2, 2), torch.ones(1, 8, 2, 2), None).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "64.0", done.stderr


# Bad input


def bad(op: str, expected: type[Exception], match: str, change: Callable[[dict[str, Any]], None]) -> Any:
    return pytest.param(op, expected, match, change, id=f"{op}-{match[:40]}")


def replacing(name: str, make: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        values[name] = make(values[name])

    return change


BAD = [
    bad("bn_silu", ValueError, r"x must be \[B, C, H, W\], got shape \(8, 5, 5\)", replacing("x", lambda x: x[0])),
    bad("bn_silu", ValueError, r"x must not be empty", replacing("x", lambda x: x[:0])),
    bad("bn_silu", TypeError, r"x must be floating point, got torch.int64", replacing("x", lambda x: x.long())),
    bad("bn_silu", ValueError, r"weight must have shape \(8,\).*got \(7,\)", replacing("weight", lambda w: w[:7])),
    bad("bn_silu", TypeError, r"bias must be float32 .*got torch.float16", replacing("bias", lambda b: b.half())),
    bad(
        "bn_silu",
        ValueError,
        r"running_mean is on meta and x on",
        replacing("running_mean", lambda r: r.to("meta")),
    ),
    bad(
        "bn_silu",
        TypeError,
        r"stores float32, float16 or bfloat16, got torch.float64",
        lambda v: v.update(parity.as_double(v)),
    ),
    bad("bn_drop_connect_add", ValueError, r"running_var must have shape", replacing("running_var", lambda r: r[None])),
    bad("bn_drop_connect_add", ValueError, r"residual must match x", replacing("residual", lambda r: r[:, :4])),
    bad(
        "drop_connect_add",
        ValueError,
        r"residual must match x.*torch.float16",
        replacing("residual", lambda r: r.half()),
    ),
    bad("drop_connect_add", ValueError, r"drop_scale must have shape \(2,\)", replacing("drop_scale", lambda s: s[:1])),
    bad("squeeze_excite", ValueError, r"w_reduce \[S, C\], got", replacing("w_reduce", lambda w: w[:, :, None, None])),
    bad("squeeze_excite", ValueError, r"w_reduce must have shape \(4, 8\)", replacing("w_reduce", lambda w: w[:, :7])),
    bad("squeeze_excite", ValueError, r"w_expand must have shape \(8, 4\)", replacing("w_expand", lambda w: w.T)),
    bad("bn_silu_squeeze_excite", ValueError, r"b_expand must have shape", replacing("b_expand", lambda b: b[1:])),
    bad("bn_silu_squeeze_excite", TypeError, r"w_reduce must be float32", replacing("w_reduce", lambda w: w.double())),
]


@pytest.mark.parametrize(("op", "expected", "match", "change"), BAD)
def test_bad_input_gets_one_sentence(
    op: str, expected: type[Exception], match: str, change: Callable[[dict[str, Any]], None]
) -> None:
    case = case_of(op)
    values: dict[str, Any] = parity.inputs(case)
    change(values)
    with pytest.raises(expected, match=match) as caught:
        parity.call(op, values, "triton", case.options)
    assert "\n" not in str(caught.value)


def test_unknown_impl_is_refused() -> None:
    with pytest.raises(ValueError, match="impl must be 'auto', 'triton' or 'torch', got 'cuda'"):
        kernels.drop_connect_add(torch.ones(SHAPE), torch.ones(SHAPE), None, impl="cuda")  # type: ignore[arg-type]


# The contract with PyTorch


def opcheck_arguments(op: str, training: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    """Each custom operation behind a public function with arguments to call it by."""
    case = case_of(op)
    values, _, _ = differentiable(op)
    v: dict[str, Any] = dict(values)
    x, dy, c, s = v["x"], v["dy"], SHAPE[1], case.squeeze
    norm = (torch.zeros(c), torch.ones(c), v["weight"], v["bias"])
    wide, narrow = torch.rand(SHAPE[0], c), torch.randn(SHAPE[0], s)
    saved = (wide, narrow, torch.rand(SHAPE[0], c))
    dsilu_sums = torch.randn(2, SHAPE[0], c)
    excite = tuple(v[n] for n in parity.EXCITE)
    ops = torch.ops.fastnet
    plain = [t.detach() if isinstance(t, Tensor) else t for t in norm]
    return {
        "squeeze_excite": [
            (ops.squeeze_excite, (x, *excite)),
            (ops.squeeze_excite_backward, (dy, x.detach(), v["w_reduce"].detach(), v["w_expand"].detach(), *saved)),
        ],
        "bn_silu": [
            (ops.batch_stats, (x.detach(),)),
            (ops.bn_silu, (x, *norm, 1e-3, training, "")),
            (ops.bn_silu_backward, (dy, x.detach(), *plain, 1e-3, training, "")),
        ],
        "bn_silu_squeeze_excite": [
            (ops.bn_silu_squeeze_excite, (x, *norm, *excite, 1e-3, training, "")),
            (
                ops.bn_silu_squeeze_excite_backward,
                (
                    dy,
                    x.detach(),
                    *plain,
                    v["w_reduce"].detach(),
                    v["w_expand"].detach(),
                    *saved,
                    dsilu_sums,
                    1e-3,
                    training,
                    "",
                ),
            ),
        ],
        "drop_connect_add": [
            (ops.drop_connect_add, (x, v["residual"], v["drop_scale"])),
            (ops.drop_connect_add, (x, v["residual"], None)),
            (ops.drop_connect_backward, (dy, v["drop_scale"])),
        ],
        "bn_drop_connect_add": [
            (ops.bn_drop_connect_add, (x, v["residual"], v["drop_scale"], *norm, 1e-3, training, "")),
            (ops.bn_drop_connect_add, (x, None, None, *norm, 1e-3, training, "")),
            (ops.bn_drop_connect_backward, (dy, x.detach(), v["drop_scale"], *plain[:3], 1e-3, training, "")),
        ],
    }[op]


@pytest.mark.wide
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    for operation, arguments in opcheck_arguments(op, training=True):
        torch.library.opcheck(operation, arguments)


@pytest.mark.wide
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", OPS)
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_equals_eager_without_recompiling(op: str, backend: str) -> None:
    torch._dynamo.reset()
    case = case_of(op)
    step = torch.compile(getattr(kernels, op), fullgraph=True, dynamic=False, backend=backend)
    for seed in range(3):
        values = parity.inputs(case, seed)
        eager = parity.run(case, "triton", values)
        graph = parity.run(case, "triton", values, wrap=lambda _: step)
        assert eager.keys() == graph.keys()
        for name, tensor in eager.items():
            assert graph[name].stride() == tensor.stride(), name
            if name.startswith("running"):  # moved outside the operation, so Inductor may contract the arithmetic
                torch.testing.assert_close(graph[name], tensor)
            else:
                assert torch.equal(graph[name], tensor), name


@pytest.mark.wide
@pytest.mark.parametrize("op", OPS)
def test_any_input_and_gradient_layout_gives_the_same_channels_last_result(op: str) -> None:
    case = case_of(op)
    values = parity.inputs(case)
    nchw = {n: None if v is None else v.contiguous() for n, v in values.items()}
    expanded = {**values, "dy": torch.ones(()).expand(SHAPE)}
    same = {**values, "dy": torch.ones(SHAPE)}
    for left, right in ((parity.run(case, "triton", values), parity.run(case, "triton", nchw)),
                        (parity.run(case, "triton", same), parity.run(case, "triton", expanded))):  # fmt: skip
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), name
    y = parity.call(op, nchw, "triton", case.options)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", OPS)
def test_backward_twice_is_equal_and_double_backward_is_refused(op: str) -> None:
    values, case, leaves = differentiable(op)
    y = parity.call(op, values, "triton", case.options)
    first = torch.autograd.grad(y, leaves, values["dy"], retain_graph=True)
    second = torch.autograd.grad(y, leaves, values["dy"], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    dy = values["dy"]
    assert dy is not None
    (dx,) = torch.autograd.grad(y, leaves[0], dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=rf"^{op} has no second derivative in Triton: pass impl='torch'"):
        torch.autograd.grad(dx.square().sum(), leaves[0] if op != "drop_connect_add" else dy)


@pytest.mark.parametrize("op", OPS)
def test_saved_for_backward_are_x_and_small_vectors(op: str) -> None:
    values, case, _ = differentiable(op)
    x = values["x"]
    assert x is not None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        parity.call(op, values, "triton", case.options)
    images = [t for t in saved if t.dim() == 4]
    assert [t.data_ptr() for t in images] == ([] if op == "drop_connect_add" else [x.data_ptr()])
    b, c = SHAPE[:2]
    assert all(t.numel() <= 2 * b * c or t.shape == (c, case.squeeze) or t.shape == (case.squeeze, c)
               for t in saved if t.dim() < 4)  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_no_grad_saves_nothing_and_accumulation_adds(op: str) -> None:
    values, case, leaves = differentiable(op, mode="eval")
    with torch.no_grad():
        assert not parity.call(op, values, "triton", case.options).requires_grad
    once = torch.autograd.grad(parity.call(op, values, "triton", case.options), leaves, values["dy"])
    for _ in range(2):
        parity.call(op, values, "triton", case.options).backward(values["dy"])
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient, rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_the_kernels_alone(op: str) -> None:
    case = case_of(op, dtype=torch.float16)
    plain = parity.run(case, "triton")
    with torch.autocast(parity.DEVICE, torch.bfloat16):
        cast = parity.run(case, "triton")
    assert cast["y"].dtype == torch.float16
    for name, tensor in plain.items():
        assert torch.equal(cast[name], tensor), name


@pytest.mark.parametrize("op", [op for op in OPS if op != "drop_connect_add"])
def test_grad_scaler_unscales_exactly_and_skips_on_overflow(op: str) -> None:
    values, case, leaves = differentiable(op, mode="eval")
    dy = values["dy"]
    assert dy is not None
    reference = torch.autograd.grad((parity.call(op, values, "triton", case.options) * dy).sum(), leaves)
    optimizer = torch.optim.SGD(leaves, lr=1.0)
    scaler = torch.amp.GradScaler(parity.DEVICE, init_scale=2.0**10)
    before = [leaf.detach().clone() for leaf in leaves]
    y = parity.call(op, values, "triton", case.options)
    scaler.scale((y * dy).sum()).backward()
    scaler.unscale_(optimizer)
    for leaf, gradient in zip(leaves, reference, strict=True):
        assert torch.equal(leaf.grad, gradient)  # type: ignore[arg-type]
    leaves[0].grad.fill_(float("inf"))  # type: ignore[union-attr]
    scaler2 = torch.amp.GradScaler(parity.DEVICE, init_scale=2.0**10)
    scaler2.scale(torch.ones(()))
    scaler2.step(optimizer)
    assert all(torch.equal(leaf, old) for leaf, old in zip(leaves, before, strict=True))


# Tiles and addresses


def test_tiles_waste_few_lanes_and_rows_of_a_program_cover_every_row() -> None:
    for channels in range(8, 4096, 8):
        tile = launch.tile_for(channels)
        assert tile.rows * tile.block_c == 8 * 32 * tile.num_warps
        lanes = launch.cdiv(channels, tile.block_c) * tile.block_c
        best = min(launch.cdiv(channels, t.block_c) * t.block_c for t in launch.TILES[1:])
        assert channels <= 16 or lanes <= 1.125 * best
    for rows in (1, 7, 128, 129, 49 * 128, 112 * 112 * 128, launch.MAX_ROWS):
        for tile in launch.TILES:
            step = launch.rows_per_program(rows, tile, 3, device.REFERENCE)
            assert step % tile.height == 0
            assert 1 <= launch.cdiv(rows, step) <= launch.MAX_PARTIALS


ADDRESSES = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels
seen = set()
for spec in kernels.all_specs():
    if spec.kind == "small" or spec.fn in seen or "bf16" not in spec.name:
        continue
    seen.add(spec.fn)
    source = ASTSource(fn=spec.fn, signature=spec.signature, constexprs=spec.constexprs, attrs=spec.attrs)
    ir = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": spec.num_warps}).asm["ttir"]
    widths = re.findall(r"tt.addptr .*x!tt.ptr<bf16>>, tensor<[0-9x]+x(i\\d+)>", ir)
    print(spec.fn.fn.__name__, *sorted(set(widths)))
"""


@pytest.mark.slow
def test_every_image_kernel_addresses_with_64_bits() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", ADDRESSES],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 16, done.stderr
    for name, *widths in lines:
        # Beside an image's elements: those of a weight, and a strip's columns from its first, of which there are few.
        short = ["i32"] if name in ("_pointwise_kernel", "_depthwise_kernel", "_expand_backward_kernel") else []
        assert widths == [*short, "i64"], name


def test_every_specification_is_named_once_and_states_aligned_pointers() -> None:
    specs = kernels.all_specs()
    assert len({spec.name for spec in specs}) == len(specs)
    assert {"fp32", "fp16", "bf16", "u8"} == {m[1] for s in specs if (m := re.search(r"\[(\w+),", s.name))}
    for spec in specs:
        pointers = [i for i, kind in enumerate(spec.signature.values()) if kind.startswith("*")]
        assert set(spec.attrs) == {(i,) for i in pointers}
        assert list(spec.constexprs) == [n for n in spec.constexprs if spec.signature[n] == "constexpr"]
