"""Models that are broken, or hold what nobody expects, for the functions that change models."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import triton_conv

FUNCTIONS = (triton_conv.convert, triton_conv.fold_batchnorm, triton_conv.fuse)
NO_MODELS = (None, 1, "x", {}, [nn.Conv2d(1, 1, 1)], nn.Conv2d, torch.ones(1), len, object())


class Uncalled(nn.Module):
    def __init__(self):
        """Without that of Module."""


class Block(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Raising(Block):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("x")


def usual() -> nn.Sequential:
    """Two convolutions with a batch norm each."""
    layers = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    model = nn.Sequential(*layers).eval()
    for norm in (layers[1], layers[4]):
        norm.running_mean.normal_()
    return model


def itself(model: nn.Sequential) -> None:
    model[2].around = model


def weight_normed(model: nn.Sequential) -> None:
    nn.utils.weight_norm(model[3])
    model(torch.ones(1, 4, 3, 3))  # keeps a weight that is computed


def replaced(index: int, name: str, value: Any) -> Callable[[nn.Sequential], None]:
    def change(model: nn.Sequential) -> None:
        if name in model[index]._buffers or value is None or not isinstance(value, Tensor):
            setattr(model[index], name, value)
        else:
            setattr(model[index], name, nn.Parameter(value, requires_grad=value.is_floating_point()))

    return change


def without(index: int, name: str) -> Callable[[nn.Sequential], None]:
    return lambda model: delattr(model[index], name)


# What may be wrong with the layers in front (0, 1), or with those behind, met when those may be changed already.
CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "itself inside": itself,
    "a lock": lambda model: setattr(model[3], "lock", threading.Lock()),
    "a generator": lambda model: setattr(model[3], "samples", (i for i in range(3))),
    "a computed tensor": lambda model: setattr(model[3], "twice", model[3].weight * 2),
    "weight_norm": weight_normed,
    "parametrized": lambda model: parametrizations.weight_norm(model[3]) and None,
    "training": lambda model: model.train() and None,
    "one in training": lambda model: model[4].train() and None,
    "a block that raises": Raising,
    "a block": Block,
    "scripted": torch.jit.script,
    "no child": lambda model: model.register_module("none", None),
    "not made": lambda model: Block(Uncalled()),
    "half": lambda model: model[4].half() and None,
    "negative padding": lambda model: nn.Sequential(
        nn.Conv2d(4, 4, 1, padding=-1, padding_mode="reflect"), nn.BatchNorm2d(4)
    ).eval(),
}
for _at, _norm in ((0, 1), (3, 4)):
    for _name in ("weight", "bias"):
        CHANGES |= {f"{_at} without {_name}": without(_at, _name), f"{_norm} without {_name}": without(_norm, _name)}
        CHANGES[f"{_at} of another {_name}"] = replaced(_at, _name, torch.ones(7))
    CHANGES[f"{_at} without weights"] = replaced(_at, "weight", None)
    CHANGES[f"{_at} of integers"] = replaced(_at, "weight", torch.ones(4, 4, 1, 1, dtype=torch.int64))
    CHANGES[f"{_at} of too few"] = replaced(_at, "weight", torch.ones(3, 4, 1, 1))
    CHANGES[f"{_at} on meta"] = lambda model, at=_at: model[at].to("meta") and None
    CHANGES[f"{_norm} on meta"] = lambda model, at=_norm: model[at].to("meta") and None
    for _name in ("running_mean", "running_var"):
        CHANGES |= {f"{_norm} without {_name}": without(_norm, _name)}
        CHANGES |= {f"{_norm} of another {_name}": replaced(_norm, _name, torch.ones(7))}
        CHANGES |= {f"{_norm} with no {_name}": replaced(_norm, _name, None)}
    CHANGES |= {f"{_norm} with eps {eps!r}": replaced(_norm, "eps", eps) for eps in ("x", None)}
    CHANGES[f"{_norm} of other features"] = replaced(_norm, "num_features", 7)


def changed(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = usual()
    return CHANGES[name](model) or model


def state(model: nn.Module) -> dict[str, Any]:
    """Who the modules are, what they hold and how they are set."""
    if any(isinstance(m, Uncalled) for m in model.children()):
        return {}
    return {
        name: (id(m), type(m), m.training, [n for n, _ in m.named_children()], {k: id(t) for k, t in held(m).items()})
        for name, m in model.named_modules()
    }


def held(module: nn.Module) -> dict[str, Any]:
    return dict((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))


def outcome(model: Any, x: Tensor) -> Any:
    try:
        with torch.no_grad():
            return model(x)
    except Exception as error:
        return error


def fault(function: Callable[[Any], Any], name: str) -> str:
    """What is wrong with what a function does to such a model; "" if nothing is."""
    model, x = changed(name), torch.randn(2, 4, 4, 5)
    runs = name != "itself inside" and "meta" not in name
    before, was = (outcome(model, x) if runs else None), state(model)
    told = f"{function.__name__} of a model, {name}: "
    try:
        report = function(model)
    except (TypeError, ValueError, RuntimeError) as error:
        clean = not isinstance(error, RecursionError) and f"{function.__name__}():" in str(error)
        named = "'model'" in str(error) or "training mode" in str(error)
        return "" if clean and named and state(model) == was else f"{told}{error!r}, or it was changed"
    except Exception as error:
        return f"{told}{error!r}"
    if function is triton_conv.fuse and state(model) != was:
        return f"{told}changed what it was given"
    if before is None:
        return ""
    after = outcome(report.model if function is triton_conv.fuse else model, x)
    if isinstance(before, Exception) or isinstance(after, Exception):
        return "" if isinstance(before, Exception) else f"{told}ran before, and then {after!r}"
    return "" if torch.allclose(before, after, rtol=1e-4, atol=1e-4) else f"{told}other values"
