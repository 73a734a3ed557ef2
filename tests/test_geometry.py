"""Extents against PyTorch, index maps and the canonical form against the definition of a convolution."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from triton_conv.geometry import (
    ConvGeometry,
    Role,
    Strides,
    canonical,
    output_extent,
    same_padding,
    transposed_extent,
)

FPROP, DGRAD, WGRAD = Role.FPROP, Role.DGRAD, Role.WGRAD

# ---------------------------------------------------------------------------------------------------------------------
# Extents


@pytest.mark.parametrize("taps", range(1, 6))
def test_output_extents_are_those_of_pytorch(taps):
    w = torch.empty(1, 1, taps, device="meta")
    for extent, padding, stride, dilation in itertools.product(range(1, 12), range(4), range(1, 4), range(1, 4)):
        ours = output_extent(extent, padding, padding, taps, stride, dilation)
        if extent + 2 * padding < dilation * (taps - 1) + 1:
            assert ours < 1
        else:
            x = torch.empty(1, 1, extent, device="meta")
            assert ours == functional.conv1d(x, w, None, stride, padding, dilation).shape[2]


@pytest.mark.parametrize("taps", range(1, 6))
def test_transposed_extents_are_those_of_pytorch(taps):
    w = torch.empty(1, 1, taps, device="meta")
    for extent, padding, stride, dilation in itertools.product(range(1, 7), range(4), range(1, 4), range(1, 4)):
        for extra in range(max(stride, dilation)):
            ours = transposed_extent(extent, padding, padding, taps, stride, dilation, extra)
            if ours >= 1:
                x = torch.empty(1, 1, extent, device="meta")
                theirs = functional.conv_transpose1d(x, w, None, stride, padding, extra, 1, dilation)
                assert ours == theirs.shape[2]


def test_a_transposed_convolution_undoes_the_extent_of_a_convolution():
    for taps, stride, lower, upper, dilation in itertools.product(range(1, 5), range(1, 5), range(3), range(3), (1, 2)):
        for output, extra in itertools.product(range(1, 5), range(stride)):
            extent = transposed_extent(output, lower, upper, taps, stride, dilation, extra)
            if extent >= 1:
                assert output_extent(extent, lower, upper, taps, stride, dilation) == output


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dilation", range(1, 5))
@pytest.mark.parametrize("taps", range(1, 8))
def test_same_padding_keeps_the_extent_and_is_that_of_pytorch(taps, dilation):
    lower, upper = same_padding(taps, dilation)
    assert output_extent(9, lower, upper, taps, 1, dilation) == 9
    x, w = torch.randn(1, 1, 9), torch.randn(1, 1, taps)
    expected = functional.conv1d(x, w, padding="same", dilation=dilation)
    torch.testing.assert_close(functional.conv1d(functional.pad(x, (lower, upper)), w, dilation=dilation), expected)


def test_a_geometry_has_three_axes_whatever_the_rank():
    for rank in (1, 2, 3):
        g = ConvGeometry.forward((2, 3, *(8,) * rank), (5, 3, *(3,) * rank), (2,) * rank, ((1, 0),) * rank)
        assert g.input == (1,) * (3 - rank) + (8,) * rank
        assert g.filter == (1,) * (3 - rank) + (3,) * rank
        assert g.output == (1,) * (3 - rank) + (4,) * rank
        assert g.stride == (1,) * (3 - rank) + (2,) * rank
        assert g.padding == ((0, 0),) * (3 - rank) + ((1, 0),) * rank
        assert g.taps == 3**rank
        assert g.flops == 2 * 2 * 5 * 3 * 3**rank * 4**rank
        assert hash(g) == hash(replace(g))


def test_modes_are_zeros_where_nothing_is_padded():
    g = ConvGeometry.forward((1, 1, 8, 8), (1, 1, 3, 3), padding=((0, 0), (1, 1)), modes=("reflect", "circular"))
    assert g.modes == ("zeros", "zeros", "circular")


def test_padded_moves_borders_into_the_extents_and_keeps_the_output():
    modes, padding = ("reflect", "zeros", "circular"), ((1, 2), (1, 1), (0, 3))
    g = ConvGeometry.forward((2, 3, 5, 6, 7), (4, 3, 3, 3, 3), (1, 2, 1), padding, modes=modes)
    p = g.padded()
    assert p.input == (8, 6, 10)
    assert p.padding == ((0, 0), (1, 1), (0, 0))
    assert p.modes == ("zeros",) * 3
    spans = zip(p.input, p.padding, p.filter, p.stride, p.dilation, strict=True)
    assert p.output == g.output == tuple(output_extent(i, *pad, f, s, d) for i, pad, f, s, d in spans)


def test_a_geometry_prints_all_that_matters():
    g = ConvGeometry.forward((2, 4, 8, 9), (6, 2, 3, 5), (1, 2), ((1, 0), (2, 2)), (1, 1), 2, ("zeros", "circular"))
    text = str(g)
    for word in ("N2", "C4", "K6", "g2", "1x8x9", "1x3x5", "1x7x5", "1x1x2", "1+0", "2+2 circular"):
        assert word in text


# ---------------------------------------------------------------------------------------------------------------------
# Index maps


def triples(extent, outputs, taps, stride, lower, dilation):
    """The definition: output o reads input i through tap r where i = o * stride - lower + r * dilation."""
    for o, r in itertools.product(range(outputs), range(taps)):
        i = o * stride - lower + r * dilation
        if 0 <= i < extent:
            yield o, r, i


def visits(axis, destinations, sources):
    """(destination, tap, source) as the documentation of Axis has them."""
    written = []
    for phi in range(axis.phases):
        t = phi + axis.offset
        if t % axis.common:
            first, count = 0, 0
        else:
            first = t // axis.common * axis.inverse % axis.tap_step
            count = max(math.ceil((axis.filter - first) / axis.tap_step), 0)
        for u in itertools.count():
            destination = phi + u * axis.phases
            if destination >= destinations:
                break
            written.append(destination)
            for j in range(count):
                numerator = t + first * axis.src_tap_step * axis.common
                assert numerator % axis.phases == 0, "the division is exact wherever a class has taps"
                source = numerator // axis.phases + u * axis.src_step + j * axis.src_tap_step
                if 0 <= source < sources:
                    yield destination, first + j * axis.tap_step, source
    assert sorted(written) == list(range(destinations)), "each destination belongs to one class"


GRID = [
    (taps, stride, lower, dilation, extent)
    for taps, stride, lower, dilation in itertools.product(range(1, 6), range(1, 7), range(4), range(1, 7))
    for extent in (1, 2, 7, 12)
]


def test_index_maps_visit_each_pair_of_the_definition_once():
    checked = 0
    for taps, stride, lower, dilation, extent in GRID:
        upper = (lower + taps) % 3
        outputs = output_extent(extent, lower, upper, taps, stride, dilation)
        if outputs < 1:
            continue
        g = ConvGeometry.forward((1, 1, extent), (1, 1, taps), (stride,), ((lower, upper),), (dilation,))
        wanted = sorted(triples(extent, outputs, taps, stride, lower, dilation))
        for role, destinations, sources in (
            (FPROP, outputs, extent),
            (DGRAD, extent, outputs),
            (WGRAD, outputs, extent),
        ):
            axis = g.axes(role)[2]
            found = sorted(visits(axis, destinations, sources))
            ordered = [(i, r, o) for o, r, i in wanted] if role is DGRAD else wanted
            assert found == sorted(ordered), (role, g)
        checked += 1
    assert checked > 1000


def test_an_input_gradient_has_one_class_for_each_residue_of_the_stride():
    g = ConvGeometry.forward((1, 1, 4, 9, 9), (1, 1, 1, 3, 3), (1, 2, 3), ((0, 0), (1, 1), (1, 1)))
    assert [axis.phases for axis in g.axes(DGRAD)] == [1, 2, 3]
    assert [axis.phases for axis in g.axes(FPROP)] == [1, 1, 1]


def test_the_two_maps_of_an_unstrided_axis_are_mirror_images():
    g = ConvGeometry.forward((1, 1, 9), (1, 1, 3), padding=((1, 1),))
    forward, backward = g.axes(FPROP)[2], g.axes(DGRAD)[2]
    assert (forward.offset, forward.src_tap_step) == (-1, 1)
    assert (backward.offset, backward.src_tap_step) == (1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Canonical form. A geometry and its strides describe what is read from and written to three flat buffers; the canonical
# ones must do the same.


def offsets(extents, strides):
    """The memory offset of every element of a strided array."""
    grids = np.meshgrid(*[np.arange(e) * s for e, s in zip(extents, strides, strict=True)], indexing="ij")
    return sum(grids)


def shapes(g):
    return (g.N, g.C, *g.input), (g.K, g.C // g.groups, *g.filter), (g.N, g.K, *g.output)


def simulate(g, strides, role, buffers):
    """What `role` writes, by the definition of a convolution, element by element: one more flat buffer."""
    x_at, w_at, y_at = (offsets(shape, s) for shape, s in zip(shapes(g), strides, strict=True))
    x_buffer, w_buffer, y_buffer = buffers
    target = {FPROP: y_buffer, DGRAD: x_buffer, WGRAD: w_buffer}[role]
    out = np.full_like(target, -7)  # shows what was never written
    out[{FPROP: y_at, DGRAD: x_at, WGRAD: w_at}[role]] = 0
    C, K = g.C // g.groups, g.K // g.groups
    per_axis = [
        list(triples(i, o, f, s, lower, d))
        for i, o, f, s, (lower, _), d in zip(g.input, g.output, g.filter, g.stride, g.padding, g.dilation, strict=True)
    ]
    for (z, t, d), (p, r, h), (q, s, w) in itertools.product(*per_axis):
        for group in range(g.groups):
            cs, ks = slice(group * C, group * C + C), slice(group * K, group * K + K)
            x_i, w_i, y_i = x_at[:, cs, d, h, w], w_at[ks, :, t, r, s], y_at[:, ks, z, p, q]
            if role is FPROP:
                out[y_i] += x_buffer[x_i] @ w_buffer[w_i].T
            elif role is DGRAD:
                out[x_i] += y_buffer[y_i] @ w_buffer[w_i]
            else:
                out[w_i] += y_buffer[y_i].T @ x_buffer[x_i]
    return out


def dense(shape, order):
    """Strides of an array whose axes lie in memory in `order`, outermost first."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


