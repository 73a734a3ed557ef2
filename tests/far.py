"""Memory far apart and launches in part, for tests of what would not fit: nothing untouched takes any memory."""

import mmap
from contextlib import contextmanager

import torch

# So many elements lie before a tensor as an offset of 32 bits may point back, by mistake: it finds memory there.
_BEFORE = 2**31
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.13 is the first to name it


def span(shape, strides) -> int:
    return 1 + sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True))


def empty(shape, strides, dtype) -> torch.Tensor:
    """A tensor of zeros of any strides, in memory that is taken as it is touched."""
    size = (2 * _BEFORE + span(shape, strides)) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides, _BEFORE)


def dense(shape, last=False) -> tuple[int, ...]:
    """Strides of a contiguous tensor, or of one whose second axis lies innermost."""
    order = (0, *range(2, len(shape)), 1) if last else range(len(shape))
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


@contextmanager
def no_overflow():
    """Makes the interpreter raise where integers of 32 bits overflow."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    options = builder.options

    def asserted(condition, message):
        assert condition.data.all(), message

    builder.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=True)
    builder.create_assert = asserted
    try:
        yield
    finally:
        builder.options = options
        del builder.create_assert


def run_some(launch, tensors, ids) -> None:
    """Runs some programs of a launch of many; negative ones count from the last."""
    from triton.runtime.interpreter import interpreter_builder as builder

    total, set_dim, set_index = launch.programs, builder.set_grid_dim, builder.set_grid_idx
    builder.set_grid_dim = lambda *_: set_dim(total, 1, 1)
    builder.set_grid_idx = lambda x, y, z: set_index(ids[x] % total, y, z)
    try:
        launch._replace(programs=len(ids)).run(tensors)
    finally:
        del builder.set_grid_dim, builder.set_grid_idx
