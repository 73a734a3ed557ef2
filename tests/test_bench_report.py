"""Reports of benchmark runs: what counts as a change, totals, pictures, the page and reasons of losses."""

import base64
import hashlib
import io
import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from bench_runs import measured, row, run
from PIL import Image

from bench import plots, reasons, records, report, summary, words
from bench.compare import compare, slower
from bench.jobs import jobs, predicted_row
from bench.records import (
    CHANNELS_LAST,
    COMPOSED,
    CONTIGUOUS,
    OURS,
    PADDED_CHANNELS_LAST,
    POINTWISE_CHANNELS_LAST,
    POINTWISE_CONTIGUOUS,
    SEPARATE_CHANNELS_LAST,
    TORCHVISION,
    Measurement,
)
from triton_conv.devices import H200
from triton_conv.tuning import rounds

# ---------------------------------------------------------------------------------------------------------------------
# Comparisons


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (measured(1.10), measured(1.0), True),
        (measured(1.0), measured(1.10), False),
        (measured(1.019), measured(1.0), False),  # within a tie, however little noise there is
        (measured(1.10, spread=0.2, rounds=9), measured(1.0), False),  # notches overlap
        (measured(1.10), measured(1.0, spread=0.2, rounds=9), False),
        (measured(1.10, spread=0.2, rounds=9000), measured(1.0, rounds=9000), True),
        (measured(1.10, spread=None), measured(1.0), False),
        (measured(1.10), measured(1.0, rounds=0), False),
        (measured(None), measured(1.0), False),
        (measured(1.10), measured(None), False),
    ],
)
def test_slower_is_what_is_beyond_a_tie_and_beyond_notches(new, old, expected):
    assert slower(new, old) is expected


def test_notches_are_those_of_mcgill():
    samples = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8]
    t = rounds.timing(samples)
    low, high = rounds.quartiles(samples)
    assert rounds.notch(t.spread, t.rounds) * t.seconds == pytest.approx(1.57 * (high - low) / 3)


def test_a_comparison_tells_regressions_from_improvements_and_noise():
    old = run(row("a", 100), row("b", 100), row("c", 100), row("d", 100), row("gone", 1))
    new = run(row("a", 150), row("b", 200), row("c", 50), row("d", 101), row("new", 1))
    found = compare(old, new)
    assert [(c.row.layer, c.ratio) for c in found.regressions] == [("b", pytest.approx(2)), ("a", pytest.approx(1.5))]
    assert [(c.row.layer, c.ratio) for c in found.improvements] == [("c", pytest.approx(0.5))]
    assert (found.same, found.lost, found.warnings) == (1, (), ())
    assert [r.layer for r in found.only_old] == ["gone"]
    assert [r.layer for r in found.only_new] == ["new"]
    assert found.regressed
    assert not compare(old, old).regressed


def test_what_ran_and_runs_no_more_is_a_regression():
    found = compare(run(row("a", 100)), run(row("a", measured={OURS: Measurement(note="failed: no memory")})))
    assert [r.layer for r in found.lost] == ["a"]
    assert found.regressed
    assert ("1 that ran and run no more: resnet50: a, fprop", True) in words.change_words(found)


def test_a_comparison_warns_of_what_else_differs():
    old = run(row("a", 100, 100), row("b", 100, 100))
    new = run(
        row("a", 100, 110), row("b", 100, 110), device="NVIDIA H100", versions={"torch": "2.13.0", "triton": "3.6.0"}
    )
    devices, torch, drift = compare(old, new).warnings
    assert devices == "the devices differ: NVIDIA H200 and NVIDIA H100"
    assert torch == "torch was 2.11.0 and is 2.13.0"
    assert "1.10 times as long as it did, in the median" in drift


def test_a_clock_of_all_is_not_our_regression():
    old = run(row("a", 100, 100), row("b", 100, 100), row("c", 100, 100))
    new = run(row("a", 104, 104), row("b", 104, 104), row("c", 110, 104))
    assert [c.row.layer for c in compare(old, new).regressions] == ["c"]
    assert compare(new, old).same == 2
    assert [c.row.layer for c in compare(new, old).improvements] == ["c"]


@pytest.mark.parametrize("count", [1, 40])
def test_noise_alone_makes_hardly_any_run_slower(count):
    rng = random.Random(3)

    def noisy(slower=1.0):
        factors = [slower, *[1.0] * (count - 1)]
        times = [rounds.timing([f * rng.gauss(1e-4, 2e-6) for _ in range(15)]) for f in factors]
        return run(*(row(str(n), measured={OURS: Measurement(*t)}) for n, t in enumerate(times)))

    assert sum(compare(noisy(), noisy()).regressed for _ in range(100)) <= 10
    assert sum("0" in {c.row.layer for c in compare(noisy(), noisy(1.06)).regressions} for _ in range(50)) >= 40


