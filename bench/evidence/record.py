"""What an evidence run has found so far: `evidence.json` in its folder."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import records
from ..files import read_json, shown

FORMAT = 1
FILE = "evidence.json"
MOST_BYTES = 64 * 2**20
_ROOT = Path(__file__).parents[2]

Facts = dict[str, Any]


@dataclass
class Record:
    """The facts of finished units, by stage and name, and what they were made with."""

    commit: str
    simulated: bool
    device: str = ""
    time: str = ""  # of the start, ISO 8601, UTC
    versions: dict[str, str] = field(default_factory=dict)
    stages: dict[str, dict[str, Facts]] = field(default_factory=dict)

    def failed(self) -> Iterator[tuple[str, str, Facts]]:
        """(stage, unit, facts) of those that are not ok."""
        for stage, units in self.stages.items():
            for name, facts in units.items():
                if not facts["ok"]:
                    yield stage, name, facts

    def deadly(self, times: int = 2) -> list[str]:
        """Kernels of which at least so many units hung or ended their process: others of them are left out."""
        counts = Counter(facts["deadly"] for _, _, facts in self.failed() if "deadly" in facts)
        return [kernel for kernel, count in counts.items() if count >= times]

    def forget(self, stage: str, name: str) -> None:
        """Lets a unit run again."""
        self.stages.get(stage, {}).pop(name, None)

    def finished(self, stage: str) -> list[str]:
        """Names of units that a resumed run skips."""
        return [name for name, facts in self.stages.get(stage, {}).items() if not facts.get("unfinished")]


def begin(commit: str, simulated: bool) -> Record:
    """A record of now."""
    return Record(commit, simulated, time=datetime.now(timezone.utc).isoformat(timespec="seconds"))


def write(record: Record, out: Path) -> None:
    """Writes the record into its folder, whole or not at all."""
    records.replace_text(out / FILE, json.dumps({"format": FORMAT, **asdict(record)}, indent=1) + "\n")


def read(out: Path) -> Record | None:
    """The record of a folder, None where there is none. Raises ValueError, naming the file, for what is none."""
    path = out / FILE
    try:
        found = read_json(path, MOST_BYTES)
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        bare: Record = records.typed(Record, {**found, "stages": {}}, "the file")
        bare.stages = _stages(found.get("stages", {}))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is no evidence run: {str(error).removeprefix(f'{path}: ')}") from error
    return bare


# What is read of a unit's facts, and of what kind it is; the others are for people.
_READ = {"ok": bool, "words": str, "seconds": float, "deadly": str, "unfinished": bool}


def _stages(found: Any) -> dict[str, dict[str, Facts]]:
    if not isinstance(found, dict):
        raise ValueError("stages: is to be an object")
    for stage, units in found.items():
        place = f"stages.{shown(stage)[1:-1]}"
        if not isinstance(units, dict):
            raise ValueError(f"{place}: is to be an object")
        for name, facts in units.items():
            unit = f"{place}.{shown(name)[1:-1]}"
            if not isinstance(facts, dict) or not isinstance(facts.get("ok"), bool):
                raise ValueError(f"{unit}: does not say whether it is ok")
            facts.setdefault("words", "")
            for key, kind in _READ.items():
                if key in facts:
                    records.typed(kind, facts[key], f"{unit}.{key}")
    return found


def commit() -> str:
    """The commit of this checkout, or, where there is no git, a name of its sources."""
    try:
        command = ["git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return _of_sources()
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else _of_sources()


def _of_sources() -> str:
    digest = hashlib.sha256()
    for folder in ("triton_conv", "bench", "autotune_configs"):
        for path in sorted((_ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json") and "results" not in path.parts:
                digest.update(path.read_bytes())
    return f"sources-{digest.hexdigest()[:12]}"
