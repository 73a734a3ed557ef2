"""Deformable convolution: values against loops over their definition and against torchvision, gradients."""

import itertools
import math

import pytest
import torch
from deform_cases import (
    CASES,
    DTYPES,
    HALF,
    LAYOUTS,
    SMALL,
    Case,
    Operands,
    convolve,
    draw,
    leaves,
    lists,
    operands,
    watched,
)
from halves import half_of
from tolerance import assert_close
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

import triton_conv
from triton_conv import deform_conv2d, deform_ops, deform_plan, deform_reference, nn

try:
    import torchvision
except Exception as error:  # also where it was built for another torch
    torchvision, why = None, f"torchvision cannot be imported: {type(error).__name__}"
else:
    why = ""
needs_torchvision = pytest.mark.skipif(torchvision is None, reason=why)

ops = torch.ops.triton_conv


def defined(case, given):
    """The definition, one number at a time."""
    x, offset, weight, bias, mask = given
    (N, C, H, W), (K, R, S), (P, Q) = case.x, case.w, case.output
    y = torch.zeros(N, K, P, Q, dtype=torch.float64)

    def pixel(n, c, i, j):
        return x[n, c, i, j].item() if 0 <= i < H and 0 <= j < W else 0.0

    def sample(n, c, r, s, p, q):
        tap = c // (C // case.offset_groups) * R * S + r * S + s
        i = p * case.stride[0] - case.padding[0][0] + r * case.dilation[0] + offset[n, 2 * tap, p, q].item()
        j = q * case.stride[1] - case.padding[1][0] + s * case.dilation[1] + offset[n, 2 * tap + 1, p, q].item()
        top, left = math.floor(i), math.floor(j)
        near = itertools.product((top, top + 1), (left, left + 1))
        mean = sum((1 - abs(i - a)) * (1 - abs(j - b)) * pixel(n, c, a, b) for a, b in near)
        return mean if mask is None else mask[n, tap, p, q].item() * mean

    for n, p, q in itertools.product(range(N), range(P), range(Q)):
        samples = {at: sample(n, *at, p, q) for at in itertools.product(range(C), range(R), range(S))}
        for k in range(K):
            first = k // (K // case.groups) * (C // case.groups)
            products = [
                weight[k, c - first, r, s].item() * v
                for (c, r, s), v in samples.items()
                if 0 <= c - first < C // case.groups
            ]
            y[n, k, p, q] = sum(products) + (0 if bias is None else bias[k].item())
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_values_are_those_of_the_definition(case):
    given = operands(case)
    assert_close(convolve(case, given), defined(case, given), 100)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_gradients_of_any_order(case):
    given = leaves(operands(case))

    def f(*there):
        values = iter(there)
        return convolve(case, Operands(*[None if t is None else next(values) for t in given]))

    assert gradcheck(f, given.there, fast_mode=True, check_forward_ad=case is CASES[0])
    assert gradgradcheck(f, given.there, fast_mode=True)


def test_each_gradient_element_by_element():
    case = Case(x=(1, 2, 2, 3), w=(2, 2, 1), offset_groups=2, padding=((0, 0), (0, 0)))
    given = leaves(operands(case))
    assert gradcheck(lambda *there: convolve(case, Operands(*there)), tuple(given), check_forward_ad=True)


def check_kernels(case, given):
    """y and gradients by the kernels, against those of the reference in float64 from the same numbers."""
    wide, mine = leaves(given, torch.float64), Operands(*[t if t is None else t.requires_grad_() for t in given])
    y = convolve(case, mine)
    torch.manual_seed(1)
    dy = draw(*y.shape)
    gradients = torch.autograd.grad(y, mine.there, dy.to(y))
    assert [g.dtype for g in gradients] == [t.dtype for t in mine.there]
    sums = deform_reference.forward(
        *wide[:3],
        wide.mask,
        wide.bias,
        deform_ops._checked(*wide[:3], wide.mask, None, *lists(case)).geometry,
        case.offset_groups,
    )
    expected = [sums, *torch.autograd.grad(sums, wide.there, dy.to(y).cpu().double())]
    for got, want in zip((y, *gradients), expected, strict=True):
        # samples are rounded before they are multiplied: the narrower dtype counts
        narrow = got.detach().to(y.dtype).cpu()
        assert_close(narrow, want.detach(), 100)
    return y, gradients


@pytest.mark.parametrize(("dtype", "memory_format"), half_of(DTYPES, LAYOUTS))
def test_kernels_of_every_dtype(dtype, memory_format, kernels, poisoned):
    case = SMALL._replace(offset_groups=2)
    given = operands(case, dtype, memory_format=memory_format, device=kernels)
    y, gradients = check_kernels(case, given)
    assert y.is_contiguous(memory_format=memory_format)
    assert [g.stride() for g in gradients] == [t.stride() for t in given.there]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_kernels_of_every_shape(case, kernels, poisoned):
    check_kernels(case, operands(case, device=kernels))


