"""What is wrong with calls of deformable convolutions, and what their operators must do."""

import pytest
import torch
from deform_cases import CASES, LAYOUTS, Case, Operands, convolve, draw, leaves, lists, operands
from tolerance import assert_close

from triton_conv import deform_conv2d, nn

ops = torch.ops.triton_conv


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with a call

GOOD = {"input": (2, 4, 5, 5), "offset": (2, 36, 5, 5), "weight": (6, 2, 3, 3), "bias": (6,), "mask": (2, 18, 5, 5)}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"input": (4, 5, 5)}, ["batched", "[4, 5, 5]"]),
        ({"input": (2, 4, 5)}, ["batched", "[2, 4, 5]"]),
        ({"weight": (6, 2, 3)}, ["4-dimensional weight", "[6, 2, 3]"]),
        ({"input": (2, 5, 5, 5)}, ["input channels", "weight.size(1) = 2", "[2, 5, 5, 5]"]),
        ({"weight": (6, 0, 3, 3)}, ["weight.size(1) = 0", "[6, 0, 3, 3]"]),
        ({"weight": (5, 2, 3, 3), "bias": (5,)}, ["divisible by 2", "[5, 2, 3, 3]"]),
        ({"offset": (2, 17, 5, 5)}, ["offset", "[2, 17, 5, 5]", "2 * offset groups * 3 * 3"]),
        ({"offset": (2, 0, 5, 5)}, ["offset", "[2, 0, 5, 5]"]),
        ({"offset": (36, 5, 5)}, ["offset", "[36, 5, 5]"]),
        ({"offset": (2, 54, 5, 5)}, ["3 offset groups", "4 channels"]),
        ({"offset": (1, 36, 5, 5)}, ["offset of size [2, 36, 5, 5]", "[1, 36, 5, 5]"]),
        ({"offset": (2, 36, 5, 4)}, ["offset of size [2, 36, 5, 5]", "[2, 36, 5, 4]"]),
        ({"mask": (2, 9, 5, 5)}, ["mask of size [2, 18, 5, 5]", "[2, 9, 5, 5]"]),
        ({"mask": (2, 18, 25)}, ["mask of size [2, 18, 5, 5]", "[2, 18, 25]"]),
        ({"bias": (5,)}, ["bias", "6 elements", "[5]"]),
        ({"input": (2, 4, 0, 5)}, ["[2, 4, 0, 5]"]),
        ({"weight": (6, 2, 9, 9)}, ["Kernel size can't be greater", "[6, 2, 9, 9]"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_that_do_not_fit(changed, words, device):
    tensors = {name: torch.ones(shape, device=device) for name, shape in (GOOD | changed).items()}
    with pytest.raises(RuntimeError) as error:
        deform_conv2d(**tensors, padding=1)
    assert all(word in str(error.value) for word in words), error.value


def test_types_and_dtypes_that_do_not_fit():
    x, offset, weight, bias, mask = (torch.ones(shape) for shape in GOOD.values())
    with pytest.raises(TypeError, match="argument 'offset' must be Tensor, not NoneType"):
        deform_conv2d(x, None, weight, padding=1)
    with pytest.raises(TypeError, match="argument 'mask' must be Tensor, not float"):
        deform_conv2d(x, offset, weight, padding=1, mask=1.0)
    with pytest.raises(TypeError, match="argument 'stride' must be int, not float"):
        deform_conv2d(x, offset, weight, stride=1.5)
    with pytest.raises(RuntimeError, match="stride"):
        deform_conv2d(x, offset, weight, stride=0, padding=1)
    with pytest.raises(RuntimeError, match="padding"):
        deform_conv2d(x, offset, weight, padding=-1)
    with pytest.raises(NotImplementedError, match=r"input .* has dtype torch.int64"):
        deform_conv2d(x.long(), offset, weight)
    with pytest.raises(NotImplementedError, match=r"input .* has dtype torch.complex64"):
        deform_conv2d(x.to(torch.complex64), offset, weight)
    with pytest.raises(RuntimeError, match=r"weight type \(torch.float64\)"):
        deform_conv2d(x, offset, weight.double(), padding=1)
    for wrong in ({"offset": offset.half()}, {"offset": offset.double()}, {"mask": mask.half()}):
        with pytest.raises(RuntimeError, match=r"offset and mask both of input's torch.float32"):
            deform_conv2d(**({"input": x, "offset": offset, "weight": weight, "mask": mask} | wrong), padding=1)
    with pytest.raises(RuntimeError, match=r"same device.*offset"):
        deform_conv2d(x, offset.to("meta"), weight, bias, padding=1)
    with pytest.raises(RuntimeError, match=r"layout torch.sparse_coo"):
        deform_conv2d(x, offset.to_sparse(), weight, padding=1)
    with pytest.raises(ValueError, match="precision='fast'"):
        deform_conv2d(x, offset, weight, padding=1, precision="fast")
    with pytest.raises(RuntimeError, match=r"expected grad_output \[2, 6, 5, 5\]"):
        ops.deform_conv_backward(x, x, offset, weight, mask, [1, 1], [1] * 4, [1, 1], None, [True] * 4)


# ---------------------------------------------------------------------------------------------------------------------
# What operators must do


TINY = Case(x=(2, 4, 3, 3), w=(4, 1, 1), padding=((0, 0), (0, 0)), groups=2, offset_groups=2)
LIGHT = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
def test_opcheck(memory_format):
    x, offset, weight, bias, mask = leaves(operands(TINY, memory_format=memory_format))
    compiled = () if memory_format is torch.contiguous_format else ("test_aot_dispatch_dynamic",)
    arguments = (x, offset, weight, mask, bias, *lists(TINY))
    torch.library.opcheck(ops.deform_conv.default, arguments, test_utils=(*LIGHT, *compiled))
    dy = draw(2, 4, 3, 3).requires_grad_()
    for m, wanted in ((mask, [True] * 4), (None, [True, True, True, False]), (mask, [False, False, False, True])):
        arguments = (dy, x, offset, weight, m, *lists(TINY), wanted)
        torch.library.opcheck(ops.deform_conv_backward.default, arguments, test_utils=LIGHT)


@pytest.mark.slow
def test_opcheck_of_gradients():
    x, offset, weight, _, mask = leaves(operands(TINY))
    dy = draw(2, 4, 3, 3).requires_grad_()
    torch.library.opcheck(ops.deform_conv_backward.default, (dy, x, offset, weight, mask, *lists(TINY), [True] * 4))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break(dynamic):
    case = CASES[3]

    def f(*given):
        return convolve(case, Operands(*given)) * 2

    given = leaves(operands(case))
    ours, theirs = f(*given), torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*given)
    assert torch.equal(ours, theirs)
    gradients = [torch.autograd.grad(y.sum(), given.there) for y in (ours, theirs)]
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Calls(torch.nn.Module):
    def forward(self, x, offset, weight, bias, mask):
        return deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)


