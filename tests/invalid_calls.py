"""Random wrong calls: one argument, or two, of a right one replaced by a value that may not fit.

What PyTorch says of the same call, or of the plain convolutions a function is made of, is what ours has to say.
"""

import enum
import operator
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import triton_conv
from triton_conv import Branch


class Case(NamedTuple):
    """A function with arguments that are right.

    kinds: what may become of each argument, a key of MUTANTS. theirs: the same by PyTorch, which is asked about the
    arguments in `shared`; of the others errors are any of the three that a wrong argument may raise.
    """

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any] | None
    arguments: dict[str, Any]
    kinds: dict[str, str]
    rank: int
    shared: frozenset[str]


class Index:
    """What operator.index takes."""

    def __init__(self, value: int):
        self.value = value

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"Index({self.value})"


class Once(NamedTuple):
    """An iterator, made anew for every call."""

    entries: Sequence[Any]


class UnaskedError(Exception):
    """PyTorch could not be asked."""


class Number(int):
    """A subclass of int."""


class Choice(enum.IntEnum):
    ONE = 1
    TWO = 2


NUMBERS = (0, -1, -(2**62), 3, 7, 2**45, 2**46 + 1, 2**62, 2**63 - 1, 2**63, -(2**63) - 1)
ODD = (True, False, 1.0, 2.5, float("nan"), None, "1", "", b"1", 1j, Fraction(1), Number(1), Number(2), Choice.ONE)
ODD += (Choice.TWO, Index(1), {1}, {1: 1}, object(), np.int64(1), np.int32(2), np.uint8(1), np.bool_(True), slice(1))
ODD += (np.float32(1), np.array(1), np.array([1]), np.array([1, 1]), torch.int64, len)


def _whole(rng: random.Random, rank: int) -> Any:
    tensors = (torch.tensor(1), torch.tensor([1]), torch.tensor(True), torch.tensor(1.0), torch.tensor([1, 1, 1, 1]))
    return rng.choice((*NUMBERS, *ODD, *tensors))


def _wholes(rng: random.Random, rank: int) -> Any:
    if rng.random() < 0.5:
        return _whole(rng, rank)
    length = rng.choice((rank, rank, 0, 1, 2, 3, 4, 5))
    entries = [rng.choice((1, 2)) for _ in range(length)]
    if entries and rng.random() < 0.7:
        entries[rng.randrange(length)] = _whole(rng, rank)
    return rng.choice((tuple, list, Once, torch.Size, np.array))(entries) if _plain(entries) else tuple(entries)


def _plain(entries: Sequence[Any]) -> bool:
    return all(type(e) is int and abs(e) < 2**62 for e in entries)


def _padding(rng: random.Random, rank: int) -> Any:
    if rng.random() < 0.2:
        return rng.choice(("same", "valid", "SAME", "zeros"))
    return _wholes(rng, rank)


def _text(rng: random.Random, rank: int) -> Any:
    return rng.choice(("", "relu", "Relu", "silu", "zeros", "zeros,zeros", "ieee", *ODD, ("zeros",) * 2, torch.ones(2)))


def _truth(rng: random.Random, rank: int) -> Any:
    return rng.choice((0, 1, "yes", *ODD, torch.tensor(True)))


def _number(rng: random.Random, rank: int) -> Any:
    return rng.choice((2, -1.5, float("inf"), 10**400, *ODD, torch.tensor(1.0), torch.ones(2)))


def _dtype(rng: random.Random, rank: int) -> Any:
    return rng.choice((torch.float64, torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool, *ODD))


DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64)
DTYPES += (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16)


def _tensor(rng: random.Random, t: Any, rank: int) -> Any:
    """Another tensor or none."""
    t = torch.ones(3) if t is None else t
    return rng.choice(
        (
            lambda: rng.choice((None, 1, 1.0, "x", [1.0], [[1.0]], np.ones(3), object(), t.shape, ())),
            lambda: t.to(rng.choice(DTYPES)),
            lambda: t.to("meta"),
            lambda: t.unsqueeze(rng.randrange(t.dim() + 1)),
            t.flatten,
            lambda: t[0] if t.dim() and t.shape[0] else t.unsqueeze(0),
            lambda: (
                t.narrow(axis := rng.randrange(t.dim()), 0, rng.randrange(t.shape[axis] or 1)) if t.dim() else t[None]
            ),
            lambda: torch.cat((t, t), rng.randrange(t.dim())) if t.dim() else t[None],
            lambda: t.float().to_sparse(),
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            lambda: t.transpose(0, -1),
        )
    )()


