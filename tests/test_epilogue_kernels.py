"""Fused epilogues, kernel by kernel, against plain PyTorch in float64."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from halves import first_of
from torch.nn import functional

from triton_conv import check, config, devices, execute, invariance, plan, reference, tiles
from triton_conv.config import BandedConfig, BoxConfig, Config, DepthwiseConfig
from triton_conv.epilogue import ACTIVATIONS, PLAIN, Epilogue
from triton_conv.execute import Call
from triton_conv.geometry import ConvGeometry, Role
from triton_conv.tuning import operands

SLOPE = 0.3
OF_TORCH = {
    "": lambda t: t,
    "relu": torch.relu,
    "relu6": functional.relu6,
    "leaky_relu": lambda t: functional.leaky_relu(t, SLOPE),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hardswish": functional.hardswish,
}
FORWARD, BACKWARD = Role.FPROP, Role.DGRAD
LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


@pytest.fixture(autouse=True)
def _no_stale_plans():
    plan._make.cache_clear()
    yield
    plan._make.cache_clear()


def geometry(input_shape, weight_shape, stride=1, padding=0, modes="zeros", groups=1) -> ConvGeometry:
    """One value stands for all axes, and for both sides of padding."""
    rank = len(weight_shape) - 2
    stride, padding = (v if isinstance(v, tuple) else (v,) * rank for v in (stride, padding))
    pairs = tuple(p if isinstance(p, tuple) else (p, p) for p in padding)
    return ConvGeometry.forward(input_shape, weight_shape, stride, pairs, (1,) * rank, groups, (modes,) * rank)


def call_of(role, g, epilogue, dtype=torch.float32, memory_format=CONTIGUOUS, bias=True, seed=0, device="cpu") -> Call:
    """A call on random operands; the residual lies as the output does, what is kept is not yet written."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, to=dtype):
        wide = torch.complex128 if dtype.is_complex else torch.float64
        if not (dtype.is_complex or dtype.is_floating_point):
            return torch.randint(-4, 5, shape, generator=generator).to(to).to(device)
        return torch.randn(shape, generator=generator, dtype=wide).to(to).to(device)

    def placed(t):
        return t.contiguous(memory_format=memory_format) if t.dim() == 4 else t

    rank = 3 - sum(n == 1 and k == 1 for n, k in zip(g.input[:1], g.filter[:1], strict=True))
    x, y, w = ((*s[:2], *s[5 - rank :]) for s in (g.shape("x"), g.shape("y"), g.shape("w")))
    a, out = (x, y) if role is FORWARD else (y, x)
    scale = None
    if epilogue.scale:
        scale = 0.5 + torch.rand(out[1], generator=generator).to(device)
    call = Call(role, g, placed(draw(*a)), placed(draw(*w)), draw(out[1]) if bias else None, None)
    residual = placed(draw(*out)) if epilogue.residual else None
    with check.poisoned():
        kept = torch.empty_like(execute.empty_output(call)) if epilogue.keep else None
    return replace(call, epilogue=epilogue, scale=scale, residual=residual, kept=kept)


