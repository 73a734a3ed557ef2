"""Offsets beyond 2^31 and 2^32, through every kernel and in plans: tensors lie far apart in memory that nobody touches."""

from dataclasses import replace
from functools import partial

import far
import pytest
import torch

from triton_conv import branches_plan, deform_plan, deform_run, plan, separable_plan, streaming_plan, ways
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
            self.shapes |= {name: (geometry.K,) for name in ("bias", "scale")}
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
        self.geometry = ConvGeometry.forward((3, 16, 5, 3, 4), (16, 16, 3, 3, 3), padding=((0, 0), (1, 1), (1, 1)))
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


def _run(subject, strides, bits=None, **mutated):
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


def _far(subject, axis, names=None):
    """Strides of which that of one axis is so long that offsets leave 32 bits; the axis of filters is that of images."""
    strides = _near(subject)
    for name, shape in subject.shapes.items():
        if (names and name not in names) or len(shape) == 1 or not _movable(subject, name, axis):
            continue
        step = next(step for step in _STRIDES if (shape[axis] - 1) * step >= 2**31 - 2**11 or step == _STRIDES[-1])
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
_DEPTHWISE = ConvGeometry.forward((3, 8, 3, 8), (8, 1, 3, 3), padding=((1, 1), (1, 1)), groups=8)
_ODD = ConvGeometry.forward((3, 2, 3, 9), (2, 1, 3, 3), padding=((1, 1), (1, 1)), groups=2)
_FUSED = Epilogue("relu", residual="before", scale=True, keep=True)
_LANES = DepthwiseConfig(2, 4, 4, 4, 4, (3, 3))
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
    "branches": Branches(Role.FPROP),
    "branches dgrad": Branches(Role.DGRAD),
    **{f"deformable {role.value}": Deformable(role) for role in DeformRole},
}
AXES = {"images": 0, "channels": 1, "rows": 3, "columns": 4}
