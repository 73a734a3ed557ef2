"""A run as one HTML page that needs nothing else: text, pictures and all rows, for a screen, a phone or paper.

    >>> page = html(run)
    >>> "http" in page
    False

Everything that comes from a file is escaped, and the page allows no other script than its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from triton_conv.tuning.suites import SUITES

from . import plots, reasons, summary
from .compare import Comparison
from .records import CHANNELS_LAST, CONTIGUOUS, OURS, Measurement, Row, Run
from .words import change_words, grouped, ms, ms_of, percent, ratio, us

_TEMPLATE = Path(__file__).with_name("report.html.jinja")

# Sorts the table of all rows by a column, numbers as numbers, empty cells last; a second click turns it round.
_SCRIPT = """
const table = document.getElementById("rows"), body = table.tBodies[0];
table.querySelectorAll("th").forEach((th, column) => {
  const button = document.createElement("button");
  button.textContent = th.textContent;
  th.replaceChildren(button);
  let sign = -1;
  button.onclick = () => {
    sign = -sign;
    const key = row => {
      const cell = row.cells[column], number = cell.dataset.number;
      return number !== undefined ? Number(number) : cell.textContent;
    };
    const order = (a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
    };
    body.append(...[...body.rows].sort(order));
  };
});
"""


class Cell(NamedTuple):
    """Text, and the number that it is sorted by."""

    text: str
    number: float | None = None


class Line(NamedTuple):
    """A row of a table; `mark` is "won", "lost" or ""."""

    cells: Sequence[Cell]
    mark: str = ""


class Table(NamedTuple):
    """Headings, ">" in front of those of numbers, and rows."""

    headings: Sequence[str]
    rows: Sequence[Line]


def html(run: Run, comparison: Comparison | None = None, before: Run | None = None, audit: bool = False) -> str:
    """The page. `comparison` is with the run `before`; `audit` adds what compilers make of lost layers (minutes)."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    panels = [
        {"name": name, "about": SUITES[name].about if name in SUITES else "", "picture": _picture(figure)}
        for name in dict.fromkeys(row.suite for row in run.rows)
        if (figure := plots.speedup_of(run, name)) is not None
    ]
    compared = None
    if comparison is not None:
        compared = _compared(comparison, before.time if before else "another time")
    return template.render(
        run=run,
        wrong=[f"{row.suite}: {row.layer}, {row.op}: {what}" for row, what in summary.faults(run)],
        facts=_facts(run),
        comparison=compared,
        suites=_suites(run),
        suites_note=_suites_note(run),
        losses=None if run.source == "predicted" else _losses(run, audit),
        goals=_goals(run),
        goals_note=_goals_note(run),
        pictures={"extremes": _picture(plots.extremes(run)), "roofline": _picture(plots.roofline(run))},
        panels=panels,
        meaning=plots.meaning(run),
        rows=_rows(run),
        rows_note=_rows_note(run),
        script=Markup(_SCRIPT),  # ours, and what the page's policy allows by its hash
        script_hash=base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode(),
    )


def _picture(figure: Figure) -> str:
    return f"data:image/png;base64,{base64.b64encode(plots.png(figure)).decode()}"


