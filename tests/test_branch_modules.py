"""Modules of parallel convolutions as torch.nn's are used: compiled, transformed, traced, in any layout and dtype."""

import copy

import pytest
import torch

import triton_conv
from triton_conv import Branch
from triton_conv.nn import ASPP, InceptionBranches, SelectiveKernel

MODULES = {
    "ASPP": (ASPP, (4, 6, (1, 2))),
    "InceptionBranches": (InceptionBranches, (4, 2, 3, 4, 2, 3, 2)),
    "SelectiveKernel": (SelectiveKernel, (4, 2, 2)),
}


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    cls, args = MODULES[request.param]
    return cls(*args, dtype=torch.float64).eval()


def test_without_gradients_they_compile_and_transform(module):
    x, tangent = torch.randn(3, 2, 4, 6, 6, dtype=torch.float64), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([module(each) for each in x])
        assert torch.allclose(torch.func.vmap(module)(x), expected)
        y, _ = torch.func.jvp(module, (x[0],), (tangent,))
        assert torch.allclose(y, expected[0])
        compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="eager")
        assert torch.allclose(compiled(x[0]), expected[0])


def test_traces_are_recorded(module):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    traced = torch.jit.trace(module, (x,))
    assert torch.allclose(traced(x), module(x))


def test_layout_and_dtype_go_through(module):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    there = copy.deepcopy(module).to(memory_format=torch.channels_last)
    y = there(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()
    assert torch.allclose(y, module(x))
    cls, args = next(kind for kind in MODULES.values() if kind[0] is type(module))
    made = cls(*args, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("channels", "kind", "words"),
    [(4, TypeError, "channels=4"), ((0, 4, 1), RuntimeError, "first, count"), ((2, 4), RuntimeError, "from 2 on")],
)
def test_wrong_channels(channels, kind, words):
    with pytest.raises(kind, match=words):
        triton_conv.multi_conv2d(torch.randn(1, 4, 5, 5), [Branch(torch.randn(2, 4, 1, 1), channels=channels)])


def test_no_branches_of_no_tensor():
    with pytest.raises(TypeError, match="'input' must be Tensor, not list"):
        triton_conv.multi_conv2d([1.0], [])
