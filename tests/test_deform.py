"""Deformable convolution: values against loops over their definition, gradients, what operators and modules must do."""

import copy
import doctest
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from halves import half_of
from tolerance import assert_close
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

import triton_conv
from triton_conv import deform, deform_conv2d, deform_nn, deform_ops, deform_plan, deform_reference, deform_run, nn

try:
    import torchvision
except Exception as error:  # also where it was built for another torch
    torchvision, why = None, f"torchvision cannot be imported: {type(error).__name__}"
else:
    why = ""
needs_torchvision = pytest.mark.skipif(torchvision is None, reason=why)

ops = torch.ops.triton_conv
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)


class Case(NamedTuple):
    """N C H W, then K R S, then what is not usual."""

    x: tuple = (2, 4, 4, 5)
    w: tuple = (4, 3, 2)
    stride: tuple = (1, 1)
    padding: tuple = ((1, 1), (1, 1))
    dilation: tuple = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    mask: bool = True
    bias: bool = True

    @property
    def params(self):
        return self.stride, self.padding, self.dilation

    @property
    def output(self):
        extents = zip(self.x[2:], self.w[1:], self.stride, self.padding, self.dilation, strict=True)
        return [(n + sum(p) - d * (f - 1) - 1) // s + 1 for n, f, s, p, d in extents]


CASES = [
    Case(),
    Case(mask=False, bias=False, offset_groups=2),
    Case(x=(1, 8, 6, 5), w=(4, 2, 3), stride=(2, 1), padding=((0, 2), (1, 0)), dilation=(1, 2), groups=2),
    Case(x=(1, 6, 4, 4), w=(6, 2, 2), groups=2, offset_groups=3, bias=False),
    Case(x=(2, 4, 3, 4), w=(4, 1, 1), padding=((0, 0), (0, 0)), groups=4, offset_groups=4),
]


# For the interpreter, which takes a millisecond for every step.
SMALL = Case(x=(1, 2, 3, 3), w=(2, 2, 1), padding=((0, 0), (0, 1)))


class Operands(NamedTuple):
    """What `deform_conv2d` takes, in its order up to bias."""

    input: torch.Tensor
    offset: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    mask: torch.Tensor | None

    @property
    def there(self):
        return [t for t in self if t is not None]


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def between(*shape):
    """Offsets of up to two pixels, a tenth away from whole ones: there derivatives exist."""
    return torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1 + torch.randint(-2, 2, shape)


def operands(case, dtype=torch.float64, offset_dtype=None, memory_format=torch.contiguous_format, device="cpu"):
    torch.manual_seed(0)
    (N, C, _, _), (K, R, S) = case.x, case.w
    taps = case.offset_groups * R * S
    made = [
        draw(*case.x, dtype=dtype),
        between(N, 2 * taps, *case.output).to(offset_dtype or dtype),
        draw(K, C // case.groups, R, S, dtype=dtype),
        draw(K, dtype=dtype) if case.bias else None,
        draw(N, taps, *case.output, dtype=offset_dtype or dtype) if case.mask else None,
    ]
    laid = [t if t is None or t.dim() != 4 else t.contiguous(memory_format=memory_format) for t in made]
    return Operands(*[t if t is None else t.to(device) for t in laid])


def leaves(given, dtype=None):
    """The same numbers, to be differentiated by."""
    return Operands(*[None if t is None else t.detach().cpu().to(dtype or t.dtype).requires_grad_() for t in given])


def convolve(case, given):
    return deform_conv2d(*given[:4], *case.params, given.mask)


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
        deform_ops._checked(*wide[:3], wide.mask, None, *_lists(case)).geometry,
        case.offset_groups,
    )
    expected = [sums, *torch.autograd.grad(sums, wide.there, dy.to(y).cpu().double())]
    for got, want in zip((y, *gradients), expected, strict=True):
        # samples are rounded before they are multiplied: the narrower dtype counts
        narrow = got.detach().to(y.dtype).cpu()
        assert_close(narrow, want.detach(), 100)
    return y, gradients


def _lists(case):
    return list(case.stride), [p for pair in case.padding for p in pair], list(case.dilation), None


LAYOUTS = (torch.contiguous_format, torch.channels_last)


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


def watched(monkeypatch):
    """The plans that are run from here on."""
    seen, plan = [], deform_run.plan
    monkeypatch.setattr(deform_run, "plan", lambda *args: seen.append(plan(*args)) or seen[-1])
    return seen


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
    found = ops.deform_conv_backward(dy, x, offset, weight, mask, *_lists(case), wanted)
    whole = ops.deform_conv_backward(dy, x, offset, weight, mask, *_lists(case), [True] * 4)
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
    arguments = (x, offset, weight, mask, bias, *_lists(TINY))
    torch.library.opcheck(ops.deform_conv.default, arguments, test_utils=(*LIGHT, *compiled))
    dy = draw(2, 4, 3, 3).requires_grad_()
    for m, wanted in ((mask, [True] * 4), (None, [True, True, True, False]), (mask, [False, False, False, True])):
        arguments = (dy, x, offset, weight, m, *_lists(TINY), wanted)
        torch.library.opcheck(ops.deform_conv_backward.default, arguments, test_utils=LIGHT)


@pytest.mark.slow
def test_opcheck_of_gradients():
    x, offset, weight, _, mask = leaves(operands(TINY))
    dy = draw(2, 4, 3, 3).requires_grad_()
    torch.library.opcheck(ops.deform_conv_backward.default, (dy, x, offset, weight, mask, *_lists(TINY), [True] * 4))


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


# ---------------------------------------------------------------------------------------------------------------------
# Modules and plans


def test_a_module_calls_the_function():
    x, offset, mask = torch.randn(2, 4, 6, 6), torch.randn(2, 36, 4, 3), torch.randn(2, 18, 4, 3)
    layer = nn.DeformConv2d(4, 6, 3, (1, 2), padding=(0, (1, 0)), groups=2)
    y = deform_conv2d(x, offset, layer.weight, layer.bias, (1, 2), (0, (1, 0)), mask=mask)
    assert torch.equal(layer(x, offset, mask), y)
    assert torch.equal(copy.deepcopy(layer)(x, offset, mask), y)
    other = nn.DeformConv2d(4, 6, 3, (1, 2), padding=(0, (1, 0)), groups=2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, offset, mask), y)
    assert (
        nn.DeformConv2d(4, 4, 3, padding="same", precision="ieee").extra_repr().endswith("padding=same, precision=ieee")
    )