@pytest.mark.parametrize("dtype", [HALF[0], pytest.param(HALF[1], marks=pytest.mark.slow)], ids=str)
def test_kernels_with_float32_offsets_beside_16_bits(dtype, kernels, poisoned):
    check_kernels(SMALL, operands(SMALL, dtype, torch.float32, device=kernels))


def test_float32_offsets_keep_fractions_that_16_bits_lose():
    x, weight = torch.arange(1000.0).view(1, 1, 1, 1000).bfloat16(), torch.ones(1, 1, 1, 1).bfloat16()
    far = torch.tensor([0.0, 100.125]).view(1, 2, 1, 1).expand(1, 2, 1, 1000)
    exact = deform_conv2d(x[..., :200].float(), far[..., :200], weight.float())
    assert torch.equal(deform_conv2d(x[..., :200], far[..., :200], weight), exact.bfloat16())
    assert not torch.equal(deform_conv2d(x[..., :200], far[..., :200].bfloat16(), weight), exact.bfloat16())


def test_channel_slices_of_one_tensor_are_taken_as_they_are(kernels):
    given = operands(SMALL, device=kernels)
    both = torch.cat((given.offset, given.mask), 1).contiguous(memory_format=torch.channels_last)
    views = given._replace(offset=both[:, :4], mask=both[:, 4:])
    for ours, theirs in zip(check_kernels(SMALL, views)[1], check_kernels(SMALL, given)[1], strict=True):
        assert_close(ours, theirs, 100)


def test_images_whose_channels_lie_apart(kernels, poisoned, monkeypatch):
    monkeypatch.setattr(deform_plan, "_WORTH_PACKING", 2)
    deform_plan._make.cache_clear()
    seen = watched(monkeypatch)
    y, gradients = check_kernels(SMALL, operands(SMALL, torch.float32, device=kernels))
    deform_plan._make.cache_clear()
    assert {p.role.value: "".join(p.packs) for p in seen} == {
        "forward": "xw",
        "input gradient": "wy",
        "offset and mask gradient": "xwy",
        "weight gradient": "xwy",
    }
    assert y.is_contiguous()
    assert all(g.is_contiguous() for g in gradients)


