"""Options of a convolution that is more than one call of `conv2d` and the like: what `explain.plans` takes by name."""

from __future__ import annotations

import argparse
from typing import Any

from ..epilogue import ACTIVATIONS
from . import values
from .common import CommandError, add_convolution

_PLAIN = ("stride", "padding", "dilation", "groups", "padding_mode", "precision", "out_dtype", "output_padding")
_EPILOGUE = ("activation", "negative_slope", "residual", "scale")
# By the option that makes it one: what else it takes.
_TAKES = {
    "causal": ("activation", "initial_state"),
    "pointwise": ("stride", "padding", "dilation", "groups", "padding_mode", "precision"),
    "branch": ("stride", "padding", "dilation", "groups", "precision", "sum"),
    "deform": ("stride", "padding", "dilation", "precision", "offset_groups", "no_mask"),
    "context": ("stride", "padding", "dilation", "groups", "padding_mode", "precision"),
}
_OWN = ("initial_state", "sum", "offset_groups", "no_mask")


def add(parser: argparse.ArgumentParser) -> None:
    """A convolution, its operands, what may follow it, and what it may be instead."""
    add_convolution(parser)
    parser.add_argument(
        "--dtype",
        type=values.dtype_or_float8,
        default="float32",
        help=f"{values.dtype_names()}, or float8_e4m3fn for a scaled convolution (default: float32)",
    )
    parser.add_argument("--channels-last", action="store_true", help="memory format of input and weight")
    fused = parser.add_argument_group("in the same kernel")
    fused.add_argument(
        "--activation",
        choices=(*ACTIVATIONS, "swish"),
        help="applied before the output is written; of --causal silu, which is swish (default: none)",
    )
    fused.add_argument("--negative-slope", type=float, metavar="SLOPE", help="of leaky_relu (default: 0.01)")
    fused.add_argument(
        "--residual",
        choices=("before", "after"),
        help="a tensor like the output is added, before the activation or after it",
    )
    fused.add_argument("--scale", action="store_true", help="a factor for each output channel, before the bias")
    other = parser.add_argument_group("other convolutions")
    other.add_argument(
        "--causal", action="store_true", help="causal_conv1d: an input B x C x L and a weight C x taps; its layout only"
    )
    other.add_argument("--initial-state", action="store_true", help="of --causal: with an initial state")
    other.add_argument(
        "--pointwise",
        type=values.positive,
        metavar="K",
        help="separable_conv: the weight is depthwise, then come K channels",
    )
    other.add_argument(
        "--branch",
        type=values.branch,
        action="append",
        metavar="WEIGHT[/NAME=VALUE]",
        help="multi_conv2d: one more filter over the same input, beside the weight and its options, for example "
        "256x2048x3x3/padding=6/dilation=6; names are padding, dilation, stride and groups; may be repeated",
    )
    other.add_argument("--sum", action="store_true", help="of --branch: outputs are summed, not side by side")
    other.add_argument("--deform", action="store_true", help="deform_conv2d, with offsets and a mask")
    other.add_argument(
        "--offset-groups", type=values.positive, metavar="G", help="of --deform: groups of channels that move alike"
    )
    other.add_argument("--no-mask", action="store_true", help="of --deform: without a mask")
    other.add_argument(
        "--context",
        type=values.count,
        metavar="FRAMES",
        help="causal_conv3d, or causal_conv1d of a weight of three sizes: so many frames are in a second tensor",
    )


def parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `explain.plans` takes beside shapes, layout, dtype and bias. Raises CommandError for what does not go on."""
    made = [kind for kind in _TAKES if getattr(arguments, kind) not in (None, False)]
    if len(made) > 1 or (made and arguments.transposed):
        others = made[1:] or ["transposed"]
        raise CommandError(f"argument {_option(made[0])}: does not go with {_option(others[0])}")
    given = [name for name in (*_PLAIN, *_EPILOGUE, *_OWN) if _is_given(arguments, name)]
    for name in given:
        if name in _OWN and not made:
            owner = next(kind for kind, takes in _TAKES.items() if name in takes)
            raise CommandError(f"argument {_option(name)}: only {_option(owner)} has one")
        if made and name not in _TAKES[made[0]]:
            raise CommandError(f"argument {_option(made[0])}: does not go with {_option(name)}")
    if "output_padding" in given and not arguments.transposed:
        raise CommandError("argument --output-padding: only a transposed convolution has one")
    if arguments.negative_slope is not None and arguments.activation != "leaky_relu":
        raise CommandError("argument --negative-slope: only --activation leaky_relu has one")
    found = {name: getattr(arguments, name) for name in given if name in (*_PLAIN, *_EPILOGUE)}
    if arguments.transposed:
        found.setdefault("output_padding", 0)
    return found | (_OF_KIND[made[0]](arguments, found) if made else {})


def _causal(arguments: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    if arguments.activation not in (None, "silu", "swish"):
        raise CommandError("argument --causal: has --activation silu or none")
    return {"causal": True, "initial_state": arguments.initial_state}


def _branches(arguments: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    first = {name: found.pop(name) for name in ("stride", "padding", "dilation", "groups") if name in found}
    branches = ((arguments.weight, first), *arguments.branch)
    return {"branches": branches, "combine": "sum" if arguments.sum else "concatenate"}


def _deform(arguments: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    return {"deform": True, "offset_groups": arguments.offset_groups or 1, "mask": not arguments.no_mask}


_OF_KIND = {
    "causal": _causal,
    "pointwise": lambda arguments, _: {"pointwise": arguments.pointwise},
    "branch": _branches,
    "deform": _deform,
    "context": lambda arguments, _: {"context": arguments.context},
}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_given(arguments: argparse.Namespace, name: str) -> bool:
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": ("zeros",)}
    value = getattr(arguments, name)
    return value is not None and value is not False and value != defaults.get(name)
