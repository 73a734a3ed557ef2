"""Published results and the README's section about them."""

import json
import re

import pytest
from bench_runs import row, run

from bench import performance, publish, records
from bench.performance import BEGIN, END


def test_the_section_of_the_readme_is_up_to_date(capsys):
    code = performance.main(["--check"])
    assert (code, capsys.readouterr().err) == (0, "")


def test_a_stale_section_is_found_and_written_anew(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# a\n\n## Performance\n\n{BEGIN}\nold\n{END}\n\nrest\n")
    monkeypatch.setattr(performance, "ROOT", tmp_path)
    monkeypatch.setattr(performance, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(performance, "block", lambda runs: "new")
    assert performance.main(["--check"]) == 1
    assert "stale: python -m bench.performance" in capsys.readouterr().err
    assert "old" in readme.read_text()
    assert performance.main([]) == 0
    assert readme.read_text() == f"# a\n\n## Performance\n\n{BEGIN}\nnew\n{END}\n\nrest\n"
    assert performance.main(["--check"]) == 0


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_markers_are_needed_once_and_in_order(text):
    with pytest.raises(ValueError, match=r"README\.md: .* are to be there once"):
        performance.replaced(text, "new")


def test_without_results_there_are_predictions_called_so():
    text = performance.block([])
    assert "No GPU has run this version" in text
    assert "nothing is measured" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert "predicted ms" in lines[0]
    assert re.match(r"\| resnet50 \|.*\| step \| 128 \| 23 \| [\d.]+ \| [\d.]+ \| \d+% \|$", lines[1])
    assert re.search(r"^\| wan_streaming \|.*\| fprop \| 1 \| 9 \|", text, re.MULTILINE)
    assert re.search(r"^\| bias, shortcut and relu in the kernel.*\| 1.2 \| 4 \| ", text, re.MULTILINE)
    assert re.search(r"^\| deformable convolution, over torchvision \| 3 \| 0 \|", text, re.MULTILINE)


def evidence(directory, found, **others):
    directory.mkdir()
    records.write(found, directory / "bench.json")
    (directory / "evidence.json").write_text(
        json.dumps({"format": 1, "commit": "12ab", "simulated": False, "stages": {}, **others})
    )
    return directory


def test_results_are_published_under_device_date_and_commit(tmp_path):
    steps = [row("a", 100, 150, 300, op="step", times=3), row("b", 100, 50, op="step"), row("b", 1, 1)]
    out = evidence(tmp_path / "out", run(*steps, device="NVIDIA H200 / ../x", commit="12ab/.."))
    results = tmp_path / "results"
    directory = publish.publish(out, results, audit=False)
    assert directory.relative_to(results).as_posix() == "NVIDIA_H200_.._x/2026-11-21-12ab"
    names = ["bench.json", "evidence.json", "extremes.png", "report.html", "roofline.png", "speedup.png"]
    assert sorted(path.name for path in directory.iterdir()) == names

    ((path, found),) = performance.newest(results)
    assert path == directory / "bench.json"
    lines = performance.block([(path, found)]).splitlines()
    (cells,) = ([cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| resnet50"))
    assert cells[2:10] == ["step", "2", "0.400", "0.500", "1.25", "0.900 (1 of 2)", "1", "1"]
    assert cells[10].startswith("b: 0.50, it takes 1.7 times its predicted 60 us")
    assert "`triton-conv bench --quick`" in "\n".join(lines)


def test_suites_without_gradients_are_shown_by_their_forward(tmp_path):
    rows = [row("a", 100, 150, op="step"), row("a", 50, 60), row("b", 40, 60, suite="wan_streaming")]
    text = performance.block([(tmp_path / "bench.json", run(*rows))])
    assert [line.split(" | ")[:2] for line in text.splitlines() if line.startswith(("| resnet", "| wan"))] == [
        ["| resnet50", "step"],
        ["| wan_streaming", "fprop"],
    ]
    assert "of a training step or fprop" in text


def test_the_newest_run_of_each_device_is_shown(tmp_path):
    for device, time in (("A", "2026-01-01T00"), ("A", "2026-02-01T00"), ("B", "2025-01-01T00")):
        found = run(row("a", 1, 2), device=device, time=time)
        records.write(found, publish.directory_of(found, tmp_path) / "bench.json")
    assert [(r.device, r.time[:7]) for _, r in performance.newest(tmp_path)] == [("A", "2026-02"), ("B", "2025-01")]


def test_what_files_say_is_no_markup(tmp_path):
    odd = run(row("a|b <script> `x`", 100, 50, op="step"), command="bench `x`", device="<b>")
    text = performance.block([(tmp_path / "bench.json", odd)])
    assert r"a\|b \<script> \`x\`" in text
    assert "`bench x`" in text
    assert r"on \<b>" in text


def test_only_what_was_measured_is_published(tmp_path, capsys):
    out = evidence(tmp_path / "out", run(row("a"), source="predicted"))
    with pytest.raises(ValueError, match="only what was measured is published, and this is predicted"):
        publish.publish(out, tmp_path / "results")
    records.write(run(row("a"), source="predicted"), tmp_path / "results" / "A" / "b" / "bench.json")
    with pytest.raises(ValueError, match="only what was measured is published"):
        performance.newest(tmp_path / "results")
    assert publish.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_broken_evidence_is_not_published(tmp_path):
    out = evidence(tmp_path / "out", run(row("a", 1, 2)))
    (out / "evidence.json").write_text("{")
    with pytest.raises(ValueError, match=r"evidence\.json: is no evidence run: is no JSON"):
        publish.publish(out, tmp_path / "results")
    assert not (tmp_path / "results").exists()