def expected(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, what its activation is applied to) in float64."""
    wide = torch.complex128 if call.a.is_complex() else torch.float64
    a, b = (execute._five(t).to("cpu", wide) for t in (call.a, call.b))
    primitive = reference.fprop if call.role is FORWARD else reference.dgrad
    sums = primitive(a, b, None, call.geometry)
    sums = sums.reshape(call.output_shape)
    channels = (-1, *(1,) * (sums.dim() - 2))
    if call.scale is not None:
        sums = sums * call.scale.cpu().double().view(channels)
    if call.bias is not None:
        sums = sums + call.bias.to("cpu", wide).view(channels)
    e = call.epilogue
    residual = 0 if call.residual is None else call.residual.to("cpu", wide)
    before = sums + (residual if e.residual == "before" else 0)
    return OF_TORCH[e.activation](before) + (residual if e.residual == "after" else 0), before


def assert_right(call: Call) -> None:
    """Output and what is kept are rounded once: the activation and scale may double the error of a sum, not more."""
    with check.poisoned():
        got = execute.execute(call)
    want, before = expected(call)
    depth = check.depth(call.geometry, call.role)
    for name, found, right in (("output", got, want), ("kept", call.kept, before)):
        if found is None:
            continue
        assert found.dtype == call.a.dtype
        if not (found.is_floating_point() or found.is_complex()):
            assert torch.equal(found.cpu().double(), right)
            continue
        bound = check.tolerance(right, depth, found.dtype, call.precision, found.device)
        bound = bound + check.tolerance(0 * right.abs(), depth, found.dtype, call.precision, found.device)
        error = torch.nan_to_num((found.to("cpu", right.dtype) - right).abs(), nan=torch.inf)
        assert (error <= bound).all(), f"{name} of {call.epilogue}: {float((error - bound).max())}"


def plan_of(call: Call) -> plan.Plan:
    return plan.make(execute.problem_of(call, execute.device_of(call.a.device)))


EVERY = [
    (Epilogue(activation, SLOPE, residual, scale, keep), bias)
    for activation, residual, scale, keep, bias in product(
        ("", *ACTIVATIONS), ("", "before", "after"), (False, True), (False, True), (False, True)
    )
]
FEW = [EVERY[i] for i in range(0, len(EVERY), 19)]  # 19 and the 24 variants of an activation share no factor
SOME = [(Epilogue("leaky_relu", SLOPE, "before", True, True), True), (Epilogue("silu", 0, "after", True, True), False)]


@pytest.mark.parametrize("epilogues", first_of([EVERY[i::6] for i in range(6)], 1))
def test_every_epilogue(epilogues, kernels):
    g = geometry((2, 3, 3, 4), (5, 3, 2, 2), padding=((1, 0), (0, 1)))
    for epilogue, bias in epilogues:
        assert_right(call_of(FORWARD, g, epilogue, bias=bias, device=kernels))


# name: (role, geometry, dtype, memory format, kernel, config or None)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BOX = geometry((2, 16, 4, 5), (24, 16, 3, 3), padding=1)
STRIDED = geometry((2, 16, 4, 8), (16, 16, 3, 3), padding=1, stride=2)
ODD = geometry((2, 16, 5, 7), (16, 16, 3, 3), padding=1, stride=2)
PLANES = geometry((2, 16, 3, 8), (24, 16, 1, 3), padding=((0, 0), (1, 1)))
DEPTHWISE = geometry((2, 5, 5, 8), (5, 1, 3, 3), padding=1, groups=5)
LONG = geometry((2, 2, 4, 16), (2, 1, 1, 13), padding=((0, 0), (6, 6)), groups=2)
HALVES = BoxConfig((1, 1, 8, 16), 128, 16)
WAYS = {
    "gather": (FORWARD, geometry((2, 3, 4, 5), (5, 3, 3, 3), padding=1), FP16, CONTIGUOUS, "gather", None),
    "gather-last": (FORWARD, geometry((2, 8, 4, 5), (16, 8, 3, 3), padding=1), FP64, LAST, "gather", None),
    "gather-groups": (FORWARD, geometry((2, 6, 4, 5), (10, 3, 3, 3), groups=2), FP32, LAST, "gather", None),
    "gather-no-dot": (FORWARD, geometry((2, 3, 9), (4, 3, 2)), FP32, CONTIGUOUS, "gather", Config(32, 4, 4, dot=False)),
    "gather-3d": (FORWARD, geometry((1, 4, 3, 3, 4), (5, 4, 2, 2, 2)), BF16, CONTIGUOUS, "gather", None),
    "gather-dgrad": (BACKWARD, geometry((2, 5, 4, 5), (3, 5, 3, 3), padding=1), BF16, CONTIGUOUS, "gather", None),
    # residue classes that no tap reaches are finished too
    "gather-no-tap": (BACKWARD, geometry((2, 5, 4, 5), (3, 5, 1, 1), stride=2), FP32, CONTIGUOUS, "gather", None),
    # taps are not folded into channels that a scale is indexed by
    "gather-steps": (BACKWARD, geometry((2, 3, 4, 6), (5, 3, 2, 2), stride=2), FP32, LAST, "gather", None),
    "box": (FORWARD, BOX, BF16, LAST, "box", None),
    "box-dgrad": (BACKWARD, BOX, FP16, LAST, "box", None),
    "box-rows": (BACKWARD, STRIDED, FP16, LAST, "box", None),
    "box-pointers": (BACKWARD, ODD, BF16, LAST, "box", BoxConfig((1, 1, 4, 4), 16, 16)),
    "box-planes": (FORWARD, PLANES, BF16, CONTIGUOUS, "box", BoxConfig((1, 1, 2, 8), 16, 16)),
    "halves": (FORWARD, BOX, BF16, LAST, "box", HALVES),
    "halves-images": (FORWARD, BOX, BF16, LAST, "box", replace(HALVES, box=(2, 1, 8, 8))),
    "quarters-rows": (BACKWARD, STRIDED, FP16, LAST, "box", HALVES),
    "quarters-images": (BACKWARD, STRIDED, BF16, LAST, "box", replace(HALVES, box=(2, 1, 4, 16))),
    "quarters-columns": (BACKWARD, STRIDED, BF16, LAST, "box", replace(HALVES, box=(1, 1, 2, 64))),
    "quarters-pointers": (BACKWARD, ODD, BF16, LAST, "box", replace(HALVES, box=(1, 1, 16, 8))),
    "halves-planes": (FORWARD, PLANES, BF16, CONTIGUOUS, "box", HALVES),
    "depthwise": (FORWARD, DEPTHWISE, FP32, CONTIGUOUS, "depthwise", None),
    "depthwise-last": (FORWARD, DEPTHWISE, FP16, LAST, "depthwise", None),
    "depthwise-dgrad": (BACKWARD, DEPTHWISE, BF16, CONTIGUOUS, "depthwise", None),
    "depthwise-stride": (
        BACKWARD,
        replace(DEPTHWISE, stride=(1, 2, 2), output=(1, 3, 4)),
        FP64,
        LAST,
        "depthwise",
        None,
    ),
    "depthwise-multiplier": (
        FORWARD,
        geometry((2, 3, 4, 4), (6, 1, 3, 3), groups=3),
        FP32,
        CONTIGUOUS,
        "depthwise",
        DepthwiseConfig(2, 1, 16, 4, 1, (3, 3), walk=2),
    ),
    "banded": (FORWARD, LONG, FP16, CONTIGUOUS, "banded", BandedConfig((2, 8, 1), 1, 16, 16)),
    # the kernel writes contiguous copies of what is channels-last
    "banded-last": (BACKWARD, LONG, BF16, LAST, "banded", BandedConfig((2, 8, 1), 1, 16, 16)),
    "fold": (
        BACKWARD,
        geometry((2, 3, 4, 5), (4, 3, 3, 3), padding=1, modes="reflect"),
        FP32,
        CONTIGUOUS,
        "gather",
        None,
    ),
    "fold-last": (
        BACKWARD,
        geometry((2, 16, 4, 5), (16, 16, 3, 3), padding=1, modes="circular"),
        BF16,
        LAST,
        "box",
        None,
    ),
    "fold-64": (
        BACKWARD,
        geometry((2, 3, 4, 5), (4, 3, 3, 3), padding=1, modes="replicate"),
        FP64,
        LAST,
        "gather",
        None,
    ),
}


def way(name, epilogue, bias, device):
    """(a call, the kernel that computes it, the config that this takes)."""
    role, g, dtype, memory_format, kernel, tiling = WAYS[name]
    call = call_of(role, g, epilogue, dtype, memory_format, bias, device=device)
    return call, kernel, {role: tiling} if tiling else {}


@pytest.mark.parametrize("number", range(len(WAYS)), ids=list(WAYS))
def test_every_kernel(number, kernels):
    epilogue, bias = SOME[number % 2]
    call, kernel, configs = way(list(WAYS)[number], epilogue, bias, kernels)
    with config.explicit(configs):
        assert_right(call)
        assert plan_of(call).kernel == kernel


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_every_activation_in_every_kernel(name, kernels):
    for epilogue, bias in FEW:
        call, _, configs = way(name, epilogue, bias, kernels)
        with config.explicit(configs):
            assert_right(call)


def test_halves_and_quarters_are_taken():
    relu, added = Epilogue("relu"), Epilogue("relu", residual="after")
    assert tiles.box_part(HALVES, relu, FORWARD, BOX) == (1, 1, 4, 16)
    assert tiles.box_part(HALVES, PLAIN, BACKWARD, STRIDED) == HALVES.box
    assert tiles.box_part(replace(HALVES, num_warps=8), added, BACKWARD, STRIDED) == HALVES.box
    assert tiles.box_part(HALVES, relu, BACKWARD, STRIDED) == (1, 1, 4, 16)
    assert tiles.box_part(HALVES, added, BACKWARD, STRIDED) == (1, 1, 2, 16)
    assert tiles.box_part(replace(HALVES, box=(2, 1, 8, 8)), added, BACKWARD, STRIDED) == (1, 1, 4, 8)
    assert tiles.box_part(HALVES, added, FORWARD, BOX) == (1, 1, 4, 16)


def test_activations_are_as_precise_as_their_type(kernels):
    """Sums are the input itself: a filter of one. Large numbers do not overflow, and NaN stays NaN."""
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, 1e30, -1e30, 90.0, -90.0, 3.0, -3.0, 6.0, 20.0, -20.0])
    g = geometry((1, 1, 1013), (1, 1, 1))
    for activation, dtype in product(ACTIVATIONS, (torch.float32, torch.float64)):
        x = torch.cat([special, torch.linspace(-12, 12, 1000)]).to(kernels, dtype).view(1, 1, -1)
        call = Call(FORWARD, g, x, torch.ones(1, 1, 1, dtype=dtype, device=kernels), None, "ieee")
        got = execute.execute(replace(call, epilogue=Epilogue(activation, SLOPE))).cpu().double()
        want = OF_TORCH[activation](x.cpu().double())
        bound = 4 * torch.finfo(dtype).eps * want.abs().clamp(min=1)
        both = (got == want) | (got.isnan() & want.isnan())  # infinity is not near to itself
        assert (both | ((got - want).abs() <= bound)).all(), activation


def test_a_residual_that_lies_otherwise_is_copied(kernels):
    call = call_of(FORWARD, BOX, Epilogue("relu", residual="before"), BF16, LAST, device=kernels)
    assert not plan_of(call).copies_residual
    shape, device = call.residual.shape, call.residual.device
    sample = torch.randn(shape[1:], device=device).to(BF16)
    off = torch.randn(call.residual.numel() + 1, device=device).to(BF16)[1:]
    for residual in (
        call.residual.contiguous(),
        sample.expand(shape),
        off.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2),
    ):
        moved = replace(call, residual=residual)
        assert_right(moved)
        p = plan_of(moved)
        assert p.copies_residual
        assert p.steps == ("copy the residual to the output's strides",)
        assert "a copy of residual" in str(p)
        assert p.workspace_bytes == residual.numel() * 2


def test_copies_of_the_output_have_company(kernels):
    call, _, configs = way("banded-last", *SOME[1], kernels)
    with config.explicit(configs):
        p = plan_of(call)
    assert p.packs == ("x", "y")
    assert p.copies_residual
    assert p.copies_kept
    assert p.steps[:2] == ("copy the residual to the output's strides", "copy what is kept from contiguous")


def test_bundles_of_groups(kernels, monkeypatch):
    g = geometry((1, 16, 3, 4), (16, 4, 3, 3), padding=1, groups=4)
    monkeypatch.setattr(plan, "choice", lambda found: found[-1])
    for epilogue, bias in SOME:
        call = call_of(FORWARD, g, epilogue, FP16, LAST, bias, device=kernels)
        assert plan_of(call).bundle > 1
        assert_right(call)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_other_numbers(dtype, kernels):
    """Integers have relu; complex convolutions are finished in plain PyTorch."""
    e = Epilogue("silu" if dtype.is_complex else "relu", residual="before", keep=True)
    g = geometry((2, 3, 4, 5), (4, 3, 3, 3))
    for role in (FORWARD, BACKWARD):
        assert_right(call_of(role, g, e, dtype, device=kernels))


def test_a_sum_of_nothing_is_finished(kernels):
    g = geometry((2, 0, 3, 4), (5, 0, 1, 1))
    assert_right(
        call_of(FORWARD, g, Epilogue("sigmoid", residual="after", scale=True, keep=True), FP16, device=kernels)
    )


@pytest.mark.parametrize("dtype", [FP16, FP32, FP64, torch.complex128])
def test_on_a_cpu_without_kernels(dtype):
    g = geometry((2, 3, 4, 5), (4, 3, 3, 3), padding=1, modes="reflect")
    for role, (epilogue, bias) in product((FORWARD, BACKWARD), SOME):
        there_is = epilogue._replace(activation="silu") if dtype.is_complex else epilogue
        call = call_of(role, g, there_is, dtype, LAST, bias)
        assert_right(call)
        with invariance.batch_invariant():
            assert_right(call)


def test_the_reference_and_pytorch_name_the_same_activations():
    t = torch.linspace(-4, 4, 9, dtype=FP64)
    for name, function in OF_TORCH.items():
        assert torch.equal(reference.activated(t, name, SLOPE), function(t))


@pytest.mark.parametrize("name", ["box", "fold", "banded"])
def test_problems_with_an_epilogue_have_operands_and_answers(name, kernels):
    """What a tuner measures and checks them with."""
    call, _, configs = way(name, *SOME[0], kernels)
    problem = execute.problem_of(call, execute.device_of(call.a.device))
    with config.explicit(configs):
        for moved in (False, True):
            asked = problem._replace(moves_residual=moved)
            drawn, output = operands.operands(asked, call.a.device, 0)
            assert execute.problem_of(drawn, asked.device, output) == asked
            assert operands.wrong(asked, plan.make(asked), drawn, output, operands.expected(asked, drawn)) is None
            plainly = operands.expected(asked, replace(drawn, epilogue=PLAIN, residual=None, scale=None))
            assert operands.wrong(asked, plan.make(asked), drawn, output, plainly)


def test_plans_say_what_is_fused(kernels):
    e = Epilogue("leaky_relu", 0.2, "after", True, True)
    line = "epilogue   scale, bias, leaky_relu of slope 0.2, residual; what leaky_relu is applied to is kept"
    for role, g in ((FORWARD, BOX), (BACKWARD, WAYS["fold"][1])):
        call = call_of(role, g, e, device=kernels)
        assert line in str(plan_of(call)).splitlines()
        assert "epilogue" not in str(plan_of(replace(call, epilogue=PLAIN, residual=None, kept=None, scale=None)))


def test_predictions_count_what_is_read_and_kept():
    problem = execute.problem_of(
        call_of(FORWARD, geometry((64, 64, 56, 56), (64, 64, 1, 1)), PLAIN, BF16, LAST), devices.H200
    )
    plain = plan.make(problem)
    tensor = 64 * 64 * 56 * 56 * 2
    for e, tensors in (
        (Epilogue("relu"), 0),
        (Epilogue(residual="after"), 1),
        (Epilogue("silu", residual="before", keep=True), 2),
    ):
        fused = plan.make(problem._replace(epilogue=e))
        assert fused.kernel == plain.kernel
        assert fused.roofline.bytes == plain.roofline.bytes + tensors * tensor
        assert fused.prediction.memory_seconds > plain.prediction.memory_seconds or not tensors
        assert fused.prediction.loop_seconds > plain.prediction.loop_seconds
    folded = execute.problem_of(call_of(BACKWARD, WAYS["fold"][1], PLAIN), devices.H200)
    assert plan.make(folded._replace(epilogue=e)).seconds > plan.make(folded).seconds


def test_boxes_that_have_no_room_for_a_residual_do_not_fit():
    problem = execute.problem_of(
        call_of(FORWARD, geometry((64, 256, 8, 16), (256, 256, 3, 3), padding=1), PLAIN, BF16, LAST), devices.H200
    )
    deep = BoxConfig((1, 1, 8, 16), 128, 64, num_stages=6)  # 192 KiB of stages
    with config.explicit({FORWARD: deep}):
        assert plan.make(problem).config == deep
        assert plan.make(problem._replace(epilogue=Epilogue("relu"))).config == deep
        with pytest.raises(RuntimeError, match="with a residual it needs 229376 bytes"):
            plan.make(
                problem._replace(
                    epilogue=Epilogue("relu", residual="before"), device=devices.H200._replace(shared_per_block=200_000)
                )
            )


def test_scales_of_other_dtypes_are_other_plans(kernels):
    """A plan's kernel is launched again without a look at dtypes."""
    call = call_of(FORWARD, BOX, Epilogue("relu", scale=True), dtype=torch.float16, device=kernels)
    assert call.scale.dtype == torch.float32
    narrow = replace(call, scale=call.scale.half())
    wide_plan, narrow_plan = map(plan_of, (call, narrow))
    assert wide_plan is not narrow_plan
    assert (wide_plan.dtypes["scale"], narrow_plan.dtypes["scale"]) == ("float32", "float16")
