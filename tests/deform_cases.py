"""Deformable convolutions and their operands."""

from typing import NamedTuple

import torch

from triton_conv import deform_conv2d, deform_run

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)


class Case(NamedTuple):
    """N C H W, then K R S, then what is not usual."""

    x: tuple = (2, 4, 4, 5)
    w: tuple = (4, 3, 2)
    stride: tuple = (1, 1)
    padding: tuple = ((1, 1), (1, 1))
    dilation: tuple = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    mask: bool = True
    bias: bool = True

    @property
    def params(self):
        return self.stride, self.padding, self.dilation

    @property
    def output(self):
        extents = zip(self.x[2:], self.w[1:], self.stride, self.padding, self.dilation, strict=True)
        return [(n + sum(p) - d * (f - 1) - 1) // s + 1 for n, f, s, p, d in extents]


CASES = [
    Case(),
    Case(mask=False, bias=False, offset_groups=2),
    Case(x=(1, 8, 6, 5), w=(4, 2, 3), stride=(2, 1), padding=((0, 2), (1, 0)), dilation=(1, 2), groups=2),
    Case(x=(1, 6, 4, 4), w=(6, 2, 2), groups=2, offset_groups=3, bias=False),
    Case(x=(2, 4, 3, 4), w=(4, 1, 1), padding=((0, 0), (0, 0)), groups=4, offset_groups=4),
]


# For the interpreter, which takes a millisecond for every step.
SMALL = Case(x=(1, 2, 3, 3), w=(2, 2, 1), padding=((0, 0), (0, 1)))


class Operands(NamedTuple):
    """What `deform_conv2d` takes, in its order up to bias."""

    input: torch.Tensor
    offset: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    mask: torch.Tensor | None

    @property
    def there(self):
        return [t for t in self if t is not None]


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def between(*shape):
    """Offsets of up to two pixels, a tenth away from whole ones: there derivatives exist."""
    return torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1 + torch.randint(-2, 2, shape)


def operands(case, dtype=torch.float64, offset_dtype=None, memory_format=torch.contiguous_format, device="cpu"):
    torch.manual_seed(0)
    (N, C, _, _), (K, R, S) = case.x, case.w
    taps = case.offset_groups * R * S
    made = [
        draw(*case.x, dtype=dtype),
        between(N, 2 * taps, *case.output).to(offset_dtype or dtype),
        draw(K, C // case.groups, R, S, dtype=dtype),
        draw(K, dtype=dtype) if case.bias else None,
        draw(N, taps, *case.output, dtype=offset_dtype or dtype) if case.mask else None,
    ]
    laid = [t if t is None or t.dim() != 4 else t.contiguous(memory_format=memory_format) for t in made]
    return Operands(*[t if t is None else t.to(device) for t in laid])


def leaves(given, dtype=None):
    """The same numbers, to be differentiated by."""
    return Operands(*[None if t is None else t.detach().cpu().to(dtype or t.dtype).requires_grad_() for t in given])


def convolve(case, given):
    return deform_conv2d(*given[:4], *case.params, given.mask)


def lists(case):
    return list(case.stride), [p for pair in case.padding for p in pair], list(case.dilation), None


LAYOUTS = (torch.contiguous_format, torch.channels_last)


def watched(monkeypatch):
    """The plans that are run from here on."""
    seen, plan = [], deform_run.plan
    monkeypatch.setattr(deform_run, "plan", lambda *args: seen.append(plan(*args)) or seen[-1])
    return seen
