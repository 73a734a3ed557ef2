"""Depthwise-separable convolutions, in one kernel and in two: values, gradients, choice, transforms, errors."""

from functools import partial

import pytest
import torch
from halves import half_of
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import triton_conv
from triton_conv import cli, config, separable_plan
from triton_conv.geometry import ConvGeometry
from triton_conv.plan import dense_strides
from triton_conv.tuning import audit
from triton_conv.tuning.audit import faults
from triton_conv.tuning.code import TARGETS

FUNCTIONS = {1: triton_conv.separable_conv1d, 2: triton_conv.separable_conv2d, 3: triton_conv.separable_conv3d}
H200 = config.DEVICES["H200"]


def operands(spatial, taps, C=6, E=None, K=5, N=2, dtype=torch.float32, channels_last=False, bias=True):
    torch.manual_seed(0)
    E, rank = E or C, len(spatial)
    x, depthwise = torch.randn(N, C, *spatial, dtype=torch.float64), torch.randn(E, 1, *taps, dtype=torch.float64)
    pointwise = torch.randn(K, E, *(1,) * rank, dtype=torch.float64)
    biases = [torch.randn(n, dtype=torch.float64) if bias else None for n in (E, K)]
    found = [None if t is None else t.to(dtype) for t in (x, depthwise, pointwise, *biases)]
    if channels_last:
        formats = {2: torch.channels_last, 3: torch.channels_last_3d}
        found[0] = found[0].contiguous(memory_format=formats[rank]) if rank > 1 else found[0].mT.contiguous().mT
    return found


def expected(x, depthwise, pointwise, depthwise_bias, bias, padding=0, mode="zeros", **options):
    """By PyTorch in float64, what lies between rounded to the dtype of x."""
    rank, wide = x.dim() - 2, [None if t is None else t.double() for t in (x, depthwise, pointwise)]
    biases = [None if b is None else b.double() for b in (depthwise_bias, bias)]
    pairs = [
        (p, p) if isinstance(p, int) else p for p in (padding if isinstance(padding, tuple) else (padding,) * rank)
    ]
    flat = [p for pair in reversed(pairs) for p in pair]
    padded = functional.pad(wide[0], flat, mode="constant" if mode == "zeros" else mode)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    between = convolve(padded, wide[1], biases[0], groups=x.shape[1], **options).to(x.dtype).double()
    return convolve(between, wide[2], biases[1])


def close(y, wanted, dtype):
    # rounding what lies between may fall to either side: one unit of it, times a filter of E elements
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), wanted, rtol=4 * eps, atol=100 * max(eps, 2**-45 if eps < 1e-9 else 2**-23))


CASES = {
    "2-D": {"spatial": (9, 8), "taps": (3, 3), "padding": 1},
    "2-D channels-last": {"spatial": (9, 8), "taps": (3, 3), "padding": 1, "C": 16, "K": 24, "channels_last": True},
    "stride and dilation": {"spatial": (11, 10), "taps": (3, 5), "padding": 2, "stride": (2, 1), "dilation": (1, 2)},
    "asymmetric": {"spatial": (5, 6), "taps": (2, 4), "padding": ((1, 0), (3, 1))},
    "1-D": {"spatial": (50,), "taps": (7,), "padding": 3},
    "1-D channels-last": {"spatial": (40,), "taps": (4,), "padding": ((3, 0),), "channels_last": True, "C": 8},
    "3-D": {"spatial": (4, 5, 6), "taps": (3, 2, 3), "padding": 1},
    "3-D channels-last": {"spatial": (3, 4, 4), "taps": (3, 1, 1), "padding": ((2, 0), 0, 0), "channels_last": True},
    "reflect": {"spatial": (6, 7), "taps": (3, 3), "padding": 2, "mode": "reflect"},
    "circular": {"spatial": (6, 7), "taps": (3, 3), "padding": 1, "mode": "circular", "channels_last": True},
    "replicate": {"spatial": (6, 7), "taps": (3, 3), "padding": 2, "mode": "replicate"},
    "two filters a channel": {"spatial": (6, 5), "taps": (3, 3), "padding": 1, "C": 5, "E": 10},
    "no bias": {"spatial": (6, 5), "taps": (3, 3), "bias": False},
    "many channels": {"spatial": (5, 5), "taps": (3, 3), "C": 70, "K": 150, "padding": 1, "channels_last": True},
    "one pixel": {"spatial": (3, 3), "taps": (3, 3), "N": 1, "C": 1, "K": 1},
}
SHAPES = ("spatial", "taps", "C", "E", "K", "N", "channels_last", "bias")


