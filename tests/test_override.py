"""Inside `override()` torch's convolutions are ours; outside, and for everything else, nothing changes."""

import threading

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from heard import convolutions
from torch.utils.checkpoint import checkpoint

import triton_conv

aten = torch.ops.aten


def tensors(rank, transposed=False, requires_grad=False):
    x = torch.randn(2, 4, *(7, 6, 5)[:rank], dtype=torch.float64)
    w = torch.randn(*((4, 3) if transposed else (6, 2)), *(3,) * rank, dtype=torch.float64)
    b = torch.randn(6, dtype=torch.float64)
    return [t.requires_grad_(requires_grad) for t in (x, w, b)]


FORWARD = [
    lambda f, x, w, b: f(x, w, b, 2, 1, 2, 2),
    lambda f, x, w, b: f(x, w, b, [2], (1,), torch.Size([1]), 2),
    lambda f, x, w, b: f(x, w, padding="same", groups=2),
    lambda f, x, w, b: f(x, w, None, 1, "valid", 2, 2),
    lambda f, x, w, b: f(input=x, weight=w, bias=b, stride=2, padding=1, dilation=1, groups=2),
    lambda f, x, w, b: f(x[0], weight=w, groups=2),
    lambda f, x, w, b: f(x=x, weight=w, groups=2),
]
TRANSPOSED = [
    lambda f, x, w, b: f(x, w, b, 2, 1, 1, 2, 2),
    lambda f, x, w, b: f(x, w, None, (2,), [1], 0, 2, 1),
    lambda f, x, w, b: f(input=x, weight=w, bias=b, stride=3, padding=1, output_padding=2, groups=2, dilation=2),
    lambda f, x, w, b: f(x[0], weight=w, groups=2),
]


CALLS = [(f"conv{r}d", r, False, call) for r in (1, 2, 3) for call in FORWARD] + [
    (f"conv_transpose{r}d", r, True, call) for r in (1, 2, 3) for call in TRANSPOSED
]


@pytest.mark.parametrize(("name", "rank", "transposed", "call"), CALLS)
def test_every_way_to_pass_the_arguments(name, rank, transposed, call):
    function = getattr(F, name)
    x, w, b = tensors(rank, transposed)
    expected = call(function, x, w, b)
    with triton_conv.override():
        torch.testing.assert_close(call(function, x, w, b), expected)
        (ran,) = convolutions(call, function, x, w, b)
    assert ran.startswith("triton_conv::conv")


def test_dilated_convolution_keeps_its_own_name():
    x, w, _ = tensors(2)
    with triton_conv.override():
        assert convolutions(lambda: F.conv2d(x, w, dilation=2, groups=2)) == ["triton_conv::conv_dilated"]


ALIASES = {
    "torch.conv2d": lambda x, w: torch.conv2d(x, w, None, 2, groups=2),
    "torch.convolution": lambda x, w: torch.convolution(x, w, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 2),
    "torch.convolution by keyword": lambda x, w: torch.convolution(
        x, w, bias=None, stride=[1], padding=[0], dilation=[1], transposed=False, output_padding=[0], groups=2
    ),
    "aten.conv2d": lambda x, w: aten.conv2d(x, w, None, [2, 2], groups=2),
    "aten.conv2d.default": lambda x, w: aten.conv2d.default(x, w, None, [2, 2], [1, 1], [1, 1], 2),
    "aten.conv2d.padding": lambda x, w: aten.conv2d.padding(x, w, None, [1, 1], "same", [1, 1], 2),
    "aten.convolution.default": lambda x, w: aten.convolution.default(
        x, w, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 2
    ),
}


@pytest.mark.parametrize("call", ALIASES.values(), ids=ALIASES)
def test_other_names_of_the_same_function(call):
    x, w, _ = tensors(2)
    expected = call(x, w)
    with triton_conv.override():
        torch.testing.assert_close(call(x, w), expected)
        assert convolutions(call, x, w) == ["triton_conv::conv"]


