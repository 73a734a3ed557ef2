"""The modules stand in for torch's, and `convert` puts them there without disturbing what surrounds them."""

import copy
import inspect
import pickle

import pytest
import torch
from heard import operators
from torch.nn.utils import parametrizations, parametrize, prune

import triton_conv
from triton_conv import execute, nn
from triton_conv.config import PRECISIONS

FORWARD = ["Conv1d", "Conv2d", "Conv3d"]
TRANSPOSED = ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
NAMES = FORWARD + TRANSPOSED

SHARED = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"groups": 2},
    {"dilation": 2, "padding": 2},
    {"dtype": torch.float64},
    {"device": "meta"},
]
FORWARD_ONLY = [
    {"padding": "same"},
    {"padding": "same", "dilation": 2, "padding_mode": "circular"},
    {"padding": "valid", "stride": 2},
    {"padding": 1, "padding_mode": "zeros"},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "replicate", "stride": 2},
    {"padding": 1, "padding_mode": "circular", "groups": 2},
]
TRANSPOSED_ONLY = [{"stride": 2, "output_padding": 1}, {"stride": 3, "padding": 1, "output_padding": 2, "groups": 2}]
CASES = [
    *((name, kwargs) for name in NAMES for kwargs in SHARED),
    *((name, kwargs) for name in FORWARD for kwargs in FORWARD_ONLY),
    *((name, kwargs) for name in TRANSPOSED for kwargs in TRANSPOSED_ONLY),
]
sweep = pytest.mark.parametrize(("name", "kwargs"), CASES, ids=[f"{name}-{kwargs}" for name, kwargs in CASES])
every_class = pytest.mark.parametrize("name", NAMES)


def rank_of(name):
    return int(name[-2])


def sample(name, channels=4, dtype=torch.float64, batch=(2,)):
    extents = (6, 5, 4)[: rank_of(name)]
    return torch.randn(*batch, channels, *extents, dtype=dtype)


def pair_of(name, *args, **kwargs):
    """torch's module and ours, with the same parameters, in float64."""
    theirs = getattr(torch.nn, name)(*args, **kwargs).double()
    ours = getattr(nn, name)(*args, **kwargs).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def output_and_gradients(module, x, **kwargs):
    x = x.clone().requires_grad_()
    y = module(x, **kwargs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])]


