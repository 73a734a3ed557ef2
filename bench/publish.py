"""Takes results of a GPU run into the repository: `python -m bench.publish OUT`.

OUT is the folder of an evidence run, or of `triton-conv bench`. Its bench.json and evidence.json go to
bench/results/<device>/<date>-<commit>/, with the report and the plots; then the README's section is written anew.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from triton_conv import stored

from . import performance, plots, records, report
from .evidence import record
from .files import read_bytes
from .records import Run

MOST_BYTES = 2 * 2**20  # that a repository takes without a thought


def main(argv: Sequence[str] | None = None) -> int:
    """Publishes a folder and returns the exit code of the process."""
    parser = argparse.ArgumentParser(prog="python -m bench.publish", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder with bench.json, and perhaps evidence.json")
    parser.add_argument("--no-audit", action="store_true", help="do not compile lost layers, which takes minutes")
    arguments = parser.parse_args(argv)
    try:
        directory = publish(arguments.out, performance.RESULTS, audit=not arguments.no_audit)
    except (ValueError, OSError) as error:
        print(f"bench.publish: error: {error}", file=sys.stderr)
        return 2
    paths = sorted(directory.iterdir())
    for path in paths:
        print(path)
    total = sum(path.stat().st_size for path in paths)
    if total > MOST_BYTES:
        print(f"{total / 2**20:.1f} MiB: more than a repository takes without a thought", file=sys.stderr)
    return performance.main([])


def publish(out: Path, results: Path, audit: bool = True) -> Path:
    """Writes what a run found under `results` and returns its directory.

    Raises OSError where bench.json cannot be read, and ValueError where it is no run that was measured, or
    evidence.json is no record of an evidence run.
    """
    run = records.read(out / "bench.json")
    if run.source != "measured":
        raise ValueError(f"{out / 'bench.json'}: only what was measured is published, and this is {run.source}")
    evidence = out / "evidence.json"
    if evidence.exists():
        record.read(out)
    page = report.html(run, audit=audit)
    directory = directory_of(run, results)
    records.write(run, directory / "bench.json")
    records.replace_text(directory / "report.html", page)
    if evidence.exists():
        records.replace_text(directory / "evidence.json", read_bytes(evidence, record.MOST_BYTES))
    plots.write(run, directory)
    return directory


def directory_of(run: Run, results: Path) -> Path:
    """Where a run's results are kept, by device, date and commit.

    >>> run = Run("NVIDIA H200", "measured", "2026-11-21T20:15:00+00:00", "0123456789ab", "triton-conv bench")
    >>> directory_of(run, Path("results")).as_posix()
    'results/NVIDIA_H200/2026-11-21-0123456789ab'
    """
    device = stored.path_of(results, run.device, "bench").parent
    date, commit = (re.sub(r"[^A-Za-z0-9-]+", "", text) or "unknown" for text in (run.time[:10], run.commit))
    return device / f"{date}-{commit}"


if __name__ == "__main__":
    raise SystemExit(main())
