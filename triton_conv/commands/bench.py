"""The command `triton-conv bench`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import installed
from ..devices import DEVICES
from . import values
from .common import CommandError, refused, require


def add(sub: Any) -> None:
    parser = sub.add_parser(
        "bench",
        help="measure suites of layers against cuDNN on this GPU; a table, JSON, an HTML report and plots",
        description="Measures layers of published networks beside cuDNN and others, in one process on one device, and "
        "compares everybody's values with float64. Without a GPU it checks values of smaller layers on the CPU and "
        "prints predicted times. It needs a checkout. Exit code 1 if a value was wrong or something became slower.",
    )
    parser.add_argument(
        "--suite", type=values.suite, action="append", help="only this one, as in tune; may be repeated"
    )
    parser.add_argument(
        "--op", choices=("fprop", "dgrad", "wgrad", "step"), action="append", help="only this one; may be repeated"
    )
    parser.add_argument("--dtype", type=values.dtype, help=f"{values.dtype_names()} (default: the suite's own)")
    parser.add_argument("--batch", type=values.positive, help="images (default: the suite's own)")
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--channels-last", action="store_true", default=None, help="memory format of our operands")
    layout.add_argument("--contiguous", action="store_false", dest="channels_last", help="the same")
    parser.add_argument("--quick", action="store_true", help="only the layers that take a network most of its time")
    parser.add_argument("--who", action="append", metavar="NAME", help="compare with this one only; may be repeated")
    parser.add_argument("--device", choices=(*DEVICES, "cuda"), help="predict times for this one, or measure (cuda)")
    parser.add_argument("--simulate", action="store_true", help="with made-up times, to try the rest; needs no GPU")
    parser.add_argument("--seconds", type=values.duration, help="begin no layer after so many (default: no limit)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where files are written, and a run that was broken off is taken up (default: a new one in bench_results)",
    )
    parser.add_argument(
        "--compare", type=Path, nargs="+", metavar="FILE", help="with a bench.json; of two, the second with the first"
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """`triton-conv bench`."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "bench" / "commands.py").is_file():
        raise CommandError("bench needs a checkout of the repository: this package is installed without its benchmarks")
    require("bench", "demo,tuning", "rich", "matplotlib", "jinja2")
    installed.require()
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))  # processes that compile get the same
    from bench import commands

    with refused():
        return commands.bench(arguments)
