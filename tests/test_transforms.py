"""The registered operators under torch.func's transforms."""

import itertools

import pytest
import torch
from op_cases import CASES, build, theirs
from tolerance import assert_close
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional

import triton_conv
from triton_conv import execute
from triton_conv.geometry import Role


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
