"""Causal convolutions of video and audio in chunks: the frames before the first one are read from a second tensor.

    >>> import torch, triton_conv
    >>> video, filters = torch.randn(1, 8, 9, 6, 6), torch.randn(16, 8, 3, 3, 3)
    >>> first, context = triton_conv.causal_conv3d(video[:, :, :1], filters, padding=1, return_context=True)
    >>> rest = triton_conv.causal_conv3d(video[:, :, 1:], filters, padding=1, context=context)
    >>> torch.equal(torch.cat((first, rest), dim=2), triton_conv.causal_conv3d(video, filters, padding=1))
    True

The operator, as a profile names it, is `triton_conv::causal_conv`; its gradients are `triton_conv::conv_dgrad` and
`triton_conv::conv_wgrad`. A sequence is to it a video whose frames have one position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import config, execute, functional, invariance, ops, plan, reference, streaming_plan
from .config import Device
from .execute import Call
from .functional import Ints, Modes, Padding
from .geometry import Context, ConvGeometry, Role, output_extent
from .streaming_plan import Problem, StreamingPlan
from .unsupported import check_kind, refuse_script

__all__ = ["causal_conv3d"]

DTYPES = tuple(getattr(torch, name) for name in streaming_plan.DTYPES)
TIME_MODES = ("zeros", "replicate")

# padding is that of rows and columns, padding_mode one name for both or two joined by commas; the rest is of three axes
_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? context, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups, str padding_mode, str time_mode, str? precision) -> Tensor"
)
_lib = torch.library.Library("triton_conv", "FRAGMENT")
_lib.define("causal_conv" + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_lib.define(f"causal_conv.traced{_SCHEMA.replace('SymInt', 'int')}")
_op = torch.ops.triton_conv.causal_conv.default


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

    Gradients exist for x, context, weight and bias, of any order. Those of x and context are views of one tensor; for
    that of weight context and x are concatenated, and forward they never are.

    Raises what PyTorch raises for arguments of the wrong type, shape, dtype or device, before anything is launched;
    RuntimeError too where a stride reaches over frames that are not there yet and the next context is asked for.

    Method: implicit GEMM; pixels or whole taps choose between two base addresses (the cache of causal convolutions in
    video decoders such as Wan 2.1, 2025, without its concatenation); on a CPU, PyTorch's own convolution.
    """
    tensors = (x, weight, bias, context)
    if has_torch_function(tensors):
        return handle_torch_function(
            causal_conv3d,
            tensors,
            *tensors,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
            time_mode=time_mode,
            return_context=return_context,
            precision=precision,
        )
    how = _video(tensors, stride, padding, dilation, groups, padding_mode, time_mode, precision)
    return _convolved("causal_conv3d", *how, return_context)


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
    strides, dilations = functional._ints(name, "stride", stride, 3), functional._ints(name, "dilation", dilation, 3)
    spatial = weight[:, :, 0] if isinstance(padding, str) else weight
    pads = functional._padding(name, padding, 2, spatial, strides[1:], dilations[1:])
    modes = functional._modes(name, padding_mode, 2)
    params = (strides, pads, dilations, functional._index(name, "groups", groups), modes)
    return batched, tensors, (*params, _time_mode(name, time_mode), functional._precision(name, precision))


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
    (step,), (reach,) = functional._ints(name, "stride", stride, 1), functional._ints(name, "dilation", dilation, 1)
    params = ([step, 1, 1], [0] * 4, [reach, 1, 1], functional._index(name, "groups", groups), "zeros")
    x, weight, bias, context = tensors
    x, weight, context = (t if t is None else t[..., None, None] for t in (x, weight, context))
    how = (*params, _time_mode(name, time_mode), functional._precision(name, precision))
    return batched, (x, weight, bias, context), how


def _time_mode(name: str, time_mode: Any) -> str:
    if time_mode not in TIME_MODES:
        raise ValueError(f"{name}(): time_mode must be one of {TIME_MODES}, but got time_mode={time_mode!r}")
    return time_mode


