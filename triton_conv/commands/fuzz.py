"""The command `triton-conv fuzz`."""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

from . import values
from .common import add_device, counted, device_name, one_thread, progress, refused, what_runs

_NAMES = (
    *("conv", "conv_transpose", "fused", "depthwise", "separable", "causal", "streaming", "branches", "deform"),
    *("scaled", "integer"),
)


def add(sub: Any) -> None:
    parser = sub.add_parser(
        "fuzz",
        help="compare random calls of every kind with PyTorch in float64",
        description="Compares outputs and gradients of random calls with PyTorch in float64, family by family. A case "
        "depends on the seed, its family and its number alone. What fails is made smaller and printed as one line, "
        "which --corpus FILE runs again. On a GPU the kernels run; on a CPU plain torch, or with TRITON_INTERPRET=1 "
        "the kernels, planned for any GPU and config. Exit code 1 on any disagreement.",
    )
    parser.add_argument("--family", choices=_NAMES, action="append", help="may be repeated (default: all)")
    parser.add_argument(
        "--cases", type=values.count, default=20, help="random cases of each family (default: %(default)s)"
    )
    parser.add_argument("--first", type=values.count, default=0, help="number of the first one (default: %(default)s)")
    parser.add_argument("--seed", type=values.count, help="the same cases again (default: a fresh one, printed)")
    parser.add_argument("--jobs", type=values.positive, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, action="append", help="run this file's cases first; may be repeated")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="add what fails to this corpus")
    parser.add_argument(
        "--shrink", type=values.count, default=60, metavar="SECONDS", help="for each failure (default: %(default)s)"
    )
    add_device(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """`triton-conv fuzz`."""
    from .. import fuzz

    device = device_name(arguments.device)
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    families = list(dict.fromkeys(arguments.family or _NAMES))
    kept: list[tuple[str, int, Any]] = []
    with refused():
        for path in arguments.corpus or []:
            kept += [("corpus", number, case) for number, case in enumerate(fuzz.read(path))]
    total = len(kept) + arguments.cases * len(families)
    print(f"{counted(total, 'case')} of {', '.join(families)}, seed {seed}; {what_runs(device)}")

    failures, compared = 0, 0
    worst: dict[tuple[str, str], tuple[float, fuzz.Outcome]] = {}
    cases = [*kept, *fuzz.numbered(families, seed, arguments.first, arguments.cases)]
    with one_thread(device):
        for outcome in progress(fuzz.sweep(cases, device, arguments.jobs, arguments.shrink), total):
            compared += len(outcome.results)
            for result in outcome.results:
                key = (outcome.family, result.name if outcome.family != "branches" else result.name[:2])
                if key not in worst or result.share > worst[key][0]:
                    worst[key] = (result.share, outcome)
            if not outcome.ok:
                failures += 1
                _print_failure(outcome, seed)
                if arguments.keep is not None:
                    with refused():
                        fuzz.keep(arguments.keep, outcome.smaller or outcome.case)

    print("\nworst error of each tensor, as a share of its tolerance")
    print(f"{'family':<16}{'tensor':<12}{'share':>8}  {'case':>6}")
    for (family, name), (share, outcome) in sorted(worst.items(), key=lambda item: item[0]):
        print(f"{family:<16}{name:<12}{share:>8.3g}  {outcome.number:>6}")
    verdict = f"{failures} of {counted(total, 'case')} failed" if failures else f"all {counted(total, 'case')} passed"
    print(f"\n{verdict}, {counted(compared, 'tensor')} compared; seed {seed}; {what_runs(device)}")
    return 1 if failures else 0


def _print_failure(outcome: Any, seed: int) -> None:
    again = f"triton-conv fuzz --family {outcome.family} --seed {seed} --first {outcome.number} --cases 1"
    if os.environ.get("TRITON_INTERPRET"):
        again = f"TRITON_INTERPRET={os.environ['TRITON_INTERPRET']} {again}"
    print(f"\nFAILED {outcome.family} {outcome.number}: {outcome.error or 'wrong values'}")
    if outcome.family != "corpus":
        print(f"  {again}")
    for result in outcome.results:
        if not result.ok:
            print(f"  {result.name}: error {result.error:.3g}, tolerance {result.bound:.3g}; {result.note}")
    print(f"{outcome.case!r}")
    if outcome.smaller is not None and outcome.smaller != outcome.case:
        print(f"made smaller:\n{outcome.smaller!r}", flush=True)
