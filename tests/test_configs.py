"""What ships, and the commands `triton-conv configs ...`."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from configs_at_hand import CONFIGS, entry, stamp, write

from triton_conv import cli, plan, stored
from triton_conv.config import BoxConfig
from triton_conv.devices import DEVICES, H200
from triton_conv.stored import Candidate
from triton_conv.tuning import audit, seed, verify
from triton_conv.tuning.seed import common, filed
from triton_conv.tuning.store import Store

SHIPPED = stored.shipped_directory()


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CONV_CACHE", str(tmp_path / "user"))
    stored.forget()
    yield tmp_path / "user"
    stored.forget()


def text_of(directory):
    return {path.name: path.read_text() for path in directory.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# What ships


@pytest.mark.parametrize("name", DEVICES)
def test_what_ships_is_what_seeding_chooses_today(name, tmp_path):
    """Else: triton-conv configs seed autotune_configs. What was measured on kernels as they are stays as it is."""
    device, shipped = DEVICES[name], stored.path_of(SHIPPED, DEVICES[name].name, "").parent
    copy = stored.path_of(tmp_path, device.name, "").parent
    shutil.copytree(shipped, copy)
    triton = re.search(r'"triton": "([^"]+)"', (copy / "depthwise.json").read_text())[1]
    seed.seed(tmp_path, device, common(device), triton)
    once = text_of(copy)
    assert once == text_of(shipped)
    shutil.rmtree(copy)
    write(tmp_path / "user", [entry([(CONFIGS[0], 1e-3)])])  # which is not asked
    seed.seed(tmp_path, device, common(device), triton)
    if not any('"measured"' in text for text in once.values()):
        assert text_of(copy) == once


def test_everything_that_ships_is_current_and_fits():
    found = list(verify.verified(SHIPPED))
    assert [str(fault) for fault in found if isinstance(fault, verify.Fault)] == []
    assert {path.parent.name for path, _, _ in found} == {path.name for path in SHIPPED.iterdir()}
    assert {p.device.name for _, _, p in found} == {device.name for device in DEVICES.values()}
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*.json")) < 1.5e6


def test_what_ships_is_found():
    for label, problem in common(H200):
        p = plan.make(problem)
        assert "config of shipped" in p.reason, label
        found = stored.find(H200, p.kernel, *filed(p))
        assert found.exact
        assert found.config == p.config


def test_seeding_keeps_what_was_measured_on_kernels_as_they_are(tmp_path):
    measured = entry([(CONFIGS[0], 1e-3)])
    stale = entry([(CONFIGS[1], 1e-3)], images=7, stamp={**stamp(), "kernel": "0" * 16})
    path = write(tmp_path, [measured, stale])
    seed.seed(tmp_path, H200, common(H200)[:9])
    entries = stored.read(path, "box", [H200.name])
    assert [e for e in entries if e.source == "measured"] == [measured]
    assert {e.source for e in entries} == {"measured", "model"}


# ---------------------------------------------------------------------------------------------------------------------
# verify


def faults(directory):
    return [str(f).removeprefix(f"{directory}/") for f in verify.verified(directory) if isinstance(f, verify.Fault)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stamp": {**stamp(), "kernel": "0" * 16}}, "was made for another version of the kernel"),
        ({"stamp": {**stamp(), "driver": "simulated"}}, "its times are simulated"),
        ({"candidates": ()}, "has no config that is right"),
        ({"candidates": (Candidate(CONFIGS[0], 1.0, 0.0, "wrong"),)}, "has no config that is right"),
        ({"candidates": (Candidate(replace(CONFIGS[0], splits=2)),)}, "its 2 splits are for weight gradients"),
        ({"candidates": (Candidate(BoxConfig((1, 1, 16, 16), 256, 256, num_stages=8)),)}, "does not fit into a multip"),
        ({"key": entry([]).key._replace(dtype="float64", out_dtype="float64")}, "float64 as ieee has no box kernel"),
        ({"key": entry([]).key._replace(dtype="float3", out_dtype="float3")}, "there are no kernels for float3"),
        ({"key": entry([]).key._replace(groups=5)}, "no convolution has such numbers"),
        ({"key": entry([]).key._replace(stride=(0, 0, 0))}, "no convolution has such numbers"),
    ],
)
def test_verify_names_file_and_entry(change, words, tmp_path):
    good = entry([(CONFIGS[0], 1e-3)], images=3)
    bad = replace(entry([(CONFIGS[0], 1e-3)]), **change)
    write(tmp_path, [good, bad])
    (fault,) = faults(tmp_path)
    assert fault.startswith(f"NVIDIA_H200/box.json: {verify.described(bad)}: ")
    assert words in fault


def test_verify_takes_no_strangers(tmp_path):
    assert list(map(str, verify.verified(tmp_path))) == [f"{tmp_path}: holds no files"]
    assert list(map(str, verify.verified(tmp_path / "none"))) == [f"{tmp_path / 'none'}: holds no files"]
    good = [entry([(CONFIGS[0], 1e-3)])]
    write(tmp_path, good)
    write(tmp_path, good, device="NVIDIA H300")
    write(tmp_path, [*good, *good], device="NVIDIA H100")
    write(tmp_path, "nothing", kernel="gather")
    (tmp_path / "NVIDIA_H200" / "notes.txt").touch()
    (tmp_path / "README").touch()
    found = faults(tmp_path)
    assert [fault.partition(": ")[0] for fault in found] == [
        "NVIDIA_H100/box.json",
        "NVIDIA_H200/gather.json",
        "NVIDIA_H200/notes.txt",
        "NVIDIA_H300",
        "README",
    ]
    assert "is there twice" in found[0]
    assert "is no JSON" in found[1]


def test_verify_compiles_each_config_once(tmp_path, capsys, monkeypatch):
    spilling = CONFIGS[1]
    write(tmp_path, [entry([(CONFIGS[0], 1e-3)], images=n) for n in (1, 2, 32)] + [entry([(spilling, 1e-3)], images=8)])
    write(tmp_path, [entry([(CONFIGS[0], 1e-3)])], device="NVIDIA A100")
    compiled = []

    def compile_none(subjects, arch, jobs):
        for number, subject in enumerate(subjects):
            compiled.append((subject.plan.config, arch))
            rows = []
            if subject.plan.config == spilling:
                what = (subject.layer, 8, "fprop", "box", "bfloat16", spilling)
                rows = [audit.Row(arch, *what, audit.Wanted(), error="it spills")]
            yield number, rows

    monkeypatch.setattr(verify, "audit", compile_none)
    assert cli.main(["configs", "verify", str(tmp_path), "--compile", "--arch", "90"]) == 1
    out, err = capsys.readouterr()
    assert sorted(compiled, key=str) == sorted([(CONFIGS[0], 90), (spilling, 90)], key=str)
    assert "sm_90: 2 configs compiled, 1 faults" in out
    assert "NVIDIA_H200/box.json: fprop bfloat16 N8" in err
    assert "does not compile: it spills" in err


# ---------------------------------------------------------------------------------------------------------------------
# The other commands


def test_show_says_what_is_stored_and_whether_it_is_stale(user, capsys):
    store = Store(user)
    store.add(H200.name, "box", entry([(CONFIGS[0], 123.4e-6), (CONFIGS[1], 2e-3)]))
    store.add(H200.name, "box", entry([(CONFIGS[1], 1e-3)], images=3, stamp={**stamp(), "kernel": "0" * 16}))
    write(user, "broken", kernel="gather")
    assert cli.main(["configs", "show", "--device", "H200", "--kernel", "box"]) == 1
    out, err = capsys.readouterr()
    (row,) = [line for line in out.splitlines() if "123.40" in line]
    assert re.search(rf"user store +NVIDIA H200 +box .* {re.escape(str(CONFIGS[0]))} +123.40 +measured +2 *$", row)
    (row,) = [line for line in out.splitlines() if "N3 " in line]
    assert "stale" in row
    assert "shipped" in out
    assert f"user store: {user}\n" in out
    assert "gather.json: is no JSON" in err


def test_show_obeys_no_file(user, capsys):
    write(user, [entry([(CONFIGS[0], 1e-3)])], device="\x1b[31m\ud800 GPU")
    assert cli.main(["configs", "show", "--device", "GPU"]) == 0
    assert "?[31m? GPU" in capsys.readouterr().out


def test_merge_takes_files_and_directories(user, tmp_path, capsys):
    one = write(tmp_path / "a", [entry([(CONFIGS[0], 1e-3)])])
    write(tmp_path / "b", [entry([(CONFIGS[1], 2e-3)]), entry([(CONFIGS[1], 2e-3)], images=3)])
    assert cli.main(["configs", "merge", str(one), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == f"3 entries merged into {user}\n"
    assert {e.extents.N: len(e.candidates) for e in Store(user).entries(H200.name, "box")} == {3: 1, 32: 2}
    broken = write(tmp_path / "c", "broken")
    assert cli.main(["configs", "merge", str(tmp_path / "c")]) == 1
    assert f"{broken}: is no JSON" in capsys.readouterr().err
    assert cli.main(["configs", "merge", str(tmp_path / "nowhere")]) == 2
    assert "there is no such file or directory" in capsys.readouterr().err


def test_simulated_times_are_neither_merged_nor_exported(user, tmp_path, capsys):
    made_up = {**stamp(), "driver": "simulated"}
    path = write(user, [entry([(CONFIGS[0], 1e-3)], images=n, stamp=made_up) for n in (3, 4)])
    assert cli.main(["configs", "export", str(tmp_path / "export")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "nothing was measured\n"
    assert printed.err == f"{path}: its times are simulated\n"
    other = path.rename(tmp_path / "box.json")
    assert cli.main(["configs", "merge", str(other)]) == 1
    printed = capsys.readouterr()
    assert printed.out == f"0 entries merged into {user}\n"
    assert printed.err == f"{other}: its times are simulated\n"
    assert not path.exists()


def test_merge_says_when_it_could_not_write(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_CONV_CACHE", "/dev/null/configs")
    monkeypatch.setattr(stored, "_held", {})
    one = write(tmp_path, [entry([(CONFIGS[0], 1e-3)])])
    with pytest.warns(UserWarning, match="/dev/null/configs"):
        assert cli.main(["configs", "merge", str(one)]) == 1
    assert "could not be written" in capsys.readouterr().err


def test_diff_says_what_differs(tmp_path, capsys):
    a = write(tmp_path / "a", [entry([(CONFIGS[0], 1e-3)], images=n) for n in (1, 2, 3)])
    b = write(tmp_path / "b", [entry([(CONFIGS[n % 2], 1e-3)], images=n) for n in (2, 3, 4)])
    assert cli.main(["configs", "diff", str(a), str(b)]) == 1
    out = capsys.readouterr().out
    assert out.endswith("3 differ, 1 are the same\n")
    assert [line.strip() for line in out.splitlines() if line.startswith("  ")] == [
        "only in the first",
        f"{CONFIGS[0]} (1000.00 us) -> {CONFIGS[1]} (1000.00 us)",
        "only in the second",
    ]
    assert cli.main(["configs", "diff", str(a), str(a)]) == 0


def test_export_writes_winners_that_were_measured(user, tmp_path, capsys):
    store = Store(user)
    store.add(H200.name, "box", entry([(CONFIGS[0], 1e-3), (CONFIGS[1], 2e-3)], baseline={"cudnn": 1e-3}))
    store.add(H200.name, "box", entry([(CONFIGS[0], None)], images=3, source="model"))
    store.add(H200.name, "box", entry([(CONFIGS[0], 1e-3)], images=4, stamp={**stamp(), "kernel": "0" * 16}))
    place = tmp_path / "exported"
    write(place, [entry([(CONFIGS[2], None)], source="model"), entry([(CONFIGS[2], None)], images=5, source="model")])
    assert cli.main(["configs", "export", str(place)]) == 0
    entries = stored.read(stored.path_of(place, H200.name, "box"), "box", [H200.name])
    winner = entry([(CONFIGS[0], 1e-3)], baseline={"cudnn": 1e-3})
    assert sorted(entries, key=lambda e: e.extents.N) == [entry([(CONFIGS[2], None)], images=5, source="model"), winner]
    assert next(verify.verified(place))[0] == stored.path_of(place, H200.name, "box")
    assert cli.main(["configs", "export", str(place), "--as", "H100"]) == 0
    assert faults(place) == []
    assert stored.read(stored.path_of(place, "NVIDIA H100", "box"), "box", ["NVIDIA H100"]) == [winner]
    capsys.readouterr()


def test_seed_writes_files_that_pass(tmp_path, capsys):
    assert cli.main(["configs", "seed", str(tmp_path), "--device", "RTX4090"]) == 0
    assert str(tmp_path / "NVIDIA_GeForce_RTX_4090" / "gather.json") in capsys.readouterr().out.splitlines()
    assert cli.main(["configs", "verify", str(tmp_path)]) == 0


def test_the_package_as_a_module_and_bad_arguments(capsys):
    command = [sys.executable, "-m", "triton_conv", "configs", "verify"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert f"entries that fit in {SHIPPED}" in done.stdout
    for bad in ([], ["show", "--kernel", "none"], ["verify", "--arch", "1"], ["merge"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["configs", *bad])
        assert caught.value.code == 2
    capsys.readouterr()
