"""Where we lose to cuDNN, and why that is likely: from a row's numbers, its plan, and on request its compiled code.

    >>> losses(run)[0].words
    'it takes 2.1 times its predicted 40.2 us: it waits for what the model misses; it reaches 31% of the nearer ceiling'

Reasons are guesses that numbers support, for whoever looks next; a profiler has the last word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from triton_conv import stored
from triton_conv.devices import Device
from triton_conv.explain import AnyPlan
from triton_conv.tuning import audit as auditing
from triton_conv.tuning import suites
from triton_conv.tuning.code import TARGETS

from . import summary
from .jobs import Job
from .jobs import plans as plans_of_job
from .records import OURS, Row, Run
from .words import us

_AS_PREDICTED = 1.25  # times the predicted time: what a prediction may be off by
_FULL = 0.75  # of the places on a device: with fewer tiles, many of them idle
_WAVES = 3  # where there are no more, a last one that is not full counts


@dataclass(frozen=True)
class Loss:
    """A suite's worst layer among those on which a rival is quicker by more than noise.

    `rows` of `of` rows are lost. `words` are the likely reasons, the likeliest first, `code` what the compiler made of
    the kernels, "" unless that was asked for and they can be compiled here.
    """

    suite: str
    row: Row
    rival: str
    ours: float
    theirs: float
    rows: int
    of: int
    words: str
    code: str = ""

    @property
    def ratio(self) -> float:
        """Our time over the rival's."""
        return self.ours / self.theirs


def losses(run: Run, audit: bool = False) -> list[Loss]:
    """For each suite that has one, the worst loss to channels-last cuDNN; the worst of all first.

    With `audit` the kernels of these layers are compiled, in processes beside this one and without a GPU.
    """
    device, found, planned = summary.device(run), [], []
    for suite in dict.fromkeys(row.suite for row in run.rows):
        rows = [row for row in run.rows if row.suite == suite and summary.speedup(row) is not None]
        lost = [row for row in rows if summary.verdict(row) < 0]
        if not lost:
            continue
        worst = min(lost, key=lambda row: summary.speedup(row) or 0.0)
        who = summary.rival(worst)
        assert who is not None
        ours, theirs = worst.seconds(OURS), worst.seconds(who)
        assert ours is not None
        assert theirs is not None
        planned.append(plans_of(worst, device) if device else [])
        words = "; ".join(_reasons(run, worst, ours, theirs, planned[-1]))
        found.append(Loss(suite, worst, who, ours, theirs, len(lost), len(rows), words))
    if audit and device:
        found = [replace(loss, code=code) for loss, code in zip(found, _codes(planned, device), strict=True)]
    return sorted(found, key=lambda loss: -loss.ratio)


def reason(run: Run, row: Row) -> str:
    """The likely reasons why a row is lost, in words; "" where it is not."""
    who, ours = summary.rival(row), row.seconds(OURS)
    theirs = row.seconds(who) if who else None
    if not ours or not theirs or ours <= theirs:
        return ""
    device = summary.device(run)
    return "; ".join(_reasons(run, row, ours, theirs, plans_of(row, device) if device else []))


# ---------------------------------------------------------------------------------------------------------------------
# From numbers


def _reasons(run: Run, row: Row, ours: float, theirs: float, plans: list[AnyPlan]) -> Iterator[str]:
    predicted, host = row.predicted_seconds, row.measured[OURS].host_seconds
    if theirs < row.roofline_seconds:
        yield (
            f"the rival is below the {_us(row.roofline_seconds)} of a direct convolution: operands from L2, or an "
            "algorithm of fewer products"
        )
    if predicted and ours > _AS_PREDICTED * predicted:
        much = f"{ours / predicted:.1f} times its predicted {_us(predicted)}"
        yield f"it takes {much}: it waits for what the model misses"
    elif predicted and predicted > theirs:
        yield f"predicted to lose: {_us(predicted)}, {row.roofline_seconds / predicted:.0%} of the roofline"
    plain = _plain_kernel(row)
    if plain:
        yield plain
    yield from _of_plans(plans)
    if row.workspace_bytes and 2 * row.workspace_bytes / _copy(run, row) > 0.1 * ours:
        yield f"the kernel has {row.workspace_bytes / 2**20:.3g} MiB of copies or slabs around it, written and read"
    share = summary.of_ceilings(run, row) or row.roofline_seconds / ours
    yield f"it reaches {share:.0%} of the nearer ceiling; the roofline's limit is {row.limit}"
    if host and host > ours:  # which times of graphs do not show
        yield f"besides, a call takes the host {_us(host)}, longer than the device"


