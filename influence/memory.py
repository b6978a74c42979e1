"""How much memory there is to be had, and how much of it may be taken.

What is planned by memory asks here: batches, blocks of queries, similarities of rows, decoded
features, factors. `bounded` is what `--memory` and `--token-budget` set for a command. Where a
bound is too high after all, batches are halved (`influence.halving`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psutil
import torch

from influence import distributed
from influence.errors import InputError, memory_is_short

#: Share of a bound that one of the blocks takes whose size is else a constant.
BLOCK_SHARE = 1 / 16


@dataclass(frozen=True)
class Bounds:
    """What `bounded` sets: `memory` in bytes of a process, `token_budget` of a batch; None: free."""

    memory: int | None = None
    token_budget: int | None = None


_bounds = Bounds()


def bounds() -> Bounds:
    """The bounds that hold now."""
    return _bounds


@contextmanager
def bounded(memory: float | None = None, token_budget: int | None = None) -> Iterator[None]:
    """Plan within bounds, in the block; runs are to be fitted and opened inside it.

    Parameters
    ----------
    memory
        GB (1e9 bytes) that a process may take of the GPU that its model is on, and as much of the
        machine; base and adapter count. A GPU's allocator refuses more. On a CPU it is a plan, and
        no limit that the system enforces.
    token_budget
        Tokens of a batch, padding included, in place of those that a run records.

    None keeps what holds already. Errors: InputError for numbers that are not positive.
    """
    global _bounds
    if memory is not None and not memory > 0:
        raise InputError(f"memory {memory} was given; expected a number of GB above 0")
    if token_budget is not None and token_budget < 1:
        raise InputError(f"token budget {token_budget} was given; expected at least 1")
    before = _bounds
    if memory is not None:
        _bounds = replace(_bounds, memory=int(memory * 1e9))
    if token_budget is not None:
        _bounds = replace(_bounds, token_budget=token_budget)
    try:
        yield
    finally:
        _bounds = before
        if memory is not None and before.memory is None and torch.cuda.is_initialized():
            for number in range(torch.cuda.device_count()):
                torch.cuda.set_per_process_memory_fraction(1.0, number)


def enforce(device: torch.device) -> None:
    """Let a GPU's allocator refuse what is beyond the bound, so that batches are halved by it.

    Errors: InputError where the process holds more already, the model above all.
    """
    limit = _bounds.memory
    if limit is None:
        return
    if (held := held_memory(device)) >= limit:
        raise InputError(
            f"memory {limit / 1e9:g} GB was given, and the process with its model takes "
            f"{held / 1e9:.2f} GB of memory ({device}): give more, or load the base in fewer bits (--dtype "
            "bfloat16, --load-in-4bit)"
        )
    if device.type == "cuda":
        share = min(1.0, limit / torch.cuda.get_device_properties(device).total_memory)
        torch.cuda.set_per_process_memory_fraction(share, device)


def held_memory(device: torch.device | None = None) -> int:
    """Bytes that this process holds of a GPU where one is given, else of the machine.

    Of the machine without the pages of files, which give way.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    held = psutil.Process().memory_info()
    return held.rss - getattr(held, "shared", 0)


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that can be had: of a GPU where one is given, else of the machine.

    Of the machine with what caches hold and give back: a run's own files fill those. Processes
    share it. Within the bound, where there is one.
    """
    if device is not None and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // distributed.on_this_machine()
    if _bounds.memory is None:
        return free
    return max(0, min(free, _bounds.memory - held_memory(device)))


def device_memory(device: torch.device | None = None) -> int:
    """All memory [bytes] of a GPU, or of the machine, or the bound: not what is free, which changes
    by the hour.
    """
    if device is not None and device.type == "cuda":
        there = int(torch.cuda.get_device_properties(device).total_memory)
    else:
        there = psutil.virtual_memory().total
    return there if _bounds.memory is None else min(there, _bounds.memory)


def block_bytes(usual: int) -> int:
    """Bytes of a block that is worked on at a time: the usual ones, or less within a bound."""
    return usual if _bounds.memory is None else min(usual, int(BLOCK_SHARE * _bounds.memory))


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """An empty tensor that is written over again and again; None where memory is too small."""
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        if not memory_is_short(error):
            raise
        return None
