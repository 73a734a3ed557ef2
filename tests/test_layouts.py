"""Memory of the registered operators: formats, strides, views, and what is empty."""

import itertools

import pytest
import torch
from op_cases import CASES, build, theirs
from tolerance import assert_close
from torch.nn import functional

import triton_conv

FORMATS = {3: [torch.contiguous_format]}
FORMATS[4] = [torch.contiguous_format, torch.channels_last]
FORMATS[5] = [torch.contiguous_format, torch.channels_last_3d]
STRIDE_CASES = {
    "conv1d": ("conv1d", (2, 4, 8), (6, 4, 3), {}),
    "conv2d": ("conv2d", (2, 4, 6, 5), (6, 4, 3, 3), {"padding": 1}),
    "conv2d 1x1": ("conv2d", (2, 4, 6, 5), (6, 4, 1, 1), {}),
    "conv2d one channel": ("conv2d", (2, 1, 6, 5), (6, 1, 3, 3), {}),
    "conv2d one filter": ("conv2d", (2, 4, 6, 5), (1, 4, 3, 3), {}),
    "conv2d one image": ("conv2d", (1, 4, 6, 5), (6, 4, 3, 3), {}),
    "conv2d one pixel": ("conv2d", (2, 4, 1, 1), (6, 4, 1, 1), {}),
    "conv2d depthwise": ("conv2d", (2, 4, 6, 5), (4, 1, 3, 3), {"groups": 4}),
    "conv2d dilated": ("conv2d", (2, 4, 6, 5), (6, 4, 2, 2), {"dilation": 2}),
    "conv3d": ("conv3d", (2, 4, 3, 4, 5), (6, 4, 2, 3, 3), {"stride": 2}),
    "conv_transpose2d": ("conv_transpose2d", (2, 4, 6, 5), (4, 6, 3, 3), {"stride": 2}),
    "conv_transpose3d": ("conv_transpose3d", (2, 4, 3, 4, 2), (4, 6, 2, 3, 3), {"stride": 2}),
}


@pytest.mark.parametrize(
    ("name", "x_format", "w_format"),
    [(n, x, w) for n, c in STRIDE_CASES.items() for x in FORMATS[len(c[1])] for w in FORMATS[len(c[2])]],
)
def test_output_strides_are_those_of_pytorch(name, x_format, w_format):
    """In float32. float64 follows the same rule here; PyTorch makes it contiguous, having no kernel for the other."""
    case = STRIDE_CASES[name]
    f, (x, w) = build(case, torch.float32, bias=False, requires_grad=False)
    x, w = x.to(memory_format=x_format), w.to(memory_format=w_format)
    y, z = f(x, w), theirs(case)(x, w)
    assert y.stride() == z.stride()
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-4)
    assert f(x.double(), w.double()).stride() == y.stride()


@pytest.mark.parametrize("name", STRIDE_CASES)
def test_input_gradients_are_channels_last_where_the_input_is(name):
    case = STRIDE_CASES[name]
    f, (x, w) = build(case, torch.float32, bias=False, requires_grad=False)
    for memory_format in FORMATS[x.dim()]:
        leaf = x.detach().to(memory_format=memory_format).requires_grad_()
        y = f(leaf, w.to(memory_format=memory_format))
        y.backward(torch.randn_like(y))
        assert leaf.grad.is_contiguous(memory_format=memory_format)


def permuted(w, order):
    """w with its axes in memory in `order`."""
    inverse = [order.index(i) for i in range(w.dim())]
    return w.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_weight_gradients_lie_in_memory_as_the_parameter_does(order, transposed):
    name, weight = ("conv_transpose2d", (3, 4, 2, 5)) if transposed else ("conv2d", (4, 3, 2, 5))
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 6, 7, dtype=torch.float64), torch.randn(weight, dtype=torch.float64)
    leaf, plain = permuted(w, order).requires_grad_(), w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(getattr(triton_conv, name)(x, leaf).pow(2).sum(), leaf)
    (expected,) = torch.autograd.grad(getattr(functional, name)(x, plain).pow(2).sum(), plain)
    assert gradient.stride() == leaf.stride()
    assert_close(gradient, expected, 100)


def test_the_gradient_of_a_parameter_with_holes_is_contiguous():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    leaf = torch.randn(4, 3, 3, 6, dtype=torch.float64)[..., ::2].requires_grad_()
    repeated = torch.randn(4, 1, 3, 3, dtype=torch.float64).expand(4, 3, 3, 3).requires_grad_()
    for w in (leaf, repeated):
        (gradient,) = torch.autograd.grad(triton_conv.conv2d(x, w).sum(), w)
        (expected,) = torch.autograd.grad(functional.conv2d(x, w).sum(), w)
        assert gradient.is_contiguous()
        assert_close(gradient, expected, 100)


