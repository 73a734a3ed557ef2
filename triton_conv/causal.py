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

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .arguments import Ints
from .causal_ops import forward_op, update_op
from .streaming import dense_causal_conv1d
from .unsupported import check_kind, refuse_script

__all__ = ["causal_conv1d", "causal_conv1d_update"]

ACTIVATIONS = (None, "silu", "swish")
_DENSE = {"stride": 1, "dilation": 1, "groups": 1, "time_mode": "zeros", "precision": None}


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
    y, final_state = forward_op(x, weight, bias, initial_state, silu, return_final_state)
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
        return update_op(x.unsqueeze(2), state, weight, bias, silu).squeeze(2)
    return update_op(x, state, weight, bias, silu)


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


refuse_script(causal_conv1d, causal_conv1d_update)
