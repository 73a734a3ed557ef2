"""The checker itself: its oracle against arithmetic done by hand, and whether it catches what is wrong."""

import random
from collections import Counter
from dataclasses import replace
from math import inf

import pytest
import torch

from triton_conv import functional
from triton_conv.check import (
    CASES,
    MEMORY_FORMATS,
    QUANTITIES,
    Case,
    Operands,
    check_case,
    compare,
    expected,
    numbered_case,
    numbered_cases,
    poisoned,
    random_case,
    sweep,
)
from triton_conv.geometry import PADDING_MODES, Role

X = torch.tensor([[[1.0, 2.0, 4.0, 8.0]]])


def row(*values: float) -> torch.Tensor:
    return torch.tensor([[values]], dtype=torch.float64)


def one(mode: str = "zeros", **fields) -> Case:
    return Case.of(4, 3, N=1, C=1, K=1, bias=False, modes=mode, **fields)


@pytest.mark.parametrize(
    ("mode", "left", "right"),
    [("zeros", (0, 0), 0), ("reflect", (4, 2), 4), ("replicate", (1, 1), 8), ("circular", (4, 8), 1)],
)
def test_forward_oracle_by_hand(mode, left, right):
    case = one(mode, padding=((2, 1),))
    w = torch.tensor([[[1.0, 10.0, 100.0]]])
    dy = torch.ones(1, 1, 5)
    found = expected(case, Operands(X, w, None, dy))
    padded = [*left, 1, 2, 4, 8, right]
    y = [padded[i] + 10 * padded[i + 1] + 100 * padded[i + 2] for i in range(5)]
    torch.testing.assert_close(found["y"], row(*y))
    dw = [sum(padded[i + tap] for i in range(5)) for tap in range(3)]
    torch.testing.assert_close(found["dw"], row(*dw))


def test_transposed_oracle_by_hand():
    case = one(transposed=True, stride=2, padding=((1, 2),), output_padding=1)
    w = torch.tensor([[[1.0, 10.0, 100.0]]])
    scattered = [1, 10, 100 + 2, 20, 200 + 4, 40, 400 + 8, 80, 800, 0]
    y = scattered[1:-2]
    found = expected(case, Operands(X, w, None, torch.ones(1, 1, len(y))))
    torch.testing.assert_close(found["y"], row(*y))


def test_circular_transposed_oracle_wraps_what_leaves():
    case = one("circular", transposed=True, padding=1)
    w = torch.tensor([[[1.0, 10.0, 100.0]]])
    # output position u receives x[u + 1 - tap] * w[tap], modulo 4
    y = [x + 10 * y + 100 * z for x, y, z in zip([2, 4, 8, 1], [1, 2, 4, 8], [8, 1, 2, 4], strict=True)]
    found = expected(case, Operands(X, w, None, torch.ones(1, 1, 4)))
    torch.testing.assert_close(found["y"], row(*y))
    torch.testing.assert_close(found["dx"], torch.full((1, 1, 4), 111.0, dtype=torch.float64))


