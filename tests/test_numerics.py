"""The same bits on every run, and PyTorch's settings of TF32 obeyed at each call, by every kernel."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import triton_conv
from triton_conv import backends, conv_calls, execute, plan, separable
from triton_conv.devices import H200

KERNELS = sorted((Path(plan.__file__).parent / "kernels").glob("*.py"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_kernel_adds_to_memory_that_others_add_to(path):
    """Without atomics a sum has one order, that of its program; `triton-conv audit` reads the same from the binary."""
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not [name for name in names if "atomic" in name or "reduce_add" in name]


@contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def results(where, options):
    generator = torch.Generator().manual_seed(3)
    groups = options.get("groups", 1)
    x, w, b = (torch.randn(s, generator=generator).to(where) for s in ((3, 8, 4, 4), (8, 8 // groups, 3, 3), (8,)))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    y = triton_conv.conv2d(*leaves, padding=1, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, y.detach())


@pytest.mark.parametrize("options", [{}, {"groups": 8}, {"padding_mode": "circular"}], ids=str)
def test_every_run_gives_the_same_bits(kernels, options):
    first = results(kernels, options)
    with deterministic():  # raises for what is not; allocations are filled, so what nobody writes shows
        again = [results(kernels, options) for _ in range(20 if torch.cuda.is_available() else 2)]
    for other in again:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_every_run_of_plain_torch_gives_the_same_bits():
    first = results("cpu", {})
    with deterministic():
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(first, results("cpu", {}), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# TF32


def old_style(on):
    with torch.backends.__allow_nonbracketed_mutation():  # which torch.testing forbids for the whole process
        torch.backends.cudnn.allow_tf32 = on


def new_style(on):
    torch.backends.cudnn.conv.fp32_precision = "tf32" if on else "ieee"


@pytest.fixture(params=[old_style, new_style])
def setting(request):
    conv, allowed = torch.backends.cudnn.conv, torch.backends.cudnn.allow_tf32
    before = conv.fp32_precision
    yield request.param
    if request.param is old_style:
        old_style(allowed)  # set in the new style, PyTorch would find the two at odds
    else:
        conv.fp32_precision = before


def calls():
    """A call of every family of kernels, in float32."""

    def meta(*shape, last=False):
        t = torch.empty(shape, device="meta")
        return t.to(memory_format=torch.channels_last) if last and len(shape) == 4 else t

    def walk(groups=1, padding=1, mode="zeros"):
        return [1, 1], [padding] * 4, [1, 1], groups, mode, None

    x, w, y = meta(8, 32, 16, 16, last=True), meta(32, 32, 3, 3, last=True), meta(8, 32, 16, 16, last=True)
    long = meta(32, 1, 31, 31)
    return {
        "box": conv_calls.conv_call(x, w, None, *walk()),
        "gather": conv_calls.conv_call(x, w, None, *walk(mode="circular")),
        "folded": conv_calls.conv_dgrad_call(y, w, x.shape, *walk(mode="reflect")),
        "wgrad": conv_calls.conv_wgrad_call(y, x, w.shape, w.stride(), *walk()),
        "depthwise": conv_calls.conv_call(x, meta(32, 1, 3, 3), None, *walk(32)),
        "banded": conv_calls.conv_call(meta(64, 32, 56, 56), long, None, *walk(32, 15)),
    }


def test_every_family_obeys_both_settings_of_tf32_at_each_call(setting):
    made = calls()
    for on in (True, False, True):
        setting(on)
        asked = "tf32" if on else "ieee"
        assert backends.default_precision() == asked
        plans = {name: plan.make(execute.problem_of(call, H200)) for name, call in made.items()}
        assert {p.numerics.precision for p in plans.values()} == {asked}
        # boxes and banded matrices are for TF32: the settings decide whose kernel runs
        assert (plans["box"].kernel, plans["banded"].kernel) == (("box", "banded") if on else ("gather", "depthwise"))


def test_separable_convolutions_obey_them_too(setting):
    x, depthwise, pointwise = (torch.empty(s, device="meta") for s in ((2, 8, 9, 9), (8, 1, 3, 3), (16, 8, 1, 1)))
    for on in (True, False):
        setting(on)
        first, second = separable._calls(x, depthwise, pointwise, None, None, [1, 1], [0] * 4, [1, 1], "zeros", None)
        made = separable.plan_of(first, second, pointwise, None, separable._empty(x, second), H200)
        assert made.numerics.precision == ("tf32" if on else "ieee")


def test_compiled_code_obeys_them_live(kernels, setting):
    x, w = torch.randn(1, 8, 5, 5, device=kernels), torch.randn(8, 8, 3, 3, device=kernels)
    setting(False)
    compiled = torch.compile(lambda x: triton_conv.conv2d(x, w), backend="aot_eager", fullgraph=True)
    compiled(x)
    for on in (True, False):
        setting(on)
        with execute.problems() as problems:
            compiled(x)
        assert {problem.precision for problem in problems} == {"tf32" if on else "ieee"}
