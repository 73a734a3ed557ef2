"""`triton-conv bench`: what it prints, what it writes and how it ends, without a GPU."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from bench_runs import row, run
from rich.console import Console

from bench import commands, records
from bench.records import OURS, Measurement
from bench.runner import PredictedMeter
from triton_conv import cli, stored
from triton_conv.commands import bench as bench_command
from triton_conv.tuning import tables

FEW = ["--quick", "--suite", "mamba"]  # two layers, two operations each


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """No GPU, no store, and a directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "300")
    stored.forget()
    return tmp_path


def bench(*arguments):
    return cli.main(["bench", *map(str, arguments)])


def test_without_a_gpu_it_predicts_and_says_so_first_and_last(capsys, here):
    assert bench(*FEW, "--out", "out") == 0
    lines = capsys.readouterr().out.splitlines()
    nothing = "Nothing was measured: every time here is a prediction for NVIDIA H200."
    assert lines[0] == lines[-1] == nothing
    rows = [line.split() for line in lines if "Mamba" in line]
    assert len(rows) == 4
    assert all("right" in cells for cells in rows)
    names = ["bench.json", "report.html", "speedup.png", "roofline.png", "extremes.png"]
    assert lines[-1 - len(names) : -1] == [f"out/{name}" for name in names]
    assert sorted(names) == sorted(path.name for path in (here / "out").iterdir())
    found = records.read(here / "out" / "bench.json")
    assert (found.source, found.device, len(found.rows)) == ("predicted", "NVIDIA H200", 4)
    assert found.command == "triton-conv bench --suite mamba --quick"
    assert nothing.partition(":")[0] in (here / "out" / "report.html").read_text()


def test_a_new_directory_for_each_run_unless_one_is_given(capsys, here):
    assert bench(*FEW, "--op", "fprop", "--device", "A100") == 0
    (made,) = (here / "bench_results").iterdir()
    assert made.name.endswith("-NVIDIA_A100")
    assert "prediction for NVIDIA A100" in capsys.readouterr().out


def test_made_up_times(capsys, here):
    assert bench(*FEW, "--simulate", "--out", "out") == 0
    printed = capsys.readouterr().out
    nothing = "Nothing was measured: every time here is made up."
    assert printed.splitlines()[0] == printed.splitlines()[-1] == nothing
    assert "made-up times: " in printed
    assert "times as quick as channels-last cuDNN (geometric mean of 4)" in printed
    assert records.read(here / "out" / "bench.json").source == "simulated"


def slower_than(path, factor):
    """A file of the same rows, so many times as quick."""
    found = json.loads(path.read_text())
    for made in found["rows"]:
        made["predicted_seconds"] *= factor
    other = path.with_name(f"{factor}.json")
    other.write_text(json.dumps(found))
    return other


def test_regressions_against_a_file_are_exit_code_1(capsys, here):
    assert bench(*FEW, "--out", "out") == 0
    quicker, same = slower_than(here / "out" / "bench.json", 0.5), here / "out" / "bench.json"
    capsys.readouterr()
    assert bench(*FEW, "--out", "again", "--compare", same) == 0
    assert "comparison: 0 slower, 0 quicker, 4 the same but for noise" in capsys.readouterr().out
    assert bench(*FEW, "--out", "worse", "--compare", quicker) == 1
    printed = capsys.readouterr().out
    assert "comparison: 4 slower, 0 quicker, 0 the same but for noise" in printed
    assert "4 slower" in (here / "worse" / "report.html").read_text()


def test_two_files_are_compared_without_measuring(capsys, here):
    old, new = here / "old.json", here / "new.json"
    records.write(run(row("a", 100), row("b", 100)), old)
    records.write(run(row("a", 200), row("b", 101)), new)
    assert bench("--compare", old, new) == 1
    printed = capsys.readouterr().out
    assert "comparison: 1 slower, 0 quicker, 1 the same but for noise" in printed
    assert [line.split()[-1] for line in printed.splitlines() if " a " in line] == ["2.00"]
    assert bench("--compare", new, old) == 0
    assert sorted(path.name for path in here.iterdir()) == ["new.json", "old.json"]


def test_results_of_others_are_not_replaced(capsys, here):
    path = here / "out" / "bench.json"
    records.write(run(row("a", 100)), path)
    before = path.read_text()
    assert bench(*FEW, "--out", "out") == 2
    assert "argument --out: out/bench.json has times of NVIDIA H200 that are measured" in capsys.readouterr().err
    assert path.read_text() == before


def test_rows_for_which_no_time_was_left_are_counted(capsys, here):
    assert bench(*FEW, "--out", "out", "--seconds", "1e-9") == 0
    assert "4 of 4 rows are left; the same command with --out out goes on" in capsys.readouterr().out


