"""The stage of features: its units on the CPU, and what they catch."""

import json
from math import prod

import far_kernels
import pytest
import torch

import triton_conv
from bench.evidence import bits, capture, compiled, features, huge, huge_calls, steady
from bench.evidence.units import Context
from triton_conv import devices

CPU = torch.device("cpu")


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path, CPU, True, lambda: 1000.0)


def test_names_are_apart_and_cheap_to_list(context, kernels):
    names = [unit.name for unit in features.units(context)]
    assert len(set(names)) == len(names) > len(huge.HUGE)


@pytest.mark.parametrize("case", huge.HUGE, ids=lambda case: case.name)
def test_huge_tensors_meet_the_kernel_that_is_meant(case):
    p = case.plan(devices.H200, tiny=False)
    assert p.kernel == case.kernel
    assert p.numerics.index_bits == case.bits


def test_huge_cases_cover_every_kernel():
    families = {"gather", "box", "wgrad", "box_wgrad", "depthwise", "depthwise_wgrad", "banded", "banded_wgrad"}
    assert {case.kernel for case in huge.HUGE} == families


@pytest.mark.parametrize("name", ["box fprop", "gather wgrad", "gather one image dgrad", "box stride 2 dgrad"])
def test_slices_are_right(name, context, kernels):
    (case,) = (case for case in huge.HUGE if case.name == name)
    facts = huge.checked(case, context)
    assert facts["ok"], facts["words"]


@pytest.mark.parametrize("name", ["box fprop", "gather wgrad", "gather one image fprop"])
def test_a_slice_that_is_off_fails(name, context, kernels, monkeypatch):
    (case,) = (case for case in huge.HUGE if case.name == name)
    run = huge.execute.run

    def broken(p, call, output):
        run(p, call, output)
        output[-1, ..., -1, :].add_(2)  # the end of the memory
        return output

    monkeypatch.setattr(huge.execute, "run", broken)
    facts = huge.checked(case, context)
    assert not facts["ok"]
    assert "are off" in facts["words"]


@pytest.mark.parametrize("call", huge_calls.CALLS, ids=lambda call: call.name)
@pytest.mark.parametrize("device", [devices.DEVICES["H100"], devices.DEVICES["H200"]], ids=lambda device: device.name)
def test_huge_calls_meet_the_kernels_that_are_meant(call, device):
    found = call.plans(device)
    assert {p.kernel for p in found} == set(call.kernels)
    assert all(p.numerics.index_bits == 64 for p in found if p.kernel != "activation_backward")
    assert max(prod(shape) for shape in call.kind.shapes(call.layer).values()) > 2**31
    assert call.needs < 76  # GiB, of 78 that an H100 has free


def test_every_kernel_is_run_on_huge_tensors(kernels):
    """Another one needs a line in `huge.HUGE` or `huge_calls.CALLS`; those of causal ones have units of their own."""
    plans = [case.plan(devices.H200, tiny=False) for case in huge.HUGE]
    plans += [p for call in huge_calls.CALLS for p in call.plans(devices.H200)]
    found = {launch.kernel.fn.__name__ for p in plans for launch in p.launches}
    causal = {"forward_kernel", "backward_kernel", "update_kernel"}
    assert found | causal == far_kernels.launched().keys()


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(call, id=call.name, marks=() if call.name in ("branches", "separable") else pytest.mark.slow)
        for call in huge_calls.CALLS
    ],
)
def test_images_of_calls_are_right(call, context, kernels):
    facts = huge_calls.checked(call, context)
    assert facts["ok"], facts["words"]
    json.dumps(facts, allow_nan=False)


_FUSED = next(call for call in huge_calls.CALLS if call.name == "gelu and residual")


def test_what_is_off_in_a_call_fails(context, kernels, monkeypatch):
    """In an image that is looked at, in a sum, and in one where nothing should be."""
    call = _FUSED._replace(tiny=_FUSED.tiny._replace(input=(4, *_FUSED.tiny.input[1:])))
    where = ([0, 2, 3], context.device)
    t, found, dy = huge_calls._computed(call, call.tiny, *where)
    for name, place, value, words in (
        ("y", (3, -1, -1, -1), 99, "elements of y of image 3"),
        ("dx", (2, 0, 0, 0), 99, "elements of dx of image 2"),
        ("dw", (0, -1, -1, -1), 999, "elements of dw,"),
        ("dx", (1, 0, 0, 0), 1, "dx is not zero where no gradient arrived"),
        ("y", (1, 0, 0, 0), torch.nan, "elements of y are not written"),
    ):
        broken = {**found, name: found[name].clone()}
        broken[name][place] = value
        monkeypatch.setattr(huge_calls, "_computed", lambda *args, broken=broken: (t, broken, dy))
        facts = huge_calls.checked(call, context)
        assert not facts["ok"]
        assert words in facts["words"]


