"""The short way for a call like one that was made before: no geometry, no problem, no plan, no dispatcher.

A call is decided by what stands in `_key`: operands but for their values and addresses, parameters, device, and every
setting that may change between two calls. What an earlier call of the same key came to is remembered as a `Bound`:
which output to allocate and which launches to make. `execute` computes what cannot be bound.

`alone` tells whether the dispatcher would do nothing for a call but find autograd and us: then it may be left out.
That is worth it: of an operator that only allocates, `python -m bench.host` measures 93 us forward and backward for
`torch.library.custom_op`, 59 us for `Library.impl` with an autograd kernel, 30 us for an autograd.Function alone
(torch 2.13.0, one CPU core). So operators are `Library.impl`s, for whoever looks on, and calls go past them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import execute, plan, recovery
from .backends import default_precision
from .devices import Device
from .epilogue import PLAIN
from .execute import Call
from .forks import Lock

LIMIT = 4096  # remembered calls, and ways to write their parameters


class Remembered(dict):
    """A dictionary that forgets its oldest item for a new one when it has LIMIT of them."""

    def remember(self, key: Any, value: Any) -> None:
        with _lock:
            while len(self) >= LIMIT:
                del self[next(iter(self))]
            self[key] = value


_lock = Lock()
_bound = Remembered()  # a Bound by key; None where `execute` has to compute it
_missed = Remembered()  # how often the call of cast tensors was sought in vain, by dtype and key before the cast


class Bound:
    """A call without its tensors."""

    def __init__(self, call: Call, p: plan.Plan, device: Device, output: Tensor):
        self.device = device  # held: its identity is part of a key
        self.plan = p
        self.where = output.device  # with an index, and part of a key too
        self.on_cuda = self.where.type == "cuda"
        self.role, self.geometry, self.precision = call.role, call.geometry, call.precision
        self.weight_stride, self.out_dtype, self.epilogue = call.weight_stride, call.out_dtype, call.epilogue
        self.names = execute.NAMES[call.role]
        self.shape, self.strides, self.dtype = output.shape, output.stride(), output.dtype
        self.launches = p.direct
        self.as_given = not p.packs and p.bundle == 1
        self.workspace_shape, self.workspace_dtype = p.workspace_shape, getattr(torch, p.workspace_dtype)

    def __call__(self, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        device = self.where
        output = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)
        try:
            if self.on_cuda and device.index != torch.cuda.current_device():
                with torch.cuda.device(device):
                    return self._launched(a, b, bias, output, device)
            return self._launched(a, b, bias, output, device)
        except Exception as error:
            recovery.check(error)
        del output
        return self._planned_anew(a, b, bias)

    def _planned_anew(
        self, a: Tensor, b: Tensor, bias: Tensor | None, scale: Tensor | None = None, residual: Tensor | None = None
    ) -> Any:
        """The output of a call that cannot run as it did, for which `execute` finds another plan."""
        kept = None
        if self.epilogue.keep:
            kept = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.where)
        how = (self.precision, self.weight_stride, None, self.out_dtype, self.epilogue, scale, residual, kept)
        output = execute.execute(Call(self.role, self.geometry, a, b, bias, *how))
        return output if kept is None else (output, kept)

    def _launched(self, a: Tensor, b: Tensor, bias: Tensor | None, output: Tensor, device: torch.device) -> Tensor:
        finish = None
        if self.as_given:
            first, second, third = self.names
            tensors = {first: a, second: b, third: output}
            if bias is not None:
                tensors["bias"] = bias.contiguous()
        else:
            how = (self.precision, self.weight_stride, None, self.out_dtype)
            call = Call(self.role, self.geometry, a, b, bias, *how)
            tensors, finish = execute.prepared(self.plan, call, output)
        if self.workspace_shape:
            tensors["workspace"] = torch.empty(self.workspace_shape, dtype=self.workspace_dtype, device=device)
        for launch in self.launches:
            launch.run(tensors)
        if finish is not None:
            finish()
        return output


class FusedBound(Bound):
    """The same of a call with an epilogue; where that keeps what the activation is applied to, it returns both."""

    def __init__(self, call: Call, p: plan.Plan, device: Device, output: Tensor):
        super().__init__(call, p, device, output)
        self.as_given = self.as_given and not (p.copies_residual or p.copies_kept)

    def __call__(self, a: Tensor, b: Tensor, bias: Tensor | None, *extra: Tensor | None) -> Any:
        device = self.where
        try:
            if self.on_cuda and device.index != torch.cuda.current_device():
                with torch.cuda.device(device):
                    return self._finished(a, b, bias, *extra)
            return self._finished(a, b, bias, *extra)
        except Exception as error:
            recovery.check(error)
        return self._planned_anew(a, b, bias, *extra)

    def _finished(
        self, a: Tensor, b: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None
    ) -> Any:
        output = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.where)
        kept = torch.empty_like(output) if self.epilogue.keep else None
        finish = None
        if self.as_given:
            first, second, third = self.names
            tensors = {first: a, second: b, third: output}
            for name, t in (("bias", bias), ("scale", scale)):
                if t is not None:
                    tensors[name] = t.contiguous()
            for name, t in (("residual", residual), ("kept", kept)):
                if t is not None:
                    tensors[name] = t
        else:
            how = (self.precision, self.weight_stride, None, self.out_dtype, self.epilogue, scale, residual, kept)
            call = Call(self.role, self.geometry, a, b, bias, *how)
            tensors, finish = execute.prepared(self.plan, call, output)
        if self.workspace_shape:
            tensors["workspace"] = torch.empty(self.workspace_shape, dtype=self.workspace_dtype, device=self.where)
        for launch in self.launches:
            launch.run(tensors)
        if finish is not None:
            finish()
        return output if kept is None else (output, kept)


def computed(make: Callable[..., Call], a: Tensor, b: Tensor, third: Any, params: tuple, *extra: Tensor | None) -> Any:
    """The output of the call `make(a, b, third, *extra, *params)`, and what it keeps if it keeps anything.

    `third` is a bias, None or a size, `params` hash, `extra` are scale and residual of a call with an epilogue.
    """
    key = _key(make, a, b, third, params, *extra)
    bound = None if key is None else _bound.get(key)
    if bound is not None:
        return bound(a, b, third if isinstance(third, Tensor) else None, *extra)
    known = key is None or key in _bound
    call = make(a, b, third, *extra, *params)
    output = execute.execute(call)
    if not known:
        made = _bind(call, output)
        # else another thread has changed a setting: whose plan is it?
        if _key(make, a, b, third, params, *extra) == key:
            _bound.remember(key, made)
    return output if call.kept is None else (output, call.kept)


def found(make: Callable[..., Call], a: Tensor, b: Tensor, third: Any, params: tuple, *extra: Tensor | None) -> Any:
    """What a call like `make(a, b, third, *extra, *params)` came to, if one was made: a Bound or a FusedBound."""
    key = _key(make, a, b, third, params, *extra)
    return None if key is None else _bound.get(key)


def hoped(make: Callable[..., Call], dtype: torch.dtype, *given: Any) -> bool:
    """Whether it is worth casting tensors to `dtype` to look for their call: not once it was sought twice in vain.

    `given` are the other arguments of `found`.
    """
    key = _key(make, *given)
    return key is not None and _missed.get((dtype, key), 0) < 2


def disappoint(make: Callable[..., Call], dtype: torch.dtype, *given: Any) -> None:
    """Tells `hoped` that there was no call for the cast tensors."""
    key = _key(make, *given)
    _missed.remember((dtype, key), _missed.get((dtype, key), 0) + 1)


def forget() -> None:
    """Forgets every call."""
    with _lock:
        _bound.clear()
        _missed.clear()


def _key(
    make: Callable[..., Call], a: Tensor, b: Tensor, third: Any, params: tuple, *extra: Tensor | None
) -> tuple | None:
    """All that decides a call, None if it is not to be remembered."""
    if execute._recorded is not None or execute._seen:
        return None
    where = a.device
    device = execute.device_of(where)
    if device is None:
        return None
    addresses = a.data_ptr() | b.data_ptr()
    if isinstance(third, Tensor):
        addresses |= third.data_ptr()
        third = (third.shape, third.stride(), third.dtype, third.device)
    if extra:
        for t in extra:
            if t is not None:
                addresses |= t.data_ptr()
                third = (third, t.shape, t.stride(), t.dtype, t.device)
            else:
                third = (third, None)
    if addresses % 16:
        return None
    of_a, of_b = (a.shape, a.stride(), a.dtype, where), (b.shape, b.stride(), b.dtype, b.device)
    precision = default_precision() if a.dtype is torch.float32 else None
    return make, params, of_a, of_b, third, id(device), precision, plan.settings()


def _bind(call: Call, output: Tensor) -> Bound | None:
    device = execute.device_of(call.a.device)
    if device is None or not (output.numel() and call.a.numel() and call.b.numel()) or call.a.is_complex():
        return None
    p = plan.make(execute.problem_of(call, device, output))
    if p.rival_runs or call.scales is not None:
        return None
    return Bound(call, p, device, output) if call.epilogue == PLAIN else FusedBound(call, p, device, output)


# ---------------------------------------------------------------------------------------------------------------------
# Who else may have a say in a call.

_states: frozenset[tuple[int, int]] | None = None  # the dispatcher's state in a thread where nothing was turned on
_plain: dict[torch.device, frozenset[int]] = {}  # the dispatch keys of a tensor that is just memory, by device
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_keys = torch._C._dispatch_keys
_included, _excluded = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set


def alone(*tensors: Any) -> bool:
    """Whether only autograd and this package would see a call on these tensors.

    That is: no compiler, tracer, profiler, mode, transform or tangent is at work, nobody has turned dispatch keys off,
    and the tensors are dense, on a CPU or GPU, of no subclass and without a lazy conjugation or negation. Autocast is
    the caller's business.
    """
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if torch.autograd._profiler_enabled() or _state() not in (_states or _usual_states()):
        return False
    for t in tensors:
        if type(t) not in PLAIN_TYPES:
            return False
        if _keys(t).raw_repr() not in (_plain.get(t.device) or _plain_keys(t.device)):
            return False
    return True


def _state() -> tuple[int, int]:
    """Dispatch keys that this thread adds to every call, and that it takes away."""
    return _included().raw_repr(), _excluded().raw_repr()


def _usual_states() -> frozenset[tuple[int, int]]:
    """What a new thread starts with, and the same under autocast and in inference mode, which has no gradients."""
    global _states
    seen = []

    def look() -> None:
        for on_cpu, on_cuda, inference in product((False, True), repeat=3):
            torch.set_autocast_enabled("cpu", on_cpu)
            torch.set_autocast_enabled("cuda", on_cuda)
            with torch.inference_mode(inference):
                seen.append(_state())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    _states = frozenset(seen)
    return _states


def _plain_keys(device: torch.device) -> frozenset[int]:
    if device.type not in ("cpu", "cuda"):
        return frozenset()
    keys = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys.append(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    _plain[device] = frozenset(keys)
    return _plain[device]
