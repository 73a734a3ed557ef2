"""The command `triton-conv bench`: what is measured or predicted, what it prints, and the files it writes."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from triton_conv import stored
from triton_conv.devices import DEVICES, H200
from triton_conv.tuning import on_device, tables

from . import plots, records, report, summary
from .compare import Comparison, compare
from .files import printable
from .jobs import Job, jobs
from .records import CHANNELS_LAST, CONTIGUOUS, OPS, OTHERS, OURS, Row, Run
from .runner import CudaMeter, Meter, PredictedMeter, SimulatedMeter
from .runner import run as run_jobs
from .words import change_words, grouped, ms, ms_of, named, percent, ratio, us

NOTHING = {
    "predicted": "Nothing was measured: every time here is a prediction for {device}.",
    "simulated": "Nothing was measured: every time here is made up.",
}


def bench(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises ValueError for what cannot be done, before anything is."""
    _check(arguments)
    before = [records.read(path) for path in arguments.compare or ()]
    if len(before) == 2:
        return _two_files(*before)
    todo = jobs(
        arguments.suite,
        [op for op in OPS if op in arguments.op] if arguments.op else OPS,
        arguments.batch,
        arguments.dtype,
        arguments.channels_last,
        arguments.quick,
    )
    if not todo:
        raise ValueError("there is nothing to measure")
    meter = _meter(arguments)
    if before and before[0].source != meter.source:
        raise ValueError(
            f"argument --compare: {arguments.compare[0]} has times that are {before[0].source}, and these will be "
            f"{meter.source}"
        )
    out = arguments.out if arguments.out is not None else _directory(meter.name)
    _check_kept(out / "bench.json", meter)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"argument --out: {error}") from error
    nothing = NOTHING.get(meter.source, "").format(device=meter.name)
    if nothing:
        print(nothing)
    found, code = _run(todo, meter, arguments, out / "bench.json")
    there = {row.name for row in found.rows}
    if left := sum(job.row_name not in there for job in todo):
        print(f"{left} of {len(todo)} rows are left; the same command with --out {out} goes on with them")
    comparison = compare(before[0], found) if before else None
    code = max(code, _say(found, comparison))
    for path in (out / "bench.json", *_written(found, comparison, before[0] if before else None, out)):
        print(path)
    if nothing:
        print(nothing)
    return code


def _check(arguments: argparse.Namespace) -> None:
    files = arguments.compare or ()
    if len(files) > 2:
        raise ValueError("argument --compare: compares this run with one file, or two files")
    if len(files) == 2:
        names = ("suite", "op", "dtype", "batch", "who", "device", "seconds", "out", "quick", "simulate")
        given = [name for name in names if getattr(arguments, name)]
        if given or arguments.channels_last is not None:
            raise ValueError(f"argument --compare: two files are not measured: no --{(*given, 'channels-last')[0]}")
    if arguments.dtype is not None and arguments.dtype.is_complex:
        raise ValueError("argument --dtype: complex convolutions are made of real ones: measure these")
    for who in arguments.who or ():
        if who not in OTHERS:
            raise ValueError(f"argument --who: {who!r} is not one of {', '.join(OTHERS)}")
    if arguments.who and (arguments.simulate or not _measures(arguments)):
        raise ValueError("argument --who: nobody is measured")


def _check_kept(path: Path, meter: Meter) -> None:
    """Raises ValueError where a file has results that this run would replace."""
    if path.exists():
        found = records.read(path)
        if (found.device, found.source, found.commit) != (meter.name, meter.source, on_device.commit()):
            raise ValueError(
                f"argument --out: {path} has times of {found.device} that are {found.source}, of commit "
                f"{found.commit or 'unknown'}: name another directory"
            )