def test_measured_and_made_up_times_are_not_compared():
    with pytest.raises(ValueError, match="times that are measured and times that are simulated"):
        compare(run(row("a", 1)), run(row("a", 1), source="simulated"))


def test_predictions_are_compared_by_the_tie_alone():
    old = run(row("a"), row("b"), row("c"), source="predicted")
    changed = [row("a", predicted_seconds=70e-6), row("b", predicted_seconds=61e-6), row("c")]
    found = compare(old, run(*changed, source="predicted"))
    assert [c.row.layer for c in found.regressions] == ["a"]
    assert found.same == 2


# ---------------------------------------------------------------------------------------------------------------------
# What follows from rows


def test_totals_count_layers_as_often_as_they_stand_in_their_network():
    found = run(row("a", 100, 200, 400, times=3), row("b", 50, 25, times=2), row("c", 1000))
    (total,) = summary.totals(found)
    assert (total.suite, total.op, total.rows) == ("resnet50", "fprop", 3)
    assert total.ours == pytest.approx(1400e-6)
    last, contiguous = total.over[CHANNELS_LAST], total.over[CONTIGUOUS]
    assert (last.ours, last.theirs, last.rows) == (pytest.approx(400e-6), pytest.approx(650e-6), 2)
    assert (contiguous.speedup, contiguous.rows) == (pytest.approx(4), 1)
    assert (total.wins, total.losses) == (1, 1)
    assert total.worst.layer == "b"
    assert total.predicted == pytest.approx(6 * 60e-6)


def test_what_pads_first_stands_in_for_cudnn():
    found = row("a", 100, measured={OURS: measured(1.0), PADDED_CHANNELS_LAST: measured(3.0)})
    assert summary.cudnn(found) == PADDED_CHANNELS_LAST
    assert summary.speedup(found) == pytest.approx(3)
    assert summary.rival(row("a", 100, contiguous=50)) == CONTIGUOUS
    assert summary.speedup(row("a", 100)) is None


def goal_row(ours, suite="resnet50_fused", call="conv2d residual before", **others):
    """A row with times in microseconds by name."""
    times = {OURS: ours, **others}
    return row(suite=suite, call=call, measured={who: measured(1e-6 * time) for who, time in times.items()})


def test_what_several_kernels_take_stands_in_for_cudnn_and_torchvision_where_there_is_none():
    assert summary.rival(goal_row(1, **{POINTWISE_CONTIGUOUS: 2})) == POINTWISE_CONTIGUOUS
    assert summary.rival(goal_row(1, **{SEPARATE_CHANNELS_LAST: 2, COMPOSED: 1})) == SEPARATE_CHANNELS_LAST
    assert summary.rival(goal_row(1, **{COMPOSED: 1, TORCHVISION: 2})) == TORCHVISION
    assert summary.rival(goal_row(1, **{COMPOSED: 1})) == COMPOSED
    assert summary.cudnn(goal_row(1, **{TORCHVISION: 2})) is None


def test_goals_are_ratios_to_the_best_of_those_named():
    both = {POINTWISE_CHANNELS_LAST: 150, POINTWISE_CONTIGUOUS: 200}
    rows = [goal_row(100, **both), replace(goal_row(100, **{POINTWISE_CHANNELS_LAST: 110}), layer="another")]
    rows += [goal_row(100, call="conv2d activation relu", **both)]  # without a residual
    rows += [goal_row(10, "dcnv2_resnet50", "deform_conv2d", **{TORCHVISION: 40, COMPOSED: 20})]
    rows += [replace(goal_row(10, "dcnv2_resnet50", "deform_conv2d", **{TORCHVISION: 40}), op="step")]
    found = run(*rows)
    assert [r.ratio for r in summary.goals(found)] == [pytest.approx(n) for n in (4.0, 1.5, 1.1)]
    fused = "bias, shortcut and relu in the kernel, over cuDNN and pointwise kernels"
    assert summary.goal_words(found) == [
        "deformable convolution, over torchvision: 4.00 times as quick (geometric mean of 1), 1 of 1 reach 3",
        f"{fused}: 1.28 times as quick (geometric mean of 2), 1 of 2 reach 1.2",
    ]
    page = report.html(found)
    assert "<h2>Goals</h2>" in page
    assert "1 of 2 reach 1.2" in page


