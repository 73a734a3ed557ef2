"""Every block of the README runs: Python, the script's diff, what is printed, and each command.

A command runs as it stands, or a smaller one in its place; those that CI or another test runs, or that nothing here
could, are read by their own parsers. `HOW` says which and why.
"""

import doctest
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import train_digits

import triton_conv
from triton_conv import cli, demo

ROOT = Path(triton_conv.__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
PAGES = ("README.md", "bench/README.md", "triton_conv/README.md", "triton_conv/kernels/README.md")
PAGES += ("triton_conv/tuning/README.md",)

pytestmark = pytest.mark.skipif(not README, reason="the package is installed without its README")

PARSED = "parsed"
# What a command begins with: what is run in its place (None: itself), or PARSED, and why.
HOW = {
    "triton-conv audit": (PARSED, "the audit is minutes long: tests/test_audit.py"),
    "triton-conv bench --compare": (PARSED, "there are no two runs: tests/test_bench_command.py"),
    "triton-conv bench": (PARSED, "minutes long, run by CI: tests/test_bench_command.py has small ones"),
    "triton-conv check": ("triton-conv check --only 3", "one of the same cases"),
    "triton-conv configs": (None, ""),
    "triton-conv configs verify": (PARSED, "tests/test_configs.py verifies what ships"),
    "triton-conv configs seed": (PARSED, "tests/test_configs.py has a small one"),
    "triton-conv demo --interpret": (PARSED, "tests/test_demo.py runs it"),
    "triton-conv explain": (None, ""),
    "triton-conv fuzz": (PARSED, "its own tests run it"),
    "triton-conv report": (PARSED, "seconds long at this size: its own tests run small ones"),
    "triton-conv tune": (PARSED, "a suite takes a while even without measuring: tests/test_tune_command.py"),
    "triton-conv tune --model": (PARSED, "wants torchvision"),
    "torchrun --nproc-per-node 8 --max-restarts 3 -m triton_conv": (PARSED, "wants eight GPUs"),
    "python -m bench.evidence": (PARSED, "wants a GPU: tests/test_evidence.py goes through all of it"),
    "python -m bench.publish": (PARSED, "wants results of a run: tests/test_performance.py"),
    "python -m bench.soak": (PARSED, "five minutes long: a slow test runs some"),
    "python -m bench.host": (PARSED, "a minute long: tests/test_host.py"),
    "python3 -m venv": (PARSED, "CI runs both, in a checkout with nothing else"),
    ".venv/bin/pip install": (PARSED, "CI does"),
    "ruff check": (PARSED, "CI does"),
    "pytest -q": (PARSED, "this is it"),
    "bash .ci/run": (PARSED, "CI is that"),
    "coverage": (PARSED, "twice as long as the tests"),
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8") if (ROOT / page).exists() else ""
        lines = "\n".join(blocks(text, "sh")).splitlines()
        found += [line.partition(" #")[0].strip() for line in lines if not line.startswith("#")]
        inline = re.findall(r"`((?:triton-conv|python -m) [^`]*\s[^`]*)`", text)
        found += [" ".join(command.split()) for command in inline if "DIR" not in command]
    return sorted({command for command in found if command})


def how(command: str) -> tuple[str | None, str]:
    fitting = [start for start in HOW if command.startswith(start)]
    assert fitting, f"nothing says how the README's {command!r} is tested"
    return HOW[max(fitting, key=len)]


@pytest.mark.parametrize("command", commands())
def test_commands_run_or_are_understood(command, tmp_path, monkeypatch, capsys):
    instead, _ = how(command)
    words = shlex.split(command)
    if instead is not PARSED:
        monkeypatch.chdir(tmp_path)
        assert cli.main(shlex.split(instead or command)[1:]) == 0
        assert capsys.readouterr().out
    elif "triton_conv" in words or words[0] == "triton-conv":
        given = words[words.index("triton_conv") + 1 :] if "triton_conv" in words else words[1:]
        assert cli._parser().parse_args(given).command is not None
    elif words[:2] == ["python", "-m"]:
        options = [w for w in words[3:] if w.startswith("--")]
        main = importlib.import_module("bench.evidence.__main__" if words[2] == "bench.evidence" else words[2]).main
        monkeypatch.setattr(sys, "argv", words[2:])
        with pytest.raises(SystemExit) as left:
            main(["--help"])
        assert left.value.code == 0
        printed = capsys.readouterr().out
        assert all(option in printed for option in options)


def test_every_way_of_testing_a_command_is_needed():
    used = {max((s for s in HOW if c.startswith(s)), key=len) for c in commands()}
    assert set(HOW) == used


def test_the_readme_shows_every_command():
    (group,) = (action for action in cli._parser()._actions if action.choices)
    shown = set(re.findall(r"^\| `triton-conv (\w+)", README, flags=re.MULTILINE))
    assert shown == set(group.choices)


def test_the_two_commands_stand_alone_on_their_lines():
    for ending in ("triton-conv demo", "pytest -q"):
        assert len(re.findall(rf"^python3 -m venv .*{ending}$", README, flags=re.MULTILINE)) == 1


def test_python_blocks_run():
    python = blocks(README, "python")
    assert all(block.startswith(">>> ") for block in python)
    with torch.random.fork_rng(devices=[]):
        result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.failed == 0
    assert result.attempted == sum(block.count("\n>>> ") + 1 for block in python)


def patched(script: str, diff: str) -> str:
    """The script after a diff whose hunks have context, and no line numbers."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert script.count(before) == 1, f"the script has no single\n{before}"
        script = script.replace(before, after)
    return script


def without_numbers(text: str) -> list[str]:
    """Lines of printed text, where a number is a number."""
    text = re.sub(r"\(torch [^)]*\)", "", text)
    return [re.sub(r"[-+]?\d[\d.,]*(e[-+]\d+)?", "0", line).split() for line in text.splitlines()]


def output_after(marker: str) -> str:
    """The block of output that follows these words."""
    fences = re.split(r"^```(.*)\n", README, flags=re.MULTILINE)  # text, language, block, "", text, ...
    shown = [(fences[i], fences[i + 2]) for i in range(0, len(fences) - 3, 4) if not fences[i + 1]]
    (found,) = (block for before, block in shown if marker in before)
    return found


def test_the_script_trains_with_its_one_line(capsys):
    (diff,) = blocks(README, "diff")
    script = patched(Path(train_digits.__file__).read_text(encoding="utf-8"), diff)
    changed: dict = {"__name__": "changed"}
    exec(compile(script, "train_digits.py, changed", "exec"), changed)
    with torch.random.fork_rng(devices=[]):
        model, accuracy = changed["main"]()
    ours = [m for m in model.modules() if type(m) is triton_conv.nn.Conv2d]
    assert len(ours) == 4
    assert accuracy > 0.95
    first, epoch, *_ = without_numbers(output_after("It then prints:"))
    printed = without_numbers(capsys.readouterr().out)
    assert printed[0] == first
    assert printed[1:] == [epoch] * 6


def test_the_script_is_plain_pytorch_before():
    source = Path(train_digits.__file__).read_text(encoding="utf-8")
    assert "triton_conv" not in source
    assert train_digits.main.__defaults__ == (6,)


def test_the_demo_prints_what_is_shown(tmp_path, capsys):
    demo.run("cpu", epochs=1, output=str(tmp_path / "demo_loss.png"))  # of one epoch, whose accuracy is too low
    printed = without_numbers(capsys.readouterr().out.replace(f"{tmp_path}/", ""))
    shown = without_numbers(output_after("The demo (`triton-conv demo`)"))
    assert printed[: len(shown)] == shown


def test_links_lead_somewhere():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" in path:
                continue
            there = (ROOT / page).parent / path if path else ROOT / page
            assert there.exists(), f"{page} links to {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert anchor in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, target


def test_files_that_pages_name_exist():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"`((?:triton_conv|tests|bench)/[\w./]*)`", text):
            assert (ROOT / name).exists(), f"{page} names {name}"


def test_pages_list_every_module():
    listed = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES[1:])
    rows = " ".join(line.split("|")[1] for line in listed.splitlines() if line.startswith("| `"))
    for folder in ("triton_conv", "triton_conv/kernels", "triton_conv/tuning", "bench"):
        for path in (ROOT / folder).glob("*.py"):
            if not path.name.startswith(("__", "commands_", "version")):
                assert re.search(rf"[`/]{path.name}`", rows), f"no page lists {folder}/{path.name}"