def test_the_same_bits_every_time(kernels):
    case = SMALL
    given = operands(case, torch.float32, device=kernels)
    crowded = given._replace(offset=given.offset * 0 + 0.3)
    dy = draw(1, 2, *case.output, dtype=torch.float32).to(kernels)
    runs = []
    for _ in range(2):
        mine = Operands(*[t.detach().requires_grad_() for t in crowded])
        y = convolve(case, mine)
        runs.append((y, *torch.autograd.grad(y, mine.there, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_sample_does_not_depend_on_its_batch():
    case = Case(x=(3, 8, 7, 7), w=(4, 3, 3))
    given = operands(case, torch.float32)
    one = Operands(given.input[1:2], given.offset[1:2], given.weight, given.bias, given.mask[1:2])
    with triton_conv.batch_invariant():
        for these in (given, one):
            for t in these:
                t.requires_grad_()
        many, alone = convolve(case, given), convolve(case._replace(x=(1, *case.x[1:])), one)
        assert torch.equal(many[1:2], alone)
        (dx,), (dalone,) = torch.autograd.grad(many.sum(), given.input), torch.autograd.grad(alone.sum(), one.input)
    assert torch.equal(dx[1:2], dalone)


def test_without_offsets_it_is_a_convolution(kernels):
    x, w, bias = draw(1, 4, 5, 5), draw(6, 2, 3, 3), draw(6)
    tensors = [t.to(kernels) for t in (x, torch.zeros(1, 18, 3, 3), w, bias)]
    y = deform_conv2d(*(t.double() for t in tensors), stride=2, padding=1)
    assert_close(y.cpu(), functional.conv2d(x, w, bias, 2, 1, groups=2), 40)


def row_of(*values):
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


@pytest.mark.parametrize(
    ("position", "value", "slope"),
    [
        (0.0, 1, 1),  # whole numbers: the derivative to the right
        (2.0, 4, -4),
        (-1.0, 0, 1),
        (-0.25, 0.75, 1),
        (2.75, 1, -4),
        (3.0, 0, 0),
        (-1.5, 0, 0),
        (1e30, 0, 0),
        (-math.inf, 0, 0),
        (math.inf, 0, 0),
    ],
)
def test_positions_and_their_derivatives(position, value, slope, kernels):
    x, weight = row_of(1, 2, 4)[..., :3].to(kernels), torch.ones(1, 1, 1, 1, dtype=torch.float64, device=kernels)
    offset = torch.tensor([0, position], dtype=torch.float64, device=kernels).view(1, 2, 1, 1).requires_grad_()
    y = deform_conv2d(x, offset, weight, stride=3)
    assert y.item() == value
    y.backward()
    assert offset.grad[0, 1].item() == slope
    dx = torch.autograd.grad(deform_conv2d(x.requires_grad_(), offset, weight, stride=3), x)[0]
    assert dx.isfinite().all()


def test_a_position_that_is_no_number_shows(kernels):
    x, weight = row_of(1, 2, 4).to(kernels), torch.ones(1, 1, 1, 1, dtype=torch.float64, device=kernels)
    offset = torch.zeros(1, 2, 1, 3, dtype=torch.float64, device=kernels)
    offset[0, 0, 0, 1] = torch.nan
    y = deform_conv2d(x, offset, weight)
    assert y.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("asked", ["input", "offset", "weight", "bias", "mask"])
def test_only_what_is_asked_for_gets_a_gradient(asked, kernels):
    case = SMALL
    given = operands(case, device=kernels)
    getattr(given, asked).requires_grad_()
    convolve(case, given).sum().backward()
    assert [name for name, t in zip(Operands._fields, given, strict=True) if t.grad is not None] == [asked]


@pytest.mark.parametrize(
    "wanted", [[True, False, False, False], [False, True, False, True], [False, False, True, False]]
)
def test_unwanted_gradients_are_empty(wanted, kernels):
    case = SMALL
    x, offset, weight, _, mask = operands(case, device=kernels)
    dy = draw(1, 2, *case.output).to(kernels)
    found = ops.deform_conv_backward(dy, x, offset, weight, mask, *lists(case), wanted)
    whole = ops.deform_conv_backward(dy, x, offset, weight, mask, *lists(case), [True] * 4)
    for want, part, all_of_it in zip(wanted, found, whole, strict=True):
        assert torch.equal(part, all_of_it) if want else part.shape == (0,)


def test_nothing_to_do(kernels):
    x, offset = torch.ones(0, 2, 4, 4, device=kernels), torch.ones(0, 8, 3, 3, device=kernels)
    weight = torch.ones(3, 2, 2, 2, device=kernels)
    for t in (x, offset, weight):
        t.requires_grad_()
    y = deform_conv2d(x, offset, weight)
    assert y.shape == (0, 3, 3, 3)
    y.sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (x, offset, weight))


def test_kernels_run_and_not_the_reference(kernels, monkeypatch):
    def refuse(*_):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(deform_reference, "forward", refuse)
    monkeypatch.setattr(deform_reference, "gradients", refuse)
    given = Operands(*[t.requires_grad_() for t in operands(SMALL, device=kernels)])
    convolve(SMALL, given).sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# torchvision


@needs_torchvision
@pytest.mark.parametrize("moved", [1.5, 0.0])
@pytest.mark.parametrize("case", [0, 1, 3, 4])
def test_values_and_gradients_are_torchvisions(case, moved):
    case = CASES[case]
    given = operands(case)
    given = given._replace(offset=given.offset * moved)
    padding = [pair[0] for pair in case.padding]
    ours, theirs = leaves(given), leaves(given)
    y = convolve(case, ours)
    z = torchvision.ops.deform_conv2d(*theirs[:4], case.stride, padding, case.dilation, theirs.mask)
    assert_close(y, z, 100)
    dy = draw(*z.shape)
    found = torch.autograd.grad(y, ours.there, dy), torch.autograd.grad(z, theirs.there, dy)
    for mine, wanted in zip(*found, strict=True):
        assert_close(mine, wanted, 100)


@needs_torchvision
def test_the_module_is_torchvisions():
    theirs = torchvision.ops.DeformConv2d(4, 6, (3, 2), 2, 1, (1, 2), groups=2, bias=False)
    torch.manual_seed(3)
    theirs.reset_parameters()
    torch.manual_seed(3)
    ours = nn.DeformConv2d(4, 6, (3, 2), 2, 1, (1, 2), groups=2, bias=False)
    assert torch.equal(ours.weight, theirs.weight)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@needs_torchvision
def test_convert_takes_torchvisions_modules():
    mine = type("Mine", (torchvision.ops.DeformConv2d,), {})
    model = torch.nn.ModuleList([torchvision.ops.DeformConv2d(2, 3, 3), mine(2, 3, 3), torch.nn.Conv2d(2, 3, 3)])
    x, offset = torch.randn(1, 2, 5, 5), torch.randn(1, 18, 3, 3)
    before, weight = model[0](x, offset), model[0].weight
    found = triton_conv.convert(model)
    assert found.converted == ("0", "2")
    assert "derive it from triton_conv.nn.DeformConv2d" in str(found)
    assert type(model[0]) is nn.DeformConv2d
    assert model[0].weight is weight
    assert_close(model[0](x, offset), before, 18)
    assert "already converted" in str(triton_conv.convert(model))


@needs_torchvision
def test_override_covers_torchvisions_function():
    case = Case(mask=False)
    given = operands(case)
    with triton_conv.override():
        y = torchvision.ops.deform_conv2d(*given[:4], padding=1)
    assert torch.equal(y, convolve(case, given))
    mask = draw(2, 6, *case.output)
    with triton_conv.override():
        y = torchvision.ops.deform_conv2d(*given[:4], padding=1, mask=mask)
    assert torch.equal(y, convolve(case, given._replace(mask=mask)))
