"""`torch.compile` of a network: its modes, forward and backward against eager, and many image sizes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_conv import backends, convert

from .networks import Mixed
from .support import Laps, apart, later_median, left_out, placed
from .units import Context, Unit

MODES = ("default", "reduce-overhead", "max-autotune")
_CALLS = 4
_TIMED = 20
_SIZE = 32
_TOLERANCE = 1e-3  # of norms: fused operators round in other places


def units(context: Context) -> Iterator[Unit]:
    """One for each mode, and one for sizes."""
    for mode in MODES:
        run = partial(compiled, mode, context)
        if context.device.type != "cuda" and mode != "default":
            run = partial(left_out, "needs CUDA: a CPU has one mode")
        yield Unit(f"torch.compile {mode}", run, timeout=180.0)
    yield Unit("torch.compile dynamic", partial(dynamic, context), timeout=180.0)


@contextmanager
def _fresh() -> Iterator[Any]:
    """The counters of a compiler that knows nothing yet."""
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    try:
        yield dynamo.utils.counters
    finally:
        dynamo.reset()


def _compile(model: torch.nn.Module, context: Context, **how: Any) -> Any:
    """On a CPU without Inductor, which takes minutes there."""
    if context.device.type != "cuda":
        how = {**how, "backend": "aot_eager"}
        how.pop("mode", None)
    return torch.compile(model, fullgraph=True, **how)


def _model(context: Context) -> torch.nn.Module:
    torch.manual_seed(0)
    small = [torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 3, padding=1)]
    model = torch.nn.Sequential(*small) if context.simulate else Mixed(32)
    convert(model)
    return placed(model, context.device)


def _images(context: Context, size: int, seed: int) -> Tensor:
    generator = torch.Generator(context.device).manual_seed(seed)
    shape = (2 if context.simulate else 8, 3, size, size)
    images = torch.randn(shape, generator=generator, device=context.device)
    return images.contiguous(memory_format=torch.channels_last)


def _results(model: Callable[[Tensor], Tensor], parameters: dict[str, Any], images: Tensor) -> dict[str, Tensor]:
    """The output and all gradients."""
    torch.compiler.cudagraph_mark_step_begin()
    for p in parameters.values():
        p.grad = None
    output = model(images)
    output.square().mean().backward()
    grads = {name: p.grad.detach().clone() for name, p in parameters.items()}
    return {"output": output.detach().clone(), **grads}


def _worst(context: Context, model: torch.nn.Module, run: Any, eager: torch.nn.Module, images: Tensor) -> float:
    """The largest distance from eager of the output and all gradients, as a share of their norms.

    A bias before a normalisation has a gradient that is zero but for rounding: it is held against the largest.
    """
    got = _results(run, dict(model.named_parameters()), images)
    want = _results(eager, dict(eager.named_parameters()), images)
    scale = max(float(t.norm()) for t in want.values())
    return max(apart(got[name], t) for name, t in want.items() if float(t.norm()) > 1e-4 * scale)


def compiled(mode: str, context: Context) -> dict[str, Any]:
    """One mode: no graph break, the numbers of eager, and what a step takes."""
    size = 4 if context.simulate else _SIZE
    calls = 1 if context.simulate else _CALLS
    with _fresh() as counters, backends.cudnn(precision="ieee"):
        model = _model(context)
        eager = copy.deepcopy(model)
        run = _compile(model, context, mode=mode)
        start, errors, first = time.monotonic(), [], 0.0
        for call in range(calls):
            errors.append(_worst(context, model, run, eager, _images(context, size, call)))
            first = first or time.monotonic() - start
        graphs, skips = int(counters["stats"]["unique_graphs"]), int(counters["inductor"]["cudagraph_skips"])
        steps = {} if context.simulate else _steps(context, model, run, eager)
    words = f"{graphs} graph, {max(errors):.1e} of norms from eager, first call {first:.1f} s"
    if steps:
        words += f", step {1e6 * steps['compiled']:.0f} us, eager {1e6 * steps['eager']:.0f}"
    if skips:
        words += f", {skips} parts not captured"
    facts = {"errors": errors, "cudagraph_skips": skips, "first_seconds": first, "steps": steps}
    return {"ok": max(errors) <= _TOLERANCE and graphs == 1, "words": words, **facts}


def _steps(context: Context, model: torch.nn.Module, run: Any, eager: torch.nn.Module) -> dict[str, float]:
    """Seconds of a forward and backward, compiled and eager."""
    images, found = _images(context, _SIZE, 0), {}
    for name, (network, forward) in {"compiled": (model, run), "eager": (eager, eager)}.items():
        laps = Laps(context.device)
        for _ in range(_TIMED):
            with laps.lap():
                _results(forward, dict(network.named_parameters()), images)
        found[name] = later_median(laps.seconds())
    return found


def dynamic(context: Context) -> dict[str, Any]:
    """Many image sizes through one graph."""
    sizes = (4, 6) if context.simulate else tuple(range(16, 48, 4))
    with _fresh() as counters, backends.cudnn(precision="ieee"):
        model = _model(context)
        eager = copy.deepcopy(model)
        run = _compile(model, context, dynamic=True)
        errors = [_worst(context, model, run, eager, _images(context, size, size)) for size in sizes]
        graphs = int(counters["stats"]["unique_graphs"])
    words = f"{graphs} graphs for {len(sizes)} sizes, {max(errors):.1e} of norms from eager"
    return {"ok": max(errors) <= _TOLERANCE and graphs <= 2, "words": words, "graphs": graphs, "errors": errors}
