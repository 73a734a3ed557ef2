"""Wrong calls raise what PyTorch raises, and say which argument of which shapes is wrong."""

import numpy as np
import pytest
import torch
from heard import raised
from torch.nn import functional
from torch.testing._internal.common_methods_invocations import op_db

import triton_conv

RANKS = (1, 2, 3)
FORWARD = [f"conv{rank}d" for rank in RANKS]
TRANSPOSED = [f"conv_transpose{rank}d" for rank in RANKS]


def check(name, tensors, kwargs, *words):
    """Both raise, ours an instance of PyTorch's type, and our message has all the words."""
    theirs = raised(getattr(functional, name), *tensors, **kwargs)
    assert theirs is not None, "PyTorch accepts this"
    check_ours(type(theirs), name, tensors, kwargs, *words)


def check_ours(kind, name, tensors, kwargs, *words):
    ours = raised(getattr(triton_conv, name), *tensors, **kwargs)
    assert isinstance(ours, kind), f"expected {kind.__name__}, got {ours!r}"
    missing = [word for word in map(str, words) if word not in str(ours)]
    assert not missing, f"{missing} not in the message: {ours}"


def operands(name):
    """input (2, 4, 6...), weight (4, 4, 3...), bias (4): good for every one of the six."""
    rank = int(name[-2])
    torch.manual_seed(0)
    return torch.randn(2, 4, *(6,) * rank), torch.randn(4, 4, *(3,) * rank), torch.randn(4)


def test_the_operands_of_these_tests_are_valid():
    for name in FORWARD + TRANSPOSED:
        for bias in (True, False):
            tensors = operands(name) if bias else operands(name)[:2]
            torch.testing.assert_close(getattr(triton_conv, name)(*tensors), getattr(functional, name)(*tensors))


# ---------------------------------------------------------------------------------------------------------------------
# Parameters

WRONG_TYPES = {
    "float": lambda rank: 1.0,
    "str": lambda rank: "1",
    "True": lambda rank: True,
    "False": lambda rank: False,
    "None": lambda rank: None,
    "floats": lambda rank: (1.0,) * rank,
    "bools": lambda rank: (True,) * rank,
    "Nones": lambda rank: [None] * rank,
    "strs": lambda rank: ("1",) * rank,
    "set": lambda rank: {1},
    "dict": lambda rank: {1: 1},
    "object": lambda rank: object(),
    "float tensor": lambda rank: torch.tensor(1.0),
    "tensors": lambda rank: torch.ones(rank + 1, dtype=torch.int64),
    "array": lambda rank: np.ones(rank + 1, dtype=np.int64),
    "numpy float": lambda rank: np.float64(1.0),
}
PARAMETERS = [(name, "stride") for name in FORWARD + TRANSPOSED]
PARAMETERS += [(name, "padding") for name in FORWARD + TRANSPOSED]
PARAMETERS += [(name, "dilation") for name in FORWARD + TRANSPOSED]
PARAMETERS += [(name, "output_padding") for name in TRANSPOSED]
GROUPS = [(name, "groups") for name in FORWARD + TRANSPOSED]


@pytest.mark.parametrize("wrong", WRONG_TYPES)
@pytest.mark.parametrize(("name", "argument"), PARAMETERS + GROUPS)
def test_parameters_of_the_wrong_type(name, argument, wrong):
    value = WRONG_TYPES[wrong](int(name[-2]))
    check(name, operands(name), {argument: value}, argument)


@pytest.mark.parametrize("value", [(1,), [1], torch.Size([1])], ids=repr)
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_groups_is_one_number(name, value):
    check(name, operands(name), {"groups": value}, "groups")


@pytest.mark.parametrize("length", range(6))
@pytest.mark.parametrize(("name", "argument"), PARAMETERS)
def test_parameters_of_the_wrong_length(name, argument, length):
    if length in (1, int(name[-2])):
        pytest.skip("one number stands for every axis")
    check(name, operands(name), {argument: (1,) * length}, argument, (1,) * length)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
