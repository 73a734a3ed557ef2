"""Plans of causal convolutions: what they launch, what they move, how long that is predicted to take."""

import pytest
import torch
from test_compile import compiled
from torch.nn import functional

from triton_conv import causal_conv1d, causal_ops, causal_plan, cli, explain
from triton_conv.causal_config import CausalConfig, CausalRole
from triton_conv.devices import DEVICES, H200

MAMBA = ((2, 12288, 16384), (12288, 4))
BFLOAT16 = {"causal": True, "dtype": torch.bfloat16, "activation": "silu"}


@pytest.mark.parametrize("channels_last", [False, True])
def test_mamba_is_predicted_at_the_bandwidth_limit(channels_last):
    """Counting the share of the data sheet's bandwidth that a copy reaches."""
    plans = explain.plans(*MAMBA, **BFLOAT16, channels_last=channels_last)
    for name, passes in (("forward", 2), ("all gradients", 3)):
        p = plans[name]
        copied = passes * 2 * 12288 * 16384 * 2 / H200.measured_copy
        assert copied <= p.seconds < 1.06 * copied
        assert p.limit == p.roofline.limit == "memory bandwidth"


def test_long_sums_in_float64_are_bound_by_instructions_where_these_are_slow():
    p = explain.plans((2, 4096, 4096), (4096, 8), causal=True, dtype=torch.float64, device=DEVICES["RTX5090"])[
        "forward"
    ]
    assert p.roofline.limit == "vector rate"


def test_a_single_step_is_bound_by_its_launch():
    assert explain.plans(*MAMBA, **BFLOAT16)["update by one step"].limit == "launches and slabs"


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("role", CausalRole)
def test_a_roofline_counts_every_tensor_and_every_product(role, state):
    B, C, L, W = 2, 3, 2 if role is CausalRole.UPDATE else 7, 4
    x, weight = torch.ones(B, C, L), torch.ones(C, W)
    before = torch.ones(B, C, W - 1) if state or role is CausalRole.UPDATE else None
    padded = functional.pad(x, (W - 1, 0)) if before is None else torch.cat((before, x), 2)
    products = int(functional.conv1d(padded, weight.unsqueeze(1), groups=C).sum())
    once = [x, x, weight] if before is None else [x, x, weight, before]
    what = (weight, None, before)
    if role is CausalRole.FORWARD:
        p, moved, passes = causal_ops.forward_plan(x, *what, False, H200, x), once, 1
    elif role is CausalRole.BACKWARD:
        p, moved, passes = causal_ops.backward_plan(x, x, *what, False, H200, x), [*once, *once[1:]], 2
        assert causal_ops.backward_plan(x, x, *what, True, H200, x).roofline.flops == 3 * 2 * products
    else:
        p, moved, passes = causal_ops.update_plan(x, before, weight, None, False, H200, x), [*once, before], 1
    assert p.roofline.bytes == sum(t.nbytes for t in moved)
    assert p.roofline.flops == passes * 2 * products


def test_what_a_plan_says(capsys):
    argv = "explain 2x12288x16384 12288x4 --causal --dtype bfloat16 --channels-last --bias --activation silu"
    assert cli.main(argv.split()) == 0
    printed = capsys.readouterr().out
    for words in (
        "causal_conv1d x 2x12288x16384 w 12288x4 channels_last bias silu bfloat16 on NVIDIA H200",
        "kernel     causal (forward)",
        "kernel     causal_backward (backward)",
        "kernel     causal_update (update)",
        "x 1024 channels",
        "slabs of dw and dbias",
        "at least 336 us, by memory bandwidth",
        "us predicted, not measured",
        "most of it by memory bandwidth",
    ):
        assert words in printed


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("8x64x9 64x9 --causal", "1 to 8 taps"),
        ("8x64 64x4 --causal", "expected x of size (B, C, L)"),
        ("8x64x9 64x4 --causal --transposed", "--causal: does not go with --transposed"),
        ("8x64x9 64x4 --causal --stride 2 --padding 1", "--causal: does not go with --stride"),
        ("8x64x9 64x4 --causal --activation relu", "has --activation silu or none"),
        ("8x64x9 64x4 --causal --dtype int32", "x has dtype torch.int32"),
    ],
)
def test_what_is_wrong_with_a_question(argv, words, capsys):
    assert cli.main(["explain", *argv.split()]) == 2
    assert words in capsys.readouterr().err


def test_the_plan_that_is_explained_is_the_one_that_runs(kernels, monkeypatch):
    made, make = [], causal_plan.make
    monkeypatch.setattr(causal_plan, "make", lambda problem: made.append(problem) or make(problem))
    x = torch.randn(2, 40, 16, device=kernels).transpose(1, 2).requires_grad_()
    causal_conv1d(x, torch.randn(16, 4, device=kernels), None, "silu").sum().backward()
    ran = [make(p._replace(device=H200)) for p in made]
    plans = explain.plans((2, 16, 40), (16, 4), causal=True, activation="silu", channels_last=True)
    assert ran == [plans["forward"], plans["all gradients"]]
    assert make(made[0]) is make(made[0])


def test_a_grid_that_is_too_large_is_refused():
    x = torch.empty(1, 128, 2, device="meta").expand(2**31, 128, 2)
    weight = torch.empty(128, 4, device="meta")
    with pytest.raises(RuntimeError, match="more than a grid holds"):
        _ = causal_ops.forward_plan(x, weight, None, None, False, H200, x).launches


def test_configs_that_no_kernel_can_run():
    with pytest.raises(ValueError, match="powers of two"):
        CausalConfig(4, 3, 128)
    with pytest.raises(ValueError, match="must be positive"):
        CausalConfig(0, 1, 128)


def test_fifty_lengths_compile_few_kernels():
    """One of each with channels side by side; with positions so, one more where rows are no whole vectors."""
    assert compiled("lengths") == {
        "forward channels_last": 1,
        "backward channels_last": 1,
        "forward contiguous": 2,
        "backward contiguous": 2,
        "update": 1,
    }
