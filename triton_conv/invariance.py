"""`batch_invariant`: the bits of a sample are the same in every batch."""

from __future__ import annotations

from types import TracebackType

import torch

from .settings import Setting

_DEFAULT = 8  # of which plans are made, unless the user names another

_batch: Setting[int | None] = Setting(None)


class batch_invariant:
    """Let no sample's bits depend on the batch it is in, for the process; as a context manager, until its end.

        >>> x, w = torch.randn(64, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> with triton_conv.batch_invariant():
        ...     torch.equal(triton_conv.conv2d(x[:1], w), triton_conv.conv2d(x, w)[:1])
        True
        >>> triton_conv.batch_invariant()  # from here on
        batch_invariant(batch=8)
        >>> triton_conv.batch_invariant(False)
        batch_invariant(False)

    Covers outputs and input gradients of every convolution here, whatever the number of samples, their places in the
    batch and the batch's stride. Not the gradients of weights and biases: they are sums over the batch. A sample is to
    lie in memory alike in both batches: contiguous and channels-last tensors are computed in different orders.

    enabled: False lets plans depend on the batch again, as they do by default. batch: the number of samples that plans
    are made for and stored configs are looked up for, instead of the call's own. Every batch runs what suits this one:
    calls of many fewer samples may leave multiprocessors idle, of many more may run smaller tiles than they could.
    `backend("auto")` runs none of cuDNN's kernels meanwhile. A CPU, where PyTorch computes, takes samples one by one.

    It is read at each call, also by what torch.compile has compiled; a CUDA graph keeps what it has captured. Raises
    TypeError or ValueError for a batch that is no whole number above 0, and RuntimeError inside of compiled code.

    Why that is enough: an output element is one sum. Its order is set by the kernel, by the layout and groups it is
    given (what is copied, how many groups are computed as one), by its config and by the sample's own sizes and
    strides; nowhere is a sum split over programs that others join, for only weight gradients have splits. So a choice
    made without the batch leaves the order as it is, and the same instructions too: a smaller tile may be multiplied by
    another one, which rounds in other places. The place of a sample in a tile changes who computes it, not what.
    """

    def __init__(self, enabled: bool = True, *, batch: int = _DEFAULT) -> None:
        if isinstance(batch, bool) or not isinstance(batch, int):
            raise TypeError(f"batch must be a whole number, but got batch={batch!r}")
        if batch < 1:
            raise ValueError(f"batch must be above 0, but got batch={batch}")
        if not isinstance(enabled, bool):
            raise TypeError(f"enabled must be True or False, but got enabled={enabled!r}; a batch is given by name")
        if torch.compiler.is_compiling():  # the graph would run after what is changed here has been put back
            raise RuntimeError("batch_invariant: call it outside of what torch.compile compiles, which obeys it")
        self._mine = batch if enabled else None
        _batch.push(self, self._mine)

    def __enter__(self) -> None:
        _batch.enter(self, self._mine)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _batch.end(self)

    def __repr__(self) -> str:
        return "batch_invariant(False)" if self._mine is None else f"batch_invariant(batch={self._mine})"


def batch() -> int | None:
    """The number of samples that plans are made for, whatever a call's own; None for the call's own."""
    return _batch.value
