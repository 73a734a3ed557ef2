"""The plain-torch primitives against torch.nn.functional and its autograd, over inputs that F.pad has padded."""

import itertools
from dataclasses import replace

import pytest
import torch
from tolerance import assert_close
from torch.nn import functional

from triton_conv import reference
from triton_conv.geometry import PADDING_MODES, ConvGeometry

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPLEX = [torch.complex64, torch.complex128]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def label(value):
    return str(value).removeprefix("torch.")


def five(t):
    while t is not None and t.dim() < 5:
        t = t.unsqueeze(2)
    return t


def tensor(dtype, *shape):
    if dtype in INTEGERS:
        return torch.randint(0 if dtype is torch.uint8 else -9, 9, shape).to(dtype)
    return torch.randn(shape, dtype=torch.complex128 if dtype in COMPLEX else torch.float64).to(dtype)


def widened(t):
    """int64, double or complex double: where PyTorch's own result is exact or nearly."""
    if t is None:
        return None
    if t.dtype in INTEGERS:
        return t.long()
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def padded(x, padding, modes):
    """x with its borders built by torch.nn.functional.pad, one axis at a time."""
    rank = len(padding)
    for axis, (pair, mode) in enumerate(zip(padding, modes, strict=True)):
        if mode == "zeros":
            widths = [0, 0] * (rank - 1 - axis) + list(pair)
            x = functional.pad(x, widths)
        else:  # torch pads trailing axes only: fold the others into the batch
            moved = x.movedim(2 + axis, -1)
            flat = moved.reshape(-1, 1, moved.shape[-1])
            flat = functional.pad(flat, pair, mode)
            x = flat.reshape(*moved.shape[:-1], flat.shape[-1]).movedim(-1, 2 + axis)
    return x


def convolve(x, w, bias, stride, padding, dilation, groups, modes):
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[w.dim() - 3]
    return conv(padded(x, padding, modes), w, bias, stride, 0, dilation, groups)


