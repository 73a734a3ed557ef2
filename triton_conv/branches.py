"""Several convolutions over one input, side by side in the output or summed, in one launch.

    >>> import torch, triton_conv
    >>> from triton_conv import Branch
    >>> x, one, three = torch.randn(1, 8, 16, 16), torch.randn(4, 8, 1, 1), torch.randn(6, 8, 3, 3)
    >>> triton_conv.multi_conv2d(x, [Branch(one), Branch(three, padding=6, dilation=6)]).shape
    torch.Size([1, 10, 16, 16])

That is DeepLab's atrous pyramid (Chen et al. 2017); slices of the input's channels make it an Inception block (Szegedy
et al. 2014) or MixConv (Tan and Le 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import arguments, branches_ops, branches_run, config, conv_calls, execute, fast, functional, plan
from .arguments import Ints, Padding
from .branches_ops import COMBINE, Params
from .branches_plan import BranchesPlan, worth_it
from .branches_plan import make as _make
from .devices import Device
from .geometry import Role
from .unsupported import check_kind, refuse_script

__all__ = ["Branch", "multi_conv2d", "plans"]


class Branch(NamedTuple):
    """One convolution of several: the arguments of `triton_conv.conv2d`, and the channels it reads.

        >>> weight = torch.randn(6, 4, 5, 5)
        >>> Branch(weight, padding="same", channels=(8, 4)).channels
        (8, 4)

    Shapes: weight (K, count / groups, R, S), bias (K) or None; stride, padding (an int, one for each axis, (lower,
    upper) pairs, "same" or "valid"), dilation and groups as there. `channels` are (first, count) of the input's
    channels; None are all. Zeros lie outside of the input. Nothing is checked before it is used: see `multi_conv2d` for
    dtypes and errors.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: Ints = 1
    padding: Padding = 0
    dilation: Ints = 1
    groups: int = 1
    channels: tuple[int, int] | None = None


def multi_conv2d(
    input: Tensor,
    branches: Sequence[Branch],
    *,
    combine: str = "concatenate",
    precision: str | None = None,
    one_launch: bool | None = None,
) -> Tensor:
    """Convolutions of one input with several filters, side by side in the output's channels or summed.

        >>> x, three, five = torch.randn(2, 12, 9, 9), torch.randn(6, 8, 3, 3), torch.randn(2, 4, 5, 5)
        >>> reads = [Branch(three, padding=1, channels=(0, 8)), Branch(five, padding=2, channels=(8, 4))]
        >>> triton_conv.multi_conv2d(x, reads).shape
        torch.Size([2, 8, 9, 9])

    Shapes: input (N, C, H, W) or (C, H, W); each branch's weight (K_i, C_i / groups_i, R_i, S_i), with C_i the channels
    it reads. Returns (N, K_0 + K_1 + ..., P, Q) for combine="concatenate", in the branches' order, and (N, K, P, Q) for
    combine="sum"; unbatched without N. Channels-last where the input or a weight is.

    Dtypes: those of `conv2d`, one for all operands. All gradients exist, of any order: that of the input is one
    launch too where branches read the same channels or none in common, and else, as with branches of different stride,
    a sum rounded after each; those of weights are one launch or more for each branch. It works under autocast,
    `torch.compile` and `torch.func`.

    one_launch: True computes all branches in one kernel, False each in its own, None what is predicted to be quicker;
    more than eight branches side by side are several launches. A sum is rounded once in one launch, and after each
    branch otherwise. Taps that meet only the zeros around the input from anywhere in a tile are left out of one launch:
    an infinite or NaN weight there makes no NaN. On a CPU it makes no difference.

    Raises RuntimeError, naming shapes, for branches whose output extents differ (for a sum, or channels), channels
    that the input has not, no branches, everything that `conv2d` raises for, and with one_launch=True for what one
    launch cannot do: other dtypes than floats, nothing but groups whose channels in times channels out are eight or
    fewer, as depthwise ones are, sums of branches with different groups or of more than eight; TypeError for a branch
    that is no Branch; ValueError for another `combine`.
    """
    name = "multi_conv2d"
    if not isinstance(branches, Sequence) or not all(isinstance(b, Branch) for b in branches):
        kinds = [type(b).__name__ for b in branches] if isinstance(branches, Sequence) else type(branches).__name__
        raise TypeError(f"{name}(): argument 'branches' must be a sequence of Branch, not {kinds}")
    tensors = (input, *(b.weight for b in branches), *(b.bias for b in branches))
    if has_torch_function(tensors):
        keywords: dict[str, Any] = {"combine": combine, "precision": precision, "one_launch": one_launch}
        return handle_torch_function(multi_conv2d, tensors, input, branches, **keywords)
    if one_launch is not None and not isinstance(one_launch, bool):
        raise TypeError(f"{name}(): argument 'one_launch' must be bool or None, not {type(one_launch).__name__}")
    if not isinstance(combine, str):
        raise TypeError(f"{name}(): argument 'combine' must be str, not {type(combine).__name__}")
    if combine not in COMBINE:
        raise ValueError(f"{name}(): combine must be one of {COMBINE}, but got combine={combine!r}")
    if not branches:
        check_kind(name, "input", input)
        raise RuntimeError(f"{name}(): expected at least one branch, but got none (input {list(input.shape)})")
    batched = True
    for b in branches:
        operands: dict[str, Any] = {"weight": b.weight, "bias": b.bias}
        batched = arguments.check_tensors(name, 2, arguments.DTYPES, input=input, **operands)
    x = input if batched else input.unsqueeze(0)
    params = _params(name, x.shape[1], branches, combine, arguments.precision_of(name, precision), one_launch)
    weights, biases = [b.weight for b in branches], [b.bias for b in branches]
    if torch.jit.is_tracing():  # it cannot record lists of biases that may be None
        y = branches_ops.composed(x, weights, biases, params)
    else:
        y = branches_ops.multi_conv(x, weights, biases, *params)
    return y if batched else y.squeeze(0)


