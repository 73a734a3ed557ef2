"""The kernels and layouts that a problem may be computed in: copied activations, bundled groups, banded filters."""

import math

import pytest
import torch
from halves import first_of

from triton_conv import choose, config, execute, explain, plan, ways
from triton_conv.check import Case, check_case
from triton_conv.config import BandedConfig
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


@pytest.mark.parametrize("spatial", [(7,), (4, 5), (3, 4, 5)])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 0}, {"transposed": True, "stride": 2}, {"modes": "reflect"}],
    ids=["plain", "strided", "transposed", "reflect"],
)
def test_activations_copied_to_channels_last_are_right(spatial, options, kernels, leaving_the_plainest):
    kernel = 3 if len(spatial) < 3 else (1, 2, 3)  # the interpreter takes its time for each tap
    case = Case.of(spatial, kernel, **{"C": 16, "K": 32, "padding": 1, "dtype": torch.bfloat16, **options})
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


# ---------------------------------------------------------------------------------------------------------------------
# Long depthwise filters: sums in registers, or banded matrices


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("C", "size", "taps"), [(128, 56, 31), (256, 28, 29), (512, 14, 27)])
def test_the_filters_of_replknet_become_banded_matrices(C, size, taps, channels_last):
    options = {"padding": taps // 2, "groups": C, "channels_last": channels_last, **BFLOAT16}
    for role, p in zip(Role, explain.plans((64, C, size, size), (C, 1, taps, taps), **options).values(), strict=True):
        assert p.kernel == ("banded_wgrad" if role is Role.WGRAD else "banded")
        assert p.packs == (("x", "y") if channels_last else ())
        assert ("contiguous" in str(p)) is channels_last
        assert "us of depthwise" in p.reason
        assert p.seconds < choose.WORTH_LEAVING * _direct(problem_of(p)).seconds


def problem_of(p: plan.Plan) -> ways.Problem:
    """The problem that a plan of a dense tensor is for, its operands as the plan reads them."""
    numerics = (p.numerics.precision, p.numerics.has_bias, p.numerics.has_scale)
    return ways.Problem(p.role, p.asked, p.dtype, p.out_dtype, p.strides, *numerics, True, p.device)


def _direct(problem: ways.Problem) -> plan.Plan:
    way = ways.of(problem, problem.geometry, problem.strides, False, None)[0]
    assert way.kernel.startswith("depthwise")
    return plan._assembled(problem, problem.geometry, problem.strides, way)


@pytest.mark.parametrize("taps", [1, 3, 7, 11])
def test_shorter_filters_are_summed_in_registers(taps):
    for size, channels_last in ((56, True), (14, False)):
        options = {"padding": taps // 2, "groups": 64, "channels_last": channels_last, **BFLOAT16}
        for p in explain.plans((64, 64, size, size), (64, 1, taps, taps), **options).values():
            assert p.kernel.startswith("depthwise")
            assert "banded" not in p.reason


def test_the_workspace_of_banded_matrices_is_named():
    p = explain.plans((64, 128, 56, 56), (128, 1, 31, 31), padding=15, groups=128, channels_last=True, **BFLOAT16)
    copies, shifted = 2 * 64 * 128 * 56 * 56 * 2, 128 * 8 * 31 * 40 * 2
    assert p["forward"].workspace_bytes == p["input gradient"].workspace_bytes == copies + shifted
    assert p["weight gradient"].workspace_bytes == copies
    assert "the filters at every shift within a vector" in str(p["forward"])
    assert "copy the input to contiguous; copy the output from contiguous" in str(p["forward"])


TILES = BandedConfig((2, 4, 2), 2, 16, 16)
EXPLICIT = dict.fromkeys(Role, TILES) | {Role.WGRAD: BandedConfig((2, 8, 1), 2, 16, 32, splits=3)}
LONG = {"input_shape": (4, 8, 28, 28), "weight_shape": (8, 1, 13, 13), "groups": 8, "padding": 6, **BFLOAT16}
OBSTACLES = [
    ({"stride": 2}, "its stride is more than 1"),
    ({"dilation": 2, "padding": 12}, "its filter is dilated"),
    ({"dtype": torch.float64}, "float64 as ieee is not multiplied on matrix units"),
    ({"dtype": torch.int8}, "int8 as ieee is not multiplied on matrix units"),
    ({"dtype": torch.float32, "precision": "ieee"}, "float32 as ieee is not multiplied on matrix units"),
    ({"dtype": torch.float32, "precision": "tf32x3"}, "float32 as tf32x3 is not multiplied on matrix units"),
    ({"weight_shape": (16, 1, 13, 13)}, "an input channel has 2 filters"),
    ({"weight_shape": (8, 2, 13, 13), "groups": 4}, "its groups have several input channels"),
    (
        {"input_shape": (4, 8, 9, 28, 28), "weight_shape": (8, 1, 3, 13, 13), "padding": (1, 6, 6)},
        "it has three spatial axes",
    ),
]


@pytest.mark.parametrize(("change", "words"), OBSTACLES, ids=[words for _, words in OBSTACLES])
def test_what_keeps_a_convolution_from_banded_matrices(change, words, leaving_the_plainest):
    layer = {**LONG, **change}
    for p in explain.plans(**layer).values():
        assert "banded" not in p.kernel
    with config.explicit({Role.FPROP: TILES}), pytest.raises(RuntimeError, match=f"a banded config.*but {words}"):
        explain.plans(**layer)


def test_a_border_to_fold_keeps_a_gradient_from_banded_matrices(leaving_the_plainest):
    p = explain.plans(**LONG, padding_mode="circular")
    assert [p.kernel for p in p.values()] == ["banded", "depthwise", "banded_wgrad"]
    with (
        config.explicit({Role.DGRAD: TILES}),
        pytest.raises(RuntimeError, match="the border of its gradient is folded"),
    ):
        explain.plans(**LONG, padding_mode="circular")


def test_an_explicit_banded_config_is_taken_even_for_short_filters():
    layer = {**LONG, "weight_shape": (8, 1, 3, 3), "padding": 1}
    with config.explicit(EXPLICIT):
        for given, p in zip(EXPLICIT.values(), explain.plans(**layer).values(), strict=True):
            assert p.config is given
            assert "config given explicitly" in p.reason
    with config.explicit({Role.FPROP: EXPLICIT[Role.WGRAD]}), pytest.raises(RuntimeError, match="3 splits are for"):
        explain.plans(**LONG)


@pytest.fixture
def banded_alone(leaving_the_plainest, monkeypatch):
    """Plans take banded matrices wherever they can run."""
    every = ways.of

    def of(*problem):
        found = every(*problem)
        return [way for way in found if way.kernel.startswith("banded")] or found

    monkeypatch.setattr(ways, "of", of)


def _long(spatial, kernel, **options) -> Case:
    return Case.of(spatial, kernel, **{"C": 3, "K": 3, "groups": 3, "N": 2, "dtype": torch.bfloat16, **options})


CASES = [
    _long((9, 16), 13, padding=6),
    _long((8, 12), 31, padding=15, memory_format="channels_last", dtype=torch.float16),
    _long((5, 7), 13, padding=6, memory_format="channels_last", dtype=torch.float32, precision="tf32"),
    _long((7, 9), (2, 14), padding=((1, 0), (13, 2)), memory_format="strided"),
    _long((6, 9), (5, 13), padding=(2, 6), memory_format="expanded"),
    _long((40,), 21, padding=((20, 0),)),
    _long((40,), 21, padding=((20, 0),), memory_format="channels_last"),
    _long((19, 1), (13, 1), padding=(6, 0)),
    _long((1, 8, 9), (1, 5, 13), padding=(0, 2, 6), memory_format="channels_last"),
    _long((8, 10), 13, padding=6, modes=("circular", "reflect"), memory_format="channels_last"),
    _long((8, 7), 13, padding=6, transposed=True, memory_format="channels_last"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_banded_matrices_are_right(case, kernels, banded_alone):
    found = [p.kernel for p in plans_of(case, kernels)[:3]]
    expected = ["banded", "banded", "banded_wgrad"]
    if set(case.modes) != {"zeros"}:
        expected[1] = "depthwise"
    assert found == expected


def test_banded_matrices_of_an_explicit_config_are_right(kernels):
    with config.explicit(EXPLICIT):
        for memory_format in ("contiguous", "channels_last"):
            case = _long((9, 11), (3, 5), padding=(1, 2), memory_format=memory_format)
            assert [p.config for p in plans_of(case, kernels)[:3]] == list(EXPLICIT.values())


@pytest.mark.parametrize("memory_format", first_of(["channels_last", "contiguous"], 1))
def test_long_filters_are_right_by_choice(memory_format, kernels):
    case = _long((24, 24), 31, padding=15, C=2, K=2, groups=2, N=16, memory_format=memory_format)
    assert all(p.kernel.startswith("banded") for p in plans_of(case, kernels)[:2])