def test_calls_that_need_more_memory_than_is_free_are_left_out(context, monkeypatch):
    there = context.__class__(context.out, torch.device("cuda"), False, context.left)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    facts = huge_calls.checked(_FUSED, there)
    assert facts["left_out"]
    assert facts["words"] == "left out: gelu and residual needs about 60 GiB, 20 are free"


def test_what_is_not_written_fails(context, kernels, monkeypatch):
    monkeypatch.setattr(huge.execute, "run", lambda p, call, output: output)
    assert "not written" in huge.checked(huge.HUGE[0], context)["words"]


@pytest.mark.parametrize(
    "unit",
    [
        huge._causal,
        huge._causal_update,
        capture.graphed,
        capture.side_stream,
        capture.threads,
        capture.two_devices,
        steady.host_cost,
        steady.host_parts,
        bits._ahead,
        bits.switched,
        steady.first_call,
        steady.scaled,
        steady.flat_memory,
        steady.repeated,
        compiled.dynamic,
    ],
    ids=lambda unit: unit.__name__,
)
def test_units_run_on_a_cpu(unit, context):
    facts = unit(context)
    assert facts["ok"], facts["words"]
    json.dumps(facts, allow_nan=False)


def test_compiled_equals_eager(context):
    facts = compiled.compiled("default", context)
    assert facts["ok"], facts["words"]


def test_compiled_that_differs_fails(context, monkeypatch):
    monkeypatch.setattr(compiled, "_compile", lambda model, context, **how: lambda x: 1.01 * model(x))
    assert not compiled.dynamic(context)["ok"]


def test_bits_are_of_every_kernel_that_has_a_plan():
    recorded = [family for family in bits.FAMILIES if family.recorded]
    kernels = {p.kernel for family in recorded for p in bits.plans(family, devices.H200, (1, 7))}
    assert kernels == {"gather", "box", "wgrad", "box_wgrad", "depthwise", "depthwise_wgrad", "banded", "banded_wgrad"}
    assert any(p.fold for family in recorded for p in bits.plans(family, devices.H200, (1, 7)))


def same_bits(family, context):
    facts = bits.same_bits(family, context)
    assert facts["ok"], facts["words"]
    assert facts["words"].endswith("the same bits")
    json.dumps(facts)


@pytest.mark.parametrize("family", bits.FAMILIES, ids=lambda family: family.name)
def test_bits_of_every_family(family, context):
    same_bits(family, context)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.name, marks=() if family.name in bits.SIMULATED else pytest.mark.slow)
        for family in bits.FAMILIES
    ],
)
def test_bits_of_every_kernel(family, context, kernels):
    same_bits(family, context)


@pytest.mark.parametrize(("when", "where"), [(2, "sample 0"), (6, "run 2"), (7, "a warm run")])
def test_bits_that_vary_are_found(context, when, where):
    count = iter(range(100))
    family = bits.FAMILIES[0]._replace(
        function=lambda *args, **how: triton_conv.conv2d(*args, **how) * (1 + 1e-1 * (next(count) == when - 1))
    )
    facts = bits.same_bits(family, context)
    assert not facts["ok"]
    assert where in facts["words"]


def test_tf32_that_is_not_switched_fails(context, monkeypatch):
    real = triton_conv.conv2d
    named = lambda *args, precision="ieee": real(*args) * (2 if precision == "tf32" else 1)  # noqa: E731
    monkeypatch.setattr(triton_conv, "conv2d", named)
    assert not bits.switched(context)["ok"]


def test_bits_that_vary_fail(context, monkeypatch):
    real, calls = triton_conv.conv2d, iter(range(1000))
    varying = lambda *args, **how: real(*args, **how) * (1 + 1e-3 * next(calls))  # noqa: E731
    monkeypatch.setattr(capture, "conv2d", varying)
    assert not steady.repeated(context)["ok"]
    assert not capture.threads(context)["ok"]


def test_memory_that_grows_fails(context, monkeypatch):
    held = []
    monkeypatch.setattr(steady, "conv2d", lambda *args, **how: held.append(torch.ones(2**21)))
    assert not steady.flat_memory(context)["ok"]
