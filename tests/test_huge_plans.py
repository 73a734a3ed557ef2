"""Plans at every boundary: elements, bytes, strides, grids and what descriptors hold, at the limit and beyond it."""

import ast
from dataclasses import replace
from pathlib import Path

import far
import far_kernels
import pytest
import torch
from far_kernels import SUBJECTS

import triton_conv
from triton_conv import (
    activation_plan,
    branches_plan,
    causal_config,
    causal_plan,
    deform_plan,
    plan,
    separable_plan,
    streaming_plan,
    tiles,
    ways,
)
from triton_conv.branches_problem import Problem as BranchesProblem
from triton_conv.branches_problem import Term
from triton_conv.config import BoxConfig, Config, DepthwiseConfig
from triton_conv.deform_config import DeformProblem, DeformRole
from triton_conv.devices import H200
from triton_conv.geometry import Context, ConvGeometry, Role, Strides

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs kernels in sparse memory, which only the host has"
)

BELOW, AT = 2**31 - 2**20, 2**31


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("extents", ["elements", "stride", "padding"])
def test_offsets_are_wide_from_two_to_the_31_on(extents, role):
    for config in (Config(16, 16, 16), DepthwiseConfig(2, 1, 4, 1, 1, (3, 1), walk=8)):
        for size, bits in ((BELOW, 32), (AT, 64), (AT + 1, 64), (2 * AT, 64), (4 * AT + 3, 64)):
            g = ConvGeometry.forward((1, 1, size if extents == "elements" else 8), (1, 1, 3), padding=((1, 1),))
            if extents == "padding":
                g = ConvGeometry.forward((1, 1, size // 2), (1, 1, 3), padding=((0, size // 2),), modes=("circular",))
            x = (1, 1, 1, 1, -(-size // 7)) if extents == "stride" else far.dense(g.shape("x"))
            what = Strides(x, far.dense(g.shape("w")), far.dense(g.shape("y")))
            assert (plan._reach(g, what, role, config) >= 2**31) == (bits == 64), (config, size)


def test_lanes_that_dilation_leaves_empty_are_counted():
    """Of one row three rows of lanes: there are more lanes than positions."""
    g = ConvGeometry.forward((2**29, 1, 1, 2), (1, 1, 3, 1), padding=((3, 3), (0, 0)), dilation=(3, 1))
    what = Strides(*(far.dense(g.shape(name)) for name in "xwy"))
    assert plan._reach(g, what, Role.FPROP, DepthwiseConfig(2, 1, 4, 1, 1, (3, 1))) >= 2**31
    assert plan._reach(g, what, Role.FPROP, Config(16, 16, 16)) < 2**31


def _box_problem(shape, filters, strides=None, **options):
    g = ConvGeometry.forward(shape, filters, **options)
    given = Strides(*(far.dense(g.shape(name), last=True) for name in "xwy"))
    return ways.Problem(Role.FPROP, g, "float16", "float16", strides or given, "ieee", False, False, True, H200)


def _kernels(problem):
    return [p.kernel for p in plan.every(problem)]


def test_boxes_stay_within_what_descriptors_hold():
    near = _box_problem((2, 16, 64, 64), (16, 16, 3, 3))
    assert _kernels(near) == ["box"]
    for axis in (0, 3):
        for stride, fits in ((2**39 - 8, True), (2**39, False), (2**39 + 4, False), (2**35 + 4, False)):
            x = tuple(stride if a == axis else s for a, s in enumerate(near.strides.x))
            found = _kernels(near._replace(strides=near.strides._replace(x=x)))
            assert ("box" in found and "gather" not in found) == fits, (axis, stride)
    longest = _box_problem((2**31 - 2**17 - 257, 16, 2, 2), (16, 16, 2, 2))
    assert _kernels(longest) == ["box"]
    assert "box" not in _kernels(_box_problem((2**31 - 2**17, 16, 2, 2), (16, 16, 2, 2)))


def test_a_stride_that_boxes_cannot_divide_by_is_gathered():
    assert _kernels(_box_problem((1, 16, 2**15), (16, 16, 3), stride=(2**13,))) == ["box"]
    assert _kernels(_box_problem((1, 16, 2**17), (16, 16, 3), stride=(2**15,))) == ["gather"]


@pytest.mark.parametrize(
    ("shape", "filters", "options", "match"),
    [
        ((1, 2**31, 1), (1, 2**31, 1), {}, "channels are more than"),
        ((1, 1, 2**31 + 2), (1, 1, 2**31), {}, "products of a sum are more than"),
        ((1, 4, 2**18), (4, 4, 3), {"stride": (65537,), "dilation": (65536,)}, "residue class .* more than"),
    ],
    ids=["channels", "taps", "steps"],
)
def test_what_kernels_cannot_count_is_refused_with_the_geometry(shape, filters, options, match):
    g = ConvGeometry.forward(shape, filters, **options)
    strides = Strides(*(far.dense(g.shape(name)) for name in "xwy"))
    problem = ways.Problem(Role.DGRAD, g, "float16", "float16", strides, "ieee", False, False, True, H200)
    with pytest.raises(NotImplementedError, match=f"{match}.*N{g.N} C{g.C} K{g.K}"):
        plan.every(problem)


def test_grids_are_refused_beyond_two_to_the_31_programs():
    """Only the first axis of a grid is used, which has room for 2^31 - 1."""
    for length, fits in ((2**35 - 16, True), (2**35, False)):
        g = ConvGeometry.forward((1, 1, length), (1, 1, 3), padding=((1, 1),))
        strides = Strides(*(far.dense(g.shape(name)) for name in "xwy"))
        problem = ways.Problem(Role.FPROP, g, "float16", "float16", strides, "ieee", False, False, True, H200)
        made = plan.every(problem, Config(16, 16, 16, dot=False))[0]
        if fits:
            assert made.launches[0].programs == 2**31 - 1
        else:
            with pytest.raises(RuntimeError, match=f"{2**31} programs.*N1 C1 K1"):
                _ = made.launches


# ---------------------------------------------------------------------------------------------------------------------
# Strides


def _reaching(subject, name, size):
    """Strides of which those of one operand span so many elements, or a few more: its images are far apart."""
    strides = subject.near()
    shape, dense = subject.shapes[name], strides[name]
    within = far.span(shape[1:], dense[1:])
    apart = -(-(size - within) // (shape[0] - 1))
    return strides | {name: (-(-apart // 8) * 8, *dense[1:])}


def _operands():
    for label, subject in SUBJECTS.items():
        # offsets of causal kernels have 64 bits always, those of slices that are written begin at their slice
        if not label.startswith("causal") and label != "branches boxes apart":
            for name in subject.shapes.keys() - subject.alike(subject.near()).keys():
                if len(subject.shapes[name]) == 5 and subject._movable(name, 0):
                    yield label, name


_MARGIN = 2**13  # tails of tiles, of dilation and of borders


@pytest.mark.parametrize(("label", "name"), sorted(_operands()))
def test_one_operand_that_spans_two_to_the_31_elements_has_wide_offsets(label, name, kernels):
    subject, bits = SUBJECTS[label], []
    for size in (2**31 - _MARGIN, 2**31, 2**32, 2**33 + 1):
        strides = _reaching(subject, name, size)
        made = subject.plan(strides | subject.alike(strides))
        fold = getattr(made, "fold", None)
        bits.append(max(made.numerics.index_bits, fold.numerics.index_bits if fold else 0))
    assert bits == [32, 64, 64, 64]


# What is read and what is written. Filters of banded kernels are left out: lanes past the last one overflow there, and
# are masked and moved to the first.
_QUICK = [("gather", "y"), ("box pointers", "y"), ("separable", "x"), ("box wgrad whole", "w")]
_LAST = [("gather", "x"), ("gather flattened", "x"), ("gather channels-last", "y"), ("gather dgrad folded", "x")]
_LAST += [("wgrad", "x"), ("depthwise", "x"), ("depthwise", "y"), ("depthwise wgrad", "x"), ("banded", "x")]
_LAST += [("banded", "y"), ("separable", "y"), ("streaming fused", "context"), ("box dgrad pointers", "x")]
_LAST += [("branches", "x0"), ("branches dgrad", "x0"), ("deformable forward", "offset")]


@pytest.mark.parametrize(("label", "name"), [*_QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in _LAST)])
def test_the_last_offsets_of_32_bits_do_not_overflow(label, name, kernels):
    subject = SUBJECTS[label]
    strides = _reaching(subject, name, 2**31 - _MARGIN)
    with far.no_overflow():
        found, made = far_kernels.run(subject, strides)
    assert made.numerics.index_bits == 32
    want, _ = far_kernels.run(subject, subject.near())
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Elements of kernels without strides, and positions and channels of causal ones


def test_elements_in_a_row_are_counted_with_the_last_block(kernels):
    for total, bits in ((2**31 - 1025, 32), (2**31 - 1024, 64), (2**31, 64), (2**32 + 1, 64)):
        problem = activation_plan.ActivationProblem(total, "float16", "relu", 0.0, False, H200)
        (launch,) = activation_plan.make(problem).launches
        assert str(launch.arguments["INDEX"]) == f"int{bits}", total


def _causal(C, L, role=causal_config.CausalRole.FORWARD, rows=False, W=4):
    outer = C if rows else L
    how = (0, outer if (L if rows else C) > 1 else 0)
    dtypes = ("float16", "float16", None)
    return causal_config.CausalProblem(role, 1, C, L, W, *dtypes, False, False, rows, H200, x=how, y=how, dx=how)


@pytest.mark.parametrize("rows", [False, True])
def test_positions_of_causal_kernels_are_counted_with_those_beyond_the_end(rows):
    for role in (causal_config.CausalRole.FORWARD, causal_config.CausalRole.BACKWARD):
        below, *beyond = (causal_plan.make(_causal(2, n, role, rows)) for n in (2**31 - 2**26, 2**31 - 5, 2**31, 2**32))
        assert below.index_bits == 32
        assert [p.index_bits for p in beyond] == [64, 64, 64]
        assert below.compiled_for != beyond[0].compiled_for


def test_taps_of_all_channels_of_causal_kernels_are_counted():
    for C, bits in ((2**29 - 2**11, 32), (2**29, 64), (2**31, 64)):
        assert causal_plan.make(_causal(C, 2, rows=True)).index_bits == bits


# ---------------------------------------------------------------------------------------------------------------------
# Grids


def _images(N, filters=(16, 16, 1, 1), size=4, groups=1):
    """So many images of 16 positions: each is a tile."""
    g = ConvGeometry.forward((N, 16, size, size), filters, groups=groups)
    return g, {name: far.dense(g.shape(name)) for name in "xwy"}


def _gathered(N):
    g, s = _images(N)
    problem = ways.Problem(Role.FPROP, g, "float32", "float32", Strides(**s), "ieee", False, False, True, H200)
    return plan.every(problem, Config(16, 16, 16))[0]


def _streamed(N):
    g, s = _images(N)
    p = streaming_plan.Problem(g, Context(0, s["x"]), "float32", "ieee", *s.values(), False, (), H200)
    layout = ways.Layout((), True, 1, g, Strides(**s), ())
    return streaming_plan._assembled(p, ways.Way("gather", layout, Config(16, 16, 16), ""))


def _deformed(role, N):
    g, s = _images(N)
    p = DeformProblem(role, g, 1, "float32", "ieee", Strides(**s), (32, 16, 16, 4, 1), (), False, H200, "float32")
    return deform_plan._assembled(p, Config(16, 16, 16), copies=False)


def _separated(N):
    g, s = _images(N, (16, 1, 1, 1), groups=16)
    p = separable_plan.Problem(g, 16, "float32", "ieee", *s.values(), s["y"], False, False, H200)
    p = p._replace(pointwise=(16, 1, 1, 1, 1))
    return separable_plan._assembled(p, g, Config(16, 16, 16))


def _activated(N):
    problem = activation_plan.ActivationProblem(1024 * N, "float16", "relu", 0.0, False, H200)
    return activation_plan.make(problem)


def _stepped(N):
    how = ("float32", "float32", None, False, True, False, H200)
    role = causal_config.CausalRole.UPDATE
    p = causal_config.CausalProblem(role, N, 1, 1, 2, *how, x=(1, 1, 1), y=(1, 1, 1), state=(1, 1, 1))
    return causal_plan.make(p)


_GRIDS = {
    "convolution": _gathered,
    "streaming": _streamed,
    "separable": _separated,
    "activation": _activated,
    "causal update": _stepped,
    **{
        role.value: lambda N, role=role: _deformed(role, N)
        for role in (DeformRole.FORWARD, DeformRole.INPUT, DeformRole.OFFSET)
    },
}


@pytest.mark.parametrize("family", _GRIDS)
def test_a_grid_holds_two_to_the_31_less_one_programs(family, kernels):
    assert max(launch.programs for launch in _GRIDS[family](2**31 - 1).launches) == 2**31 - 1
    with pytest.raises(RuntimeError, match=f"{2**31} programs is more than a grid holds"):
        _ = _GRIDS[family](2**31).launches


def test_kernels_number_their_programs_along_the_first_axis():
    """The others have room for 65535."""
    asked = []
    for path in (Path(triton_conv.__file__).parent / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("program_id", "num_programs"):
                asked.append([ast.literal_eval(a) for a in node.args] + [k.arg for k in node.keywords])
    assert len(asked) > 20
    assert all(axes == [0] for axes in asked)


def _branched(N, config, dtype="float16", stride=None, aligned=True):
    g, s = _images(N, size=8)
    s = {name: far.dense(g.shape(name), last=True) for name in s}
    x = s["x"] if stride is None else (stride, *s["x"][1:])
    terms = tuple(Term(i, i, g, s["w"], False) for i in range(2))
    p = BranchesProblem(
        Role.FPROP, terms, dtype, "ieee", x, far.dense((N, 32, 1, 8, 8), True), (16, 32), aligned, True, H200
    )
    return branches_plan.every(p) if config is None else branches_plan._assembled(p, p, *config, "")


@pytest.mark.parametrize(
    "config",
    [("gather_branches", Config(64, 16, 16)), ("box_branches", BoxConfig((1, 1, 8, 8), 16, 16))],
    ids=lambda config: config[0],
)
def test_tiles_of_all_branches_are_counted_together(config, kernels):
    """Two of each image. Programs take turns, so that the grid is small, and tiles count in 32 bits."""
    (launch,) = _branched((tiles.COUNTED - 1) // 2, config).launches
    assert launch.programs < 2**16
    with pytest.raises(NotImplementedError, match=f"{tiles.COUNTED} tiles are more than kernels count"):
        _branched(tiles.COUNTED // 2, config)


def test_tiles_of_boxes_are_counted():
    g, s = _images(tiles.COUNTED, size=4)
    p = streaming_plan.Problem(g, Context(0, s["x"]), "float16", "ieee", *s.values(), False, (), H200)
    way = ways.Way("box", ways.Layout((), True, 1, g, Strides(**s), ()), BoxConfig((1, 1, 4, 4), 16, 16), "")
    with pytest.raises(NotImplementedError, match=f"{tiles.COUNTED} tiles are more than kernels count"):
        streaming_plan._assembled(p, way)
    fewer = replace(g, N=tiles.COUNTED - 1)
    streaming_plan._assembled(p._replace(geometry=fewer), way)


# ---------------------------------------------------------------------------------------------------------------------
# Descriptors


# Of elements of two bytes, and whether a descriptor holds them: below 2^40 bytes, in whole 16 bytes, and not 0.
_DESCRIBED = [(2**39 - 8, True), (2**39, False), (2**35 + 4, False), (2**35, True), (0, False)]


@pytest.mark.parametrize(("stride", "fits"), _DESCRIBED)
def test_descriptors_of_branches(stride, fits):
    kernels = [p.kernel for p in _branched(3, None, stride=stride)]
    assert kernels == (["box_branches"] if fits else ["gather_branches"])


@pytest.mark.parametrize(("stride", "fits"), _DESCRIBED)
@pytest.mark.parametrize("name", ["x", "context"])
def test_descriptors_of_chunks(name, stride, fits):
    """What a descriptor does not hold is copied."""
    g = ConvGeometry.forward((3, 16, 5, 8, 8), (16, 16, 3, 1, 1))
    s = {n: far.dense((3, 16, frames, 8, 8), True) for n, frames in (("x", 3), ("context", 2))}
    s[name] = (stride, *s[name][1:])
    filters, y = far.dense(g.shape("w"), True), far.dense(g.shape("y"), True)
    p = streaming_plan.Problem(g, Context(2, s["context"]), "float16", "ieee", s["x"], filters, y, False, (), H200)
    made = streaming_plan.make(p)
    assert made.kernel == "box"
    assert made.packs == (() if fits else (name,))


def test_what_starts_between_16_bytes_is_not_described():
    assert [p.kernel for p in _branched(3, None, aligned=False)] == ["gather_branches"]
    problem = _box_problem((2, 16, 64, 64), (16, 16, 3, 3))
    assert "box" not in _kernels(problem._replace(aligned=False))


def test_filters_that_lie_on_each_other_are_not_described():
    """An expanded weight: a descriptor's strides are more than 0."""
    problem = _box_problem((2, 16, 64, 64), (16, 16, 3, 3))
    for w in ((0, 1, 0, 48, 16), (16, 1, 0, 0, 0)):
        assert _kernels(problem._replace(strides=problem.strides._replace(w=w))) == ["gather"]
    g = ConvGeometry.forward((3, 16, 5, 8, 8), (16, 16, 3, 1, 1))
    x, context, y = (far.dense((3, 16, frames, 8, 8), last=True) for frames in (3, 2, 3))
    for filters in ((0, 1, 16, 0, 0), (16, 1, 0, 0, 0)):
        p = streaming_plan.Problem(g, Context(2, context), "float16", "ieee", x, filters, y, False, (), H200)
        assert streaming_plan.make(p).kernel == "gather"


def test_sides_of_a_box():
    BoxConfig((1, 1, 1, 256), 256, 256)
    for sides in (((1, 1, 1, 512), 16, 16), ((1, 1, 1, 16), 512, 16), ((1, 1, 1, 16), 16, 512)):
        with pytest.raises(ValueError, match="256 or less"):
            BoxConfig(*sides)
