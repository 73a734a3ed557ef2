"""The command `triton-conv tune`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import installed
from ..devices import DEVICES
from . import values
from .common import add_convolution, refused, require


def add(sub: Any) -> None:
    parser = sub.add_parser(
        "tune",
        help="find the quickest configs on this GPU: of a shape, of a suite of layers or of a model",
        description="Measures configs of the kernels that can run a convolution and its gradients, likely winners "
        "first, compares their values with a float64 reference, and stores what it finds where later calls look it "
        "up. What is tuned is a shape, written as for explain, a suite or the convolutions that a model makes. Exit "
        "code 1 if values were wrong.",
    )
    add_convolution(parser, nargs="?")
    parser.add_argument("--suite", type=values.suite, action="append", help="layers of this suite; may be repeated")
    parser.add_argument("--list-suites", action="store_true", help="show the suites and exit")
    parser.add_argument("--batch", type=values.positive, help="images of a suite's layers (default: the suite's own)")
    parser.add_argument(
        "--model",
        metavar="MODULE:CALLABLE",
        help="forward and backward of what this returns: torchvision:resnet50, or package.module:callable",
    )
    parser.add_argument(
        "--input",
        dest="inputs",
        type=values.model_input,
        action="append",
        metavar="SHAPE[:DTYPE]",
        help="of --model: an argument of its forward, such as 256x3x224x224 or 8x77:int64; may be repeated",
    )
    parser.add_argument("--model-arguments", metavar="JSON", help='of --model: keywords, such as {"num_classes": 10}')
    parser.add_argument("--autocast", type=values.dtype, help="of --model: dtype of an autocast, bfloat16 or float16")
    parser.add_argument("--forward-only", action="store_true", help="of --model: without its gradients")
    parser.add_argument(
        "--run-on", choices=("cpu", "cuda"), help="of --model: run it once for real, if its forward looks at values"
    )
    parser.add_argument(
        "--dtype",
        type=values.dtype_or_float8,
        help=f"{values.dtype_names()}, or float8_e4m3fn (default: of a shape float32, else its own)",
    )
    parser.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, help="memory format (default: of a suite its own)"
    )
    parser.add_argument("--role", choices=("fprop", "dgrad", "wgrad"), help="only this one")
    parser.add_argument("--device", choices=(*DEVICES, "cuda"), help="of --dry-run and --simulate (default: this GPU)")
    parser.add_argument(
        "--arch", type=int, choices=(80, 90, 100, 120), help="the same, a device of this compute capability"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be measured; needs no GPU")
    parser.add_argument("--simulate", action="store_true", help="with made-up times, to try the rest; needs no GPU")
    parser.add_argument("--seconds", type=values.duration, help="to spend on each problem (default: no limit)")
    parser.add_argument("--total-seconds", type=values.duration, help="to spend on everything (default: no limit)")
    parser.add_argument("--candidates", type=values.positive, help="configs to try for each problem (default: all)")
    parser.add_argument("--again", action="store_true", help="measure anew what is stored already")
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="where configs are stored (default: your own, see configs show)"
    )
    parser.add_argument("--export", type=Path, metavar="DIR", help="also write the winners as files that ship")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """`triton-conv tune`."""
    require("tune", "tuning", "rich")
    installed.require()
    from ..tuning import commands_tune

    with refused():
        return commands_tune.tune(arguments)
