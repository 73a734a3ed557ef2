"""Folded models compute what they did, to rounding, and what could not be folded is left with its reason."""

import copy
import doctest
import re

import pytest
import torch
from models import MODELS, normed
from test_models import assert_same, pair
from torch import nn
from torch.nn.utils import parametrizations, prune

import triton_conv
from triton_conv import fold
from triton_conv import nn as ours

RANKS = (1, 2, 3)


def lively(model):
    """In eval mode, batch norms with statistics and parameters that are not those of a new one."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for t, low, high in (
                    (module.running_mean, -2, 2),
                    (module.running_var, 0.2, 3),
                    (module.weight, -1.5, 1.5),
                    (module.bias, -2, 2),
                ):
                    if t is not None:
                        t.uniform_(low, high)
    return model.eval()


def two(convolution, norm):
    return lively(nn.Sequential(convolution, norm))


def convolution(rank, transposed=False, package=nn, **options):
    name = f"Conv{'Transpose' * transposed}{rank}d"
    return getattr(package, name)(4, 6, 3, **options)


def norm(rank, **options):
    return getattr(nn, f"BatchNorm{rank}d")(6, **options)


def sample(rank, C=4, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(2, C, *(6, 5, 4)[:rank], dtype=dtype)


CASES = [
    {},
    {"bias": False},
    {"groups": 2},
    {"stride": 2, "padding": 1, "dilation": 2},
    {"transposed": True},
    {"transposed": True, "groups": 2, "stride": 2, "output_padding": 1},
    {"transposed": True, "bias": False, "stride": 2},
]


@pytest.mark.parametrize("package", [nn, ours], ids=["torch", "ours"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, rank, package):
    torch.manual_seed(0)
    model = two(convolution(rank, package=package, **case), norm(rank)).double()
    x, cls = sample(rank), type(model[0])
    expected = model(x)
    report = triton_conv.fold_batchnorm(model)
    assert (report.folded, report.skipped, len(report)) == ((("0", "1"),), (), 1)
    assert type(model[1]) is nn.Identity
    assert type(model[0]) is cls
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "other",
    [nn.BatchNorm2d(6, affine=False), nn.SyncBatchNorm(6), nn.BatchNorm2d(6, eps=0.5)],
    ids=["not affine", "synchronised", "eps"],
)
def test_other_batch_norms(other):
    model = two(convolution(2), other).double()
    expected = model(sample(2))
    assert len(triton_conv.fold_batchnorm(model)) == 1
    torch.testing.assert_close(model(sample(2)), expected, rtol=1e-12, atol=1e-12)


def test_layout_and_requires_grad_of_the_weight_stay():
    model = two(convolution(2, bias=False), norm(2)).to(memory_format=torch.channels_last).requires_grad_(False)
    before = model[0].weight
    triton_conv.fold_batchnorm(model)
    assert model[0].weight is not before
    assert model[0].weight.stride() == before.stride()
    assert not model[0].weight.requires_grad
    assert not model[0].bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_differ_by_no_more_than_said(dtype):
    torch.manual_seed(2)
    model = two(convolution(2, padding=1), norm(2)).to(dtype)
    x = sample(2, dtype=dtype)
    apart, exact = model(x).double(), copy.deepcopy(model).double()
    c, n = exact
    gain = (n.weight / torch.sqrt(n.running_var + n.eps)).abs().view(-1, 1, 1)
    everything = nn.functional.conv2d(x.double().abs(), c.weight.abs(), c.bias.abs(), padding=1) * gain
    everything = everything + gain * n.running_mean.abs().view(-1, 1, 1) + n.bias.abs().view(-1, 1, 1)
    triton_conv.fold_batchnorm(model)
    orders = 36**0.5 * 2.0**-23
    assert ((model(x).double() - apart).abs() <= (2 * torch.finfo(dtype).eps + orders) * everything).all()


class Around(nn.Module):
    """A convolution and a batch norm, which `forward` may do what it likes with."""

    def __init__(self, forward, **options):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, **options)
        self.does = forward

    def forward(self, x):
        return self.does(self, x)


def hooked(model):
    model[0].register_forward_hook(lambda m, args, y: 2 * y)


def shared(model):
    model.append(nn.Conv2d(4, 6, 3))
    model[2].weight = model[0].weight
    model[2] = nn.Sequential(nn.Conv2d(6, 4, 1), model[2]).eval()


class Own(nn.Conv2d):
    pass


class Normalised(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnOurs(ours.Conv2d):
    pass


SKIPPED = {
    "hooks on the convolution": (hooked, "'0': it has hooks"),
    "hooks on the batch norm": (lambda m: m[1].register_forward_pre_hook(lambda m, args: None), "'1': it has hooks"),
    "weight norm": (lambda m: parametrizations.weight_norm(m[0]), "'0': its weight is parametrized"),
    "pruning": (lambda m: prune.l1_unstructured(m[0], "weight", 0.5), "'0': it has hooks"),
    "shared weight": (shared, "'0': its weight is used elsewhere too"),
    "subclass": (lambda m: setattr(m[0], "__class__", Own), "'0': .*Own is a subclass of torch.nn.Conv2d"),
    "subclass of ours": (lambda m: setattr(m[0], "__class__", OwnOurs), "'0': OwnOurs is a subclass of Conv2d"),
    "batch norm of its own": (lambda m: setattr(m[1], "__class__", Normalised), "Normalised is a class of its own"),
    "patched forward": (lambda m: setattr(m[0], "_conv_forward", lambda *a: a[0]), "'0': _conv_forward was replaced"),
}


@pytest.mark.parametrize(("change", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_left_alone_with_the_reason(change, reason):
    model = two(nn.Conv2d(4, 6, 3), norm(2))
    change(model)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    report = triton_conv.fold_batchnorm(model)
    assert report.folded == ()
    ((name, said),) = report.skipped
    assert name == "1"
    assert re.search(reason, said)
    assert str(report) == f"0 of 1 batch norm folded\n  skipped 1: {said}"
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


FORWARDS = {
    "two readers": (lambda m, x: m.norm(y := m.conv(x)) + y, "2 others read its output: BatchNorm2d norm, add"),
    "called twice": (lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(x)), "'conv': it is called 2 times"),
    "something between": (lambda m, x: m.norm(m.conv(x).relu()), "it follows no convolution"),
    "weight read": (lambda m, x: m.norm(m.conv(x)) + m.conv.weight.sum(), "'conv': its weight is used elsewhere too"),
    "not called": (lambda m, x: m.conv(x), "nothing calls it"),
    "not traced": (
        lambda m, x: m.norm(m.conv(x)) if x.sum() > 0 else x,
        "'the model' cannot be traced: torch.fx: TraceError: symbolically traced variables",
    ),
    "grad mode": (
        lambda m, x: m.norm(torch.no_grad()(m.conv)(x)),
        "'the model' cannot be traced: torch.fx: RuntimeError: a part changes grad",
    ),
}


@pytest.mark.parametrize(("forward", "reason"), FORWARDS.values(), ids=FORWARDS)
def test_left_alone_for_how_it_is_called(forward, reason):
    report = triton_conv.fold_batchnorm(lively(Around(forward)))
    ((name, said),) = report.skipped
    assert (report.folded, name) == ((), "norm")
    assert said.startswith(reason)


def test_without_running_statistics():
    model = Around(lambda m, x: m.norm(m.conv(x)), track_running_stats=False).eval()
    assert triton_conv.fold_batchnorm(model).skipped == (("norm", "it has no running statistics"),)


def test_dtypes_that_do_not_fit():
    model = two(nn.Conv2d(4, 6, 3), norm(2).half())
    ((_, said),) = triton_conv.fold_batchnorm(model).skipped
    assert said == "it is torch.float16 and the convolution torch.float32"
    model = two(nn.Conv2d(4, 6, 3).half(), norm(2))
    assert len(triton_conv.fold_batchnorm(model)) == 1
    assert model[0].bias.dtype is torch.float16


def test_training_mode_raises_before_anything_changes():
    model = lively(nn.Sequential(normed(3, 4, 3), normed(4, 4, 3)))
    model[1][1].train()
    with pytest.raises(RuntimeError, match=r"'1\.1' in training mode; call model\.eval\(\)"):
        triton_conv.fold_batchnorm(model)
    assert type(model[0][1]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match=r"must be torch\.nn\.Module, not int"):
        triton_conv.fold_batchnorm(3)


def test_a_sequential_inside_what_does_not_trace():
    def forward(model, x):
        return model.part(x) if x.sum() > 0 else model.part(-x)

    model = Around(forward)
    del model.conv, model.norm
    model.part = normed(3, 4, 3)
    model = lively(model.double())
    x = sample(2, 3)
    expected = [model(x), model(-x)]
    report = triton_conv.fold_batchnorm(model)
    assert report.folded == (("part.0", "part.1"),)
    torch.testing.assert_close([model(x), model(-x)], expected)


@pytest.mark.parametrize("name", MODELS)
def test_networks(name):
    model, _, _, x = pair(name)
    lively(model)
    expected, norms = model(x), [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    names = [n for n, _ in model.named_modules()]
    report = triton_conv.fold_batchnorm(model)
    assert sorted(n for _, n in report.folded) == sorted(norms)
    assert [n for n, _ in model.named_modules()] == names
    assert_same([model(x)], [expected], 1e-12)
    assert len(triton_conv.fold_batchnorm(model)) == 0


def test_documented_examples():
    result = doctest.testmod(fold, extraglobs={"torch": torch, "triton_conv": triton_conv})
    assert (result.attempted > 5, result.failed) == (True, 0)