@pytest.mark.parametrize(("name", "argument"), PARAMETERS + GROUPS)
def test_parameters_beyond_64_bits(name, argument, value):
    check(name, operands(name), {argument: value}, argument, value)


@pytest.mark.parametrize("value", [0, -1, -5])
@pytest.mark.parametrize(("name", "argument"), [p for p in PARAMETERS + GROUPS if "padding" not in p[1]])
def test_parameters_that_must_be_positive(name, argument, value):
    check(name, operands(name), {argument: value}, argument, value)


@pytest.mark.parametrize(("name", "argument"), PARAMETERS)
def test_one_bad_axis_is_enough(name, argument):
    rank = int(name[-2])
    for axis in range(rank):
        value = [1] * rank
        value[axis] = -1
        check(name, operands(name), {argument: value, **({"stride": 2} if "output" in argument else {})}, argument)


@pytest.mark.parametrize(("name", "argument"), [p for p in PARAMETERS if "padding" in p[1]])
def test_negative_padding(name, argument):
    check(name, operands(name), {argument: -1}, argument, -1)


@pytest.mark.parametrize("value", ["", "SAME", "full", "zeros", "1"])
@pytest.mark.parametrize("name", FORWARD)
def test_unknown_padding_strings(name, value):
    check(name, operands(name), {"padding": value}, "padding", f"'{value}'")


@pytest.mark.parametrize("name", FORWARD)
def test_same_padding_with_a_stride(name):
    check(name, operands(name), {"padding": "same", "stride": 2}, "padding='same'", "stride")


@pytest.mark.parametrize("value", ["same", "valid"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions_take_no_padding_string(name, value):
    check(name, operands(name), {"padding": value}, "padding")


@pytest.mark.parametrize(("stride", "dilation", "extra"), [(1, 1, 1), (2, 1, 2), (1, 2, 2), (3, 2, 3), (2, 3, 5)])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_output_padding_too_large(name, stride, dilation, extra):
    kwargs = {"stride": stride, "dilation": dilation, "output_padding": extra}
    check(name, operands(name), kwargs, "output_padding", extra, "stride", "dilation")


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize("groups", [3, 8])
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_groups_that_do_not_divide_the_channels(name, groups):
    tensors = operands(name)
    check(name, tensors, {"groups": groups}, f"groups={groups}", list(tensors[1].shape))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels", [0, 3, 5, 8])
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_channels_that_do_not_match(name, channels, groups):
    x, w, b = operands(name)
    x = x.new_zeros(2, channels, *x.shape[2:])
    if groups == 2 and name in FORWARD and channels == 8:
        pytest.skip("eight channels in two groups of four fit")
    check(name, (x, w, b), {"groups": groups}, list(x.shape), list(w.shape), "channels")


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), (1, 4), (), (0,), (1,)], ids=str)
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_bias_of_the_wrong_shape(name, shape):
    x, w, _ = operands(name)
    check(name, (x, w, torch.ones(shape)), {}, "bias", list(shape), list(w.shape))


@pytest.mark.parametrize("dims", range(8))
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_inputs_of_the_wrong_rank(name, dims):
    _, w, b = operands(name)
    if dims in (w.dim() - 1, w.dim()):
        pytest.skip("unbatched and batched inputs are right")
    x = torch.ones((2, 4, 6, 6, 6, 6, 6, 6)[:dims])
    check(name, (x, w, b), {}, "input", list(x.shape), name)


@pytest.mark.parametrize("dims", range(7))
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_weights_of_the_wrong_rank(name, dims):
    x, _, b = operands(name)
    if dims == x.dim():
        pytest.skip("this rank is right")
    w = torch.ones((4, 4, 3, 3, 3, 3)[:dims])
    check(name, (x, w, b), {}, "weight", list(w.shape), list(x.shape))


