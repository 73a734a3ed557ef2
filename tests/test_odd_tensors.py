"""Every kernel and operator on tensors as programs really make them, against plain torch in float64.

Views of every kind, empty tensors, gradients of any subset, tensors changed between forward and backward, tensors of
inference mode, subclasses, operands that share memory.
"""

from collections.abc import Callable, Mapping
from itertools import combinations
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import triton_conv
from triton_conv import Branch, config
from triton_conv.config import BandedConfig, BoxConfig
from triton_conv.geometry import Role
from triton_conv.kernels.launch import Launch

LAST = torch.channels_last
BANDED = {role: BandedConfig((2, 8, 1), 1, 16, 16) for role in (Role.FPROP, Role.DGRAD)}
BOXES = {Role.WGRAD: BoxConfig((1, 1, 1, 16), 64, 16, splits=2)}


class Family(NamedTuple):
    """What ours computes and plain torch does, of tensors of these shapes.

    `kernels` are those that it has to launch with `configs`; `dtypes` are those of operands that have not the output's.
    """

    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    kernels: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    gradients: bool = True
    last: bool = False
    configs: Mapping[Role, Any] = MappingProxyType({})
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({})


def _plain(name: str, **how: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    ours, theirs = getattr(triton_conv, name), getattr(functional, name)
    return lambda **t: ours(**t, **how), lambda **t: theirs(**t, **how)


def _finished(activation: str, after: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def ours(scale, residual, **t):
        how = {"padding": 1, "activation": activation, "residual_after_activation": after}
        return triton_conv.conv2d(**t, scale=scale, residual=residual, **how)

    def theirs(input, weight, bias, scale, residual):
        z = functional.conv2d(input, weight, padding=1) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
        function = getattr(functional, activation)
        return function(z) + residual if after else function(z + residual)

    return ours, theirs


def _scaled(input, weight, scale_a, scale_b, bias):
    return functional.conv2d(input * scale_a, weight * scale_b, bias, padding=1)


def _curved(input, weight, bias, scale, residual):
    """With an activation that complex numbers have."""
    z = functional.conv2d(input, weight, padding=1) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
    return (z + residual).sigmoid()


def _summed(input, first, second, bias):
    branches = [Branch(first, bias), Branch(second, padding=1)]
    return triton_conv.multi_conv2d(input, branches, combine="sum")


def _reflected(input, weight, bias):
    return functional.conv2d(functional.pad(input, (1, 1, 1, 1), mode="reflect"), weight, bias)


def _causal(x, weight, bias, initial_state):
    C = x.shape[1]
    return functional.silu(functional.conv1d(torch.cat((initial_state, x), 2), weight.unsqueeze(1), bias, groups=C))


def _updated(x, weight, bias, initial_state):
    return triton_conv.causal_conv1d_update(x, initial_state.clone(), weight, bias, "silu")


def _video(x, weight, bias, context):
    return functional.conv3d(torch.cat((context, x), 2), weight, bias, padding=(0, 1, 1))


def _separable(input, depthwise, pointwise, bias):
    between = functional.conv2d(input, depthwise, padding=1, groups=input.shape[1])
    return functional.conv2d(between, pointwise, bias)


def _deformed(input, offset, weight, mask, bias):
    """One tap, whose offsets are not moved by gradients across a pixel."""
    H, W = input.shape[2:]
    ys, xs = torch.meshgrid(torch.arange(H, dtype=input.dtype), torch.arange(W, dtype=input.dtype), indexing="ij")
    y, x = ys + offset[:, 0], xs + offset[:, 1]
    at = torch.stack((2 * (x + 1) / (W + 1) - 1, 2 * (y + 1) / (H + 1) - 1), -1)
    framed = functional.pad(input, (1, 1, 1, 1))  # outside are zeros
    samples = functional.grid_sample(framed, at, align_corners=True) * mask
    return functional.conv2d(samples, weight, bias)


def _branched(input, first, second, bias):
    """The second filter is in two branches."""
    branches = [Branch(first, bias), Branch(second, padding=1), Branch(second, None, padding=2, dilation=2)]
    return triton_conv.multi_conv2d(input, branches, one_launch=True)


def _apart(input, first, second, bias):
    parts = (functional.conv2d(input, first, bias), functional.conv2d(input, second, padding=1))
    return torch.cat((*parts, functional.conv2d(input, second, padding=2, dilation=2)), 1)


EIGHT_BITS = dict.fromkeys(("input", "weight"), torch.float8_e4m3fn)
EIGHT_BITS |= dict.fromkeys(("scale_a", "scale_b"), torch.float32)
FAMILIES = {
    "gather": Family(
        *_plain("conv2d", padding=1, stride=2),
        {"input": (2, 3, 4, 5), "weight": (4, 3, 3, 3), "bias": (4,)},
        ("gather", "wgrad"),
    ),
    "gather in halves": Family(
        *_plain("conv2d", groups=2),
        {"input": (2, 8, 3, 4), "weight": (8, 4, 1, 2), "bias": (8,)},
        ("gather", "wgrad"),
        torch.float16,
    ),
    "transposed": Family(
        *_plain("conv_transpose1d", stride=2, padding=1),
        {"input": (2, 3, 5), "weight": (3, 4, 3), "bias": (4,)},
        ("gather", "wgrad"),
    ),
    "reflected": Family(
        _plain("conv2d", padding=1, padding_mode="reflect")[0],
        _reflected,
        {"input": (1, 2, 3, 4), "weight": (3, 2, 3, 3), "bias": (3,)},
        ("gather", "fold", "wgrad"),
    ),
    "box": Family(
        *_plain("conv2d", padding=1),
        {"input": (2, 16, 4, 5), "weight": (16, 16, 3, 3), "bias": (16,)},
        ("box", "box_wgrad"),
        torch.bfloat16,
        last=True,
        configs=BOXES,
    ),
    "depthwise": Family(
        *_plain("conv2d", padding=1, groups=3),
        {"input": (2, 3, 4, 6), "weight": (3, 1, 3, 3), "bias": (3,)},
        ("depthwise", "depthwise_wgrad"),
    ),
    "banded": Family(
        *_plain("conv2d", padding=(0, 6), groups=2),
        {"input": (2, 2, 3, 16), "weight": (2, 1, 1, 13), "bias": (2,)},
        ("banded",),
        torch.float16,
        configs=BANDED,
    ),
    "finished": Family(
        *_finished("silu", False),
        {"input": (2, 3, 3, 4), "weight": (4, 3, 3, 3), "bias": (4,), "scale": (4,), "residual": (2, 4, 3, 4)},
        ("gather", "activation_backward"),
    ),
    "finished by its output": Family(
        *_finished("relu", True),
        {"input": (2, 3, 3, 4), "weight": (3, 3, 3, 3), "bias": (3,), "scale": (3,), "residual": (2, 3, 3, 4)},
        ("gather", "activation_backward"),
    ),
    "causal": Family(
        lambda x, weight, bias, initial_state: triton_conv.causal_conv1d(x, weight, bias, "silu", initial_state),
        _causal,
        {"x": (2, 3, 9), "weight": (3, 4), "bias": (3,), "initial_state": (2, 3, 3)},
        ("causal", "causal_backward"),
    ),
    "causal update": Family(
        _updated,
        _causal,
        {"x": (2, 3, 2), "weight": (3, 4), "bias": (3,), "initial_state": (2, 3, 3)},
        ("causal_update",),
        gradients=False,
    ),
    "video": Family(
        lambda x, weight, bias, context: triton_conv.causal_conv3d(x, weight, bias, context, padding=1),
        _video,
        {"x": (1, 3, 2, 3, 4), "weight": (4, 3, 3, 3, 3), "bias": (4,), "context": (1, 3, 2, 3, 4)},
        ("gather", "wgrad"),
    ),
    "separable": Family(
        lambda **t: triton_conv.separable_conv2d(**t, padding=1, fused=True),
        _separable,
        {"input": (2, 3, 4, 5), "depthwise": (6, 1, 3, 3), "pointwise": (4, 6, 1, 1), "bias": (4,)},
        ("separable",),
        gradients=False,
    ),
    "deformed": Family(
        triton_conv.deform_conv2d,
        _deformed,
        {"input": (2, 3, 3, 4), "offset": (2, 2, 3, 4), "weight": (4, 3, 1, 1), "mask": (2, 1, 3, 4), "bias": (4,)},
        ("deform",),
    ),
    "branches": Family(
        _branched,
        _apart,
        {"input": (1, 16, 3, 4), "first": (8, 16, 1, 1), "second": (8, 16, 3, 3), "bias": (8,)},
        ("gather_branches",),
    ),
    "8-bit floats": Family(
        lambda **t: triton_conv.scaled_conv2d(**t, padding=1),
        _scaled,
        {"input": (2, 16, 3, 4), "weight": (4, 16, 2, 2), "scale_a": (), "scale_b": (1,), "bias": (4,)},
        ("gather",),
        torch.bfloat16,
        gradients=False,
        dtypes=EIGHT_BITS,
    ),
    "8-bit integers": Family(
        lambda **t: triton_conv.int_conv2d(**t, padding=1),
        _plain("conv2d", padding=1)[1],
        {"input": (2, 16, 3, 4), "weight": (4, 16, 2, 2), "bias": (4,)},
        ("gather",),
        torch.int32,
        gradients=False,
        dtypes=dict.fromkeys(("input", "weight"), torch.int8),
    ),
    "complex": Family(
        *_plain("conv2d", groups=2),
        {"input": (1, 4, 3, 3), "weight": (4, 2, 2, 2), "bias": (4,)},
        ("gather", "wgrad"),
        torch.complex64,
    ),
    "complex transposed": Family(
        *_plain("conv_transpose1d", stride=2),
        {"input": (1, 3, 3), "weight": (3, 2, 3), "bias": (2,)},
        ("gather", "wgrad"),
        torch.complex64,
    ),
    "complex finished": Family(
        lambda **t: triton_conv.conv2d(**t, padding=1, activation="sigmoid"),
        _curved,
        {"input": (1, 2, 3, 3), "weight": (2, 2, 3, 3), "bias": (2,), "scale": (2,), "residual": (1, 2, 3, 3)},
        ("gather",),
        torch.complex64,
    ),
    "complex separable": Family(
        lambda **t: triton_conv.separable_conv2d(**t, padding=1),
        _separable,
        {"input": (1, 2, 3, 3), "depthwise": (2, 1, 3, 3), "pointwise": (3, 2, 1, 1), "bias": (3,)},
        ("depthwise", "gather"),
        torch.complex64,
    ),
    "complex branches": Family(
        _summed,
        lambda input, first, second, bias: (
            functional.conv2d(input, first, bias) + functional.conv2d(input, second, padding=1)
        ),
        {"input": (1, 2, 3, 3), "first": (2, 2, 1, 1), "second": (2, 2, 3, 3), "bias": (2,)},
        ("gather",),
        torch.complex64,
    ),
}
families = pytest.mark.parametrize("name", FAMILIES)
# a kernel of complex numbers is four of real ones: through the interpreter each family is to be seen less often
COMPOUND = [name for name in FAMILIES if name.startswith("complex ")]
interpreted = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in COMPOUND else name for name in FAMILIES]
)
WITH_GRADIENTS = [name for name, family in FAMILIES.items() if family.gradients]
differentiable = pytest.mark.parametrize("name", WITH_GRADIENTS)


