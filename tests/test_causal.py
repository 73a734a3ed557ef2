"""Causal convolutions: kernels and reference against PyTorch in float64, streaming, and what operators must do."""

import doctest
import itertools
from dataclasses import replace

import pytest
import torch
from halves import half_of
from tolerance import assert_close
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

import triton_conv
from triton_conv import (
    causal,
    causal_config,
    causal_conv1d,
    causal_conv1d_update,
    causal_ops,
    causal_plan,
    causal_reference,
)

ops = torch.ops.triton_conv
HALF = (torch.bfloat16, torch.float16)


def draw(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype)


def arranged(t, layout):
    """t (B, C, L) with the same values, laid out so; around a slice there is NaN."""
    B, C, L = t.shape
    if layout == "contiguous":
        return t.contiguous()
    if layout == "rows":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    wide = {
        "slice": lambda: t.new_full((B, C + 1, L + 16), torch.nan)[:, 1:, 8:-8],
        "odd slice": lambda: t.new_full((B, C, L + 3), torch.nan)[:, :, 1:-2],
        "slice of rows": lambda: t.new_full((B, L + 1, C + 32), torch.nan)[:, 1:, 16:-16].transpose(1, 2),
        "odd slice of rows": lambda: t.new_full((B, L, C + 5), torch.nan)[:, :, 3:-2].transpose(1, 2),
        "neither": lambda: t.new_full((B, C, 2 * L), torch.nan)[:, :, ::2],
    }[layout]()
    return wide.copy_(t)


LAYOUTS = ("contiguous", "rows", "slice", "odd slice", "slice of rows", "odd slice of rows", "neither")


def expected(x, weight, bias, state, silu, dy, dfinal):
    """y, the final state, and the gradients of all that is there, by PyTorch in float64 on the CPU."""
    W = weight.shape[1]
    leaves = [None if t is None else t.detach().cpu().double().requires_grad_() for t in (x, weight, bias, state)]
    x, weight, bias, state = leaves
    before = x.new_zeros(*x.shape[:2], W - 1) if state is None else state
    padded = torch.cat((before, x), dim=2)
    y = functional.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[1])
    y = functional.silu(y) if silu else y
    final = padded[:, :, padded.shape[2] - (W - 1) :]
    loss = (y * dy.cpu().double()).sum() + (final * dfinal.cpu().double()).sum()
    present = [t for t in leaves if t is not None]
    return [y.detach(), final.detach(), *torch.autograd.grad(loss, present)]


def check(
    B,
    C,
    L,
    W,
    *,
    dtype=torch.float32,
    wdtype=None,
    layout="contiguous",
    dlayout=None,
    silu=True,
    bias=True,
    state=True,
    device="cpu",
):
    """Values and gradients of one call."""
    torch.manual_seed(L + W)
    wdtype = wdtype or dtype
    x = arranged(draw(B, C, L, dtype=dtype, device=device), layout)
    dy = arranged(draw(B, C, L, dtype=dtype, device=device), dlayout or layout)
    weight = draw(C, W, dtype=wdtype, device=device)
    b = draw(C, dtype=wdtype, device=device) if bias else None
    s = draw(B, C, W - 1, dtype=dtype, device=device) if state else None
    dfinal = draw(B, C, W - 1, dtype=dtype, device=device)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, b, s)]
    y, final = causal_conv1d(*leaves[:3], "silu" if silu else None, leaves[3], return_final_state=True)
    assert y.dtype == final.dtype == dtype
    present = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad((y, final), present, (dy, dfinal))
    assert [g.dtype for g in gradients] == [t.dtype for t in present]
    depths = [W, 1, W, *[B * L * W] * (1 + bias), W]
    wanted = expected(x, weight, b, s, silu, dy, dfinal)
    for got, want, depth in zip((y, final, *gradients), wanted, depths, strict=False):
        assert_close(got.detach().cpu(), want, depth)
    return y, gradients


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients

LENGTHS = [(L, W) for W in (2, 4, 8) for L in sorted({1, 2, W - 1, W, 17, 130})]
OPTIONS = list(itertools.product((True, False), repeat=3))


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
@pytest.mark.parametrize(("L", "W"), LENGTHS)
def test_lengths(L, W, layout, kernels, poisoned):
    check(2, 5, L, W, layout=layout, device=kernels)


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
@pytest.mark.parametrize(("silu", "bias", "state"), OPTIONS)
def test_options(silu, bias, state, layout, kernels, poisoned):
    check(2, 24, 40, 4, layout=layout, silu=silu, bias=bias, state=state, device=kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("C", "L"), [(24, 48), (3, 21)])
