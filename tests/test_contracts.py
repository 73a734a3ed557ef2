"""Promises between the parts: what is computed, in which precision, and what is refused before it runs."""

from functools import partial

import pytest
import torch
from torch.func import jvp
from torch.nn import functional

import triton_conv
from triton_conv import execute, explain
from triton_conv.check import Case, check_case
from triton_conv.config import Config


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 6, 6), (4, 3, 3, 3), (4,))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(("moving", "convolutions"), [(0, 2), (1, 2), (2, 1)])
def test_a_tangent_that_is_not_there_is_not_convolved(operands, moving, convolutions):
    def only(function):
        return lambda t: function(*operands[:moving], t, *operands[moving + 1 :])

    t = operands[moving]
    with execute.recording() as calls:
        _, tangent = jvp(only(triton_conv.conv2d), (t,), (t,))
    _, expected = jvp(only(functional.conv2d), (t,), (t,))
    torch.testing.assert_close(tangent, expected)
    assert len(calls) == convolutions


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_gradients_under_autocast_keep_the_precision_of_their_operands(operands, name):
    x, w = operands[0].requires_grad_(), operands[1][:3].requires_grad_()
    ours, theirs = (getattr(module, name)(x, w) for module in (triton_conv, functional))
    dy = torch.ones_like(theirs)
    expected = torch.autograd.grad(theirs, (x, w), dy)
    with torch.autocast("cpu"):
        got = torch.autograd.grad(ours, (x, w), dy)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("stride", [(54, 18, 6, 2), (27, 9, 3, 0), (9, 9, 3, 1)])
def test_weight_gradients_with_gaps_or_overlaps_are_refused(operands, stride):
    dy = torch.randn(2, 4, 4, 4)
    with pytest.raises(RuntimeError, match="weight_stride"):
        torch.ops.triton_conv.conv_wgrad(
            dy, operands[0], [4, 3, 3, 3], list(stride), [1, 1], [0] * 4, [1, 1], 1, "zeros", None
        )


def test_a_huge_stride_costs_no_more_residue_classes_than_the_image_has_pixels(kernels):
    plan = explain.plans((2, 3, 5, 5), (4, 3, 5, 5), stride=1000, padding=1)["input gradient"]
    assert max(plan.geometry.stride) <= 7
    assert all(r.ok for r in check_case(Case.of((5, 5), 5, stride=9, padding=1, N=1), 0, kernels))


def test_launches_beyond_a_grid_are_refused_with_the_geometry():
    from triton_conv.kernels.indexing import launchable

    geometry = Case.of((5, 5), 3).geometry
    assert launchable(2**31 - 1, geometry) == 2**31 - 1
    with pytest.raises(RuntimeError, match="N2 C3 K4"):
        launchable(2**31, geometry)


@pytest.mark.parametrize(
    "arguments",
    [(24, 16, 16), (16, 0, 16), (16, 16, 8)],
    ids=["no power of two", "zero", "too small for a dot"],
)
def test_configs_no_kernel_can_run_are_refused(arguments):
    with pytest.raises(ValueError, match="blocks"):
        Config(*arguments)
    with pytest.raises(ValueError, match="splits"):
        Config(16, 16, 16, splits=0)


def test_half_precision_complex_products_are_added_before_they_are_rounded(kernels):
    x = torch.full((1, 1, 1), 300 + 300j, device=kernels).to(torch.complex32)
    w = torch.full((1, 1, 1), 300 + 299j, device=kernels).to(torch.complex32)
    y = triton_conv.conv1d(x, w).to(torch.complex64)
    # 90000 would overflow float16; the difference of the two products does not
    assert y.real.item() == 300


def test_taps_beyond_two_to_the_31_elements_are_reached(kernels):
    """Three taps 2^30 elements apart in untouched virtual memory: offsets need 64 bits."""
    storage = torch.empty(2**31 + 1, dtype=torch.int8)
    w = storage.as_strided((1, 1, 3), (1, 1, 2**30))
    w.copy_(torch.tensor([[[2, 3, 5]]], dtype=torch.int8))
    x = torch.arange(1, 6, dtype=torch.int8).view(1, 1, 5)
    if kernels == "cuda":
        pytest.skip("needs sparse memory, which only the host has")
    assert triton_conv.conv1d(x, w).flatten().tolist() == [2 + 6 + 15, 4 + 9 + 20, 6 + 12 + 25]


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize(
    "view", [lambda b: b.repeat_interleave(2)[::2], lambda b: b[:1].expand(3)], ids=["step", "one"]
)
def test_a_bias_may_have_any_stride(name, mode, view, operands, kernels):
    x, w, b = (t.to(kernels) for t in (operands[0], operands[1][:3], operands[2][:3]))
    convolve = partial(getattr(triton_conv, name), padding=1, padding_mode=mode)
    torch.testing.assert_close(convolve(x, w, view(b)), convolve(x, w, view(b).clone()))
