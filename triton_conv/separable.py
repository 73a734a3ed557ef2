"""Depthwise-separable convolutions: one of each channel by itself, then a 1x1 convolution across channels.

    >>> import torch, triton_conv
    >>> x, depthwise, pointwise = torch.randn(1, 8, 16, 16), torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)
    >>> triton_conv.separable_conv2d(x, depthwise, pointwise, padding=1).shape
    torch.Size([1, 4, 16, 16])

`triton_conv::conv_separable` is for inference, and may run one kernel that keeps what lies between the two convolutions
in registers. Where a gradient is asked for it is two `triton_conv::conv`, which have all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import arguments, batching, conv_calls, derivatives, execute, ops, recovery, schemas
from .arguments import Ints, Modes, Padding
from .devices import Device
from .separable_plan import Problem, SeparablePlan, make, obstacle
from .unsupported import refuse_script

__all__ = ["separable_conv1d", "separable_conv2d", "separable_conv3d"]

_SCHEMA = (
    "(Tensor input, Tensor depthwise, Tensor pointwise, Tensor? depthwise_bias, Tensor? bias, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, str padding_mode, str? precision, bool? fused) -> Tensor"
)
_lib = torch.library.Library("triton_conv", "FRAGMENT")
_lib.define("conv_separable" + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_lib.define(f"conv_separable.traced{_SCHEMA.replace('SymInt', 'int')}")
_op = torch.ops.triton_conv.conv_separable.default


def separable_conv1d(
    input: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    depthwise_bias: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    *,
    padding_mode: Modes = "zeros",
    precision: str | None = None,
    fused: bool | None = None,
) -> Tensor:
    """1-D depthwise-separable convolution.

        >>> x, depthwise, pointwise = torch.randn(2, 6, 50), torch.randn(6, 1, 5), torch.randn(10, 6, 1)
        >>> triton_conv.separable_conv1d(x, depthwise, pointwise, padding="same").shape
        torch.Size([2, 10, 50])

    Shapes: input (N, C, W) or (C, W), depthwise (E, 1, S), pointwise (K, E, 1); returns (N, K, Q) or (K, Q). See
    `separable_conv2d` for the rest.
    """
    filters, biases = (depthwise, pointwise), (depthwise_bias, bias)
    return _separable(1, input, filters, biases, stride, padding, dilation, padding_mode, precision, fused)


def separable_conv2d(
    input: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    depthwise_bias: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    *,
    padding_mode: Modes = "zeros",
    precision: str | None = None,
    fused: bool | None = None,
) -> Tensor:
    """2-D depthwise-separable convolution: `conv2d(conv2d(input, depthwise, ..., groups=C), pointwise)`.

        >>> x, depthwise, pointwise = torch.randn(2, 4, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(6, 8, 1, 1)
        >>> triton_conv.separable_conv2d(x, depthwise, pointwise, stride=2, padding=1).shape
        torch.Size([2, 6, 5, 5])

    Shapes: input (N, C, H, W) or (C, H, W), depthwise (E, 1, R, S) with E a multiple of C, pointwise (K, E, 1, 1),
    depthwise_bias (E), bias (K); returns (N, K, P, Q) or (K, P, Q). stride, padding, dilation and padding_mode are the
    depthwise part's; see `triton_conv.conv2d` for them, for dtypes and errors.

    fused: True computes both in one kernel, which neither writes nor reads what lies between them; False runs two. None
    leaves it to the library, which takes the one kernel where it is predicted and has been measured to be faster: so
    far nowhere. Values are the same to accumulation order: what lies between is rounded to the input's dtype either
    way. Where a gradient is asked for two kernels run all the same. On a CPU it makes no difference.

    Raises RuntimeError too for what the one kernel does not do, if `fused` is True: integers, complex numbers, filters
    of more than 7 columns.
    """
    filters, biases = (depthwise, pointwise), (depthwise_bias, bias)
    return _separable(2, input, filters, biases, stride, padding, dilation, padding_mode, precision, fused)


def separable_conv3d(
    input: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    depthwise_bias: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    *,
    padding_mode: Modes = "zeros",
    precision: str | None = None,
    fused: bool | None = None,
) -> Tensor:
    """3-D depthwise-separable convolution.

        >>> x, depthwise, pointwise = torch.randn(1, 4, 5, 8, 8), torch.randn(4, 1, 3, 1, 1), torch.randn(6, 4, 1, 1, 1)
        >>> triton_conv.separable_conv3d(x, depthwise, pointwise, padding=((2, 0), 0, 0)).shape
        torch.Size([1, 6, 5, 8, 8])

    Shapes: input (N, C, D, H, W) or (C, D, H, W), depthwise (E, 1, T, R, S), pointwise (K, E, 1, 1, 1); returns
    (N, K, Z, P, Q) or (K, Z, P, Q). See `separable_conv2d` for the rest.
    """
    filters, biases = (depthwise, pointwise), (depthwise_bias, bias)
    return _separable(3, input, filters, biases, stride, padding, dilation, padding_mode, precision, fused)


def _separable(rank, input, filters, biases, stride, padding, dilation, padding_mode, precision, fused) -> Tensor:
    name, tensors = f"separable_conv{rank}d", (input, *filters, *biases)
    if has_torch_function(tensors):
        args: Any = (*tensors, stride, padding, dilation)
        keywords = {"padding_mode": padding_mode, "precision": precision, "fused": fused}
        return handle_torch_function(globals()[name], tensors, *args, **keywords)
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(f"{name}(): argument 'fused' must be bool or None, not {type(fused).__name__}")
    (depthwise, pointwise), (depthwise_bias, bias) = filters, biases
    batched = arguments.check_tensors(
        name, rank, arguments.DTYPES, input, depthwise, weight_name="depthwise", depthwise_bias=depthwise_bias
    )
    arguments.check_tensors(name, rank, arguments.DTYPES, input, pointwise, weight_name="pointwise", bias=bias)
    stride, padding, dilation, _, modes = arguments.forward_parameters(
        name, rank, depthwise, stride, padding, dilation, 1, padding_mode
    )
    x = input if batched else input.unsqueeze(0)
    params = (stride, padding, dilation, modes, arguments.precision_of(name, precision))
    op: Any = torch.ops.triton_conv.conv_separable.traced if torch.jit.is_tracing() else _op
    y = op(x, depthwise, pointwise, depthwise_bias, bias, *params, fused)
    return y if batched else y.squeeze(0)


# ---------------------------------------------------------------------------------------------------------------------
# The operator


def _first_call(
    input, depthwise, pointwise, depthwise_bias, bias, stride, padding, dilation, padding_mode, precision
) -> execute.Call:
    """The depthwise call; everything about the other one is checked but how its channels fit."""
    conv_calls.check_given(_op, input=input, depthwise=depthwise, pointwise=pointwise)
    sizes = f"depthwise {list(depthwise.shape)}, pointwise {list(pointwise.shape)} (input {list(input.shape)})"
    if not input.dim() == depthwise.dim() == pointwise.dim() > 2:
        raise RuntimeError(f"expected input, depthwise and pointwise with as many dimensions, but got {sizes}")
    C, E = input.shape[1], depthwise.shape[0]
    if C == 0 or E == 0 or E % C:
        raise RuntimeError(f"expected depthwise to have a multiple of the input's {C} channels, but got {sizes}")
    if depthwise.shape[1] != 1 or pointwise.shape[1] != E or any(n != 1 for n in pointwise.shape[2:]):
        raise RuntimeError(
            f"expected depthwise of size (E, 1, ...) and pointwise of size (K, E, 1, ...), but got {sizes}"
        )
    first = conv_calls.conv_call(
        input, depthwise, depthwise_bias, stride, padding, dilation, C, padding_mode, precision
    )
    conv_calls.check_operands(bias, pointwise.shape[0], precision, input=input, pointwise=pointwise)
    return first


def _second_params(rank: int, precision: str | None) -> tuple:
    ones = [1] * rank
    return ones, [0, 0] * len(ones), ones, 1, "zeros", precision


def _calls(input, depthwise, pointwise, *rest) -> tuple[execute.Call, execute.Call]:
    """The depthwise call, and one of the 1x1 convolution whose input is only a shape."""
    first = _first_call(input, depthwise, pointwise, *rest)
    between = execute._empty_like_output(replace(first, a=input.to("meta"), b=depthwise.to("meta")))
    return first, conv_calls.conv_call(
        between, pointwise.to("meta"), None, *_second_params(input.dim() - 2, first.precision)
    )


def _empty(input: Tensor, second: execute.Call) -> Tensor:
    like = execute._empty_like_output(second)
    return torch.empty_strided(like.shape, like.stride(), dtype=input.dtype, device=input.device)


def _fake(*args) -> Tensor:
    calls = _calls(*args[:-1])
    for call in calls:
        execute.record(call)
    return _empty(args[0], calls[1])


def _run(input, depthwise, pointwise, depthwise_bias, bias, *params) -> Tensor:
    how, fused = params[:-1], params[-1]
    first, second = _calls(input, depthwise, pointwise, depthwise_bias, bias, *how)
    output, device = _empty(input, second), execute.device_of(input.device)
    numbers = output.numel() and first.a.numel() and second.a.numel()
    if device is not None and numbers and fused is not False:
        made = plan_of(first, second, pointwise, bias, output, device)
        if isinstance(made, str):
            if fused:
                raise RuntimeError(
                    f"the fused kernel cannot compute this: {made} (input {list(input.shape)} of {input.dtype}, "
                    f"depthwise {list(depthwise.shape)})"
                )
        elif fused or made.worth_it:
            tensors = {"x": input, "depthwise": depthwise, "pointwise": pointwise, "y": output}
            biases = {"depthwise_bias": depthwise_bias, "bias": bias}
            tensors |= {name: b.contiguous() for name, b in biases.items() if b is not None}

            def launched(p: SeparablePlan) -> Tensor:
                for launch in p.direct:
                    launch.run(tensors)
                return output

            with execute._on_device(input.device):
                return recovery.run(lambda: make(made.problem), launched, made.problem)
    between = execute.execute(first)
    y = execute.execute(replace(second, a=between, b=pointwise, bias=bias))
    return y if y.stride() == output.stride() else output.copy_(y)


def plan_of(
    first: execute.Call, second: execute.Call, pointwise: Tensor, bias: Tensor | None, output: Tensor, device: Device
) -> SeparablePlan | str:
    """The plan of the fused kernel, or in words why there is none."""
    dtype = str(first.a.dtype).removeprefix("torch.")
    why = obstacle(dtype, first.geometry)
    if why:
        return why
    x, filters, mixing, y = (execute._strides(t) for t in (first.a, first.b, pointwise, output))
    problem = Problem(
        first.geometry,
        second.geometry.K,
        dtype,
        (first.precision or execute.default_precision()) if dtype == "float32" else "ieee",
        x,
        filters,
        mixing,
        y,
        first.bias is not None,
        bias is not None,
        device,
    )
    return make(problem)


def _composed(*args) -> Tensor:
    """The same as two operators, which have gradients."""
    first = _first_call(*args)
    input, depthwise, pointwise, depthwise_bias, bias, stride, padding, dilation, padding_mode, precision = args
    params = (stride, padding, dilation, input.shape[1], padding_mode, precision)
    between = schemas.fprop(input, depthwise, depthwise_bias, params)
    return schemas.fprop(between, pointwise, bias, _second_params(input.dim() - 2, first.precision))


def _autograd(*args) -> Tensor:
    asked = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    if asked or torch.autograd.forward_ad._current_level >= 0:
        return _composed(*args[:-1])
    return derivatives.below_autograd(_op, *args)


def _vmap(info, in_dims, input, depthwise, pointwise, depthwise_bias, bias, *params):
    """By the rules of the two operators."""
    stride, padding, dilation, padding_mode, precision, _ = params
    C = [n for axis, n in enumerate(input.shape) if axis != in_dims[0]][1]
    first, dims = (input, depthwise, depthwise_bias), (in_dims[0], in_dims[1], in_dims[3])
    how = (stride, padding, dilation, C, padding_mode, precision)
    op = ops.conv_dilated if any(d > 1 for d in dilation) else ops.conv
    if any(dim is not None for dim in dims):
        between, dim = batching.activation_vmap(op, 0)(info, dims, *first, *how)
    else:
        between, dim = op(*first, *how), None
    rule = batching.activation_vmap(ops.conv, 0)
    return rule(info, (dim, *in_dims[2:5:2]), between, pointwise, bias, *_second_params(len(stride), precision))


_lib.impl("conv_separable", _run, "CPU")
_lib.impl("conv_separable", _run, "CUDA")
_lib.impl("conv_separable", _autograd, "Autograd")
_lib.impl("conv_separable.traced", _op, "CompositeImplicitAutograd")
torch.library.register_fake("triton_conv::conv_separable", _fake, lib=_lib)
torch.library.register_vmap("triton_conv::conv_separable", _vmap, lib=_lib)
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _lib.impl("conv_separable", ops._autocast_kernel(_op, _device), _key)

refuse_script(separable_conv1d, separable_conv2d, separable_conv3d)