def test_layouts(C, L, layout, kernels, poisoned):
    y, (dx, *_) = check(2, C, L, 4, layout=layout, device=kernels)
    axis = 1 if "rows" in layout else 2
    assert y.stride(axis) == dx.stride(axis) == 1


@pytest.mark.parametrize(("layout", "dlayout"), [("contiguous", "rows"), ("rows", "contiguous"), ("rows", "neither")])
def test_gradients_that_arrive_in_another_layout(layout, dlayout, kernels, poisoned):
    check(2, 24, 48, 3, layout=layout, dlayout=dlayout, device=kernels)


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
@pytest.mark.parametrize("W", range(1, 9))
def test_taps(W, layout, kernels, poisoned):
    check(1, 8, 16, W, layout=layout, device=kernels)


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
@pytest.mark.parametrize("dtype", causal_ops.DTYPES, ids=str)
def test_dtypes(dtype, layout, kernels, poisoned):
    check(1, 16, 40, 4, dtype=dtype, layout=layout, device=kernels)


def test_rows_of_which_a_thread_holds_one_channel(kernels, poisoned):
    check(1, 48, 20, 8, dtype=torch.float64, layout="rows", device=kernels)


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float64], ids=str)
def test_float32_weights_with_other_inputs(dtype, layout, kernels, poisoned):
    check(1, 16, 40, 4, dtype=dtype, wdtype=torch.float32, layout=layout, device=kernels)


@pytest.mark.parametrize(
    ("layout", "shares"), half_of(["contiguous", "rows", "odd slice of rows", "odd slice"], [1, 3])
)
def test_long_walks_in_few_shares_of_a_sequence(layout, shares, kernels, poisoned, monkeypatch):
    """Programs that take many steps, as they do where there is more to do than a GPU has multiprocessors."""
    by_rule = causal_config.default

    def few(p):
        return replace(by_rule(p), runs=2, channels=16, splits=shares)

    monkeypatch.setattr(causal_config, "default", few)
    causal_plan._make.cache_clear()
    for W in (3, 8):
        check(1, 17, 104, W, layout=layout, device=kernels)
    causal_plan._make.cache_clear()


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_the_reference_is_right_too(layout):
    for L, W in LENGTHS:
        check(2, 5, L, W, layout=layout)
    for silu, bias, state in OPTIONS:
        check(2, 5, 17, 4, layout=layout, silu=silu, bias=bias, state=state)
    for dtype in causal_ops.DTYPES:
        check(2, 5, 17, 4, layout=layout, dtype=dtype)


@pytest.mark.parametrize(("silu", "layout"), half_of([True, False], ["contiguous", "rows"]))
def test_gradcheck_through_the_kernels(silu, layout, kernels):
    torch.manual_seed(0)
    x = arranged(draw(2, 3, 6, device=kernels), layout).requires_grad_()
    rest = [draw(*shape, device=kernels).requires_grad_() for shape in ((3, 4), (3,), (2, 3, 3))]

    def f(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, "silu" if silu else None, state, True)

    assert gradcheck(f, (x, *rest), fast_mode=True)
    assert gradgradcheck(f, (x, *rest), fast_mode=True)


@pytest.mark.parametrize(
    "needs", [(True, False, False, False), (False, True, False, False), (False, False, True, True)]
)
def test_only_what_is_asked_for_gets_a_gradient(needs):
    tensors = [draw(*shape) for shape in ((1, 2, 5), (2, 3), (2,), (1, 2, 2))]
    for t, need in zip(tensors, needs, strict=True):
        t.requires_grad_(need)
    causal_conv1d(*tensors[:3], "silu", tensors[3]).sum().backward()
    assert [t.grad is not None for t in tensors] == list(needs)


