"""Offsets beyond 2^31 and 2^32, through every kernel and in plans, in memory that is taken only where it is touched."""

from dataclasses import replace

import far
import pytest
import torch

from triton_conv import branches_plan, cost, deform_plan, deform_run, plan, separable_plan, streaming_plan, ways
from triton_conv.branches_problem import Problem as BranchesProblem
from triton_conv.branches_problem import Term
from triton_conv.config import BandedConfig, BoxConfig, Config, DepthwiseConfig
from triton_conv.deform_config import DeformProblem, DeformRole
from triton_conv.devices import H200
from triton_conv.epilogue import PLAIN, Epilogue
from triton_conv.geometry import Context, ConvGeometry, Role, Strides

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs sparse memory, which only the host has")

_WRITTEN = {Role.FPROP: "y", Role.DGRAD: "x", Role.WGRAD: "w"}
_STRIDES = (2**30 + 2**10, 2**32 + 2**10)  # the second, counted in vectors of eight, is a number of 32 bits


class Convolution:
    """A role of a geometry by the kernel of a config: plans of it for any strides, and its operands."""

    def __init__(self, role, geometry, config, dtype="float32", last=False, epilogue=PLAIN, bias=False):
        self.role, self.geometry, self.config, self.dtype = role, geometry, config, dtype
        self.last, self.epilogue, self.bias, self.written = last, epilogue, bias, (_WRITTEN[role],)
        self.slabs = config.splits > 1
        self.shapes = {name: geometry.shape(name) for name in "xwy"}
        if bias:
            self.shapes |= dict.fromkeys(("bias", "scale"), (geometry.K,))
        if epilogue != PLAIN:
            self.written += ("kept",)
            self.shapes |= dict.fromkeys(("residual", "kept"), geometry.shape(self.written[0]))

    def plan(self, strides):
        where = Strides(*(strides[name] for name in "xwy"))
        how = (where, "ieee", self.bias, False, True, H200, self.epilogue)
        problem = ways.Problem(self.role, self.geometry, self.dtype, self.dtype, *how)
        made = plan.every(problem, self.config)[0]
        assert not made.packs
        return made

    def alike(self, strides):
        """What lies as what is written does."""
        return dict.fromkeys({"residual", "kept"} & self.shapes.keys(), strides[self.written[0]])

    def run(self, made, tensors):
        if made.workspace_shape:
            dtype = getattr(torch, made.workspace_dtype)
            tensors = {**tensors, "workspace": torch.full(made.workspace_shape, torch.nan, dtype=dtype)}
        for launch in made.launches:
            launch.run(tensors)


class Separable(Convolution):
    def __init__(self, last=False):
        self.geometry = ConvGeometry.forward((3, 16, 3, 4), (16, 1, 3, 3), padding=((1, 1), (1, 1)), groups=16)
        self.last, self.dtype, self.written, self.slabs = last, "float32", ("y",), True
        g = self.geometry
        self.shapes = {"x": g.shape("x"), "depthwise": g.shape("w"), "pointwise": (4, 16, 1, 1, 1)}
        self.shapes["y"] = (3, 4, 1, 3, 4)

    def plan(self, strides):
        where = (strides[name] for name in ("x", "depthwise", "pointwise", "y"))
        return separable_plan.make(
            separable_plan.Problem(self.geometry, 4, "float32", "ieee", *where, False, False, H200)
        )

    def alike(self, strides):
        return {}

    def run(self, made, tensors):
        for launch in made.launches:
            launch.run(tensors)


class Streaming(Separable):
    def __init__(self, last=False):
        super().__init__(last)
        self.geometry = ConvGeometry.forward((3, 16, 5, 3, 4), (16, 16, 3, 1, 1))
        g = self.geometry
        self.shapes = {"context": (3, 16, 2, 3, 4), "x": (3, 16, 3, 3, 4), "w": g.shape("w"), "y": g.shape("y")}

    def plan(self, strides):
        context = Context(2, strides["context"])
        where = (strides[name] for name in "xwy")
        p = streaming_plan.Problem(self.geometry, context, "float32", "ieee", *where, False, (), H200)
        made = streaming_plan.make(p)
        numerics = made.numerics
        made = streaming_plan.StreamingPlan(p, "gather", Config(16, 16, 16), numerics, (), "")
        return made


