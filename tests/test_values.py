"""Infinities, NaN, overflow, denormals and signed zeros: where they go, kernel by kernel, against plain PyTorch.

One value that is not finite is put somewhere into one operand. Outputs that a tap connects to it become what float64
makes of them; of the others those stay finite that `Layer.beyond` does not name, which is the table under "Special
values" in the README.
"""

import random
from collections.abc import Callable
from math import inf, nan
from typing import Any, NamedTuple

import pytest
import torch
from halves import first_of
from torch import Tensor
from torch.nn import functional

import triton_conv
from triton_conv import Branch, activation, check, config, deform_reference, reference, ways
from triton_conv.config import BandedConfig, BoxConfig
from triton_conv.epilogue import ACTIVATIONS
from triton_conv.geometry import ConvGeometry, Role
from triton_conv.kernels.launch import Launch

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

# How far a value may spread beyond the outputs that a tap connects it to.
CHANNEL = "all images and positions of a channel"
FILTER = "all taps"
ALL = "everything"


def weights(*names: str) -> dict[tuple[str, str], str]:
    """What lies outside of an image is zeros, which taps are multiplied by, also in gradients."""
    found = {(name, output): CHANNEL for name in names for output in ("y", "dx")}
    return found | {("dy", f"d{name}"): FILTER for name in names}


PADDED = weights("w")
EXACT: dict[tuple[str, str], str] = {}


class Layer(NamedTuple):
    """A function of operands by name, what PyTorch calls it, and the kernels that compute it and its gradients."""

    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    kernels: tuple[str, ...]
    beyond: dict[tuple[str, str], str] = PADDED
    dtype: torch.dtype = SINGLE
    last: bool = False
    tiles: dict[Role, Any] = {}
    fixed: tuple[str, ...] = ()  # operands that stay finite


def convolution(x, w, **options: Any) -> tuple[Callable, Callable, dict]:
    """conv2d with a bias, ours and theirs, and the shapes of its operands."""
    pads = options.pop("padding", (0, 0))
    mode = options.pop("padding_mode", "zeros")
    precision = options.pop("precision", None)

    def ours(x, w, bias):
        return triton_conv.conv2d(x, w, bias, padding=pads, padding_mode=mode, precision=precision, **options)

    def theirs(x, w, bias):
        padded = functional.pad(x, (pads[1], pads[1], pads[0], pads[0]), "constant" if mode == "zeros" else mode)
        return functional.conv2d(padded, w, bias, **options)

    return ours, theirs, {"x": x, "w": w, "bias": w[:1]}


def transposed(x, w, **options: Any) -> tuple[Callable, Callable, dict]:
    return (
        lambda x, w, bias: triton_conv.conv_transpose2d(x, w, bias, **options),
        lambda x, w, bias: functional.conv_transpose2d(x, w, bias, **options),
        {"x": x, "w": w, "bias": w[1:2]},
    )


def causal(x, w) -> tuple[Callable, Callable, dict]:
    def theirs(x, w, bias, state):
        return functional.conv1d(torch.cat((state, x), 2), w.unsqueeze(1), bias, groups=len(w))

    shapes = {"x": x, "w": w, "bias": w[:1], "state": (*x[:2], w[1] - 1)}
    return lambda x, w, bias, state: triton_conv.causal_conv1d(x, w, bias, initial_state=state), theirs, shapes


def separable(x, first, second) -> tuple[Callable, Callable, dict]:
    def ours(x, w, pointwise):
        with torch.no_grad():
            return triton_conv.separable_conv2d(x, w, pointwise, padding=1, fused=True)

    def theirs(x, w, pointwise):
        between = functional.conv2d(x, w, padding=1, groups=x.shape[1])
        return functional.conv2d(between, pointwise)

    return ours, theirs, {"x": x, "w": first, "pointwise": second}


