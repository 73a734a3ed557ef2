"""Banded kernels against float64: long depthwise filters of every shape and layout, all three roles."""

import random
from math import prod

import pytest
import torch

from triton_conv import config, tiles
from triton_conv.config import BandedConfig, Numerics
from triton_conv.geometry import ConvGeometry, Role, Strides

H200 = config.DEVICES["H200"]


class Layer:
    """A depthwise convolution with random operands, and what PyTorch makes of it in float64."""

    def __init__(
        self, N, C, image, taps, padding=(0, 0), modes=("zeros", "zeros"), dtype=torch.float32, layout="dense"
    ):
        self.geometry = ConvGeometry.forward((N, C, *image), (C, 1, *taps), (1, 1), _pairs(padding), (1, 1), C, modes)
        generator = torch.Generator().manual_seed(N + C + sum(image))
        shapes = {"x": (N, C, *image), "w": (C, 1, *taps), "y": (N, C, *self.geometry.output[1:]), "bias": (C,)}
        values = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        x, w, bias = (values[name].double().requires_grad_() for name in ("x", "w", "bias"))
        y = torch.nn.functional.conv2d(_padded(x, _pairs(padding), modes), w, bias, groups=C)
        dx, dw = torch.autograd.grad(y, (x, w), values["y"].double())
        self.expected = {Role.FPROP: y.detach(), Role.DGRAD: dx, Role.WGRAD: dw}
        self.tensors = {name: _laid_out(t, layout if name in "xy" else "dense") for name, t in values.items()}

    def check(self, role, device, tiling=None, index_bits=32):
        """Runs a role into memory full of NaN and compares every element with the tolerance of `triton_conv check`."""
        from triton_conv.kernels import banded, banded_wgrad

        g, dtype = self.geometry, self.tensors["w"].dtype
        tiling = tiling or config.default_banded(g, role, dtype.itemsize, H200)
        name = {Role.FPROP: "y", Role.DGRAD: "x", Role.WGRAD: "w"}[role]
        tensors = {n: t.to(device) for n, t in self.tensors.items()}
        tensors[name] = torch.empty_like(tensors[name]).fill_(torch.nan)
        strides = Strides(*((*t.stride()[:2], 0, *t.stride()[2:]) for t in (tensors[n] for n in "xwy")))
        numerics = Numerics(index_bits, "float32", "ieee", has_bias=role is Role.FPROP)
        if role is Role.WGRAD:
            tensors["workspace"] = torch.full((tiling.splits, g.C, *g.filter), torch.nan, device=device)
            launches = banded_wgrad.launches(g, strides, tiling, numerics)
        else:
            shape = tiles.shifted_shape(g, dtype.itemsize)
            tensors["workspace"] = torch.full(shape, torch.nan, dtype=dtype, device=device)
            launches = banded.launches(role, g, strides, tiling, numerics, dtype.itemsize)
        for launch in launches:
            launch.run(tensors)
        expected, depth = self.expected[role], g.N * prod(g.output) if role is Role.WGRAD else g.taps
        error = (tensors[name].cpu().double() - expected).abs()
        bound = torch.finfo(dtype).eps * expected.abs() + 10 * 2.0**-23 * depth
        assert (error <= bound).all(), f"{role} {g} {tiling}: {error.max()}"
        return tensors[name]


def _pairs(padding):
    return tuple((p, p) if isinstance(p, int) else p for p in padding)


def _padded(x, padding, modes):
    """Both axes padded by torch.nn.functional.pad, which knows each mode for the last axis of a 3-D tensor."""
    for axis, (pair, mode) in enumerate(zip(padding, modes, strict=True), start=2):
        rows = x.movedim(axis, -1)
        flat = rows.reshape(-1, 1, rows.shape[-1])
        flat = torch.nn.functional.pad(flat, pair, mode="constant" if mode == "zeros" else mode)
        x = flat.reshape(*rows.shape[:-1], -1).movedim(-1, axis)
    return x


def _laid_out(t, layout):
    """A copy of t: dense, channels-last, or a window of NaN."""
    if layout == "channels_last":
        return t.to(memory_format=torch.channels_last)
    if layout == "window":
        return t.new_full([extent + 2 for extent in t.shape], torch.nan)[(slice(1, -1),) * 4].copy_(t)
    return t