def operands(name: str) -> dict[str, Tensor]:
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(0)
    made = {}
    for argument, shape in family.shapes.items():
        dtype = family.dtypes.get(argument, family.dtype)
        wide = torch.randn(shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else torch.float32)
        t = (wide if dtype.is_floating_point or dtype.is_complex else 20 * wide).to(dtype)
        if argument == "offset":
            t = 0.25 + 0.5 * torch.rand(shape, generator=generator)
        made[argument] = t.contiguous(memory_format=LAST) if family.last and t.dim() == 4 else t
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Views. Each keeps shape and dtype; what lies around its elements is NaN.


def _noise(t: Tensor, shape) -> Tensor:
    wide = torch.full(shape, torch.nan if t.is_floating_point() or t.is_complex() else 99.0)
    return wide.to(t.dtype)


def _moved(t: Tensor) -> Tensor:
    """Begins one element after the start of its memory, at no multiple of 16 bytes."""
    around = _noise(t, (t.numel() + 1,))
    return around[1:].as_strided(t.shape, t.stride(), 1).copy_(t)


def _cut(t: Tensor) -> Tensor:
    around = _noise(t, [n + 2 for n in t.shape])
    return around[(slice(1, -1),) * t.dim()].copy_(t)


def _reversed(t: Tensor) -> Tensor:
    order = tuple(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


def _lonely(t: Tensor) -> Tensor:
    """Axes of one element have strides that nothing follows from; there is one more such axis than before."""
    return t.as_strided(t.shape, [13 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)])


