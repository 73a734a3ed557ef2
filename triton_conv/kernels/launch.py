"""What a launch of a kernel is before it has addresses: worked out once for a plan, then run or compiled."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import lru_cache
from typing import Any, NamedTuple

from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Box(NamedTuple):
    """A tensor descriptor of an operand, without its address; units are elements."""

    operand: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


def all_registers(num_warps: int) -> int:
    """What a thread can have at most, as a limit of a kernel: `maxnreg`.

    Told a limit, the assembler takes what it needs up to there. Left alone, it aims at fewer, for room for one more
    block on a multiprocessor, and then spills.
    """
    return min(255, 2**16 // (32 * num_warps))


class Launch(NamedTuple):
    """A kernel, its number of programs, its tensors by name and every other argument by keyword.

    The names of tensors are "x", "w", "y", "scale_a", "scale_b", "bias" and "workspace"; None is a tensor that is not
    there.
    """

    name: str
    kernel: Any
    programs: int
    operands: tuple[str | Box | None, ...]
    arguments: dict[str, Any]

    def run(self, tensors: Mapping[str, Any]) -> None:
        """Launches it on the current device."""
        if self.programs:
            self.kernel[(self.programs,)](*self._bound(tensors), **self.arguments)

    def compile(self, dtypes: Mapping[str, Any]) -> Any:
        """The compiled kernel for operands of these dtypes, for the target that Triton's driver names."""
        stand_ins = {name: MockTensor(dtype) for name, dtype in dtypes.items()}
        return self.kernel.warmup(*self._bound(stand_ins), **self.arguments, grid=(1,))

    def _bound(self, tensors: Mapping[str, Any]) -> list:
        bound = []
        for operand in self.operands:
            if isinstance(operand, Box):
                tensor = tensors[operand.operand]
                descriptor = copy(_checked(operand, tensor.dtype))
                descriptor.base = tensor
                bound.append(descriptor)
            else:
                bound.append(operand if operand is None else tensors[operand])
        return bound


@lru_cache(maxsize=16384)
def _checked(box: Box, dtype: Any) -> TensorDescriptor:
    """A descriptor that Triton has found valid, at no address: the checks are not repeated at every launch."""
    return TensorDescriptor(MockTensor(dtype), list(box.shape), list(box.strides), list(box.block))
