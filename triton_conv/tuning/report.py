"""Everything that whoever looks into a wrong result asks for, as one text.

A convolution of random operands is computed as users call it, by PyTorch, and in float64; then each kernel and layout
that could run it, with the config that plans choose and with a small one: which of them is wrong says where to look.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import check, devices, execute, explain, installed, key, plan, ways
from ..config import Config
from . import built, differences, subject, surroundings

_ROUNDINGS = 8.0  # of the dtype, that a result may be off where it is rounded on the way
_KINKED = ("relu", "relu6", "leaky_relu", "hardswish")


@dataclass
class Report:
    """The text so far, section by section, and what was found wrong."""

    sections: list[tuple[str, list[str]]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        verdict = f"wrong: {', '.join(self.wrong)}" if self.wrong else "nothing here is wrong"
        parts = [f"# triton_conv report: {verdict}"]
        for title, lines in self.sections:
            parts.append(f"## {title}\n\n```\n" + "\n".join(lines) + "\n```")
        return "\n\n".join(parts) + "\n"


def report(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    device: torch.device,
    seed: int = 7,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    bias: bool = False,
    **parameters: Any,
) -> Report:
    """The report on a convolution, as `triton_conv.explain.plans` takes it, computed on a device."""
    made = Report()
    named: dict[str, Any] = {"transposed": transposed, "dtype": dtype, "channels_last": channels_last, "bias": bias}
    call = built.built(input_shape, weight_shape, seed=seed, **named, **parameters)
    made.sections.append(("Machine", surroundings.lines(device)))
    found = execute.device_of(device)
    planned = explain.plans(input_shape, weight_shape, device=found or devices.H200, **named, **parameters)
    made.sections.append((f"Plans{'' if found else ' for an H200, none of which runs here'}", _plans(planned)))
    made.sections.append(("Values", list(_values(made, call, device, dtype, parameters))))
    if found is not None:
        given = (input_shape, weight_shape)
        problems = _problems(planned, given, {**named, "device": found, **parameters})
        made.sections.append(("Kernels, each by itself", list(_kernels(made, problems, device, seed))))
    return made


def _plans(planned: Mapping[str, explain.AnyPlan]) -> list[str]:
    said = list[str]()
    for title, p in planned.items():
        kernel = getattr(p, "kernel", "")
        said += ["", title, str(p), *([f"source     {key.source_hash(kernel)}"] if kernel in key.CONFIGS else [])]
    return said[1:]


def _values(
    made: Report, call: built.Call, device: torch.device, dtype: torch.dtype, parameters: Mapping[str, Any]
) -> Iterator[str]:
    """The call as users make it, against float64 and beside PyTorch's."""
    exact = not (dtype.is_floating_point or dtype.is_complex)
    gradients = not exact and dtype.itemsize > 1
    wide = None if exact else torch.complex128 if dtype.is_complex else torch.float64
    with execute.plainly():
        want = _evaluated(call.run, {name: t.to(wide or t.dtype) for name, t in call.tensors.items()}, gradients)
    there = {name: _moved(t, device) for name, t in call.tensors.items()}
    with check.poisoned():
        got = _evaluated(call.run, there, gradients)
        again = _evaluated(call.run, there, gradients)
    rival = _of_rival(call, there, gradients)
    how = (parameters.get("precision"), device)
    weights = [t for name, t in call.tensors.items() if "weight" in name or "wise" in name]
    yield f"{call.name}, random operands; errors as shares of what rounding explains; 1 and below is right"
    yield f"{'tensor':<18}{'ours':>10}{'torch':>10}  {'twice the same bits':<20}"
    details = list[str]()
    for name, right in want.items():
        ours, label = got[name], name if name == "output" else f"gradient of {name}"
        depth = differences.depth_of(name, weights, want["output"])
        slack = _ROUNDINGS if call.rounds_between else 0.0
        allowed = differences.bound(right, depth, ours.dtype, how, slack)
        shares = differences.share(ours, right, allowed)
        other = rival.get(name)
        same = torch.equal(_bits(ours), _bits(again[name]))
        theirs = "" if other is None else f"{float(differences.share(other, right, allowed).max()):.3g}"
        worst = float(shares.max()) if shares.numel() else 0.0
        yield f"{label:<18}{worst:>10.3g}{theirs:>10}  {'yes' if same else 'NO':<20}"
        if worst > 1:
            made.wrong.append(label)
            axes = differences.letters(name, right.dim())
            details += ["", label, *differences.lines(shares > 1, axes, ours, right, other)]
        if not same:
            made.wrong.append(f"{label} differs from run to run")
    yield from details
    if details and parameters.get("activation") in _KINKED:
        yield "A few elements may differ where the activation has a kink: sums next to it round to either side."


