"""Offsets beyond 2^31 and 2^32, through every kernel, in memory that is taken only where it is touched."""

from dataclasses import replace

import far
import far_kernels
import pytest
import torch
from far_kernels import SUBJECTS

from triton_conv import cost, plan, ways
from triton_conv.causal_config import CausalConfig, CausalProblem, CausalRole
from triton_conv.causal_plan import CausalPlan
from triton_conv.config import BandedConfig, Config, DepthwiseConfig
from triton_conv.devices import H200
from triton_conv.geometry import ConvGeometry, Role, Strides

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs sparse memory, which only the host has")

AXES = {"images": 0, "channels": 1, "rows": 3, "columns": 4}

# Boxes are fetched and stored by descriptors, whose strides are 64 bits wide whatever the kernel is told.
_DESCRIBED = ("box", "streaming boxes", "branches boxes")
# Those of causal kernels are 64 bits wide always.
_NO_OFFSETS = {name for name in SUBJECTS if name.startswith((*_DESCRIBED, "causal"))}
_NO_OFFSETS -= {"box wgrad whole", *(name for name in SUBJECTS if "pointers" in name)}
_QUICK = {"gather", "wgrad channels-last", "depthwise", "banded", "separable", "box pointers fused"}
_QUICK |= {"streaming boxes one frame", "branches boxes"}
_THOROUGH = {"gather", "depthwise", "banded", "box pointers fused"}
_ONCE = ("streaming ", "branches ", "box fused", "box in parts", "box planes", "box wgrad whole")

# Kernels of elements in a row, which have no strides, and who runs their last ones.
_IN_A_ROW = {"activation_backward_kernel": "test_the_last_elements_of_elementwise_kernels"}


def _plans():
    """Of every subject, in memory far apart along rows, or where it has none along images."""
    for subject in SUBJECTS.values():
        strides = next(far for far in map(subject.far, (3, 0)) if far != subject.near())
        yield subject, subject.plan(strides | subject.alike(strides))


def test_every_kernel_is_run_in_memory_far_apart(kernels):
    """One that is new needs a line in `far_kernels.SUBJECTS`, or a test of its own in `_IN_A_ROW`."""
    reached = {launch.kernel.fn.__name__ for _, made in _plans() for launch in made.launches}
    assert not reached & _IN_A_ROW.keys()
    assert reached | _IN_A_ROW.keys() == far_kernels.launched().keys()
    assert all(callable(globals()[test]) for test in _IN_A_ROW.values())


def test_boxes_are_run_however_they_are_stored(kernels):
    found = set()
    for _, made in _plans():
        for launch in made.launches:
            a = launch.arguments
            if launch.name == "box":
                stored = "box" if a["STORE_BOX"] else "planes" if a["STORE_PLANES"] else "pointers"
                context = ("one frame" if a["ONE_FRAME"] else "frames") if a["CONTEXT"] else ""
                found.add((stored, a["RESIDUAL"], a["PARTS"], context))
    stores = {(stored, fused) for stored, fused, _, context in found if not context}
    assert stores >= {(s, fused) for s in ("box", "pointers") for fused in ("", "before", "after")}
    assert ("planes", "before") in stores
    assert {(parts, stored) for stored, _, parts, _ in found} >= {(2, "box"), (2, "pointers")}
    assert {context for _, _, _, context in found} == {"", "frames", "one frame"}


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _cases():
    for name, subject in SUBJECTS.items():
        for where, axis in AXES.items():
            asked = where == "rows" or name in _THOROUGH or (where == "images" and not name.startswith(_ONCE))
            if asked and subject.far(axis) != subject.near():
                quick = name in _QUICK and where == "rows"
                yield pytest.param(name, axis, id=f"{name}-{where}", marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "axis"), list(_cases()))
def test_strides_of_all_operands_beyond_32_bits(name, axis, kernels):
    """The same bits as in dense memory, where nothing overflows; and others with offsets of 32 bits."""
    subject = SUBJECTS[name]
    want, made = far_kernels.run(subject, subject.near())
    assert _bits(made) == 32
    assert all(t.isfinite().all() and t.any() for t in want)
    with far.no_overflow():
        found, made = far_kernels.run(subject, subject.far(axis))
    assert _same(found, want)
    if not name.startswith("causal"):
        assert _bits(made) == 64
    if name not in _NO_OFFSETS:
        assert not _same(far_kernels.run(subject, subject.far(axis), bits=32)[0], want)


def _bits(made):
    """The widest offsets of a plan's kernels."""
    fold = getattr(made, "fold", None)
    if isinstance(made, CausalPlan):
        return made.index_bits
    return max(made.numerics.index_bits, fold.numerics.index_bits if fold else 0)


