"""What calls cost beside kernels and over time: host, first call, memory, the same bits, scaled float16 gradients."""

from __future__ import annotations

import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triton_conv import causal_conv1d, conv2d, convert, execute

from .. import host
from .capture import operands_of, work
from .networks import Mixed
from .support import left_out, placed, wait
from .units import Context, Unit

_CALLS, _ROUNDS = 200, 7
_SHAPES, _TIMES = 200, 10  # 2,000 calls
_GROWTH = 8 * 2**20  # bytes of the host that a round over all shapes may add, once all were seen
_REPEATS = 20
_SCALED_STEPS = 40
_ROOT = Path(__file__).parents[2]

_FIRST_CALLS = """
import json, time
start = time.perf_counter()
import torch, triton_conv
imported = time.perf_counter()
def operand(*shape):
    t = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return t.contiguous(memory_format=torch.channels_last).requires_grad_()
x, w = operand(8, 64, 56, 56), operand(64, 64, 3, 3)
def now():
    torch.cuda.synchronize()
    return time.perf_counter()
begin = now()
y = triton_conv.conv2d(x, w, padding=1)
forward = now()
torch.autograd.grad(y, (x, w), y.detach())
backward = now()
print(json.dumps({"import": imported - start, "forward": forward - begin, "backward": backward - forward}))
"""


def units(context: Context) -> Iterator[Unit]:
    """One for each."""
    yield Unit("host cost", partial(host_cost, context))
    yield Unit("host cost, part by part", partial(host_parts, context))
    yield Unit("first call", partial(first_call, context), timeout=300.0)
    yield Unit("float16 with GradScaler", partial(scaled, context))
    yield Unit("memory over 2,000 calls", partial(flat_memory, context))
    yield Unit("the same bits 20 times", partial(repeated, context))


def host_cost(context: Context) -> dict[str, Any]:
    """Microseconds of the host per call of a convolution so small that the device waits for it, beside PyTorch's."""
    device, cuda = context.device, context.device.type == "cuda"
    if not cuda and execute.interpreting():
        return left_out("needs CUDA: the interpreter takes milliseconds")
    generator = torch.Generator(device).manual_seed(0)

    def operand(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator, device=device).to(torch.bfloat16 if cuda else torch.float32)
        return t.contiguous(memory_format=torch.channels_last).requires_grad_()

    x, w = operand(1, 16, 8, 8), operand(16, 16, 3, 3)
    dy = torch.ones_like(x)

    def forward(convolve: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            convolve(x, w, padding=1)

    def both(convolve: Callable[..., Tensor]) -> None:
        torch.autograd.grad(convolve(x, w, padding=1), (x, w), dy)

    subjects = {
        f"{what} {who}": partial(run, convolve)
        for what, run in (("forward", forward), ("step", both))
        for who, convolve in (("triton_conv", conv2d), ("torch", torch.nn.functional.conv2d))
    }
    calls, samples = _CALLS if cuda else 5, {name: list[float]() for name in subjects}
    for call in subjects.values():
        call()
    gc.collect()
    gc.disable()
    try:
        for _ in range(_ROUNDS):
            for name, call in subjects.items():
                wait(device)
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                samples[name].append(1e6 * (time.perf_counter() - start) / calls)
    finally:
        gc.enable()
        wait(device)
    medians = {name: statistics.median(found) for name, found in samples.items()}
    words = "; ".join(
        f"{what} {medians[f'{what} triton_conv']:.1f} us a call, torch {medians[f'{what} torch']:.1f}"
        for what in ("forward", "step")
    )
    short = host.short_calls(x, w)
    ok = not cuda or short == host.Short(3, 0)
    words += "" if ok else f"; NOT SHORT: {short.calls} of 3 calls are, {short.binder} launches go by Triton's binder"
    facts = {"short_calls": short.calls, "binder_launches": short.binder, "over": medians["forward triton_conv"]}
    facts["over"] -= medians["forward torch"]
    return {"ok": ok, "words": words, "microseconds": medians, "samples": samples, **facts}


def host_parts(context: Context) -> dict[str, Any]:
    """Where the microseconds of a call go, and those of other ways to have an operator."""
    if context.device.type != "cuda":
        return left_out("needs CUDA: python -m bench.host shows it without one")
    x, w = host.operands(context.device, torch.bfloat16)
    rows = [*host.compared(x, w, calls=20, batches=50), *host.layers(x, w, calls=20, batches=50)]
    rows += host.dispatch(x, w, calls=20, batches=20)
    short = {row.name: row.least for row in rows if row.name.startswith("short: ")}
    words = ", ".join(f"{name.removeprefix('short: ')} {least:.1f} us" for name, least in short.items())
    return {"ok": True, "words": words, "microseconds": {row.name: [row.least, row.median] for row in rows}}


def first_call(context: Context) -> dict[str, Any]:
    """Seconds of the first calls of a process: with nothing compiled yet, and with everything on the disk."""
    if context.device.type != "cuda":
        return left_out("needs CUDA: nothing is compiled for a CPU")
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", _FIRST_CALLS],
                env={**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": cache},
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=140,
                check=False,
            )
            if done.returncode:
                return {"ok": False, "words": f"exit code {done.returncode}: {done.stderr.strip()[-500:]}"}
            found.append(json.loads(done.stdout.splitlines()[-1]))
    cold, warm = found
    words = (
        f"import {cold['import']:.1f} s; forward {cold['forward']:.2f} s and gradients {cold['backward']:.2f} s with "
        f"nothing compiled, {warm['forward']:.2f} and {warm['backward']:.2f} from the disk"
    )
    return {"ok": True, "words": words, "cold": cold, "warm": warm}


def scaled(context: Context) -> dict[str, Any]:
    """Channels-last training in float16 autocast with a GradScaler, clipped, beside cuDNN's."""
    device, tiny = context.device, context.simulate
    N, size, steps = (2, 4, 1) if tiny else (16, 32, _SCALED_STEPS)
    torch.manual_seed(0)
    first = Mixed(4 if tiny else 64)
    curves, scales = {}, {}
    for who in ("triton_conv", "torch"):
        model = copy.deepcopy(first)
        if who == "triton_conv":
            convert(model)
        placed(model, device)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        scaler, losses = torch.amp.GradScaler(device.type), list[Tensor]()
        generator = torch.Generator(device).manual_seed(1)
        for _ in range(steps):
            images = torch.randn(N, 3, size, size, generator=generator, device=device)
            images = images.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.float16):
                output = model(images)
            loss = (output.float() - images.roll(1, 3)).square().mean()  # which three convolutions can learn
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        curves[who], scales[who] = torch.stack(losses).tolist(), scaler.get_scale()
    ours, theirs = curves["triton_conv"], curves["torch"]
    off = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    learned = tiny or ours[-1] < 0.7 * ours[0]
    words = f"loss {ours[0]:.3f} to {ours[-1]:.3f}, never more than {off:.1%} from cuDNN's"
    words += f"; scale {scales['triton_conv']:.0f}, cuDNN's {scales['torch']:.0f}"
    ok = off < 0.1 and learned and scales["triton_conv"] > 0
    return {"ok": ok, "words": words, "losses": curves, "scales": scales}


