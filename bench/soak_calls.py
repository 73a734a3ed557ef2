"""Calls of every kind with random shapes, dtypes and settings, forward and backward: what a soak runs.

>>> name, call = next(random_calls(0, torch.device("cpu")))
>>> call()
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (its name everywhere)

import triton_conv
from triton_conv import check

_LEAST, _MOST = 3, 9  # pixels along an axis

Call = Callable[[], None]


def random_calls(seed: int, device: torch.device) -> Iterator[tuple[str, Call]]:
    """Names of kinds and calls without arguments, which keep nothing; the same for the same seed, without an end.

    Kinds come like cards of a deck that is shuffled again when it has been dealt.
    """
    rng = random.Random(seed)
    while True:
        for name, make in rng.sample(KINDS, len(KINDS)):
            yield name, partial(_run, make, rng.randrange(2**31), device)


def _run(make: Callable[..., Any], seed: int, device: torch.device) -> None:
    rng = random.Random(seed)
    with _settings(rng):
        made = make(rng, device, torch.Generator().manual_seed(seed))
        tensors = [t for t in made if isinstance(t, Tensor)] if isinstance(made, tuple) else [made]
        loss = sum((t.float() if not t.is_complex() else t.real).sum() for t in tensors)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()


@contextmanager
def _settings(rng: random.Random) -> Iterator[None]:
    """Now and then what a call is made under is another, and afterwards as before."""
    before = torch.backends.cuda.matmul.allow_tf32
    which = rng.randrange(6)
    try:
        if which == 0:
            with triton_conv.batch_invariant():
                yield
        elif which == 1:
            with triton_conv.backend("auto"):
                yield
        elif which == 2:
            torch.backends.cuda.matmul.allow_tf32 = not before
            yield
        elif which == 3:
            with torch.no_grad():
                yield
        else:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class _Made:
    """Operands of a call, normal numbers that want gradients."""

    def __init__(self, rng: random.Random, device: torch.device, generator: torch.Generator):
        self.rng, self.device, self.generator = rng, device, generator
        self.dtype = rng.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64))
        self.last = rng.random() < 0.5

    def side(self) -> int:
        return self.rng.randint(_LEAST, _MOST)

    def tensor(self, *shape: int, grad: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        t = torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)
        if self.last and t.dim() in (4, 5):
            t = t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
        return t.requires_grad_(grad)


def _ordinary(rng: random.Random, device: torch.device, generator: torch.Generator) -> Any:
    """Of the cases that `triton-conv check` draws: any rank, transposed too, any dtype, padding and memory format."""
    case = check.random_case(rng)
    case.run(case.operands(generator.initial_seed(), device), check.QUANTITIES if torch.is_grad_enabled() else ("y",))
    return ()


def _fused(*given: Any) -> Any:
    made = _Made(*given)
    H, W, C, K = made.side(), made.side(), 2 * made.side(), 2 * made.side()
    activation = made.rng.choice((None, "relu", "gelu", "silu", "hardswish", "sigmoid"))
    x, w, b = made.tensor(1, C, H, W), made.tensor(K, C, 3, 3), made.tensor(K)
    residual = made.tensor(1, K, H, W) if made.rng.random() < 0.5 else None
    return triton_conv.conv2d(x, w, b, padding=1, activation=activation, residual=residual)


def _causal(*given: Any) -> Any:
    made = _Made(*given)
    C, L = made.side(), 4 * made.side()
    x, w, b = made.tensor(2, C, L), made.tensor(C, made.rng.randint(1, 4)), made.tensor(C)
    return triton_conv.causal_conv1d(x, w, b, activation=made.rng.choice((None, "silu")), return_final_state=True)


def _update(*given: Any) -> Any:
    made = _Made(*given)
    C, taps = made.side(), made.rng.randint(2, 4)
    state = made.tensor(2, C, taps - 1, grad=False)
    with torch.no_grad():
        return triton_conv.causal_conv1d_update(made.tensor(2, C, grad=False), state, made.tensor(C, taps))


def _streaming(*given: Any) -> Any:
    made = _Made(*given)
    C, K, H, W = made.side(), made.side(), made.side(), made.side()
    w, context, outputs = made.tensor(K, C, 3, 3, 3), None, []
    for frames in (made.rng.randint(1, 2), 1):
        x = made.tensor(1, C, frames, H, W)
        y, context = triton_conv.causal_conv3d(x, w, context=context, padding=1, return_context=True)
        outputs.append(y)
    return tuple(outputs)


def _deformable(*given: Any) -> Any:
    made = _Made(*given)
    made.dtype = torch.float32 if made.dtype is torch.float64 else made.dtype
    C, K, H, W = 2 * made.side(), made.side(), made.side(), made.side()
    x, w = made.tensor(1, C, H, W), made.tensor(K, C, 3, 3)
    offset = made.tensor(1, 18, H, W)
    mask = made.tensor(1, 9, H, W) if made.rng.random() < 0.5 else None
    return triton_conv.deform_conv2d(x, offset, w, padding=1, mask=mask)


def _branches(*given: Any) -> Any:
    made = _Made(*given)
    C, K, H, W = 8 * made.rng.randint(1, 2), 8, made.side(), made.side()
    rates = made.rng.sample((1, 2, 3), 2)
    branches = [triton_conv.Branch(made.tensor(K, C, 3, 3), made.tensor(K), padding=r, dilation=r) for r in rates]
    how = made.rng.choice((None, True, False)) if made.dtype is not torch.float64 else None
    return triton_conv.multi_conv2d(
        made.tensor(1, C, H, W), branches, combine=made.rng.choice(("concatenate", "sum")), one_launch=how
    )


def _separable(*given: Any) -> Any:
    made = _Made(*given)
    C, K, H, W = 8 * made.rng.randint(1, 2), 8 * made.rng.randint(1, 2), made.side(), made.side()
    return triton_conv.separable_conv2d(
        made.tensor(1, C, H, W), made.tensor(C, 1, 3, 3), made.tensor(K, C, 1, 1), padding=1
    )


def _converted(*given: Any) -> Any:
    """A model that is made, copied, converted, and called under autocast."""
    made = _Made(*given)
    C, size = made.side(), made.side()
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, C, 3, padding=1), torch.nn.ReLU(), torch.nn.ConvTranspose2d(C, 3, 2, stride=2)
    ).to(made.device)
    model = copy.deepcopy(model)
    triton_conv.convert(model)
    made.dtype = torch.float32
    with torch.autocast(made.device.type, torch.bfloat16, enabled=made.rng.random() < 0.5):
        return model(made.tensor(1, 3, size, size))


def _overridden(*given: Any) -> Any:
    made = _Made(*given)
    C, size = made.side(), made.side()
    with triton_conv.override():
        return F.conv2d(made.tensor(1, C, size, size), made.tensor(C, C, 3, 3), padding=1)


def _folded(*given: Any) -> Any:
    """A model that is fused for inference."""
    made = _Made(*given)
    C, size = made.side(), made.side()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, C, 3), torch.nn.BatchNorm2d(C), torch.nn.ReLU()).eval()
    triton_conv.convert(model)
    triton_conv.fuse(model)
    made.dtype = torch.float32
    with torch.no_grad():
        return model.to(made.device)(made.tensor(1, 3, size, size))


def _wrong(*given: Any) -> Any:
    """A call that is refused: what an exception holds is let go too."""
    made = _Made(*given)
    try:
        return triton_conv.conv2d(made.tensor(1, 3, 8, 8), made.tensor(4, 5, 3, 3))
    except RuntimeError:
        return ()


KINDS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("ordinary", _ordinary),
    ("ordinary", _ordinary),
    ("ordinary", _ordinary),
    ("fused", _fused),
    ("causal", _causal),
    ("update", _update),
    ("streaming", _streaming),
    ("deformable", _deformable),
    ("branches", _branches),
    ("separable", _separable),
    ("converted", _converted),
    ("overridden", _overridden),
    ("folded", _folded),
    ("wrong", _wrong),
)
