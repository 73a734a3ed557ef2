"""Causal convolutions in chunks: values, gradients, and the same bits however a video is cut."""

import doctest
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from test_compile import compiled
from tolerance import assert_close
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

import triton_conv
from triton_conv import (
    causal,
    causal_conv1d,
    causal_conv3d,
    causal_nn,
    config,
    execute,
    nn,
    plan,
    streaming,
    streaming_ops,
    streaming_plan,
)
from triton_conv.config import BoxConfig, Config
from triton_conv.devices import DEVICES
from triton_conv.geometry import Role

GATHER, BOX = Config(32, 32, 16), BoxConfig((1, 1, 2, 8), 16, 16)
SUMS = Config(32, 1, 1, dot=False)
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@contextmanager
def running(tiles):
    """Causal convolutions run with these tiles; gives the kernels that ran."""
    ran, make = [], streaming_plan.make

    def made(problem):
        p = make(problem)
        ran.append(p.kernel)
        return p

    streaming_plan.make = made
    try:
        with config.explicit({} if tiles is None else {Role.FPROP: tiles}):
            yield ran
    finally:
        streaming_plan.make = make


def draw(*shape, dtype=torch.float32, last=False, device="cpu", poisoned_around=False):
    t = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    if poisoned_around:
        wide = t.new_full([n + 2 for n in t.shape], torch.nan)[(slice(1, -1),) * t.dim()]
        return wide.copy_(t)
    return t.contiguous(memory_format=torch.channels_last_3d) if last and t.dim() == 5 else t


def expected(x, w, b, context, stride=1, padding=(0, 0), dilation=1, groups=1, modes=("zeros", "zeros"), time="zeros"):
    """In float64: what came before x in front of it, borders around it, and PyTorch's convolution of that."""
    x, w, b, context = (None if t is None else t.cpu().double() for t in (x, w, b, context))
    reach = (dilation if isinstance(dilation, int) else dilation[0]) * (w.shape[2] - 1)
    if context is None:
        context = (x[:, :, :1] * (time == "replicate")).expand(-1, -1, reach, -1, -1)
    x = torch.cat((context, x), dim=2)
    for axis, (n, mode) in enumerate(zip(padding, modes, strict=True), start=3):
        flat = x.movedim(axis, -1)
        rows = functional.pad(flat.reshape(-1, 1, flat.shape[-1]), (n, n), MODES[mode])
        x = rows.reshape(*flat.shape[:-1], -1).movedim(-1, axis)
    return functional.conv3d(x, w, b, stride, 0, dilation, groups)


def case(
    name,
    tiles,
    context,
    C=16,
    K=16,
    groups=1,
    filter=(3, 1, 2),
    last=False,
    dtype=torch.float32,
    slow=False,
    **options,
):
    options = {"padding": (0, 1), **options}
    marks = pytest.mark.slow if slow else ()
    return pytest.param(tiles, context, (C, K, groups, filter), last, dtype, options, id=name, marks=marks)


