"""Causal convolutions of video and audio in chunks: the frames before the first one are read from a second tensor.

    >>> import torch, triton_conv
    >>> video, filters = torch.randn(1, 8, 9, 6, 6), torch.randn(16, 8, 3, 3, 3)
    >>> first, context = triton_conv.causal_conv3d(video[:, :, :1], filters, padding=1, return_context=True)
    >>> rest = triton_conv.causal_conv3d(video[:, :, 1:], filters, padding=1, context=context)
    >>> torch.equal(torch.cat((first, rest), dim=2), triton_conv.causal_conv3d(video, filters, padding=1))
    True

The operators, as a profile names them, are `triton_conv::causal_conv` and, with an epilogue, `causal_conv_fused`; their
gradients are `triton_conv::conv_dgrad` and `conv_wgrad`. A sequence is to them a video whose frames have one position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import arguments, config, derivatives, execute, fused, plan, streaming_ops, streaming_plan
from .arguments import Ints, Modes, Padding
from .config import Device
from .epilogue import PLAIN, Epilogue
from .execute import Call
from .fused import Fusion
from .geometry import Role, output_extent
from .streaming_plan import StreamingPlan
from .unsupported import check_kind, refuse_script

__all__ = ["causal_conv3d"]

DTYPES = tuple(getattr(torch, name) for name in streaming_plan.DTYPES)
TIME_MODES = ("zeros", "replicate")


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    context: Tensor | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    padding_mode: Modes = "zeros",
    time_mode: str = "zeros",
    return_context: bool = False,
    precision: str | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    residual_after_activation: bool = False,
    scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """3-D convolution that looks back in time, never ahead; `context` is what came before x.

        >>> x, w = torch.ones(1, 1, 2, 1, 1), torch.tensor([4.0, 2.0, 1.0]).view(1, 1, 3, 1, 1)
        >>> y, context = triton_conv.causal_conv3d(x, w, return_context=True)
        >>> y.flatten(), triton_conv.causal_conv3d(x, w, context=context).flatten()
        (tensor([1., 3.]), tensor([7., 7.]))

    Shapes: x (N, C, D, H, W), weight (K, C / groups, T, R, S), bias (K), context (N, C, any number of frames, H, W);
    returns (N, K, Z, P, Q), channels-last where x or weight is. x and context may be without N, and so is the result.
    Dtypes: float16, bfloat16, float32 or float64, one for all; sums are float32, in float64 float64.

    context: None stands for the dilation * (T - 1) frames before a beginning, which are zeros, or with
    time_mode="replicate" all the first frame of x. Given, Z = (frames + D - dilation * (T - 1) - 1) // stride + 1.
    return_context: returns a pair of y and the context of the next chunk: for a stride of 1 the last
    dilation * (T - 1) frames. It is a view of x where x has them all, which keeps x in memory: clone() it if that
    matters. padding: an int, one int or (lower, upper) pair for rows and one for columns, "valid" or "same".
    padding_mode: "zeros", "reflect", "replicate" or "circular", one name or one for each of the two. Stride and
    dilation: an int, or three, those of time first.

    The bits of a frame do not depend on the chunks that a video is cut into, nor on where it is cut: not on a GPU and
    not on a CPU, where frames are computed one by one and are therefore slow. x, context and weight are to lie in
    memory alike each time (contiguous or channels-last), and N to be the same.

    activation, negative_slope, residual, residual_after_activation, scale: as in `triton_conv.conv3d`. Where no
    gradient is asked for they happen in the same kernel, else in plain torch after it, rounded once more.

    Gradients exist for all tensors, of any order. Those of x and context are views of one tensor; for
    that of weight context and x are concatenated, and forward they never are.

    Raises what PyTorch raises for arguments of the wrong type, shape, dtype or device, before anything is launched;
    RuntimeError too where a stride reaches over frames that are not there yet and the next context is asked for.

    Method: implicit GEMM; pixels or whole taps choose between two base addresses (the cache of causal convolutions in
    video decoders such as Wan 2.1, 2025, without its concatenation); on a CPU, PyTorch's own convolution.
    """
    tensors = (x, weight, bias, context, residual, scale)
    if has_torch_function(tensors):
        return handle_torch_function(
            causal_conv3d,
            tensors,
            *tensors[:4],
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
            time_mode=time_mode,
            return_context=return_context,
            precision=precision,
            activation=activation,
            negative_slope=negative_slope,
            residual=residual,
            residual_after_activation=residual_after_activation,
            scale=scale,
        )
    how = _video(tensors[:4], stride, padding, dilation, groups, padding_mode, time_mode, precision)
    fusion = fused.asked("causal_conv3d", activation, negative_slope, residual, residual_after_activation, scale)
    return _convolved("causal_conv3d", *how, return_context, fusion)


def dense_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    context: Tensor | None,
    stride: Ints,
    dilation: Ints,
    groups: int,
    time_mode: str,
    return_context: bool,
    precision: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d` of weights (K, C / groups, S)."""
    how = _sequence((x, weight, bias, context), stride, dilation, groups, time_mode, precision)
    found = _convolved("causal_conv1d", *how, return_context)
    return tuple(t[..., 0, 0] for t in found) if isinstance(found, tuple) else found[..., 0, 0]


