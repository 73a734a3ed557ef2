"""The command `triton-conv report`."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from .. import installed
from . import kinds
from .common import CommandError, add_device, device_name

_INTERPRETER_SECONDS = 300


def add(sub: Any) -> None:
    parser = sub.add_parser(
        "report",
        help="everything about a wrong result in one text: what to attach to a bug report",
        description="Computes a convolution and its gradients from random operands, compares them with float64 and "
        "with PyTorch's own, tries each kernel that could run it by itself, and writes all of it down with versions, "
        "device, settings and plans: as Markdown, without names of users, hosts or places. Exit code 1 if something "
        "is wrong.",
    )
    kinds.add(parser)
    parser.add_argument("--seed", type=int, default=7, help="of the operands (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a new file that only you can read (default: shown)")
    add_device(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """`triton-conv report`."""
    installed.require()
    import torch

    from ..tuning import report as reporting

    parameters = kinds.parameters(arguments)
    device = device_name(arguments.device)
    names = ("transposed", "dtype", "channels_last", "bias", "seed")
    how: dict[str, Any] = {name: getattr(arguments, name) for name in names} | parameters
    x, w = arguments.input, arguments.weight
    try:
        found = reporting.report(x, w, device=torch.device(device), **how)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    again = _again(arguments.given)
    found.sections.append(("Again", [f"{'TRITON_INTERPRET=1 ' if _interprets() else ''}triton-conv {again}"]))
    if not _interprets() and reporting.interpretable(x, w):
        lines, wrong = _interpreted(again)
        found.sections.append(("In Triton's interpreter", lines))
        found.wrong += ["the same in Triton's interpreter"] * wrong
    _write(str(found), arguments.out)
    return 1 if found.wrong else 0


def _again(given: tuple[str, ...]) -> str:
    """The arguments, without where the report goes and on what device it is made."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out")
    return shlex.join(parser.parse_known_args(given)[1])


def _interprets() -> bool:
    from ..execute import interpreting

    return interpreting()


def _interpreted(again: str) -> tuple[list[str], bool]:
    """The values of the same report where Triton interprets its kernels on the CPU, and whether some were wrong."""
    command = [sys.executable, "-m", "triton_conv", *shlex.split(again), "--device", "cpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=_INTERPRETER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return [f"took longer than {_INTERPRETER_SECONDS} seconds"], False
    if done.returncode not in (0, 1):
        return (done.stderr.splitlines() or ["failed"])[-1:], False
    _, _, values_on = done.stdout.partition("## Values")
    shown = values_on.partition("## Again")[0]
    return [line for line in shown.splitlines() if line and line != "```"], done.returncode == 1


def _write(text: str, out: Path | None) -> None:
    if out is None:
        print(text, end="")
        return
    try:
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise CommandError(f"argument --out: {out}: {error.strerror}") from error
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    print(f"written to {out}; attach it to your report")