half = {"dtype": torch.bfloat16, "last": True}
CASES = [
    case("gather", GATHER, 2),
    case("gather from a beginning", GATHER, None, slow=True),
    case("gather repeats the first frame", GATHER, None, time_mode="replicate"),
    case("gather repeats one frame once", GATHER, None, filter=(2, 1, 2), time_mode="replicate", slow=True),
    case("gather without context", GATHER, 0),
    case("gather with a frame of context", GATHER, 1, **half, slow=True),
    case("gather with a long context", GATHER, 5, **half),
    case("gather with a stride in time", GATHER, 3, stride=(2, 1, 1)),
    case("gather dilated in time", GATHER, 4, dilation=(2, 1, 1), last=True, slow=True),
    case("gather dilated from a beginning", GATHER, None, dilation=(2, 1, 1), time_mode="replicate", **half),
    case("gather with modes per axis", GATHER, 2, filter=(2, 2, 2), padding=1, padding_mode=("circular", "reflect")),
    case("gather of groups", GATHER, 2, C=32, K=32, groups=2, last=True, slow=True),
    case("gather of few channels", Config(32, 16, 16, flatten=True), 2, C=3, K=5),
    case("gather with filters first", Config(32, 64, 16, filters_first=True), 2, **half, slow=True),
    case("gather in one frame", GATHER, 0, filter=(1, 1, 2)),
    case("gather of a filter of one frame", GATHER, None, filter=(1, 1, 2), stride=(2, 1, 1), slow=True),
    case("depthwise", SUMS, 2, C=3, K=3, groups=3),
    case("depthwise of float64", SUMS, None, C=3, K=6, groups=3, dtype=torch.float64, time_mode="replicate", slow=True),
    case("gather of float16", GATHER, 2, dtype=torch.float16, slow=True),
    case("box", BOX, 2, **half),
    case("box from a beginning", BOX, None, **half),
    case("box repeats the first frame", BOX, None, time_mode="replicate", **half),
    case("box without context", BOX, 0, **half, slow=True),
    case("box with a frame of context", BOX, 1, **half, slow=True),
    case("box with a long context", BOX, 5, **half),
    case("box dilated in time", BOX, 3, dilation=(2, 1, 1), **half, slow=True),
    case("box with a stride in width", BOX, 2, stride=(1, 1, 2), **half),
    case("box of copies", BOX, 2, dtype=torch.float16, slow=True),
    case("box of copies repeats the first frame", BOX, None, time_mode="replicate", dtype=torch.bfloat16),
    case("box of groups", BOX, 2, C=32, K=32, groups=2, **half, slow=True),
    case("box of several images", BoxConfig((2, 1, 2, 4), 16, 16), 2, **half),
    case("box with a tail of channels", BOX, 2, C=24, K=24, **half),
    case("box of one frame", BOX, None, filter=(1, 1, 2), **half, slow=True),
    case("box of 3x3x3", BOX, 2, filter=(3, 3, 3), padding=1, **half, slow=True),
]


