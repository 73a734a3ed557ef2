"""The depthwise kernels: right wherever a plan picks them, and picked exactly where groups have one channel."""

from dataclasses import replace

import pytest
import torch
from halves import first_of, half_of
from picked import kernels_of
from torch.autograd import gradcheck

import triton_conv
from triton_conv import choose, config, execute, explain, plan
from triton_conv.check import Case
from triton_conv.config import Config, DepthwiseConfig
from triton_conv.geometry import Role

DIRECT = ("depthwise", "depthwise", "depthwise_wgrad")


def _of(spatial, kernel, **options) -> Case:
    defaults = {"C": 8, "K": 8, "groups": 8, "N": 1}
    return Case.of(spatial, kernel, **{**defaults, **options})


CASES = [
    # every rank in both memory formats; rows that are whole vectors and rows that are not
    _of(40, 4, padding=((3, 0),), dtype=torch.bfloat16),
    _of(13, 4, padding=((3, 0),), memory_format="channels_last"),
    _of((6, 16), 3, padding=1, dtype=torch.bfloat16),
    _of((6, 7), 3, padding=1, dtype=torch.float16),
    _of((5, 6), 3, padding=1, memory_format="channels_last", dtype=torch.bfloat16, N=2),
    _of((2, 4, 8), 3, padding=1, C=2, K=2, groups=2),
    _of((2, 3, 4), (2, 3, 1), memory_format="channels_last"),
    # long filters, of which a part is unrolled
    _of((5, 8), 7, padding=3, C=2, K=2, groups=2),
    _of((9, 4), (11, 2), padding=(5, 1), memory_format="channels_last"),
    _of((3, 9), (2, 11), padding=(0, 5), memory_format="channels_last"),
    # strides and dilations, together and apart
    _of((7, 16), 3, padding=1, stride=2, C=3, K=3, groups=3),
    _of((8, 7), 3, padding=2, stride=(1, 3), dilation=(2, 1), C=3, K=3, groups=3),
    _of((9, 7), (3, 2), padding=2, stride=(2, 1), dilation=(3, 2), memory_format="channels_last"),
    _of((5, 4), 1, stride=2),
    # a stride beyond the filter: residues without taps
    _of((7, 8), (1, 2), stride=(3, 4), memory_format="channels_last"),
    # padding modes, one of which reaches past what is there
    _of((5, 8), 3, padding=((2, 1), (3, 2)), modes=("reflect", "circular"), C=2, K=2, groups=2),
    _of((4, 5), 3, padding=((5, 0), (0, 4)), modes=("replicate", "zeros"), memory_format="channels_last"),
    # several filters of a channel
    _of((4, 6), 3, padding=1, C=3, K=9, groups=3),
    _of((4, 5), 3, padding=1, C=8, K=16, memory_format="channels_last"),
    # tails in channels, borders of memory that is not dense
    _of((4, 5), 3, padding=1, C=17, K=17, groups=17, memory_format="channels_last", dtype=torch.float16),
    _of((4, 5), 3, padding=1, C=3, K=3, groups=3, memory_format="strided"),
    _of((4, 5), 3, padding=1, transposed=True, stride=2, output_padding=1),
    _of((4, 5), 3, padding=1, dtype=torch.float64),
    _of((4, 5), 3, padding=1, dtype=torch.int8),
    _of((4, 5), 3, padding=1, C=1, K=1, groups=1),
]


@pytest.fixture
def direct(monkeypatch):
    """Other kernels may be predicted to be quicker where a channel has several filters and images are tiny."""
    monkeypatch.setattr(choose, "WORTH_LEAVING", 0.0)
    plan._make.cache_clear()
    yield
    plan._make.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_right_and_picked(case, kernels, poisoned, direct):
    assert set(kernels_of(case, kernels)) <= set(DIRECT)


