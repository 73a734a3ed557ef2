"""The command `triton-conv explain`."""

from __future__ import annotations

import argparse
from typing import Any

from ..devices import DEVICES
from . import kinds, values
from .common import CommandError


def add(sub: Any) -> None:
    parser = sub.add_parser(
        "explain",
        help="show which kernel runs a convolution, with which config, and why; needs no GPU",
        description="Shows the plans of a convolution and its gradients: geometry, kernel, config, layout steps, "
        "workspace and reason. Shapes are written 8x64x56x56; one value per axis is written 2,1 and (lower, upper) "
        "padding 2:0,1,1.",
    )
    kinds.add(parser)
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

    parameters = kinds.parameters(arguments)
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