# (input, weight, stride, padding, dilation, groups, modes)
CASES = {
    "1d": ((2, 3, 9), (4, 3, 3), (1,), ((1, 1),), (1,), 1, ("zeros",)),
    "1d causal": ((2, 3, 9), (4, 3, 3), (1,), ((2, 0),), (1,), 1, ("zeros",)),
    "1d circular": ((2, 4, 7), (4, 2, 4), (2,), ((7, 2),), (1,), 2, ("circular",)),
    "2d": ((2, 4, 7, 6), (6, 4, 3, 2), (1, 1), ((1, 1), (0, 0)), (1, 1), 1, ("zeros",) * 2),
    "2d strided": ((2, 4, 7, 8), (6, 2, 3, 3), (2, 3), ((1, 1), (2, 2)), (1, 1), 2, ("zeros",) * 2),
    "2d dilated": ((1, 4, 9, 9), (6, 4, 3, 2), (2, 1), ((2, 2), (1, 1)), (2, 3), 1, ("zeros",) * 2),
    "2d depthwise": ((2, 4, 6, 6), (8, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 4, ("zeros",) * 2),
    "2d asymmetric": ((2, 4, 7, 6), (6, 4, 3, 2), (2, 2), ((0, 3), (2, 1)), (1, 2), 1, ("zeros",) * 2),
    "2d border only": ((2, 3, 1, 1), (2, 3, 3, 3), (2, 2), ((3, 3), (4, 2)), (1, 1), 1, ("zeros",) * 2),
    "2d reflect": ((2, 3, 5, 4), (2, 3, 3, 3), (1, 2), ((4, 2), (3, 3)), (1, 1), 1, ("reflect",) * 2),
    "2d replicate": ((2, 3, 2, 4), (2, 3, 3, 3), (1, 2), ((5, 2), (0, 7)), (2, 1), 1, ("replicate",) * 2),
    "2d circular": ((2, 4, 3, 4), (4, 2, 3, 3), (1, 2), ((3, 2), (4, 4)), (2, 1), 2, ("circular",) * 2),
    "2d mixed": ((2, 3, 5, 6), (2, 3, 3, 3), (1, 2), ((2, 1), (1, 1)), (1, 2), 1, ("circular", "zeros")),
    "3d": ((1, 2, 4, 5, 4), (3, 2, 2, 3, 1), (1, 2, 1), ((1, 1), (1, 1), (0, 0)), (1, 1, 2), 1, ("zeros",) * 3),
    "3d mixed": (
        (1, 2, 4, 5, 4),
        (4, 1, 3, 2, 3),
        (1, 2, 1),
        ((2, 0), (1, 1), (1, 2)),
        (1, 1, 1),
        2,
        ("replicate", "reflect", "circular"),
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", FLOATS + COMPLEX + INTEGERS, ids=label)
@cases
def test_fprop_is_pytorch_convolution_of_the_padded_input(case, dtype, bias):
    input_shape, weight_shape, stride, padding, dilation, groups, modes = case
    torch.manual_seed(0)
    x, w = tensor(dtype, *input_shape), tensor(dtype, *weight_shape)
    b = tensor(dtype, weight_shape[0]) if bias else None
    expected = convolve(widened(x), widened(w), widened(b), stride, padding, dilation, groups, modes)
    g = ConvGeometry.forward(input_shape, weight_shape, stride, padding, dilation, groups, modes)
    y = reference.fprop(five(x), five(w), b, g)
    assert y.dtype == dtype
    assert_close(y, five(expected), g.taps * weight_shape[1])


@pytest.mark.parametrize("dtype", FLOATS + COMPLEX, ids=label)
@cases
def test_gradients_are_those_of_autograd(case, dtype):
    input_shape, weight_shape, stride, padding, dilation, groups, modes = case
    torch.manual_seed(0)
    x, w = tensor(dtype, *input_shape), tensor(dtype, *weight_shape)
    leaves = [widened(x).requires_grad_(), widened(w).requires_grad_()]
    y = convolve(*leaves, None, stride, padding, dilation, groups, modes)
    dy = tensor(dtype, *y.shape)
    dx, dw = torch.autograd.grad(y, leaves, widened(dy).conj())
    g = ConvGeometry.forward(input_shape, weight_shape, stride, padding, dilation, groups, modes)
    # autograd conjugates the operands of a complex product; the primitives do not
    assert_close(reference.dgrad(five(dy), five(w), None, g), five(dx).conj(), g.taps * g.K // groups)
    assert_close(reference.wgrad(five(dy), five(x), g), five(dw).conj(), y.numel() // g.K)


@pytest.mark.parametrize("dtype", INTEGERS, ids=label)
@cases
def test_integer_gradients_are_exact(case, dtype):
    """Autograd refuses integers; doubles hold these sums exactly."""
    input_shape, weight_shape, stride, padding, dilation, groups, modes = case
    torch.manual_seed(0)
    x, w = tensor(dtype, *input_shape), tensor(dtype, *weight_shape)
    g = ConvGeometry.forward(input_shape, weight_shape, stride, padding, dilation, groups, modes)
    dy = tensor(dtype, g.N, g.K, *g.output)
    dx = reference.dgrad(dy.double(), five(w).double(), None, g).long().to(dtype)
    dw = reference.wgrad(dy.double(), five(x).double(), g).long().to(dtype)
    assert torch.equal(reference.dgrad(dy, five(w), None, g), dx)
    assert torch.equal(reference.wgrad(dy, five(x), g), dw)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16], ids=label)
def test_narrow_integers_wrap_as_in_pytorch(dtype):
    info = torch.iinfo(dtype)
    x = torch.randint(info.min, info.max, (2, 3, 6, 6), dtype=dtype)
    w = torch.randint(info.min, info.max, (4, 3, 3, 3), dtype=dtype)
    g = ConvGeometry.forward(x.shape, w.shape)
    y = reference.fprop(five(x), five(w), None, g)
    assert torch.equal(y, five(functional.conv2d(x, w)))
    assert torch.equal(y, five(functional.conv2d(x.long(), w.long())).to(dtype))


TRANSPOSED = {
    "1d": ((2, 4, 5), (4, 3, 3), (2,), (1,), (1,), 1, (1,)),
    "2d": ((2, 4, 5, 4), (4, 3, 3, 2), (1, 1), (0, 1), (0, 0), 1, (1, 1)),
    "2d strided": ((2, 4, 5, 4), (4, 3, 3, 2), (2, 3), (1, 0), (1, 2), 2, (1, 1)),
    "2d dilated": ((1, 2, 3, 4), (2, 3, 3, 2), (2, 1), (2, 1), (0, 1), 1, (2, 3)),
    "2d output_padding above the stride": ((2, 2, 4, 4), (2, 2, 4, 5), (3, 2), (1, 2), (2, 3), 2, (4, 4)),
    "2d gaps": ((1, 2, 3, 3), (2, 2, 1, 1), (3, 2), (0, 0), (2, 1), 1, (1, 1)),
    "3d": ((1, 2, 3, 2, 3), (2, 4, 2, 3, 1), (2, 1, 3), (0, 1, 0), (1, 0, 2), 2, (1, 2, 1)),
}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX, torch.int64], ids=label)
@pytest.mark.parametrize("case", TRANSPOSED.values(), ids=TRANSPOSED)
def test_dgrad_of_the_mirrored_geometry_is_a_transposed_convolution(case, dtype, bias):
    input_shape, weight_shape, stride, padding, extra, groups, dilation = case
    torch.manual_seed(0)
    x, w = tensor(dtype, *input_shape), tensor(dtype, *weight_shape)
    b = tensor(dtype, weight_shape[1] * groups) if bias else None
    conv = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[w.dim() - 3]
    expected = conv(widened(x), widened(w), widened(b), stride, padding, extra, groups, dilation)
    pairs = [(p, p) for p in padding]
    g = ConvGeometry.transposed(input_shape, weight_shape, stride, pairs, extra, groups, dilation)
    y = reference.dgrad(five(x), five(w), b, g)
    assert y.dtype == dtype
    assert_close(y, five(expected), g.taps * g.K // groups)


@cases
def test_outputs_that_nobody_asked_for_have_no_gradient(case):
    """A geometry may have fewer outputs than its extents allow: the same as zeros where the others would be."""
    input_shape, weight_shape, stride, padding, dilation, groups, modes = case
    torch.manual_seed(0)
    full = ConvGeometry.forward(input_shape, weight_shape, stride, padding, dilation, groups, modes)
    less = replace(full, output=tuple(max(extent - 2, 1) for extent in full.output))
    x, w = five(tensor(torch.float64, *input_shape)), five(tensor(torch.float64, *weight_shape))
    for dtype in (torch.float64, torch.int64):
        x, w, dy = (10 * x).to(dtype), (10 * w).to(dtype), tensor(dtype, full.N, full.K, *less.output)
        grown = functional.pad(dy, [v for f, o in zip(full.output, less.output, strict=True) for v in (f - o, 0)][::-1])
        assert_close(reference.dgrad(dy, w, None, less), reference.dgrad(grown, w, None, full), 100)
        assert_close(reference.wgrad(dy, x, less), reference.wgrad(grown, x, full), 100)
        z, p, q = less.output
        assert_close(reference.fprop(x, w, None, less), reference.fprop(x, w, None, full)[:, :, :z, :p, :q], 100)


@pytest.mark.parametrize("modes", list(itertools.product(PADDING_MODES, repeat=2)), ids="-".join)
@pytest.mark.parametrize("padding", [((1, 1), (2, 2)), ((2, 0), (1, 3))], ids=str)
def test_every_pair_of_padding_modes(modes, padding):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    g = ConvGeometry.forward(x.shape, w.shape, (1, 2), padding, (1, 1), 1, modes)
    y = convolve(x, w, None, (1, 2), padding, (1, 1), 1, modes)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert_close(reference.fprop(five(x), five(w), None, g), five(y), 18)
    assert_close(reference.dgrad(five(dy), five(w), None, g), five(dx), 18)
    assert_close(reference.wgrad(five(dy), five(x), g), five(dw), y.numel())


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((2, 1), (0, 3))], ids=str)
def test_a_corner_that_is_not_finite_reaches_only_the_outputs_that_read_it(padding, value):
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    x[..., 0, 0] = x[..., -1, -1] = value
    g = ConvGeometry.forward(x.shape, w.shape, padding=padding)
    y = reference.fprop(five(x), five(w), None, g)
    reads = functional.conv2d(padded((~x.isfinite()).double(), padding, ("zeros",) * 2), torch.ones_like(w))
    assert torch.equal(y.isfinite(), five(reads == 0))
    assert 0 < y.isfinite().sum() < y.numel()


