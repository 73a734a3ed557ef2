"""Long runs: what the process holds stays as it is, and what does not is found. SOAK_SECONDS says how long."""

import importlib
import os
import pkgutil
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import pytest
import torch

import triton_conv
from bench import holdings, soak
from bench.soak import Holdings, Soak

ROOT = Path(__file__).parents[1]


# What has no bound of its own, and why it needs none.
UNBOUNDED = {
    "backends._of_environment": "one",
    "entry._hints": "one for each class of configs",
    "installed._trouble": "one",
    "key.source_hash": "one for each kernel",
    "tuning.on_device.commit": "one",
    "tuning.remembered._reader": "one",
    "recovery._failed": "recovery.LIMIT, the oldest of which goes",
    "recovery._room": "the same",
    "recovery._moved": "one: Triton's cache moves once",
    "stored._told": "one for each directory and reason",
    "fast._plain": "one for each device",
    "config._explicit": "one for each role",
    "stored._indices": "one for each device and kernel, of files of a bounded size",
    "stored._installed": "one for each problem that this process has tuned, which took it seconds",
    "stored._held": "the same, where the disk is full",
    "tuning.training._tuned": "the same",
}


def test_every_cache_has_a_bound_or_a_reason():
    for module in pkgutil.walk_packages(triton_conv.__path__, "triton_conv."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = holdings.caches()
    assert {"plan._make", "fast._bound", "functional._parameters_of", "kernels.launch._checked"} <= set(found)
    # what is written in capitals is a table that nobody adds to
    without = {name for name, cache in found.items() if cache.most is None and not name.split(".")[-1].isupper()}
    constants = {name for name in without if name.split(".")[-1].strip("_").isupper()}
    assert without - constants == set(UNBOUNDED)


def test_nothing_else_remembers_without_a_bound():
    """Of methods and inner functions, too, which `holdings.caches` does not see."""
    texts = {path: path.read_text() for path in sorted((ROOT / "triton_conv").rglob("*.py"))}
    places = [
        f"{path.stem}: {text.splitlines()[number + 1].strip().partition('(')[0]}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines())
        if line.strip() in ("@cache", "@functools.cache", "@lru_cache(None)", "@lru_cache(maxsize=None)")
    ]
    # `predicted` ends with the call that it is inside
    once = [
        "backends: def _of_environment",
        "installed: def _trouble",
        "on_device: def commit",
        "remembered: def _reader",
    ]
    few = ["choose: def predicted", "entry: def _hints", "key: def source_hash"]
    assert sorted(places) == sorted([*once, *few])


def test_a_few_seconds_are_flat():
    """In a process of its own, since those of other tests hold what they hold."""
    command = [sys.executable, "-m", "bench.soak", "--seconds", "3", "--calls", "12", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("flat")


kept: list = []


def descriptor(n):
    kept.append(os.open(os.devnull, os.O_RDONLY))


LEAKS = {
    "resident": lambda n: kept.append(bytearray(b"a" * 2**22)),
    "handles": descriptor,
    "objects": lambda n: kept.extend([n] for _ in range(300)),
    "plan._dangling": lambda n: triton_conv.plan._dangling.update({n: n}),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_planted_leak_is_found(name, monkeypatch):
    monkeypatch.setattr(soak, "random_calls", lambda seed, device: repeat(("nothing", lambda: None)))
    monkeypatch.setattr(triton_conv.plan, "_dangling", {}, raising=False)
    count = iter(range(10**9))
    try:
        found = soak.soak(0.0, torch.device("cpu"), calls=12, rounds=6, each=lambda: LEAKS[name](next(count)))
        assert any(fault.startswith(f"{name} grew") for fault in found.faults), found.faults
    finally:
        for one in kept:
            if isinstance(one, int):
                os.close(one)
        kept.clear()


def of(**changes):
    return Holdings(10**9, 6, 2, 10**5, 3, 10**6, 10**8, 40)._replace(**changes)


@pytest.mark.parametrize(
    ("name", "by"),
    [("resident", 2**21), ("handles", 1), ("threads", 1), ("warnings", 1), ("allocated", 512), ("reserved", 2**23)],
)
def test_what_grows_slowly_is_named(name, by):
    slow = Soak(rounds=[of(**{name: getattr(of(), name) + by * n}) for n in range(60)])
    assert [fault.split()[0] for fault in slow.faults] == [name]
    once = Soak(rounds=[of()] * 3 + [of(**{name: getattr(of(), name) + by})] * 57)
    assert once.faults == []


def test_a_call_that_fails_and_a_cache_beyond_its_bound_are_faults(monkeypatch):
    def broken():
        raise ZeroDivisionError("nothing")

    monkeypatch.setattr(soak, "random_calls", lambda *_: repeat(("broken", broken)))
    monkeypatch.setattr(soak, "caches", lambda: {"plan._make": holdings.Cache(5, 4)})
    faults = soak.soak(0.0, torch.device("cpu"), calls=2, rounds=3).faults
    assert any("broken, seed 0, round 0: ZeroDivisionError: nothing" in fault for fault in faults)
    assert "plan._make has 5, and may have 4" in faults


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", [False, True], ids=["plain torch", "interpreter"])
def test_minutes_are_flat(interpreted):
    """Half of SOAK_SECONDS each."""
    seconds = float(os.environ.get("SOAK_SECONDS", "300")) / 2
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    command = [sys.executable, "-m", "bench.soak", "--seconds", f"{seconds:g}", "--device", "cpu"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=5 * seconds + 120, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
