"""Processes and threads of one program: data loaders, pickled modules, many threads at once."""

import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import triton_conv
from triton_conv import execute, explain, plan
from triton_conv.devices import H200
from triton_conv.tuning.layers import LAYERS

BLUR = torch.full((3, 1, 3, 3), 1 / 9)


def blurred(n, layer):
    x = torch.full((1, 3, 6, 6), float(n))
    return layer(triton_conv.conv2d(x, BLUR, groups=3, padding=1))[0].detach()


class Images(Dataset):
    """Uses functions and a module in whatever process asks for an image."""

    def __init__(self):
        torch.manual_seed(0)
        self.layer = triton_conv.nn.Conv2d(3, 2, 3)

    def __len__(self):
        return 4

    def __getitem__(self, n):
        return blurred(n, self.layer), os.getpid()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loaders_may_convolve_in_their_workers(context):
    images, stop = Images(), threading.Event()
    expected = [blurred(n, images.layer) for n in range(len(images))]  # so the parent has run some before it forks

    def busy():
        while not stop.is_set():
            blurred(1, images.layer)
            time.sleep(0.001)  # leaves the workers a core to start on

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        loaded = list(DataLoader(images, num_workers=1, multiprocessing_context=context, timeout=120))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for (y, pid), want in zip(loaded, expected, strict=True):
        torch.testing.assert_close(y[0], want)
        assert pid.item() != os.getpid()


def test_modules_go_through_torchs_queues():
    context = torch.multiprocessing.get_context("fork")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ConvTranspose2d(4, 2, 3))
    triton_conv.convert(model)
    x = torch.randn(1, 3, 8, 8)
    queue, answers = context.SimpleQueue(), context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(queue.get()(x).detach().tolist()))
    child.start()
    queue.put(model)
    got = torch.tensor(answers.get())
    child.join(60)
    torch.testing.assert_close(got, model(x).detach())
    assert type(pickle.loads(pickle.dumps(model))[0]) is triton_conv.nn.Conv2d


def test_threads_compute_what_one_does():
    """Forward and backward of different layers at once, gradients of a shared weight apart."""
    w = torch.randn(4, 4, 3, 3)

    def step(n):
        x = torch.randn(2, 4, 5 + n % 5, 6, generator=torch.Generator().manual_seed(n))
        own = w.clone().requires_grad_()
        triton_conv.conv2d(x, own, padding=1).square().sum().backward()
        return own.grad

    alone = [step(n) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(step, range(40)))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)


def test_threads_make_the_same_plans():
    sizes = [(2, 16, 20 + n, 24) for n in range(24)]

    def made(size):
        return explain.plans(size, (16, 16, 3, 3), dtype=torch.bfloat16, channels_last=True, device=H200)

    plan._make.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(made, sizes * 2))
    plan._make.cache_clear()
    assert together == [made(size) for size in sizes * 2]


def test_who_listens_in_one_thread_is_told_of_no_other():
    def convolve(n):
        triton_conv.conv2d(torch.zeros(n, 3, 6, 6), BLUR, groups=3)

    def batches(calls):
        return [call.geometry.N for call in calls]

    with ThreadPoolExecutor(1) as pool:
        with execute.recording() as everywhere:
            outer = execute.recording(here=True)
            mine = outer.__enter__()
            convolve(1)
            pool.submit(convolve, 2).result()
            theirs = execute.recording(here=True)
            other = pool.submit(theirs.__enter__).result()
            outer.__exit__(None, None, None)  # before the one that began later
            convolve(3)
            pool.submit(convolve, 4).result()
            pool.submit(theirs.__exit__, None, None, None).result()
        convolve(5)
    assert (batches(mine), batches(other), batches(everywhere)) == ([1], [4], [2, 3])
    assert execute._recorded is None


@pytest.mark.parametrize("layer", ["3x3", "causal", "separable"])
def test_plans_travel_without_what_they_have_worked_out(layer):
    shapes, options = LAYERS[layer][:2], LAYERS[layer].options
    for p in explain.plans(*shapes, **options).values():
        assert p.launches
        twin = pickle.loads(pickle.dumps(p))
        assert twin == p
        assert "launches" not in vars(twin)