def test_goals_without_times_are_predicted_ratios():
    apart = row(suite="aspp_branches", call="multi_conv2d", predicted_seconds=2e-5, separate_predicted_seconds=5e-5)
    found = run(apart, source="predicted")
    assert [(r.ratio, r.predicted) for r in summary.goals(found)] == [(None, pytest.approx(2.5))]
    assert summary.goal_words(found) == []
    assert "Nothing was measured. What one kernel is to win" in report.html(found)


def test_shares_are_of_the_ceiling_that_is_nearer():
    one = row("a", 50)
    assert summary.of_ceilings(run(one), one) == pytest.approx(30e9 / 50e-6 / 8e14)
    memory = row("a", 50, flops=10**6)
    assert summary.of_ceilings(run(memory), memory) == pytest.approx(20e6 / 50e-6 / 4e12)
    sheet = summary.ceilings(run(one, ceilings={}), one)
    assert (sheet.matmul, sheet.measured) == (H200.matrix_16, False)
    assert summary.of_ceilings(run(one, ceilings={}, device="a toaster"), one) is None


def test_wrong_values_and_failures_are_faults():
    rows = [row("good", 1), row("wrong", measured={OURS: measured(1.0, error=1.5)})]
    rows += [row("nan", measured={OURS: Measurement(note="wrong: nan")}), row("theirs", 1, 1)]
    rows[3].measured[CHANNELS_LAST] = Measurement(note="failed: theirs")
    found = {r.layer: what for r, what in summary.faults(run(*rows))}
    assert set(found) == {"wrong", "nan"}
    assert "1.5 times its tolerance" in found["wrong"]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def size_of(png):
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return image.size


def test_pictures_of_a_run(tmp_path):
    found = run(row("a", 100, 150), row("b", 100, 50), row("b", 10, 20, op="wgrad"))
    paths = plots.write(found, tmp_path / "plots")
    assert [path.name for path in paths] == ["speedup.png", "roofline.png", "extremes.png"]
    assert all(min(size_of(path.read_bytes())) > 200 for path in paths)


def test_bars_are_speed_ups_from_one_on():
    figure = plots.speedup(run(row("a", 100, 150), row("b", 100, 50)))
    (axes,) = figure.axes
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [
        (1, pytest.approx(0.5)),
        (1, pytest.approx(-0.5)),
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_xscale() == "log"
    assert "speed-up over channels-last cuDNN" in figure.get_suptitle()


def test_bars_of_predictions_say_so():
    figure = plots.speedup(run(row("a"), source="predicted"))
    assert [bar.get_x() + bar.get_width() for bar in figure.axes[0].patches] == [pytest.approx(0.5)]
    assert "nothing measured" in figure.get_suptitle()
    assert "made-up" in plots.speedup(run(row("a", 1, 1), source="simulated")).get_suptitle()


@pytest.mark.parametrize(
    ("source", "ceilings", "words"),
    [
        ("measured", {"copy": 4e12, "matmul bfloat16": 8e14}, "4 TB/s copy, 800 TFLOP/s bfloat16 (measured)"),
        ("simulated", {"copy": 4e12, "matmul bfloat16": 8e14}, "4 TB/s copy, 800 TFLOP/s bfloat16 (made up)"),
        ("measured", {"copy": 4e12}, "4 TB/s copy (measured)"),
        ("predicted", {}, "4.8 TB/s copy, 989 TFLOP/s bfloat16 (data sheet)"),
    ],
)
def test_roofs_say_where_they_are_from(source, ceilings, words):
    (axes,) = plots.roofline(run(row("a", 100, 150), source=source, ceilings=ceilings)).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()][-1] == words


