"""Infinities, NaN, overflow, denormals and signed zeros, kernel by kernel; error growth. The tables are in bench."""

from math import nan

import pytest
import torch
from halves import first_of

import triton_conv
from bench import numerics, special
from bench.special import laid_out
from bench.special_layers import BRAIN, DOUBLE, HALF, LAYERS, SINGLE
from triton_conv import ways
from triton_conv.epilogue import ACTIVATIONS

SLOW = ("banded", "box of groups", "box, short runs", "deformable", "depthwise", "circular", "chunks")
SLOWLY = pytest.mark.slow
SLOW += ("branches side by side", "branches summed")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities and NaN


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAYERS])
def test_what_is_not_finite_reaches_what_a_tap_connects_it_to(name, kernels, launched, poisoned, monkeypatch):
    if name == "bundled groups":
        every = ways.of
        monkeypatch.setattr(ways, "of", lambda *problem: [w for w in every(*problem) if w.layout.bundle > 1])
    assert special.escapes(name, torch.device(kernels)) == []
    if kernels == "cpu":  # elsewhere launches go a shorter way, and plans may be others
        assert set(launched) == set(LAYERS[name].kernels)


def test_a_value_that_goes_too_far_is_found(kernels, monkeypatch):
    layer = LAYERS["gather"]
    monkeypatch.setitem(LAYERS, "gather", layer._replace(beyond={}))
    assert any("dw goes too far" in words for words in special.escapes("gather", torch.device(kernels)))
    monkeypatch.setitem(LAYERS, "gather", layer._replace(ours=lambda x, w, bias: layer.ours(x.nan_to_num(0), w, bias)))
    assert any("x[" in words and "stays finite" in words for words in special.escapes("gather", torch.device(kernels)))


@pytest.mark.parametrize("name", first_of(["causal", "transposed", "circular", "box", "depthwise", "chunks"], 2))
def test_float16_overflows_where_the_result_does_and_nowhere_between(name, kernels, poisoned):
    assert special.overflows(name, torch.device(kernels)) == []


@pytest.mark.parametrize("dtype", [HALF, SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize("groups", [1, 16])
def test_denormals_are_numbers(dtype, groups, kernels):
    assert special.denormals(dtype, groups, torch.device(kernels)) == []


def test_zeros_are_positive_unless_all_there_is_to_add_is_negative(kernels):
    x, w = torch.zeros(1, 2, 3, 3, device=kernels), -torch.ones(2, 1, 1, 1, device=kernels)
    bias = torch.tensor([-0.0, 0.0], device=kernels)
    for groups, weight in ((1, w.expand(2, 2, 1, 1)), (2, w)):
        y = triton_conv.conv2d(x, weight, groups=groups)
        assert not y.signbit().any()
        y = triton_conv.conv2d(x, weight, bias, groups=groups)
        assert (y == 0).all()
        assert not y[:, 1].signbit().any()
    assert not triton_conv.conv2d(-x, w, groups=2, activation="relu").signbit().any()


@pytest.mark.parametrize("where", ["x", "w", "scale_a"])
def test_nan_of_8_bit_floats_stays_nan(where, kernels):
    if where != "scale_a" and not torch.cuda.is_available():
        pytest.skip("the interpreter takes NaN of 8-bit floats for 480")
    x, w = torch.ones(1, 16, 2, 16), torch.ones(16, 16, 1, 1)
    scales = [torch.ones(1), torch.ones(1)]
    {"x": x, "w": w, "scale_a": scales[0]}[where].view(-1)[0] = nan
    x, w = (laid_out(t.to(torch.float8_e4m3fn).to(kernels), True) for t in (x, w))
    y = triton_conv.scaled_conv2d(x, w, *(s.to(kernels) for s in scales)).float()
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[{"x": (0, slice(None), 0, 0), "w": (0, 0), "scale_a": ()}[where]] = True
    assert torch.equal(y.isnan(), reached)
    assert (y[~reached] == 16).all()


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN, DOUBLE], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients_at_every_special_point(name, dtype, kernels, poisoned):
    assert special.corners(name, dtype, torch.device(kernels)) == []


# ---------------------------------------------------------------------------------------------------------------------
# Error growth


def modes(names):
    return [mode for mode in numerics.MODES if mode.name in names]


QUICK = ("float32 ieee", "float32 tf32", "bfloat16, not rounded", "float8_e4m3fn")
GROWTH = [
    pytest.param(mode, role, id=f"{mode.name}-{role}", marks=() if role == "forward" and mode.name in QUICK else SLOWLY)
    for mode in numerics.MODES
    for role in numerics.ROLES
    if role == "forward" or mode.dtype is not torch.float8_e4m3fn  # which have no gradients
]


@pytest.mark.parametrize(("mode", "role"), GROWTH)
def test_errors_grow_no_faster_than_is_documented(mode, role, kernels):
    where = torch.device(kernels)
    if mode not in numerics.modes(where):
        pytest.skip("the interpreter multiplies float32 exactly: tf32x3 would be ieee")
    for operands in ("normal", "uniform"):
        found = numerics.errors(mode, operands, role, 4096, where, rival=False)
        assert found.ok, found


@pytest.mark.slow
@pytest.mark.parametrize("role", numerics.ROLES)
@pytest.mark.parametrize("mode", modes(("float32 ieee", "float16, not rounded")), ids=lambda mode: mode.name)
def test_errors_of_a_million_products(mode, role, kernels):
    found = numerics.errors(mode, "uniform", role, 2**20, torch.device(kernels), rival=False)
    assert found.ok, found


def test_16_bit_sums_would_be_found(kernels):
    mode = modes(("float16",))[0]
    found = numerics.errors(mode._replace(sums=True), "uniform", "forward", 4096, torch.device(kernels), rival=False)
    rounded = numerics.errors(mode, "uniform", "forward", 4096, torch.device(kernels), rival=False)
    assert found.ours < 0.1 * found.bound
    assert rounded.ours > found.bound
