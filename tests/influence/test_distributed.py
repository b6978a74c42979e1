"""Sums over several processes: two that talk by gloo add up tensors, and dictionaries of them."""

from __future__ import annotations

import numpy as np
import torch

from influence import distributed
from tests.helpers import in_two_processes

F64 = torch.float64


def test_one_process_is_all_there_is():
    """Without torchrun nothing is exchanged, and what was given is returned."""
    tensor, sums = torch.ones(3), {"a": torch.ones(2)}
    assert distributed.add_up(tensor) is tensor
    assert distributed.add_up(sums) is sums
    assert torch.equal(sums["a"], torch.ones(2))
    assert (distributed.rank(), distributed.world()) == (0, 1)
    assert distributed.shard(np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    assert distributed.join("cpu") == "cpu"
    distributed.leave()


def test_two_processes_add_up_a_dictionary_whatever_its_order(tmp_path):
    """The sums of two accumulators, in place: also a part of a larger tensor, a number, a count."""

    def work(rank: int) -> None:
        whole = torch.zeros(4, 3, dtype=F64)
        whole[:, 1] = rank + 1
        sums = {
            "moment": torch.full((2, 2), 10.0**rank, dtype=F64),
            "column": whole[:, 1],  # not contiguous
            "mass": torch.tensor(0.5 + rank, dtype=F64),
            "rows": torch.tensor([rank, 7]),
        }
        given = dict(reversed(sums.items())) if rank else dict(sums)
        moment = given["moment"]
        total = distributed.add_up(given)
        assert total is given
        assert total["moment"] is moment
        assert torch.equal(moment, torch.full((2, 2), 11.0, dtype=F64))
        assert whole[:, 1].tolist() == [3.0] * 4
        assert not whole[:, 0].any()
        assert not whole[:, 2].any()
        assert float(total["mass"]) == 2.0
        assert total["rows"].tolist() == [1, 14]

    in_two_processes(work, tmp_path)


def test_two_processes_add_up_a_tensor_share_rows_and_follow_the_first(tmp_path):
    def work(rank: int) -> None:
        tensor = torch.tensor([1.0, 2.0]) * (rank + 1)
        assert distributed.add_up(tensor) is tensor
        assert tensor.tolist() == [3.0, 6.0]
        assert distributed.add_up({}) == {}
        rows = distributed.shard(np.arange(5))
        assert rows.tolist() == [[0, 2, 4], [1, 3]][rank]
        assert distributed.first(np.array([rank + 0.25])).tolist() == [0.25]
        assert (distributed.rank(), distributed.world()) == (rank, 2)

    in_two_processes(work, tmp_path)
