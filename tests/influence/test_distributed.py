"""Sums over several processes that talk by gloo, what they share out, and what they agree on."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from influence import distributed
from influence.errors import BadRow, DataError, ProcessError
from tests.helpers import in_two_processes, statuses

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
    assert distributed.span(5) == (0, 5)
    assert distributed.share(["a", "b"], [2, 1]) == ["a", "b"]
    assert list(distributed.rounds("ab")) == [["a"], ["b"]]
    assert distributed.gathered(["a"]) == ["a"]
    assert distributed.at_first(lambda: 3) == 3
    assert distributed.largest(0.5) == 0.5
    assert distributed.assembled(tensor, np.arange(3), 3) is tensor
    assert distributed.tells(2) == (True, 2)
    distributed.wait()
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


def test_work_is_dealt_out_by_its_cost(monkeypatch):
    """The dearest first, each to the one with least to do: no share is dearer than the mean and
    the cheapest things together, and everything is done once.
    """
    costs = sorted(np.random.default_rng(0).integers(1, 100, 40).tolist(), reverse=True)
    monkeypatch.setattr(distributed, "world", lambda: 3)
    owners = np.array(distributed.owners(costs))
    loads = [sum(np.array(costs)[owners == process]) for process in range(3)]
    assert max(loads) - min(loads) <= 3  # a round robin differs by 26 here
    assert distributed.owners([5, 4, 3, 2]) == [0, 1, 2, 2]
    ends, dealt = [0], []
    for process in range(3):
        monkeypatch.setattr(distributed, "rank", lambda process=process: process)
        dealt += distributed.share(range(40), costs)
        first, end = distributed.span(40)
        assert first == ends[-1]
        ends.append(end)
    assert sorted(dealt) == list(range(40))
    assert ends[-1] == 40


def test_processes_meet_after_every_round_whatever_they_have_to_do(tmp_path, monkeypatch):
    """One has many items, one few, one none: what they have done by then is exchanged each time."""
    monkeypatch.setattr(distributed, "ROUND_SECONDS", 1e9)

    def work(rank: int) -> None:
        items, seen, rounds = [[10, 11, 12, 13, 14, 15], [20], []][rank], [], []
        for made in distributed.rounds(iter(items)):
            rounds.append(len(made))
            seen += distributed.gathered(made)
        assert rounds == [[1, 2, 3], [1, 0, 0], [0, 0, 0]][rank]  # twice as many each time
        assert sorted(seen) == ([10, 11, 12, 13, 14, 15, 20] if rank == 0 else [])

    assert statuses(work, tmp_path, 3) == [0] * 3


def test_what_the_first_finds_all_have(tmp_path):
    def work(rank: int) -> None:
        asked = []
        assert distributed.at_first(lambda: asked.append(rank) or {"rank": rank}) == {"rank": 0}
        assert asked == [0] * (rank == 0)
        assert distributed.first_says(rank == 0)

        def wrong() -> None:
            raise DataError("bad rows", [BadRow(3, "a", "empty")])

        with pytest.raises(DataError, match="bad rows") as error:
            distributed.at_first(wrong)
        assert error.value.rows[0].number == 3

        def unportable() -> None:
            raise ValueError(lambda: 0)  # which cannot be sent

        with pytest.raises((ValueError, RuntimeError), match="lambda"):
            distributed.at_first(unportable)
        held = []

        @contextlib.contextmanager
        def lock():
            held.append(rank)
            yield
            held.clear()

        with distributed.held_by_first(lock()):
            assert held == [0] * (rank == 0)
        assert held == []

    in_two_processes(work, tmp_path)


def test_a_process_alone_exchanges_nothing(tmp_path):
    """What the first does for all is done so, and so are pieces of work that are dealt out."""

    def work(rank: int) -> None:
        if rank == 1:  # the other one is not there
            with distributed.alone():
                tensor = torch.ones(2)
                assert distributed.add_up(tensor).tolist() == [1.0, 1.0]
                assert (distributed.rank(), distributed.world()) == (0, 1)
                assert distributed.shard(np.arange(3)).tolist() == [0, 1, 2]
                assert distributed.first(np.array([5.0])).tolist() == [5.0]
                assert distributed.at_first(lambda: 7) == 7
                distributed.wait()
            assert distributed.world() == 2
        alike = distributed.at_first(lambda: distributed.add_up(torch.ones(1)).tolist())
        assert alike == [1.0]
        with contextlib.suppress(ValueError), distributed.alone():
            raise ValueError
        assert (distributed.rank(), distributed.world()) == (rank, 2)
        known = {4 - rank: "ab"[rank]}
        assert list(distributed.told_by_all(known).items()) == [(3, "b"), (4, "a")]

    in_two_processes(work, tmp_path)
    assert distributed.told_by_all({2: "c", 1: "d"}) == {1: "d", 2: "c"}


def test_parts_of_several_processes_make_a_whole(tmp_path):
    def work(rank: int) -> None:
        places = np.array([[2, 0], [1]][rank])
        whole = distributed.assembled(torch.from_numpy(places * 1.5)[:, None], places, 4)
        assert whole.tolist() == [[0.0], [1.5], [3.0], [0.0]]
        mine = torch.full((2, 3), rank + 1.0).T  # not contiguous
        distributed.hand_out([mine], owner=1)
        assert torch.equal(mine, torch.full((3, 2), 2.0))
        assert distributed.largest(float(rank)) == 1.0

    in_two_processes(work, tmp_path)


def test_a_process_that_ends_is_told_of_in_words(tmp_path):
    def work(rank: int) -> None:
        if rank == 1:
            raise SystemExit(3)
        with pytest.raises(ProcessError, match="another process of this call ended"):
            distributed.add_up(torch.ones(2))

    assert statuses(work, tmp_path, 2) == [0, 3]
