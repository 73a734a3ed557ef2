"""Every kernel of the package with operands of any strides: what `test_huge` runs in memory far apart."""

import ast
from dataclasses import replace
from pathlib import Path

import far
import torch

import triton_conv
from triton_conv import branches_plan, causal_plan, deform_plan, deform_run, plan, separable_plan, streaming_plan, ways
from triton_conv.branches_problem import Problem as BranchesProblem
from triton_conv.branches_problem import Term
from triton_conv.causal_config import CausalProblem, CausalRole
from triton_conv.config import BandedConfig, BoxConfig, Config, DepthwiseConfig
from triton_conv.deform_config import DeformProblem, DeformRole
from triton_conv.devices import H200
from triton_conv.epilogue import PLAIN, Epilogue
from triton_conv.geometry import Context, ConvGeometry, Role, Strides

_WRITTEN = {Role.FPROP: "y", Role.DGRAD: "x", Role.WGRAD: "w"}
_STRIDES = (2**30 + 2**10, 2**32 + 2**10)  # the second, counted in vectors of eight, is a number of 32 bits


class Subject:
    """Plans of a kernel for operands of any strides, and how they run.

    `shapes` are those of the operands by name, `written` the names of outputs, `last` those whose channels lie side by
    side (or True for all). `fixed` are operands that lie dense whatever the others do.
    """

    dtype = "float32"
    last: object = False
    slabs = False
    kept_inner: object = ()  # operands whose innermost axis stays innermost
    written: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    fixed: tuple[str, ...] = ()

    def plan(self, strides):
        raise NotImplementedError

    def alike(self, strides):
        """What lies as what is written does."""
        return {}

    def run(self, made, tensors):
        for launch in made.launches:
            launch.run(tensors)

    def lies_last(self, name):
        return self.last is True or (self.last is not False and name in self.last)

    def near(self):
        """Strides of dense operands."""
        return {name: far.dense(s, len(s) == 5 and self.lies_last(name)) for name, s in self.shapes.items()}

    def far(self, axis):
        """Strides of which that of one axis is so long that offsets leave 32 bits."""
        strides = self.near()
        for name, shape in self.shapes.items():
            if len(shape) == 5 and self._movable(name, axis):
                step = _STRIDES[0 if shape[axis] > 2 else 1]
                strides[name] = tuple(step if a == axis else s for a, s in enumerate(strides[name]))
        return strides

    def _movable(self, name, axis):
        shape, last = self.shapes[name], self.lies_last(name)
        if name in self.fixed or (name == "w" and "w" in self.written and self.slabs):
            return False  # slabs are dense, and so is their sum
        inner = min(a for a, s in enumerate(far.dense(shape, last)) if s == 1 and shape[a] > 1)
        return shape[axis] > 1 and not ((last or self.kept_inner is True or name in self.kept_inner) and axis == inner)


class Convolution(Subject):
    """A role of a geometry by the kernel of a config."""

    def __init__(
        self, role, geometry, config, dtype="float32", last=False, epilogue=PLAIN, bias=False, kept_inner=(), kernel=""
    ):
        self.role, self.geometry, self.config, self.dtype = role, geometry, config, dtype
        self.last, self.epilogue, self.bias, self.written = last, epilogue, bias, (_WRITTEN[role],)
        self.slabs = config.splits > 1
        self.kept_inner = True if isinstance(config, BandedConfig) else kept_inner
        self.shapes = {name: geometry.shape(name) for name in "xwy"}
        channels = (geometry.C if role is Role.DGRAD else geometry.K,)
        if bias:
            self.shapes["bias"] = channels
        if epilogue.scale:
            self.shapes["scale"] = channels
        like = (*(("residual",) if epilogue.residual else ()), *(("kept",) if epilogue.keep else ()))
        self.written += ("kept",) if epilogue.keep else ()
        self.shapes |= dict.fromkeys(like, geometry.shape(self.written[0]))

    def plan(self, strides):
        where = Strides(*(strides[name] for name in "xwy"))
        how = (where, "ieee", self.bias, False, True, H200, self.epilogue)
        problem = ways.Problem(self.role, self.geometry, self.dtype, self.dtype, *how)
        made = plan.every(problem, self.config)[0]
        assert not made.packs
        return made

    def alike(self, strides):
        return dict.fromkeys({"residual", "kept"} & self.shapes.keys(), strides[self.written[0]])

    def lies_last(self, name):
        return super().lies_last(self.written[0] if name in ("residual", "kept") else name)

    def run(self, made, tensors):
        if made.workspace_shape:
            dtype = getattr(torch, made.workspace_dtype)
            tensors = {**tensors, "workspace": torch.full(made.workspace_shape, torch.nan, dtype=dtype)}
        super().run(made, tensors)