@pytest.mark.parametrize("modes", [("zeros", "zeros"), ("circular", "zeros"), ("reflect", "replicate")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_transposed_oracle_is_the_adjoint_of_the_forward_oracle(modes, dtype):
    case = Case.of((4, 5), 3, transposed=True, stride=2, padding=1, modes=modes, dtype=dtype, bias=False)
    operands = case.operands(3)
    x, w, _, dy = operands
    found = expected(case, operands)
    forward = replace(case, transposed=False, C=case.K, K=case.C, spatial=case.output_spatial)
    turned = expected(forward, Operands(dy, w.conj(), None, x))
    assert forward.output_spatial == case.spatial
    # torch.vdot conjugates its first argument, and the adjoint of a convolution with conj(w) is transposed with w
    torch.testing.assert_close(
        torch.vdot(turned["y"].flatten(), x.flatten()), torch.vdot(dy.flatten(), found["y"].flatten())
    )
    torch.testing.assert_close(found["dx"], turned["y"])
    torch.testing.assert_close(found["dw"], turned["dw"].conj())


def test_integer_oracle_wraps():
    case = Case.of(1, 1, N=1, C=1, K=1, bias=False, dtype=torch.int8)
    found = expected(case, Operands(*[torch.full((1, 1, 1), 100, dtype=torch.int8)] * 2, None, None))
    assert found["y"].item() == 10_000 % 256


def test_one_error_is_caught_and_located(monkeypatch):
    case = Case.of((6, 7), 3)
    right = functional.conv2d

    def wrong(*args, **kwargs):
        y = right(*args, **kwargs)
        spoilt = torch.zeros_like(y)
        spoilt[1, 2, 3, 4] = 1e-3
        return y + spoilt

    monkeypatch.setattr(functional, "conv2d", wrong)
    y, dx, dw, db = check_case(case, 7)
    assert not y.ok
    assert "1 of 160 elements, the worst at [1, 2, 3, 4]" in y.note
    assert dx.ok
    assert dw.ok
    assert db.ok


def test_a_wrong_gradient_is_caught(monkeypatch):
    case = Case.of((6, 7), 3)
    right = functional.conv2d
    monkeypatch.setattr(
        functional, "conv2d", lambda x, w, b, **kwargs: right(x, w * 1.00001 - 0.00001 * w.detach(), b, **kwargs)
    )
    assert [result.name for result in check_case(case, 7) if not result.ok] == ["dw"]


def test_memory_nobody_wrote_is_caught(monkeypatch):
    def forgetful(x, w, bias, **kwargs):
        y = right(x, w, bias, **kwargs)
        left = torch.empty_like(y)
        left[:, :-1] = y[:, :-1]
        return left

    right = functional.conv1d
    monkeypatch.setattr(functional, "conv1d", forgetful)
    for dtype in (torch.float32, torch.int8, torch.int64, torch.complex64):
        y, *_ = check_case(Case.of(9, 3, dtype=dtype), 7)
        assert not y.ok, dtype


def test_memory_outside_a_strided_operand_is_poison():
    x = Case.of((4, 5), 3, memory_format="strided").operands(1).x
    assert not x.is_contiguous()
    around = torch.as_strided(x, (x.untyped_storage().nbytes() // 4,), (1,), 0)
    assert around.isnan().sum() == around.numel() - x.numel()
    assert not x.isnan().any()


def test_poisoned_restores_the_settings():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    def broken():
        assert torch.empty(3).isnan().all()
        raise KeyError

    with pytest.raises(KeyError), poisoned():
        broken()
    after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert after == before


def test_nan_wrong_shapes_and_wrong_dtypes_are_infinitely_wrong():
    case = one()
    for got in (torch.tensor([[[1.0, float("nan")]]]), torch.ones(1, 1, 3), torch.ones(1, 1, 2).double()):
        result = compare(case, "y", got, torch.ones(1, 1, 2, dtype=torch.float64))
        assert result.error == result.share == inf
        assert not result.ok


def test_a_second_rounding_to_16_bits_or_16_bit_sums_exceed_the_tolerance(kernels):
    case = Case.of((8, 8), 3, C=32, K=8, dtype=torch.float16)
    operands = case.operands(2, kernels)
    want = expected(case, operands, ["y"])["y"]
    once = want.half().to(kernels)
    assert compare(case, "y", once, want).share <= 0.5
    x, w = operands.x.double().cpu(), operands.w.double().cpu()
    total = operands.bias.cpu().half().view(1, -1, 1, 1).expand(want.shape)
    for r in range(3):
        for s in range(3):
            total = total + torch.einsum("nchw,kc->nkhw", x[:, :, r : r + 6, s : s + 6], w[:, :, r, s]).half()
    assert not compare(case, "y", total.to(kernels), want).ok


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_operands_repeat_whatever_the_memory_format(memory_format):
    case = Case.of((4, 5), 3, memory_format=memory_format)
    operands = case.operands(5)
    plain = replace(case, memory_format="contiguous").operands(5)
    if memory_format == "expanded":
        plain = plain._replace(x=plain.x[:1].expand_as(plain.x), dy=plain.dy[:1].expand_as(plain.dy))
    for got, want in zip(operands, plain, strict=True):
        assert torch.equal(got, want)
    assert operands.x.is_contiguous() == (memory_format == "contiguous")
    assert torch.equal(case.operands(5).x, operands.x)
    assert not torch.equal(case.operands(6).x, operands.x)


def test_random_cases_repeat_and_do_not_depend_on_their_count():
    assert list(numbered_cases(20, 3))[-10:] == list(numbered_cases(30, 3))[-20:-10]
    assert [numbered_case(n, 3) for n, _ in numbered_cases(5, 3)] == [case for _, case in numbered_cases(5, 3)]
    assert numbered_case(len(CASES), 3) != numbered_case(len(CASES), 4)


def test_random_cases_are_valid_and_varied():
    rng = random.Random(1)
    cases = [random_case(rng) for _ in range(600)]
    for case in cases:
        assert min(case.output_spatial) >= 1
    assert len({str(case) for case in cases}) > 550
    assert {case.rank for case in cases} == {1, 2, 3}
    assert {mode for case in cases for mode in case.modes} == set(PADDING_MODES)
    assert {case.memory_format for case in cases} == set(MEMORY_FORMATS)
    assert len({case.dtype for case in cases}) == 11
    seen = Counter(
        name
        for case in cases
        for name, is_so in {
            "transposed": case.transposed,
            "dilated": max(case.dilation) > 1,
            "strided": max(case.stride) > 1,
            "grouped": case.groups > 1,
            "depthwise": case.groups == case.C > 1,
            "asymmetric": any(lower != upper for lower, upper in case.padding),
            "mixed modes": len(set(case.modes)) > 1,
            "empty": case.N == 0,
            "residues without taps": any(s > k for s, k in zip(case.stride, case.kernel, strict=True)),
            "output_padding": max(case.output_padding) > 0,
            "transposed with a mode": case.transposed and set(case.geometry.modes) != {"zeros"},
        }.items()
        if is_so
    )
    assert min(seen.values()) >= 20, seen


def test_roles_name_the_tensors_they_compute():
    forward, transposed = Case.of(8, 3), Case.of(8, 3, transposed=True)
    assert [forward.quantities(role) for role in Role] == [("y",), ("dx",), ("dw",)]
    assert [transposed.quantities(role) for role in Role] == [("dx",), ("y",), ("dw",)]
    assert forward.quantities() == QUANTITIES
    assert Case.of(8, 3, dtype=torch.int32).quantities(Role.DGRAD) == ()


def test_ids_are_distinct_words():
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids)
    assert not any(" " in i for i in ids)


def test_an_exception_is_an_outcome(monkeypatch):
    monkeypatch.setattr(functional, "conv1d", lambda *args, **kwargs: 1 / 0)
    first, second = sweep([(0, Case.of(9, 3)), (1, Case.of((5, 5), 3))], seed=1)
    assert isinstance(first.exception, ZeroDivisionError)
    assert not first.ok
    assert second.ok


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_corner_case(case):
    failed = [result for result in check_case(case, 7) if not result.ok]
    assert not failed


def test_random_cases_agree():
    failed = [o for o in sweep(((n, c) for n, c in numbered_cases(100, 11) if n >= len(CASES)), 11) if not o.ok]
    assert not failed
