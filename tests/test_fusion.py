"""Fused models compute what they did, and every convolution is in the report with what was fused or why not."""

import copy
import doctest
import operator
import pickle
from functools import partial

import pytest
import torch
from heard import convolutions as heard_convolutions
from models import FUSED, MODELS
from test_fold import lively
from test_models import assert_same
from tolerance import assert_close
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import triton_conv
from triton_conv import fusion
from triton_conv import nn as ours


class Net(nn.Module):
    """A convolution, a batch norm, an activation of each kind, and a forward that does with them what a test says."""

    def __init__(self, forward, conv=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(self.conv.out_channels)
        self.relu, self.dropout = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.does = forward

    def forward(self, x):
        return self.does(self, x)


def net(forward, conv=None, training=False):
    torch.manual_seed(0)
    model = Net(forward, conv).double()
    return model.train() if training else lively(model)


def sample(*shape, dtype=torch.float64):
    return torch.randn(shape or (2, 4, 5, 6), dtype=dtype)


def rows(report):
    return {c.name: c.parts for c in report.convolutions if c.parts}


def reasons(report):
    return {c.name: c.left for c in report.convolutions if not c.parts}


@torch.no_grad()
def convolutions(model, x):
    return heard_convolutions(model, x)


def step(model, x):
    """The output, and gradients by name; of parameters that nothing uses, none."""
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    (y * weights).sum().backward()
    found = {"input": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return y.detach(), found


def same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert_same([ours[name] for name in theirs], theirs.values(), 1e-11)


def fused_equals(model, x, **parts):
    """The report of a model that was fused into these parts and computes the same; in training, gradients too."""
    report = triton_conv.fuse(model)
    assert rows(report) == parts
    if model.training:
        (y, gradients), (z, expected) = step(report.model, x), step(model, x)
        same_gradients(gradients, expected)
    else:
        with torch.no_grad():
            y, z = report.model(x.clone()), model(x.clone())
    assert_same([y], [z], 1e-12)
    return report


ACTIVATIONS = {
    "relu": [
        functional.relu,
        partial(functional.relu, inplace=True),
        torch.relu,
        torch.relu_,
        nn.ReLU(),
        lambda x: x.relu(),
    ],
    "relu6": [functional.relu6, nn.ReLU6(inplace=True)],
    "leaky_relu": [
        partial(functional.leaky_relu, negative_slope=0.3),
        lambda x: functional.leaky_relu(x, 0.4),
        nn.LeakyReLU(0.2),
    ],
    "silu": [functional.silu, nn.SiLU(inplace=True)],
    "gelu": [functional.gelu, nn.GELU()],
    "gelu_tanh": [partial(functional.gelu, approximate="tanh"), nn.GELU(approximate="tanh")],
    "sigmoid": [functional.sigmoid, torch.sigmoid, nn.Sigmoid(), lambda x: x.sigmoid()],
    "hardswish": [functional.hardswish, nn.Hardswish(inplace=True)],
}
FORMS = [(name, form) for name, forms in ACTIVATIONS.items() for form in forms]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_form_of_every_activation(name, form):
    model = net(lambda m, x: m.act(m.norm(m.conv(x))))
    model.act = form
    fused_equals(model, sample(), conv=("batch norm norm", name))


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "gelu_tanh"])
def test_gradients_of_an_activation_in_training(name):
    model = net(lambda m, x: m.act(m.conv(x)), training=True)
    model.act, model.norm, model.other = ACTIVATIONS[name][-1], None, None
    fused_equals(model, sample(), conv=(name,))


SUMS = {
    "+": (lambda m, x: m.relu(m.conv(x) + x), ("residual", "relu")),
    "+ on the right": (lambda m, x: m.relu(x + m.conv(x)), ("residual", "relu")),
    "torch.add": (lambda m, x: torch.add(x, m.conv(x), alpha=1).sigmoid(), ("residual", "sigmoid")),
    "add": (lambda m, x: functional.silu(m.conv(x).add(other=x)), ("residual", "silu")),
    "add_": (lambda m, x: functional.silu(m.conv(x).add_(x)), ("residual", "silu")),
    "iadd": (lambda m, x: operator.iadd(m.conv(x), x), ("residual",)),
    "after": (lambda m, x: x + m.relu(m.conv(x)), ("relu", "residual")),
    "once": (lambda m, x: m.relu(x + m.relu(m.conv(x))), ("relu", "residual")),
    "two": (lambda m, x: m.conv(x) + x + x, ("residual",)),
    "Identity": (lambda m, x: m.relu(m.nothing(m.conv(m.nothing(x)))) + x, ("relu", "residual")),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("forward", "parts"), SUMS.values(), ids=SUMS)
