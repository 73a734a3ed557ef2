"""Products of two lists of parameters, of which every other one is fast."""

import pytest


def half_of(first, second):
    """Pairs for `parametrize`: each value meets half of the other list, and the rest where slow tests run."""
    return [
        pytest.param(a, b, id=f"{_id(a)}-{_id(b)}", marks=pytest.mark.slow if (i + j) % 2 else ())
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


def _id(value):
    return str(getattr(value, "id", value)).replace(" ", "-")


def first_of(values, count):
    """Values for `parametrize`: those after the first few are slow."""
    return [v if i < count else pytest.param(v, marks=pytest.mark.slow) for i, v in enumerate(values)]
