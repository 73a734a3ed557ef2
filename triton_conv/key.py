"""What a tuned config is filed under: all that decides which config is quickest, and nothing that tells shapes apart.

>>> small = ConvGeometry.forward((32, 64, 50, 50), (64, 64, 3, 3), padding=((1, 1), (1, 1)))
>>> large = ConvGeometry.forward((32, 64, 56, 56), (64, 64, 3, 3), padding=((1, 1), (1, 1)))
>>> key_of = lambda g: of(g, Role.FPROP, "bfloat16", "bfloat16", "ieee", channels_last=True)[0]
>>> key_of(small) == key_of(large)
True
"""

from __future__ import annotations

import hashlib
import io
import re
import tokenize
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

from .config import BandedConfig, BoxConfig, Config, DepthwiseConfig, KernelConfig
from .deform_config import DeformRole
from .geometry import ConvGeometry, Role

# The kernels that have configs to choose from, and of what type these are.
CONFIGS: dict[str, type[KernelConfig]] = {
    "gather": Config,
    "wgrad": Config,
    "box": BoxConfig,
    "box_wgrad": BoxConfig,
    "depthwise": DepthwiseConfig,
    "depthwise_wgrad": DepthwiseConfig,
    "banded": BandedConfig,
    "banded_wgrad": BandedConfig,
    "deform": Config,
    "deform_dgrad": Config,
    "deform_offset": Config,
    "deform_wgrad": Config,
    "gather_branches": Config,
    "box_branches": BoxConfig,
}


class Key(NamedTuple):
    """The part of a problem that its config depends on; what a file is for, its device and kernel, is not repeated.

    Numbers are those of the geometry that the kernel computes (`ways.Layout`): a 1x1 convolution of 32 images is the
    same as one of as many pixels in one image. `pixels` is the power of two at or below the number of output positions
    of all images: shapes of one bucket share their config. `zero_padding` says that nothing but zeros is around the
    input; how much of it, which other padding modes, bias and epilogue are left out. `variant` says in words what else
    the kernels of another kind of convolution depend on; it is "" for ordinary ones.
    """

    role: str
    dtype: str
    out_dtype: str
    precision: str
    channels_last: bool
    zero_padding: bool
    groups: int
    C: int
    K: int
    filter: tuple[int, int, int]
    stride: tuple[int, int, int]
    dilation: tuple[int, int, int]
    pixels: int
    variant: str = ""


class Extents(NamedTuple):
    """What tells the shapes of one key apart: images and positions of the input, and of the output."""

    N: int
    input: tuple[int, int, int]
    output: tuple[int, int, int]


def of(
    g: ConvGeometry,
    role: Role | DeformRole,
    dtype: str,
    out_dtype: str,
    precision: str,
    channels_last: bool,
    variant: str = "",
) -> tuple[Key, Extents]:
    """The key of a canonical geometry, and where in its bucket it is."""
    extents = Extents(g.N, _three(g.input), _three(g.output))
    walk = (_three(g.filter), _three(g.stride), _three(g.dilation))
    zero_padding = all(mode == "zeros" for mode in g.modes)
    what = (role.value, dtype, out_dtype, precision, channels_last, zero_padding)
    return Key(*what, g.groups, g.C, g.K, *walk, bucket(extents), variant), extents


def _three(axes: tuple[int, ...]) -> tuple[int, int, int]:
    d, h, w = axes
    return d, h, w


def bucket(extents: Extents) -> int:
    """The power of two at or below the number of output positions."""
    return 1 << max((extents.N * prod(extents.output)).bit_length() - 1, 0)


def simplicity(config: KernelConfig) -> tuple:
    """Sorts configs that are equally quick: fewer slabs, stages and warps, smaller tiles, then by all their numbers.

    No two configs of a kernel are equally simple.
    """
    stages = getattr(config, "num_stages", 1)
    return config.splits, stages, config.num_warps, config.BLOCK_M, repr(config)


_KERNELS = Path(__file__).with_name("kernels")
_SIBLING = re.compile(r"^from \.(\w+) import", re.MULTILINE)


@cache
def source_hash(kernel: str) -> str:
    """Names the source of a kernel: another one for changed code, the same for other comments, docstrings or blanks.

    >>> len(source_hash("gather"))
    16
    """
    found, waiting = set(), [kernel]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _SIBLING.findall((_KERNELS / f"{name}.py").read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(_code((_KERNELS / f"{name}.py").read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:16]


_NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
_NESTING = {tokenize.INDENT: "{", tokenize.DEDENT: "}"}


def _code(source: str) -> str:
    """A source without comments, docstrings and blanks, but with its nesting; the same in every version of Python."""
    words: list[str] = []
    starts = True  # a statement, in which a string is a docstring
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _NESTING:
            words.append(_NESTING[token.type])
        elif token.type == tokenize.NEWLINE:
            if not starts:
                words.append(";")
            starts = True
        elif token.type not in _NOT_CODE and not (starts and token.type == tokenize.STRING):
            words.append(token.string)
            starts = False
    return "".join("".join(words).split())  # newer versions split f-strings at the blanks in their braces
