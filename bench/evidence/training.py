"""Stage e: networks trained for 200 steps by cuDNN and by triton_conv, from the same weights on the same images.

Training magnifies rounding: two runs that differ in one bit have other losses soon. How far such runs of cuDNN lie
apart is the noise: of two of them the initial filters were changed by up to half of bfloat16's last place, at random.
The distance of two loss curves is the root of the mean square of their difference, smoothed. Ours counts as the same
if its median distance from cuDNN's is at most three times the largest among cuDNN's own, plus a hundredth of the first
loss. What rounding a single gradient has is compared too, with float32 as the truth.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from triton_conv import backends, convert, execute

from .support import Laps, apart, compile_ahead, different, later_median, left_out, placed, plans_of, thinned, wait
from .tasks import TEST, Task, logits_of, tasks
from .units import Context, Unit

NAME = "e"
ABOUT = "training by triton_conv against cuDNN: loss curves, accuracy, step time, memory, the same bits twice"
LIMIT = 450.0

_SEED = 0
_NUDGE = 2.0**-9  # half of bfloat16's last place, relative
_SETTLED = 0.1  # the share of steps after which memory is what it will be


class Trained(NamedTuple):
    """A training: losses and seconds of every step, peak memory, and what was learned."""

    losses: list[float]
    seconds: list[float]
    peak_bytes: int | None
    model: nn.Module


def units(context: Context) -> Iterator[Unit]:
    """One for each network."""
    known = {task.name: task for task in tasks(context.device, context.simulate)}
    for name in ("resnet18", "deeplab", "digits"):
        run: Callable[[], dict[str, Any]] = partial(left_out, "scikit-learn, which has the digits, is not installed")
        if name in known:
            run = partial(compared, known[name], context)
        yield Unit(name, run, timeout=240.0)


def compared(task: Task, context: Context) -> dict[str, Any]:
    """The facts of a task."""
    device = context.device
    facts: dict[str, Any] = {"ok": False, "words": "", "steps": task.steps}
    with backends.cudnn():
        model, images = task.network(), task.batch(0).images
        where = execute.device_of(device)
        if where is not None and device.type == "cuda":
            facts["compiled"] = compile_ahead(plans_of(model, images, where, task.dtype), device)
        facts["gradient_errors"] = errors = gradient_errors(task, device)
        theirs = [trained(task, device, ours=False, nudge=0), trained(task, device, ours=False, nudge=1)]
        ours = [trained(task, device, ours=True), trained(task, device, ours=True)]
        if context.left() > 2 * sum(theirs[0].seconds):
            theirs.append(trained(task, device, ours=False, nudge=2))
        uneven = different(ours[0].model.state_dict(), ours[1].model.state_dict())
        changing = unrepeated(task, device) if uneven else []
        score, *scores = [_score(task, run.model, device) for run in (ours[0], *theirs)]
    curves = agreement(ours[0].losses, [run.losses for run in theirs])
    least = min(scores) - max(0.02, 3 * (max(scores) - min(scores)))
    repeats = not uneven or (bool(changing) and not any("triton_conv" in name for name in changing))
    facts |= {
        "curves": curves,
        "learned": _learned(ours[0].losses),
        "score": score,
        "cudnn_scores": scores,
        "step_seconds": later_median(ours[0].seconds),
        "cudnn_step_seconds": later_median(theirs[0].seconds),
        "peak_bytes": ours[0].peak_bytes,
        "cudnn_peak_bytes": theirs[0].peak_bytes,
        "same_bits": not uneven,
        "uneven": uneven[:5],
        "operators_that_vary": changing,
        "losses": {
            "triton_conv": thinned(ours[0].losses),
            **{f"cudnn {n}": thinned(run.losses) for n, run in enumerate(theirs)},
        },
    }
    few = context.simulate  # steps, too few to have learned anything
    facts["ok"] = errors["ok"] and curves["within_noise"] and repeats and (few or (facts["learned"] and score >= least))
    facts["words"] = _words(task, facts)
    return facts


def _words(task: Task, facts: dict[str, Any]) -> str:
    curves, same = facts["curves"], "the same bits twice"
    if not facts["same_bits"]:
        same = f"other bits the second time, by {', '.join(facts['operators_that_vary']) or 'no known operator'}"
    step, theirs = (1e3 * facts[name] for name in ("step_seconds", "cudnn_step_seconds"))
    return (
        f"{task.name}, {task.steps} steps: losses {curves['distance']:.3g} from cuDNN's, which are "
        f"{curves['noise']:.3g} apart; recall {facts['score']:.1%}, cuDNN's {min(facts['cudnn_scores']):.1%}; "
        f"{step:.2f} ms a step, cuDNN's {theirs:.2f}; {same}"
    )


def network_of(task: Task, device: torch.device, ours: bool, nudge: int = 0) -> nn.Module:
    """The task's network with its initial weights; with `nudge`, a seed, filters are off by a rounding."""
    torch.manual_seed(_SEED)
    model = task.network()
    if nudge:
        generator = torch.Generator().manual_seed(nudge)
        for module in model.modules():
            if isinstance(module, _ConvNd):
                random = torch.rand(module.weight.shape, generator=generator)
                module.weight.data.mul_(1 + _NUDGE * (2 * random - 1))
    if ours:
        convert(model)
    return placed(model, device)