def _video(
    tensors,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    padding_mode: Modes = "zeros",
    time_mode: str = "zeros",
    precision: str | None = None,
) -> tuple[bool, tuple, tuple]:
    """(whether x is batched, the operator's tensors, its parameters) of `causal_conv3d`."""
    name, weight = "causal_conv3d", tensors[1]
    batched = _check_tensors(name, 3, *tensors)
    strides, dilations = arguments.ints_of(name, "stride", stride, 3), arguments.ints_of(name, "dilation", dilation, 3)
    spatial = weight[:, :, 0] if isinstance(padding, str) else weight
    pads = arguments.padding_of(name, padding, 2, spatial, strides[1:], dilations[1:])
    modes = arguments.mode_names(name, padding_mode, 2)
    params = (strides, pads, dilations, arguments.index_of(name, "groups", groups), modes)
    return batched, tensors, (*params, check_time_mode(name, time_mode), arguments.precision_of(name, precision))


def _sequence(
    tensors,
    stride: Ints = 1,
    dilation: Ints = 1,
    groups: int = 1,
    time_mode: str = "zeros",
    precision: str | None = None,
) -> tuple[bool, tuple, tuple]:
    """The same of `causal_conv1d`: of a video whose frames have one position."""
    name = "causal_conv1d"
    batched = _check_tensors(name, 1, *tensors)
    (step,), (reach,) = arguments.ints_of(name, "stride", stride, 1), arguments.ints_of(name, "dilation", dilation, 1)
    params = ([step, 1, 1], [0] * 4, [reach, 1, 1], arguments.index_of(name, "groups", groups), "zeros")
    x, weight, bias, context = tensors
    if weight.shape[1] * params[3] != x.shape[-2]:
        raise RuntimeError(
            f"Given groups={groups}, expected weight (K, C / groups, S) for x (B, C, L), or (C, W) for one a channel, "
            f"but got weight {list(weight.shape)}, x {list(x.shape)}"
        )
    x, weight, context = (t if t is None else t[..., None, None] for t in (x, weight, context))
    how = (*params, check_time_mode(name, time_mode), arguments.precision_of(name, precision))
    return batched, (x, weight, bias, context), how


def check_time_mode(name: str, time_mode: Any) -> str:
    if not isinstance(time_mode, str):
        raise TypeError(f"{name}(): argument 'time_mode' must be str, not {type(time_mode).__name__}")
    if time_mode not in TIME_MODES:
        raise ValueError(f"{name}(): time_mode must be one of {TIME_MODES}, but got time_mode={time_mode!r}")
    return time_mode


def _convolved(
    name: str, batched: bool, tensors: tuple, params: tuple, return_context: Any, fusion: Fusion | None = None
) -> Any:
    x, weight, bias, context = tensors
    if not isinstance(return_context, bool):
        raise TypeError(f"{name}(): argument 'return_context' must be bool, not {type(return_context).__name__}")
    if not batched:
        x, context = x.unsqueeze(0), None if context is None else context.unsqueeze(0)
    if fusion is None:
        y = streaming_ops.recordable(streaming_ops.causal_conv)(x, weight, bias, context, *params)
    else:
        y = _fused(name, batched, (x, weight, bias), context, params, fusion)
    y = y if batched else y.squeeze(0)
    if not return_context:
        return y
    stride, _, dilation, _, _, time_mode, _ = params
    following = _next_context(name, x, context, weight.shape[2], stride[0], dilation[0], time_mode)
    return y, following if batched else following.squeeze(0)


def _fused(name: str, batched: bool, tensors: tuple, context: Tensor | None, params: tuple, fusion: Fusion) -> Tensor:
    activation, slope, residual, after, scale = fusion
    fused.check(name, activation, slope, after)
    for argument, t in (("residual", residual), ("scale", scale)):
        if t is not None:
            check_kind(name, argument, t)
    residual = residual if batched or residual is None else residual.unsqueeze(0)
    op = streaming_ops.recordable(streaming_ops.causal_conv_fused)
    return op(*tensors, scale, residual, context, *params, activation or "", float(slope), bool(after))