def assert_same_numbers(theirs, ours, x, **kwargs):
    expected, actual = output_and_gradients(theirs, x, **kwargs), output_and_gradients(ours, x, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# The classes.


@sweep
def test_constructor_makes_the_module_torch_makes(name, kwargs):
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(4, 6, 3, **kwargs)
    torch.manual_seed(0)
    ours = getattr(nn, name)(4, 6, 3, **kwargs)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    assert type(ours) is not type(theirs)
    private = ("_parameters", "_buffers", "_modules")
    assert {k: v for k, v in vars(ours).items() if k not in private} == {
        k: v for k, v in vars(theirs).items() if k not in private
    }
    expected, actual = theirs.state_dict(), ours.state_dict()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert (actual[key].dtype, actual[key].device, actual[key].shape) == (value.dtype, value.device, value.shape)
        if value.device.type != "meta":
            assert torch.equal(actual[key], value), "initialisation draws the same numbers"


@every_class
def test_constructor_takes_torchs_arguments_in_torchs_order(name):
    theirs = inspect.signature(getattr(torch.nn, name)).parameters
    ours = inspect.signature(getattr(nn, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [p.default for p in theirs.values()] == [ours[key].default for key in theirs]
    assert {ours[key].kind for key in list(ours)[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


@every_class
def test_positional_arguments_mean_what_they_mean_in_torch(name):
    arguments = (
        (4, 6, 3, 2, 1, 1, 2, False, 2, "zeros") if name in TRANSPOSED else (4, 6, 3, 2, 1, 2, 2, False, "zeros")
    )
    assert repr(getattr(nn, name)(*arguments)) == repr(getattr(torch.nn, name)(*arguments))


@sweep
def test_outputs_and_gradients_equal_torchs(name, kwargs):
    kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "dtype")}
    theirs, ours = pair_of(name, 4, 6, 3, **kwargs)
    assert_same_numbers(theirs, ours, sample(name))


@every_class
def test_unbatched_input(name):
    theirs, ours = pair_of(name, 4, 6, 3, padding=1)
    assert_same_numbers(theirs, ours, sample(name, batch=()))


@every_class
def test_forward_runs_our_operator(name):
    _, ours = pair_of(name, 4, 6, 3)
    op = "conv_transpose" if name in TRANSPOSED else "conv"
    assert operators(ours, sample(name)) == [f"triton_conv::{op}"]


def test_border_is_not_made_by_a_padded_copy():
    module = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular").double()
    assert operators(module, sample("Conv2d")) == ["triton_conv::conv"]


@every_class
def test_state_dict_goes_both_ways(name):
    theirs, ours = getattr(torch.nn, name)(4, 6, 3), getattr(nn, name)(4, 6, 3)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(dict(theirs.state_dict()), dict(ours.state_dict()), rtol=0, atol=0)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


@every_class
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_class_arguments_and_numbers(name, clone):
    module = getattr(nn, name)(4, 6, 3, padding=[(2, 1)] * rank_of(name), precision="ieee").double()
    twin, x = clone(module), sample(name)
    assert type(twin) is type(module)
    assert repr(twin) == repr(module)
    assert twin.precision == "ieee"
    assert twin.weight is not module.weight
    assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.parametrize("batch", [(2,), ()], ids=["batched", "unbatched"])
def test_output_size_picks_among_the_possible_extents(name, batch):
    rank = rank_of(name)
    theirs, ours = pair_of(name, 4, 6, 3, stride=3, padding=1, dilation=2)
    x = sample(name, batch=batch)
    smallest = theirs(x).shape[-rank:]
    for more in (0, 1, 2):
        size = [extent + more for extent in smallest]
        assert_same_numbers(theirs, ours, x, output_size=size)
        assert ours(x, output_size=[*batch, 6, *size]).shape == (*batch, 6, *size)
        assert ours(x, size).shape[-rank:] == torch.Size(size)
    for wrong in ([extent + 3 for extent in smallest], [extent - 1 for extent in smallest], [*smallest, 1]):
        for module in (theirs, ours):
            with pytest.raises(ValueError, match="output"):
                module(x, output_size=wrong)


@pytest.mark.parametrize(
    ("padding", "extra"), [(((1, 2), (0, 1)), 0), (((1, 2), (0, 1)), 1), ((1, (2, 0)), 1), (((0, 1),), 1)]
)
def test_output_size_with_padding_pairs(padding, extra):
    module = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=padding).double()
    x = sample("ConvTranspose2d")
    uncut = torch.nn.functional.conv_transpose2d(x, module.weight, module.bias, 2, output_padding=extra)
    (top, bottom), (left, right) = [p if isinstance(p, tuple) else (p, p) for p in module.padding]
    expected = uncut[..., top : uncut.shape[2] - bottom, left : uncut.shape[3] - right]
    actual = module(x, output_size=expected.shape[2:])
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="valid sizes range"):
        module(x, output_size=[e + 2 - extra for e in expected.shape[2:]])


WRONG = [
    ("Conv2d", {"padding_mode": "mirror"}),
    ("Conv2d", {"padding_mode": None}),
    ("Conv2d", {"padding": "full"}),
    ("Conv2d", {"padding": "same", "stride": 2}),
    ("Conv2d", {"groups": 3}),
    ("Conv2d", {"groups": 0}),
    ("Conv2d", {"groups": -1}),
    ("Conv1d", {"padding_mode": "constant"}),
    ("Conv3d", {"kernels": 3}),
    ("ConvTranspose1d", {"padding_mode": "reflect"}),
    ("ConvTranspose2d", {"padding_mode": "circular"}),
    ("ConvTranspose2d", {"padding_mode": ("zeros", "circular")}),
    ("ConvTranspose3d", {"groups": 3}),
]


@pytest.mark.parametrize(("name", "kwargs"), WRONG, ids=[f"{name}-{kwargs}" for name, kwargs in WRONG])
def test_constructor_refuses_what_torch_refuses(name, kwargs):
    with pytest.raises(Exception) as expected:  # noqa: PT011
        getattr(torch.nn, name)(4, 6, 3, **kwargs)
    with pytest.raises(type(expected.value)) as actual:
        getattr(nn, name)(4, 6, 3, **kwargs)
    if expected.type is ValueError:
        hint = f"; triton_conv.conv_transpose{rank_of(name)}d has them all" if "Only" in str(expected.value) else ""
        assert str(actual.value) == str(expected.value) + hint
    assert "_Conv" not in str(actual.value)


def test_padding_mode_set_to_an_unsupported_one_later_raises_in_forward():
    module = nn.ConvTranspose2d(4, 6, 3).double()
    module.padding_mode = "circular"
    with pytest.raises(ValueError, match=r'Only "zeros".* triton_conv\.conv_transpose2d has them all'):
        module(sample("ConvTranspose2d"))


@every_class
def test_errors_about_arguments_name_the_class(name):
    for arguments, kwargs in (((4,), {}), ((4, 6, 3), {"kernels": 3}), ((), {})):
        with pytest.raises(TypeError) as theirs:
            getattr(torch.nn, name)(*arguments, **kwargs)
        with pytest.raises(TypeError) as ours:
            getattr(nn, name)(*arguments, **kwargs)
        assert str(ours.value) == str(theirs.value)
        assert str(ours.value).startswith(f"{name}.__init__() ")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"padding": ((1, 2, 3), 1)},
        {"padding": ((1, 2), 1, 1)},
        {"padding_mode": ("zeros", "mirror")},
        {"padding_mode": ("zeros", "zeros", "zeros")},
        {"padding_mode": ()},
    ],
    ids=str,
)
def test_constructor_refuses_malformed_pairs_and_modes(kwargs):
    with pytest.raises(ValueError, match="padding"):
        nn.Conv2d(4, 6, 3, **kwargs)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_pairs_are_lower_and_upper_of_each_axis(mode):
    module = nn.Conv2d(4, 6, 3, padding=((2, 0), 1), padding_mode=mode).double()
    x = sample("Conv2d")
    padded = torch.nn.functional.pad(x, (1, 1, 2, 0), mode="constant" if mode == "zeros" else mode)
    torch.testing.assert_close(module(x), torch.nn.functional.conv2d(padded, module.weight, module.bias))