def test_nothing_is_among_the_best_and_among_the_worst():
    figure = plots.extremes(run(*(row(str(n), 100, 10 * n + 10) for n in range(7))))
    best, worst = ([label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes)
    assert [name.split(", ")[0] for name in best] == [f"resnet50: {n}" for n in (6, 5, 4, 3)]
    assert [name.split(", ")[0] for name in worst] == [f"resnet50: {n}" for n in (2, 1, 0)]


@pytest.mark.parametrize("draw", plots.PLOTS.values(), ids=plots.PLOTS)
def test_pictures_of_nothing_and_of_names_that_are_no_names(draw):
    assert size_of(plots.png(draw(run())))
    odd = row("$\\frac{x", 100, 150, suite="\x1b[31m\N{SNOWMAN}" + "x" * 200)
    assert size_of(plots.png(draw(run(odd, device="$_{$"))))


# ---------------------------------------------------------------------------------------------------------------------
# The page


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.rows, self.text, self._in = [], [], 0, [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._in = tag

    def handle_data(self, data):
        (self.scripts if self._in == "script" else self.text).append(data)

    def handle_endtag(self, tag):
        self._in = ""


HOSTILE = '"><script>alert(1)</script><img src="http://example.org/x.png" onerror=alert(2)>{{ 7 * 7 }}'


def test_a_page_needs_nothing_else_and_escapes_everything():
    bad = measured(1.0, error=9.0, note=HOSTILE)
    odd = row(HOSTILE, suite=HOSTILE, kernel=HOSTILE, config=HOSTILE, reason=HOSTILE, limit=HOSTILE, call=HOSTILE)
    odd = replace(odd, measured={OURS: bad, CHANNELS_LAST: measured(0.5, note=HOSTILE), HOSTILE: measured(1.0)})
    before = run(odd, row("gone", 1))
    found = run(odd, device=HOSTILE, time=HOSTILE, commit=HOSTILE, command=HOSTILE, versions={HOSTILE: HOSTILE})
    text = report.html(found, compare(before, found), before)
    page = Page(text)
    assert len(page.scripts) == 1
    assert "alert" not in page.scripts[0]
    assert HOSTILE in "".join(page.text)
    assert "49" not in "".join(page.text)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert tag not in ("iframe", "object", "embed", "link", "base", "form", "a")
        assert all(
            attributes[name].startswith("data:image/png;base64,") for name in ("src", "href") if name in attributes
        )
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "content" in a and "src" in a["content"])
    assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_a_page_of_measurements():
    rows = [row("fine", 100, 150, 300), row("slow", 100, 50), row("step", 10, 20, op="step")]
    text = report.html(run(*rows))
    page = " ".join("".join(Page(text).text).split())
    assert "Nothing was measured" not in page
    assert "copy 4 TB/s, matmul bfloat16 800 TFLOP/s" in page
    assert "torch 2.11.0" in page
    assert "0123456789ab" in page
    body = text[text.index('id="rows"') :]
    assert body.count("<tr") == 1 + len(rows)
    assert re.search(r'class="lost">.*slow.*data-number="0.5', body)
    losses = text[text.index("<h2>Losses") : text.index("<h2>Best")]
    assert "slow" in losses
    assert "1 of 3" in losses


@pytest.mark.parametrize(("source", "words"), [("predicted", "is a prediction"), ("simulated", "is made up")])
def test_a_page_says_aloud_that_nothing_was_measured(source, words):
    found = run(row("a", *(() if source == "predicted" else (100, 150))), source=source)
    text = report.html(found)
    loud = re.findall(r'<p class="loud">(.*?)</p>', text)
    assert len(loud) == 1
    assert loud[0].startswith("Nothing was measured. ")
    assert words in loud[0]
    assert ("<h2>Losses" in text) == (source == "simulated")


def test_a_page_says_aloud_what_was_wrong_and_what_became_slower():
    before, found = run(row("a", 100)), run(row("a", measured={OURS: measured(1.0, error=3.0)}))
    loud = re.findall(r'<p class="loud">(.*?)</p>', report.html(found, compare(before, found), before))
    assert len(loud) == 2
    assert "3 times its tolerance" in loud[0]
    assert loud[1].startswith("1 slower")


# ---------------------------------------------------------------------------------------------------------------------
# Reasons


def lost(**others):
    (loss,) = reasons.losses(run(row("a", 100, 50, **others)))
    return loss


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"predicted_seconds": 40e-6}, "it takes 2.5 times its predicted 40 us"),
        ({"predicted_seconds": 95e-6}, "predicted to lose: 95 us, 32% of the roofline"),
        ({"roofline_seconds": 60e-6}, "the rival is below the 60 us of a direct convolution"),
        (
            {"reason": "pointer gather, since channels are not whole vectors; tiles by rule"},
            "the gather kernel ran, since channels are not whole vectors",
        ),
        ({"workspace_bytes": 400 * 2**20}, "the kernel has 400 MiB of copies or slabs around it"),
        ({}, "it reaches 38% of the nearer ceiling; the roofline's limit is matrix rate"),
    ],
)
def test_reasons_follow_from_numbers(others, words):
    assert words in lost(**others).words


def test_a_busy_host_is_a_reason():
    slow = row("a", measured={OURS: measured(1e-5, host_seconds=2e-5), CHANNELS_LAST: measured(5e-6)})
    assert reasons.reason(run(slow), slow).endswith("; besides, a call takes the host 20 us, longer than the device")
    assert reasons.reason(run(slow), row("a", 50, 100)) == ""


