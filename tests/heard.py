"""What a call did, for tests to look at: the operators it ran, the exception it raised."""

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Names of the operators run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def operators(function, *args):
    """Names of the operators that `function` runs."""
    with Operators() as ran:
        function(*args)
    return ran.names


def convolutions(function, *args):
    """Those of convolutions."""
    return [name for name in operators(function, *args) if "conv" in name]


def raised(function, *args, **kwargs):
    """The exception that `function` raises, if it does."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None
