"""Layers for Hugging Face's `kernels`: its rules, kept without it, and its `kernelize`, where it is installed."""

import copy
import inspect

import pytest
import torch
from heard import convolutions
from torch.nn.utils import parametrizations

import triton_conv
from triton_conv import layers

every_layer = pytest.mark.parametrize("name", layers.NAMES)


def module_of(name, **options):
    """A module of torch's and an input for it."""
    options = {"stride": 2, "padding": 1, **options}
    module = getattr(torch.nn, name)(4, 6, 3, **options).double()
    return module, torch.randn(2, 4, *(7, 6, 5)[: int(name[-2])], dtype=torch.float64)


@every_layer
def test_layers_have_no_state_and_torchs_signature(name):
    layer = getattr(layers, name)
    assert issubclass(layer, torch.nn.Module)
    assert layer.__init__ is torch.nn.Module.__init__
    members = {m for m, _ in inspect.getmembers(layer)} - {m for m, _ in inspect.getmembers(torch.nn.Module)}
    assert members == {"has_backward", "can_torch_compile"}
    assert layer.has_backward
    assert layer.can_torch_compile
    ours, theirs = (inspect.signature(c.forward).parameters for c in (layer, getattr(torch.nn, name)))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@every_layer
def test_the_forward_of_a_layer_serves_torchs_module(name):
    options = {} if "Transpose" in name else {"padding_mode": "circular"}
    module, x = module_of(name, **options)
    expected = torch.autograd.grad(module(x).square().sum(), module.weight)
    module.forward = getattr(layers, name).forward.__get__(module)
    torch.testing.assert_close(torch.autograd.grad(module(x).square().sum(), module.weight), expected)
    assert convolutions(module, x) == ["triton_conv::conv_transpose" if "Transpose" in name else "triton_conv::conv"]


def test_the_forward_of_a_layer_takes_output_sizes():
    module, x = module_of("ConvTranspose2d")
    expected = module(x, output_size=[14, 12])
    module.forward = layers.ConvTranspose2d.forward.__get__(module)
    torch.testing.assert_close(module(x, output_size=[14, 12]), expected)


def test_the_forward_of_a_layer_compiles():
    module, x = module_of("Conv2d")
    expected = module(x)
    module.forward = layers.Conv2d.forward.__get__(module)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), expected)


def test_the_mapping_names_every_layer():
    mapping = layers.mapping(("cuda", "cpu"))
    assert list(mapping) == layers.NAMES
    for name, devices in mapping.items():
        assert list(devices) == ["cuda", "cpu"]
        for repository in devices.values():
            assert repository.load() is getattr(layers, name)
            assert repository == copy.deepcopy(repository)
            assert hash(repository) == hash(copy.deepcopy(repository))


# ---------------------------------------------------------------------------------------------------------------------
# With the library


@pytest.fixture
def kernels():
    found = pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed")
    yield found
    for name in layers.NAMES:
        for attribute in ("kernel_layer_name", "kernel_condition"):
            if attribute in vars(getattr(torch.nn, name)):
                delattr(getattr(torch.nn, name), attribute)


class Custom(torch.nn.Conv2d):
    pass


def test_kernelize_makes_torchs_convolutions_ours(kernels):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        parametrizations.weight_norm(torch.nn.Conv2d(4, 4, 1)),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(4, 2, 2, stride=2),
    ).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).square().sum(), model.parameters())
    layers.register(("cpu",))
    for mode in (
        kernels.Mode.TRAINING,
        kernels.Mode.INFERENCE,
        kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE,
    ):
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
        assert convolutions(model, x) == ["triton_conv::conv"] * 2 + ["triton_conv::conv_transpose"]
        torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), model.parameters()), expected)


def test_kernelize_leaves_subclasses_and_other_devices_alone(kernels):
    layers.register(("cpu",))
    model = torch.nn.Sequential(Custom(3, 4, 3), torch.nn.Conv2d(4, 4, 3, device="cpu"))
    kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    assert convolutions(model, torch.randn(1, 3, 8, 8))[1:] == ["triton_conv::conv"]
    assert "forward" not in vars(model[0])


def test_a_mapping_for_a_class_of_ones_own(kernels):
    @kernels.use_kernel_forward_from_hub("Conv2d")
    class Marked(torch.nn.Conv2d):
        pass

    model, x = Marked(3, 4, 3), torch.randn(1, 3, 8, 8)
    expected = model(x)
    with kernels.use_kernel_mapping(layers.mapping(("cpu",)), inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu", use_fallback=False)
    assert convolutions(model, x) == ["triton_conv::conv"]
    torch.testing.assert_close(model(x), expected)


def test_without_the_library_the_error_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kernels", None)
    with pytest.raises(ImportError, match="kernels"):
        triton_conv.layers.register()
