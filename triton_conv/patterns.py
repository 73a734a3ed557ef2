"""What nodes of a torch.fx graph compute: activations, sums, what writes to tensors that others read."""

from __future__ import annotations

import inspect
import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.nn import Module, functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .tracing import hooked


class Activation(NamedTuple):
    """An activation by the name that `triton_conv.conv2d` knows it by."""

    name: str
    slope: float = 0.01


_FUNCTIONS: dict[Any, str] = {
    functional.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    functional.relu6: "relu6",
    functional.leaky_relu: "leaky_relu",
    functional.leaky_relu_: "leaky_relu",
    functional.silu: "silu",
    functional.gelu: "gelu",
    functional.hardswish: "hardswish",
    functional.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
}
_MODULES: dict[type, str] = {
    torch.nn.ReLU: "relu",
    torch.nn.ReLU6: "relu6",
    torch.nn.LeakyReLU: "leaky_relu",
    torch.nn.SiLU: "silu",
    torch.nn.GELU: "gelu",
    torch.nn.Hardswish: "hardswish",
    torch.nn.Sigmoid: "sigmoid",
}
_SUMS = {operator.add: False, operator.iadd: True, torch.add: False, "add": False, "add_": True}  # whether in place


def module_of(node: Node, root: Module) -> Module | None:
    """The module that the node calls."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def activation(node: Node, root: Module) -> Activation | None:
    """What the node applies to each element of its only input, if it is one of those that kernels can apply."""
    module = module_of(node, root)
    if len(node.all_input_nodes) != 1:
        return None
    if module is not None:
        name = _MODULES.get(type(module))
        if name is None or hooked(module):
            return None
        settings = vars(module)
    elif node.op in ("call_function", "call_method"):
        name = _FUNCTIONS.get(node.target)
        settings = {"negative_slope": node.args[1]} if name == "leaky_relu" and len(node.args) > 1 else {}
        settings |= node.kwargs
    else:
        return None
    if name == "gelu":
        how = settings.get("approximate", "none")
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(how) if isinstance(how, str) else None
    if name != "leaky_relu":
        return None if name is None else Activation(name)
    slope = settings.get("negative_slope", 0.01)
    return Activation(name, float(slope)) if isinstance(slope, (int, float)) else None


class Sum(NamedTuple):
    """`value` + `other`; in place if it writes to `value`."""

    other: Node
    in_place: bool


def summed(node: Node, value: Node) -> Sum | str | None:
    """The sum of `value` and something else that the node is; in words why it is none that kernels can do; or None."""
    if node.op not in ("call_function", "call_method") or node.target not in _SUMS:
        return None
    operands = [*node.args, *(node.kwargs[key] for key in ("input", "other") if key in node.kwargs)]
    if len(operands) != 2 or node.kwargs.get("alpha", 1) != 1 or "out" in node.kwargs:
        return "the sum has alpha or out"
    if operands[0] is operands[1]:
        return "it is added to itself"
    other = operands[1] if operands[0] is value else operands[0]
    if not isinstance(other, Node):
        return f"{other!r} is added, not a tensor"
    if _SUMS[node.target] and operands[0] is not value:
        return "it is added in place to another tensor"
    return Sum(other, _SUMS[node.target])


_CONVOLUTIONS = {f"conv{rank}d" for rank in (1, 2, 3)} | {f"conv_transpose{rank}d" for rank in (1, 2, 3)}


def is_convolution(node: Node) -> bool:
    """Whether the node calls a function that is one, of PyTorch's or ours."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _CONVOLUTIONS


def described(node: Node, root: Module) -> str:
    """What the node does, in few words."""
    module = module_of(node, root)
    if module is not None:
        return f"{type(module).__name__} {node.target}"
    target = node.target
    return {"output": "the output"}.get(node.op) or (target if isinstance(target, str) else target.__name__)


# ---------------------------------------------------------------------------------------------------------------------
# A convolution that takes a residual moves down to the sum: may what it reads have changed by then?


def overwritten(value: Node, after: Node, before: Node, root: Module) -> bool:
    """Whether anything between the two nodes may write to what `value`, older than `after`, holds."""
    between, base = _between(after, before), _origin(value, root)
    new = {after, *between}
    for node in between:
        for target in written(node, root):
            origin = _origin(target, root)
            if origin in new:
                continue  # shares no memory with what is older
            if origin is None or base is None or origin is base:
                return True
    return False


def _between(after: Node, before: Node) -> list[Node]:
    nodes, node = [], after.next
    while node is not before:
        nodes.append(node)
        node = node.next
    return nodes


_IN_PLACE = {f for name, f in vars(operator).items() if name[:1] == "i" and f"__{name}__" in dir(operator)}
_IN_PLACE |= {operator.setitem}
_OUT_OF_PLACE = {operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.mul, torch.cat}
_LAYERS = (_ConvNd, _NormBase, torch.nn.Linear, torch.nn.GroupNorm, torch.nn.LayerNorm)
_PURE = {"torch", "_operator", "operator", "builtins", "math", "triton_conv"}


def _origin(node: Node, root: Module) -> Node | None:
    """The node that allocated what this one returns, as far as is known."""
    while not _allocates(node, root):
        if node.args and node.args[0] in written(node, root) and isinstance(node.args[0], Node):
            node = node.args[0]
        else:
            return None
    return node


def _allocates(node: Node, root: Module) -> bool:
    module = module_of(node, root)
    if module is None:
        return node.op == "call_function" and node.target in _OUT_OF_PLACE and "out" not in node.kwargs
    return not hooked(module) and (
        isinstance(module, _LAYERS) or (type(module) in _MODULES and not getattr(module, "inplace", False))
    )


def written(node: Node, root: Module) -> list[Node]:
    """Nodes whose tensors the node may write to."""
    first = [n for n in node.args[:1] if isinstance(n, Node)]
    module = module_of(node, root)
    if module is not None:
        known = type(module).__module__.startswith("torch.nn.") or isinstance(module, _ConvNd)
        if not known or hooked(module):
            return node.all_input_nodes
        return first if getattr(module, "inplace", False) else []
    if node.op == "call_method":
        name = str(node.target)
        return first if name.endswith("_") and not name.endswith("__") else []
    if node.op != "call_function":
        return []
    target: Any = node.target
    if target in _IN_PLACE or getattr(target, "__name__", "_").endswith("_"):
        return first
    if "out" in node.kwargs or str(getattr(target, "__module__", "")).partition(".")[0] not in _PURE:
        return node.all_input_nodes
    return first if _asks_in_place(node) else []


def _asks_in_place(node: Node) -> bool:
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    try:
        position = list(inspect.signature(node.target).parameters).index("inplace")  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return len(node.args) > position and bool(node.args[position])