@pytest.mark.parametrize(("tiles", "context", "shape", "last", "dtype", "options"), CASES)
@pytest.mark.parametrize("on", ["kernels", "cpu"])
def test_values(on, tiles, context, shape, last, dtype, options, request, poisoned):
    device = request.getfixturevalue("kernels") if on == "kernels" else "cpu"
    torch.manual_seed(1)
    C, K, groups, taps = shape
    H, W, D = (2, 4, 3) if "stride" not in options or options["stride"][0] == 1 else (2, 3, 4)
    how = {"dtype": dtype, "last": last, "device": device}
    N = 2 if tiles is GATHER or (isinstance(tiles, BoxConfig) and tiles.box[0] > 1) else 1
    x, w, b = draw(N, C, D, H, W, **how), draw(K, C // groups, *taps, **how), draw(K, **how)
    before = None if context is None else draw(N, C, context, H, W, **how)
    with running(tiles) as ran:
        y = causal_conv3d(x, w, b, before, groups=groups, **options)
    if on == "kernels":
        assert ran == ["box" if isinstance(tiles, BoxConfig) else "gather"]
    padding, mode = options["padding"], options.get("padding_mode", "zeros")
    want = expected(
        *(x, w, b, before),
        stride=options.get("stride", 1),
        padding=padding if isinstance(padding, tuple) else (padding,) * 2,
        dilation=options.get("dilation", 1),
        groups=groups,
        modes=mode if isinstance(mode, tuple) else (mode,) * 2,
        time=options.get("time_mode", "zeros"),
    )
    assert y.dtype is dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    assert_close(y.cpu(), want, C // groups * w[0, 0].numel())


@pytest.mark.parametrize("layout", ["misaligned", "apart", "other"])
@pytest.mark.parametrize("tiles", [GATHER, BOX], ids=["gather", "box"])
def test_contexts_lie_anywhere(tiles, layout, kernels, poisoned):
    """Not where x does, next to NaN, or at odd addresses."""
    x, w = draw(2, 16, 2, 2, 3, **half, device=kernels), draw(16, 16, 3, 1, 1, **half, device=kernels)
    context = draw(2, 16, 2, 2, 3, dtype=torch.bfloat16, device=kernels, poisoned_around=layout == "apart")
    if layout == "misaligned":
        room = x.new_full((context.numel() + 1,), torch.nan)[1:]
        context = room.view(2, 2, 2, 3, 16).permute(0, 4, 1, 2, 3).copy_(context)
        assert context.data_ptr() % 16
    with running(tiles):
        assert_close(causal_conv3d(x, w, None, context).cpu(), expected(x, w, None, context), 48)
        assert_close(causal_conv3d(context, w, None, x).cpu(), expected(context, w, None, x), 48)
        repeated = context[:, :, 1:].expand(-1, -1, 3, -1, -1)
        assert_close(causal_conv3d(x, w, None, repeated).cpu(), expected(x, w, None, repeated), 48)


# ---------------------------------------------------------------------------------------------------------------------
# Chunks


def in_chunks(function, x, sizes):
    """`function` of chunks of these sizes, one after the other, and the last context."""
    found, context = [], None
    for chunk in x.split(sizes, dim=2):
        y, context = function(chunk, context=context, return_context=True)
        found.append(y)
    return torch.cat(found, dim=2), context


CUTS = [(1, 4, 1), (3, 1, 2), (1, 1, 1, 1, 1, 1), (4, 2)]


@pytest.mark.parametrize(
    ("on", "tiles", "dtype", "last", "time_mode"),
    [
        ("cpu", None, torch.float32, False, "replicate"),
        ("cpu", None, torch.bfloat16, True, "zeros"),
        ("kernels", GATHER, torch.float32, False, "zeros"),
        ("kernels", BOX, torch.bfloat16, True, "replicate"),
        pytest.param("kernels", GATHER, torch.bfloat16, True, "replicate", marks=pytest.mark.slow),
        pytest.param("kernels", BOX, torch.bfloat16, True, "zeros", marks=pytest.mark.slow),
        pytest.param("kernels", BOX, torch.float16, False, "replicate", marks=pytest.mark.slow),
    ],
)
def test_chunks_do_not_show(on, tiles, dtype, last, time_mode, request):
    device = request.getfixturevalue("kernels") if on == "kernels" else "cpu"
    torch.manual_seed(2)
    how = {"dtype": dtype, "last": last, "device": device}
    x, w, b = draw(1, 16, 6, 2, 3, **how), draw(16, 16, 3, 1, 1, **how), draw(16, **how)
    function = partial(causal_conv3d, weight=w, bias=b, time_mode=time_mode)
    with running(tiles):
        whole, last_context = function(x, return_context=True)
        for sizes in CUTS if device == "cuda" or on == "cpu" else CUTS[:2]:
            y, context = in_chunks(function, x, sizes)
            assert torch.equal(y, whole)
            assert torch.equal(context, last_context)


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 3}, {"groups": 2}], ids=str)
def test_sequences_in_chunks(options, kernels):
    x, w = draw(1, 4, 12, device=kernels), draw(6, 4 // options.get("groups", 1), 3, device=kernels)
    function = partial(causal_conv1d, weight=w, **options)
    with running(Config(16, 16, 16, flatten=True)) as ran:
        whole = function(x)
        reach = 2 * options.get("dilation", 1)
        plain = functional.conv1d(functional.pad(x, (reach, 0)).cpu().double(), w.cpu().double(), **options)
        assert_close(whole.cpu(), plain, 12)
        for sizes in ((4, 8), (2, 4, 6) if "stride" in options else (1, 5, 6)):
            assert torch.equal(in_chunks(function, x, sizes)[0], whole)
    assert set(ran) == {"gather"}


@pytest.mark.parametrize("rows", [False, True])
def test_long_reductions_of_sequences_are_over_rows(rows, kernels, poisoned):
    """Which are copied where positions lie side by side; a chunk of one position is both."""
    x, w = draw(1, 7, 64, device=kernels).transpose(1, 2), draw(64, 64, 2, dtype=torch.float32, device=kernels)
    x = x if rows else x.contiguous()
    with running(None):
        whole = causal_conv1d(x, w)
        pieces, _ = in_chunks(partial(causal_conv1d, weight=w), x, (1, 6))
    assert_close(whole.cpu(), functional.conv1d(functional.pad(x, (1, 0)).cpu().double(), w.cpu().double()), 128)
    assert torch.equal(pieces, whole)
    long = streaming.plans((1, 512, 4000), (512, 512, 3), dtype=torch.bfloat16, channels_last=rows, context=2)
    assert long["forward"].packs == (() if rows else ("x", "context", "w"))


def test_nothing_is_chosen_by_the_number_of_frames():
    """Nor by the context's, for any layer: kernel, config, and what is read of x."""
    for device in (DEVICES["H200"], DEVICES["A100"]):
        for shape, weight, options in (
            ((1, 96, 1, 64, 64), (96, 96, 3, 3, 3), {"padding": 1, "channels_last": True}),
            ((1, 384, 1, 8, 8), (384, 384, 3, 1, 1), {"channels_last": True}),
            ((1, 384, 1, 30, 52), (384, 384, 3, 3, 3), {"padding": 1, "channels_last": False}),
            ((2, 16, 1, 8, 8), (16, 1, 3, 3, 3), {"padding": 1, "groups": 16, "channels_last": True}),
            ((1, 64, 1), (64, 64, 3), {}),
            ((1, 64, 1), (64, 64, 3), {"channels_last": True}),
        ):
            found = set()
            for frames in (1, 4, 81, 1000):
                for context in (None, 2, 5) if weight[2] == 3 else (None, 2):
                    many = (*shape[:2], frames, *shape[3:])
                    p = streaming.plans(
                        many, weight, dtype=torch.bfloat16, context=context, device=device, bias=True, **options
                    )["forward"]
                    assert not isinstance(p.config, BoxConfig) or p.config.box[1] == 1
                    found.add((p.kernel, p.config, p.reason))
            assert len(found) == 1


def test_a_cpu_takes_frames_one_by_one(monkeypatch):
    """PyTorch's own convolutions may do as they like with several."""
    plain = torch.convolution
    x, w = torch.randn(1, 3, 4, 5, 5), torch.randn(4, 3, 3, 3, 3)
    monkeypatch.setattr(torch, "convolution", lambda x, *rest: plain(x, *rest) + x.shape[2])
    whole = causal_conv3d(x, w)
    assert torch.equal(in_chunks(partial(causal_conv3d, weight=w), x, (1, 3))[0], whole)
    assert not torch.equal(whole, causal_conv3d(x, w[:, :, 1:]))


@pytest.mark.parametrize("time_mode", ["zeros", "replicate"])
def test_the_next_context_is_a_view_where_x_has_it_all(time_mode):
    x, w = torch.randn(2, 3, 5, 4, 4), torch.randn(4, 3, 3, 3, 3)
    _, context = causal_conv3d(x, w, return_context=True)
    assert context.data_ptr() == x[:, :, 3:].data_ptr()
    assert torch.equal(context, x[:, :, 3:])
    _, context = causal_conv3d(x[:, :, :1], w, time_mode=time_mode, return_context=True)
    first = x[:, :, :1]
    assert torch.equal(context, torch.cat((first if time_mode == "replicate" else 0 * first, first), dim=2))
    _, following = causal_conv3d(x[:, :, 1:2], w, None, context, return_context=True)
    assert torch.equal(following, x[:, :, :2])
    _, empty = causal_conv3d(x, w[:, :, :1], return_context=True)
    assert empty.shape[2] == 0
    assert torch.equal(causal_conv3d(x, w[:, :, :1], None, empty), causal_conv3d(x, w[:, :, :1]))


# ---------------------------------------------------------------------------------------------------------------------
# Epilogues

FUSED = [
    (GATHER, {"activation": "silu"}, "", False),
    (GATHER, {"activation": "leaky_relu", "negative_slope": 0.2}, "before", True),
    (BOX, {"activation": "relu"}, "after", True),
    (BOX, {}, "before", False),
]


def finished(sums, options, bias, residual, place, scale):
    """What `triton_conv.epilogue` says, by plain torch."""
    y = sums * (1 if scale is None else scale.view(-1, 1, 1, 1)) + bias.view(-1, 1, 1, 1)
    y = y + residual if place == "before" else y
    name, slope = options.get("activation"), options.get("negative_slope")
    y = y if name is None else functional.leaky_relu(y, slope) if slope else getattr(functional, name)(y)
    return y + residual if place == "after" else y


@pytest.mark.parametrize(("tiles", "options", "place", "scaled"), FUSED)
@pytest.mark.parametrize("on", ["kernels", "cpu"])
def test_epilogues(on, tiles, options, place, scaled, request, poisoned):
    device = request.getfixturevalue("kernels") if on == "kernels" else "cpu"
    x, w, b = (draw(*shape, **half, device=device) for shape in ((1, 16, 3, 2, 3), (16, 16, 3, 1, 1), (16,)))
    context, residual = draw(1, 16, 2, 2, 3, **half, device=device), draw(1, 16, 3, 2, 3, **half, device=device)
    scale = draw(16, device=device) if scaled else None
    options = {**options, "residual_after_activation": place == "after"}
    given = {**options, "scale": scale, "residual": residual.contiguous() if place else None}
    with running(tiles) as ran:
        y = causal_conv3d(x, w, b, context, **given)
        first = causal_conv3d(
            x[:, :, :1], w, b, context, **{**given, "residual": given["residual"][:, :, :1] if place else None}
        )
    assert not ran or set(ran) == {"box" if tiles is BOX else "gather"}
    wide = [None if t is None else t.double().cpu() for t in (b, residual, scale)]
    want = finished(expected(x, w, None, context), options, wide[0], wide[1], place, wide[2])
    assert_close(y.cpu(), want, 48)
    assert torch.equal(first, y[:, :, :1])


def test_gradients_pass_through_epilogues():
    x, context, residual = (torch.randn(1, 2, n, 1, 2, dtype=torch.float64, requires_grad=True) for n in (2, 1, 2))
    w, b, scale = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 2, 1, 1), (2,), (2,)))

    def function(x, w, b, context, residual, scale):
        return causal_conv3d(x, w, b, context, activation="silu", residual=residual, scale=scale)

    assert gradcheck(function, (x, w, b, context, residual, scale), check_forward_ad=True)
    assert torch.autograd.grad(function(x, w, b, context, residual, scale).sum(), x)[0].shape == x.shape
    values = [t.detach() for t in (x, w, b, context, residual, scale)]
    torch.testing.assert_close(function(*values), function(x, w, b, context, residual, scale))
    many = [torch.stack((t, 2 * t)) for t in values]
    for dims in ((0,) * 6, (0, None, None, 0, None, None), (None, None, 0, None, 0, None), (None, 0, None, None, 0, 0)):
        given = [m if d == 0 else v for m, v, d in zip(many, values, dims, strict=True)]
        found = torch.vmap(function, dims)(*given)
        for i in range(2):
            torch.testing.assert_close(
                found[i], function(*(t if d is None else t[i] for t, d in zip(given, dims, strict=True)))
            )


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives, transforms, the operator


