"""Short causal convolutions of each channel, as state-space and linear-attention models use them.

    >>> import torch, triton_conv
    >>> x, weight = torch.randn(2, 64, 100), torch.randn(64, 4)
    >>> y, state = triton_conv.causal_conv1d(x, weight, activation="silu", return_final_state=True)
    >>> triton_conv.causal_conv1d_update(torch.randn(2, 64), state, weight, activation="silu").shape  # the 101st step
    torch.Size([2, 64])

The operators, as a profile names them:

    triton_conv::causal_conv1d           the whole sequence
    triton_conv::causal_conv1d_backward  all its gradients; its own gradients are those of plain torch
    triton_conv::causal_conv1d_update    a few more steps, without gradients; changes the state in place

Filters over all channels, of three dimensions, are computed by `streaming`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from . import causal_plan, execute, invariance, recovery
from .arguments import Ints
from .batching import fold_batch, unfold_batch
from .causal_config import CausalProblem, CausalRole
from .causal_plan import CausalPlan
from .conv_calls import check_device, check_given
from .derivatives import SingleLevelFunction, autograd_kernel, below_autograd
from .execute import _on_device
from .ops import _autocast_kernel
from .streaming import dense_causal_conv1d
from .unsupported import check_kind, refuse_script

__all__ = ["causal_conv1d", "causal_conv1d_update"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATIONS = (None, "silu", "swish")
MOST_TAPS = 8
_DENSE = {"stride": 1, "dilation": 1, "groups": 1, "time_mode": "zeros", "precision": None}
LONGEST = 2**30  # positions are counted in 32 bits, some of them beyond the end
MOST_CHANNELS = 2**27  # and so are the taps of all channels

_lib = torch.library.Library("triton_conv", "FRAGMENT")
_SCHEMAS = {
    "causal_conv1d": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, bool silu, bool return_final_state)"
        " -> (Tensor, Tensor)"
    ),
    "causal_conv1d_backward": (
        "(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, bool silu)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "causal_conv1d_update": "(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    _lib.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
_forward_op = torch.ops.triton_conv.causal_conv1d.default
_backward_op = torch.ops.triton_conv.causal_conv1d_backward.default
_update_op = torch.ops.triton_conv.causal_conv1d_update.default


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    *,
    context: Tensor | None = None,
    return_context: bool = False,
    stride: Ints = 1,
    dilation: Ints = 1,
    groups: int = 1,
    time_mode: str = "zeros",
    precision: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolves each channel with a few taps of its own, none of which looks ahead; then SiLU, if asked for.

        >>> x, weight = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[10.0, 1.0]])
        >>> triton_conv.causal_conv1d(x, weight)
        tensor([[[ 1., 12., 23., 34.]]])

    Shapes: x (B, C, L), weight (C, W) with W from 1 to 8, bias (C), initial_state (B, C, W - 1), which is what came
    before x (None: zeros). Returns y (B, C, L), and with `return_final_state` a pair of it and the last W - 1 inputs
    (B, C, W - 1), which is the initial state of what comes after x. activation: None, "silu" or "swish", its other
    name. Dtypes: x and states float16, bfloat16, float32 or float64, weight and bias that one or float32; sums are
    float32, in float64 float64.

    x lies in memory with positions side by side, or channels (a transposed (B, L, C) tensor), and so does y; with
    neither, or where the gradient of y arrives in the other layout, it is copied first. Gradients exist for every
    argument and from the final state, the same bits on every run. Those of gradients are computed by plain torch.

    context and return_context are other names of initial_state and return_final_state. A weight (K, C / groups, S)
    convolves all channels of a group, as `triton_conv.causal_conv3d` does frames:

        >>> x, weight = torch.randn(2, 4, 100), torch.randn(6, 4, 3)
        >>> y, context = triton_conv.causal_conv1d(x, weight, dilation=2, return_context=True)
        >>> y.shape, context.shape
        (torch.Size([2, 6, 100]), torch.Size([2, 4, 4]))

    Then context has any number of positions, stride, dilation, groups, time_mode, precision, dtypes and what is
    promised of chunks are those of `causal_conv3d`, x may be (C, L), and there is no activation.

    Raises what PyTorch raises for arguments of the wrong type, shape, dtype or device, before anything is launched;
    TypeError for options that the weight's kind of convolution does not have.

    Method: a window of inputs in registers, one read of x and one write of y; on a CPU, PyTorch's own convolution.
    """
    tensors = (x, weight, bias, initial_state, context)
    dense: dict[str, Any] = {
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "time_mode": time_mode,
        "precision": precision,
    }
    if has_torch_function(tensors):
        args: Any = (x, weight, bias, activation, initial_state, return_final_state)
        keywords: Any = {"context": context, "return_context": return_context, **dense}
        return handle_torch_function(causal_conv1d, tensors, *args, **keywords)
    silu = _silu("causal_conv1d", activation)
    if context is not None and initial_state is not None:
        raise TypeError("causal_conv1d(): context and initial_state are two names of one argument; give one of them")
    state_name = "initial_state" if context is None else "context"
    initial_state = initial_state if context is None else context
    for argument, asked in {"return_final_state": return_final_state, "return_context": return_context}.items():
        if not isinstance(asked, bool):
            raise TypeError(f"causal_conv1d(): argument '{argument}' must be bool, not {type(asked).__name__}")
    return_final_state = return_final_state or return_context
    _check_types("causal_conv1d", x=x, weight=weight, bias=bias, **{state_name: initial_state})
    if weight.dim() == 3:
        if silu:
            raise TypeError("causal_conv1d(): an activation is for weights (C, W), not for one of three dimensions")
        return dense_causal_conv1d(x, weight, bias, initial_state, **dense, return_context=return_final_state)
    for option, given in dense.items():
        usual = _DENSE[option]
        if type(given) is not type(usual) or given != usual:
            raise TypeError(
                f"causal_conv1d(): {option} is for weights (K, C / groups, S), but got {option}={given!r} "
                f"(weight {list(weight.shape)})"
            )
    y, final_state = _forward_op(x, weight, bias, initial_state, silu, return_final_state)
    return (y, final_state) if return_final_state else y


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """The next step, or steps, of `causal_conv1d`; `state` (B, C, W - 1) is changed in place to what follows it.

        >>> state = torch.zeros(1, 1, 1)
        >>> weight = torch.tensor([[10.0, 1.0]])
        >>> [triton_conv.causal_conv1d_update(torch.tensor([[v]]), state, weight).item() for v in (1.0, 2.0, 3.0)]
        [1.0, 12.0, 23.0]

    Shapes: x (B, C) or (B, C, L), and the result likewise. Tensors and state have any strides. Autocast leaves the
    arguments as they are. There is no gradient: raises RuntimeError if gradients are enabled and an argument requires
    them. See `causal_conv1d` for weight, bias, activation, dtypes and other errors.
    """
    tensors = (x, state, weight, bias)
    if has_torch_function(tensors):
        return handle_torch_function(causal_conv1d_update, tensors, *tensors, activation)
    silu = _silu("causal_conv1d_update", activation)
    _check_types("causal_conv1d_update", x=x, state=state, weight=weight, bias=bias)
    if (
        not torch.compiler.is_compiling() and state.is_neg()
    ):  # the dispatcher's way with such a view is not for operators that write
        following = state.resolve_neg()
        y = causal_conv1d_update(x, following, weight, bias, activation)
        state.copy_(following)
        return y
    if x.dim() == 2:
        return _update_op(x.unsqueeze(2), state, weight, bias, silu).squeeze(2)
    return _update_op(x, state, weight, bias, silu)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with arguments


