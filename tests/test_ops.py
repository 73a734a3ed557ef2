"""The registered operators under what PyTorch does to them: autocast, fake tensors, torch.compile, FLOP counting."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from halves import first_of
from op_cases import CASES, OURS_ALONE, Recorder, build, cases, recorded, shared_cases, theirs
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

import triton_conv
from triton_conv import later

ops = torch.ops.triton_conv


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------------------
# The operators


@cases
def test_opcheck(case):
    for op, args in recorded(case):
        leaves = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(op, leaves)


def test_the_cases_call_all_five_operators():
    called = {op._schema.name.split("::")[1] for case in CASES.values() for op, _ in recorded(case)}
    assert called == {"conv", "conv_dilated", "conv_transpose", "conv_dgrad", "conv_wgrad"}


def test_the_name_of_the_operator_says_which_path_ran():
    def names(case):
        return [op._schema.name.split("::")[1] for op, _ in recorded(CASES[case])]

    assert names("conv2d") == ["conv", "conv_dgrad", "conv_wgrad"]
    assert names("conv2d dilated") == ["conv_dilated", "conv_dgrad", "conv_wgrad"]
    assert names("conv_transpose2d") == ["conv_transpose", "conv", "conv_wgrad"]
    assert names("conv_transpose2d output_padding above stride")[1] == "conv_dilated"


def test_padding_modes_are_one_string():
    modes = {name: [args[-2] for _, args in recorded(CASES[name])] for name in CASES}
    assert modes["conv2d circular"] == ["circular"] * 3
    assert modes["conv2d mixed"] == ["reflect,zeros"] * 3
    x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3)
    for modes in (("circular", "circular"), ["circular"], "circular"):
        with Recorder() as recorder:
            triton_conv.conv2d(x, w, padding=1, padding_mode=modes)
        assert recorder.calls[0][1][-2] == "circular"
    parameters = ((1, 1), (1,) * 4, (1, 1), 1)
    one, each = (ops.conv(x, w, None, *parameters, mode, None) for mode in ("replicate", "replicate,replicate"))
    assert torch.equal(one, each)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("case", [CASES["conv2d"], CASES["conv_transpose2d"]], ids=["conv2d", "conv_transpose2d"])
def test_only_what_is_asked_for_is_computed(case, needs):
    f, tensors = build(case, requires_grad=False)
    for t, need in zip(tensors, needs, strict=True):
        t.requires_grad_(need)
    with Recorder() as recorder:
        y = f(*tensors)
        assert y.requires_grad == any(needs)
        if any(needs):
            y.sum().backward()
    assert [t.grad is not None for t in tensors] == list(needs)
    assert len(recorder.calls) == 1 + needs[0] + needs[1]


@shared_cases
def test_outputs_and_gradients_are_those_of_pytorch(case):
    f, tensors = build(case)
    copies = [t.detach().clone().requires_grad_() for t in tensors]
    y, z = f(*tensors), theirs(case)(*copies)
    assert_close(y, z, 100)
    dy = torch.randn_like(y)
    for ours, wanted in zip(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(z, copies, dy), strict=True):
        assert_close(ours, wanted, 100)


# ---------------------------------------------------------------------------------------------------------------------
# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv2d dilated", "conv3d", "conv_transpose2d"])
def test_autocast_gives_what_it_gives_for_pytorch(name, dtype):
    case = CASES[name]
    f, tensors = build(case, torch.float32)
    copies = [t.detach().clone().requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype):
        y, z = f(*tensors), theirs(case)(*copies)
    assert y.dtype == z.dtype == dtype
    assert_close(y, z, 30)
    for ours, wanted, t in zip(
        torch.autograd.grad(y.float().sum(), tensors),
        torch.autograd.grad(z.float().sum(), copies),
        tensors,
        strict=True,
    ):
        assert ours.dtype == t.dtype == torch.float32
        torch.testing.assert_close(ours, wanted, atol=0.05 * float(wanted.abs().max()), rtol=0)


def test_autocast_casts_each_operand_of_whatever_type():
    x, w, b = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3).bfloat16(), torch.randn(2).half()
    with torch.autocast("cpu", torch.bfloat16):
        assert triton_conv.conv2d(x, w, b).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="should be the same"):
        triton_conv.conv2d(x, w, b)


def test_autocast_leaves_doubles_integers_and_what_is_outside_alone():
    f, tensors = build(CASES["conv2d"], torch.float64)
    whole = [(t * 4).long().detach() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        y, i = f(*tensors), f(*whole)
        with torch.autocast("cpu", enabled=False):
            single = f(*[t.float() for t in tensors])
    assert (y.dtype, i.dtype, single.dtype) == (torch.float64, torch.int64, torch.float32)
    assert torch.equal(y, f(*tensors))


def test_autocast_and_compile_together():
    f, tensors = build(CASES["conv2d"], torch.float32)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = compiled(*tensors), f(*tensors)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert tensors[1].grad.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Fake tensors and torch.compile


@cases
def test_meta_tensors_give_shape_strides_and_gradients(case):
    f, tensors = build(case)
    metas = [t.detach().to("meta").requires_grad_() for t in tensors]
    y, m = f(*tensors), f(*metas)
    assert m.device.type == "meta"
    assert (m.shape, m.stride(), m.dtype) == (y.shape, y.stride(), y.dtype)
    m.sum().backward()
    assert [t.grad.shape for t in metas] == [t.shape for t in tensors]


@pytest.mark.parametrize(
    "name",
    first_of(
        [
            "conv2d mixed",
            "conv3d",
            "conv2d dilated",
            "conv_transpose2d circular",
            "conv1d causal",
            "conv2d",
            "conv_transpose2d",
        ],
        4,
    ),
)
def test_one_dynamic_graph_serves_every_image_size(name):
    case = CASES[name]
    f, (x, w, b) = build(case)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
    rank = x.dim() - 2
    for size in (11, 7, 8, 5):  # the first has no extent in common with the weight, which would be assumed to stay
        images = [
            torch.randn(size - 2, x.shape[1], *range(size, size + rank), dtype=x.dtype).requires_grad_() for _ in "ab"
        ]
        leaves = [[image, *(t.detach().clone().requires_grad_() for t in (w, b))] for image in images]
        leaves[1][0] = images[0].detach().clone().requires_grad_()
        y, z = compiled(*leaves[0]), f(*leaves[1])
        assert y.stride() == z.stride()
        assert torch.equal(y, z)
        for ours, wanted in zip(
            torch.autograd.grad(y.pow(2).sum(), leaves[0]), torch.autograd.grad(z.pow(2).sum(), leaves[1]), strict=True
        ):
            assert_close(ours, wanted, 100)
    assert counter.frame_count == 1


def test_same_padding_compiles():
    f, tensors = build(CASES["conv2d depthwise"])
    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)(*tensors), f(*tensors))


def test_compiled_channels_last_keeps_its_strides():
    f, (x, w, b) = build(CASES["conv2d"], torch.float32)
    x = x.detach().to(memory_format=torch.channels_last)
    y = torch.compile(f, backend="aot_eager", fullgraph=True)(x, w, b)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, f(x, w, b))


def test_export_keeps_the_operator():
    class Net(torch.nn.Module):
        def forward(self, x, w):
            return triton_conv.conv2d(x, w, padding=1, padding_mode="circular")

    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=4), 3: torch.export.Dim("width", min=4)}
    program = torch.export.export(Net(), (x, w), dynamic_shapes=(free, None))
    assert ops.conv.default in [node.target for node in program.graph.nodes]
    other = torch.randn(5, 3, 9, 17)
    assert torch.equal(program.module()(other, w), Net()(other, w))


# ---------------------------------------------------------------------------------------------------------------------
# FLOP counting


def counted(f, tensors):
    """FLOPs of forward, input gradient and weight gradient."""
    x, w, b = (t.detach().clone() for t in tensors)
    result = []
    for chosen in ((), (0,), (1,)):
        leaves = [t.requires_grad_(i in chosen) for i, t in enumerate((x, w, b))]
        with FlopCounterMode(display=False) as counter:
            y = f(*leaves)
            if chosen:
                y.sum().backward()
        result.append(counter.get_total_flops() - sum(result[:1]))
    return result


# An output_padding above the stride makes an input gradient that is computed whole, counted so, and cropped.
CROPPED = "conv_transpose2d output_padding above stride"


@pytest.mark.parametrize("name", [name for name in CASES if name not in {*OURS_ALONE, CROPPED}])
def test_flops_are_those_of_pytorch(name):
    case = CASES[name]
    f, tensors = build(case)
    ours, wanted = counted(f, tensors), counted(theirs(case), tensors)
    assert ours[:2] == wanted[:2]
    assert ours[2] == ours[0]
    # PyTorch's formula counts all channels for each group in weight gradients (2.13 at least); these are of one group.
    assert wanted[2] in (ours[2], ours[2] * case[3].get("groups", 1))


def test_flops_are_those_of_the_formula():
    f, tensors = build(CASES["conv2d circular"])
    assert counted(f, tensors) == [2 * 2 * 4 * 4 * 2 * 3 * 9] * 3
    metas = [t.detach().to("meta") for t in tensors]
    assert counted(f, metas) == counted(f, tensors)


def test_flops_are_counted_whichever_is_imported_first():
    """Here the counter comes second; the first time is a matter of `when_imported`."""
    called = []
    later.when_imported("torch", lambda: called.append("at once"))
    assert called == ["at once"]
    code = """
import sys, triton_conv
loaded = "torch.utils.flop_counter" in sys.modules
import torch, triton_conv
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    triton_conv.conv1d(torch.ones(1, 2, 5), torch.ones(3, 2, 3))
print(loaded, counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", str(2 * 3 * 3 * 2 * 3)]
