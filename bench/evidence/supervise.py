"""Runs stages in processes that may hang or die, and keeps what they found: a parent that never touches the device."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..files import printable
from . import record as records
from .child import Task
from .record import Facts, Record

START = "(start)"  # the name under which it is recorded that a stage does not even begin
_START_SECONDS = 120.0  # until a stage has listed its units
_RESERVE = 12.0  # seconds for a later stage of a simulation
_GRACE = 5.0  # seconds for a unit to notice that the time of its stage is up
_LOG_BYTES = 12 * 2**20
_TRACE = "(most recent call first):"  # what faulthandler prints before the calls of a thread
_LAST_LINES = 5  # of what a unit printed, in its facts


class RefusedError(Exception):
    """The folder holds another run's results, or there is no device."""


class OtherDeviceError(RefusedError):
    """The folder holds results of another device."""


class Log:
    """What is printed, on the terminal and in a file; what children print is in the file alone."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._left = _LOG_BYTES - self._file.tell()
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """A line for the person who waits."""
        print(text, flush=True)
        self.keep(text + "\n")

    def keep(self, text: str) -> None:
        """A line for the file; once that is long, for nobody."""
        with self._lock:
            if self._left > 0 and not self._file.closed:
                self._left -= len(text)
                self._file.write(text)
                self._file.flush()

    def close(self) -> None:
        self._file.close()


@dataclass
class Report:
    """What became of a stage in this run: `left` are the units that are not finished, in all runs together."""

    stage: str
    about: str = ""
    seconds: float = 0.0
    left: int = 0


def run(
    stages: Mapping[str, str],
    out: Path,
    record: Record,
    log: Log,
    budget: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Report]:
    """Runs stages (module by letter) one after the other, as far as the budget in seconds goes.

    What is finished is in the record already, and is skipped. Raises `RefusedError`, and KeyboardInterrupt after all
    processes have ended; the record is on the disk whatever happens.
    """
    end = None if budget is None else time.monotonic() + budget
    reports = []
    with tempfile.TemporaryDirectory(prefix="evidence-") as scratch:
        variables = {**os.environ, **(environment or {}), "TMPDIR": scratch}
        for number, (letter, module) in enumerate(stages.items()):
            until = math.inf if end is None else end
            if record.simulated and end is not None:  # of worth is that each runs something: later ones have time too
                now, later = time.monotonic(), len(stages) - number - 1
                until = min(now + 2 * max(end - now, 0) / (later + 2), end - later * _RESERVE)
            reports.append(_Watch(letter, module, out, record, log, until).run(variables))
    return reports


class _Child:
    """A running child: its events, and the last lines that it printed."""

    def __init__(self, task: Task, variables: Mapping[str, str], log: Log):
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue()  # None when it says no more
        self._lines: deque[str] = deque(maxlen=200)
        self._log = log
        ours, theirs = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.evidence.child", str(theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs,),
            env=dict(variables),
            start_new_session=True,  # Ctrl-C is the parent's to answer, and a group can be ended as one
        )
        os.close(theirs)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, which is noticed soon
            self.process.stdin.write((json.dumps(task._asdict()) + "\n").encode())
            self.process.stdin.flush()
        events = os.fdopen(ours, encoding="utf-8", errors="replace")
        self._readers = [
            threading.Thread(target=self._read_events, args=(events,), daemon=True),
            threading.Thread(target=self._read_lines, args=(self.process.stdout,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_events(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                try:
                    self.events.put(json.loads(line))
                except ValueError:
                    break  # half a line, of one that was killed
        self.events.put(None)

    def _read_lines(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                text = line.decode(errors="replace")
                self._lines.append(text)
                self._log.keep(text)

    def last_lines(self) -> list[str]:
        """What it printed last; of one that ended itself because it hung, the innermost calls of its main thread."""
        lines = [line.rstrip()[:300] for line in list(self._lines) if line.strip()]
        if self._hung():
            begin = max(number for number, line in enumerate(lines) if _TRACE in line)
            return lines[begin + 1 : begin + 1 + _LAST_LINES]
        return lines[-_LAST_LINES:]

    def _hung(self) -> bool:
        """Whether it ended itself so: see `checking.watched`."""
        lines = list(self._lines)
        late = any(line.startswith("Timeout (") for line in lines)
        return late and any(_TRACE in line for line in lines)

    def ending(self) -> str:
        """How it ended by itself, in words."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE)
        code = self.process.poll()
        self.kill()
        if code is None:
            words = "stopped answering"
        elif code < 0:
            words = f"died with signal {_signal(-code)}"
        elif self._hung():
            return " ".join(["hung: it ended itself in", *(line.strip() for line in self.last_lines()[:1])])
        else:
            words = f"ended with exit code {code}"
        last = self.last_lines()[-1:]
        return f"{words}: {last[0].strip()}" if last else words

    def kill(self) -> None:
        """Ends it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # stuck in the driver: it ends when that lets go
            self.process.wait(30)
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
        for reader in self._readers:
            reader.join(2)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


class _Watch:
    """A stage, over all the children that it takes."""

    def __init__(self, letter: str, module: str, out: Path, record: Record, log: Log, until: float):
        self.letter, self.module, self.out, self.record, self.log = letter, module, out, record, log
        self.until = until
        self.about = ""
        self.names: list[str] | None = None  # of all units, once they are listed
        self.unit, self.kernel, self.began, self.unit_until = "", "", 0.0, math.inf  # in flight

    def run(self, variables: Mapping[str, str]) -> Report:
        """Runs what is left of the stage, in a new process after each that dies."""
        start = time.monotonic()
        self.record.stages.setdefault(self.letter, {})
        self.record.forget(self.letter, START)
        finished, idle = -1, 0
        while (self._owes_one() or time.monotonic() < self.until) and idle < 2:  # deaths between units
            before, finished = finished, len(self.record.finished(self.letter))
            idle = idle + 1 if finished == before else 0
            if idle < 2 and self._child_is_the_last(variables):
                break
        done = set(self.record.finished(self.letter))
        left = sum(name not in done for name in self.names or ())
        return Report(self.letter, self.about, time.monotonic() - start, left)

    def _owes_one(self) -> bool:
        """In a simulation each stage runs a unit, however slow the machine is: what counts is that it can run."""
        return self.record.simulated and not self.record.stages[self.letter]

    def _child_is_the_last(self, variables: Mapping[str, str]) -> bool:
        until = None if self.until == math.inf else self.until
        done, deadly = self.record.finished(self.letter), self.record.deadly()
        task = Task(self.module, str(self.out), self.record.simulated, until, done, deadly)
        child = _Child(task, variables, self.log)
        self.unit, self.unit_until = "", time.monotonic() + _START_SECONDS
        try:
            while True:
                end = math.inf if self._owes_one() else self.until + _GRACE
                wait = min(self.unit_until, end) - time.monotonic()
                if wait <= 0:
                    return self._out_of_time(child)
                try:
                    event = child.events.get(timeout=min(wait, 1.0))
                except queue.Empty:
                    if child.process.poll() is None:
                        continue
                    event = None  # something that it started holds its end of the pipe
                if event is None:
                    return self._died(child)
                if event["event"] == "done":
                    return True
                if self._heed(event, child):
                    self.log.say(f"{self.letter}  the device answers no more: a new process goes on")
                    return False
        finally:
            child.kill()

    def _heed(self, event: dict[str, Any], child: _Child) -> bool:
        """Whether the child says that it cannot go on."""
        kind = event["event"]
        if kind == "refuse":
            raise RefusedError(event["words"])
        if kind == "hello":
            self._greet(event)
        elif kind == "units":
            self.names, self.unit_until = event["names"], math.inf
        elif kind == "begin":
            self.unit, self.kernel, self.began = event["name"], event["kernel"], time.monotonic()
            self.unit_until = self.began + event["timeout"]
            self.log.keep(f"-- {self.letter} {self.unit}\n")
        elif kind == "end":
            facts = event["facts"]
            if not facts["ok"]:
                facts.setdefault("output", child.last_lines())
                facts |= {"deadly": self.kernel} if event["broken"] and self.kernel else {}
            self._finish(event["name"], facts)
            self.unit, self.unit_until = "", math.inf
            return event["broken"]
        return False

    def _greet(self, hello: dict[str, Any]) -> None:
        if self.record.device not in ("", hello["device"]):
            raise OtherDeviceError(
                f"{self.out} holds results of {self.record.device}, and this is {hello['device']}: "
                "give another folder with --out, or start anew with --again"
            )
        self.until = min(self.until, hello["until"])
        self.record.device, self.record.versions = hello["device"], hello["versions"]
        records.write(self.record, self.out)
        if not self.about:
            self.about = hello["about"]
            self.log.say(f"\n== {self.letter}: {self.about} (at most {max(self.until - time.monotonic(), 0):.0f} s)")

    def _finish(self, name: str, facts: Facts) -> None:
        self.record.stages[self.letter][name] = facts
        records.write(self.record, self.out)
        mark = "FAILED" if not facts["ok"] else "to go on" if facts.get("unfinished") else "ok"
        self.log.say(f"{self.letter}  {mark:6} {facts['seconds']:6.1f} s  {name}: {facts['words']}")

    def _fail(self, words: str, child: _Child) -> None:
        seconds = time.monotonic() - self.began if self.unit else 0.0
        facts = {"ok": False, "words": words, "output": child.last_lines(), "seconds": seconds}
        facts |= {"deadly": self.kernel} if self.unit and self.kernel else {}
        self._finish(self.unit or START, facts)

    def _out_of_time(self, child: _Child) -> bool:
        """A unit that takes longer than it may has failed; one whose stage is over is left for another run."""
        now = time.monotonic()
        if self.unit_until > now:
            if self.unit:
                self.log.say(f"{self.letter}  cut off  {self.unit}: the time of the stage is up")
            return True
        child.kill()  # so that all of what it printed is there
        if self.unit:
            self._fail(f"hung: it was ended after {now - self.began:.0f} s", child)
            return False
        self._fail(f"hung: it listed no units within {_START_SECONDS:.0f} s", child)
        return True

    def _died(self, child: _Child) -> bool:
        """What was in flight has failed; a stage that does not begin is given up."""
        words = child.ending()
        if self.unit:
            self._fail(words, child)
        elif self.names is None:
            self._fail(words, child)
            return True
        else:
            self.log.say(f"{self.letter}  a process {words}; a new one goes on")
        return False


def table(reports: Sequence[Report], record: Record) -> str:
    """The stages in lines, then the failed units in words."""
    lines = [f"{'stage':5}  {'ok':>4} {'failed':>6} {'left':>5} {'seconds':>8}"]
    for r in reports:
        units = record.stages.get(r.stage, {}).values()
        failed = sum(not facts["ok"] for facts in units)
        fine = sum(facts["ok"] and not facts.get("unfinished") for facts in units)
        lines.append(f"{r.stage:5}  {fine:4} {failed:6} {r.left:5} {r.seconds:8.1f}  {r.about or 'not begun'}")
    for stage, name, facts in record.failed():
        lines.append(printable(f"failed: {stage} {name}: {facts['words']}"))
    return "\n".join(lines)