@pytest.mark.parametrize("kwargs", [{}, {"dilation": 4}, {"padding": 1, "dilation": 6}], ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_filters_that_reach_beyond_the_input(name, kwargs):
    x, w, b = operands(name)
    x = x if kwargs else x[..., :2]
    check(name, (x, w, b), kwargs, list(x.shape), list(w.shape), "Kernel size can't be greater than")


@pytest.mark.parametrize("padding", [3, 10])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_outputs_that_are_empty(name, padding):
    x, w, b = operands(name)
    x = x[(..., *[slice(0, 1)] * int(name[-2]))]
    check(name, (x, w, b), {"padding": padding}, "Output size is too small", list(w.shape), "padding", padding)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_images_without_pixels(name, padding):
    x, w, b = operands(name)
    check(name, (x[..., :0], w, b), {"padding": padding}, "input", list(x[..., :0].shape))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_filters_without_taps(name, padding):
    x, w, b = operands(name)
    check(name, (x, w[..., :0], b), {"padding": padding}, "weight", list(w[..., :0].shape))


# ---------------------------------------------------------------------------------------------------------------------
# Operands: type, dtype, device, layout


@pytest.mark.parametrize("wrong", [None, 1, 1.0, "x", [1.0], np.ones(3), object()], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("argument", ["input", "weight", "bias"])
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_operands_that_are_no_tensors(name, argument, wrong):
    if argument == "bias" and wrong is None:
        pytest.skip("no bias is right")
    tensors = dict(zip(("input", "weight", "bias"), operands(name), strict=True))
    tensors[argument] = wrong
    check(name, tensors.values(), {}, f"'{argument}'", type(wrong).__name__)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.complex64])
@pytest.mark.parametrize("argument", ["input", "weight", "bias"])
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_operands_of_different_dtypes(name, argument, dtype):
    tensors = dict(zip(("input", "weight", "bias"), operands(name), strict=True))
    tensors[argument] = tensors[argument].to(dtype)
    theirs = raised(getattr(functional, name), **tensors)
    if isinstance(theirs, NotImplementedError):
        pytest.skip("PyTorch stumbles over the dtype before it compares them")
    check(name, tensors.values(), {}, dtype, torch.float32, "should be the same", list(tensors[argument].shape))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_dtypes_that_do_not_convolve(name, dtype):
    tensors = [t.to(dtype) for t in operands(name)]
    check(name, tensors, {}, "input", dtype, list(tensors[0].shape))


@pytest.mark.parametrize("argument", ["input", "weight", "bias"])
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_operands_on_different_devices(name, argument):
    """PyTorch raises RuntimeError for CPU and CUDA, and for CPU and meta computes garbage."""
    tensors = dict(zip(("input", "weight", "bias"), operands(name), strict=True))
    tensors[argument] = tensors[argument].to("meta")
    words = ("same device", "cpu", "meta", argument if argument != "input" else "weight", list(tensors["input"].shape))
    check_ours(RuntimeError, name, tensors.values(), {}, *words)


@pytest.mark.parametrize("argument", ["input", "weight", "bias"])
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_sparse_operands(name, argument):
    tensors = dict(zip(("input", "weight", "bias"), operands(name), strict=True))
    tensors[argument] = tensors[argument].to_sparse()
    check(name, tensors.values(), {}, argument, "sparse", "to_dense")


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("argument", ["input", "weight", "bias"])
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_quantized_operands(name, argument):
    tensors = dict(zip(("input", "weight", "bias"), operands(name), strict=True))
    tensors[argument] = torch.quantize_per_tensor(tensors[argument], 0.1, 0, torch.qint8)
    check(name, tensors.values(), {}, argument, "quantized", "dequantize")


@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_signatures(name):
    x, w, b = operands(name)
    check(name, (x,), {}, "weight")
    check(name, (x, w, b), {"strides": 1}, "strides")
    check(name, (x, w, b, 1, 0, 1, 1, 1, 1, 1), {})


# ---------------------------------------------------------------------------------------------------------------------
# Borders: what PyTorch has in torch.nn.functional.pad and in the constructors of its modules