WAYS = [(d, True) for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)] + [(torch.bfloat16, False)]


@pytest.mark.parametrize(("name", "way"), half_of(CASES, WAYS))
def test_values(name, way, kernels, poisoned, launched):
    dtype, fused = way
    case = CASES[name]
    tensors = operands(**{k: v for k, v in case.items() if k in SHAPES}, dtype=dtype)
    options = {k: v for k, v in case.items() if k not in SHAPES}
    wanted = expected(*tensors, **options)
    options["padding_mode"] = options.pop("mode", "zeros")
    on_device = [None if t is None else t.to(kernels) for t in tensors]
    y = FUNCTIONS[len(case["spatial"])](*on_device, **options, fused=fused)
    close(y.cpu(), wanted, dtype)
    assert ("separable" in launched) is fused


def test_views_and_filters_in_any_layout(kernels, poisoned):
    x, depthwise, pointwise, first, second = operands((8, 7), (3, 3), C=8, K=6)
    wide = torch.full((2, 10, 12, 9), torch.nan)
    wide[:, 1:9, 2:10, 1:8] = x
    window = wide.to(kernels)[:, 1:9, 2:10, 1:8]
    filters = depthwise.to(kernels).to(memory_format=torch.channels_last)
    turned = pointwise.to(kernels).transpose(0, 1).contiguous().transpose(0, 1)
    y = triton_conv.separable_conv2d(window, filters, turned, first.to(kernels), second.to(kernels), fused=True)
    close(y.cpu(), expected(x, depthwise, pointwise, first, second), torch.float32)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("fused", [True, False, None])
def test_output_lies_as_two_convolutions_leave_it(fused, channels_last, kernels):
    x, depthwise, pointwise, *_ = (t.to(kernels) for t in operands((5, 6), (3, 3), channels_last=channels_last))
    between = triton_conv.conv2d(x, depthwise, groups=6)
    wanted = triton_conv.conv2d(between, pointwise)
    assert triton_conv.separable_conv2d(x, depthwise, pointwise, fused=fused).stride() == wanted.stride()


def test_an_unbatched_input_and_an_empty_one():
    _, depthwise, pointwise, *_ = operands((5, 6), (3, 3))
    assert triton_conv.separable_conv2d(torch.randn(6, 5, 6), depthwise, pointwise).shape == (5, 3, 4)
    assert triton_conv.separable_conv2d(torch.randn(0, 6, 5, 6), depthwise, pointwise, fused=True).shape == (0, 5, 3, 4)