def test_a_gradient_from_the_final_state_alone(kernels):
    x, weight, state = draw(2, 3, 2, device=kernels), draw(3, 4, device=kernels), draw(2, 3, 3, device=kernels)
    x.requires_grad_(), state.requires_grad_()
    _, final = causal_conv1d(x, weight, initial_state=state, return_final_state=True)
    dx, dstate = torch.autograd.grad(final.sum(), (x, state))
    assert torch.equal(dx, torch.ones_like(x))
    assert torch.equal(dstate, torch.tensor([0.0, 0, 1], dtype=torch.float64, device=kernels).expand(2, 3, 3))


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_same_bits_every_run(layout, kernels):
    x, weight = arranged(draw(2, 16, 300, dtype=torch.float32, device=kernels), layout), draw(16, 4, device=kernels)
    weight = weight.float().requires_grad_()
    runs = [torch.autograd.grad(causal_conv1d(x, weight, None, "silu").sum(), weight)[0] for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_a_nan_goes_no_further_than_its_taps(layout, kernels):
    clean = arranged(draw(2, 8, 32, dtype=torch.float32, device=kernels), layout)
    weight = draw(8, 4, dtype=torch.float32, device=kernels)
    for sample, channel, position in ((0, 0, 0), (1, 3, 13), (1, 7, 31)):
        x, dy = clean.clone().requires_grad_(), torch.ones_like(clean)
        dy[sample, channel, position] = torch.nan
        y = causal_conv1d(x, weight, None, "silu")
        (dx,) = torch.autograd.grad(y, x, dy)
        touched = torch.zeros_like(clean, dtype=torch.bool)
        touched[sample, channel, max(position - 3, 0) : position + 1] = True
        assert torch.equal(dx.isnan(), touched)
        with torch.no_grad():
            x[sample, channel, position] = torch.nan
        touched = torch.zeros_like(clean, dtype=torch.bool)
        touched[sample, channel, position : position + 4] = True
        assert torch.equal(causal_conv1d(x, weight, None, "silu").isnan(), touched)


def test_what_silu_makes_of_large_sums(kernels):
    x = torch.tensor([[[-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4, torch.inf]]], device=kernels)
    one = torch.ones(1, 1, device=kernels)
    assert_close(causal_conv1d(x, one, None, "silu")[..., :-1], functional.silu(x)[..., :-1], 1)
    assert causal_conv1d(x, one, None, "silu")[0, 0, -1] == torch.inf


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_offsets_beyond_32_bits(layout, kernels):
    """Two samples further apart than 2^31 elements; what lies between them is never touched."""
    C, L, far = 16, 16, 2**31 + 16
    memory = torch.empty(far + C * L, dtype=torch.bfloat16, device=kernels)
    x = memory.as_strided((2, C, L), (far, 1, C) if layout == "rows" else (far, L, 1))
    x.copy_(draw(2, C, L))
    weight = draw(C, 4, dtype=torch.bfloat16, device=kernels)
    near = arranged(x.clone(), layout)
    assert torch.equal(causal_conv1d(x, weight), causal_conv1d(near, weight))
    outputs = [ops.causal_conv1d_backward(near, None, t, weight, None, None, True) for t in (x, near)]
    for far_away, close in zip(*outputs, strict=True):
        assert torch.equal(far_away, close)


# ---------------------------------------------------------------------------------------------------------------------
# Streaming


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
@pytest.mark.parametrize("chunks", [(7, 1, 2, 1, 19), (1, 1, 1, 27), (16, 8, 6)])
def test_chunks_make_up_the_whole(chunks, layout, kernels):
    x = arranged(draw(2, 8, sum(chunks), dtype=torch.float32, device=kernels), layout)
    weight, bias = draw(8, 4, dtype=torch.float32, device=kernels), draw(8, dtype=torch.float32, device=kernels)
    whole, last = causal_conv1d(x, weight, bias, "silu", return_final_state=True)
    parts, state = [], None
    for chunk in x.split(chunks, dim=2):
        y, state = causal_conv1d(chunk, weight, bias, "silu", state, return_final_state=True)
        parts.append(y)
    assert torch.equal(torch.cat(parts, dim=2), whole)
    assert torch.equal(state, last)


@pytest.mark.parametrize("W", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_updates_continue_a_sequence(dtype, W, kernels):
    x = draw(2, 130, 12, dtype=dtype, device=kernels)
    weight, bias = draw(130, W, dtype=torch.float32, device=kernels), draw(130, dtype=dtype, device=kernels)
    whole = causal_conv1d(x, weight, bias, "silu")
    _, state = causal_conv1d(x[:, :, :5], weight, bias, return_final_state=True)
    with torch.no_grad():
        five = causal_conv1d_update(x[:, :, 5], state, weight, bias, "silu")
        rest = causal_conv1d_update(x[:, :, 6:], state, weight, bias, "silu")
    assert torch.equal(five, whole[:, :, 5])
    assert torch.equal(rest, whole[:, :, 6:])
    assert torch.equal(state, x[:, :, 12 - (W - 1) :])


def test_an_update_writes_the_state_where_it_is(kernels):
    memory = torch.full((2, 5, 8), torch.nan, device=kernels)
    state = memory[:, 1:-1, ::2].transpose(1, 2)[:, :, :].permute(0, 2, 1)[:, :, 1:]
    state.zero_()
    before = memory.isnan()
    x, weight = draw(2, 3, dtype=torch.float32, device=kernels), draw(3, 4, dtype=torch.float32, device=kernels)
    y = causal_conv1d_update(x, state, weight)
    assert_close(y, x * weight[:, -1], 4)
    assert torch.equal(state[:, :, -1], x)
    assert torch.equal(memory.isnan(), before)


@pytest.mark.parametrize(("C", "L"), [(1, 2**31 + 5), (2**29, 1)])
def test_sequences_and_channels_have_any_length(C, L):
    x, w = torch.empty(1, C, L, device="meta"), torch.empty(C, 4, device="meta")
    y, state = causal_conv1d(x, w, return_final_state=True)
    assert (y.shape, state.shape) == (x.shape, (1, C, 3))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_that_lies_on_itself_cannot_be_updated(device):
    state = torch.zeros(1, 3, 2, device=device).expand(2, 3, 2)
    x, weight = torch.ones(2, 3, device=device), torch.ones(3, 3, device=device)
    with pytest.raises(RuntimeError, match="more than one element of the written-to state"):
        causal_conv1d_update(x, state, weight)


def test_an_update_counts_as_a_change_of_the_state():
    x, state, weight = draw(1, 2), draw(1, 2, 2), draw(2, 3)
    leaf = draw(1, 2, 2).requires_grad_()
    product = leaf * state
    version = state._version
    causal_conv1d_update(x, state, weight)
    assert state._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        causal_conv1d_update(x, torch.zeros(1, 2, 2, dtype=torch.float64), weight)


def test_an_update_that_would_need_a_gradient_raises():
    x, state, weight = draw(1, 2), draw(1, 2, 2), draw(2, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="causal_conv1d_update has no gradient"):
        causal_conv1d_update(x, state, weight)
    with torch.no_grad():
        causal_conv1d_update(x, state, weight)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with a call

GOOD = {"x": (2, 4, 6), "weight": (4, 3), "bias": (4,), "initial_state": (2, 4, 2)}


@pytest.mark.parametrize(
    ("changed", "kind", "words"),
    [
        ({"x": (4, 6)}, RuntimeError, ["x [4, 6]", "(B, C, L)"]),
        ({"x": (2, 5, 6)}, RuntimeError, ["weight [4, 3]", "x [2, 5, 6]"]),
        ({"weight": (4, 1, 3)}, RuntimeError, ["weight [4, 1, 3]", "(C, W)"]),
        ({"weight": (4, 9), "initial_state": (2, 4, 8)}, RuntimeError, ["1 to 8 taps", "weight [4, 9]"]),
        ({"weight": (4, 0), "initial_state": None}, RuntimeError, ["1 to 8 taps", "weight [4, 0]"]),
        ({"bias": (3,)}, RuntimeError, ["bias [3]", "x [2, 4, 6]"]),
        ({"initial_state": (2, 4, 3)}, RuntimeError, ["initial_state", "[2, 4, 2]", "[2, 4, 3]"]),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_that_do_not_fit(changed, kind, words, device):
    shapes = GOOD | changed
    tensors = {name: None if shape is None else torch.ones(shape, device=device) for name, shape in shapes.items()}
    with pytest.raises(kind) as error:
        causal_conv1d(**tensors)
    assert all(word in str(error.value) for word in words), error.value


def test_types_and_dtypes_that_do_not_fit():
    x, weight, _, state = (torch.ones(shape) for shape in GOOD.values())
    with pytest.raises(TypeError, match="argument 'weight' must be Tensor, not list"):
        causal_conv1d(x, [1.0])
    with pytest.raises(TypeError, match="argument 'state' must be Tensor, not NoneType"):
        causal_conv1d_update(x, None, weight)
    with pytest.raises(ValueError, match="activation='relu'"):
        causal_conv1d(x, weight, activation="relu")
    with pytest.raises(RuntimeError, match=r"expected weight \[4, 3\] of torch.bfloat16 or torch.float32"):
        causal_conv1d(x.bfloat16(), weight.half())
    with pytest.raises(
        RuntimeError, match=r"expected initial_state \[2, 4, 2\] of torch.bfloat16, but got torch.float"
    ):
        causal_conv1d(x.bfloat16(), weight, initial_state=state)
    with pytest.raises(NotImplementedError, match=r"x has dtype torch.int64"):
        causal_conv1d(x.long(), weight.long())
    with pytest.raises(RuntimeError, match=r"same device.*weight"):
        causal_conv1d(x, weight.to("meta"))
    with pytest.raises(RuntimeError, match=r"layout torch.sparse_coo"):
        causal_conv1d(x.to_sparse(), weight)
    with pytest.raises(RuntimeError, match=r"state of size \[2, 4, 2\]"):
        causal_conv1d_update(x, state[:1], weight)


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6), (2, 4, 0)], ids=str)
def test_nothing_to_do(shape, kernels):
    B, C, _ = shape
    x, weight = torch.ones(shape, device=kernels, requires_grad=True), torch.ones(C, 3, device=kernels)
    weight.requires_grad_()
    state = torch.full((B, C, 2), 7.0, device=kernels)
    y, final = causal_conv1d(x, weight, initial_state=state, return_final_state=True)
    assert y.shape == shape
    assert torch.equal(final, (state if shape[2] == 0 else x[:, :, -2:]))
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


# ---------------------------------------------------------------------------------------------------------------------
# What operators must do


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_opcheck(layout):
    x = arranged(draw(2, 3, 6), layout)
    weight, bias, state = draw(3, 4), draw(3), draw(2, 3, 3)
    leaves = [t.requires_grad_() for t in (x, weight, bias, state)]
    torch.library.opcheck(ops.causal_conv1d, (*leaves, True, True))
    torch.library.opcheck(ops.causal_conv1d, (*leaves[:2], None, None, False, False))
    dy, dfinal = arranged(draw(2, 3, 6), layout).requires_grad_(), draw(2, 3, 3).requires_grad_()
    torch.library.opcheck(ops.causal_conv1d_backward, (dy, dfinal, *leaves, True))
    torch.library.opcheck(ops.causal_conv1d_backward, (dy, None, *leaves[:2], None, None, False))
    x, weight, bias, state = (t.detach() for t in leaves)
    torch.library.opcheck(ops.causal_conv1d_update, (x, state, weight, bias, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break(dynamic):
    def f(x, weight, bias, state):
        y, final = causal_conv1d(x, weight, bias, "silu", state, return_final_state=True)
        with torch.no_grad():
            step = causal_conv1d_update(x[:, :, 0].detach(), final, weight.detach())
        return y * 2, final, step

    tensors = [draw(*shape).requires_grad_() for shape in ((2, 3, 6), (3, 4), (3,), (2, 3, 3))]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = [(g(*tensors)) for g in (f, compiled)]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    gradients = [torch.autograd.grad(y.sum(), tensors) for y, *_ in results]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_casts_as_for_other_convolutions():
    x, weight = draw(1, 2, 6, dtype=torch.float32), draw(2, 3, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = causal_conv1d(x, weight)
        assert triton_conv.conv1d(x, weight.unsqueeze(1), groups=2).dtype == y.dtype == torch.bfloat16
        step = causal_conv1d_update(x.bfloat16(), torch.zeros(1, 2, 2, dtype=torch.bfloat16), weight.detach())
    assert torch.equal(y, causal_conv1d(x.bfloat16(), weight.bfloat16()))
    assert step.dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


IN_DIMS = [(0, None, None, None), (None, 0, None, None), (1, None, 0, None), (None, None, None, 2), (0, 1, 0, 1)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap(in_dims):
    shapes = ((2, 3, 6), (3, 4), (3,), (2, 3, 3))
    tensors = [
        draw(*shape) if dim is None else draw(*shape[:dim], 5, *shape[dim:])
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]

    def f(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, "silu", state, True)

    found = torch.func.vmap(f, in_dims)(*tensors)
    for i in range(5):
        one = [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)]
        for ours, wanted in zip(found, f(*one), strict=True):
            assert_close(ours[i], wanted, 20)


def test_gradients_per_sample():
    x, weight, bias = draw(4, 3, 6), draw(3, 4), draw(3)

    def loss(weight, bias, sample):
        return causal_conv1d(sample.unsqueeze(0), weight, bias, "silu").pow(2).sum()

    found = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0))(weight, bias, x)
    for i, sample in enumerate(x):
        leaves = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        for ours, wanted in zip(found, torch.autograd.grad(loss(*leaves, sample), leaves), strict=True):
            assert_close(ours[i], wanted, 20)


def test_kernels_run_and_not_the_reference(kernels, monkeypatch):
    def refuse(*_):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(causal_reference, "forward", refuse)
    monkeypatch.setattr(causal_reference, "gradients", refuse)
    x, weight = draw(1, 2, 6, device=kernels).requires_grad_(), draw(2, 3, device=kernels)
    causal_conv1d(x, weight).sum().backward()
    causal_conv1d_update(x.detach(), draw(1, 2, 2, device=kernels), weight)


def test_the_examples_of_the_documentation():
    result = doctest.testmod(causal, extraglobs={"torch": torch, "triton_conv": triton_conv})
    assert result.attempted > 5
    assert result.failed == 0
