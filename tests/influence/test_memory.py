"""Free memory is what the machine, or a GPU, can give, or what a bound leaves."""

from __future__ import annotations

import os

import psutil
import pytest
import torch

from influence import memory
from influence.errors import InputError
from influence.memory import (
    block_bytes,
    bounded,
    bounds,
    device_memory,
    enforce,
    free_memory,
    held_memory,
    room,
)

CPU = torch.device("cpu")


def test_free_memory_is_the_machines_or_the_gpus(monkeypatch):
    assert 0 < free_memory() <= psutil.virtual_memory().total
    assert free_memory(CPU) <= psutil.virtual_memory().total
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert free_memory(torch.device("cuda", 0)) == 123


def test_the_memory_is_that_of_the_machine():
    found = device_memory(CPU)
    assert found == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") > 1e8


def test_a_bound_leaves_what_is_not_held(monkeypatch):
    monkeypatch.setattr(memory, "held_memory", lambda device=None: 300_000_000)
    free = free_memory()
    with bounded(memory=0.5):
        assert free_memory() == min(free, 200_000_000)
        assert device_memory(CPU) == 500_000_000
        assert block_bytes(1 << 30) == 500_000_000 // 16
        assert block_bytes(1000) == 1000
        with bounded(token_budget=7):  # the other bound stays
            assert bounds().memory == 500_000_000
            assert bounds().token_budget == 7
        with bounded(memory=0.1):
            assert free_memory() == 0
        assert bounds().token_budget is None
    assert bounds().memory is None
    assert block_bytes(1 << 30) == 1 << 30


def test_a_bound_below_what_the_model_takes_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "held_memory", lambda device=None: 300_000_000)
    enforce(CPU)
    with bounded(memory=0.31):
        enforce(CPU)
    with (
        bounded(memory=0.3),
        pytest.raises(
            InputError, match=r"memory 0.3 GB was given, .* takes 0.30 GB of memory .cpu."
        ),
    ):
        enforce(CPU)


@pytest.mark.parametrize("wrong", [{"memory": 0}, {"memory": float("nan")}, {"token_budget": 0}])
def test_bounds_are_positive(wrong):
    with pytest.raises(InputError, match="was given; expected"), bounded(**wrong):
        pass
    assert bounds() == memory.Bounds()


def test_held_memory_grows_with_what_is_held():
    before = held_memory()
    kept = torch.ones(20_000_000)  # more than malloc takes from what it holds
    grown = held_memory() - before
    assert 70_000_000 < grown < 90_000_000
    del kept


def test_there_is_room_or_none():
    there = room((2, 3), torch.float64, CPU)
    assert there is not None
    assert there.shape == (2, 3)
    assert room((1 << 30, 1 << 28), torch.float64, CPU) is None
