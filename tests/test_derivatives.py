"""Derivatives of the registered operators, of any order and in both modes."""

import itertools

import pytest
import torch
from op_cases import CASES, build, cases
from tolerance import assert_close
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp

from triton_conv.geometry import PADDING_MODES

ops = torch.ops.triton_conv


@cases
def test_gradcheck_in_both_modes_and_batched(case):
    f, tensors = build(case)
    gradcheck(f, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@pytest.mark.parametrize("name", ["conv1d", "conv2d dilated", "conv2d mixed", "conv_transpose2d circular"])
def test_gradcheck_of_complex_tensors(name):
    f, tensors = build(CASES[name], torch.complex128)
    gradcheck(f, tensors, fast_mode=True, check_forward_ad=True)
    gradgradcheck(f, tensors, fast_mode=True)


MODES = {
    "conv": ("conv2d", (1, 2, 4, 3), (2, 2, 2, 3), {"padding": ((1, 0), 1), "stride": (1, 2)}),
    "conv_dilated": ("conv2d", (1, 2, 5, 4), (2, 1, 2, 2), {"padding": (2, 1), "dilation": (3, 2), "groups": 2}),
    "conv_transpose": ("conv_transpose2d", (1, 2, 3, 3), (2, 2, 3, 2), {"padding": ((1, 1), (0, 1)), "stride": (1, 2)}),
}


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("op", MODES)
def test_first_and_second_derivatives_with_every_border(op, mode):
    name, x, w, kwargs = MODES[op]
    f, tensors = build((name, x, w, {**kwargs, "padding_mode": mode}))
    gradcheck(f, tensors, check_forward_ad=True)
    gradgradcheck(f, tensors, check_fwd_over_rev=True, fast_mode=True)


@cases
def test_second_derivatives(case):
    f, tensors = build(case)
    gradgradcheck(f, tensors, fast_mode=True, check_batched_grad=True)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_gradient_operators_take_fewer_outputs_than_the_extents_allow(mode):
    torch.manual_seed(0)
    x, w, dy = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 6), (3, 2, 3), (1, 3, 2)))
    parameters = ((1,), (2, 1), (1,), 1, mode, None)
    gradcheck(lambda dy, w: ops.conv_dgrad(dy, w, x.shape, *parameters), (dy, w), check_forward_ad=True)
    gradcheck(lambda dy, x: ops.conv_wgrad(dy, x, w.shape, w.stride(), *parameters), (dy, x), check_forward_ad=True)
    y = ops.conv(x, w, None, *parameters)[..., :2]
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert_close(ops.conv_dgrad(dy, w, x.shape, *parameters), dx, 9)
    assert_close(ops.conv_wgrad(dy, x, w.shape, w.stride(), *parameters), dw, 9)


@pytest.mark.parametrize("name", ["conv1d", "conv_transpose2d output_padding above stride"])
def test_third_derivatives(name):
    f, tensors = build(CASES[name])

    def slope(*tensors):
        y = f(*tensors)
        return torch.autograd.grad(y.pow(3).sum(), tensors, create_graph=True)

    gradgradcheck(slope, tensors, fast_mode=True)


def test_forward_mode_with_respect_to_any_subset_of_the_operands():
    f, tensors = build(CASES["conv2d mixed"], requires_grad=False)
    tangents = [torch.randn_like(t) for t in tensors]
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):

        def g(*some, chosen=chosen):
            full = list(tensors)
            for index, t in zip(chosen, some, strict=True):
                full[index] = t
            return f(*full)

        primals, directions = [tensors[i] for i in chosen], [tangents[i] for i in chosen]
        y, dy = jvp(g, tuple(primals), tuple(directions))
        h = 1e-6
        moved = [p + h * d for p, d in zip(primals, directions, strict=True)]
        torch.testing.assert_close(y, g(*primals))
        torch.testing.assert_close(dy, (g(*moved) - y) / h, atol=1e-4, rtol=1e-4)


def test_a_tensor_changed_between_forward_and_backward_raises_as_in_pytorch():
    for index in (0, 1):
        f, tensors = build(CASES["conv2d"])
        y = f(*tensors)
        with torch.no_grad():
            tensors[index].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_bias_may_change_between_forward_and_backward():
    f, tensors = build(CASES["conv2d"])
    y = f(*tensors)
    with torch.no_grad():
        tensors[2].add_(1)
    y.sum().backward()


def test_inference_mode_and_no_grad_record_nothing():
    f, tensors = build(CASES["conv2d"])
    expected = f(*tensors)
    with torch.inference_mode():
        y = f(*tensors)
    assert y.is_inference()
    assert torch.equal(y, expected)
    with torch.no_grad():
        assert f(*tensors).grad_fn is None


def test_the_graph_may_be_walked_twice():
    f, tensors = build(CASES["conv2d"])
    y = f(*tensors).sum()
    first = torch.autograd.grad(y, tensors, retain_graph=True)
    for again, once in zip(torch.autograd.grad(y, tensors), first, strict=True):
        assert torch.equal(again, once)
