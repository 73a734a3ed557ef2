"""CUDA graphs of a training step, side streams, threads and several devices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_conv import conv2d, conv_transpose2d, convert, execute, plan

from .networks import Mixed
from .support import different, left_out, placed, wait
from .units import Context, Unit

_ROUNDS = 10  # of each thread
_SLEEP = 10**9  # cycles: half a second


def units(context: Context) -> Iterator[Unit]:
    """One for each."""
    yield Unit("graph of a training step", partial(graphed, context))
    yield Unit("side stream", partial(side_stream, context))
    yield Unit("two threads, two streams", partial(threads, context))
    yield Unit("two devices", partial(two_devices, context))


class _Training:
    """Steps on tensors that stay where they are; `restart` brings the first weights back."""

    def __init__(self, device: torch.device, tiny: bool):
        torch.manual_seed(0)
        self.device, self.model, self.steps = device, Mixed(4 if tiny else 64), 1 if tiny else 4
        convert(self.model)
        placed(self.model, device)
        N, size = (2, 4) if tiny else (16, 32)
        shape = (N, 3, size, size)
        self.images, self.targets = (
            torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2)
        )
        self.loss = torch.zeros((), device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self._first = {name: t.detach().clone() for name, t in self.model.state_dict().items()}

    def feed(self, seed: int) -> None:
        """Other images and targets into the same memory."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for t in (self.images, self.targets):
            t.normal_(generator=generator)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            output = self.model(self.images)
        loss = (output.float() - self.targets).square().mean()
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def restart(self) -> None:
        with torch.no_grad():
            for name, t in self.model.state_dict().items():
                t.copy_(self._first[name])
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()

    def run(self, step: Callable[[], object]) -> dict[str, Tensor]:
        """What is learned in some steps from the start, and their losses."""
        self.restart()
        losses = []
        for seed in range(self.steps):
            self.feed(seed)
            step()
            losses.append(self.loss.clone())
        state = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        return {**state, "losses": torch.stack(losses)}


def graphed(context: Context) -> dict[str, Any]:
    """A step that is replayed learns what an eager one does, bit by bit, and allocates, plans and compiles nothing."""
    device = context.device
    eager = _Training(device, context.simulate)
    eager.feed(100)
    eager.step()  # so that momentum is there
    want = eager.run(eager.step)
    again = different(eager.run(eager.step), want)
    if again:
        return {"ok": False, "words": f"eager steps do not repeat their bits: {', '.join(again[:3])}"}
    if device.type != "cuda":
        return {"ok": True, "words": "eager steps repeat their bits; graphs need CUDA", "left_out": True}

    training = _Training(device, context.simulate)
    training.feed(100)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            training.step()
    torch.cuda.current_stream(device).wait_stream(side)
    training.optimizer.zero_grad(set_to_none=True)
    planned, graph = plan._make.cache_info().misses, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training.step()
    planned = plan._make.cache_info().misses - planned
    allocations = 0

    def replay() -> None:
        nonlocal allocations
        before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
        graph.replay()
        allocations += torch.cuda.memory_stats(device)["allocation.all.allocated"] - before

    found = training.run(replay)
    wait(device)
    wrong = different(found, want)
    unequal = f"other bits in {', '.join(wrong[:3])}" if wrong else "the bits of eager steps"
    words = f"{training.steps} replays: {unequal}; {allocations} allocations in them, {planned} plans at capture"
    ok = not wrong and not allocations and not planned
    return {"ok": ok, "words": words, "different": wrong, "allocations": allocations, "planned": planned}


def operands_of(device: torch.device, C: int, size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shapes = [(2, C, size, size), (C, C, 3, 3), (C, 1, 3, 3), (C, C, 4, 4)]
    return [torch.randn(s, generator=generator, device=device).to(dtype).requires_grad_() for s in shapes]


def work(operands: list[Tensor]) -> list[Tensor]:
    """Convolutions of three kinds, one after the other, and all gradients."""
    x, w, depthwise, up = operands
    y = conv2d(x.contiguous(memory_format=torch.channels_last), w, padding=1)
    y = conv2d(y, depthwise, padding=1, groups=len(depthwise), padding_mode="circular")
    y = conv_transpose2d(y, up, stride=2, padding=1)
    return [y.detach(), *torch.autograd.grad(y, operands, torch.ones_like(y))]


def side_stream(context: Context) -> dict[str, Any]:
    """Kernels run on the current stream, and wait for no other."""
    device = context.device
    if device.type != "cuda":
        return left_out("needs CUDA: a CPU has no streams")
    operands = operands_of(device, 64, 64, seed=0)
    want = work(operands)
    side = torch.cuda.Stream(device)
    wait(device)
    with torch.cuda.stream(side):
        work(operands)  # so that this stream has memory of its own
    wait(device)
    with torch.cuda.device(device):
        slept, done = torch.cuda.Event(), torch.cuda.Event()
        torch.cuda._sleep(_SLEEP)  # on the stream that was current before
        slept.record()
        with torch.cuda.stream(side):
            got = work(operands)
            done.record()
        done.synchronize()
        waited = slept.query()
    wait(device)
    wrong = [n for n, (a, b) in enumerate(zip(got, want, strict=True)) if not torch.equal(a, b)]
    words = "waited for another stream" if waited else "ran beside another stream"
    words += f"; {len(wrong)} of {len(want)} results differ" if wrong else "; the same bits"
    return {"ok": not wrong and not waited, "words": words, "waited": waited, "wrong": wrong}


def threads(context: Context) -> dict[str, Any]:
    """Two threads, on a GPU with a stream each, compute what one does."""
    device, cuda = context.device, context.device.type == "cuda"
    if not cuda and execute.interpreting():
        return left_out("needs CUDA: the interpreter runs one kernel at a time")
    sizes = (24, 40) if cuda else (4, 6)
    cases = [operands_of(device, 64 if cuda else 4, size, seed=size) for size in sizes]
    wanted = [work(case) for case in cases]
    wait(device)
    wrong, errors = [0, 0], list[str]()

    def repeat(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream(device)) if cuda else nullcontext():
                for _ in range(_ROUNDS):
                    got = work(cases[number])
                    wrong[number] += sum(not torch.equal(a, b) for a, b in zip(got, wanted[number], strict=True))
        except Exception as error:  # a thread's own would be lost
            errors.append(f"{type(error).__name__}: {error}")

    workers = [threading.Thread(target=repeat, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wait(device)
    words = "; ".join(errors) or f"{sum(wrong)} of {2 * _ROUNDS * len(wanted[0])} results differ from a single thread's"
    return {"ok": not errors and not any(wrong), "words": words, "wrong": wrong}


def two_devices(context: Context) -> dict[str, Any]:
    """The second device computes what the first does, while the first is current."""
    count = torch.cuda.device_count() if context.device.type == "cuda" else 0
    if count < 2:
        return left_out(f"needs two GPUs, {count} are here")
    first = operands_of(context.device, 64, 40, seed=0)
    other = torch.device("cuda", 1 if context.device.index in (None, 0) else 0)
    second = [t.detach().to(other).requires_grad_() for t in first]
    wrong = [n for n, (a, b) in enumerate(zip(work(first), work(second), strict=True)) if not torch.equal(a, b.to(a))]
    alike = torch.cuda.get_device_name(context.device) == torch.cuda.get_device_name(other)
    words = f"{len(wrong)} of {len(first) + 1} results differ between {count} devices"
    return {"ok": not wrong or not alike, "words": words, "wrong": wrong}
