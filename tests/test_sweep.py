"""Tasks shared by real processes on the CPU, some of which are killed or raise; the times are simulated."""

import json
import os
import signal
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import fresh_processes

from triton_conv.devices import DEVICES
from triton_conv.execute import Call, problem_of
from triton_conv.geometry import ConvGeometry, Role
from triton_conv.tuning import ranks, sweep
from triton_conv.tuning.measure import SimulatedBench
from triton_conv.tuning.store import Store
from triton_conv.tuning.tune import Budget, Task

LEASE = 3.0  # where a rank is killed: long enough for another that a busy machine keeps waiting
NEVER = 100.0  # a lease that nobody waits for: a rank hangs sooner


def task(channels, device="H200"):
    x, w = (torch.empty(shape, device="meta") for shape in ((8, channels, 14, 14), (64, channels, 3, 3)))
    call = Call(Role.FPROP, ConvGeometry.forward(x.shape, w.shape), x, w, None, "ieee")
    return Task(f"{channels} channels", problem_of(call, DEVICES[device]))


def tasks(count, device="H200"):
    return [task(16 * (i + 1), device) for i in range(count)]


class Slow(SimulatedBench):
    """Takes as long as it is told, writes down which problems it is given, and dies or raises at one of them."""

    def __init__(self, device, log, pause=0.0, end="", at=()):
        super().__init__(DEVICES[device])
        self.log, self.pause, self.end, self.at, self.begun = Path(log), pause, end, at, set()

    def time(self, problem, plans):
        channels = problem.geometry.C
        if channels not in self.begun:
            self.begun.add(channels)
            with self.log.open("a") as file:
                file.write(f"{channels}\n")
        if channels in self.at or (len(self.begun) == 2 and "second" in self.at):
            if self.end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("an illegal memory access was encountered")
        time.sleep(self.pause)
        return super().time(problem, plans)


