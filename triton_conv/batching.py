"""vmap of the operators.

A batch of one operand folds into an axis that no other operand has: inputs into N, weights and gradients into their
channels of the output. A batch of both folds into groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schemas import conv_dgrad, conv_scaled, conv_wgrad

GROUPS = 3  # the place of groups in every operator's parameters


def front(t: Tensor, dim: int | None, size: int) -> Tensor:
    return t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def fold_batch(t: Tensor, dim: int | None, size: int, axis: int) -> Tensor:
    """t with its batch as the outer part of `axis`; without a batch it is repeated."""
    return front(t, dim, size).movedim(0, axis).flatten(axis, axis + 1)


def unfold_batch(t: Tensor, size: int, axis: int) -> Tensor:
    return t.unflatten(axis, (size, t.shape[axis] // size)).movedim(axis, 0)


def _with_bias(y: Tensor, bias: Tensor | None, dim: int | None) -> Tensor:
    """Adds bias (C) or a batch of them to y (batch, N, C, ...)."""
    if bias is None:
        return y
    bias = bias.unsqueeze(0) if dim is None else bias.movedim(dim, 0)
    return y + bias.reshape(bias.shape[0], 1, bias.shape[1], *(1,) * (y.dim() - 3))


def activation_vmap(op, output_channels: int):
    """The rule of an operator that maps an activation and a weight, whose axis it names, to an activation."""

    def rule(info, in_dims, a, w, third, *params):
        bias, bias_dim, sizes = (third, in_dims[2], None) if op is not conv_dgrad else (None, None, third)
        size, (a_dim, w_dim) = info.batch_size, in_dims[:2]
        if a_dim is None and w_dim is None:
            return _with_bias(op(a, w, None, *params).unsqueeze(0), bias, bias_dim), 0
        if w_dim is None:
            folded = fold_batch(a, a_dim, size, 0)
            last = [folded.shape[0], *sizes[1:]] if sizes is not None else (bias if bias_dim is None else None)
            y = unfold_batch(op(folded, w, last, *params), size, 0)
            return (y if bias_dim is None else _with_bias(y, bias, bias_dim)), 0
        last = None if sizes is None else [sizes[0], sizes[1] * size, *sizes[2:]]
        if a_dim is None and params[GROUPS] == 1:  # with more, the channels of a group would not stay together
            y = op(a, fold_batch(w, w_dim, size, output_channels), last, *params)
        else:
            grouped = list(params)
            grouped[GROUPS] = params[GROUPS] * size
            y = op(fold_batch(a, a_dim, size, 1), fold_batch(w, w_dim, size, 0), last, *grouped)
        return _with_bias(unfold_batch(y, size, 1), bias, bias_dim), 0

    return rule


def scaled_vmap(info, in_dims, a, w, bias, *params):
    if any(dim is not None for dim in in_dims[-3:-1]):
        raise NotImplementedError("vmap over the scales of triton_conv::conv_scaled is not supported")
    return activation_vmap(conv_scaled, 0)(info, in_dims, a, w, bias, *params)


def wgrad_vmap(info, in_dims, dy, x, weight_size, weight_stride, *params):
    size, (dy_dim, x_dim) = info.batch_size, in_dims[:2]
    grouped, axis = list(params), 0
    if params[GROUPS] == 1 and x_dim is None:
        dy = fold_batch(dy, dy_dim, size, 1)
    elif params[GROUPS] == 1 and dy_dim is None:
        x, axis = fold_batch(x, x_dim, size, 1), 1
    else:
        dy, x = fold_batch(dy, dy_dim, size, 1), fold_batch(x, x_dim, size, 1)
        grouped[GROUPS] = params[GROUPS] * size
    many = [*weight_size[:axis], weight_size[axis] * size, *weight_size[axis + 1 :]]
    strides = torch._prims_common.make_contiguous_strides_for(many)
    return unfold_batch(conv_wgrad(dy, x, many, strides, *grouped), size, axis), 0
