"""The command `triton-conv check`."""

from __future__ import annotations

import argparse
import os
from typing import Any

from . import values
from .common import add_device, counted, device_name, one_thread, progress, what_runs


def add(sub: Any) -> None:
    parser = sub.add_parser(
        "check",
        help="compare convolutions of every shape with PyTorch in float64",
        description="Compares outputs and gradients with PyTorch in float64: a table of corner cases, then random "
        "ones. On a GPU the kernels run; on a CPU plain torch, or the kernels in Triton's interpreter if "
        "TRITON_INTERPRET=1 is set. Exit code 1 on any disagreement.",
    )
    parser.add_argument(
        "--cases", type=values.count, default=300, help="random cases after the corner cases (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=7, help="random cases and operands (default: %(default)s)")
    parser.add_argument("--role", choices=("fprop", "dgrad", "wgrad"), help="only the tensors that this role computes")
    parser.add_argument("--dtype", type=values.dtype, help=f"run every case in this dtype: {values.dtype_names()}")
    parser.add_argument("--only", type=values.count, metavar="N", help="one case, by the number in a failure's report")
    add_device(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """`triton-conv check`."""
    from ..check import CASES, Outcome, numbered_case, numbered_cases, sweep
    from ..geometry import Role

    device = device_name(arguments.device)
    role = None if arguments.role is None else Role(arguments.role)
    if arguments.only is None:
        cases = numbered_cases(arguments.cases, arguments.seed, arguments.dtype)
        total = len(CASES) + arguments.cases
    else:
        cases = iter([(arguments.only, numbered_case(arguments.only, arguments.seed, arguments.dtype))])
        total = 1

    print(f"{counted(total, 'case')}, seed {arguments.seed}; {what_runs(device)}")
    worst: dict[tuple[str, str], tuple[float, Outcome]] = {}
    failures: list[Outcome] = []
    compared = 0
    with one_thread(device):
        for outcome in progress(sweep(cases, arguments.seed, device, role), total):
            compared += len(outcome.results)
            if not outcome.ok:
                failures.append(outcome)
            for result in outcome.results:
                key = (str(outcome.case.dtype).removeprefix("torch."), result.name)
                if key not in worst or result.share > worst[key][0]:
                    worst[key] = (result.share, outcome)

    print("\nworst error of each tensor, as a share of its tolerance")
    print(f"{'dtype':<12}{'tensor':<8}{'share':>8}  {'case':>5}")
    for (dtype, name), (share, outcome) in sorted(worst.items()):
        print(f"{dtype:<12}{name:<8}{share:>8.3g}  {outcome.number:>5}  {outcome.case}")
    for outcome in failures:
        _print_failure(outcome, arguments, device)
    verdict = f"{counted(total, 'case')} passed"
    if failures:
        verdict = f"{len(failures)} of {counted(total, 'case')} failed"
    elif total > 1:
        verdict = f"all {verdict}"
    print(f"\n{verdict}, {counted(compared, 'tensor')} compared; {what_runs(device)}")
    return 1 if failures else 0


def _print_failure(outcome: Any, arguments: argparse.Namespace, device: str) -> None:
    again = f"triton-conv check --only {outcome.number} --seed {arguments.seed} --device {device}"
    if arguments.dtype is not None:
        again += f" --dtype {str(arguments.dtype).removeprefix('torch.')}"
    if arguments.role is not None:
        again += f" --role {arguments.role}"
    if os.environ.get("TRITON_INTERPRET"):
        again = f"TRITON_INTERPRET={os.environ['TRITON_INTERPRET']} {again}"
    print(f"\nFAILED {outcome.number}: {outcome.case}\n  {again}\n  {outcome.case!r}")
    for result in outcome.results:
        if not result.ok:
            print(f"  {result.name}: error {result.error:.3g}, tolerance {result.bound:.3g}; {result.note}")
    if outcome.exception is not None:
        print(f"  {type(outcome.exception).__name__}: {outcome.exception}")