def _check_tensors(name: str, rank: int, x: Any, weight: Any, bias: Any, context: Any) -> bool:
    """Whether x is batched; raises for what is not a tensor of the right kind and rank."""
    for argument, t in {"x": x, "weight": weight, "bias": bias, "context": context}.items():
        if t is not None or argument in ("x", "weight"):
            check_kind(name, argument, t)
            if t.dtype not in DTYPES:
                raise NotImplementedError(f"{name}(): {argument} {list(t.shape)} has dtype {t.dtype}; use .to()")
    if weight.dim() != rank + 2:
        raise RuntimeError(
            f"{name}(): expected a {rank + 2}-dimensional weight, but got weight of size {list(weight.shape)} "
            f"(x {list(x.shape)})"
        )
    if x.dim() not in (rank + 1, rank + 2):
        raise RuntimeError(
            f"Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) x to {name}, but got x of size {list(x.shape)}"
        )
    if context is not None and context.dim() != x.dim():
        raise RuntimeError(
            f"{name}(): expected context with {x.dim()} dimensions like x, but got context {list(context.shape)}, "
            f"x {list(x.shape)}"
        )
    return x.dim() == rank + 2


def _next_context(
    name: str, x: Tensor, context: Tensor | None, taps: int, stride: int, dilation: int, time_mode: str
) -> Tensor:
    """The frames from the first one that the next output reads."""
    frames = x.shape[2]
    before = dilation * (taps - 1) if context is None else context.shape[2]
    read = output_extent(before + frames, 0, 0, taps, stride, dilation) * stride
    keep = before + frames - read
    if keep < 0:
        raise RuntimeError(
            f"{name}(): the next chunk has to leave out {-keep} frames, which no context can say; cut chunks so that "
            f"they end where a stride of {stride} does (x {list(x.shape)}, weight of {taps} frames)"
        )
    if keep <= frames:
        return x.narrow(2, frames - keep, keep)
    older = keep - frames
    if context is not None:
        return torch.cat((context.narrow(2, before - older, older), x), dim=2)
    size = (*x.shape[:2], older, *x.shape[3:])
    return torch.cat((x[:, :, :1].expand(size) if time_mode == "replicate" else x.new_zeros(size), x), dim=2)


refuse_script(causal_conv3d)


# ---------------------------------------------------------------------------------------------------------------------
# Plans from shapes alone


def plans(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    bias: bool = False,
    device: Device = config.DEVICES["H200"],
    context: int | None = None,
    **options: Any,
) -> dict[str, StreamingPlan | plan.Plan]:
    """The plans of a causal convolution and of its two gradients; needs no GPU.

        >>> shapes = (1, 384, 4, 60, 104), (384, 384, 3, 3, 3)
        >>> list(plans(*shapes, dtype=torch.bfloat16, channels_last=True, context=2, padding=1))
        ['forward', 'input gradient', 'weight gradient']

    `context` counts its frames; None is a beginning. `options` are those of `causal_conv3d` or, for a weight of three
    dimensions, of `causal_conv1d`, and a `residual` "before" or "after" the activation and a `scale` where there is one
    (True). With `channels_last` input, context and weight are laid out so.
    """

    def empty(*shape: int) -> Tensor:
        if not channels_last:
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.empty(shape[0], *shape[2:], shape[1], dtype=dtype, device="meta").movedim(-1, 1)

    x, weight = empty(*input_shape), empty(*weight_shape)
    before = None if context is None else empty(*input_shape[:2], context, *input_shape[3:])
    biases = torch.empty(weight_shape[0], dtype=dtype, device="meta") if bias else None
    split: Any = _video if len(weight_shape) == 5 else _sequence
    names = ("activation", "negative_slope", "residual", "scale")
    fusion = {name: options.pop(name) for name in names if name in options}
    _, tensors, params = split((x, weight, biases, before), **options)
    call, before = _of_shapes(tensors, params, fusion), tensors[3]
    y, plain = execute._empty_like_output(call), replace(call, epilogue=PLAIN, scale=None, residual=None)
    both = call.a if before is None else torch.cat((before, call.a), dim=2)
    weight_stride = tuple(derivatives.gradient_strides(call.b))
    gradients = {
        "input gradient": replace(plain, role=Role.DGRAD, a=y, bias=None),
        "weight gradient": replace(plain, role=Role.WGRAD, a=y, b=both, bias=None, weight_stride=weight_stride),
    }
    forward = streaming_plan.make(streaming_ops.problem_of(call, before, y, device))
    return {
        "forward": forward,
        **{name: plan.make(execute.problem_of(gradient, device)) for name, gradient in gradients.items()},
    }


def _of_shapes(tensors: tuple, params: tuple, fusion: dict[str, Any]) -> Call:
    """The call of tensors without memory; a residual and a scale are like those that one would give."""
    call = streaming_ops.call_of(*tensors, *params)
    activation, residual, scale = (fusion.get(name) or "" for name in ("activation", "residual", "scale"))
    slope = fusion.get("negative_slope", PLAIN.slope) if activation == "leaky_relu" else PLAIN.slope
    if not (activation or residual or scale):
        return call
    fused.check("plans", activation or None, slope, residual == "after")
    return replace(
        call,
        epilogue=Epilogue(activation, slope, residual, bool(scale)),
        residual=execute._empty_like_output(call) if residual else None,
        scale=torch.empty(call.geometry.K, dtype=call.a.dtype, device="meta") if scale else None,
    )
