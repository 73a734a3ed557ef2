"""What a convolution launches: a plan, which prints itself (`str(plan)`). `plan` makes it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from . import cost, ways
from . import key as keys
from .config import ITEM_BYTES, BoxConfig, Device, KernelConfig, Numerics
from .cost import Prediction, Roofline
from .epilogue import PLAIN, Epilogue
from .forks import cached_property
from .frozen import Planned
from .geometry import ConvGeometry, Role, Strides
from .ways import Layout

if TYPE_CHECKING:
    from .kernels.launch import Launch

# What kernels call what a role writes.
WRITTEN = {Role.FPROP: "y", Role.DGRAD: "x", Role.WGRAD: "w"}


@dataclass(frozen=True)
class Fold:
    """The second step of an input gradient whose padding is not zeros: border positions add up onto dx."""

    geometry: ConvGeometry
    padded_shape: tuple[int, ...]
    padded_strides: tuple[int, ...]
    dx_strides: tuple[int, ...]
    numerics: Numerics


@dataclass(frozen=True)
class Plan(Planned):
    """A kernel and everything it is launched with, for tensors of any address.

    `geometry` and `strides` are canonical: they describe the same memory as the caller's tensors, in fewer axes.
    `asked` is the caller's geometry. `packs` names the tensors that are copied to another memory format, `bundle` says
    how many of the caller's groups are computed as one (`ways.Layout`). `measured` and the rival are as in `ways.Way`.
    Where `rival_runs`, PyTorch computes this in place of the kernel (`backends`). `moves_residual` and
    `scale_dtype` are as in `ways.Problem`.
    """

    kernel: str
    role: Role
    dtype: str
    out_dtype: str
    asked: ConvGeometry
    geometry: ConvGeometry
    strides: Strides
    config: KernelConfig
    numerics: Numerics
    device: Device
    packs: tuple[str, ...]
    channels_last: bool
    bundle: int
    steps: tuple[str, ...]
    fold: Fold | None
    workspace_shape: tuple[int, ...]
    workspace_dtype: str
    reason: str
    measured: float | None = None
    rival: float | None = None
    rival_name: str = ""
    rival_runs: bool = False
    moves_residual: bool = False
    scale_dtype: str = ""

    @property
    def N(self) -> int:
        return self.asked.N

    @property
    def layout(self) -> Layout:
        """The canonical problem and the memory it lies in."""
        return Layout(self.packs, self.channels_last, self.bundle, self.geometry, self.strides, self.steps)

    @property
    def compiled_for(self) -> Hashable:
        """All that its kernels' code depends on beside their config."""
        channels_last = ways.reads_channels_last(self.role, self.strides)
        what = (self.role, self.dtype, self.out_dtype, self.numerics.precision, channels_last)
        rival = self.rival_name if self.rival_runs else ""
        return keys.of(self.geometry, *what)[0], self.numerics, bool(self.fold), self.scale_dtype, rival

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every operand that a launch may name."""
        operands = dict.fromkeys(("x", "w", "y"), self.dtype)
        operands |= dict.fromkeys((WRITTEN[self.role], "bias", "residual", "kept"), self.out_dtype)
        operands["scale"] = self.scale_dtype or self.out_dtype
        return operands | {"scale_a": "float32", "scale_b": "float32", "workspace": self.workspace_dtype}

    @property
    def workspace_bytes(self) -> int:
        """Device memory beyond inputs and output, in bytes."""
        workspace = prod(self.workspace_shape) if self.workspace_shape else 0
        return sum(self._copies.values()) + workspace * ITEM_BYTES[self.workspace_dtype]

    @property
    def _copies(self) -> dict[str, int]:
        """The size in bytes of every tensor that stands for another."""
        names = (*self.packs, "w") if self.bundle > 1 else self.packs
        copies = {name: prod(self.geometry.shape(name)) * ITEM_BYTES[self.dtype] for name in names}
        more = [name for name, there in (("residual", self.copies_residual), ("kept", self.copies_kept)) if there]
        return copies | dict.fromkeys(more, prod(self.asked.shape(WRITTEN[self.role])) * ITEM_BYTES[self.out_dtype])

    @property
    def epilogue(self) -> Epilogue:
        """What the last kernel does to its sums before it stores them."""
        return (self.fold or self).numerics.epilogue

    @property
    def copies_residual(self) -> bool:
        """Whether kernels read a copy of the residual, which lies as what they write."""
        return bool(self.epilogue.residual) and (self.moves_residual or WRITTEN[self.role] in self.packs)

    @property
    def copies_kept(self) -> bool:
        """Whether kernels write what is kept into a copy, which lies as their output."""
        return self.epilogue.keep and WRITTEN[self.role] in self.packs

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        """What runs, in order; needs Triton, and is first asked for when TRITON_INTERPRET can no longer be set."""
        from .kernels import banded, banded_wgrad, box, box_wgrad, depthwise, depthwise_wgrad, fold, gather, wgrad

        what = (self.geometry, self.strides, self.config, self.numerics)
        if self.role is Role.WGRAD:
            rooms = {"box_wgrad": box_wgrad, "depthwise_wgrad": depthwise_wgrad, "banded_wgrad": banded_wgrad}
            return tuple(rooms.get(self.kernel, wgrad).launches(*what))
        if self.kernel == "banded":
            return tuple(banded.launches(self.role, *what, ITEM_BYTES[self.dtype]))
        into = "workspace" if self.fold else ""
        if self.kernel == "box":
            vector = 16 // ITEM_BYTES[self.workspace_dtype if self.fold else self.out_dtype]
            first = box.launch(self.role, *what, self.device, vector, into)
        else:
            first = (depthwise if self.kernel == "depthwise" else gather).launch(self.role, *what, into)
        if self.fold is None:
            return (first,)
        f = self.fold
        return first, fold.launch(f.geometry, f.numerics, f.padded_strides, f.dx_strides)

    @cached_property
    def roofline(self) -> Roofline:
        """The least time of what the plan computes, by whatever kernel."""
        what = (self.role, self.dtype, self.numerics.precision, self.device, self.out_dtype)
        return cost.roofline(self.asked, *what, self.epilogue)

    @cached_property
    def prediction(self) -> Prediction:
        """The predicted time of the kernel."""
        channels_last = ways.reads_channels_last(self.role, self.strides)
        what = (self.geometry, self.role, self.kernel, self.config, self.dtype, self.numerics.precision, self.device)
        return cost.predict(*what, channels_last, self.out_dtype, self.numerics.epilogue)

    @property
    def measured_seconds(self) -> float | None:
        """The time of everything where the kernel's was measured; an epilogue and what is around it are predicted."""
        if self.measured is None:
            return None
        epilogue = cost.epilogue_seconds(self.geometry, self.role, self.out_dtype, self.device, self.numerics.epilogue)
        return self.measured + epilogue + self._around

    @property
    def _around(self) -> float:
        if self.fold is None:
            return super()._around
        return super()._around + cost.fold_seconds(self.fold.geometry, self.dtype, self.device, self.epilogue)

    def __str__(self) -> str:
        numerics = self.numerics
        instead = f"{self.rival_name}, in place of " if self.rival_runs else ""
        fused = fused_words(self.epilogue, (self.fold or self).numerics.has_bias)
        lines = [
            f"kernel     {instead}{self.kernel} ({self.role.value})",
            f"geometry   {self.geometry}",
            f"config     {self.config}",
            f"numbers    {self._products()}, {numerics.accumulator} accumulator, {numerics.index_bits}-bit offsets",
            *([f"epilogue   {fused}"] if fused else []),
            f"layout     {'; '.join(self.steps) if self.steps else 'as given, no copies'}",
            f"workspace  {self.workspace_bytes} bytes{self._workspace_use()}",
            f"reason     {self.reason}",
        ]
        return "\n".join(lines)

    def _products(self) -> str:
        dot = self.dtype == "float32" and (isinstance(self.config, BoxConfig) or self.config.dot)
        products = f"float32 products as {self.numerics.precision}" if dot else f"{self.dtype} products"
        return products if self.out_dtype == self.dtype else f"{products} to {self.out_dtype}"

    def _workspace_use(self) -> str:
        uses = [f"a copy of {name}" for name in self._copies]
        if self.fold is not None:
            uses.append("the gradient of the padded input, folded onto dx")
        elif self.kernel == "banded":
            uses.append("the filters at every shift within a vector")
        elif self.workspace_shape:
            uses.append(f"{self.config.splits} slabs of dw, summed in order")
        return f" ({'; '.join(uses)})" if uses else ""


def fused_words(epilogue: Epilogue, has_bias: bool) -> str:
    """What happens to sums before they are stored, in words and in order; "" if nothing but a bias does."""
    e = epilogue
    if e == PLAIN:
        return ""
    activation = f"{e.activation} of slope {e.slope}" if e.activation == "leaky_relu" else e.activation
    words = ["scale" * e.scale, "bias" * has_bias, "residual" * (e.residual == "before"), activation]
    words.append("residual" * (e.residual == "after"))
    kept = f"; what {e.activation or 'the rest'} is applied to is kept" if e.keep else ""
    return ", ".join(filter(None, words)) + kept
