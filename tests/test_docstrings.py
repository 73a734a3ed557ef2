"""What a reader of `help()` finds: every public name has an example that runs, shapes, dtypes and errors.

A docstring says each of these itself, or sends the reader to one that does: "See `conv2d` for ...".
"""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import triton_conv

PACKAGE = Path(triton_conv.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
PARTS = ["nn", "layers", "config", "fusion", "fold", "convert", "branches"]  # whose __all__ users may import from


def public_names():
    names = {}
    for room in ("triton_conv", *(f"triton_conv.{part}" for part in PARTS)):
        module = importlib.import_module(room)
        for name in module.__all__:
            thing = getattr(module, name)
            if not inspect.ismodule(thing) and not any(thing is known for known in names.values()):
                names[f"{room}.{name}"] = thing
    return names


PUBLIC = public_names()
# Of tensors: what neither takes nor returns any has no shapes and no dtypes.
SETTINGS = {"autotune", "backend", "batch_invariant", "convert", "explicit", "fold_batchnorm", "fuse", "override"}
SETTINGS |= {"Conversion", "Folding", "FusionReport", "Layer", "mapping", "register", "plans"}
SETTINGS |= {"BandedConfig", "BoxConfig", "Config", "DepthwiseConfig"}


def own_doc(thing) -> str:
    """Without what a class inherits from torch."""
    return inspect.cleandoc(thing.__doc__ or "")


def seen_from(text: str) -> list[str]:
    """Docstrings that "See `name`" in a text sends to."""
    flat = " ".join(text.split())
    return [own_doc(named(name)) for name in re.findall(r"[Ss]ee `([\w.]+)`", flat) if named(name) is not None]


def named(name: str):
    last = name.rpartition(".")[2]
    candidates = [thing for path, thing in PUBLIC.items() if path.endswith(f".{last}")]
    return candidates[0] if candidates else None


def says(text: str, word: str, depth: int = 3) -> bool:
    if re.search(word, text):
        return True
    return depth > 0 and any(says(other, word, depth - 1) for other in seen_from(text))


@pytest.mark.parametrize("path", PUBLIC)
def test_public_names_have_an_example_shapes_dtypes_and_errors(path):
    text = own_doc(PUBLIC[path])
    assert ">>> " in text, f"{path} has no example"
    assert says(text, r"\bRaises\b"), f"{path} does not say what it raises"
    if path.rpartition(".")[2] not in SETTINGS:
        assert re.search(r"\bShapes: ", text), f"{path} does not say which shapes"
        assert says(text, r"\bDtypes: "), f"{path} does not say which dtypes"


@pytest.mark.parametrize("path", [p for p, thing in PUBLIC.items() if inspect.isclass(thing)])
def test_public_methods_have_a_docstring(path):
    for base in PUBLIC[path].__mro__:
        if base.__module__.startswith("triton_conv"):
            for name, member in vars(base).items():
                if inspect.isfunction(member) and not name.startswith("_") and name != "extra_repr":
                    assert own_doc(member), f"{base.__name__}.{name} has no docstring"


def test_the_names_that_docstrings_send_to_exist():
    for path, thing in PUBLIC.items():
        for name in re.findall(r"`triton_conv\.([\w.]+)", own_doc(thing)):
            found = triton_conv
            for part in name.rstrip(".").split("."):
                if not hasattr(found, part):
                    importlib.import_module(f"{found.__name__}.{part}")
                found = getattr(found, part, None)
                assert found is not None, f"{path} names triton_conv.{name}"


@pytest.fixture
def settings_as_before():
    before = triton_conv.backends.current()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    triton_conv.backend(before)


SKIPPED = {"triton_conv.tuning.subject", "triton_conv.tuning.sweep", "triton_conv.tuning.training"}
SKIPPED |= {
    "triton_conv.tuning.space",
    "triton_conv.fuzz.shrinking",
}  # their examples want a GPU, or a problem of the reader's


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_docstrings(name, settings_as_before):
    module = importlib.import_module(name)
    names = {**vars(module), "torch": torch, "triton_conv": triton_conv, "__name__": "__main__"}
    result = doctest.testmod(module, extraglobs=names)
    assert (result.attempted > 0) != (name in SKIPPED)
    assert result.failed == 0