LAYERS = {
    "31x31": {"N": 2, "C": 2, "image": (16, 16), "taps": (31, 31), "padding": (15, 15)},
    "31x31 wide image": {"N": 1, "C": 1, "image": (9, 72), "taps": (31, 31), "padding": (15, 15)},
    "13x13": {"N": 3, "C": 2, "image": (14, 14), "taps": (13, 13), "padding": (6, 6), "dtype": torch.bfloat16},
    "even and asymmetric": {"N": 2, "C": 3, "image": (9, 21), "taps": (8, 14), "padding": ((7, 1), (2, 13))},
    "padded beyond the filter": {"N": 1, "C": 2, "image": (5, 7), "taps": (3, 9), "padding": ((4, 3), (12, 10))},
    "padded far beyond": {"N": 1, "C": 1, "image": (2, 3), "taps": (1, 9), "padding": (0, (700, 0))},
    "not padded": {"N": 1, "C": 2, "image": (20, 40), "taps": (7, 21)},
    "one row of taps": {"N": 2, "C": 1, "image": (6, 24), "taps": (1, 13), "padding": (0, 6)},
    "one image row": {"N": 3, "C": 2, "image": (1, 150), "taps": (1, 70), "padding": (0, (69, 0))},
    "one output": {"N": 2, "C": 2, "image": (13, 13), "taps": (13, 13)},
    "channels-last": {"N": 2, "C": 4, "image": (7, 8), "taps": (5, 17), "padding": (2, 8), "layout": "channels_last"},
    "window": {"N": 2, "C": 2, "image": (8, 16), "taps": (9, 9), "padding": (4, 4), "layout": "window"},
    "float16": {"N": 2, "C": 2, "image": (8, 24), "taps": (5, 31), "padding": (2, 15), "dtype": torch.float16},
}


@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
@pytest.mark.parametrize("name", LAYERS)
def test_right_for_every_shape_and_layout(name, role, kernels):
    Layer(**LAYERS[name]).check(role, kernels)


@pytest.mark.parametrize("seed", range(8))
def test_random_layers(seed, kernels):
    rng = random.Random(seed)
    taps = rng.randint(5, 31), rng.randint(5, 31)
    image = rng.randint(1, 18), rng.randint(1, 40)
    padding = []
    for extent, reach in zip(image, taps, strict=True):
        lower = rng.randrange(reach)
        padding.append((lower, rng.randrange(max(reach - extent - lower, 0), reach + 1)))
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    layout = rng.choice(("dense", "dense", "channels_last", "window"))
    layer = Layer(rng.randint(1, 3), rng.randint(1, 5), image, taps, padding, dtype=dtype, layout=layout)
    for role in Role:
        layer.check(role, kernels, index_bits=rng.choice((32, 64)))


@pytest.mark.parametrize("role", [Role.FPROP, Role.WGRAD], ids=lambda role: role.value)
@pytest.mark.parametrize(
    "modes", [("zeros", "reflect"), ("replicate", "circular"), ("circular", "zeros")], ids="-".join
)
def test_padding_modes(modes, role, kernels):
    Layer(2, 2, (9, 20), (5, 13), ((2, 3), (6, 5)), modes).check(role, kernels)


TILES = [
    BandedConfig((16, 1, 1), 1, 16, 16),
    BandedConfig((1, 4, 4), 2, 16, 32, splits=3),
    BandedConfig((2, 8, 1), 8, 32, 16, splits=9),
    BandedConfig((4, 2, 2), 4, 16, 64),
]


@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
@pytest.mark.parametrize("tiling", TILES, ids=str)
def test_tiling_does_not_change_the_numbers(tiling, role, kernels):
    Layer(3, 1, (7, 37), (5, 15), ((2, 3), (7, 3))).check(role, kernels, tiling)


def test_slabs_are_summed_to_the_same_bits_every_run(kernels):
    layer = Layer(2, 2, (12, 24), (5, 11), (2, 5))
    first, second = (layer.check(Role.WGRAD, kernels, TILES[1]) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("counts", "size", "blocks"),
    [
        ((64, 8, 1), 128, (64, 2, 1)),
        ((1, 8, 1), 16, (2, 8, 1)),
        ((3, 3, 47), 64, (4, 1, 16)),
        ((48, 4, 1), 64, (16, 4, 1)),
    ],
)
def test_tiles_waste_little_and_prefer_images(counts, size, blocks):
    assert config.most_images(counts, size) == blocks


@pytest.mark.parametrize("sides", [((8, 1, 1), 4, 32, 32), ((16, 1, 1), 3, 32, 32), ((16, 1, 1), 4, 8, 32)])
def test_sides_that_no_dot_has_are_refused(sides):
    with pytest.raises(ValueError, match=r"powers of two|16 or more"):
        BandedConfig(*sides)
