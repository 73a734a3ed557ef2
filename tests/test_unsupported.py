"""What cannot be done raises, in words that say what to do instead: from functions, from modules, under override."""

import pytest
import torch
from heard import raised
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import triton_conv


def on(device):
    def move(t):
        with FakeTensorMode():
            return torch.empty(t.shape, device=device)

    return move


def named(t):
    if not hasattr(t, "rename"):
        pytest.skip(f"torch {torch.__version__} has no named tensors")
    return t.rename(*"ABCDE"[: t.dim()])


def jagged(t):
    return torch.nested.nested_tensor(list(t), layout=torch.jagged)


# how to make one, the type of error, what to do instead
KINDS = {
    "sparse": (lambda t: t.to_sparse(), RuntimeError, ".to_dense()"),
    "sparse rows": (lambda t: t.flatten(1).to_sparse_csr(), RuntimeError, ".to_dense()"),
    "sparse blocks": (lambda t: torch.ones(4, 4).to_sparse_bsr((2, 2)), RuntimeError, ".to_dense()"),
    "mkldnn": (lambda t: t.to_mkldnn(), RuntimeError, ".to_dense()"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), NotImplementedError, ".dequantize()"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), NotImplementedError, "to_padded_tensor"),
    "jagged": (jagged, NotImplementedError, "to_padded_tensor"),
    "named": (named, RuntimeError, "rename(None)"),
    "mps": (on("mps"), RuntimeError, ".to()"),
    "xpu": (on("xpu"), RuntimeError, ".to()"),
    "xla": (on("xla"), RuntimeError, ".to()"),
}
quiet = pytest.mark.filterwarnings("ignore:.*(quantize|nested|CSR|csr|BSR|Named)")
every_kind = pytest.mark.parametrize("kind", KINDS)


def check(kind, function, *args, argument):
    _, expected, instead = KINDS[kind]
    error = raised(function, *args)
    assert isinstance(error, expected), repr(error)
    assert instead in str(error), error
    if kind != "named":  # which the dispatcher refuses, and it knows no names of arguments
        assert f"{argument} " in str(error)
        assert "(): " in str(error), "the function is named"


def operands(rank):
    return torch.randn(2, 4, *(6,) * rank), torch.randn(4, 4, *(3,) * rank), torch.randn(4)


@quiet
@every_kind
@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "conv_transpose2d"])
def test_kinds_of_tensors_in_functions(name, argument, kind):
    tensors = list(operands(int(name[-2])))
    tensors[argument] = KINDS[kind][0](tensors[argument])
    if kind.startswith("sparse") and name == "conv1d" and argument == 0:
        assert isinstance(raised(functional.conv1d, *tensors), KINDS[kind][1]), "PyTorch raises this too"
    word = ("input", "weight")[argument]
    check(kind, getattr(triton_conv, name), *tensors, argument=word)


@quiet
@every_kind
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_kinds_of_tensors_under_override(name, kind):
    x, w, b = operands(2)
    with triton_conv.override():
        check(kind, getattr(functional, name), KINDS[kind][0](x), w, b, argument="input")


@quiet
@every_kind
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d"])
def test_kinds_of_tensors_in_modules(name, kind):
    module = getattr(triton_conv.nn, name)(4, 4, 3)
    check(kind, module, KINDS[kind][0](operands(int(name[-2]))[0]), argument="input")


@quiet
@every_kind
def test_kinds_of_tensors_in_causal_and_separable_convolutions(kind):
    make = KINDS[kind][0]
    x, w = torch.randn(2, 4, 6), torch.randn(4, 3)
    check(kind, triton_conv.causal_conv1d, make(x), w, argument="x")
    check(kind, triton_conv.causal_conv1d, x, make(w), argument="weight")
    check(kind, triton_conv.causal_conv1d_update, x, make(torch.randn(2, 4, 2)), w, argument="state")
    x, depthwise, pointwise = torch.randn(2, 4, 6), torch.randn(4, 1, 3), torch.randn(5, 4, 1)
    check(kind, triton_conv.separable_conv1d, make(x), depthwise, pointwise, argument="input")
    check(kind, triton_conv.separable_conv1d, x, depthwise, make(pointwise), argument="pointwise")


@quiet
@pytest.mark.parametrize("kind", ["sparse", "quantized", "nested"])
def test_types_of_errors_are_pytorchs(kind):
    x, w, _ = operands(2)
    theirs = raised(functional.conv2d, KINDS[kind][0](x), w)
    assert isinstance(raised(triton_conv.conv2d, KINDS[kind][0](x), w), type(theirs))


@pytest.mark.parametrize(
    ("dtype", "instead"), [(torch.bool, ".to()"), (torch.float8_e5m2, ".to()"), (torch.float8_e4m3fn, "scaled_conv2d")]
)
def test_dtypes_without_a_convolution(dtype, instead):
    x, w, b = (t.to(dtype) for t in operands(2))
    assert instead in str(raised(triton_conv.conv2d, x, w, b))


# ---------------------------------------------------------------------------------------------------------------------
# torch.jit.script

x, w = torch.ones(1, 2, 5), torch.ones(2, 2, 3)


def calls_conv1d(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return triton_conv.conv1d(x, w) + 1


class Calls(torch.nn.Module):
    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return triton_conv.conv1d(x, w)


SCRIPTED = {
    "function": (triton_conv.conv1d, "triton_conv.conv1d"),
    "transposed": (triton_conv.conv_transpose3d, "triton_conv.conv_transpose3d"),
    "scaled": (triton_conv.scaled_conv2d, "triton_conv.scaled_conv2d"),
    "causal": (triton_conv.causal_conv1d, "triton_conv.causal_conv1d"),
    "separable": (triton_conv.separable_conv2d, "triton_conv.separable_conv2d"),
    "caller": (calls_conv1d, "triton_conv.conv1d"),
    "module that calls": (Calls(), "triton_conv.conv1d"),
    "module": (triton_conv.nn.Conv2d(2, 2, 1), "triton_conv.nn.Conv2d"),
    "transposed module": (triton_conv.nn.ConvTranspose2d(2, 2, 1), "triton_conv.nn.ConvTranspose2d"),
    "inside": (torch.nn.Sequential(torch.nn.ReLU(), triton_conv.nn.Conv1d(2, 2, 1)), "triton_conv.nn.Conv1d"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", SCRIPTED)
def test_script_names_what_does_work(name):
    scripted, culprit = SCRIPTED[name]
    with pytest.raises(RuntimeError, match=rf"{culprit} cannot be compiled by torch\.jit\.script") as error:
        torch.jit.script(scripted)
    assert all(word in str(error.value) for word in ("torch.compile", "torch.export", "torch.jit.trace"))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_every_function_refuses_to_be_scripted():
    functions = [getattr(triton_conv, name) for name in triton_conv.__all__ if "_conv" in name or "conv_" in name]
    functions += [triton_conv.conv1d, triton_conv.conv2d, triton_conv.conv3d]
    assert len(functions) > 16
    for function in functions:
        with pytest.raises(RuntimeError, match=rf"triton_conv\.{function.__name__} cannot"):
            torch.jit.script(function)
