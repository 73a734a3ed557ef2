"""Causal families: of each channel by itself with its update, and of video and sequences in chunks."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from .. import causal as ours
from .. import streaming
from ..cases import Case
from ..check import Result, compared, poisoned
from ..epilogue import ACTIVATIONS
from ..oracle import convolved
from .convolutions import activated
from .drawn import Drawn, Tensors, frozen, steering
from .placing import random_places
from .steering import steered


@dataclass(frozen=True, kw_only=True, repr=False)
class Causal(Drawn):
    """`causal_conv1d` of weights (C, W), and the same by `causal_conv1d_update` from position `update` on, if any."""

    B: int = 1
    C: int = 1
    L: int = 1
    W: int = 1
    bias: bool = False
    state: bool = False
    silu: bool = False
    update: int = 0
    dtype: str = "float32"
    weight_dtype: str = "float32"

    MOST: ClassVar[int] = 20_000

    def cost(self) -> tuple[int, int]:
        known = 1 <= self.W <= 8 and self.weight_dtype in (self.dtype, "float32") and 0 <= self.update <= self.L
        if not known or self.B < 0 or min(self.C, self.L) < 1:
            raise ValueError("no causal convolution has such numbers")
        return self.B * self.C * self.L * self.W, self.B * self.C * self.L

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        found = {"x": ((self.B, self.C, self.L), self.dtype), "weight": ((self.C, self.W), self.weight_dtype)}
        if self.bias:
            found["bias"] = ((self.C,), self.weight_dtype)
        if self.state:
            found["state"] = ((self.B, self.C, self.W - 1), self.dtype)
        return found

    def compute(self, t: Tensors) -> Any:
        x, weight, bias, state = (t.get(name) for name in ("x", "weight", "bias", "state"))
        assert x is not None
        assert weight is not None
        return ours.causal_conv1d(x, weight, bias, "silu" if self.silu else None, state, True)

    def plain(self, t: Tensors) -> Any:
        x, weight, bias, state = (t.get(name) for name in ("x", "weight", "bias", "state"))
        assert x is not None
        assert weight is not None
        before = x.new_zeros(self.B, self.C, self.W - 1) if state is None else state
        padded = torch.cat((before, x), 2)
        case = Case.of(padded.shape[2], self.W, N=self.B, C=self.C, K=self.C, groups=self.C, bias=False)
        y = convolved(case, padded, weight.unsqueeze(1), bias)
        return functional.silu(y) if self.silu else y, padded[:, :, padded.shape[2] - (self.W - 1) :]

    def depth(self, name: str) -> tuple[int, float]:
        # the final state's gradient is added to that of y, which is rounded first
        rounded = torch.finfo(getattr(torch, self.dtype)).eps if name in ("dx", "dstate") else 0.0
        return {"y": 2, "y1": 1, "dx": 2, "dstate": 2}.get(name, 2 * max(self.B * self.L, 1)) * self.W, rounded

    def check(self, where: torch.device | str = "cpu") -> list[Result]:
        return [*super().check(where), *(self._updated(where) if self.update < self.L and self.B and self.C else [])]

    def _updated(self, where: torch.device | str) -> list[Result]:
        """The rest of the sequence, by updates of a few steps."""
        with steered(self.device, self.candidate), poisoned(), torch.no_grad():
            t = self.operands(self.seed, where)
            x, weight, bias, state = (t.get(name) for name in ("x", "weight", "bias", "state"))
            assert x is not None
            assert weight is not None
            activation, first = "silu" if self.silu else None, x[:, :, : self.update]
            zeros = x.new_zeros(self.B, self.C, self.W - 1)
            after = torch.cat((zeros if state is None else state, first), 2)
            after = after[:, :, after.shape[2] - (self.W - 1) :].clone()
            made, place = [], self.update
            while place < self.L:
                steps = 1 + place % 3
                piece = x[:, :, place] if steps == 1 else x[:, :, place : place + steps]
                y = ours.causal_conv1d_update(piece, after, weight, bias, activation)
                made.append(y.unsqueeze(2) if steps == 1 else y)
                place += steps
            whole = self.plain({name: None if o is None else self._wide(o) for name, o in t.items()})
        got = torch.cat(made, 2)
        results = [compared("updated", got, whole[0][:, :, self.update :], *self._depths("y"))]
        return [*results, compared("state", after, whole[1], *self._depths("y1"))]

    def _depths(self, name: str) -> tuple[int, None]:
        return self.depth(name)[0], None


def causal(rng: random.Random) -> Causal:
    dtype = rng.choice(("float32", "float64", "float16", "bfloat16"))
    names = ("x", "weight", "bias", "state")
    L = rng.choice((1, 2, 3, 5, 16, 17, 33, rng.randint(1, 150), rng.randint(1, 150)))
    c = Causal(
        **steering(rng),
        B=rng.choice((0, 1, 1, 1, 2, 2, 3)),
        C=rng.choice((1, 2, 3, 5, 8, 16, 24, 32, 33)),
        L=L,
        W=rng.randint(1, 8),
        bias=rng.random() < 0.5,
        state=rng.random() < 0.5,
        silu=rng.random() < 0.5,
        update=max(L - rng.randint(0, 6), 0),
        dtype=dtype,
        weight_dtype=rng.choice((dtype, "float32")) if dtype != "float64" else dtype,
    )
    present = tuple(name for name in names if name in c.shapes())
    return replace(c, frozen=frozen(rng, present), places=random_places(rng, (*present, "dy")))


@dataclass(frozen=True, kw_only=True, repr=False)
class Streaming(Drawn):
    """`causal_conv3d` or, with one spatial axis, dense `causal_conv1d`, in one pass and in chunks.

    The first axis is time: its `padding` is not asked. `context` counts frames before x, -1 for a beginning. `chunks`
    are the lengths of all chunks but the last, in frames that a stride reads.
    """

    N: int = 1
    C: int = 1
    K: int = 1
    spatial: tuple[int, ...] = (1,)
    kernel: tuple[int, ...] = (1,)
    stride: tuple[int, ...] = (1,)
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = (1,)
    groups: int = 1
    modes: tuple[str, ...] = ()
    time_mode: str = "zeros"
    context: int = -1
    chunks: tuple[int, ...] = ()
    bias: bool = False
    dtype: str = "float32"
    precision_: str | None = None
    activation: str = ""
    residual: str = ""
    scale: str = ""

    @property
    def precision(self) -> str | None:
        return self.precision_

    @property
    def reach(self) -> int:
        return self.dilation[0] * (self.kernel[0] - 1)

    @property
    def case(self) -> Case:
        """The convolution of all frames, those before x too."""
        if len(self.spatial) not in (1, 3) or len(self.padding) != len(self.spatial) - 1 or self.context < -1:
            raise ValueError("neither video nor sequence")
        if len(self.spatial) == 1 and (self.activation or self.residual or self.scale):
            raise ValueError("sequences have no epilogue")
        before = self.reach if self.context < 0 else self.context
        return Case.of(
            (before + self.spatial[0], *self.spatial[1:]),
            self.kernel,
            N=self.N,
            C=self.C,
            K=self.K,
            stride=self.stride,
            padding=((0, 0), *self.padding),
            dilation=self.dilation,
            groups=self.groups,
            modes=("zeros", *self.modes),
            bias=False,
            dtype=getattr(torch, self.dtype),
        )

    def cost(self) -> tuple[int, int]:
        if min((*self.chunks, 1)) < 1 or sum(self.chunks) >= self.spatial[0]:
            raise ValueError("no such chunks")
        return self.case.macs, self.N * self.K * prod(self.case.output_spatial)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        case, dtype = self.case, self.dtype
        found = {"x": ((self.N, self.C, *self.spatial), dtype), "w": (case.weight_shape, dtype)}
        if self.context >= 0:
            found["context"] = ((self.N, self.C, self.context, *self.spatial[1:]), dtype)
        if self.bias:
            found["bias"] = ((self.K,), dtype)
        if self.residual:
            found["residual"] = ((self.N, self.K, *case.output_spatial), dtype)
        if self.scale:
            found["scale"] = ((self.K,), self.scale)
        return found

    def _call(self, x: Any, context: Any, residual: Any, t: Tensors, more: bool) -> Any:
        how: dict[str, Any] = {"groups": self.groups, "time_mode": self.time_mode, "precision": self.precision_}
        if len(self.spatial) == 1:
            how |= {"stride": self.stride[0], "dilation": self.dilation[0]}
            return ours.causal_conv1d(x, t["w"], t.get("bias"), context=context, return_context=more, **how)  # type: ignore[arg-type]
        how |= {"stride": self.stride, "dilation": self.dilation, "padding": self.padding, "padding_mode": self.modes}
        how |= {"activation": self.activation or None, "residual": residual, "scale": t.get("scale")}
        how |= {"residual_after_activation": self.residual == "after", "return_context": more}
        return streaming.causal_conv3d(x, t["w"], t.get("bias"), context, **how)  # type: ignore[arg-type]

    def compute(self, t: Tensors) -> Tensor:
        return self._call(t["x"], t.get("context"), t.get("residual"), t, False)

    def plain(self, t: Tensors) -> Tensor:
        x, w, context, bias = t["x"], t["w"], t.get("context"), t.get("bias")
        assert x is not None
        assert w is not None
        if context is None:
            first = x[:, :, :1] * (1 if self.time_mode == "replicate" else 0)
            context = first.expand(-1, -1, self.reach, *(-1,) * (x.dim() - 3))
        channels, residual = (-1, *(1,) * len(self.spatial)), t.get("residual")
        z = convolved(self.case, torch.cat((context, x), 2), w, None)
        z = z if t.get("scale") is None else z * t["scale"].view(channels)  # type: ignore[union-attr]
        z = z if bias is None else z + bias.view(channels)
        z = z + residual if residual is not None and self.residual == "before" else z
        y = activated(self.activation, 0.01, z, getattr(torch, self.dtype))
        return y + residual if residual is not None and self.residual == "after" else y

    def depth(self, name: str) -> tuple[int, float]:
        case, eps = self.case, 0.0
        outputs = max(self.N * prod(case.output_spatial), 1)
        if self.activation or self.residual or self.scale:  # one more rounding, of what the rest is applied to
            eps = torch.finfo(case.dtype).eps
        if name == "y":
            return 4 * case.depth("y"), eps
        found = {"dx": case.depth("dx"), "dcontext": case.depth("dx"), "dresidual": 1}
        found["dscale"] = outputs * case.depth("y")
        times = 16 if eps else 1
        if self.time_mode == "replicate" and self.context < 0:
            times *= 1 + self.reach
        return times * found.get(name, outputs), eps

    def check(self, where: torch.device | str = "cpu") -> list[Result]:
        return [*super().check(where), *self._cut(where)]

    def _cut(self, where: torch.device | str) -> list[Result]:
        """Chunks have the bits of one pass."""
        if not self.chunks or not self.N:
            return []
        with steered(self.device, self.candidate), poisoned(), torch.no_grad():
            t = self.operands(self.seed, where)
            x, context, residual = (t.get(name) for name in ("x", "context", "residual"))
            assert x is not None
            whole = self._call(x, context, residual, t, False)
            made, done = list[Tensor](), 0
            lengths = [*self.chunks, x.shape[2] - sum(self.chunks)]
            for piece in x.split(lengths, 2):
                frames = (context.shape[2] if context is not None else self.reach) + piece.shape[2]
                outputs = (frames - self.reach - 1) // self.stride[0] + 1
                part = None if residual is None else residual[:, :, done : done + outputs]
                done += outputs
                if len(made) < len(self.chunks):
                    y, context = self._call(piece, context, part, t, True)
                else:  # where a video ends does not matter
                    y = self._call(piece, context, part, t, False)
                made.append(y)
        cut = torch.cat(made, 2)
        same = cut.shape == whole.shape and torch.equal(cut, whole)
        return [Result("chunks", 0.0 if same else 1.0, 0.0, "" if same else "other bits than those of one pass")]


def streamed(rng: random.Random) -> Streaming:
    while True:
        video, whole = rng.random() < 0.65, rng.random() < 0.5
        rank = 3 if video else 1
        dtype = rng.choice(("bfloat16", "bfloat16", "float16", "float32", "float64"))
        groups = rng.choice((1, 1, 1, 2))
        C, K = (groups * rng.choice((8, 16, 24, 32) if whole else (1, 2, 3, 5)) for _ in range(2))
        if rng.random() < 0.1:
            groups = C = K = rng.choice((1, 3, 8))
        kernel = (rng.choice((1, 2, 3, 3, 4)), *(rng.choice((1, 1, 2, 3)) for _ in range(rank - 1)))
        stride = (rng.choice((1, 1, 1, 2)), *(rng.choice((1, 1, 1, 2)) for _ in range(rank - 1)))
        dilation = (rng.choice((1, 1, 2, 3)), *(rng.choice((1, 1, 1, 2)) for _ in range(rank - 1)))
        pads = [(n, rng.choice((n, rng.randrange(k + 1)))) for k in kernel[1:] for n in [rng.randrange(k)]]
        chunks = tuple(stride[0] * rng.randint(1, 3) for _ in range(rng.choice((0, 1, 1, 2, 3))))
        epilogue = video and rng.random() < 0.3
        reach = dilation[0] * (kernel[0] - 1)
        s = Streaming(
            **steering(rng),
            N=rng.choice((1, 1, 1, 2)),
            C=C,
            K=K,
            spatial=(sum(chunks) + rng.randint(1, 4), *(rng.randint(1, 6) for _ in range(rank - 1))),
            kernel=kernel,
            stride=stride,
            padding=tuple(pads),
            dilation=dilation,
            groups=groups,
            modes=tuple(
                "zeros" if rng.random() < 0.7 else rng.choice(("reflect", "replicate", "circular")) for _ in pads
            ),
            time_mode=rng.choice(("zeros", "replicate")),
            context=rng.choice((-1, reach, reach, reach + stride[0])),
            chunks=chunks,
            bias=rng.random() < 0.5,
            dtype=dtype,
            precision_=rng.choice((None, "ieee", "tf32", "tf32x3")) if dtype == "float32" else None,
            activation=rng.choice(("", *ACTIVATIONS)) if epilogue else "",
            residual=rng.choice(("", "before", "after")) if epilogue else "",
            scale=rng.choice(("", "float32", dtype)) if epilogue else "",
        )
        if s.valid() and s.cost()[0] <= 60_000:
            names = tuple(s.shapes())
            placed = random_places(rng, (*names, "dy"), usual="channels_last")
            if chunks:  # chunks must lie in memory alike each time
                placed = tuple((name, how) for name, how in placed if how == "channels_last")
            return replace(s, frozen=frozen(rng, names), places=placed)
