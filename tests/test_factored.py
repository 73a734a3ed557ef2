"""Separable modules are the plain composition of their parts."""

import copy
import doctest
import inspect
import pickle
from collections import OrderedDict

import pytest
import torch
from heard import convolutions
from test_models import assert_same, step
from tolerance import assert_close
from torch import nn
from torch.nn.utils import parametrizations

import triton_conv
from triton_conv import factored
from triton_conv import nn as ours

DEPTHWISE = ["DepthwiseSeparableConv1d", "DepthwiseSeparableConv2d", "DepthwiseSeparableConv3d"]
EXTENTS = (7, 6, 5)


def sample(rank, C=4, dtype=torch.float64, batch=(2,)):
    torch.manual_seed(1)
    return torch.randn(*batch, C, *EXTENTS[:rank], dtype=dtype)


def padded(x, pairs, modes):
    """With the border that a convolution of torch's does not have."""
    for axis, (pair, mode) in enumerate(zip(pairs, modes, strict=True)):
        flat = [0] * (2 * (len(pairs) - 1 - axis)) + list(pair)
        x = nn.functional.pad(x, flat + [0] * (2 * len(pairs) - len(flat)), "constant" if mode == "zeros" else mode)
    return x


def plain(rank, C, K, taps, multiplier=1, bias=True, depthwise_bias=False, **options):
    """Of torch's modules."""
    cls = getattr(nn, f"Conv{rank}d")
    depthwise = cls(C, C * multiplier, taps, groups=C, bias=depthwise_bias, **options)
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=cls(C * multiplier, K, 1, bias=bias)))


CASES = [
    ({}, {}),
    ({"bias": False}, {"bias": False}),
    ({"depthwise_bias": True}, {"depthwise_bias": True}),
    ({"depth_multiplier": 3, "stride": 2}, {"multiplier": 3, "stride": 2}),
    ({"padding": "same", "dilation": 2, "padding_mode": "circular"},) * 2,
    ({"padding": 1, "padding_mode": "reflect", "stride": 2},) * 2,
]


@pytest.mark.parametrize("name", DEPTHWISE)
@pytest.mark.parametrize(("options", "theirs"), CASES, ids=[str(ours) for ours, _ in CASES])
def test_depthwise_separable_is_the_composition(name, options, theirs):
    rank = int(name[-2])
    torch.manual_seed(0)
    expected = plain(rank, 4, 6, 3, **theirs).double()
    torch.manual_seed(0)
    module = getattr(ours, name)(4, 6, 3, **options).double()
    assert module.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[key], value)  # initialised alike
    (y, gradients), (z, wanted) = step(module, sample(rank)), step(expected, sample(rank))
    assert_same([y, *gradients], [z, *wanted], 1e-12)
    assert_same([module(sample(rank, batch=()))], [expected(sample(rank, batch=()))], 1e-12)


def test_padding_pairs_and_modes_of_each_axis():
    modes, pairs = ("replicate", "zeros"), ((2, 0), (1, 3))
    module = ours.DepthwiseSeparableConv2d(4, 6, 3, padding=pairs, padding_mode=modes).double()
    theirs = plain(2, 4, 6, 3).double()
    theirs.load_state_dict(module.state_dict())
    assert_same([module(sample(2))], [theirs(padded(sample(2), pairs, modes))], 1e-12)


@pytest.mark.parametrize(
    ("rank", "dtype", "fused"),
    [(1, torch.float32, None), (2, torch.bfloat16, None), (2, torch.bfloat16, True), (3, torch.float32, True)],
)
def test_depthwise_separable_kernels(rank, dtype, fused, kernels, poisoned):
    torch.manual_seed(0)
    module = getattr(ours, f"DepthwiseSeparableConv{rank}d")(4, 6, 3, padding=1, fused=fused).to(dtype)
    theirs = plain(rank, 4, 6, 3, padding=1).double()
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(1, 4, *(3, 3, 3)[:rank], dtype=dtype)
    between = theirs.depthwise(x.double()).to(dtype).double()  # rounded, as two convolutions round it
    with torch.no_grad():
        y = module.to(kernels)(x.to(kernels)).cpu()
    assert_close(y, theirs.pointwise(between), 4 + 27)


