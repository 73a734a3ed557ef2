"""`convert`: the convolution modules of a model that exists, made ours.

>>> import torch, triton_conv
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.ConvTranspose2d(8, 3, 3))
>>> print(triton_conv.convert(model))
2 of 2 convolutions converted
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch.nn import Module
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from .nn import OURS, DeformConv2d, _Ours
from .unsupported import check_model

__all__ = ["Conversion", "convert"]


@dataclass(frozen=True)
class Conversion:
    """What `convert` did; its length is the number of modules converted, printing it lists those that were not.

    converted: names of the modules, as in `model.named_modules()`; "" is the model itself.
    skipped: (name, reason) of every other convolution.

        >>> report = triton_conv.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()))
        >>> len(report), report.converted, report.skipped
        (1, ('0',), ())

    See `convert` for what it raises.
    """

    converted: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.converted)

    def __str__(self) -> str:
        total = len(self.converted) + len(self.skipped)
        lines = [f"{len(self)} of {total} convolution{'s' * (total != 1)} converted"]
        lines += [f"  skipped {name or 'the model itself'}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def convert(model: torch.nn.Module) -> Conversion:
    """Make the convolutions of `model` ours, in place, and report which.

        >>> class Patches(torch.nn.Conv2d):
        ...     pass
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.LazyConv2d(8, 1), Patches(8, 8, 2))
        >>> print(triton_conv.convert(model))
        2 of 3 convolutions converted
          skipped 2: __main__.Patches is a subclass of torch.nn.Conv2d; derive it from triton_conv.nn.Conv2d

    Only the class of a module changes. The module stays the same object with the same parameters, buffers, hooks,
    training mode and state_dict, so optimizers, weight_norm, pruning and parametrizations keep working. Lazy
    modules stay lazy until their first input. Modules reached by two names are converted once, under the first.

    Skipped, each with its reason: subclasses of torch's classes, whose own code may call torch's convolution (derive
    them from `triton_conv.nn` instead, or run them under `triton_conv.override()`), modules whose forward was replaced
    on the instance, and negative padding, which torch's take with a `padding_mode` other than "zeros". Wrappers that
    change the class of a module, such as `fully_shard`, come after `convert`. What goes by torch's classes comes before
    it: quantization, and torch.fx, which sees a convolution of torch's as one module and of ours as a call of a
    function. A traced `torch.fx.GraphModule` is converted as any module is.

    `torchvision.ops.DeformConv2d` is converted too. Ours is no subclass of it, as ours of torch's are.

    Raises TypeError if `model` is not a `torch.nn.Module`, ValueError if it contains itself.
    """
    check_model("convert", model)
    converted, skipped = [], []
    for name, module in model.named_modules():
        if not _convolves(module):
            continue
        reason = reason_to_skip(module)
        if reason:
            skipped.append((name, reason))
        else:
            module.__class__ = our_class(module)
            converted.append(name)
    return Conversion(tuple(converted), tuple(skipped))


def _convolves(module: Module) -> bool:
    return isinstance(module, (_ConvNd, DeformConv2d, *_torchvisions()))


def reason_to_skip(module: Module) -> str:
    """Why `convert` leaves a module alone; "" if it need not."""
    cls = parametrize.type_before_parametrizations(module)
    if isinstance(module, (_Ours, DeformConv2d)):
        return "already converted"
    known = OURS | _torchvisions()
    if cls not in known:
        base: type = next((c for c in cls.__mro__ if c in known), _ConvNd)
        ours = f"; derive it from triton_conv.nn.{base.__name__}" if base in known else ""
        theirs = "torch.nn" if base not in _torchvisions() else "torchvision.ops"
        return f"{cls.__module__}.{cls.__qualname__} is a subclass of {theirs}.{base.__name__}{ours}"
    patched = sorted({"forward", "_conv_forward"} & vars(module).keys())
    if patched:
        return f"{patched[0]} was replaced on the instance; convert before that"
    cropped = min(getattr(module, "_reversed_padding_repeated_twice", ()), default=0) < 0
    if cropped and module.padding_mode != "zeros":  # F.pad takes it
        return f"its padding is negative, padding={module.padding}"
    return ""


def _torchvisions() -> dict[type, type]:
    """Its deformable convolution and ours, if anyone has imported it."""
    cls = getattr(sys.modules.get("torchvision.ops"), "DeformConv2d", None)
    return {cls: DeformConv2d} if isinstance(cls, type) else {}


def our_class(module: Module) -> type:
    known = OURS | _torchvisions()
    return class_over(module, known[parametrize.type_before_parametrizations(module)])


def class_over(module: Module, cls: type) -> type:
    """`cls`, for a module that may be parametrized."""
    if not parametrize.is_parametrized(module):
        return cls
    # register_parametrization gave the module a class of its own, with a property per tensor: the same over another.
    return type(type(module).__name__, (cls,), dict(vars(type(module))))
