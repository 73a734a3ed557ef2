"""Kernels of deformable convolutions, against a direct definition in float64."""

from typing import NamedTuple

import pytest
import torch

from triton_conv import check, deform_run, execute
from triton_conv.deform_config import DeformRole
from triton_conv.fuzz.deforming import definition
from triton_conv.geometry import ConvGeometry

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Case(NamedTuple):
    """A problem: x is N C H W, w is K C/groups R S."""

    x: tuple[int, int, int, int] = (2, 4, 5, 6)
    w: tuple[int, int, int, int] = (6, 4, 3, 2)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    offset_groups: int = 1
    mask: bool = True
    bias: bool = True
    spread: float = 1.0
    last: bool = True
    dtype: torch.dtype = DOUBLE
    precision: str = "ieee"

    @property
    def geometry(self) -> ConvGeometry:
        padding = [(side, side) for side in self.padding]
        return ConvGeometry.forward(self.x, self.w, self.stride, padding, self.dilation, groups=self.x[1] // self.w[1])


def operands(case, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    g, taps = case.geometry, case.w[2] * case.w[3]
    P, Q = g.output[1:]
    offset = case.spread * random(case.x[0], 2 * case.offset_groups * taps, P, Q)
    mask = random(case.x[0], case.offset_groups * taps, P, Q) if case.mask else None
    made = random(*case.x), offset, random(*case.w), mask, random(case.w[0]) if case.bias else None
    made = (*made, random(case.x[0], case.w[0], P, Q))
    return [laid(t, case) for t in made]


def laid(t, case):
    t = t if t is None else t.to(case.dtype)
    return t.contiguous(memory_format=torch.channels_last) if t is not None and t.dim() == 4 and case.last else t


def there(t):
    return t.cuda() if t is not None and torch.cuda.is_available() else t


def computed(case, *given, names=("y", "dx", "doffset", "dw")):
    """y and all gradients but bias', by kernels; dmask comes with doffset."""
    x, offset, w, mask, bias, dy = map(there, given)
    how = (case.geometry, case.offset_groups, case.precision, execute.device_of(x.device))
    found = {}
    if "y" in names:
        found["y"] = deform_run.forward(x, offset, w, mask, bias, *how, torch.empty_like(dy))
    if "dx" in names:
        found["dx"] = deform_run.input_gradient(dy, offset, w, mask, *how, torch.empty_like(x))
    if "doffset" in names:
        found["doffset"], found["dmask"] = deform_run.offset_gradients(dy, x, offset, w, mask, *how)
    if "dw" in names:
        found["dw"] = deform_run.weight_gradient(dy, x, offset, mask, *how, torch.empty_like(w))
    return {name: t if t is None else t.cpu() for name, t in found.items()}


def wanted(case, x, offset, w, mask, bias, dy):
    leaves = [t if t is None else t.to(DOUBLE).detach().requires_grad_() for t in (x, offset, w, mask, bias)]
    y = definition(*leaves, case.geometry)
    grads = iter(torch.autograd.grad(y, [t for t in leaves[:4] if t is not None], dy.to(DOUBLE)))
    dx, doffset, dw = next(grads), next(grads), next(grads)
    return {"y": y.detach(), "dx": dx, "doffset": doffset, "dmask": next(grads) if case.mask else None, "dw": dw}


def depths(case):
    """How many products sum up to an element of each result."""
    g, (_, P, Q) = case.geometry, case.geometry.output
    K, C = g.K // g.groups, g.C // g.groups
    over = g.C // case.offset_groups * K * 4
    return {"y": C * g.taps * 4, "dx": K * g.taps * 16, "doffset": over, "dmask": over, "dw": g.N * P * Q * 4}


def compare(case, given, **options):
    got, want, products = computed(case, *given, **options), wanted(case, *given), depths(case)
    for name in got:
        if want[name] is None:
            assert got[name] is None
            continue
        assert got[name].dtype is case.dtype
        assert got[name].shape == want[name].shape
        error = (got[name].to(DOUBLE) - want[name]).abs()
        # samples are rounded to the operands' dtype before they are multiplied
        rounded = torch.finfo(case.dtype).eps * products[name] ** 0.5 * want[name].abs().amax()
        allowed = check.tolerance(want[name], products[name], case.dtype, case.precision, given[0].device) + rounded
        worst = (error - allowed).argmax()
        assert (error <= allowed).all(), (name, float(error.flatten()[worst]), float(allowed.flatten()[worst]))
    return got


CASES = {
    "mask and bias": Case((2, 4, 3, 4), (6, 4, 2, 2)),
    "contiguous, strides and dilation": Case(
        (1, 3, 9, 8), (5, 3, 2, 2), (2, 1), (0, 1), (1, 3), mask=False, bias=False, last=False
    ),
    "groups": Case((1, 8, 4, 5), (6, 4, 1, 2)),
    "offset groups": Case((1, 8, 4, 5), (6, 8, 2, 1), offset_groups=2),
    "groups across offset groups": Case((1, 12, 3, 4), (10, 6, 1, 1), offset_groups=3, padding=(0, 1)),
    "offset groups across groups, without a dot": Case((1, 6, 3, 4), (4, 3, 1, 1), offset_groups=3, last=False),
    "depthwise": Case((2, 4, 3, 4), (4, 1, 2, 1), offset_groups=2, mask=False),
    "many channels, apart in memory": Case((1, 40, 3, 3), (72, 40, 1, 1), offset_groups=2, padding=(0, 0), last=False),
    "many pixels": Case((2, 3, 5, 5), (4, 3, 1, 1), spread=0.3),
    "far outside": Case((1, 3, 4, 4), (4, 3, 1, 2), spread=9.0),
    "float16": Case((2, 8, 4, 5), (6, 8, 2, 1), dtype=HALF),
    "bfloat16": Case((2, 8, 4, 5), (6, 8, 1, 2), dtype=BRAIN, last=False),
    "float32": Case((1, 8, 4, 5), (6, 8, 1, 2), dtype=SINGLE),
    "float32 as tf32": Case((1, 8, 4, 5), (6, 8, 2, 1), dtype=SINGLE, precision="tf32", mask=False),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_against_the_definition(name, kernels, poisoned):
    case = CASES[name]
    compare(case, operands(case))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "groups", "last"), [(HALF, 1, False), (BRAIN, 2, True), (SINGLE, 2, False), (DOUBLE, 1, True)]
)
def test_three_by_three(dtype, groups, last, kernels, poisoned):
    case = Case((1, 24, 5, 6), (20, 24 // groups, 3, 3), (1, 2), offset_groups=2, dtype=dtype, last=last)
    compare(case, operands(case))


def test_positions_between_and_on_pixels_and_borders(kernels, poisoned):
    """Offsets are whole numbers, with which taps sample at -1, 0, H - 1 and H too: slopes are those to the right."""
    case = Case((2, 3, 4, 5), (4, 3, 1, 2), spread=2.0)
    x, offset, *rest = operands(case)
    offset = offset.round()
    base = torch.arange(4 + 2).view(-1, 1) - 1 + offset[:, 0::2].squeeze()
    assert {-1, 0, 3, 4} <= set(base.flatten().tolist())
    compare(case, [x, offset, *rest])


@pytest.mark.parametrize(("at", "pixels"), [((1.25, 2.5), 4), ((-0.5, 3.75), 2), ((2.0, 2.0), 1)])
def test_all_taps_sample_at_one_place(at, pixels, kernels, poisoned):
    """All contributions to the gradient of x are to the same few pixels."""
    case = Case((1, 3, 4, 5), (4, 3, 1, 2))
    x, offset, *rest = operands(case)
    P, Q = case.geometry.output[1:]
    rows, columns = torch.arange(P).view(-1, 1) - 1, torch.arange(Q) - 1
    for s in range(2):
        offset[:, 2 * s] = at[0] - rows
        offset[:, 2 * s + 1] = at[1] - columns - s
    got = compare(case, [x, offset, *rest], names=("dx",))
    assert int((got["dx"].abs().sum((0, 1)) > 0).sum()) == pixels


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # NumPy's, of the interpreter
def test_offsets_that_are_no_numbers(kernels, poisoned):
    """An infinite offset is outside; one that is no number shows in y and not elsewhere, and gives x no gradient."""
    case = Case((1, 3, 4, 4), (4, 3, 1, 2), mask=False)
    x, offset, *rest = operands(case)
    far = offset.clone()
    for channel, row, value in ((0, 1, torch.inf), (3, 2, -torch.inf), (0, 0, torch.nan)):
        offset[0, channel, row, 2], far[0, channel, row, 2] = value, 100.0
    got, want = computed(case, x, offset, *rest, names=("y", "dx")), wanted(case, x, far, *rest)
    assert got["y"].isnan().sum() == 4
    assert got["y"][0, :, 0, 2].isnan().all()
    got["y"][0, :, 0, 2] = want["y"][0, :, 0, 2]
    torch.testing.assert_close(got["y"], want["y"])
    torch.testing.assert_close(got["dx"], want["dx"])


def test_any_strides(kernels, poisoned):
    """Tensors that are parts of others, expanded or lie in any order."""
    case = Case((2, 4, 4, 3), (4, 4, 1, 1), last=False)
    x, offset, w, mask, bias, dy = operands(case)
    mask = mask[:, :1, :, :1].expand(mask.shape)
    dy = dy[:, :1].expand(dy.shape)
    wide = [torch.cat((t, torch.full_like(t, torch.nan)), 1)[:, : t.shape[1]] for t in (x, offset)]
    got = compare(case, [wide[0].transpose(2, 3).contiguous().transpose(2, 3), wide[1], w, mask, bias, dy])
    assert got["doffset"].stride() == offset.stride()


def test_offsets_may_be_more_precise(kernels, poisoned):
    """float32 offsets and masks with float16 images: the gradients are float32."""
    case = Case((1, 4, 4, 4), (4, 4, 1, 1), dtype=HALF)
    x, offset, w, mask, bias, dy = operands(case)
    given = (x, offset.float() + 1e-4, w, mask.float(), bias, dy)
    got, want = computed(case, *given, names=("y", "doffset")), wanted(case, *given)
    for name in ("doffset", "dmask"):
        assert got[name].dtype is SINGLE
        torch.testing.assert_close(got[name].to(DOUBLE), want[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["y"].to(DOUBLE), want["y"], rtol=5e-3, atol=5e-3)


def test_weight_gradients_by_slabs(kernels, poisoned):
    """Many pixels are cut into slabs, which are summed."""
    case = Case((1, 3, 16, 16), (4, 3, 1, 1), padding=(0, 0))
    x, offset, w, mask, _, dy = given = operands(case)
    problem = (DeformRole.WEIGHT, x, w, dy, offset, mask, case.geometry, 1, "ieee", execute.device_of(there(x).device))
    p = deform_run.plan(*problem)
    assert [launch.name for launch in p.launches] == ["deform_wgrad", "sum_slabs"]
    assert p.workspace_bytes == p.config.splits * w.numel() * 8
    compare(case, given, names=("dw",))


def test_the_same_bits_every_time(kernels, poisoned):
    case = Case((1, 4, 4, 4), (4, 4, 1, 1), dtype=HALF, padding=(0, 0))
    once, again = (computed(case, *operands(case)) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_nothing_to_compute(kernels, poisoned):
    case = Case((0, 4, 4, 4), (4, 4, 1, 2))
    got = computed(case, *operands(case))
    assert got["y"].numel() == got["dx"].numel() == 0
    assert torch.equal(got["dw"], torch.zeros_like(got["dw"]))


def test_torchvision_agrees(kernels, poisoned):
    """Gradients too, where taps sample between pixels, on them, on borders and outside."""
    try:
        from torchvision import ops
    except (ImportError, RuntimeError) as error:  # the latter where it was built for another PyTorch
        pytest.skip(f"torchvision cannot be imported: {error}")
    case = Case((2, 4, 3, 4), (4, 4, 1, 2), spread=2.0, offset_groups=2)
    x, offset, w, mask, bias, dy = given = operands(case)
    offset[1] = offset[1].round()
    leaves = [t.clone().requires_grad_() for t in (x, offset, mask, w)]
    y = ops.deform_conv2d(leaves[0], leaves[1], leaves[3], bias, padding=case.padding, mask=leaves[2])
    want = dict(zip(("dx", "doffset", "dmask", "dw"), torch.autograd.grad(y, leaves, dy), strict=True))
    got = computed(case, *given)
    for name, t in {"y": y.detach(), **want}.items():
        torch.testing.assert_close(got[name], t, msg=lambda m, name=name: f"{name}: {m}")