CONTIGUOUS, CHANNELS_LAST = (0, 1, 2, 3, 4), (0, 2, 3, 4, 1)
ORDERS = [CONTIGUOUS, CHANNELS_LAST, (1, 0, 2, 3, 4), (2, 3, 4, 1, 0), (0, 4, 1, 3, 2)]


def assert_same_memory(g, strides, role):
    small, small_strides, steps = canonical(g, strides, role)
    buffers = []
    for shape, s in zip(shapes(g), strides, strict=True):
        reach = 1 + sum((e - 1) * step for e, step in zip(shape, s, strict=True))
        buffers.append(np.random.default_rng(reach).integers(-9, 9, reach))
    np.testing.assert_array_equal(simulate(small, small_strides, role, buffers), simulate(g, strides, role, buffers))
    assert small.flops == g.flops
    return small, small_strides, steps


def forward(x, w, stride=1, padding=0, dilation=1, groups=1):
    rank = len(x) - 2
    per = [v if isinstance(v, tuple) else (v,) * rank for v in (stride, padding, dilation)]
    pairs = [p if isinstance(p, tuple) else (p, p) for p in per[1]]
    return ConvGeometry.forward(x, w, per[0], pairs, per[2], groups)


CASES = {
    "1x1": forward((2, 3, 4, 5), (4, 3, 1, 1)),
    "1x1 batch 1": forward((1, 3, 4, 5), (4, 3, 1, 1)),
    "1x1 one pixel": forward((3, 4, 1, 1), (2, 4, 1, 1)),
    "1x1 grouped": forward((2, 4, 3, 2), (6, 2, 1, 1), groups=2),
    "1x1 strided": forward((2, 3, 5, 6), (4, 3, 1, 1), stride=2),
    "1x1 strided one way": forward((2, 3, 5, 6), (4, 3, 1, 1), stride=(1, 2)),
    "1x1 strided exact": forward((2, 3, 4, 6), (4, 3, 1, 1), stride=(2, 3)),
    "1x1 padded": forward((2, 3, 4, 5), (4, 3, 1, 1), padding=1),
    "1x1 padded strided": forward((2, 3, 4, 5), (4, 3, 1, 1), stride=2, padding=1),
    "1x1x1": forward((2, 3, 2, 3, 4), (4, 3, 1, 1, 1)),
    "3x1": forward((2, 3, 5, 4), (4, 3, 3, 1), padding=((1, 1), 0)),
    "1x3": forward((2, 3, 5, 4), (4, 3, 1, 3), padding=(0, 1)),
    "3x1 strided": forward((2, 3, 5, 4), (4, 3, 3, 1), stride=2),
    "1x3x1": forward((2, 3, 2, 5, 3), (4, 3, 1, 3, 1)),
    "3x1x1": forward((2, 3, 4, 2, 3), (4, 3, 3, 1, 1), stride=(2, 1, 2)),
    "3x3": forward((2, 3, 5, 4), (4, 3, 3, 3), padding=1),
    "3x3 asymmetric": forward((2, 3, 5, 4), (4, 3, 3, 3), padding=((0, 2), (1, 0)), dilation=2, stride=3),
    "3x3 depthwise": forward((2, 3, 5, 4), (3, 1, 3, 3), padding=1, groups=3),
    "1d": forward((2, 3, 7), (4, 3, 3), stride=2, padding=1),
    "patches": forward((2, 3, 4, 6), (5, 3, 2, 2), stride=2),
    "patches of a gray image": forward((2, 1, 4, 6), (5, 1, 2, 3), stride=(2, 3)),
    "patches with a rest": forward((2, 3, 5, 7), (5, 3, 2, 2), stride=2),
    "patches grouped": forward((2, 4, 4, 6), (4, 2, 2, 2), stride=2, groups=2),
    "patches dilated": forward((2, 3, 4, 6), (5, 3, 2, 2), stride=2, dilation=(1, 2)),
    "patches of a video": forward((1, 2, 4, 4, 2), (3, 2, 2, 2, 2), stride=2),
    "patches of a signal": forward((2, 3, 8), (5, 3, 4), stride=4),
    "whole image": forward((2, 3, 4, 2), (5, 3, 4, 2)),
    "whole image, odd stride": forward((2, 3, 4, 2), (5, 3, 4, 2), stride=3),
    "2x1 patches": forward((2, 3, 4, 5), (5, 3, 2, 1), stride=(2, 1)),
    "2x1 patches, sampled": forward((2, 3, 4, 5), (5, 3, 2, 1), stride=(2, 2)),
    "transposed": ConvGeometry.transposed((2, 4, 3, 3), (4, 3, 2, 2), (2, 2)),
    "transposed with output_padding": ConvGeometry.transposed((2, 4, 3, 3), (4, 3, 1, 1), (2, 2), (), (1, 0)),
    "transposed with less output": ConvGeometry.transposed((2, 2, 2, 2), (2, 2, 2, 1), (1, 1), (), (1, 2), 1, (2, 3)),
}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("g", CASES.values(), ids=CASES)
def test_the_canonical_form_computes_the_same_from_the_same_memory(g, role):
    for x_order, w_order, y_order in itertools.product(ORDERS[:3], repeat=3):
        orders = x_order, w_order, y_order
        strides = Strides(*(dense(shape, order) for shape, order in zip(shapes(g), orders, strict=True)))
        assert_same_memory(g, strides, role)


