"""Convolutions that between them have every parameter, and what calls operators they make."""

from functools import partial

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import triton_conv

# (name in triton_conv and torch.nn.functional, input, weight, parameters); those with pairs or modes are ours alone
CASES = {
    "conv1d": ("conv1d", (2, 3, 8), (4, 3, 3), {"padding": 1}),
    "conv1d causal": ("conv1d", (2, 3, 8), (4, 3, 3), {"padding": ((2, 0),)}),
    "conv1d groups": ("conv1d", (2, 4, 8), (4, 2, 3), {"groups": 2, "stride": 2}),
    "conv2d": ("conv2d", (2, 3, 5, 6), (4, 3, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    "conv2d 1x1": ("conv2d", (2, 3, 4, 4), (4, 3, 1, 1), {}),
    "conv2d 1x1 strided": ("conv2d", (2, 3, 5, 4), (4, 3, 1, 1), {"stride": 2}),
    "conv2d dilated": ("conv2d", (2, 4, 7, 7), (4, 2, 2, 3), {"dilation": (3, 2), "padding": 2, "groups": 2}),
    "conv2d depthwise": ("conv2d", (2, 4, 5, 5), (8, 1, 3, 3), {"groups": 4, "padding": "same"}),
    "conv2d asymmetric": ("conv2d", (2, 3, 5, 6), (2, 3, 3, 3), {"padding": ((0, 2), (1, 0)), "stride": 2}),
    "conv2d circular": ("conv2d", (2, 3, 4, 4), (2, 3, 3, 3), {"padding": 1, "padding_mode": "circular"}),
    "conv2d mixed": (
        "conv2d",
        (2, 2, 4, 5),
        (2, 2, 3, 3),
        {"padding": ((1, 2), 1), "padding_mode": ("reflect", "zeros"), "dilation": (1, 2)},
    ),
    "conv3d": ("conv3d", (1, 2, 3, 4, 4), (2, 2, 2, 3, 1), {"stride": (1, 2, 1), "padding": (1, 1, 0)}),
    "conv3d causal": (
        "conv3d",
        (1, 2, 3, 3, 3),
        (2, 1, 2, 2, 2),
        {"padding": ((1, 0), (0, 1), 1), "padding_mode": ("replicate", "zeros", "circular"), "groups": 2},
    ),
    "conv_transpose1d": ("conv_transpose1d", (2, 3, 4), (3, 2, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "conv_transpose2d": ("conv_transpose2d", (2, 4, 3, 4), (4, 2, 3, 2), {"stride": (2, 3), "groups": 2}),
    "conv_transpose2d output_padding above stride": (
        "conv_transpose2d",
        (2, 2, 3, 3),
        (2, 2, 2, 3),
        {"stride": (1, 2), "dilation": (3, 4), "padding": (1, 2), "output_padding": (2, 3)},
    ),
    "conv_transpose2d circular": (
        "conv_transpose2d",
        (2, 2, 3, 3),
        (2, 3, 3, 3),
        {"stride": 2, "padding": ((1, 0), 1), "padding_mode": "circular"},
    ),
    "conv_transpose3d": (
        "conv_transpose3d",
        (1, 2, 2, 3, 2),
        (2, 1, 2, 1, 3),
        {"stride": (1, 2, 2), "groups": 2, "output_padding": (0, 1, 0)},
    ),
}
OURS_ALONE = {"conv1d causal", "conv2d asymmetric", "conv2d circular", "conv2d mixed", "conv3d causal"}
OURS_ALONE |= {"conv_transpose2d circular"}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
shared_cases = pytest.mark.parametrize("case", [CASES[k] for k in CASES if k not in OURS_ALONE])


def build(case, dtype=torch.float64, bias=True, requires_grad=True):
    """(function of input, weight and bias, the three tensors)."""
    name, x, w, kwargs = case
    torch.manual_seed(0)
    channels = w[1] * kwargs.get("groups", 1) if "transpose" in name else w[0]
    shapes = (x, w, (channels,)) if bias else (x, w)
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]
    return partial(getattr(triton_conv, name), **kwargs), tensors


def theirs(case):
    return partial(getattr(functional, case[0]), **case[3])


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "triton_conv":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


def recorded(case, dtype=torch.float64):
    """Every call of our operators in forward and backward, with its arguments."""
    with Recorder() as recorder:
        f, tensors = build(case, dtype)
        f(*tensors).sum().backward()
    return recorder.calls
