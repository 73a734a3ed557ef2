"""Convolutions with scale, bias, residual and activation in one operator: values, gradients, errors, transforms."""

import copy
import itertools
import pickle

import pytest
import torch
from halves import first_of
from heard import convolutions, operators, raised
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import triton_conv
from triton_conv import nn
from triton_conv.epilogue import ACTIVATIONS

torch_ops = torch.ops.triton_conv

PLAIN = {
    None: lambda z: z,
    "relu": torch.relu,
    "relu6": functional.relu6,
    "leaky_relu": lambda z: functional.leaky_relu(z, 0.2),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hardswish": functional.hardswish,
}
OF_OUTPUT = ("relu", "relu6", "leaky_relu", "sigmoid")
PLACES = ("", "before", "after")


def composed(x, w, bias, residual, scale, activation, after, transposed=False, **options):
    z = (functional.conv_transpose2d if transposed else functional.conv2d)(x, w, **options)
    z = z if scale is None else z * scale.view(-1, 1, 1)
    z = z if bias is None else z + bias.view(-1, 1, 1)
    z = z if residual is None or after else z + residual
    y = PLAIN[activation](z)
    return y + residual if residual is not None and after else y


def fused(x, w, bias, residual, scale, activation, after, transposed=False, **options):
    function = triton_conv.conv_transpose2d if transposed else triton_conv.conv2d
    how = {"activation": activation, "negative_slope": 0.2, "residual": residual, "scale": scale}
    return function(x, w, bias, **options, **how, residual_after_activation=after)


def operands(place, scaled, transposed=False, dtype=torch.float64, grad=True, seed=0):
    """x, w, bias, residual and scale of a convolution with two groups; whatever is there is a leaf."""
    draw = torch.Generator().manual_seed(seed)
    extent = 4 if transposed else 2
    sizes = ((2, 4, 3, 3), (4, 2, 2, 2), (4,), (2, 4, extent, extent) if place else None, (4,) if scaled else None)
    tensors = [None if s is None else torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in sizes]
    return [t if t is None or not grad else t.requires_grad_() for t in tensors]


def present(tensors):
    return [t for t in tensors if t is not None]


COMBINATIONS = list(itertools.product((None, *ACTIVATIONS), PLACES, (False, True)))


@pytest.mark.parametrize("transposed", [False, True])
def test_every_combination_is_the_composition_with_its_gradients(transposed):
    for activation, place, scaled in COMBINATIONS:
        tensors = operands(place, scaled, transposed)
        how = (activation, place == "after", transposed)
        found, wanted = (f(*tensors, *how, groups=2) for f in (fused, composed))
        torch.testing.assert_close(found, wanted)
        dy = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
        for a, b in zip(*(torch.autograd.grad(y, present(tensors), dy) for y in (found, wanted)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("activation", first_of(["silu", "relu", *sorted({*ACTIVATIONS} - {"silu", "relu"}), None], 2))
def test_gradients_of_any_order_and_direction(activation, place, transposed):
    for scaled in (False, True):
        tensors = operands(place, scaled, transposed)

        def function(*tensors):
            return fused(*tensors, activation, place == "after", transposed, groups=2)

        assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_third_derivatives():
    tensors = operands("before", True)
    third = []
    for function in (fused, composed):
        value = function(*tensors, "silu", False, groups=2).sum()
        for _ in range(2):
            value = sum(g.square().sum() for g in torch.autograd.grad(value, tensors, create_graph=True))
        third.append(torch.autograd.grad(value, tensors))
    for a, b in zip(*third, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_ranks_strides_dilations_and_tensors_without_a_batch(rank):
    x = torch.randn(2, 4, *(7, 6, 5)[:rank])
    w, scale, bias = torch.randn(6, 4, *(2,) * rank), torch.rand(6), torch.randn(6)
    convolve = getattr(triton_conv, f"conv{rank}d")
    for options in ({"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same", "padding_mode": "circular"}):
        z = convolve(x, w, **options) * scale.view(-1, *(1,) * rank) + bias.view(-1, *(1,) * rank)
        residual = torch.randn_like(z)
        how = {"activation": "relu", "scale": scale, **options}
        y = convolve(x, w, bias, residual=residual, **how)
        torch.testing.assert_close(y, (z + residual).relu())
        alone = convolve(x[0], w, bias, residual=residual[0], residual_after_activation=True, **how)
        torch.testing.assert_close(alone, z[0].relu() + residual[0])


def test_a_transposed_convolution_with_output_padding():
    x, w, scale = torch.randn(2, 4, 5, 5), torch.randn(4, 3, 3, 3), torch.rand(6)
    options = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}
    z = functional.conv_transpose2d(x, w, **options) * scale.view(-1, 1, 1)
    y = triton_conv.conv_transpose2d(x, w, **options, scale=scale, activation="hardswish")
    torch.testing.assert_close(y, functional.hardswish(z))
    torch.testing.assert_close(triton_conv.conv_transpose2d(x[0], w, **options, scale=scale), z[0])


def test_the_output_lies_as_without_an_epilogue():
    x, w = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last), torch.randn(8, 8, 3, 3)
    residual = torch.randn(2, 8, 3, 3)
    y = triton_conv.conv2d(x, w, residual=residual, activation="silu")
    assert y.stride() == triton_conv.conv2d(x, w).stride() != residual.stride()


# ---------------------------------------------------------------------------------------------------------------------
# What runs, and what is saved


def test_what_asks_for_nothing_is_a_plain_convolution():
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)
    names = convolutions(lambda: triton_conv.conv2d(x, w, negative_slope=0.3, residual_after_activation=True))
    assert names == ["triton_conv::conv"]
    x, w = torch.randn(1, 2, 4), torch.randn(2, 2, 3)
    assert convolutions(lambda: triton_conv.conv_transpose1d(x, w)) == ["triton_conv::conv_transpose"]


