"""Sharding rules of the operators, for tensors that are spread over devices (`torch.distributed.tensor.DTensor`).

An operator is written by the letters of its dimensions: `NC KC K -> NK` is a convolution of input, filters and bias.
Along a dimension of the mesh one letter is shared out, or none is. Tensors that have the letter are sharded there,
others are replicated, and a result without it is a sum whose parts the devices hold (`Partial`):

| letter         | what it is                                  | results                                           |
|----------------|---------------------------------------------|---------------------------------------------------|
| N              | data parallel                               | activations sharded, gradients of filters partial |
| K              | output channels, each device some filters   | output sharded, input gradients partial           |
| C              | input channels                              | output partial, input gradients sharded           |
| G (groups > 1) | whole groups, their inputs and filters      | everything about channels sharded                 |

The letter for which the fewest bytes of arguments are moved is taken; of equals, none. Channels and groups are shared
out only in equal parts. What is sharded otherwise, along the axes of images for instance, is brought together first:
nothing exchanges halos. A bias that is added to a partial sum is added by the first device alone. `separable_conv` has
the letters of its output channels and of its input's. An activation is applied to whole sums: of fused convolutions no
letter of the input's channels is shared out, which "-" says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import causal_ops as causal_ops  # its operators are to be defined
from . import conv_calls, later, schemas
from . import fused_ops as fused_ops
from . import separable as separable


class Letters(NamedTuple):
    """The letters of an operator's arguments, by their places, and of its results.

    groups   the place of the number of groups; with more than one, K and C become G
    size     the places of the result's size, and of its strides where it is asked for them
    added    arguments that are added to sums rather than multiplied
    changed  the argument that is changed in place, and therefore stays as it is sharded
    """

    arguments: Mapping[int, str]
    results: tuple[str, ...]
    groups: int | None = None
    size: tuple[int, ...] = ()
    added: tuple[int, ...] = ()
    changed: int | None = None


_FORWARD = Letters({0: "NC", 1: "KC", 2: "K"}, ("NK",), groups=6, added=(2,))
_FUSED = Letters({0: "N", 1: "K", 2: "K", 3: "K", 4: "NK"}, ("NK",), groups=8)
_FUSED_TRANSPOSE = Letters({0: "N", 1: "-C", 2: "C", 3: "C", 4: "NC"}, ("NC",), groups=8)
OPERATORS = {
    "conv": _FORWARD,
    "conv_dilated": _FORWARD,
    "conv_int": _FORWARD,
    "conv_scaled": _FORWARD._replace(arguments={**_FORWARD.arguments, 8: "", 9: ""}),
    "conv_transpose": Letters({0: "NK", 1: "KC", 2: "C"}, ("NC",), groups=6, added=(2,)),
    "conv_dgrad": Letters({0: "NK", 1: "KC"}, ("NC",), groups=6, size=(2,)),
    "conv_wgrad": Letters({0: "NK", 1: "NC"}, ("KC",), groups=7, size=(2, 3)),
    "conv_separable": Letters({0: "NC", 1: "C", 2: "KC", 3: "C", 4: "K"}, ("NK",), added=(4,)),
    "conv_fused": _FUSED,
    "conv_fused_keep": _FUSED._replace(results=("NK", "NK")),
    "conv_transpose_fused": _FUSED_TRANSPOSE,
    "conv_transpose_fused_keep": _FUSED_TRANSPOSE._replace(results=("NC", "NC")),
    "activation_backward": Letters({0: "NC", 1: "NC"}, ("NC",)),
    "causal_conv1d": Letters({0: "NC", 1: "C", 2: "C", 3: "NC"}, ("NC", "NC")),
    "causal_conv1d_backward": Letters({0: "NC", 1: "NC", 2: "NC", 3: "C", 4: "C", 5: "NC"}, ("NC", "C", "C", "NC")),
    "causal_conv1d_update": Letters({0: "NC", 1: "NC", 2: "C", 3: "C"}, ("NC",), changed=1),
}


def _of_groups(letters: Letters) -> Letters:
    """The letters of more than one group: filters have theirs outermost."""

    def renamed(text: str) -> str:
        return "NG" if "N" in text else "G" if text else ""

    arguments = {place: renamed(text) for place, text in letters.arguments.items()}
    return letters._replace(arguments=arguments, results=tuple(map(renamed, letters.results)))


def dispatch(cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
    """An operator of distributed tensors: brings them where they are needed, computes each device's part."""
    from torch.distributed.tensor import DTensor, Partial

    name = func._schema.name.split("::")[1]
    given = [*args, *((kwargs or {})[a.name] for a in func._schema.arguments[len(args) :])]
    letters = OPERATORS[name]
    groups = 1 if letters.groups is None else given[letters.groups]
    letters = letters if groups == 1 else _of_groups(letters)
    tensors: dict[int, Any] = {place: given[place] for place in letters.arguments if given[place] is not None}
    meshes = {t.device_mesh for t in tensors.values() if isinstance(t, DTensor)}
    if len(meshes) > 1 or not all(isinstance(t, DTensor) for t in tensors.values()):
        names = [func._schema.arguments[place].name for place, t in tensors.items() if not isinstance(t, DTensor)]
        raise RuntimeError(
            f"triton_conv::{name} got DTensors beside other tensors: use distribute_tensor on {', '.join(names)}"
            if names
            else f"triton_conv::{name} got DTensors of different meshes: {', '.join(map(str, meshes))}"
        )
    (mesh,) = meshes
    if func in conv_calls.CALLS:
        conv_calls.CALLS[func](*given)  # for its errors: those of a part would name other sizes

    shared, factors = _shared(mesh, letters, tensors, groups)
    local = list(given)
    with torch.no_grad():
        for place, t in tensors.items():
            wanted = [_placement(letters.arguments[place], letter) for letter in shared]
            local[place] = (t if list(t.placements) == wanted else t.redistribute(mesh, wanted)).to_local()
        partial = [dim for dim, letter in enumerate(shared) if letter and letter not in letters.results[0]]
        for place in letters.added:
            if any(mesh.get_local_rank(dim) for dim in partial if shared[dim] not in letters.arguments[place]):
                local[place] = None
        if letters.groups is not None:
            local[letters.groups] = groups // factors.get("G", 1)
        if letters.size:
            where, *of_strides = letters.size
            local[where] = _scaled(given[where], letters.results[0], factors, local[0].shape[0])
            for place in of_strides:
                local[place] = dense_in_order(local[where], given[place])
        results = func(*local)
        many = isinstance(results, (tuple, list))
        found = []
        for result, text in zip(results if many else (results,), letters.results, strict=True):
            up = [
                tensors[0].shape[0] if letter == "N" else extent * factors.get(letter, 1)
                for letter, extent in zip(text, result.shape, strict=False)
            ]
            shape = torch.Size([*up, *result.shape[len(up) :]])
            placements = [Partial() if letter and letter not in text else _placement(text, letter) for letter in shared]
            strides = tuple(dense_in_order(shape, result.stride()))
            found.append(DTensor.from_local(result, mesh, placements, run_check=False, shape=shape, stride=strides))
    return tuple(found) if many else found[0]