def _steps(t: Tensor) -> Tensor:
    return _noise(t, (*t.shape, 3))[..., 1].copy_(t)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "moved": _moved,
    "cut": _cut,
    "reversed": _reversed,
    "steps": _steps,
    "expanded": lambda t: t[:1].expand(t.shape),
    "one value": lambda t: t.flatten()[:1].view((1,) * t.dim()).expand(t.shape),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (1,) * t.dim()),
    "negated": torch._neg_view,
    "lonely": _lonely,
    "moved and negated": lambda t: torch._neg_view(_moved(t)),
}


def views_of(t: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """Those that its dtype has; of complex numbers every other one is conjugated lazily too."""
    views = [view for name, view in VIEWS.items() if t.dtype is not torch.float8_e4m3fn or "neg" not in name]
    return [_conjugated(view) if t.is_complex() and i % 2 == 0 else view for i, view in enumerate(views)]


def _conjugated(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: view(t.conj().resolve_conj()).conj()


def plain(t: Tensor) -> Tensor:
    """A dense copy in float64, or of two of them."""
    t = t.detach()
    t = t.resolve_neg() if t.is_neg() else t
    return t.resolve_conj().to(torch.complex128 if t.is_complex() else torch.float64).contiguous()


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(plain(got), plain(want), rtol=0, atol=_bound(want, dtype))


def _bound(want: Tensor, dtype: torch.dtype) -> float:
    if not dtype.is_floating_point and not dtype.is_complex:
        return 0.0
    largest = want.detach().abs().max().item() if want.numel() else 0.0
    return 40 * torch.finfo(dtype).eps * max(largest, 1.0)


def check(name: str, given: dict[str, Tensor], arrange: Callable[[Tensor], Tensor] = lambda t: t) -> None:
    """Values, and gradients of an output's gradient that is arranged too."""
    family = FAMILIES[name]
    leaves = {a: plain(t).requires_grad_(family.gradients) for a, t in given.items()}
    want = family.theirs(**leaves)
    given = {a: t.detach().requires_grad_(family.gradients) for a, t in given.items()}
    got = family.ours(**given)
    close(got, want, family.dtype)
    assert not _shared(got, given.values())
    if family.gradients:
        wide = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
        dy = arrange(wide.to(family.dtype))
        found = torch.autograd.grad(got, list(given.values()), dy)
        expected = torch.autograd.grad(want, list(leaves.values()), plain(dy))
        for t, gradient, right in zip(given.values(), found, expected, strict=True):
            assert gradient.dtype == t.dtype
            close(gradient, right, family.dtype)


def _shared(t: Tensor, others) -> bool:
    return any(t.untyped_storage().data_ptr() == o.untyped_storage().data_ptr() for o in others)


def _arranged(name: str, turn: int) -> dict[str, Tensor]:
    """Each operand in another view; in as many turns as there are views each has had all of them."""

    def arranged(t: Tensor, i: int) -> Tensor:
        views = views_of(t)
        return views[(turn + 3 * i) % len(views)](t)

    return {a: arranged(t, i) for i, (a, t) in enumerate(operands(name).items())}


def _but_boxes(name: str):
    """The family's configs, but for those that want aligned memory."""
    configs = FAMILIES[name].configs
    return config.explicit({role: c for role, c in configs.items() if not isinstance(c, BoxConfig)})


@interpreted
def test_operands_in_views(name, kernels, poisoned):
    with _but_boxes(name):
        check(name, _arranged(name, 0), lambda dy: views_of(dy)[0](dy))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "turn"), [(name, turn) for name in FAMILIES for turn in (1, 4, 7) if turn == 1 or name not in COMPOUND]
)
def test_operands_in_every_view(name, turn, kernels, poisoned):
    with _but_boxes(name):
        check(name, _arranged(name, turn), lambda dy: views_of(dy)[turn](dy))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in COMPOUND])