def test_one_padding_mode_per_axis():
    module = nn.Conv2d(4, 6, 3, padding="same", padding_mode=["replicate", "circular"]).double()
    x = sample("Conv2d")
    padded = torch.nn.functional.pad(x, (1, 1, 0, 0), mode="circular")
    padded = torch.nn.functional.pad(padded, (0, 0, 1, 1), mode="replicate")
    torch.testing.assert_close(module(x), torch.nn.functional.conv2d(padded, module.weight, module.bias))


def test_repr_shows_pairs_modes_and_precision():
    module = nn.Conv2d(4, 6, 3, padding=[[2, 0], 1], padding_mode=["replicate", "zeros"], precision="tf32x3")
    assert repr(module) == (
        "Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=((2, 0), 1), padding_mode=('replicate', 'zeros'), "
        "precision=tf32x3)"
    )


@every_class
def test_precision_reaches_the_operator(name):
    module = getattr(nn, name)(4, 6, 3, precision="tf32x3")
    with execute.recording() as calls:
        module(sample(name, dtype=torch.float32))
    assert [call.precision for call in calls] == ["tf32x3"]
    module.precision = "exact"
    with pytest.raises(ValueError, match="precision='exact'"):
        module(sample(name, dtype=torch.float32))


@every_class
@pytest.mark.parametrize("wrong", ["exact", "", "TF32", 1, True])
def test_constructor_refuses_an_unknown_precision_and_names_those_it_knows(name, wrong):
    with pytest.raises(ValueError, match="precision") as error:
        getattr(nn, name)(4, 6, 3, precision=wrong)
    assert all(repr(known) in str(error.value) for known in (*PRECISIONS, wrong))
    assert [getattr(nn, name)(4, 6, 3, precision=known).precision for known in PRECISIONS] == list(PRECISIONS)


def test_subclass_may_call_conv_forward_with_its_own_weight():
    class Masked(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight * 2, None)

    module = Masked(4, 6, 3).double()
    x = sample("Conv2d")
    torch.testing.assert_close(module(x), torch.nn.functional.conv2d(x, module.weight * 2))
    assert "triton_conv::conv" in operators(module, x)


def test_skip_init_leaves_parameters_alone():
    module = torch.nn.utils.skip_init(nn.Conv2d, 4, 6, 3, device="cpu")
    assert module.weight.shape == (6, 4, 3, 3)


# ---------------------------------------------------------------------------------------------------------------------
# convert.


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.norm = torch.nn.BatchNorm2d(4)
        self.again = self.first
        self.up = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ConvTranspose2d(4, 2, 2, stride=2))

    def forward(self, x):
        return self.up(self.again(self.norm(self.first(x))))


def nested():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"body": Block(), "head": torch.nn.Conv2d(2, 1, 1)}).double()


