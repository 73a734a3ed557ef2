"""Modules made and called as is right, and what torch.nn has in their place."""

import random
from typing import Any

import torch
from invalid_functions import Case

import triton_conv

_MODULE = {"in_channels": "int", "out_channels": "int", "kernel_size": "ints", "stride": "ints", "padding": "padding"}
_MODULE |= {"dilation": "ints", "groups": "int"}


def of_torch(rng: random.Random) -> Case:
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


def of_ours(rng: random.Random) -> Case:
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
