"""The command line of the evidence run."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import STAGES, record, supervise


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs stages and says what came of them; 1 if a unit failed, 2 if it may not run, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence",
        description="Checks and measures everything on a GPU, in stages. Run again, it goes on where it was.",
    )
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="folder of the results (default: evidence)")
    parser.add_argument("--budget", type=_seconds, help="seconds for everything (default: as the stages take)")
    letters = "".join(STAGES)
    parser.add_argument("--stages", type=_stages, default=letters, help=f"of {letters}, in the order that is given")
    parser.add_argument("--simulate", action="store_true", help="on the CPU, with simulated times")
    parser.add_argument(
        "--again", action="store_true", help="run failed units again; of another commit or device, start anew"
    )
    parser.add_argument("--commit", default="", help="the commit, where git is not at hand")
    given = parser.parse_args(arguments)
    commit = given.commit or record.commit()
    try:
        found = _record(given.out, commit, given.simulate, given.again)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGINT itself may be ignored, as behind nohup
    log = supervise.Log(given.out / "log.txt")
    try:
        try:
            return _run(given, found, log)
        except supervise.OtherDeviceError:
            if not given.again:
                raise
            return _run(given, _anew(given.out, commit, given.simulate), log)
    except supervise.RefusedError as error:
        log.say(str(error))
        return 2
    except KeyboardInterrupt:
        log.say("interrupted: what is finished is kept, and the same command goes on")
        return 130
    finally:
        log.close()


def _run(given: Any, found: record.Record, log: supervise.Log) -> int:
    stages = {letter: STAGES[letter] for letter in given.stages}
    log.say(f"evidence of {found.commit} in {given.out}{', simulated: no time is real' if found.simulated else ''}")
    with tempfile.TemporaryDirectory(prefix="evidence-configs-") as empty:  # what a user tuned is no evidence
        environment = {"TRITON_CONV_CACHE": empty, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
        if found.simulated:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        reports = supervise.run(stages, given.out, found, log, given.budget, environment)
    log.say("\n" + supervise.table(reports, found))
    left = sum(report.left for report in reports)
    late = [report.stage for report in reports if not report.about]
    if left or late:
        parts = [f"{left} units"] if left else []
        parts += [f"stages {', '.join(late)}"] if late else []
        log.say(f"left: {' and '.join(parts)}; the same command goes on with them")
    return 1 if any(True for _ in found.failed()) else 0


def _record(out: Path, commit: str, simulated: bool, again: bool) -> record.Record:
    """The record to go on with. Raises ValueError where the folder holds another run's."""
    found = record.read(out)
    if found is None:
        return record.begin(commit, simulated)
    same = (found.commit, found.simulated) == (commit, simulated)
    if not same and not again:
        what = "simulated results" if found.simulated and not simulated else f"results of commit {found.commit}"
        raise ValueError(
            f"{out} holds {what}, and this is commit {commit}: "
            "give another folder with --out, or start anew with --again"
        )
    if not same:
        return _anew(out, commit, simulated)
    if again:
        for stage, name, _ in list(found.failed()):
            found.forget(stage, name)
    return found


def _anew(out: Path, commit: str, simulated: bool) -> record.Record:
    for name in ("evidence.json", "bench.json", "store.tgz"):
        (out / name).unlink(missing_ok=True)
    return record.begin(commit, simulated)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return seconds


def _stages(text: str) -> str:
    unknown = sorted(set(text) - set(STAGES))
    if unknown or not text:
        raise argparse.ArgumentTypeError(f"{text!r} is to be letters of {''.join(STAGES)}")
    return "".join(dict.fromkeys(text))


if __name__ == "__main__":
    sys.exit(main())
