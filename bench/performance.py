"""The README's performance section, written from committed results: `python -m bench.performance [--check]`.

    >>> "nothing is measured" in block([])
    True

Between its two markers stand the newest results of each device under bench/results, or, until there is one, predictions
that say what they are. With `--check` nothing is written, and the exit code is 1 where the section is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean

from triton_conv import stored
from triton_conv.devices import H200
from triton_conv.tuning.suites import SUITES

from . import reasons, records, summary
from .jobs import jobs, predicted_row
from .records import CHANNELS_LAST, CONTIGUOUS, Run
from .summary import Total
from .words import ms, ms_of, percent, ratio

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the section, or checks it, and returns the exit code of the process."""
    parser = argparse.ArgumentParser(prog="python -m bench.performance", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the section is stale")
    arguments = parser.parse_args(argv)
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    try:
        after = replaced(before, block(newest(RESULTS)))
    except ValueError as error:
        print(f"bench.performance: error: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        if before != after:
            print("README.md: its performance section is stale: python -m bench.performance", file=sys.stderr)
        return int(before != after)
    if before != after:
        records.replace_text(readme, after)
    return 0


def replaced(text: str, section: str) -> str:
    """A text with a new section between its markers. Raises ValueError where these are not there, once and in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md: {BEGIN} and {END} are to be there once, in this order")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{section.strip()}\n{END}{rest.partition(END)[2]}"


def newest(directory: Path) -> list[tuple[Path, Run]]:
    """The newest run of each device with its file, by name of the device. Raises ValueError for what is no run."""
    found: dict[str, tuple[Path, Run]] = {}
    for path in sorted(directory.glob("*/*/bench.json")):
        run = records.read(path)
        if run.source != "measured":
            raise ValueError(f"{path}: only what was measured is published, and this is {run.source}")
        if run.device not in found or found[run.device][1].time < run.time:
            found[run.device] = (path, run)
    return [found[device] for device in sorted(found)]


def block(runs: Sequence[tuple[Path, Run]]) -> str:
    """The section: of results, or without any of predictions."""
    if runs:
        return "\n\n".join("\n".join(_measured(path, run)) for path, run in runs)
    return "\n".join(_predicted())


# ---------------------------------------------------------------------------------------------------------------------
# Measured


def _measured(path: Path, run: Run) -> Iterator[str]:
    where = path.parent.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.parent.as_posix()
    made = ", ".join(f"{name} {run.versions[name]}" for name in ("torch", "triton", "cudnn") if name in run.versions)
    ops = summary.whole(run)
    kinds = {"a training step" if names == ("step",) else " + ".join(names) for names in ops.values()}
    what = f"of {' or '.join(sorted(kinds))}"
    yield f"Measured on {_plain(run.device)}, {_plain(run.time[:10])}, commit {_plain(run.commit)}, {_plain(made)}, by"
    yield f"`{run.command.replace('`', '')}`."
    yield f"Milliseconds {what}, of the layers of each suite that were measured, each as often as it stands in its"
    yield "network; a step has both gradients of every layer, also that of images, which no training needs. Wins and"
    yield "losses are layers quicker and slower than channels-last cuDNN by more than 2 % and noise."
    yield f"The worst layer has its speed-up and the likely reason. All rows, plots and losses: [{where}]({where})."
    yield ""
    headings = ["suite", "op", "layers", "triton_conv", "cuDNN channels-last", "speed-up", "cuDNN contiguous"]
    totals = [total for total in summary.totals(run) if total.op in ops[total.suite]]
    yield from _table([*headings, "wins", "losses", "worst layer"], [_cells(run, total) for total in totals])
    lines = summary.goal_words(run)
    if lines:
        yield ""
        yield "Of what one kernel does in place of several:"
        yield ""
        yield from (f"- {_plain(line)}" for line in lines)


def _cells(run: Run, total: Total) -> list[str]:
    last, contiguous, worst = total.over.get(CHANNELS_LAST), total.over.get(CONTIGUOUS), ""
    if total.worst is not None:
        why = "; ".join(reasons.reason(run, total.worst).split("; ")[:2])  # the likeliest
        worst = f"{total.worst.layer}: {ratio(summary.speedup(total.worst))}{', ' if why else ''}{why}"
    cells = [total.suite, total.op, str(total.rows), ms(total.ours)]
    cells += [ms_of(last, total), ratio(last.speedup) if last else ""]
    return [*cells, ms_of(contiguous, total), str(total.wins), str(total.losses), worst]


# ---------------------------------------------------------------------------------------------------------------------
# Predicted


def _predicted() -> Iterator[str]:
    wanted = jobs(ops=("fprop", "step"))
    trained = {job.suite for job in wanted if job.op == "step"}
    goals = {goal.suite for goal in summary.GOALS}
    with stored.hidden("installed", "user store"):
        rows = [predicted_row(j, H200) for j in wanted if j.op == "step" or j.suite not in trained or j.suite in goals]
    run = Run(H200.name, "predicted", "", "", "", rows=tuple(rows))
    ops = summary.whole(run)
    yield "**No GPU has run this version: what stands here are predictions, nothing is measured.** They are for an"
    yield f"{H200.name}, of the convolutions of a training step, forward and gradients, of each suite's network, or of"
    yield "inference alone, beside the least time that the data sheet allows. All gradients of every layer count, also"
    yield "that of images, which no training needs. `triton-conv bench` shows every layer, and measures on a GPU."
    yield ""
    cells = []
    for total in summary.totals(run):
        if total.op not in ops[total.suite]:
            continue
        suite = SUITES[total.suite]
        share = percent(total.roofline / total.predicted) if total.predicted else ""
        times = [ms(total.predicted), ms(total.roofline), share]
        cells.append([total.suite, suite.about, total.op, str(suite.batch), str(total.rows), *times])
    yield from _table(["suite", "about", "op", "batch", "layers", "predicted ms", "roofline ms", "share"], cells)
    yield ""
    yield "What one kernel is to win over several in inference, by the same models: over our own convolutions and"
    yield "copies between them. There is no model of torchvision's kernels."
    yield ""
    cells = []
    for goal in summary.GOALS:
        found = [one.predicted for one in summary.goals(run) if one.goal == goal and one.predicted]
        numbers = [ratio(min(found)), ratio(geometric_mean(found)), ratio(max(found))] if found else [""] * 3
        cells.append([goal.words, f"{goal.factor:g}", str(len(found)), *numbers])
    yield from _table(["one kernel", "wanted", "layers", "predicted least", "mean", "most"], cells)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(map(_plain, row))} |"


def _plain(text: str) -> str:
    """Text that is no markup, whatever a file says."""
    return re.sub(r"([\\|<\[\]`*])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    raise SystemExit(main())