GRADIENTS = [
    ({}, 2),
    ({"padding": (1, 0), "padding_mode": ("reflect", "zeros"), "time_mode": "replicate"}, None),
    ({"stride": (2, 1, 1)}, 1),
    ({"groups": 2, "dilation": (2, 1, 1)}, None),
]


@pytest.mark.parametrize(("options", "frames"), GRADIENTS, ids=str)
def test_gradients_of_any_order(options, frames):
    x = torch.randn(1, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2 // options.get("groups", 1), 2, 1, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)
    before = None if frames is None else torch.randn(1, 2, frames, 2, 2, dtype=torch.float64, requires_grad=True)
    tensors = [t for t in (x, w, b, before) if t is not None]

    def function(*given):
        return causal_conv3d(*given, return_context=True, **options)

    assert gradcheck(function, tensors, check_forward_ad=True)
    assert gradgradcheck(function, tensors)


def test_gradients_by_kernels_are_views_of_one(kernels, poisoned):
    how = {"dtype": torch.float32, "device": kernels}
    leaves = [
        t.requires_grad_()
        for t in (
            draw(1, 16, 3, 1, 2, **how),
            draw(16, 16, 2, 1, 1, **how),
            draw(16, **how),
            draw(1, 16, 1, 1, 2, **how),
        )
    ]
    y = causal_conv3d(*leaves)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, dy)
    assert found[0]._base is found[3]._base is not None
    x, w, b, context = (t.detach().cpu().double().requires_grad_() for t in leaves)
    plain = functional.conv3d(torch.cat((context, x), 2), w, b)
    for got, want in zip(found, torch.autograd.grad(plain, (x, w, b, context), dy.cpu().double()), strict=True):
        assert_close(got.cpu(), want, 32)


