"""The evidence run: what becomes of units that fail in every way, and that its stages leave no kernel out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import interruptible

from bench.evidence import __main__ as command
from bench.evidence import record, supervise

STAGE = """
import os, signal, sys, time
from bench.evidence.units import Unit

NAME, ABOUT, LIMIT = "x", "a stage of a test", 100.0

def fine():
    return {"ok": True, "words": "well", "value": float("nan"), "path": os.path, "pid": os.getpid()}

def raises():
    print("about to raise")
    raise ValueError("no such luck")

def killed():
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def hangs():
    print("for ever", flush=True)
    time.sleep(600)

def stuck():
    import faulthandler
    faulthandler.dump_traceback_later(0.2, exit=True)
    hangs()

def grows():
    with open(os.path.join(sys.path[0] or ".", "COUNT"), "a") as file:
        file.write("x")
    return {"ok": True, "words": "more", "unfinished": True}

def units(context):
    assert context.simulate and context.device.type == "cpu" and context.left() < 200
"""
# In place of what takes a child seconds to import.
STAND_INS = """
import sys, types
sys.modules["torch"] = types.SimpleNamespace(device=lambda kind, *_: types.SimpleNamespace(type=kind))
sys.modules["bench.runner"] = types.SimpleNamespace(versions=lambda: {"torch": "2"})
"""
EVERYTHING = """
    yield Unit("first", fine)
    yield Unit("raises", raises)
    yield Unit("killed", killed)
    yield Unit("hangs", hangs, 0.5)
    yield Unit("last", fine)
