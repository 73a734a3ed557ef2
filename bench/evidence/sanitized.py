"""The program that compute-sanitizer watches: small cases of every kernel family, from tensors made on the host.

`python -m bench.evidence.sanitized cuda:0` prints a line for each case; the exit code is 1 where one is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from triton_conv import (
    Branch,
    causal_conv1d,
    causal_conv1d_update,
    causal_conv3d,
    check,
    config,
    conv2d,
    deform_conv2d,
    execute,
    multi_conv2d,
    plan,
    separable_conv2d,
)
from triton_conv.check import Case
from triton_conv.config import BandedConfig, KernelConfig
from triton_conv.devices import Device
from triton_conv.geometry import Role
from triton_conv.plan import Plan

from .support import apart

_of = partial(Case.of, dtype=torch.bfloat16)
_last = partial(_of, memory_format="channels_last")

# Odd extents and channels beyond a block, so that tiles have tails.
CASES: dict[str, Case] = {
    "box": _last((11, 13), 3, C=32, K=72, padding=1),
    "box stride 2": _last((10, 12), 3, C=32, K=32, padding=1, stride=2),
    "box float32 as tf32": _last((7, 9), 3, C=32, K=32, padding=1, dtype=torch.float32, precision="tf32"),
    "gather": _of((7, 9), 3, C=17, K=33, padding=1, dtype=torch.float32, precision="ieee"),
    "gather strided operands": _of((6, 7), 3, C=8, K=8, memory_format="strided", dtype=torch.float16),
    "gather dilated, stride 2": _of((12, 13), 3, C=20, K=12, stride=2, dilation=2, padding=2),
    "fold of circular borders": _last((6, 7), 3, C=16, K=16, padding=((2, 1), (0, 3)), modes="circular"),
    "transposed": _last((5, 6), 4, C=16, K=24, stride=2, padding=1, transposed=True),
    "groups": _last((7, 6), 3, C=32, K=32, groups=8, padding=1),
    "depthwise": _of((9, 11), 3, C=6, K=6, groups=6, padding=1),
    "depthwise channels-last": _last((9, 11), 3, C=24, K=24, groups=24, padding=1, stride=2),
    "banded": _of((14, 24), 13, C=3, K=3, groups=3, padding=6),
    "three axes": _last((4, 6, 6), 3, C=16, K=16, padding=((2, 0), 1, 1)),
    "integers": _of((6, 7), 3, C=20, padding=1, dtype=torch.int8),
}
_BANDED = BandedConfig((2, 8, 1), 1, 16, 16)
CONFIGS: dict[str, dict[Role, KernelConfig]] = {"banded": {Role.FPROP: _BANDED, Role.DGRAD: _BANDED}}
_FEW = ("depthwise",)


def main() -> int:
    """Runs all cases, or with `--few` those that an interpreter runs in seconds."""
    parser = argparse.ArgumentParser(prog="python -m bench.evidence.sanitized")
    parser.add_argument("device")
    parser.add_argument("--few", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    programs: dict[str, Callable[[], str]] = {
        name: partial(_case, case, device, CONFIGS.get(name, {})) for name, case in CASES.items()
    }
    programs |= {"causal": partial(_causal, device), "separable": partial(_separable, device)}
    programs |= {name: partial(_differentiated, *shapes, function, device) for name, (shapes, function) in MORE.items()}
    wrong = 0
    for name, program in programs.items():
        if arguments.few and name not in _FEW:
            continue
        words = program()
        wrong += bool(words)
        print(f"case {name}: {words or 'right'}", flush=True)
    return int(wrong > 0)


def plans(device: Device) -> list[Plan]:
    """What the cases run on a device, but for those beside `CASES`; they run once on the CPU for it."""
    found = []
    for name, case in CASES.items():
        with execute.recording() as calls:
            case.run(case.operands(0))
        with config.explicit(CONFIGS.get(name, {})):
            found += [plan.make(execute.problem_of(call, device)) for call in calls]
    return found


def _case(case: Case, device: torch.device, configs: dict[Role, KernelConfig]) -> str:
    operands = case.operands(0, device)
    with config.explicit(configs):
        got = case.run(operands)
    want = check.expected(case, operands)
    results = [check.compare(case, name, got[name], t) for name, t in want.items()]
    return "; ".join(f"{r.name} is off by {r.error:.3g}, {r.bound:.3g} allowed {r.note}" for r in results if not r.ok)


def _causal(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    x, w, bias, state = (torch.randn(s, generator=generator) for s in ((2, 10, 37), (10, 4), (10,), (2, 10, 3)))

    def run(where: torch.device) -> list[torch.Tensor]:
        leaves = [t.to(where).requires_grad_() for t in (x, w, bias, state)]
        inputs, taps, offset, before = leaves
        y, last = causal_conv1d(inputs, taps, offset, "silu", before, return_final_state=True)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        with torch.no_grad():
            moving = last.clone()
            step = causal_conv1d_update(inputs[:, :, 0], moving, taps, offset, "silu")
        return [y.detach(), last.detach(), *gradients, step, moving]

    return _unequal(run, device)


def _separable(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator) for s in ((2, 16, 9, 11), (16, 1, 3, 3), (24, 16, 1, 1))]

    def run(where: torch.device) -> list[torch.Tensor]:
        x, depthwise, pointwise = (t.to(where) for t in tensors)
        x = x.contiguous(memory_format=torch.channels_last)
        return [separable_conv2d(x, depthwise, pointwise, padding=1, precision="ieee", fused=where.type == "cuda")]

    return _unequal(run, device)


def _fused(x: Tensor, w: Tensor) -> Tensor:
    residual, scale = 1 - x, torch.linspace(0.5, 1.5, len(w), device=w.device)
    return conv2d(x, w, padding=1, precision="ieee", activation="gelu", residual=residual, scale=scale)


def _branches(x: Tensor, w: Tensor) -> Tensor:
    filters = [Branch(w, padding=1), Branch(w[:7].flip(2), padding=2, dilation=2)]
    return multi_conv2d(x, filters, precision="ieee")


def _deformable(x: Tensor, w: Tensor) -> Tensor:
    offset, mask = 2 * x.repeat(1, 2, 1, 1)[:, :18], x[:, :9].sigmoid()
    return deform_conv2d(x, offset, w, padding=1, mask=mask, precision="ieee")


def _in_chunks(x: Tensor, w: Tensor) -> Tensor:
    y = causal_conv3d(x[:, :, 2:], w, context=x[:, :, :2], padding=1, padding_mode="reflect", precision="ieee")
    assert isinstance(y, Tensor)
    return y


# Shapes of input and filters, and what is computed from them.
Shapes = tuple[tuple[int, ...], tuple[int, ...]]
_IMAGE, _VIDEO = ((2, 16, 9, 11), (16, 16, 3, 3)), ((2, 8, 4, 6, 7), (10, 8, 3, 3, 3))
MORE: dict[str, tuple[Shapes, Callable[[Tensor, Tensor], Tensor]]] = {
    "fused": (_IMAGE, _fused),
    "branches": (_IMAGE, _branches),
    "deformable": (_IMAGE, _deformable),
    "chunk of video": (_VIDEO, _in_chunks),
}


def _differentiated(
    shape: tuple[int, ...], filters: tuple[int, ...], function: Callable[..., Tensor], device: torch.device
) -> str:
    """Values and gradients of a function of an input and filters."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in (shape, filters)]

    def run(where: torch.device) -> list[torch.Tensor]:
        leaves = [t.to(where).requires_grad_() for t in tensors]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    return _unequal(run, device)


def _unequal(run: Callable[[torch.device], list[torch.Tensor]], device: torch.device) -> str:
    """How results on a device differ from those of a CPU, in words."""
    pairs = zip(run(device), run(torch.device("cpu")), strict=True)
    worst = max(apart(got.cpu(), want) for got, want in pairs)
    return "" if worst < 1e-4 else f"off by {worst:.2g} of the norm"


if __name__ == "__main__":
    raise SystemExit(main())
