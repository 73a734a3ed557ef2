"""The registered operators under everything PyTorch does to operators: autograd of any order, forward mode, torch.func,
autocast, fake tensors and torch.compile, memory formats, views."""

import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from halves import first_of
from tolerance import assert_close
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import triton_conv
from triton_conv import execute, later
from triton_conv.geometry import PADDING_MODES, Role

ops = torch.ops.triton_conv

# (name in triton_conv and torch.nn.functional, input, weight, parameters); those with pairs or modes are ours alone
CASES = {
    "conv1d": ("conv1d", (2, 3, 8), (4, 3, 3), {"padding": 1}),
    "conv1d causal": ("conv1d", (2, 3, 8), (4, 3, 3), {"padding": ((2, 0),)}),
    "conv1d groups": ("conv1d", (2, 4, 8), (4, 2, 3), {"groups": 2, "stride": 2}),
    "conv2d": ("conv2d", (2, 3, 5, 6), (4, 3, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    "conv2d 1x1": ("conv2d", (2, 3, 4, 4), (4, 3, 1, 1), {}),
    "conv2d 1x1 strided": ("conv2d", (2, 3, 5, 4), (4, 3, 1, 1), {"stride": 2}),
    "conv2d dilated": ("conv2d", (2, 4, 7, 7), (4, 2, 2, 3), {"dilation": (3, 2), "padding": 2, "groups": 2}),
    "conv2d depthwise": ("conv2d", (2, 4, 5, 5), (8, 1, 3, 3), {"groups": 4, "padding": "same"}),
    "conv2d asymmetric": ("conv2d", (2, 3, 5, 6), (2, 3, 3, 3), {"padding": ((0, 2), (1, 0)), "stride": 2}),
    "conv2d circular": ("conv2d", (2, 3, 4, 4), (2, 3, 3, 3), {"padding": 1, "padding_mode": "circular"}),
    "conv2d mixed": (
        "conv2d",
        (2, 2, 4, 5),
        (2, 2, 3, 3),
        {"padding": ((1, 2), 1), "padding_mode": ("reflect", "zeros"), "dilation": (1, 2)},
    ),
    "conv3d": ("conv3d", (1, 2, 3, 4, 4), (2, 2, 2, 3, 1), {"stride": (1, 2, 1), "padding": (1, 1, 0)}),
    "conv3d causal": (
        "conv3d",
        (1, 2, 3, 3, 3),
        (2, 1, 2, 2, 2),
        {"padding": ((1, 0), (0, 1), 1), "padding_mode": ("replicate", "zeros", "circular"), "groups": 2},
    ),
    "conv_transpose1d": ("conv_transpose1d", (2, 3, 4), (3, 2, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "conv_transpose2d": ("conv_transpose2d", (2, 4, 3, 4), (4, 2, 3, 2), {"stride": (2, 3), "groups": 2}),
    "conv_transpose2d output_padding above stride": (
        "conv_transpose2d",
        (2, 2, 3, 3),
        (2, 2, 2, 3),
        {"stride": (1, 2), "dilation": (3, 4), "padding": (1, 2), "output_padding": (2, 3)},
    ),
    "conv_transpose2d circular": (
        "conv_transpose2d",
        (2, 2, 3, 3),
        (2, 3, 3, 3),
        {"stride": 2, "padding": ((1, 0), 1), "padding_mode": "circular"},
    ),
    "conv_transpose3d": (
        "conv_transpose3d",
        (1, 2, 2, 3, 2),
        (2, 1, 2, 1, 3),
        {"stride": (1, 2, 2), "groups": 2, "output_padding": (0, 1, 0)},
    ),
}
OURS_ALONE = {"conv1d causal", "conv2d asymmetric", "conv2d circular", "conv2d mixed", "conv3d causal"}
OURS_ALONE |= {"conv_transpose2d circular"}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
shared_cases = pytest.mark.parametrize("case", [CASES[k] for k in CASES if k not in OURS_ALONE])


def build(case, dtype=torch.float64, bias=True, requires_grad=True):
    """(function of input, weight and bias, the three tensors)."""
    name, x, w, kwargs = case
    torch.manual_seed(0)
    channels = w[1] * kwargs.get("groups", 1) if "transpose" in name else w[0]
    shapes = (x, w, (channels,)) if bias else (x, w)
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]
    return partial(getattr(triton_conv, name), **kwargs), tensors


def theirs(case):
    return partial(getattr(functional, case[0]), **case[3])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------------------
# The operators


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "triton_conv":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


def recorded(case, dtype=torch.float64):
    """Every call of our operators in forward and backward, with its arguments."""
    with Recorder() as recorder:
        f, tensors = build(case, dtype)
        f(*tensors).sum().backward()
    return recorder.calls


@cases
def test_opcheck(case):
    for op, args in recorded(case):
        leaves = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(op, leaves)


def test_the_cases_call_all_five_operators():
    called = {op._schema.name.split("::")[1] for case in CASES.values() for op, _ in recorded(case)}
    assert called == {"conv", "conv_dilated", "conv_transpose", "conv_dgrad", "conv_wgrad"}


def test_the_name_of_the_operator_says_which_path_ran():
    def names(case):
        return [op._schema.name.split("::")[1] for op, _ in recorded(CASES[case])]

    assert names("conv2d") == ["conv", "conv_dgrad", "conv_wgrad"]
    assert names("conv2d dilated") == ["conv_dilated", "conv_dgrad", "conv_wgrad"]
    assert names("conv_transpose2d") == ["conv_transpose", "conv", "conv_wgrad"]
    assert names("conv_transpose2d output_padding above stride")[1] == "conv_dilated"


def test_padding_modes_are_one_string():
    modes = {name: [args[-2] for _, args in recorded(CASES[name])] for name in CASES}
    assert modes["conv2d circular"] == ["circular"] * 3
    assert modes["conv2d mixed"] == ["reflect,zeros"] * 3
    x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3)
    for modes in (("circular", "circular"), ["circular"], "circular"):
        with Recorder() as recorder:
            triton_conv.conv2d(x, w, padding=1, padding_mode=modes)
        assert recorder.calls[0][1][-2] == "circular"
    parameters = ((1, 1), (1,) * 4, (1, 1), 1)
    one, each = (ops.conv(x, w, None, *parameters, mode, None) for mode in ("replicate", "replicate,replicate"))
    assert torch.equal(one, each)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("case", [CASES["conv2d"], CASES["conv_transpose2d"]], ids=["conv2d", "conv_transpose2d"])
def test_only_what_is_asked_for_is_computed(case, needs):
    f, tensors = build(case, requires_grad=False)
    for t, need in zip(tensors, needs, strict=True):
        t.requires_grad_(need)
    with Recorder() as recorder:
        y = f(*tensors)
        assert y.requires_grad == any(needs)
        if any(needs):
            y.sum().backward()
    assert [t.grad is not None for t in tensors] == list(needs)
    assert len(recorder.calls) == 1 + needs[0] + needs[1]


@shared_cases
def test_outputs_and_gradients_are_those_of_pytorch(case):
    f, tensors = build(case)
    copies = [t.detach().clone().requires_grad_() for t in tensors]
    y, z = f(*tensors), theirs(case)(*copies)
    assert_close(y, z, 100)
    dy = torch.randn_like(y)
    for ours, wanted in zip(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(z, copies, dy), strict=True):
        assert_close(ours, wanted, 100)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives


@cases
def test_gradcheck_in_both_modes_and_batched(case):
    f, tensors = build(case)
    gradcheck(f, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@pytest.mark.parametrize("name", ["conv1d", "conv2d dilated", "conv2d mixed", "conv_transpose2d circular"])
def test_gradcheck_of_complex_tensors(name):
    f, tensors = build(CASES[name], torch.complex128)
    gradcheck(f, tensors, fast_mode=True, check_forward_ad=True)
    gradgradcheck(f, tensors, fast_mode=True)


MODES = {
    "conv": ("conv2d", (1, 2, 4, 3), (2, 2, 2, 3), {"padding": ((1, 0), 1), "stride": (1, 2)}),
    "conv_dilated": ("conv2d", (1, 2, 5, 4), (2, 1, 2, 2), {"padding": (2, 1), "dilation": (3, 2), "groups": 2}),
    "conv_transpose": ("conv_transpose2d", (1, 2, 3, 3), (2, 2, 3, 2), {"padding": ((1, 1), (0, 1)), "stride": (1, 2)}),
}


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("op", MODES)
def test_first_and_second_derivatives_with_every_border(op, mode):
    name, x, w, kwargs = MODES[op]
    f, tensors = build((name, x, w, {**kwargs, "padding_mode": mode}))
    gradcheck(f, tensors, check_forward_ad=True)
    gradgradcheck(f, tensors, check_fwd_over_rev=True, fast_mode=True)


@cases
def test_second_derivatives(case):
    f, tensors = build(case)
    gradgradcheck(f, tensors, fast_mode=True, check_batched_grad=True)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_gradient_operators_take_fewer_outputs_than_the_extents_allow(mode):
    torch.manual_seed(0)
    x, w, dy = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 6), (3, 2, 3), (1, 3, 2)))
    parameters = ((1,), (2, 1), (1,), 1, mode, None)
    gradcheck(lambda dy, w: ops.conv_dgrad(dy, w, x.shape, *parameters), (dy, w), check_forward_ad=True)
    gradcheck(lambda dy, x: ops.conv_wgrad(dy, x, w.shape, w.stride(), *parameters), (dy, x), check_forward_ad=True)
    y = ops.conv(x, w, None, *parameters)[..., :2]
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert_close(ops.conv_dgrad(dy, w, x.shape, *parameters), dx, 9)
    assert_close(ops.conv_wgrad(dy, x, w.shape, w.stride(), *parameters), dw, 9)