def test_sums(forward, parts, training):
    model = net(forward, training=training)
    model.nothing, model.norm, model.other = nn.Identity(), None, None
    fused_equals(model, sample(), conv=parts)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("package", [nn, ours], ids=["torch", "ours"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Conv", {"padding": "same", "padding_mode": "circular", "dilation": 2}),
        ("Conv", {"stride": 2, "padding": 1, "groups": 2}),
        ("ConvTranspose", {"stride": 2, "padding": 1, "output_padding": 1, "bias": False}),
    ],
    ids=str,
)
def test_every_class(kind, options, package, rank):
    conv = getattr(package, f"{kind}{rank}d")(4, 6, 3, **options)
    x = sample(2, 4, *(6, 4, 6)[:rank])
    residual = torch.randn_like(conv.double()(x))
    model = net(lambda m, x: functional.hardswish(m.norm(m.conv(x)) + residual), conv)
    model.norm = lively(getattr(nn, f"BatchNorm{rank}d")(6).double())
    report = fused_equals(model, x, conv=("batch norm norm", "residual", "hardswish"))
    assert convolutions(report.model, x) in (["triton_conv::conv_fused"], ["triton_conv::conv_transpose_fused"])
    assert isinstance(report.model.conv, getattr(ours, type(conv).__name__))
    assert type(model.conv) is type(conv)


def test_output_size_of_a_transposed_convolution():
    def forward(m, x):
        return m.relu(m.conv(x, output_size=(10, 11)) + functional.pad(x, (0, 5, 0, 5)))

    model = net(forward, nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1))
    report = fused_equals(model, sample(), conv=("residual", "relu"))
    assert convolutions(report.model, sample()) == ["triton_conv::conv_transpose_fused"]


# ---------------------------------------------------------------------------------------------------------------------
# What is left, and why


def branch(m, x):
    return m.relu(m.conv(x)) if x.sum() > 0 else x


REASONS = {
    "two readers": (lambda m, x: m.relu(y := m.conv(x)) * y, "2 others read its output: ReLU relu, mul"),
    "no reader but the end": (lambda m, x: m.conv(x), "the output follows"),
    "dropout between": (lambda m, x: m.relu(m.dropout(m.conv(x))), "Dropout dropout follows"),
    "another activation": (lambda m, x: m.conv(x).tanh(), "tanh follows"),
    "called twice": (lambda m, x: m.relu(m.conv(m.relu(m.conv(x)))), "it is called 2 times"),
    "a number": (lambda m, x: m.conv(x) + 1.5, "1.5 is added, not a tensor"),
    "alpha": (lambda m, x: torch.add(m.conv(x), x, alpha=2), "the sum has alpha or out"),
    "itself": (lambda m, x: (y := m.conv(x)) + y, "it is added to itself"),
    "in place to another": (lambda m, x: (2 * x).add_(m.conv(x)), "it is added in place to another tensor"),
    "input overwritten": (
        lambda m, x: (y := 2 * x, m.conv(y), m.relu(y))[1] + y,
        "its input may be overwritten before its output is added",
    ),
    "input overwritten by a view of it": (
        lambda m, x: (y := 2 * x, m.conv(y), y.flatten().mul_(3))[1] + y,
        "its input may be overwritten before its output is added",
    ),
    "called with more": (lambda m, x: m.relu(m.conv(x, x)), "it is given a residual"),
    "does not trace": (branch, "'the model' cannot be traced: torch.fx: TraceError: symbolically traced variables"),
    "is not called": (lambda m, x: x * 2, "nothing calls it"),
}


