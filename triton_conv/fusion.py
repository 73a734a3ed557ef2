"""`fuse`: convolutions of a model with what follows them, batch norm, residual and activation, in one kernel.

>>> import torch, triton_conv
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
>>> report = triton_conv.fuse(model)
>>> print(report)
1 of 1 convolution fused with what follows it
  0: batch norm 1, relu
outputs of these differ by rounding: at most 6 eps of the magnitudes added up, see fuse
>>> report.model(torch.randn(1, 3, 8, 8)).shape
torch.Size([1, 8, 6, 6])
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from .convert import class_over
from .fold import Uses, fold, following, obstacle_of_arguments, obstacle_of_class
from .nn import OURS
from .patterns import Activation, Sum, activation, described, is_convolution, module_of, overwritten, summed, written
from .residual import ADDING
from .tracing import NO_FORWARD, Traced, hooked
from .unsupported import check_model

__all__ = ["FusionReport", "fuse"]

# Activations whose output is saved for backward here, and whose input is in PyTorch.
_NEED_OUTPUT = ("relu6", "leaky_relu")


class Fused(NamedTuple):
    """One convolution: its name, what was fused with it in order, and why nothing more was."""

    name: str
    parts: tuple[str, ...]
    left: str

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(self.parts) or f'nothing, as {self.left}'}"


@dataclass(frozen=True)
class FusionReport:
    """What `fuse` made; its length is the number of convolutions that were fused with something.

    model: the fused model.
    convolutions: a `Fused` for each, in the order of `named_modules()` of the model that was given.
    untraced: (module, reason) of each module that torch.fx could not take apart; those inside it were, if they could
    be.

        >>> report = triton_conv.fuse(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU()))
        >>> len(report), report.convolutions, report.untraced
        (1, (Fused(name='0', parts=('relu',), left='the output follows'),), ())

    See `fuse` for what it raises.
    """

    model: Module
    convolutions: tuple[Fused, ...]
    untraced: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return sum(bool(c.parts) for c in self.convolutions)

    def __str__(self) -> str:
        total = len(self.convolutions)
        what = "convolution fused with what follows it" if total == 1 else "convolutions fused with what follows them"
        lines = [f"{len(self)} of {total} {what}", *(f"  {c}" for c in self.convolutions)]
        if len(self):
            lines.append("outputs of these differ by rounding: at most 6 eps of the magnitudes added up, see fuse")
        lines += [f"{name or 'the model'} does not trace: {reason}" for name, reason in self.untraced]
        return "\n".join(lines)


def fuse(model: Module) -> FusionReport:
    """Fuse the convolutions of `model` with what follows them, in a new model, and report what became of each.

        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv, self.norm = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
        ...         self.last = torch.nn.Conv2d(4, 4, 1)
        ...     def forward(self, x):
        ...         y = torch.relu(self.norm(self.conv(x)) + x)
        ...         return y + self.last(y).tanh()
        >>> print(triton_conv.fuse(Block().eval()))
        1 of 2 convolutions fused with what follows them
          conv: batch norm norm, residual, relu
          last: nothing, as tanh follows
        outputs of these differ by rounding: at most 6 eps of the magnitudes added up, see fuse

    Found by torch.fx, in this order: batch norm, where the model is in eval mode (see `fold_batchnorm` for which);
    an activation and a residual, in either order, each at most once. Activations: relu, relu6, leaky_relu, silu, gelu
    (both), sigmoid and hardswish, as modules, functions and methods, in place or not; sums: `+`, `+=`, `torch.add`,
    `add`, `add_`. In training mode batch norms stay, and convolutions are fused with what follows them directly.

    The result is in the report, not in place as `convert` does it: a graph of other calls is another model.
    `report.model` is a `torch.fx.GraphModule` with names of modules and parameters as before, and shares the parameters
    and buffers of `model` but for those that took a batch norm in; so an optimizer made before goes on. `model` stays
    what it was. Where torch.fx cannot trace a module (control flow or asserts that depend on data or shapes; grad
    modes, autocast or checkpointing in its code) it stays what it is and its parts are fused by themselves.
    Convolutions with nothing to fuse stay as they are: `convert`, before or after, makes them ours. What a graph does
    not keep: methods other than forward; parameters and modules that forward does not use, which the state_dict lacks
    too; code that asks `self.training` is fixed to the mode of now; an argument that has a default keeps it, and
    another value raises ValueError. Fuse before wrapping in DDP or FSDP, and before `torch.compile`.

    A residual that is repeated along an axis or has another dtype is found out when the model runs, and added
    afterwards as before. Left alone, with the reason in the report: outputs that something else reads too, convolutions
    called more than once, modules with hooks, subclasses, what something between writes to in place, functions
    (`F.conv2d`).

    Results differ by rounding: what lies between is no longer rounded to the dtype, but kept as the sums are, and
    folded weights are rounded once. With a, the sum of the magnitudes of all that is added up behind an element
    (products, bias, batch norm's mean and shift, residual), and eps that of the dtype, an element differs by at most 4
    eps a times the steepest slope of the activation (at most 1.5), and by what two orders of summation differ by.

    Raises TypeError if `model` is not a `torch.nn.Module`, ValueError if it contains itself, and RuntimeError if
    `copy.deepcopy` cannot copy something that one of its modules holds, a lock for instance.
    """
    check_model("fuse", model)
    model = _copied(model)
    uses = Uses(model)
    found: dict[str, Fused] = {}
    for part in uses.parts:
        made, fused = _Part(part, uses).made()
        found |= {c.name: c for c in fused}
        if made is part.module:
            continue
        for name in uses.names[part.module]:
            owner, _, attribute = name.rpartition(".")
            if not name:
                model = made
            else:
                model.get_submodule(owner)._modules[attribute] = made
    for module, names in uses.names.items():
        if isinstance(module, _ConvNd) and names[0] not in found:
            found[names[0]] = Fused(names[0], (), uses.why_unseen(module))
    order = {names[0]: i for i, names in enumerate(uses.names.values())}
    rows = sorted(found.values(), key=lambda c: order.get(c.name, len(order)))
    untraced = {name: why for name, why in uses.untraced.items() if why != NO_FORWARD}
    return FusionReport(model, tuple(rows), tuple(untraced.items()))


def _copied(model: Module) -> Module:
    """Other modules with the same tensors."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # weight_norm and pruning keep what they compute, which cannot be copied
        tensors |= {id(t): t for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf}
    try:
        return copy.deepcopy(model, tensors)
    except Exception as error:
        raise RuntimeError(f"fuse(): argument 'model' cannot be copied: {type(error).__name__}: {error}") from error


class _Part:
    """The convolutions of one graph."""

    def __init__(self, part: Traced, uses: Uses) -> None:
        self.part, self.uses = part, uses
        self.graph, self.root = part.graph, part.module

    def made(self) -> tuple[Module, list[Fused]]:
        """The module itself if nothing was fused, else one of the graph as it is now; a row for each convolution."""
        rows = []
        for node in self.graph.nodes:
            module = module_of(node, self.root)
            if type(module) is torch.nn.Identity and not hooked(module):
                node.replace_all_uses_with(node.all_input_nodes[0])
                self.graph.erase_node(node)
        for node in reversed(list(self.graph.nodes)):  # of two that could take a sum, the later one does
            module = module_of(node, self.root)
            if is_convolution(node):
                rows.append(Fused(self.part.named(node.name), (), "it is a call of a function, not a module"))
            elif isinstance(module, _ConvNd):
                rows.append(self._fused(node, module))
        if not any(row.parts for row in rows):
            return self.root, rows
        for node in reversed(list(self.graph.nodes)):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
        self.graph.lint()
        made = GraphModule(self.root, self.graph, type(self.root).__name__)
        for name, module in made.named_modules():
            old = self.root.get_submodule(name)
            if module is not old:  # an empty one, put there to hold what the graph calls
                module.training = old.training
                module._non_persistent_buffers_set = old._non_persistent_buffers_set & module._buffers.keys()
        for key in vars(Module()):
            if "hook" in key:
                setattr(made, key, getattr(self.root, key))
        return made, rows

    def _fused(self, node: Node, convolution: _ConvNd) -> Fused:
        name = self.uses.names[convolution][0]
        left = obstacle_of_class(convolution) or obstacle_of_arguments(node, convolution)
        left = left or self.uses.obstacle_to_call(convolution)
        if not left and not convolution.weight.is_floating_point():
            left = f"{convolution.weight.dtype} has no activations"
        if left:
            return Fused(name, (), left)
        chain = _Chain(node, self.root, self.uses)
        while chain.grows():
            pass
        if chain.norm is not None:
            fold(convolution, chain.norm)
        if chain.activation or chain.sum:
            self._rewrite(chain, convolution)
        elif chain.parts:
            self._replace(chain.nodes, node)
        return Fused(name, tuple(chain.parts), chain.left)

    def _rewrite(self, chain: _Chain, convolution: Any) -> None:
        cls = parametrize.type_before_parametrizations(convolution)
        cls = OURS.get(cls, cls)
        convolution.__class__ = class_over(convolution, ADDING[cls] if chain.sum else cls)
        if chain.activation:
            convolution.activation, convolution.negative_slope = chain.activation
        node, last = chain.nodes[0], chain.nodes[-1]
        if chain.sum:
            convolution.residual_after_activation = chain.after
            convolution.in_place = chain.sum.in_place
            with self.graph.inserting_before(last):
                keywords = {**node.kwargs, "residual": chain.sum.other}
                node = self.graph.call_module(str(node.target), node.args, keywords)
            node.meta = dict(chain.nodes[0].meta)
        self._replace(chain.nodes, node)

    def _replace(self, nodes: list[Node], node: Node) -> None:
        nodes[-1].replace_all_uses_with(node)
        for old in reversed(nodes):
            if old is not node:
                self.graph.erase_node(old)


class _Chain:
    """A convolution and what can be done in its kernel: nodes one after another, each the only one to read the last."""

    def __init__(self, node: Node, root: Module, uses: Uses) -> None:
        self.nodes, self.root, self.uses = [node], root, uses
        self.norm: _BatchNorm | None = None
        self.activation: Activation | None = None
        self.sum: Sum | None = None
        self.after = False  # the sum comes after the activation
        self.parts: list[str] = []
        self.left = ""

    def grows(self) -> bool:
        """Takes in the next node, or says in `left` why not."""
        if self.sum and self.activation:
            return False
        last = self.nodes[-1]
        node = following(last, self.root)
        self.left = node if isinstance(node, str) else self._take(node, last)
        return not self.left

    def _take(self, node: Node, last: Node) -> str:
        module = module_of(node, self.root)
        if isinstance(module, _BatchNorm) and len(self.nodes) == 1:
            return self._take_norm(node, module)
        if isinstance(module, _ConvNd) and node.kwargs.get("residual") is last:
            return f"it is the residual of {node.target}"
        function = None if self.activation else activation(node, self.root)
        if function and function.name in _NEED_OUTPUT and any(node in written(u, self.root) for u in node.users):
            return f"{function.name}'s output is written to, and backward needs it"
        if function:
            self.activation = function
            return self._took(node, function.name)
        added = None if self.sum else summed(node, last)
        if not isinstance(added, Sum):
            return added or f"{described(node, self.root)} follows"
        if any(overwritten(value, self.nodes[0], node, self.root) for value in self.nodes[0].all_input_nodes):
            return "its input may be overwritten before its output is added"
        self.sum, self.after = added, self.activation is not None
        return self._took(node, "residual")

    @property
    def _convolution(self) -> Any:
        return module_of(self.nodes[0], self.root)

    def _take_norm(self, node: Node, norm: _BatchNorm) -> str:
        convolution = self._convolution
        if norm.training or convolution.training:
            return f"batch norm {self.uses.names[norm][0]} is in training mode"
        why = self.uses.obstacle(convolution, norm)
        if why:
            return f"batch norm {self.uses.names[norm][0]} stays: {why}"
        self.norm = norm
        return self._took(node, f"batch norm {self.uses.names[norm][0]}")

    def _took(self, node: Node, part: str) -> str:
        self.nodes.append(node)
        self.parts.append(part)
        return ""