@pytest.mark.parametrize(("modulation", "share"), [("sigmoid", 0.5), ("none", 1), (None, 1)])
def test_a_modulated_module_starts_as_a_convolution(modulation, share):
    layer = nn.ModulatedDeformConv2d(4, 6, 3, 2, 1, groups=2, offset_groups=2, modulation=modulation)
    x = torch.randn(2, 4, 6, 6)
    plain = functional.conv2d(x, share * layer.weight, layer.bias, 2, 1, groups=2)
    assert_close(layer(x), plain, 18)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (layer.weight, layer.bias, layer.conv_offset.weight))
    for part in layer.modules():  # as what fills a module made on the meta device does
        part.reset_parameters()
    assert_close(layer(x), functional.conv2d(x, share * layer.weight, layer.bias, 2, 1, groups=2), 18)


@pytest.mark.parametrize("modulation", ["sigmoid", "none", None])
def test_a_modulated_module_makes_its_own_offsets_and_mask(modulation):
    layer = nn.ModulatedDeformConv2d(4, 6, 3, padding=1, offset_groups=2, modulation=modulation)
    assert list(layer.state_dict()) == ["weight", "bias", "conv_offset.weight", "conv_offset.bias"]
    torch.nn.init.normal_(layer.conv_offset.weight)
    x = torch.randn(2, 4, 5, 5)
    found = functional.conv2d(x, layer.conv_offset.weight, layer.conv_offset.bias, padding=1)
    mask = {"sigmoid": found[:, 36:].sigmoid(), "none": found[:, 36:], None: None}[modulation]
    assert found.shape[1] == (36 if modulation is None else 54)
    assert_close(layer(x), deform_conv2d(x, found[:, :36], layer.weight, layer.bias, padding=1, mask=mask), 36)


