"""A call of a public function, from shapes and options as `explain` takes them, with random tensors.

>>> call = built((2, 4, 8, 8), (6, 4, 3, 3), dtype=torch.float32, padding=1)
>>> call.name, list(call.tensors), tuple(call.run(call.tensors).shape)
('conv2d', ['input', 'weight'], (2, 6, 8, 8))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import branches, causal, deform, functional, separable, streaming
from ..explain import _CHANNELS_LAST, _name

Tensors = Mapping[str, Tensor]
_SCALES = {"scale_a": 0.5, "scale_b": 0.75}


class Call(NamedTuple):
    """The function's name; its tensors, on the CPU; the function of them; PyTorch's own of them, where it has one.

    `run` takes tensors of any floating-point dtype: of 8-bit floats it is then the ordinary convolution that scales.
    """

    name: str
    tensors: dict[str, Tensor]
    run: Callable[[Tensors], Tensor]
    rival: Callable[[Tensors], Tensor] | None = None
    rounds_between: bool = False  # more than once from operands to results


def built(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    dtype: torch.dtype,
    transposed: bool = False,
    channels_last: bool = False,
    bias: bool = False,
    seed: int = 7,
    **parameters: Any,
) -> Call:
    """The call that these describe, as in `triton_conv.explain.plans`; raises what it would raise.

    Floating-point values are standard normal, integers in -4..4 (0..8 if unsigned), masks in [0, 1], offsets odd
    sixteenths of a pixel: never whole, where their gradients have two sides.
    """
    drawn = _Drawn(dtype, channels_last, torch.Generator().manual_seed(seed))
    made = {"input": drawn(*input_shape), "weight": drawn(*weight_shape)}
    rest = dict(parameters)
    of_kind = next((make for kind, make in _KINDS.items() if rest.get(kind) not in (None, False, ())), None)
    if of_kind is None and "context" in rest:
        of_kind = _streaming
    if of_kind is not None:
        return of_kind(made, drawn, bias, rest)
    return _ordinary(made, drawn, bias, transposed, rest)


class _Drawn:
    """Draws tensors of a dtype; those with spatial axes lie channels-last if that is asked for."""

    def __init__(self, dtype: torch.dtype, channels_last: bool, generator: torch.Generator) -> None:
        self.dtype, self.channels_last, self.generator = dtype, channels_last, generator

    def __call__(self, *shape: int) -> Tensor:
        if not (self.dtype.is_floating_point or self.dtype.is_complex):
            low = 0 if self.dtype is torch.uint8 else -4
            return self.laid(torch.randint(low, low + 9, shape, generator=self.generator).to(self.dtype))
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        return self.laid(torch.randn(shape, generator=self.generator, dtype=wide).to(self.dtype))

    def uniform(self, *shape: int) -> Tensor:
        return self.laid(torch.rand(shape, generator=self.generator).to(self.dtype))

    def sixteenths(self, *shape: int) -> Tensor:
        odd = 2 * torch.randint(-16, 16, shape, generator=self.generator) + 1
        return self.laid((odd / 16).to(self.dtype))

    def laid(self, t: Tensor) -> Tensor:
        if not self.channels_last or t.dim() < 3:
            return t
        if t.dim() == 3:
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        return t.contiguous(memory_format=_CHANNELS_LAST[t.dim() - 2])


def _ordinary(made: dict[str, Tensor], drawn: _Drawn, bias: bool, transposed: bool, rest: dict[str, Any]) -> Call:
    w = made["weight"]
    out_dtype = rest.get("out_dtype")
    name = _name(w.shape, transposed, drawn.dtype, out_dtype)
    low, whole = name.startswith("scaled"), name.startswith("int_")
    if whole:
        rest.pop("out_dtype")
    channels = w.shape[1] * rest.get("groups", 1) if transposed else w.shape[0]
    if low:
        made |= {key: torch.tensor(scale) for key, scale in _SCALES.items()}
    after = rest.pop("residual", "")
    convolve, plain = getattr(functional, name), getattr(functional, f"conv{w.dim() - 2}d")
    if bias:
        of_bias = out_dtype or torch.bfloat16 if low else torch.int32 if whole else drawn.dtype
        made["bias"] = _Drawn(of_bias, False, drawn.generator)(channels)
    if rest.pop("scale", False):
        made["scale"] = drawn.uniform(channels)
    if after:
        rest["residual_after_activation"] = after == "after"

    def run(given: Tensors) -> Tensor:
        named = {key: t for key, t in given.items() if key not in ("input", "weight", *_SCALES)}
        if low and given["input"].dtype.itemsize > 1:
            how = {key: value for key, value in rest.items() if key != "out_dtype"}
            y = plain(given["input"] * given["scale_a"], given["weight"] * given["scale_b"], **how)
            b = named.get("bias")
            return y if b is None else y + b.view(1, -1, *(1,) * (y.dim() - 2))
        return convolve(
            given["input"], given["weight"], **{k: given[k] for k in _SCALES if k in given}, **named, **rest
        )

    if after:
        with torch.no_grad():
            made["residual"] = drawn.laid(drawn(*run({k: t.to("meta") for k, t in made.items()}).shape))
    fused = bool(rest.get("activation") or after or "scale" in made)
    rival = None if low or whole or fused else _torchs(name, rest)
    return Call(name, made, run, rival, fused)


def _torchs(name: str, how: dict[str, Any]) -> Callable[[Tensors], Tensor] | None:
    """PyTorch's function of this name, if it has these options."""
    rest = {key: value for key, value in how.items() if key not in ("precision", "out_dtype")}
    modes, padding = rest.pop("padding_mode", "zeros"), rest.get("padding", 0)
    modes = (modes,) if isinstance(modes, str) else modes
    sides = padding if isinstance(padding, tuple) else ()
    if set(modes) != {"zeros"} or any(isinstance(side, tuple) for side in sides):
        return None
    return lambda given: getattr(torch.nn.functional, name)(**given, **rest)


