"""The box kernels: right wherever a plan picks it, and picked exactly where its conditions hold."""

import random
from dataclasses import replace

import pytest
import torch
from halves import first_of, half_of
from picked import kernels_of

from triton_conv import config, execute, explain, plan
from triton_conv.check import Case, check_case
from triton_conv.config import BoxConfig, Config, little_waste, run_of_little_waste
from triton_conv.geometry import ConvGeometry, Role

ACTIVATIONS = (Role.FPROP, Role.DGRAD)


def _of(spatial, kernel, **options) -> Case:
    defaults = {"C": 16, "K": 24, "memory_format": "channels_last", "dtype": torch.bfloat16}
    return Case.of(spatial, kernel, **{**defaults, **options})


# (case, kernels of the forward pass, the input gradient and the weight gradient); rows of less than eight pixels are
# too short for the runs of a weight gradient
ALL, BOTH = ("box", "box", "box_wgrad"), ("box", "box", "wgrad")
FORWARD, BACKWARD = ("box", "gather", "wgrad"), ("gather", "box", "wgrad")
CASES = [
    (_of((9, 11), 3, C=32, K=48, padding=1), ALL),
    (_of((9, 11), (2, 5), padding=((2, 0), (1, 3)), dilation=(3, 2)), BOTH),
    (_of((3, 2), 7, padding=3), BOTH),
    (_of((4, 5, 6), 3, padding=1), BOTH),
    (_of((6, 1, 9), (3, 1, 1), padding=((2, 0), 0, 0)), ALL),
    # tails in channels, blocks of several steps
    (_of((6, 7), 3, C=136, K=72, padding=1), BOTH),
    (_of((6, 7), 1, C=200, K=264), ALL),
    # strides of whole extents: rows in steps, columns folded into channels
    (_of((8, 12), 3, C=32, K=48, padding=1, stride=2), BOTH),
    (_of((8, 12), 3, C=32, K=48, padding=1, stride=(2, 1)), ALL),
    (_of((8, 12), 3, C=32, K=48, padding=1, stride=(1, 3), dilation=2), BOTH),
    (_of((12, 9), 5, C=16, K=16, padding=2, stride=3), BOTH),
    (_of((4, 6, 8), 3, C=16, padding=1, stride=(1, 1, 2)), BOTH),
    # extents that are no whole strides: gathered forward, stored by pointer backward
    (_of((9, 11), 3, padding=1, stride=2), BACKWARD),
    (_of((4, 5, 6), 3, padding=1, stride=2), BACKWARD),
    (_of((8, 8), 3, padding=1, stride=2, C=24, K=16), BACKWARD),
    # pointwise, and filters that step by their own length
    (_of((7, 7), 1), ALL),
    (_of((8, 9), 1, stride=2), BOTH),
    (_of((8, 12), 4, stride=4), BOTH),
    (_of((8, 8), 2, stride=2, C=3 * 16), BOTH),
    # groups
    (_of((8, 12), 3, C=64, K=32, groups=2, padding=1), ALL),
    (_of((8, 12), 3, C=96, K=144, groups=3, padding=1, stride=2), BOTH),
    # transposed
    (_of((4, 5), 3, K=32, stride=2, padding=1, output_padding=1, transposed=True), BOTH),
    (_of((4, 5), 4, K=32, stride=2, padding=1, transposed=True), BOTH),
    (_of((4, 5), 2, stride=2, transposed=True), BOTH),
    (_of((4, 5), 1, stride=3, transposed=True), BOTH),
    (_of((4, 5), 3, stride=2, transposed=True), FORWARD),
    (
        _of((3, 4), 3, stride=(2, 3), dilation=(3, 2), C=32, K=64, groups=2, output_padding=(1, 1), transposed=True),
        BOTH,
    ),
    # padding modes: gathered forward, folded backward
    (_of((8, 7), 3, padding=((2, 1), (0, 2)), modes=("circular", "reflect")), BACKWARD),
    (_of((4, 6, 6), 3, padding=((2, 0), 1, 1), modes=("replicate", "zeros", "zeros")), BACKWARD),
    # other types
    (_of((8, 7), 3, padding=1, dtype=torch.float16), BOTH),
    (_of((8, 7), 3, padding=1, dtype=torch.float32, precision="tf32"), BOTH),
    (_of((8, 8), 3, C=20, K=16, padding=1, stride=(2, 1), dtype=torch.float32, precision="tf32"), BOTH),
    (_of((8, 7), 3, padding=1, N=1, bias=False), BOTH),
    # images of one pixel, whose strides are anything
    (_of((1, 1), 3, padding=1, N=17), ALL),
    # batches of small images
    (_of((2, 3), 3, padding=1, N=17), ALL),
]

