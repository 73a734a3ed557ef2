"""Calls of the public functions that are right, and what PyTorch has in their place."""

import operator
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from invalid_arguments import Index
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


class UnaskedError(Exception):
    """PyTorch could not be asked."""


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


def plain_convolution(rng: random.Random) -> Case:
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


def transposed_convolution(rng: random.Random) -> Case:
    rank = rng.choice((1, 2, 3))
    name, kinds = f"conv_transpose{rank}d", CONVOLUTION | {"output_padding": "ints"}
    given = _operands(rng, rank, True) | {"output_padding": 0}
    return Case(name, getattr(triton_conv, name), getattr(functional, name), given, kinds, rank, frozenset(kinds))


def fused_convolution(rng: random.Random) -> Case:
    case = rng.choice((plain_convolution, transposed_convolution))(rng)
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


def scaled_convolution(rng: random.Random) -> Case:
    rank = rng.choice((1, 2, 3))
    name, given = f"scaled_conv{rank}d", _operands(rng, rank, False)
    given |= {a: given[a].to(torch.float8_e4m3fn) for a in ("input", "weight")}
    given |= {"scale_a": torch.ones(()), "scale_b": torch.ones(1), "out_dtype": torch.float32, "padding_mode": "zeros"}

    def theirs(input, weight, scale_a, scale_b, out_dtype, padding_mode, **rest):
        return getattr(functional, f"conv{rank}d")(input.float(), weight.float(), **rest)

    kinds = CONVOLUTION | {"scale_a": "tensor", "scale_b": "tensor", "out_dtype": "dtype", "padding_mode": "text"}
    shared = frozenset(("stride", "padding", "dilation", "groups"))
    return Case(name, getattr(triton_conv, name), theirs, given, kinds, rank, shared)


def int_convolution(rng: random.Random) -> Case:
    rank = rng.choice((1, 2, 3))
    name, given = f"int_conv{rank}d", _operands(rng, rank, False)
    given |= {a: (10 * given[a]).to(torch.int8) for a in ("input", "weight")}
    given["bias"] = None if given["bias"] is None else given["bias"].to(torch.int32)

    def theirs(input, weight, bias, **rest):
        bias = None if bias is None else bias.double()
        return getattr(functional, f"conv{rank}d")(input.double(), weight.double(), bias, **rest).int()

    shared = frozenset(("stride", "padding", "dilation", "groups"))
    return Case(name, getattr(triton_conv, name), theirs, given, CONVOLUTION, rank, shared)


def separable_convolution(rng: random.Random) -> Case:
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


def causal_convolution(rng: random.Random) -> Case:
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


def chunked_convolution(rng: random.Random) -> Case:
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


def deformable_convolution(rng: random.Random) -> Case:
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


def branched_convolution(rng: random.Random) -> Case:
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


def bordered_convolution(rng: random.Random) -> Case:
    """With borders made of the input, which may have too few positions for them."""
    case = plain_convolution(rng)
    rank, mode = case.rank, rng.choice(("reflect", "replicate", "circular"))

    def theirs(padding_mode, padding, input, **rest):
        for side in _sides(padding):
            case.theirs(input=input, padding=side, **rest)  # for what PyTorch says of the numbers
        return case.theirs(input=_bordered(input, padding, rank, padding_mode, **rest), **rest)

    kinds = case.kinds | {"padding": "border", "padding_mode": "text"}
    return Case(case.name, case.ours, theirs, case.arguments | {"padding_mode": mode}, kinds, rank, case.shared)


def bordered_video(rng: random.Random) -> Case:
    """A chunk with borders of rows and columns, after a context."""
    given = _operands(rng, 3, False)
    x, weight = given.pop("input"), given["weight"]
    context = torch.randn(*x.shape[:-3], weight.shape[2] - 1, *x.shape[-2:])
    mode = rng.choice(("reflect", "replicate", "circular"))
    given |= {"x": x, "context": context, "padding": 1, "padding_mode": mode, "stride": 1, "dilation": 1}

    def theirs(x, context, padding, padding_mode, **rest):
        for side in _sides(padding):
            still = {"stride": 1} | {a: rest[a] for a in ("weight", "bias", "groups")}
            for i in range(x.shape[-3]):
                frame = {a: v[:, :, 0] if a == "weight" else v for a, v in still.items()}
                functional.conv2d(x[..., i, :, :], padding=side, **frame)
        whole = torch.cat((context, x), -3)
        return functional.conv3d(_bordered(whole, padding, 2, padding_mode, **rest), **rest)

    kinds = {a: kind for a, kind in CONVOLUTION.items() if a != "input"} | {"x": "tensor", "context": "tensor"}
    kinds |= {"padding": "border", "padding_mode": "text"}
    return Case("causal_conv3d", triton_conv.causal_conv3d, theirs, given, kinds, 3, frozenset(("padding",)))


def _sides(padding: Any) -> list[Any]:
    """Padding as PyTorch knows it: for what is below, and for what is above."""
    if not isinstance(padding, (tuple, list)) or not any(isinstance(p, tuple) for p in padding):
        return [padding]
    return [tuple(p[side] if isinstance(p, tuple) else p for p in padding) for side in (0, 1)]


def _bordered(x, padding, rank, mode, weight, dilation, **_):
    """x with its border, by torch.nn.functional.pad."""
    if isinstance(padding, str):
        dilations = dilation if isinstance(dilation, (tuple, list)) else [dilation] * rank
        totals = [d * (n - 1) * (padding == "same") for d, n in zip(dilations, weight.shape[-rank:], strict=False)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [side if isinstance(side, (tuple, list)) else [side] for side in _sides(padding)]
        sides = [[*side] * (rank if len(side) == 1 else 1) for side in sides]
        pairs = list(zip(sides[0], sides[-1], strict=True))
    border = [operator.index(p) for pair in pairs[::-1] for p in pair]
    if max(map(abs, border)) > 2**50:
        raise UnaskedError  # it crashes the process
    return functional.pad(x, border + [0] * (2 * (weight.dim() - 2 - rank)), mode=mode)


def overridden_convolution(rng: random.Random) -> Case:
    """torch.nn.functional's own, sent to ours."""
    case = rng.choice((plain_convolution, transposed_convolution))(rng)

    def ours(**arguments):
        with triton_conv.override():
            return case.theirs(**arguments)

    return case._replace(name=f"override {case.name}", ours=ours)


def overridden_operator(rng: random.Random) -> Case:
    """torch.ops.aten's, whose arguments modes see before torch does."""
    case = rng.choice((plain_convolution, transposed_convolution))(rng)
    rank, packet = case.rank, getattr(torch.ops.aten, case.name)
    operator_of = rng.choice((packet, getattr(packet, packet.overloads()[0])))
    given = dict(case.arguments)
    for argument in ("stride", "padding", "dilation", "output_padding"):
        if isinstance(given.get(argument), int):
            given[argument] = (given[argument],) * rank

    def ours(**arguments):
        with triton_conv.override():
            return operator_of(**arguments)

    def theirs(**arguments):
        if any(isinstance(a, Iterator) for a in arguments.values()):
            raise UnaskedError  # it may be read once for each overload
        return operator_of(**arguments)

    return Case(f"aten {case.name}", ours, theirs, given, case.kinds, rank, case.shared)
