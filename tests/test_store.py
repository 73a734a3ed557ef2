"""The store under many writers, kills, full disks and broken files; and how entries merge."""

import errno
import itertools
import multiprocessing
import os
import random
import re
import signal
import stat
import time
import warnings

import filelock
import pytest
from configs_at_hand import CONFIGS, entry, problem, stamp, write

from triton_conv import plan, stored
from triton_conv.config import BoxConfig
from triton_conv.stored import Candidate
from triton_conv.tuning import store as room
from triton_conv.tuning.store import Store, merged

H200 = "NVIDIA H200"
FORK = multiprocessing.get_context("fork")  # a fresh interpreter each would take most of a minute


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CONV_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(stored, "_held", {})
    stored.forget()
    yield tmp_path / "user"
    stored.forget()


def candidates(store):
    return {(e.extents.N, c.config): c.seconds for e in store.entries(H200, "box") for c in e.candidates}


def warning_of(action):
    """The only one, in words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    (warning,) = caught
    return str(warning.message)


def config(number):
    """One of 4096."""
    box = (1, 1, 2 ** (number % 8), 16)
    return BoxConfig(box, 64, 32, num_stages=1 + number // 8 % 16, programs=1 + number // 128)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_what_was_added_is_found_by_everyone(directory):
    Store(directory).add(H200, "box", entry([(CONFIGS[0], 2e-3)]))
    Store(directory).add(H200, "box", entry([(CONFIGS[1], 1e-3)]))
    Store(directory).add(H200, "box", entry([(CONFIGS[2], 1e-3)], images=3))
    expected = {(32, CONFIGS[0]): 2e-3, (32, CONFIGS[1]): 1e-3, (3, CONFIGS[2]): 1e-3}
    assert candidates(Store(directory)) == expected
    stored.forget()
    p = plan.make(problem())
    assert (p.config, p.measured) == (CONFIGS[1], 1e-3)
    assert Store(directory).entries(H200, "gather") == Store(directory).entries("NVIDIA H100", "box") == []


def test_nobody_else_can_read_it(directory):
    old = os.umask(0)
    try:
        Store(directory / "deep" / "deeper").add(H200, "box", entry([(CONFIGS[0], 1e-3)]))
    finally:
        os.umask(old)
    made = [directory, *directory.rglob("*")]
    assert {p.name for p in made if p.is_file()} >= {"box.json"}
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_sixteen_processes_lose_nothing(directory):
    """All measure the same problem and one of their own, each config by itself."""

    def measure(rank):
        for i in range(6):
            number = 6 * rank + i
            Store(directory).add(H200, "box", entry([(config(number), 1e-3 + number)]))
            Store(directory).add(H200, "box", entry([(config(number), 1e-3)], images=100 + rank))

    entry([], images=100)  # what plans import is imported once, before processes part
    processes = [FORK.Process(target=measure, args=(rank,)) for rank in range(16)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 16
    expected = {(32, config(n)): 1e-3 + n for n in range(96)}
    expected |= {(100 + n // 6, config(n)): 1e-3 for n in range(96)}
    assert candidates(Store(directory)) == expected


def test_threads_lose_nothing(directory):
    from concurrent.futures import ThreadPoolExecutor

    store = Store(directory)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.add(H200, "box", entry([(config(n), 1.0)])), range(32)))
    stored.forget()
    assert plan.make(problem()).measured == 1.0  # places that threads hid are there again
    assert candidates(store) == {(32, config(n)): 1.0 for n in range(32)}


def test_a_killed_writer_loses_at_most_what_it_was_writing(directory):
    whole = [entry([(config(n), 1e-3)]) for n in range(500)]
    padding = [entry([(config(n), 1e-3) for n in range(60)], images=100 + n) for n in range(4)]
    Store(directory).add(H200, "box", *padding)  # so that a write takes a while
    rng, done, caught_writing = random.Random(3), 0, 0

    def measure(first, pipe):
        store = Store(directory)
        for number in range(first, len(whole)):
            store.add(H200, "box", whole[number])
            os.write(pipe, b".")

    for _ in range(12):
        reading, writing = os.pipe()
        process = FORK.Process(target=measure, args=(done, writing))
        process.start()
        os.close(writing)
        acknowledged = len(os.read(reading, 1))  # it has begun
        time.sleep(rng.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while some := os.read(reading, 4096):
            acknowledged += len(some)
        os.close(reading)
        caught_writing += stored.path_of(directory, H200, "box").with_name("box.json.new").exists()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = candidates(Store(directory))
        expected = {(32, config(n)) for n in range(done + acknowledged)}
        ours = {what for what in found if what[0] == 32}
        assert expected <= ours <= expected | {(32, config(done + acknowledged))}
        assert len(found) - len(ours) == 240
        done = len(ours)
    Store(directory).add(H200, "box", whole[-1])
    print(f"{caught_writing} of 12 were killed before they replaced the file, {done} configs")
    assert sorted(p.name for p in directory.rglob("box*")) == ["box.json", "box.json.lock"]


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_full_disk_costs_nothing_but_the_file(call, directory, monkeypatch):
    store = Store(directory)
    store.add(H200, "box", entry([(CONFIGS[0], 2e-3)]))
    path = stored.path_of(directory, H200, "box")
    before, working = path.read_bytes(), getattr(os, call)

    def full(name, *args, **kwargs):
        if call == "open" and not str(name).endswith(".new"):
            return working(name, *args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        message = warning_of(
            lambda: [store.add(H200, "box", entry([c])) for c in ((CONFIGS[1], 1e-3), (CONFIGS[2], 3e-3))]
        )
        assert message == f"configs stay in memory, for this process only: {directory}: No space left on device"
    assert path.read_bytes() == before
    assert not path.with_name("box.json.new").exists()
    stored.forget()
    assert plan.make(problem()).config == CONFIGS[1]
    everything = {(32, c): s for c, s in zip(CONFIGS, (2e-3, 1e-3, 3e-3), strict=False)}
    assert candidates(store) == everything
    assert store.unsaved(H200, "box") == 1
    store.add(H200, "box", entry([(CONFIGS[0], 2e-3)]))  # there is room again
    assert store.unsaved(H200, "box") == 0
    assert candidates(Store(directory)) == everything


def read_only(tmp_path):
    if os.getuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    return tmp_path / "user"


PLACES = {
    "read-only": read_only,
    "a file is in the way": lambda tmp_path: (tmp_path / "file").write_text("") * 0 or tmp_path / "file" / "user",
    "no such device": lambda tmp_path: stored.Path("/proc/triton_conv"),
    "homeless": lambda tmp_path: None,
}


@pytest.mark.parametrize("name", PLACES)
def test_without_a_place_to_write_to_results_stay_usable(name, tmp_path, monkeypatch):
    place = PLACES[name](tmp_path)
    monkeypatch.setattr(stored, "user_directory", lambda: place)
    store = Store(place)
    entries = [entry([(CONFIGS[i], 1e-3 * (3 - i))], images=n) for i in range(3) for n in (32, 2)]
    message = warning_of(lambda: [store.add(H200, "box", e) for e in entries])
    assert message.startswith(f"configs stay in memory, for this process only: {place}: ")
    stored.forget()
    assert plan.make(problem()).config == CONFIGS[2]
    assert "config of user store, measured" in plan.make(problem()).reason
    assert len(candidates(store)) == 6


def test_a_directory_that_vanishes_is_made_again(directory):
    store = Store(directory)
    store.add(H200, "box", entry([(CONFIGS[0], 1e-3)]))
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    store.add(H200, "box", entry([(CONFIGS[1], 1e-3)]))
    assert candidates(store) == {(32, CONFIGS[1]): 1e-3}


def test_a_lock_that_nobody_lets_go_is_named(directory, monkeypatch):
    store = Store(directory)
    store.add(H200, "box", entry([(CONFIGS[0], 1e-3)]))
    monkeypatch.setattr(room, "LOCK_SECONDS", 0.05)
    with filelock.FileLock(directory / "NVIDIA_H200" / "box.json.lock"):
        message = warning_of(lambda: store.add(H200, "box", entry([(CONFIGS[1], 1e-3)])))
    assert "box.json.lock" in message
    assert set(candidates(store)) == {(32, CONFIGS[0]), (32, CONFIGS[1])}
    assert set(candidates(Store(directory))) == set(candidates(store))  # as long as this process lasts


def test_a_lock_of_a_dead_process_is_nobodys(directory):
    def die():
        lock = filelock.FileLock(directory / "NVIDIA_H200" / "box.json.lock")
        lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    store = Store(directory)
    store.add(H200, "box", entry([(CONFIGS[0], 1e-3)]))
    process = FORK.Process(target=die)
    process.start()
    process.join(60)
    start = time.monotonic()
    store.add(H200, "box", entry([(CONFIGS[1], 1e-3)]))
    assert time.monotonic() - start < room.LOCK_SECONDS / 2
    assert set(candidates(Store(directory))) == {(32, CONFIGS[0]), (32, CONFIGS[1])}


def test_a_child_of_fork_that_outlives_its_parents_write_holds_no_lock(directory):
    """A worker that was forked in the middle of a write."""
    reading, writing = os.pipe()
    with filelock.FileLock(_there(directory) / "box.json.lock"):
        process = FORK.Process(target=lambda: os.read(reading, 1))
        process.start()
    Store(directory).add(H200, "box", entry([(CONFIGS[0], 1e-3)]))
    os.write(writing, b".")
    process.join(60)
    os.close(reading)
    os.close(writing)
    assert candidates(Store(directory)) == {(32, CONFIGS[0]): 1e-3}


def _there(directory):
    place = directory / "NVIDIA_H200"
    place.mkdir(parents=True)
    return place


UNREADABLE = [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "Input/output error")]


@pytest.mark.parametrize("error", UNREADABLE, ids=["permission", "device"])
def test_a_directory_that_cannot_be_read_is_said_once_and_calls_go_on(error, directory, monkeypatch):
    store = Store(directory)
    for kernel in ("box", "gather", "wgrad"):
        store.add(H200, kernel, entry([(CONFIGS[0], 1e-3)], kernel=kernel) if kernel == "box" else entry([]))

    def refuse(path, *args):
        raise error

    stored.forget()
    monkeypatch.setattr(stored, "_told", set())
    monkeypatch.setattr(stored, "user_directory", lambda: directory)
    real, reading = stored.load, stored.files.read_bytes

    def load(path):
        if directory in path.parents:
            monkeypatch.setattr(stored.files, "read_bytes", refuse)
        try:
            return real(path)
        finally:
            monkeypatch.setattr(stored.files, "read_bytes", reading)

    monkeypatch.setattr(stored, "load", load)

    def calls():
        plans.append(plan.make(problem(images=4)))
        plans.append(plan.make(problem(images=4, channels_last=False)))
        stored.forget()
        plans.append(plan.make(problem(images=5)))

    plans = []
    assert re.search(f"configs are ignored: {directory}.*: {error.strerror}", warning_of(calls))
    assert plans[0].config != CONFIGS[0]


BROKEN = {
    "corrupt": lambda good: "not JSON",
    "truncated": lambda good: good[:-30],
    "of another device": lambda good: good.replace(H200, "NVIDIA A100"),
    "older": lambda good: good.replace('"schema": 1', '"schema": 0'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_moved_aside(name, directory):
    text = BROKEN[name](stored.dumps(H200, "box", [entry([(CONFIGS[0], 1e-3)])]))
    store = Store(directory)
    for number in (1, 2):
        path = write(directory, text)
        with pytest.warns(
            UserWarning, match=rf"{path}: .*; it is now box.json.corrupt-{number}, and a new file begins"
        ):
            store.add(H200, "box", entry([(CONFIGS[1], 1e-3)]))
        assert path.with_name(f"box.json.corrupt-{number}").read_text() == text
        assert set(candidates(store)) == {(32, CONFIGS[1])}


def test_a_file_of_a_later_version_is_left_alone(directory):
    text = stored.dumps(H200, "box", [entry([(CONFIGS[0], 1e-3)])]).replace('"schema": 1', '"schema": 2')
    path = write(directory, text)
    store = Store(directory)
    more = [entry([c]) for c in ((CONFIGS[1], 1e-3), (CONFIGS[2], 2e-3))]
    message = warning_of(lambda: [store.add(H200, "box", e) for e in more])
    assert message.endswith(f"{path}: schema is 2, not 1")
    assert path.read_text() == text
    stored.forget()
    with pytest.warns(UserWarning, match="configs are ignored"):
        assert plan.make(problem()).config == CONFIGS[1]


def test_a_file_that_says_it_already_is_not_written_again(directory):
    store = Store(directory)
    store.add(H200, "box", entry([(CONFIGS[0], 1e-3)]))
    before = stored.path_of(directory, H200, "box").stat()
    store.add(H200, "box", entry([(CONFIGS[0], 1e-3)]))
    assert stored.path_of(directory, H200, "box").stat() == before


# ---------------------------------------------------------------------------------------------------------------------
# Merging


def at(minute, pairs, **others):
    time = others.pop("time", f"2026-03-01T12:{minute:02}:00+00:00")
    return entry(pairs, stamp=stamp(time=time, **others.pop("stamp", {})), **others)


def told(e):
    return {c.config: (c.seconds, c.status) for c in e.candidates}


def test_of_one_config_the_newer_measurement_is_kept():
    old, new = at(1, [(CONFIGS[0], 1e-3), (CONFIGS[1], 1e-3)]), at(2, [(CONFIGS[0], 2e-3), (CONFIGS[2], 1e-3)])
    expected = {CONFIGS[0]: (2e-3, "ok"), CONFIGS[1]: (1e-3, "ok"), CONFIGS[2]: (1e-3, "ok")}
    for both in (merged(old, new), merged(new, old)):
        assert told(both) == expected
        assert both.stamp == new.stamp


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("2026-03-01T12:00:00+00:00", "2026-03-01T11:30:00-01:00"),
        ("2026-03-01T12:00:00+00:00", "2026-03-01T12:00:00.5Z"),
        ("2026-03-01T12:00:00", "2026-03-01T12:00:01Z"),
        ("yesterday", "1999-01-01T00:00:00Z"),
        ("", "1999-01-01T00:00:00Z"),
    ],
)
def test_times_are_compared_as_times(earlier, later):
    old, new = at(0, [(CONFIGS[0], 1e-3)], time=earlier), at(0, [(CONFIGS[0], 2e-3)], time=later)
    assert told(merged(old, new)) == told(merged(new, old)) == {CONFIGS[0]: (2e-3, "ok")}


def test_clocks_drop_no_config():
    """Two machines a year apart, and two with the same second: in any order all configs are there."""
    times = [
        "2025-03-01T12:00:00+00:00",
        "2026-03-01T12:00:00+00:00",
        "2026-03-01T12:00:00+00:00",
        "2027-01-01T00:00:00Z",
    ]
    entries = [at(0, [(CONFIGS[i], 1e-3), (CONFIGS[7], 1.0 + i)], time=t) for i, t in enumerate(times)]
    outcomes = []
    for order in itertools.permutations(entries):
        together = order[0]
        for other in order[1:]:
            together = merged(together, other)
        assert {c.config for c in together.candidates} == {*CONFIGS[:4], CONFIGS[7]}
        outcomes.append(together.stamp["time"])
    assert set(outcomes) == {times[-1]}
    one, other = entries[1:3]
    assert merged(one, other) == merged(other, one)


def test_rejected_configs_stay_rejected():
    wrong = at(
        1, [Candidate(CONFIGS[0], 1e-4, 0.0, "wrong", "off by 3"), Candidate(CONFIGS[1], None, 0.0, "failed", "died")]
    )
    other = at(2, [(CONFIGS[2], 1e-3)])
    assert told(merged(wrong, other))[CONFIGS[0]] == (1e-4, "wrong")
    assert told(merged(wrong, other))[CONFIGS[1]] == (None, "failed")
    again = at(2, [(CONFIGS[0], 1e-4), (CONFIGS[1], 1e-4)])
    for both in (merged(wrong, again), merged(again, wrong)):
        assert told(both) == {CONFIGS[0]: (1e-4, "wrong"), CONFIGS[1]: (1e-4, "ok")}  # failures may have been the day's
        assert "off by 3" in {c.why for c in both.candidates}
    repaired = at(2, [(CONFIGS[0], 1e-4)], stamp={"triton": "3.8.0"})
    assert told(merged(wrong, repaired))[CONFIGS[0]] == (1e-4, "ok")


def test_measurements_go_before_models():
    model, measured = at(2, [(CONFIGS[0], None)], source="model"), at(1, [(CONFIGS[1], 1e-3)])
    for both in (merged(model, measured), merged(measured, model)):
        assert both == measured


def test_baselines_unite():
    old, new = at(1, [], baseline={"cudnn": 1e-3, "other": 1e-3}), at(2, [], baseline={"cudnn": 2e-3})
    assert merged(old, new).baseline == merged(new, old).baseline == {"cudnn": 2e-3, "other": 1e-3}


def test_a_changed_kernel_begins_anew(directory):
    stale = at(5, [(CONFIGS[0], 1e-5), (CONFIGS[1], 1e-5)], stamp={"kernel": "0" * 16})
    elsewhere = at(5, [(CONFIGS[3], 1e-5)], images=7, stamp={"kernel": "0" * 16})
    current = at(1, [(CONFIGS[1], 1e-3)])
    store = Store(directory)
    store.add(H200, "box", stale, elsewhere)
    store.add(H200, "box", current)
    store.add(H200, "box", stale)
    assert candidates(store) == {(32, CONFIGS[1]): 1e-3, (7, CONFIGS[3]): 1e-5}
    stored.forget()
    assert plan.make(problem()).config == CONFIGS[1]
    assert merged(stale, current, current.stamp["kernel"]) == current
    assert merged(current, stale) == merged(stale, current) == stale  # the newer, where nobody says which is current


def test_only_entries_of_one_problem_merge():
    with pytest.raises(ValueError, match="entries of one problem merge"):
        merged(entry([]), entry([], images=3))
