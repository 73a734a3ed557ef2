"""The command `triton-conv configs`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import installed
from ..devices import DEVICES
from ..key import CONFIGS
from .common import add_compiling, refused, require


def add(sub: Any) -> None:
    parser = sub.add_parser(
        "configs",
        help="show, merge, check and compare tuned configs: your own and those that ship",
        description="Tuned configs are JSON files, one for each device and kernel: your own in $TRITON_CONV_CACHE or "
        "~/.cache/triton_conv, others in the package.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)

    def action(name: str, words: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        made.set_defaults(command=run)
        return made

    def selection(made: argparse.ArgumentParser) -> None:
        made.add_argument("--device", help=f"only of this one: {', '.join(DEVICES)}, or part of its name")
        made.add_argument("--kernel", choices=tuple(CONFIGS), help="only of this kernel")

    selection(action("show", "a table of what is stored and what ships: winner, time, source, whether it is stale"))
    merging = action("merge", "merge files, or all files of directories, into your own")
    merging.add_argument("paths", type=Path, nargs="+", metavar="FILE_OR_DIR")
    verifying = action("verify", "check that files may ship; exit code 1 if not, naming file and entry")
    verifying.add_argument("directory", type=Path, nargs="?", metavar="DIR", help="(default: what ships)")
    verifying.add_argument("--compile", action="store_true", help="compile each config too, as audit does")
    add_compiling(verifying)
    comparing = action("diff", "compare the winners of two files or directories; exit code 1 if any differ")
    comparing.add_argument("a", type=Path, metavar="A")
    comparing.add_argument("b", type=Path, metavar="B")
    exporting = action("export", "write the winners that you have measured as files that ship")
    exporting.add_argument("directory", type=Path, metavar="DIR")
    exporting.add_argument("--as", dest="rename", choices=tuple(DEVICES), help="under the name of this known device")
    selection(exporting)
    seeding = action("seed", "write what rules and the cost model choose for common layers; what was measured stays")
    seeding.add_argument("directory", type=Path, metavar="DIR")
    seeding.add_argument("--device", choices=tuple(DEVICES), action="append", help="may be repeated (default: all)")


def run(arguments: argparse.Namespace) -> int:
    """`triton-conv configs`."""
    require("configs", "tuning", "rich")
    installed.require()
    from ..tuning.commands_configs import COMMANDS

    with refused():
        return COMMANDS[arguments.action](arguments)
