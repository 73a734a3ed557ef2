"""Who is quickest, from noisy samples: rounds over all candidates, so that a drifting clock is everyone's.

Every sampler is asked once a round. One that cannot win any more is asked no longer; the rounds end when nobody's place
is open, or when they have cost enough. Medians and quartiles are what counts: an interrupt spoils a sample, not a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median, quantiles
from typing import NamedTuple

from .. import stored

# Rounds before anyone is eliminated, of those that then are left, and of those that remain close to a tie.
LEAST, USUAL, MOST = 9, 30, 100


class Timing(NamedTuple):
    """`seconds` is the median of so many rounds, `spread` half the distance of their quartiles, relative."""

    seconds: float
    spread: float
    rounds: int


def timing(samples: Sequence[float]) -> Timing:
    """The statistics of samples in seconds.

    >>> timing([1.0, 1.1, 0.9, 1.0, 5.0]).seconds
    1.0
    """
    middle = median(samples)
    low, high = quartiles(samples)
    return Timing(middle, (high - low) / (2 * middle), len(samples))


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one; of a single sample, itself."""
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return low, high


def interleaved(
    samplers: Sequence[Callable[[], float]], now: Callable[[], float] = lambda: 0.0, seconds: float = math.inf
) -> list[Timing | None]:
    """The timing of each sampler, each call of which is a sample in seconds.

    No round starts once `now()` has advanced by `seconds`; what has fewer than `LEAST` rounds by then is None, unless
    it was eliminated, for which so many are needed. Whoever is eliminated keeps the timing that it had.
    """
    samples: list[list[float]] = [[] for _ in samplers]
    alive, start = list(range(len(samplers))), now()
    for number in range(MOST):
        if not alive or (number and now() - start > seconds):
            break
        for i in _order(alive, number):
            samples[i].append(samplers[i]())
        if number + 1 >= LEAST:
            alive = contenders(samples, alive)
            if len(alive) == 1 or (number + 1 >= USUAL and settled([samples[i] for i in alive])):
                break
    return [timing(s) if len(s) >= LEAST else None for s in samples]


def all_rounds(
    samplers: Sequence[Callable[[], float]],
    rounds: int,
    now: Callable[[], float] = lambda: 0.0,
    seconds: float = math.inf,
    least: int = 1,
) -> list[Timing]:
    """The timing of each sampler after so many rounds of all of them: nobody is eliminated.

    No round after the first `least` starts once `now()` has advanced by `seconds`.
    """
    samples: list[list[float]] = [[] for _ in samplers]
    start = now()
    for number in range(rounds):
        if number >= least and now() - start > seconds:
            break
        for i in _order(range(len(samplers)), number):
            samples[i].append(samplers[i]())
    return [timing(s) for s in samples]


def _order(those: Sequence[int], number: int) -> Iterable[int]:
    """Theirs in a round: forth and back, so that nobody always follows the same one."""
    return those if number % 2 == 0 else reversed(those)


def contenders(samples: Sequence[Sequence[float]], alive: Sequence[int]) -> list[int]:
    """Those that may still win: whose least sample is not above what the quickest takes in all but its worst quarter.

    A tie goes to the simpler config, so that it may be by as much slower as ties are wide.
    """
    best = min(alive, key=lambda i: median(samples[i]))
    tie = 1 + max(stored.TIE, timing(samples[best]).spread)
    limit = quartiles(samples[best])[1] * tie
    return [i for i in alive if min(samples[i]) <= limit]


def settled(samples: Sequence[Sequence[float]]) -> bool:
    """Whether more rounds would hardly change who is within a tie of the quickest."""
    timings = [timing(s) for s in samples]
    best = min(timings, key=lambda t: t.seconds)
    return all(
        notch(max(t.spread, best.spread), t.rounds)
        < abs(t.seconds / best.seconds - 1 - max(stored.TIE, t.spread, best.spread))
        for t in timings
        if t is not best
    )


def notch(spread: float, rounds: int) -> float:
    """How uncertain a median is, relative: two medians differ where their notches do not overlap.

        >>> round(notch(0.01, 100), 5)
        0.00314

    It is 1.57 times the distance of the quartiles over the root of the samples: McGill, Tukey, Larsen, Variations of
    Box Plots (1978). `spread` and `rounds` are those of a `Timing`.
    """
    return 2 * 1.57 * spread / math.sqrt(rounds)