def _facts(run: Run) -> list[tuple[str, str]]:
    ceilings = [
        f"{name} {rate / 1e12:.3g} {'TB/s' if name == 'copy' else 'TFLOP/s'}" for name, rate in run.ceilings.items()
    ]
    how = "made up" if run.source == "simulated" else "which ideal loops reached in this run"
    return [
        ("Device", run.device),
        ("Times", {"measured": "measured", "simulated": "simulated, made up", "predicted": "predicted"}[run.source]),
        ("Taken", run.time),
        ("Commit", run.commit or "unknown"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run.versions.items()) or "unknown"),
        ("Ceilings", f"{', '.join(ceilings)}, {how}" if ceilings else "none measured"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _compared(comparison: Comparison, time: str) -> dict[str, Any]:
    lines = [{"words": words, "bad": bad} for words, bad in change_words(comparison)]
    changes = [*comparison.regressions, *comparison.improvements]
    rows = [
        Line(
            [Cell(c.row.suite), Cell(c.row.layer), Cell(c.row.op), _time(c.old), _time(c.new), _ratio(c.ratio)],
            "lost" if c.ratio > 1 else "won",
        )
        for c in changes
    ]
    headings = ["suite", "layer", "op", ">before, us", ">now, us", ">times as long"]
    return {"time": time, "lines": lines, "headings": headings, "rows": rows}


def _suites_note(run: Run) -> str:
    each = "Every layer counts as often as it stands in its network, of the layers that were asked for."
    each += " A step has both gradients of every layer, also that of images, which no training needs."
    if run.source == "predicted":
        return f"Predicted totals beside the least that the device's data sheet allows. {each}"
    return (
        f"Totals in milliseconds. {each} A speed-up is the total of cuDNN over ours, of the layers that both computed; "
        "where cuDNN has no such border it pads first, and where one kernel of ours does more it is several of theirs. "
        "Wins and losses differ by more than 2 % and noise, also from torchvision, where cuDNN has nothing."
    )


def _suites(run: Run) -> Table:
    predicted = run.source == "predicted"
    headings = ["suite", "op", ">layers"]
    headings += [] if predicted else [">ours, ms", ">cuDNN channels-last, ms", ">speed-up", ">cuDNN contiguous, ms"]
    headings += [] if predicted else [">speed-up over it", ">wins", ">losses"]
    headings += [">predicted, ms", ">roofline, ms", ">share of it", *([] if predicted else ["worst layer"])]
    rows = []
    for total in summary.totals(run):
        cells = [Cell(total.suite), Cell(total.op), Cell(str(total.rows), total.rows)]
        last, contiguous = total.over.get(CHANNELS_LAST), total.over.get(CONTIGUOUS)
        if not predicted:
            cells.append(Cell(ms(total.ours), total.ours))
            for pair in (last, contiguous):
                cells.append(Cell(ms_of(pair, total), pair.theirs if pair else None))
                cells.append(_ratio(pair.speedup) if pair else Cell(""))
            cells += [Cell(str(total.wins), total.wins), Cell(str(total.losses), total.losses)]
        share = total.roofline / total.predicted if total.predicted else None
        cells += [Cell(ms(total.predicted), total.predicted), Cell(ms(total.roofline), total.roofline)]
        cells.append(Cell(percent(share), share))
        if not predicted:
            cells.append(Cell(f"{total.worst.layer}: {ratio(summary.speedup(total.worst))}" if total.worst else ""))
        mark = "" if last is None else "won" if last.speedup > 1 else "lost"
        rows.append(Line(cells, mark))
    return Table(headings, rows)


def _losses(run: Run, audit: bool) -> Table:
    found = reasons.losses(run, audit)
    headings = ["suite", ">lost", "worst layer", "op", "kernel", ">ours, us", "rival", ">its us", ">speed-up", "why"]
    rows = []
    for loss in found:
        row, speedup = loss.row, 1 / loss.ratio
        cells = [Cell(loss.suite), Cell(f"{loss.rows} of {loss.of}", loss.rows), Cell(row.layer), Cell(row.op)]
        cells += [Cell(row.kernel), _time(loss.ours), Cell(loss.rival), _time(loss.theirs)]
        why = f"{loss.words}. Compiled: {loss.code}." if loss.code else f"{loss.words}."
        rows.append(Line([*cells, _ratio(speedup), Cell(why)], "lost"))
    return Table(headings, rows)


def _goals_note(run: Run) -> str:
    note = (
        "What one kernel is to win over several, in the forward pass. The predicted ratio is that of models: our own "
    )
    note += "convolutions in cuDNN's place with copies between them, and of the one kernel."
    lines = summary.goal_words(run)
    made_up = "Made up: " if run.source == "simulated" else ""
    return f"{made_up}{'; '.join(lines)}. {note}" if lines else f"Nothing was measured. {note}"


def _goals(run: Run) -> Table:
    predicted = run.source == "predicted"
    headings = [
        "goal",
        ">wanted",
        "layer",
        "call",
        *([] if predicted else [">ours, us", "rival", ">its us", ">speed-up"]),
    ]
    rows = []
    for goal, row, rival, reached, model in summary.goals(run):
        cells = [Cell(goal.words), Cell(f"{goal.factor:g}", goal.factor), Cell(row.layer), Cell(row.call)]
        if not predicted:
            cells += [_time(row.seconds(OURS)), Cell(rival or ""), _time(row.seconds(rival) if rival else None)]
            cells.append(_ratio(reached))
        mark = "" if reached is None else "won" if reached >= goal.factor else "lost"
        rows.append(Line([*cells, _time(row.predicted_seconds), _ratio(model)], mark))
    return Table([*headings, ">predicted, us", ">predicted ratio"], rows)


def _rows_note(run: Run) -> str:
    if run.source == "predicted":
        return (
            "Times are predictions; the share is the roofline's of them. The worst error, as a share of its tolerance, "
            "is that of a smaller layer of the same kind on the CPU."
        )
    return (
        "Times are medians, with half the distance of their quartiles; the share is of the nearer ceiling. Memory is "
        "above inputs and outputs; the host's time is that of a call. The worst error is a share of its tolerance."
    )


def _rows(run: Run) -> Table:
    predicted = run.source == "predicted"
    headings = ["suite", "layer", "op", "call", "dtype", "layout", ">times"]
    others = list(dict.fromkeys(who for row in run.rows for who in row.measured if who != OURS))
    if not predicted:
        headings += [">ours, us", *(f">{who}, us" for who in others)]
        headings += [">speed-up", ">TFLOP/s", ">GB/s", ">share", ">peak MiB", ">host us", ">error"]
    headings += [">predicted, us", ">roofline, us", *([">share", ">error"] if predicted else [])]
    headings += ["limit", "kernel", "why", "notes"]
    return Table(headings, [_row(run, row, others, predicted) for row in run.rows])


def _row(run: Run, row: Row, others: Sequence[str], predicted: bool) -> Line:
    layout = "channels-last" if row.channels_last else "contiguous"
    cells = [Cell(row.suite), Cell(row.layer), Cell(row.op), Cell(row.call), Cell(row.dtype), Cell(layout)]
    cells.append(Cell(str(row.times), row.times))
    ours, mark = row.measured.get(OURS), ""
    if not predicted:
        cells += [_measured(row.measured.get(who)) for who in (OURS, *others)]
        speedup, seconds = summary.speedup(row), row.seconds(OURS)
        cells.append(_ratio(speedup))
        rates = [row.flops / seconds / 1e12, row.bytes / seconds / 1e9] if seconds else [None, None]
        share = summary.of_ceilings(run, row) if seconds else None
        peak = ours.peak_bytes / 2**20 if ours and ours.peak_bytes is not None else None
        host = 1e6 * ours.host_seconds if ours and ours.host_seconds is not None else None
        numbers: list[float | None] = [*rates]
        cells += [_number(number) for number in numbers]
        cells += [Cell(percent(share), share), _number(peak), _number(host), _number(ours.error if ours else None)]
        mark = {1: "won", -1: "lost", 0: ""}[summary.verdict(row)]
    cells += [_time(row.predicted_seconds), _time(row.roofline_seconds)]
    if predicted:
        value = plots.shown(run, row)
        cells += [Cell(percent(value), value), _number(ours.error if ours else None)]
    says = row.measured if run.source == "measured" else {}  # others say of every row that it is made up
    notes = "; ".join(f"{who}: {m.note}" for who, m in says.items() if m.note)
    words = [row.limit, grouped(row.kernel, row.config), row.reason, notes]
    return Line([*cells, *map(Cell, words)], mark)


def _measured(measurement: Measurement | None) -> Cell:
    if measurement is None or measurement.seconds is None:
        return Cell("")
    spread = "" if measurement.spread is None else f" ± {percent(measurement.spread, 1)}"
    return Cell(us(measurement.seconds) + spread, measurement.seconds)


def _time(seconds: float | None) -> Cell:
    return Cell(us(seconds), seconds)


def _ratio(value: float | None) -> Cell:
    return Cell(ratio(value), value)


def _number(value: float | None) -> Cell:
    return Cell("" if value is None else f"{value:.3g}", value)