def run(model, x):
    return model["head"](model["body"](x))


def test_convert_keeps_objects_parameters_mode_and_numbers():
    model, x = nested(), sample("Conv2d")
    expected = run(model, x)
    before = dict(model.named_modules(remove_duplicate=False))
    parameters, text = dict(model.named_parameters()), repr(model)
    model["head"].eval()
    report = triton_conv.convert(model)
    assert report.converted == ("body.first", "body.up.1", "head")
    assert report.skipped == ()
    assert len(report) == 3
    assert str(report) == "3 of 3 convolutions converted"
    assert repr(model) == text
    assert {k: id(m) for k, m in model.named_modules(remove_duplicate=False)} == {k: id(m) for k, m in before.items()}
    assert all(p is parameters[k] for k, p in model.named_parameters())
    assert not model["head"].training
    assert model["body"].again is model["body"].first
    assert [type(model["body"].first), type(model["body"].up[1])] == [nn.Conv2d, nn.ConvTranspose2d]
    torch.testing.assert_close(run(model, x), expected)
    assert not [op for op in operators(run, model, x) if "aten::conv" in op or "aten::pad" in op]


@every_class
def test_convert_takes_the_model_itself(name):
    module = getattr(torch.nn, name)(4, 6, 3)
    report = triton_conv.convert(module)
    assert type(module) is getattr(nn, name)
    assert report.converted == ("",)
    assert str(report) == "1 of 1 convolution converted"


@sweep
def test_converted_module_computes_what_it_computed(name, kwargs):
    kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "dtype")}
    theirs = getattr(torch.nn, name)(4, 6, 3, **kwargs).double()
    ours = copy.deepcopy(theirs)
    assert len(triton_conv.convert(ours)) == 1
    assert_same_numbers(theirs, ours, sample(name))
    assert repr(ours) == repr(theirs)


def test_border_patched_on_the_module_is_kept():
    module, x = torch.nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular").double(), sample("Conv2d")
    module._reversed_padding_repeated_twice = [2, 0, 0, 1]
    expected = module(x)
    triton_conv.convert(module)
    torch.testing.assert_close(module(x), expected)


def test_converted_model_copies_pickles_and_loads_into_torch():
    model, x = nested(), sample("Conv2d")
    triton_conv.convert(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin["head"]) is nn.Conv2d
        assert torch.equal(run(twin.eval(), x), run(model.eval(), x))
    plain = nested().eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(plain, x), run(model, x))


def test_optimizer_made_before_convert_trains_the_converted_model():
    theirs = nested()
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (theirs, ours)]
    triton_conv.convert(ours)
    x = sample("Conv2d")
    for _ in range(3):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            run(model, x).square().mean().backward()
            optimizer.step()
    start = dict(nested().named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name))
        assert not torch.equal(p, start[name])


def test_hooks_stay():
    module, calls = torch.nn.Conv2d(4, 6, 3).double(), []
    module.register_forward_pre_hook(lambda m, args: calls.append("before"))
    module.register_forward_hook(lambda m, args, y: calls.append("after"))
    module.register_full_backward_hook(lambda m, gx, gy: calls.append("backward"))
    triton_conv.convert(module)
    module(sample("Conv2d").requires_grad_()).sum().backward()
    assert calls == ["before", "after", "backward"]


def weight_norm_with_hooks(module):
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(module)