class Branches(Separable):
    def __init__(self, role, dtype="float16", last=True):
        super().__init__(last)
        self.role, self.dtype, self.written = role, dtype, (("y0",) if role is Role.FPROP else ("x0",))
        self.geometry = ConvGeometry.forward((3, 16, 3, 8), (16, 16, 3, 3), padding=((1, 1), (1, 1)))
        self.shapes = {"x": self.geometry.shape("x"), "y": self.geometry.shape("y")}
        self.shapes |= {f"w{i}": self.geometry.shape("w") for i in range(2)}
        self.shapes = {{"x": "x0", "y": "y0"}.get(name, name): shape for name, shape in self.shapes.items()}

    def plan(self, strides):
        terms = tuple(Term(i, 0, self.geometry, strides[f"w{i}"], False) for i in range(2))
        how = (strides["x0"], strides["y0"], (16, 16), True, True, H200)
        p = BranchesProblem(self.role, terms, self.dtype, "ieee", *how)
        return branches_plan._assembled(p, p, "gather_branches", Config(16, 16, 16), "")

    def run(self, made, tensors):
        source = "x" if self.role is Role.FPROP else "y"
        super().run(made, {**tensors, f"{source}1": tensors[f"{source}0"]})


class Deformable(Separable):
    def __init__(self, role, last=False):
        super().__init__(last)
        self.role = role
        self.written = {
            DeformRole.FORWARD: ("y",),
            DeformRole.INPUT: ("x",),
            DeformRole.WEIGHT: ("w",),
            DeformRole.OFFSET: ("doffset", "dmask"),
        }[role]
        g = ConvGeometry.forward((3, 4, 3, 4), (4, 4, 3, 3), padding=((1, 1), (1, 1)))
        self.geometry, self.shapes = g, {name: g.shape(name) for name in "xwy"}
        self.shapes |= {"offset": (3, 18, 1, 3, 4), "mask": (3, 9, 1, 3, 4)}
        if role is DeformRole.OFFSET:
            self.shapes |= {"doffset": self.shapes["offset"], "dmask": self.shapes["mask"]}

    def alike(self, strides):
        both = {"doffset": strides["offset"], "dmask": strides["mask"]}
        return both if self.role is DeformRole.OFFSET else {}

    def plan(self, strides):
        where = Strides(*(strides[name] for name in "xwy")), strides["offset"], strides["mask"]
        p = DeformProblem(self.role, self.geometry, 1, "float32", "ieee", *where, False, H200, "float32")
        made = deform_plan.with_config(p, None, Config(16, 16, 16, splits=2 if self.role is DeformRole.WEIGHT else 1))
        assert not made.packs
        return made

    def run(self, made, tensors):
        deform_run.launched(made, tensors)


def _values(subject, name):
    whole = torch.randint(
        -3, 4, subject.shapes[name], generator=torch.Generator().manual_seed(len(name) + ord(name[0]))
    )
    return whole / 4 if name in ("offset", "mask") else whole


def _run(subject, strides, bits=None):
    """(what was written, the plan), in memory of these strides; of offsets of `bits`, whatever the plan says."""
    strides = strides | subject.alike(strides)
    made = subject.plan(strides)
    if bits:
        made = replace(made, numerics=made.numerics._replace(index_bits=bits))
    tensors = {}
    for name, shape in subject.shapes.items():
        tensors[name] = t = far.empty(shape, strides[name], getattr(torch, subject.dtype))
        t.fill_(torch.nan) if name in subject.written else t.copy_(_values(subject, name))
    subject.run(made, tensors)
    return [tensors[name].clone() for name in subject.written], made


def _near(subject):
    strides = {name: far.dense(shape, subject.last) for name, shape in subject.shapes.items()}
    return strides | {name: (1,) for name in ("bias", "scale") if name in strides}


def _far(subject, axis):
    """Strides of which that of one axis is so long that offsets leave 32 bits."""
    strides = _near(subject)
    for name, shape in subject.shapes.items():
        if len(shape) == 1 or not _movable(subject, name, axis):
            continue
        step = _STRIDES[0 if shape[axis] > 2 else 1]
        strides[name] = tuple(step if a == axis else s for a, s in enumerate(strides[name]))
    return strides


def _movable(subject, name, axis):
    shape = subject.shapes[name]
    if name == "w" and "w" in subject.written and subject.slabs:
        return False  # slabs are dense, and so is their sum
    inner = min(a for a, s in enumerate(far.dense(shape, subject.last)) if s == 1 and shape[a] > 1)
    kept = subject.last or isinstance(getattr(subject, "config", None), BandedConfig)
    return shape[axis] > 1 and not (kept and axis == inner)


