"""Modules made and called as is right, and what torch.nn has in their place."""

import random
from typing import Any, NamedTuple

import torch
from invalid_functions import Case, UnaskedError

from triton_conv import nn

_KINDS = {"in_channels": "int", "out_channels": "int", "kernel_size": "ints", "stride": "ints", "padding": "padding"}
_KINDS |= {"dilation": "ints", "groups": "int", "bias": "truth", "depthwise_bias": "truth", "middle_bias": "truth"}
_KINDS |= {"padding_mode": "text", "time_mode": "text", "precision": "text", "activation": "text", "fused": "bool"}
_KINDS |= {"negative_slope": "float", "scale": "bool", "offset_groups": "int", "modulation": "text", "dtype": "dtype"}
_KINDS |= {"depth_multiplier": "int", "middle_channels": "int", "output_padding": "ints", "return_context": "bool"}
_KINDS |= {
    "residual_after_activation": "bool",
    "rates": "rates",
    "dropout": "float",
    "channels": "int",
    "pool_proj": "int",
}
_KINDS |= dict.fromkeys(
    ("branches", "reduction", "ch1x1", "ch3x3red", "ch3x3", "ch5x5red", "ch5x5", "pool_proj"), "int"
)
_KINDS |= dict.fromkeys(("input", "context", "offset", "mask", "residual"), "tensor")

_OF_TORCH = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")


def of_torch(rng: random.Random) -> Case:
    rank, transposed, lazy = rng.choice((1, 2, 3)), rng.choice((False, True)), rng.random() < 0.2
    name = f"{'Lazy' if lazy else ''}Conv{'Transpose' if transposed else ''}{rank}d"
    mode = "zeros" if transposed else rng.choice(("zeros", "reflect", "replicate", "circular"))
    x = torch.randn(2, 4, *(6,) * rank)
    given = {"in_channels": 4, "out_channels": 6, "kernel_size": 2, "stride": 1, "padding": 1, "dilation": 1}
    given |= {"groups": rng.choice((1, 2)), "bias": True, "padding_mode": mode, "dtype": None}
    if transposed:
        given["output_padding"] = 0
    if lazy:
        del given["in_channels"]
    kinds = {a: _KINDS[a] for a in given}
    if mode != "zeros" and rng.random() < 0.5:
        kinds["padding"] = "border"

    def called(cls):
        def call(**arguments):
            torch.manual_seed(0)
            return cls(**arguments)(x)

        return call

    theirs = called(getattr(torch.nn, name))

    def asked(**arguments):
        padding = arguments["padding"]
        sides = padding if isinstance(padding, (tuple, list)) else [padding] * rank
        beyond = any(isinstance(p, int) and abs(p) > 2**50 for p in sides)  # it crashes the process
        if any(isinstance(p, tuple) for p in sides) or (mode != "zeros" and (beyond or len(sides) != rank)):
            raise UnaskedError
        return theirs(**arguments)

    return Case(f"nn.{name}", called(getattr(nn, name)), asked, given, kinds, rank, frozenset(kinds))


class Layer(NamedTuple):
    """Arguments of a constructor, and of a call."""

    made: dict[str, Any]
    called: dict[str, Any]


def _layers() -> dict[Any, Layer]:
    """Modules that torch.nn has not, and options that its modules have not."""
    x, shape = torch.randn(2, 4, 6, 6), {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
    plain = shape | {"stride": 1, "padding": 1, "dilation": 1, "bias": True, "precision": None}
    fusing = {"activation": "relu", "negative_slope": 0.1, "scale": True, "residual_after_activation": False}
    grouped, y = plain | {"groups": 1}, torch.randn(2, 6, 6, 6)
    sequence = {a: v for a, v in grouped.items() if a != "padding"} | {"time_mode": "zeros"}
    inception = ("ch1x1", "ch3x3red", "ch3x3", "ch5x5red", "ch5x5", "pool_proj")
    offsets = {"input": x, "offset": torch.zeros(2, 18, 6, 6), "mask": None}
    chunk = {"input": x.unsqueeze(2), "context": torch.randn(2, 4, 2, 6, 6), "return_context": False}
    return {
        nn.Conv2d: Layer(grouped | {"padding_mode": "zeros"} | fusing, {"input": x, "residual": y}),
        nn.ConvTranspose2d: Layer(grouped | fusing, {"input": x, "residual": y}),
        nn.DeformConv2d: Layer(grouped, offsets),
        nn.ModulatedDeformConv2d: Layer(grouped | {"offset_groups": 1, "modulation": "sigmoid"}, {"input": x}),
        nn.CausalConv3d: Layer(grouped | {"time_mode": "zeros", "padding_mode": "zeros"}, chunk),
        nn.CausalConv1d: Layer(sequence, {a: v[..., 0, 0] if a != "return_context" else v for a, v in chunk.items()}),
        nn.DepthwiseSeparableConv2d: Layer(
            plain | {"depth_multiplier": 1, "padding_mode": "reflect", "fused": None, "depthwise_bias": False},
            {"input": x},
        ),
        nn.SpatiallySeparableConv2d: Layer(
            plain | {"middle_channels": None, "padding_mode": "circular", "middle_bias": False}, {"input": x}
        ),
        nn.ASPP: Layer(
            {"in_channels": 4, "out_channels": 3, "rates": (1, 2), "dropout": 0.5, "dtype": None}, {"input": x}
        ),
        nn.InceptionBranches: Layer({"in_channels": 4, **dict.fromkeys(inception, 2), "dtype": None}, {"input": x}),
        nn.SelectiveKernel: Layer(
            {"channels": 4, "branches": 2, "groups": 2, "reduction": 2, "dtype": None}, {"input": x}
        ),
    }


def of_ours(rng: random.Random) -> Case:
    layers = _layers()
    cls = rng.choice(list(layers))
    made, called = layers[cls]
    training = rng.choice((False, True))

    def ours(**arguments):
        module = cls(**{a: arguments[a] for a in made}).train(training)
        before = {a: t.clone() for a, t in module.state_dict().items()}
        try:
            return module(**{a: arguments[a] for a in called})
        except Exception:
            assert all(torch.equal(t, before[a]) for a, t in module.state_dict().items()), "something was lost"
            raise

    def theirs(**arguments):  # whose constructors say what is wrong with arguments that they have too
        if cls not in (nn.Conv2d, nn.ConvTranspose2d):
            raise UnaskedError
        known = {a: v for a, v in arguments.items() if a in _OF_TORCH and a in made}
        return getattr(torch.nn, cls.__name__)(**known)(arguments["input"])

    given = made | called
    return Case(f"nn.{cls.__name__}", ours, theirs, given, {a: _KINDS[a] for a in given}, 2, frozenset())