IN_N, IN_D, IN_H, IN_W = [tuple(16 if axis == a else 1 for a in range(4)) for axis in range(4)]
# (case, run of its weight gradient): tails of runs, borders before and behind them, steps along and across them
RUNS = [
    (_of((2, 21), (2, 4), C=40, padding=((1, 0), (2, 3))), IN_W),
    (_of((21, 2), (4, 1), K=72, padding=((3, 0), 0)), IN_H),
    (_of((19, 2, 2), (3, 1, 2), padding=((2, 0), 0, 0)), IN_D),
    (_of((2, 2), (2, 3), C=24, K=72, N=19, padding=1), IN_N),
    (_of(35, 5, padding=2, dilation=3), IN_W),
    (_of((4, 36), 3, padding=1, stride=2), IN_W),
    (_of((36, 4), 3, padding=1, stride=2), IN_H),
    (_of((4, 6), 3, padding=1, stride=(2, 3), dilation=2, N=17), IN_N),
    (_of((2, 2, 40), 3, padding=1, stride=(1, 1, 2)), IN_W),
    (_of((18, 2), 3, C=96, K=72, groups=3, padding=1), IN_H),
    (_of((2, 34), 3, C=48, K=48, groups=2, padding=1, stride=(1, 2), dtype=torch.float16), IN_W),
    (_of((2, 18), 4, K=32, padding=1, stride=2, transposed=True), IN_W),
]


@pytest.mark.parametrize(("case", "expected"), CASES, ids=lambda v: v.id if isinstance(v, Case) else "-".join(v))
def test_right_and_picked_where_it_can_be(case, expected, kernels):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no bulk tensor copy engine")
    assert kernels_of(case, kernels) == expected


BOXED = [case for case, expected in CASES if expected in (ALL, BOTH)]
COMPARED = first_of([BOXED[i] for i in (4, 8, 12, 20, 24, 0, 6, 18)], 5)  # the last are large


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.id)
def test_box_and_gather_agree(case, kernels):
    operands = case.operands(1, kernels)
    runs = {Role.WGRAD: BoxConfig(IN_W, 64, 16, splits=2)} if case.dtype is not torch.float32 else {}
    with config.explicit(runs):
        boxed = case.run(operands, ("y", "dx", "dw"))
    with config.explicit(dict.fromkeys(Role, Config(32, 32, 32))):
        gathered = case.run(operands, ("y", "dx", "dw"))
    for name in boxed:
        depth = case.depth(name)
        eps = max(torch.finfo(case.dtype).eps, 2.0**-11 if case.precision == "tf32" else 0)
        assert (boxed[name] - gathered[name]).abs().max() <= 4 * eps * depth**0.5


TILES = [
    BoxConfig((1, 1, 4, 8), 64, 16),
    BoxConfig((2, 1, 1, 16), 32, 16),
    BoxConfig((1, 1, 8, 2), 16, 16, programs=3),
    BoxConfig((16, 1, 1, 1), 128, 16),
]


@pytest.mark.parametrize(
    ("case", "tiles"),
    half_of([_of((5, 6), 3, C=32, padding=1), _of((4, 6), 3, C=32, K=48, padding=1, stride=2), CASES[21][0]], TILES),
)
def test_tiling_does_not_change_the_numbers(case, tiles, kernels):
    with config.explicit(dict.fromkeys(ACTIVATIONS, tiles)):
        assert kernels_of(case, kernels)[:2] == ("box", "box")