def test_one_operator_for_inference_and_two_for_training():
    module, x = ours.DepthwiseSeparableConv2d(4, 6, 3), sample(2, dtype=torch.float32)
    assert convolutions(module, x) == ["triton_conv::conv"] * 2
    with torch.no_grad():
        assert convolutions(module, x) == ["triton_conv::conv_separable"]


@pytest.mark.parametrize("part", ["depthwise", "pointwise"])
def test_parts_that_do_more_than_their_parameters_say_are_called(part):
    module, x = ours.DepthwiseSeparableConv2d(4, 6, 3).double(), sample(2)
    before = module(x)
    handle = getattr(module, part).register_forward_hook(lambda m, args, y: 2 * y)
    bias = module.pointwise.bias.view(-1, 1, 1)
    expected = 2 * before if part == "pointwise" else 2 * (before - bias) + bias
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
    handle.remove()

    class Halved(ours.Conv2d):
        def forward(self, x):
            return super().forward(x) / 2

    getattr(module, part).__class__ = Halved
    with torch.no_grad():
        torch.testing.assert_close(module(x), before / 2 if part == "pointwise" else (before - bias) / 2 + bias)


def test_parametrized_parts():
    module, x = ours.DepthwiseSeparableConv2d(4, 6, 3).double(), sample(2)
    before = module(x)
    parametrizations.weight_norm(module.depthwise)
    torch.testing.assert_close(module(x), before)
    with torch.no_grad():
        module.depthwise.parametrizations.weight.original0 *= 2
        bias = module.pointwise.bias.view(-1, 1, 1)
        torch.testing.assert_close(module(x), 2 * (before - bias) + bias)


def test_fuse_sees_the_parts():
    model = nn.Sequential(ours.DepthwiseSeparableConv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU6()).double().eval()
    x = sample(2)
    report = triton_conv.fuse(model)
    assert {c.name: c.parts for c in report.convolutions} == {
        "0.depthwise": (),
        "0.pointwise": ("batch norm 1", "relu6"),
    }
    torch.testing.assert_close(report.model(x), model(x))


# ---------------------------------------------------------------------------------------------------------------------
# Spatially separable


def whole(module):
    """The filters that a column and a row make together."""
    return torch.einsum("mcru,kmvs->kcrs", module.vertical.weight, module.horizontal.weight)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"middle_channels": 3, "bias": False},
        {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2)},
        {"padding": (1, 2), "stride": 2},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 4, "padding": "valid"},
    ],
    ids=str,
)
def test_spatially_separable_is_one_convolution_with_filters_of_low_rank(options):
    options = {"kernel_size": (3, 5)} | options
    module = ours.SpatiallySeparableConv2d(4, 6, **options).double()
    middle = options.pop("middle_channels", 6)
    assert module.vertical.weight.shape[:2] == (middle, 4)
    expected = nn.Conv2d(4, 6, **options).double()
    with torch.no_grad():
        expected.weight.copy_(whole(module))
        if expected.bias is not None:
            expected.bias.copy_(module.horizontal.bias)
    assert_same([module(sample(2))], [expected(sample(2))], 1e-12)


def test_padding_pairs_and_modes_of_columns_and_rows():
    modes, pairs = ("reflect", "circular"), ((2, 0), (1, 3))
    module = ours.SpatiallySeparableConv2d(4, 6, 3, padding=pairs, padding_mode=modes).double()
    x = padded(sample(2), pairs, modes)
    expected = nn.functional.conv2d(x, whole(module), module.horizontal.bias)
    torch.testing.assert_close(module(sample(2)), expected)


