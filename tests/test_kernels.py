"""The real kernels against float64: on a GPU where there is one, else in Triton's interpreter."""

import random
from dataclasses import replace

import pytest
import torch
from halves import first_of, half_of

import triton_conv
from triton_conv import config, execute, plan
from triton_conv.check import CASES, Case, check_case, random_case
from triton_conv.config import Config
from triton_conv.geometry import Role

GATHER, WGRAD = (Role.FPROP, Role.DGRAD), (Role.WGRAD,)


def assert_right(case: Case, device: str, seed: int = 0) -> None:
    wrong = [r for r in check_case(case, seed, device) if not r.ok]
    assert not wrong, f"{case}: {wrong}"


@pytest.fixture(autouse=True)
def _no_stale_plans():
    plan._make.cache_clear()
    yield
    plan._make.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_corner_cases(case, kernels):
    assert_right(case, kernels)


SEEDS = [*(seed for seed in range(60) if seed != 29), 29]  # 29 takes the interpreter a quarter of a minute


@pytest.mark.parametrize("seed", first_of(SEEDS, 30))
def test_random_cases(seed, kernels):
    assert_right(random_case(random.Random(seed)), kernels, seed)


# Cases that between them reach every branch of the kernels, small enough to run under many configs.
BRANCHES = [
    Case.of((3, 5), 3, C=17, K=10, padding=1),
    Case.of((4, 5), 3, C=16, K=24, stride=2, padding=1, memory_format="channels_last", dtype=torch.float16),
    Case.of((4, 3, 2), (3, 2, 1), C=6, K=4, groups=2, padding=((1, 1), (0, 1), (0, 0)), dilation=(1, 2, 1)),
    Case.of((4, 5), 3, C=3, K=5, padding=((2, 1), (0, 2)), modes=("reflect", "circular"), stride=(1, 2)),
    Case.of((4, 5), 3, C=5, K=3, stride=(3, 2), padding=1, output_padding=(2, 1), transposed=True),
    Case.of(11, 4, C=3, K=3, groups=3, padding=((3, 0),)),
]
GATHER_CONFIGS = [
    Config(16, 16, 16),
    Config(32, 16, 16, filters_first=True),
    Config(16, 32, 32, flatten=True),
    Config(64, 16, 16, flatten=True, filters_first=True),
    Config(32, 8, 16, dot=False),
    Config(64, 16, 8, dot=False, flatten=True, filters_first=True),
]
WGRAD_CONFIGS = [
    Config(16, 16, 16),
    Config(16, 32, 16, splits=3),
    Config(16, 16, 32, flatten=True, splits=2),
    Config(32, 16, 16, flatten=True),
    Config(16, 8, 16, dot=False, splits=5),
    Config(32, 16, 32, dot=False, flatten=True),
]


@pytest.mark.parametrize(("case", "tiles"), half_of(BRANCHES, range(len(GATHER_CONFIGS))))
def test_tiling_does_not_change_the_numbers(case, tiles, kernels):
    configs = {**dict.fromkeys(GATHER, GATHER_CONFIGS[tiles]), Role.WGRAD: WGRAD_CONFIGS[tiles]}
    with config.explicit(configs):
        assert_right(case, kernels)


@pytest.mark.parametrize("case", BRANCHES, ids=lambda case: case.id)
def test_64_bit_offsets(case, kernels, monkeypatch):
    monkeypatch.setattr(plan, "_reach", lambda *_: 2**31)
    assert_right(case, kernels)


def test_more_splits_than_pixels_leave_empty_slabs(kernels):
    case = Case.of((3, 3), 2, C=3, K=4)
    with config.explicit({Role.WGRAD: Config(16, 16, 16, splits=7)}):
        assert_right(case, kernels)


def test_default_config_splits_long_reductions(kernels):
    case = Case.of(5000, 3, C=1, K=4, N=1, padding=1)
    with execute.recording() as calls:
        assert_right(case, kernels)
    call = next(c for c in calls if c.role is Role.WGRAD)
    device = execute.device_of(torch.device(kernels))
    assert plan.make(execute.problem_of(call, device)).config.splits > 1


@pytest.mark.parametrize("case", BRANCHES[:4:2], ids=lambda case: case.id)
def test_same_bits_every_run(case, kernels):
    operands = case.operands(3, kernels)
    configs = {Role.WGRAD: Config(16, 16, 16, splits=3)}
    with config.explicit(configs):
        first, second = case.run(operands), case.run(operands)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_kernels_run_and_not_the_reference(kernels, monkeypatch):
    def refuse(*_):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(execute, "_reference", refuse)
    for case in BRANCHES:
        assert_right(replace(case, dtype=torch.float32), kernels)


def test_unsupported_dtype_is_named(kernels):
    x = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=kernels)
    with pytest.raises(NotImplementedError, match="bool"):
        triton_conv.conv2d(x, x)


def test_precision_follows_pytorch_until_it_is_given(kernels):
    x, w = torch.randn(1, 4, 6, 6, device=kernels), torch.randn(4, 4, 3, 3, device=kernels)
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for setting, explicit, expected in (
            ("tf32", None, "tf32"),
            ("ieee", None, "ieee"),
            ("none", None, "ieee"),
            ("ieee", "tf32x3", "tf32x3"),
            ("tf32", "ieee", "ieee"),
        ):
            conv.fp32_precision = setting
            with execute.recording() as calls:
                triton_conv.conv2d(x, w, precision=explicit)
            problem = execute.problem_of(calls[0], execute.device_of(x.device))
            assert plan.make(problem).numerics.precision == expected
    finally:
        conv.fp32_precision = before


@pytest.mark.parametrize(("allowed", "expected"), [(False, "ieee"), (True, "tf32")])
def test_allow_tf32_is_followed(allowed, expected):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
        assert execute.default_precision() == expected


@pytest.mark.parametrize("deformed", [False, True])
def test_a_single_filter_of_any_stride_has_a_right_gradient(deformed, kernels, poisoned):
    """Slabs of it are as far apart as it has elements, whatever the stride of its one filter."""
    x, dy = (torch.randn(2, channels, 40, 40, device=kernels) for channels in (5, 1))
    w = torch.randn(8, 64, 1, 1, device=kernels)[:1, :5].requires_grad_()
    offset = x.new_zeros(2, 2, 40, 40)
    y = triton_conv.deform_conv2d(x, offset, w) if deformed else triton_conv.conv2d(x, w)
    dw = torch.autograd.grad(y, w, dy)[0]
    expected = torch.einsum("nchw,nkhw->kc", x.double(), dy.double())[..., None, None]
    torch.testing.assert_close(dw.double(), expected, rtol=0, atol=1e-2)