def test_an_output_s_gradient_is_one_number_and_the_kernels_meant_are_launched(name, kernels, poisoned, monkeypatch):
    launched, run = set(), Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, tensors: (launched.add(self.name), run(self, tensors))[1])
    with config.explicit(FAMILIES[name].configs):
        check(name, operands(name), VIEWS["one value"])
    assert all(any(kernel in n for n in launched) for kernel in FAMILIES[name].kernels), launched


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of any subset, of nothing, of sums; tensors without elements


def total(y: Tensor) -> Tensor:
    """A real sum, for which each element counts alike."""
    return y.real.sum() + 2 * y.imag.sum() if y.is_complex() else y.sum()


def gradients(function: Callable[..., Tensor], given: dict[str, Tensor], wanted) -> tuple[Tensor, ...]:
    """Those of the sum of an output, whose own gradient is one number expanded."""
    return torch.autograd.grad(total(function(**given)), [given[a] for a in wanted])


def _leaves(given: dict[str, Tensor], wanted) -> dict[str, Tensor]:
    return {a: t.detach().clone().requires_grad_(a in wanted) for a, t in given.items()}


@differentiable
def test_gradients_of_every_subset(name):
    family, given = FAMILIES[name], operands(name)
    every = dict(zip(given, gradients(family.ours, _leaves(given, given), given), strict=True))
    right = gradients(family.theirs, {a: plain(t).requires_grad_() for a, t in given.items()}, given)
    for count in range(1, len(given) + 1):
        for wanted in combinations(given, count):
            leaves = _leaves(given, wanted)
            for a, gradient in zip(wanted, gradients(family.ours, leaves, wanted), strict=True):
                torch.testing.assert_close(gradient, every[a])
            assert all((t.grad_fn is None and t.requires_grad) == (a in wanted) for a, t in leaves.items())
    for a, want in zip(given, right, strict=True):
        close(every[a], want, family.dtype)
    assert family.ours(**given).grad_fn is None