def test_a_bias_between():
    module = ours.SpatiallySeparableConv2d(4, 6, 3, padding=1, middle_bias=True).double()
    theirs = nn.Sequential(nn.Conv2d(4, 6, (3, 1), padding=(1, 0)), nn.Conv2d(6, 6, (1, 3), padding=(0, 1))).double()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), module.state_dict().values(), strict=True)))
    (y, gradients), (z, wanted) = step(module, sample(2)), step(theirs, sample(2))
    assert_same([y, *gradients], [z, *wanted], 1e-12)


def test_spatially_separable_kernels(kernels, poisoned):
    torch.manual_seed(0)
    module = ours.SpatiallySeparableConv2d(3, 4, 3, padding=1).float()
    x = sample(2, 3, torch.float32, (1,))
    expected = nn.functional.conv2d(x.double(), whole(module).double(), module.horizontal.bias.double(), padding=1)
    y = module.to(kernels)(x.to(kernels))
    assert_close(y.cpu(), expected, 9 + 12)


# ---------------------------------------------------------------------------------------------------------------------
# All of them

ALL = [*DEPTHWISE, "SpatiallySeparableConv2d"]


def made(name, **options):
    return getattr(ours, name)(4, 6, 3, padding=1, **options)


@pytest.mark.parametrize("name", ALL)
def test_gradients(name):
    rank = int(name[-2])
    module = made(name).double()
    keys, values = zip(*module.named_parameters(), strict=True)

    def function(x, *tensors):
        return torch.func.functional_call(module, dict(zip(keys, tensors, strict=True)), (x,))

    operands = (torch.randn(1, 4, *(3,) * rank, dtype=torch.float64, requires_grad=True), *values)
    assert torch.autograd.gradcheck(function, operands, fast_mode=True)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(name, clone):
    module, x = made(name, precision="ieee").double(), sample(int(name[-2]))
    twin = clone(module)
    assert repr(twin) == repr(module)
    assert torch.equal(twin(x), module(x))
    assert all(m.precision == "ieee" for m in twin.children())


@pytest.mark.parametrize("name", ALL)
def test_dtype_and_device_reach_the_parts(name):
    module = made(name, dtype=torch.float16, device="meta")
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.float16, "meta")}
    assert triton_conv.convert(module).converted == ()


@pytest.mark.parametrize("name", ALL)
def test_arguments_stand_where_torchs_do(name):
    theirs = list(inspect.signature(nn.Conv2d).parameters)
    mine = list(inspect.signature(getattr(ours, name)).parameters)
    assert [n for n in mine if n in theirs] == [n for n in theirs if n != "groups"]
    assert mine.index("dilation") == theirs.index("dilation")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_compiles(name):
    module, x = made(name).double(), sample(int(name[-2]))
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("DepthwiseSeparableConv2d", {"depth_multiplier": 0}, ValueError, "depth_multiplier must be a positive"),
        ("DepthwiseSeparableConv2d", {"padding_mode": "mirror"}, ValueError, "padding_mode"),
        ("DepthwiseSeparableConv2d", {"padding": "same", "stride": 2}, ValueError, "padding='same'"),
        ("SpatiallySeparableConv2d", {"stride": (1, 2, 3)}, RuntimeError, r"expected stride .* 2 values"),
        ("SpatiallySeparableConv2d", {"padding_mode": "mirror"}, ValueError, "padding_mode"),
        ("SpatiallySeparableConv2d", {"padding": "full"}, ValueError, "padding string"),
    ],
)
def test_wrong_arguments(name, options, error, words):
    with pytest.raises(error, match=words):
        getattr(ours, name)(4, 6, 3, **options)


@pytest.mark.parametrize("name", ALL)
def test_scripting_says_what_to_use(name):
    with pytest.raises(RuntimeError, match=rf"triton_conv\.nn\.{name} cannot be compiled by torch\.jit\.script"):
        torch.jit.script(made(name))


def test_documented_examples():
    result = doctest.testmod(factored, extraglobs={"torch": torch, "triton_conv": triton_conv})
    assert (result.attempted > 10, result.failed) == (True, 0)