def ran(activation, place, wanted=(0, 1)):
    tensors = [t if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate(operands(place, False))]
    names = convolutions(lambda: fused(*tensors, activation, place == "after", groups=2))
    return [name.split("::")[1] for name in names]


def test_what_an_activation_is_applied_to_is_kept_only_where_a_gradient_needs_it():
    assert ran("silu", "") == ["conv_fused_keep"]
    assert ran("silu", "", wanted=()) == ["conv_fused"]
    assert ran("relu", "before") == ["conv_fused"]
    assert ran("relu", "after") == ["conv_fused_keep"]
    assert ran("relu", "after", wanted=(3,)) == ["conv_fused"]
    assert ran(None, "after") == ["conv_fused"]
    with torch.no_grad():
        assert ran("silu", "") == ["conv_fused"]


def saved_by(tensors, activation, after):
    """(the output, what its graph saves beside x, w and scale), as tensors."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fused(*tensors, activation, after, groups=2)
    ours = {t.data_ptr() for t in present((tensors[0], tensors[1], tensors[4]))}
    return y, [t for t in saved if t.data_ptr() not in ours]


@pytest.mark.parametrize(("activation", "place"), [(a, p) for a in (None, *ACTIVATIONS) for p in PLACES])
def test_what_is_saved_is_what_the_documentation_says(activation, place):
    tensors = operands(place, True)
    y, saved = saved_by(tensors, activation, place == "after")
    if activation is None:
        assert saved == []
    elif activation in OF_OUTPUT and place != "after":
        assert [t.data_ptr() for t in saved] == [y.data_ptr()]
    else:
        (kept,) = saved
        unactivated = composed(*tensors, None, False, groups=2)
        torch.testing.assert_close(kept, unactivated - tensors[3] if place == "after" else unactivated)


def test_a_slope_that_turns_the_output_around_keeps_what_it_is_applied_to():
    x, w = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(2, 2, 3, 3)
    y = triton_conv.conv2d(x, w, activation="leaky_relu", negative_slope=-0.5)
    wanted = functional.leaky_relu(functional.conv2d(x, w), -0.5)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, wanted)))


def test_backward_is_one_kernel_for_the_activation_and_those_of_the_convolution():
    tensors = operands("before", False)
    y = fused(*tensors, "gelu", False, groups=2)
    names = [n.split("::")[1] for n in operators(y.sum().backward) if "triton_conv" in n]
    assert names == ["activation_backward", "conv_dgrad", "conv_wgrad"]


def test_the_gradient_of_a_residual_is_not_copied():
    dy = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    tensors = operands("after", False)
    y = fused(*tensors, "silu", True, groups=2)
    assert torch.autograd.grad(y, tensors[3], dy)[0].data_ptr() == dy.data_ptr()


def test_gradients_of_outputs_in_another_layout_or_none_at_all():
    x, w = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(4, 4, 3, 3)
    y, wanted = triton_conv.conv2d(x, w, activation="silu"), functional.silu(functional.conv2d(x, w))
    for dy in (torch.randn(2, 4, 4, 4).to(memory_format=torch.channels_last), torch.ones(()).expand(2, 4, 4, 4)):
        torch.testing.assert_close(*(torch.autograd.grad(t, x, dy, retain_graph=True)[0] for t in (y, wanted)))
    empty = torch.randn(0, 4, 6, 6, requires_grad=True)
    (dx,) = torch.autograd.grad(triton_conv.conv2d(empty, w, activation="silu").sum(), empty)
    assert dx.shape == empty.shape


def test_flops_are_those_of_the_convolution():
    x, w = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(4, 4, 3, 3)
    counts = []
    for options in ({}, {"activation": "silu"}, {"scale": torch.ones(4)}):
        with FlopCounterMode(display=False) as counter:
            triton_conv.conv2d(x, w, **options).sum().backward()
            triton_conv.conv_transpose2d(x, w, **options).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] > 0


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong


X, W = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
R, S = torch.randn(2, 6, 3, 3), torch.ones(6)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"activation": "tanh"}, ValueError, ["tanh", "gelu_tanh"]),
        ({"activation": 1}, TypeError, ["activation", "int"]),
        ({"activation": "leaky_relu", "negative_slope": "x"}, TypeError, ["negative_slope", "str"]),
        ({"residual": R, "residual_after_activation": "yes"}, TypeError, ["residual_after_activation", "bool", "str"]),
        ({"residual": R[:1]}, RuntimeError, ["residual", "[2, 6, 3, 3]", "[1, 6, 3, 3]"]),
        ({"residual": R[0]}, RuntimeError, ["residual", "[2, 6, 3, 3]", "[6, 3, 3]"]),
        ({"residual": R.double()}, RuntimeError, ["residual", "float32", "float64"]),
        ({"residual": R.to("meta")}, RuntimeError, ["residual", "meta", "cpu"]),
        ({"residual": R.to_sparse()}, RuntimeError, ["residual", "sparse"]),
        ({"residual": 1.0}, TypeError, ["residual", "float"]),
        ({"scale": 1.0}, TypeError, ["scale", "float"]),
        ({"scale": S[:4]}, RuntimeError, ["scale", "6", "[4]"]),
        ({"scale": S.view(6, 1)}, RuntimeError, ["scale", "[6, 1]"]),
        ({"scale": S.half()}, RuntimeError, ["scale", "float16", "float32"]),
        ({"scale": S.to("meta")}, RuntimeError, ["scale", "meta", "cpu"]),
        ({"activation": "relu", "padding": (1, 1, 1)}, RuntimeError, ["padding"]),
    ],
)
def test_errors(options, kind, words):
    error = raised(triton_conv.conv2d, X, W, **options)
    assert type(error) is kind
    assert [word for word in words if word not in str(error)] == []


def test_errors_of_unbatched_residuals_and_of_modules():
    error = raised(triton_conv.conv2d, X[0], W, residual=R)
    assert type(error) is RuntimeError
    assert "residual [2, 6, 3, 3], input [4, 5, 5]" in str(error)
    for make in (triton_conv.nn.Conv2d, triton_conv.nn.ConvTranspose2d):
        for option in ("scale", "residual_after_activation"):
            error = raised(make, 4, 4, 3, **{option: torch.ones(1)})
            assert type(error) is TypeError
            assert f"'{option}' must be bool, not Tensor" in str(error)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.complex64, torch.complex128])
def test_integers_and_complex_numbers_have_the_activations_that_pytorch_has(dtype):
    draw = (lambda s: torch.randint(0, 5, s).to(dtype)) if not dtype.is_complex else lambda s: torch.randn(s).to(dtype)
    x, w, residual = draw((1, 2, 4, 4)), draw((2, 2, 3, 3)), draw((1, 2, 2, 2))
    scale = draw((2,))
    for activation in (None, *ACTIVATIONS):
        wanted = raised(PLAIN[activation], residual)
        error = raised(triton_conv.conv2d, x, w, residual=residual, scale=scale, activation=activation)
        if wanted is not None:
            assert type(error) is type(wanted) is NotImplementedError
            assert activation in str(error)
        elif activation != "sigmoid" or dtype.is_complex:  # that of integers is of floats
            assert error is None
            y = triton_conv.conv2d(x, w, residual=residual, scale=scale, activation=activation)
            z = triton_conv.conv2d(x, w) * scale.view(-1, 1, 1) + residual
            torch.testing.assert_close(y, PLAIN[activation](z))
    error = raised(triton_conv.conv2d, x, w, scale=torch.ones(2, dtype=torch.float64))
    assert type(error) is RuntimeError


# ---------------------------------------------------------------------------------------------------------------------
# What others do to operators


PARAMETERS = ([1, 1], [0, 0, 0, 0], [1, 1], 2, "zeros", None)
TRANSPOSED = ([1, 1], [0, 0, 0, 0], [0, 0], 2, [1, 1], "zeros", None)


@pytest.mark.parametrize("transposed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_opcheck(transposed):
    x, w, bias, residual, scale = operands("before", True, transposed)
    name, params = ("conv_transpose_fused", TRANSPOSED) if transposed else ("conv_fused", PARAMETERS)
    op, keeping = (getattr(torch_ops, n).default for n in (name, f"{name}_keep"))
    torch.library.opcheck(op, (x, w, bias, scale, residual, *params, "silu", 0.01, False))
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(keeping, (x, w, bias, None, residual, *params, "gelu", 0.01, True), test_utils=quick)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_opcheck_of_the_gradient(activation):
    dy, saved = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    torch.library.opcheck(torch_ops.activation_backward.default, (dy, saved, activation, 0.01, activation == "relu"))


def test_the_operators_check_their_arguments():
    x, w = torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3)
    how = (None, None, None, *PARAMETERS)
    assert type(raised(torch_ops.conv_fused, x, w, *how, "tanh", 0.01, False)) is ValueError
    assert type(raised(torch_ops.conv_fused, x.int(), w.int(), *how, "relu", 0.01, False)) is NotImplementedError
    backward = torch_ops.activation_backward
    assert type(raised(backward, x, x[0], "relu", 0.01, True)) is RuntimeError
    assert type(raised(backward, x, x, "silu", 0.01, True)) is RuntimeError
    assert type(raised(backward, x, x, "tanh", 0.01, False)) is ValueError
    assert type(raised(backward, x.int(), x.int(), "relu", 0.01, True)) is NotImplementedError


def block(x, w, bias, residual, scale):
    y = triton_conv.conv2d(x, w, bias, groups=2, padding=1, activation="silu", scale=scale)
    y = triton_conv.conv2d(y, w, bias, groups=2, activation="relu", residual=residual)
    return triton_conv.conv_transpose2d(y, w, bias, groups=2, activation="relu6")


def block_operands(dtype=torch.float32):
    x, w, bias, _, scale = operands("before", True, dtype=dtype, grad=False)
    return [t.requires_grad_() for t in (x, w, bias, torch.randn(2, 4, 3, 3).to(dtype), scale)]


def test_compiled_for_training_without_a_break():
    tensors = block_operands()
    eager, compiled = block(*tensors), torch.compile(block, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), tensors) for y in (compiled, eager)), strict=True):
        torch.testing.assert_close(a, b)


def test_exported_and_traced():
    tensors = [t.detach() for t in block_operands()]

    class Block(torch.nn.Module):
        def forward(self, *tensors):
            return block(*tensors)

    program = torch.export.export(Block(), tuple(tensors))
    assert [str(n.target) for n in program.graph.nodes if "fused" in str(n.target)] == [
        "triton_conv.conv_fused.default",
        "triton_conv.conv_fused.default",
        "triton_conv.conv_transpose_fused.default",
    ]
    torch.testing.assert_close(program.module()(*tensors), block(*tensors))
    torch.testing.assert_close(torch.jit.trace(block, tuple(tensors))(*tensors), block(*tensors))


def test_torch_fx_records_the_call_as_it_was_made():
    def function(x, w, r):
        return triton_conv.conv2d(x, w, activation="silu", residual=r), triton_conv.conv2d(x, w)

    (fused_call, plain) = [n for n in torch.fx.symbolic_trace(function).graph.nodes if n.op == "call_function"]
    assert fused_call.kwargs["activation"] == "silu"
    assert str(fused_call.kwargs["residual"]) == "r"
    assert set(plain.kwargs) == {"padding_mode", "precision"}


def test_autocast_casts_all_but_a_float32_scale():
    x, w, bias, residual, scale = (t.detach().requires_grad_() for t in operands("before", True, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(x, w, bias, residual, scale, "silu", False, groups=2)
    assert y.dtype is torch.bfloat16
    cast = [t.bfloat16() for t in (x, w, bias, residual)]
    torch.testing.assert_close(y, fused(*cast, scale, "silu", False, groups=2), rtol=0, atol=0)
    y.float().sum().backward()
    assert {t.grad.dtype for t in (x, w, bias, residual, scale)} == {torch.float32}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batched", [(0,), (0, 3), (1,), (2, 4), (0, 1, 2, 3, 4), (3,)])
def test_vmap(batched, transposed):
    tensors = operands("before", True, transposed, grad=False)
    stacked = [torch.stack((t, 2 * t, -t)) if i in batched else t for i, t in enumerate(tensors)]

    def function(*tensors):
        return fused(*tensors, "silu", False, transposed, groups=2)

    dims = tuple(0 if i in batched else None for i in range(5))
    found = torch.vmap(function, dims)(*stacked)
    each = [function(*(t[n] if i in batched else t for i, t in enumerate(stacked))) for n in range(3)]
    torch.testing.assert_close(found, torch.stack(each))


@pytest.mark.parametrize("batched", [(0, 3), (0, 4), (2,)])
def test_vmap_of_the_operator_that_keeps(batched):
    x, w, bias, residual, scale = operands("before", True, grad=False)
    tensors = [x, w, bias, scale, residual]
    stacked = [torch.stack((t, -t)) if i in batched else t for i, t in enumerate(tensors)]

    def function(*tensors):
        return torch_ops.conv_fused_keep(*tensors, *PARAMETERS, "silu", 0.01, False)

    found = torch.vmap(function, tuple(0 if i in batched else None for i in range(5)))(*stacked)
    for n in range(2):
        each = function(*(t[n] if i in batched else t for i, t in enumerate(stacked)))
        torch.testing.assert_close([t[n] for t in found], list(each))


def test_functional_transforms():
    tensors = operands("after", True, grad=False)

    def loss(function, *tensors):
        return function(*tensors, "gelu", True, groups=2).square().sum()

    for of in (0, 1, 3, 4):
        for transform in (torch.func.grad, lambda f, argnums: torch.func.jacfwd(torch.func.grad(f, argnums), argnums)):
            found, wanted = (transform(lambda *t, f=f: loss(f, *t), argnums=of)(*tensors) for f in (fused, composed))
            torch.testing.assert_close(found, wanted)

    def per_sample(function):
        def of_one(x, w, r):
            return loss(function, x[None], w, tensors[2], r[None], tensors[4])

        return torch.vmap(torch.func.grad(of_one, argnums=1), (0, None, 0))(tensors[0], tensors[1], tensors[3])

    torch.testing.assert_close(per_sample(fused), per_sample(composed))


def test_batched_gradients():
    tensors = operands("before", False)
    dys = torch.randn(3, 2, 4, 2, 2, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad(f(*tensors, "silu", False, groups=2), present(tensors), dys, is_grads_batched=True)
        for f in (fused, composed)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    tensors = block_operands()
    grads = [
        torch.autograd.grad(y.square().sum(), tensors) if not reentrant else y.square().sum().backward()
        for y in (checkpoint(block, *tensors, use_reentrant=reentrant),)
    ]
    found = [t.grad for t in tensors] if reentrant else grads[0]
    for a, b in zip(found, torch.autograd.grad(block(*tensors).square().sum(), tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_tensors_of_a_gpu_that_is_not_there():
    with FakeTensorMode():
        x, w = (torch.empty(s, device="cuda") for s in ((2, 8, 9, 9), (16, 8, 3, 3)))
        y = triton_conv.conv2d(x.to(memory_format=torch.channels_last), w, activation="silu")
        assert (y.shape, y.device.type) == ((2, 16, 7, 7), "cuda")
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_sample_has_the_same_bits_in_every_batch():
    x, w, residual, scale = torch.randn(5, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(5, 4, 4, 4), torch.rand(4)
    how = {"activation": "gelu", "scale": scale}
    with triton_conv.batch_invariant():
        y = triton_conv.conv2d(x, w, residual=residual, **how)
        for n in range(5):
            alone = triton_conv.conv2d(x[n : n + 1], w, residual=residual[n : n + 1], **how)
            assert torch.equal(alone, y[n : n + 1])


# ---------------------------------------------------------------------------------------------------------------------
# Modules


@pytest.mark.parametrize(
    "name", ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
)
def test_modules(name):
    rank, transposed = int(name[-2]), "Transpose" in name
    plain = getattr(nn, name)(4, 6, 3, padding=1)
    layer = getattr(nn, name)(4, 6, 3, padding=1, activation="leaky_relu", negative_slope=0.2, scale=True)
    lazy = getattr(nn, f"Lazy{name}")(6, 3, padding=1, activation="leaky_relu", negative_slope=0.2, scale=True)
    assert list(plain.state_dict()) == ["weight", "bias"]
    assert list(layer.state_dict()) == ["weight", "bias", "scale"]
    assert torch.equal(layer.scale, torch.ones(6))
    x = torch.randn(2, 4, *(5, 4, 3)[:rank])
    residual = torch.randn(2, 6, *x.shape[2:])
    lazy(x)
    for module in (layer, lazy):
        module.load_state_dict(layer.state_dict() | {"scale": torch.full((6,), 2.0)})
    z = getattr(triton_conv, f"conv{'_transpose' if transposed else ''}{rank}d")(x, layer.weight, padding=1) * 2
    z = z + layer.bias.view(-1, *(1,) * rank)
    for module in (layer, lazy, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(module(x), functional.leaky_relu(z, 0.2))
        torch.testing.assert_close(module(x, residual=residual), functional.leaky_relu(z + residual, 0.2))
    layer.residual_after_activation = True
    torch.testing.assert_close(layer(x, residual=residual), functional.leaky_relu(z, 0.2) + residual)
    layer.reset_parameters()
    assert torch.equal(layer.scale, torch.ones(6))
    assert repr(layer).endswith(
        "activation=leaky_relu, negative_slope=0.2, residual_after_activation=True, scale=True)"
    )
    assert "activation" not in repr(plain)
    assert "scale" not in repr(plain)


def test_modules_refuse_unknown_activations():
    for make in (lambda **k: nn.Conv2d(2, 2, 1, **k), lambda **k: nn.LazyConvTranspose1d(2, 1, **k)):
        error = raised(make, activation="swish")
        assert type(error) is ValueError
        assert "swish" in str(error)


def test_converted_modules_take_residuals():
    layer, x = torch.nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 5, 5)
    wanted = layer(x) + x
    assert len(triton_conv.convert(layer)) == 1
    torch.testing.assert_close(layer(x, residual=x), wanted)
    layer.activation = "relu"
    torch.testing.assert_close(layer(x, residual=x), wanted.relu())