ARGUMENTS = ([1, 1, 1], [1, 1, 0, 0], [1, 1, 1], 1, "zeros", "zeros", None)


@pytest.mark.parametrize("frames", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_opcheck(frames):
    x, w, b = torch.randn(2, 4, 3, 3, 2), torch.randn(2, 4, 3, 2, 1), torch.randn(2)
    context = None if frames is None else torch.randn(2, 4, frames, 3, 2).requires_grad_()
    leaves = (x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), context)
    torch.library.opcheck(torch.ops.triton_conv.causal_conv.default, (*leaves, *ARGUMENTS))


@pytest.mark.slow
def test_opcheck_of_the_fused_one():
    x, w, b, context = (
        torch.randn(2, 4, 3, 3, 2),
        torch.randn(2, 4, 3, 2, 1),
        torch.randn(2),
        torch.randn(2, 4, 2, 3, 2),
    )
    residual = torch.randn(2, 2, 3, 4, 2).requires_grad_()
    arguments = (x.requires_grad_(), w, b, torch.ones(2), residual, context, *ARGUMENTS, "relu", 0.01, False)
    torch.library.opcheck(torch.ops.triton_conv.causal_conv_fused.default, arguments)


def test_compiles_with_its_context():
    layer = nn.CausalConv3d(3, 4, (3, 1, 2), padding=(0, 1), time_mode="replicate")

    def two_chunks(x):
        y, context = layer(x[:, :, :1], return_context=True)
        return torch.cat((y, torch.relu(layer(x[:, :, 1:], context))), dim=2)

    x = torch.randn(1, 3, 4, 2, 3, requires_grad=True)
    compiled = torch.compile(two_chunks, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, two_chunks(x))
    compiled.sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(two_chunks(x).sum(), x)[0])