def _measures(arguments: argparse.Namespace) -> bool:
    """Whether there is a GPU to measure on. Raises ValueError where one is asked for that is not there."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("argument --device: PyTorch sees no CUDA device")
    return not arguments.simulate and arguments.device in (None, "cuda") and torch.cuda.is_available()


def _meter(arguments: argparse.Namespace) -> Meter:
    if _measures(arguments):
        return CudaMeter(who=arguments.who)
    device = DEVICES.get(arguments.device or "", H200)
    return SimulatedMeter(device) if arguments.simulate else PredictedMeter(device)


def _directory(device: str) -> Path:
    """A new one for each run, so that none takes another's times for its own."""
    now = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return Path("bench_results") / f"{now}-{stored.path_of(Path(), device, '').parent}"


def command_line(arguments: argparse.Namespace) -> str:
    """What to type to do the same again."""
    words = ["triton-conv", "bench"]
    for name in ("suite", "op", "who"):
        for value in getattr(arguments, name) or ():
            words += [f"--{name}", value]
    if arguments.dtype is not None:
        words += ["--dtype", str(arguments.dtype).removeprefix("torch.")]
    for name in ("batch", "device", "seconds"):
        if getattr(arguments, name) is not None:
            words += [f"--{name}", f"{getattr(arguments, name)}"]
    if arguments.channels_last is not None:
        words.append("--channels-last" if arguments.channels_last else "--contiguous")
    words += [f"--{name}" for name in ("quick", "simulate") if getattr(arguments, name)]
    return shlex.join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def _run(todo: Sequence[Job], meter: Meter, arguments: argparse.Namespace, path: Path) -> tuple[Run, int]:
    """The run and the exit code; of one that was broken off, what it had by then."""
    with _progress(len(todo)) as advance:
        try:
            line = command_line(arguments)
            return run_jobs(todo, meter, line, path, arguments.seconds, advance), 0
        except KeyboardInterrupt:
            words, code = "interrupted", 130
        except torch.AcceleratorError as error:
            words, code = f"the GPU answers no more: {str(error).splitlines()[0]}", 1
    print(f"triton-conv: {words}; what was measured is kept in {path}", file=sys.stderr)
    return records.read(path), code


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Row], None]]:
    """A bar with the time that is left, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    stderr = Console(stderr=True)
    columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
    columns.append(TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        number = bar.add_task("bench", total=total)
        yield lambda row: bar.update(number, advance=1, description=f"{row.suite}: {row.layer}")


# ---------------------------------------------------------------------------------------------------------------------
# What came of it


def _say(run: Run, comparison: Comparison | None) -> int:
    """Prints a run and what changed, and returns the exit code."""
    _print_rows(run)
    _print_totals(run)
    faults = summary.faults(run)
    for row, what in faults:
        print(f"{named(row)} ({row.call}): {what}", file=sys.stderr)
    regressed = comparison is not None and _print_comparison(comparison)
    return 1 if faults or regressed else 0


def _print_rows(run: Run) -> None:
    if run.source == "predicted":
        headings = ["suite", "layer", "op", "kernel", ">predicted us", ">roofline us", ">share", "limit", "values"]
    else:
        headings = ["suite", "layer", "op", "kernel", ">ours us", ">spread", ">cuDNN channels-last us", ">speed-up"]
        headings += ["best other", ">its us", ">roofline us", ">TFLOP/s", ">GB/s", ">share", ">MiB", ">host us"]
    made = tables.table(*headings)
    spare = ["kernel", "limit", "MiB", "host us", "GB/s", "TFLOP/s", "its us", "best other", "roofline us", "spread"]
    for row in run.rows:
        rest = _predicted if run.source == "predicted" else _measured
        tables.add(made, [row.suite, row.layer, row.op, *rest(run, row)])
    tables.show(made, spare)


def _predicted(run: Run, row: Row) -> list[str]:
    ours, kernel = row.measured.get(OURS), row.kernel if row.op == "step" else grouped(row.kernel, row.config)
    times = [us(row.predicted_seconds), us(row.roofline_seconds)]
    values = "" if ours is None or ours.error is None else "right" if ours.error <= 1 else "WRONG"
    return [kernel, *times, percent(plots.shown(run, row)), row.limit, values]


def _measured(run: Run, row: Row) -> list[str]:
    ours, seconds = row.measured.get(OURS), row.seconds(OURS)
    last, best = summary.cudnn(row, CHANNELS_LAST), summary.best_rival(row)
    cells = [row.kernel, us(seconds), percent(ours.spread, 1) if ours and seconds else ""]
    cells += [us(row.seconds(last) if last else None), ratio(summary.speedup(row))]
    cells += [best or "", us(row.seconds(best) if best else None), us(row.roofline_seconds)]
    cells += [f"{row.flops / seconds / 1e12:.3g}", f"{row.bytes / seconds / 1e9:.4g}"] if seconds else ["", ""]
    cells.append(percent(summary.of_ceilings(run, row)) if seconds else "")
    peak, host = (ours.peak_bytes, ours.host_seconds) if ours else (None, None)
    return [*cells, "" if peak is None else f"{peak / 2**20:.3g}", us(host)]


def _print_totals(run: Run) -> None:
    """A line for each suite and operation: networks, not layers."""
    predicted = run.source == "predicted"
    made = tables.table(
        *("suite", "op", ">layers", *(() if predicted else (">ours ms", ">cuDNN channels-last ms", ">speed-up"))),
        *(() if predicted else (">cuDNN contiguous ms", ">wins", ">losses")),
        *(">predicted ms", ">roofline ms"),
    )
    for total in summary.totals(run):
        cells = [total.suite, total.op, str(total.rows)]
        if not predicted:
            last, contiguous = total.over.get(CHANNELS_LAST), total.over.get(CONTIGUOUS)
            cells += [ms(total.ours), ms_of(last, total), ratio(last.speedup) if last else ""]
            cells += [ms_of(contiguous, total), str(total.wins), str(total.losses)]
        tables.add(made, [*cells, ms(total.predicted), ms(total.roofline)])
    tables.show(made, () if predicted else ("predicted ms", "roofline ms", "cuDNN contiguous ms"))
    theirs = [row for row in run.rows if summary.cudnn(row) or summary.cudnn(row, CONTIGUOUS)]
    speedups = [value for row in theirs if (value := summary.speedup(row))]
    if speedups:
        wins = sum(summary.verdict(row) > 0 for row in theirs)
        losses = sum(summary.verdict(row) < 0 for row in theirs)
        prefix = "" if run.source == "measured" else "made-up times: "
        print(
            f"{prefix}{geometric_mean(speedups):.2f} times as quick as channels-last cuDNN (geometric mean of "
            f"{len(speedups)}), quicker on {wins}, slower on {losses}"
        )
    for words in summary.goal_words(run):
        print(printable(f"{'' if run.source == 'measured' else 'made-up times: '}{words}"))


def _print_comparison(comparison: Comparison) -> bool:
    """Prints what changed, and returns whether anything became worse, or nobody can say."""
    made = tables.table("suite", "layer", "op", ">before us", ">now us", ">times as long")
    for change in (*comparison.regressions, *comparison.improvements):
        row = change.row
        tables.add(made, [row.suite, row.layer, row.op, us(change.old), us(change.new), ratio(change.ratio)])
    if comparison.regressions or comparison.improvements:
        tables.show(made)
    for words, _ in change_words(comparison):
        print(printable(f"comparison: {words}"))
    return comparison.regressed or not comparison.compared


def _two_files(old: Run, new: Run) -> int:
    try:
        comparison = compare(old, new)
    except ValueError as error:
        raise ValueError(f"argument --compare: {error}") from error
    nothing = NOTHING.get(new.source, "").format(device=printable(new.device))
    if nothing:
        print(nothing)
    return 1 if _print_comparison(comparison) else 0


def _written(run: Run, comparison: Comparison | None, before: Run | None, out: Path) -> list[Path]:
    page = out / "report.html"
    records.replace_text(page, report.html(run, comparison, before))
    return [page, *plots.write(run, out)]
