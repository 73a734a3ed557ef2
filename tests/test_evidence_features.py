"""The stage of features: its units on the CPU, and what they catch."""

import json

import pytest
import torch

import triton_conv
from bench.evidence import bits, capture, compiled, features, huge, steady
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


def test_what_is_not_written_fails(context, kernels, monkeypatch):
    monkeypatch.setattr(huge.execute, "run", lambda p, call, output: output)
    assert "not written" in huge.checked(huge.HUGE[0], context)["words"]


@pytest.mark.parametrize(
    "unit",
    [
        huge._causal,
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
