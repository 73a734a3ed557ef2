"""The short way: what it computes, when it is taken, and that settings are obeyed however often a call was made."""

import gc
import importlib
import pkgutil
import tracemalloc
from functools import lru_cache

import pytest
import torch
from test_autotune import install, problems_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import triton_conv
from triton_conv import backends, config, conv_calls, execute, fast, functional, ops, plan, stored
from triton_conv.config import Config
from triton_conv.geometry import Role


@pytest.fixture(autouse=True)
def nothing_remembered():
    fast.forget()
    functional._parameters_of.clear()
    yield
    fast.forget()


@pytest.fixture
def bounds(monkeypatch):
    """The bound calls that were made, in order."""
    made, call = [], fast.Bound.__call__

    def counted(self, *tensors):
        made.append(self)
        return call(self, *tensors)

    monkeypatch.setattr(fast.Bound, "__call__", counted)
    return made


def operands(device, channels=4, dtype=torch.float32, **form):
    torch.manual_seed(channels)
    shapes = (2, channels, 6, 6), (channels, channels, 3, 3)
    x, w = (torch.randn(shape, device=device, dtype=dtype).to(**form) for shape in shapes)
    return x.requires_grad_(), w.requires_grad_(), torch.randn(channels, device=device, dtype=dtype).requires_grad_()


def step(conv, x, w, b, **options):
    y = conv(x, w, b, **options)
    grads = torch.autograd.grad(y, (x, w, b), y.detach().cos())
    return y.detach(), *grads


UNLIMITED = {
    "backends._of_environment",
    "entry._hints",
    "installed._trouble",
    "key.source_hash",
    "tuning.on_device.commit",
    "tuning.remembered._reader",
}

CASES = {
    "plain": (triton_conv.conv2d, {"padding": 1}),
    "strided": (triton_conv.conv2d, {"stride": 2, "padding": (1, 1)}),
    "dilated": (triton_conv.conv2d, {"dilation": 2, "padding": "same"}),
    "circular": (triton_conv.conv2d, {"padding": ((1, 0), 1), "padding_mode": "circular"}),
    "transposed": (triton_conv.conv_transpose2d, {"stride": 2, "padding": 1, "output_padding": 1}),
}