SAMPLES = ("input", "x", "residual", "initial_state", "context", "offset", "mask")


@families
def test_no_samples(name, kernels, poisoned):
    family = FAMILIES[name]
    given = {a: t[:0] if a in SAMPLES else t for a, t in operands(name).items()}
    given = {a: t.detach().requires_grad_(family.gradients) for a, t in given.items()}
    y = family.ours(**given)
    assert y.shape == (0, *family.theirs(**{a: plain(t) for a, t in operands(name).items()}).shape[1:])
    if family.gradients:
        for t, gradient in zip(given.values(), torch.autograd.grad(total(y), list(given.values())), strict=True):
            assert torch.equal(gradient, torch.zeros_like(t))


# ---------------------------------------------------------------------------------------------------------------------
# What autograd saves


def outcome(function: Callable[..., Any], *args: Any) -> Any:
    """What a call returns, or the RuntimeError that it raises."""
    try:
        return function(*args)
    except RuntimeError as error:
        return error


@differentiable
def test_operands_changed_before_backward_raise_or_do_not_matter(name):
    family, given = FAMILIES[name], operands(name)
    right = gradients(family.ours, _leaves(given, given), given)
    raised = []
    for changed in given:
        leaves = _leaves(given, given)
        y = total(family.ours(**leaves))
        with torch.no_grad():
            leaves[changed].add_(1)
        found = outcome(torch.autograd.grad, y, list(leaves.values()))
        if isinstance(found, RuntimeError):
            assert "modified by an inplace operation" in str(found)
            raised.append(changed)
        else:
            assert all(map(torch.equal, found, right)), f"{changed} was saved"
    filters = {"weight", "first", "second"} & given.keys()
    assert {next(iter(given)), *filters} <= set(raised)
    assert "bias" not in raised or "causal" in name


@differentiable
def test_outputs_changed_before_backward_raise_or_do_not_matter(name):
    family, given = FAMILIES[name], operands(name)
    right = gradients(family.ours, _leaves(given, given), given)
    leaves = _leaves(given, given)
    y = family.ours(**leaves)
    loss = total(y)
    with torch.no_grad():
        y.mul_(0)
    found = outcome(torch.autograd.grad, loss, list(leaves.values()))
    if isinstance(found, RuntimeError):
        assert "modified by an inplace operation" in str(found)
        assert name in ("finished by its output", "complex finished")
    else:
        assert all(map(torch.equal, found, right))


