"""`batch_invariant`: the same bits for a sample in every batch, live and under torch.compile."""

import pytest
import torch
from torch.nn import functional

import triton_conv
from triton_conv import backends, causal_plan, conv_calls, execute, explain, fast, invariance, plan, stored
from triton_conv.causal_config import CausalProblem, CausalRole
from triton_conv.devices import DEVICES, H200
from triton_conv.geometry import Role
from triton_conv.tuning.layers import LAYERS

BATCHES = (1, 7, 64)


@pytest.fixture(autouse=True)
def _left_as_it_was():
    yield
    assert invariance.batch() is None


def sample(name, x, w, bias=None, **options):
    """(shape of a sample, shape of the filters, dtype, channels-last, function of x, w and bias)."""
    options = dict(options)
    dtype, last, function = (
        options.pop(key, default)
        for key, default in (("dtype", torch.float32), ("last", False), ("function", triton_conv.conv2d))
    )
    return pytest.param(x, w, bias, dtype, last, function, options, id=name)


half = {"dtype": torch.bfloat16, "last": True}
transposed = {"function": triton_conv.conv_transpose2d}
CASES = [
    sample("gather", (20, 2, 3), (24, 20, 3, 2), 24, padding=(1, 0)),
    sample("few channels", (3, 3, 3), (16, 3, 2, 2), 16, stride=2),
    sample("box", (16, 2, 2), (32, 16, 1, 3), 32, **half, padding=(0, 1)),
    sample("box in steps", (16, 2, 4), (32, 16, 1, 2), 32, **half, stride=2),
    sample("pointwise", (32, 2, 2), (16, 32, 1, 1), 16, **half),
    sample("narrow groups", (16, 2, 2), (16, 4, 1, 3), None, **half, padding=(0, 1), groups=4),
    sample("depthwise", (2, 1, 4), (2, 1, 1, 3), 2, padding=(0, 1), groups=2),
    sample("depthwise, channels-last", (16, 3, 2), (32, 1, 3, 1), 32, **half, padding=(1, 0), groups=16),
    sample("banded", (1, 1, 16), (1, 1, 1, 13), 1, dtype=torch.float16, padding=(0, 6)),
    sample("transposed", (12, 1, 2), (12, 20, 1, 3), 20, **transposed, stride=(1, 2), output_padding=(0, 1)),
    sample("transposed box", (16, 1, 2), (16, 16, 1, 2), 16, **transposed, **half, stride=(1, 2)),
    sample("folded", (8, 2, 2), (12, 8, 1, 3), 12, padding=(0, 1), padding_mode="circular"),
    sample("float64", (5, 2, 2), (6, 5, 1, 3), 6, dtype=torch.float64, padding=(0, 1), padding_mode="reflect"),
    sample("tf32x3", (16, 2, 2), (16, 16, 1, 2), None, padding=(0, 1), precision="tf32x3"),
]


def outputs(x, w, bias, dy, function, options):
    """y and dx."""
    x = x.detach().requires_grad_()
    y = function(x, w, bias, **options)
    return y.detach(), *torch.autograd.grad(y, x, dy)


@pytest.mark.parametrize(("shape", "weight", "bias", "dtype", "last", "function", "options"), CASES)
def test_a_sample_has_the_same_bits_in_every_batch(kernels, shape, weight, bias, dtype, last, function, options):
    batches = BATCHES if last or "groups" not in options else (1, 7, 12)  # contiguous depthwise lanes are slow here
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        t = torch.randn(shape, generator=generator, dtype=torch.float64).to(kernels, dtype)
        return t.to(memory_format=torch.channels_last) if last and t.dim() == 4 else t

    x, w = random(max(batches), *shape), random(*weight)
    b = None if bias is None else random(bias)
    with triton_conv.batch_invariant(batch=64):  # whose tiles are large: the interpreter takes its time for each
        dy = random(*function(x[:1].to("meta"), w.to("meta"), **options).shape).expand(max(batches), -1, -1, -1)
        dy = dy.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
        found = {n: outputs(x[:n], w, b, dy[:n], function, options) for n in batches}
        found["last of 7"] = tuple(t[6:7] for t in found[7])
        alone = outputs(x[6:7], w, b, dy[6:7], function, options)
    for n in batches[1:]:
        for one, many in zip(found[1], found[n], strict=True):
            assert torch.equal(one[0], many[0])
    for one, many in zip(alone, found["last of 7"], strict=True):
        assert torch.equal(one, many)