def trained(task: Task, device: torch.device, ours: bool, nudge: int = 0) -> Trained:
    """Adam, autocast, channels-last; the rate rises for a tenth of the steps, then falls."""
    gc.collect()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    model, laps, losses = network_of(task, device, ours, nudge), Laps(device), list[Tensor]()
    optimizer = torch.optim.Adam(model.parameters(), lr=task.rate)
    settled = int(_SETTLED * task.steps)
    for step in range(task.steps):
        if step == settled and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        batch = task.batch(step)
        for group in optimizer.param_groups:
            group["lr"] = task.rate * _share(step, task.steps)
        with laps.lap():
            optimizer.zero_grad(set_to_none=True)
            with _casting(task.dtype, device):
                output = model(batch.images)
            loss = task.loss(output, batch)
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    seconds = laps.seconds()
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return Trained(torch.stack(losses).tolist(), seconds, peak, model)


def _casting(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Convolutions in this dtype."""
    enabled = dtype is not torch.float32
    return torch.autocast(device.type, dtype if enabled else torch.bfloat16, enabled=enabled)


def _share(step: int, steps: int) -> float:
    """Of the rate: a tenth of the steps up, half a cosine down."""
    rise = max(steps // 10, 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def _score(task: Task, model: nn.Module, device: torch.device) -> float:
    """The mean over classes of the share of their images, or pixels, that are found."""
    model.eval()
    found = total = torch.zeros((), device=device)
    with torch.no_grad(), _casting(task.dtype, device):
        for number in range(task.tests):
            batch = task.batch(TEST + number)
            logits = logits_of(model(batch.images))
            hits = nn.functional.one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1) * batch.shares
            over = [0, *range(2, logits.dim())]
            found, total = found + hits.sum(over), total + batch.shares.sum(over)
    return float((found / total.clamp(min=1)).sum() / (total > 0).sum())


def agreement(ours: Sequence[float], theirs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How far a loss curve is from others, and these from each other.

    >>> agreement([2.0, 1.0], [[2.0, 1.1], [2.0, 0.9]])["within_noise"]
    True
    """
    distance = statistics.median(_gap(ours, run) for run in theirs)
    noise = max((_gap(a, b) for a, b in combinations(theirs, 2)), default=0.0)
    bound = 3 * noise + 0.01 * theirs[0][0]
    return {"distance": distance, "noise": noise, "bound": bound, "within_noise": distance <= bound}


def _gap(first: Sequence[float], second: Sequence[float]) -> float:
    """The root of the mean square of the difference of two curves, smoothed over a twentieth of their length."""
    width = max(len(first) // 20, 1)
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    smooth = [statistics.fmean(gaps[i : i + width]) for i in range(len(gaps) - width + 1)]
    return math.sqrt(statistics.fmean(gap**2 for gap in smooth))


def _learned(losses: Sequence[float]) -> bool:
    """Whether the last tenth of the losses is well below the first."""
    return statistics.fmean(losses[-max(len(losses) // 10, 1) :]) < 0.7 * losses[0]


def gradient_errors(task: Task, device: torch.device) -> dict[str, Any]:
    """By how much the first gradients are off in the task's dtype, ours and cuDNN's, as shares of their norms."""
    batch = task.batch(0)

    def gradients(ours: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        model = network_of(task, device, ours)
        with _casting(dtype, device):
            output = model(batch.images)
        task.loss(output, batch).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    with backends.cudnn(precision="ieee"):
        truth = gradients(False, torch.float32)
    errors = []
    for ours in (True, False):
        found = gradients(ours, task.dtype)
        errors.append({name: apart(found[name], g) for name, g in truth.items()})
    mine, theirs = errors
    # a gradient that is zero but for rounding is as wrong as it is for cuDNN
    beyond = {name: mine[name] - 2 * theirs[name] for name in truth}
    worst = max(truth, key=lambda name: beyond[name] if math.isfinite(beyond[name]) else math.inf)
    return {
        "ok": all(math.isfinite(e) for e in mine.values()) and beyond[worst] <= 0.02,
        "median": statistics.median(mine.values()),
        "cudnn_median": statistics.median(theirs.values()),
        "worst": [worst, mine[worst], theirs[worst]],
    }


class _Twice(TorchDispatchMode):
    """Runs every operator twice, and notes those that answer differently."""

    def __init__(self) -> None:
        super().__init__()
        self.varying: dict[str, None] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = function(*args, **kwargs)
        plain = not function._schema.is_mutable and torch.Tag.nondeterministic_seeded not in function.tags
        if plain and "empty" not in function._schema.name:
            second = function(*args, **kwargs)
            pairs = zip(_tensors(first), _tensors(second), strict=True)
            if any(not torch.equal(a, b) and not a.isnan().any() for a, b in pairs):
                self.varying[str(function._schema.name)] = None
        return first


def _tensors(result: Any) -> list[Tensor]:
    results = result if isinstance(result, (tuple, list)) else [result]
    return [t for t in results if isinstance(t, Tensor)]


def unrepeated(task: Task, device: torch.device) -> list[str]:
    """The operators of a step that do not repeat their bits on the same operands."""
    model, batch = network_of(task, device, ours=True), task.batch(0)
    with _Twice() as twice:
        with _casting(task.dtype, device):
            output = model(batch.images)
        task.loss(output, batch).backward()
    wait(device)
    return list(twice.varying)