@pytest.mark.parametrize(("forward", "reason"), REASONS.values(), ids=REASONS)
def test_left_with_the_reason(forward, reason):
    model = net(forward)
    report = triton_conv.fuse(model)
    assert rows(report) == {}
    assert reasons(report)["conv"].startswith(reason)
    assert f"conv: nothing, as {reason}" in str(report)
    assert type(report.model) is Net


def test_what_is_written_to_elsewhere_does_not_matter():
    def forward(m, x):
        y = m.conv(x)
        return m.relu(m.other(x)) + y  # writes to what other made

    report = fused_equals(net(forward), sample(), other=("relu", "residual"))
    assert reasons(report) == {"conv": "it is the residual of other"}
    fused_equals(
        net(lambda m, x: m.relu(m.norm(m.other(x))) + m.conv(x)),
        sample(),
        conv=("residual",),
        other=("batch norm norm", "relu"),
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_outputs_that_are_written_to_in_training(name):
    model = net(lambda m, x: m.act(m.conv(x)).mul_(2), training=True)
    model.act, model.norm, model.other = ACTIVATIONS[name][0], None, None
    if name in ("relu", "sigmoid"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            step(model, sample())  # without us
    elif name in ("relu6", "leaky_relu"):
        report = fused_equals(model, sample())
        assert reasons(report) == {"conv": f"{name}'s output is written to, and backward needs it"}
    else:
        fused_equals(model, sample(), conv=(name,))


def test_functions_are_in_the_report():
    report = triton_conv.fuse(net(lambda m, x: functional.conv2d(x, m.conv.weight).relu()))
    assert ("conv2d", (), "it is a call of a function, not a module") in report.convolutions


def test_hooks_subclasses_and_dtypes():
    def left(change, forward=lambda m, x: m.relu(m.conv(x))):
        model = net(forward)
        change(model)
        return reasons(triton_conv.fuse(model)).get("conv")

    class Own(nn.Conv2d):
        pass

    assert left(lambda m: None) is None
    assert left(lambda m: m.conv.register_forward_hook(print)) == "it has hooks"
    assert left(lambda m: m.relu.register_forward_hook(print)) == "ReLU relu follows"
    assert "is a subclass of torch.nn.Conv2d" in left(lambda m: setattr(m, "conv", Own(4, 4, 1)))
    complex_valued = nn.Conv2d(4, 4, 1, dtype=torch.complex64)
    assert left(lambda m: setattr(m, "conv", complex_valued)) == "torch.complex64 has no activations"
    active = ours.Conv2d(4, 4, 1, activation="silu")
    assert left(lambda m: setattr(m, "conv", active)) == "it has an activation or a scale of its own"
    assert left(lambda m: setattr(m, "conv", nn.LazyConv2d(4, 1))) == "its input channels are not known yet"


def test_a_second_time_finds_nothing_new():
    model = net(lambda m, x: m.relu(m.norm(m.conv(x)) + m.other(x)))
    once = triton_conv.fuse(model)
    twice = triton_conv.fuse(once.model)
    assert len(twice) == 0
    x = sample()
    assert torch.equal(twice.model(x), once.model(x))


# ---------------------------------------------------------------------------------------------------------------------
# Training and eval mode, batch norms


def test_batch_norms_stay_in_training():
    model = net(lambda m, x: m.relu(m.norm(m.conv(m.relu(m.other(x))))), training=True)
    report = fused_equals(model, sample(), other=("relu",))
    assert reasons(report) == {"conv": "batch norm norm is in training mode"}
    assert report.model.norm.training
    assert report.model.norm.running_mean is model.norm.running_mean


def test_a_batch_norm_in_eval_mode_behind_a_convolution_that_is_trained():
    model = net(lambda m, x: m.relu(m.norm(m.conv(x))), training=True)
    model.norm.eval()
    report = triton_conv.fuse(model)
    assert reasons(report)["conv"] == "batch norm norm is in training mode"
    assert report.model.conv.weight is model.conv.weight


def test_a_batch_norm_that_cannot_be_folded():
    model = net(lambda m, x: m.relu(m.norm(m.conv(x))))
    model.other.weight = model.conv.weight
    report = triton_conv.fuse(model)
    assert reasons(report)["conv"] == "batch norm norm stays: 'conv': its weight is used elsewhere too"


def test_the_optimizer_of_the_model_trains_the_fused_one():
    model = net(lambda m, x: m.relu(m.conv(x) + x) + m.other(x), training=True)
    twin = copy.deepcopy(model)
    optimizer, plain = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin))
    fused, x = triton_conv.fuse(model).model, sample()
    for network, steps in ((fused, optimizer), (twin, plain)):
        for _ in range(3):
            steps.zero_grad()
            network(x).square().mean().backward()
            steps.step()
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert not torch.equal(model.conv.weight, net(model.does).conv.weight)