class Separable(Subject):
    slabs = True
    written = ("y",)

    def __init__(self, last=False):
        self.geometry = ConvGeometry.forward((3, 16, 3, 4), (16, 1, 3, 3), padding=((1, 1), (1, 1)), groups=16)
        self.last = last
        g = self.geometry
        self.shapes = {"x": g.shape("x"), "depthwise": g.shape("w"), "pointwise": (4, 16, 1, 1, 1)}
        self.shapes["y"] = (3, 4, 1, 3, 4)

    def plan(self, strides):
        where = (strides[name] for name in ("x", "depthwise", "pointwise", "y"))
        return separable_plan.make(
            separable_plan.Problem(self.geometry, 4, "float32", "ieee", *where, False, False, H200)
        )


class Streaming(Subject):
    """With `held` frames of context before three of x: fewer than the filter's two are repeated."""

    written = ("y",)

    def __init__(self, config=None, last=False, held=2, dtype="float32", epilogue=PLAIN):
        self.config, self.last, self.dtype, self.epilogue = config or Config(16, 16, 16), last, dtype, epilogue
        image = (3, 8 if isinstance(config, BoxConfig) else 4)
        self.geometry = g = ConvGeometry.forward((3, 16, 5, *image), (16, 16, 3, 1, 1))
        self.shapes = {"context": (3, 16, held, *image), "x": (3, 16, 3, *image), "w": g.shape("w"), "y": g.shape("y")}
        self.shapes |= {"residual": g.shape("y")} if epilogue.residual else {}
        self.shapes |= {"scale": (g.K,)} if epilogue.scale else {}
        self.shapes |= {"bias": (g.K,)} if epilogue != PLAIN else {}

    def alike(self, strides):
        return {"residual": strides["y"]} if "residual" in self.shapes else {}

    def lies_last(self, name):
        return super().lies_last("y" if name == "residual" else name)

    def plan(self, strides):
        before = strides["context"]
        if self.shapes["context"][2] < 2:
            before = (*before[:2], 0, *before[3:])
        context = Context(2, before)
        where = tuple(strides[name] for name in "xwy")
        has_bias = "bias" in self.shapes
        p = streaming_plan.Problem(
            self.geometry, context, self.dtype, "ieee", *where, has_bias, (), H200, epilogue=self.epilogue
        )
        kernel = "box" if isinstance(self.config, BoxConfig) else "gather"
        layout = ways.Layout((), True, 1, self.geometry, Strides(*where), ())
        made = streaming_plan._assembled(p, ways.Way(kernel, layout, self.config, ""))
        assert not made.packs
        return made


class Causal(Subject):
    """A depthwise one of a sequence; shapes have two axes of one beside B, C and L."""

    def __init__(self, role, last=False):
        self.role, self.last = role, last
        B, C, L, W = 3, 16, 24, 4
        self.shapes = {"x": (B, C, 1, 1, L), "w": (C, W), "bias": (C,), "state": (B, C, W - 1)}
        update = role is CausalRole.UPDATE
        if role is CausalRole.BACKWARD:
            self.written = ("dx", "dstate", "sums")
            self.shapes |= {"dy": self.shapes["x"], "dx": self.shapes["x"], "dstate": (B, C, W - 1)}
            self.shapes["sums"] = (W + 1, C)
            self.fixed = ("state", "dstate")
        else:
            self.written = ("y",)
            self.shapes["y"] = self.shapes["x"]
        if update:
            self.shapes["state"] = (B, C, 1, 1, W - 1)
        self.kept_inner = () if update else True

    def _strides(self, strides, name):
        B, C, _, _, L = strides[name]
        if self.role is CausalRole.UPDATE:
            return (B, C, L)
        return (B, L) if self.last else (B, C)

    def plan(self, strides):
        B, C, _, _, L = self.shapes["x"]
        backward = self.role is CausalRole.BACKWARD
        where = {"x": self._strides(strides, "x"), "y": self._strides(strides, "dy" if backward else "y")}
        if backward:
            where["dx"] = self._strides(strides, "dx")
        if self.role is CausalRole.UPDATE:
            where["state"] = self._strides(strides, "state")
        how = (self.dtype, self.dtype, self.dtype, True, True, bool(self.last), H200)
        return causal_plan.make(CausalProblem(self.role, B, C, L, 4, *how, **where))

    def run(self, made, tensors):
        if made.workspace_shape:
            tensors = {**tensors, "slabs": torch.full(made.workspace_shape, torch.nan)}
        super().run(made, tensors)


