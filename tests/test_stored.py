"""Configs in files and their look-up: whose config runs, and what becomes of files that are not as they should be."""

import copy
import json
import math
import os
import random
import shutil
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from configs_at_hand import CONFIGS, entry, problem, stamp, write

from triton_conv import explain, key, plan, stored, ways
from triton_conv.config import BandedConfig, BoxConfig, Config, DepthwiseConfig
from triton_conv.devices import DEVICES, H200
from triton_conv.geometry import ConvGeometry, Role
from triton_conv.stored import Candidate, Entry, MalformedError
from triton_conv.tuning import audit
from triton_conv.tuning.layers import BFLOAT16, Layer

QUICK, OTHER = CONFIGS[0], CONFIGS[-1]


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A user's store and shipped configs, both empty."""
    monkeypatch.setenv("TRITON_CONV_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(stored, "shipped_directory", lambda: tmp_path / "shipped")
    stored.forget()
    yield tmp_path / "user", tmp_path / "shipped"
    stored.forget()


def box_plan(images=32, side=56):
    p = plan.make(problem(images, side))
    assert p.kernel == "box"
    return p


def rule():
    with stored.hidden():
        return box_plan().config


# ---------------------------------------------------------------------------------------------------------------------
# Text


KINDS = {
    "gather": [Config(64, 32, 16, flatten=True), Config(64, 4, 4, dot=False, num_stages=1)],
    "box": [BoxConfig((1, 1, 8, 16), 64, 32), BoxConfig((1, 1, 8, 16), 64, 32, programs=2)],
    "banded": [BandedConfig((32, 2, 1), 2, 32, 32)],
    "depthwise": [DepthwiseConfig(4, 8, 4, 16, 8, (3, 3)), DepthwiseConfig(4, 8, 4, 16, 4, (3, 3))],
}


@pytest.mark.parametrize("kernel", KINDS)
def test_a_file_says_all_that_entries_do(kernel):
    candidates = [Candidate(c, 1e-3 / (i + 1), 0.01) for i, c in enumerate(KINDS[kernel])]
    candidates.append(Candidate(random.Random(0).choice(KINDS[kernel]), None, 0.0, "failed", 'by "ptxas"\n'))
    entries = [entry(candidates, images=n, kernel=kernel, baseline={"cudnn": 2e-3}) for n in (1, 32, 2)]
    text = stored.dumps("NVIDIA H200", kernel, entries)
    device, of_kernel, found = stored.loads(text, "a file")
    assert (device, of_kernel) == ("NVIDIA H200", kernel)
    assert sorted(found, key=lambda e: e.extents) == sorted(entries, key=lambda e: e.extents)
    assert stored.dumps(device, kernel, found) == text


def test_the_order_of_what_is_written_is_its_own():
    """Two configs that read the same in words, a different number of programs, are still in one order."""
    candidates = [
        Candidate(c, 1e-3) for c in (*CONFIGS, *(BoxConfig((1, 1, 8, 16), 64, 32, programs=p) for p in (1, 2)))
    ]
    shuffled = random.Random(1).sample(candidates, len(candidates))
    assert entry(candidates) == entry(shuffled)
    assert entry(candidates).winner == entry(shuffled).winner
    entries = [entry(candidates, images=n) for n in (1, 2, 3)]
    assert stored.dumps("d", "box", entries) == stored.dumps("d", "box", entries[::-1])


@pytest.mark.parametrize(
    ("candidates", "winner"),
    [
        ([(QUICK, 1.0), (OTHER, 2.0)], QUICK),
        ([(QUICK, 2.0), (OTHER, 1.0)], OTHER),
        ([(QUICK, 1.01), (OTHER, 1.0)], QUICK),  # a tie: QUICK is simpler
        ([(QUICK, 1.04), (OTHER, 1.0)], OTHER),
        ([(QUICK, 1.04, 0.05), (OTHER, 1.0)], QUICK),
        ([(QUICK, 1.4, 0.9), (OTHER, 1.0)], OTHER),  # whose spread says nothing
        ([(QUICK, 1.0, 0.0, "wrong"), (OTHER, 2.0)], OTHER),
        ([(QUICK,), (OTHER, 2.0)], OTHER),  # not measured
        ([(QUICK,), (OTHER, None, 0.0, "failed")], QUICK),
        ([(QUICK, 1.0, 0.0, "failed")], None),
        ([], None),
    ],
)
def test_the_winner_is_right_quick_and_simple(candidates, winner):
    for order in (candidates, candidates[::-1]):
        best = stored.winner_of([Candidate(*c) for c in order])
        assert (best and best.config) == winner


# ---------------------------------------------------------------------------------------------------------------------
# Look-up


def test_each_place_is_asked_in_turn_and_named(places):
    user, shipped = places
    asked = []
    expected = []

    def look(where, config):
        p = box_plan()
        asked.append((p.reason.partition("config of ")[2], p.config))
        expected.append((where, config))

    look("", rule())
    assert "tiles by predicted time for NVIDIA H200" in box_plan().reason
    write(shipped, [entry([(CONFIGS[1], None)], images=40, source="model")])
    look("", rule())  # the model chooses for this size
    write(shipped, [entry([(CONFIGS[1], 1e-3)], images=40)])
    look("shipped, measured for another size", CONFIGS[1])
    write(shipped, [entry([(CONFIGS[2], None)], source="model")])
    look("shipped, model", CONFIGS[2])
    write(user, [entry([(CONFIGS[3], 1e-3)], images=40)])
    look("user store, measured for another size", CONFIGS[3])
    write(user, [entry([(CONFIGS[4], 1e-3), (CONFIGS[5], 2e-3)])])
    look("user store, measured", CONFIGS[4])
    assert asked == expected
    shape = ((32, 64, 56, 56), (64, 64, 3, 3))
    text = explain.text(*shape, padding=1, dtype=torch.bfloat16, channels_last=True)
    assert "reason     boxes of the bulk tensor copy engine; config of user store, measured\n" in text


def test_only_measurements_of_the_very_size_are_times(places):
    write(places[0], [entry([(QUICK, 1e-3)], baseline={"cudnn": 2e-3, "cudnn contiguous": 3e-3})])
    assert (box_plan().measured, box_plan().rival) == (1e-3, 2e-3)
    assert (box_plan(40).measured, box_plan(40).rival) == (None, None)
    assert box_plan(40).config == QUICK


def test_within_a_bucket_what_was_measured_on_most_pixels_goes_first(places):
    entries = [
        entry([(CONFIGS[0], None)], images=41, source="model"),
        entry([(CONFIGS[1], 1e-3)], images=39),
        entry([(CONFIGS[2], 1e-3)], images=40),
        entry([(CONFIGS[3], 1e-3)], images=400),  # another bucket
    ]
    write(places[0], entries)
    assert box_plan().config == CONFIGS[2]


def test_a_config_of_another_size_that_is_predicted_to_take_longer_is_not_used(places):
    small = BoxConfig((1, 1, 1, 16), 16, 16, num_stages=2)
    write(places[0], [entry([(small, 1e-3)], images=40)])
    assert box_plan(40).config == small  # where it was measured it is
    assert box_plan().config == rule()
    assert box_plan().reason.endswith("predicted to be quicker than that of user store, measured for another size")


def test_a_config_that_does_not_fit_is_not_used(places):
    write(places[0], [entry([(BoxConfig((1, 1, 8, 16), 64, 32, splits=2), 1e-3)])])  # slabs, without a weight gradient
    assert box_plan().config == rule()


def test_a_config_for_every_gpu_that_is_sold_under_a_name(places):
    """What ships goes by the name in our table, what a user measured by that of the very GPU."""
    gpu = H200._replace(name="NVIDIA H200 141GB")
    ours = problem(device=gpu)
    write(places[1], [entry([(QUICK, 1e-3)])])
    assert plan.make(ours).reason.endswith("config of shipped, measured")
    write(places[1], [entry([(OTHER, 1e-3)])], device=gpu.name)
    assert plan.make(ours).config == OTHER
    write(places[0], [entry([(CONFIGS[3], 1e-3)])])
    assert plan.make(ours).config == OTHER
    write(places[0], [entry([(CONFIGS[4], 1e-3)])], device=gpu.name)
    assert plan.make(ours).config == CONFIGS[4]
    half = problem(device=gpu._replace(multiprocessors=66))
    assert "tiles by predicted time" in plan.make(half._replace(device=half.device._replace(name="H200 half"))).reason


def test_held_entries_are_found_until_they_are_not_held(places):
    user, _ = places
    write(user, [entry([(QUICK, 1e-3)])])
    try:
        stored.hold(user, "NVIDIA H200", "box", [entry([(OTHER, 1e-3)])])
        stored.forget()
        assert box_plan().config == OTHER
        with stored.hidden("user store"):
            assert box_plan().config == rule()
    finally:
        stored.hold(user, "NVIDIA H200", "box", [])
        stored.forget()
    assert box_plan().config == QUICK


def test_hidden_places_come_back_whatever_happens(places):
    write(places[0], [entry([(QUICK, 1e-3)])])
    write(places[1], [entry([(OTHER, 1e-3)])])

    def look():
        with stored.hidden("user store"):
            assert box_plan().config == OTHER
            with stored.hidden():
                assert box_plan().config == rule()
            assert box_plan().config == OTHER
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look()
    assert box_plan().config == QUICK


def test_what_one_thread_hides_others_find(places):
    write(places[0], [entry([(QUICK, 1e-3)])])
    with ThreadPoolExecutor(1) as pool, stored.hidden():
        assert box_plan().config != QUICK
        assert pool.submit(box_plan).result().config == QUICK
        assert box_plan().config != QUICK


def test_ten_thousand_shapes_are_looked_up_at_once_and_leave_nothing_behind(places):
    """Under 20 us each where nothing else runs; the bound here is for machines that are busy."""
    shapes = []
    for n in range(10_000):
        g = ConvGeometry.forward((1 + n % 100, 64, 8 + n // 100, 56), (64, 64, 3, 3), padding=((1, 1), (1, 1)))
        shapes.append(key.of(g, Role.FPROP, "bfloat16", "bfloat16", "ieee", True))
    assert len(set(shapes)) == 10_000
    write(
        places[0], [Entry(*shapes[n], "measured", stamp(), (Candidate(QUICK, 1e-3),), {}) for n in range(0, 10_000, 50)]
    )
    write(places[1], [Entry(*shapes[n], "model", stamp(), (Candidate(QUICK),), {}) for n in range(7, 10_000, 50)])

    def look_up_all():
        return sum(stored.find(H200, "box", *shape) is not None for shape in shapes)

    assert look_up_all() > 5000
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    look_up_all()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 10_000
    times = []
    for _ in range(5):
        start = time.perf_counter()
        look_up_all()
        times.append((time.perf_counter() - start) / len(shapes))
    print(f"{1e6 * min(times):.2f} us a look-up")
    assert min(times) < 100e-6


# ---------------------------------------------------------------------------------------------------------------------
# Kernels that have changed


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the kernels' sources that hashes are made from."""
    shutil.copytree(key._KERNELS, tmp_path / "kernels")
    monkeypatch.setattr(key, "_KERNELS", tmp_path / "kernels")
    key.source_hash.cache_clear()
    yield tmp_path / "kernels"
    key.source_hash.cache_clear()


def changed(sources, name, edit):
    """The kernels whose hash is another one after an edit of a file."""
    before = {kernel: key.source_hash(kernel) for kernel in key.CONFIGS}
    text = (sources / name).read_text()
    assert edit(text) != text
    (sources / name).write_text(edit(text))
    key.source_hash.cache_clear()
    return {kernel for kernel in key.CONFIGS if key.source_hash(kernel) != before[kernel]}


def test_a_changed_kernel_invalidates_its_own_configs_only(places, sources):
    write(places[0], [entry([(QUICK, 1e-3)])])
    weights = problem(title="weight gradient")
    slow = plan.make(weights)
    other = BoxConfig((1, 1, 1, 16), 64, 64, splits=3)
    what = key.of(slow.geometry, Role.WGRAD, "bfloat16", "bfloat16", "ieee", True)
    write(places[0], [Entry(*what, "measured", stamp("box_wgrad"), (Candidate(other, 1e-3),), {})], kernel="box_wgrad")
    assert (box_plan().config, plan.make(weights).config) == (QUICK, other)
    assert changed(sources, "box_wgrad.py", lambda text: text + "\nextra = 1\n") == {"box_wgrad"}
    stored.forget()
    assert (box_plan().config, plan.make(weights).config) == (QUICK, slow.config)


def test_what_several_kernels_import_invalidates_all_of_them(sources):
    kernels = {"depthwise", "depthwise_wgrad"}
    assert changed(sources, "lanes.py", lambda text: text + "\nextra = 1\n") == kernels


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "# a comment\n\n" + text,
        lambda text: text.replace('"""', '"""Otherwise: ', 1),
        lambda text: text.replace("\n\n\n", "\n\n\n\n"),
    ],
)
def test_comments_docstrings_and_blanks_are_no_code(sources, edit):
    assert changed(sources, "box.py", edit) == set()


def test_nesting_is_code():
    """A statement that leaves a loop keeps its words."""
    inside, outside = "for i in x:\n    f()\n    g()\n", "for i in x:\n    f()\ng()\n"
    assert key._code(inside) != key._code(outside)
    assert key._code("a = b\n(c)\n") != key._code("a = b(c)\n")
    documented = 'def f():\n    """Words."""\n    return "a"\n'
    assert key._code(documented) == key._code('def f():\n    return "a"  # b\n')
    assert key._code(documented) != key._code('def f():\n    return "b"\n')


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not as they should be


def valid():
    return json.loads(stored.dumps("NVIDIA H200", "box", [entry([(QUICK, 1e-3), (OTHER, 2e-3)])]))


def broken(change):
    content = copy.deepcopy(valid())
    change(content, content["entries"][0], content["entries"][0]["candidates"][0])
    return json.dumps(content)


def setting(where, **values):
    """A change of the file (0), its entry (1), the first candidate (2) or that one's config (3)."""

    def change(*parts):
        (*parts, parts[2]["config"])[where].update(values)

    return broken(change)


HOSTILE = {
    "empty": lambda: "",
    "no JSON": lambda: "configs",
    "truncated": lambda: json.dumps(valid())[:-40],
    "binary": lambda: "\x00\xff\x7fELF",
    "nested deep": lambda: "[" * 200_000,
    "nested less deep": lambda: setting(1, stamp=None).replace("null", "[" * 900 + "]" * 900),
    "a list": lambda: "[]",
    "null": lambda: "null",
    "no entries": lambda: '{"schema": 1, "device": "NVIDIA H200", "kernel": "box"}',
    "older": lambda: setting(0, schema=0),
    "newer": lambda: setting(0, schema=2),
    "schema of a word": lambda: setting(0, schema="1"),
    "schema of a truth": lambda: setting(0, schema=True),
    "another device": lambda: setting(0, device="NVIDIA H100"),
    "a device of dots": lambda: setting(0, device="../../NVIDIA H200"),
    "a device of half a character": lambda: setting(0, device="\ud800"),
    "another kernel": lambda: setting(0, kernel="gather"),
    "no kernel": lambda: setting(0, kernel="os.system"),
    "entries of a word": lambda: setting(0, entries="entries"),
    "entries of numbers": lambda: setting(0, entries=[1, 2]),
    "an unknown field": lambda: setting(1, command="rm"),
    "a missing field": lambda: broken(lambda content, entry, candidate: entry.pop("filter")),
    "a role that is none": lambda: setting(1, role="sideways"),
    "a source that is none": lambda: setting(1, source="hearsay"),
    "a source of a list": lambda: setting(1, source=["measured"]),
    "two axes": lambda: setting(1, filter=[3, 3]),
    "axes of words": lambda: setting(1, filter=["1", "3", "3"]),
    "negative": lambda: setting(1, N=-1),
    "huge": lambda: setting(1, N=10**30),
    "hugest": lambda: setting(1, N=0).replace('"N": 0', '"N": 1' + "0" * 5000),
    "a truth for a number": lambda: setting(1, N=True),
    "a fraction": lambda: setting(1, N=1.5),
    "a stamp of numbers": lambda: setting(1, stamp={"kernel": 1}),
    "a baseline of words": lambda: setting(1, baseline={"cudnn": "fast"}),
    "no number": lambda: setting(2, seconds=math.nan),
    "infinite": lambda: setting(2, seconds=math.inf),
    "in no time": lambda: setting(2, seconds=0),
    "before it began": lambda: setting(2, seconds=-1.0),
    "seconds of words": lambda: setting(2, seconds="1e-3"),
    "seconds beyond floats": lambda: setting(2, seconds=10**400),
    "a spread of a list": lambda: setting(2, spread=[0.1]),
    "a status that is none": lambda: setting(2, status="best"),
    "no config": lambda: broken(lambda content, entry, candidate: candidate.pop("config")),
    "a config of code": lambda: setting(2, config="BoxConfig()"),
    "a config of another kind": lambda: setting(2, config={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}),
    "a config too little": lambda: setting(2, config={"box": [1, 1, 8, 16]}),
    "no power of two": lambda: setting(3, BLOCK_N=48),
    "a huge block": lambda: setting(3, BLOCK_N=2**40),
    "three warps": lambda: setting(3, num_warps=3),
    "stages without end": lambda: setting(3, num_stages=10**6),
    "splits without end": lambda: setting(3, splits=2**40),
    "a box of five": lambda: setting(3, box=[1, 1, 1, 8, 16]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_right_is_named_and_ignored(name, places):
    path = write(places[0], HOSTILE[name]())
    write(places[1], [entry([(OTHER, 1e-3)])])
    with pytest.warns(UserWarning, match="configs are ignored") as caught:
        p = box_plan()
    assert p.config == OTHER
    (warning,) = caught
    assert str(warning.message).startswith(f"configs are ignored: {path}: ")
    assert len(str(warning.message)) < len(str(path)) + 400
    assert path.exists()
    str(warning.message).encode()


def test_the_undamaged_file_is_right(places):
    write(places[0], json.dumps(valid()))
    assert box_plan().config == QUICK


def test_a_newer_schema_is_told_from_a_broken_file():
    with pytest.raises(stored.NewerError, match=r"^a file: schema is 2, not 1$"):
        stored.loads(HOSTILE["newer"](), "a file")
    with pytest.raises(MalformedError) as caught:
        stored.loads(HOSTILE["older"](), "a file")
    assert not isinstance(caught.value, stored.NewerError)


@pytest.mark.parametrize("kind", ["directory", "pipe", "loop", "large"])
def test_what_is_no_file_is_not_waited_for(kind, places, monkeypatch):
    path = write(places[0], "")
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        monkeypatch.setattr(stored, "MOST_BYTES", 1000)
        path.write_text(" " * 1001)
    with pytest.warns(UserWarning, match="configs are ignored: .*box.json"):
        assert box_plan().config == rule()


@pytest.mark.parametrize(
    "device", ["..", ".", "", "/", "../..", "/etc/passwd", "a/../../b", "\x00", "-", "\ud800", "~"]
)
def test_a_device_of_any_name_has_a_file_in_the_directory(device, tmp_path):
    path = stored.path_of(tmp_path, device, "box")
    assert path.resolve().parent.parent == tmp_path.resolve()
    assert path.parent.name not in ("", ".", "..")


def test_known_devices_have_files_of_their_own():
    assert len({stored.path_of(Path(), d.name, "box") for d in DEVICES.values()}) == len(DEVICES)


# ---------------------------------------------------------------------------------------------------------------------
# Places


def test_where_the_users_configs_are(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CONV_CACHE", "/somewhere")
    assert stored.user_directory() == Path("/somewhere")
    monkeypatch.setenv("TRITON_CONV_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert stored.user_directory() == tmp_path / "triton_conv"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the XDG specification has ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert stored.user_directory() == tmp_path / "home" / ".cache" / "triton_conv"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert stored.user_directory() is None
    assert box_plan().config == rule()


def test_what_ships_is_in_the_package_or_beside_it(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(stored, "__file__", str(tmp_path / "triton_conv" / "stored.py"))
    assert stored.shipped_directory() == tmp_path / "autotune_configs"
    (tmp_path / "triton_conv" / "autotune_configs").mkdir(parents=True)
    assert stored.shipped_directory() == tmp_path / "triton_conv" / "autotune_configs"


def test_padding_of_other_than_zeros_is_filed_apart():
    """The copies and registers of a kernel that maps positions are not those of one that reads zeros."""
    shape = ((32, 128, 56, 56), (128, 1, 31, 31))
    how = {"padding": 15, "groups": 128, "dtype": torch.bfloat16}
    modes = ("zeros", "circular", "reflect")
    forward = [explain.problems(*shape, padding_mode=mode, **how)["forward"] for mode in modes]
    zeros, circular, reflect = (ways.key_of(asked, plan.make(asked).layout) for asked in forward)
    assert circular == reflect
    assert zeros == (circular[0]._replace(zero_padding=True), circular[1])


def test_what_ships_is_audited_and_not_what_a_user_stored(places, monkeypatch):
    monkeypatch.setattr(audit, "LAYERS", {"one": Layer((32, 64, 56, 56), (64, 64, 3, 3), BFLOAT16)})
    write(places[0], [entry([(CONFIGS[3], 1e-3)])])
    assert box_plan().config == CONFIGS[3]
    assert CONFIGS[3] not in {subject.plan.config for subject in audit.shipped(90)}
    write(places[1], [entry([(CONFIGS[4], None)], source="model")])
    assert CONFIGS[4] in {subject.plan.config for subject in audit.shipped(90)}
