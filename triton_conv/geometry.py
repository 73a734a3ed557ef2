"""The shape of a convolution: validation, extents, index maps and canonical form. Pure Python.

Letters follow CUTLASS and cuDNN: input N C D H W, filter K C T R S, output N K Z P Q. A geometry always has
three spatial axes (D, H, W); those a 1-D or 2-D convolution lacks have extent 1. It always describes the
*forward* convolution: a transposed convolution is the input gradient (`Role.DGRAD`) of the geometry whose
output is the caller's input, so no other module needs the word.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, NamedTuple

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

Three = tuple[int, ...]  # always three: D, H, W


class Role(enum.Enum):
    """Which of a convolution's three tensors is computed.

    | role  | src (read)  | flt (read) | dst (written) | GEMM_M  | GEMM_N  | GEMM_K  |
    |-------|-------------|------------|---------------|---------|---------|---------|
    | FPROP | x N C D H W | w K C T R S| y N K Z P Q   | N Z P Q | K       | T R S C |
    | DGRAD | y N K Z P Q | w K C T R S| x N C D H W   | N D H W | C       | T R S K |
    | WGRAD | y and x     |            | w K C T R S   | K       | T R S C | N Z P Q |
    """

    FPROP = "fprop"
    DGRAD = "dgrad"
    WGRAD = "wgrad"


class Axis(NamedTuple):
    """One spatial axis of an implicit GEMM as affine maps of a position u and a tap j.

    Destination positions fall into `phases` residue classes, each a dense convolution with its own taps.
    In class phi (0 <= phi < phases), with t = phi + offset:

        first tap  f   = t / common * inverse % tap_step       if common divides t; else the class has no taps
        taps           = ceil((filter - f) / tap_step)
        destination    = phi + u * phases
        source         = (t + f * src_tap_step * common) / phases + u * src_step + j * src_tap_step
        filter tap     = f + j * tap_step

    A forward axis has one class: source = u * stride - lower + j * dilation. An input-gradient axis has one
    class for each residue of the stride. Image extents are not part of it: they change more often.
    """

    filter: int
    phases: int
    offset: int
    common: int
    inverse: int
    tap_step: int
    src_step: int
    src_tap_step: int


@dataclass(frozen=True)
class ConvGeometry:
    """A forward convolution, always with three spatial axes and explicit extents.

    `padding` holds (lower, upper) per axis; `modes` says how each axis is padded, and is "zeros" wherever the
    padding is empty. `output` may be smaller than the extents allow (a transposed convolution whose
    output_padding reaches its stride): the outputs that nobody asked for are not computed.

        >>> g = ConvGeometry.forward((8, 64, 56, 56), (128, 64, 3, 3), stride=(2, 2), padding=((1, 1), (1, 1)))
        >>> g.output
        (1, 28, 28)
    """

    N: int
    C: int
    K: int
    groups: int
    input: Three
    filter: Three
    output: Three
    stride: Three
    padding: tuple[tuple[int, int], ...]
    dilation: Three
    modes: tuple[str, ...] = ("zeros", "zeros", "zeros")

    @classmethod
    def forward(
        cls,
        input_shape: Sequence[int],
        weight_shape: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[tuple[int, int]] = (),
        dilation: Sequence[int] = (),
        groups: int = 1,
        modes: Sequence[str] = (),
    ) -> ConvGeometry:
        """The convolution of an (N, C, *spatial) input with a (K, C / groups, *filter) weight.

        Raises RuntimeError, as torch.nn.functional does, naming the argument and the shapes at fault.
        """
        rank = _check_ranks(input_shape, weight_shape, "input")
        stride, padding, dilation, modes = _defaults(rank, stride, padding, dilation, modes)
        _check_parameters(weight_shape, stride, padding, dilation, groups)
        K, C = weight_shape[0], input_shape[1]
        if K % groups:
            raise RuntimeError(
                f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
                f"but got weight of size {list(weight_shape)}"
            )
        if weight_shape[1] * groups != C:
            raise RuntimeError(
                f"Given groups={groups}, weight of size {list(weight_shape)}, expected input "
                f"{list(input_shape)} to have {weight_shape[1] * groups} channels, but got {C} channels"
            )
        spatial = input_shape[2:]
        _check_spatial(input_shape)
        modes = _check_modes(input_shape, spatial, padding, modes)
        output = [
            output_extent(i, lower, upper, f, s, d)
            for i, (lower, upper), f, s, d in zip(spatial, padding, weight_shape[2:], stride, dilation, strict=True)
        ]
        if any(o < 1 for o in output):
            padded = [i + lower + upper for i, (lower, upper) in zip(spatial, padding, strict=True)]
            reach = [d * (f - 1) + 1 for f, d in zip(weight_shape[2:], dilation, strict=True)]
            raise RuntimeError(
                f"Calculated padded input size per channel: {_by(padded)}, filter size with dilation: {_by(reach)}. "
                f"Kernel size can't be greater than actual input size (input {list(input_shape)}, "
                f"weight {list(weight_shape)})"
            )
        _check_64_bits(input_shape, output, stride, padding)
        return cls._three(
            input_shape[0], C, K, groups, spatial, weight_shape[2:], output, stride, padding, dilation, modes
        )

    @classmethod
    def transposed(
        cls,
        input_shape: Sequence[int],
        weight_shape: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[tuple[int, int]] = (),
        output_padding: Sequence[int] = (),
        groups: int = 1,
        dilation: Sequence[int] = (),
        modes: Sequence[str] = (),
    ) -> ConvGeometry:
        """The forward convolution whose input gradient is this transposed convolution.

        `input_shape` is the caller's input (N, K, *spatial), `weight_shape` is (K, C / groups, *filter); the
        caller's output is this geometry's (C, *input). Raises RuntimeError as `torch.nn.functional` does.
        """
        rank = _check_ranks(input_shape, weight_shape, "input")
        stride, padding, dilation, modes = _defaults(rank, stride, padding, dilation, modes)
        output_padding = _for_each_axis("output_padding", output_padding, 0, rank)
        _check_parameters(weight_shape, stride, padding, dilation, groups)
        if any(o < 0 for o in output_padding):
            raise RuntimeError(f"negative output_padding is not supported, but got {list(output_padding)}")
        if any(o >= s and o >= d for o, s, d in zip(output_padding, stride, dilation, strict=True)):
            raise RuntimeError(
                f"output padding must be smaller than either stride or dilation, but got output_padding "
                f"{list(output_padding)}, stride {list(stride)}, dilation {list(dilation)}"
            )
        K = input_shape[1]
        if weight_shape[0] != K:
            raise RuntimeError(
                f"Given transposed=1, weight of size {list(weight_shape)}, expected input {list(input_shape)} "
                f"to have {weight_shape[0]} channels, but got {K} channels"
            )
        if K % groups:
            raise RuntimeError(
                f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
                f"but got weight of size {list(weight_shape)}"
            )
        spatial = input_shape[2:]
        _check_spatial(input_shape)
        extents = [
            transposed_extent(o, lower, upper, f, s, d, extra)
            for o, (lower, upper), f, s, d, extra in zip(
                spatial, padding, weight_shape[2:], stride, dilation, output_padding, strict=True
            )
        ]
        if any(i < 1 for i in extents):
            raise RuntimeError(
                f"Given input size per channel: {_by(spatial)}. Calculated output size per channel: "
                f"{_by(extents)}. Output size is too small (weight {list(weight_shape)}, stride {list(stride)}, "
                f"padding {list(padding)})"
            )
        _check_64_bits(input_shape, extents, stride, padding, dilation)
        modes = _check_modes((input_shape[0], weight_shape[1] * groups, *extents), extents, padding, modes)
        return cls._three(
            input_shape[0],
            weight_shape[1] * groups,
            K,
            groups,
            extents,
            weight_shape[2:],
            spatial,
            stride,
            padding,
            dilation,
            modes,
        )

    @classmethod
    def gradient(
        cls,
        input_shape: Sequence[int],
        weight_shape: Sequence[int],
        output_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        groups: int,
        modes: Sequence[str],
    ) -> ConvGeometry:
        """The forward convolution seen from its output: `output_shape` is that of the gradient at hand."""
        full = cls.forward(input_shape, weight_shape, stride, padding, dilation, groups, modes)
        _check_ranks(output_shape, weight_shape, "grad_output")
        output = _three_of(output_shape[2:], 1)
        if (
            output_shape[0] != full.N
            or output_shape[1] != full.K
            or any(o > f for o, f in zip(output, full.output, strict=True))
        ):
            raise RuntimeError(
                f"grad_output of size {list(output_shape)} does not belong to input {list(input_shape)} and weight "
                f"{list(weight_shape)}: expected {[full.N, full.K, *full.output[3 - len(stride) :]]}"
            )
        return replace(full, output=output)

    @classmethod
    def _three(cls, N, C, K, groups, spatial, flt, output, stride, padding, dilation, modes) -> ConvGeometry:
        return cls(
            N,
            C,
            K,
            groups,
            _three_of(spatial, 1),
            _three_of(flt, 1),
            _three_of(output, 1),
            _three_of(stride, 1),
            _three_of(padding, (0, 0)),
            _three_of(dilation, 1),
            _three_of(modes, "zeros"),
        )

    @property
    def taps(self) -> int:
        """Filter taps per channel, T * R * S."""
        return self.filter[0] * self.filter[1] * self.filter[2]

    @property
    def flops(self) -> int:
        """Floating-point operations of any one role, a multiplication and an addition counted apart."""
        pixels = self.N * self.output[0] * self.output[1] * self.output[2]
        return 2 * pixels * self.K * (self.C // self.groups) * self.taps

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The five extents of "x", "w" or "y"."""
        shapes = {
            "x": (self.N, self.C, *self.input),
            "w": (self.K, self.C // self.groups, *self.filter),
            "y": (self.N, self.K, *self.output),
        }
        return shapes[tensor]

    def axes(self, role: Role) -> tuple[Axis, Axis, Axis]:
        """The index maps of fprop and wgrad (one class of positions) or of dgrad (one per stride residue)."""
        make = _dgrad_axis if role is Role.DGRAD else _fprop_axis
        d, h, w = (
            make(f, s, lower, d)
            for f, s, (lower, _), d in zip(self.filter, self.stride, self.padding, self.dilation, strict=True)
        )
        return d, h, w

    def padded(self) -> ConvGeometry:
        """The same convolution over an input whose reflect, replicate and circular borders are already there."""
        border = [pad if mode != "zeros" else (0, 0) for pad, mode in zip(self.padding, self.modes, strict=True)]
        keep = [(0, 0) if mode != "zeros" else pad for pad, mode in zip(self.padding, self.modes, strict=True)]
        extents = [i + lower + upper for i, (lower, upper) in zip(self.input, border, strict=True)]
        return replace(self, input=tuple(extents), padding=tuple(keep), modes=("zeros",) * 3)

    def __str__(self) -> str:
        text = (
            f"N{self.N} C{self.C} K{self.K} g{self.groups}  input {_x(self.input)}  filter {_x(self.filter)}  "
            f"output {_x(self.output)}  stride {_x(self.stride)}  dilation {_x(self.dilation)}"
        )
        pads = [
            f"{lower}+{upper}" + ("" if mode == "zeros" else f" {mode}")
            for (lower, upper), mode in zip(self.padding, self.modes, strict=True)
        ]
        return f"{text}  padding {', '.join(pads)}"


class Strides(NamedTuple):
    """Element strides of the three tensors of a geometry: x (n c d h w), w (k c t r s), y (n k z p q)."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    y: tuple[int, ...]


class Context(NamedTuple):
    """The first frames (D) of a convolution's input where they are in another tensor than x.

    `strides` are as those of x. A D stride of 0 shows one frame `frames` times. Without frames it is x's own place.
    `aligned` says that both start at multiples of 16 bytes.
    """

    frames: int
    strides: tuple[int, ...]
    aligned: bool = True

    @property
    def held(self) -> int:
        """How many frames there are in memory."""
        return self.frames if self.strides[2] else min(self.frames, 1)


def output_extent(extent: int, lower: int, upper: int, taps: int, stride: int, dilation: int) -> int:
    """Positions of a filter along one axis; the only place where this formula stands."""
    return (extent + lower + upper - dilation * (taps - 1) - 1) // stride + 1


def transposed_extent(
    extent: int, lower: int, upper: int, taps: int, stride: int, dilation: int, output_padding: int
) -> int:
    """The input extent that a transposed convolution's output has: `output_extent` solved for `extent`."""
    return (extent - 1) * stride - lower - upper + dilation * (taps - 1) + output_padding + 1


def same_padding(taps: int, dilation: int) -> tuple[int, int]:
    """(lower, upper) that keep a stride-1 extent; the odd element goes above, as in PyTorch."""
    total = dilation * (taps - 1)
    return total // 2, total - total // 2


def canonical(
    geometry: ConvGeometry, strides: Strides, role: Role, keep_channels: bool = False
) -> tuple[ConvGeometry, Strides, tuple[str, ...]]:
    """The smallest geometry that computes the same numbers from the same memory, and the steps taken.

    Works on extents and strides alone: no tensor is viewed or copied. Steps apply only where strides allow.

    * the stride of an axis with one output is no longer than the axis;
    * an axis whose filter has one tap and that is not padded is sampled: its stride moves into x's strides
      (not for dgrad, which must write the positions in between);
    * an axis on which the filter steps by its own length folds its taps into the channels (patch embeddings), unless
      `keep_channels` asks that C stay what it is, because a bias is indexed by it;
    * axes without a filter fold into one pixel axis, the batch included: a 1x1 convolution becomes a GEMM;
    * unit axes move to the front.
    """
    fold = _Fold(geometry, strides)
    for axis in (2, 1, 0, 1, 2):  # taps outside of channels fold innermost first, those inside outermost first
        fold.shorten(axis)
        fold.sample(axis, role)
        if not keep_channels:
            fold.taps_into_channels(axis)
    fold.unit_axes_first()
    fold.pixels(1, 2)
    fold.pixels(0, 2)
    fold.batch()
    return fold.done()


def tap_step(geometry: ConvGeometry, strides: Strides) -> int | None:
    """The stride between neighbouring taps, T R S counted through; 0 for a single tap, None if it is not one stride."""
    step, steps = 0, 0
    for stride, extent in zip(reversed(strides.w[2:]), reversed(geometry.filter), strict=True):
        if extent == 1:
            continue
        if steps and stride != step * steps:
            return None
        step, steps = step or stride, (steps or 1) * extent
    return step


def rows_first(
    geometry: ConvGeometry, strides: Strides, keep_w: bool
) -> tuple[ConvGeometry, Strides, tuple[int, int, int]]:
    """The same convolution with its axes in another order, and that order: the filter longest along H, then along W.

    `keep_w` leaves W where it is. Filters of one length stay in place.
    """
    g, free = geometry, (1, 0) if keep_w else (1, 2, 0)
    longest = sorted(free, key=lambda axis: -g.filter[axis])
    h, w, d = (longest[0], 2, longest[1]) if keep_w else longest

    def ordered(values):
        return values[d], values[h], values[w]

    names = ("input", "filter", "output", "stride", "padding", "dilation", "modes")
    turned = replace(g, **{name: ordered(getattr(g, name)) for name in names})
    return turned, Strides(*((*tensor[:2], *ordered(tensor[2:])) for tensor in strides)), (d, h, w)


def describable(extents: tuple[int, ...], steps: list[int]) -> bool:
    """Whether an image walked in these steps fits the five axes of a descriptor."""
    _, h, w = extents
    rows = steps[1] == 1 or (h % steps[1] == 0 and extents[0] == 1)
    return steps[0] == 1 and rows and w % steps[2] == 0


class _Fold:
    """A geometry and its strides as mutable lists, and the rewriting steps of `canonical`."""

    def __init__(self, g: ConvGeometry, strides: Strides):
        self.geometry, self.N, self.C = g, g.N, g.C
        self.input, self.filter, self.output = list(g.input), list(g.filter), list(g.output)
        self.stride, self.dilation = list(g.stride), list(g.dilation)
        self.padding, self.modes = list(g.padding), list(g.modes)
        self.x, self.w, self.y = list(strides.x), list(strides.w), list(strides.y)
        self.steps: list[str] = []

    def unpadded(self, axis: int) -> bool:
        return self.padding[axis] == (0, 0)

    def pointwise(self, axis: int) -> bool:
        return (
            self.filter[axis] == 1
            and self.stride[axis] == 1
            and self.unpadded(axis)
            and self.input[axis] == self.output[axis]
        )

    def shorten(self, axis: int) -> None:
        """A single output is nowhere a stride away from: a huge one would only be so many residue classes."""
        if self.output[axis] == 1:
            self.stride[axis] = min(self.stride[axis], self.input[axis] + sum(self.padding[axis]))

    def sample(self, axis: int, role: Role) -> None:
        if self.filter[axis] != 1 or not self.unpadded(axis):
            return
        self.dilation[axis] = 1
        if self.input[axis] == self.output[axis] == 1:
            self.stride[axis] = 1
        elif role is not Role.DGRAD and self.input[axis] != self.output[axis]:
            self.x[2 + axis] *= self.stride[axis]
            self.stride[axis] = 1
            self.input[axis] = self.output[axis]
            self.steps.append(f"sample {'DHW'[axis]} by its stride")

    def taps_into_channels(self, axis: int) -> None:
        taps = self.filter[axis]
        steps_by_itself = self.stride[axis] == taps or self.output[axis] == 1
        if (
            taps == 1
            or not steps_by_itself
            or self.dilation[axis] != 1
            or not self.unpadded(axis)
            or self.geometry.groups != 1
            or self.input[axis] != self.output[axis] * taps
        ):
            return
        x_tap, w_tap = self.x[2 + axis], self.w[2 + axis]
        x_c, w_c = self.x[1], self.w[1]
        taps_outside = (x_c * self.C == x_tap and w_c * self.C == w_tap) or self.C == 1
        taps_inside = x_tap * taps == x_c and w_tap * taps == w_c
        if not taps_outside and not taps_inside:
            return
        if self.C == 1 or not taps_outside:
            self.x[1], self.w[1] = x_tap, w_tap
        self.C *= taps
        self.x[2 + axis] = x_tap * taps
        self.input[axis], self.filter[axis], self.stride[axis] = self.output[axis], 1, 1
        self.steps.append(f"fold the taps of {'DHW'[axis]} into channels")

    def unit_axes_first(self) -> None:
        unit = [self.pointwise(a) and self.input[a] == 1 for a in range(3)]
        order = sorted(range(3), key=lambda a: not unit[a])
        if order != [0, 1, 2]:
            per_axis: tuple[list[Any], ...] = (self.input, self.filter, self.output, self.stride, self.dilation)
            for values in (*per_axis, self.padding, self.modes):
                values[:] = [values[a] for a in order]
            for values in (self.x, self.w, self.y):
                values[2:] = [values[2 + a] for a in order]
            self.steps.append("unit axes first")

    def pixels(self, outer: int, inner: int) -> None:
        """Fold axis `outer` into `inner` where both only count pixels."""
        if outer == 0 and self.input[1] != 1:
            outer, inner = 0, 1
        if not (self.pointwise(outer) and self.pointwise(inner)) or self.input[outer] == 1:
            return
        extent = self.input[inner]
        if extent == 1:
            for t in (self.x, self.y):
                t[2 + inner] = t[2 + outer]
        elif any(t[2 + outer] != t[2 + inner] * extent for t in (self.x, self.y)):
            return
        self.input[inner] *= self.input[outer]
        self.output[inner] = self.input[inner]
        self.input[outer] = self.output[outer] = 1
        self.steps.append(f"fold {'DHW'[outer]} into {'DHW'[inner]}")

    def batch(self) -> None:
        if self.N > 1 and self.input[:2] == [1, 1] and all(self.pointwise(a) for a in range(3)):
            extent = self.input[2]
            if extent == 1:
                self.x[4], self.y[4] = self.x[0], self.y[0]
            elif any(t[0] != t[4] * extent for t in (self.x, self.y)):
                return
            self.input[2] = self.output[2] = self.N * extent
            self.N = 1
            self.steps.append("fold N into pixels")

    def done(self) -> tuple[ConvGeometry, Strides, tuple[str, ...]]:
        geometry = replace(
            self.geometry,
            N=self.N,
            C=self.C,
            input=tuple(self.input),
            filter=tuple(self.filter),
            output=tuple(self.output),
            stride=tuple(self.stride),
            padding=tuple(self.padding),
            dilation=tuple(self.dilation),
            modes=tuple(self.modes),
        )
        return geometry, Strides(tuple(self.x), tuple(self.w), tuple(self.y)), tuple(self.steps)


def _fprop_axis(taps: int, stride: int, lower: int, dilation: int) -> Axis:
    return Axis(taps, 1, -lower, 1, 0, 1, stride, dilation)


def _dgrad_axis(taps: int, stride: int, lower: int, dilation: int) -> Axis:
    common = gcd(stride, dilation)
    tap_step = stride // common
    inverse = pow(dilation // common, -1, tap_step)
    return Axis(taps, stride, lower, common, inverse, tap_step, 1, -(dilation // common))


def _three_of(values, fill):
    return (fill,) * (3 - len(values)) + tuple(values)


def _x(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def _by(values: Sequence[int]) -> str:
    return "(" + " x ".join(map(str, values)) + ")"


def _defaults(rank, stride, padding, dilation, modes):
    given = {"stride": (stride, 1), "padding": (padding, (0, 0)), "dilation": (dilation, 1), "modes": (modes, "zeros")}
    return tuple(_for_each_axis(name, values, default, rank) for name, (values, default) in given.items())


def _for_each_axis(name, values, default, rank) -> tuple:
    values = tuple(values) or (default,) * rank
    if len(values) != rank:
        raise RuntimeError(f"expected {name} to have an entry for each of {rank} axes, but got {name}={list(values)}")
    return values


def _check_ranks(shape: Sequence[int], weight_shape: Sequence[int], name: str) -> int:
    rank = len(weight_shape) - 2
    if not 1 <= rank <= 3:
        raise RuntimeError(f"expected weight to have 3, 4 or 5 dimensions, but got weight of size {list(weight_shape)}")
    if len(shape) != rank + 2:
        raise RuntimeError(
            f"Expected {rank + 2}-dimensional {name} for {rank + 2}-dimensional weight {list(weight_shape)}, "
            f"but got {name} of size {list(shape)}"
        )
    return rank


def _check_parameters(weight_shape, stride, padding, dilation, groups) -> None:
    if groups < 1:
        raise RuntimeError(f"non-positive groups is not supported, but got groups={groups}")
    if any(s < 1 for s in stride):
        raise RuntimeError(f"non-positive stride is not supported, but got stride={list(stride)}")
    if any(d < 1 for d in dilation):
        raise RuntimeError(f"dilation should be greater than zero, but got dilation={list(dilation)}")
    if any(f < 1 for f in weight_shape[2:]):
        raise RuntimeError(f"kernel size should be greater than zero, but got weight of size {list(weight_shape)}")
    if any(p < 0 for pair in padding for p in pair):
        raise RuntimeError(f"negative padding is not supported, but got padding={[tuple(p) for p in padding]}")
    if weight_shape[0] < groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be at least {groups} at dimension 0, "
            f"but got weight of size {list(weight_shape)} instead"
        )


def _check_64_bits(shape, extents, stride, padding, dilation=()) -> None:
    """Of the output; extents may be symbolic, and are looked at only where a parameter is out of proportion."""
    if max((*stride, *itertools.chain(*padding), *dilation), default=0) < 2**31:
        return
    if any(isinstance(e, int) and e >= 2**63 for e in extents):
        parameters = f"stride {list(stride)}, padding {list(padding)}"
        parameters += f", dilation {list(dilation)}" if dilation else ""
        raise RuntimeError(
            f"Calculated output size per channel: {_by(extents)}, which does not fit into 64 bits (input "
            f"{list(shape)}, {parameters})"
        )


def _check_spatial(shape: Sequence[int]) -> None:
    if any(extent < 1 for extent in shape[2:]):
        raise RuntimeError(f"Only zero batch or zero channel inputs are supported, but got input of size {list(shape)}")


def _check_modes(shape, spatial, padding, modes) -> tuple[str, ...]:
    """Modes with "zeros" wherever nothing is padded; PyTorch's limits on how far a border may reach."""
    result = []
    for axis, (extent, (lower, upper), mode) in enumerate(zip(spatial, padding, modes, strict=True)):
        if mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {set(PADDING_MODES)}, but got padding_mode={mode!r}")
        if mode == "zeros" or (lower == 0 and upper == 0):
            result.append("zeros")
            continue
        where = f"padding {(lower, upper)} at dimension {axis + 2} of input {list(shape)}"
        if extent < 1:
            raise RuntimeError(f"padding_mode={mode!r} needs a non-empty input, but got {where}")
        if mode == "reflect" and (lower >= extent or upper >= extent):
            raise RuntimeError(f"Padding size should be less than the corresponding input dimension, but got {where}")
        if mode == "circular" and (lower > extent or upper > extent):
            raise RuntimeError(f"Padding value causes wrapping around more than once: {where}")
        result.append(mode)
    return tuple(result)
