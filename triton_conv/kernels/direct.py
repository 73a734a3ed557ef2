"""A launch without Triton's binder, which binds and specialises every argument anew each time.

`Direct` lets it do so once, and then hands the compiled kernel the same arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Box, Launch

# Releases whose `JITFunction.run` was read: it launches `CompiledKernel.run` with every parameter in order, and what
# it compiles for depends on tensors by their dtype and on whether their address is a multiple of 16, nothing else.
_READ = ((3, 6), (3, 7), (3, 8), (3, 9))
_DIRECT = tuple(int(part) for part in triton.__version__.split(".")[:2]) in _READ


class _Ready(NamedTuple):
    """A compiled kernel and its arguments; `fills` says where tensors go: (place, name, descriptor's fields)."""

    compiled: CompiledKernel  # held: a kernel that nobody holds is unloaded
    arguments: list[Any]
    fills: tuple[tuple[int, str, dict[str, Any] | None], ...]


class Direct:
    """A launch that passes by Triton's binder from its second time on, for tensors of the same dtypes each time.

    Triton's public way is taken the first time on each device, while anyone has hooks on launches or other settings
    than the defaults are made, for tensors that are not aligned to 16 bytes, where kernels are interpreted, and with a
    Triton that this was not written for.
    """

    def __init__(self, launch: Launch):
        self.launch = launch
        self._usable = _DIRECT and isinstance(launch.kernel, JITFunction)
        self._ready: dict[Any, _Ready] = {}

    def run(self, tensors: Mapping[str, Any]) -> None:
        """Launches it on the current device."""
        launch = self.launch
        if not launch.programs:
            return
        if not self._usable or _unusual(launch.kernel):
            launch.run(tensors)
            return
        active = driver.active
        device = active.get_current_device()
        ready = self._ready.get(device)
        if ready is None:
            self._first(tensors, device)
            return
        arguments, addresses = ready.arguments.copy(), 0
        for place, name, fields in ready.fills:
            tensor = tensors[name]
            addresses |= tensor.data_ptr()
            if fields is None:
                arguments[place] = tensor
            else:
                arguments[place] = descriptor = _new(TensorDescriptor)
                descriptor.__dict__.update(fields, base=tensor)
        if addresses % 16:
            launch.run(tensors)
            return
        compiled = ready.compiled
        stream, function = active.get_current_stream(device), compiled.function
        # no metadata of the launch and no hooks: there is nobody to tell
        compiled.run(launch.programs, 1, 1, stream, function, compiled.packed_metadata, None, None, None, *arguments)

    def _first(self, tensors: Mapping[str, Any], device: Any) -> None:
        launch = self.launch
        bound = launch._bound(tensors)
        compiled = launch.kernel[(launch.programs,)](*bound, **launch.arguments)
        given = [tensors[o.operand if isinstance(o, Box) else o] for o in launch.operands if o is not None]
        parameters = launch.kernel.params
        values = dict(zip((p.name for p in parameters), bound, strict=False)) | launch.arguments
        complete = all(p.name in values or p.has_default for p in parameters)
        if not complete or not isinstance(compiled, CompiledKernel) or any(t.data_ptr() % 16 for t in given):
            return
        fills = tuple(
            (place, operand, None)
            if isinstance(operand, str)
            else (place, operand.operand, vars(bound[place]) | {"base": None})
            for place, operand in enumerate(launch.operands)
            if operand is not None
        )
        arguments = [values.get(p.name, p.default) for p in parameters]
        for place, _, _ in fills:
            arguments[place] = None  # holds no tensor
        self._ready[device] = _Ready(compiled, arguments, fills)


_new = object.__new__


def _unusual(kernel: JITFunction) -> bool:
    """Whether a launch of it, or what it is compiled to, is anyone's business but ours."""
    runtime, compilation = knobs.runtime, knobs.compilation
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or kernel.pre_run_hooks
        or kernel.debug
        or runtime.debug
        or runtime.add_stages_inspection_hook is not None
        or compilation.instrumentation_mode
        or getattr(compilation, "fpsan_homomorphic_casts", False)
    )
