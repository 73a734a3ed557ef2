"""Kernels and reference in one process: Triton decides when it is imported whether it can interpret kernels.

Without a GPU, tests that take the `kernels` fixture run the real kernels in Triton's interpreter; the others run
the plain-torch reference. TRITON_INTERPRET=1 in the environment makes every test run the kernels.
"""

import importlib
import os
import pkgutil

import pytest
import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    # kernels too: one that a test imported without the variable could not be interpreted later
    for kernel in pkgutil.iter_modules(importlib.import_module("triton_conv.kernels").__path__):
        importlib.import_module(f"triton_conv.kernels.{kernel.name}")

    del os.environ["TRITON_INTERPRET"]

os.environ["TRITON_CONV_CACHE"] = "/dev/null/configs"  # no test depends on what was tuned here, nor adds to it
torch.set_num_threads(1)  # tensors are tiny: waking a second thread makes every convolution ten times slower


@pytest.fixture
def kernels(monkeypatch) -> str:
    """The device on which the test's convolutions run Triton kernels."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of what is launched."""
    from triton_conv.kernels.launch import Launch

    names, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, tensors: (names.append(self.name), run(self, tensors))[1])
    return names


@pytest.fixture
def poisoned():
    """torch.empty is filled with NaN (integers: their largest value), so that what nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


def pytest_collection_modifyitems(items):
    """Those that take minutes whatever the machine begin first, beside all others."""
    items.sort(key=lambda item: "test_minutes_are_flat" not in item.nodeid)