@pytest.mark.parametrize("form", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_the_second_time_is_short_and_equals_the_first(kernels, bounds, name, form):
    conv, options = CASES[name]
    tensors = operands(kernels, memory_format=getattr(torch, form))
    first = step(conv, *tensors, **options)
    assert bounds == []
    second = step(conv, *tensors, **options)
    forward, backward = (Role.FPROP, Role.DGRAD) if conv is triton_conv.conv2d else (Role.DGRAD, Role.FPROP)
    assert [b.role for b in bounds] == [forward, backward, Role.WGRAD]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


MODULES = {
    "plain": lambda nn: nn.Conv2d(4, 4, 3, padding=1),
    "same": lambda nn: nn.Conv2d(4, 4, 3, padding="same", dilation=2),
    "circular": lambda nn: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "transposed": lambda nn: nn.ConvTranspose2d(4, 4, 3, stride=2),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("convert", [False, True], ids=["ours", "converted"])
def test_modules_are_short_the_second_time(kernels, bounds, name, convert):
    module = MODULES[name](torch.nn if convert else triton_conv.nn).to(kernels)
    triton_conv.convert(module)
    x, *_ = operands(kernels)
    first = module(x)
    assert bounds == []
    second = module(x)
    assert len(bounds) == 1
    assert "Again" in type(second.grad_fn).__name__, "it went by the dispatcher"
    assert torch.equal(first, second)


def test_groups_computed_as_one_and_copies_are_short_too(kernels, bounds):
    x = torch.randn(2, 8, 6, 6, device=kernels, dtype=torch.float16)
    w = torch.randn(8, 2, 3, 3, device=kernels, dtype=torch.float16)
    calls = [lambda: triton_conv.conv2d(x, w, groups=4), lambda: triton_conv.conv2d(x[..., ::2], w, groups=4)]
    for call in calls:
        first = call()
        assert torch.equal(call(), first)
    assert len(bounds) == 2


def test_a_short_call_has_gradients_of_gradients(kernels, bounds):
    x, w, b = (t.detach().requires_grad_() for t in operands(kernels, channels=1, dtype=torch.float64))
    x = x.detach()[:1, :, :3, :3].requires_grad_()
    for _ in range(2):
        y = triton_conv.conv2d(x, w, b, padding=1)
        dx, dw = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
        found = torch.autograd.grad((dx * dw).sum(), (x, w))
    assert Role.FPROP in {bound.role for bound in bounds}
    z = torch.nn.functional.conv2d(x, w, b, padding=1)
    dx, dw = torch.autograd.grad(z.square().sum(), (x, w), create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad((dx * dw).sum(), (x, w)))


def test_a_short_call_is_a_node_like_others(kernels, bounds):
    """Memory saved for it is watched, packed by hooks and freed, and a checkpoint may compute it the other way."""
    x, w, b = operands(kernels)
    want = torch.autograd.grad(triton_conv.conv2d(x, w, b).square().sum(), (x, w, b))
    changed = w.detach().clone().requires_grad_()
    y = triton_conv.conv2d(x, changed, b)
    assert len(bounds) == 1
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = triton_conv.conv2d(x, w, b)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        triton_conv.conv2d(x, w, b)
    assert [t.data_ptr() for t in packed] == [x.data_ptr(), w.data_ptr()]
    for cold in (True, False):
        if cold:
            fast.forget()
        y = checkpoint(triton_conv.conv2d, x, w, b, use_reentrant=False)
        for got, wanted in zip(torch.autograd.grad(y.square().sum(), (x, w, b)), want, strict=True):
            assert torch.equal(got, wanted)


def test_gradients_that_nobody_asked_for_are_not_computed(kernels, bounds):
    x, w, b = operands(kernels)
    x, b = x.detach(), b.detach()
    for _ in range(2):
        triton_conv.conv2d(x, w, b).sum().backward()
    assert [bound.role for bound in bounds] == [Role.FPROP, Role.WGRAD]


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_wrong_types_raise_however_often_the_right_one_was_given(kernels, value):
    x, w, _ = operands(kernels)
    for _ in range(2):
        triton_conv.conv2d(x, w, stride=1)
    with pytest.raises(TypeError, match="stride"):
        triton_conv.conv2d(x, w, stride=value)
    if value is True:  # PyTorch looks at the first of a sequence only
        triton_conv.conv2d(x, w, stride=(1, value))
        value = (value, 1)
    with pytest.raises(TypeError, match="stride"):
        triton_conv.conv2d(x, w, stride=value if isinstance(value, tuple) else (1, value))


@pytest.mark.parametrize("wrong", [None, [1.0]])
def test_what_is_no_tensor_raises_however_often_tensors_were_given(kernels, wrong):
    x, w, _ = operands(kernels)
    for _ in range(2):
        triton_conv.conv2d(x, w, padding="same")
    for tensors in ((wrong, w), (x, wrong), (x, w, [1.0])):
        with pytest.raises(TypeError, match="must be Tensor"):
            triton_conv.conv2d(*tensors, padding="same")


def test_float32_precision_is_read_at_each_call(kernels, bounds):
    x, w, _ = operands(kernels)
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for name in ("ieee", "tf32", "ieee"):
            conv.fp32_precision = name
            for _ in range(2):
                triton_conv.conv2d(x.detach(), w.detach())
    finally:
        conv.fp32_precision = before
    assert [b.plan.numerics.precision for b in bounds] == ["ieee", "tf32", "ieee", "ieee"]


def test_a_setting_that_another_thread_changes_meanwhile_is_not_remembered_as_the_old_one(kernels, bounds, monkeypatch):
    """A first call may compile for seconds between what it reads of settings and what it remembers."""
    x, w = (t.detach() for t in operands(kernels)[:2])
    conv, compute = torch.backends.cudnn.conv, execute.execute
    before = conv.fp32_precision

    def interrupted(call):
        output = compute(call)
        conv.fp32_precision = "tf32"
        return output

    try:
        conv.fp32_precision = "ieee"
        with monkeypatch.context() as patch:
            patch.setattr(execute, "execute", interrupted)
            triton_conv.conv2d(x, w)
        conv.fp32_precision = "ieee"
        for _ in range(2):
            triton_conv.conv2d(x, w)
    finally:
        conv.fp32_precision = before
    assert [b.plan.numerics.precision for b in bounds] == ["ieee"]


def test_explicit_configs_and_what_tuning_installs_are_obeyed_at_once(kernels, bounds):
    x, w = (t.detach() for t in operands(kernels)[:2])

    def call():
        return triton_conv.conv2d(x, w)

    (problem,) = problems_of(call)
    call(), call()
    asked = Config(16, 16, 16, num_stages=1)
    with config.explicit({Role.FPROP: asked}):
        call(), call()
    call()
    install([problem], 1e-3, 2e-3)
    call(), call()
    stored.uninstall()
    assert [b.plan.config == asked for b in bounds] == [False, True, False, False]
    assert [b.plan.measured for b in bounds] == [None, None, None, 1e-3]


def test_another_backend_is_obeyed_at_once(kernels, bounds, monkeypatch):
    taken = []
    convolve = backends.convolve
    monkeypatch.setattr(backends, "convolve", lambda *args: taken.append(1) or convolve(*args))
    x, w = (t.detach() for t in operands(kernels)[:2])

    def call():
        return triton_conv.conv2d(x, w)

    install(problems_of(call), 1e-3, 0.5e-3)
    call(), call()
    assert (len(bounds), len(taken)) == (1, 0)
    with triton_conv.backend("auto"):
        call(), call()
        assert (len(bounds), len(taken)) == (1, 2)
        with torch.backends.cudnn.flags(enabled=False):
            call(), call()
        assert (len(bounds), len(taken)) == (2, 2)
    call()
    assert (len(bounds), len(taken)) == (3, 2)
    stored.uninstall()


def test_who_listens_hears_of_calls_that_were_made_before(kernels, bounds):
    x, w, b = operands(kernels)
    for _ in range(2):
        triton_conv.conv2d(x, w, b)
    assert len(bounds) == 1
    with execute.recording() as calls:
        triton_conv.conv2d(x, w, b)
    assert len(calls) == 1
    assert len(problems_of(lambda: triton_conv.conv2d(x, w, b))) == 1
    with torch.profiler.profile() as profile:
        triton_conv.conv2d(x, w, b)
    assert "triton_conv::conv" in {event.name for event in profile.events()}
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        triton_conv.conv2d(x, w, b)
    assert ops.conv in seen


def test_what_is_not_plain_goes_by_the_dispatcher(kernels, bounds):
    x, w, _ = operands(kernels)
    x, w = x.detach(), w.detach()
    for _ in range(2):
        want = triton_conv.conv2d(x, w)
    bounds.clear()
    negated = torch.complex(w, w).conj().imag  # lazily
    assert negated.is_neg()
    torch.testing.assert_close(triton_conv.conv2d(x, negated), -want)
    tangent = torch.func.jvp(lambda t: triton_conv.conv2d(t, w), (x,), (x,))[1]
    torch.testing.assert_close(tangent, want)
    torch.testing.assert_close(torch.vmap(triton_conv.conv2d, (0, None))(x[None], w)[0], want)
    with torch._C._AutoDispatchBelowAutograd():
        assert not triton_conv.conv2d(x, w.clone().requires_grad_()).requires_grad
    assert not fast.alone(x.to("meta"))
    assert not fast.alone(x.to_sparse())


def test_autocast_is_obeyed_and_short(kernels, bounds):
    x, w, b = operands(kernels)
    for _ in range(2):
        with torch.autocast(kernels, torch.float16):
            y = triton_conv.conv2d(x, w, b)
        y.float().sum().backward()
    assert y.dtype == torch.float16
    assert w.grad.dtype == torch.float32
    assert len(bounds) == 3
    assert triton_conv.conv2d(x, w, b).dtype == torch.float32


def test_nothing_is_cast_in_vain_for_long(kernels, monkeypatch):
    """Where a call cannot be remembered the operator alone casts."""
    monkeypatch.setattr(fast, "_bind", lambda call, output: None)
    cast, before = [], ops._autocast
    monkeypatch.setattr(ops, "_autocast", lambda *args: cast.append(1) or before(*args))
    x, w, _ = operands(kernels)
    counts = []
    with torch.autocast(kernels, torch.float16):
        for _ in range(5):
            cast.clear()
            triton_conv.conv2d(x.detach(), w.detach())
            counts.append(sum(cast))
    assert counts[-1] == counts[0]
    assert counts[1] > counts[0]


def test_inference_mode_is_short_and_has_no_gradient(kernels, bounds):
    x, w, b = operands(kernels)
    with torch.inference_mode():
        for _ in range(2):
            y = triton_conv.conv2d(x, w, b)
    assert y.is_inference()
    assert len(bounds) == 1
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        triton_conv.conv2d(y[..., :3, :3], w[:, :, :1, :1], None)


def test_empty_and_unaligned_operands(kernels, bounds):
    x, w, _ = operands(kernels)
    x, w = x.detach(), w.detach()
    for _ in range(2):
        assert triton_conv.conv2d(x[:0], w).shape == (0, 4, 4, 4)
        assert triton_conv.conv2d(x[:, :0], w[:, :0]).abs().sum() == 0
    assert bounds == []
    want = [triton_conv.conv2d(x, w) for _ in range(2)][1]
    moved = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    assert torch.equal(triton_conv.conv2d(moved, w), want)
    assert len(bounds) == 1


def test_as_many_calls_as_you_like_leave_memory_flat(kernels, monkeypatch):
    """Caches are made small here; that each has a limit of its own is looked up below."""
    limit = 16
    monkeypatch.setattr(fast, "LIMIT", limit)
    monkeypatch.setattr(plan, "_make", lru_cache(maxsize=limit)(plan._make.__wrapped__))
    monkeypatch.setattr(conv_calls, "_cached", lru_cache(maxsize=limit)(conv_calls._cached.__wrapped__))
    boxes = config.boxes_of_little_waste.__wrapped__
    monkeypatch.setattr(config, "boxes_of_little_waste", lru_cache(maxsize=limit)(boxes))
    monkeypatch.setattr(fast.Bound, "_launched", lambda self, a, b, bias, output, device: output)
    monkeypatch.setattr(execute, "run", lambda p, call, output: p.launches and output)
    grown = growth(kernels, 40, 80)
    assert len(fast._bound) == limit
    assert len(functional._parameters_of) <= limit
    assert grown < 500, f"{grown:.0f} bytes a shape"


def growth(device, warm: int, more: int) -> float:
    """Bytes by which the host's memory grows with a distinct shape, after the first `warm` ones.

    What is remembered of a call takes thousands; a few come from sizes that are larger numbers.
    """
    w = torch.randn(2, 2, 3, 3, device=device)

    def calls(sizes):
        for size in sizes:
            x = torch.empty(1, 2, 3, size, device=device)
            for _ in range(2):
                triton_conv.conv2d(x, w, padding=(1, size))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = calls(range(10, 10 + warm))
        return (calls(range(10 + warm, 10 + warm + more)) - before) / more
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_ten_thousand_shapes_leave_memory_flat(kernels, monkeypatch):
    """The largest caches that a call fills hold 8192: with all of them full nothing grows."""
    monkeypatch.setattr(fast.Bound, "_launched", lambda self, a, b, bias, output, device: output)
    monkeypatch.setattr(execute, "run", lambda p, call, output: p.launches and output)
    assert growth(kernels, 8200, 1800) < 500


def test_every_cache_has_a_limit_or_few_keys():
    """Of files and devices there are few; whatever is kept by shape forgets."""
    unlimited = set()
    for found in pkgutil.walk_packages(triton_conv.__path__, "triton_conv."):
        if found.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(found.name)).items():
            if hasattr(value, "cache_info") and value.cache_info().maxsize is None:
                unlimited.add(f"{value.__module__.removeprefix('triton_conv.')}.{name}")
    assert unlimited == UNLIMITED
