"""What a call takes the host, in microseconds, layer by layer and next to `torch.nn.functional.conv2d`.

    python -m bench.host [--batches 500] [--calls 20]

On a GPU everything is real: calls are queued a few at a time behind the device, which is waited for between batches,
so that no call waits for it. Without one, tensors lie on the CPU, plans are made for an H200, and `stubbed` stands in
for Triton's compiler and driver: all of the host's work is done but for the last call, which gives the arguments to
the driver. `F.conv2d` then is PyTorch's own on the CPU, with one position and few channels: its dispatch, autograd and
allocation are the same as on a GPU; in place of cuDNN's heuristics and launch it has a product of 16 x 16 numbers, so
that on a GPU it takes longer.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton_conv
from triton_conv import arguments, conv_calls, derivatives, execute, fast, functional, ops, plan
from triton_conv.devices import H200, Device

_numbers = count(10_000)  # kernels are kept by device: none that exists, and not that of an earlier time

PARAMETERS = ([1, 1], [0, 0, 0, 0], [1, 1], 1, "zeros", None)  # of the operator


class Cost(NamedTuple):
    """What part of a call takes the host: its least and its median time over batches, in microseconds."""

    name: str
    least: float
    median: float


def cost(name: str, call: Callable[[], Any], calls: int = 20, batches: int = 500) -> Cost:
    """Times `call` on the host after two warm calls.

    >>> cost("nothing", lambda: None, calls=10, batches=3).name
    'nothing'
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(2):
        call()
    for _ in range(batches):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(1e6 * (time.perf_counter() - start) / calls)
    wait()
    return Cost(name, min(times), median(times))


@contextmanager
def stubbed(device: Device = H200, listed: bool = False) -> Iterator[list[tuple]]:
    """Within it, CPU tensors are planned for as if on `device`; yields what kernels are "launched" with, if `listed`.

    Kernels are neither compiled nor run: outputs hold whatever was in memory. Needs kernels that are not interpreted.
    Each item is (compiled kernel's key, *arguments from the grid on), newest last; only the last hundred are kept.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    if execute.interpreting():
        raise RuntimeError("kernels are being interpreted: unset TRITON_INTERPRET")
    launched: list[tuple] = []
    kernels = []

    def compiled(kernel, key, signature, index, *rest) -> CompiledKernel:
        made = CompiledKernel.__new__(CompiledKernel)
        made.module, made.function, made._module_pid = object(), 1, None
        made.name, made.src, made.packed_metadata = kernel.__name__, None, ()

        def run(*args) -> None:
            del launched[:-99]
            launched.append((key, *args))

        made._run = run if listed else lambda *args: None
        kernel.device_caches[index][0][key] = made
        kernels.append(kernel)
        return made

    driver = triton.runtime.driver
    before = driver._active, execute.device_of, JITFunction._do_compile
    number = next(_numbers)
    fake = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", device.capability, 32),
        get_current_device=lambda: number,
        get_current_stream=lambda index: 0,
    )
    driver.set_active(fake)
    execute.device_of, JITFunction._do_compile = lambda _: device, compiled  # type: ignore[assignment]
    try:
        yield launched
    finally:
        driver._active, execute.device_of, JITFunction._do_compile = before
        for kernel in kernels:  # whose launches would go on to be listed here
            kernel.device_caches.pop(number, None)
        fast.forget()


def operands(device: torch.device | str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """An input of one position with 16 channels, and 16 filters of one tap."""
    return torch.randn(1, 16, 1, 1, device=device, dtype=dtype), torch.randn(16, 16, 1, 1, device=device, dtype=dtype)


def compared(x: Tensor, w: Tensor, **how: int) -> list[Cost]:
    """F.conv2d and ours: forward without gradients, forward with, forward and backward."""
    theirs = costs("F.conv2d", torch.nn.functional.conv2d, x, w, **how)
    return [*theirs, *costs("triton_conv.conv2d", triton_conv.conv2d, x, w, **how)]


def costs(name: str, conv: Callable[..., Tensor], x: Tensor, w: Tensor, **how: int) -> list[Cost]:
    """Forward without gradients, forward with, forward and backward."""
    xg, wg = x.clone().requires_grad_(), w.clone().requires_grad_()
    dy = torch.ones_like(conv(x, w))

    def step() -> None:
        torch.autograd.backward(conv(xg, wg), dy, inputs=(xg, wg))
        xg.grad = wg.grad = None

    calls: dict[str, Callable[[], Any]] = {
        "inference": partial(conv, x, w),
        "forward": partial(conv, xg, wg),
        "forward + backward": step,
    }
    return [cost(f"{name} {what}", call, **how) for what, call in calls.items()]


class Short(NamedTuple):
    """Of the three convolutions of a training step: those that went the short way, and launches by Triton's binder."""

    calls: int
    binder: int


def short_calls(x: Tensor, w: Tensor) -> Short:
    """What is short of a training step of ours once it was made: Short(3, 0), if all is well."""
    xg, wg = (t.detach().clone().requires_grad_() for t in (x, w))

    def step() -> None:
        y = triton_conv.conv2d(xg, wg)
        y.backward(torch.ones_like(y))

    for _ in range(2):
        step()
    with counting() as count:
        step()
    return Short(count["short"], count["binder"])


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts, of all threads: "short", calls that were made before, and "binder", launches by Triton's binder."""
    from triton_conv.kernels.launch import Launch

    count: Counter[str] = Counter()
    whole, run = fast.Bound.__call__, Launch.run

    def counted(*args):
        count["short"] += 1
        return whole(*args)

    def counted_run(*args):
        count["binder"] += 1
        return run(*args)

    fast.Bound.__call__, Launch.run = counted, counted_run  # type: ignore[method-assign]
    try:
        yield count
    finally:
        fast.Bound.__call__, Launch.run = whole, run  # type: ignore[method-assign]