def check_pad(kind, rank, input, padding, mode):
    """Our error for `padding` with `mode` is what torch.nn.functional.pad raises."""
    theirs = raised(functional.pad, input, [p for pair in reversed(padding) for p in pair], mode)
    assert isinstance(theirs, kind), theirs
    w = torch.randn(4, 4, *(1,) * rank)
    words = ("padding", padding[0], list(input.shape))
    check_ours(type(theirs), f"conv{rank}d", (input, w), {"padding": padding, "padding_mode": mode}, *words)


@pytest.mark.parametrize("pair", [(6, 6), (6, 0), (0, 6), (9, 1)], ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_reflections_as_wide_as_the_input(rank, pair):
    check_pad(RuntimeError, rank, torch.randn(2, 4, *(6,) * rank), (pair,) * rank, "reflect")


@pytest.mark.parametrize("pair", [(7, 7), (7, 0), (0, 7), (20, 1)], ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_circular_borders_wider_than_the_input(rank, pair):
    check_pad(RuntimeError, rank, torch.randn(2, 4, *(6,) * rank), (pair,) * rank, "circular")


@pytest.mark.parametrize("mode", ["reflect", "circular"])
@pytest.mark.parametrize("rank", RANKS)
def test_transposed_borders_wider_than_the_output(rank, mode):
    x, w = torch.randn(2, 4, *(2,) * rank), torch.randn(4, 4, *(4,) * rank)
    kwargs = {"padding": 2, "padding_mode": mode}
    check_ours(RuntimeError, f"conv_transpose{rank}d", (x, w), kwargs, "(2, 2)", [2, 4, *(1,) * rank])


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
@pytest.mark.parametrize("rank", RANKS)
def test_borders_of_images_without_pixels(rank, mode):
    x, w = torch.randn(2, 4, *(0,) * rank), torch.randn(4, 4, *(1,) * rank)
    assert isinstance(raised(functional.pad, x, (1, 1) * rank, mode), RuntimeError)
    check_ours(RuntimeError, f"conv{rank}d", (x, w), {"padding": 1, "padding_mode": mode}, "input", list(x.shape))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("mode", ["", "constant", "Zeros", "mirror"])
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_unknown_padding_modes(name, mode, padding):
    module = name.title().replace("_", "")[:-1] + "d"
    theirs = raised(getattr(torch.nn, module), 4, 4, 3, padding_mode=mode)
    kwargs = {"padding": padding, "padding_mode": mode}
    check_ours(type(theirs), name, operands(name), kwargs, "padding_mode", repr(mode), "reflect")


@pytest.mark.parametrize("joined", ["zeros,circular", "circular,circular", "zeros,", ","])
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_joined_padding_modes_are_for_the_operators_alone(name, joined):
    rank = int(name[-2])
    for mode in (joined, (joined,) * rank, (*("zeros",) * (rank - 1), joined)):
        check_ours(ValueError, name, operands(name), {"padding": 1, "padding_mode": mode}, repr(joined), "reflect")


@pytest.mark.parametrize("wrong", [None, 1, True, 1.0, (1, 1, 1), object()], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_padding_modes_of_the_wrong_type(name, wrong):
    assert isinstance(raised(functional.pad, operands(name)[0], (1, 1), wrong), TypeError)
    wrong = wrong[: int(name[-2])] if isinstance(wrong, tuple) else wrong
    check_ours(TypeError, name, operands(name), {"padding_mode": wrong}, "padding_mode")


@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_a_wrong_number_of_padding_modes(name):
    rank = int(name[-2])
    for length in {0, rank - 1, rank + 1} - {1}:
        kwargs = {"padding": 1, "padding_mode": ("circular",) * length}
        check_ours(RuntimeError, name, operands(name), kwargs, "padding_mode", ("circular",) * length)


@pytest.mark.parametrize("entry", [(1,), (1, 1, 1), ()], ids=str)
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_padding_pairs_that_are_not_pairs(name, entry):
    check_ours(RuntimeError, name, operands(name), {"padding": (entry,) * int(name[-2])}, "padding", entry)


@pytest.mark.parametrize("entry", [(1, 1.0), ("1", 1), (True, 1), (None, 0)], ids=str)
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_padding_pairs_of_the_wrong_type(name, entry):
    check_ours(TypeError, name, operands(name), {"padding": (entry,) * int(name[-2])}, "padding")


@pytest.mark.parametrize("entry", [(-1, 1), (1, -1)], ids=str)
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_padding_pairs_with_a_negative_side(name, entry):
    check_ours(RuntimeError, name, operands(name), {"padding": (entry,) * int(name[-2])}, "negative padding", entry)


@pytest.mark.parametrize(("wrong", "kind"), [("bf16", ValueError), ("", ValueError), (1, TypeError), (True, TypeError)])
@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_unknown_precisions(name, wrong, kind):
    check_ours(kind, name, operands(name), {"precision": wrong}, "precision")


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's own list

OFFICIAL = [
    pytest.param(op.name.split(".")[-1], case, id=f"{op.name.split('.')[-1]}-{index}")
    for op in op_db
    if op.name.startswith("nn.functional.conv") and op.error_inputs_func is not None
    for index, case in enumerate(op.error_inputs("cpu"))
]


def test_pytorch_has_a_list():
    assert len(OFFICIAL) >= 30


@pytest.mark.parametrize(("name", "case"), OFFICIAL)
def test_error_inputs_of_pytorch(name, case):
    sample = case.sample_input
    ours = raised(getattr(triton_conv, name), sample.input, *sample.args, **sample.kwargs)
    assert isinstance(ours, case.error_type)
    if sample.args[0].dim() == int(name[-2]) + 2:  # of a weight of another rank we say that, not what follows from it
        assert case.error_regex in str(ours)


# ---------------------------------------------------------------------------------------------------------------------
# Errors of the operators themselves, for those who call them directly


def test_gradient_operators_refuse_a_gradient_of_another_shape():
    x, w, _ = operands("conv2d")
    parameters = ((1, 1), (0, 0, 0, 0), (1, 1), 1, "zeros", None)
    for shape in ((2, 4, 5, 4), (2, 3, 4, 4), (1, 4, 4, 4), (2, 4, 4)):
        dy = torch.zeros(shape)
        with pytest.raises(RuntimeError, match="grad_output"):
            torch.ops.triton_conv.conv_dgrad(dy, w, x.shape, *parameters)
        with pytest.raises(RuntimeError, match="grad_output"):
            torch.ops.triton_conv.conv_wgrad(dy, x, w.shape, w.stride(), *parameters)


def test_operators_refuse_unknown_modes_and_a_wrong_number_of_them():
    x, w, _ = operands("conv2d")
    before, after = ((1, 1), (1, 1, 1, 1), (1, 1), 1), (None,)
    calls = {
        "conv": lambda mode: ((x, w, None), (*before, mode, *after)),
        "conv_transpose": lambda mode: ((x, w, None), (*before[:2], (0, 0), 1, (1, 1), mode, *after)),
        "conv_dgrad": lambda mode: ((x, w, x.shape), (*before, mode, *after)),
        "conv_wgrad": lambda mode: ((x, x, w.shape, w.stride()), (*before, mode, *after)),
    }
    for name, arguments in calls.items():
        for mode, kind in (("zeros,zeros,zeros", RuntimeError), ("zeros,mirror", ValueError), ("", ValueError)):
            tensors, parameters = arguments(mode)
            with pytest.raises(kind, match="padding_mode"):
                getattr(torch.ops.triton_conv, name)(*tensors, *parameters)


@pytest.mark.parametrize("name", FORWARD + TRANSPOSED)
def test_errors_are_the_same_on_meta_tensors(name):
    x, w, b = (t.to("meta") for t in operands(name))
    for tensors, kwargs in (((x, w, b), {"stride": 0}), ((x, w, b[:3]), {}), ((x[:, :3], w, b), {})):
        with pytest.raises(RuntimeError):
            getattr(triton_conv, name)(*tensors, **kwargs)
