"""Random wrong calls raise what PyTorch raises for them, name an argument, and lose nothing."""

import invalid_models
import invalid_operators
import invalid_symbols
import pytest
import torch
from invalid_calls import FAMILIES, fault
from torch.nn import functional

import triton_conv

pytestmark = [  # prototypes of nested tensors, no weights; weight_norm, torch.jit.script
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning", "DeprecationWarning")
]


@pytest.mark.parametrize("family", FAMILIES)
def test_random_wrong_calls(family):
    for seed in range(25):
        assert fault(family, seed) == ""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_random_wrong_calls(family):
    for seed in range(25, 400):
        assert fault(family, seed) == ""


def check_operators(seeds):
    for op, arguments in invalid_operators.right_calls().values():
        assert not isinstance(invalid_operators.outcome(op, arguments), Exception)
        for seed in seeds:
            assert invalid_operators.fault(op, arguments, seed) == ""


def test_random_wrong_calls_of_operators():
    check_operators(range(12))


@pytest.mark.slow
def test_many_random_wrong_calls_of_operators():
    check_operators(range(12, 300))


def test_every_operator_is_called():
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    ours = {name.removeprefix("triton_conv::").split(".")[0] for name in registered if name.startswith("triton_conv::")}
    assert ours == invalid_operators.right_calls().keys()


OF_SYMBOLS = [family for family in FAMILIES if not family.endswith(" modules") and family != "override"]


@pytest.mark.parametrize("family", OF_SYMBOLS)
def test_random_wrong_calls_of_symbols(family):
    for seed in range(6):
        assert invalid_symbols.fault(family, seed) == ""


@pytest.mark.slow
@pytest.mark.parametrize("family", OF_SYMBOLS)
def test_many_random_wrong_calls_of_symbols(family):
    for seed in range(6, 30):
        assert invalid_symbols.fault(family, seed) == ""


@pytest.mark.parametrize("argument", ["stride", "groups"])
def test_a_wrong_size_while_a_graph_is_compiled(argument):
    """What torch.compile makes of PyTorch's exception it makes of ours, which is in its words."""

    def raised(function):
        def f(x, w, n):
            return function(x, w, **{argument: n.shape[0] - 3})

        compiled = torch.compile(f, backend="eager", fullgraph=True, dynamic=True)
        with pytest.raises(RuntimeError, match=f"non-positive {argument}|{argument} to be greater") as error:
            compiled(torch.ones(1, 2, 4, 4), torch.ones(2, 2, 1, 1), torch.ones(3))
        return error.type

    assert raised(triton_conv.conv2d) is raised(functional.conv2d)


@pytest.mark.parametrize("function", invalid_models.FUNCTIONS)
def test_broken_models_are_refused_or_left_alone(function):
    for name in invalid_models.CHANGES:
        assert invalid_models.fault(function, name) == ""
    for model in invalid_models.NO_MODELS:
        with pytest.raises(
            TypeError, match=rf"{function.__name__}\(\): argument 'model' must be torch.nn.Module, not "
        ):
            function(model)


def test_convert_leaves_negative_padding_alone():
    """torch.nn.functional.pad crops; a convolution of ours would raise."""
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1, padding=-1, padding_mode="circular"))
    report = triton_conv.convert(model)
    assert report.skipped == (("0", "its padding is negative, padding=(-1, -1)"),)
    assert model(torch.ones(1, 2, 4, 4)).shape == (1, 2, 2, 2)


def test_fusing_models_with_weight_norm_that_have_run():
    """They hold tensors that copy.deepcopy refuses."""
    model = torch.nn.Sequential(torch.nn.utils.weight_norm(torch.nn.Conv1d(2, 2, 3)), torch.nn.Conv1d(2, 2, 1))
    model.append(torch.nn.ReLU())
    x = torch.randn(1, 2, 6)
    want = model(x)
    report = triton_conv.fuse(model)
    assert [c.parts for c in report.convolutions] == [(), ("relu",)]
    torch.testing.assert_close(report.model(x), want)


def test_a_batch_norm_that_does_not_fit_keeps_those_before_it():
    """What cannot be folded is a reason in the report, with the rest folded."""
    layers = torch.nn.Conv1d(2, 2, 3), torch.nn.BatchNorm1d(2), torch.nn.Conv1d(2, 2, 3), torch.nn.BatchNorm1d(2)
    model = torch.nn.Sequential(*layers).eval()
    layers[3].running_var = torch.ones(7)
    report = triton_conv.fold_batchnorm(model)
    assert report.folded == (("0", "1"),)
    assert report.skipped == (("3", "its running_var is not one of 2 numbers"),)