def _evaluated(run: Any, tensors: Mapping[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    """The output and, if asked for, the gradients of all tensors, by name."""
    if not gradients:
        with torch.no_grad():
            return {"output": run(tensors)}
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = run(leaves)
    # rounded to 8 bits, so that every dtype holds them
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.device, y.dtype)
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"output": y.detach(), **dict(zip(leaves, found, strict=True))}


def _moved(t: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(t, device=device).copy_(t)


def _of_rival(call: built.Call, tensors: Mapping[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    if call.rival is None:
        return {}
    try:
        return _evaluated(call.rival, tensors, gradients)
    except RuntimeError:  # PyTorch cannot do this here
        return {}


def _bits(t: Tensor) -> Tensor:
    """What compares NaN equal."""
    if t.is_complex():
        t = torch.view_as_real(t)
    t = t.contiguous()
    return t.view(torch.uint8) if t.dim() else t.reshape(1).view(torch.uint8)


def _problems(
    planned: Mapping[str, explain.AnyPlan], shapes: tuple[Sequence[int], Sequence[int]], how: dict[str, Any]
) -> dict[str, Any]:
    """What kernels can be tried for, by what it computes."""
    own: dict[str, Any] = {name: p.problem for name, p in planned.items() if hasattr(p, "problem")}
    if own or any(how.get(kind) for kind in ("causal", "pointwise", "branches")):
        return {name: p for name, p in own.items() if _tunable(p)}
    return {} if "context" in how else dict(explain.problems(*shapes, **how))


def _tunable(problem: Any) -> bool:
    return isinstance(problem, (subject.DeformProblem, subject.branches_problem.Problem))


def _kernels(made: Report, problems: Mapping[str, Any], device: torch.device, seed: int) -> Iterator[str]:
    """Every way to compute each problem, with its own config and the simplest."""
    if not problems:
        yield "not of this kind of convolution: its kernels run in the call above alone"
        return
    for title, problem in problems.items():
        kind = subject.of(problem)
        found = kind.every(problem)
        case = kind.case(problem, device, seed)
        want, chosen = kind.expected(problem, case), kind.choice(found)
        yield title
        for p in dict.fromkeys(p for way in found for p in (way, _simplest(kind, problem, way))) | _plainest(problem):
            try:
                verdict = kind.wrong(problem, p, case, want) or "right"
            except Exception as error:  # whatever a compiler or driver raises is what the report is about
                verdict = f"{type(error).__name__}: {error}".splitlines()[0]
            mark, copied = "runs" if _alike(p, chosen) else "could run", ", ".join(getattr(p, "packs", ()))
            yield f"  {p.kernel:<16} {mark:<10} {str(p.config).rstrip()}{f', copies {copied}' if copied else ''}"
            yield f"    {verdict}"
            if verdict != "right":
                made.wrong.append(f"{title} by {p.kernel} {p.config}".rstrip())


def _alike(a: Any, b: Any) -> bool:
    """Whether two plans of a problem do the same, whatever their reasons."""
    return (a.kernel, a.config, getattr(a, "packs", ())) == (b.kernel, b.config, getattr(b, "packs", ()))


def _simplest(kind: subject.Subject, problem: Any, way: Any) -> Any:
    """The same way with the simplest of the configs that are worth measuring."""
    return min(kind.plans(problem, [way]), key=lambda p: key.simplicity(p.config))


def _plainest(problem: Any) -> dict[plan.Plan, None]:
    """Of a convolution: gathered by pointers, as sums of products without matrix units, in small tiles."""
    if not isinstance(problem, ways.Problem):
        return {}
    return dict.fromkeys(plan.every(problem, Config(16, 16, 16, num_stages=1, dot=False)))


def interpretable(input_shape: Sequence[int], weight_shape: Sequence[int]) -> bool:
    """Whether it is small enough for Triton's interpreter, and Triton is there."""
    taps = 1
    for n in weight_shape[1:]:
        taps *= n
    work = taps * weight_shape[0]
    for n in (input_shape[0], *input_shape[2:]):
        work *= n
    return installed.available() and work <= 2**24
