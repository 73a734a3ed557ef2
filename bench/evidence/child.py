"""The process that runs the units of a stage: `python -m bench.evidence.child FD`, started by `supervise`.

Its standard input is the task, a line of JSON; when that input ends the parent is gone, and so is this process.
To the file descriptor it writes a line of JSON for each event: "hello", "units", their "begin" and "end", and "done".
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

ON_NO_DEVICE = "there is no CUDA device here; --simulate runs every stage on the CPU"


class Task(NamedTuple):
    """What a child is to do; `until` is in seconds of time.monotonic, which is one clock for all processes."""

    stage: str  # a module
    out: str
    simulate: bool
    until: float | None
    skip: list[str]  # names of units
    deadly: list[str]  # kernels


def main(descriptor: int) -> int:
    """Runs what the parent asks for. The parent reads everything from the events."""
    task = Task(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    with os.fdopen(descriptor, "w", encoding="utf-8") as events:

        def tell(event: str, **facts: Any) -> None:
            events.write(json.dumps({"event": event, **plain(facts)}) + "\n")
            events.flush()

        return _run(task, tell)


def _run(task: Task, tell: Any) -> int:
    import torch

    from .units import Context, shunned

    if not task.simulate and not torch.cuda.is_available():
        tell("refuse", words=ON_NO_DEVICE)
        return 1
    where = torch.device("cpu") if task.simulate else torch.device("cuda", 0)
    module: Any = importlib.import_module(task.stage)
    until = min(math.inf if task.until is None else task.until, time.monotonic() + module.LIMIT)
    context = Context(Path(task.out), where, task.simulate, lambda: until - time.monotonic())
    tell("hello", device=device_name(where), versions=versions(), about=module.ABOUT, until=until)
    listed = list(module.units(context))
    tell("units", names=[unit.name for unit in listed])
    skip = set(task.skip)
    ran = len(skip)
    for unit in listed:
        if unit.name in skip:
            continue
        if context.left() <= 0 and (ran or not task.simulate):
            break
        ran += 1
        tell("begin", name=unit.name, timeout=unit.timeout, kernel=unit.kernel)
        start, broken = time.monotonic(), False
        try:
            facts = shunned(unit.kernel) if unit.kernel in task.deadly else unit.run()
            facts = {"ok": bool(facts["ok"]), "words": str(facts["words"]), **facts}
            if not task.simulate:
                torch.cuda.synchronize(where)  # what it launched and did not wait for is its doing
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            facts = {"ok": False, "words": words(error)}
            broken = not task.simulate and _is_broken(where)
        tell("end", name=unit.name, facts={**facts, "seconds": time.monotonic() - start}, broken=broken)
        if broken:
            return 1  # nothing answers any more in this process
    tell("done")
    return 0


def _is_broken(where: Any) -> bool:
    """Whether the device answers nothing any more."""
    import torch

    try:
        torch.cuda.synchronize(where)
        return float(torch.ones(8, device=where).sum()) != 8
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    except Exception:
        return True


def device_name(where: Any) -> str:
    """As PyTorch calls it."""
    import torch

    return torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU, simulated"


def versions() -> dict[str, str]:
    """Of what a run depends on."""
    from ..runner import versions

    return versions()


def words(error: BaseException) -> str:
    """One line of an exception, and where it was raised."""
    lines = str(error).strip().splitlines() or ["no message"]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(lines)[:600]}{where}"


def plain(value: Any) -> Any:
    """As JSON can hold it: what is not finite is None, what it does not know a string.

    >>> plain({"a": (1, float("nan")), "b": Path("c")})
    {'a': [1, None], 'b': 'c'}
    """
    if isinstance(value, dict):
        return {str(name): plain(v) for name, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def _end_with_the_parent() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)  # with the processes that compile for it


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