def test_the_model_stays_what_it_was():
    model = net(lambda m, x: m.relu(m.norm(m.conv(x))) + m.other(x))
    state, text = copy.deepcopy(model.state_dict()), repr(model)
    fused = triton_conv.fuse(model).model
    fused.train()
    assert repr(model) == text
    assert not any(m.training for m in model.modules())
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert fused.other.weight is model.other.weight
    assert fused.conv.weight is not model.conv.weight


def test_parametrized_weights_stay_parametrized():
    model = net(lambda m, x: m.relu(m.conv(x)), training=True)
    model.norm, model.other, model.conv = None, None, parametrizations.weight_norm(model.conv)
    fused_equals(model, sample(), conv=("relu",))


# ---------------------------------------------------------------------------------------------------------------------
# Residuals whose shape and dtype only the call knows


def residual_of(shape, dtype=torch.float64):
    t = torch.randn(shape, dtype=dtype)
    return lambda m, x: functional.silu(m.conv(x) + t), t


@pytest.mark.parametrize(
    ("shape", "dtype", "inside"),
    [
        ((2, 4, 5, 6), torch.float64, True),
        ((4, 1, 1), torch.float64, False),
        ((1, 4, 5, 6), torch.float64, False),
        ((2, 1, 5, 6), torch.float64, False),
        ((), torch.float64, False),
        ((2, 4, 5, 6), torch.float32, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("add", [operator.add, torch.Tensor.add_], ids=["+", "add_"])
def test_residuals_that_fit_and_others(shape, dtype, inside, add):
    t = torch.randn(shape, dtype=dtype)
    model = net(lambda m, x: functional.silu(m.conv(x) + t if add is operator.add else m.conv(x).add_(t)))
    x = sample()
    report = triton_conv.fuse(model)
    y, z = report.model(x), model(x)
    assert y.dtype is z.dtype
    torch.testing.assert_close(y, z)
    name = "conv_fused" if inside else "conv"
    assert convolutions(report.model, x) == [f"triton_conv::{name}"]


def test_a_residual_larger_than_the_output():
    model = net(lambda m, x: m.relu(m.conv(x.mean((2, 3), keepdim=True)) + x))
    fused_equals(model, sample(), conv=("residual", "relu"))


def test_residuals_are_promoted_as_before():
    model = net(lambda m, x: x.double() + m.relu(m.conv(x))).float()
    x = sample(dtype=torch.float32)
    y = triton_conv.fuse(model).model(x)
    assert y.dtype is torch.float64
    torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize("wide", [True, False])
def test_autocast(wide):
    model = net(lambda m, x: (x if wide else x.bfloat16()) + m.relu(m.conv(x))).float()
    fused, x = triton_conv.fuse(model).model, sample(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = fused(x), model(x)
        assert convolutions(fused, x) == ["triton_conv::conv" if wide else "triton_conv::conv_fused"]
    assert y.dtype is z.dtype
    torch.testing.assert_close(y.float(), z.float(), rtol=0.02, atol=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Modules within modules, and how they are called


def test_parts_of_what_does_not_trace():
    model = net(None)
    model.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).double()
    model.does = lambda m, x: m.body(x) if x.sum() > 0 else m.body(-x)
    report = fused_equals(model, sample(), **{"body.0": ("relu",)})
    assert [name for name, _ in report.untraced] == [""]
    assert "the model does not trace: torch.fx: TraceError" in str(report)
    assert type(report.model) is Net


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x, scale=None, *, twice=False):
        y = self.relu(self.conv(x))
        y = y if scale is None else y * scale
        return 2 * y if twice else y


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = Inner(), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = torch.sigmoid(self.last(self.inner(x)))
        return self.inner(y, 3.0, twice=True) if x.sum() > 0 else y


def test_arguments_with_defaults_keep_them():
    model, x = Inner().double().eval(), sample()
    fused = triton_conv.fuse(model).model
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused(x, None, twice=False), model(x))
    for wrong in ({"twice": True}, {"scale": x}, {"scale": 2}):
        with pytest.raises(ValueError, match=f"argument '{next(iter(wrong))}' was .* when the graph was made"):
            fused(x, **wrong)


def test_hooks_of_modules_that_are_taken_apart_still_run():
    model, heard = nn.Sequential(Inner(), Inner()).double().eval(), []
    model[0].register_forward_hook(lambda m, args, kwargs, y: heard.append("inner") or 2 * y, with_kwargs=True)
    model.register_forward_pre_hook(lambda m, args: heard.append("outer"))
    x = sample()
    expected = model(x)
    assert heard == ["outer", "inner"]
    report = triton_conv.fuse(model)
    assert rows(report) == {"0.conv": ("relu",), "1.conv": ("relu",)}
    assert heard == ["outer", "inner"]
    torch.testing.assert_close(report.model(x), expected)
    assert heard == ["outer", "inner"] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["torch.compile", "torch.jit.trace"])
def test_what_was_compiled_stays_what_it_is(how):
    def compiled(module):
        return torch.compile(module, backend="eager") if how == "torch.compile" else torch.jit.trace(module, sample())

    inside = lively(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).double())
    model, x = nn.Sequential(compiled(inside), lively(copy.deepcopy(inside))).eval(), sample()
    report = fused_equals(model, x, **{"1.0": ("batch norm 1.1", "relu")})
    if how == "torch.compile":
        assert reasons(report) == {"0._orig_mod.0": "'0' cannot be traced: OptimizedModule has been compiled"}
    expected = model(x)
    assert triton_conv.fold_batchnorm(model).folded == (("1.0", "1.1"),)
    torch.testing.assert_close(model(x), expected)