# Layers that people train, with fewer images, channels and pixels.
REAL = {
    "MobileNetV3 5x5 stride 2": _of((9, 9), 5, padding=2, stride=2, memory_format="channels_last"),
    "EfficientNetV2 3x3": _of((9, 9), 3, padding=1, C=16, K=16, groups=16, memory_format="channels_last", N=2),
    "ConvNeXt 7x7": _of((9, 9), 7, padding=3, memory_format="channels_last"),
    "RegNetY of 8 channels": _of((6, 6), 3, padding=1, C=32, K=32, groups=4, memory_format="channels_last"),
    "temporal": _of((5, 3, 4), (3, 1, 1), padding=(1, 0, 0), memory_format="channels_last"),
    "temporal, causal": _of((9, 2, 8), (5, 1, 1), padding=((4, 0), 0, 0), C=2, K=2, groups=2),
    "spatial": _of((2, 5, 5), (1, 3, 3), padding=(0, 1, 1), memory_format="channels_last"),
    "two filters a channel": _of((5, 6), 3, padding=1, K=16, memory_format="channels_last"),
}


@pytest.mark.parametrize(("name", "dtype"), half_of(REAL, [torch.bfloat16, torch.float32]))
def test_layers_that_people_train(name, dtype, kernels, poisoned, direct):
    picked = set(kernels_of(replace(REAL[name], dtype=dtype), kernels))
    assert picked.isdisjoint(DIRECT) if "RegNet" in name else picked <= set(DIRECT)


DIFFERENTIATED = {
    "1-D": (1, 1, {"padding": ((2, 1),), "padding_mode": "circular"}),
    "strided": (2, 1, {"padding": 1, "stride": (2, 1)}),
    "dilated": (2, 2, {"padding": (1, 2), "dilation": (1, 2)}),
    "3-D": (3, 1, {"padding": ((2, 0), 1, 1)}),
}


@pytest.mark.parametrize(("name", "memory_format"), half_of(DIFFERENTIATED, ["contiguous", "channels_last"]))
def test_gradcheck(name, memory_format, kernels, direct):
    rank, filters, options = DIFFERENTIATED[name]
    size = {1: (7,), 2: (4, 5), 3: (2, 3, 3)}[rank]
    torch.manual_seed(0)
    x, w, b = (
        torch.randn(shape, dtype=torch.float64, device=kernels)
        for shape in ((1, 2, *size), (2 * filters, 1, *(3,) * rank), (2 * filters,))
    )
    if memory_format == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    conv = getattr(triton_conv, f"conv{rank}d")

    def f(x, w, b):
        return conv(x, w, b, groups=2, **options)

    tensors = [t.requires_grad_() for t in (x, w, b)]
    with execute.recording() as calls:
        torch.autograd.grad(f(*tensors).sum(), tensors)
    found = execute.device_of(x.device)
    assert {plan.make(execute.problem_of(c, found)).kernel for c in calls} == set(DIRECT)
    assert gradcheck(f, tensors, fast_mode=True)


def test_the_longest_filter_is_walked_along_rows():
    options = {"groups": 64, "dtype": torch.bfloat16, "channels_last": True}
    for filters, padding in (((3, 1, 1), (1, 0, 0)), ((1, 1, 5), (0, 0, 2)), ((3, 1, 5), (1, 0, 2))):
        for p in explain.plans((2, 64, 8, 14, 14), (64, 1, *filters), padding=padding, **options).values():
            assert p.geometry.filter[1] == max(filters), p
    for p in explain.plans((2, 64, 8, 14, 14), (64, 1, 3, 1, 1), padding=(1, 0, 0), groups=64).values():
        assert p.geometry.filter == (1, 3, 1), p  # contiguous: vectors run along W, which stays