def dispatch(x: Tensor, w: Tensor, **how: int) -> list[Cost]:
    """Ways to have an operator in PyTorch, of one that only allocates its output and gradients.

    What it costs to be asked, whatever is then computed: `torch.library.custom_op`, `Library.define` and `impl` with an
    autograd kernel, as this package's operators have it, and an autograd.Function alone, as a call made before has it.
    """
    schema = "(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    schema += "SymInt groups, str padding_mode, str? precision) -> Tensor"
    rows, args = [], (None, *PARAMETERS)

    def allocated(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
        return torch.empty_like(x)

    class Dispatched(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(op, *given):
            return derivatives.below_autograd(op, *given)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[1:3])

        @staticmethod
        def backward(ctx, dy):
            return None, *map(torch.empty_like, ctx.saved_tensors), *[None] * len(args)

    class Alone(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx, x, w, *given):
            ctx.save_for_backward(x, w)
            return allocated(x, w)

        @staticmethod
        def backward(ctx, dy):
            return *map(torch.empty_like, ctx.saved_tensors), None

    with torch.library._scoped_library("triton_conv_bench", "FRAGMENT") as library:
        custom = torch.library.custom_op("triton_conv_bench::custom", allocated, mutates_args=(), schema=schema)
        custom.register_autograd(
            lambda ctx, dy: (*map(torch.empty_like, ctx.saved_tensors), *[None] * len(args)),
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
        )
        library.define("plain" + schema)
        plain = torch.ops.triton_conv_bench.plain.default
        for key in ("CPU", "CUDA"):
            library.impl("plain", allocated, key)
        library.impl("plain", derivatives.autograd_kernel(plain, Dispatched), "Autograd")
        ways: dict[str, Callable[..., Tensor]] = {
            "custom_op": lambda x, w: custom(x, w, *args),
            "Library.define and impl": lambda x, w: plain(x, w, *args),
            "autograd.Function alone": lambda x, w: Alone.apply(x, w, None),  # type: ignore[attr-defined]
        }
        for name, way in ways.items():
            rows += costs(name, way, x, w, **how)
    return rows


def layers(x: Tensor, w: Tensor, **how: int) -> list[Cost]:
    """The parts of a call of ours: those of the short way, then those of the long way that a new call takes."""
    args: tuple[Any, ...] = (x, w, None, *PARAMETERS)
    frozen = tuple(map(conv_calls.hashable, PARAMETERS))
    triton_conv.conv2d(x, w)
    bound = fast.found(conv_calls.conv_call, x, w, None, frozen)
    if bound is None:
        raise RuntimeError("no call was remembered")
    call = conv_calls.conv_call(*args)
    device, output = execute.device_of(x.device), execute.empty_output(call)
    if device is None:
        raise RuntimeError("plain PyTorch would compute this")
    problem = execute.problem_of(call, device, output)
    made = plan.make(problem)
    tensors = {"x": x, "w": w, "y": output} | execute.workspace(made, x.device)

    def launched(launches) -> None:
        for launch in launches:
            launch.run(tensors)

    spelling = (1, 0, 1, 1, "zeros", None)
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("short: how parameters are spelled", lambda: functional._spelled(2, w, 0, spelling)),
        ("short: who else has a say", lambda: fast.alone(x, w)),
        ("short: what decides a call", lambda: fast._key(conv_calls.conv_call, x, w, None, frozen)),
        ("short: look-up, with that", lambda: fast.found(conv_calls.conv_call, x, w, None, frozen)),
        ("short: output, tensors and launch", lambda: bound(x, w, None)),
        ("short: launch alone", lambda: launched(bound.launches)),
        ("operator, from Python", lambda: ops.conv(*args)),
        ("long: checks of arguments", lambda: arguments.check_tensors("", 2, None, input=x, weight=w)),
        ("long: parameters", lambda: arguments.forward_parameters("", 2, w, 1, 0, 1, 1, "zeros")),
        ("long: call and geometry", lambda: conv_calls.conv_call(*args)),
        ("long: output", lambda: execute.empty_output(call)),
        ("long: problem", lambda: execute.problem_of(call, device, output)),
        ("long: plan look-up", lambda: plan.make(problem)),
        ("long: preparing tensors", lambda: execute.prepared(made, call, output)),
        ("long: launch through Triton's binder", lambda: launched(made.launches)),
    ]
    return [cost(name, part, **how) for name, part in parts]


def table(costs: Sequence[Cost]) -> str:
    """One line each.

    >>> print(table([Cost("look-up", 1.25, 1.5)]))
    look-up                                           1.2     1.5
    """
    return "\n".join(f"{c.name:44s} {c.least:8.1f} {c.median:7.1f}" for c in costs)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--calls", type=int, default=20, help="calls of a batch")
    parser.add_argument("--batches", type=int, default=500, help="batches; the least and the median are shown")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    given = parser.parse_args(argv)
    how = {"calls": given.calls, "batches": given.batches}
    real = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if real else "CPU, compiler and driver stubbed, plans for an H200"
    print(f"host microseconds a call, least and median; {given.dtype}, torch {torch.__version__}, {where}")
    x, w = operands("cuda" if real else "cpu", getattr(torch, given.dtype))
    os.environ.pop("TRITON_INTERPRET", None)
    with nullcontext() if real else stubbed():
        print(table([*compared(x, w, **how), *layers(x, w, **how), *dispatch(x, w, **how)]))
        short = short_calls(x, w)
        print(f"{short.calls} of 3 convolutions of a step go the short way, {short.binder} launches by Triton's binder")


if __name__ == "__main__":
    main(sys.argv[1:])