def test_narrow_terminals_get_fewer_columns(capsys, monkeypatch):
    made = tables.table("layer", ">ours us", "kernel")
    tables.add(made, ["3x3 256>256", "123", "box of a very long name"])
    monkeypatch.setattr(tables, "_Console", partial(Console, force_terminal=True, width=30))
    tables.show(made, ["kernel", "ours us"])
    printed = capsys.readouterr().out
    assert "123" in printed
    assert "very" not in printed
    assert "also shows: kernel\n" in printed


def test_wrong_values_are_exit_code_1(capsys, here, monkeypatch):
    right = PredictedMeter.row

    def wrong(self, job):
        found = right(self, job)
        return replace(found, measured={OURS: Measurement(error=7.0, note="wrong: y")})

    monkeypatch.setattr(PredictedMeter, "row", wrong)
    assert bench(*FEW, "--op", "fprop", "--out", "out") == 1
    printed = capsys.readouterr()
    assert "WRONG" in printed.out
    assert "mamba: Mamba-2.8B, fprop (causal_conv1d" in printed.err
    assert "7 times its tolerance" in printed.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(KeyboardInterrupt(), 130, "interrupted"), (torch.AcceleratorError("lost\nmore"), 1, "the GPU answers no more: ")],
)
def test_a_run_that_is_broken_off_is_kept_and_taken_up(capsys, here, monkeypatch, error, code, words):
    right, seen = PredictedMeter.row, []

    def breaks(self, job):
        seen.append(job.name)
        if len(seen) == 2:
            raise error
        return right(self, job)

    monkeypatch.setattr(PredictedMeter, "row", breaks)
    assert bench(*FEW, "--op", "fprop", "--out", "out") == code
    printed = capsys.readouterr()
    assert f"triton-conv: {words}" in printed.err
    assert "what was measured is kept in out/bench.json" in printed.err
    assert len(records.read(here / "out" / "bench.json").rows) == 1
    assert bench(*FEW, "--op", "fprop", "--out", "out") == 0
    assert seen[2:] == [seen[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "argument --device: PyTorch sees no CUDA device"),
        (["--who", "flag_gems"], "argument --who: nobody is measured"),
        (["--who", "nobody"], "argument --who: 'nobody' is not one of cudnn contiguous,"),
        (["--dtype", "complex64"], "argument --dtype: complex convolutions are made of real ones"),
        (["--compare", "a", "b", "c"], "argument --compare: compares this run with one file, or two files"),
        (["--compare", "a", "b", "--quick"], "argument --compare: two files are not measured: no --quick"),
        (["--compare", "a", "b", "--contiguous"], "argument --compare: two files are not measured: no --channels-last"),
        (["--compare", "missing.json"], "missing.json"),
        (["--compare", "words.json"], "words.json: is no JSON"),
        (["--compare", "measured.json"], "measured.json has times that are measured, and these will be predicted"),
        (["--compare", "measured.json", "predicted.json"], "argument --compare: times that are measured and"),
        (["--suite", "mamba", "--op", "dgrad"], "there is nothing to measure"),
        (["--out", "words.json"], "argument --out: "),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is(arguments, message, capsys, here):
    (here / "words.json").write_text("words")
    records.write(run(row("a", 1)), here / "measured.json")
    records.write(run(row("a"), source="predicted"), here / "predicted.json")
    before = sorted(here.iterdir())
    assert bench(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("triton-conv: error: ")
    assert message in printed.err
    assert sorted(here.iterdir()) == before


def test_an_installed_package_has_no_benchmarks(capsys, here, monkeypatch):
    installed = here / "site-packages" / "triton_conv" / "commands" / "bench.py"
    monkeypatch.setattr(bench_command, "__file__", str(installed))
    assert bench("--quick") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "triton-conv: error: bench needs a checkout of the repository: this package is installed without its benchmarks"
    )


def test_a_command_line_says_what_to_type_again():
    words = "--suite aspp --suite x3d --op step --dtype float16 --batch 4 --seconds 60.0 --contiguous --quick"
    arguments = cli._parser().parse_args(["bench", *words.split(), "--out", "somewhere"])
    assert commands.command_line(arguments) == f"triton-conv bench {words}"


def test_a_reader_that_goes_away_is_no_error_of_the_arguments(monkeypatch):
    def gone(arguments):
        raise BrokenPipeError

    monkeypatch.setattr(commands, "bench", gone)
    with pytest.raises(BrokenPipeError):
        bench_command.run(cli._parser().parse_args(["bench"]))
