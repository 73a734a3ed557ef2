"""Random wrong calls raise what PyTorch raises for them, name an argument, and lose nothing."""

import invalid_operators
import pytest
import torch
from invalid_calls import FAMILIES, fault

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # prototypes of nested tensors, no weights


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
