"""Threads that change settings beside each other, and what a child of fork finds."""

import multiprocessing
import random
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from configs_at_hand import CONFIGS, entry, problem, stamp
from triton.runtime.errors import OutOfResources

import triton_conv
from triton_conv import (
    backends,
    config,
    conv_calls,
    execute,
    fast,
    forks,
    invariance,
    plan,
    recovery,
    stored,
    ways,
)
from triton_conv.config import Config
from triton_conv.frozen import cached_property
from triton_conv.geometry import Role
from triton_conv.kernels.launch import Launch

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def nothing_known():
    recovery.forget()
    fast.forget()
    yield
    stored.uninstall()
    recovery.forget()
    fast.forget()


SETTINGS = {
    "explicit": (
        lambda: config.explicit({Role.FPROP: Config(16, 16, 16)}),
        lambda: config.explicit({Role.WGRAD: Config(32, 32, 32)}),
        config.all_chosen,
    ),
    "batch": (lambda: triton_conv.batch_invariant(batch=2), triton_conv.batch_invariant, invariance.batch),
    "backend": (lambda: triton_conv.backend("auto"), lambda: triton_conv.backend("triton"), backends.current),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_two_threads_end_in_any_order(name):
    mine, theirs, value = SETTINGS[name]
    before = value()
    with theirs():
        alone = value()
    with ThreadPoolExecutor(1) as pool:
        first, second = mine(), None
        first.__enter__()
        second = pool.submit(theirs).result()
        pool.submit(second.__enter__).result()
        first.__exit__(None, None, None)  # before the one that began later
        assert value() == alone
        pool.submit(second.__exit__, None, None, None).result()
    assert value() == before


def test_settings_from_here_on_take_no_memory():
    for n in range(1, 50):
        triton_conv.batch_invariant(batch=n)
    assert invariance.batch() == 49
    assert len(invariance._batch._layers) <= 3
    with triton_conv.batch_invariant(batch=100), triton_conv.batch_invariant(batch=101):
        assert invariance.batch() == 101
    assert invariance.batch() == 49
    again = triton_conv.batch_invariant(batch=7)
    with again, again:
        assert invariance.batch() == 7
    triton_conv.batch_invariant(False)
    assert invariance.batch() is None


def test_one_that_works_something_out_holds_up_no_other():
    began, end = threading.Event(), threading.Event()

    class Slow:
        def __init__(self, waits):
            self.waits = waits

        @cached_property
        def found(self):
            if self.waits:
                began.set()
                end.wait(60)
            return 1

    thread = threading.Thread(target=lambda: Slow(True).found)
    thread.start()
    assert began.wait(60)
    other = ThreadPoolExecutor(1).submit(lambda: Slow(False).found)
    assert other.result(60) == 1
    end.set()
    thread.join()


# ---------------------------------------------------------------------------------------------------------------------
# Forks


def in_child(work):
    """The exit code of a child that does this and nothing else."""
    process = FORK.Process(target=work)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode


def test_a_child_of_fork_waits_for_no_thread_of_its_parent(kernels):
    x, w = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 1, 1)
    triton_conv.conv2d(x, w)
    held, end = threading.Event(), threading.Event()

    def hold():
        locks = list(forks._locks)
        for lock in locks:
            lock.__enter__()
        held.set()
        end.wait(60)
        for lock in locks:
            lock.__exit__(None, None, None)

    def work():
        fast.forget()
        with triton_conv.batch_invariant(), config.explicit({}), execute.recording(), execute.problems():
            pass
        recovery.forget()
        for _ in range(3):
            torch.testing.assert_close(triton_conv.conv2d(x, w), torch.conv2d(x, w), atol=1e-4, rtol=1e-4)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    assert len(forks._locks) >= 5
    try:
        assert in_child(work) == 0
    finally:
        end.set()
        thread.join()
    work()  # and the parent's locks are as they were