def _silu(name: str, activation: Any) -> bool:
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f"{name}(): argument 'activation' must be str or None, not {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}(): activation must be one of {ACTIVATIONS}, but got activation={activation!r}")
    return activation is not None


def _check_types(name: str, **tensors: Any) -> None:
    for argument, t in tensors.items():
        if t is None and argument in ("bias", "initial_state", "context"):
            continue
        check_kind(name, argument, t)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, **states: Tensor | None) -> None:
    """Shapes, dtypes and devices; the states are of (B, C, W - 1)."""
    check_given(_forward_op, x=x, weight=weight)
    sizes = f"x {list(x.shape)}, weight {list(weight.shape)}"
    if x.dim() != 3:
        raise RuntimeError(f"expected x of size (B, C, L), but got {sizes}")
    B, C, L = x.shape
    if weight.dim() != 2 or weight.shape[0] != C:
        raise RuntimeError(f"expected weight of size (C, W) with C = {C}, but got {sizes}")
    W = weight.shape[1]
    if not 1 <= W <= MOST_TAPS:
        raise RuntimeError(f"expected weight of 1 to {MOST_TAPS} taps, but got {sizes}")
    if C > MOST_CHANNELS:
        raise RuntimeError(f"expected at most {MOST_CHANNELS} channels, but got {sizes}")
    if L > LONGEST:
        raise RuntimeError(f"expected a sequence of at most {LONGEST} positions, but got {sizes}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != C):
        raise RuntimeError(f"expected bias of size [{C}], but got bias {list(bias.shape)} ({sizes})")
    if x.dtype not in DTYPES:
        raise NotImplementedError(f"x has dtype {x.dtype}, which is not supported ({sizes})")
    for name, state in states.items():
        if state is not None and tuple(state.shape) != (B, C, W - 1):
            raise RuntimeError(f"expected {name} of size [{B}, {C}, {W - 1}], but got {list(state.shape)} ({sizes})")
    for name, t in {"weight": weight, "bias": bias, **states}.items():
        if t is None:
            continue
        dtypes = {x.dtype} if name in states else {x.dtype, torch.float32}
        if t.dtype not in dtypes:
            allowed = " or ".join(sorted(map(str, dtypes)))
            raise RuntimeError(f"expected {name} {list(t.shape)} of {allowed}, but got {t.dtype} ({sizes})")
        if t.device != x.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but x is on {x.device} and {name} {list(t.shape)} is "
                f"on {t.device} ({sizes})"
            )


