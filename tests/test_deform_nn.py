"""Deformable modules, and plans of deformable convolutions."""

import copy
import doctest

import pytest
import torch
from deform_cases import SMALL, Operands, convolve, operands, watched
from tolerance import assert_close
from torch.nn import functional

import triton_conv
from triton_conv import deform, deform_conv2d, deform_nn, nn


def test_a_module_calls_the_function():
    x, offset, mask = torch.randn(2, 4, 6, 6), torch.randn(2, 36, 4, 3), torch.randn(2, 18, 4, 3)
    layer = nn.DeformConv2d(4, 6, 3, (1, 2), padding=(0, (1, 0)), groups=2)
    y = deform_conv2d(x, offset, layer.weight, layer.bias, (1, 2), (0, (1, 0)), mask=mask)
    assert torch.equal(layer(x, offset, mask), y)
    assert torch.equal(copy.deepcopy(layer)(x, offset, mask), y)
    other = nn.DeformConv2d(4, 6, 3, (1, 2), padding=(0, (1, 0)), groups=2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, offset, mask), y)
    assert (
        nn.DeformConv2d(4, 4, 3, padding="same", precision="ieee").extra_repr().endswith("padding=same, precision=ieee")
    )


@pytest.mark.parametrize(("modulation", "share"), [("sigmoid", 0.5), ("none", 1), (None, 1)])
def test_a_modulated_module_starts_as_a_convolution(modulation, share):
    layer = nn.ModulatedDeformConv2d(4, 6, 3, 2, 1, groups=2, offset_groups=2, modulation=modulation)
    x = torch.randn(2, 4, 6, 6)
    plain = functional.conv2d(x, share * layer.weight, layer.bias, 2, 1, groups=2)
    assert_close(layer(x), plain, 18)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (layer.weight, layer.bias, layer.conv_offset.weight))
    for part in layer.modules():  # as what fills a module made on the meta device does
        part.reset_parameters()
    assert_close(layer(x), functional.conv2d(x, share * layer.weight, layer.bias, 2, 1, groups=2), 18)


@pytest.mark.parametrize("modulation", ["sigmoid", "none", None])
def test_a_modulated_module_makes_its_own_offsets_and_mask(modulation):
    layer = nn.ModulatedDeformConv2d(4, 6, 3, padding=1, offset_groups=2, modulation=modulation)
    assert list(layer.state_dict()) == ["weight", "bias", "conv_offset.weight", "conv_offset.bias"]
    torch.nn.init.normal_(layer.conv_offset.weight)
    x = torch.randn(2, 4, 5, 5)
    found = functional.conv2d(x, layer.conv_offset.weight, layer.conv_offset.bias, padding=1)
    mask = {"sigmoid": found[:, 36:].sigmoid(), "none": found[:, 36:], None: None}[modulation]
    assert found.shape[1] == (36 if modulation is None else 54)
    assert_close(layer(x), deform_conv2d(x, found[:, :36], layer.weight, layer.bias, padding=1, mask=mask), 36)


def test_a_modulated_module_trains_under_autocast(kernels):
    layer = nn.ModulatedDeformConv2d(2, 2, 1, device=kernels)
    with torch.autocast(kernels, torch.bfloat16):
        y = layer(torch.randn(1, 2, 3, 3, device=kernels))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("cls", "wrong", "words"),
    [
        (nn.DeformConv2d, {"groups": 3}, "in_channels must be divisible by groups.*in_channels=4, groups=3"),
        (nn.DeformConv2d, {"groups": 4}, "out_channels must be divisible by groups.*out_channels=6, groups=4"),
        (nn.DeformConv2d, {"precision": "fast"}, "precision='fast'"),
        (nn.ModulatedDeformConv2d, {"modulation": "softmax"}, "modulation='softmax'"),
        (nn.ModulatedDeformConv2d, {"offset_groups": 3}, "in_channels=4, offset_groups=3"),
    ],
)
def test_constructors_refuse(cls, wrong, words):
    with pytest.raises(ValueError, match=words):
        cls(4, 6, 3, **wrong)


def test_plans_need_no_gpu():
    shapes = ((4, 64, 28, 28), (32, 64, 3, 3))
    plans = deform.plans(*shapes, dtype=torch.float16, padding=1, offset_groups=4, bias=True, channels_last=True)
    assert [p.role.value for p in plans.values()] == list(plans)
    assert all("offset groups 4, mask" in str(p) for p in plans.values())
    assert plans["forward"].asked.has_bias
    assert plans["forward"].asked.offset_dtype == "float16"
    fine = deform.plans(*shapes, dtype=torch.float16, padding=1, mask=False, offset_dtype=torch.float32)
    assert fine["forward"].asked.offset_dtype == "float32"
    assert not fine["forward"].asked.has_mask
    with pytest.raises(RuntimeError, match="3 offset groups"):
        deform.plans(*shapes, padding=1, offset_groups=3)


def test_copies_are_named():
    for channels_last in (False, True):
        how = {"dtype": torch.float16, "padding": 1, "channels_last": channels_last}
        p = deform.plans((8, 256, 56, 56), (256, 256, 3, 3), **how)["forward"]
        assert ("copy x to channels_last" in str(p)) is not channels_last
        assert p.workspace_bytes == (0 if channels_last else 2 * (8 * 256 * 56 * 56 + 256 * 256 * 9))


def test_plans_are_those_of_calls(kernels, monkeypatch):
    seen = watched(monkeypatch)
    case = SMALL._replace(offset_groups=2)
    given = Operands(*[t.requires_grad_() for t in operands(case, torch.float32, device=kernels)])
    y = convolve(case, given)
    y.backward(torch.ones_like(y))
    shown = deform.plans(
        case.x,
        tuple(given.weight.shape),
        device=seen[0].device,
        bias=True,
        offset_groups=2,
        padding=case.padding,
        mask=True,
    )
    assert {p.role: p.asked for p in seen} == {p.role: p.asked for p in shown.values()}


@pytest.mark.parametrize("module", [deform, deform_nn], ids=lambda m: m.__name__)
def test_the_examples_of_the_documentation(module):
    result = doctest.testmod(module, extraglobs={"torch": torch, "triton_conv": triton_conv, "plans": deform.plans})
    assert result.attempted > 5
    assert result.failed == 0
