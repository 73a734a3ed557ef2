"""The command `triton-conv demo`."""

from __future__ import annotations

import argparse
import os
from typing import Any

from . import values
from .common import CommandError, add_device, device_name, one_thread, require


def add(sub: Any) -> None:
    parser = sub.add_parser(
        "demo",
        help="train a small network on real digits, beside the same network in torch.nn",
        description="Trains a small network of plain, depthwise-separable, grouped, dilated and transposed "
        "convolutions on scikit-learn's handwritten digits, beside the same network in torch.nn. Exit code 1 if an "
        "accuracy is below 95 % or the gradients disagree.",
    )
    parser.add_argument("--epochs", type=values.positive, help="passes over the training images (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="initial weights, split and batches (default: 0)")
    parser.add_argument(
        "--output",
        default="demo_loss.png",
        metavar="PATH",
        help="picture, in the format of its extension (default: %(default)s)",
    )
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="a few steps on the CPU through the Triton kernels themselves, in Triton's interpreter",
    )
    add_device(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """`triton-conv demo`."""
    if arguments.interpret and arguments.device == "cuda":
        raise CommandError("argument --device: --interpret runs on the CPU")
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, at the first launch
    require("demo", "demo", "sklearn", "matplotlib", "tqdm")
    from .. import demo as digits

    device = "cpu" if arguments.interpret else device_name(arguments.device)
    try:
        digits.check_output(arguments.output)
    except ValueError as error:
        raise CommandError(f"argument --output: {error}") from error
    with one_thread(device):
        return digits.run(device, epochs=arguments.epochs, seed=arguments.seed, output=arguments.output)