@pytest.mark.parametrize("name", ["conv1d", "conv_transpose2d output_padding above stride"])
def test_third_derivatives(name):
    f, tensors = build(CASES[name])

    def slope(*tensors):
        y = f(*tensors)
        return torch.autograd.grad(y.pow(3).sum(), tensors, create_graph=True)

    gradgradcheck(slope, tensors, fast_mode=True)


def test_forward_mode_with_respect_to_any_subset_of_the_operands():
    f, tensors = build(CASES["conv2d mixed"], requires_grad=False)
    tangents = [torch.randn_like(t) for t in tensors]
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):

        def g(*some, chosen=chosen):
            full = list(tensors)
            for index, t in zip(chosen, some, strict=True):
                full[index] = t
            return f(*full)

        primals, directions = [tensors[i] for i in chosen], [tangents[i] for i in chosen]
        y, dy = jvp(g, tuple(primals), tuple(directions))
        h = 1e-6
        moved = [p + h * d for p, d in zip(primals, directions, strict=True)]
        torch.testing.assert_close(y, g(*primals))
        torch.testing.assert_close(dy, (g(*moved) - y) / h, atol=1e-4, rtol=1e-4)


def test_a_tensor_changed_between_forward_and_backward_raises_as_in_pytorch():
    for index in (0, 1):
        f, tensors = build(CASES["conv2d"])
        y = f(*tensors)
        with torch.no_grad():
            tensors[index].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_bias_may_change_between_forward_and_backward():
    f, tensors = build(CASES["conv2d"])
    y = f(*tensors)
    with torch.no_grad():
        tensors[2].add_(1)
    y.sum().backward()