def _convolved(name: str, batched: bool, tensors: tuple, params: tuple, return_context: Any) -> Any:
    x, weight, bias, context = tensors
    if not isinstance(return_context, bool):
        raise TypeError(f"{name}(): argument 'return_context' must be bool, not {type(return_context).__name__}")
    if not batched:
        x, context = x.unsqueeze(0), None if context is None else context.unsqueeze(0)
    op: Any = torch.ops.triton_conv.causal_conv.traced if torch.jit.is_tracing() else _op
    y = op(x, weight, bias, context, *params)
    y = y if batched else y.squeeze(0)
    if not return_context:
        return y
    stride, _, dilation, _, _, time_mode, _ = params
    following = _next_context(name, x, context, weight.shape[2], stride[0], dilation[0], time_mode)
    return y, following if batched else following.squeeze(0)


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


# ---------------------------------------------------------------------------------------------------------------------
# What the operator computes, by real and fake kernels


def _conv_params(
    weight: Tensor, context: Tensor | None, stride, padding, dilation, groups, padding_mode, time_mode, precision
) -> tuple:
    """Those of the same convolution of all frames in a row: `triton_conv::conv`'s."""
    first = dilation[0] * (weight.shape[2] - 1) if context is None else 0
    modes = padding_mode.split(",")
    modes = [time_mode if context is None else "zeros", *(modes if len(modes) == 2 else modes * 2)]
    return stride, [first, 0, *padding], dilation, groups, ",".join(modes), precision


def _call(x, weight, bias, context, *params) -> Call:
    """The convolution of all frames in a row, whose input is x alone; raises for what does not fit."""
    if x.dim() != 5 or weight.dim() != 5:
        raise RuntimeError(
            f"expected x and weight with five dimensions, but got x {list(x.shape)}, weight {list(weight.shape)}"
        )
    if context is not None:
        sizes = f"context {list(context.shape)}, x {list(x.shape)}"
        if (*context.shape[:2], *context.shape[3:]) != (*x.shape[:2], *x.shape[3:]):
            raise RuntimeError(f"expected context to have the shape of x but for its number of frames, but got {sizes}")
        if context.dtype != x.dtype:
            raise RuntimeError(f"expected context of {x.dtype}, but got {context.dtype} ({sizes})")
        ops._check_device("x", x, "context", context)
    if x.shape[2] < 1:
        raise RuntimeError(f"expected x to have a frame, but got x of size {list(x.shape)}")
    stride, padding, dilation, groups, modes, precision = _conv_params(weight, context, *params)
    frames = x.shape[2] + (0 if context is None else context.shape[2])
    geometry = ops._geometry(
        ConvGeometry.forward,
        (*x.shape[:2], frames, *x.shape[3:]),
        weight.shape,
        stride,
        ops._pairs(padding),
        dilation,
        groups,
        ops._modes(modes, weight.shape),
    )
    ops._check_operands(bias, geometry.K, precision, x=x, weight=weight)
    return Call(Role.FPROP, geometry, x, weight, bias, precision)


def _fake(*args) -> Tensor:
    return execute._empty_like_output(_call(*args))


def _run(x, weight, bias, context, *params) -> Tensor:
    call = _call(x, weight, bias, context, *params)
    output, device = execute._empty_like_output(call), execute.device_of(x.device)
    if output.numel() == 0:
        return output
    if x.numel() == 0 or weight.numel() == 0:
        return reference.add_bias(output.zero_(), bias)
    if device is None:
        return _by_frames(call, context, output)
    problem = problem_of(call, context, output, device)
    p = streaming_plan.make(problem)
    tensors = {"x": x, "w": weight, "y": output}
    if problem.context.held:  # where there is no context, it is x that repeats
        tensors["context"] = (x if context is None else context)[:, :, : problem.context.held]
    tensors |= {name: _channels_last(tensors[name]) for name in p.packs}
    if bias is not None:
        tensors["bias"] = bias.contiguous()
    with execute._on_device(x.device):
        for launch in p.direct:
            launch.run(tensors)
    return output