# The parameters of calls that were found right, by how they were spelled and the filters' shapes.
_known = fast.Remembered()


def _params(name: str, C: int, branches: Sequence[Branch], combine, precision, one_launch) -> Params:
    """The operator's parameters."""
    given, shapes = tuple(b[2:] for b in branches), tuple(tuple(b.weight.shape) for b in branches)
    exact = not torch.compiler.is_compiling() and functional._exact((C, given, shapes))  # symbols have no hash
    key = (C, given, shapes, combine, precision, one_launch) if exact else None
    found = _known.get(key) if key else None
    if found is None:
        found = _parsed(name, C, branches, combine, precision, one_launch)
        if key:
            _known.remember(key, found)
    return found


def _parsed(name: str, C: int, branches: Sequence[Branch], combine, precision, one_launch) -> Params:
    flat: dict[str, list] = {"stride": [], "padding": [], "dilation": [], "groups": [], "channels": []}
    for b in branches:
        how = arguments.forward_parameters(name, 2, b.weight, b.stride, b.padding, b.dilation, b.groups, "zeros")
        stride, padding, dilation, groups, _ = how
        channels = (0, C) if b.channels is None else b.channels
        if not isinstance(channels, Sequence) or len(channels) != 2:
            wrong = RuntimeError if isinstance(channels, Sequence) else TypeError
            raise wrong(f"{name}(): expected channels to be (first, count), but got channels={b.channels}")
        flat["stride"] += stride
        flat["padding"] += padding
        flat["dilation"] += dilation
        flat["groups"].append(groups)
        flat["channels"] += [arguments.index_of(name, "channels", c) for c in channels]
    return Params(**flat, combine=combine, precision=precision, one_launch=one_launch)


def plans(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    bias: bool = False,
    device: Device = config.DEVICES["H200"],
    branches: Sequence[tuple[Sequence[int], Mapping[str, Any]]] = (),
    combine: str = "concatenate",
    precision: str | None = None,
    one_launch: bool | None = None,
) -> dict[str, BranchesPlan | plan.Plan]:
    """The plans of `multi_conv2d` and of its gradients; needs no GPU.

        >>> pyramid = (((8, 16, 1, 1), {}), ((8, 16, 3, 3), {"padding": 6, "dilation": 6}))
        >>> list(plans((2, 16, 33, 33), (8, 16, 1, 1), branches=pyramid))
        ['forward', 'input gradient', 'weight gradient of branch 0', 'weight gradient of branch 1']

    `branches` are the weight's shape of each and its arguments as in `Branch`, `weight_shape` is the first's.
    Forward and input gradient are plans of one launch; where that is impossible, or is said to take longer and
    `one_launch` is not True, there is a plan for each branch. Raises what `multi_conv2d` raises for such operands.
    """
    given = branches or ((weight_shape, {}),)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def empty(shape: Sequence[int]) -> Tensor:
        return torch.empty(list(shape), dtype=dtype, device="meta")

    made = [
        Branch(empty(shape).contiguous(memory_format=layout), empty(shape[:1]) if bias else None, **dict(how))
        for shape, how in given
    ]
    x = empty(input_shape).contiguous(memory_format=layout)
    params = _params("multi_conv2d", x.shape[1], made, combine, precision, None)
    weights = [b.weight for b in made]
    forward = branches_ops._forward(x, weights, [b.bias for b in made], params)
    y = branches_run.empty_output(forward)
    found = _of(forward, y, device, one_launch)
    if dtype.is_floating_point:
        found |= _of(branches_ops._backward(y, weights, x.shape, params), x, device, one_launch)
        slices = params.written(weights)
        for i, w in enumerate(weights):
            operands = (branches_ops._slice(y, slices[i]), branches_ops._slice(x, params.read(i)))
            call = conv_calls.conv_wgrad_call(*operands, w.shape, w.stride(), *params.of(i))
            found[f"weight gradient of branch {i}"] = plan.make(execute.problem_of(call, device))
    return found


def _of(
    calls: branches_run.Calls, output: Tensor, device: Device, one_launch: bool | None
) -> dict[str, BranchesPlan | plan.Plan]:
    title = "forward" if calls.role is Role.FPROP else "input gradient"
    problems = branches_run.problems(calls, output, device)
    launches = [] if isinstance(problems, str) else [_make(problem) for problem in problems]
    if launches and (one_launch or all(worth_it(p.asked) for p in launches)):
        names = [title] if len(launches) == 1 else [f"{title}, launch {i}" for i in range(len(launches))]
        return dict(zip(names, launches, strict=True))
    why = f"one launch cannot: {problems}" if isinstance(problems, str) else f"one launch: {launches[0].comparison}"
    each = [plan.make(execute.problem_of(call, device)) for call in calls.each]
    return {f"{title} of branch {i}": replace(p, reason=f"{p.reason}; {why}") for i, p in enumerate(each)}


refuse_script(multi_conv2d)
