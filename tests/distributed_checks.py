"""What two ranks check together, on CPUs; `test_distributed` starts them and reads what they found."""

import copy
import json
import os
import sys
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def work(rank, size, port, directory):
    """A rank's process: runs every check, and says of each what went wrong."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TRITON_INTERPRET"] = "0"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {}
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function(rank)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        Path(directory, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@contextmanager
def warned(directory=None):
    """What is warned about within it, by Python or by C++ on the file descriptor."""
    import tempfile

    said = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            said += [str(w.message) for w in caught] + [file.read().decode()]


# ---------------------------------------------------------------------------------------------------------------------
# Data parallel modules


def network():
    from torch import nn

    import triton_conv

    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 6, 1),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
    )
    triton_conv.convert(model)
    return model


def step(model, x):
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


def ddp(rank, memory_format):
    from torch.nn.parallel import DistributedDataParallel

    model = network().to(memory_format=memory_format)
    x = torch.randn(6, 4, 5, 5).to(memory_format=memory_format)
    alone = copy.deepcopy(model)
    step(alone, x)
    wrapped = DistributedDataParallel(model)
    with warned() as said:
        for _ in range(2):  # buckets are built anew after the first step
            wrapped.zero_grad()
            step(wrapped, x.chunk(2)[rank])
    assert not [text for text in said if "strides" in text], said
    for one, other in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
        assert one.grad.stride() == one.stride()


@check
def ddp_contiguous(rank):
    ddp(rank, torch.contiguous_format)


@check
def ddp_channels_last(rank):
    ddp(rank, torch.channels_last)


@check
def fsdp(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    model, x = network(), torch.randn(6, 4, 5, 5)
    alone = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (alone, model)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        step(alone, x)
        step(model, x.chunk(2)[rank])
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other.full_tensor())


# ---------------------------------------------------------------------------------------------------------------------
# DTensor


def spread(tensors, placements, mesh):
    from torch.distributed.tensor import distribute_tensor

    return [
        None if t is None else distribute_tensor(t.detach(), mesh, p).requires_grad_(t.requires_grad)
        for t, p in zip(tensors, placements, strict=True)
    ]


def equal(function, tensors, placements, mesh=None, output=None, gradients=None):
    """Forward and backward of distributed tensors against one process; what the result's placements must be."""
    from torch.distributed.tensor import init_device_mesh

    mesh = mesh or init_device_mesh("cpu", (2,))
    tensors = [t if t is None else t.requires_grad_(t.is_floating_point()) for t in tensors]
    parts = spread(tensors, placements, mesh)
    y = function(*parts)
    expected = function(*tensors)
    y, expected = ([v] if isinstance(v, torch.Tensor) else list(v) for v in (y, expected))
    for have, want in zip(y, expected, strict=True):
        assert have.shape == want.shape
        if have.placements[0].is_replicate():
            assert have.stride() == have.to_local().stride()
        if all(t is None or t.is_contiguous() for t in tensors):  # distribute_tensor makes the others so
            assert have.stride() == want.stride(), (have.stride(), want.stride())
        torch.testing.assert_close(have.full_tensor(), want)
        assert output is None or list(have.placements) == output, have.placements
    if not any(want.requires_grad for want in expected):
        return
    dy = [torch.randn_like(want) for want in expected]
    there = [(t, p) for t, p in zip(tensors, parts, strict=True) if t is not None]
    wanted = torch.autograd.grad(expected, [t for t, _ in there], dy)
    spread_dy = spread(
        dy, [have.placements if not any(q.is_partial() for q in have.placements) else None for have in y], mesh
    )
    had = torch.autograd.grad(y, [p for _, p in there], spread_dy)
    for number, (have, want) in enumerate(zip(had, wanted, strict=True)):
        assert have.shape == want.shape
        torch.testing.assert_close(have.full_tensor(), want)
        if gradients is not None:
            assert list(have.placements) == gradients[number], (number, have.placements)