def flat_memory(context: Context) -> dict[str, Any]:
    """Memory of device and host while convolutions of 200 shapes are called ten times each."""
    device, cuda = context.device, context.device.type == "cuda"
    count, times = (_SHAPES, _TIMES) if cuda else (2, 3)
    dtype = torch.bfloat16 if cuda else torch.float32
    C = 16 if cuda else 2
    w = torch.randn(C, C, 3, 3, device=device, dtype=dtype)
    host, held = [], []
    for _ in range(times):
        for number in range(count):
            size, last = 8 + number // 2 if cuda else 4 + number // 2, number % 2 == 0
            x = torch.ones(1, C, size, size, device=device, dtype=dtype)
            if last:
                x = x.contiguous(memory_format=torch.channels_last)
            conv2d(x, w, padding=1)
        del x
        gc.collect()
        wait(device)
        host.append(_resident())
        held.append(torch.cuda.memory_allocated(device) if cuda else 0)
    growth = max(b - a for a, b in pairwise(host[1:]))
    flat = held[-1] <= held[0] and growth <= _GROWTH
    words = f"{count * times} calls of {count} shapes: device {held[-1] - held[0]:+,} bytes after the first round, "
    words += f"host at most {growth / 2**20:+.1f} MiB a round after the second"
    return {"ok": flat, "words": words, "host_bytes": host, "device_bytes": held}


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def repeated(context: Context) -> dict[str, Any]:
    """Convolutions and all their gradients, again and again under `torch.use_deterministic_algorithms(True)`."""
    device, tiny = context.device, context.simulate
    times = 2 if tiny else _REPEATS
    operands = operands_of(device, 4 if tiny else 64, 4 if tiny else 56, seed=0)
    generator = torch.Generator(device).manual_seed(1)
    shapes = ((2, 8, 20), (8, 4)) if tiny else ((2, 1024, 4096), (1024, 4))
    x, w = (torch.randn(s, generator=generator, device=device).requires_grad_() for s in shapes)

    def run() -> list[Tensor]:
        y = causal_conv1d(x, w, activation="silu")
        assert isinstance(y, Tensor)
        return [*work(operands), y.detach(), *torch.autograd.grad(y, (x, w), torch.ones_like(y))]

    with deterministic():
        first = run()
        wrong = sum(not torch.equal(a, b) for _ in range(times - 1) for a, b in zip(run(), first, strict=True))
    words = f"{wrong} of {(times - 1) * len(first)} results differ from those of the first of {times} runs"
    return {"ok": not wrong, "words": words, "different": wrong}