def _plain_kernel(row: Row) -> str:
    """Why the general kernel ran and no special one, as plans say."""
    whys = dict.fromkeys(re.findall(r"pointer gather, since ([^;]+)", row.reason))
    return f"the gather kernel ran, since {' and '.join(whys)}" if whys else ""


def _of_plans(plans: list[AnyPlan]) -> Iterator[str]:
    for p in plans:
        prediction = p.prediction
        name = p.kernel if len(plans) == 1 else f"{p.role.value}'s {p.kernel}"
        slots = prediction.resident * p.device.multiprocessors
        if prediction.tiles < _FULL * slots:
            yield f"{name} has {prediction.tiles} tiles for {slots} places on the device"
        elif 1 < prediction.waves <= _WAVES and prediction.tiles < _FULL * prediction.waves * slots:
            share = prediction.tiles / (prediction.waves * slots)
            yield f"{name}'s {prediction.waves} waves are {share:.0%} full"
        if prediction.useful < 0.6:
            yield f"{prediction.useful:.0%} of what {name} multiplies counts"


def _copy(run: Run, row: Row) -> float:
    return summary.ceilings(run, row).copy or 1e12


# ---------------------------------------------------------------------------------------------------------------------
# From plans


def plans_of(row: Row, device: Device) -> list[AnyPlan]:
    """The plans that ran a row, made again; none where they would not be those."""
    suite = suites.SUITES.get(row.suite)
    layer = suite.layers.get(row.layer) if suite else None
    shape = re.search(r"\b(\d+(?:x\d+)+) \d+(?:x\d+)+", row.call)
    if layer is None or shape is None:
        return []
    options: dict[str, Any] = {**layer.options, "channels_last": row.channels_last}
    options["dtype"] = getattr(torch, row.dtype, None)
    if not isinstance(options["dtype"], torch.dtype):
        return []
    sizes = tuple(map(int, shape[1].split("x")))
    job = Job(row.suite, row.layer, layer._replace(input=sizes, options=options), row.op)
    try:
        with stored.hidden("user store"):
            found = plans_of_job(job, device)
    except (ValueError, RuntimeError, TypeError, KeyError):
        return []
    same = [p.kernel for p in found] == re.split(r",\s*", row.kernel)
    return found if same and all(str(p.config).strip() in row.config for p in found) else []


def _codes(planned: list[list[AnyPlan]], device: Device) -> list[str]:
    """What the compiler makes of some plans each; "" where it cannot be asked."""
    arch = next((arch for arch, target in TARGETS.items() if target.capability == device.capability), None)
    if arch is None:
        return [""] * len(planned)
    subjects = [auditing.Subject(p.kernel, p) for plans in planned for p in plans]
    rows = dict(auditing.audit(subjects, arch))
    said = iter(["; ".join(_code(p, rows[number])) for number, (_, p) in enumerate(subjects)])
    return ["; ".join(next(said) for _ in plans) for plans in planned]


def _code(p: Any, rows: list[auditing.Row]) -> Iterator[str]:
    for row in rows:
        code = row.code
        if code is not None and row.kernel == p.kernel:
            matrix = f"{code.matrix} from {code.operands or 'registers'}" if code.matrix else "no matrix instruction"
            blocks = "a block" if code.resident == 1 else f"{code.resident} blocks"
            yield (
                f"{row.kernel}: {code.registers} registers, {blocks} a multiprocessor, {matrix}, loads {code.ahead} "
                "steps ahead"
            )
        yield from (f"{row.kernel}: {fault}" for fault in auditing.faults(row))


def _us(seconds: float) -> str:
    return f"{us(seconds)} us"