FEW = [
    replace(case, C=2, K=2 * case.K // case.C, groups=2)
    for case in (CASES[4], CASES[10], CASES[17], CASES[2], CASES[15])
]


@pytest.mark.parametrize("case", first_of(FEW, 3), ids=lambda case: case.id)
def test_depthwise_and_gather_agree(case, kernels):
    operands = case.operands(1, kernels)
    direct = case.run(operands)
    gather = Config(16, 4, 4, dot=False)
    with config.explicit(dict.fromkeys(Role, gather)):
        gathered = case.run(operands)
    for name in direct:
        depth = case.depth(name)
        assert (direct[name] - gathered[name]).abs().max() <= 4 * torch.finfo(case.dtype).eps * depth**0.5


# Parts of filters, walks, lanes past the image, slabs without tiles, columns that no vector covers.
CONFIGS = [
    DepthwiseConfig(4, 1, 16, 8, 4, (3, 3), walk=2, splits=3),
    DepthwiseConfig(3, 2, 16, 4, 2, (2, 1), splits=5),
    DepthwiseConfig(1, 8, 8, 2, 4, (1, 3), walk=3),
    DepthwiseConfig(2, 16, 4, 1, 8, (7, 7), walk=2, splits=2),
]


@pytest.mark.parametrize(("case", "tiles"), half_of(FEW, CONFIGS))
def test_tiling_does_not_change_the_numbers(case, tiles, kernels):
    with config.explicit(dict.fromkeys(Role, tiles)):
        assert set(kernels_of(case, kernels)) <= set(DIRECT)


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[12]], ids=lambda case: case.id)
def test_64_bit_offsets(case, kernels, monkeypatch):
    monkeypatch.setattr(plan, "_reach", lambda *_: 2**31)
    plan._make.cache_clear()
    assert kernels_of(case, kernels)
    plan._make.cache_clear()


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_infinities_stay_where_a_tap_reads_them(memory_format, kernels):
    """Seven rows in lanes of four: the first filter row never reads the last image row, nor its infinity."""
    case = _of((7, 8), 3, padding=1, C=2, K=2, groups=2, memory_format=memory_format)
    operands = case.operands(0, kernels)
    operands.x[..., 6, :] = float("inf")
    tiles = DepthwiseConfig(4, 1, 8, 2, 1, (3, 3), walk=2)
    with config.explicit({Role.WGRAD: tiles}):
        dw = case.run(operands, ("dw",))["dw"]
    assert dw[..., 0, :].isfinite().all()
    assert not dw[..., 1:, :].isfinite().any()


def test_same_bits_every_run(kernels):
    case = _of((9, 8), 3, padding=1, C=2, K=2, groups=2)
    operands = case.operands(3, kernels)
    with config.explicit({Role.WGRAD: DepthwiseConfig(2, 8, 4, 1, 4, (3, 3), splits=3)}):
        first, second = case.run(operands, ("dw",)), case.run(operands, ("dw",))
    assert torch.equal(first["dw"], second["dw"])


SHAPES = ((8, 64, 28, 28), (64, 1, 3, 3))


def test_an_explicit_config_names_the_kernel():
    for given, kernel in ((Config(64, 4, 4, dot=False), "gather"), (CONFIGS[0], "depthwise")):
        with config.explicit({Role.FPROP: given}):
            p = explain.plans(*SHAPES, groups=64, padding=1)["forward"]
        assert (p.kernel, p.config) == (kernel, given)
        assert "explicitly" in p.reason


def test_a_depthwise_config_where_none_can_run_is_refused():
    with config.explicit({Role.FPROP: CONFIGS[0]}), pytest.raises(RuntimeError, match="several input channels"):
        explain.plans((8, 64, 28, 28), (64, 2, 3, 3), groups=32, padding=1)


@pytest.mark.parametrize(
    "change", [{"columns": 3}, {"lanes": 0}, {"rows": 0}, {"unroll": (0, 3)}, {"splits": 0}], ids=str
)
def test_configs_that_are_none_are_refused(change):
    with pytest.raises(ValueError, match="must be"):
        replace(CONFIGS[0], **change)


@pytest.mark.parametrize("device", config.DEVICES.values(), ids=lambda device: device.name)
def test_small_channel_counts_still_fill_the_device(device):
    shapes = ((32, 16, 224, 224), (16, 1, 3, 3))
    for channels_last in (False, True):
        options = {"groups": 16, "padding": 1, "dtype": torch.bfloat16, "channels_last": channels_last}
        p = explain.plans(*shapes, device=device, **options)["weight gradient"]
        assert p.kernel == "depthwise_wgrad"
        assert p.prediction.tiles >= 2 * device.multiprocessors
