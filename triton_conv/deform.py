"""Deformable convolution: each output pixel moves the taps of its filter, and may scale what they see.

>>> import torch, triton_conv
>>> x, weight = torch.randn(2, 8, 10, 10), torch.randn(4, 8, 3, 3)
>>> offset, mask = torch.randn(2, 18, 10, 10), torch.rand(2, 9, 10, 10)
>>> triton_conv.deform_conv2d(x, offset, weight, padding=1, mask=mask).shape
torch.Size([2, 4, 10, 10])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import arguments, config, deform_ops, deform_run, execute
from .arguments import Ints, Padding
from .deform_config import DeformRole
from .deform_plan import DeformPlan
from .devices import Device
from .unsupported import check_kind, refuse_script

__all__ = ["deform_conv2d"]

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = (1, 1),
    padding: Padding = (0, 0),
    dilation: Ints = (1, 1),
    mask: Tensor | None = None,
    *,
    precision: str | None = None,
) -> Tensor:
    """Deformable convolution, `torchvision.ops.deform_conv2d` in signature and values.

        >>> x, weight = torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.ones(1, 1, 1, 1)
        >>> half_a_pixel_right = torch.tensor([0.0, 0.5]).view(1, 2, 1, 1).expand(1, 2, 1, 3)
        >>> triton_conv.deform_conv2d(x, half_a_pixel_right, weight)
        tensor([[[[1.5000, 2.5000, 1.5000]]]])

    Shapes: input (N, C, H, W), weight (K, C / groups, R, S), bias (K), offset (N, 2 * G * R * S, P, Q), mask
    (N, G * R * S, P, Q); returns (N, K, P, Q). groups follow from the channels of weight, the offset groups G, each of
    which moves C / G channels alike, from those of offset. Channels of offset: for each offset group and each of its
    taps a (y, x) pair; of mask: one. stride, padding, dilation and precision are those of `triton_conv.conv2d`, padding
    in pairs and by name too.

    A tap's sample is the bilinear mean of the four pixels around it; pixels outside of the image are zeros. It is
    multiplied by mask, which may be any number: in [0, 1] in DCN v2, whatever a convolution gave, without a sigmoid or
    softmax, in DCN v4. Without mask it is DCN v1. A sample at infinity is 0, at NaN NaN.

    Dtypes: input, weight and bias float16, bfloat16, float32 or float64; offset and mask that one, or both float32,
    which keeps fractions of a pixel that 16 bits lose. Positions, samples and sums are float32, in float64 float64;
    kernels round a sample to the input's dtype before they multiply it with the filter. Autocast casts input, weight
    and bias, and leaves offset and mask as they are. Gradients exist for every argument, the same bits on every run;
    where an offset is a whole number its derivative is the one to the right.

    Raises what PyTorch raises for arguments of the wrong type, shape, dtype or device, before anything is launched.

    Method: Dai et al. 2017 (arXiv:1703.06211), Zhu et al. 2018 (arXiv:1811.11168), Xiong et al. 2024
    (arXiv:2401.06197). Samples go from the image to the product with the filters without a buffer of columns between;
    on a CPU plain torch goes tap by tap.
    """
    tensors = (input, offset, weight, bias, mask)
    if has_torch_function(tensors):
        return handle_torch_function(
            deform_conv2d,
            tensors,
            *(input, offset, weight, bias, stride, padding, dilation),
            mask=mask,
            precision=precision,
        )
    name = "deform_conv2d"
    for argument, t in {"offset": offset, "mask": mask}.items():
        if t is not None or argument == "offset":
            check_kind(name, argument, t)
    if not arguments.check_tensors(name, 2, DTYPES, input=input, weight=weight, bias=bias):
        raise RuntimeError(f"{name}(): expected a batched input (N, C, H, W), but got input {list(input.shape)}")
    params = _parameters(name, weight, stride, padding, dilation, precision)
    op: Any = deform_ops.traced if torch.jit.is_tracing() else deform_ops.deform_conv
    return op(input, offset, weight, mask, bias, *params)


def plans(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    bias: bool = False,
    device: Device = config.DEVICES["H200"],
    offset_groups: int = 1,
    mask: bool = True,
    offset_dtype: torch.dtype | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    precision: str | None = None,
) -> dict[str, DeformPlan]:
    """The plans of a deformable convolution and of its gradients, from shapes alone; needs no GPU.

        >>> list(plans((8, 64, 56, 56), (64, 64, 3, 3), padding=1, dtype=torch.bfloat16))
        ['forward', 'input gradient', 'offset and mask gradient', 'weight gradient']

    mask says whether there is one. offset and mask have `offset_dtype`, where it is None the input's. `channels_last`
    lays out everything so. The other arguments, and errors, are those of `deform_conv2d`.
    """

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)

    x, weight = tensor(*input_shape), tensor(*weight_shape)
    params = _parameters("plans", weight, stride, padding, dilation, precision)
    call = deform_ops.undeformed(x, weight, None, *params)
    (_, P, Q), pairs = call.geometry.output, offset_groups * call.geometry.taps
    offset = tensor(x.shape[0], 2 * pairs, P, Q, dtype=offset_dtype or dtype)
    scales = tensor(x.shape[0], pairs, P, Q, dtype=offset.dtype) if mask else None
    deform_ops._checked(x, offset, weight, scales, None, *params)
    y = execute._empty_like_output(call)
    how = (x, weight, y, offset, scales, call.geometry, offset_groups, call.precision, device)
    return {r.value: deform_run.plan(r, *how, bias and r is DeformRole.FORWARD) for r in DeformRole}


def _parameters(name: str, weight: Tensor, stride: Any, padding: Any, dilation: Any, precision: Any) -> tuple:
    """As operators take them."""
    stride, dilation = arguments.ints_of(name, "stride", stride, 2), arguments.ints_of(name, "dilation", dilation, 2)
    padding = arguments.padding_of(name, padding, 2, weight, stride, dilation)
    return stride, padding, dilation, arguments.precision_of(name, precision)


refuse_script(deform_conv2d)