def branches(combine) -> tuple[Callable, Callable, dict]:
    def ours(x, w, wide):
        both = [Branch(w), Branch(wide, padding=2, dilation=2)]
        return triton_conv.multi_conv2d(x, both, combine=combine, one_launch=True)

    def theirs(x, w, wide):
        parts = [functional.conv2d(x, w), functional.conv2d(x, wide, padding=2, dilation=2)]
        return torch.cat(parts, 1) if combine == "concatenate" else parts[0] + parts[1]

    return ours, theirs, {"x": (2, 16, 5, 6), "w": (16, 16, 1, 1), "wide": (16, 16, 3, 3)}


def deformable() -> tuple[Callable, Callable, dict]:
    def ours(x, w, offset, mask):
        return triton_conv.deform_conv2d(x, offset, w, padding=1, mask=mask)

    def theirs(x, w, offset, mask):
        g = ConvGeometry.forward(tuple(x.shape), tuple(w.shape), (1, 1), ((1, 1), (1, 1)), (1, 1))
        return deform_reference.forward(x, offset, w, mask, None, g, 1)

    return ours, theirs, {"x": (2, 4, 4, 5), "w": (3, 4, 2, 2), "offset": (2, 8, 5, 6), "mask": (2, 4, 5, 6)}


def in_chunks() -> tuple[Callable, Callable, dict]:
    def ours(x, w, context):
        return triton_conv.causal_conv3d(x, w, context=context, padding=1)

    def theirs(x, w, context):
        return functional.conv3d(torch.cat((context, x), 2), w, padding=(0, 1, 1))

    return ours, theirs, {"x": (1, 16, 2, 3, 4), "w": (16, 16, 3, 3, 3), "context": (1, 16, 2, 3, 4)}


# Where a run of pixels ends, zeros of the output's gradient meet the input's next pixels; bundled groups share a tile.
RUNS = {**PADDED, ("x", "dw"): FILTER}
BUNDLED = {("x", "y"): ALL, ("w", "y"): ALL, ("dy", "dx"): ALL, ("w", "dx"): ALL, ("x", "dw"): ALL, ("dy", "dw"): ALL}
TILES = {(a, b): CHANNEL for a, b in (("x", "y"), ("w", "y"), ("dy", "dx"), ("w", "dx"))}
TILES |= {("x", "dw"): FILTER, ("dy", "dw"): FILTER}
BANDED = BandedConfig((4, 2, 2), 2, 16, 16, num_stages=2)

