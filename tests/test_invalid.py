"""Random wrong calls raise what PyTorch raises for them, name an argument, and lose nothing."""

import pytest
from invalid_calls import FAMILIES, fault

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # prototypes of nested tensors, no weights


@pytest.mark.parametrize("family", FAMILIES)
def test_random_wrong_calls(family):
    for seed in range(30):
        assert fault(family, seed) == ""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_random_wrong_calls(family):
    for seed in range(30, 600):
        assert fault(family, seed) == ""