class Operators(TorchDispatchMode):
    """The names of the package's operators that run within it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "triton_conv":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [True, False, None])
def test_one_operator_for_inference_and_two_for_training(fused):
    tensors = operands((5, 6), (3, 3))
    with Operators() as ran:
        triton_conv.separable_conv2d(*tensors, fused=fused)
    assert ran.names == ["conv_separable"]
    tensors[2].requires_grad_()
    with Operators() as ran:
        triton_conv.separable_conv2d(*tensors, fused=fused)
    assert ran.names == ["conv", "conv"]
    with Operators() as ran, torch.no_grad():
        triton_conv.separable_conv2d(*tensors, fused=fused)
    assert ran.names == ["conv_separable"]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients(rank):
    tensors = operands((4,) * rank, (3,) * rank, C=2, E=4, K=3, N=1, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in tensors]
    function = partial(FUNCTIONS[rank], padding=1, stride=2, fused=True)
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("batched", range(5), ids=["input", "depthwise", "pointwise", "depthwise_bias", "bias"])
@pytest.mark.parametrize("dim", [0, -1])
def test_vmap(batched, dim):
    tensors = operands((5, 6), (3, 3))
    many = torch.stack([tensors[batched], 2 * tensors[batched], -tensors[batched]], dim)
    dims = [dim if i == batched else None for i in range(5)]
    function = partial(triton_conv.separable_conv2d, fused=True, dilation=2)
    found = torch.vmap(function, tuple(dims))(*[many if i == batched else t for i, t in enumerate(tensors)])
    for i, y in enumerate(found):
        one = many.select(dim, i)
        torch.testing.assert_close(y, function(*[one if k == batched else t for k, t in enumerate(tensors)]))


def test_transforms_and_autocast():
    x, *rest = operands((5, 6), (3, 3))
    function = partial(triton_conv.separable_conv2d, fused=True)
    grads = torch.func.grad(lambda w: function(x, rest[0], w, *rest[2:]).square().sum())(rest[1])
    w = rest[1].clone().requires_grad_()
    function(x, rest[0], w, *rest[2:]).square().sum().backward()
    torch.testing.assert_close(grads, w.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert function(x, *rest).dtype is torch.bfloat16


@pytest.mark.parametrize("training", [False, True])
def test_the_operator_is_what_pytorch_expects(training):
    tensors = operands((5, 6), (3, 3))
    if training:
        tensors = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(
        torch.ops.triton_conv.conv_separable.default, (*tensors, [1, 1], [1, 1, 1, 1], [1, 1], "zeros", None, True)
    )


def test_compiles_to_the_same():
    tensors = operands((5, 6), (3, 3))
    function = partial(triton_conv.separable_conv2d, padding=1, fused=True)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), function(*tensors))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depthwise": (6, 2, 3, 3)}, "expected depthwise of size|expected input"),
        ({"depthwise": (7, 1, 3, 3)}, "multiple of the input.s 6 channels"),
        ({"pointwise": (5, 6, 3, 1)}, r"pointwise of size \(K, E, 1, ...\)"),
        ({"pointwise": (5, 7, 1, 1)}, r"pointwise of size \(K, E, 1, ...\)"),
        ({"depthwise_bias": (5,)}, "bias to be 1-dimensional with 6 elements"),
        ({"bias": (6,)}, "bias to be 1-dimensional with 5 elements"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_shapes_that_do_not_fit(change, words, training):
    shapes = {"input": (2, 6, 5, 5), "depthwise": (6, 1, 3, 3), "pointwise": (5, 6, 1, 1)} | change
    tensors = {name: torch.randn(shape).requires_grad_(training) for name, shape in shapes.items()}
    with pytest.raises(RuntimeError, match=words):
        triton_conv.separable_conv2d(**tensors)


def test_what_the_fused_kernel_does_not_do(kernels):
    x, depthwise, pointwise, *_ = (t.to(kernels) for t in operands((4, 12), (1, 9)))
    with pytest.raises(RuntimeError, match="unrolls at most 7 columns"):
        triton_conv.separable_conv2d(x, depthwise, pointwise, fused=True)
    assert triton_conv.separable_conv2d(x, depthwise, pointwise).shape == (2, 5, 4, 4)
    with pytest.raises(RuntimeError, match="no sums of int32"):
        triton_conv.separable_conv2d(x.int(), depthwise.int(), pointwise.int(), fused=True)
    with pytest.raises(TypeError, match="'fused' must be bool or None, not str"):
        triton_conv.separable_conv2d(x, depthwise, pointwise, fused="yes")
    with pytest.raises(RuntimeError, match="pointwise type"):
        triton_conv.separable_conv2d(x, depthwise, pointwise.half())


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def planned(N, C, image, K, taps=3, stride=1, dtype="bfloat16", channels_last=True, device=H200):
    g = ConvGeometry.forward(
        (N, C, image, image), (C, 1, taps, taps), (stride, stride), ((taps // 2, taps // 2),) * 2, (1, 1), C
    )
    x, y = (dense_strides(shape, channels_last) for shape in (g.shape("x"), (N, K, *g.output)))
    filters, mixing = dense_strides(g.shape("w"), False), dense_strides((K, C, 1, 1, 1), False)
    return separable_plan.make(separable_plan.Problem(g, K, dtype, "ieee", x, filters, mixing, y, True, True, device))


def test_what_lies_between_is_left_out_of_the_roofline():
    p = planned(32, 128, 56, 128)
    image = 32 * 56 * 56 * 128 * 2
    assert p.roofline.bytes == 2 * image + 2 * (128 * 9 + 128 * 128)
    assert p.roofline.limit == "memory bandwidth"
    assert sum(part.roofline.bytes for part in p.apart) == p.roofline.bytes + 2 * image


def test_fused_only_where_predicted_and_measured(monkeypatch):
    p = planned(128, 64, 112, 64)
    assert not p.worth_it
    monkeypatch.setattr(separable_plan, "MEASURED", frozenset({H200.name}))
    assert not p.worth_it  # predicted to take longer
    monkeypatch.setitem(vars(p), "seconds", 0.79 * sum(part.seconds for part in p.apart))
    assert p.worth_it
    monkeypatch.setattr(separable_plan, "MEASURED", frozenset())
    assert not p.worth_it


def test_channels_in_several_tiles_are_summed_again_for_each():
    one, four = (planned(128, 512, 14, K).prediction.loop_seconds for K in (128, 512))
    assert 3 < four / one < 5


def test_the_choice_is_the_plans(kernels, launched, monkeypatch):
    tensors = [t.to(kernels) for t in operands((5, 6), (3, 3))]
    triton_conv.separable_conv2d(*tensors)
    assert "separable" not in launched
    monkeypatch.setattr(separable_plan.SeparablePlan, "worth_it", True)
    triton_conv.separable_conv2d(*tensors)
    assert launched[-1] == "separable"


def test_offsets_are_as_wide_as_the_tensors_are_large():
    assert planned(2, 64, 56, 64).numerics.index_bits == 32
    assert planned(4096, 256, 56, 64).numerics.index_bits == 64


def test_a_plan_says_what_it_is_and_why():
    text = str(planned(32, 128, 56, 128))
    assert "kernel     separable" in text
    assert "us of two kernels; not measured on NVIDIA H200" in text


@pytest.mark.parametrize("arch", TARGETS)
def test_tiles_fit_every_device(arch):
    for dtype in separable_plan.DTYPES:
        assert planned(8, 64, 28, 64, dtype=dtype, device=TARGETS[arch]).prediction.resident >= 1


def test_explain_shows_one_kernel_and_two(capsys):
    command = "explain 32x128x56x56 128x1x3x3 --pointwise 256 --padding 1 --dtype bfloat16 --channels-last"
    assert cli.main(command.split()) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("separable convolution 32x128x56x56, depthwise 128x1x3x3, pointwise 256 bfloat16")
    titles = [line for line in printed.splitlines() if line in ("both in one kernel", "depthwise", "pointwise")]
    assert titles == ["both in one kernel", "depthwise", "pointwise"]
    assert printed.count("predicted, not measured") == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--transposed", "--pointwise: does not go with --transposed"),
        ("--groups 2", "as many groups as channels"),
        ("--dtype int32", "no sums of int32"),
    ],
)
def test_explain_says_what_does_not_fit(options, words, capsys):
    assert cli.main(f"explain 2x8x9x9 8x1x3x3 --pointwise 4 {options}".split()) == 2
    assert words in capsys.readouterr().err


def test_the_fused_kernel_has_wide_loads_and_a_matrix_instruction():
    subjects = [s for s in audit.shipped(90) if s.layer == "separable" and s.plan.kernel == "separable"]
    rows = [row for _, found in audit.audit(subjects, 90, jobs=1) for row in found]
    assert rows
    assert [faults(row) for row in rows] == [[] for _ in rows]
    assert all(row.wanted.wide_loads and row.wanted.matrix == "HGMMA" for row in rows)
