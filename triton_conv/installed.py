"""Whether Triton is there: everything but the kernels works without it, in plain torch on a CPU.

PyTorch for Linux with CUDA brings Triton along; its wheels for macOS, Windows and CPUs do not.
"""

from __future__ import annotations

import os
import re
from functools import cache

OLDEST = (3, 6)
_INSTALL = "pip install 'triton>={}.{}'".format(*OLDEST)
_TRUE = {"1", "true", "on", "yes", "y"}  # what Triton takes for it


class TritonMissingError(ImportError):
    """Triton is not installed, cannot be imported, or is too old; the message says what to do."""


def require() -> None:
    """Raises TritonMissingError unless kernels can be defined."""
    reason, error = _trouble()
    if reason:
        raise TritonMissingError(reason, name="triton") from error


def available() -> bool:
    """Whether kernels can be defined; where not, and TRITON_INTERPRET asks for them, raises TritonMissingError."""
    if _trouble()[0] is None:
        return True
    if os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE:
        require()
    return False


@cache
def _trouble() -> tuple[str | None, Exception | None]:
    """What keeps Triton from being used, in words, and the exception; imports it."""
    try:
        import triton
    except ModuleNotFoundError as error:
        if error.name == "triton":
            where = "kernels run on Linux with an NVIDIA GPU, or there in Triton's interpreter"
            return f"triton is not installed: {where}; {_INSTALL}", None
        return f"triton cannot be imported ({error}); reinstall it: {_INSTALL}", error
    except Exception as error:  # a package that is broken may raise anything, and plain torch does without it
        return f"triton cannot be imported ({type(error).__name__}: {error}); reinstall it: {_INSTALL}", error
    version = getattr(triton, "__version__", "")
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or not hasattr(triton, "jit"):  # the empty namespace that a half-removed package leaves, or another's
        return f"triton at {list(getattr(triton, '__path__', []))} is not the compiler; reinstall it: {_INSTALL}", None
    if (int(found[1]), int(found[2])) < OLDEST:
        least = "{}.{}".format(*OLDEST)
        return f"triton {version} is too old: kernels need {least} or newer; {_INSTALL}", None
    return None, None