# ---------------------------------------------------------------------------------------------------------------------
# The same in plain torch: what runs on a CPU, and what gradients of gradients are taken of


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _with_state(x: Tensor, state: Tensor | None, taps: int) -> Tensor:
    """x with the taps - 1 positions before it."""
    return functional.pad(x, (taps - 1, 0)) if state is None else torch.cat((state, x), dim=2)


def _sums(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = padded.dtype
    bias = None if bias is None else bias.to(wide)
    return functional.conv1d(padded, weight.to(wide).unsqueeze(1), bias, groups=padded.shape[1])


def _samples(*tensors: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """The same samples of each; all of them at once unless sums must not depend on the batch."""
    parts = 1 if invariance.batch() is None else max(t.shape[0] for t in tensors if t is not None)
    columns = ([None] * parts if t is None else t.chunk(parts) if parts > 1 else [t] for t in tensors)
    return list(zip(*columns, strict=True))


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool) -> Tensor:
    return torch.cat([_reference_of(a, weight, bias, s, silu) for a, s in _samples(x, state)])


def _reference_of(x: Any, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool) -> Tensor:
    y = _sums(_with_state(x, state, weight.shape[1]).to(_wide(x.dtype)), weight, bias)
    return functional.silu(y) if silu else y


def _reference_gradients(
    dy: Any,
    dfinal_state: Tensor | None,
    x: Any,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and the gradient of the state, as wide as sums are; the last two empty where there is none."""
    (_, C, L), W, wide = x.shape, weight.shape[1], _wide(x.dtype)
    padded, g = _with_state(x, state, W).to(wide), dy.to(wide)
    if silu:
        a = _sums(padded, weight, bias)
        s = torch.sigmoid(a)
        g = g * (s * (1 + a * (1 - s)))  # not aten's silu_backward, which has no derivative
    dpadded, dweight, dbias = torch.ops.aten.convolution_backward(
        g, padded, weight.to(wide).unsqueeze(1), [C], [1], [0], [1], False, [0], C, [True, True, bias is not None]
    )
    if dfinal_state is not None:
        dpadded = dpadded + functional.pad(dfinal_state.to(wide), (L, 0))
    dstate, dx = dpadded.split((W - 1, L), dim=2)
    return (
        dx,
        dweight.squeeze(1),
        x.new_empty(0, dtype=wide) if dbias is None else dbias,
        dstate[:, :, :0] if state is None else dstate,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Memory. "Rows" are positions whose channels lie side by side; without them, positions of a channel do.


def _in_rows(x: Tensor) -> bool:
    return x.shape[1] != 1 and x.stride(1) == 1


def _empty_like(x: Tensor) -> Tensor:
    """Uninitialised, dense, and in the layout of x."""
    B, C, L = x.shape
    return x.new_empty(B, L, C).transpose(1, 2) if _in_rows(x) else x.new_empty(B, C, L)


def _laid_out(t: Tensor, rows: bool) -> Tensor:
    """t, or a copy of it where it does not lie so."""
    axis = 1 if rows else 2
    if t.shape[axis] == 1 or t.stride(axis) == 1:
        return t
    return t.transpose(1, 2).contiguous().transpose(1, 2) if rows else t.contiguous()


def _strides(t: Tensor, rows: bool) -> tuple[int, int]:
    """Of a sample and of a row or a channel; 0 where there is only one."""
    outer = 2 if rows else 1
    return (t.stride(0) if t.shape[0] > 1 else 0, t.stride(outer) if t.shape[outer] > 1 else 0)


def _next_state(x: Tensor, state: Tensor | None, taps: int) -> Tensor:
    """The last taps - 1 inputs."""
    B, C, L = x.shape
    following = x.new_empty(B, C, taps - 1)
    older = max(taps - 1 - L, 0)
    following[:, :, older:] = x[:, :, L - (taps - 1 - older) :]
    if state is None:
        following[:, :, :older] = 0
    else:
        following[:, :, :older] = state[:, :, taps - 1 - older :]
    return following


# ---------------------------------------------------------------------------------------------------------------------
# The operators


def _plan(role, x, weight, bias, state, silu, device, strides) -> CausalPlan:
    """`strides` are those of `CausalProblem`."""
    (B, C, L), W = x.shape, weight.shape[1]
    dtype, weight_dtype, *bias_dtype = (str(t.dtype).removeprefix("torch.") for t in (x, weight, bias) if t is not None)
    there, rows = state is not None, _in_rows(x)
    return causal_plan.make(
        CausalProblem(
            role, B, C, L, W, dtype, weight_dtype, next(iter(bias_dtype), None), silu, there, rows, device, **strides
        )
    )


def forward_plan(x, weight, bias, state, silu, device, y) -> CausalPlan:
    rows = _in_rows(x)
    strides = {"x": _strides(x, rows), "y": _strides(y, rows)}
    return _plan(CausalRole.FORWARD, x, weight, bias, state, silu, device, strides)


def backward_plan(dy, x, weight, bias, state, silu, device, dx) -> CausalPlan:
    rows = _in_rows(x)
    strides = {"x": _strides(x, rows), "y": _strides(dy, rows), "dx": _strides(dx, rows)}
    return _plan(CausalRole.BACKWARD, x, weight, bias, state, silu, device, strides)


def update_plan(x, state, weight, bias, silu, device, y) -> CausalPlan:
    strides = {"x": x.stride(), "y": y.stride(), "state": state.stride()}
    return _plan(CausalRole.UPDATE, x, weight, bias, state, silu, device, strides)


def _contiguous(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: t.contiguous() for name, t in tensors.items() if t is not None}


def _forward(x, weight, bias, initial_state, silu, return_final_state) -> tuple[Tensor, Tensor]:
    y, final_state = _forward_outputs(x, weight, bias, initial_state, silu, return_final_state)
    if return_final_state:
        final_state = _next_state(x, initial_state, weight.shape[1])
    device = execute.device_of(x.device)
    if y.numel() == 0:
        return y, final_state
    if device is None:
        return y.copy_(_reference(x, weight, bias, initial_state, silu)), final_state
    x = _laid_out(x, _in_rows(x))
    tensors = {"x": x, "y": y, **_contiguous(w=weight, bias=bias, state=initial_state)}
    _launched(partial(forward_plan, x, weight, bias, initial_state, silu, device, y), tensors)
    return y, final_state


def _launched(make: Callable[[], CausalPlan], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Runs the first plan of `make` that can run, on tensors by name; returns them with the plan's workspace."""

    def launched(plan: CausalPlan) -> dict[str, Tensor]:
        given = dict(tensors)
        if plan.workspace_shape:
            given["slabs"] = tensors["x"].new_empty(plan.workspace_shape, dtype=_wide(tensors["x"].dtype))
            given["sums"] = torch.empty_like(given["slabs"][0])
        for launch in plan.direct:
            launch.run(given)
        return given

    with _on_device(tensors["x"].device):
        return recovery.run(make, launched)


def _forward_outputs(x, weight, bias, initial_state, silu, return_final_state) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias, initial_state=initial_state)
    B, C, _ = x.shape
    return _empty_like(x), x.new_empty(B, C, weight.shape[1] - 1 if return_final_state else 0)


def _backward(dy, dfinal_state, x, weight, bias, initial_state, silu) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _backward_outputs(dy, dfinal_state, x, weight, bias, initial_state, silu)
    dx, dweight, dbias, dstate = outputs
    device, L, W = execute.device_of(x.device), x.shape[2], weight.shape[1]
    if dx.numel() == 0:
        for output in outputs:
            output.zero_()
    elif device is None:
        given = _samples(dy, dfinal_state, x, initial_state)
        found = [_reference_gradients(g, after, a, weight, bias, before, silu) for g, after, a, before in given]
        for output, values, of_samples in zip(
            outputs, zip(*found, strict=True), (True, False, False, True), strict=True
        ):
            output.copy_(torch.cat(values) if of_samples else sum(values[1:], values[0]))
        return outputs
    else:
        rows = _in_rows(x)
        x, dy = _laid_out(x, rows), _laid_out(dy, rows)
        tensors = {"x": x, "dy": dy, "dx": dx, "dstate": dstate}
        tensors |= _contiguous(w=weight, bias=bias, state=initial_state)
        make = partial(backward_plan, dy, x, weight, bias, initial_state, silu, device, dx)
        sums = _launched(make, tensors)["sums"]
        dweight.copy_(sums[:W].t())
        if bias is not None:
            dbias.copy_(sums[W])
    if dfinal_state is not None:
        older = max(W - 1 - L, 0)
        dx[:, :, L - (W - 1 - older) :] += dfinal_state[:, :, older:]
        if initial_state is not None:
            dstate[:, :, W - 1 - older :] += dfinal_state[:, :, :older]
    return outputs


def _backward_outputs(dy, dfinal_state, x, weight, bias, initial_state, silu) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, weight, bias, initial_state=initial_state, dfinal_state=dfinal_state)
    check_given(_backward_op, dy=dy)
    check_device("x", x, "dy", dy)
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise RuntimeError(f"expected dy {list(x.shape)} of {x.dtype}, but got {list(dy.shape)} of {dy.dtype}")
    (B, C, _), (_, W) = x.shape, weight.shape
    return (
        _empty_like(x),
        weight.new_empty(C, W),
        x.new_empty(0) if bias is None else bias.new_empty(C),
        x.new_empty(B, C, 0 if initial_state is None else W - 1),
    )


