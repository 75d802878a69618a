"""Which configuration a launch chooses: it fits every card, follows the number of multiprocessors, and can be set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.shapes import model_blocks
from kernels import configs, device
from kernels.block import expand_backward, pointwise_blocks, pointwise_wgrad, strips  # fmt: skip
from kernels.block.pointwise_operand import span_for, vector_width
from kernels.block.strips import geometry
from kernels.block.traffic import Block
from kernels.configs import Site
from kernels.device import REFERENCE, Gpu

CARDS = tuple(
    Gpu(f"sm_{arch}", (arch // 10, arch % 10), multiprocessors, device.SHARED_MEMORY[arch])
    for arch, multiprocessors in ((80, 108), (86, 28), (89, 128), (90, 132), (100, 148), (120, 170))
)
AMPERE = CARDS[1]
RESIDUAL_ADD = Site("pointwise", (128, 14, 14, 112, 672, "residual_add", "statistics", "bfloat16"))
NARROW = Site("pointwise", (128, 56, 56, 24, 144, "residual_add", "statistics", "bfloat16"))


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    configs.forget()


def sites(block: Block, dtype: str) -> list[Site]:
    """Those of a block in training."""
    b, h, w, c, c_in, out = (
        block.images, block.height, block.width, block.channels, block.in_channels, block.out_channels,
    )  # fmt: skip
    g = geometry(h, w, block.kernel_size, block.stride)
    wide, narrow = (b, h, w), (b, g.out_height, g.out_width)
    found = [
        Site("pointwise", (*narrow, c, out, "bn_silu_gate", "statistics", dtype)),
        Site("pointwise", (*narrow, c, out, "bn_silu_gate", "bias", dtype)),
        Site("pointwise", (*narrow, out, c, "bn_grad", "gate_sums", dtype)),
        Site("pointwise_wgrad", (*narrow, c, out, "bn_silu_gate", "bn_grad", dtype)),
        Site("depthwise", (b, c, h, w, block.kernel_size, block.stride, block.expands, True, dtype)),
        Site("depthwise_backward", (b, c, h, w, block.kernel_size, block.stride, block.expands, True, dtype)),
    ]
    if block.expands:
        found += [
            Site("pointwise", (*wide, c_in, c, prologue, "statistics", dtype)) for prologue in ("none", "residual_add")
        ]
        found += [
            Site("pointwise", (*wide, c, c_in, "bn_silu_grad", epilogue, dtype)) for epilogue in ("none", "residual")
        ]
        found.append(Site("pointwise_wgrad", (*wide, c, c_in, "bn_silu_grad", "none", dtype)))
        found.append(Site("expand_backward", (*wide, c, c_in, block.residual, dtype)))
    return found


def need(site: Site, config: configs.Config, card: Gpu) -> int:
    """Bytes of shared memory that a launch there may take."""
    if site.kernel.startswith("depthwise"):
        return 0
    sizes: tuple[Any, ...] = site.sizes
    if site.kernel == "expand_backward":
        return expand_backward.shared_bytes(config, sizes[3], sizes[4], card.capability) if config.together else 0
    _, h, w, *sides, one, other, name = sizes
    dtype = getattr(torch, name)
    span = span_for(config.m, h * w, vector_width(*sides), dtype)
    file = pointwise_blocks if site.kernel == "pointwise" else pointwise_wgrad
    return file.shared_bytes(config, one, other, dtype, span, card.capability)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("variant", ["b0", "b3", "b7"])
def test_every_candidate_fits_the_card(variant: str, card: Gpu) -> None:
    for block in set(model_blocks(variant, 224, 8)):
        for dtype in ("bfloat16", "float16", "float32"):
            for site in sites(block, dtype):
                found = configs.candidates(site, card)
                assert 1 <= len(found) <= 6
                assert len(set(found)) == len(found)
                assert all(need(site, config, card) <= card.shared_memory for config in found), site


def test_a_product_too_large_for_a_card_is_cut_smaller_there_alone() -> None:
    large = max(configs.candidates(RESIDUAL_ADD, REFERENCE), key=lambda blocks: need(RESIDUAL_ADD, blocks, REFERENCE))
    assert large.single
    assert large not in configs.candidates(RESIDUAL_ADD, AMPERE)
    assert (
        need(RESIDUAL_ADD, large, AMPERE)
        > AMPERE.shared_memory
        >= need(RESIDUAL_ADD, configs.choose(RESIDUAL_ADD, AMPERE), AMPERE)
    )


def test_where_nothing_fits_the_smallest_is_launched_and_says_so() -> None:
    tiny = Gpu("tiny", (9, 0), 1, 1024)
    (smallest,) = configs.candidates(RESIDUAL_ADD, tiny)
    assert need(RESIDUAL_ADD, smallest, tiny) == min(
        need(RESIDUAL_ADD, blocks, tiny) for blocks in configs.candidates(RESIDUAL_ADD, REFERENCE)
    )  # fmt: skip


def test_programs_follow_the_multiprocessors() -> None:
    g = geometry(112, 112, 3, 1)
    shape, wide = (128, 96, 112, 112), (128, 240, 28, 28)
    grids = []
    for card in (REFERENCE, AMPERE):
        product = pointwise_blocks.plan(shape, 96, 24, "bn_silu_gate", "statistics", torch.bfloat16, card)
        gradient = pointwise_wgrad.split_plan(wide, 40, "bn_silu_gate", "bn_grad", torch.bfloat16, card)
        forward, _ = strips.forward_plan(shape, torch.bfloat16, g, norm=True, stats=True, gpu=card)
        backward, _ = strips.backward_plan(shape, torch.bfloat16, g, norm=True, out_norm=True, gpu=card)
        grids.append([
            (product.column_blocks * product.parts, product.blocks.programs),
            (gradient.outputs * gradient.splits, gradient.blocks.programs),
            (forward.blocks * forward.partials, forward.config.programs),
            (backward.blocks * backward.partials, backward.config.programs),
        ])  # fmt: skip
    for card, grid in zip((REFERENCE, AMPERE), grids, strict=True):
        for programs, each in grid:
            assert 0.6 * each * card.multiprocessors <= programs <= each * card.multiprocessors


def test_a_measured_choice_is_launched_until_it_is_forgotten() -> None:
    first, second, *_ = configs.candidates(NARROW, AMPERE)
    configs.use({NARROW: second})
    assert configs.choose(NARROW, AMPERE) == second
    with configs.trying({NARROW: first}):
        assert configs.choose(NARROW, AMPERE) == first
    assert configs.choose(NARROW, AMPERE) == second
    configs.forget()
    assert configs.choose(NARROW, AMPERE) == first


def test_a_choice_that_this_card_cannot_run_is_not_made() -> None:
    large = max(configs.candidates(RESIDUAL_ADD, REFERENCE), key=lambda blocks: need(RESIDUAL_ADD, blocks, REFERENCE))
    configs.use({RESIDUAL_ADD: large})
    assert configs.choose(RESIDUAL_ADD, REFERENCE) == large
    assert configs.choose(RESIDUAL_ADD, AMPERE) == configs.candidates(RESIDUAL_ADD, AMPERE)[0] != large


def test_choices_survive_json_and_what_no_longer_exists_is_not_found() -> None:
    for config in configs.candidates(NARROW, AMPERE):
        kept = json.loads(json.dumps(configs.to_json(config)))
        assert configs.find(NARROW, AMPERE, kept) == config
    assert configs.find(NARROW, AMPERE, {**kept, "stages": 17}) is None
    assert configs.find(NARROW, AMPERE, "nonsense") is None
    kernel, sizes = json.loads(json.dumps(NARROW))
    assert Site(kernel, tuple(sizes)) == NARROW