def problem_of(call: Call, context: Tensor | None, output: Tensor, device: Device) -> Problem:
    """The numbers a plan is made from."""
    x, weight, g = call.a, call.b, call.geometry
    before = Context(0, _strides(x))
    if context is not None and context.shape[2]:
        before = Context(context.shape[2], _strides(context))
    elif g.modes[0] == "replicate":
        first = g.padding[0][0]
        pads, modes = ((0, 0), *g.padding[1:]), ("zeros", *g.modes[1:])
        g = replace(g, input=(first + g.input[0], *g.input[1:]), padding=pads, modes=modes)
        before = Context(first, _strides(x[:, :, :1].expand(-1, -1, first, -1, -1)))
    operands = {"x": x, "context": context, "w": weight}
    there = {name: t for name, t in operands.items() if t is not None and t.device.type != "meta"}
    return Problem(
        g,
        before,
        str(x.dtype).removeprefix("torch."),
        (call.precision or execute.default_precision()) if x.dtype is torch.float32 else "ieee",
        _strides(x),
        weight.stride(),
        _strides(output),
        call.bias is not None,
        tuple(name for name, t in there.items() if t.data_ptr() % 16),
        device,
    )


def _strides(t: Tensor) -> tuple[int, ...]:
    """Those of axes with one row or column, which are whatever they are, as 0; for D 0 says that a frame repeats."""
    n, c, d, *rest = t.stride()
    d = d if d or t.shape[2] > 1 else 1
    return (n, c, d, *(0 if extent == 1 else s for s, extent in zip(rest, t.shape[3:], strict=True)))


def _channels_last(t: Tensor) -> Tensor:
    """A dense copy (N, D, H, W, C)."""
    return t.permute(0, 2, 3, 4, 1).clone(memory_format=torch.contiguous_format)


def _by_frames(call: Call, context: Tensor | None, output: Tensor) -> Tensor:
    """By plain torch, one output frame at a time: PyTorch's convolutions may do as they like with several."""
    x, weight, g = call.a, call.b, call.geometry
    if invariance.batch() is not None and g.N > 1:
        one = replace(g, N=1)
        contexts = [None] * g.N if context is None else context.split(1)
        for a, before, y in zip(x.split(1), contexts, output.split(1), strict=True):
            _by_frames(replace(call, geometry=one, a=a), before, y)
        return output
    taps, before = g.filter[0], 0 if context is None else context.shape[2]
    one = replace(
        g,
        input=(taps, *g.input[1:]),
        output=(1, *g.output[1:]),
        stride=(1, *g.stride[1:]),
        padding=((0, 0), *g.padding[1:]),
        dilation=(1, *g.dilation[1:]),
        modes=("zeros", *g.modes[1:]),
    )
    for z in range(g.output[0]):
        window = x.new_zeros(g.N, g.C, *one.input)
        for t in range(taps):
            frame = z * g.stride[0] - g.padding[0][0] + t * g.dilation[0]
            if context is not None and frame < before:
                window[:, :, t] = context[:, :, frame]
            elif frame >= 0 or g.modes[0] == "replicate":
                window[:, :, t] = x[:, :, max(frame - before, 0)]
        output[:, :, z : z + 1] = reference.fprop(window, weight, call.bias, one)
    return output


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives and transforms


