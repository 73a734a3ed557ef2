"""Convolutions of 8-bit floats with scales and of int8: values, kernels and what is refused."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import triton_conv
from triton_conv import check, cli, config, cost, execute, explain, plan
from triton_conv.check import Case
from triton_conv.config import BoxConfig, Config
from triton_conv.geometry import Role
from triton_conv.tuning import audit

FLOAT8, SCALES = torch.float8_e4m3fn, (0.37, 1.9)
OUTPUTS = [torch.bfloat16, torch.float16, torch.float32, torch.int32]


def _of(spatial, kernel, **options) -> Case:
    defaults = {"C": 32, "K": 48, "memory_format": "channels_last", "dtype": FLOAT8}
    return Case.of(spatial, kernel, **{**defaults, **options})


BOX = [
    _of((9, 11), 3, padding=1),
    _of(21, 4, padding=((3, 0),)),
    _of((4, 5, 6), 3, padding=1),
    _of((9, 11), (2, 5), padding=((2, 0), (1, 3)), dilation=(3, 2)),
    _of((3, 2), 7, padding=3, C=16),
    # tails in channels and pixels, blocks of several steps
    _of((6, 7), 3, C=144, K=72, padding=1, N=3),
    _of((6, 7), 1, C=208, K=264),
    # strides of whole extents: rows in steps, columns folded into channels
    _of((8, 12), 3, padding=1, stride=2),
    _of((8, 12), 3, C=64, padding=1, stride=(1, 3), dilation=2),
    # a filter that steps by its own length
    _of((8, 12), 4, C=16, stride=4),
    # groups of whole tiles, and of parts of them
    _of((8, 7), 3, C=64, K=128, groups=2, padding=1),
    _of((8, 12), 3, C=96, K=48, groups=3, padding=1, stride=2),
    _of((8, 7), 3, padding=1, N=1, bias=False),
]
GATHER = [
    _of((9, 11), 3, padding=1, stride=2),
    _of((6, 7), 3, C=20, K=18, padding=1),
    _of((7, 8), 7, C=3, padding=3, stride=2),
    _of((6, 7), 3, padding=((2, 1), (0, 3)), modes=("circular", "reflect")),
    _of((4, 5, 4), 3, C=18, K=4, padding=1, modes=("replicate", "zeros", "circular"), stride=(1, 2, 1)),
    _of((6, 7), 3, C=20, padding=1, memory_format="contiguous"),
    _of((6, 7), 3, C=20, padding=1, memory_format="strided"),
    _of((6, 7), 3, C=20, N=3, padding=1, memory_format="expanded", bias=False),
]
# few channels in a group, or layouts that a copy may change: plans may run them in more ways than one
EITHER = [
    _of((6, 7), 3, C=40, K=24, padding=1, groups=2),
    _of((4, 5), 3, C=8, K=8, padding=1, groups=8),
    _of(19, 4, C=5, K=15, groups=5, padding=((3, 0),)),
    _of((5, 6), 3, C=16, K=8, padding=2, dilation=2, groups=4),
    _of((6, 7), 3, padding=1, memory_format="contiguous"),
    _of((6, 7), 3, padding=1, memory_format="strided"),
]


@pytest.fixture(autouse=True)
def _fresh():
    plan._make.cache_clear()
    yield
    torch._dynamo.reset()
    plan._make.cache_clear()


def operands_of(case, out, device, seed=0):
    """x, w and bias or None; floats standard normal, integers of eight bits and biases of all 32."""
    x, w, bias, _ = (replace(case, dtype=torch.int8) if out is torch.int32 else case).operands(seed, device)
    if out is not torch.int32:
        return x, w, None if bias is None else bias.to(out)
    generator = torch.Generator().manual_seed(seed)
    for t in (x[:1], w) if case.memory_format == "expanded" else (x, w):
        t.copy_(torch.randint(-128, 128, t.shape, generator=generator))
    top = torch.iinfo(torch.int32).max
    return x, w, None if bias is None else top - torch.arange(case.K, dtype=torch.int32, device=device)


def computed(case, out, x, w, bias):
    parameters = {name: getattr(case, name) for name in ("stride", "padding", "dilation", "groups")}
    with check.poisoned():
        if out is torch.int32:
            function = getattr(triton_conv, f"int_conv{case.rank}d")
            return function(x, w, bias, **parameters, padding_mode=case.modes)
        scales = (torch.tensor(scale, device=x.device) for scale in SCALES)
        function = getattr(triton_conv, f"scaled_conv{case.rank}d")
        return function(x, w, *scales, bias, **parameters, padding_mode=case.modes, out_dtype=out)


def expected(case, out, x, w, bias):
    """By PyTorch, in float64: products and sums of integers are exact in it."""
    zeros = torch.zeros(0)
    y = check.expected(replace(case, dtype=torch.float64), check.Operands(x, w, None, zeros), ("y",))["y"]
    factor = 1 if out is torch.int32 else SCALES[0] * SCALES[1]
    added = 0 if bias is None else bias.to("cpu", torch.float64).view(-1, *(1,) * case.rank)
    y = y * factor + added
    return y.to(torch.int64).to(torch.int32) if out is torch.int32 else y


def assert_right(case, out, device):
    operands = operands_of(case, out, device)
    y, want = computed(case, out, *operands), expected(case, out, *operands)
    assert (y.dtype, y.shape) == (out, want.shape)
    if out is torch.int32:
        assert torch.equal(y.cpu(), want)
        return
    depth = case.depth("y")
    # Hopper's matrix units add the products of a step up with about 14 bits
    partial_sums = 10 * 2.0**-13 * depth**0.5 if device == "cuda" else 0.0
    bound = torch.finfo(out).eps * want.abs() + SCALES[0] * SCALES[1] * (10 * 2.0**-23 * depth + partial_sums)
    error = (y.cpu().double() - want).abs()
    assert bool((error <= bound).all()), (case, float((error / bound).max()))


def kernel_of(case, out, device):
    """What the plan runs; the case is checked on the way."""
    with execute.recording() as calls:
        assert_right(case, out, device)
    (call,) = calls
    return plan.make(execute.problem_of(call, execute.device_of(torch.device(device)))).kernel


def skip_where_impossible(out, box):
    needed = (9, 0) if box else (8, 9) if out is not torch.int32 else (0, 0)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < needed:
        pytest.skip("this GPU has no 8-bit floats" if needed == (8, 9) else "this GPU has no bulk tensor copy engine")


@pytest.mark.parametrize("out", OUTPUTS, ids=str)
@pytest.mark.parametrize("case", BOX + GATHER + EITHER, ids=lambda case: case.id)
def test_the_reference_is_right(case, out):
    assert_right(case, out, "cpu")


@pytest.mark.parametrize("out", [torch.bfloat16, torch.int32], ids=str)
@pytest.mark.parametrize(("case", "kernel"), [(c, "box") for c in BOX] + [(c, "gather") for c in GATHER], ids=str)
def test_kernels_are_right_and_picked_where_they_can_be(case, kernel, out, kernels):
    skip_where_impossible(out, kernel == "box")
    assert kernel_of(case, out, kernels) == kernel


@pytest.mark.parametrize("out", [torch.bfloat16, torch.int32], ids=str)
@pytest.mark.parametrize("tiles", [None, Config(64, 16, 32), Config(128, 16, 32, dot=False)], ids=str)
@pytest.mark.parametrize("case", EITHER, ids=str)
def test_kernels_are_right_in_whatever_way_they_run(case, tiles, out, kernels):
    skip_where_impossible(out, False)
    with config.explicit({} if tiles is None else {Role.FPROP: tiles}):
        assert_right(case, out, kernels)


@pytest.mark.parametrize("out", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [BOX[0], GATHER[1]], ids=str)
def test_kernels_write_every_float(case, out, kernels):
    skip_where_impossible(out, case is BOX[0])
    assert kernel_of(case, out, kernels) == ("box" if case is BOX[0] else "gather")


TILES = [
    Config(16, 16, 32),
    Config(32, 64, 64, filters_first=True),
    Config(16, 32, 32, flatten=True),
    Config(64, 16, 32, flatten=True, filters_first=True),
    Config(32, 32, 16, dot=False),
    BoxConfig((1, 1, 4, 8), 64, 32),
    BoxConfig((2, 1, 1, 16), 32, 32, programs=3),
    BoxConfig((16, 1, 1, 1), 128, 32),
]


@pytest.mark.parametrize("out", [torch.bfloat16, torch.int32], ids=str)
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_tiling_does_not_change_the_numbers(tiles, out, kernels):
    skip_where_impossible(out, isinstance(tiles, BoxConfig))
    with config.explicit({Role.FPROP: tiles}):
        assert kernel_of(_of((4, 3), 3, C=64, K=40, padding=1), out, kernels) == (
            "box" if isinstance(tiles, BoxConfig) else "gather"
        )


@pytest.mark.parametrize("out", [torch.bfloat16, torch.int32], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (5, 7)], ids=["whole vectors", "odd rows"])
def test_boxes_write_contiguous_outputs(size, out, kernels):
    skip_where_impossible(out, True)
    with config.explicit({Role.FPROP: BoxConfig((1, 1, 4, 8), 64, 32)}):
        assert kernel_of(_of(size, 3, padding=1, memory_format="contiguous"), out, kernels) == "box"


@pytest.mark.parametrize("tiles", [Config(16, 16, 16), BoxConfig((1, 1, 4, 8), 64, 16)], ids=str)
def test_dots_of_bytes_take_32_channels_at_a_time(tiles, kernels):
    with config.explicit({Role.FPROP: tiles}), pytest.raises(RuntimeError, match="BLOCK_K 16 is below the 32"):
        assert_right(BOX[0], torch.int32, kernels)


@pytest.mark.parametrize("case", [BOX[0], GATHER[1]], ids=str)
def test_64_bit_offsets(case, kernels, monkeypatch):
    monkeypatch.setattr(plan, "_reach", lambda *_: 2**31)
    assert_right(case, torch.int32, kernels)
    assert_right(case, torch.bfloat16, kernels)


@pytest.mark.parametrize("case", [BOX[0], BOX[7], GATHER[1], GATHER[2], EITHER[0]], ids=str)
def test_int8_convolutions_of_pytorch_keep_eight_bits(case, kernels):
    x, w, _ = operands_of(case, torch.int32, kernels)
    parameters = {name: getattr(case, name) for name in ("stride", "padding", "dilation", "groups")}
    with execute.recording() as calls, check.poisoned():
        y = triton_conv.conv2d(x, w, **parameters)
    assert torch.equal(y.cpu(), expected(case, torch.int32, x, w, None).to(torch.int8))
    p = plan.make(execute.problem_of(calls[0], execute.device_of(y.device)))
    assert p.config.BLOCK_K >= 32  # of a dot: sums in registers have 4 at most


@pytest.mark.parametrize("transposed", [False, True])
def test_int8_gradient_of_the_input_is_exact(transposed, kernels):
    case = Case.of((4, 5), 3, C=20, K=24, stride=2, dtype=torch.int8, transposed=transposed, bias=False)
    operands = case.operands(0, kernels)
    operands = operands._replace(x=operands.x * 31, w=operands.w * 31)
    y = case.run(operands)["y"].cpu()
    assert torch.equal(y, check.expected(case, operands, ("y",))["y"])


FINITE = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
FINITE = FINITE[FINITE.float().isfinite()]


@pytest.mark.parametrize("channels", [32, 3], ids=["box", "gather"])
def test_every_finite_float_is_multiplied_exactly(channels, kernels):
    """Subnormals and the largest value, 448, among them: each passes a 1x1 filter of ones in one channel alone."""
    skip_where_impossible(torch.float32, channels == 32)
    x = torch.zeros(1, channels, FINITE.numel()).to(FLOAT8)
    x[0, 0] = FINITE
    x = x.to(kernels).movedim(1, -1).contiguous().movedim(-1, 1)
    w = torch.ones(16, channels, 1, device=kernels).to(FLOAT8)
    scales = torch.tensor([0.5, 4.0], device=kernels)
    y = triton_conv.scaled_conv1d(x, w, scales[0], scales[1], out_dtype=torch.float32)
    assert torch.equal(y.cpu(), (FINITE.float() * 2).expand(1, 16, -1))


def test_sums_beyond_float16_are_infinite_and_scales_bring_them_back(kernels):
    x, w = (torch.full(shape, 448.0, device=kernels).to(FLOAT8) for shape in ((1, 32, 4, 4), (16, 32, 1, 1)))
    one, small = torch.ones(1, device=kernels), torch.full((1, 1), 2.0**-10, device=kernels)
    assert triton_conv.scaled_conv2d(x, w, one, one, out_dtype=torch.float16).isinf().all()
    y = triton_conv.scaled_conv2d(x, w, one, small, out_dtype=torch.float16)
    assert torch.equal(y, torch.full_like(y, 32 * 448 * 448 / 1024))


def nan_spreads(device):
    x, w = torch.ones(1, 32, 5, 5).to(FLOAT8), torch.ones(16, 32, 3, 3).to(FLOAT8)
    x[0, 3, 0, 0] = float("nan")
    one = torch.ones((), device=device)
    y = triton_conv.scaled_conv2d(x.to(device), w.to(device), one, one, padding=1).cpu()
    reached = torch.zeros(5, 5, dtype=torch.bool)
    reached[:2, :2] = True
    return torch.equal(y.isnan(), reached.expand_as(y))


def test_nan_reaches_the_outputs_that_see_it():
    assert nan_spreads("cpu")


def test_nan_reaches_the_outputs_that_see_it_in_kernels(kernels):
    if kernels == "cpu":
        pytest.skip("the interpreter takes the NaN of 8-bit floats for 480")
    assert nan_spreads(kernels)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_show(bad, kernels):
    x, w = torch.ones(1, 8, 3, 3, device=kernels).to(FLOAT8), torch.ones(4, 8, 1, 1, device=kernels).to(FLOAT8)
    y = triton_conv.scaled_conv2d(x, w, torch.tensor(bad, device=kernels), torch.ones((), device=kernels))
    assert not y.isfinite().any()


# ---------------------------------------------------------------------------------------------------------------------
# The operators


def arguments(out=torch.bfloat16, device="cpu"):
    """(public function of input, weight and bias; those three; the operator; its arguments)."""
    case = _of((6, 7), 3, C=8, K=4, groups=2, memory_format="contiguous")
    x, w, bias = operands_of(case, out, device)
    scales = [torch.tensor(scale, device=device) for scale in SCALES]
    parameters = (x, w, bias, [2, 2], [1] * 4, [1, 1], 2, "zeros")

    def scaled(x, w, bias):
        return triton_conv.scaled_conv2d(x, w, *scales, bias, 2, 1, groups=2, out_dtype=out)

    def integer(x, w, bias):
        return triton_conv.int_conv2d(x, w, bias, 2, 1, groups=2)

    if out is torch.int32:
        return integer, (x, w, bias), torch.ops.triton_conv.conv_int, parameters
    return scaled, (x, w, bias), torch.ops.triton_conv.conv_scaled, (*parameters, *scales, out)


BOTH = pytest.mark.parametrize("out", [torch.bfloat16, torch.int32], ids=["conv_scaled", "conv_int"])


@BOTH
def test_opcheck(out):
    *_, operator, args = arguments(out)
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if out is torch.int32:
        tests.append("test_schema")  # it compares operands by allclose, which PyTorch has not for 8-bit floats
    torch.library.opcheck(operator.default, args, test_utils=tests)


@BOTH
def test_operands_are_not_written(out, kernels):
    function, tensors, _, _ = arguments(out, kernels)
    before = [t.clone() for t in tensors]
    function(*tensors)
    assert all(torch.equal(t.view(torch.uint8), b.view(torch.uint8)) for t, b in zip(tensors, before, strict=True))


@BOTH
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph(out, backend):
    function, tensors, _, _ = arguments(out)
    assert torch.equal(torch.compile(function, fullgraph=True, backend=backend)(*tensors), function(*tensors))


def test_a_compiled_graph_reads_the_scales_of_each_call():
    _, (x, w, _), _, _ = arguments()
    function = partial(triton_conv.scaled_conv2d, groups=2)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for scale in (torch.tensor(2.0), torch.tensor(3.0)):
        assert torch.equal(compiled(x, w, scale, torch.ones(())), function(x, w, scale, torch.ones(())))


@BOTH
def test_traced(out):
    function, tensors, _, _ = arguments(out)
    assert torch.equal(torch.jit.trace(function, tensors)(*tensors), function(*tensors))


@BOTH
def test_shapes_strides_and_flops_need_no_data(out):
    function, tensors, _, _ = arguments(out)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = tensors[0].contiguous(memory_format=layout)
        y = function(x, *tensors[1:])
        assert y.is_contiguous(memory_format=layout)
    function, tensors, _, _ = arguments(out, "meta")
    with FlopCounterMode(display=False) as counter:
        assert function(*tensors).shape == (2, 4, 3, 4)
    assert counter.get_total_flops() == 2 * y.numel() * 4 * 9


@BOTH
def test_unbatched_and_empty_inputs(out):
    function, (x, w, bias), _, _ = arguments(out)
    y = function(x, w, bias)
    assert torch.equal(function(x[0], w, bias), y[0])
    assert function(x[:0], w, bias).shape == (0, *y.shape[1:])
    nothing = function(x[:, :0], w[:, :0], bias)
    assert torch.equal(nothing, bias.view(-1, 1, 1).expand_as(nothing))


@BOTH
def test_vmap_over_inputs_and_weights(out):
    function, (x, w, bias), _, _ = arguments(out)
    zero = torch.zeros_like(bias)
    inputs, weights = torch.stack([x, x.flip(0)]), torch.stack([w, w.flip(0), w])
    assert torch.equal(vmap(function, (0, None, None))(inputs, w, bias)[1], function(x.flip(0), w, bias))
    assert torch.equal(vmap(function, (None, 0, None))(x, weights, zero)[1], function(x, w.flip(0), zero))
    assert torch.equal(
        vmap(function, (0, 0, None))(inputs, weights[:2], zero)[1], function(*(inputs[1], weights[1]), zero)
    )


def test_vmap_over_scales_is_refused():
    _, (x, w, _), _, _ = arguments()
    one = torch.ones(())
    with pytest.raises(NotImplementedError, match="scales"):
        vmap(lambda scale: triton_conv.scaled_conv2d(x, w, scale, one, groups=2))(torch.ones(3))


def test_autocast_changes_nothing():
    function, tensors, _, _ = arguments(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*tensors)
    assert torch.equal(y, function(*tensors))


def test_there_is_no_gradient_and_asking_for_it_raises():
    function, (x, w, bias), _, _ = arguments()
    y = function(x, w, bias.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"conv_scaled has no gradient"):
        y.sum().backward()
    y = function(x.clone().requires_grad_(), w, bias)
    with pytest.raises(RuntimeError, match=r"conv_scaled has no gradient"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match=r"conv_scaled has no gradient"):
        grad(lambda b: function(x, w, b).sum())(bias)
    with pytest.raises(RuntimeError, match=r"conv_scaled has no derivative"):
        jvp(lambda b: function(x, w, b), (bias,), (bias,))
    with torch.no_grad():
        assert torch.equal(function(x, w, bias.requires_grad_()), y)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

ONE = torch.ones(())
X, W = torch.ones(1, 8, 5, 5).to(FLOAT8), torch.ones(4, 8, 3, 3).to(FLOAT8)
WRONG_SCALED = {
    "input dtype": ((X.float(), W, ONE, ONE), {}, RuntimeError, "input of torch.float8_e4m3fn"),
    "weight dtype": ((X, W.half(), ONE, ONE), {}, RuntimeError, "weight of torch.float8_e4m3fn"),
    "other 8-bit floats": ((X.to(torch.float8_e5m2), W, ONE, ONE), {}, RuntimeError, "float8_e5m2"),
    "scale dtype": ((X, W, ONE.double(), ONE), {}, RuntimeError, "scale_a to be one float32.*float64"),
    "scale shape": ((X, W, ONE, torch.ones(4)), {}, RuntimeError, r"scale_b to be one float32.*\[4\]"),
    "scale type": ((X, W, ONE, 1.0), {}, TypeError, "scale_b.*Tensor, not float"),
    "scale device": ((X, W, ONE.to("meta"), ONE), {}, RuntimeError, "scale_a.* on meta"),
    "bias dtype": ((X, W, ONE, ONE, torch.ones(4)), {}, RuntimeError, "bias of torch.bfloat16.*float32"),
    "bias shape": ((X, W, ONE, ONE, torch.ones(5).bfloat16()), {}, RuntimeError, "4 elements"),
    "output dtype": ((X, W, ONE, ONE), {"out_dtype": torch.int32}, RuntimeError, "out_dtype.*int32"),
    "output type": ((X, W, ONE, ONE), {"out_dtype": "float32"}, TypeError, "out_dtype.*not str"),
    "channels": ((X, W[:, :4], ONE, ONE), {}, RuntimeError, "channels"),
    "padding": ((X, W, ONE, ONE), {"padding": "some"}, RuntimeError, "padding"),
    "rank": ((X[0, 0], W, ONE, ONE), {}, RuntimeError, "scaled_conv2d"),
}
XI, WI = X.to(torch.int8), W.to(torch.int8)
WRONG_INT = {
    "input dtype": ((XI.int(), WI), {}, RuntimeError, "input of torch.int8.*int32"),
    "unsigned": ((XI.to(torch.uint8), WI), {}, RuntimeError, "input of torch.int8.*uint8"),
    "weight dtype": ((XI, W), {}, RuntimeError, "weight of torch.int8"),
    "bias dtype": ((XI, WI, torch.ones(4).to(torch.int8)), {}, RuntimeError, "bias of torch.int32"),
    "mode": ((XI, WI), {"padding_mode": "mirror"}, ValueError, "padding_mode"),
}


@pytest.mark.parametrize(("args", "keywords", "kind", "words"), WRONG_SCALED.values(), ids=WRONG_SCALED)
def test_wrong_calls_of_scaled_conv2d(args, keywords, kind, words):
    with pytest.raises(kind, match=words):
        triton_conv.scaled_conv2d(*args, **keywords)


@pytest.mark.parametrize(("args", "keywords", "kind", "words"), WRONG_INT.values(), ids=WRONG_INT)
def test_wrong_calls_of_int_conv2d(args, keywords, kind, words):
    with pytest.raises(kind, match=words):
        triton_conv.int_conv2d(*args, **keywords)


def test_the_operator_of_floats_does_not_take_8_bit_ones(kernels):
    with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
        torch.ops.triton_conv.conv(X.to(kernels), W.to(kernels), None, [1, 1], [0] * 4, [1, 1], 1, "zeros", None)


def test_a_gpu_without_8_bit_floats_is_named_before_anything_runs():
    with execute.recording() as calls:
        triton_conv.scaled_conv2d(X.to("meta"), W.to("meta"), ONE.to("meta"), ONE.to("meta"))
    problem = execute.problem_of(calls[0], config.DEVICES["A100"])
    with pytest.raises(NotImplementedError, match=r"NVIDIA A100.*float8_e4m3fn"):
        plan.make(problem)
    assert plan.make(problem._replace(device=config.DEVICES["RTX4090"])).kernel == "gather"


def test_plain_pytorch_agrees_where_it_can():
    """A product of two channels-last matrices is a 1x1 convolution."""
    x, w = torch.randn(4, 32).to(FLOAT8), torch.randn(16, 32).to(FLOAT8)
    y = triton_conv.scaled_conv1d(x[:, :, None], w[:, :, None], ONE / 2, ONE * 3, out_dtype=torch.float32)
    torch.testing.assert_close(y[:, :, 0], functional.linear(x.float(), w.float()) * 1.5)
    i, v = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((32, 32), (32, 32)))
    assert torch.equal(triton_conv.int_conv1d(i[:, :, None], v[:, :, None])[:, :, 0], torch._int_mm(i, v.T))


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def explained(words: str) -> int:
    return cli.main(["explain", *words.split()])


def test_explain_shows_the_plan_and_no_gradients(capsys):
    shapes, options = ((8, 128, 56, 56), (256, 128, 3, 3)), {"channels_last": True, "padding": 1}
    assert list(explain.plans(*shapes, dtype=FLOAT8, **options)) == ["forward"]
    assert explained("8x128x56x56 256x128x3x3 --dtype float8_e4m3fn --bias --padding 1 --channels-last") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("scaled_conv2d input 8x128x56x56")
    assert "float8_e4m3fn products to bfloat16, float32 accumulator" in printed
    assert explained("8x128x56 256x128x3 --dtype int8 --out-dtype int32") == 0
    assert "int8 products to int32, int32 accumulator" in capsys.readouterr().out
    assert explained("8x128x56 256x128x3 --dtype int8 --out-dtype int16") == 2
    assert "out_dtype" in capsys.readouterr().err
    with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
        explain.plans(*shapes, dtype=FLOAT8, transposed=True)


@pytest.mark.parametrize(
    ("dtypes", "operands", "output"),
    [
        ({"dtype": FLOAT8}, "float8_e4m3fn", "bfloat16"),
        ({"dtype": torch.int8, "out_dtype": torch.int32}, "int8", "int32"),
    ],
    ids=str,
)
def test_plans_name_the_dtype_of_every_operand(dtypes, operands, output):
    p = explain.plans((8, 20, 56, 56), (256, 20, 3, 3), bias=True, **dtypes)["forward"]
    named = {name for launch in p.launches for name in launch.operands if name}
    assert named <= set(p.dtypes)
    assert [p.dtypes[name] for name in ("x", "w", "y", "bias", "scale_a")] == [
        operands,
        operands,
        output,
        output,
        "float32",
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"padding_mode": "circular"}, "only zeros"),
        ({"groups": 8}, "channels of a group"),
        ({"stride": 3}, "whole strides"),
        ({"device": config.DEVICES["A100"]}, "copy engine"),
    ],
    ids=str,
)
def test_plans_say_what_keeps_bytes_from_boxes(change, why):
    shapes = ((8, 128, 56, 56), (256, 128 // change.get("groups", 1), 3, 3))
    options = {"channels_last": True, "dtype": torch.int8, "padding": 1}
    assert explain.plans(shapes[0], (256, 128, 3, 3), **options)["forward"].kernel == "box"
    p = explain.plans(*shapes, **options, **change)["forward"]
    assert p.kernel == "gather"
    assert why in p.reason
    assert p.config.dot


def test_tiles_of_wider_outputs_need_more_shared_memory():
    p = explain.plans((8, 128, 56, 56), (256, 128, 3, 3), channels_last=True, dtype=torch.int8)["forward"]
    stages = replace(p.config, num_stages=6)
    for out, fits in (("int8", True), ("int32", False)):
        predicted = cost.predict(p.geometry, p.role, "box", stages, "int8", "ieee", p.device, out_dtype=out)
        assert bool(predicted.resident) is fits


def test_dots_of_bytes_are_compiled_to_instructions_of_bytes():
    """For Hopper, as shipped: both operands in shared memory where boxes bring them, and no register spilled."""
    shapes, options = ((32, 128, 56, 56), (256, 128, 3, 3)), {"channels_last": True, "bias": True, "padding": 1}
    dtypes = {"QGMMA": {"dtype": FLOAT8}, "IGMMA": {"dtype": torch.int8, "out_dtype": torch.int32}}
    subjects = [
        audit.Subject(instruction, explain.plans(*shapes, **options, **dtype, padding_mode=mode)["forward"])
        for instruction, dtype in dtypes.items()
        for mode in ("zeros", "circular")
    ]
    rows = [row for _, (row,) in sorted(audit.audit(subjects, 90), key=lambda done: done[0])]
    assert [row.kernel for row in rows] == ["box", "gather"] * 2
    for row in rows:
        assert audit.faults(row) == []
        assert (row.code.matrix, row.code.operands, row.code.spills) == (row.layer, "shared", 0)
        assert row.code.tma_loads or row.code.copies
        assert not row.code.narrow_copies
