"""Layers for Hugging Face's library `kernels`, whose `kernelize` gives the modules of a model another forward.

    >>> import kernels  # doctest: +SKIP
    >>> triton_conv.layers.register()  # doctest: +SKIP
    >>> model = kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cuda")  # doctest: +SKIP

Each class here is what that library calls a layer: no constructor and no state, a `forward` with the signature of the
module's own, and two attributes that say what it can do. `self` is the module whose forward it becomes. Written for
version 0.17 of it. Most models need none of this: `triton_conv.convert(model)` does the same without that library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from . import functional, nn

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Layer",
    "mapping",
    "register",
]

NAMES = __all__[:6]


def _text(name: str, arguments: str, shape: str) -> str:
    """The docstring of a layer; `arguments` are those of a module of torch's, `shape` an input's."""
    return f"""What `torch.nn.{name}` computes, by this package's kernels; the forward of a module of that class.

        >>> module, x = torch.nn.{name}({arguments}), torch.randn({shape})
        >>> torch.allclose(triton_conv.layers.{name}.forward(module, x), module(x), atol=1e-5)
        True

    Shapes: those of `triton_conv.nn.{name}`. See `triton_conv.nn.{name}` for dtypes and errors.
    """


class Conv1d(torch.nn.Module):
    __doc__ = _text("Conv1d", "4, 8, 3", "2, 4, 9")
    has_backward = True
    can_torch_compile = True

    def forward(self: Any, input: Tensor) -> Tensor:
        """The convolution of `input` by the module's parameters."""
        return nn.convolved(self, functional.conv1d, input, self.weight, self.bias)


class Conv2d(torch.nn.Module):
    __doc__ = _text("Conv2d", "4, 8, 3", "2, 4, 9, 9")
    has_backward = True
    can_torch_compile = True

    def forward(self: Any, input: Tensor) -> Tensor:
        """The convolution of `input` by the module's parameters."""
        return nn.convolved(self, functional.conv2d, input, self.weight, self.bias)


class Conv3d(torch.nn.Module):
    __doc__ = _text("Conv3d", "4, 8, 3", "2, 4, 5, 9, 9")
    has_backward = True
    can_torch_compile = True

    def forward(self: Any, input: Tensor) -> Tensor:
        """The convolution of `input` by the module's parameters."""
        return nn.convolved(self, functional.conv3d, input, self.weight, self.bias)


class ConvTranspose1d(torch.nn.Module):
    __doc__ = _text("ConvTranspose1d", "4, 8, 2, 2", "2, 4, 9")
    has_backward = True
    can_torch_compile = True

    def forward(self: Any, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The transposed convolution of `input` by the module's parameters, of extents `output_size` if given."""
        return nn.transposed(self, functional.conv_transpose1d, input, output_size)


class ConvTranspose2d(torch.nn.Module):
    __doc__ = _text("ConvTranspose2d", "4, 8, 2, 2", "2, 4, 9, 9")
    has_backward = True
    can_torch_compile = True

    def forward(self: Any, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The transposed convolution of `input` by the module's parameters, of extents `output_size` if given."""
        return nn.transposed(self, functional.conv_transpose2d, input, output_size)


class ConvTranspose3d(torch.nn.Module):
    __doc__ = _text("ConvTranspose3d", "4, 8, 2, 2", "2, 4, 5, 9, 9")
    has_backward = True
    can_torch_compile = True

    def forward(self: Any, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The transposed convolution of `input` by the module's parameters, of extents `output_size` if given."""
        return nn.transposed(self, functional.conv_transpose3d, input, output_size)


class Layer(NamedTuple):
    """A layer of this module, where that library expects a repository to load one from.

    >>> triton_conv.layers.Layer("Conv2d").load() is triton_conv.layers.Conv2d
    True

    Raises KeyError, in `load`, for a name that is not one of this module's layers.
    """

    layer_name: str

    def load(self) -> type[torch.nn.Module]:
        """The class of this name."""
        return globals()[self.layer_name]


def mapping(devices: Sequence[str] = ("cuda",)) -> dict[str, dict[str, Any]]:
    """The layers of this module by name and type of device, for `kernels.use_kernel_mapping`.

        >>> triton_conv.layers.mapping()["Conv2d"]
        {'cuda': Layer(layer_name='Conv2d')}

    For models whose own classes are marked with these names by `kernels.use_kernel_forward_from_hub`. Raises nothing:
    types of devices that `kernels` does not know are for it to refuse.
    """
    return {name: {device: Layer(name) for device in devices} for name in NAMES}


def register(devices: Sequence[str] = ("cuda",)) -> None:
    """Has `kernels.kernelize` make torch.nn's convolutions ours, from here on, in models on these types of device.

        >>> triton_conv.layers.register()  # doctest: +SKIP

    Subclasses of torch's classes are left alone, as `convert` leaves them. Raises ImportError where the library
    `kernels` is not installed.
    """
    import kernels

    for name in NAMES:
        cls = getattr(torch.nn, name)
        kernels.replace_kernel_forward_from_hub(cls, name, _is_one_of(cls))
    kernels.register_kernel_mapping(mapping(devices))


def _is_one_of(cls: type) -> Any:
    def condition(module: torch.nn.Module) -> bool:
        return parametrize.type_before_parametrizations(module) is cls

    return condition
