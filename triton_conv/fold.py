"""`fold_batchnorm`: batch norms of a trained model, made part of the convolutions before them.

    >>> import torch, triton_conv
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> print(triton_conv.fold_batchnorm(model))
    1 of 1 batch norm folded

At inference a batch norm is a scale and a shift per channel, (y - mean) * s + shift with s = weight / sqrt(var + eps),
and so is what a convolution with weight s * w and bias s * (b - mean) + shift adds to its sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import Module, Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .convert import reason_to_skip
from .nn import OURS, _Ours
from .patterns import described, module_of
from .tracing import Traced, hooked, traced
from .unsupported import check_model

__all__ = ["Folding", "fold_batchnorm"]

_OF_NORMS = ("running_mean", "running_var", "weight", "bias")
_AXES = {torch.nn.BatchNorm1d: 1, torch.nn.BatchNorm2d: 2, torch.nn.BatchNorm3d: 3}


@dataclass(frozen=True)
class Folding:
    """What `fold_batchnorm` did; its length is the number of batch norms folded, printing it lists the others.

    folded: (convolution, batch norm) by their names in `model.named_modules()`.
    skipped: (batch norm, reason) of every other batch norm.

        >>> model = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3), torch.nn.BatchNorm1d(8)).eval()
        >>> report = triton_conv.fold_batchnorm(model)
        >>> len(report), report.folded, report.skipped
        (1, (('0', '1'),), ())

    See `fold_batchnorm` for what it raises.
    """

    folded: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.folded)

    def __str__(self) -> str:
        total = len(self.folded) + len(self.skipped)
        lines = [f"{len(self)} of {total} batch norm{'s' * (total != 1)} folded"]
        lines += [f"  skipped {name or 'the model itself'}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def fold_batchnorm(model: Module) -> Folding:
    """Fold the batch norms of `model` into the convolutions before them, in place, for inference; report which.

        >>> layers = torch.nn.BatchNorm1d(4), torch.nn.Conv1d(4, 8, 3), torch.nn.BatchNorm1d(8)
        >>> model = torch.nn.Sequential(*layers).eval()
        >>> print(triton_conv.fold_batchnorm(model))
        1 of 2 batch norms folded
          skipped 0: it follows no convolution
        >>> model[2]
        Identity()

    In place, as `convert` is: the model stays the object it was, a folded convolution gets a new weight and bias, its
    batch norm becomes `torch.nn.Identity`. Fold a `copy.deepcopy` to keep the other; a folded model is not to be
    trained.

    What follows what is read off a torch.fx graph of the model, or of those parts of it that trace by themselves, so
    that two neighbours in a `torch.nn.Sequential` are found whatever is around it. (Code that does not trace and takes
    a convolution out of such a Sequential, to call it alone, would get the folded one.) `BatchNorm1d` to `3d` and
    `SyncBatchNorm`, with and without affine parameters, fold into `torch.nn`'s convolutions and ours, plain and
    transposed. Left alone, each with its reason: where something else reads what lies between or calls either module
    again, weights that other modules share or that are parametrized, modules with hooks, subclasses, batch norms
    without running statistics, 16-bit batch norms behind float32 convolutions, parameters that are missing or fit
    neither each other nor the module's own numbers.

    Results differ by rounding. The new weights are computed in float64 and rounded once to the weight's dtype, by at
    most eps / 2 of each (eps: `torch.finfo(dtype).eps`), and what lies between is no longer rounded. With a, the sum of
    the magnitudes of all that is added up behind an element, |x| * |s w| + |s b| + |s mean| + |shift|, that is at most
    2 eps a, and what two orders of summation differ by.

    Raises, before anything is changed, RuntimeError if a module to be folded is in training mode, TypeError if `model`
    is not a `torch.nn.Module`, and ValueError if it contains itself.
    """
    check_model("fold_batchnorm", model)
    uses = Uses(model)
    pairs, skipped = [], dict.fromkeys(m for m in model.modules() if isinstance(m, _BatchNorm))
    for part in uses.parts:
        for node in part.graph.nodes:
            convolution = module_of(node, part.module)
            if not isinstance(convolution, _ConvNd):
                continue
            after = following(node, part.module)
            norm = module_of(after, part.module) if isinstance(after, Node) else None
            if isinstance(norm, _BatchNorm):
                skipped[norm] = obstacle_of_arguments(node, convolution) or uses.obstacle(convolution, norm)
                if not skipped[norm]:
                    pairs.append((convolution, norm))
            elif isinstance(after, str):
                for user in node.users:
                    other = module_of(user, part.module)
                    if isinstance(other, _BatchNorm):
                        skipped[other] = after
    training = [uses.names[m][0] for pair in pairs for m in pair if m.training]
    if training:
        raise RuntimeError(
            f"fold_batchnorm(): {', '.join(map(repr, training))} in training mode; call model.eval() before"
        )
    made = [folded(*pair) for pair in pairs]  # all of them or, without memory, none
    for (convolution, norm), tensors in zip(pairs, made, strict=True):
        _give(convolution, *tensors)
        _replace(model, uses.names[norm])
    return Folding(
        tuple((uses.names[a][0], uses.names[b][0]) for a, b in pairs),
        tuple((uses.names[m][0], reason or uses.why_unseen(m)) for m, reason in skipped.items() if reason != ""),
    )


class Uses:
    """How often the modules and parameters of a model are used, as far as its graphs show."""

    def __init__(self, model: Module) -> None:
        self.parts, self.untraced = traced(model)
        self.names: dict[Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.calls: Counter[Module] = Counter()
        self.owners = Counter(id(p) for m in self.names for p in m._parameters.values())
        for part in self.parts:
            self.calls.update(called(part))
            self.owners.update(id(p) for p in _read(part))

    def obstacle_to_call(self, module: Module) -> str:
        """Why calls of a module cannot be given something else to do; "" if they can."""
        if hooked(module):
            return "it has hooks"
        if self.calls[module] > 1:
            return f"it is called {self.calls[module]} times"
        if self.untraced and len(self.names[module]) > 1:
            return f"it is also {', '.join(map(repr, self.names[module][1:]))}, in code that was not traced"
        return ""

    def obstacle(self, convolution: _ConvNd, norm: _BatchNorm) -> str:
        """Why a convolution cannot take in the batch norm that follows it; "" if it can."""
        for module in (convolution, norm):
            why = self.obstacle_to_call(module)
            if why:
                return f"{self.names[module][0]!r}: {why}"
        return self._obstacle_of_weights(convolution) or _obstacle_of_norm(norm, convolution)

    def _obstacle_of_weights(self, convolution: _ConvNd) -> str:
        name = self.names[convolution][0]
        why = obstacle_of_class(convolution)
        if why:
            return f"{name!r}: {why}"
        if parametrize.is_parametrized(convolution):
            return f"{name!r}: its weight is parametrized"
        for key, p in convolution._parameters.items():
            if p is not None and type(p) is not Parameter:
                return f"{name!r}: its {key} is a {type(p).__name__}"
            if p is not None and self.owners[id(p)] > 1:
                return f"{name!r}: its {key} is used elsewhere too"
        return ""

    def why_unseen(self, module: Module) -> str:
        """Why a module is followed or preceded by nothing, as far as is known."""
        if self.calls[module]:
            return "it follows no convolution"
        for name in self.names[module]:
            around = [n for n in self.untraced if not n or name == n or name.startswith(f"{n}.")]
            if around:
                around.sort(key=len)
                return f"{around[-1] or 'the model'!r} cannot be traced: {self.untraced[around[-1]]}"
        return "nothing calls it"


def called(part: Traced) -> Iterator[Module]:
    for node in part.graph.nodes:
        module = module_of(node, part.module)
        if module is not None:
            yield module


def _read(part: Traced) -> Iterator[object]:
    """Tensors that the graph reads by itself."""
    for node in part.graph.nodes:
        if node.op == "get_attr" and node.users:
            owner, _, name = str(node.target).rpartition(".")
            yield getattr(part.module.get_submodule(owner), name)


def following(node: Node, root: Module) -> Node | str:
    """The only node that reads what this one returns, beyond modules that do nothing; or in words why there is none."""
    while True:
        users = list(node.users)
        if len(users) != 1:
            return f"{len(users)} others read its output: {', '.join(described(u, root) for u in users)}"
        module = module_of(users[0], root)
        if type(module) is not torch.nn.Identity or hooked(module):
            return users[0]
        node = users[0]


def obstacle_of_arguments(node: Node, convolution: _ConvNd) -> str:
    """Why a call of a convolution is more than that; "" if it is not."""
    given = [*node.args[2 if convolution.transposed else 1 :], node.kwargs.get("residual")]
    return "it is given a residual" if any(a is not None for a in given) else ""


def obstacle_of_class(convolution: _ConvNd) -> str:
    """Why a convolution is not known to be what its parameters say."""
    cls = parametrize.type_before_parametrizations(convolution)
    if cls not in OURS and cls not in OURS.values():
        base = cls.__mro__[1] if isinstance(convolution, _Ours) else None
        return f"{cls.__qualname__} is a subclass of {base.__name__}" if base else reason_to_skip(convolution)
    why = _obstacle_of_parameters(convolution)
    if why:
        return why
    patched = sorted({"forward", "_conv_forward"} & vars(convolution).keys())
    if patched:
        return f"{patched[0]} was replaced on the instance"
    if getattr(convolution, "activation", None) or getattr(convolution, "has_scale", False):
        return "it has an activation or a scale of its own"
    return ""


def _obstacle_of_parameters(convolution: Any) -> str:
    """Why a convolution has not the parameters that its numbers ask for."""
    weight: Any = getattr(convolution, "weight", None)
    bias: Any = getattr(convolution, "bias", "")
    if is_lazy(weight):
        return "its input channels are not known yet"
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        return f"its {'bias' if isinstance(weight, Tensor) else 'weight'} is missing"
    channels = (convolution.in_channels, convolution.out_channels)
    first, second = channels if convolution.transposed else channels[::-1]
    shape = (first, second // convolution.groups, *convolution.kernel_size)
    if tuple(weight.shape) != shape or weight.layout is not torch.strided:
        return f"its weight is {list(weight.shape)}, {weight.layout}, and not {list(shape)}"
    if bias is not None and (bias.shape != (convolution.out_channels,) or bias.device != weight.device):
        return f"its bias {list(bias.shape)} on {bias.device} does not fit its weight {list(shape)} on {weight.device}"
    return ""


def _obstacle_of_norm(norm: _BatchNorm, convolution: _ConvNd) -> str:
    axes = _AXES.get(type(norm))
    mean, var, gain, shift = (getattr(norm, name, "") for name in _OF_NORMS)
    if axes is None and type(norm) is not torch.nn.SyncBatchNorm:
        return f"{type(norm).__qualname__} is a class of its own"
    if axes not in (None, len(convolution.kernel_size)) or norm.num_features != convolution.out_channels:
        return f"{type(norm).__name__}({norm.num_features}) does not fit the convolution before it"
    if "forward" in vars(norm):
        return "forward was replaced on the instance"
    if mean is None or var is None:
        return "it has no running statistics"
    if parametrize.is_parametrized(norm):
        return "its parameters are parametrized"
    if not isinstance(norm.eps, Real):
        return f"its eps is {norm.eps!r}"
    for name, t in zip(_OF_NORMS, (mean, var, gain, shift), strict=True):
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.shape != mean.shape or t.shape != (norm.num_features,):
            return f"its {name} is not one of {norm.num_features} numbers"
        if t.device != convolution.weight.device:
            return f"its {name} is on {t.device} and the convolution on {convolution.weight.device}"
    if mean.dtype not in (torch.float32, convolution.weight.dtype) or not convolution.weight.is_floating_point():
        return f"it is {mean.dtype} and the convolution {convolution.weight.dtype}"
    return ""


def fold(convolution: _ConvNd, norm: _BatchNorm) -> None:
    """Gives the convolution weight and bias of both."""
    _give(convolution, *folded(convolution, norm))


def _give(convolution: _ConvNd, weight: Tensor, bias: Tensor) -> None:
    old = convolution.weight
    convolution.weight = Parameter(weight, requires_grad=old.requires_grad)
    convolution.bias = Parameter(bias, requires_grad=old.requires_grad)


@torch.no_grad()
def folded(convolution: _ConvNd, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of both, computed in float64 and rounded once."""
    w, mean, var = convolution.weight, norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    gain = torch.rsqrt(var.double() + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    shift = -mean.double() if convolution.bias is None else convolution.bias.double() - mean.double()
    shift = shift * gain if norm.bias is None else shift * gain + norm.bias.double()
    per_filter = gain.reshape(-1, *[1] * (w.dim() - 1))
    if convolution.transposed:  # (C, K / groups, ...): a group's channels beside each other, groups below each other
        per_filter = gain.reshape(convolution.groups, 1, -1, *[1] * (w.dim() - 2))
        weight = (w.double().unflatten(0, (convolution.groups, -1)) * per_filter).flatten(0, 1)
    else:
        weight = w.double() * per_filter
    like = torch.empty_like(w)  # in the memory format of the weight
    return like.copy_(weight), shift.to(w.dtype)


def _replace(model: Module, names: Sequence[str]) -> None:
    for name in names:
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._modules[attribute] = torch.nn.Identity()
