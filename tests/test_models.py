"""Networks that people use, converted: same outputs, same gradients, same memory formats, nothing left behind."""

import copy
import importlib

import pytest
import torch
from models import MODELS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import triton_conv

every_model = pytest.mark.parametrize("name", MODELS)


class Recorder(TorchDispatchMode):
    """Convolutions, in order, with what they returned."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "conv" in func._schema.name:
            self.calls.append((func._schema.name, result))
        return result

    @property
    def names(self):
        return [name for name, _ in self.calls]

    @property
    def layouts(self):
        return [(name, tuple(y.shape), y.stride()) for name, y in self.calls]


def pair(name, dtype=torch.float64, memory_format=torch.contiguous_format):
    """The model, its converted copy and an input."""
    torch.manual_seed(0)
    make, shape, _ = MODELS[name]
    theirs = laid_out(make().to(dtype), memory_format)
    ours = copy.deepcopy(theirs)
    return theirs, ours, triton_conv.convert(ours), laid_out(torch.randn(shape, dtype=dtype), memory_format)


def laid_out(value, memory_format):
    """A tensor or a module with its 4-D tensors in this format, and 5-D ones in the one of that name."""
    if isinstance(value, torch.nn.Module):
        for p in value.parameters():
            p.data = laid_out(p.data, memory_format)
        return value
    if memory_format is torch.channels_last and value.dim() == 5:
        return value.to(memory_format=torch.channels_last_3d)
    return value.to(memory_format=memory_format) if value.dim() == 4 else value


def step(model, x):
    """The output and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    y = y["out"] if isinstance(y, dict) else y  # torchvision's segmentation
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return y, torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])


def assert_same(ours, theirs, eps):
    """As close as sums of this precision are: gradients before a batch norm cancel to nearly nothing."""
    largest = max(float(t.detach().abs().max()) for t in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=eps * largest)


@every_model
def test_nothing_is_left_behind(name):
    _, ours, report, x = pair(name)
    assert len(report) == MODELS[name][2]
    assert report.skipped == ()
    with Recorder() as ran:
        step(ours, x)
    assert all(op.startswith("triton_conv::") for op in ran.names)
    assert len([op for op in ran.names if op.endswith("conv_wgrad")]) == len(report)


@every_model
def test_outputs_and_gradients_in_double_precision(name):
    theirs, ours, _, x = pair(name)
    (y, gradients), (z, expected) = step(ours, x), step(theirs, x)
    assert_same([y], [z], 1e-13)
    assert_same(gradients, expected, 1e-12)


@every_model
def test_outputs_and_gradients_channels_last(name):
    theirs, ours, _, x = pair(name, torch.float32, torch.channels_last)
    (y, gradients), (z, expected) = step(ours, x), step(theirs, x)
    if y.dim() == 4:  # PyTorch's CPU returns contiguous 3-D ones
        assert y.stride() == z.stride()
    assert_same([y], [z], 1e-5)
    assert_same(gradients, expected, 1e-4)
    for gradient, p in zip(gradients[1:], ours.parameters(), strict=True):
        assert gradient.stride() == p.stride()


@every_model
def test_strides_predicted_without_data_are_the_real_ones(name):
    _, ours, _, x = pair(name, torch.float32, torch.channels_last)
    with Recorder() as real:
        step(ours, x)
    with FakeTensorMode() as mode:
        for module in ours.modules():
            for values in (module._parameters, module._buffers):
                values |= {key: mode.from_tensor(t) for key, t in values.items() if t is not None}
        with Recorder() as predicted:
            step(ours, mode.from_tensor(x))
    assert predicted.layouts == real.layouts
    if x.dim() > 3:
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        assert all(y.is_contiguous(memory_format=last) for _, y in real.calls)


@pytest.mark.slow
def test_compiles_whole():
    _, ours, _, x = pair("WaveNet")
    torch._dynamo.reset()
    expected, wanted = step(ours, x)
    y, gradients = step(torch.compile(ours, backend="aot_eager", fullgraph=True), x)
    torch._dynamo.reset()
    assert_same([y], [expected], 1e-13)
    assert_same(gradients, wanted, 1e-12)


def their(package, make):
    try:
        return make(importlib.import_module(package)).double()
    except (ImportError, RuntimeError) as error:  # the latter from installations that do not fit this PyTorch
        pytest.skip(f"{package}: {error}")


OTHERS = {
    "torchvision.models": [
        (lambda m: m.resnet18(num_classes=4), (2, 3, 32, 32)),
        (lambda m: m.mobilenet_v3_small(num_classes=4), (2, 3, 32, 32)),
        (lambda m: m.convnext_tiny(num_classes=4), (2, 3, 32, 32)),
    ],
    "torchvision.models.segmentation": [
        (lambda m: m.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=4), (2, 3, 32, 32)),
    ],
    "timm": [(lambda m: m.create_model("resnet10t", num_classes=4), (2, 3, 32, 32))],
    "diffusers": [
        (
            lambda m: m.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).decoder,
            (1, 4, 8, 8),
        )
    ],
}


@pytest.mark.parametrize(
    ("package", "number"), [(package, i) for package, made in OTHERS.items() for i in range(len(made))]
)
def test_models_of_other_packages(package, number):
    make, shape = OTHERS[package][number]
    theirs = their(package, make).eval()
    ours, x = copy.deepcopy(theirs), torch.randn(shape, dtype=torch.float64)
    assert triton_conv.convert(ours).skipped == ()
    (y, gradients), (z, expected) = (step(model, x) for model in (ours, theirs))
    assert_same([y], [z], 1e-10)
    assert_same(gradients, expected, 1e-9)