def test_grad_modes_inside_are_kept():
    class Frozen(Inner):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    model = nn.Sequential(Frozen(), Inner()).double()
    with torch.no_grad():  # as most people fuse
        report = triton_conv.fuse(model)
    assert rows(report) == {"1.conv": ("relu",)}
    x = sample()
    assert not report.model.get_submodule("0")(x).requires_grad
    torch.testing.assert_close(report.model(x), model(x))


class Checkpointed(Inner):
    def __init__(self):
        super().__init__()
        self.first = Inner()

    def forward(self, x):
        return super().forward(checkpoint(self.first, x, use_reentrant=False))


def test_checkpoints_are_kept():
    model = nn.Sequential(Checkpointed(), Inner()).double()
    report = fused_equals(model, sample(), **{"0.first.conv": ("relu",), "1.conv": ("relu",)})
    ((name, why),) = report.untraced
    assert name == "0"
    assert "checkpointed" in why


def test_shapes_of_parameters_may_be_asked_for():
    def forward(m, x):
        x = x if m.conv.weight.shape[0] == 4 else -x
        return m.relu(m.norm(m.conv(x))) * m.factor

    model = net(forward)
    model.register_buffer("factor", torch.tensor(3.0), persistent=False)
    report = fused_equals(model, sample(), conv=("batch norm norm", "relu"))
    assert "factor" not in report.model.state_dict()
    assert "conv_weight" not in report.model.code


def test_names_modes_and_state_dict_are_kept():
    model = nn.Sequential(Inner(), nn.Dropout(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU())).double()
    model[2].eval()
    fused = triton_conv.fuse(model).model
    assert fused.state_dict().keys() == model.state_dict().keys()
    for name, module in fused.named_modules():
        assert module.training == model.get_submodule(name).training


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(clone):
    model = nn.Sequential(Inner(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GELU()).double().eval()
    fused, x = triton_conv.fuse(model).model, sample()
    twin = clone(fused)
    assert torch.equal(twin(x), fused(x))
    assert convolutions(twin, x) == ["triton_conv::conv_fused"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(training):
    model = net(lambda m, x: m.relu(m.conv(x) + x) + m.other(x), training=training)
    fused, x = triton_conv.fuse(model).model, sample()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same([compiled(x)], [fused(x)], 1e-12)
    if training:
        same_gradients(step(compiled._orig_mod, x)[1], step(fused, x)[1])


def test_exports():
    model = net(lambda m, x: m.relu(m.norm(m.conv(x)) + x))
    fused, x = triton_conv.fuse(model).model, sample()
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), model(x))