def operands(rank=2, groups=1, channels_last=False, K=4, C=4):
    x, w, b = torch.randn(6, C, *(5,) * rank), torch.randn(K, C // groups, *(3,) * rank), torch.randn(K)
    return (t.to(memory_format=torch.channels_last) if channels_last and t.dim() == 4 else t for t in (x, w, b))


def placed():
    from torch.distributed.tensor import Partial, Replicate, Shard

    return [Replicate()], [Shard(0)], [Shard(1)], [Shard(2)], [Partial()]


def conv(x, w, b=None, **options):
    import triton_conv

    return triton_conv.conv2d(x, w, b, **({"padding": 1} | options))


@check
def nothing_shared(rank):
    R, *_ = placed()
    equal(conv, operands(), (R, R, R), output=R, gradients=(R, R, R))


@check
def batch_sharded(rank):
    R, S0, _, _, P = placed()
    equal(conv, operands(), (S0, R, R), output=S0, gradients=(S0, P, P))
    equal(conv, operands(channels_last=True), (S0, R, R), output=S0, gradients=(S0, P, P))


@check
def uneven_batch_sharded(rank):
    R, S0, _, _, P = placed()
    x, w, b = operands()
    equal(conv, (x[:5], w, b), (S0, R, R), output=S0, gradients=(S0, P, P))
    equal(conv, (x[:1], w, b), (S0, R, R), output=S0, gradients=(S0, P, P))  # one rank has none


@check
def output_channels_sharded(rank):
    R, S0, S1, _, P = placed()
    equal(conv, operands(), (R, S0, S0), output=S1, gradients=(P, S0, S0))
    equal(conv, operands(channels_last=True), (R, S0, S0), output=S1, gradients=(P, S0, S0))


@check
def input_channels_sharded(rank):
    R, _, S1, _, P = placed()
    equal(conv, operands(), (S1, S1, R), output=P)
    equal(lambda x, w: conv(x, w, stride=2), (*tuple(operands())[:2],), (S1, S1), output=P)


@check
def one_layer_after_another(rank):
    """Output channels, then input channels: one sum over ranks for two layers."""
    R, S0, S1, _, P = placed()
    x, w, b = operands()
    v = torch.randn(6, 4, 3, 3)
    equal(lambda x, w, b, v: conv(conv(x, w, b).relu(), v), (x, w, b, v), (R, S0, S0, S1), output=P)


@check
def groups_sharded(rank):
    R, S0, S1, _, P = placed()
    equal(lambda *t: conv(*t, groups=2), operands(groups=2), (S1, S0, S0), output=S1, gradients=(S1, S0, S0))
    equal(lambda *t: conv(*t, groups=4), operands(groups=4, K=8), (S1, S0, S0), output=S1, gradients=(S1, S0, S0))
    equal(lambda *t: conv(*t, groups=4), operands(groups=4), (S0, R, R), output=S0, gradients=(S0, P, P))


@check
def groups_that_cannot_be_shared_out(rank):
    R, S0, S1, *_ = placed()
    equal(lambda *t: conv(*t, groups=3), operands(groups=3, K=6, C=6), (S1, S0, S0))
    equal(conv, operands(K=5), (R, S0, S0))
    equal(conv, operands(K=1), (R, S0, S0))


@check
def images_sharded_are_brought_together(rank):
    R, _, _, S2, _ = placed()
    equal(conv, operands(), (S2, R, R))
    equal(conv, operands(), (S2, S2, R))


@check
def transposed(rank):
    import triton_conv

    R, S0, S1, _, P = placed()

    def function(*t):
        return triton_conv.conv_transpose2d(*t, stride=2, output_padding=1)

    for where, output in (((S0, R, R), S0), ((R, S1, S0), S1), ((S1, S0, R), P)):
        x, w, b = torch.randn(6, 4, 3, 3), torch.randn(4, 2, 3, 3), torch.randn(2)
        equal(function, (x, w, b), where, output=output)


@check
def other_ranks_and_modes(rank):
    import triton_conv

    R, S0, S1, *_ = placed()
    equal(lambda *t: triton_conv.conv1d(*t, dilation=2), operands(1), (S0, R, R), output=S0)
    equal(lambda *t: triton_conv.conv3d(*t, padding=1, padding_mode="circular"), operands(3), (R, S0, S0), output=S1)


@check
def causal(rank):
    import triton_conv

    R, S0, S1, _, P = placed()

    def function(x, w, b, state):
        return triton_conv.causal_conv1d(x, w, b, "silu", state, True)

    tensors = torch.randn(4, 6, 9), torch.randn(6, 4), torch.randn(6), torch.randn(4, 6, 3)
    equal(function, tensors, (S0, R, R, S0), output=S0, gradients=(S0, P, P, S0))
    equal(function, tensors, (S1, S0, S0, S1), output=S1, gradients=(S1, S0, S0, S1))


@check
def causal_step(rank):
    import pytest
    from torch.distributed.tensor import init_device_mesh

    import triton_conv

    R, S0, S1, *_ = placed()
    mesh = init_device_mesh("cpu", (2,))
    for where in ((S1, S1, S0, S0), (S0, S0, R, R), (S0, S1, R, R)):
        tensors = [torch.randn(4, 6, 1), torch.randn(4, 6, 3), torch.randn(6, 4), torch.randn(6)]
        x, state, w, b = spread(tensors, where, mesh)
        y = triton_conv.causal_conv1d_update(x, state, w, b, "silu")
        expected = triton_conv.causal_conv1d_update(*tensors, "silu")
        torch.testing.assert_close(y.full_tensor(), expected)
        torch.testing.assert_close(state.full_tensor(), tensors[1])
    x, state, w, b = spread(tensors, (R, [S0[0].__class__(2)], R, R), mesh)
    with pytest.raises(RuntimeError, match="changed in place"):
        triton_conv.causal_conv1d_update(x, state, w, b)


@check
def separable(rank):
    import triton_conv

    R, S0, S1, _, P = placed()
    shapes = (4, 4, 5, 5), (8, 1, 3, 3), (6, 8, 1, 1), (8,), (6,)
    for where, output in (((S0, R, R, R, R), S0), ((R, R, S0, R, S0), S1), ((S1, S0, S1, S0, R), P)):
        tensors = [torch.randn(s) for s in shapes]
        equal(triton_conv.separable_conv2d, tensors, where, output=output)
        with torch.no_grad():
            equal(triton_conv.separable_conv2d, tensors, where, output=output)


@check
def fused(rank):
    import triton_conv

    R, S0, S1, *_ = placed()

    def function(x, w, b, residual, scale):
        return triton_conv.conv2d(x, w, b, activation="silu", residual=residual, scale=scale)

    shapes = (4, 4, 5, 5), (6, 4, 3, 3), (6,), (4, 6, 3, 3), (6,)
    for where, output in (((S0, R, R, S0, R), S0), ((R, S0, S0, S1, S0), S1), ((S1, R, R, S0, R), S0)):
        tensors = [torch.randn(s) for s in shapes]
        equal(function, tensors, where, output=output)
        with torch.no_grad():
            equal(function, tensors, where, output=output)

    def transposed(x, w, b, scale):
        return triton_conv.conv_transpose2d(x, w, b, groups=2, activation="relu", scale=scale)

    tensors = [torch.randn(s) for s in ((4, 4, 3, 3), (4, 3, 2, 2), (6,), (6,))]
    for where, output in (((S0, R, R, R), S0), ((S1, S0, S0, S0), S1)):
        equal(transposed, tensors, where, output=output)


@check
def eight_bits(rank):
    import triton_conv

    R, S0, S1, _, P = placed()
    for where, output in (((S0, R), S0), ((R, S0), S1), ((S1, S1), P)):
        x, w = (torch.randint(-9, 9, s, dtype=torch.int8) for s in ((4, 4, 5, 5), (6, 4, 3, 3)))
        equal(triton_conv.int_conv2d, (x, w), where, output=output)


@check
def converted_modules(rank):
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    model, x = network(), torch.randn(6, 4, 5, 5)
    alone = copy.deepcopy(model)
    step(alone, x)
    distribute_module(model, mesh)
    step(model, distribute_tensor(x, mesh, [Shard(0)]))
    for one, other in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad.full_tensor())