def _update(x, state, weight, bias, silu) -> Tensor:
    y = _update_output(x, state, weight, bias, silu)
    device = execute.device_of(x.device)
    if y.numel() == 0:
        return y
    if device is None:
        y.copy_(_reference(x, weight, bias, state, silu))
        state.copy_(_next_state(x, state, weight.shape[1]))
        return y
    if x.untyped_storage().data_ptr() == state.untyped_storage().data_ptr():
        x = x.clone()  # one program may write what another has yet to read
    tensors = {"x": x, "state": state, "y": y, **_contiguous(w=weight, bias=bias)}
    _launched(partial(update_plan, x, state, weight, bias, silu, device, y), tensors)
    return y


def _update_output(x, state, weight, bias, silu) -> Tensor:
    check_given(_update_op, state=state)
    _check(x, weight, bias, state=state)
    if any(stride == 0 and size > 1 for size, stride in zip(state.shape, state.stride(), strict=True)):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to state refers to a single memory location; "
            f"clone() it first (state {list(state.shape)}, strides {list(state.stride())})"
        )
    return _empty_like(x)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


class _Forward(SingleLevelFunction):
    @staticmethod
    def forward(op, *args):
        return below_autograd(op, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, weight, bias, state, ctx.silu, final = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, state)
        if not final:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, dy, dfinal_state):
        x, weight, bias, state = ctx.saved_tensors
        if dy is None and dfinal_state is None:
            return (None,) * 7
        dy = torch.zeros_like(x) if dy is None else dy
        found = _backward_op(dy, dfinal_state, x, weight, bias, state, ctx.silu)
        wanted = [g if need else None for g, need in zip(found, ctx.needs_input_grad[1:5], strict=True)]
        return None, *wanted, None, None