@differentiable
def test_tensors_of_inference_mode_are_not_saved(name):
    family, given = FAMILIES[name], operands(name)
    right = dict(zip(given, gradients(family.ours, _leaves(given, given), given), strict=True))
    for made in given:
        leaves = _leaves(given, given)
        with torch.inference_mode():
            leaves[made] = given[made].clone()
        rest = [a for a in given if a != made]
        found = outcome(gradients, family.ours, leaves, rest)
        if isinstance(found, RuntimeError):
            assert "Inference tensors cannot be saved for backward" in str(found)
        else:
            assert all(torch.equal(g, right[a]) for a, g in zip(rest, found, strict=True)), made
    with torch.inference_mode():
        y = family.ours(**_leaves(given, given))
    assert y.is_inference()


# ---------------------------------------------------------------------------------------------------------------------
# Who the operands are


class Tagged(Tensor):
    """A subclass that leaves everything to torch."""


@families
def test_subclasses_come_back(name):
    family, given = FAMILIES[name], operands(name)
    want = family.ours(**given)
    for tagged in given:
        y = family.ours(**given | {tagged: given[tagged].as_subclass(Tagged)})
        assert type(y) is Tagged
        assert torch.equal(y.as_subclass(Tensor), want)
    held = {a: torch.nn.Parameter(t, requires_grad=family.gradients) for a, t in given.items()}
    y = family.ours(**held)
    assert type(y) is Tensor
    assert torch.equal(y, want)


def test_operands_that_are_one_tensor(kernels, poisoned):
    """Input, residual and context; and two filters, and two biases."""
    x, w = torch.randn(1, 4, 4, 4), torch.randn(4, 4, 1, 1)
    for activation, after in (("relu", False), ("silu", True), ("relu6", True)):
        leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        how = {"activation": activation, "residual_after_activation": after}
        y = triton_conv.conv2d(leaf, w, residual=leaf, **how)
        z = functional.conv2d(wide, w.double())
        function = getattr(functional, activation)
        want = function(z) + wide if after else function(z + wide)
        assert not _shared(y, (leaf,))
        close(y, want, torch.float32)
        close(*(torch.autograd.grad(t.sum(), of)[0] for t, of in ((y, leaf), (want, wide))), torch.float32)
    video, filters = torch.randn(1, 2, 2, 3, 3, requires_grad=True), torch.randn(3, 2, 3, 1, 1)
    y = triton_conv.causal_conv3d(video, filters, None, video)
    wide = video.detach().double().requires_grad_()
    want = functional.conv3d(torch.cat((wide, wide), 2), filters.double())
    close(y, want, torch.float32)
    close(*(torch.autograd.grad(t.sum(), of)[0] for t, of in ((y, video), (want, wide))), torch.float32)


def test_an_update_of_a_state_that_is_a_part_of_another_tensor(kernels):
    """Only the state's own elements change, wherever they are."""
    x, weight = torch.randn(2, 3), torch.randn(3, 4)
    state = torch.randn(2, 3, 3)
    want = torch.cat((state, x.unsqueeze(2)), 2)[:, :, 1:]
    for view in ("moved", "cut", "reversed", "steps"):
        part = VIEWS[view](state)
        triton_conv.causal_conv1d_update(x, part, weight)
        assert torch.equal(part, want)
        whole = torch.empty(0).set_(part.untyped_storage())
        assert whole.isnan().sum() == whole.numel() - part.numel()


def test_an_update_by_a_part_of_its_own_state(kernels):
    """Whoever writes the state first, x is what was there before."""
    state, weight = torch.randn(3, 3, 3), torch.randn(3, 4)
    for part in (lambda t: t[:, :, 0], lambda t: t.transpose(0, 1), lambda t: t):
        want_state, got_state = state.clone(), state.clone()
        want = triton_conv.causal_conv1d_update(part(state.clone()), want_state, weight)
        assert torch.equal(triton_conv.causal_conv1d_update(part(got_state), got_state, weight), want)
        assert torch.equal(got_state, want_state)


def test_an_update_of_a_negated_state(kernels):
    x, state, weight = torch.randn(2, 3), torch.randn(2, 3, 3), torch.randn(3, 4)
    want_state = state.clone()
    want = triton_conv.causal_conv1d_update(x, want_state, weight)
    for mode in (torch.no_grad(), torch.inference_mode()):
        negated = torch._neg_view(-state)
        with mode:
            assert torch.equal(triton_conv.causal_conv1d_update(x, negated, weight), want)
        assert negated.is_neg()
        assert torch.equal(negated, want_state)