def _same(subject, a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


_G = ConvGeometry.forward((3, 16, 3, 4), (16, 16, 3, 3), padding=((1, 1), (1, 1)))
_DEPTHWISE = ConvGeometry.forward((3, 4, 3, 4), (4, 1, 3, 3), padding=((1, 1), (1, 1)), groups=4)
_ODD = ConvGeometry.forward((3, 3, 3, 9), (3, 1, 3, 3), padding=((1, 1), (1, 1)), groups=3)
_BOXES = ConvGeometry.forward((3, 16, 3, 8), (16, 16, 1, 3), padding=((0, 0), (1, 1)))
_BOX = BoxConfig((1, 1, 4, 8), 16, 16)
_FUSED = Epilogue("relu", residual="before", scale=True, keep=True)
_LANES = DepthwiseConfig(2, 4, 8, 4, 4, (3, 3))
_BANDS = BandedConfig((16, 1, 1), 1, 16, 16)
SUBJECTS = {
    "gather": Convolution(Role.FPROP, _G, Config(16, 16, 16), epilogue=_FUSED, bias=True),
    "gather channels-last": Convolution(Role.FPROP, _G, Config(16, 16, 16, filters_first=True), last=True),
    "gather flattened": Convolution(Role.FPROP, _G, Config(16, 16, 16, flatten=True)),
    "gather dgrad": Convolution(Role.DGRAD, _G, Config(16, 16, 16)),
    "wgrad": Convolution(Role.WGRAD, _G, Config(16, 16, 16, splits=2)),
    "wgrad channels-last": Convolution(Role.WGRAD, _G, Config(16, 16, 16), last=True),
    "depthwise": Convolution(Role.FPROP, _DEPTHWISE, _LANES, epilogue=_FUSED, bias=True),
    "depthwise dgrad channels-last": Convolution(Role.DGRAD, _DEPTHWISE, _LANES, last=True),
    "depthwise wgrad": Convolution(Role.WGRAD, _DEPTHWISE, _LANES),
    "banded": Convolution(Role.FPROP, _ODD, _BANDS, "float16", epilogue=_FUSED, bias=True),
    "banded dgrad": Convolution(Role.DGRAD, _ODD, _BANDS, "float16"),
    "banded wgrad": Convolution(Role.WGRAD, _ODD, _BANDS, "float16"),
    "separable": Separable(),
    "separable channels-last": Separable(last=True),
    "streaming": Streaming(),
    "box": Convolution(Role.FPROP, _BOXES, _BOX, "float16", last=True),
    "box dgrad": Convolution(Role.DGRAD, _BOXES, _BOX, "float16", last=True),
    "box wgrad": Convolution(Role.WGRAD, _BOXES, BoxConfig((1, 1, 1, 16), 16, 16, splits=2), "float16", last=True),
    "branches": Branches(Role.FPROP),
    "branches dgrad": Branches(Role.DGRAD),
    **{f"deformable {role.value}": Deformable(role) for role in DeformRole},
}
AXES = {"images": 0, "channels": 1, "rows": 3, "columns": 4}

# Boxes are fetched and stored by descriptors, whose strides are 64 bits wide whatever the kernel is told.
_NO_OFFSETS = {"box", "box dgrad", "box wgrad"}
_QUICK = {"gather", "wgrad channels-last", "depthwise", "banded", "separable"}
_THOROUGH = {"gather", "depthwise", "banded"}


def _cases():
    for name, subject in SUBJECTS.items():
        for where, axis in AXES.items():
            asked = where in ("rows", "images") or name in _THOROUGH
            if asked and _far(subject, axis) != _near(subject):
                quick = name in _QUICK and where == "rows"
                yield pytest.param(name, axis, id=f"{name}-{where}", marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "axis"), list(_cases()))
def test_strides_of_all_operands_beyond_32_bits(name, axis, kernels):
    """The same bits as in dense memory, where nothing overflows; and others with offsets of 32 bits."""
    subject = SUBJECTS[name]
    want, made = _run(subject, _near(subject))
    assert made.numerics.index_bits == 32
    assert all(t.isfinite().all() and t.any() for t in want)
    with far.no_overflow():
        found, made = _run(subject, _far(subject, axis))
    assert made.numerics.index_bits == 64
    assert _same(subject, found, want)
    if name not in _NO_OFFSETS:
        assert not _same(subject, _run(subject, _far(subject, axis), bits=32)[0], want)


def test_rows_further_apart_than_32_bits_count_in_vectors(kernels):
    """The stride is a number of 32 bits in vectors of four, and none in elements."""
    g = ConvGeometry.forward((1, 2, 3, 16), (2, 1, 2, 3), padding=((0, 0), (1, 1)), groups=2)
    for role in (Role.FPROP, Role.WGRAD):
        subject = Convolution(role, g, DepthwiseConfig(1, 8, 4, 2, 4, (2, 3)))
        far_apart = _near(subject) | {"x": (32, 16, 2**34, 2**32, 1)}
        with far.no_overflow():
            assert _same(subject, _run(subject, far_apart)[0], _run(subject, _near(subject))[0])


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
        problem = _line(Role.FPROP, length)
        made = plan.every(problem, Config(16, 16, 16, dot=False))[0]
        if fits:
            assert made.launches[0].programs == 2**31 - 1
        else:
            with pytest.raises(RuntimeError, match=f"{2**31} programs.*N1 C1 K1"):
                _ = made.launches
