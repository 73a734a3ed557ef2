"""The registered operators by name: their schemas, and what torch.jit.trace can record in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PLAIN = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str padding_mode"
PARAMS = f"{PLAIN}, str? precision"
TRANSPOSED = (
    "SymInt[] stride, SymInt[] padding, SymInt[] output_padding, SymInt groups, SymInt[] dilation, "
    "str padding_mode, str? precision"
)
SCHEMAS = {
    "conv": f"(Tensor input, Tensor weight, Tensor? bias, {PARAMS}) -> Tensor",
    "conv_dilated": f"(Tensor input, Tensor weight, Tensor? bias, {PARAMS}) -> Tensor",
    "conv_transpose": f"(Tensor input, Tensor weight, Tensor? bias, {TRANSPOSED}) -> Tensor",
    "conv_dgrad": f"(Tensor grad_output, Tensor weight, SymInt[] input_size, {PARAMS}) -> Tensor",
    "conv_wgrad": (
        f"(Tensor grad_output, Tensor input, SymInt[] weight_size, SymInt[] weight_stride, {PARAMS}) -> Tensor"
    ),
    "conv_scaled": (
        f"(Tensor input, Tensor weight, Tensor? bias, {PLAIN}, Tensor scale_a, Tensor scale_b, ScalarType out_dtype)"
        " -> Tensor"
    ),
    "conv_int": f"(Tensor input, Tensor weight, Tensor? bias, {PLAIN}) -> Tensor",
}

LIBRARY = torch.library.Library("triton_conv", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

conv = torch.ops.triton_conv.conv.default
conv_dilated = torch.ops.triton_conv.conv_dilated.default
conv_transpose = torch.ops.triton_conv.conv_transpose.default
conv_dgrad = torch.ops.triton_conv.conv_dgrad.default
conv_wgrad = torch.ops.triton_conv.conv_wgrad.default
conv_scaled = torch.ops.triton_conv.conv_scaled.default
conv_int = torch.ops.triton_conv.conv_int.default

# torch.jit.trace records no list of SymInts: while it runs, calls go to an overload with plain ones.
_TRACED: dict[Any, Any] = {}


def define_traced(lib: torch.library.Library, op: Any, schemas: Mapping[str, str]) -> None:
    """Gives `op` that overload; `schemas` has its own under its name."""
    name = op._schema.name.split("::")[1]
    lib.define(f"{name}.traced{schemas[name].replace('SymInt', 'int')}")
    lib.impl(f"{name}.traced", op, "CompositeImplicitAutograd")
    _TRACED[op] = getattr(torch.ops.triton_conv, name).traced


for _op in (conv, conv_dilated, conv_transpose, conv_scaled, conv_int):
    define_traced(LIBRARY, _op, SCHEMAS)


def recordable(op):
    """`op`, or while torch.jit traces what it can record in its place."""
    return _TRACED[op] if torch.jit.is_tracing() else op


def fprop(x: Tensor, w: Tensor, bias: Tensor | None, params: Sequence[Any]) -> Tensor:
    """`conv` or `conv_dilated`, by the dilation in `params` (stride, padding, dilation, groups, mode, precision)."""
    return recordable(fprop_op(params))(x, w, bias, *params)


def fprop_op(params: Sequence[Any]):
    return conv_dilated if any(d > 1 for d in params[2]) else conv
