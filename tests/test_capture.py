"""What a call that was made before does beside launching kernels: nothing that a CUDA graph could not capture."""

import builtins
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from triton_conv import causal_ops, conv_calls, execute, plan, separable, stored

# Allocations of PyTorch's own allocator, copies and fills on the device, and views.
CAPTURABLE = {
    "empty.memory_format",
    "empty_strided.default",
    "new_empty.default",
    "new_empty_strided.default",
    "empty_like.default",
    "new_zeros.default",
    "zeros.default",
    "clone.default",
    "copy_.default",
    "fill_.Scalar",
    "zero_.default",
    "add_.Tensor",
    "view.default",
    "_unsafe_view.default",
    "permute.default",
    "transpose.int",
    "t.default",
    "unsqueeze.default",
    "diagonal.default",
    "select.int",
    "slice.Tensor",
    "alias.default",
    "detach.default",
    "lift_fresh.default",
}

_files: list[str] = []
_watching = False
sys.addaudithook(
    lambda event, args: _watching and event in ("open", "os.listdir", "os.scandir") and _files.append(event)
)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (kwargs or {}).get("device") != torch.device("meta"):  # shapes, without memory
            self.seen.add(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(kernels, monkeypatch):
    """Kernels by name, in place of being launched."""
    from triton_conv.kernels.launch import Launch

    names = []
    monkeypatch.setattr(Launch, "run", lambda self, tensors: names.append(self.name))
    return names


def walk(groups=1, padding=1, mode="zeros", stride=1):
    return [stride] * 2, [padding] * 4, [1, 1], groups, mode, None


def tensors(*shapes, dtype=torch.float32, last=False):
    made = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    return [t.to(memory_format=torch.channels_last) if last and t.dim() == 4 else t for t in made]


def cases():
    x, w, y = tensors((4, 32, 8, 8), (32, 32, 3, 3), (4, 32, 8, 8), dtype=torch.bfloat16, last=True)
    a, v, dy = tensors((4, 32, 8, 8), (32, 32, 3, 3), (4, 32, 8, 8), dtype=torch.bfloat16)
    narrow = tensors((32, 4, 3, 3), dtype=torch.bfloat16)[0]
    deep, long = tensors((2, 4, 16, 16), (4, 1, 13, 13), dtype=torch.bfloat16)
    s, w1, b1, state = tensors((2, 8, 20), (8, 4), (8,), (2, 8, 3))
    i, d, p = tensors((2, 8, 9, 9), (8, 1, 3, 3), (16, 8, 1, 1))
    return {
        "box": lambda: execute.execute(conv_calls.conv_call(x, w, None, *walk())),
        "contiguous": lambda: execute.execute(conv_calls.conv_call(a, v, None, *walk())),
        "folded": lambda: execute.execute(conv_calls.conv_dgrad_call(dy, v, a.shape, *walk(mode="circular"))),
        "narrow groups": lambda: execute.execute(conv_calls.conv_call(x, narrow, None, *walk(8))),
        "wgrad": lambda: execute.execute(conv_calls.conv_wgrad_call(dy, a, v.shape, v.stride(), *walk())),
        "box wgrad": lambda: execute.execute(conv_calls.conv_wgrad_call(y, x, w.shape, w.stride(), *walk())),
        "depthwise": lambda: execute.execute(conv_calls.conv_call(a, v[:, :1], None, *walk(32))),
        "banded": lambda: execute.execute(conv_calls.conv_call(deep, long, None, *walk(4, 6))),
        "causal": lambda: causal_ops._forward(s, w1, b1, state, True, True),
        "causal backward": lambda: causal_ops._backward(s, state, s, w1, b1, state, True),
        "causal step": lambda: causal_ops._update(s, state, w1, b1, True),
        "separable": lambda: separable._run(i, d, p, None, None, [1, 1], [0] * 4, [1, 1], "zeros", None, True),
    }


@pytest.mark.parametrize("name", cases())
def test_a_warm_call_reads_no_file_and_waits_for_nothing(name, launched):
    global _watching
    call = cases()[name]
    call()
    cold, launched[:] = list(launched), []
    assert cold
    _files.clear()
    _watching = True
    try:
        call()
    finally:
        _watching = False
    with Operators() as operators:
        call()
    assert launched == 2 * cold
    assert _files == []
    assert operators.seen <= CAPTURABLE


def test_the_watch_sees_what_must_not_be(tmp_path):
    global _watching
    with Operators() as operators:
        _watching = True
        try:
            builtins.open(tmp_path / "file", "w").close()
            torch.ones(1).item()
        finally:
            _watching = False
    assert "open" in _files
    assert not operators.seen <= CAPTURABLE


def test_configs_may_be_read_while_a_graph_is_captured(launched, monkeypatch, tmp_path):
    """A first call is planned, and may look files up, whatever the stream does: nothing of that is CUDA's."""
    monkeypatch.setenv("TRITON_CONV_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    looked = []
    read = stored.read
    monkeypatch.setattr(stored, "read", lambda path, *rest: looked.append(path) or read(path, *rest))
    stored.forget()
    try:
        call = cases()["box"]
        with Operators() as operators:
            call()
    finally:
        stored.forget()
    assert looked
    assert launched == ["box"]
    assert operators.seen <= CAPTURABLE


def test_what_was_captured_is_planned_only_once(launched):
    call = cases()["box"]
    call()
    misses = plan._make.cache_info().misses
    call()
    assert plan._make.cache_info().misses == misses