@st.composite
def problems(draw):
    """A geometry in any memory format, some of its tensors cut out of larger ones."""
    taps = draw(st.tuples(*[st.integers(1, 3)] * 3))
    outputs = draw(st.tuples(*[st.integers(1, 3)] * 3))
    stride = tuple(draw(st.sampled_from([1, 2, t])) for t in taps)
    dilation = draw(st.tuples(*[st.sampled_from([1, 1, 2])] * 3))
    padding = draw(st.tuples(*[st.sampled_from([(0, 0), (0, 0), (1, 0), (1, 1)])] * 3))
    extra = draw(st.tuples(*[st.integers(0, 1)] * 3))
    groups = draw(st.sampled_from([1, 1, 2]))
    spatial = [
        transposed_extent(o, lower, upper, t, s, d, min(e, s - 1))
        for o, (lower, upper), t, s, d, e in zip(outputs, padding, taps, stride, dilation, extra, strict=True)
    ]
    assume(min(spatial) >= 1)
    N, C, K = draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    g = ConvGeometry.forward((N, C, *spatial), (K, C // groups, *taps), stride, padding, dilation, groups)
    strides = []
    for shape in shapes(g):
        order = draw(st.sampled_from(ORDERS))
        room = [e + draw(st.sampled_from([0, 0, 0, 1])) for e in shape]
        strides.append(dense(room, order))
    return g, Strides(*strides)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(problems(), st.sampled_from(Role))
@example((CASES["patches"], Strides(*(dense(s, CHANNELS_LAST) for s in shapes(CASES["patches"])))), FPROP)
def test_the_canonical_form_of_anything_computes_the_same(problem, role):
    assert_same_memory(*problem, role)


def canonical_dense(g, role, *orders):
    orders = orders if len(orders) == 3 else orders * 3
    strides = Strides(*(dense(shape, order) for shape, order in zip(shapes(g), orders, strict=True)))
    return assert_same_memory(g, strides, role)


@pytest.mark.parametrize("role", Role)
def test_a_1x1_convolution_becomes_a_matrix_product(role):
    for name, order in itertools.product(("1x1", "1x1x1"), (CHANNELS_LAST,)):
        g, strides, steps = canonical_dense(CASES[name], role, order)
        assert (g.N, g.input, g.output) == (1, (1, 1, CASES[name].N * math.prod(CASES[name].input)), g.input)
        assert (strides.x[4], strides.x[1]) == (CASES[name].C, 1)
        assert steps[-1] == "fold N into pixels"


@pytest.mark.parametrize("role", Role)
def test_a_contiguous_1x1_convolution_keeps_its_batch(role):
    g, strides, _ = canonical_dense(CASES["1x1"], role, CONTIGUOUS)
    assert (g.N, g.input) == (2, (1, 1, 20))
    assert (strides.x[0], strides.x[4]) == (60, 1)
    g, _, _ = canonical_dense(CASES["1x1 one pixel"], role, CONTIGUOUS)
    assert (g.N, g.input) == (1, (1, 1, 3))


@pytest.mark.parametrize("role", Role)
def test_a_patch_embedding_becomes_a_matrix_product(role):
    """In channels-last memory the S taps of a row of a patch lie together with its channels."""
    g, _, steps = canonical_dense(CASES["patches"], role, CHANNELS_LAST)
    assert g.C == 3 * 2
    assert g.filter == (1, 2, 1)
    assert "fold the taps of W into channels" in steps


@pytest.mark.parametrize("role", Role)
def test_a_patch_embedding_of_one_channel_folds_in_any_memory(role):
    for order in (CONTIGUOUS, CHANNELS_LAST):
        g, _, steps = canonical_dense(CASES["patches of a gray image"], role, order)
        assert g.C == 3
        assert "fold the taps of W into channels" in steps


@pytest.mark.parametrize("role", Role)
def test_a_filter_of_the_size_of_the_image_becomes_a_matrix_product(role):
    for order in (CONTIGUOUS, CHANNELS_LAST):
        g, _, _ = canonical_dense(CASES["whole image"], role, order)
        assert (g.N, g.C, g.K, g.taps, g.input, g.output) == (1, 24, 5, 1, (1, 1, 2), (1, 1, 2))


@pytest.mark.parametrize("name", ["patches with a rest", "patches grouped", "3x3", "3x3 depthwise"])
def test_taps_stay_where_they_cannot_fold(name):
    g, _, _ = canonical_dense(CASES[name], FPROP, CHANNELS_LAST)
    assert (g.C, g.filter) == (CASES[name].C, CASES[name].filter)


@pytest.mark.parametrize("role", [FPROP, WGRAD])
def test_a_strided_1x1_convolution_is_sampled(role):
    original = CASES["1x1 strided"]
    g, strides, steps = canonical_dense(original, role, CHANNELS_LAST)
    assert g.stride == (1, 1, 1)
    assert g.input == g.output
    assert strides.x[4] == 2 * original.C
    assert {"sample H by its stride", "sample W by its stride"} <= set(steps)


def test_the_input_gradient_of_a_strided_1x1_convolution_writes_what_nobody_read():
    original = CASES["1x1 strided"]
    g, _, steps = canonical_dense(original, DGRAD, CHANNELS_LAST)
    assert (g.input, g.stride) == (original.input, original.stride)
    assert not any("sample" in step for step in steps)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("order", [CONTIGUOUS, CHANNELS_LAST])
def test_unit_axes_move_to_the_front(role, order):
    tall = forward((2, 3, 5, 1), (4, 3, 3, 1), padding=((1, 1), 0))
    g, _, steps = canonical_dense(tall, role, order)
    assert (g.input, g.filter, g.padding[2]) == ((1, 1, 5), (1, 1, 3), (1, 1))
    assert "unit axes first" in steps


@pytest.mark.parametrize("role", Role)
def test_a_filter_along_one_axis_leaves_the_others_as_pixels(role):
    """The frames of a (1, 3, 3) filter stay apart; under (3, 1, 1) the pixels of a frame are one axis."""
    g, _, _ = canonical_dense(forward((2, 3, 4, 5, 6), (4, 3, 3, 1, 1), padding=((1, 1), 0, 0)), role, CHANNELS_LAST)
    assert sorted(g.input) == [1, 4, 30]
    assert g.taps == 3


@pytest.mark.parametrize("role", Role)
def test_nothing_happens_to_a_plain_3x3_convolution(role):
    assert canonical_dense(CASES["3x3"], role, CHANNELS_LAST)[0] == CASES["3x3"]
    assert canonical_dense(CASES["3x3"], role, CHANNELS_LAST)[2] == ()


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("g", CASES.values(), ids=CASES)
@pytest.mark.parametrize("order", ORDERS)
def test_the_canonical_form_is_its_own_canonical_form(g, role, order):
    small, strides, _ = canonical_dense(g, role, order)
    assert canonical(small, strides, role) == (small, strides, ())