def test_rows_further_apart_than_32_bits_count_in_vectors(kernels):
    """The stride is a number of 32 bits in vectors of four, and none in elements."""
    g = ConvGeometry.forward((1, 2, 3, 16), (2, 1, 2, 3), padding=((0, 0), (1, 1)), groups=2)
    for role in (Role.FPROP, Role.WGRAD):
        subject = far_kernels.Convolution(role, g, DepthwiseConfig(1, 8, 4, 2, 4, (2, 3)))
        far_apart = subject.near() | {"x": (32, 16, 2**34, 2**32, 1)}
        with far.no_overflow():
            assert _same(far_kernels.run(subject, far_apart)[0], far_kernels.run(subject, subject.near())[0])


def _line(role, length, dtype="float16", mode="zeros", **options):
    """A convolution of one channel of so many positions, as numbers."""
    modes = {"modes": (mode,)} if mode != "zeros" else {}
    g = ConvGeometry.forward((1, 1, length), (1, 1, 3), padding=((1, 1),), **modes)
    strides = Strides(*(far.dense(g.shape(name)) for name in "xwy"))
    return ways.Problem(role, g, dtype, dtype, strides, "ieee", False, False, True, H200, **options)


def _ends(length, *live):
    """A line of zeros but for its first and its last elements."""
    x = far.empty((1, 1, 1, 1, length), (length, length, length, length, 1), torch.float16)
    x[..., 0], x[..., -3:] = 5, torch.tensor([1.0, 2, 3])
    return x


LENGTHS = [2**31 - 5, pytest.param(2**32 + 5, marks=pytest.mark.slow)]
_LINES = {
    "gather": Config(16, 16, 16, dot=False, flatten=True),
    "depthwise": DepthwiseConfig(2, 8, 4, 1, 8, (1, 3), walk=2),
    "depthwise down": DepthwiseConfig(4, 1, 4, 1, 1, (3, 1), walk=4),
    "banded": BandedConfig((1, 1, 16), 1, 16, 16),
}


@pytest.mark.parametrize("mode", ["zeros", pytest.param("circular", marks=pytest.mark.slow)])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kernel", _LINES)
def test_the_last_positions_of_a_line(kernel, length, mode, kernels):
    """Real extents, of which the first and the last programs of a launch are run."""
    problem = _line(Role.FPROP, length, mode=mode)
    if kernel == "banded" and length > 2**31 - 2**17:
        with pytest.raises(RuntimeError, match="longer than it counts"):
            plan.every(problem, _LINES[kernel])
        return
    made = plan.every(problem, _LINES[kernel])[0]
    assert made.kernel == kernel.split()[0]
    w = torch.tensor([1.0, 10, 100], dtype=torch.float16)
    y = far.empty((length,), (1,), torch.float16)
    y[-4:], y[:2] = torch.nan, torch.nan
    with far.no_overflow():
        (launch,) = made.launches
        far.run_some(launch, {"x": _ends(length), "w": w, "y": y}, [0, -2, -1])
    around = {"zeros": (0, 0), "circular": (3, 500)}[mode]
    assert y[-3:].tolist() == [10 + 200, 1 + 20 + 300, 2 + 30 + around[1]]
    assert y[0].item() == 50 + around[0]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kernel", ["wgrad", "depthwise_wgrad"])
