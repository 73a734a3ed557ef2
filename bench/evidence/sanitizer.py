"""Stage g: NVIDIA's compute-sanitizer over small cases of every kernel family, one process for each of its tools.

The cases run once without it first: that checks their values, and leaves every kernel compiled on the disk.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from triton_conv import execute

from . import sanitized
from .support import compile_ahead, left_out
from .units import Context, Unit

NAME = "g"
ABOUT = "compute-sanitizer: memory errors, races and barriers of every kernel family"
LIMIT = 470.0

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_SECONDS = 110.0  # of a tool
_FOUND = 99  # the exit code of a program in which a tool found something
_ROOT = Path(__file__).parents[2]
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/compute-sanitizer")
_REFUSALS = (
    "Device not supported",
    "Unable to attach",
    "Insufficient permissions",
    "No attachable process found",
    "terminated before first instrumented API call",
    "Failed to initialize",
)


class Report(NamedTuple):
    """What a tool printed: errors by its own count (None: it did not finish), the first findings, why it refused."""

    errors: int | None
    warnings: int
    findings: list[str]
    refusal: str


def units(context: Context) -> Iterator[Unit]:
    """The cases alone, then one unit for each tool."""
    yield Unit("cases", partial(plain, context), timeout=240.0)
    for tool in TOOLS:
        yield Unit(tool, partial(checked, tool, context), timeout=_SECONDS + 30)


def found() -> str | None:
    """The path of compute-sanitizer."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(_PLACES))


def command(sanitizer: str, tool: str) -> list[str]:
    """What precedes the program that a tool watches."""
    how = [sanitizer, "--tool", tool, "--target-processes", "application-only", "--print-limit", "20"]
    if tool == "memcheck":  # PyTorch asks CUDA for what a driver may not have
        how += ["--report-api-errors", "no"]
    return [*how, "--error-exitcode", str(_FOUND)]


def plain(context: Context) -> dict[str, Any]:
    """The cases without a tool."""
    device, compiled = execute.device_of(context.device), {}
    if context.device.type == "cuda" and device is not None:
        compiled = compile_ahead(sanitized.plans(device), context.device)
    code, output = _run([], context, 200.0)
    done, wrong = cases_of(output)
    words = f"{len(done)} cases right" if not code else f"exit code {code}"
    if wrong:
        words += f"; {'; '.join(wrong[:3])}"
    elif code:
        words += f": {output.strip()[-300:]}"
    return {
        "ok": code == 0 and bool(done) and not wrong,
        "words": words,
        "cases": done,
        "wrong": wrong,
        "compiled": compiled,
    }


def checked(tool: str, context: Context) -> dict[str, Any]:
    """What a tool says of the cases."""
    if context.device.type != "cuda":
        return left_out("needs CUDA: compute-sanitizer watches kernels on a GPU")
    sanitizer = found()
    if sanitizer is None:
        return left_out("compute-sanitizer is not installed")
    seconds = min(_SECONDS, max(context.left() - 10, 20))
    code, output = _run(command(sanitizer, tool), context, seconds)
    report, (done, wrong) = parsed(output), cases_of(output)
    if report.refusal:
        return left_out(f"compute-sanitizer: {report.refusal}")
    facts = {"errors": report.errors, "warnings": report.warnings, "findings": report.findings, "cases": done}
    if report.errors is None:
        why = f"not done after {seconds:.0f} s" if code is None else f"exit code {code} and no summary"
        clean = code is None and bool(done) and not report.findings and not wrong
        words = f"{why}; {len(done)} cases until then, {len(report.findings)} findings"
        return {"ok": clean, "words": words, **facts, "output": output.strip()[-1000:]}
    words = f"{report.errors} errors, {report.warnings} warnings in {len(done)} cases"
    first = [*wrong, *report.findings]
    words += f"; first: {first[0]}" if first else ""
    return {"ok": not report.errors and not wrong and code == 0, "words": words, "wrong": wrong, **facts}


def _run(before: Sequence[str], context: Context, seconds: float) -> tuple[int | None, str]:
    """(exit code, None where time was up; all that was printed) of the cases under a tool."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if before:  # each tensor is an allocation of its own, whose bounds the tool knows
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if context.device.type != "cuda":
        env["TRITON_INTERPRET"] = "1"
    program = [sys.executable, "-m", "bench.evidence.sanitized", str(context.device)]
    if context.simulate:
        program.append("--few")
    try:
        done = subprocess.run(
            [*before, *program],
            env=env,
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        return None, printed.decode(errors="replace") if isinstance(printed, bytes) else printed
    return done.returncode, done.stdout


def cases_of(output: str) -> tuple[list[str], list[str]]:
    """(names of the cases that were right, what was wrong with others), as `sanitized` prints them.

    >>> cases_of("case box: right\\ncase fold: y is off\\n")
    (['box'], ['fold: y is off'])
    """
    lines = re.findall(r"^case (.+?): (.*)$", output, re.MULTILINE)
    return [name for name, words in lines if words == "right"], [
        f"{n}: {words}" for n, words in lines if words != "right"
    ]


def parsed(output: str) -> Report:
    """The report of a tool among what a program printed.

    >>> parsed("========= COMPUTE-SANITIZER\\n========= ERROR SUMMARY: 0 errors\\n").errors
    0
    """
    lines = [line[9:].rstrip() for line in output.splitlines() if line.startswith("=========")]
    refusal = next((line.strip() for line in lines if any(words in line for words in _REFUSALS)), "")
    errors, warnings = _counts("\n".join(lines))
    findings, block = list[str](), list[str]()
    for line in [*lines, ""]:
        # a finding begins with one blank, what belongs to it with more, and an empty line ends it
        if not line.strip() or not line.startswith("  "):
            findings += _finding(block)
            block = []
        if line.strip():
            block.append(line.strip())
    return Report(errors, warnings, findings[:5], refusal)


def _counts(text: str) -> tuple[int | None, int]:
    """(errors, warnings) of the summary; no errors where there is no summary."""
    races = re.search(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)", text)
    if races:
        return int(races[1]), int(races[2])
    others = re.search(r"ERROR SUMMARY: (\d+) errors?", text)
    return (int(others[1]) if others else None), 0


def _finding(block: Sequence[str]) -> list[str]:
    """The first lines of what a tool complains about, without the host's backtrace; [] for anything else."""
    if not block or "SUMMARY" in block[0] or block[0].startswith(("COMPUTE-SANITIZER", "Target application", "LEAK")):
        return []
    kept = []
    for line in block:
        if "backtrace" in line.lower():
            break
        kept.append(line)
    return ["; ".join(kept[:5])]