@check
def two_dimensions_of_a_mesh(rank):
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (1, 2))
    equal(
        conv,
        operands(),
        ([Shard(0), Replicate()], [Replicate(), Shard(0)], [Replicate(), Shard(0)]),
        mesh,
        [Shard(0), Shard(1)],
    )


@check
def mixed_with_plain_tensors(rank):
    import pytest
    from torch.distributed.tensor import init_device_mesh

    R, S0, *_ = placed()
    x, w, b = operands()
    (part,) = spread([x], [R], init_device_mesh("cpu", (2,)))
    with pytest.raises(RuntimeError, match=r"use distribute_tensor on weight, bias"):
        conv(part, w, b)
    with pytest.raises(RuntimeError, match=r"\[6, 4, 5, 5\]"):  # errors name whole sizes, not those of a rank's part
        conv(*spread([x, torch.randn(4, 3, 3, 3)], [S0, R], init_device_mesh("cpu", (2,))))


@check
def compiled(rank):
    R, S0, *_ = placed()
    equal(torch.compile(conv, backend="aot_eager", fullgraph=True), operands(), (S0, R, R), output=S0)


@check
def last_of_all_strides_that_do_not_match_are_seen(rank):
    """The warning that other checks look for: PyTorch gives it once in a process."""
    from torch.nn.parallel import DistributedDataParallel

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, dw):
            return dw.as_strided(dw.shape, (4, 1, 4, 4))

    class Model(torch.nn.Conv2d):
        def forward(self, x):
            return torch.nn.functional.conv2d(x, Wrong.apply(self.weight))

    model = DistributedDataParallel(Model(4, 4, 1, bias=False))
    with warned() as said:
        for _ in range(2):
            model.zero_grad()
            step(model, torch.randn(2, 4, 5, 5))
    assert [text for text in said if "strides" in text]