def test_the_first_gradient_becomes_that_of_the_parameter_without_a_copy():
    x, w = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    made = []
    w.register_hook(lambda gradient: made.append(gradient.data_ptr()))
    triton_conv.conv2d(x, w).sum().backward()
    assert w.grad.data_ptr() == made[0]


VIEWS = {
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "offset": lambda t: torch.cat([torch.ones_like(t), t])[t.shape[0] :],
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "every second channel": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch inside": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "expanded pixels": lambda t: t[..., :1].expand_as(t),
    "expanded channels": lambda t: t[:, :1].expand_as(t),
    "expanded batch": lambda t: t[:1].expand_as(t),
    "one value": lambda t: t[:1, :1, :1, :1].expand_as(t),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (7, 3, 2, 1)),
}


@pytest.mark.parametrize("weight_view", VIEWS)
@pytest.mark.parametrize("input_view", VIEWS)
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_any_view_gives_what_its_copy_gives(name, input_view, weight_view):
    f, (x, w, b) = build(CASES[name], requires_grad=False)
    x, w = VIEWS[input_view](x), VIEWS[weight_view](w)
    leaves = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x, w, b)]
    z = theirs(CASES[name])(*leaves)
    views = [t.detach().requires_grad_() for t in (x, w, b)]
    y = f(*views)
    assert_close(y, z, 100)
    dy = torch.randn_like(z)
    wanted = torch.autograd.grad(z, leaves, dy)
    for ours, expected in zip(torch.autograd.grad(y, views, VIEWS["transposed"](dy)), wanted, strict=True):
        assert_close(ours, expected, 100)


def test_conjugated_and_negated_views():
    f, (x, w, b) = build(CASES["conv2d"], torch.complex128, requires_grad=False)
    assert_close(f(x.conj(), w, b), f(x.conj().resolve_conj(), w, b), 100)
    assert_close(f(x, w.conj(), b.conj()), f(x, w.conj().resolve_conj(), b.conj().resolve_conj()), 100)
    negative = x.conj().imag
    assert negative.is_neg()
    assert_close(f(negative, w.real, b.real), f(negative.resolve_neg(), w.real, b.real), 100)


def test_operands_are_not_written():
    f, tensors = build(CASES["conv2d mixed"])
    before = [t.detach().clone() for t in tensors]
    f(*tensors).pow(2).sum().backward()
    assert all(torch.equal(t, saved) for t, saved in zip(tensors, before, strict=True))


def test_the_output_shares_no_memory_with_its_operands():
    x, w = torch.randn(1, 1, 4, 4), torch.ones(1, 1, 1, 1)
    y = triton_conv.conv2d(x, w)
    expected = x.clone()
    x.zero_()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("name", ["conv1d", "conv2d mixed", "conv3d", "conv_transpose2d"])
def test_empty_batches(name):
    f, (x, w, b) = build(CASES[name])
    expected = f(x, w, b).shape
    empty = x.detach()[:0].requires_grad_()
    y = f(empty, w, b)
    assert y.shape == (0, *expected[1:])
    dx, dw, db = torch.autograd.grad(y.sum(), (empty, w, b))
    assert dx.shape == empty.shape
    assert torch.equal(dw, torch.zeros_like(w))
    assert torch.equal(db, torch.zeros_like(b))


def test_zero_channels_make_an_output_of_bias():
    """PyTorch's CPU returns no channels here; a sum of nothing is zero, for each of the K filters."""
    x, w, b = torch.randn(2, 0, 5, 5), torch.randn(3, 0, 3, 3), torch.randn(3, requires_grad=True)
    y = triton_conv.conv2d(x, w, b, padding=1)
    assert torch.equal(y, b.view(1, 3, 1, 1).expand(2, 3, 5, 5))
    y.sum().backward()
    assert torch.equal(b.grad, torch.full((3,), 50.0))


def test_no_filters_make_an_output_without_channels():
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    y = triton_conv.conv_transpose2d(x, torch.randn(3, 0, 3, 3))
    assert y.shape == (2, 0, 7, 7)
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d"])
def test_unbatched_inputs(name):
    f, (x, w, b) = build(CASES[name])
    assert_close(f(x[0], w, b), f(x, w, b)[0], 100)
    assert_close(f(x[0], w, b), theirs(CASES[name])(x[0], w, b), 100)


def test_the_same_call_gives_the_same_bits():
    f, tensors = build(CASES["conv2d dilated"], torch.float32)
    y = f(*tensors)
    first = torch.autograd.grad(y.sum(), tensors)
    for _ in range(3):
        z = f(*tensors)
        assert torch.equal(z, y)
        for once, again in zip(first, torch.autograd.grad(z.sum(), tensors), strict=True):
            assert torch.equal(once, again)


def test_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    f, tensors = build(CASES["conv2d"])
    expected = torch.autograd.grad(f(*tensors).sum(), tensors)

    def work(_):
        return torch.autograd.grad(f(*tensors).sum(), tensors)

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(16)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