class Branches(Subject):
    """Two filters, of which each has its own output, or whose outputs are summed."""

    last = True

    def __init__(self, role, config=None, dtype="float16", summed=True):
        self.role, self.dtype, self.summed = role, dtype, summed
        self.config = config or Config(16, 16, 16)
        self.written = ("y0",) if role is Role.FPROP else ("x0",)
        # boxes take taps that lie evenly, which far apart are those of one row
        rows, columns = (1, 8) if isinstance(self.config, BoxConfig) else (3, 4)
        padding = ((rows // 2, rows // 2), (1, 1))
        self.geometry = g = ConvGeometry.forward((3, 16, 3, columns), (16, 16, rows, 3), padding=padding)
        self.shapes = {"x0": g.shape("x"), "y0": g.shape("y")} | {f"w{i}": g.shape("w") for i in range(2)}
        if role is Role.FPROP:
            self.shapes["bias1"] = (g.K,)
        if not summed:  # the other one is in the other half of the channels
            self.shapes[self.written[0]] = (3, 32, *self.shapes["y0"][2:])

    def plan(self, strides):
        forward = self.role is Role.FPROP
        terms = tuple(
            Term(i, 0 if self.summed else i, self.geometry, strides[f"w{i}"], forward and i == 1) for i in range(2)
        )
        channels = (self.shapes["x0"][1], self.shapes["y0"][1])
        how = (strides["x0"], strides["y0"], channels, True, True, H200)
        p = BranchesProblem(self.role, terms, self.dtype, "ieee", *how)
        kernel = "box_branches" if isinstance(self.config, BoxConfig) else "gather_branches"
        made = branches_plan.of_kernel(p, kernel, self.config)
        assert not made.packs
        return made

    def run(self, made, tensors):
        source = "x" if self.role is Role.FPROP else "y"
        tensors = {**tensors, f"{source}1": tensors[f"{source}0"]}
        if not self.summed:
            whole = self.written[0]
            tensors[whole[0] + "1"] = tensors[whole][:, 16:]
        super().run(made, tensors)


class Deformable(Subject):
    def __init__(self, role, last=False):
        self.last, self.slabs = last, role is DeformRole.WEIGHT
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
        made = deform_plan.with_config(p, None, Config(16, 16, 16, splits=2 if self.slabs else 1))
        assert not made.packs
        return made

    def run(self, made, tensors):
        deform_run.launched(made, tensors)


def _values(subject, name):
    whole = torch.randint(
        -3, 4, subject.shapes[name], generator=torch.Generator().manual_seed(len(name) + ord(name[0]))
    )
    return whole / 4 if name in ("offset", "mask") else whole


def run(subject, strides, bits=None):
    """(what was written, the plan), in memory of these strides; of offsets of `bits`, whatever the plan says."""
    strides = strides | subject.alike(strides)
    made = subject.plan(strides)
    if bits:
        made = replace(made, numerics=made.numerics._replace(index_bits=bits))
        if getattr(made, "fold", None):
            made = replace(made, fold=replace(made.fold, numerics=made.fold.numerics._replace(index_bits=bits)))
    tensors = {}
    for name, shape in subject.shapes.items():
        tensors[name] = t = far.empty(shape, strides[name], getattr(torch, subject.dtype))
        t.fill_(torch.nan) if name in subject.written else t.copy_(_values(subject, name))
    subject.run(made, tensors)
    return [tensors[name].clone() for name in subject.written], made


def launched() -> dict[str, str]:
    """Every kernel that some module of the package launches: its name, and the module's."""
    found = {}
    for path in sorted((Path(triton_conv.__file__).parent / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Launch":
                assert isinstance(node.args[1], ast.Name), f"{path.name} launches what is no name"
                found[node.args[1].id] = path.stem
    return found


_G = ConvGeometry.forward((3, 16, 3, 4), (16, 16, 3, 3), padding=((1, 1), (1, 1)))
_REFLECTED = ConvGeometry.forward((3, 4, 3, 4), (4, 4, 2, 3), padding=((0, 0), (1, 1)), modes=("reflect", "reflect"))
_DEPTHWISE = ConvGeometry.forward((3, 4, 3, 4), (4, 1, 3, 3), padding=((1, 1), (1, 1)), groups=4)
_ODD = ConvGeometry.forward((3, 3, 3, 9), (3, 1, 3, 3), padding=((1, 1), (1, 1)), groups=3)
_BOXES = ConvGeometry.forward((3, 16, 3, 8), (16, 16, 1, 3), padding=((0, 0), (1, 1)))
_SQUARE = ConvGeometry.forward((3, 16, 3, 8), (16, 16, 3, 3), padding=((1, 1), (1, 1)))
_NARROW = ConvGeometry.forward((3, 16, 3, 7), (16, 16, 1, 3), padding=((0, 0), (1, 1)))  # rows of no whole vectors
_HALVED = ConvGeometry.forward((3, 16, 3, 7), (16, 16, 1, 2), stride=(1, 2))  # no whole steps
_BOX = BoxConfig((1, 1, 4, 8), 16, 16)
_WIDE = BoxConfig((1, 1, 8, 16), 128, 16)  # sums that fill half of the registers, finished in two parts
_RUN = BoxConfig((1, 1, 1, 16), 16, 16)
_FUSED = Epilogue("relu", residual="before", scale=True, keep=True)
_AFTER = Epilogue("relu6", residual="after", scale=True)
_LANES = DepthwiseConfig(2, 4, 8, 4, 4, (3, 3))
_BANDS = BandedConfig((16, 1, 1), 1, 16, 16)
_READ = ("x", "w")  # channels-last, where the output is contiguous


def _boxes(geometry, config, role=Role.FPROP, last=True, **options):
    return Convolution(role, geometry, config, "float16", last, **options)


SUBJECTS = {
    "gather": Convolution(Role.FPROP, _G, Config(16, 16, 16), epilogue=_FUSED, bias=True),
    "gather channels-last": Convolution(Role.FPROP, _G, Config(16, 16, 16, filters_first=True), last=True),
    "gather flattened": Convolution(Role.FPROP, _G, Config(16, 16, 16, flatten=True)),
    "gather dgrad": Convolution(Role.DGRAD, _G, Config(16, 16, 16)),
    "gather dgrad folded": Convolution(Role.DGRAD, _REFLECTED, Config(16, 16, 16), epilogue=_FUSED, bias=True),
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
    "streaming fused": Streaming(last=True, epilogue=_AFTER),
    "streaming one frame": Streaming(held=1),
    "streaming boxes": Streaming(_BOX, last=True, dtype="float16"),
    "streaming boxes fused": Streaming(_BOX, last=True, dtype="float16", epilogue=_AFTER),
    "streaming boxes one frame": Streaming(_BOX, last=True, dtype="float16", held=1),
    "box": _boxes(_BOXES, _BOX),
    "box fused": _boxes(_BOXES, _BOX, epilogue=_FUSED, bias=True),
    "box in parts": _boxes(_BOXES, _WIDE, epilogue=_AFTER, bias=True),
    "box planes": _boxes(_BOXES, _BOX, last=_READ, kept_inner=("y", "residual", "kept"), epilogue=_FUSED, bias=True),
    "box pointers": _boxes(_NARROW, _BOX, last=_READ),
    "box pointers fused": _boxes(_NARROW, _BOX, last=_READ, epilogue=_FUSED, bias=True),
    "box pointers in parts": _boxes(_NARROW, _WIDE, last=_READ, epilogue=_AFTER),
    "box dgrad": _boxes(_BOXES, _BOX, Role.DGRAD),
    "box dgrad pointers": _boxes(_HALVED, _BOX, Role.DGRAD, epilogue=_FUSED, bias=True),
    "box wgrad": _boxes(_BOXES, replace(_RUN, splits=2), Role.WGRAD),
    "box wgrad whole": _boxes(_SQUARE, _RUN, Role.WGRAD),
    "branches": Branches(Role.FPROP),
    "branches dgrad": Branches(Role.DGRAD),
    "branches boxes": Branches(Role.FPROP, _BOX),
    "branches boxes apart": Branches(Role.FPROP, _BOX, summed=False),
    "branches boxes dgrad": Branches(Role.DGRAD, _BOX),
    **{f"causal {role.value}": Causal(role) for role in CausalRole},
    "causal forward rows": Causal(CausalRole.FORWARD, last=True),
    "causal backward rows": Causal(CausalRole.BACKWARD, last=True),
    **{f"deformable {role.value}": Deformable(role) for role in DeformRole},
}