def _causal(made: dict[str, Tensor], drawn: _Drawn, bias: bool, rest: dict[str, Any]) -> Call:
    x, w = made["input"], made["weight"]
    if bias:
        made["bias"] = drawn(w.shape[0])
    if rest.get("initial_state"):
        made["initial_state"] = drawn(*x.shape[:2], w.shape[1] - 1)

    def run(given: Tensors) -> Tensor:
        named: dict[str, Any] = {key: t for key, t in given.items() if key not in ("input", "weight")}
        y = causal.causal_conv1d(given["input"], given["weight"], activation=rest.get("activation"), **named)
        assert isinstance(y, Tensor)
        return y

    return Call("causal_conv1d", made, run, None, True)


def _separable(made: dict[str, Tensor], drawn: _Drawn, bias: bool, rest: dict[str, Any]) -> Call:
    made["depthwise"] = made.pop("weight")
    between, rank = made["depthwise"].shape[0], made["depthwise"].dim() - 2
    channels = rest.pop("pointwise")
    made["pointwise"] = drawn(channels, between, *(1,) * rank)
    if bias:
        made |= {"depthwise_bias": drawn(between), "bias": drawn(channels)}
    how = {key: value for key, value in rest.items() if key != "groups"}
    name = f"separable_conv{rank}d"
    return Call(name, made, lambda given: getattr(separable, name)(**given, **how), None, True)


def _branches(made: dict[str, Tensor], drawn: _Drawn, bias: bool, rest: dict[str, Any]) -> Call:
    terms = rest.pop("branches")
    del made["weight"]
    for number, (shape, _) in enumerate(terms):
        made[f"weight{number}"] = drawn(*shape)
        if bias:
            made[f"bias{number}"] = drawn(shape[0])

    def run(given: Tensors) -> Tensor:
        each = [
            branches.Branch(given[f"weight{number}"], given.get(f"bias{number}"), **dict(how))
            for number, (_, how) in enumerate(terms)
        ]
        return branches.multi_conv2d(given["input"], each, **rest)

    return Call("multi_conv2d", made, run, None, True)


def _deform(made: dict[str, Tensor], drawn: _Drawn, bias: bool, rest: dict[str, Any]) -> Call:
    x, w = made["input"], made["weight"]
    groups, masked = rest.pop("offset_groups", 1), rest.pop("mask", True)
    how = {key: value for key, value in rest.items() if key != "deform"}
    undeformed = {key: value for key, value in how.items() if key in ("stride", "padding", "dilation")}
    y = functional.conv2d(x.to("meta")[:, : w.shape[1]], w.to("meta"), **undeformed)
    pairs = groups * w.shape[2] * w.shape[3]
    made["offset"] = drawn.sixteenths(x.shape[0], 2 * pairs, *y.shape[2:])
    if masked:
        made["mask"] = drawn.uniform(x.shape[0], pairs, *y.shape[2:])
    if bias:
        made["bias"] = drawn(w.shape[0])

    def run(given: Tensors) -> Tensor:
        named: dict[str, Any] = dict(given)
        return deform.deform_conv2d(**named, **how)

    return Call("deform_conv2d", made, run, None, True)


def _streaming(made: dict[str, Tensor], drawn: _Drawn, bias: bool, rest: dict[str, Any]) -> Call:
    x, w, frames = made["input"], made["weight"], rest.pop("context")
    if frames is not None:
        made["context"] = drawn(*x.shape[:2], frames, *x.shape[3:])
    if bias:
        made["bias"] = drawn(w.shape[0])
    function: Any = streaming.causal_conv3d if w.dim() == 5 else causal.causal_conv1d

    def run(given: Tensors) -> Tensor:
        named = {key: t for key, t in given.items() if key not in ("input", "weight")}
        return function(given["input"], given["weight"], **named, **rest)

    return Call(function.__name__, made, run)


_KINDS: dict[str, Callable[[dict[str, Tensor], _Drawn, bool, dict[str, Any]], Call]] = {
    "causal": _causal,
    "pointwise": _separable,
    "branches": _branches,
    "deform": _deform,
}