LAYERS: dict[str, Layer] = {
    "gather": Layer(
        *convolution((2, 5, 6, 7), (7, 5, 3, 2), padding=(1, 0), stride=(2, 1)), ("gather", "gather", "wgrad")
    ),
    "pointwise": Layer(*convolution((2, 5, 4, 3), (4, 5, 1, 1)), ("gather", "gather", "wgrad"), EXACT, DOUBLE),
    "circular": Layer(
        *convolution((2, 5, 4, 5), (4, 5, 3, 3), padding=(1, 2), padding_mode="circular"),
        ("gather", "gather", "fold", "wgrad"),
        {("w", "dx"): CHANNEL},  # the gradient of the padded input is padded with zeros
    ),
    "transposed": Layer(*transposed((2, 5, 4, 5), (5, 4, 3, 3), stride=2, padding=1), ("gather", "gather", "wgrad")),
    "box": Layer(
        *convolution((2, 16, 5, 16), (16, 16, 3, 3), padding=(1, 1)),
        ("box", "box", "box_wgrad"),
        RUNS,
        HALF,
        True,
        {Role.WGRAD: BoxConfig((1, 1, 1, 16), 16, 16)},
    ),
    "box, short runs": Layer(
        *convolution((2, 16, 3, 21), (16, 16, 1, 3), padding=(0, 1)),
        ("box", "box", "box_wgrad", "sum_slabs"),
        RUNS,
        BRAIN,
        True,
        {Role.WGRAD: BoxConfig((1, 1, 1, 16), 16, 16, splits=2)},
    ),
    "box of groups": Layer(
        *convolution((2, 64, 4, 8), (64, 32, 3, 3), padding=(1, 1), groups=2, precision="tf32"),
        ("box", "box", "wgrad"),
        PADDED,
        SINGLE,
        True,
    ),
    "depthwise": Layer(
        *convolution((2, 3, 7, 9), (3, 1, 3, 3), padding=(1, 1), groups=3),
        ("depthwise", "depthwise", "depthwise_wgrad"),
    ),
    "depthwise in vectors": Layer(
        *convolution((2, 16, 5, 6), (16, 1, 3, 3), padding=(1, 1), groups=16, stride=2),
        ("depthwise", "depthwise", "depthwise_wgrad"),
        PADDED,
        HALF,
        True,
    ),
    "banded": Layer(
        *convolution((2, 2, 7, 16), (2, 1, 13, 13), padding=(6, 6), groups=2),
        ("shift", "banded", "shift", "banded", "banded_wgrad"),
        TILES,
        HALF,
        False,
        {Role.FPROP: BANDED, Role.DGRAD: BANDED, Role.WGRAD: BandedConfig((4, 4, 1), 2, 16, 16)},
    ),
    "bundled groups": Layer(
        *convolution((1, 8, 4, 5), (8, 2, 3, 3), padding=(1, 1), groups=4), ("gather", "gather", "wgrad"), BUNDLED, HALF
    ),
    # without a slope, zeros behind the end meet the last positions
    "causal": Layer(
        *causal((2, 5, 13), (5, 4)),
        ("causal", "causal_backward", "sum_slabs"),
        weights("w") | {("x", "dw"): FILTER},
    ),
    "causal, channels-last": Layer(
        *causal((2, 16, 13), (16, 3)),
        ("causal", "causal_backward", "sum_slabs"),
        weights("w") | {("x", "dw"): FILTER},
        HALF,
        True,
    ),
    "separable": Layer(
        *separable((2, 16, 4, 5), (16, 1, 3, 3), (16, 16, 1, 1)),
        ("separable",),
        {("w", "y"): ALL},
        BRAIN,
        True,
        fixed=("dy",),
    ),
    "branches side by side": Layer(*branches("concatenate"), ("gather_branches", "wgrad"), weights("wide")),
    "branches summed": Layer(
        *branches("sum"), ("box_branches", "box_wgrad", "wgrad"), weights("wide") | {("x", "dw"): FILTER}, HALF, True
    ),
    "deformable": Layer(
        *deformable(),
        ("deform", "deform_cells", "deform_dgrad", "deform_offset", "deform_wgrad"),
        {
            **weights("w"),
            **{("mask", "y"): ALL, ("w", "doffset"): ALL, ("w", "dmask"): ALL},
            **{("dy", "doffset"): ALL, ("dy", "dmask"): ALL, ("mask", "doffset"): ALL},
        },
        fixed=("offset",),
    ),
    "chunks": Layer(*in_chunks(), ("gather", "box", "wgrad"), weights("w") | {("w", "dcontext"): CHANNEL}, HALF, True),
}


@pytest.fixture
def launched(monkeypatch):
    """The names of what is launched."""
    names, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, tensors: (names.append(self.name), run(self, tensors))[1])
    return names


def results(function, operands, without: str = "") -> dict[str, Tensor]:
    """The output "y" and the gradients, each called "d" and its operand's name; those that an operand does not reach
    are left out: its own gradient, and that of "dy" is the output."""
    leaves = {name: t.detach().requires_grad_(name != without) for name, t in operands.items() if name != "dy"}
    y = function(**leaves)
    wanted = {name: t for name, t in leaves.items() if t.requires_grad and y.requires_grad and without != "bias"}
    found = torch.autograd.grad(y, list(wanted.values()), operands["dy"]) if wanted else ()
    gradients = {f"d{name}": t for name, t in zip(wanted, found, strict=True)}
    return gradients if without == "dy" and gradients else {"y": y.detach(), **gradients}


def laid_out(t: Tensor, last: bool) -> Tensor:
    if last and t.dim() == 3:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats[t.dim()]) if last and t.dim() in formats else t.contiguous()


def spread(mask: Tensor, how: str) -> Tensor:
    axes = range(mask.dim())
    found = {CHANNEL: [a for a in axes if a != 1], FILTER: axes[min(2, mask.dim() - 1) :], ALL: axes, "": ()}[how]
    return mask.any(tuple(found), keepdim=True).expand_as(mask) if found else mask