def test_filters_that_are_not_finite_show_at_the_border_too():
    """Zero padding times NaN is NaN, as in PyTorch: only the input is not read there."""
    x, w = torch.ones(1, 1, 3, 3), torch.full((1, 1, 3, 3), float("nan"))
    g = ConvGeometry.forward(x.shape, w.shape, padding=((1, 1), (1, 1)))
    assert reference.fprop(five(x), five(w), None, g).isnan().all()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_empty_operands(bias):
    b = torch.randn(4) if bias else None
    for n, c, k in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        g = ConvGeometry.forward((n, c, 5, 5), (max(k, 1), c, 3, 3), padding=((1, 2), (1, 1)))
        g = ConvGeometry.forward((n, c, 5, 5), (4, c, 3, 3), padding=((1, 2), (1, 1))) if k else g
        x, w = torch.randn(n, c, 1, 5, 5), torch.randn(g.K, c, 1, 3, 3)
        used = None if b is None else b[: g.K]
        y = reference.fprop(x, w, used, g)
        assert y.shape == (n, g.K, *g.output)
        dx, dw = reference.dgrad(y, w, None, g), reference.wgrad(y, x, g)
        assert dx.shape == x.shape
        assert dw.shape == w.shape
        if c == 0:
            wanted = torch.zeros(()) if used is None else used.view(1, -1, 1, 1, 1)
            assert torch.equal(y, wanted.expand_as(y))