def test_the_worst_layer_of_each_suite_that_loses():
    rows = [row("a", 100, 90), row("b", 100, 30), row("c", 100, 99), row("d", 10, 40)]
    rows += [row("e", 100, 60, suite="patches"), row("f", 10, 40, suite="aspp")]
    found = reasons.losses(run(*rows))
    assert [(loss.suite, loss.row.layer, loss.rows, loss.of) for loss in found] == [
        ("resnet50", "b", 2, 4),
        ("patches", "e", 1, 1),
    ]
    assert found[0].ratio == pytest.approx(100 / 30)


def small_run(suite, op, layer):
    """A row as it is planned, and slow."""
    job = next(job for job in jobs([suite], [op]) if job.name.startswith(layer))
    times = {OURS: measured(1e-2), CHANNELS_LAST: measured(1e-3)}
    return replace(predicted_row(job, H200), measured=times)


@pytest.mark.parametrize(
    ("suite", "op", "layer", "kernels"),
    [
        ("resnet50", "step", "stage 3 3x3 256", ["box", "box", "box_wgrad"]),
        ("resnet50", "dgrad", "stem", ["gather"]),
        ("mamba", "step", "Mamba-2.8B", ["causal", "causal_backward"]),
        ("resnet50_fused", "step", "stage 3 expand", ["box", "activation_backward", "box", "box_wgrad"]),
        ("aspp_branches", "fprop", "rates 6/12/18", ["box_branches"]),
        ("dcnv2_resnet50", "step", "stage 4", ["deform", "deform_dgrad", "deform_offset", "deform_wgrad"]),
        ("wan_streaming", "fprop", "3x3x3 384", ["box"]),
    ],
)
def test_plans_are_made_again_from_a_row(suite, op, layer, kernels):
    found = small_run(suite, op, layer)
    assert [p.kernel for p in reasons.plans_of(found, H200)] == kernels
    for odd in ({"suite": "mine"}, {"layer": "mine"}, {"call": "mine"}, {"dtype": "nn"}, {"kernel": "mine"}):
        assert reasons.plans_of(replace(found, **odd), H200) == []
    assert reasons.plans_of(replace(found, call=found.call.replace("x", "x9", 1)), H200) == []


def test_few_tiles_are_a_reason():
    row = small_run("resnet50_batch1", "fprop", "stage 4 3x3 512")
    assert re.search(r"box has \d+ tiles for \d+ places on the device", reasons.reason(run(row), row))


@pytest.mark.slow
def test_losses_say_what_the_compiler_made_of_the_kernel():
    rows = [small_run("resnet50", "fprop", "stage 3 3x3 256"), row("a", 100, 50, suite="mine")]
    known, unknown = reasons.losses(run(*rows), audit=True)
    assert re.search(r"box: \d+ registers, (a block|2 blocks) a multiprocessor, HGMMA from shared", known.code)
    assert unknown.code == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": 0}, "rows[1].times: is out of range"),
        ({"flops": -1}, "rows[1].flops: is out of range"),
        ({"bytes": 10**400}, "rows[1].bytes: is out of range"),
        ({"roofline_seconds": 10**400}, "rows[1].roofline_seconds: is not finite"),
        ({"predicted_seconds": 0.0}, "rows[1].predicted_seconds: is out of range"),
        ({"measured": {OURS: {"seconds": 0.0}}}, "rows[1].measured.triton_conv.seconds: is out of range"),
        ({"measured": {OURS: {"spread": -0.1}}}, "rows[1].measured.triton_conv.spread: is out of range"),
        ({"layer": "a"}, "rows[1]: the same row stands there twice"),
    ],
    ids=str,
)
def test_numbers_that_nobody_can_have_measured(change, message, tmp_path):
    path = tmp_path / "bench.json"
    records.write(run(row("a", 100), row("b", 100, call=row("a").call)), path)
    assert len(records.read(path).rows) == 2
    found = json.loads(path.read_text())
    found["rows"][1] |= change
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=re.escape(message)):
        records.read(path)


def test_numbers_of_too_many_digits_are_named_with_their_file(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(f'{{"format": {"9" * 5000}}}')
    with pytest.raises(ValueError, match=r"bench\.json: is no JSON"):
        records.read(path)


def test_files_without_a_common_row_are_no_success():
    found = compare(run(row("a", 100)), run(row("b", 100)))
    assert not found.compared
    assert ("no row with a time is in both: nothing was compared", True) in words.change_words(found)