def test_exported_traced_and_taken_by_fx():
    case = Case()
    given = operands(case)
    wanted = convolve(case, given)
    exported = torch.export.export(Calls(), tuple(given))
    assert "triton_conv.deform_conv" in str(exported.graph)
    assert torch.equal(exported.module()(*given), wanted)
    assert torch.equal(torch.jit.trace(Calls(), tuple(given))(*given), wanted)
    assert torch.equal(torch.fx.symbolic_trace(Calls())(*given), wanted)


def test_torch_jit_script_is_refused():
    with pytest.raises(RuntimeError, match="use torch\\.compile"):
        torch.jit.script(nn.DeformConv2d(2, 2, 3))


def test_autocast_leaves_positions_as_they_are():
    case = Case()
    given = leaves(operands(case, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = convolve(case, given)
        mixed = convolve(case, given._replace(mask=given.mask.bfloat16()))
        half = convolve(case, given._replace(offset=given.offset.bfloat16(), mask=given.mask.bfloat16()))
    x, offset, weight, bias, mask = given
    narrow = Operands(x.bfloat16(), offset, weight.bfloat16(), bias.bfloat16(), mask)
    assert torch.equal(y, convolve(case, narrow))
    assert torch.equal(mixed, convolve(case, narrow._replace(mask=mask.bfloat16().float())))
    assert torch.equal(half, convolve(case, narrow._replace(offset=offset.bfloat16(), mask=mask.bfloat16())))
    assert y.dtype == half.dtype == torch.bfloat16
    y.sum().backward()
    assert [t.grad.dtype for t in given] == [torch.float32] * 5


@pytest.mark.parametrize("in_dims", [(0, 1, None, None, 0), (0, None, None, None, None), (None, 0, 1, 0, 2)], ids=str)
def test_vmap(in_dims):
    case = CASES[3]._replace(bias=True)
    one = operands(case)
    many = [
        t if dim is None else torch.stack([t + 0.01 * i for i in range(3)], dim)
        for t, dim in zip(one, in_dims, strict=True)
    ]
    found = torch.func.vmap(lambda *given: convolve(case, Operands(*given)), in_dims)(*many)
    for i in range(3):
        alone = [t if dim is None else t.select(dim, i) for t, dim in zip(many, in_dims, strict=True)]
        assert_close(found[i], convolve(case, Operands(*alone)), 100)


def test_gradients_per_sample_and_derivatives_forward_over_reverse():
    case = Case(x=(1, 2, 3, 3), w=(2, 2, 2))
    x, offset, weight, bias, mask = operands(case)

    def loss(weight, offset, x):
        return convolve(case, Operands(x, offset, weight, bias, mask)).pow(2).sum()

    many = torch.stack((x, 2 * x))
    found = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0))(weight, offset, many)
    for i, sample in enumerate(many):
        given = weight.clone().requires_grad_(), offset.clone().requires_grad_()
        for ours, wanted in zip(found, torch.autograd.grad(loss(*given, sample), given), strict=True):
            assert_close(ours[i], wanted, 100)
    forward_over_reverse = torch.func.hessian(loss)(weight, offset, x)
    reverse_over_reverse = torch.func.jacrev(torch.func.jacrev(loss))(weight, offset, x)
    assert_close(forward_over_reverse, reverse_over_reverse, 100)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    case = Case()
    given = leaves(operands(case))
    (N, C, _, _), (K, R, S), (P, Q) = case.x, case.w, case.output
    with FlopCounterMode(display=False) as counter:
        y = convolve(case, given)
        assert counter.get_total_flops() == 2 * N * K * P * Q * C * R * S
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * N * K * P * Q * C * R * S