def connected(layer: Layer, values: dict[str, Tensor], name: str, position: tuple[int, ...]) -> dict[str, Tensor]:
    """Which elements of which outputs a tap connects to this element; all are linear in each operand."""

    def ones(t: Tensor, of: str) -> Tensor:
        return t if of in layer.fixed else torch.ones_like(t)

    plain = {of: ones(t, of) for of, t in values.items()}
    without, beside = dict(plain), dict(plain)
    without[name] = torch.zeros_like(values[name])
    beside[name] = without[name].clone()
    beside[name][position] = 1
    first, second = (results(layer.theirs, d, name) for d in (without, beside))
    return {of: first[of] != second[of] for of in first}


def drawn(layer: Layer, generator: torch.Generator) -> dict[str, Tensor]:
    """Operands and the output's gradient, in the layer's dtype; none is zero."""

    def random_of(shape) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=DOUBLE)
        return (t + t.sign() * 0.1).to(layer.dtype)

    values = {name: random_of(shape) for name, shape in layer.shapes.items()}
    y = layer.theirs(**{name: t.double() for name, t in values.items()})
    return {**values, "dy": random_of(y.shape)}


SLOW = ("banded", "box of groups", "box, short runs", "deformable", "depthwise", "branches side by side", "chunks")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAYERS])
def test_what_is_not_finite_reaches_what_a_tap_connects_it_to(name, kernels, launched, poisoned, monkeypatch):
    layer, rng = LAYERS[name], random.Random(name)
    if name == "bundled groups":
        every = ways.of
        monkeypatch.setattr(ways, "of", lambda *problem: [w for w in every(*problem) if w.layout.bundle > 1])
    values = drawn(layer, torch.Generator().manual_seed(7))
    for operand in values:
        if operand in layer.fixed:
            continue
        position = tuple(rng.randrange(n) for n in values[operand].shape)
        given = {of: t.clone() for of, t in values.items()}
        given[operand][position] = rng.choice((inf, -inf, nan))
        on_device = {of: laid_out(t.to(kernels), layer.last) for of, t in given.items()}
        with config.explicit(layer.tiles):
            got = results(layer.ours, on_device, operand)
        want = results(layer.theirs, {of: t.double() for of, t in given.items()}, operand)
        reached = connected(layer, {of: t.double() for of, t in values.items()}, operand, position)
        for output, found in got.items():
            where = f"{output}, {given[operand][position]} at {operand}{list(position)}"
            found, right, mine = found.cpu().double(), want[output], reached[output]
            allowed = spread(mine, layer.beyond.get((operand, output), ""))
            assert not (mine & found.isfinite()).any(), f"stays finite: {where}"
            assert not (~allowed & ~found.isfinite()).any(), f"goes too far: {where}"
            if (operand, output) not in layer.beyond:
                assert torch.equal(found[mine].nan_to_num(0), right[mine].nan_to_num(0)), where
            assert close(found[~allowed], right[~allowed], layer.dtype), where
    assert set(launched) == set(layer.kernels)


