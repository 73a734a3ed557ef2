"""compute-sanitizer's output is read right, and its program covers every kernel."""

import subprocess

import pytest
import torch

from bench.evidence import sanitized, sanitizer
from bench.evidence.units import Context
from triton_conv import devices

CLEAN = """case box: right
========= COMPUTE-SANITIZER
case gather: right
========= ERROR SUMMARY: 0 errors
"""
READ = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at gather_kernel+0x1a30 in gather.py:88
=========     by thread (31,0,0) in block (3,0,0)
=========     Access at 0x7f2a4e000200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f2a4e000000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernelEx [0x2f1b5c] in libcuda.so.1
=========
========= Invalid __global__ write of size 4 bytes
=========     at wgrad_kernel+0x90 in wgrad.py:12
=========     Saved host backtrace up to driver entry point
=========         Host Frame: cuLaunchKernelEx
=========
========= Target application returned an error
========= ERROR SUMMARY: 2 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at box_kernel+0x560 in box.py:120
=========     and Read access at box_kernel+0x8f0 in box.py:131 [16 hazards]
=========
========= Warning: Race reported between Write access at fold_kernel+0x10
=========     and Write access at fold_kernel+0x10 [2 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the documentation
=========
"""


def test_a_clean_report():
    assert sanitizer.parsed(CLEAN) == sanitizer.Report(0, 0, [], "")
    assert sanitizer.cases_of(CLEAN) == (["box", "gather"], [])


def test_findings_are_kept_without_backtraces():
    report = sanitizer.parsed(READ)
    assert report.errors == 2
    assert len(report.findings) == 2
    assert report.findings[0].startswith("Invalid __global__ read of size 2 bytes; at gather_kernel+0x1a30")
    assert "nearest allocation" in report.findings[0]
    assert not any("Host Frame" in finding for finding in report.findings)


def test_races_have_a_summary_of_their_own():
    report = sanitizer.parsed(RACE)
    assert (report.errors, report.warnings) == (1, 1)
    assert "and Read access at box_kernel" in report.findings[0]


def test_a_report_that_breaks_off_has_no_count():
    assert sanitizer.parsed("========= COMPUTE-SANITIZER\ncase box: right\n").errors is None


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """A context whose sanitizer prints what it is told to, and the commands that were run."""
    commands, answers = [], []

    def run(command, **how):
        commands.append((command, how["env"]))
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return subprocess.CompletedProcess(command, *answer)

    monkeypatch.setattr(sanitizer.subprocess, "run", run)
    monkeypatch.setattr(sanitizer, "found", lambda: "/opt/compute-sanitizer")
    return Context(tmp_path, torch.device("cuda", 0), False, lambda: 400.0), commands, answers


def test_a_tool_that_finds_nothing_is_fine(on_a_gpu):
    context, commands, answers = on_a_gpu
    answers.append((0, CLEAN))
    facts = sanitizer.checked("memcheck", context)
    assert facts["ok"]
    assert facts["cases"] == ["box", "gather"]
    command, environment = commands[0]
    assert command[:3] == ["/opt/compute-sanitizer", "--tool", "memcheck"]
    assert command[-2:] == ["bench.evidence.sanitized", "cuda:0"]
    assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_a_finding_fails_and_is_shown(on_a_gpu):
    context, _, answers = on_a_gpu
    answers.append((99, READ))
    facts = sanitizer.checked("memcheck", context)
    assert not facts["ok"]
    assert "2 errors" in facts["words"]
    assert "gather_kernel" in facts["words"]


def test_a_wrong_value_under_a_tool_fails(on_a_gpu):
    context, _, answers = on_a_gpu
    answers.append((1, CLEAN.replace("gather: right", "gather: y is off")))
    assert not sanitizer.checked("memcheck", context)["ok"]


def test_a_device_that_is_refused_is_left_out(on_a_gpu):
    context, _, answers = on_a_gpu
    answers.append((1, REFUSED))
    facts = sanitizer.checked("racecheck", context)
    assert facts["left_out"]
    assert "Device not supported" in facts["words"]


def test_a_tool_that_takes_too_long_says_how_far_it_came(on_a_gpu):
    context, _, answers = on_a_gpu
    answers.append(subprocess.TimeoutExpired("x", 110, output=b"case box: right\n"))
    facts = sanitizer.checked("racecheck", context)
    assert facts["cases"] == ["box"]
    assert "not done after" in facts["words"]
    answers.append(subprocess.TimeoutExpired("x", 110, output=RACE.partition("========= RACECHECK")[0].encode()))
    assert not sanitizer.checked("racecheck", context)["ok"]


def test_without_the_program_it_is_left_out(on_a_gpu, monkeypatch):
    monkeypatch.setattr(sanitizer, "found", lambda: None)
    assert "not installed" in sanitizer.checked("memcheck", on_a_gpu[0])["words"]


def test_cases_that_die_are_reported(on_a_gpu, monkeypatch):
    context, _, answers = on_a_gpu
    monkeypatch.setattr(sanitizer.execute, "device_of", lambda device: None)
    answers.append((-11, "case box: right\nSegmentation fault"))
    facts = sanitizer.plain(context)
    assert not facts["ok"]
    assert "Segmentation fault" in facts["words"]


def test_cases_cover_every_kernel():
    plans = sanitized.plans(devices.H200)
    families = {"gather", "box", "wgrad", "box_wgrad", "depthwise", "depthwise_wgrad", "banded", "banded_wgrad"}
    assert {p.kernel for p in plans} == families
    assert any(p.fold for p in plans)


def test_the_program_runs_its_cases(monkeypatch, capsys):
    monkeypatch.setattr(sanitizer.sys, "argv", ["sanitized", "cpu"])
    assert sanitized.main() == 0
    done, wrong = sanitizer.cases_of(capsys.readouterr().out)
    assert len(done) == len(sanitized.CASES) + 2 + len(sanitized.MORE)
    assert not wrong