class _Causal(ops._SingleLevelFunction):
    @staticmethod
    def forward(op, x, weight, bias, context, *params):
        return ops._below_autograd(op, x, weight, bias, context, *params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, weight, _, context, *ctx.params = inputs
        ctx.output_shape = output.shape
        ops._save(ctx, x, weight, context)

    @staticmethod
    def backward(ctx, dy):
        none = (None,) * len(ctx.params)
        if dy is None:
            return (None,) * 5 + none
        (x, weight, context), needs = ctx.saved_tensors, ctx.needs_input_grad
        how = _conv_params(weight, context, *ctx.params)
        frames = [0 if context is None else context.shape[2], x.shape[2]]
        dx = dweight = dcontext = None
        if needs[1] or needs[4]:
            size = [*x.shape[:2], sum(frames), *x.shape[3:]]
            dcontext, dx = ops.conv_dgrad(dy, weight, size, *how).split(frames, dim=2)
        if needs[2]:
            both = x if context is None else torch.cat((context, x), dim=2)
            dweight = ops.conv_wgrad(dy, both, weight.shape, ops._gradient_strides(weight), *how)
        dbias = ops._bias_gradient(dy) if needs[3] else None
        return None, dx if needs[1] else None, dweight, dbias, dcontext if needs[4] else None, *none

    @staticmethod
    def jvp(ctx, _, dx, dweight, dbias, dcontext, *unused):
        x, weight, context = ctx.saved_tensors
        parts = []
        if dx is not None or dcontext is not None:
            dx = torch.zeros_like(x) if dx is None else dx
            if context is not None and dcontext is None:
                dcontext = torch.zeros_like(context)
            parts.append(_op(dx, weight, None, dcontext, *ctx.params))
        if dweight is not None:
            parts.append(_op(x, dweight, None, context, *ctx.params))
        return ops._sum_of(parts, dbias, ctx.output_shape)


def _vmap(info, in_dims, x, weight, bias, context, *params):
    """A batch of x and context is more samples; of filters, that of the convolution of all frames in a row."""
    size, (x_dim, weight_dim, bias_dim, context_dim) = info.batch_size, in_dims[:4]
    if weight_dim is None and bias_dim is None:
        x = ops._folded(x, x_dim, size, 0)
        context = None if context is None else ops._folded(context, context_dim, size, 0)
        return ops._unfolded(_op(x, weight, bias, context, *params), size, 0), 0
    frames, dim = x, x_dim
    if context is not None:
        parts, dim = [context, x], None
        if x_dim is not None or context_dim is not None:
            parts, dim = [ops._front(context, context_dim, size), ops._front(x, x_dim, size)], 0
        frames = torch.cat(parts, dim=2 if dim is None else 3)
    how = _conv_params(weight if weight_dim is None else weight.select(weight_dim, 0), context, *params)
    rule = ops._activation_vmap(ops._fprop_op(how), 0)
    return rule(info, (dim, weight_dim, bias_dim), frames, weight, bias, *how)


_lib.impl("causal_conv", _run, "CPU")
_lib.impl("causal_conv", _run, "CUDA")
_lib.impl("causal_conv", ops._autograd_kernel(_op, _Causal), "Autograd")
_lib.impl("causal_conv.traced", _op, "CompositeImplicitAutograd")
torch.library.register_fake("triton_conv::causal_conv", _fake, lib=_lib)
torch.library.register_vmap("triton_conv::causal_conv", _vmap, lib=_lib)
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _lib.impl("causal_conv", ops._autocast_kernel(_op, _device), _key)

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
    dimensions, of `causal_conv1d`. With `channels_last` input, context and weight are laid out so.
    """

    def empty(*shape: int) -> Tensor:
        if not channels_last:
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.empty(shape[0], *shape[2:], shape[1], dtype=dtype, device="meta").movedim(-1, 1)

    x, weight = empty(*input_shape), empty(*weight_shape)
    before = None if context is None else empty(*input_shape[:2], context, *input_shape[3:])
    biases = torch.empty(weight_shape[0], dtype=dtype, device="meta") if bias else None
    arguments: Any = _video if len(weight_shape) == 5 else _sequence
    _, tensors, params = arguments((x, weight, biases, before), **options)
    call, before = _call(*tensors, *params), tensors[3]
    y = execute._empty_like_output(call)
    both = call.a if before is None else torch.cat((before, call.a), dim=2)
    weight_stride = tuple(ops._gradient_strides(call.b))
    gradients = {
        "input gradient": replace(call, role=Role.DGRAD, a=y, bias=None),
        "weight gradient": replace(call, role=Role.WGRAD, a=y, b=both, bias=None, weight_stride=weight_stride),
    }
    forward = streaming_plan.make(problem_of(call, before, y, device))
    return {
        "forward": forward,
        **{name: plan.make(execute.problem_of(gradient, device)) for name, gradient in gradients.items()},
    }