def test_inference_mode_and_no_grad_record_nothing():
    f, tensors = build(CASES["conv2d"])
    expected = f(*tensors)
    with torch.inference_mode():
        y = f(*tensors)
    assert y.is_inference()
    assert torch.equal(y, expected)
    with torch.no_grad():
        assert f(*tensors).grad_fn is None


def test_the_graph_may_be_walked_twice():
    f, tensors = build(CASES["conv2d"])
    y = f(*tensors).sum()
    first = torch.autograd.grad(y, tensors, retain_graph=True)
    for again, once in zip(torch.autograd.grad(y, tensors), first, strict=True):
        assert torch.equal(again, once)


# ---------------------------------------------------------------------------------------------------------------------
# torch.func


def stacked(f, tensors, in_dims, size):
    """What vmap must return, one call at a time."""
    chosen = ([t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)] for i in range(size))
    return torch.stack([f(*one) for one in chosen])


@pytest.mark.parametrize("in_dims", list(itertools.product([None, 0, -1], repeat=3))[1:], ids=str)
@pytest.mark.parametrize("name", ["conv2d dilated", "conv2d mixed", "conv_transpose2d", "conv1d causal"])
def test_vmap_over_every_subset_of_operands_and_dimensions(name, in_dims):
    f, tensors = build(CASES[name], requires_grad=False)
    tensors = [
        t if d is None else torch.randn(*t.shape, 3, dtype=t.dtype).movedim(-1, d)
        for t, d in zip(tensors, in_dims, strict=True)
    ]
    assert_close(vmap(f, in_dims)(*tensors), stacked(f, tensors, in_dims, 3), 100)
    out = vmap(f, in_dims, out_dims=1)(*tensors)
    assert_close(out, stacked(f, tensors, in_dims, 3).movedim(0, 1), 100)


