"""From operands to numbers: allocates the output, then runs the reference or the plan's kernels.

The output's shape and strides come from `empty_output`, for real and fake tensors alike. CPU tensors run plain
torch, unless TRITON_INTERPRET=1 makes Triton interpret its kernels: then they run the kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import backends, devices, installed, invariance, plan, recovery, reference
from . import config as configs
from .backends import default_precision
from .devices import INTERPRETER, Device
from .epilogue import PLAIN, Epilogue
from .forks import Lock, in_child
from .geometry import ConvGeometry, Role, Strides

# What kernels call the operands of a role, and its output.
NAMES = {Role.FPROP: ("x", "w", "y"), Role.DGRAD: ("y", "w", "x"), Role.WGRAD: ("y", "x", "w")}


@dataclass(frozen=True)
class Call:
    """One primitive with its operands.

    a, b are (x, w) for fprop, (dy, w) for dgrad, (dy, x) for wgrad; bias goes with the first two. With `scales`, one
    element of float32 each, the sum is multiplied by both before bias is added. The output and bias have `out_dtype`,
    which is the operands' own where it is None. Of fprop and dgrad the `epilogue` asks for `scale` (one number of
    float32 or the output's dtype for each of its channels), for a `residual` like the output, of any strides, and for
    `kept`, which is written: it has the output's strides too.
    """

    role: Role
    geometry: ConvGeometry
    a: Tensor
    b: Tensor
    bias: Tensor | None
    precision: str | None
    weight_stride: tuple[int, ...] = ()
    scales: tuple[Tensor, Tensor] | None = None
    out_dtype: torch.dtype | None = None
    epilogue: Epilogue = PLAIN
    scale: Tensor | None = None
    residual: Tensor | None = None
    kept: Tensor | None = None

    @property
    def output_shape(self) -> list[int]:
        g, spatial = self.geometry, self.a.dim() - 2
        if self.role is Role.WGRAD:
            return [g.K, g.C // g.groups, *g.filter[3 - spatial :]]
        channels, extents = (g.K, g.output) if self.role is Role.FPROP else (g.C, g.input)
        return [g.N, channels, *extents[3 - spatial :]]


_listening = Lock()  # held while one of the two below changes
_recorded: tuple[tuple[list[Call], int | None], ...] | None = None  # calls, and the thread whose they are


@contextmanager
def recording(*, here: bool = False) -> Iterator[list[Call]]:
    """Collects every call, real or fake, made within it by any thread; with `here`, by this one alone.

    A call is told to the innermost that collects it.
    """
    global _recorded
    mine: tuple[list[Call], int | None] = ([], threading.get_ident() if here else None)
    with _listening:
        _recorded = (mine, *(_recorded or ()))
    try:
        yield mine[0]
    finally:
        with _listening:
            _recorded = tuple(other for other in _recorded or () if other is not mine) or None


_seen: tuple[dict[plan.Problem, None], ...] = ()


@contextmanager
def problems() -> Iterator[dict[plan.Problem, None]]:
    """Collects the problems, each once and in order, that kernels compute within it on any thread; holds no tensors."""
    global _seen
    mine: dict[plan.Problem, None] = {}
    with _listening:
        _seen = (*_seen, mine)
    try:
        yield mine
    finally:
        with _listening:
            _seen = tuple(seen for seen in _seen if seen is not mine)


def empty_output(call: Call) -> Tensor:
    """An uninitialised output: weight gradients as asked, activations channels-last where an operand is.

    That is PyTorch's rule for cuDNN convolutions (for float64 too, which cuDNN cannot do).
    """
    record(call)
    return _empty_like_output(call)


def record(call: Call) -> None:
    """Tells whoever is `recording`."""
    for calls, thread in _recorded or ():
        if thread is None or thread == threading.get_ident():
            calls.append(call)
            return


def _empty_like_output(call: Call) -> Tensor:
    dtype = call.out_dtype or call.a.dtype
    if call.role is Role.WGRAD:
        return call.a.new_empty_strided(call.output_shape, call.weight_stride)
    memory_format = torch.contiguous_format
    if call.a.dim() > 3:
        wanted = torch.channels_last if call.a.dim() == 4 else torch.channels_last_3d
        if wanted in (suggest_memory_format(call.a), suggest_memory_format(call.b)):
            memory_format = wanted
    return torch.empty(call.output_shape, dtype=dtype, device=call.a.device, memory_format=memory_format)


def execute(call: Call) -> Tensor:
    """The output of a call."""
    output = empty_output(call)
    if output.numel() == 0:
        return output
    device = device_of(call.a.device)
    if device is None:
        return _reference(call, output)
    if call.a.numel() == 0 or call.b.numel() == 0:
        return _finished(call, torch.zeros_like(output, dtype=reference.wide_of(output.dtype)), output)
    if call.a.is_complex():
        a, b = (t.to(reference.wide_of(t.dtype)) for t in (call.a, call.b))
        return _finished(call, reference.complex_as_real(partial(_part, call), a, b), output)
    if invariance.batch() is not None and call.role is not Role.WGRAD and call.a.data_ptr() % 16:
        call = replace(call, a=call.a.clone())  # what kernels may run must not depend on where the first sample is
    problem = problem_of(call, device, output)
    for seen in _seen:
        seen[problem] = None
    outputs = [output]
    del output
    return computed(problem, call, outputs)


def computed(problem: plan.Problem, call: Call, outputs: list[Tensor]) -> Tensor:
    """The output of a call that is this problem, by the first plan that can run (`recovery`).

    `outputs` holds an uninitialised output, and nobody else does: its memory is freed where cuDNN returns another.
    """
    shape, strides = outputs[0].shape, outputs[0].stride()

    def attempt(p: plan.Plan) -> Tensor:
        if not p.rival_runs:
            return run(p, call, outputs[0] if outputs else _empty_like_output(call))
        outputs.clear()
        last = p.rival_name.endswith("channels_last")
        with _on_device(call.a.device):
            return backends.convolve(call.role, call.geometry, call.a, call.b, call.bias, shape, strides, last)

    return recovery.run(lambda: plan.make(problem), attempt, problem, configs.chosen(call.role))


def device_of(device: torch.device) -> Device | None:
    """What plans need to know of a device; None where plain torch runs."""
    if device.type == "cuda":
        return _cuda_device(device.index if device.index is not None else torch.cuda.current_device())
    return INTERPRETER if not _plain and interpreting() else None


_plain = False


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, CPU tensors run plain torch in this process, also where TRITON_INTERPRET is set."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def interpreting() -> bool:
    """Whether Triton interprets kernels (TRITON_INTERPRET=1), so that they run on CPU tensors.

    Raises RuntimeError if the variable was set too late: Triton reads it when it is imported. Raises ImportError if it
    is set and Triton is missing.
    """
    if not installed.available():
        return False
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    if not triton.knobs.runtime.interpret:
        return False
    if not isinstance(triton.language.cdiv, InterpretedFunction):
        raise RuntimeError("TRITON_INTERPRET=1 was set after triton was imported; set it before the process starts")
    return True


@lru_cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    # in kHz and bits; not every build of PyTorch tells them, and plans do without
    clock, memory_clock, bus = (
        getattr(properties, name, 0) for name in ("clock_rate", "memory_clock_rate", "memory_bus_width")
    )
    return devices.of(
        properties.name,
        properties.multi_processor_count,
        capability,
        clock=clock * 1e3,
        bandwidth=2 * memory_clock * 1e3 * bus / 8,  # two transfers a clock
        l2_bytes=getattr(properties, "L2_cache_size", 0),
    )


# A child of fork cannot use CUDA; asked for the device anew, PyTorch says so, before a launch by the parent's handles.
in_child(_cuda_device.cache_clear)


def problem_of(call: Call, device: Device, output: Tensor | None = None) -> plan.Problem:
    """The numbers a plan is made from. Raises NotImplementedError for a dtype without kernels."""
    output = _empty_like_output(replace(call, a=call.a.to("meta"), b=call.b.to("meta"))) if output is None else output
    dtype, out_dtype = (str(t.dtype).removeprefix("torch.") for t in (call.a, output))
    if dtype not in plan.ACCUMULATORS or out_dtype == "float8_e4m3fn":
        raise NotImplementedError(f"triton_conv has no kernel for {call.a.dtype} that writes {output.dtype}")
    a, b, out = (_strides(t) for t in (call.a, call.b, output))
    strides = {
        Role.FPROP: Strides(x=a, w=b, y=out),
        Role.DGRAD: Strides(x=out, w=b, y=a),
        Role.WGRAD: Strides(x=b, w=out, y=a),
    }[call.role]
    precision = (call.precision or default_precision()) if dtype == "float32" else "ieee"
    written = (output,) if call.kept is None else (output, call.kept)
    aligned = all(map(_aligned, (call.a, call.b, *written)))
    has_bias, has_scale, epilogue = call.bias is not None, call.scales is not None, call.epilogue
    moves = call.residual is not None and not (_aligned(call.residual) and _lies_as(call.residual, output))
    how = (precision, has_bias, has_scale, aligned, device, epilogue, moves, scale_dtype(call, out_dtype))
    return plan.Problem(call.role, call.geometry, dtype, out_dtype, strides, *how)


def scale_dtype(call: Call, out_dtype: str) -> str:
    """The dtype of an epilogue's scale, "" where it is the output's or there is none."""
    name = "" if call.scale is None else str(call.scale.dtype).removeprefix("torch.")
    return "" if name == out_dtype else name


def _aligned(t: Tensor) -> bool:
    """Whether its first element is at a multiple of 16 bytes."""
    return t.device.type == "meta" or t.data_ptr() % 16 == 0


def _lies_as(t: Tensor, other: Tensor) -> bool:
    """Whether the elements of two tensors of one shape are equally far apart."""
    return all(a == b or n == 1 for a, b, n in zip(t.stride(), other.stride(), other.shape, strict=True))


def _part(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """The real convolution of a component of each operand of a complex one."""
    return execute(Call(call.role, call.geometry, a, b, None, call.precision, call.weight_stride))


def _finished(call: Call, sums: Tensor, output: Tensor) -> Tensor:
    """The output of sums that no kernel has finished, in their dtype and rounded once; fills what is kept."""
    out, unactivated = reference.finished(sums, call.scale, call.bias, call.residual, call.epilogue)
    if call.kept is not None:
        call.kept.copy_(unactivated)
    return output.copy_(out)


def _strides(t: Tensor) -> tuple[int, ...]:
    stride = t.stride()
    return (*stride[:2], *(0,) * (5 - len(stride)), *stride[2:])


def run(p: plan.Plan, call: Call, output: Tensor) -> Tensor:
    """The output of a call, written by the kernels of a plan for it."""
    with _on_device(output.device):
        tensors, finish = prepared(p, call, output)
        tensors |= workspace(p, output.device)
        for launch in p.direct:
            launch.run(tensors)
        finish()
    return output


def prepared(p: plan.Plan, call: Call, output: Tensor) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """(the tensors of a plan's launches, copied to its layout, but for its workspace; what to do after these)."""
    names = NAMES[call.role]
    tensors = dict(zip(names, (call.a, call.b, output), strict=True))
    if call.bias is not None:
        tensors["bias"] = call.bias.contiguous()
    if call.scales is not None:
        tensors["scale_a"], tensors["scale_b"] = call.scales
    for name in p.packs:
        t = tensors[name]
        if name == names[2]:
            tensors[name] = torch.empty_like(t, memory_format=torch.contiguous_format)
        else:
            tensors[name] = _five(t).permute(0, 2, 3, 4, 1).contiguous() if p.channels_last else t.contiguous()
    if call.scale is not None:
        tensors["scale"] = call.scale.contiguous()
    written = tensors[names[2]]
    if call.residual is not None:
        tensors["residual"] = _empty_as(written).copy_(call.residual) if p.copies_residual else call.residual
    if call.kept is not None:
        tensors["kept"] = _empty_as(written) if p.copies_kept else call.kept
    blocks = dense = None
    if p.bundle > 1:
        K, C, T, R, S = p.asked.shape("w")
        wide = output.new_zeros((K, T, R, S, p.bundle * C), dtype=call.b.dtype)
        blocks, dense = _diagonal_blocks(wide, p.asked.groups, p.bundle, tensors["w"])
        tensors["w"] = wide
        if call.role is not Role.WGRAD:
            blocks.copy_(dense)

    def finish() -> None:
        if call.role is Role.WGRAD and blocks is not None and dense is not None:
            dense.copy_(blocks)
        if names[2] in p.packs:
            output.copy_(written)
        if call.kept is not None and p.copies_kept:
            call.kept.copy_(tensors["kept"])

    return tensors, finish


def _empty_as(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)


def workspace(p: plan.Plan, device: torch.device) -> dict[str, Tensor]:
    """The workspace of a plan's launches, by name, if they have one."""
    if not p.workspace_shape:
        return {}
    return {"workspace": torch.empty(p.workspace_shape, dtype=getattr(torch, p.workspace_dtype), device=device)}


def _diagonal_blocks(wide: Tensor, groups: int, bundle: int, w: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the same shape: of a bundle's filters, the blocks that belong to one group each; and of `w`."""
    K, T, R, S, channels = wide.shape
    parts = (groups // bundle, bundle, K // groups)
    squares = wide.view(*parts, T, R, S, bundle, channels // bundle)
    return squares.diagonal(dim1=1, dim2=6), _five(w).unflatten(0, parts).permute(0, 2, 4, 5, 6, 3, 1)


def _on_device(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _five(t: Tensor) -> Tensor:
    """A (N, C, *spatial) tensor with three spatial axes, the new ones in front."""
    while t.dim() < 5:
        t = t.unsqueeze(2)
    return t


def _reference(call: Call, output: Tensor) -> Tensor:
    if invariance.batch() is not None and call.role is not Role.WGRAD and call.geometry.N > 1:
        one = replace(call.geometry, N=1)
        for n in range(call.geometry.N):
            sample = slice(n, n + 1)
            extra = {name: t[sample] for name in ("residual", "kept") if (t := getattr(call, name)) is not None}
            _reference(replace(call, geometry=one, a=call.a[sample].clone(), **extra), output[sample])
        return output
    if call.epilogue != PLAIN:
        wide = reference.wide_of(output.dtype)
        plain = Call(call.role, call.geometry, call.a.to(wide), call.b.to(wide), None, call.precision)
        return _finished(call, _reference(plain, torch.empty_like(output, dtype=wide)), output)
    a, b, g = _five(call.a), _five(call.b), call.geometry
    if call.out_dtype is None:
        fprop = partial(reference.fprop, a, b, call.bias, g)
    else:
        fprop = partial(reference.low_precision_fprop, a, b, call.scales, call.bias, g, call.out_dtype)
    primitive: Callable[[], Tensor] = {
        Role.FPROP: fprop,
        Role.DGRAD: partial(reference.dgrad, a, b, call.bias, g),
        Role.WGRAD: partial(reference.wgrad, a, b, g),
    }[call.role]
    _five(output).copy_(primitive())
    return output
