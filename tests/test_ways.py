"""The layouts that a problem may be computed in: activations copied to channels-last, groups bundled."""

import math

import pytest
import torch

from triton_conv import choose, config, execute, explain, plan, ways
from triton_conv.check import Case, check_case
from triton_conv.geometry import Role

BFLOAT16 = {"dtype": torch.bfloat16}


@pytest.fixture
def leaving_the_plainest(monkeypatch):
    """Plans take the best of the other ways, whatever it is predicted to cost."""
    monkeypatch.setattr(choose, "WORTH_LEAVING", math.inf)
    plan._make.cache_clear()
    yield
    plan._make.cache_clear()


def plans_of(case: Case, device: str) -> list[plan.Plan]:
    """The plans of y, dx and dw, once the case has been found right."""
    with execute.recording() as calls:
        wrong = [r for r in check_case(case, 0, device) if not r.ok]
    assert not wrong, f"{case}: {wrong}"
    plans = [plan.make(execute.problem_of(c, execute.device_of(torch.device(device)))) for c in calls]
    assert [p.role for p in plans[:3]] == (
        [Role.DGRAD, Role.FPROP, Role.WGRAD] if case.transposed else [Role.FPROP, Role.DGRAD, Role.WGRAD]
    )
    return plans


GROUPED = [
    Case.of((6, 7), 3, C=32, K=32, groups=8, padding=1, memory_format="channels_last", dtype=torch.bfloat16),
    Case.of((6, 7), 3, C=32, K=32, groups=8, padding=1, dtype=torch.float16),
    Case.of((8, 6), (3, 2), C=12, K=24, groups=6, padding=1, stride=2, dtype=torch.float32, precision="tf32"),
    Case.of((9,), 3, C=24, K=48, groups=4, padding=2, dilation=2, dtype=torch.bfloat16),
    Case.of((3, 4, 5), 2, C=16, K=16, groups=4, memory_format="channels_last", dtype=torch.float16),
    Case.of((5, 6), 3, C=8, K=8, groups=2, padding=1, modes="circular", dtype=torch.float16),
    Case.of((4, 5), 3, C=32, K=64, groups=16, stride=2, padding=1, transposed=True, dtype=torch.bfloat16),
    Case.of((5, 4), 3, C=8, K=32, groups=8, padding=1, memory_format="channels_last", dtype=torch.float16),
    Case.of((6, 6), 2, C=16, K=16, groups=4, stride=2, memory_format="channels_last", dtype=torch.bfloat16),
]


@pytest.fixture
def bundles_alone(leaving_the_plainest, monkeypatch):
    """Plans take a bundle of groups wherever there is one."""
    every = ways.of
    monkeypatch.setattr(ways, "of", lambda *problem: [w for w in every(*problem) if w.layout.bundle > 1])


@pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.id)
def test_bundles_of_groups_are_right(case, kernels, bundles_alone):
    plans_of(case, kernels)


@pytest.mark.parametrize("bundle", [2, 4, 8])
def test_every_size_of_bundle_gives_the_same(bundle, kernels, leaving_the_plainest, monkeypatch):
    monkeypatch.setattr("triton_conv.ways._bundles", lambda g: [bundle] if g.groups > 1 else [])
    case = Case.of((5, 6), 3, C=32, K=64, groups=8, padding=1, memory_format="channels_last", dtype=torch.float16)
    assert [p.bundle for p in plans_of(case, kernels)[:3]] == [bundle] * 3


@pytest.mark.parametrize("spatial", [(7,), (6, 5), (3, 4, 5)])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 0}, {"transposed": True, "stride": 2}, {"modes": "reflect"}],
    ids=["plain", "strided", "transposed", "reflect"],
)
def test_activations_copied_to_channels_last_are_right(spatial, options, kernels, leaving_the_plainest):
    case = Case.of(spatial, 3, **{"C": 16, "K": 32, "padding": 1, "dtype": torch.bfloat16, **options})
    plans = plans_of(case, kernels)
    sources = {Role.FPROP: {"x"}, Role.DGRAD: {"y"}, Role.WGRAD: {"x", "y"}}
    assert all(sources[p.role] <= set(p.packs) for p in plans)


def test_large_contiguous_convolutions_are_copied_and_small_ones_are_not():
    large = explain.plans((32, 256, 56, 56), (256, 256, 3, 3), padding=1, **BFLOAT16)
    small = explain.plans((1, 64, 14, 14), (64, 64, 3, 3), padding=1, **BFLOAT16)
    assert {title: p.packs for title, p in large.items()} == {
        "forward": ("x", "w"),
        "input gradient": ("y", "w"),
        "weight gradient": ("x", "y"),
    }
    assert all(p.packs == () for p in small.values())
    assert "not channels-last" in small["forward"].reason
    assert "after copies" in small["forward"].reason
    p = large["forward"]
    assert p.workspace_bytes == (32 * 256 * 56 * 56 + 256 * 256 * 9) * 2
    assert "copy the input to channels-last" in str(p)


def test_a_gpu_without_the_copy_engine_may_copy_too():
    p = explain.plans((32, 256, 56, 56), (256, 256, 3, 3), padding=1, device=config.DEVICES["A100"], **BFLOAT16)
    assert (p["forward"].kernel, p["forward"].packs) == ("gather", ("x", "w"))


def test_groups_of_few_channels_are_bundled_where_it_pays():
    shapes = ((128, 128, 56, 56), (128, 4, 3, 3))
    for p in explain.plans(*shapes, padding=1, groups=32, channels_last=True, **BFLOAT16).values():
        assert p.bundle in (4, 8, 16)
        assert p.geometry.groups * p.bundle == 32
        assert f"{p.bundle} groups in one" in str(p)
        assert p.roofline.flops == 2 * 128 * 128 * 4 * (56 * 3 - 2) ** 2
    exact = explain.plans(*shapes, padding=1, groups=32, channels_last=True, dtype=torch.int64)
    assert all(p.bundle == 1 for p in exact.values())


@pytest.mark.parametrize("groups", [1, 2, 64])
def test_wide_and_depthwise_groups_are_not_bundled(groups):
    plans = explain.plans((8, 64, 28, 28), (64, 64 // groups, 3, 3), groups=groups, channels_last=True, **BFLOAT16)
    assert all(p.bundle == 1 for p in plans.values())


def test_axes_longer_than_coordinates_reach_are_gathered():
    fits, beyond = (
        explain.plans((1, 16, n, 1), (16, 16, 1, 1), channels_last=True, **BFLOAT16) for n in (2**30, 2**31)
    )
    assert {p.kernel for p in fits.values()} == {"box", "box_wgrad"}
    assert {p.kernel for p in beyond.values()} == {"gather", "wgrad"}
    assert "coordinates" in beyond["forward"].reason
    assert beyond["forward"].numerics.index_bits == 64
