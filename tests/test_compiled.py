"""torch.compile: one graph, few of them over many sizes, layouts as predicted, and what follows a convolution fused."""

import copy
import re

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code

import triton_conv

pytestmark = pytest.mark.filterwarnings("ignore:dynamo_pgo", "ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Net(torch.nn.Module):
    """Every kind of convolution that a graph may meet, with a residual between."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular")
        self.norm = torch.nn.BatchNorm2d(16)
        self.second = torch.nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=2, bias=False)
        self.up = torch.nn.ConvTranspose2d(16, 8, 2, stride=2)

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)))
        return torch.sigmoid(self.up(torch.relu(self.second(y) * 2 + y)))


def converted():
    torch.manual_seed(0)
    net = Net()
    assert len(triton_conv.convert(net)) == 3
    return net


def image(*size, batch=2):
    return torch.randn(batch, 8, *size, requires_grad=True)


def step(function, x, parameters):
    y = function(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return y, torch.autograd.grad((y * weights).sum(), [x, *parameters])


def assert_same_step(compiled, net, x):
    (y, gradients), (z, wanted) = (step(f, x, net.parameters()) for f in (compiled, net))
    assert y.stride() == z.stride()
    assert [g.stride() for g in gradients] == [g.stride() for g in wanted]
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients, wanted, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Graphs


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_graph_forward_and_backward(dynamic):
    net = converted()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=dynamic)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert_same_step(compiled, net, image(12, 16).detach().to(memory_format=memory_format).requires_grad_())
    assert not counters["graph_break"]


def graphs(function, inputs, mark=(), **options):
    """How many graphs are compiled for all these inputs."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, **options)
    with torch._dynamo.config.patch(error_on_recompile=False, fail_on_recompile_limit_hit=True):
        for x in inputs:
            for dim in mark:
                torch._dynamo.mark_dynamic(x, dim)
            compiled(x)
    return counter.frame_count


def fifty_images():
    return [torch.randn(2 + size % 3, 8, size, 2 * size + 6) for size in range(9, 59)]


def test_fifty_image_sizes_are_two_graphs():
    """The one of the first size and the one of every size, as for PyTorch's own convolutions."""
    ours, theirs = converted().eval(), Net().eval()
    assert graphs(ours, fifty_images()) == graphs(theirs, fifty_images()) == 2


@pytest.mark.parametrize("options", [{"mark": (0, 2, 3)}, {"dynamic": True}], ids=["marked", "dynamic"])
def test_fifty_image_sizes_known_to_change_are_one_graph(options):
    assert graphs(converted().eval(), fifty_images(), **options) == 1


def causal(x):
    y, state = triton_conv.causal_conv1d(x, torch.ones(8, 4), None, "silu", return_final_state=True)
    return triton_conv.causal_conv1d_update(y[:, :, 0], state, torch.ones(8, 4))


def separable(x):
    return triton_conv.separable_conv1d(x, torch.ones(8, 1, 3), torch.ones(5, 8, 1), padding="same").relu()


@pytest.mark.parametrize("function", [causal, separable])
def test_fifty_lengths_are_two_graphs(function):
    lengths = [torch.randn(2, 8, size) for size in range(9, 59)]
    assert graphs(function, lengths) == 2
    assert graphs(function, lengths, mark=(2,)) == 1


def test_override_inside_compiled_code_is_two_graphs_too():
    net = Net().eval()

    @triton_conv.override()
    def overridden(x):
        return net(x)

    assert graphs(overridden, fifty_images()[:3]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# With what else scripts do


def lazy():
    model = triton_conv.nn.LazyConv2d(4, 3)
    return model, model


def weight_normed():
    model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(8, 4, 3))
    triton_conv.convert(model)
    return model, model


def hooked():
    model = triton_conv.nn.Conv2d(8, 4, 3)
    model.register_forward_hook(lambda module, args, y: y * 2)
    return model, model


def checkpointed():
    model = torch.nn.Sequential(triton_conv.nn.Conv2d(8, 4, 3), torch.nn.ReLU(), triton_conv.nn.Conv2d(4, 4, 3))
    return model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)


def autocast():
    model = triton_conv.nn.ConvTranspose2d(8, 4, 3)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    return model, run


def sized():
    model = triton_conv.nn.ConvTranspose2d(8, 4, 3, stride=2)
    return model, lambda x: model(x, output_size=[2 * n + 2 for n in x.shape[2:]])


def per_sample():
    model = triton_conv.nn.Conv2d(8, 4, 3)
    parameters = dict(model.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    return None, lambda x: torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["weight"]


def directional():
    model = triton_conv.nn.Conv2d(8, 4, 3)
    return None, lambda x: torch.func.jvp(model, (x,), (x,))[1]


def updated():
    weight = torch.randn(8, 4)

    def run(x):
        state = torch.ones(2, 8, 3)
        y = triton_conv.causal_conv1d_update(x[:, :, 0, 0], state, weight)
        return y.sum() + state

    return None, run


SCRIPTS = [lazy, weight_normed, hooked, checkpointed, autocast, sized, per_sample, directional, updated]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_scripts_compile_whole(script):
    model, run = script()
    x = image(6, 7).detach()
    y = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, run(x))
    if model is not None:
        gradients, wanted = (torch.autograd.grad(z.float().square().sum(), model.parameters()) for z in (y, run(x)))
        torch.testing.assert_close(gradients, wanted)