@pytest.mark.parametrize(("number", "splits"), half_of(range(len(RUNS)), [1, 3]))
def test_weight_gradients_are_right_in_runs_along_any_axis(number, splits, kernels):
    case, run = RUNS[number]
    sixteen = BoxConfig(run, 64, 16, splits=splits)
    longer = BoxConfig(tuple(2 * side if side > 1 else 1 for side in run), 16, 64, splits=splits)
    with execute.recording() as calls, config.explicit({Role.WGRAD: longer if splits > 1 else sixteen}):
        wrong = [r for r in check_case(case, 0, kernels, Role.WGRAD) if not r.ok]
        assert not wrong, f"{case}: {wrong}"
        p = plan.make(execute.problem_of(calls[-1], execute.device_of(torch.device(kernels))))
    assert p.kernel == "box_wgrad"
    assert p.workspace_shape[:1] == ((splits,) if splits > 1 else ())


@pytest.mark.parametrize(
    ("role", "tiles", "options", "why"),
    [
        (Role.FPROP, BoxConfig((1, 2, 8, 8), 64, 16), {"stride": 2}, "depth of 1"),
        (Role.FPROP, BoxConfig((1, 1, 8, 16), 64, 64), {"groups": 2}, "does not divide"),
        (Role.FPROP, BoxConfig((1, 1, 8, 16), 64, 64, splits=2), {}, "for weight gradients"),
        (Role.WGRAD, BoxConfig(IN_D, 64, 16), {"stride": 2}, "depth of 1"),
        (Role.WGRAD, BoxConfig((1, 1, 4, 16), 64, 64), {}, "a run of pixels"),
    ],
)
def test_box_configs_that_do_not_fit_are_refused(role, tiles, options, why):
    shapes = ((8, 64, 28, 28), (64, 64 // options.get("groups", 1), 3, 3))
    with config.explicit({role: tiles}), pytest.raises(RuntimeError, match=why):
        explain.plans(*shapes, dtype=torch.bfloat16, channels_last=True, padding=1, **options)


PLANES = [
    (_of((3, 8), 3, C=32, padding=1, N=3), (2, 1, 1, 16)),
    (_of((2, 3, 16), 3, padding=1, N=1), (1, 2, 2, 8)),
    (_of((24,), 5, padding=2, dtype=torch.float16), (1, 1, 1, 16)),
    (_of((4, 8), 1, K=136, N=3, bias=False), (1, 1, 1, 32)),
    (_of((3, 16), 3, C=64, K=32, groups=2, padding=1, N=1), (1, 1, 2, 16)),
    (_of((6, 8), 3, C=16, K=16, padding=(1, 4), modes="circular"), (1, 1, 4, 8)),
    (_of((6, 8), 3, C=20, K=16, padding=1, dtype=torch.float32, precision="tf32"), (2, 1, 4, 4)),
]


@pytest.mark.parametrize(("case", "box"), PLANES, ids=lambda v: v.id if isinstance(v, Case) else None)
def test_contiguous_outputs_are_stored_as_planes_where_their_rows_allow(case, box, kernels):
    contiguous = replace(case, memory_format="contiguous")
    roles = ACTIVATIONS if set(case.modes) == {"zeros"} else (Role.DGRAD,)
    with config.explicit(dict.fromkeys(roles, BoxConfig(box, 16, 16))), execute.recording() as calls:
        wrong = [r for r in check_case(contiguous, 0, kernels) if not r.ok]
        assert not wrong
        device = execute.device_of(torch.device(kernels))
        plans = [plan.make(execute.problem_of(c, device)) for c in calls if c.role in roles]
    assert all(p.launches[0].arguments["STORE_PLANES"] for p in plans)


@pytest.mark.parametrize("case", [case for case, expected in CASES if expected == BOTH][::5], ids=lambda case: case.id)
def test_contiguous_tensors_are_right_once_copied(case, kernels):
    contiguous = replace(case, memory_format="contiguous")
    with config.explicit(dict.fromkeys(ACTIVATIONS, BoxConfig((1, 1, 2, 8), 32, 16))):
        assert kernels_of(contiguous, kernels) == BOTH


def test_unaligned_tensors_are_gathered(kernels):
    case = _of((6, 7), 3, padding=1)
    operands = case.operands(0, kernels)
    moved = torch.empty(operands.x.numel() + 1, dtype=case.dtype, device=kernels)[1:]
    moved = moved.as_strided(operands.x.shape, operands.x.stride()).copy_(operands.x)
    with execute.recording() as calls:
        case.run(operands._replace(x=moved), ("y",))
    p = plan.make(execute.problem_of(calls[0], execute.device_of(moved.device)))
    assert p.kernel == "gather"
    assert "16 bytes" in p.reason


def test_repeated_images_are_gathered():
    """Nobody promises that a descriptor may have a stride of zero."""
    x = torch.empty((1, 64, 28, 28), dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    x, w = x.expand(8, -1, -1, -1), torch.empty((64, 64, 3, 3), dtype=x.dtype, device="meta")
    with execute.recording() as calls:
        y = torch.ops.triton_conv.conv(x, w.requires_grad_(), None, [1, 1], [0] * 4, [1, 1], 1, "zeros", None)
        torch.autograd.grad(y, w, torch.empty_like(y).contiguous(memory_format=torch.channels_last))
    found = [plan.make(execute.problem_of(c, config.DEVICES["H200"])) for c in calls]
    assert [p.kernel for p in found] == ["gather", "wgrad"]
    assert all("16 bytes apart" in p.reason for p in found)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": config.DEVICES["A100"]}, "copy engine"),
        ({"channels_last": False}, "not channels-last"),
        ({"dtype": torch.float64}, "no box kernel"),
        ({"dtype": torch.float32, "precision": "ieee"}, "no box kernel"),
        ({"padding_mode": "circular"}, "only zeros"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_plans_say_what_keeps_them_from_it(change, why):
    shapes = ((8, 64, 28, 28), (64, 64, 3, 3))
    options = {"padding": 1, "dtype": torch.bfloat16, "channels_last": True}
    assert explain.plans(*shapes, **options)["forward"].kernel == "box"
    other = explain.plans(*shapes, **{**options, **change})["forward"]
    assert other.kernel == "gather"
    assert why in other.reason


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32, "precision": "tf32"}, "weight gradients of float32"),
        ({"device": config.DEVICES["A100"]}, "copy engine"),
        ({"groups": 8}, "few channels"),
        ({"stride": 3}, "whole strides"),
        ({"padding_mode": "circular"}, "only zeros"),
        ({"kernel_size": (25, 25)}, "idle more than half"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_plans_say_what_keeps_weight_gradients_from_it(change, why):
    def weight_gradient(kernel_size=(3, 3), **options):
        shapes = ((6, 64, 28, 28), (64, 64 // options.get("groups", 1), *kernel_size))
        options = {"padding": 1, "dtype": torch.bfloat16, "channels_last": True, **options}
        return explain.plans(*shapes, **options)["weight gradient"]

    assert weight_gradient().kernel == "box_wgrad"
    assert weight_gradient(**change).kernel == "wgrad"
    assert why in weight_gradient(**change).reason


def test_a_box_config_where_none_can_run_is_refused():
    with (
        config.explicit({Role.FPROP: BoxConfig((1, 1, 8, 16), 64, 64)}),
        pytest.raises(RuntimeError, match="only zeros"),
    ):
        explain.plans((8, 64, 28, 28), (64, 64, 3, 3), padding=1, padding_mode="circular", dtype=torch.bfloat16)


def test_contiguous_filters_are_copied_and_explain_says_so():
    shapes = ((8, 64, 28, 28), (64, 64, 3, 3))
    x = torch.empty(shapes[0], dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    w = torch.empty(shapes[1], dtype=torch.bfloat16, device="meta")
    with execute.recording() as calls:
        torch.ops.triton_conv.conv(x, w, None, [1, 1], [0] * 4, [1, 1], 1, "zeros", None)
    p = plan.make(execute.problem_of(calls[0], config.DEVICES["H200"]))
    assert p.kernel == "box"
    assert p.packs == ("w",)
    assert p.workspace_bytes == w.numel() * 2
    assert "copy the filters" in str(p)


@pytest.mark.parametrize(
    ("counts", "box"),
    [
        ((1, 1, 1, 3136), (1, 1, 1, 128)),
        ((32, 1, 56, 56), (1, 1, 8, 16)),
        ((32, 1, 14, 14), (4, 1, 2, 16)),
        ((128, 1, 7, 7), (16, 1, 1, 8)),
        ((1, 16, 4, 4), (1, 8, 4, 4)),
        ((128, 1, 1, 1), (128, 1, 1, 1)),
    ],
)
def test_boxes_waste_little(counts, box):
    assert little_waste(counts, 128) == box


@pytest.mark.parametrize(
    ("counts", "run"),
    [
        ((1, 1, 1, 3136), (1, 1, 1, 64)),
        ((32, 1, 56, 56), (1, 1, 1, 64)),
        ((64, 1, 28, 28), (64, 1, 1, 1)),
        ((32, 1, 14, 14), (32, 1, 1, 1)),
        ((1, 64, 9, 9), (1, 64, 1, 1)),
        ((2, 1, 100, 32), (1, 1, 1, 32)),
        ((1, 1, 1, 1), (1, 1, 1, 16)),
    ],
)
def test_runs_waste_little(counts, run):
    assert run_of_little_waste(counts) == run


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (((1, 1, 1, 24), 64, 64), "powers of two"),
        (((1, 1, 1, 64), 0, 64), "powers of two"),
        (((1, 1, 1, 8), 64, 64), "16 or more"),
        (((1, 1, 1, 512), 64, 64), "256 or less"),
    ],
    ids=str,
)
def test_boxes_no_kernel_can_fetch_are_refused(arguments, why):
    with pytest.raises(ValueError, match=why):
        BoxConfig(*arguments)
    with pytest.raises(ValueError, match="splits"):
        BoxConfig((1, 1, 1, 64), 64, 64, splits=0)


def test_every_box_is_whole():
    rng = random.Random(0)
    for _ in range(200):
        counts = tuple(rng.randint(1, 40) for _ in range(4))
        assert torch.Size(little_waste(counts, 128)).numel() == 128


@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
def test_slices_of_channels_with_steps_along_rows_are_right(role, kernels):
    """Columns fold into channels only where all channels are there."""
    case = _of((8, 16), 3, C=32, K=32, N=1, padding=1, stride=2)
    operands = case.operands(0, kernels)
    x, w, dy = operands.x, operands.w, operands.dy
    wide = torch.full((1, 48, 8, 16), 7.0, dtype=x.dtype, device=x.device).contiguous(memory_format=torch.channels_last)
    x = wide[:, 8:40].copy_(x)
    a, b = {Role.FPROP: (x, w), Role.DGRAD: (dy, w), Role.WGRAD: (dy, x)}[role]
    g = ConvGeometry.forward(x.shape, w.shape, (2, 2), ((1, 1), (1, 1)))
    call = execute.Call(role, g, a, b, None, None, tuple(w.stride()))
    dx = wide.clone()[:, 8:40]
    output = dx if role is Role.DGRAD else execute.empty_output(call)
    p = plan.make(execute.problem_of(call, config.DEVICES["H200"], output))
    assert p.kernel.startswith("box") == (role is Role.DGRAD)
    execute.run(p, call, output)
    expected = execute._reference(call, torch.empty_like(output))
    torch.testing.assert_close(output, expected)
    assert (dx._base[:, :8] == 7).all()
    assert (dx._base[:, 40:] == 7).all()