def test_the_last_slab_of_a_line(kernel, length, kernels):
    config = {
        "wgrad": Config(16, 16, 16, dot=False, flatten=True, splits=2**26),
        "depthwise_wgrad": DepthwiseConfig(2, 8, 4, 1, 8, (1, 3), splits=2**27),
    }[kernel]
    problem = _line(Role.WGRAD, length)
    steps = cost.TILES[kernel](Role.WGRAD, problem.geometry, replace(config, splits=1)).longest
    config = replace(config, splits=-(-steps // -(-steps // config.splits)))  # the last one has a step at least
    made = plan.every(problem, config)[0]
    assert made.kernel == kernel
    slabs = far.empty((config.splits, 3), (3, 1), torch.float32)
    tensors = {"x": _ends(length), "y": _ends(length), "workspace": slabs}
    with far.no_overflow():
        launch, _ = made.launches
        far.run_some(launch, tensors, range(-8, 0))
    # dy of the last three is 1, 2, 3 too, and no slab but the last ones has seen them
    assert slabs[-8:].sum(0).tolist() == [1 * 2 + 2 * 3, 1 + 4 + 9, 1 * 2 + 2 * 3]


def _causal(role, C, L, rows, config):
    """A plan for one sequence, and its tensors: the last three positions of the last channel are 1, 2, 3."""
    apart = (0, C) if rows else (0, L)
    dtypes = ("float32", "float32", None)
    where = {"x": apart, "y": apart, "dx": apart} | ({"state": (3 * C, 3, 1)} if role is CausalRole.UPDATE else {})
    if role is CausalRole.UPDATE:
        where |= {"x": (C * L, L, 1), "y": (C * L, L, 1), "dx": ()}
    state = role is CausalRole.UPDATE
    p = CausalProblem(role, 1, C, L, 4, *dtypes, False, state, rows, H200, **where)
    made = CausalPlan(p, config)
    strides = (C * L, 1, C) if rows else (C * L, L, 1)
    t = {name: far.empty((1, C, L), strides, torch.float32) for name in ("x", "y", "dy", "dx")}
    t |= {"w": far.empty((C, 4), (4, 1), torch.float32), "state": far.empty((1, C, 3), (3 * C, 3, 1), torch.float32)}
    slabs = made.workspace_shape or (1, 1, 1)
    t["slabs"] = far.empty(slabs, far.dense(slabs), torch.float32)
    few = min(L, 3)
    t["w"][-1], t["x"][0, -1, -few:], t["dy"][0, -1, -few:] = torch.tensor([1.0, 2, 4, 8]), _LAST[-few:], 1
    for name in ("y", "dx"):
        t[name][0, -1, -few:] = torch.nan
    return made, t


_LAST = torch.tensor([1.0, 2, 3])


def _beyond(t, count=4096):
    """What lies behind the last element of a tensor."""
    return t.as_strided((count,), (1,), t.storage_offset() + far.span(t.shape, t.stride()))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_last_positions_of_a_sequence(length, rows, kernels):
    """No position wraps around: what would seem to lie in the sequence again is behind its end, and not written."""
    config = CausalConfig(8, 16, 4, splits=-(-length // 128))
    for role in (CausalRole.FORWARD, CausalRole.BACKWARD):
        made, t = _causal(role, 1, length, rows, config)
        assert made.index_bits == 64
        with far.no_overflow():
            far.run_some(made.launches[0], t, [-2, -1])
        assert not any(_beyond(t[name]).any() for name in ("y", "dx"))
        if role is CausalRole.FORWARD:
            assert t["y"][0, 0, -3:].tolist() == [8, 4 + 16, 2 + 8 + 24]
        else:
            assert t["dx"][0, 0, -3:].tolist() == [8 + 4 + 2, 8 + 4, 8]
            assert t["slabs"][-2:, :, 0].sum(0).tolist() == [0, 1, 1 + 2, 1 + 2 + 3]


@pytest.mark.parametrize("role", CausalRole)
def test_the_last_channels_of_many_sequences(role, kernels):
    """Their taps lie beyond 2^31."""
    made, t = _causal(role, 2**29 + 5, 1, role is not CausalRole.UPDATE, CausalConfig(4, 1, 16))
    with far.no_overflow():
        far.run_some(made.launches[0], t, [-1])
    if role is CausalRole.BACKWARD:
        assert t["dx"][0, -1].tolist() == [8]
        assert t["slabs"][0, :, -1].tolist() == [0, 0, 0, 3]
    else:
        assert t["y"][0, -1].tolist() == [24]
        assert t["state"][0, -1].tolist() == ([0, 0, 3] if role is CausalRole.UPDATE else [0, 0, 0])


@pytest.mark.parametrize("length", [2**31 - 5, 2**31 - 300])
def test_the_last_elements_of_elementwise_kernels(length, kernels):
    from triton_conv import activation_plan
    from triton_conv.kernels import wgrad

    problem = activation_plan.ActivationProblem(length, "float16", "relu", 0.0, False, H200)
    (launch,) = activation_plan.make(problem).launches
    tensors = {name: far.empty((length,), (1,), torch.float16) for name in ("dy", "saved", "dz")}
    tensors["dy"][-3:], tensors["saved"][-3:] = torch.tensor([1.0, 2, 3]), torch.tensor([1.0, -1, 1])
    with far.no_overflow():
        far.run_some(launch, tensors, [-1])
    assert tensors["dz"][-3:].tolist() == [1, 0, 3]
    import triton.language as tl

    slabs, w = far.empty((2, length), (length, 1), torch.float16), far.empty((length,), (1,), torch.float16)
    slabs[:, -2:] = torch.tensor([[1.0, 2], [10, 20]])
    with far.no_overflow():
        far.run_some(wgrad.sum_launch(length, 2, tl.int64), {"workspace": slabs, "w": w}, [-1])
    assert w[-2:].tolist() == [11, 22]


@pytest.mark.parametrize("length", [2**30 + 10, 2**31 - 200])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_the_folded_border_of_a_line(mode, length, kernels):
    """An extent whose double is no number of 32 bits, with offsets of both widths."""
    made = plan.every(_line(Role.DGRAD, length, mode=mode), Config(16, 16, 16, dot=False))[0]
    fold = made.fold
    for bits in (fold.numerics.index_bits, 64):
        from triton_conv.kernels import fold as kernel

        numerics = fold.numerics._replace(index_bits=bits)
        launch = kernel.launch(fold.geometry, numerics, fold.padded_strides, fold.dx_strides)
        padded = far.empty((length + 2,), (1,), torch.float32)
        padded[:3], padded[-3:] = torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30])
        dx = far.empty((length,), (1,), torch.float16)
        far.run_some(launch, {"workspace": padded, "x": dx}, [0, -1])
        # the border on the left shows one position, that on the right another
        shows = {"reflect": (1, -2), "replicate": (0, -1), "circular": (-1, 0)}[mode]
        want = {0: 2.0, 1: 3.0, -2: 10.0, -1: 20.0}
        for place, value in zip(shows, (1, 30), strict=True):
            want[place] += value
        assert {place: dx[place].item() for place in want} == want