def test_a_modulated_module_trains_under_autocast(kernels):
    layer = nn.ModulatedDeformConv2d(2, 2, 1, device=kernels)
    with torch.autocast(kernels, torch.bfloat16):
        y = layer(torch.randn(1, 2, 3, 3, device=kernels))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("cls", "wrong", "words"),
    [
        (nn.DeformConv2d, {"groups": 3}, "in_channels must be divisible by groups.*in_channels=4, groups=3"),
        (nn.DeformConv2d, {"groups": 4}, "out_channels must be divisible by groups.*out_channels=6, groups=4"),
        (nn.DeformConv2d, {"precision": "fast"}, "precision='fast'"),
        (nn.ModulatedDeformConv2d, {"modulation": "softmax"}, "modulation='softmax'"),
        (nn.ModulatedDeformConv2d, {"offset_groups": 3}, "in_channels=4, offset_groups=3"),
    ],
)
def test_constructors_refuse(cls, wrong, words):
    with pytest.raises(ValueError, match=words):
        cls(4, 6, 3, **wrong)


def test_plans_need_no_gpu():
    shapes = ((4, 64, 28, 28), (32, 64, 3, 3))
    plans = deform.plans(*shapes, dtype=torch.float16, padding=1, offset_groups=4, bias=True, channels_last=True)
    assert [p.role.value for p in plans.values()] == list(plans)
    assert all("offset groups 4, mask" in str(p) for p in plans.values())
    assert plans["forward"].asked.has_bias
    assert plans["forward"].asked.offset_dtype == "float16"
    fine = deform.plans(*shapes, dtype=torch.float16, padding=1, mask=False, offset_dtype=torch.float32)
    assert fine["forward"].asked.offset_dtype == "float32"
    assert not fine["forward"].asked.has_mask
    with pytest.raises(RuntimeError, match="3 offset groups"):
        deform.plans(*shapes, padding=1, offset_groups=3)


def test_copies_are_named():
    for channels_last in (False, True):
        how = {"dtype": torch.float16, "padding": 1, "channels_last": channels_last}
        p = deform.plans((8, 256, 56, 56), (256, 256, 3, 3), **how)["forward"]
        assert ("copy x to channels_last" in str(p)) is not channels_last
        assert p.workspace_bytes == (0 if channels_last else 2 * (8 * 256 * 56 * 56 + 256 * 256 * 9))


def test_plans_are_those_of_calls(kernels, monkeypatch):
    seen = watched(monkeypatch)
    case = SMALL._replace(offset_groups=2)
    given = Operands(*[t.requires_grad_() for t in operands(case, torch.float32, device=kernels)])
    y = convolve(case, given)
    y.backward(torch.ones_like(y))
    shown = deform.plans(
        case.x,
        tuple(given.weight.shape),
        device=seen[0].device,
        bias=True,
        offset_groups=2,
        padding=case.padding,
        mask=True,
    )
    assert {p.role: p.asked for p in seen} == {p.role: p.asked for p in shown.values()}


@pytest.mark.parametrize("module", [deform, deform_nn], ids=lambda m: m.__name__)
def test_the_examples_of_the_documentation(module):
    result = doctest.testmod(module, extraglobs={"torch": torch, "triton_conv": triton_conv, "plans": deform.plans})
    assert result.attempted > 5
    assert result.failed == 0