@pytest.mark.parametrize("in_dims", [(1, None), (None, 2), (1, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("name", ["conv2d", "conv2d depthwise", "conv3d causal", "conv_transpose3d"])
def test_vmap_without_a_bias_over_inner_dimensions(name, in_dims):
    f, tensors = build(CASES[name], bias=False, requires_grad=False)
    tensors = [
        t if d is None else torch.randn(*t.shape, 2, dtype=t.dtype).movedim(-1, d)
        for t, d in zip(tensors, in_dims, strict=True)
    ]
    assert_close(vmap(f, in_dims)(*tensors), stacked(f, tensors, in_dims, 2), 100)


@pytest.mark.parametrize(
    "name", ["conv2d", "conv2d dilated", "conv2d mixed", "conv_transpose2d circular", "conv3d causal"]
)
def test_per_sample_gradients(name):
    """vmap(grad): a weight gradient for each sample of a batch, of unbatched samples."""
    f, (x, w, b) = build(CASES[name], requires_grad=False)
    x = torch.cat([x, x.flip(0) * 2, x - 1])

    def loss(weight, bias, sample):
        return f(sample, weight, bias).pow(2).sum()

    found = vmap(grad(loss, (0, 1)), (None, None, 0))(w, b, x)
    for index, sample in enumerate(x):
        leaves = w.clone().requires_grad_(), b.clone().requires_grad_()
        for ours, wanted in zip(found, torch.autograd.grad(loss(*leaves, sample), leaves), strict=True):
            assert_close(ours[index], wanted, 100)


def test_per_sample_gradients_of_a_module():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
            self.v = torch.nn.Parameter(torch.randn(4, 2, 2, 2))

        def forward(self, x):
            return triton_conv.conv_transpose2d(triton_conv.conv2d(x, self.w, stride=2).tanh(), self.v, stride=2)

    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 3, 9, 9)
    parameters = {k: p.detach() for k, p in net.named_parameters()}

    def loss(p, sample):
        return functional_call(net, p, (sample.unsqueeze(0),)).square().mean()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for index in range(5):
        wanted = grad(loss)(parameters, x[index])
        for key, value in wanted.items():
            torch.testing.assert_close(found[key][index], value, atol=1e-4, rtol=1e-4)


ENSEMBLES = ["conv1d causal", "conv2d mixed", "conv3d", "conv_transpose1d", "conv_transpose2d circular"]


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_of_weights_on_one_input_repeats_no_operand(name, dim):
    """The operands of the one call that is made, forward and for each gradient, are as large as those given."""
    f, (x, w, b) = build(CASES[name], requires_grad=False)
    ws = torch.randn(*w.shape, 3, dtype=w.dtype).movedim(-1, dim)
    bs = torch.randn(3, *b.shape, dtype=b.dtype)
    y = f(x, w, b)
    dys = torch.randn(3, *y.shape, dtype=y.dtype)

    def input_gradient(weight):
        return vjp(lambda t: f(t, weight, b), x)[1](dys[0])[0]

    def weight_gradient(dy):
        return vjp(lambda t: f(x, t, b), w)[1](dy)[0]

    def weight_gradient_of_inputs(t):
        return vjp(lambda weight: f(t, weight, b), w)[1](dys[0])[0]

    xs = torch.stack([x, x + 1, -x])
    for function, tensors, in_dims, role in (
        (f, (x, ws, bs), (None, dim, 0), None),
        (input_gradient, (ws,), (dim,), None),
        (weight_gradient, (dys,), (0,), Role.WGRAD),
        (weight_gradient_of_inputs, (xs,), (0,), Role.WGRAD),
    ):
        with execute.recording() as calls:
            found = vmap(function, in_dims)(*tensors)
        assert_close(found, stacked(function, tensors, in_dims, 3), 100)
        call = calls[-1]
        assert role in (None, call.role)
        given = {t.numel() for t in (x, ws, xs, y, dys)}
        assert {call.a.numel(), call.b.numel()} <= given
        assert call.geometry.groups == 1


def test_gradients_of_an_ensemble():
    f, (x, w, b) = build(CASES["conv2d mixed"], requires_grad=False)
    ws = torch.stack([w, w + 1, -w])

    def loss(weight):
        return f(x, weight, b).pow(2).sum()

    with execute.recording() as calls:
        found = vmap(grad(loss))(ws)
    assert {call.geometry.groups for call in calls} == {1}
    assert_close(found, torch.stack([grad(loss)(weight) for weight in ws]), 100)


@pytest.mark.parametrize("groups", [0, 3])
def test_an_ensemble_with_wrong_groups_raises(groups):
    x, ws = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 4, 3, 3)
    with pytest.raises(RuntimeError, match="groups"):
        vmap(lambda w: triton_conv.conv2d(x, w, groups=groups))(ws)


@pytest.mark.parametrize("name", ["conv2d dilated", "conv_transpose2d", "conv1d causal"])
def test_vmap_within_vmap(name):
    f, (x, w, b) = build(CASES[name], requires_grad=False)
    xs, ws = torch.stack([x, x + 1]), torch.stack([w, -w, w * 2])
    outer = vmap(vmap(f, (0, None, None)), (None, 0, None))(xs, ws, b)
    for i, j in itertools.product(range(3), range(2)):
        assert_close(outer[i, j], f(xs[j], ws[i], b), 100)
    both = vmap(vmap(f, (0, 0, None)), (0, None, None))(
        torch.stack([ws.new_ones(3, *x.shape), torch.stack([x] * 3)]), ws, b
    )
    for i, j in itertools.product(range(2), range(3)):
        assert_close(both[i, j], f(x if i else torch.ones_like(x), ws[j], b), 100)


@pytest.mark.parametrize("name", ["conv1d", "conv1d causal", "conv_transpose1d"])
def test_jacobians_forward_and_reverse_agree(name):
    f, tensors = build(CASES[name], requires_grad=False)
    reverse, forward = jacrev(f, (0, 1, 2))(*tensors), jacfwd(f, (0, 1, 2))(*tensors)
    reference = torch.autograd.functional.jacobian(f, tuple(tensors))
    for a, b, c in zip(reverse, forward, reference, strict=True):
        assert_close(a, c, 100)
        assert_close(b, c, 100)


def test_hessian():
    f, (x, w, b) = build(CASES["conv1d"], requires_grad=False)
    found = hessian(lambda weight: f(x, weight, b).pow(3).sum())(w)
    expected = torch.autograd.functional.hessian(
        lambda weight: functional.conv1d(x, weight, b, padding=1).pow(3).sum(), w
    )
    assert_close(found, expected, 100)


def test_a_batch_of_cotangents():
    f, (x, w, b) = build(CASES["conv2d mixed"], requires_grad=False)
    y, pull = vjp(f, x, w, b)
    dy = torch.randn(3, *y.shape, dtype=y.dtype)
    many = vmap(pull)(dy)
    for index in range(3):
        for ours, wanted in zip(many, pull(dy[index]), strict=True):
            assert_close(ours[index], wanted, 100)


def directional(f, t):
    return lambda w: jvp(f, (w,), (t,))[1]


COMPOSED = {
    "grad of grad": lambda f, t: grad(lambda w: (grad(f)(w) * t).sum()),
    "grad of jvp": lambda f, t: grad(directional(f, t)),
    "jvp of grad": lambda f, t: directional(grad(f), t),
    "jvp of jvp": lambda f, t: directional(directional(f, t), t),
    "grad of grad of grad": lambda f, t: grad(lambda w: (COMPOSED["grad of grad"](f, t)(w) * t).sum()),
    "jvp of grad of jvp": lambda f, t: directional(grad(directional(f, t)), t),
    "vmap of jvp of grad": lambda f, t: lambda w: vmap(lambda s: directional(grad(f), s)(w))(torch.stack([t, -t])),
    "grad of vmap": lambda f, t: grad(lambda w: (vmap(f)(torch.stack([w, w * t])) ** 2).sum()),
    "backward of grad": lambda f, t: lambda w: torch.autograd.grad((grad(f)(v := leaf(w)) * t).sum(), v)[0],
    "backward of jvp": lambda f, t: lambda w: torch.autograd.grad(directional(f, t)(v := leaf(w)), v)[0],
}


def leaf(t):
    return t.detach().clone().requires_grad_()


@pytest.mark.parametrize("composed", COMPOSED)
@pytest.mark.parametrize("name", ["conv1d", "conv2d dilated", "conv_transpose2d"])
def test_transforms_of_transforms_are_those_of_pytorch(name, composed):
    f, (x, w, b) = build(CASES[name], requires_grad=False)
    t = torch.randn_like(w)
    ours, wanted = (COMPOSED[composed](lambda v, g=g: g(x, v, b).pow(3).sum(), t)(w) for g in (f, theirs(CASES[name])))
    assert wanted.abs().max() > 1
    assert_close(ours, wanted, 1000)
    ours, wanted = (
        COMPOSED[composed](lambda v, g=g: g(v, w, b).pow(3).sum(), x + 1)(x) for g in (f, theirs(CASES[name]))
    )
    assert_close(ours, wanted, 1000)


# ---------------------------------------------------------------------------------------------------------------------
# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv2d dilated", "conv3d", "conv_transpose2d"])
def test_autocast_gives_what_it_gives_for_pytorch(name, dtype):
    case = CASES[name]
    f, tensors = build(case, torch.float32)
    copies = [t.detach().clone().requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype):
        y, z = f(*tensors), theirs(case)(*copies)
    assert y.dtype == z.dtype == dtype
    assert_close(y, z, 30)
    for ours, wanted, t in zip(
        torch.autograd.grad(y.float().sum(), tensors),
        torch.autograd.grad(z.float().sum(), copies),
        tensors,
        strict=True,
    ):
        assert ours.dtype == t.dtype == torch.float32
        torch.testing.assert_close(ours, wanted, atol=0.05 * float(wanted.abs().max()), rtol=0)


def test_autocast_casts_each_operand_of_whatever_type():
    x, w, b = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3).bfloat16(), torch.randn(2).half()
    with torch.autocast("cpu", torch.bfloat16):
        assert triton_conv.conv2d(x, w, b).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="should be the same"):
        triton_conv.conv2d(x, w, b)


