"""The console script `triton-conv`: its parser, and what becomes of errors; `commands` has a module for each command.

Exit codes: 0 for success, 1 when something was found wrong, 2 for bad arguments or a missing optional dependency,
130 when interrupted, 141 when the reader of the output went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .commands import audit, bench, check, configs, demo, explain, fuzz, report, tune
from .commands.common import CommandError
from .files import printable
from .installed import TritonMissingError
from .version import VERSION


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code of the process.

    >>> main(["configs", "verify", "no/such/directory"])
    0 entries that fit in no/such/directory
    1
    """
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)  # here rather than at exit, where a closed pipe is not to be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        return 141


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
        arguments.given = tuple(sys.argv[1:] if argv is None else argv)
        if arguments.command is None:
            parser.print_help(sys.stderr)
            return 2
        return arguments.command(arguments)
    except (CommandError, TritonMissingError) as error:
        text = "\n".join(map(printable, str(error).splitlines()))
        print(f"triton-conv: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("triton-conv: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="triton-conv", description="Convolutions for NVIDIA GPUs in Triton.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}", help="show the version and exit")
    parser.set_defaults(command=None)
    sub = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (demo, check, fuzz, explain, report, audit, configs, tune, bench):
        command.add(sub)
    return parser
