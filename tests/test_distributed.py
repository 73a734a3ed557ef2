"""DDP, FSDP2 and DTensor on two ranks of CPUs, which start once and run `distributed_checks`."""

import json

import pytest
import torch.distributed as dist
from distributed_checks import CHECKS, work
from processes import fresh_processes

from triton_conv import sharding


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What went wrong on each rank, by check."""
    directory, processes = tmp_path_factory.mktemp("ranks"), fresh_processes()
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    port = store.port
    del store
    ranks = [processes.Process(target=work, args=(rank, 2, port, directory)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(150)
    for rank in ranks:
        if rank.exitcode is None:
            rank.kill()
    paths = [directory / f"{rank}.json" for rank in range(2)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in paths]


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks_compute_what_one_does(found, name):
    for rank in found:
        assert name in rank, "a rank did not get as far"
        assert not rank[name], rank[name]


def test_strides_in_an_order():
    assert sharding.dense_in_order((2, 3, 4, 5), (60, 1, 15, 3)) == [60, 1, 15, 3]
    assert sharding.dense_in_order((2, 1, 4, 5), (20, 20, 5, 1)) == [20, 20, 5, 1]
    assert sharding.dense_in_order((4, 8, 3, 3), (72, 9, 3, 1)) == [72, 9, 3, 1]
