"""Fuzzing itself: what is drawn, how it is written down, made smaller and kept; and the corpus of hard cases."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from triton_conv import branches, cli, functional, fuzz
from triton_conv.fuzz.convolutions import Convolution
from triton_conv.fuzz.placing import PLACES, placed
from triton_conv.fuzz.running import drawn

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.txt"))
EVERY_KERNEL = {
    *("gather", "box", "wgrad", "box_wgrad", "depthwise", "depthwise_wgrad", "banded", "banded_wgrad", "fold"),
    *("activation_backward", "separable", "causal", "causal_backward", "causal_update", "gather_branches"),
    *("box_branches", "deform", "deform_dgrad", "deform_offset", "deform_wgrad"),
}


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
@pytest.mark.parametrize("on", ["kernels", "cpu"])
def test_every_case_of_the_corpus_is_right(path, on, request):
    device = request.getfixturevalue("kernels") if on == "kernels" else "cpu"
    for case in fuzz.read(path):
        wrong = [result for result in case.check(device) if not result.ok]
        assert not wrong, f"{case}: {wrong}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="cases are sent the way of kernels in the interpreter only")
@pytest.mark.slow
def test_the_corpus_reaches_every_kernel(kernels, launched):
    for path in CORPUS:
        for case in fuzz.read(path):
            case.check(kernels)
    assert set(launched) >= EVERY_KERNEL


@pytest.mark.parametrize("family", fuzz.FAMILIES)
def test_what_is_drawn_is_valid_varied_and_said_by_its_text(family):
    cases = [fuzz.drawn(family, 1, number) for number in range(25)]
    assert all(case.valid() for case in cases)
    assert len(set(map(repr, cases))) == 25
    assert [fuzz.parse(repr(case)) for case in cases] == cases
    assert len({case.device for case in cases}) >= 3
    assert 0 < sum(case.candidate > 0 for case in cases) < 25
    assert [case for _, _, case in fuzz.numbered([family], 1, 5, 3)] == cases[5:8]
    assert fuzz.drawn(family, 2, 0) != cases[0]


@pytest.mark.parametrize("family", fuzz.FAMILIES)
def test_random_cases_agree_on_the_reference(family):
    """Of plain torch: the oracles and the calls that reach it, without kernels."""
    failed = [outcome for outcome in fuzz.sweep(fuzz.numbered([family], 3, 0, 6), seconds=0) if not outcome.ok]
    assert not failed


def _launches(b):
    """What multi_conv2d of a drawn case plans forward."""
    shapes = b.shapes()
    given = [
        (shapes[f"w{i}"][0], {"stride": b.stride, "padding": p, "dilation": d, "groups": g, "channels": channels})
        for i, (_, _, p, d, g, _, channels) in enumerate(b.parts)
    ]
    how = {"dtype": getattr(torch, b.dtype), "combine": b.combine, "precision": b.precision_, "one_launch": True}
    found = branches.plans(shapes["x"][0], given[0][0], branches=given, **how)
    return [p for name, p in found.items() if name.startswith("forward")]


def test_one_launch_is_drawn_where_one_launch_can():
    cases = [b for b in (drawn("branches", 3, number) for number in range(150)) if b.one_launch and b.N]
    assert len(cases) > 50
    assert [b for b in cases if not all(isinstance(p, branches.BranchesPlan) for p in _launches(b))] == []


@pytest.mark.slow
def test_fresh_cases_agree_by_kernels(kernels):
    """The first few of each family; `triton-conv fuzz --cases 10000` goes on."""
    failed = [o for o in fuzz.sweep(fuzz.numbered(list(fuzz.FAMILIES), 11, 0, 2), kernels) if not o.ok]
    assert not failed


@pytest.mark.parametrize(
    "line",
    [
        "Convolution(N=__import__('os').getpid())",
        "Convolution(N=1 + 1)",
        "Convolution(N=True)",
        "Convolution(N=2.0)",
        "Convolution(1)",
        "Convolution(**{'N': 1})",
        "Convolution(padding=(1,))",
        "Convolution(modes=('zeros',), M=3)",
        "Convolution(dtype='load')",
        "Convolution(dtype='float32', spatial=(9, 9))",
        "Convolution(spatial=(1000000,), C=1000, K=1000)",
        "Convolution(device='../H200')",
        "Convolution(activation='eval')",
        "print(N=1)",
        "Convolution",
        "(" * 3000,
        "Convolution(N=1" + " " * 5000 + ")",
        "Convolution(N=10000000000)",
    ],
    ids=lambda line: line[:40],
)
def test_text_that_is_no_case_is_refused(line):
    with pytest.raises(ValueError, match=r".+"):
        fuzz.parse(line)


def test_a_corpus_names_the_line_that_is_wrong_and_is_small(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("# a comment\n\nConvolution(C=2)\nConvolution(C=x)\n")
    with pytest.raises(ValueError, match=r"corpus\.txt, line 4"):
        fuzz.read(corpus)
    corpus.write_text("#" * 2**21)
    with pytest.raises(ValueError, match="at most 1048576 bytes"):
        fuzz.read(corpus)


@pytest.mark.parametrize("how", PLACES)
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 4, 6), (4, 5), (7,)])
def test_operands_have_the_same_values_wherever_they_lie(how, shape):
    t = torch.randn(shape)
    found = placed(t.clone(), how)
    assert torch.equal(found, t[:1].expand_as(t) if how == "expanded" else t)


@pytest.fixture
def wrong_from_three_channels(monkeypatch):
    """conv2d drops the last of three or more channels where the filter has two rows or more."""
    right = functional.conv2d

    def wrong(x, w, bias=None, **how):
        keep = torch.ones(w.shape[1], dtype=w.dtype)
        if w.shape[1] >= 3 and w.shape[2] >= 2:
            keep[-1] = 0
        return right(x, w * keep.view(1, -1, 1, 1), bias, **how)

    monkeypatch.setattr(functional, "conv2d", wrong)


BIG = Convolution(
    N=3,
    C=16,
    K=24,
    spatial=(9, 7),
    kernel=(3, 5),
    stride=(1, 2),
    padding=((1, 2), (2, 0)),
    output_padding=(0, 0),
    dilation=(2, 1),
    modes=("reflect", "zeros"),
    bias=True,
    dtype="float64",
    seed=1234,
    again=True,
    places=(("x", "channels_last"), ("w", "window")),
)


def test_what_fails_is_made_smaller_until_nothing_can_go(wrong_from_three_channels):
    (outcome,) = fuzz.sweep([("conv", 0, BIG)])
    assert outcome.kind == "values"
    small = outcome.smaller
    assert (small.C, small.kernel[0]) == (3, 2)
    assert max(small.N, small.K, small.kernel[1], *small.stride, *small.dilation) == 1
    assert (small.bias, small.again, small.places, small.seed) == (False, False, (), 0)
    assert fuzz.checked(("conv", 0, small)).kind == "values"


def test_an_exception_is_made_smaller_as_the_same_exception(monkeypatch):
    def broken(x, w, bias=None, **how):
        if x.shape[1] >= 4:
            raise KeyError("boom")
        raise IndexError

    monkeypatch.setattr(functional, "conv2d", broken)
    (outcome,) = fuzz.sweep([("conv", 0, BIG)])
    assert outcome.error == "KeyError: 'boom'"
    assert outcome.smaller.C == 4


def test_shrinking_is_bounded_in_time(monkeypatch):
    calls = Counter()

    def fails(case):
        calls["fails"] += 1
        return True

    assert fuzz.shrunk(BIG, fails, seconds=0) == BIG
    assert calls["fails"] <= 1


def test_the_command_keeps_what_fails_and_runs_it_again(capsys, tmp_path, wrong_from_three_channels):
    kept = tmp_path / "kept.txt"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(f"{BIG!r}\n{replace(BIG, C=2)!r}\n")
    command = ["fuzz", "--family", "conv", "--cases", "0", "--device", "cpu", "--seed", "5", "--keep", str(kept)]
    assert cli.main([*command, "--corpus", str(corpus)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED corpus 0: wrong values" in printed
    assert "1 of 2 cases failed" in printed
    (small,) = fuzz.read(kept)
    assert repr(small) in printed
    assert cli.main([*command, "--corpus", str(kept)]) == 1
    assert fuzz.read(kept) == [small]


def test_the_command_prints_a_seed_that_gives_the_same_cases(capsys):
    command = ["fuzz", "--family", "conv", "--family", "causal", "--cases", "2", "--device", "cpu"]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    seed = first.split("seed ")[1].split(";")[0]
    assert "all 4 cases passed" in first
    assert cli.main([*command, "--seed", seed]) == 0
    assert capsys.readouterr().out == first


def test_a_corpus_that_is_no_corpus_is_an_error_in_one_line(capsys, tmp_path):
    (tmp_path / "bad.txt").write_text("import os\n")
    assert cli.main(["fuzz", "--cases", "0", "--corpus", str(tmp_path / "bad.txt")]) == 2
    assert "bad.txt, line 1" in capsys.readouterr().err
    assert cli.main(["fuzz", "--cases", "0", "--corpus", str(tmp_path / "none.txt")]) == 2


@pytest.mark.slow
def test_processes_beside_each_other_check_the_same_cases():
    cases = list(fuzz.numbered(["conv"], 1, 0, 3))
    beside = list(fuzz.sweep(cases, jobs=2))
    assert [outcome.case for outcome in beside] == [case for _, _, case in cases]
    assert all(outcome.ok for outcome in beside)