def test_autocast_leaves_doubles_integers_and_what_is_outside_alone():
    f, tensors = build(CASES["conv2d"], torch.float64)
    whole = [(t * 4).long().detach() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        y, i = f(*tensors), f(*whole)
        with torch.autocast("cpu", enabled=False):
            single = f(*[t.float() for t in tensors])
    assert (y.dtype, i.dtype, single.dtype) == (torch.float64, torch.int64, torch.float32)
    assert torch.equal(y, f(*tensors))


def test_autocast_and_compile_together():
    f, tensors = build(CASES["conv2d"], torch.float32)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = compiled(*tensors), f(*tensors)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert tensors[1].grad.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Fake tensors and torch.compile


@cases
def test_meta_tensors_give_shape_strides_and_gradients(case):
    f, tensors = build(case)
    metas = [t.detach().to("meta").requires_grad_() for t in tensors]
    y, m = f(*tensors), f(*metas)
    assert m.device.type == "meta"
    assert (m.shape, m.stride(), m.dtype) == (y.shape, y.stride(), y.dtype)
    m.sum().backward()
    assert [t.grad.shape for t in metas] == [t.shape for t in tensors]


@pytest.mark.parametrize(
    "name",
    first_of(
        [
            "conv2d mixed",
            "conv3d",
            "conv2d dilated",
            "conv_transpose2d circular",
            "conv1d causal",
            "conv2d",
            "conv_transpose2d",
        ],
        4,
    ),
)
def test_one_dynamic_graph_serves_every_image_size(name):
    case = CASES[name]
    f, (x, w, b) = build(case)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
    rank = x.dim() - 2
    for size in (11, 7, 8, 5):  # the first has no extent in common with the weight, which would be assumed to stay
        images = [
            torch.randn(size - 2, x.shape[1], *range(size, size + rank), dtype=x.dtype).requires_grad_() for _ in "ab"
        ]
        leaves = [[image, *(t.detach().clone().requires_grad_() for t in (w, b))] for image in images]
        leaves[1][0] = images[0].detach().clone().requires_grad_()
        y, z = compiled(*leaves[0]), f(*leaves[1])
        assert y.stride() == z.stride()
        assert torch.equal(y, z)
        for ours, wanted in zip(
            torch.autograd.grad(y.pow(2).sum(), leaves[0]), torch.autograd.grad(z.pow(2).sum(), leaves[1]), strict=True
        ):
            assert_close(ours, wanted, 100)
    assert counter.frame_count == 1


def test_same_padding_compiles():
    f, tensors = build(CASES["conv2d depthwise"])
    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)(*tensors), f(*tensors))


