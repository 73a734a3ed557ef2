"""Graphs of a model by torch.fx: one where all of it traces, else one of each part that traces by itself.

What torch.fx would lose without a word makes a module a part of its own: hooks, a forward put on the instance, grad and
autocast modes that its code changes, checkpointing. An argument of forward that has a default is traced with that
default, and the graph refuses another value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.node import has_side_effect
from torch.nn import Module
from torch.nn.modules.conv import _ConvNd
from torch.overrides import handle_torch_function, has_torch_function

NO_FORWARD = "it has no forward"  # as torch.nn.ModuleList


class Traced(NamedTuple):
    """A module whose forward is a graph, under its name in the model; "" is the model itself."""

    name: str
    module: Module
    graph: Graph

    def named(self, target: str) -> str:
        """The name in the model of what the graph calls `target`."""
        return joined(self.name, target)


def traced(model: Module) -> tuple[list[Traced], dict[str, str]]:
    """Graphs of `model`, parts before what contains them, and why the other modules that have convolutions have none.

    A module that appears in a graph as one node has a graph of its own, or is in the second, or has no convolution.
    """
    found: list[Traced] = []
    untraced: dict[str, str] = {}
    _visit("", model, found, untraced, set())
    return found[::-1], untraced


def hooked(module: Module) -> bool:
    """Whether calling the module does more than its forward."""
    return any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks),
    )


def joined(name: str, target: str) -> str:
    return f"{name}.{target}" if name and target else name or target


def _visit(name: str, module: Module, found: list[Traced], untraced: dict[str, str], seen: set[Module]) -> None:
    if module in seen or isinstance(module, _ConvNd) or not any(isinstance(m, _ConvNd) for m in module.modules()):
        return
    seen.add(module)
    if _closed(module):
        untraced[name] = f"{type(module).__name__} has been compiled"
        return
    graph, apart, why = _graph(module)
    if graph is None:
        untraced[name] = why
        children = [(n, m) for n, m in module.named_children()]
    else:
        found.append(Traced(name, module, graph))
        children = [(n, m) for n, m in module.named_modules() if m in apart]
    for child_name, child in children:
        _visit(joined(name, child_name), child, found, untraced, seen)


def _graph(module: Module) -> tuple[Graph | None, set[Module], str]:
    """The graph, the modules that are one node of it although they are made of others, or why there is none."""
    apart = {m for m in module.modules() if m is not module and (hooked(m) or _patched(m) or _closed(m))}
    if _patched(module):
        return None, apart, "forward was replaced on the instance"
    if type(module).forward is Module.forward:
        return None, apart, NO_FORWARD
    while True:
        tracer = _Tracer(apart)
        try:
            with torch.inference_mode(False), torch.enable_grad(), _no_autocast():
                graph = tracer.trace(module)
        except Exception as error:
            if tracer.failed is None or tracer.failed in apart or tracer.failed is module:
                return None, apart, f"torch.fx: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            apart = apart | {tracer.failed}
        else:
            graph._tracer_cls = None  # whoever unpickles the graph traces its code again: with the ordinary one
            return graph, apart, ""


def _patched(module: Module) -> bool:
    return "forward" in vars(module) and not _closed(module)


def _closed(module: Module) -> bool:
    """Whether what the module runs is no longer the code of its class."""
    return isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules  # torch.compile's


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _as_outside() -> bool:
    """Whether code runs in the modes that `_graph` set: those of a graph are of whoever calls it."""
    grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    checkpointing = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return grad and not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or checkpointing)


class _Tracer(Tracer):
    def __init__(self, apart: set[Module]) -> None:
        super().__init__(param_shapes_constant=True)
        self.apart, self.failed = apart, None
        self._error: Exception | None = None

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        return m in self.apart or isinstance(m, _ConvNd) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if self._error is not error and not self.is_leaf_module(m, ""):  # whose code raised it, the innermost
                self._error, self.failed = error, m  # type: ignore[assignment]
            raise

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if not _as_outside():
            raise RuntimeError("a part changes grad or autocast mode or is checkpointed, which a graph does not show")
        return super().create_node(*args, **kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return fn, [self._as_by_default(a) if isinstance(a, Proxy) else a for a in args]

    def _as_by_default(self, argument: Proxy) -> Any:
        """Not a proxy where there is a default: code that asks `mask is None` would take the wrong branch."""
        if not argument.node.args or str(argument.node.target).startswith("*"):
            return argument
        default = argument.node.args[0]
        self.create_proxy("call_function", only, (argument, default, str(argument.node.target)), {})
        return default


@has_side_effect
def only(value: Any, default: Any, name: str) -> None:
    """Raises ValueError unless an argument of forward has the value that the graph was made for."""
    if has_torch_function((value,)):
        return handle_torch_function(only, (value,), value, default, name)
    if value is default or (not isinstance(value, torch.Tensor) and type(value) is type(default) and value == default):
        return None
    given = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    raise ValueError(f"forward(): argument '{name}' was {default!r} when the graph was made, and cannot be {given}")