MUTANTS: dict[str, Callable[[random.Random, int], Any]] = {
    "int": _whole,
    "ints": _wholes,
    "padding": _padding,
    "text": _text,
    "bool": _truth,
    "truth": lambda rng, rank: rng.choice((True, False, 0, 1, None, "", "no", 2.5, object())),
    "float": _number,
    "dtype": _dtype,
}
CONVOLUTION = {"input": "tensor", "weight": "tensor", "bias": "tensor", "stride": "ints", "padding": "padding"}
CONVOLUTION |= {"dilation": "ints", "groups": "int"}
EPILOGUE = {"activation": "text", "negative_slope": "float", "residual": "tensor", "scale": "tensor"}
EPILOGUE |= {"residual_after_activation": "bool"}


def _operands(rng: random.Random, rank: int, transposed: bool) -> dict[str, Any]:
    groups, channels, filters = rng.choice(((1, 2, 3), (1, 1, 2), (2, 4, 4), (3, 3, 3)))
    taps = tuple(rng.choice((1, 2, 3)) for _ in range(rank))
    extents = tuple(rng.choice((4, 5, 6)) for _ in range(rank))
    batch = rng.choice(((), (1,), (2,), (0,)))
    torch.manual_seed(rng.randrange(2**31))
    shape = (channels, filters // groups) if transposed else (filters, channels // groups)
    bias = torch.randn(filters if not transposed else shape[1] * groups)
    return {
        "input": torch.randn(*batch, channels, *extents),
        "weight": torch.randn(*shape, *taps),
        "bias": rng.choice((None, bias)),
        "stride": rng.choice((1, 1, 2, (2,) * rank)),
        "padding": rng.choice((0, 1, (1,) * rank)),
        "dilation": rng.choice((1, 1, (2,) * rank)) if max(taps) < 3 else 1,
        "groups": groups,
    }


def _plain_convolution(rng: random.Random) -> Case:
    rank = rng.choice((1, 2, 3))
    name = f"conv{rank}d"
    return Case(
        name,
        getattr(triton_conv, name),
        getattr(functional, name),
        _operands(rng, rank, False),
        CONVOLUTION,
        rank,
        frozenset(CONVOLUTION),
    )


def _transposed_convolution(rng: random.Random) -> Case:
    rank = rng.choice((1, 2, 3))
    name, kinds = f"conv_transpose{rank}d", CONVOLUTION | {"output_padding": "ints"}
    given = _operands(rng, rank, True) | {"output_padding": 0}
    return Case(name, getattr(triton_conv, name), getattr(functional, name), given, kinds, rank, frozenset(kinds))


def _fused_convolution(rng: random.Random) -> Case:
    case = rng.choice((_plain_convolution, _transposed_convolution))(rng)
    given = dict(case.arguments)
    y = case.theirs(**given)
    given["activation"] = rng.choice((None, "relu", "leaky_relu", "silu"))
    given["negative_slope"] = rng.choice((0.01, 0.5, 1))
    given["residual"] = rng.choice((None, torch.randn(y.shape)))
    given["residual_after_activation"] = rng.choice((False, True))
    given["scale"] = rng.choice((None, torch.randn(y.shape[-case.rank - 1])))
    given |= {"padding_mode": "zeros", "precision": rng.choice((None, "ieee", "tf32"))}

    def theirs(activation, negative_slope, residual, residual_after_activation, scale, padding_mode, precision, **rest):
        sums = case.theirs(**rest)  # with its bias, which is checked
        if residual is not None and residual.shape != sums.shape:
            raise RuntimeError("a residual has the output's shape")
        bias = rest["bias"] if scale is not None else None
        sums = sums if bias is None else case.theirs(**rest | {"bias": None})
        channels = (-1, *(1,) * case.rank)
        sums = sums if scale is None else sums * scale.view(channels)
        sums = sums if bias is None else sums + bias.view(channels)
        before, after = (None, residual) if residual_after_activation and activation else (residual, None)
        sums = sums if before is None else sums + before
        function = {None: lambda t: t, "relu": functional.relu, "silu": functional.silu}.get(activation)
        sums = function(sums) if function else functional.leaky_relu(sums, negative_slope)
        return sums if after is None else sums + after

    kinds = case.kinds | EPILOGUE | {"padding_mode": "text", "precision": "text"}
    return Case(case.name, case.ours, theirs, given, kinds, case.rank, case.shared)


def _scaled_convolution(rng: random.Random) -> Case:
    rank = rng.choice((1, 2, 3))
    name, given = f"scaled_conv{rank}d", _operands(rng, rank, False)
    given |= {a: given[a].to(torch.float8_e4m3fn) for a in ("input", "weight")}
    given |= {"scale_a": torch.ones(()), "scale_b": torch.ones(1), "out_dtype": torch.float32, "padding_mode": "zeros"}

    def theirs(input, weight, scale_a, scale_b, out_dtype, padding_mode, **rest):
        return getattr(functional, f"conv{rank}d")(input.float(), weight.float(), **rest)

    kinds = CONVOLUTION | {"scale_a": "tensor", "scale_b": "tensor", "out_dtype": "dtype", "padding_mode": "text"}
    shared = frozenset(("stride", "padding", "dilation", "groups"))
    return Case(name, getattr(triton_conv, name), theirs, given, kinds, rank, shared)


def _int_convolution(rng: random.Random) -> Case:
    rank = rng.choice((1, 2, 3))
    name, given = f"int_conv{rank}d", _operands(rng, rank, False)
    given |= {a: (10 * given[a]).to(torch.int8) for a in ("input", "weight")}
    given["bias"] = None if given["bias"] is None else given["bias"].to(torch.int32)

    def theirs(input, weight, bias, **rest):
        bias = None if bias is None else bias.double()
        return getattr(functional, f"conv{rank}d")(input.double(), weight.double(), bias, **rest).int()

    shared = frozenset(("stride", "padding", "dilation", "groups"))
    return Case(name, getattr(triton_conv, name), theirs, given, CONVOLUTION, rank, shared)


def _separable_convolution(rng: random.Random) -> Case:
    rank = rng.choice((1, 2, 3))
    name, given = f"separable_conv{rank}d", _operands(rng, rank, False)
    C = given["input"].shape[-rank - 1]
    taps = given.pop("weight").shape[2:]
    given |= {"depthwise": torch.randn(2 * C, 1, *taps), "pointwise": torch.randn(3, 2 * C, *(1,) * rank)}
    given |= {"bias": rng.choice((None, torch.randn(3))), "depthwise_bias": rng.choice((None, torch.randn(2 * C)))}
    given |= {"padding_mode": "zeros", "precision": None, "fused": rng.choice((None, False))}
    del given["groups"]

    def theirs(input, depthwise, pointwise, depthwise_bias, bias, padding_mode, precision, fused, **rest):
        conv = getattr(functional, f"conv{rank}d")
        return conv(conv(input, depthwise, depthwise_bias, groups=input.shape[-rank - 1], **rest), pointwise, bias)

    kinds = {a: kind for a, kind in CONVOLUTION.items() if a not in ("weight", "groups")}
    kinds |= dict.fromkeys(("depthwise", "pointwise", "depthwise_bias"), "tensor")
    kinds |= {"padding_mode": "text", "precision": "text", "fused": "bool"}
    shared = frozenset(("stride", "padding", "dilation"))
    return Case(name, getattr(triton_conv, name), theirs, given, kinds, rank, shared)


def _causal_convolution(rng: random.Random) -> Case:
    B, C, L, W = rng.choice((1, 2, 0)), rng.choice((1, 3)), rng.choice((1, 5)), rng.choice((1, 2, 4))
    given = {"x": torch.randn(B, C, L), "weight": torch.randn(C, W), "bias": rng.choice((None, torch.randn(C)))}
    given["activation"] = rng.choice((None, "silu"))
    kinds = {"x": "tensor", "weight": "tensor", "bias": "tensor", "activation": "text"}
    if rng.random() < 0.4:
        given["state"] = torch.randn(B, C, W - 1)
        ours: Any = triton_conv.causal_conv1d_update
        return Case("causal_conv1d_update", ours, None, given, kinds | {"state": "tensor"}, 1, frozenset())
    given["initial_state"] = rng.choice((None, torch.randn(B, C, W - 1)))
    given["return_final_state"] = rng.choice((False, True))
    given |= {"stride": 1, "dilation": 1, "groups": 1, "time_mode": "zeros", "precision": None}
    kinds |= {"initial_state": "tensor", "return_final_state": "bool", "stride": "ints", "dilation": "ints"}
    kinds |= {"groups": "int", "time_mode": "text", "precision": "text"}
    return Case("causal_conv1d", triton_conv.causal_conv1d, None, given, kinds, 1, frozenset())


def _chunked_convolution(rng: random.Random) -> Case:
    given = _operands(rng, rank := rng.choice((1, 3)), False)
    given["x"], reach = given.pop("input"), given["weight"].shape[2] - 1
    given["bias"] = None if given["bias"] is None else given["bias"]
    given["stride"], given["dilation"] = 1, 1
    shape = list(given["x"].shape)
    shape[-rank] = reach
    given["context"] = rng.choice((None, torch.randn(shape)))
    given |= {"time_mode": "zeros", "return_context": False, "precision": None}
    kinds = {a: kind for a, kind in CONVOLUTION.items() if a != "input"} | {"x": "tensor", "context": "tensor"}
    kinds |= {"time_mode": "text", "return_context": "bool", "precision": "text"}
    if rank == 1:
        del given["padding"], kinds["padding"]
    else:
        given |= {"padding": rng.choice((0, 1)), "padding_mode": "zeros", "activation": None, "negative_slope": 0.01}
        given |= {"residual": None, "scale": None, "residual_after_activation": False}
        kinds |= EPILOGUE | {"padding_mode": "text"}
    function = triton_conv.causal_conv1d if rank == 1 else triton_conv.causal_conv3d

    def theirs(x, weight, bias, context, stride, dilation, groups, time_mode, return_context, precision, **rest):
        step = dilation[0] if isinstance(dilation, (tuple, list)) and dilation else dilation
        if context is None and isinstance(step, (int, Index, np.integer)) and 0 < operator.index(step) < 100:
            shape[-rank] = (weight.shape[2] - 1) * operator.index(step)
        elif context is None and isinstance(step, int) and step >= 100:
            raise UnaskedError
        before = x.new_zeros(shape) if context is None else context
        pads = rest.get("padding", 0)
        spatial = {} if rank == 1 else {"padding": (0, pads, pads)}
        whole = torch.cat((before, x), -rank)
        return getattr(functional, f"conv{rank}d")(
            whole, weight, bias, stride, dilation=dilation, groups=groups, **spatial
        )

    shared = frozenset(("stride", "dilation", "groups"))
    return Case(function.__name__, function, theirs, given, kinds, rank, shared)


def _deformable_convolution(rng: random.Random) -> Case:
    given = _operands(rng, 2, False)
    del given["groups"]
    if given["input"].dim() == 3:
        given["input"] = given["input"].unsqueeze(0)
    kinds = {a: kind for a, kind in CONVOLUTION.items() if a != "groups"} | {"offset": "tensor", "mask": "tensor"}
    groups = given["input"].shape[1] // given["weight"].shape[1]
    how = {a: given[a] for a in ("stride", "padding", "dilation")}
    y = functional.conv2d(given["input"], given["weight"], **how, groups=groups)
    taps = given["weight"].shape[2] * given["weight"].shape[3]
    given["offset"] = torch.zeros(y.shape[0], 2 * taps, *y.shape[2:])
    given["mask"] = rng.choice((None, torch.ones(y.shape[0], taps, *y.shape[2:])))
    given["precision"] = None

    def theirs(input, offset, weight, mask, precision, **rest):
        y = functional.conv2d(input, weight, groups=groups, **rest)
        if y.shape[2:] != offset.shape[2:]:
            raise RuntimeError("an offset has the output's extents")
        return y

    kinds["precision"] = "text"
    shared = frozenset(("stride", "padding", "dilation"))
    return Case("deform_conv2d", triton_conv.deform_conv2d, theirs, given, kinds, 2, shared)


def _branched_convolution(rng: random.Random) -> Case:
    given = _operands(rng, 2, False)
    given |= {"channels": None, "combine": "concatenate", "one_launch": None, "precision": None}
    names = ("weight", "bias", "stride", "padding", "dilation", "groups", "channels")

    def ours(input, combine, one_launch, precision, **branch):
        branches = [Branch(*(branch[a] for a in names))] * 2
        return triton_conv.multi_conv2d(input, branches, combine=combine, one_launch=one_launch, precision=precision)

    def theirs(input, combine, one_launch, precision, channels, **rest):
        return torch.cat([functional.conv2d(input, **rest)] * 2, -3)

    kinds = CONVOLUTION | {"channels": "ints", "combine": "text", "one_launch": "bool", "precision": "text"}
    return Case("multi_conv2d", ours, theirs, given, kinds, 2, frozenset(CONVOLUTION))


def _module(rng: random.Random) -> Case:
    rank, transposed, lazy = rng.choice((1, 2, 3)), rng.choice((False, True)), rng.random() < 0.2
    name = f"{'Lazy' if lazy else ''}Conv{'Transpose' if transposed else ''}{rank}d"
    x = torch.randn(2, 4, *(6,) * rank)
    given = {"in_channels": 4, "out_channels": 6, "kernel_size": 2, "stride": 1, "padding": 1, "dilation": 1}
    given |= {"groups": rng.choice((1, 2)), "bias": True, "padding_mode": "zeros", "dtype": None}
    kinds = {"in_channels": "int", "out_channels": "int", "kernel_size": "ints", "stride": "ints", "bias": "truth"}
    kinds |= {"padding": "padding", "dilation": "ints", "groups": "int", "padding_mode": "text", "dtype": "dtype"}
    if transposed:
        given["output_padding"], kinds["output_padding"] = 0, "ints"
    if lazy:
        del given["in_channels"], kinds["in_channels"]

    def called(cls):
        def call(**arguments):
            torch.manual_seed(0)
            return cls(**arguments)(x)

        return call

    ours, theirs = called(getattr(triton_conv.nn, name)), called(getattr(torch.nn, name))
    return Case(f"nn.{name}", ours, theirs, given, kinds, rank, frozenset(kinds))


def _own_module(rng: random.Random) -> Case:
    """Modules that torch.nn has not, and options that its modules have not."""
    nn, x = triton_conv.nn, torch.randn(2, 4, 6, 6)
    shape = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
    options: dict[Any, tuple[dict[str, Any], dict[str, str], Any]] = {
        nn.Conv2d: (
            shape | {"precision": None, "activation": "relu", "negative_slope": 0.1, "scale": True},
            {"precision": "text", "activation": "text", "negative_slope": "float", "scale": "bool"},
            lambda m: m(x),
        ),
        nn.ConvTranspose2d: (
            shape | {"precision": None, "activation": "relu", "negative_slope": 0.1, "scale": True},
            {"precision": "text", "activation": "text", "negative_slope": "float", "scale": "bool"},
            lambda m: m(x),
        ),
        nn.DeformConv2d: (
            shape | {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "bias": True, "precision": None},
            {**_MODULE, "precision": "text", "bias": "truth"},
            lambda m: m(x, torch.zeros(2, 18, 6, 6)),
        ),
        nn.ModulatedDeformConv2d: (
            shape | {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "bias": True, "offset_groups": 1},
            {**_MODULE, "offset_groups": "int", "modulation": "text", "bias": "truth"},
            lambda m: m(x),
        ),
        nn.CausalConv3d: (
            shape | {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "time_mode": "zeros", "precision": None},
            {**_MODULE, "time_mode": "text", "padding_mode": "text", "precision": "text"},
            lambda m: m(x.unsqueeze(2)),
        ),
        nn.CausalConv1d: (
            shape | {"stride": 1, "dilation": 1, "groups": 1, "time_mode": "zeros", "precision": None},
            {a: kind for a, kind in _MODULE.items() if a != "padding"} | {"time_mode": "text", "precision": "text"},
            lambda m: m(x[..., 0]),
        ),
        nn.DepthwiseSeparableConv2d: (
            shape | {"stride": 1, "padding": 1, "dilation": 1, "depth_multiplier": 1, "fused": None},
            {a: kind for a, kind in _MODULE.items() if a != "groups"}
            | {"depth_multiplier": "int", "fused": "bool", "depthwise_bias": "truth"},
            lambda m: m(x),
        ),
        nn.SpatiallySeparableConv2d: (
            shape | {"stride": 1, "padding": 1, "dilation": 1, "middle_channels": None},
            {a: kind for a, kind in _MODULE.items() if a != "groups"}
            | {"middle_channels": "int", "middle_bias": "truth"},
            lambda m: m(x),
        ),
    }
    cls = rng.choice(list(options))
    given, kinds, forward = options[cls]

    def ours(**arguments):
        return forward(cls(**arguments))

    return Case(f"nn.{cls.__name__}", ours, None, given, kinds, 2, frozenset())


_MODULE = {"in_channels": "int", "out_channels": "int", "kernel_size": "ints", "stride": "ints", "padding": "padding"}
_MODULE |= {"dilation": "ints", "groups": "int"}

FAMILIES: dict[str, Callable[[random.Random], Case]] = {
    "conv": _plain_convolution,
    "conv_transpose": _transposed_convolution,
    "fused": _fused_convolution,
    "scaled_conv": _scaled_convolution,
    "int_conv": _int_convolution,
    "separable_conv": _separable_convolution,
    "causal_conv1d": _causal_convolution,
    "causal chunks": _chunked_convolution,
    "deform_conv2d": _deformable_convolution,
    "multi_conv2d": _branched_convolution,
    "torch's modules": _module,
    "own modules": _own_module,
}


def wrong_call(family: str, seed: int) -> tuple[Case, dict[str, Any], tuple[str, ...]]:
    """A case, arguments that may be wrong, and which of them differ from the case's."""
    rng = random.Random(f"{family} {seed}")
    case = FAMILIES[family](rng)
    given = dict(case.arguments)
    changed = tuple(rng.sample(list(case.kinds), rng.choice((1, 1, 1, 2))))
    for argument in changed:
        kind = case.kinds[argument]
        if kind == "tensor":
            given[argument] = _tensor(rng, given[argument], case.rank)
        else:
            given[argument] = MUTANTS[kind](rng, case.rank)
    return case, given, changed


def described(case: Case, given: dict[str, Any], changed: Sequence[str]) -> str:
    """A call as one line, what was changed first."""

    def text(value: Any) -> str:
        if not isinstance(value, Tensor):
            return repr(value)
        if value.is_nested:
            return "nested"
        kind = "" if value.layout is torch.strided else f" {value.layout}"
        return f"{list(value.shape)} {value.dtype} {value.device}{kind}"

    first = ", ".join(f"{a}={text(given[a])}" for a in changed)
    rest = ", ".join(f"{a}={text(v)}" for a, v in given.items() if a not in changed)
    return f"{case.name}({first} | {rest})"


WRONG = (TypeError, ValueError, RuntimeError)  # what a wrong argument may raise; NotImplementedError is a RuntimeError


def _made(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """What a call returns or raises."""
    try:
        made = function(**{a: iter(v.entries) if isinstance(v, Once) else v for a, v in given.items()})
        return made[0] if isinstance(made, tuple) else made
    except Exception as error:
        return error


# Bugs of PyTorch's parser, which it asks to report; convolutions that its CPU backends have not, or one of them has;
# and exceptions that say what memory there is not.
EXCUSED = (
    "INTERNAL ASSERT",
    "Could this error message be improved",
    "non-empty 2D or 4D weight",
    "non-empty 5D",
    "could not create a primitive",
)
NO_MEMORY = ("calculation overflowed", "can't allocate memory", "could not create a primitive")
NO_MEMORY += ("iteration over a 0-d",)  # what constructors of torch's say of padding


def fault(family: str, seed: int) -> str:
    """What is wrong with what a random wrong call of ours does; "" if nothing is."""
    case, given, changed = wrong_call(family, seed)
    ours = _made(case.ours, given)
    refused = isinstance(ours, Exception)
    why = ""
    if refused and (not isinstance(ours, WRONG) or isinstance(ours, RecursionError)):
        why = "not an exception for wrong arguments"
    theirs = _made(case.theirs, given) if case.theirs else UnaskedError()
    if not why and not isinstance(theirs, UnaskedError) and set(changed) <= case.shared and not _mixed(case, given):
        why = _different(case, given, changed, ours, theirs)
    if not why and refused and not _names(case, str(ours)) and str(ours)[:80] != str(theirs)[:80]:
        why = "names no argument"
    return f"{why}: {family} {seed}, {described(case, given, changed)}: {ours!r}" if why else ""


def _mixed(case: Case, given: dict[str, Any]) -> bool:
    """Whether PyTorch does not look at what these are: devices of meta tensors, anything about empty ones.

    Without input channels it has no output channels either.
    """
    tensors = [t for t in given.values() if isinstance(t, Tensor) and not t.is_nested]
    empty = any(t.numel() == 0 for t in tensors)
    alike = len({(t.dtype, t.layout) for t in tensors}) == 1 and all(0 not in t.shape[1:] for t in tensors)
    return len({t.device for t in tensors}) > 1 or (empty and not alike)


def _different(case: Case, given: dict[str, Any], changed: Sequence[str], ours: Any, theirs: Any) -> str:
    if isinstance(theirs, Exception) and any(words in str(theirs) for words in EXCUSED):
        return ""
    if not isinstance(theirs, Exception):
        if isinstance(ours, Exception):
            return "" if _unseen(given, changed, ours, theirs) else "PyTorch accepts this"
        same = ours.shape == theirs.shape and ours.dtype == theirs.dtype
        if same and not ours.is_meta:
            same = torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2, equal_nan=True)
        return "" if same else "other values than PyTorch's"
    if not isinstance(ours, Exception):
        return "" if isinstance(given.get("padding_mode"), tuple) else f"PyTorch raises {theirs!r}"
    # of two wrong arguments either may be complained about
    alone = (_made(case.theirs, case.arguments | {a: given[a]}) for a in changed) if len(changed) > 1 else ()
    allowed = tuple({type(e) for e in (theirs, *alone) if isinstance(e, Exception)})
    stumbled = isinstance(theirs, NotImplementedError) and "not implemented for" in str(theirs)
    if stumbled or any(isinstance(t, Tensor) and t.layout is not torch.strided for t in given.values()):
        allowed += (RuntimeError,)  # PyTorch's depends on which operator stumbles
    return "" if isinstance(ours, allowed) else f"PyTorch raises {theirs!r}"


def _unseen(given: dict[str, Any], changed: Sequence[str], ours: Exception, theirs: Tensor) -> bool:
    """Whether what is wrong is what PyTorch does not look at, or one of its backends does not.

    That is anything about empty tensors, a sum beyond 64 bits, another dtype of a bias, no dilation of a single tap.
    """
    beyond = any(abs(n) >= 2**62 for a in changed for n in _flat(given[a]))
    none = "dilation" in changed and "dilation" in str(ours)
    return theirs.numel() == 0 or beyond or none or "should be the same" in str(ours) or "has dtype" in str(ours)


def _flat(value: Any) -> list[int]:
    entries = value if isinstance(value, (tuple, list)) else [value]
    return [e for e in entries if isinstance(e, int)]


def _names(case: Case, message: str) -> bool:
    """Whether a message names an argument, or says that there is not so much memory."""
    words = re.findall(r"\w+", message)
    return any(a in words for a in (*case.kinds, "input", "weight", "offset")) or any(
        text in message for text in NO_MEMORY
    )
