"""Pictures of a run: speed-up of each layer, roofline, the best and the worst ten.

Of predictions they show predicted shares of the roofline instead, and say so in their titles. Colours are Okabe and
Ito's, which colour-blind people tell apart; operations have markers of their own besides.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from . import summary
from .records import OPS, OURS, Row, Run
from .words import ratio

COLOURS = {"fprop": "#0072B2", "dgrad": "#E69F00", "wgrad": "#009E73", "step": "#CC79A7"}
_MARKERS = {"fprop": "o", "dgrad": "s", "wgrad": "^", "step": "D"}
_GREY = "#8A8A8A"
_BAR, _GAP, _TITLE, _AXIS = 0.1, 0.09, 0.35, 0.45  # inches: a bar, between layers, above and below a panel
_PANEL = 6.4  # inches that a panel is wide
_TALLEST = 40.0  # inches of a column before there is another one

PLOTS: dict[str, Callable[[Run], Figure]] = {}


def _plot(draw: Callable[[Run], Figure]) -> Callable[[Run], Figure]:
    PLOTS[draw.__name__] = draw
    return draw


def write(run: Run, directory: Path) -> list[Path]:
    """Draws everything there is to draw of a run into PNG files of a directory, and returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in PLOTS.items():
        path = directory / f"{name}.png"
        path.write_bytes(png(draw(run)))
        paths.append(path)
    return paths


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False}):  # names are not to be set as formulas
        figure.savefig(buffer, format="png")
    few = io.BytesIO()  # of few colours: a quarter of the bytes
    image = Image.open(buffer).convert("RGB").quantize(96, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    image.save(few, format="png")
    return few.getvalue()


def shown(run: Run, row: Row) -> float | None:
    """What bars show of a row: its speed-up over cuDNN, or what the roofline is of its predicted time."""
    if run.source != "predicted":
        return summary.speedup(row)
    return row.roofline_seconds / row.predicted_seconds if row.predicted_seconds else None


def meaning(run: Run) -> str:
    """What `shown` is, in words."""
    if run.source == "predicted":
        return "predicted share of the roofline, nothing measured"
    return f"speed-up over channels-last cuDNN{'' if run.source == 'measured' else ', simulated: made-up times'}"


# ---------------------------------------------------------------------------------------------------------------------
# Speed-up of each layer


@_plot
def speedup(run: Run) -> Figure:
    """A panel for each suite, in as many columns as it takes."""
    panels = {suite: _bars(run, suite) for suite in dict.fromkeys(row.suite for row in run.rows)}
    panels = {suite: bars for suite, bars in panels.items() if bars}
    heights = {suite: _height(bars) for suite, bars in panels.items()}
    columns = min(max(1, ceil(sum(heights.values()) / _TALLEST)), 4, max(len(panels), 1))
    filled: list[list[str]] = [[] for _ in range(columns)]
    for suite in panels:
        least = min(filled, key=lambda column: sum(heights[s] for s in column))
        least.append(suite)
    tall = max((sum(heights[s] for s in column) for column in filled), default=1.0) + 0.7
    made = _figure(_PANEL * columns, tall, f"{run.device}: {meaning(run)}")
    limits = _limits([value for bars in panels.values() for layer in bars.values() for value in layer.values()])
    for number, column in enumerate(filled):
        top = tall - 0.7
        for suite in column:
            height = heights[suite]
            box = (
                (number + 0.4) / columns,
                (top - height + _AXIS) / tall,
                0.56 / columns,
                (height - _AXIS - _TITLE) / tall,
            )
            _draw_bars(made.add_axes(box), suite, panels[suite], limits)
            top -= height
    if not panels:
        _empty(made)
    _legend(made, [op for op in OPS if any(row.op == op for row in run.rows)], 1 - 0.32 / tall)
    return made


def speedup_of(run: Run, suite: str) -> Figure:
    """The panel of one suite."""
    rows = tuple(row for row in run.rows if row.suite == suite)
    return speedup(Run(run.device, run.source, run.time, run.commit, run.command, rows=rows))


def _bars(run: Run, suite: str) -> dict[str, dict[str, float]]:
    """What is shown of each layer and operation; a layer at several sizes is told apart by its call."""
    of_suite = [row for row in run.rows if row.suite == suite]
    calls: dict[str, set[tuple[str, ...]]] = {}
    for row in of_suite:
        calls.setdefault(row.layer, set()).add((row.call, row.dtype, str(row.channels_last)))
    found: dict[str, dict[str, float]] = {}
    for row in of_suite:
        value = shown(run, row)
        if value:
            which = row.layer if len(calls[row.layer]) == 1 else f"{row.layer} ({row.call} {row.dtype})"
            found.setdefault(which, {})[row.op] = value
    return found


def _height(bars: dict[str, dict[str, float]]) -> float:
    return _TITLE + _AXIS + sum(_lines(layer) for layer in bars.values())


def _lines(layer: dict[str, float]) -> float:
    return max(_BAR * len(layer) + _GAP, 0.17)


def _draw_bars(axes: Axes, suite: str, bars: dict[str, dict[str, float]], limits: tuple[float, float]) -> None:
    at, ticks, placed = 0.0, [], []
    for layer in bars.values():
        height = _lines(layer)
        first = at + (height - _BAR * len(layer) + _BAR) / 2
        placed += [(first + number * _BAR, op, value) for number, (op, value) in enumerate(layer.items())]
        ticks.append(at + height / 2)
        at += height
    beyond, colours = [value - 1 for _, _, value in placed], [COLOURS[op] for _, op, _ in placed]
    axes.barh([y for y, _, _ in placed], beyond, left=1, height=_BAR * 0.9, color=colours, linewidth=0)
    for y, _, value in placed:
        side: dict[str, Any] = {"ha": "left" if value >= 1 else "right", "va": "center", "fontsize": 5}
        axes.annotate(ratio(value), (value, y), (2 if value >= 1 else -2, 0), textcoords="offset points", **side)
    axes.set(xscale="log", xlim=limits, ylim=(at, 0))
    axes.set_yticks(ticks, [plain(name, 44) for name in bars], fontsize=7)
    axes.set_title(plain(suite), fontsize=10, fontweight="bold", loc="left", pad=4)
    _ratios(axes)


def _ratios(axes: Axes) -> None:
    """A logarithmic axis of ratios, with a line at 1."""
    axes.axvline(1, color="black", linewidth=1)
    _numbered(axes.xaxis, *axes.get_xlim())
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", which="major", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _numbered(axis: Axis, low: float, high: float) -> None:
    """As many plain numbers on a logarithmic axis as there is room for."""
    span = high / low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 150 else (1, 3) if span < 1500 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _limits(values: Sequence[float], share: float = 0.12) -> tuple[float, float]:
    """Of an axis with room for the numbers beside bars: so much of it, where there are such bars."""
    low, high = min([*values, 0.8]), max([*values, 1.25])
    room = (high / low) ** share
    return low / room, high * (room if high > 1.25 else 1)


# ---------------------------------------------------------------------------------------------------------------------
# Roofline


@_plot
def roofline(run: Run) -> Figure:
    """Rate against arithmetic intensity, under the ceilings of memory and of the matrix units."""
    predicted = run.source == "predicted"
    made = _figure(9, 6, f"{run.device}: {_words(run)}")
    axes = made.add_axes((0.085, 0.09, 0.895, 0.84))
    points = [(row, time) for row in run.rows if row.flops and row.bytes and (time := summary.seconds(row))]
    if not points:
        _empty(made)
    theirs = [(row, row.seconds(who)) for row, _ in points if (who := summary.rival(row))]
    if theirs:
        x, y = [row.flops / row.bytes for row, _ in theirs], [row.flops / (t or 1) / 1e12 for row, t in theirs]
        axes.scatter(x, y, s=16, marker="x", linewidths=0.8, color=_GREY, label="cuDNN channels-last", zorder=2)
    for op in OPS:
        found = [(row.flops / row.bytes, row.flops / time / 1e12) for row, time in points if row.op == op]
        if found:
            label = f"ours, {op}{', predicted' if predicted else ''}"
            style: dict[str, Any] = {"marker": _MARKERS[op], "color": COLOURS[op], "edgecolors": "white"}
            x, y = [x for x, _ in found], [y for _, y in found]
            axes.scatter(x, y, s=26, alpha=0.85, linewidths=0.4, label=label, zorder=3, **style)
    if points:
        _draw_roofs(axes, run, [row for row, _ in points])
        axes.set(xscale="log", yscale="log")
        _numbered(axes.xaxis, *axes.get_xlim())
        _numbered(axes.yaxis, *axes.get_ylim())
        axes.legend(fontsize=8, loc="lower right", framealpha=0.95)
    axes.set_xlabel("arithmetic intensity: flops for each byte that must be moved", fontsize=9)
    axes.set_ylabel("predicted TFLOP/s" if predicted else "TFLOP/s", fontsize=9)
    axes.grid(which="major", color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return made


def _draw_roofs(axes: Axes, run: Run, rows: Sequence[Row]) -> None:
    intensities = [row.flops / row.bytes for row in rows]
    low, high = min(intensities) / 1.5, max(intensities) * 1.5
    dashes = ("-", "--", ":", "-.")
    for number, (products, row) in enumerate(sorted({summary.products(row): row for row in rows}.items())):
        top = summary.ceilings(run, row)
        how = {"measured": "measured", "simulated": "made up"}[run.source] if top.measured else "data sheet"
        line: dict[str, Any] = {"color": "black", "linewidth": 1.2, "zorder": 1, "linestyle": dashes[number % 4]}
        if top.copy and top.matmul:
            ridge = min(max(top.matmul / top.copy, low), high)
            xs = [low, ridge, high]
            label = f"{top.copy / 1e12:.3g} TB/s copy, {top.matmul / 1e12:.0f} TFLOP/s {products} ({how})"
            axes.plot(xs, [min(top.copy * x, top.matmul) / 1e12 for x in xs], label=label, **line)
        elif top.copy:
            label = f"{top.copy / 1e12:.3g} TB/s copy ({how})"
            axes.plot([low, high], [top.copy * low / 1e12, top.copy * high / 1e12], label=label, **line)


# ---------------------------------------------------------------------------------------------------------------------
# Best and worst


@_plot
def extremes(run: Run) -> Figure:
    """The ten rows with the largest values and the ten with the least, without naming any twice."""
    found = sorted(((value, row) for row in run.rows if (value := shown(run, row))), key=lambda pair: -pair[0])
    best, worst = found[: min(10, ceil(len(found) / 2))], found[len(found) - min(10, len(found) // 2) :]
    made = _figure(9.5, 1.3 + 0.24 * (len(best) + len(worst)) + 0.6, f"{run.device}: {meaning(run)}")
    if not found:
        _empty(made)
        return made
    tall = made.get_figheight()
    limits, top = _limits([value for value, _ in found[:1] + found[-1:]], 0.3), tall - 0.85
    for title, some in (("best", best), ("worst", worst)):
        if not some:
            continue
        height = 0.24 * len(some)
        axes = made.add_axes((0.42, (top - height) / tall, 0.55, height / tall))
        for number, (value, row) in enumerate(some):
            axes.barh(number, value - 1, left=1, height=0.7, color=COLOURS[row.op], linewidth=0)
            side: dict[str, Any] = {"ha": "left" if value >= 1 else "right", "va": "center", "fontsize": 7}
            where = (4 if value >= 1 else -4, 0)
            axes.annotate(_numbers(run, row, value), (value, number), where, textcoords="offset points", **side)
        axes.set(xscale="log", xlim=limits, ylim=(len(some) - 0.5, -0.5))
        names = [f"{plain(row.suite, 16)}: {plain(row.layer, 34)}, {row.op}" for _, row in some]
        axes.set_yticks(range(len(some)), names, fontsize=8)
        axes.set_title(f"{title} {len(some)}", fontsize=10, fontweight="bold", loc="left", pad=4)
        _ratios(axes)
        top -= height + 0.75
    _legend(made, [op for op in OPS if any(row.op == op for _, row in (*best, *worst))], 1 - 0.32 / tall)
    return made


def _numbers(run: Run, row: Row, value: float) -> str:
    time = row.predicted_seconds if run.source == "predicted" else row.seconds(OURS)
    return f"{ratio(value)} ({1e6 * (time or 0):.4g} us)"


# ---------------------------------------------------------------------------------------------------------------------
# Shared


def plain(text: str, most: int = 60) -> str:
    """Text of one line that any font has, cut where it is long."""
    text = "".join(c if c.isprintable() else "?" for c in text).encode("latin-1", "replace").decode("latin-1")
    return text if len(text) <= most else f"{text[: most - 2]}.."


def _words(run: Run) -> str:
    how = {"measured": "measured", "simulated": "simulated: made-up times", "predicted": "predicted, nothing measured"}
    return f"rate against arithmetic intensity, {how[run.source]}"


def _figure(width: float, height: float, title: str) -> Figure:
    made = Figure(figsize=(width, height), dpi=110)
    with matplotlib.rc_context({"text.parse_math": False}):
        made.suptitle(plain(title, 110), fontsize=11, y=1 - 0.1 / height, va="top")
    return made


def _legend(figure: Figure, ops: Sequence[str], y: float) -> None:
    if ops:
        handles = [Patch(color=COLOURS[op], label=op) for op in ops]
        where: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, y), "ncols": len(ops)}
        figure.legend(handles=handles, fontsize=8, frameon=False, **where)


def _empty(figure: Figure) -> None:
    figure.text(0.5, 0.5, "no times to show", ha="center")