def work(rank, size, port, directory, lease, device, bench, given, gloo, agent):
    """A rank's process; its results end up in a file."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": str(agent), "LOCAL_RANK": str(rank), "GROUP_RANK": str(rank)}
    torch.set_num_threads(1)
    if gloo:
        dist.init_process_group("gloo")
    group = ranks.of_this_job()
    ranks.gathered(group, "start", "", timeout=60)
    heard = []
    results = sweep.sweep(
        given,
        lambda index: Slow(device, directory / f"begun-{index}", **bench),
        Store(directory / (f"store-{rank}" if gloo else "store")),
        Budget(candidates=2),
        group,
        progress=lambda result: heard.append(result.task.label),
        lease=lease,
        poll=0.01,
    )
    found = [[r.task.label, r.task.problem.device.name, r.skipped] for r in results]
    (directory / f"results-{rank}").write_text(json.dumps([found, heard]))


@pytest.fixture(scope="module")
def processes():
    return fresh_processes()


@pytest.fixture
def run(processes, tmp_path):
    """Runs ranks, each with its own device, bench and tasks; their results, and tasks begun, by rank."""

    def run(*given, gloo=False, agent=True, lease=NEVER):
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # what torchrun's agent does
        port = store.port
        if not agent:
            del store
        started = [
            processes.Process(target=work, args=(rank, len(given), port, tmp_path, lease, *arguments, gloo, agent))
            for rank, arguments in enumerate(given)
        ]
        for rank in started:
            rank.start()
        for rank in started:
            rank.join(60)
            assert rank.exitcode is not None, "a rank hangs"
        results = [json.loads(p.read_text()) for r in range(len(started)) if (p := tmp_path / f"results-{r}").exists()]
        paths = [tmp_path / f"begun-{r}" for r in range(len(started))]
        return results, [path.read_text().split() if path.exists() else [] for path in paths]

    return run


def labels(results):
    return [label for label, _, skipped in results if not skipped]


def test_ranks_share_the_tasks_and_the_quicker_one_gets_more(run):
    given = tasks(12)
    results, begun = run(("H200", {"pause": 0.02}, given), ("H200", {"pause": 0.3}, given))
    assert len(begun[0]) > len(begun[1]) > 0  # half each is what a static split would be
    assert sorted(begun[0] + begun[1]) == sorted(str(t.problem.geometry.C) for t in given)
    for found, heard in results:
        assert labels(found) == [t.label for t in given]
        assert sorted(heard) == sorted(labels(found))


def test_what_a_killed_rank_had_in_hand_is_done_by_another(run, tmp_path):
    given = tasks(8)
    benches = ({"pause": 0.1}, {"end": "kill", "at": ("second",)}, {"pause": 0.1})  # its second comes before the last
    results, begun = run(*(("H200", bench, given) for bench in benches), lease=LEASE)
    assert len(results) == 2
    assert len(begun[1]) == 2
    twice = begun[1][1]
    assert sorted(chain.from_iterable(begun)) == sorted([*(str(t.problem.geometry.C) for t in given), twice])
    for found, heard in results:
        assert labels(found) == [t.label for t in given]
        assert sorted(heard) == sorted(labels(found))
    # nothing that anybody measured is lost
    there = {e.key.C for k in ("box", "gather") for e in Store(tmp_path / "store").entries("NVIDIA H200", k)}
    assert there == {t.problem.geometry.C for t in given}


def test_a_rank_that_raises_hands_its_task_on_at_once_and_waits(run):
    given = tasks(4)
    results, begun = run(("H200", {"end": "raise", "at": ("second",)}, given), ("H200", {"pause": 0.1}, given))
    assert len(results) == 2
    assert len(begun[0]) == 2
    assert begun[0][1] in begun[1]
    for found, _ in results:
        assert labels(found) == [t.label for t in given]


def test_a_task_that_kills_whoever_touches_it_is_given_up(run):
    given = tasks(3)
    deadly = {"end": "raise", "at": (given[0].problem.geometry.C,), "pause": 0.01}
    results, _ = run(*(("H200", deadly, given) for _ in range(2)))
    assert len(results) == 2
    for found, _ in results:
        assert [label for label, _, skipped in found if skipped] == [
            t.label for t in given if t.label not in labels(found)
        ]
        assert given[0].label not in labels(found)


def test_each_device_does_all_of_its_own_tasks_and_everyone_hears_of_them(run, tmp_path):
    mine, theirs = tasks(3, "H200"), tasks(3, "A100")
    results, begun = run(("H200", {}, mine), ("A100", {}, theirs), ("A100", {}, theirs), gloo=True)
    assert sorted(begun[0]) == sorted(begun[1] + begun[2]) == ["16", "32", "48"]
    for (found, _), first in zip(results, ("NVIDIA H200", "NVIDIA A100", "NVIDIA A100"), strict=True):
        assert sorted((label, device) for label, device, _ in found) == sorted(
            (t.label, t.problem.device.name) for t in [*mine, *theirs]
        )
        assert found[0][1] == first
    # file systems are the ranks' own here: each has everything
    for rank in range(3):
        for device in ("NVIDIA H200", "NVIDIA A100"):
            there = {e.key.C for k in ("box", "gather") for e in Store(tmp_path / f"store-{rank}").entries(device, k)}
            assert there == {16, 32, 48}


def test_the_rank_that_serves_the_store_leaves_last(run):
    given = tasks(3)
    results, _ = run(("H200", {}, given), ("H200", {"pause": 0.1}, given), agent=False)
    for found, _ in results:
        assert labels(found) == [t.label for t in given]
    assert len(results) == 2


def test_what_was_measured_before_is_not_measured_again(run):
    given = tasks(4)
    run(("H200", {}, given[:3]), ("H200", {}, given[:3]))
    _, begun = run(("H200", {}, given), ("H200", {}, given))
    assert sorted(chain.from_iterable(begun)) == ["16", "32", "48", "64"]


def test_without_a_launcher_it_tunes_here(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    results = sweep.sweep(
        tasks(2), lambda index: SimulatedBench(DEVICES["H200"]), Store(tmp_path), Budget(candidates=2)
    )
    assert [r.task.label for r in results] == ["16 channels", "32 channels"]
    assert all(r.tried for r in results)


def test_a_queue_waits_for_no_rank_that_never_comes():
    store = dist.HashStore()
    queue = ranks.Queue(ranks.Ranks(store, 0, 2), lease=0.1)
    with queue.joined(["a"]):
        name, turn = queue.take()
        assert queue.take() is None
        assert queue.finish(name, turn, "1")
        assert not queue.over()
        time.sleep(0.15)
        assert queue.over()
    assert queue.result("a") == "1"


def test_of_two_results_the_first_counts():
    store = dist.HashStore()
    one, other = (ranks.Queue(ranks.Ranks(store, rank, 2), lease=0.1) for rank in range(2))
    for queue in (one, other):  # without a sign of life
        queue._names, queue._untouched = ["a"], ["a"]
    name, turn = one.take()
    assert other.take() is None
    time.sleep(0.15)
    _, later = other.take()
    assert other.finish(name, later, "taken over")
    assert not one.finish(name, turn, "too late")
    assert one.result(name) == other.result(name) == "taken over"


def test_what_a_rank_that_leaves_by_an_exception_had_is_anothers_at_once():
    store = dist.HashStore()
    one, other = (ranks.Queue(ranks.Ranks(store, rank, 2)) for rank in range(2))

    def interrupted():
        with one.joined(["a"]):
            one.take()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with other.joined(["a"]):
        name, turn = other.take()
        assert other.finish(name, turn, "1")
        assert other.over()


def test_who_does_not_speak_is_named():
    store = dist.HashStore()
    with pytest.raises(RuntimeError, match=r"waited 0.05 s for rank 1, 2 of 3"):
        ranks.gathered(ranks.Ranks(store, 0, 3), "problems", "[]", timeout=0.05)