class _Backward(SingleLevelFunction):
    @staticmethod
    def forward(op, *args):
        return below_autograd(op, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.silu = inputs[1:]
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        tensors = ctx.saved_tensors
        there = [i for i, t in enumerate(tensors) if t is not None]

        def in_place(values) -> list[Any]:
            """The values of those that are there, with None for those that are not."""
            given = dict(zip(there, values, strict=True))
            return [given.get(i) for i in range(len(tensors))]

        def gradients(*present):
            arguments: tuple[Any, ...] = (*in_place(present), ctx.silu)
            return _reference_gradients(*arguments)

        outputs, pull = torch.func.vjp(gradients, *(tensors[i] for i in there))  # type: ignore[misc]
        found = pull(tuple(c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)))
        return None, *in_place(found), None


def _update_autograd(*args):
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        raise RuntimeError(
            "causal_conv1d_update has no gradient: call it under torch.no_grad() or detach its arguments"
        )
    return below_autograd(_update_op, *args)


def _update_in_place(keys, *args):
    """So that autograd knows that the state has changed."""
    torch.autograd.graph.increment_version(args[1])
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return _update_op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)


def _channels_vmap(op, inputs: tuple[int, ...], outputs: tuple[int, ...]):
    """Channels do not know each other: a batch of whatever operands becomes more of them, on these axes."""

    def rule(info, in_dims, *args):
        size, count = info.batch_size, len(inputs)
        tensors = zip(args[:count], in_dims[:count], inputs, strict=True)
        folded = [None if t is None else fold_batch(t, dim, size, axis) for t, dim, axis in tensors]
        found = op(*folded, *args[count:])
        return tuple(unfold_batch(t, size, axis) for t, axis in zip(found, outputs, strict=True)), (0,) * len(outputs)

    return rule


# ---------------------------------------------------------------------------------------------------------------------
# Registration

for _op, _run, _fake, _autograd in (
    (_forward_op, _forward, _forward_outputs, autograd_kernel(_forward_op, _Forward)),
    (_backward_op, _backward, _backward_outputs, autograd_kernel(_backward_op, _Backward)),
    (_update_op, _update, _update_output, _update_autograd),
):
    _name = _op._schema.name.split("::")[1]
    _lib.impl(_name, _run, "CPU")
    _lib.impl(_name, _run, "CUDA")
    _lib.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(_op._schema.name, _fake, lib=_lib)
for _op, _inputs, _outputs in (
    (_forward_op, (1, 0, 0, 1), (1, 1)),
    (_backward_op, (1, 1, 1, 0, 0, 1), (1, 0, 0, 1)),
):
    torch.library.register_vmap(_op._schema.name, _channels_vmap(_op, _inputs, _outputs), lib=_lib)
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _lib.impl("causal_conv1d", _autocast_kernel(_forward_op, _device), _key)
_lib.impl("causal_conv1d_update", _update_in_place, "ADInplaceOrView", with_keyset=True)

refuse_script(causal_conv1d, causal_conv1d_update)