def test_transposed_torch_convolution():
    x, w, b = tensors(2, transposed=True)
    arguments = (x, w, b, [2, 2], [1, 1], [2, 2], True, [1, 1], 2)
    expected = torch.convolution(*arguments)
    with triton_conv.override():
        torch.testing.assert_close(torch.convolution(*arguments), expected)
        assert convolutions(torch.convolution, *arguments) == ["triton_conv::conv_transpose"]


MODULES = {
    "Conv1d": ("triton_conv::conv", {}),
    "Conv2d": ("triton_conv::conv", {"padding": "same"}),
    "Conv3d": ("triton_conv::conv_dilated", {"dilation": 2}),
    "ConvTranspose1d": ("triton_conv::conv_transpose", {"stride": 2, "output_padding": 1}),
    "ConvTranspose2d": ("triton_conv::conv_transpose", {}),
    "ConvTranspose3d": ("triton_conv::conv_transpose", {"groups": 2}),
    "Conv2d circular": ("triton_conv::conv", {"padding": 1, "padding_mode": "circular"}),
}


@pytest.mark.parametrize("name", MODULES)
def test_torch_modules_compute_outputs_and_gradients_here(name):
    op, kwargs = MODULES[name]
    kind = name.split()[0]
    module = getattr(torch.nn, kind)(4, 6, 3, **kwargs).double()
    x = tensors(int(kind[-2]))[0].requires_grad_()

    def step():
        return torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])

    expected = step()
    with triton_conv.override():
        actual = step()
        ran = convolutions(step)
    torch.testing.assert_close(actual, expected)
    gradient_of_x = "triton_conv::conv" if "transpose" in op else "triton_conv::conv_dgrad"
    assert ran == [op, gradient_of_x, "triton_conv::conv_wgrad"]


