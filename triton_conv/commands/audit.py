"""The command `triton-conv audit`."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from dataclasses import asdict
from typing import Any

from .. import installed
from . import values
from .common import CommandError, add_compiling, counted, require

_AUDITED_ROLES = (
    *("fprop", "dgrad", "wgrad"),
    *("forward", "backward", "update"),  # of causal_conv1d; the first also of deformable convolutions
    *("input gradient", "offset and mask gradient", "weight gradient"),
    "activation gradient",
)


def add(sub: Any) -> None:
    parser = sub.add_parser(
        "audit",
        help="compile what ships for a GPU that need not be there, and read the code",
        description="Compiles the kernels of a list of layers, in processes beside each other and without a GPU, and "
        "shows what became of them: registers of a thread, bytes that it spills, bytes of shared memory of a block, "
        "the matrix instruction and where it reads its operands, bulk tensor copies (TMA), asynchronous copies of 16 "
        "bytes a thread and of fewer, steps of the main loop that loads run ahead of their use, blocks that a "
        "multiprocessor has room for. Exit code 1 if a config spills, exceeds shared memory, or loses its matrix "
        "instruction or its pipelining.",
    )
    add_compiling(parser)
    parser.add_argument("--layer", type=values.layer, action="append", help="only this layer; may be repeated")
    parser.add_argument("--role", choices=_AUDITED_ROLES, help="only plans of this role")
    parser.add_argument("--kernel", action="append", help="only launches of this kernel, such as box; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """`triton-conv audit`."""
    require("audit", "tuning", "rich")
    installed.require()
    from rich.console import Console
    from rich.progress import Progress

    from ..tuning import audit as auditing

    rows, stderr = [], Console(stderr=True)
    for arch in arguments.arch or [90]:
        subjects = [
            subject
            for subject in auditing.shipped(arch)
            if (not arguments.layer or subject.layer in arguments.layer)
            and arguments.role in (None, subject.plan.role.value)
        ]
        results = auditing.audit(subjects, arch, arguments.jobs, arguments.kernel or ())
        with closing(results), Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
            found = dict(progress.track(results, len(subjects), description=f"sm_{arch}"))
        rows += [row for number in sorted(found) for row in found[number]]
    if not rows:
        raise CommandError("no such layer has a plan of this role that launches such a kernel")
    if arguments.json:
        _print_json(rows)
    else:
        _print_table(rows)
    return 1 if any(map(auditing.faults, rows)) else 0


def _print_json(rows: list[Any]) -> None:
    import triton

    from ..tuning.audit import faults

    print(json.dumps({"triton": triton.__version__, "rows": [{**asdict(r), "faults": faults(r)} for r in rows]}))


def _print_table(rows: list[Any]) -> None:
    import triton

    from ..tuning import tables
    from ..tuning.audit import faults

    table = tables.table(
        *("sm", "layer", "N", "role", "kernel", "config", ">registers", ">spilled", ">shared"),
        *("matrix", "operands", "TMA", "copies", "ahead", "blocks", "faults"),
    )
    table.columns[-1].style = "red"
    for row in rows:
        cells = [str(row.arch), row.layer, str(row.N), row.role, row.kernel, str(row.config or "")]
        if row.code is not None:
            c = row.code
            cells += [str(c.registers), str(c.spill_bytes), str(c.shared), c.matrix, c.operands]
            cells += [f"{c.tma_loads}+{c.tma_stores}", f"{c.copies}+{c.narrow_copies}", str(c.ahead), str(c.resident)]
        cells += [""] * (len(table.columns) - 1 - len(cells))
        tables.add(table, [*cells, "; ".join(faults(row))])
    tables.show(table)
    count = sum(bool(faults(row)) for row in rows)
    print(f"{counted(len(rows), 'kernel')} compiled by Triton {triton.__version__}, {count or 'none'} with a fault")
