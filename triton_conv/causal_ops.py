"""The operators of causal convolutions of each channel: schemas, fake kernels, autograd, autocast and vmap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import causal_plan, execute, recovery
from . import causal_reference as reference
from .batching import fold_batch, unfold_batch
from .causal_config import CausalProblem, CausalRole
from .causal_plan import CausalPlan
from .conv_calls import check_device, check_given
from .derivatives import SingleLevelFunction, autograd_kernel, below_autograd
from .execute import _on_device
from .ops import _autocast_kernel
from .reference import wide_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_TAPS = 8

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
forward_op = torch.ops.triton_conv.causal_conv1d.default
_backward_op = torch.ops.triton_conv.causal_conv1d_backward.default
update_op = torch.ops.triton_conv.causal_conv1d_update.default


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with operands


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, **states: Tensor | None) -> None:
    """Shapes, dtypes and devices; the states are of (B, C, W - 1)."""
    check_given(forward_op, x=x, weight=weight)
    sizes = f"x {list(x.shape)}, weight {list(weight.shape)}"
    if x.dim() != 3:
        raise RuntimeError(f"expected x of size (B, C, L), but got {sizes}")
    B, C, _ = x.shape
    if weight.dim() != 2 or weight.shape[0] != C:
        raise RuntimeError(f"expected weight of size (C, W) with C = {C}, but got {sizes}")
    W = weight.shape[1]
    if not 1 <= W <= MOST_TAPS:
        raise RuntimeError(f"expected weight of 1 to {MOST_TAPS} taps, but got {sizes}")
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
        return y.copy_(reference.forward(x, weight, bias, initial_state, silu)), final_state
    x = _laid_out(x, _in_rows(x))
    tensors = {"x": x, "y": y, **_contiguous(w=weight, bias=bias, state=initial_state)}
    _launched(partial(forward_plan, x, weight, bias, initial_state, silu, device, y), tensors)
    return y, final_state


def _launched(make: Callable[[], CausalPlan], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Runs the first plan of `make` that can run, on tensors by name; returns them with the plan's workspace."""

    def launched(plan: CausalPlan) -> dict[str, Tensor]:
        given = dict(tensors)
        if plan.workspace_shape:
            given["slabs"] = tensors["x"].new_empty(plan.workspace_shape, dtype=wide_of(tensors["x"].dtype))
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
        given = reference.samples(dy, dfinal_state, x, initial_state)
        found = [reference.gradients(g, after, a, weight, bias, before, silu) for g, after, a, before in given]
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
        y.copy_(reference.forward(x, weight, bias, state, silu))
        state.copy_(_next_state(x, state, weight.shape[1]))
        return y
    if x.untyped_storage().data_ptr() == state.untyped_storage().data_ptr():
        x = x.clone()  # one program may write what another has yet to read
    tensors = {"x": x, "state": state, "y": y, **_contiguous(w=weight, bias=bias)}
    _launched(partial(update_plan, x, state, weight, bias, silu, device, y), tensors)
    return y


def _update_output(x, state, weight, bias, silu) -> Tensor:
    check_given(update_op, state=state)
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
            return reference.gradients(*arguments)

        outputs, pull = torch.func.vjp(gradients, *(tensors[i] for i in there))  # type: ignore[misc]
        found = pull(tuple(c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)))
        return None, *in_place(found), None


def _update_autograd(*args):
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        raise RuntimeError(
            "causal_conv1d_update has no gradient: call it under torch.no_grad() or detach its arguments"
        )
    return below_autograd(update_op, *args)


def _update_in_place(keys, *args):
    """So that autograd knows that the state has changed."""
    torch.autograd.graph.increment_version(args[1])
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return update_op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)


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
    (forward_op, _forward, _forward_outputs, autograd_kernel(forward_op, _Forward)),
    (_backward_op, _backward, _backward_outputs, autograd_kernel(_backward_op, _Backward)),
    (update_op, _update, _update_output, _update_autograd),
):
    _name = _op._schema.name.split("::")[1]
    _lib.impl(_name, _run, "CPU")
    _lib.impl(_name, _run, "CUDA")
    _lib.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(_op._schema.name, _fake, lib=_lib)
for _op, _inputs, _outputs in (
    (forward_op, (1, 0, 0, 1), (1, 1)),
    (_backward_op, (1, 1, 1, 0, 0, 1), (1, 0, 0, 1)),
):
    torch.library.register_vmap(_op._schema.name, _channels_vmap(_op, _inputs, _outputs), lib=_lib)
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _lib.impl("causal_conv1d", _autocast_kernel(forward_op, _device), _key)
_lib.impl("causal_conv1d_update", _update_in_place, "ADInplaceOrView", with_keyset=True)