def test_compiled_channels_last_keeps_its_strides():
    f, (x, w, b) = build(CASES["conv2d"], torch.float32)
    x = x.detach().to(memory_format=torch.channels_last)
    y = torch.compile(f, backend="aot_eager", fullgraph=True)(x, w, b)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, f(x, w, b))


def test_export_keeps_the_operator():
    class Net(torch.nn.Module):
        def forward(self, x, w):
            return triton_conv.conv2d(x, w, padding=1, padding_mode="circular")

    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=4), 3: torch.export.Dim("width", min=4)}
    program = torch.export.export(Net(), (x, w), dynamic_shapes=(free, None))
    assert ops.conv.default in [node.target for node in program.graph.nodes]
    other = torch.randn(5, 3, 9, 17)
    assert torch.equal(program.module()(other, w), Net()(other, w))


# ---------------------------------------------------------------------------------------------------------------------
# FLOP counting


def counted(f, tensors):
    """FLOPs of forward, input gradient and weight gradient."""
    x, w, b = (t.detach().clone() for t in tensors)
    result = []
    for chosen in ((), (0,), (1,)):
        leaves = [t.requires_grad_(i in chosen) for i, t in enumerate((x, w, b))]
        with FlopCounterMode(display=False) as counter:
            y = f(*leaves)
            if chosen:
                y.sum().backward()
        result.append(counter.get_total_flops() - sum(result[:1]))
    return result


# An output_padding above the stride makes an input gradient that is computed whole, counted so, and cropped.
CROPPED = "conv_transpose2d output_padding above stride"


@pytest.mark.parametrize("name", [name for name in CASES if name not in {*OURS_ALONE, CROPPED}])
def test_flops_are_those_of_pytorch(name):
    case = CASES[name]
    f, tensors = build(case)
    ours, wanted = counted(f, tensors), counted(theirs(case), tensors)
    assert ours[:2] == wanted[:2]
    assert ours[2] == ours[0]
    # PyTorch's formula counts all channels for each group in weight gradients (2.13 at least); these are of one group.
    assert wanted[2] in (ours[2], ours[2] * case[3].get("groups", 1))


def test_flops_are_those_of_the_formula():
    f, tensors = build(CASES["conv2d circular"])
    assert counted(f, tensors) == [2 * 2 * 4 * 4 * 2 * 3 * 9] * 3
    metas = [t.detach().to("meta") for t in tensors]
    assert counted(f, metas) == counted(f, tensors)


