"""Random wrong calls of the registered operators, one argument of a right call each."""

import random
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import triton_conv
from triton_conv import Branch


class Recorder(TorchDispatchMode):
    """The calls of our operators inside."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "triton_conv":
            self.calls.setdefault(op._schema.name.split("::")[1], (op, args))
        return op(*args, **(kwargs or {}))


def right_calls() -> dict[str, tuple[Any, tuple]]:
    """One of each operator, with arguments that are right."""
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 4, 5, 6), torch.randn(4, 2, 3, 3), torch.randn(4)
    leaf = x.clone().requires_grad_()
    square, scale = torch.randn(4, 4, 3, 3), torch.ones(4)
    eight = torch.float8_e4m3fn
    with Recorder() as recorder:
        for activation in ("relu", "silu"):
            y = triton_conv.conv2d(leaf, w, b, padding=1, groups=2, activation=activation, residual=x, scale=scale)
            y.sum().backward()
            triton_conv.conv_transpose2d(leaf, square, b, activation=activation, scale=scale).sum().backward()
            triton_conv.conv2d(x, w, b, groups=2, activation=activation)
            triton_conv.conv_transpose2d(x, square, b, activation=activation)
        triton_conv.conv2d(leaf, w.clone().requires_grad_(), b, groups=2).sum().backward()
        triton_conv.conv2d(x, w, b, groups=2, dilation=2)
        triton_conv.conv_transpose2d(x, square, b)
        triton_conv.scaled_conv2d(x.to(eight), square.to(eight), torch.ones(()), torch.ones(()), b.bfloat16())
        triton_conv.int_conv2d(x.to(torch.int8), square.to(torch.int8))
        triton_conv.separable_conv2d(x, torch.randn(8, 1, 3, 3), torch.randn(3, 8, 1, 1), None, torch.randn(3))
        sequence = torch.randn(2, 3, 7).requires_grad_()
        state = torch.randn(2, 3, 3)
        triton_conv.causal_conv1d(sequence, torch.randn(3, 4), torch.randn(3), "silu", state).sum().backward()
        triton_conv.causal_conv1d_update(torch.randn(2, 3), state, torch.randn(3, 4), torch.randn(3))
        video, filters = torch.randn(1, 2, 4, 3, 3), torch.randn(2, 2, 3, 1, 1)
        triton_conv.causal_conv3d(video, filters, None, video)
        triton_conv.causal_conv3d(video, filters, None, video, activation="relu")
        offset, mask = torch.rand(2, 18, 3, 4).requires_grad_(), torch.rand(2, 9, 3, 4)
        triton_conv.deform_conv2d(leaf, offset, square, b, mask=mask).sum().backward()
        branches = [Branch(square, b, padding=1), Branch(torch.randn(4, 4, 1, 1))]
        triton_conv.multi_conv2d(leaf, branches).sum().backward()
    return recorder.calls


def another(rng: random.Random, value: Any) -> Any:
    """Something in place of an argument."""
    if isinstance(value, Tensor):
        return rng.choice(
            (
                lambda: value.to(rng.choice((torch.float64, torch.int64, torch.bool, torch.complex64, torch.float16))),
                lambda: value.to("meta"),
                lambda: value[None],
                value.flatten,
                lambda: value[..., :-1] if value.dim() else value[None],
                lambda: value[:0] if value.dim() else value[None],
                lambda: value[..., :0] if value.dim() else value[None],
                lambda: torch.cat((value, value)) if value.dim() else value[None],
                lambda: torch.zeros(()),
                lambda: None,
                lambda: "x",
            )
        )()
    if value is None:
        return rng.choice((torch.ones(4), torch.ones(2, 4, 5, 6), torch.zeros(()), 1, "x", "ieee"))
    if isinstance(value, bool):
        return rng.choice((not value, 2, "x", None))
    if isinstance(value, str):
        return rng.choice(("", "x", ",", "zeros,", "zeros,zeros,zeros,zeros", "relu", "circular", None, 1, value * 2))
    if isinstance(value, (list, tuple)):
        entries = list(value)
        place = rng.randrange(len(entries)) if entries else 0
        return rng.choice(
            (
                lambda: [],
                lambda: entries[:-1],
                lambda: [*entries, *entries[:1]],
                lambda: entries * 2,
                lambda: [*entries[:place], another(rng, entries[place]), *entries[place + 1 :]] if entries else [1],
                lambda: None,
                lambda: 1,
                lambda: "x",
            )
        )()
    if isinstance(value, (int, float)):
        return rng.choice((0, -1, 7, 2**40, -(2**62), 2**63 - 1, 1.5, None, "x", True, float("nan")))
    return rng.choice((None, 1, "x", torch.float64, torch.int8))


def outcome(op: Any, args: tuple) -> Any:
    try:
        return op(*(a.clone() if isinstance(a, Tensor) else a for a in args))
    except Exception as error:
        return error


def shape_of(made: Any) -> Any:
    made = made if isinstance(made, (tuple, list)) else (made,)
    return [(t.shape, t.dtype) for t in made]


WRONG = (TypeError, ValueError, RuntimeError)
STUMBLED = ("zip()", "to unpack", "object has no attribute", "unsupported operand", "not supported between")


def fault(op: Any, args: tuple, seed: int) -> str:
    """What is wrong with what a call with one other argument does; "" if nothing is."""
    rng = random.Random(f"{op._schema.name} {seed}")
    place, args = rng.randrange(len(args)), list(args)
    args[place] = another(rng, args[place])
    name = op._schema.arguments[place].name
    made = outcome(op, args)
    told = f"{op._schema.name} {seed}, {name}={args[place]!r:.200}: {made!r:.300}"
    if isinstance(made, Exception):
        clean = isinstance(made, WRONG) and not isinstance(made, RecursionError)
        return "" if clean and not any(words in str(made) for words in STUMBLED) else told
    if any(isinstance(a, Tensor) and a.is_meta for a in args):
        return told  # computed on another device
    expected = outcome(op, tuple(_on_meta(a) for a in args))
    if isinstance(expected, RuntimeError) and "Expected a value of type" in str(expected):
        return ""  # torch's other parser takes fewer kinds of numbers
    if isinstance(expected, Exception) or shape_of(made) != shape_of(expected):
        return f"{told} but of fakes {expected!r:.200}"
    return ""


def _on_meta(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_on_meta(v) for v in value]
    return value.to("meta") if isinstance(value, Tensor) else value
