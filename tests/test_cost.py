"""Predicted times: counts against enumeration, and properties that a wrong model would break."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from triton_conv import choose, config, cost, devices, execute, explain, plan, tiles
from triton_conv.config import BandedConfig, BoxConfig, Config
from triton_conv.devices import DEVICES
from triton_conv.geometry import Axis, ConvGeometry, Role
from triton_conv.tuning.suites import SUITES

H200 = DEVICES["H200"]
ACTIVATIONS = (Role.FPROP, Role.DGRAD)


def conv(N, C, K, size, taps=3, groups=1, padding=None, **options) -> ConvGeometry:
    rank = len(size)
    filters = (taps,) * rank if isinstance(taps, int) else taps
    padding = [(t // 2, t // 2) for t in filters] if padding is None else padding
    return ConvGeometry.forward((N, C, *size), (K, C // groups, *filters), padding=padding, groups=groups, **options)


def seconds(g, kernel, tiling, role=Role.FPROP, dtype="bfloat16", device=H200, **options) -> float:
    return cost.predict(g, role, kernel, tiling, dtype, "tf32", device, **options).seconds


# ---------------------------------------------------------------------------------------------------------------------
# Devices


@pytest.mark.parametrize("name", DEVICES)
def test_devices_are_plausible(name):
    d = DEVICES[name]
    assert name.removeprefix("RTX") in d.name
    assert "20" in d.source  # documents are named with their year
    assert d.matrix_16 > d.matrix_tf32 >= d.vector_32 >= d.vector_int32 > d.vector_64 / 2
    assert d.matrix_int8 >= 2 * d.matrix_16 - 1e12
    assert d.matrix_fp8 == 0 or 1.9 < d.matrix_fp8 / d.matrix_16 < 2.1
    assert d.matrix_64 >= d.vector_64
    assert d.l2_bandwidth > d.bandwidth
    assert d.shared_per_block < d.shared_per_multiprocessor < 4 * d.registers
    # one multiplication and one addition a clock of 64 or 128 units, and of 512 to 4096 in matrix units: no sparse rate
    assert d.vector_32 / (2 * d.multiprocessors * d.clock) == pytest.approx(64 if d.capability == 80 else 128, rel=0.02)
    assert 250 < d.matrix_16 / (2 * d.multiprocessors * d.clock) < 4100
    assert d.measured_copy < d.bandwidth
    assert d.measured_matrix < d.matrix_16


@pytest.mark.parametrize(
    ("name", "multiprocessors", "capability", "expected"),
    [
        ("NVIDIA H200", 132, 90, "H200"),
        ("NVIDIA H100 80GB HBM3", 132, 90, "H100"),
        ("NVIDIA A100-SXM4-80GB", 108, 80, "A100"),
        ("NVIDIA GeForce RTX 4090", 128, 89, "RTX4090"),
    ],
)
def test_known_gpus_are_known_by_what_they_call_themselves(name, multiprocessors, capability, expected):
    assert devices.of(name, multiprocessors, capability) == DEVICES[expected]._replace(name=name)


@pytest.mark.parametrize(
    ("name", "multiprocessors", "capability", "kin"),
    [
        ("NVIDIA H100 PCIe", 114, 90, "H100"),
        ("NVIDIA GH200 480GB", 132, 90, "H100"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", 82, 120, "RTX5090"),
        ("NVIDIA RTX A6000", 84, 86, "A100"),
        ("NVIDIA B300", 160, 103, "B200"),
        ("Tesla V100-SXM2-16GB", 80, 70, "A100"),
    ],
)
def test_other_gpus_are_scaled_from_their_kin_and_say_so(name, multiprocessors, capability, kin):
    found = devices.of(name, multiprocessors, capability, clock=1e9, bandwidth=5e11)
    assert found.source == f"scaled from {DEVICES[kin].name}"
    assert (found.name, found.capability, found.bandwidth) == (name, capability, 5e11)
    share = multiprocessors / DEVICES[kin].multiprocessors * 1e9 / DEVICES[kin].clock
    assert found.matrix_16 == pytest.approx(DEVICES[kin].matrix_16 * share)
    assert found.measured_copy == found.measured_matrix == 0


def test_a_gpu_is_described_by_what_pytorch_says_of_it(monkeypatch):
    least = {"name": "NVIDIA H100 PCIe", "major": 9, "minor": 0, "multi_processor_count": 114}
    more = {"clock_rate": 1_755_000, "memory_clock_rate": 1_593_000, "memory_bus_width": 5120}
    properties = SimpleNamespace(**least, **more, L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = execute._cuda_device.__wrapped__(0)
    assert (found.name, found.capability, found.multiprocessors) == ("NVIDIA H100 PCIe", 90, 114)
    assert found.bandwidth == pytest.approx(2.04e12, rel=0.01)  # NVIDIA's data sheet: 2 TB/s
    assert found.l2_bytes == 50 * 2**20
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**least))
    found = execute._cuda_device.__wrapped__(0)
    assert found.bandwidth == pytest.approx(DEVICES["H100"].bandwidth * 114 / 132)


# ---------------------------------------------------------------------------------------------------------------------
# Counts


def random_geometry(rng) -> ConvGeometry:
    rank = rng.randint(1, 2)
    groups = rng.choice((1, 1, 2, 3))
    taps = tuple(rng.randint(1, 4) for _ in range(rank))
    dilation = tuple(rng.randint(1, 3) for _ in range(rank))
    size = [rng.randint(1, 7) + d * (t - 1) for t, d in zip(taps, dilation, strict=True)]
    return conv(
        rng.randint(1, 2),
        groups * rng.randint(1, 3),
        groups * rng.randint(1, 3),
        size,
        taps,
        groups,
        padding=[(rng.randint(0, 3), rng.randint(0, 3)) for _ in range(rank)],
        stride=tuple(rng.randint(1, 4) for _ in range(rank)),
        dilation=dilation,
    )


def multiplications(g: ConvGeometry) -> tuple[int, int]:
    """(products, elements of x that take part in one), one by one."""
    products, read = 0, set()
    for n, k, *out in itertools.product(range(g.N), range(g.K), *map(range, g.output)):
        for c, *tap in itertools.product(range(g.C // g.groups), *map(range, g.filter)):
            at = [o * s - p[0] + t * d for o, s, p, t, d in zip(out, g.stride, g.padding, tap, g.dilation, strict=True)]
            if all(0 <= i < extent for i, extent in zip(at, g.input, strict=True)):
                products += 1
                read.add((n, k // (g.K // g.groups) * (g.C // g.groups) + c, *at))
    return products, len(read)


@pytest.mark.parametrize("seed", range(40))
def test_roofline_counts_what_enumeration_counts(seed):
    g = random_geometry(random.Random(seed))
    products, read = multiplications(g)
    w, y = (torch.Size(g.shape(name)).numel() for name in "wy")
    for role in Role:
        roof = cost.roofline(g, role, "float32", "ieee", H200)
        assert roof.flops == 2 * products, g
        x = torch.Size(g.shape("x")).numel()
        if role is Role.DGRAD:
            assert roof.bytes == 4 * (x + w + y)  # every element of dx is written
        else:
            assert 4 * (read + w + y) <= roof.bytes <= 4 * (x + w + y), g


def test_every_tap_of_a_padding_mode_meets_the_input():
    zeros, circular = (conv(2, 4, 4, (5, 6), modes=(mode, mode)) for mode in ("zeros", "circular"))
    roofs = [cost.roofline(g, Role.FPROP, "float32", "ieee", H200) for g in (zeros, circular, circular.padded())]
    assert roofs[0].flops < roofs[1].flops == roofs[2].flops == circular.flops


def test_transposed_convolutions_count_as_the_gradients_they_are():
    g = ConvGeometry.transposed((2, 3, 4, 5), (3, 2, 3, 3), stride=(2, 2), padding=((1, 1), (1, 1)))
    assert cost.roofline(g, Role.DGRAD, "float32", "ieee", H200).flops == 2 * multiplications(g)[0]


def classes_of(axis: Axis) -> list[int]:
    """Taps of each residue class, as `Axis` defines them."""
    found = []
    for t in range(axis.offset, axis.offset + axis.phases):
        first = t // axis.common * axis.inverse % axis.tap_step
        taps = max(-(-(axis.filter - first) // axis.tap_step), 0)
        found.append(0 if t % axis.common else taps)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_steps_are_those_of_every_tile(seed):
    rng = random.Random(seed)
    g = random_geometry(rng)
    tiling = Config(rng.choice((16, 32)), 16, 16, flatten=rng.random() < 0.5)
    boxes = BoxConfig((1, 1, 4, 8), 16, 16)
    for role in ACTIVATIONS:
        src, extents = (g.C, g.output) if role is Role.FPROP else (g.K, g.input)
        per_tile, axes = [], g.axes(role)
        for taps in itertools.product(*map(classes_of, axes)):
            depth = torch.Size(taps).numel()
            flat, apart = -(-depth * (src // g.groups) // 16), depth * -(-(src // g.groups) // 16)
            per_tile.append((flat if tiling.flatten else apart, apart))
        pixels = [-(-extent // axis.phases) for extent, axis in zip(extents, axes, strict=True)]
        found = tiles.gather(role, g, tiling)
        tiles_m = -(-g.N * torch.Size(pixels).numel() // tiling.BLOCK_M)
        assert found.total == tiles_m * found.tiles_n * g.groups * len(per_tile)
        assert found.steps == tiles_m * found.tiles_n * g.groups * sum(flat for flat, _ in per_tile)
        assert found.longest == max(flat for flat, _ in per_tile)
        found = tiles.box(role, g, boxes)
        tiles_m = g.N * pixels[0] * -(-pixels[1] // 4) * -(-pixels[2] // 8)
        assert found.steps == tiles_m * found.tiles_n * g.groups * sum(apart for _, apart in per_tile)


# ---------------------------------------------------------------------------------------------------------------------
# Predictions

BIG = conv(32, 256, 256, (56, 56))
BOXES = [("box", BoxConfig((1, 1, 8, 16), 128, 64)), ("box", BoxConfig((4, 1, 2, 8), 64, 32, programs=2))]
RUNS = [("box_wgrad", BoxConfig((1, 1, 1, 32), 128, 64, splits=5))]
TILINGS = {
    Role.FPROP: [("gather", Config(128, 64, 64)), ("gather", Config(32, 16, 16, flatten=True)), *BOXES],
    Role.DGRAD: [("gather", Config(64, 64, 32, filters_first=True)), ("gather", Config(64, 1, 4, dot=False)), *BOXES],
    Role.WGRAD: [("wgrad", Config(64, 64, 64, splits=3)), ("wgrad", Config(16, 16, 16)), *RUNS],
}


@pytest.mark.parametrize("device", [*DEVICES.values(), devices.INTERPRETER], ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", "float8_e4m3fn", "int8", "int64"])
def test_nothing_is_predicted_below_the_roofline(device, dtype):
    rng = random.Random(7)
    shapes = [random_geometry(rng) for _ in range(10)] + [
        BIG,
        conv(8, 64, 64, (56, 56), groups=64),
        conv(1, 8, 8, (9,)),
    ]
    shapes += [conv(4, 96, 96, (33, 20), stride=(2, 3)), conv(2, 64, 1, (40,)), conv(2, 64, 512, (40,), groups=64)]
    for g, role, precision in itertools.product(shapes, Role, config.PRECISIONS):
        least = cost.roofline(g, role, dtype, precision, device)
        for kernel, tiling in TILINGS[role]:
            found = cost.predict(g, role, kernel, tiling, dtype, precision, device)
            assert found.seconds >= least.seconds + cost.LAUNCH, (g, role, kernel, tiling)
            assert 0 <= found.useful <= 1


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_no_plan_of_a_suite_is_predicted_below_its_roofline(suite):
    for name, layer in suite.layers.items():
        for title, found in explain.plans(layer.input, layer.weight, device=H200, **layer.options).items():
            assert found.seconds >= 0.999 * found.roofline.seconds, (name, title, found.kernel)


def test_positions_of_a_patch_fill_matrix_instructions_as_channels_do():
    patches = conv(64, 3, 1280, (28, 28), 14, padding=[(0, 0)] * 2, stride=(14, 14))
    linear = conv(64, 3 * 14 * 14, 1280, (2, 2), 1)
    roofs = [cost.roofline(g, Role.DGRAD, "bfloat16", "ieee", H200) for g in (patches, linear)]
    assert roofs[0].seconds == pytest.approx(roofs[1].seconds)


@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
def test_more_pixels_never_cost_less(role):
    for kernel, tiling in TILINGS[role]:
        for sizes in (
            [conv(n, 64, 64, (28, 28)) for n in range(1, 40)],
            [conv(2, 32, 48, (9, w)) for w in range(8, 99)],
        ):
            times = [seconds(g, kernel, tiling, role) for g in sizes]
            assert times == sorted(times), (kernel, tiling)


@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
def test_tiles_larger_than_the_problem_lose(role):
    tiny = conv(1, 16, 16, (8, 8))
    if role is Role.WGRAD:
        kernel, small, large = "wgrad", Config(64, 16, 16), Config(64, 128, 128)
    else:
        kernel, small, large = "gather", Config(16, 16, 16), Config(128, 128, 64)
    assert seconds(tiny, kernel, small, role) < seconds(tiny, kernel, large, role)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
def test_large_tiles_win_where_they_fill_the_gpu(device):
    sizes = (Config(32, 16, 32), Config(32, 32, 32), Config(64, 32, 32), Config(64, 64, 32, filters_first=True))
    times = [seconds(BIG, "gather", tiling, device=device) for tiling in sizes]
    assert times == sorted(times, reverse=True)
    if device.capability in (90, 100):
        boxes = [BoxConfig((1, 1, 4, 8), 64, 64), BoxConfig((1, 1, 8, 8), 64, 64), BoxConfig((1, 1, 8, 16), 128, 64)]
        times = [seconds(BIG, "box", box, device=device) for box in boxes]
        assert times == sorted(times, reverse=True)
        assert times[-1] < seconds(BIG, "gather", sizes[-1], device=device)


def test_splits_win_for_few_weights_and_many_pixels_and_lose_for_many_weights():
    few, many = conv(32, 64, 64, (56, 56), 1), conv(1, 1024, 1024, (14, 14))
    one, eight = Config(64, 64, 64), Config(64, 64, 64, splits=8)
    assert seconds(few, "wgrad", eight, Role.WGRAD) < 0.5 * seconds(few, "wgrad", one, Role.WGRAD)
    assert seconds(many, "wgrad", one, Role.WGRAD) < seconds(many, "wgrad", eight, Role.WGRAD)


def test_slabs_are_written_and_read():
    found = cost.predict(BIG, Role.WGRAD, "wgrad", Config(64, 64, 64, splits=8), "bfloat16", "ieee", H200)
    assert found.split_seconds == pytest.approx(2 * 8 * 4 * 256 * 256 * 9 / H200.measured_copy)
    assert found.seconds == max(found.loop_seconds, found.l2_seconds, found.memory_seconds) + found.split_seconds + 6e-6


def test_configs_that_do_not_fit_are_never_chosen():
    assert seconds(BIG, "box", BOXES[0][1], device=DEVICES["RTX5090"]) == float("inf")
    assert seconds(BIG, "gather", Config(128, 256, 128, 8, 4)) == float("inf")


def test_spilled_accumulators_cost_more():
    assert seconds(BIG, "gather", Config(128, 256, 32, 4)) > seconds(BIG, "gather", Config(128, 256, 32, 8))


@pytest.mark.parametrize(
    ("g", "dtype", "limit"),
    [
        (BIG, "bfloat16", "matrix rate"),
        (BIG, "float32", "matrix rate"),
        (BIG, "int64", "vector rate"),
        (conv(32, 256, 256, (56, 56), groups=256), "bfloat16", "memory bandwidth"),
        (conv(8, 512, 512, (4096,), 7, groups=512), "bfloat16", "memory bandwidth"),
        (conv(32, 256, 64, (56, 56), 1), "bfloat16", "memory bandwidth"),
    ],
)
def test_the_limit_that_binds(g, dtype, limit):
    for role in Role:
        assert cost.roofline(g, role, dtype, "tf32", H200).limit == limit


def test_a_wider_output_is_more_bytes():
    narrow, wide = (cost.roofline(BIG, Role.FPROP, "int8", "ieee", H200, out) for out in (None, "int32"))
    assert wide.bytes - narrow.bytes == 3 * 32 * 256 * 56 * 56
    assert wide.flops == narrow.flops


def test_float32_without_tf32_is_bound_by_the_vector_rate():
    assert cost.roofline(BIG, Role.FPROP, "float32", "ieee", H200).limit == "vector rate"
    ieee, tf32 = (
        cost.predict(BIG, Role.FPROP, "gather", Config(64, 64, 32), "float32", p, H200) for p in ("ieee", "tf32")
    )
    assert ieee.seconds > 3 * tf32.seconds


def test_what_a_layout_costs():
    """Scalar loads of contiguous activations cost more than copying them to channels-last, for busy layers."""
    contiguous = seconds(BIG, "gather", Config(64, 64, 32, filters_first=True), channels_last=False)
    boxed = seconds(BIG, "box", BOXES[0][1]) + 2 * cost.copy_seconds(2 * 32 * 256 * 56 * 56, H200)
    assert boxed < contiguous
    assert cost.copy_seconds(2**30, H200) == pytest.approx(2**31 / H200.measured_copy + cost.LAUNCH)


def test_groups_that_share_sectors_of_channels_last_images_are_fetched_together():
    g = conv(32, 256, 256, (56, 56), groups=256)
    tiling = Config(256, 1, 1, dot=False)
    last, first = (seconds(g, "gather", tiling, channels_last=last) for last in (True, False))
    assert last > 1.5 * first


# bfloat16, channels-last, as trained on one H200: input, filter, padding, stride.
BY_MEMORY = {
    "MobileNetV3 3x3": ((128, 16, 112, 112), (3, 3), 1, 1),
    "MobileNetV3 3x3 stride 2": ((128, 64, 112, 112), (3, 3), 1, 2),
    "EfficientNetV2 3x3": ((128, 512, 24, 24), (3, 3), 1, 1),
    "EfficientNetV2 3x3 stride 2": ((128, 256, 48, 48), (3, 3), 1, 2),
    "3x3": ((128, 256, 56, 56), (3, 3), 1, 1),
    "spatial": ((8, 256, 16, 28, 28), (1, 3, 3), (0, 1, 1), 1),
    "temporal": ((8, 256, 16, 28, 28), (3, 1, 1), (1, 0, 0), 1),
    "temporal of 5": ((8, 54, 16, 56, 56), (5, 1, 1), (2, 0, 0), 1),
}
BY_INSTRUCTIONS = {
    "MobileNetV3 5x5": ((128, 120, 28, 28), (5, 5), 2, 1),
    "MobileNetV3 5x5 stride 2": ((128, 72, 56, 56), (5, 5), 2, 2),
    "ConvNeXt 7x7": ((128, 96, 56, 56), (7, 7), 3, 1),
    "3x3x3": ((8, 256, 16, 28, 28), (3, 3, 3), 1, 1),
}


def depthwise(shape, filters, padding, stride):
    C = shape[1]
    options = {"padding": padding, "stride": stride, "groups": C, "dtype": torch.bfloat16, "channels_last": True}
    return (shape, (C, 1, *filters)), options


@pytest.mark.parametrize("name", BY_MEMORY)
def test_depthwise_layers_of_few_taps_run_at_the_speed_of_memory(name):
    shapes, options = depthwise(*BY_MEMORY[name])
    for p in explain.plans(*shapes, **options).values():
        assert p.kernel.startswith("depthwise")
        assert p.roofline.limit == "memory bandwidth"
        assert p.roofline.seconds < p.seconds < 1.55 * p.roofline.seconds, p
    assert "bound by " in explain.text(*shapes, **options)


@pytest.mark.parametrize("name", BY_INSTRUCTIONS)
def test_depthwise_layers_of_many_taps_are_bound_by_their_instructions(name):
    """What a kernel without matrix instructions cannot do better: an instruction for each product at the least."""
    shapes, options = depthwise(*BY_INSTRUCTIONS[name])
    for p in explain.plans(*shapes, **options).values():
        assert p.prediction.limit == "main loop"
        products = p.roofline.flops / 2
        assert p.prediction.loop_seconds > products / (cost.LANES * H200.clock * H200.multiprocessors)
    assert "bound by main loop" in explain.text(*shapes, **options)


def test_a_padded_gradient_is_folded_at_the_speed_of_memory():
    g = conv(32, 256, 256, (56, 56), modes=("circular", "circular"))
    padded, image = 32 * 256 * 58 * 58, 32 * 256 * 56 * 56
    moved = padded * (4 + 2) + image * 2  # written as float32 in place of bfloat16, read, written as bfloat16
    assert cost.fold_seconds(g, "bfloat16", H200) == pytest.approx(moved / H200.measured_copy + cost.LAUNCH)


# ---------------------------------------------------------------------------------------------------------------------
# Choice

CHANNELS_LAST = {"dtype": torch.bfloat16, "channels_last": True, "padding": 1}


def rule(monkeypatch, *shapes, **options):
    """The plans that rules alone would make."""
    with monkeypatch.context() as patch:
        patch.setattr(choose, "quickest", lambda kernel, rule, *_: rule)
        plan._make.cache_clear()
        found = explain.plans(*shapes, **options)
    plan._make.cache_clear()
    return found


def test_the_rule_holds_where_its_tiles_fill_the_gpu(monkeypatch):
    shapes = ((32, 256, 56, 56), (256, 256, 3, 3))
    for options in (
        CHANNELS_LAST,
        {**CHANNELS_LAST, "padding_mode": "circular"},
        {**CHANNELS_LAST, "channels_last": False},
    ):
        ruled, chosen = rule(monkeypatch, *shapes, **options), explain.plans(*shapes, **options)
        assert [p.config for p in chosen.values()] == [p.config for p in ruled.values()]


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
def test_small_problems_get_smaller_tiles_where_that_is_predicted_to_gain(monkeypatch, device):
    for shapes in (((1, 256, 7, 7), (256, 256, 3, 3)), ((1, 64, 28, 28), (64, 64, 3, 3))):
        ruled = rule(monkeypatch, *shapes, device=device, **CHANNELS_LAST)
        for name, p in explain.plans(*shapes, device=device, **CHANNELS_LAST).items():
            before = ruled[name]
            assert p.prediction.resident > 0
            assert p.config == before.config or p.prediction.seconds < 0.8 * before.prediction.seconds
            assert p.reason.endswith(f"tiles by predicted time for {device.name}")
            if p.kernel == "box" and shapes[0][1] == 256:
                assert p.config.BLOCK_M * p.config.BLOCK_N < before.config.BLOCK_M * before.config.BLOCK_N


def test_boxes_fit_into_the_shared_memory_of_every_device():
    for device, width in itertools.product(DEVICES.values(), (16, 64, 128, 512)):
        if device.capability >= 90:
            shapes = ((32, width, 28, 28), (width, width, 3, 3))
            for p in explain.plans(*shapes, device=device, **CHANNELS_LAST).values():
                assert p.prediction.resident > 0, (device.name, p)


def test_fifty_image_sizes_share_tiles():
    """What differs between compiled kernels: all of a config but its splits, unless there is one."""
    for options in (
        CHANNELS_LAST,
        {**CHANNELS_LAST, "channels_last": False},
        {**CHANNELS_LAST, "padding_mode": "circular"},
    ):
        compiled = {}
        for n, size in itertools.product((1, 8), range(40, 90)):
            for name, p in explain.plans((n, 64, size, size + 3), (64, 64, 3, 3), **options).items():
                tiling = replace(p.config, splits=1)
                compiled.setdefault((n, name, p.kernel), set()).add((tiling, p.config.splits > 1))
        for (_, name, kernel), variants in compiled.items():
            assert len(variants) <= (6 if "box" in kernel else 2), (name, kernel, variants)


@pytest.mark.parametrize(("tiles_of_the_rule", "kept"), [(131, False), (132, True)])
def test_smaller_tiles_are_for_idle_multiprocessors(monkeypatch, tiles_of_the_rule, kept):
    def smaller_is_quicker(g, role, kernel, tiling, *_):
        return SimpleNamespace(seconds=tiling.BLOCK_M * tiling.BLOCK_N, tiles=tiles_of_the_rule, resident=1)

    monkeypatch.setattr(cost, "predict", smaller_is_quicker)
    for kernel, tiling in (("gather", Config(64, 64, 32)), ("box", BOXES[0][1])):
        found = choose.quickest(kernel, tiling, BIG, Role.FPROP, "bfloat16", "ieee", H200, True)
        assert (found == tiling) is kept


def test_equal_predictions_keep_the_rule(monkeypatch):
    monkeypatch.setattr(cost, "predict", lambda *_: SimpleNamespace(seconds=1.0, tiles=1, resident=1))
    tiling = Config(64, 64, 32, splits=4)
    for role, kernel in ((Role.FPROP, "gather"), (Role.WGRAD, "wgrad")):
        assert choose.quickest(kernel, tiling, BIG, role, "bfloat16", "ieee", H200, True) is tiling


def ranks(values) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [float(order.index(i)) for i in range(len(values))]


def test_predictions_rank_plans_as_measurements_do():
    """Spearman's rank correlation over the plans that a GPU has timed.

    bench/results/<name in DEVICES>/plans.json lists {"input", "weight", "options", "plan", "seconds"}: the arguments of
    `explain.plans`, the name of one of the plans and its median time.
    """
    results = sorted((Path(__file__).parents[1] / "bench" / "results").glob("*/plans.json"))
    if not results:
        pytest.skip("no GPU measurements are committed under bench/results")
    for path in results:
        predicted, measured = [], []
        for row in json.loads(path.read_text()):
            options = {**row["options"], "dtype": getattr(torch, row["options"]["dtype"])}
            found = explain.plans(row["input"], row["weight"], device=DEVICES[path.parent.name], **options)
            predicted.append(found[row["plan"]].seconds)
            measured.append(row["seconds"])
        correlation = torch.corrcoef(torch.tensor([ranks(predicted), ranks(measured)]))
        assert correlation[0, 1] > 0.7, path


# ---------------------------------------------------------------------------------------------------------------------
# Banded matrices


def long_filter(rng) -> ConvGeometry:
    taps = rng.randint(1, 20), rng.randint(1, 80)
    size = rng.randint(1, 40), rng.randint(1, 90)
    padding = [(rng.randint(0, t + 2), rng.randint(t - 1, t + 3)) for t in taps]
    C = rng.randint(1, 3)
    return conv(rng.randint(1, 5), C, C, size, taps, C, padding=padding)


def span(values) -> tuple[int, int]:
    """The first of the values and one past the last."""
    values = list(values)
    return (min(values), max(values) + 1) if values else (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_banded_steps_are_those_of_every_tile(seed):
    """A tile sees every row from the first to the last that a tap of one of its blocks meets."""
    rng = random.Random(seed)
    g = long_filter(rng)
    images, rows, columns = rng.choice(((2, 4, 2), (4, 1, 4), (16, 1, 1)))
    tiling = BandedConfig((images, rows, columns), rng.choice((1, 2, 4)), 16, rng.choice((16, 32)))
    tiles_n, height, chunk = -(-g.N // images), tiling.height, tiling.chunk
    (_, P, Q), (_, H, W), (_, R, S) = g.output, g.input, g.filter

    def counted(first, last, axis):
        """Steps of a tile along one axis: of which blocks its own start at first ... last."""
        size, extent, taps = ((height, H, R), (16, W, S))[axis - 1]
        lower = g.padding[axis][0]
        seen = [
            p + t - lower
            for p, t in itertools.product(range(size), range(taps))
            if last * size + p + t - lower >= 0 and first * size + p + t - lower < extent
        ]
        begin, end = span(seen)
        return end - begin if axis == 1 else max(-(-(end - begin // 8 * 8) // chunk), 1)

    over_h = [counted(p, p + rows - 1, 1) for p in range(0, -(-P // height), rows)]
    over_w = [counted(q, q + columns - 1, 2) for q in range(0, -(-Q // 16), columns)]
    found = tiles.banded(Role.FPROP, g, tiling)
    assert found.total == g.C * tiles_n * len(over_h) * len(over_w)
    assert found.steps == g.C * tiles_n * sum(over_h) * sum(over_w)
    assert found.longest == max(over_h) * max(over_w)

    tiles_q = -(-Q // (16 * columns))
    total = 0
    for r, s in itertools.product(range(0, R, height), range(0, S, tiles.BANDED_TAPS)):
        part_s = range(s, min(s + tiles.BANDED_TAPS, S))
        begin, end = span(p for p in range(P) if any(0 <= p + t - g.padding[1][0] < H for t in range(r, r + height)))
        first, last = span(
            q + t - g.padding[2][0]
            for q, t in itertools.product(range(16), part_s)
            if (tiles_q * columns - 1) * 16 + q + t - g.padding[2][0] >= 0 and q + t - g.padding[2][0] < W
        )
        total += tiles_n * -(-(end - begin) // rows) * tiles_q * max(-(-(last - first // 8 * 8) // chunk), 1)
    assert tiles.banded_wgrad(g, tiling).steps == g.C * total


BANDED = {Role.FPROP: "banded", Role.DGRAD: "banded", Role.WGRAD: "banded_wgrad"}
REPLKNET = [(128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13)]


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
def test_banded_predictions_grow_with_the_layer_and_stay_above_the_roofline(role, device):
    def predicted(N, C, size, taps):
        g = conv(N, C, C, (size, size), taps, C)
        tiling = config.default_banded(g, role, 2, device)
        found = cost.predict(g, role, BANDED[role], tiling, "bfloat16", "ieee", device)
        assert found.seconds > cost.roofline(g, role, "bfloat16", "ieee", device).seconds
        assert 0 < found.useful < 1
        assert found.resident > 0
        return found.seconds

    for C, size, taps in REPLKNET:
        over_taps = [predicted(64, C, size, t) for t in range(3, taps + 1, 2)]
        over_images = [predicted(n, C, size, taps) for n in (1, 4, 16, 64, 256)]
        for times in (over_taps, over_images):  # other tiles come with other numbers
            assert all(b >= 0.9 * a for a, b in itertools.pairwise(times)), times


@pytest.mark.parametrize("device", [H200, DEVICES["A100"], DEVICES["B200"]], ids=lambda d: d.name)
@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
def test_long_filters_cross_over_from_sums_in_registers_to_banded_matrices(role, device):
    """Contiguous, 64 images: three taps are for sums, thirty-one for matrices, and there is one change between."""
    for C, size, _ in REPLKNET[:2]:
        sums, bands = [], []
        for taps in range(3, 33, 4):
            g = conv(64, C, C, (size, size), taps, C)
            direct = config.default_depthwise(g, role, "bfloat16", False, device)
            kernel = "depthwise_wgrad" if role is Role.WGRAD else "depthwise"
            sums.append(seconds(g, kernel, direct, role, device=device, channels_last=False))
            bands.append(seconds(g, BANDED[role], config.default_banded(g, role, 2, device), role, device=device))
        better = [band < choose.WORTH_LEAVING * total for band, total in zip(bands, sums, strict=True)]
        assert better == sorted(better)
        assert not better[0]
        assert bands[-1] < 0.5 * sums[-1]


def test_rows_that_are_no_whole_vectors_and_wide_types_cost_more():
    whole, odd = (conv(64, 128, 128, (56, w), 31, 128) for w in (56, 55))
    for role in Role:
        tiling = config.default_banded(odd, role, 2, H200)
        assert seconds(odd, BANDED[role], tiling, role) > seconds(whole, BANDED[role], tiling, role)
        tiling = config.default_banded(whole, role, 4, H200)
        assert seconds(whole, BANDED[role], tiling, role, "float32") > seconds(whole, BANDED[role], tiling, role)


def test_shifted_filters_are_written_and_read():
    g = conv(64, 128, 128, (56, 56), 31, 128)
    tiling = config.default_banded(g, Role.FPROP, 2, H200)
    found = cost.predict(g, Role.FPROP, "banded", tiling, "bfloat16", "ieee", H200)
    assert found.split_seconds == pytest.approx(2 * 2 * 128 * 8 * 31 * 40 / H200.measured_copy)
    assert found.launch_seconds == 2 * cost.LAUNCH


def test_depthwise_filters_may_use_as_much_of_a_matrix_as_a_band_fills():
    dense, depthwise = (conv(64, 64, 64, (56, 56), 31, groups) for groups in (1, 64))
    rates = [
        found.flops / found.seconds
        for found in (cost.roofline(g, Role.FPROP, "bfloat16", "ieee", H200) for g in (dense, depthwise))
    ]
    assert rates[1] == pytest.approx(rates[0] * 31 / 38)