def test_torch_fx_traces_converted_and_fused_models():
    model, x = net(lambda m, x: m.relu(m.conv(x) + m.other(x))), sample()
    expected = model(x)
    triton_conv.convert(model)
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), expected)
    report = triton_conv.fuse(model)
    assert rows(report) == {"other": ("residual", "relu")}
    torch.testing.assert_close(torch.fx.symbolic_trace(report.model)(x), expected)


def test_only_a_module_can_be_fused():
    with pytest.raises(TypeError, match=r"must be torch\.nn\.Module, not int"):
        triton_conv.fuse(3)
    assert triton_conv.fuse(nn.Conv2d(3, 4, 1)).convolutions == (("", (), "nothing calls it"),)


# ---------------------------------------------------------------------------------------------------------------------
# Networks, numbers


@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_of_networks(name):
    make, shape, parts = FUSED[name]
    torch.manual_seed(0)
    fused_equals(lively(make().double()), sample(*shape), **parts)


@pytest.mark.parametrize("name", [*MODELS, *FUSED])
@pytest.mark.parametrize("training", [True, False])
def test_networks(name, training):
    make, shape, *_ = (MODELS | FUSED)[name]
    torch.manual_seed(0)
    model, x = lively(make().double()).train(training), sample(*shape)
    twin = copy.deepcopy(model)  # batch norms in training change their statistics
    report = triton_conv.fuse(model)
    assert all(c.parts or c.left for c in report.convolutions)
    if training:
        (y, gradients), (z, expected) = step(report.model, x), step(twin, x)
        same_gradients(gradients, expected)
        torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
    else:
        with torch.no_grad():
            y, z = report.model(x), twin(x)
    assert_same([y], [z], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "hardswish"])
def test_values_differ_by_no_more_than_said(name, dtype):
    model = net(lambda m, x: m.act(m.norm(m.conv(x)) + x)).to(dtype)
    model.act = ACTIVATIONS[name][0]
    x = sample(4, 4, 9, 9, dtype=dtype)
    c, n = (copy.deepcopy(m).double() for m in (model.conv, model.norm))
    gain = (n.weight / torch.sqrt(n.running_var + n.eps)).abs().view(-1, 1, 1)
    everything = functional.conv2d(x.double().abs(), c.weight.abs(), c.bias.abs(), padding=1) * gain + x.double().abs()
    everything = everything + gain * n.running_mean.abs().view(-1, 1, 1) + n.bias.abs().view(-1, 1, 1)
    bound = 1.5 * (4 * torch.finfo(dtype).eps + 36**0.5 * 2.0**-23) * everything
    report = triton_conv.fuse(model)
    assert rows(report) == {"conv": ("batch norm norm", "residual", name)}
    difference = (report.model(x).double() - model(x).double()).abs()
    assert (difference <= bound).all()
    assert difference.max() > 0  # they do differ


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 3, padding=1)], ids=type)
def test_kernels(conv, kernels, poisoned):
    model = net(lambda m, x: m.norm(m.conv(x)).sigmoid() + x, conv)
    x = sample(1, 4, 5, 6)
    expected = model(x).detach()
    fused = triton_conv.fuse(model).model.float().to(kernels)
    assert_close(fused(x.float().to(kernels)).detach().cpu(), expected, 36)


def test_gradients_of_kernels(kernels, poisoned):
    model = net(lambda m, x: functional.silu(m.conv(x) + x), training=True)
    model.norm, model.other = None, None
    (y, gradients), x = step(model, x := sample(1, 4, 4, 5)), x.float().to(kernels)
    z, found = step(triton_conv.fuse(model.float()).model.to(kernels), x)
    assert_close(z.cpu(), y, 36)
    for name, expected in gradients.items():
        assert_close(found[name].cpu(), expected, 36)


def test_documented_examples():
    result = doctest.testmod(fusion, extraglobs={"torch": torch, "triton_conv": triton_conv})
    assert (result.attempted > 5, result.failed) == (True, 0)
