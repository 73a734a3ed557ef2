"""What commands share: their error, arguments of several, the device, progress, extras."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from . import values


class CommandError(Exception):
    """What was asked for cannot be done here; the message says why, in one line."""


@contextmanager
def refused() -> Iterator[None]:
    """Makes a CommandError of what is raised inside for what cannot be done, but not of a reader who went away."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error


def add_convolution(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """A convolution by shapes and parameters."""
    for name, words, example in (
        ("input", "shape of the input, N x C x spatial", "8x64x56x56"),
        ("weight", "shape of the weight as PyTorch has it", "128x64x3x3"),
    ):
        parser.add_argument(name, type=values.shape, nargs=nargs, help=f"{words}, for example {example}")
    parser.add_argument("--transposed", action="store_true", help="a transposed convolution")
    parser.add_argument("--stride", type=values.ints, default=1, help="one value, or one per axis: 2,1 (default: 1)")
    parser.add_argument(
        "--padding",
        type=values.padding,
        default=0,
        help='one value, one value or (lower, upper) pair per axis: 2:0,1, or "same" or "valid" (default: 0)',
    )
    parser.add_argument(
        "--output-padding",
        type=values.ints,
        help="of a transposed convolution: one value, or one per axis (default: 0)",
    )
    parser.add_argument("--dilation", type=values.ints, default=1, help="one value, or one per axis: 2,1 (default: 1)")
    parser.add_argument("--groups", type=values.positive, default=1, help="groups of channels (default: 1)")
    parser.add_argument(
        "--padding-mode",
        type=values.modes,
        default="zeros",
        help="zeros, reflect, replicate or circular, or one of them per axis: circular,zeros (default: zeros)",
    )
    parser.add_argument(
        "--out-dtype",
        type=values.dtype,
        help="of float8_e4m3fn: bfloat16, float16 or float32 (default: bfloat16); int8 may be written as int32",
    )
    parser.add_argument(
        "--precision", choices=("ieee", "tf32", "tf32x3"), help="of float32 (default: as PyTorch is set)"
    )
    parser.add_argument("--bias", action="store_true", help="add a bias")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where it runs."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one and TRITON_INTERPRET is not set (default: %(default)s)",
    )


def add_compiling(parser: argparse.ArgumentParser) -> None:
    """What is compiled for, and how many at a time."""
    parser.add_argument(
        "--arch",
        type=int,
        choices=(80, 90, 100, 120),
        action="append",
        help="compute capability to compile for, ten times the one of data sheets; may be repeated (default: 90)",
    )
    parser.add_argument("--jobs", type=values.positive, help="compilers at a time (default: one for each processor)")


def device_name(wanted: str) -> str:
    """`cpu` or `cuda`, of what --device says."""
    import torch

    from ..execute import interpreting

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise CommandError("argument --device: PyTorch sees no CUDA device")
    return wanted


def what_runs(device: str) -> str:
    """Kernels on a GPU, interpreted ones, or plain torch, in words."""
    import torch

    from ..execute import INTERPRETER, device_of

    found = device_of(torch.device(device))
    if found is None:
        return "plain torch on the CPU: no kernel was tested (set TRITON_INTERPRET=1 to interpret them)"
    if found is INTERPRETER:
        return "Triton's kernels in its interpreter, on the CPU"
    return f"Triton's kernels on {found.name}"


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """On a CPU, inside, PyTorch computes in one thread.

    The tensors of these commands are too small for two: a training step of the demo was measured on two busy cores
    at 5 to 12 ms in one thread and 40 to 1500 ms in two, which spend it waiting for each other.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    """A progress bar where tqdm is installed (and the output a terminal), else a line now and then."""
    try:
        from tqdm import tqdm
    except ImportError:
        for count, item in enumerate(items, start=1):
            yield item
            if count % 100 == 0:
                print(f"{count} of {total} cases")
    else:
        yield from tqdm(items, total=total, unit="case", disable=None, leave=False)


def require(command: str, extra: str, *modules: str) -> None:
    """Raises CommandError naming the extra of the package where one of the modules is not installed."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise CommandError(
                f"{command} needs {error.name or module}: in a checkout, pip install -e '.[{extra}]'"
            ) from error


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
