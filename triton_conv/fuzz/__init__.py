"""Random calls of every family against PyTorch in float64: what `triton-conv fuzz` runs.

    >>> case = drawn("fused", seed=7, number=0)
    >>> outcome = checked(("fused", 0, case))
    >>> outcome.ok
    True

A case (`Drawn`) is data that a line of text says; a family draws it from a generator. Its operands, lying anywhere in
memory, go through the package and through PyTorch in float64, and every output and gradient is held to the tolerance
of `triton_conv.check`. Interpreted kernels are sent the way of any GPU and any config (`steered`).
"""

from .drawn import Drawn as Drawn
from .families import FAMILIES as FAMILIES
from .running import Outcome as Outcome
from .running import checked as checked
from .running import drawn as drawn
from .running import numbered as numbered
from .running import sweep as sweep
from .shrinking import shrunk as shrunk
from .text import keep as keep
from .text import parse as parse
from .text import read as read
