"""Plans that cannot run: configs that fail, workspace that cannot be had; each fault is injected."""

import errno
import gc
import os
import warnings
import weakref

import pytest
import torch
import triton
from configs_at_hand import stamp
from triton.compiler.errors import CompilationError
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources, PTXASError

import triton_conv
from triton_conv import backends, choose, config, conv_calls, execute, fast, plan, recovery, stored, ways
from triton_conv.config import Config
from triton_conv.devices import H200, INTERPRETER
from triton_conv.geometry import Role
from triton_conv.kernels.launch import Launch
from triton_conv.stored import Candidate, Entry

ERRORS = {
    "resources": OutOfResources(300_000, 232_448, "shared memory"),
    "assembler": PTXASError("ptxas exited with 255"),
    "compiler": CompilationError("tl.dot(a, b)", None, "shapes do not fit"),
    "passes": RuntimeError("PassManager::run failed"),
    "launch": RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
}
X, W = torch.randn(2, 16, 4, 8), torch.randn(16, 16, 1, 3)


@pytest.fixture(autouse=True)
def nothing_known():
    def clean():
        recovery.forget()
        fast.forget()
        stored.uninstall()

    clean()
    yield
    clean()


class Launches:
    """Kernels that are launched from here on; those that `fails` picks raise `error` instead."""

    def __init__(self, monkeypatch, fails, error):
        self.seen, self.failed, run = [], [], Launch.run

        def wrapped(launch, tensors):
            if fails(launch):
                self.failed.append(launch)
                raise error
            self.seen.append(launch)
            run(launch, tensors)

        monkeypatch.setattr(Launch, "run", wrapped)


def heard(function, *args, **kwargs):
    """(what a function returns, its warnings of ours as text)"""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args, **kwargs)
    return result, [str(w.message) for w in caught if w.category is RuntimeWarning and "triton_conv" in str(w.message)]


def stages(number):
    return lambda launch: launch.arguments.get("num_stages") == number


def install(call, made, baseline=()):
    """Lets this process find `made` for a call, as if it had been measured."""
    problem = execute.problem_of(call, INTERPRETER)
    (way,) = [p for p in plan.every(problem) if isinstance(p.config, type(made)) and not p.packs and p.bundle == 1]
    what = ways.key_of(problem, way.layout)
    stored.install(
        INTERPRETER.name,
        way.kernel,
        [Entry(*what, "measured", stamp(way.kernel), (Candidate(made, 1e-6),), dict(baseline))],
    )
    return problem


def forward(x=X, w=W):
    return conv_calls.conv_call(x, w, None, [1, 1], [0, 0, 1, 1], [1, 1], 1, "zeros", None)


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_stored_config_that_fails_is_named_once_and_the_next_one_runs(kernels, poisoned, monkeypatch, error):
    x, w = X.to(kernels), W.to(kernels)
    bad = Config(32, 16, 16, num_stages=7)
    install(forward(x, w), bad)
    launched = Launches(monkeypatch, stages(7), error)
    y, told = heard(triton_conv.conv2d, x, w, padding=(0, 1))
    torch.testing.assert_close(y, torch.conv2d(x, w, padding=(0, 1)), atol=1e-4, rtol=1e-4)
    (text,) = told
    assert all(words in text for words in (str(bad), "gather (fprop)", "installed, measured", type(error).__name__))
    again = [heard(triton_conv.conv2d, x, w, padding=(0, 1)) for _ in range(3)]
    assert all(torch.equal(one, y) and not words for one, words in again)
    assert len(launched.failed) == 1
    assert (
        fast.found(conv_calls.conv_call, x, w, None, ((1, 1), (0, 0, 1, 1), (1, 1), 1, "zeros", None)).plan.config
        != bad
    )


def test_what_failed_for_one_size_is_not_tried_for_another_of_its_bucket(kernels, monkeypatch):
    bad = Config(32, 16, 16, num_stages=7)
    for x in (X, torch.randn(2, 16, 4, 9)):
        install(forward(x), bad)
    launched = Launches(monkeypatch, stages(7), ERRORS["resources"])
    told = [
        heard(triton_conv.conv2d, x.to(kernels), W.to(kernels), padding=(0, 1))[1]
        for x in (X, torch.randn(2, 16, 4, 9))
    ]
    assert len(launched.failed) == 1
    assert [len(words) for words in told] == [1, 0]