"""


class Bed:
    """A folder of results and fake stages that children can import."""

    def __init__(self, path: Path):
        self.path, self.out = path, path / "out"
        (path / "sitecustomize.py").write_text(STAND_INS)
        root = Path(__file__).parents[1]
        self.environment = {"PYTHONPATH": f"{path}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}

    def run(self, budget=None, simulated=True, **stages):
        for letter, body in stages.items():
            (self.path / f"fake_{letter}.py").write_text(body)
        found = record.read(self.out) or record.begin("c0ffee", simulated)
        log = supervise.Log(self.out / "log.txt")
        modules = {letter: f"fake_{letter}" for letter in stages}
        try:
            return supervise.run(modules, self.out, found, log, budget, self.environment), found
        finally:
            log.close()

    def log(self):
        return (self.out / "log.txt").read_text()


@pytest.fixture
def bed(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "_GRACE", 0.3)
    return Bed(tmp_path)


def test_units_fail_in_every_way_and_the_others_go_on(bed):
    (report,), _ = bed.run(x=STAGE + EVERYTHING)
    found = record.read(bed.out)
    facts = found.stages["x"]
    assert list(facts) == ["first", "raises", "killed", "hangs", "last"]
    assert [one["ok"] for one in facts.values()] == [True, False, False, False, True]
    assert facts["first"]["value"] is None
    assert isinstance(facts["first"]["path"], str)
    assert facts["raises"]["words"].startswith("ValueError: no such luck (fake_x.py:")
    assert facts["killed"]["words"] == "died with signal SIGKILL: last words"
    assert facts["hangs"]["words"].startswith("hung")
    assert facts["hangs"]["output"][-1] == "for ever"
    assert 0.5 <= facts["hangs"]["seconds"] < 5
    assert (report.left, report.about) == (0, "a stage of a test")
    words = supervise.table([report], found)
    assert "failed: x killed: died with signal SIGKILL" in words
    assert words.splitlines()[1].split()[:4] == ["x", "2", "3", "0"]
    assert "about to raise" in bed.log()
    # again: nothing is left to do, and what failed stays as it is
    before = (bed.out / record.FILE).stat().st_mtime_ns, facts
    (report,), found = bed.run(x=STAGE + EVERYTHING)
    assert (report.left, found.stages["x"]) == (0, before[1])


def test_a_kernel_that_ends_processes_is_left_out(bed):
    body = "".join(
        f'    yield Unit("{n}", {what}, kernel="box")\n' for n, what in enumerate(("stuck", "killed", "fine"))
    )
    body += '    yield Unit("another", fine, kernel="gather")\n'
    _, found = bed.run(x=STAGE + body)
    stuck, killed, out, another = (found.stages["x"][name] for name in ("0", "1", "2", "another"))
    assert stuck["words"].startswith("hung: it ended itself in File")
    assert stuck["words"].endswith("in hangs")
    assert (stuck["deadly"], killed["deadly"]) == ("box", "box")
    assert out["words"] == "left out: box has hung, or ended its process, before"
    assert (out["ok"], out["unfinished"], another["ok"]) == (False, True, True)
    found.forget("x", "1")  # as --again does: a single death is no rule
    record.write(found, bed.out)
    _, found = bed.run(x=STAGE + body.replace("killed", "fine"))
    assert found.stages["x"]["2"]["ok"]


def test_stages_run_in_the_order_that_is_given():
    assert command._stages("caca") == "ca"


def test_a_stage_that_does_not_begin_has_failed_and_the_next_one_runs(bed):
    good = STAGE.replace('"x"', '"y"') + '    yield Unit("one", fine)\n'
    reports, found = bed.run(x="raise ImportError('nothing here')", y=good)
    assert found.stages["x"][supervise.START]["words"].endswith("ImportError: nothing here")
    assert found.stages["y"]["one"]["ok"]
    assert [r.left for r in reports] == [0, 0]


def test_time_that_is_up_leaves_units_for_another_run(bed):
    body = STAGE + '    yield Unit("first", fine)\n    yield Unit("slow", hangs)\n    yield Unit("last", fine)\n'
    began = time.monotonic()
    (report,), found = bed.run(x=body.replace("100.0", "1.0"))
    assert time.monotonic() - began < 30
    assert list(found.stages["x"]) == ["first"]
    assert report.left == 2
    assert "cut off  slow" in bed.log()
    body = STAGE + '    yield Unit("first", raises)\n    yield Unit("slow", fine)\n    yield Unit("last", fine)\n'
    (report,), found = bed.run(x=body)
    assert report.left == 0
    assert [facts["ok"] for facts in found.stages["x"].values()] == [True, True, True]


def test_an_exhausted_budget_begins_nothing(bed):
    (report,), found = bed.run(budget=1e-9, simulated=False, x=STAGE + EVERYTHING)
    assert (found.stages["x"], report.about) == ({}, "")
    assert "not begun" in supervise.table([report], found)


def test_a_simulated_stage_runs_a_unit_however_little_time_there_is(bed):
    (report,), found = bed.run(budget=1e-9, x=STAGE + EVERYTHING)
    assert list(found.stages["x"]) == ["first"]
    assert report.left == 4


def alive(pid):
    """Whether it runs; one that has ended and that nobody asks about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupted_run_leaves_no_process_and_keeps_what_is_finished(bed, number):
    body = STAGE + '    yield Unit("first", fine)\n    yield Unit("slow", hangs)\n    yield Unit("last", fine)\n'
    (bed.path / "fake_x.py").write_text(body)
    code = f"""
import sys
from bench.evidence import __main__
__main__.STAGES = {{"x": "fake_x"}}
sys.exit(__main__.main(["--out", {str(bed.out)!r}, "--simulate", "--commit", "c0ffee"]))
"""
    environment = {**os.environ, **bed.environment}
    how = {"env": environment, "stdout": subprocess.PIPE, "text": True, "preexec_fn": interruptible}
    with subprocess.Popen([sys.executable, "-c", code], **how) as process:
        for line in process.stdout:
            if "first" in line:
                break
        process.send_signal(number)
        rest = process.communicate(timeout=20)[0]
    found = record.read(bed.out)
    assert list(found.stages["x"]) == ["first"]
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert ("interrupted" in rest) == (number != signal.SIGKILL)
    deadline = time.monotonic() + 10
    while alive(found.stages["x"]["first"]["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(found.stages["x"]["first"]["pid"])


def test_results_of_another_run_are_not_mixed(tmp_path, capsys):
    old = record.begin("c0ffee", simulated=True)
    old.stages["x"] = {
        "one": {"ok": False, "words": "", "seconds": 1.0},
        "two": {"ok": True, "words": "", "seconds": 1},
    }
    record.write(old, tmp_path)
    assert command.main(["--out", str(tmp_path), "--simulate", "--commit", "decaf"]) == 2
    assert "results of commit c0ffee, and this is commit decaf" in capsys.readouterr().err
    assert command.main(["--out", str(tmp_path), "--commit", "c0ffee"]) == 2
    assert "holds simulated results" in capsys.readouterr().err
    assert list(command._record(tmp_path, "c0ffee", True, again=False).stages["x"]) == ["one", "two"]
    assert list(command._record(tmp_path, "c0ffee", True, again=True).stages["x"]) == ["two"]
    assert command._record(tmp_path, "decaf", True, again=True).stages == {}
    (tmp_path / record.FILE).write_text('{"format": 1, "stages": 3}')
    assert command.main(["--out", str(tmp_path), "--commit", "c0ffee"]) == 2
    assert "is no evidence run" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--stages", "az"], ["--stages", ""], ["--budget", "0"], ["--budget", "nan"]])
def test_wrong_words_are_named(words, capsys):
    with pytest.raises(SystemExit):
        command.main(words)
    assert words[0] in capsys.readouterr().err
