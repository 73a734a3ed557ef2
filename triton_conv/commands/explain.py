"""The command `triton-conv explain`."""

from __future__ import annotations

import argparse
from typing import Any

from ..devices import DEVICES
from . import values
from .common import CommandError, add_convolution


def add(sub: Any) -> None:
    parser = sub.add_parser(
        "explain",
        help="show which kernel runs a convolution, with which config, and why; needs no GPU",
        description="Shows the plans of a convolution and its gradients: geometry, kernel, config, layout steps, "
        "workspace and reason. Shapes are written 8x64x56x56; one value per axis is written 2,1 and (lower, upper) "
        "padding 2:0,1,1.",
    )
    add_convolution(parser)
    parser.add_argument(
        "--causal", action="store_true", help="causal_conv1d: an input B x C x L and a weight C x taps; its layout only"
    )
    parser.add_argument(
        "--pointwise",
        type=values.positive,
        metavar="K",
        help="separable_conv: the weight is depthwise, then come K channels",
    )
    parser.add_argument("--activation", choices=("silu", "swish"), help="of --causal (default: none)")
    parser.add_argument("--initial-state", action="store_true", help="of --causal: with an initial state")
    parser.add_argument(
        "--dtype",
        type=values.dtype_or_float8,
        default="float32",
        help=f"{values.dtype_names()}, or float8_e4m3fn for a scaled convolution (default: float32)",
    )
    parser.add_argument("--channels-last", action="store_true", help="memory format of input and weight")
    parser.add_argument(
        "--device",
        type=values.known_device,
        default="H200",
        help=f"{', '.join(DEVICES)}, or cuda for this GPU (default: H200)",
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """`triton-conv explain`."""
    from .. import explain as explaining

    names = ("stride", "padding", "dilation", "groups", "padding_mode", "precision", "out_dtype")
    parameters = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.transposed:
        parameters["output_padding"] = arguments.output_padding or 0
    elif arguments.output_padding is not None:
        raise CommandError("argument --output-padding: only a transposed convolution has one")
    if arguments.causal:
        given = {name: getattr(arguments, name) for name in names if _unlike_default(arguments, name)}
        if given or arguments.output_padding is not None:
            raise CommandError(f"argument --causal: does not go with {', '.join(given) or 'output_padding'}")
        parameters = {name: getattr(arguments, name) for name in ("causal", "activation", "initial_state")}
    elif arguments.activation or arguments.initial_state:
        raise CommandError("arguments --activation and --initial-state: only --causal has them")
    if arguments.pointwise is not None:
        if arguments.causal or arguments.transposed or arguments.out_dtype is not None:
            raise CommandError("argument --pointwise: does not go with --causal, --transposed or --out-dtype")
        parameters["pointwise"] = arguments.pointwise
    try:
        text = explaining.text(
            arguments.input,
            arguments.weight,
            transposed=arguments.transposed,
            dtype=arguments.dtype,
            channels_last=arguments.channels_last,
            bias=arguments.bias,
            device=arguments.device,
            **parameters,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    print(text)
    return 0


def _unlike_default(arguments: argparse.Namespace, name: str) -> bool:
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": ("zeros",)}
    return getattr(arguments, name) != defaults.get(name)