REPARAMETRIZED = {
    "weight_norm hooks": weight_norm_with_hooks,
    "spectral_norm hooks": lambda m: torch.nn.utils.spectral_norm(m.eval()),
    "pruning": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.eval()),
    "orthogonal": parametrizations.orthogonal,
    "own": lambda m: parametrize.register_parametrization(m, "bias", torch.nn.Tanh(), unsafe=True),
}


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
@pytest.mark.parametrize("change", REPARAMETRIZED.values(), ids=REPARAMETRIZED)
def test_reparametrized_modules_convert(name, change):
    theirs, ours = (change(getattr(torch.nn, name)(4, 6, 3).double()) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    text, x = repr(ours), sample(name)
    assert triton_conv.convert(ours).skipped == ()
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == text
    assert_same_numbers(theirs, ours, x)
    assert any(op.startswith("triton_conv::") for op in operators(ours, x))


def test_weight_norm_hooks_survive_the_swap():
    module, x = weight_norm_with_hooks(torch.nn.Conv2d(4, 6, 3).double()), sample("Conv2d")
    triton_conv.convert(module)
    before = module(x)
    with torch.no_grad():
        module.weight_g *= 2
    bias = module.bias.view(-1, 1, 1)
    torch.testing.assert_close(module(x) - bias, 2 * (before - bias))


def test_parametrizations_of_a_converted_module_come_off_and_go_on():
    module, x = parametrizations.weight_norm(torch.nn.Conv2d(4, 6, 3).double()), sample("Conv2d")
    twin = copy.deepcopy(module)
    triton_conv.convert(module)
    assert not isinstance(twin, nn.Conv2d), "a copy that shared the parametrized class is left alone"
    expected = module(x)
    assert type(module).__name__ == "ParametrizedConv2d"
    assert torch.equal(copy.deepcopy(module)(x), expected)
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is nn.Conv2d
    torch.testing.assert_close(module(x), expected)
    parametrizations.weight_norm(module)
    torch.testing.assert_close(module(x), expected)


class Custom(torch.nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Derived(nn.Conv2d):
    pass


def test_report_names_what_was_skipped_and_why():
    patched = torch.nn.Conv2d(2, 2, 1)
    patched.forward = lambda x: x
    model = torch.nn.ModuleDict(
        {
            "plain": torch.nn.Conv1d(2, 2, 1),
            "custom": Custom(2, 2, 1),
            "parametrized": parametrizations.weight_norm(Custom(2, 2, 1)),
            "lazy": torch.nn.LazyConv2d(2, 1),
            "patched": patched,
            "ours": nn.Conv3d(2, 2, 1),
            "derived": Derived(2, 2, 1),
            "linear": torch.nn.Linear(2, 2),
        }
    )
    classes = {name: type(m) for name, m in model.items()}
    report = triton_conv.convert(model)
    assert report.converted == ("plain", "lazy")
    assert {name: type(m) for name, m in model.items()} == classes | {"plain": nn.Conv1d, "lazy": nn.LazyConv2d}
    where = Custom.__module__
    assert str(report) == (
        "2 of 7 convolutions converted\n"
        f"  skipped custom: {where}.Custom is a subclass of torch.nn.Conv2d; derive it from triton_conv.nn.Conv2d\n"
        f"  skipped parametrized: {where}.Custom is a subclass of torch.nn.Conv2d; "
        "derive it from triton_conv.nn.Conv2d\n"
        "  skipped patched: forward was replaced on the instance; convert before that\n"
        "  skipped ours: already converted\n"
        "  skipped derived: already converted"
    )
    with pytest.raises(AttributeError):
        report.converted = ()


def test_model_that_is_itself_skipped_is_named():
    report = triton_conv.convert(Custom(2, 2, 1))
    assert not report
    assert str(report).startswith("0 of 1 convolution converted\n  skipped the model itself: ")


def test_model_without_convolutions():
    assert str(triton_conv.convert(torch.nn.Linear(2, 2))) == "0 of 0 convolutions converted"


def test_convert_refuses_what_is_not_a_module():
    with pytest.raises(TypeError, match=r"'model' must be torch\.nn\.Module, not type"):
        triton_conv.convert(torch.nn.Conv2d)


def test_converted_model_compiles_whole():
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), torch.nn.ReLU()).double()
    model.append(torch.nn.ConvTranspose2d(4, 2, 2, stride=2).double())
    x = sample("Conv2d")
    expected = model(x)
    triton_conv.convert(model)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_converted_model_is_traced_for_every_image_size(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 4, 3, stride=2, dilation=2, groups=2),
        torch.nn.Conv2d(4, 6, 4, padding="same"),
        torch.nn.ConvTranspose2d(6, 2, 3, stride=2, padding=1, output_padding=1),
    ).double()
    triton_conv.convert(model)
    model.append(nn.Conv2d(2, 2, 3, padding=((2, 0), 1), padding_mode=("replicate", "zeros")).double())
    traced = torch.jit.trace(model, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    torch.jit.save(traced, tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    for shape in ((2, 3, 16, 16), (3, 3, 21, 24)):
        x = torch.randn(shape, dtype=torch.float64)
        for twin in (traced, loaded):
            assert torch.equal(twin(x), model(x))
            assert {op for op in operators(twin, x) if "conv" in op} == {
                "triton_conv::conv",
                "triton_conv::conv_dilated",
                "triton_conv::conv_transpose",
            }
    gradients = [torch.autograd.grad(m(x).square().sum(), m.parameters()) for m in (model, loaded)]
    torch.testing.assert_close(*gradients)