def test_backward_after_leaving_is_ours_too():
    x, w, b = tensors(2, requires_grad=True)
    expected = torch.autograd.grad(F.conv2d(x, w, b, groups=2).square().sum(), [x, w, b])
    with triton_conv.override():
        loss = F.conv2d(x, w, b, groups=2).square().sum()
    ran = convolutions(loss.backward)
    assert ran == ["triton_conv::conv_dgrad", "triton_conv::conv_wgrad"]
    torch.testing.assert_close([x.grad, w.grad, b.grad], list(expected))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_right(use_reentrant):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 2, 3)).double()
    x = tensors(2)[0].requires_grad_()
    model(x).square().sum().backward()
    expected = [x.grad, *(p.grad for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    with triton_conv.override():
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close([x.grad, *(p.grad for p in model.parameters())], expected)


def test_nothing_is_left_behind():
    x, w, _ = tensors(2)
    call = lambda: F.conv2d(x, w, groups=2)  # noqa: E731
    torchs = convolutions(call)
    with triton_conv.override():
        assert convolutions(call) == ["triton_conv::conv"]
    assert convolutions(call) == torchs
    assert torchs
    assert "triton_conv" not in torchs[0]
    with pytest.raises(ZeroDivisionError), triton_conv.override():
        _ = 1 / 0
    assert convolutions(call) == torchs
    with pytest.raises(RuntimeError), triton_conv.override():
        F.conv2d(x, w)
    assert convolutions(call) == torchs


def test_nested_and_entered_again():
    x, w, _ = tensors(2)
    call = lambda: F.conv2d(x, w, groups=2)  # noqa: E731
    context = triton_conv.override()
    with context:
        with context, triton_conv.override():
            assert convolutions(call) == ["triton_conv::conv"]
        assert convolutions(call) == ["triton_conv::conv"]
    assert "triton_conv::conv" not in convolutions(call)
    with context:
        assert convolutions(call) == ["triton_conv::conv"]
    assert "triton_conv::conv" not in convolutions(call)


def test_decorator():
    x, w, _ = tensors(2)

    @triton_conv.override()
    def call():
        """Original."""
        return F.conv2d(x, w, groups=2)

    assert convolutions(call) == convolutions(call) == ["triton_conv::conv"]
    assert call.__doc__ == "Original."


def test_calls_of_triton_conv_inside_do_not_recurse():
    x, w, _ = tensors(2)
    module = triton_conv.nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect").double()
    expected = triton_conv.conv2d(x, w, groups=2), module(x)
    with triton_conv.override():
        assert convolutions(lambda: (triton_conv.conv2d(x, w, groups=2), module(x))) == ["triton_conv::conv"] * 2
        torch.testing.assert_close((triton_conv.conv2d(x, w, groups=2), module(x)), expected)


def test_other_functions_pass_through():
    x = tensors(2)[0]
    with triton_conv.override():
        assert torch.equal(F.relu(x), x.clamp(min=0))
        assert F.pad(x, (1, 1)).shape[-1] == x.shape[-1] + 2
        assert F.linear(x, torch.ones(2, 6, dtype=x.dtype)).shape[-1] == 2
        assert F.unfold(x, 3).shape == (2, 36, 20)


def test_only_the_thread_that_entered():
    x, w, _ = tensors(2)
    ran = []
    with triton_conv.override():
        thread = threading.Thread(target=lambda: ran.extend(convolutions(lambda: F.conv2d(x, w, groups=2))))
        thread.start()
        thread.join()
    assert ran
    assert "triton_conv::conv" not in ran


WRONG = {
    "channels": F.conv2d,
    "string": lambda x, w: F.conv2d(x, "w"),
    "no input": lambda x, w: F.conv2d(weight=w),
    "keyword of triton_conv": lambda x, w: F.conv2d(x, w, groups=2, padding_mode="zeros"),
    "stride": lambda x, w: F.conv2d(x, w, stride=0, groups=2),
    "padding string": lambda x, w: F.conv2d(x, w, padding="full", groups=2),
    "padding string of a transposed one": lambda x, w: F.conv_transpose2d(x, w, padding="same"),
    "dtype": lambda x, w: F.conv2d(x.float(), w, groups=2),
    "rank": lambda x, w: torch.convolution(x, w[0, 0, 0], None, [1], [0], [1], False, [0], 1),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_wrong_arguments_raise_torchs_type_of_error(call):
    x, w, _ = tensors(2)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        call(x, w)
    with triton_conv.override(), pytest.raises(expected.type):
        call(x, w)


class Answering(torch.Tensor):
    """A tensor with a convolution of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "mine" if func is torch.conv2d else super().__torch_function__(func, types, args, kwargs or {})


class Plain(torch.Tensor):
    pass


def test_tensors_with_a_convolution_of_their_own_keep_it():
    x, w, _ = tensors(2)
    with triton_conv.override():
        assert F.conv2d(x.as_subclass(Answering), w) == "mine"
        assert convolutions(lambda: F.conv2d(x.as_subclass(Plain), w, groups=2)) == ["triton_conv::conv"]
        assert type(F.conv2d(x.as_subclass(Plain), w, groups=2)) is Plain


def test_symbolic_tracing_inside_sees_torchs_functions():
    class Net(torch.nn.Module):
        def forward(self, x, w):
            return F.conv2d(x, w)

    with triton_conv.override():
        graph = torch.fx.symbolic_trace(Net()).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [torch.conv2d]


@pytest.mark.parametrize("inside", [False, True], ids=["compiled under override", "override in compiled code"])
def test_compiled_whole(inside):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.ReLU(), torch.nn.ConvTranspose2d(6, 2, 3)).double()
    x = tensors(2)[0]
    expected = model(x)
    torch._dynamo.reset()

    def overridden(x):
        with triton_conv.override():
            return model(x)

    compiled = torch.compile(overridden if inside else model, backend="aot_eager", fullgraph=True)
    function = compiled if inside else triton_conv.override()(compiled)
    torch.testing.assert_close(function(x), expected)
    with torch.profiler.profile() as profile:
        function(x)
    ran = {event.key for event in profile.key_averages()}
    assert {"triton_conv::conv", "triton_conv::conv_transpose"} <= ran
