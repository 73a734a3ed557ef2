"""Fused convolutions by the kernels: values and gradients against the composition in float64."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from halves import half_of
from tolerance import assert_close

import triton_conv
from triton_conv import activation_plan, fast, reference
from triton_conv.activation import backward, tells_gradient
from triton_conv.devices import H200
from triton_conv.epilogue import ACTIVATIONS

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def gelu_tanh_slope(z):
    """As PyTorch's formula has it, without its 1 - tanh^2, which cancels."""
    u = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    return torch.sigmoid(2 * u) + 0.5 * z * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2) / torch.cosh(u) ** 2


def test_the_slope_of_gelu_tanh_is_that_of_pytorch():
    z = torch.linspace(-8, 8, 1100, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(reference.activated(z, "gelu_tanh", 0.0).sum(), z)
    torch.testing.assert_close(gelu_tanh_slope(z), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_activations(activation, dtype, kernels, poisoned, launched):
    z = torch.linspace(-8, 8, 1100, dtype=torch.float64).to(dtype).to(kernels)
    z[:4] = torch.tensor([0.0, 6.0, 200.0, -200.0])
    dy = torch.randn(1100, generator=torch.Generator().manual_seed(3)).to(dtype).to(kernels)
    for of_output in {False, tells_gradient(activation, 0.2)}:
        saved = reference.activated(z, activation, 0.2) if of_output else z
        leaf = z.to(torch.float64, copy=True).requires_grad_()
        wide = saved.double() if of_output and activation == "sigmoid" else None
        (wanted,) = torch.autograd.grad(reference.activated(leaf, activation, 0.2), leaf, dy.double())
        wanted = wanted if wide is None else dy.double() * wide * (1 - wide)  # of what was rounded
        wanted = dy.double() * gelu_tanh_slope(z.double()) if activation == "gelu_tanh" else wanted
        smooth = (z != 0) & (z != 6) & (z.abs() != 3)
        assert_close(backward(dy, saved, activation, 0.2, of_output)[smooth], wanted[smooth], 10)
    assert set(launched) == {"activation_backward"}


def test_gradients_of_activations_in_any_layout(kernels, poisoned, launched):
    saved = torch.randn(2, 5, 3, 4, device=kernels).to(memory_format=torch.channels_last)
    dy = torch.randn(2, 5, 3, 4, device=kernels)
    for given, kept in ((dy, saved), (dy[:, :, :1].expand_as(dy), saved), (dy, saved[:, ::2]), (dy, dy)):
        g = given[:, : kept.shape[1]]
        dz = backward(g, kept, "silu", 0.01, False)
        assert dz.stride() == torch.empty_like(kept).stride()
        assert_close(dz, reference_gradient(g, kept), 1)
    assert len(launched) == 4


def reference_gradient(g, z):
    leaf = z.detach().double().requires_grad_()
    return torch.autograd.grad(torch.nn.functional.silu(leaf), leaf, g.double())[0]


# rank, transposed, channels-last, options, activation, place, scale's dtype
LAYERS = [
    (2, False, True, {"padding": 1}, "relu", "before", torch.float32),
    (2, False, False, {"stride": 2, "padding": 1, "groups": 2}, "silu", "after", None),
    (2, True, True, {"stride": 2}, "gelu", "before", torch.float32),
    (1, False, False, {"padding": ((2, 0),), "padding_mode": "replicate"}, "hardswish", "", "own"),
    (1, True, False, {"groups": 2}, "leaky_relu", "after", "own"),
    (3, False, False, {"groups": 2}, "sigmoid", "before", None),
    (2, False, True, {"groups": 4, "padding": 1}, "gelu_tanh", "after", "own"),
    (2, False, False, {"dilation": 2, "padding": 2}, "relu6", "", torch.float32),
    (1, False, False, {}, None, "before", torch.float32),
]


@pytest.mark.parametrize(("layer", "dtype"), half_of(LAYERS, FLOATS[:3]))
def test_values_and_gradients(layer, dtype, kernels, poisoned, launched):
    rank, transposed, channels_last, options, activation, place, scale_dtype = layer
    groups = options.get("groups", 1)
    channels = 4
    w = torch.randn(channels, 4 // groups, *(2,) * rank)
    x = torch.randn(2, channels, *(4, 3, 2)[3 - rank :])
    function = getattr(triton_conv, f"conv{'_transpose' if transposed else ''}{rank}d")
    bias = torch.randn(4)
    plain = function(x.double(), w.double(), bias.double(), **options)  # on the CPU, in plain torch
    residual = torch.randn(plain.shape) if place else None
    scale = None if scale_dtype is None else torch.rand(4) + 0.5
    tensors = [None if t is None else t.to(dtype).to(kernels) for t in (x, w, bias, residual)]
    if channels_last and rank == 2:
        tensors[:2] = [t.to(memory_format=torch.channels_last) for t in tensors[:2]]
    tensors.append(None if scale is None else scale.to(dtype if scale_dtype == "own" else scale_dtype).to(kernels))
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    x, w, bias, residual, scale = tensors
    how = {"activation": activation, "negative_slope": 0.2, "residual_after_activation": place == "after"}
    launched.clear()
    y = function(x, w, bias, residual=residual, scale=scale, **how, **options)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [t for t in tensors if t is not None], dy)
    assert ("activation_backward" in launched) is (activation is not None)

    wide = [None if t is None else t.detach().double().cpu().requires_grad_() for t in tensors]
    wanted = composed(rank, transposed, *wide, activation, place, options)
    assert_close(y.cpu(), wanted, 16)
    gradients = torch.autograd.grad(wanted, [t for t in wide if t is not None], dy.double().cpu())
    for a, b in zip(found, gradients, strict=True):
        assert_close(a.cpu().to(dtype), b, 64)  # that of a float32 scale is a sum of what was rounded to dtype too


def composed(rank, transposed, x, w, bias, residual, scale, activation, place, options):
    how = dict(options)
    mode = how.pop("padding_mode", None)
    if mode:
        x = torch.nn.functional.pad(x, how.pop("padding")[0], mode=mode)
    z = getattr(torch.nn.functional, f"conv{'_transpose' if transposed else ''}{rank}d")(x, w, **how)
    ones = (1,) * rank
    z = (z if scale is None else z * scale.view(-1, *ones)) + bias.view(-1, *ones)
    y = reference.activated(z + residual if place == "before" else z, activation or "", 0.2)
    return y + residual if place == "after" else y


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("strided", [False, True])
def test_the_second_call_goes_the_short_way_to_the_same_values(strided, place, kernels, poisoned, monkeypatch):
    made, call = [], fast.FusedBound.__call__
    monkeypatch.setattr(fast.FusedBound, "__call__", lambda self, *args: (made.append(self), call(self, *args))[1])
    fast.forget()
    w, scale = torch.randn(4, 4, 2, device=kernels), torch.rand(4, device=kernels)
    found, before = [], torch.randn(2, 4, 3, device=kernels)
    for number in range(2):
        x = (torch.full((2, 4, 4), number + 1.0, device=kernels)).requires_grad_()
        residual = (before + number).transpose(1, 2).contiguous().transpose(1, 2) if strided else before + number
        residual.requires_grad_()
        how = {"activation": "silu", "residual": residual, "residual_after_activation": place == "after"}
        y = triton_conv.conv1d(x, w, scale=scale, **how)
        expected = composed(1, False, x, w, torch.zeros(4, device=kernels), residual, scale, "silu", place, {})
        assert_close(y, expected, 8)
        dy = torch.randn_like(y)
        for a, b in zip(*(torch.autograd.grad(t, (x, residual), dy) for t in (y, expected)), strict=True):
            assert_close(a, b, 8)
        with torch.no_grad():
            assert torch.equal(triton_conv.conv1d(x, w, scale=scale, **how), y)
        found.append(len(made))
    assert found == [0, 2]


def test_the_second_call_under_autocast_goes_the_short_way(kernels, poisoned, monkeypatch):
    made, call = [], fast.FusedBound.__call__
    monkeypatch.setattr(fast.FusedBound, "__call__", lambda self, *args: (made.append(self), call(self, *args))[1])
    fast.forget()
    x, w, scale = (torch.randn(s, device=kernels) for s in ((2, 4, 6), (4, 4, 2), (4,)))
    leaves = [t.requires_grad_() for t in (x, w, scale)]
    found = []
    for _ in range(2):
        with torch.autocast(kernels, torch.bfloat16):
            y = triton_conv.conv1d(x, w, scale=scale, activation="gelu")
        found.append([y, *torch.autograd.grad(y.float().sum(), leaves)])
        assert y.dtype is torch.bfloat16
    assert len(made) == 1
    assert all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][3].dtype is torch.float32


@pytest.mark.slow
def test_no_order_of_gradients_needs_more_than_the_kernels(kernels):
    x, w = (torch.randn(s, device=kernels, dtype=torch.float64).requires_grad_() for s in ((1, 2, 4), (2, 2, 2)))
    assert torch.autograd.gradgradcheck(
        lambda x, w: triton_conv.conv1d(x, w, activation="silu", residual=x[..., 1:]), (x, w), fast_mode=True
    )


def test_a_sample_has_the_same_bits_in_every_batch(kernels):
    x, w, residual = torch.randn(3, 4, 4, 4), torch.randn(4, 4, 3, 3), torch.randn(3, 4, 2, 2)
    x, w, residual = (t.to(kernels) for t in (x, w, residual))
    with triton_conv.batch_invariant():
        y = triton_conv.conv2d(x, w, residual=residual, activation="gelu")
        for n in range(3):
            alone = triton_conv.conv2d(x[n : n + 1], w, residual=residual[n : n + 1], activation="gelu")
            assert torch.equal(alone, y[n : n + 1])


def test_the_plan_of_a_gradient_says_what_it_does():
    problem = activation_plan.ActivationProblem(2**20, "bfloat16", "silu", 0.0, False, H200)
    plan = activation_plan.make(problem)
    assert plan is activation_plan.make(problem)
    assert "silu of 1048576 elements, from its input" in str(plan)
    assert plan.roofline.bytes == 3 * 2 * 2**20
    assert plan.seconds > plan.roofline.seconds > 0
    (launch,) = plan.launches
    assert launch.programs == 1024


HERE = Path(__file__).parent


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), environment.get("PYTHONPATH", ""))))
    command = [sys.executable, str(HERE / "compile_plans.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_gradients_of_activations_compile_once_for_fifty_images_and_do_not_spill():
    found = compiled("activations")
    assert found == {"variants": 1, "spills": [], "narrow": []}