def test_a_child_of_fork_is_told_by_torch_that_it_cannot_use_cuda(monkeypatch):
    """Not by a launch through handles of its parent's."""
    where = torch.device("cuda", 0)

    class Properties:
        name, multi_processor_count, major, minor = "NVIDIA H200", 132, 9, 0

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
        execute._cuda_device.cache_clear()
        assert execute.device_of(where).capability == 90
    assert execute.device_of(where).capability == 90  # the parent knows it by heart

    def work():
        torch.cuda._is_in_bad_fork = lambda: True  # as CUDA's own builds say after a fork
        with pytest.raises(RuntimeError, match="Cannot re-initialize CUDA in forked subprocess"):
            execute.device_of(where)

    assert in_child(work) == 0
    execute._cuda_device.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# Threads


@pytest.fixture
def often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_with_shapes_and_settings_of_their_own_compute_what_they_asked_for(kernels, monkeypatch, often):
    """Launches are plain torch, since Triton's interpreter is for one thread; those of one config fail."""
    bad, failed = Config(64, 16, 16, num_stages=7), []

    def run(launch, tensors):
        if launch.arguments.get("num_stages") == 7:
            failed.append(launch)
            raise OutOfResources(2, 1, "shared memory")
        assert launch.name == "gather"
        tensors["y"].copy_(torch.conv2d(tensors["x"], tensors["w"]))

    monkeypatch.setattr(Launch, "run", run)

    def settings(rng):
        return rng.choice(
            [
                lambda: config.explicit({Role.FPROP: Config(16, 16, 16, num_stages=rng.choice((1, 2)))}),
                lambda: triton_conv.batch_invariant(batch=rng.choice((1, 4))),
                lambda: triton_conv.backend("auto"),
                lambda: stored.hidden("installed"),
                lambda: execute.recording(here=True),
                execute.problems,
            ]
        )()

    def disturb(rng):
        rng.choice([fast.forget, plan._make.cache_clear, stored.forget, recovery.forget, stored.uninstall])()

    def hammer(seed):
        rng, torches = random.Random(seed), torch.Generator().manual_seed(seed)
        for step in range(30):
            shape = (rng.choice((1, 2)), rng.choice((16, 32)), rng.choice((3, 4, 5)), rng.choice((3, 4)))
            x = torch.randn(shape, generator=torches)
            w = torch.randn(rng.choice((16, 32)), shape[1], rng.choice((1, 2, 3)), 2, generator=torches)
            if step % 5 == 0:
                disturb(rng)
            if step % 7 == 0:
                with stored.hidden():
                    key, extents = entry_of(x, w)
                stored.install(execute.INTERPRETER.name, "gather", [made_entry(key, extents, bad)])
            with settings(rng):
                for _ in range(2):
                    y = triton_conv.conv2d(x, w)
                    assert y.shape == (shape[0], w.shape[0], shape[2] - w.shape[2] + 1, shape[3] - 1)
                    torch.testing.assert_close(y, torch.conv2d(x, w), atol=1e-4, rtol=1e-4)
        return seed

    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("ignore")
        futures = [pool.submit(hammer, seed) for seed in range(8)]
        assert [future.result(120) for future in futures] == list(range(8))
    assert failed
    assert config.all_chosen() == ()
    assert invariance.batch() is None
    assert backends.current() == "triton"
    assert (execute._recorded, execute._seen) == (None, ())


def entry_of(x, w):
    call = conv_calls.conv_call(x, w, None, [1, 1], [0, 0, 0, 0], [1, 1], 1, "zeros", None)
    asked = execute.problem_of(call, execute.INTERPRETER)
    return ways.key_of(asked, plan.every(asked)[0].layout)


def made_entry(key, extents, made):
    return stored.Entry(key, extents, "measured", stamp("gather"), (stored.Candidate(made, 1e-6),), {})


def test_many_who_ask_for_the_same_plan_at_once_get_the_same(often):
    plan._make.cache_clear()
    barrier = threading.Barrier(8)

    def ask(_):
        barrier.wait(60)
        return plan.make(problem(images=3, side=11))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert all(p == found[0] for p in found)


def test_what_one_thread_installs_while_others_plan_is_seen_by_the_next_call(often):
    """No plan from before is cached under what holds after."""
    stop = threading.Event()

    def ask():
        while not stop.is_set():
            plan.make(problem())

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for n in range(40):
            wanted = CONFIGS[n % 2]
            stored.install("NVIDIA H200", "box", [entry([(wanted, 1e-6)])])
            assert plan.make(problem()).config == wanted
    finally:
        stop.set()
        for thread in threads:
            thread.join()