def test_configs_of_one_place_after_the_other_are_tried_at_last_the_rules():
    def look():
        hidden = stored.generation()[1]
        return next((place for place in stored.PLACES if place not in hidden), "rule")

    assert list(recovery.sources(look)) == ["installed", "user store", "shipped", "rule"]


def test_boxes_that_fail_give_way_to_gathering(kernels, poisoned, monkeypatch):
    x, w = (t.to(kernels, torch.bfloat16, memory_format=torch.channels_last) for t in (X, W))
    assert plan.make(execute.problem_of(forward(x, w), INTERPRETER)).kernel == "box"
    launched = Launches(monkeypatch, lambda launch: launch.name == "box", ERRORS["resources"])
    y, told = heard(triton_conv.conv2d, x, w, padding=(0, 1))
    torch.testing.assert_close(y.float(), torch.conv2d(x.float(), w.float(), padding=(0, 1)), atol=0.1, rtol=0.02)
    assert len(told) == len(launched.failed) == len(set(told)) <= 3
    assert [launch.name for launch in launched.seen] == ["gather"]


def test_where_nothing_can_run_the_first_error_is_raised(kernels, monkeypatch):
    launched = Launches(monkeypatch, lambda launch: True, ERRORS["resources"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(OutOfResources, match="300000"):
            triton_conv.conv2d(X.to(kernels), W.to(kernels), padding=(0, 1))
    assert 1 < len(launched.failed) <= 5


def test_an_explicit_config_is_not_replaced(kernels, monkeypatch):
    mine = Config(32, 16, 16, num_stages=7)
    launched = Launches(monkeypatch, stages(7), ERRORS["resources"])
    with (
        config.explicit({Role.FPROP: mine}),
        pytest.raises(RuntimeError, match="given explicitly for gather") as raised,
    ):
        triton_conv.conv2d(X.to(kernels), W.to(kernels), padding=(0, 1))
    assert str(mine) in str(raised.value)
    assert isinstance(raised.value.__cause__, OutOfResources)
    assert len(launched.failed) == 1
    assert not launched.seen


@pytest.mark.parametrize("words", ["an illegal memory access was encountered", "unspecified launch failure"])
def test_a_device_that_has_failed_is_not_tried_again(kernels, monkeypatch, words):
    launched = Launches(monkeypatch, lambda launch: True, RuntimeError(f"Triton Error [CUDA]: {words}"))
    with pytest.raises(RuntimeError, match=words):
        triton_conv.conv2d(X.to(kernels), W.to(kernels), padding=(0, 1))
    assert len(launched.failed) == 1


@pytest.mark.parametrize("warm", [False, True])
def test_nothing_is_tried_while_a_graph_is_captured(kernels, monkeypatch, warm):
    if warm:
        triton_conv.conv2d(X.to(kernels), W.to(kernels), padding=(0, 1))
    launched = Launches(monkeypatch, lambda launch: True, ERRORS["resources"])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(OutOfResources):
        triton_conv.conv2d(X.to(kernels), W.to(kernels), padding=(0, 1))
    assert len(launched.failed) == 1


RIVALS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("GET was unable to find an engine to execute this"),
]


@pytest.mark.parametrize("error", RIVALS, ids=["memory", "engine"])
def test_where_cudnn_cannot_our_kernels_do(kernels, monkeypatch, error):
    def fail(*args):
        tried.append(args)
        raise error

    tried, x, w = [], X.to(kernels), W.to(kernels)
    monkeypatch.setattr(backends, "convolve", fail)
    install(forward(x, w), Config(32, 16, 16), {"cudnn": 1e-9})
    with triton_conv.backend("auto"):
        y, told = heard(triton_conv.conv2d, x, w, padding=(0, 1))
        again, words = heard(triton_conv.conv2d, x, w, padding=(0, 1))
    torch.testing.assert_close(y, torch.conv2d(x, w, padding=(0, 1)), atol=1e-4, rtol=1e-4)
    assert torch.equal(y, again)
    assert (len(tried), len(told), words) == (1, 1, [])
    assert "cudnn" in told[0]


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class Memory:
    """torch.empty has no room for more than `most` bytes at a time."""

    def __init__(self, monkeypatch, most):
        self.most, self.refused, empty = most, 0, torch.empty

        def limited(*args, **kwargs):
            like = empty(*args, **{**kwargs, "device": "meta"})
            if like.numel() * like.element_size() > self.most:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return empty(*args, **kwargs)

        monkeypatch.setattr(torch, "empty", limited)


def slabs(device, splits):
    """The gradient of W in so many slabs, and what it should be."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(32, 16, 4, 8, generator=generator).to(device) for _ in "xy")  # enough steps for the slabs
    w = W.to(device).requires_grad_()
    call = conv_calls.conv_wgrad_call(
        dy, x, list(W.shape), list(W.stride()), [1, 1], [0, 0, 1, 1], [1, 1], 1, "zeros", None
    )
    problem = install(call, Config(16, 16, 16, splits=splits))
    expected = torch.autograd.grad(torch.conv2d(x.double(), w.double(), padding=(0, 1)), w, dy.double())[0]

    y = triton_conv.conv2d(x, w, padding=(0, 1))

    def gradient():
        return torch.autograd.grad(y, w, dy, retain_graph=True)[0]

    return gradient, expected.float(), problem


@pytest.mark.parametrize("warm", [False, True])
def test_slabs_without_room_are_fewer_and_stay_so(kernels, monkeypatch, warm):
    gradient, expected, problem = slabs(kernels, 4)
    if warm:
        for _ in range(2):
            gradient()
    memory = Memory(monkeypatch, 3 * W.numel() * 4)
    dw, told = heard(gradient)
    torch.testing.assert_close(dw, expected, atol=1e-3, rtol=1e-4)
    assert plan.make(problem).config.splits == 2
    assert len(told) == 1
    assert f"{4 * W.numel() * 4} bytes of workspace" in told[0]
    assert "other bits" in told[0]
    refused, memory.most = memory.refused, 2**40
    again = [heard(gradient) for _ in range(2)]
    assert all(torch.equal(dw, one) and not words for one, words in again)
    assert memory.refused == refused
    recovery.forget()
    assert plan.make(problem).config.splits == 4


def test_without_any_room_there_are_no_slabs(kernels, monkeypatch):
    gradient, expected, problem = slabs(kernels, 4)
    Memory(monkeypatch, W.numel() * 4 - 1)
    torch.testing.assert_close(heard(gradient)[0], expected, atol=1e-3, rtol=1e-4)
    assert plan.make(problem).workspace_bytes == 0


def test_copies_without_room_are_not_made(kernels, poisoned, monkeypatch):
    """A plan that copies its operands to channels-last gives way to one that reads them as they lie."""
    x, w = X.to(kernels, torch.bfloat16), W.to(kernels, torch.bfloat16)
    problem = execute.problem_of(forward(x, w), INTERPRETER)
    found = plan.every(problem)
    (copies,) = [p for p in found if p.packs]
    monkeypatch.setattr(plan, "choice", lambda found: copies)
    contiguous = torch.Tensor.contiguous

    def refuse(t, **kwargs):
        if t.dim() == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return contiguous(t, **kwargs)

    stored.renew()
    monkeypatch.setattr(torch.Tensor, "contiguous", refuse)
    y, told = heard(triton_conv.conv2d, x, w, padding=(0, 1))
    torch.testing.assert_close(y.float(), torch.conv2d(x.float(), w.float(), padding=(0, 1)), atol=0.1, rtol=0.02)
    assert len(told) == 1
    assert f"{copies.workspace_bytes} bytes" in told[0]
    assert plan.make(problem).workspace_bytes == 0


def test_memory_that_nothing_helps_against_says_how_much_and_for_what(kernels, monkeypatch):
    launched = Launches(monkeypatch, lambda launch: True, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(
        torch.OutOfMemoryError, match=r"CUDA out of memory.\n.* 0 bytes of workspace for gather \(fprop\) of "
    ):
        heard(triton_conv.conv2d, X.to(kernels), W.to(kernels), padding=(0, 1))
    assert len(launched.failed) == 1


def test_an_output_without_room_raises_as_torch_does(kernels, monkeypatch):
    memory = Memory(monkeypatch, 16)
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory. Tried to allocate$"):
        triton_conv.conv2d(X.to(kernels), W.to(kernels), padding=(0, 1))
    assert memory.refused == 1


def test_what_failed_holds_no_memory_while_the_next_one_runs(kernels, monkeypatch):
    """The copies of a plan are free before another is tried."""
    x, w = X.to(kernels, torch.bfloat16), W.to(kernels, torch.bfloat16)
    problem, gc_was = execute.problem_of(forward(x, w), INTERPRETER), gc.isenabled()
    (copies,) = [p for p in plan.every(problem) if p.packs]
    monkeypatch.setattr(plan, "choice", lambda found: copies)
    stored.renew()
    alive, prepared = [], execute.prepared

    def watched(p, call, output):
        alive.append([ref() is not None for refs in held for ref in refs])
        tensors, finish = prepared(p, call, output)
        held.append([weakref.ref(t) for name, t in tensors.items() if name in p.packs])
        return tensors, finish

    held = []
    monkeypatch.setattr(execute, "prepared", watched)
    Launches(monkeypatch, lambda launch: launch.name == "box", torch.OutOfMemoryError("CUDA out of memory."))
    gc.disable()
    try:
        heard(triton_conv.conv2d, x, w, padding=(0, 1))
    finally:
        if gc_was:
            gc.enable()
    assert len(alive) == 2
    assert held[0]
    assert alive[1] == [False] * len(held[0])


# ---------------------------------------------------------------------------------------------------------------------
# Every kind of convolution


def fused():
    return lambda: triton_conv.conv2d(
        X, W, padding=(0, 1), activation="silu", residual=X
    ), lambda: torch.nn.functional.silu(torch.conv2d(X, W, padding=(0, 1)) + X)


def depthwise():
    w = torch.randn(16, 1, 1, 3)
    return lambda: triton_conv.conv2d(X, w, groups=16), lambda: torch.conv2d(X, w, groups=16)


def causal():
    x, w = torch.randn(1, 8, 20), torch.randn(8, 4)
    padded = torch.nn.functional.pad(x, (3, 0))
    return lambda: triton_conv.causal_conv1d(x, w), lambda: torch.conv1d(padded, w[:, None], groups=8)


def causal_gradient():
    x, w = torch.randn(1, 8, 20).requires_grad_(), torch.randn(8, 4).requires_grad_()

    def reference():
        return torch.autograd.grad(torch.conv1d(torch.nn.functional.pad(x, (3, 0)), w[:, None], groups=8).sum(), w)[0]

    y = triton_conv.causal_conv1d(x, w)
    return lambda: torch.autograd.grad(y.sum(), w, retain_graph=True)[0], reference


def separable():
    w, mix = torch.randn(16, 1, 1, 3), torch.randn(8, 16, 1, 1)
    return lambda: triton_conv.separable_conv2d(X, w, mix, fused=True), lambda: torch.conv2d(
        torch.conv2d(X, w, groups=16), mix
    )


def branches():
    w = [torch.randn(16, 16, 1, 1), W]
    parts = [triton_conv.Branch(w[0]), triton_conv.Branch(w[1], padding=(0, 1))]
    return lambda: triton_conv.multi_conv2d(X, parts, one_launch=True), lambda: torch.cat(
        [torch.conv2d(X, w[0]), torch.conv2d(X, w[1], padding=(0, 1))], 1
    )


def deform():
    offset = torch.zeros(2, 6, 4, 6)
    return lambda: triton_conv.deform_conv2d(X, offset, W), lambda: torch.conv2d(X, W)


def streaming():
    x, w = torch.randn(1, 16, 3, 4, 4), torch.randn(16, 16, 2, 1, 2)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 0))
    return lambda: triton_conv.causal_conv3d(x, w), lambda: torch.conv3d(padded, w)


@pytest.mark.parametrize(
    "case",
    [fused, depthwise, causal, causal_gradient, separable, branches, deform, streaming],
    ids=lambda c: c.__name__,
)
def test_every_kind_goes_on_with_another_config(kernels, poisoned, monkeypatch, case):
    torch.manual_seed(0)
    ours, reference = case()
    first = []

    def fails(launch):
        what = {name: value for name, value in launch.arguments.items() if name != "splits"}
        if not first:
            first.append((launch.name, repr(what)))
        return (launch.name, repr(what)) == first[0]

    launched = Launches(monkeypatch, fails, ERRORS["resources"])
    y, told = heard(ours)
    torch.testing.assert_close(y, reference(), atol=2e-3, rtol=1e-3)
    assert len(told) == len(launched.failed) == 1
    again, words = heard(ours)
    assert torch.equal(y, again)
    assert not words
    assert len(launched.failed) == 1


KERNELS = {"gather": (torch.float32, torch.contiguous_format, 1), "box": (torch.bfloat16, torch.channels_last, 1)}
KERNELS |= {"depthwise": (torch.float32, torch.contiguous_format, 16)}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("kernel", KERNELS)
def test_small_configs_of_every_kernel_are_right(kernels, poisoned, kernel, role):
    """What is left where nothing larger can run."""
    dtype, form, groups = KERNELS[kernel]
    x, w, dy = X, W[:, : 16 // groups].contiguous(), torch.randn(2, 16, 4, 8)
    x, w, dy = (t.to(kernels, dtype, memory_format=form) for t in (x, w, dy))
    rest = ([1, 1], [0, 0, 1, 1], [1, 1], groups, "zeros", None)
    call = {
        Role.FPROP: conv_calls.conv_call(x, w, None, *rest),
        Role.DGRAD: conv_calls.conv_dgrad_call(dy, w, list(X.shape), *rest),
        Role.WGRAD: conv_calls.conv_wgrad_call(dy, x, list(w.shape), list(w.stride()), *rest),
    }[role]
    problem = execute.problem_of(call, INTERPRETER)
    rule = plan.make(problem)
    assert rule.kernel == (kernel if role is not Role.WGRAD else f"{kernel}_wgrad".removeprefix("gather_"))
    small = choose.smallest(rule.config, problem.dtype)
    y = execute.run(plan.with_config(problem, rule, small), call, execute.empty_output(call))
    bound = {"atol": 1e-3, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.1, "rtol": 0.02}
    torch.testing.assert_close(y, execute.execute(call), **bound)


def test_plans_that_nobody_knows_anything_against_are_what_they_were():
    problem = execute.problem_of(forward(X.to(torch.bfloat16), W.to(torch.bfloat16)), H200)
    best = plan.choice(plan.every(problem))
    assert plan.make(problem) == best
    tried = list(plan._candidates(problem, rivals=False))
    assert tried[0] == best
    assert (tried[-1].kernel, tried[-1].packs, tried[-1].config.num_stages) == ("gather", (), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Where Triton keeps what it compiles


@pytest.fixture
def unmoved(monkeypatch):
    monkeypatch.setattr(recovery, "_moved", {})
    before = triton.knobs.cache.__dict__.copy()
    yield
    triton.knobs.cache.__dict__.clear()
    triton.knobs.cache.__dict__.update(before)


@pytest.mark.parametrize("full", [False, True], ids=["read-only", "full"])
def test_a_cache_that_takes_no_files_is_kept_elsewhere(kernels, monkeypatch, unmoved, tmp_path, full):
    """In the interpreter nothing is compiled: what a launch would first do with the cache is done here."""
    if not full:
        (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / ("cache" if full else "file")))
    run = Launch.run

    def compiled(launch, tensors):
        if full and knobs_dir() == str(tmp_path / "cache"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        get_cache_manager("0123").put("code", "kernel.ptx")
        run(launch, tensors)

    def knobs_dir():
        return triton.knobs.cache.dir

    monkeypatch.setattr(Launch, "run", compiled)
    y, told = heard(triton_conv.conv2d, X.to(kernels), W.to(kernels), padding=(0, 1))
    torch.testing.assert_close(y, torch.conv2d(X, W, padding=(0, 1)).to(kernels), atol=1e-4, rtol=1e-4)
    (text,) = told
    assert str(tmp_path) in text
    assert knobs_dir() in text
    assert heard(triton_conv.conv2d, X.to(kernels), W.to(kernels), padding=(0, 1))[1] == []


def test_other_files_that_are_missing_are_the_callers(kernels, monkeypatch, unmoved):
    launched = Launches(monkeypatch, lambda launch: True, FileNotFoundError(errno.ENOENT, "No such file", "gcc"))
    with pytest.raises(FileNotFoundError, match="gcc"):
        triton_conv.conv2d(X.to(kernels), W.to(kernels), padding=(0, 1))
    assert len(launched.failed) == 1