def _placement(text: str, letter: str) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    return Shard(text.index(letter)) if letter and letter in text else Replicate()


def _shared(mesh: Any, letters: Letters, tensors: Mapping[int, Any], groups: int) -> tuple[list[str], dict[str, int]]:
    """The letter that each dimension of the mesh shares out, "" for none; among how many devices all of them do."""
    shared: list[str] = []
    factors: dict[str, int] = {}
    for dim in range(mesh.ndim):
        size = mesh.size(dim)

        def whole(letter: str, size: int = size) -> bool:
            """Whether every device gets as much, so that none is left without a channel."""
            parts = factors.get(letter, 1) * size
            extents = [
                t.shape[letters.arguments[place].index(letter)]
                for place, t in tensors.items()
                if letter in letters.arguments[place]
            ]
            return all(n % parts == 0 for n in ([*extents, groups] if letter == "G" else extents))

        def cost(letter: str, dim: int = dim, size: int = size) -> float:
            moved = [
                _moved(t, t.placements[dim], _placement(letters.arguments[place], letter), size)
                for place, t in tensors.items()
            ]
            return sum(moved)

        there = [letter for letter in "NGKC" if any(letter in text for text in letters.arguments.values())]
        possible = ["", *(letter for letter in there if letter == "N" or whole(letter))]
        if letters.changed is not None:
            state = tensors[letters.changed]
            text = letters.arguments[letters.changed]
            possible = [letter for letter in possible if _placement(text, letter) == state.placements[dim]]
            if not possible:
                raise RuntimeError(
                    f"state is changed in place: it must be replicated, or sharded along its batch or, in equal parts, "
                    f"its channels, but got {state.placements} of {list(state.shape)}"
                )
        best = min(possible, key=cost)
        shared.append(best)
        if best:
            factors[best] = factors.get(best, 1) * size
    return shared, factors


def _moved(t: Tensor, have: Any, want: Any, size: int) -> float:
    """Bytes, about, that a device receives to have a tensor placed otherwise; one where it only drops some."""
    whole = t.numel() * t.element_size()
    if have == want:
        return 0
    if have.is_replicate():
        return 1
    if have.is_partial():
        return whole if want.is_shard() else 2 * whole
    return whole / size if want.is_shard() else whole


def _scaled(shape: Sequence[int], text: str, factors: Mapping[str, int], batch: int) -> list[int]:
    """A device's part of a shape."""
    parts = [batch if letter == "N" else n // factors.get(letter, 1) for letter, n in zip(text, shape, strict=False)]
    return [*parts, *shape[len(parts) :]]


def dense_in_order(shape: Sequence[int], like: Sequence[int]) -> list[int]:
    """The strides of a dense tensor of this shape whose dimensions lie in the order that those strides have.

    >>> dense_in_order((2, 3, 4), (100, 1, 7))
    [12, 1, 3]
    """
    strides, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (like[dim], -dim)):
        strides[dim] = step
        step *= shape[dim]
    return strides


def _register() -> None:
    from torch.distributed.tensor import DTensor

    for name in OPERATORS:
        torch.library.register_torch_dispatch(f"triton_conv::{name}", DTensor, dispatch, lib=schemas.LIBRARY)


later.when_imported("torch.distributed.tensor", _register)