@pytest.mark.parametrize("dims", [(0, None, None, 0), (0, 0, None, None), (None, 0, 0, 1), (1, None, 0, None)], ids=str)
def test_vmap(dims):
    shapes = ((1, 2, 3, 2, 2), (2, 2, 2, 1, 1), (2,), (1, 2, 1, 2, 2))
    tensors = [
        torch.randn(*shape[: d or 0], 3, *shape[d or 0 :]) if d is not None else torch.randn(shape)
        for shape, d in zip(shapes, dims, strict=True)
    ]
    many = torch.vmap(causal_conv3d, dims)(*tensors)
    for i in range(3):
        one = [t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)]
        torch.testing.assert_close(many[i], causal_conv3d(*one))


def test_autocast_and_fewer_dimensions():
    x, w, context = torch.randn(4, 3, 2, 2), torch.randn(2, 4, 3, 1, 1), torch.randn(4, 2, 2, 2)
    y, following = causal_conv3d(x, w, None, context, return_context=True)
    assert y.shape == (2, 3, 2, 2)
    assert torch.equal(following, x[:, 1:])
    assert torch.equal(y, causal_conv3d(x[None], w, None, context[None])[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert causal_conv3d(x, w, None, context).dtype is torch.bfloat16
    z, after = causal_conv1d(x[:, :, 0, 0], w[..., 0, 0], context=context[:, :, 0, 0], return_context=True)
    torch.testing.assert_close(z, y[:, :, 0, 0])
    assert torch.equal(after, x[:, 1:, 0, 0])


def test_context_is_the_other_name_of_initial_state():
    x, w, state = torch.randn(2, 3, 5), torch.randn(3, 4), torch.randn(2, 3, 3)
    y, after = causal_conv1d(x, w, context=state, return_context=True)
    want = causal_conv1d(x, w, initial_state=state, return_final_state=True)
    assert torch.equal(y, want[0])
    assert torch.equal(after, want[1])
    dense = torch.randn(2, 3, 4)
    assert torch.equal(causal_conv1d(x, dense, initial_state=state), causal_conv1d(x, dense, context=state))
    with pytest.raises(TypeError, match="two names of one argument"):
        causal_conv1d(x, w, initial_state=state, context=state)
    with pytest.raises(TypeError, match=r"stride is for weights \(K, C / groups, S\)"):
        causal_conv1d(x, w, stride=2)
    with pytest.raises(TypeError, match="an activation is for weights"):
        causal_conv1d(x, dense, None, "silu")


def test_modules_take_the_parameters_of_torch():
    ours = nn.CausalConv3d(4, 6, (3, 3, 1), (1, 2, 1), (1, 0), groups=2, padding_mode=("reflect", "zeros"))
    theirs = torch.nn.Conv3d(4, 6, (3, 3, 1), groups=2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 4, 3, 5, 2)
    want = expected(x, theirs.weight, theirs.bias, None, (1, 2, 1), (1, 0), 1, 2, ("reflect", "zeros"))
    assert_close(ours(x), want, 36)
    assert "time_mode=replicate" in repr(nn.CausalConv1d(4, 6, 3, time_mode="replicate"))
    with pytest.raises(ValueError, match="time_mode"):
        nn.CausalConv1d(4, 6, 3, time_mode="circular")
    with pytest.raises(RuntimeError, match="a list of 2 values"):
        nn.CausalConv3d(4, 6, 3, padding=(2, 1, 1))


X, W = (1, 4, 3, 5, 5), (2, 4, 3, 3, 3)
ERRORS = [
    ({"context": torch.zeros(1, 4, 2, 5, 4)}, RuntimeError, r"context \[1, 4, 2, 5, 4\], x \[1, 4, 3, 5, 5\]"),
    ({"context": torch.zeros(4, 2, 5, 5)}, RuntimeError, "expected context with 5 dimensions"),
    ({"context": torch.zeros(1, 4, 2, 5, 5).double()}, RuntimeError, "expected context of torch.float32"),
    ({"context": 3}, TypeError, "'context' must be Tensor, not int"),
    ({"context": torch.zeros(1, 4, 2, 5, 5, device="meta")}, RuntimeError, "same device"),
    ({"x": torch.zeros(1, 4, 0, 5, 5)}, RuntimeError, "expected x to have a frame"),
    ({"x": torch.zeros(5, 5)}, RuntimeError, "Expected 4D .* or 5D .* x to causal_conv3d"),
    ({"x": torch.zeros(X, dtype=torch.int32)}, NotImplementedError, "x .* has dtype torch.int32"),
    ({"weight": torch.zeros(2, 4, 3)}, RuntimeError, "expected a 5-dimensional weight"),
    ({"bias": torch.zeros(3)}, RuntimeError, "expected bias to be 1-dimensional with 2 elements"),
    ({"context": torch.zeros(1, 4, 0, 5, 5), "dilation": (2, 1, 1)}, RuntimeError, "Kernel size can't be greater"),
    ({"time_mode": "circular"}, ValueError, "time_mode must be one of"),
    ({"padding": (1, 1, 1)}, RuntimeError, "expected padding to be a single value or a list of 2"),
    ({"padding_mode": "constant"}, ValueError, "padding_mode must be one of"),
    ({"padding": 5, "padding_mode": "reflect"}, RuntimeError, "Padding size should be less"),
    ({"return_context": 1}, TypeError, "'return_context' must be bool"),
    ({"stride": (7, 1, 1), "return_context": True}, RuntimeError, "leave out 2 frames"),
    ({"precision": "fp8"}, ValueError, "precision must be"),
    ({"activation": "tanh"}, ValueError, "activation must be None or one of"),
    ({"residual": torch.zeros(X)}, RuntimeError, "expected residual of the output's size"),
    ({"scale": torch.zeros(3)}, RuntimeError, "expected scale to be 1-dimensional with 2 elements"),
]


@pytest.mark.parametrize(("given", "error", "words"), ERRORS, ids=[words for *_, words in ERRORS])
def test_errors(given, error, words):
    arguments = {"x": torch.zeros(X), "weight": torch.zeros(W), **given}
    with pytest.raises(error, match=words):
        causal_conv3d(**arguments)


def test_nothing_of_nothing(kernels):
    w, b = torch.randn(2, 3, 3, 1, 1, device=kernels), torch.randn(2, device=kernels)
    assert causal_conv3d(torch.empty(0, 3, 4, 2, 2, device=kernels), w, b).shape == (0, 2, 4, 2, 2)
    y = causal_conv3d(torch.empty(1, 0, 2, 1, 1, device=kernels), w[:, :0], b)
    assert torch.equal(y.flatten(1), b.repeat_interleave(2)[None])


def test_plans_say_what_happens():
    shapes = (1, 384, 4, 60, 104), (384, 384, 3, 3, 3)
    options = {"dtype": torch.bfloat16, "context": 2, "padding": 1, "bias": True}
    made = streaming.plans(*shapes, channels_last=True, **options)
    forward = made["forward"]
    assert (forward.kernel, forward.packs, forward.workspace_bytes) == ("box", (), 0)
    assert made["input gradient"].asked.input == made["weight gradient"].asked.input == (6, 60, 104)
    assert isinstance(made["weight gradient"], plan.Plan)
    assert "context 2 frames" in str(forward)
    assert "concatenated for the weight gradient" in str(forward)
    assert 0 < forward.roofline.seconds < forward.seconds
    copied = streaming.plans(*shapes, channels_last=False, **options)["forward"]
    assert copied.packs == ("x", "context", "w") if copied.kernel == "box" else copied.packs == ()
    fused = streaming.plans(*shapes, channels_last=True, activation="silu", residual="after", scale=True, **options)
    assert "epilogue   scale, bias, silu, residual" in str(fused["forward"])
    old = streaming.plans(*shapes, channels_last=True, device=DEVICES["A100"], **options)["forward"]
    assert old.kernel == "gather"


def test_large_videos_have_wide_offsets():
    made = [
        streaming.plans((1, 96, frames, 480, 832), (96, 96, 3, 3, 3), channels_last=True, padding=1, context=context)
        for frames, context in ((4, 2), (81, 2), (1, 81))
    ]
    assert [p["forward"].numerics.index_bits for p in made] == [32, 64, 64]


def test_explicit_configs_that_cannot_run_are_refused():
    x, w = torch.empty(1, 16, 2, 4, 4, device="meta"), torch.empty(16, 16, 3, 3, 3, device="meta")
    call = streaming_ops.call_of(x, w, None, None, *ARGUMENTS)
    problem = streaming_ops.problem_of(call, None, execute._empty_like_output(call), DEVICES["H200"])
    for tiles, words in (
        (BoxConfig((1, 1, 2, 8), 16, 16), "float32 as ieee has no box kernel"),
        (BoxConfig((1, 2, 1, 8), 16, 16), "more than one frame"),
    ):
        wanted = problem._replace(dtype="bfloat16") if "frame" in words else problem._replace(precision="ieee")
        with config.explicit({Role.FPROP: tiles}), pytest.raises(RuntimeError, match=words):
            streaming_plan.make(wanted)


def test_examples():
    for module in (streaming, causal_nn, causal):
        found = doctest.testmod(
            module, extraglobs={"torch": torch, "triton_conv": triton_conv, "plans": streaming.plans}
        )
        assert found.attempted > found.failed == 0


# ---------------------------------------------------------------------------------------------------------------------
# Code


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_both_loops_are_pipelined_and_nothing_spills(arch):
    """Boxes have a loop for the context and one for x; their dots read both operands from shared memory."""
    found = compiled("streaming", str(arch))
    assert {name: faults for name, (_, _, faults) in found.items() if faults} == {}
    for name, (kernel, ahead, _) in found.items():
        assert kernel == ("gather" if arch < 90 or name == "reflect" else "box")
        assert len(ahead) == (2 if kernel == "box" else 1)


@pytest.mark.slow
def test_sizes_of_chunks_contexts_and_images_compile_few_kernels():
    """A box kernel once more for each shape of box that images of these sizes want."""
    counts = compiled("frames")
    assert counts["gather"] == 1
    assert counts["box"] <= 2