def test_a_backward_pass_compiled_by_itself():
    """Compiled autograd reads the graph that eager code recorded, whatever its parameters, and compiles that."""
    from torch._dynamo import compiled_autograd

    def loss(model, x):
        y = triton_conv.causal_conv1d(model(x).flatten(2), torch.ones(4, 3), activation="silu")
        return y.square().sum()

    for mode in ("circular", "zeros"):
        model = torch.nn.Sequential(
            triton_conv.nn.Conv2d(8, 6, 3, padding=1, padding_mode=mode), triton_conv.nn.ConvTranspose2d(6, 4, 3)
        )
        x = image(6, 7).detach()
        wanted = torch.autograd.grad(loss(model, x), model.parameters())
        with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            loss(model, x).backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], list(wanted))


# ---------------------------------------------------------------------------------------------------------------------
# What Inductor makes of it. C++ takes half a minute to compile: these tests run the code without its kernels.


@pytest.fixture
def uncompiled(monkeypatch):
    """Inductor, whose C++ kernels do nothing; operators run, and so does what it asserts of their layouts."""
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *args, **kwargs: lambda *tensors: None)
    monkeypatch.setattr(torch._inductor.cpu_vec_isa, "valid_vec_isa_list", list)
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        yield


def generated(net, x, **options):
    """Lines of Python in the order they run, forward and backward: calls of operators and fused kernels, and copies."""
    compiled = torch.compile(net, fullgraph=True, **options)

    def run():
        y = compiled(x)
        if y.requires_grad:
            y.sum().backward()
        return y

    y, codes = run_and_get_code(run)
    calls = [re.findall(r"triton_conv\.\w+(?=\.default\()|cpp_fused_\w+(?=\()", _body(code)) for code in codes]
    return y, calls


def _body(code):
    return code[code.index("def call(") : code.index("def benchmark_compiled_module")]


def last(net, *size):
    """The model and an image channels-last."""
    x = image(*size).detach().to(memory_format=torch.channels_last)
    return net.to(memory_format=torch.channels_last), x


def test_what_follows_a_convolution_is_one_kernel(uncompiled):
    net, x = last(converted().eval().requires_grad_(False), 12, 16)
    y, (calls,) = generated(net, x)
    kinds = [call if call.startswith("triton_conv") else "fused" for call in calls]
    assert kinds == [
        *("triton_conv.conv", "fused"),  # batch norm, ReLU
        *("triton_conv.conv_dilated", "fused"),  # the factor, the residual, ReLU
        *("triton_conv.conv_transpose", "fused"),  # sigmoid
    ]
    assert "batch_norm" in calls[1]
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layouts_are_those_that_inductor_was_told_of(uncompiled, dynamic):
    """Forward and backward: Inductor asserts the strides of what each operator returns."""
    net, x = last(converted(), 12, 16)
    _, (forward, backward) = generated(net, x.requires_grad_(), dynamic=dynamic)
    operators = [call for call in forward + backward if call.startswith("triton_conv")]
    assert operators == [
        *("triton_conv.conv", "triton_conv.conv_dilated", "triton_conv.conv_transpose"),
        *("triton_conv.conv", "triton_conv.conv_wgrad"),  # of the transposed one
        *("triton_conv.conv_dgrad", "triton_conv.conv_wgrad") * 2,
    ]
    assert all(p.grad.stride() == p.stride() for p in net.parameters())


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_modes(uncompiled, mode):
    net, x = last(converted(), 12, 16)
    expected = copy.deepcopy(net)(x)
    y, (forward, backward) = generated(net, x.requires_grad_(), mode=mode)
    assert sum("triton_conv" in call for call in forward + backward) == 9
    assert (y.shape, y.stride()) == (expected.shape, expected.stride())


def test_what_follows_causal_and_separable_convolutions_is_one_kernel(uncompiled):
    def f(x, w, depthwise, pointwise):
        y = triton_conv.causal_conv1d(x * 2, w, activation="silu").relu() + 1
        return (triton_conv.separable_conv1d(y, depthwise, pointwise) * 3).tanh()

    tensors = torch.randn(2, 8, 20), torch.randn(8, 4), torch.randn(8, 1, 3), torch.randn(6, 8, 1)
    _, (code,) = run_and_get_code(torch.compile(f, fullgraph=True), *tensors)
    calls = re.findall(r"triton_conv\.\w+(?=\.default\()|cpp_fused(?=\w+\()", _body(code))
    assert calls == ["cpp_fused", "triton_conv.causal_conv1d", "cpp_fused", "triton_conv.conv_separable", "cpp_fused"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "max-autotune", "reduce-overhead"])
def test_values_and_layouts_of_compiled_code(mode):
    net, x = last(converted(), 12, 16)
    assert_same_step(torch.compile(net, fullgraph=True, mode=mode), net, x.requires_grad_())