def test_a_box_kernel_gets_samples_that_start_anywhere(kernels):
    x = torch.randn(2, 6, 6, 16).to(kernels, torch.bfloat16).permute(0, 3, 1, 2)
    w = torch.randn(16, 16, 3, 3).to(kernels, torch.bfloat16).contiguous(memory_format=torch.channels_last)
    room = torch.zeros(2 * x[0].numel() + 13, dtype=x.dtype, device=x.device)
    apart = room[5:].as_strided(x.shape, (x[0].numel() + 3, *x.stride()[1:]))  # as views of something larger are
    apart.copy_(x)
    with triton_conv.batch_invariant(), execute.problems() as problems:
        alone, together, spread = triton_conv.conv2d(x[:1], w), triton_conv.conv2d(x, w), triton_conv.conv2d(apart, w)
        made = [plan.make(problem) for problem in problems]
    assert {p.kernel for p in made} == {"box"}
    assert torch.equal(alone[0], together[0])
    assert torch.equal(together, spread)


@pytest.mark.parametrize("rows", [False, True], ids=["contiguous", "rows"])
def test_causal_convolutions_too(kernels, rows):
    generator = torch.Generator().manual_seed(2)
    B, C, L = 7, 2, 5
    x, dy = (torch.randn(B, L, C, generator=generator).transpose(1, 2).to(kernels) for _ in range(2))
    x, dy = (t if rows else t.contiguous() for t in (x, dy))
    w, b, state = (torch.randn(s, generator=generator).to(kernels) for s in ((C, 4), (C,), (B, C, 3)))

    def everything(n):
        leaf, before, running = x[:n].detach().requires_grad_(), state[:n].clone().requires_grad_(), state[:n].clone()
        y, after = triton_conv.causal_conv1d(leaf, w, b, "silu", before, True)
        dx, dstate = torch.autograd.grad((y, after), (leaf, before), (dy[:n], state[:n]))
        step = triton_conv.causal_conv1d_update(x[:n, :, 0], running, w, b, "silu")
        return y, after, dx, dstate, step, running

    with triton_conv.batch_invariant(batch=64):
        one, *more = (everything(n) for n in (1, 2, 7))
    for many in more:
        assert all(torch.equal(a[0], b[0]) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("fused", [None, True])
def test_separable_convolutions_too(kernels, fused):
    x, depthwise, pointwise = (torch.randn(s).to(kernels) for s in ((64, 2, 1, 4), (4, 1, 1, 3), (16, 4, 1, 1)))
    with triton_conv.batch_invariant(batch=64):
        one, *more = (triton_conv.separable_conv2d(x[:n], depthwise, pointwise, fused=fused) for n in BATCHES)
    assert all(torch.equal(one[0], many[0]) for many in more)


def test_eight_bits_too(kernels):
    x, w = (torch.randint(-9, 9, s, dtype=torch.int8, device=kernels) for s in ((64, 16, 2, 2), (16, 16, 1, 2)))
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    scale = torch.tensor(0.3, device=kernels)
    for function in (
        lambda x: triton_conv.int_conv2d(x, w),
        lambda x: triton_conv.scaled_conv2d(
            x.float().to(torch.float8_e4m3fn), w.float().to(torch.float8_e4m3fn), scale, scale
        ),
    ):
        with triton_conv.batch_invariant():
            one, *more = (function(x[:n]) for n in BATCHES)
        assert all(torch.equal(one[0], many[0]) for many in more)


def test_a_cpu_takes_samples_one_by_one(monkeypatch):
    """PyTorch's own convolutions may do as they like with a batch."""

    def dependent(x, *rest):
        return plain(x, *rest) + x.shape[0]

    x, w = torch.randn(7, 3, 5, 5), torch.randn(4, 3, 3, 3)
    plain = torch.convolution
    monkeypatch.setattr(torch, "convolution", dependent)
    with triton_conv.batch_invariant():
        assert torch.equal(triton_conv.conv2d(x[:1], w)[0], triton_conv.conv2d(x, w)[0])
        assert torch.equal(
            triton_conv.conv_transpose2d(x[:1], w.transpose(0, 1))[0],
            triton_conv.conv_transpose2d(x, w.transpose(0, 1))[0],
        )
    assert not torch.equal(triton_conv.conv2d(x[:1], w)[0], triton_conv.conv2d(x, w)[0])


def test_causal_on_a_cpu_too(monkeypatch):
    def dependent(x, *rest, **more):
        return plain(x, *rest, **more) + x.shape[0]

    x, w, dy = torch.randn(7, 3, 9), torch.randn(3, 4), torch.randn(7, 3, 9)
    plain = functional.conv1d
    monkeypatch.setattr(functional, "conv1d", dependent)
    with triton_conv.batch_invariant():
        alone, together = (torch.ops.triton_conv.causal_conv1d(x[:n], w, None, None, True, False)[0] for n in (1, 7))
        backward = torch.ops.triton_conv.causal_conv1d_backward
        gradients = [backward(dy[:n], None, x[:n], w, None, None, True) for n in (1, 7)]
        parts = [backward(dy[n : n + 1], None, x[n : n + 1], w, None, None, True)[1] for n in range(7)]
    assert torch.equal(alone[0], together[0])
    assert torch.equal(gradients[0][0][0], gradients[1][0][0])
    torch.testing.assert_close(gradients[1][1], sum(parts))


# ---------------------------------------------------------------------------------------------------------------------
# Choices. The interpreter multiplies with NumPy: what a GPU would do otherwise shows in plans alone.


def choices(layer, device):
    """What sets the order of sums, of the plans of a layer in several batches."""
    found = set()
    for n in BATCHES:
        made = explain.plans((n, *layer.input[1:]), layer.weight, bias=True, device=device, **layer.options)
        for name, p in made.items():
            if isinstance(p, plan.Plan) and p.role is not Role.WGRAD:
                found.add((name, p.kernel, p.config, p.packs, p.channels_last, p.bundle, p.geometry.C, p.fold is None))
            elif getattr(p, "role", None) in (CausalRole.FORWARD, CausalRole.BACKWARD):
                found.add((name, p.kernel, p.config))
    return found


@pytest.mark.parametrize("device", [DEVICES["H200"], DEVICES["A100"]], ids=lambda d: d.name)
def test_nothing_is_chosen_by_the_batch(device):
    arch = device.capability
    others = {"pointwise", "branches", "deform", "context", "activation"}
    layers = {n: la for n, la in LAYERS.items() if la.since <= arch and not others & la.options.keys()}
    free = {name: choices(layer, device) for name, layer in layers.items()}
    with triton_conv.batch_invariant():
        held = {name: choices(layer, device) for name, layer in layers.items()}
    roles = {name: len({choice[0] for choice in found}) for name, found in held.items()}
    assert {name: len(found) for name, found in held.items()} == roles
    assert sum(len(free[name]) > roles[name] for name in free) > len(free) // 4  # or this would prove nothing


def test_plans_of_the_named_batch_are_those_it_has_by_itself():
    layer = next(iter(LAYERS.values()))
    role = next(iter(explain.plans(layer.input, layer.weight, device=H200, **layer.options)))
    own = explain.plans((32, *layer.input[1:]), layer.weight, device=H200, **layer.options)[role]
    with triton_conv.batch_invariant(batch=32):
        lent = explain.plans((2, *layer.input[1:]), layer.weight, device=H200, **layer.options)[role]
    assert (lent.kernel, lent.config) == (own.kernel, own.config)
    assert "chosen for a batch of 32" in lent.reason
    assert lent.geometry.N * lent.geometry.output[2] < own.geometry.N * own.geometry.output[2]


def test_a_batch_beyond_the_coordinates_of_boxes_is_refused():
    def make(n):
        x = torch.empty(n, 64, 1024, 1024, device="meta").to(memory_format=torch.channels_last)
        w = torch.empty(64, 64, 1, 1, device="meta")
        call = conv_calls.conv_call(x, w.to(dtype=x.dtype), None, [1, 1], [0] * 4, [1, 1], 1, "zeros", "tf32")
        return plan.make(execute.problem_of(call, H200))

    with triton_conv.batch_invariant():
        assert make(2047).kernel == "box"
        with pytest.raises(NotImplementedError, match="smaller batches, since an axis is longer"):
            make(2048)
    assert make(2048).kernel == "gather"


def test_causal_splits_are_those_of_the_named_batch():
    problems = [
        CausalProblem(
            CausalRole.FORWARD, n, 256, 4096, 4, "bfloat16", "bfloat16", None, True, False, False, H200, (1, 1), (1, 1)
        )
        for n in (1, 512)
    ]
    assert len({causal_plan.make(p).config for p in problems}) == 2
    with triton_conv.batch_invariant():
        assert len({causal_plan.make(p).config for p in problems}) == 1


def test_compiled_code_obeys_it_live(kernels):
    x, w = torch.randn(2, 8, 5, 5, device=kernels), torch.randn(8, 8, 3, 3, device=kernels)
    compiled = torch.compile(lambda x: triton_conv.conv2d(x, w), backend="aot_eager", fullgraph=True)
    compiled(x)
    asked, make = [], plan._make

    def spied(*args):
        asked.append(args[-1])
        return make(*args)

    def batches() -> set[int | None]:
        asked.clear()
        fast.forget()
        compiled(x)
        return set(asked)

    plan._make = spied
    try:
        assert batches() == {None}
        with triton_conv.batch_invariant(batch=4):
            assert batches() == {4}
        assert batches() == {None}
    finally:
        plan._make = make


# ---------------------------------------------------------------------------------------------------------------------
# The switch


def test_it_nests_and_ends():
    with triton_conv.batch_invariant(batch=4):
        with triton_conv.batch_invariant(False):
            assert invariance.batch() is None
        assert invariance.batch() == 4
    assert invariance.batch() is None
    assert repr(triton_conv.batch_invariant(batch=3)) == "batch_invariant(batch=3)"
    assert repr(triton_conv.batch_invariant(False)) == "batch_invariant(False)"


@pytest.mark.parametrize(
    ("switch", "current"),
    [(triton_conv.batch_invariant, invariance.batch), (lambda: triton_conv.backend("auto"), backends.current)],
    ids=["batch_invariant", "backend"],
)
def test_compiled_code_cannot_change_it_silently(switch, current):
    def function(x):
        with switch():
            return triton_conv.conv2d(x, x)

    before = current()
    with pytest.raises(Exception, match=r"outside of what torch\.compile compiles"):
        torch.compile(function, backend="eager", fullgraph=True)(torch.ones(1, 1, 2, 2))
    assert current() == before


def test_wrong_arguments_change_nothing():
    with pytest.raises(ValueError, match="batch=0"):
        triton_conv.batch_invariant(batch=0)
    with pytest.raises(TypeError, match=r"batch=2\.5"):
        triton_conv.batch_invariant(batch=2.5)
    with pytest.raises(TypeError, match="enabled=16"):
        triton_conv.batch_invariant(16)


def test_cudnn_never_runs_meanwhile():
    call = conv_calls.conv_call(
        *(torch.empty(s, device="meta") for s in ((2, 8, 9, 9), (8, 8, 3, 3))),
        None,
        [1, 1],
        [0] * 4,
        [1, 1],
        1,
        "zeros",
        "ieee",
    )
    problem = execute.problem_of(call, H200)
    asked = []
    make, plan._make = plan._make, lambda *args: asked.append(args[2])
    try:
        with backends.backend("auto"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            plan.make(problem)
            with triton_conv.batch_invariant():
                plan.make(problem)
    finally:
        plan._make = make
    assert asked == [True, False]


def test_settings_change_with_whatever_changes_plans():
    seen = [plan.settings()]
    hash(seen[0])
    with triton_conv.batch_invariant():
        seen.append(plan.settings())
    with triton_conv.backend("auto"):
        seen.append(plan.settings())
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            seen.append(plan.settings())
    with plan.configs.explicit({Role.FPROP: plan.configs.Config(64, 64, 32)}):
        seen.append(plan.settings())
    with stored.hidden():
        seen.append(plan.settings())
    assert len(set(seen)) == len(seen)
    assert plan.settings() == seen[0]
    stored.forget()
    assert plan.settings() != seen[0]
