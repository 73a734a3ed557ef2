"""PyTorch's own sample inputs of its six convolutions, forward and gradients, against PyTorch in double precision.

In a process started with TRITON_INTERPRET=1 the same tests run the Triton kernels on the CPU; the last test starts one.
"""

import os
import subprocess
import sys

import pytest
import torch
from tolerance import assert_close
from torch.testing._internal.common_methods_invocations import op_db

import triton_conv

OPS = {op.name.removeprefix("nn.functional."): op for op in op_db if op.name.startswith("nn.functional.conv")}
FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
DTYPES = [*FLOATING, torch.int64]


def dtypes(of):
    return pytest.mark.parametrize("dtype", of, ids=lambda dtype: str(dtype).removeprefix("torch."))


def samples(name, dtype, requires_grad=False):
    """(input, weight, bias) and the parameters of every sample; the seed makes them the same in every process."""
    torch.manual_seed(0)
    for sample in OPS[name].sample_inputs("cpu", dtype, requires_grad):
        weight, *bias = sample.args
        yield (sample.input, weight, *bias), sample.kwargs


def call(module, name, tensors, kwargs):
    """float32 is multiplied as float32, so that its own eps is the measure."""
    precision = {"precision": "ieee"} if module is triton_conv else {}
    return getattr(module, name)(*tensors, **kwargs, **precision)


def in_double(t):
    if t is None or not (t.is_floating_point() or t.is_complex()):
        return t
    return t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_(t.requires_grad)


def depths(name, x, w, y, groups):
    """How many products an element of the output, and of the gradients of input, weight and bias, is a sum of."""
    taps, rank = w[0, 0].numel(), w.dim() - 2
    forward, backward = w.shape[1] * taps, w.shape[0] // groups * taps
    pixels = y.numel() // y.shape[-rank - 1]
    if "transpose" not in name:
        return forward, backward, pixels, pixels
    return backward, forward, x.numel() // x.shape[-rank - 1], pixels


def test_pytorch_has_samples_of_all_six_convolutions_in_all_dtypes():
    assert sorted(OPS) == sorted(f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3))
    assert all(set(DTYPES) <= set(op.dtypes) for op in OPS.values())
    assert all(len(list(samples(name, torch.float32))) >= 10 for name in OPS)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@dtypes(DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_outputs_are_those_of_pytorch(name, dtype):
    for tensors, kwargs in samples(name, dtype):
        y = call(triton_conv, name, tensors, kwargs)
        expected = call(torch.nn.functional, name, [in_double(t) for t in tensors], kwargs)
        assert y.dtype == dtype
        assert_close(y, expected, depths(name, *tensors[:2], y, kwargs.get("groups", 1))[0])


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@dtypes(FLOATING)
@pytest.mark.parametrize("name", OPS)
def test_gradients_are_those_of_pytorch(name, dtype):
    for tensors, kwargs in samples(name, dtype, requires_grad=True):
        y = call(triton_conv, name, tensors, kwargs)
        doubles = [in_double(t) for t in tensors]
        z = call(torch.nn.functional, name, doubles, kwargs)
        dy = torch.randn_like(y)
        gradients = torch.autograd.grad(y, [t for t in tensors if t is not None], dy)
        expected = torch.autograd.grad(z, [t for t in doubles if t is not None], in_double(dy))
        below = depths(name, *tensors[:2], y, kwargs.get("groups", 1))[1:]
        for gradient, wanted, depth in zip(gradients, expected, below, strict=False):
            assert gradient.dtype == dtype
            assert_close(gradient, wanted, depth)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process already runs the kernels")
def test_the_kernels_agree_too():
    """In float32 all samples, in the other types those of one dimension: the interpreter takes its time."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    some = "float32 or conv1d or conv_transpose1d"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", some, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