def test_flops_are_counted_whichever_is_imported_first():
    """Here the counter comes second; the first time is a matter of `when_imported`."""
    called = []
    later.when_imported("torch", lambda: called.append("at once"))
    assert called == ["at once"]
    code = """
import sys, triton_conv
loaded = "torch.utils.flop_counter" in sys.modules
import torch, triton_conv
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    triton_conv.conv1d(torch.ones(1, 2, 5), torch.ones(3, 2, 3))
print(loaded, counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", str(2 * 3 * 3 * 2 * 3)]


# ---------------------------------------------------------------------------------------------------------------------
# Memory

FORMATS = {3: [torch.contiguous_format]}
FORMATS[4] = [torch.contiguous_format, torch.channels_last]
FORMATS[5] = [torch.contiguous_format, torch.channels_last_3d]
STRIDE_CASES = {
    "conv1d": ("conv1d", (2, 4, 8), (6, 4, 3), {}),
    "conv2d": ("conv2d", (2, 4, 6, 5), (6, 4, 3, 3), {"padding": 1}),
    "conv2d 1x1": ("conv2d", (2, 4, 6, 5), (6, 4, 1, 1), {}),
    "conv2d one channel": ("conv2d", (2, 1, 6, 5), (6, 1, 3, 3), {}),
    "conv2d one filter": ("conv2d", (2, 4, 6, 5), (1, 4, 3, 3), {}),
    "conv2d one image": ("conv2d", (1, 4, 6, 5), (6, 4, 3, 3), {}),
    "conv2d one pixel": ("conv2d", (2, 4, 1, 1), (6, 4, 1, 1), {}),
    "conv2d depthwise": ("conv2d", (2, 4, 6, 5), (4, 1, 3, 3), {"groups": 4}),
    "conv2d dilated": ("conv2d", (2, 4, 6, 5), (6, 4, 2, 2), {"dilation": 2}),
    "conv3d": ("conv3d", (2, 4, 3, 4, 5), (6, 4, 2, 3, 3), {"stride": 2}),
    "conv_transpose2d": ("conv_transpose2d", (2, 4, 6, 5), (4, 6, 3, 3), {"stride": 2}),
    "conv_transpose3d": ("conv_transpose3d", (2, 4, 3, 4, 2), (4, 6, 2, 3, 3), {"stride": 2}),
}


@pytest.mark.parametrize(
    ("name", "x_format", "w_format"),
    [(n, x, w) for n, c in STRIDE_CASES.items() for x in FORMATS[len(c[1])] for w in FORMATS[len(c[2])]],
)
def test_output_strides_are_those_of_pytorch(name, x_format, w_format):
    """In float32. float64 follows the same rule here; PyTorch makes it contiguous, having no kernel for the other."""
    case = STRIDE_CASES[name]
    f, (x, w) = build(case, torch.float32, bias=False, requires_grad=False)
    x, w = x.to(memory_format=x_format), w.to(memory_format=w_format)
    y, z = f(x, w), theirs(case)(x, w)
    assert y.stride() == z.stride()
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-4)
    assert f(x.double(), w.double()).stride() == y.stride()


@pytest.mark.parametrize("name", STRIDE_CASES)
def test_input_gradients_are_channels_last_where_the_input_is(name):
    case = STRIDE_CASES[name]
    f, (x, w) = build(case, torch.float32, bias=False, requires_grad=False)
    for memory_format in FORMATS[x.dim()]:
        leaf = x.detach().to(memory_format=memory_format).requires_grad_()
        y = f(leaf, w.to(memory_format=memory_format))
        y.backward(torch.randn_like(y))
        assert leaf.grad.is_contiguous(memory_format=memory_format)


def permuted(w, order):
    """w with its axes in memory in `order`."""
    inverse = [order.index(i) for i in range(w.dim())]
    return w.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_weight_gradients_lie_in_memory_as_the_parameter_does(order, transposed):
    name, weight = ("conv_transpose2d", (3, 4, 2, 5)) if transposed else ("conv2d", (4, 3, 2, 5))
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 6, 7, dtype=torch.float64), torch.randn(weight, dtype=torch.float64)
    leaf, plain = permuted(w, order).requires_grad_(), w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(getattr(triton_conv, name)(x, leaf).pow(2).sum(), leaf)
    (expected,) = torch.autograd.grad(getattr(functional, name)(x, plain).pow(2).sum(), plain)
    assert gradient.stride() == leaf.stride()
    assert_close(gradient, expected, 100)


def test_the_gradient_of_a_parameter_with_holes_is_contiguous():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    leaf = torch.randn(4, 3, 3, 6, dtype=torch.float64)[..., ::2].requires_grad_()
    repeated = torch.randn(4, 1, 3, 3, dtype=torch.float64).expand(4, 3, 3, 3).requires_grad_()
    for w in (leaf, repeated):
        (gradient,) = torch.autograd.grad(triton_conv.conv2d(x, w).sum(), w)
        (expected,) = torch.autograd.grad(functional.conv2d(x, w).sum(), w)
        assert gradient.is_contiguous()
        assert_close(gradient, expected, 100)


def test_the_first_gradient_becomes_that_of_the_parameter_without_a_copy():
    x, w = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    made = []
    w.register_hook(lambda gradient: made.append(gradient.data_ptr()))
    triton_conv.conv2d(x, w).sum().backward()
    assert w.grad.data_ptr() == made[0]


VIEWS = {
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "offset": lambda t: torch.cat([torch.ones_like(t), t])[t.shape[0] :],
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "every second channel": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch inside": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "expanded pixels": lambda t: t[..., :1].expand_as(t),
    "expanded channels": lambda t: t[:, :1].expand_as(t),
    "expanded batch": lambda t: t[:1].expand_as(t),
    "one value": lambda t: t[:1, :1, :1, :1].expand_as(t),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (7, 3, 2, 1)),
}


@pytest.mark.parametrize("weight_view", VIEWS)
@pytest.mark.parametrize("input_view", VIEWS)
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_any_view_gives_what_its_copy_gives(name, input_view, weight_view):
    f, (x, w, b) = build(CASES[name], requires_grad=False)
    x, w = VIEWS[input_view](x), VIEWS[weight_view](w)
    leaves = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x, w, b)]
    z = theirs(CASES[name])(*leaves)
    views = [t.detach().requires_grad_() for t in (x, w, b)]
    y = f(*views)
    assert_close(y, z, 100)
    dy = torch.randn_like(z)
    wanted = torch.autograd.grad(z, leaves, dy)
    for ours, expected in zip(torch.autograd.grad(y, views, VIEWS["transposed"](dy)), wanted, strict=True):
        assert_close(ours, expected, 100)


def test_conjugated_and_negated_views():
    f, (x, w, b) = build(CASES["conv2d"], torch.complex128, requires_grad=False)
    assert_close(f(x.conj(), w, b), f(x.conj().resolve_conj(), w, b), 100)
    assert_close(f(x, w.conj(), b.conj()), f(x, w.conj().resolve_conj(), b.conj().resolve_conj()), 100)
    negative = x.conj().imag
    assert negative.is_neg()
    assert_close(f(negative, w.real, b.real), f(negative.resolve_neg(), w.real, b.real), 100)


def test_operands_are_not_written():
    f, tensors = build(CASES["conv2d mixed"])
    before = [t.detach().clone() for t in tensors]
    f(*tensors).pow(2).sum().backward()
    assert all(torch.equal(t, saved) for t, saved in zip(tensors, before, strict=True))


def test_the_output_shares_no_memory_with_its_operands():
    x, w = torch.randn(1, 1, 4, 4), torch.ones(1, 1, 1, 1)
    y = triton_conv.conv2d(x, w)
    expected = x.clone()
    x.zero_()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("name", ["conv1d", "conv2d mixed", "conv3d", "conv_transpose2d"])
def test_empty_batches(name):
    f, (x, w, b) = build(CASES[name])
    expected = f(x, w, b).shape
    empty = x.detach()[:0].requires_grad_()
    y = f(empty, w, b)
    assert y.shape == (0, *expected[1:])
    dx, dw, db = torch.autograd.grad(y.sum(), (empty, w, b))
    assert dx.shape == empty.shape
    assert torch.equal(dw, torch.zeros_like(w))
    assert torch.equal(db, torch.zeros_like(b))


def test_zero_channels_make_an_output_of_bias():
    """PyTorch's CPU returns no channels here; a sum of nothing is zero, for each of the K filters."""
    x, w, b = torch.randn(2, 0, 5, 5), torch.randn(3, 0, 3, 3), torch.randn(3, requires_grad=True)
    y = triton_conv.conv2d(x, w, b, padding=1)
    assert torch.equal(y, b.view(1, 3, 1, 1).expand(2, 3, 5, 5))
    y.sum().backward()
    assert torch.equal(b.grad, torch.full((3,), 50.0))


def test_no_filters_make_an_output_without_channels():
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    y = triton_conv.conv_transpose2d(x, torch.randn(3, 0, 3, 3))
    assert y.shape == (2, 0, 7, 7)
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d"])
def test_unbatched_inputs(name):
    f, (x, w, b) = build(CASES[name])
    assert_close(f(x[0], w, b), f(x, w, b)[0], 100)
    assert_close(f(x[0], w, b), theirs(CASES[name])(x[0], w, b), 100)


def test_the_same_call_gives_the_same_bits():
    f, tensors = build(CASES["conv2d dilated"], torch.float32)
    y = f(*tensors)
    first = torch.autograd.grad(y.sum(), tensors)
    for _ in range(3):
        z = f(*tensors)
        assert torch.equal(z, y)
        for once, again in zip(first, torch.autograd.grad(z.sum(), tensors), strict=True):
            assert torch.equal(once, again)


def test_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    f, tensors = build(CASES["conv2d"])
    expected = torch.autograd.grad(f(*tensors).sum(), tensors)

    def work(_):
        return torch.autograd.grad(f(*tensors).sum(), tensors)

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(16)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
