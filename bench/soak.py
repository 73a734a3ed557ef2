"""Calls of random shapes, dtypes and kinds for as long as is asked for: `python -m bench.soak --seconds 300`.

Each round makes other calls, forward and backward; then what the package remembers is forgotten, and what the process
still holds is to be no more than before: memory, file handles, threads, objects, warnings, and on a GPU its memory.
While a round runs no cache may be larger than its bound, and those without one may not grow from round to round.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from triton_conv import execute

from .holdings import Holdings, caches, forget, holdings
from .soak_calls import KINDS, random_calls

CALLS = 120  # of a round
INTERPRETED = 6  # where kernels are interpreted, which takes seconds
COMPILED = 24  # on a GPU, where most of them are compiled at first
WARM = 3  # rounds at least in which imports, libraries and allocators may grow; until each kind was called, too
STEADY = 3  # rounds at least after them

# How much more the last rounds may hold than the first after warming up.
MARGINS = Holdings(
    resident=24 * 2**20,  # pages that the allocator keeps; a leak of 100 bytes a call is more within an hour
    handles=0,
    threads=0,
    objects=1000,  # of modules that a kind of call loads where it takes a way that it did not take before
    warnings=0,
    allocated=0,
    reserved=64 * 2**20,
    kernels=10**9,  # new ones are compiled all the time, for new dtypes and channels
)
PER_KERNEL = {"resident": 2**20, "objects": 3000}  # that a compiled kernel may hold


@dataclass
class Soak:
    """What a soak saw: holdings after each round, the largest sizes of caches, and what failed."""

    warm: int = WARM  # of the rounds
    calls: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    rounds: list[Holdings] = field(default_factory=list)
    over: list[str] = field(default_factory=list)  # caches beyond their bound
    grown: dict[str, list[int]] = field(default_factory=dict)  # sizes of caches without a bound, by round
    failures: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """What is not flat, and what failed, in words."""
        found = [*self.failures, *self.over]
        steady = self.rounds[self._warm(len(self.rounds)) :]
        if len(steady) < 2:
            return [*found, "too few rounds to say whether anything grows: give it more seconds"]
        part = max(len(steady) // 3, 1)
        for name, most in MARGINS._asdict().items():
            before, after = (median(getattr(h, name) for h in some) for some in (steady[:part], steady[-part:]))
            compiled = steady[-1].kernels - steady[0].kernels
            if after - before > most + compiled * PER_KERNEL.get(name, 0):
                found.append(f"{name} grew from {before:,.0f} to {after:,.0f}")
        for name, sizes in self.grown.items():
            late = sizes[self._warm(len(sizes)) :]
            if len(late) >= 3 and all(b > a for a, b in pairwise(late)):
                found.append(f"{name} grew each round, from {late[0]} to {late[-1]}, and has no bound")
        return found

    def _warm(self, rounds: int) -> int:
        return min(max(self.warm, rounds // 4), max(rounds - 2, 0))


def soak(
    seconds: float,
    device: torch.device,
    seed: int = 0,
    calls: int | None = None,
    rounds: int = 0,
    heard: Callable[[int, Holdings], None] | None = None,
    each: Callable[[], Any] | None = None,
) -> Soak:
    """Runs rounds for so many seconds, and `rounds` at least however long they take.

    Where the seconds are too few to say anything, it goes on for up to four times as long. `heard` is told of each
    round, `each` is called after each call.
    """
    start, number = time.monotonic(), 0
    interpreted = device.type == "cpu" and execute.interpreting()
    made = (calls or (INTERPRETED if interpreted else COMPILED if device.type == "cuda" else CALLS)) // 2 or 1
    found = Soak(warm=max(WARM, -(-len(KINDS) // made)))
    coming = random_calls(seed, device)
    # oneDNN keeps code for each new shape, up to 1,024; NumPy, which interprets, warns of values once for each line
    heed: Literal["ignore"] | None = "ignore" if interpreted else None
    while True:
        spent = time.monotonic() - start
        if number >= rounds and spent >= seconds * (1 if number >= found.warm + STEADY else 4):
            break
        for name, call in islice(coming, made):
            for _ in range(2):  # the second time as one that was made before
                try:
                    with torch.backends.mkldnn.flags(enabled=False), np.errstate(all=heed):
                        call()
                except Exception as error:
                    words = f"{name}, seed {seed}, round {number}: {type(error).__name__}: {str(error)[:300]}"
                    found.failures += [words] if len(found.failures) < 10 else []
                found.kinds[name] += 1
                found.calls += 1
                if each is not None:
                    each()
        _sizes(found)
        forget()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = holdings()
        found.rounds.append(now._replace(objects=now.objects - len(found.rounds)))  # one of which is each of these
        if heard is not None:
            heard(number, found.rounds[-1])
        number += 1
    found.seconds = time.monotonic() - start
    return found


def _sizes(found: Soak) -> None:
    for name, cache in caches().items():
        if cache.most is None:
            found.grown.setdefault(name, []).append(cache.size)
        elif cache.size > cache.most:
            found.over.append(f"{name} has {cache.size}, and may have {cache.most}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 1 where something grew or failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="how long (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of the calls (default: %(default)s)")
    parser.add_argument("--calls", type=int, help="of a round (default: as many as take seconds)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where (default: a GPU if there is one)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch sees no CUDA device")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())

    def heard(number: int, now: Holdings) -> None:
        print(f"round {number}: {words(now)}", flush=True)

    found = soak(arguments.seconds, device, arguments.seed, arguments.calls, heard=heard)
    print(
        f"{found.calls} calls in {found.seconds:.0f} s: {', '.join(f'{n} {k}' for k, n in sorted(found.kinds.items()))}"
    )
    for fault in found.faults:
        print(f"FAULT: {fault}")
    print("flat" if not found.faults else f"{len(found.faults)} faults, seed {arguments.seed}")
    return 1 if found.faults else 0


def words(now: Holdings) -> str:
    """Holdings in a line."""
    text = f"{now.resident / 2**20:.1f} MiB, {now.handles} handles, {now.threads} threads, {now.objects} objects"
    gpu = f", GPU {now.allocated / 2**20:.1f} of {now.reserved / 2**20:.1f} MiB, {now.kernels} kernels"
    return text + (gpu if now.reserved else "")


if __name__ == "__main__":
    sys.exit(main())