def close(found: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """As far as what is between two of them, and TF32, leave them; `triton-conv check` is for tolerances."""
    eps = max(torch.finfo(dtype).eps, 2.0**-9)
    return bool(((found - right).abs() <= eps * (2 * right.abs() + 50)).all())


# ---------------------------------------------------------------------------------------------------------------------
# Range


@pytest.mark.parametrize("name", first_of(["causal", "transposed", "circular", "box", "depthwise", "chunks"], 2))
def test_float16_overflows_where_the_result_does_and_nowhere_between(name, kernels, poisoned):
    layer = LAYERS[name]._replace(dtype=HALF)
    values = drawn(layer, torch.Generator().manual_seed(3))
    for large, small in (("x", "w"), ("dy", "w"), ("dy", "x")):
        given = {of: t.clone() for of, t in values.items()}
        given[large] = (given[large] * 3e4).clamp(-6e4, 6e4)  # sums of them are beyond float16
        given[small] *= 1e-4
        with config.explicit(layer.tiles):
            got = results(layer.ours, {of: laid_out(t.to(kernels), layer.last) for of, t in given.items()})
        want = results(layer.theirs, {of: t.double() for of, t in given.items()})
        for output, right in want.items():
            clear = (right.abs() < 6.5e4) | (right.abs() > 6.6e4)  # of the largest float16
            found, rounded = got[output].cpu()[clear], right.to(HALF)[clear]
            assert torch.equal(found.isinf(), rounded.isinf()), f"{output} of large {large}"
            assert not found.isnan().any()
            assert torch.equal(found[found.isinf()], rounded[rounded.isinf()])


@pytest.mark.parametrize("dtype", [HALF, SINGLE, DOUBLE], ids=str)  # interpreted kernels lose those of bfloat16
@pytest.mark.parametrize("groups", [1, 16])
def test_denormals_are_numbers(dtype, groups, kernels):
    tiny = torch.finfo(dtype).smallest_normal
    x = laid_out(torch.full((1, 16, 3, 4), tiny / 4, dtype=dtype, device=kernels), True)
    w = laid_out(torch.ones(16, 16 // groups, 1, 1, dtype=dtype, device=kernels), True)
    leaves = [t.requires_grad_() for t in (x, w)]
    y = triton_conv.conv2d(*leaves, groups=groups, activation="relu", precision="ieee" if dtype is SINGLE else None)
    assert (y == tiny / 4 * (16 // groups)).all()
    dx, dw = torch.autograd.grad(y, leaves, torch.full_like(y, tiny / 8))
    assert (dx == tiny / 8 * (16 // groups)).all()
    assert (dw == 0).all()  # the square of so small a number


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


# ---------------------------------------------------------------------------------------------------------------------
# Activations


def points(dtype: torch.dtype) -> Tensor:
    """Around zero, the corners of activations, where exponentials overflow, and the largest."""
    limits = torch.finfo(dtype)
    near = [0.0, limits.smallest_normal, 0.5, 1, 2.5, 3, 6, 6.5, 20, 87, 88.5, 89, 104, 300, 710, 746, 1e4, limits.max]
    if dtype is not BRAIN:  # whose denormals interpreted kernels lose
        near.append(limits.smallest_normal / 4)
    return torch.tensor([s * v for v in (*near, inf) for s in (1, -1)] + [nan], dtype=DOUBLE).to(dtype)


def same(found: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Alike where both are infinite or NaN, else to a few roundings, in float32, of the larger of 1 and the result."""
    eps = 4 * torch.finfo(dtype).eps
    near = (found - right).abs() <= eps * right.abs().clamp(min=1)
    return torch.where(right.isfinite(), near, (found == right) | (found.isnan() & right.isnan()))


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN, DOUBLE], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients_at_every_special_point(name, dtype, kernels, poisoned):
    x = points(dtype)
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    y = triton_conv.conv2d(x.view(1, 1, 1, -1).to(kernels), one.to(kernels), activation=name).flatten()
    z = x.double().requires_grad_()
    want = reference.activated(z, name)
    (slope,) = torch.autograd.grad(want, z, torch.ones_like(z))
    dz = activation.backward(torch.ones_like(x).to(kernels), x.to(kernels), name, 0.01, False).cpu()
    # as PyTorch has it: beyond a sixth of the largest the product with 6 overflows, and in float32 the cube of z
    extreme = x.abs() == torch.finfo(dtype).max if dtype is not HALF else torch.zeros_like(x, dtype=torch.bool)
    right = same(y.cpu().double(), want.detach().to(dtype).double(), dtype)
    if name == "hardswish":
        right |= extreme & (x > 0) & (y.cpu() == inf)
    assert right.all(), (x[~right], y.cpu()[~right], want[~right])
    right = same(dz.double(), slope.to(dtype).double(), dtype)
    if name == "gelu_tanh":
        right |= extreme & dz.isnan()
    if name == "hardswish":  # PyTorch has a slope of 1 at NaN
        right |= x.isnan() & dz.isnan()
    assert right.all(), (x[~right], dz[~right], slope[~right])
