"""What waits for a module to be imported."""

import importlib
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

import triton_conv
from triton_conv.later import when_imported


def test_all_that_wait_for_a_module_are_called(tmp_path, monkeypatch):
    (tmp_path / "awaited_by_two.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    called = []
    for name in "abc":
        when_imported("awaited_by_two", lambda name=name: called.append((name, sys.modules["awaited_by_two"].value)))
    assert not called
    importlib.import_module("awaited_by_two")
    assert called == [("a", 3), ("b", 3), ("c", 3)]
    when_imported("awaited_by_two", lambda: called.append("at once"))
    assert called[-1] == "at once"


def test_flops_of_streaming_convolutions_are_counted():
    x, w = torch.randn(2, 3, 4, 5, 5), torch.randn(6, 3, 3, 1, 1, requires_grad=True)
    context, flops = torch.randn(2, 3, 2, 5, 5), 2 * (2 * 4 * 5 * 5) * 6 * 3 * 3
    with FlopCounterMode(display=False) as counter:
        triton_conv.causal_conv3d(x, w, context=context).sum().backward()
    assert counter.get_total_flops() == 2 * flops
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        triton_conv.causal_conv3d(x, w, context=context, activation="silu")
    assert counter.get_total_flops() == flops
