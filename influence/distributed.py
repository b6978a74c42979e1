"""Several processes at one piece of work: rows are shared out, sums are added up.

`torchrun` starts them. Without it every function here is that of one process. On CPUs processes
talk by gloo, on GPUs by nccl.

All processes run the same lines. What depends on the clock, on free memory or on a file that one
of them writes is found out by the first and told to the others (`at_first`, `first`), so that all
take the same turn. A function that exchanges something is called by all of them, or by none. Within
`alone` a process is the only one, and the others need not be there: so whole pieces of work, a
training or an ascent, are dealt out.
"""

from __future__ import annotations

import heapq
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar, overload

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from influence.errors import ProcessError, ToolkitError, memory_is_short

T = TypeVar("T")

#: How long a process waits for the others, one of which may be at work alone for long. One that
#: ends is noticed at once, by its closed connection.
PATIENCE = timedelta(days=2)
#: Seconds of work between two meetings of the processes (`rounds`).
ROUND_SECONDS = 5.0
#: Seconds that an error waits for torchrun's mailbox before it is told anyway.
MAILBOX_SECONDS = 10
LOST = (
    "another process of this call ended, or this one was told to stop; what had been saved is kept: "
    "the same command goes on from there, with any number of processes"
)


def join(device: str = "auto") -> str:
    """Join the other processes where `torchrun` started this one, and return the device to use.

    Each process gets a GPU of its own, where there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    gpu = torch.cuda.is_available() and not device.startswith("cpu")
    if gpu and device in ("auto", "cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE)
        signal.signal(signal.SIGTERM, _stopped)  # torchrun's, once another process has ended
    return device


def leave() -> None:
    """Wait for the other processes, and leave them."""
    if dist.is_initialized():
        wait()
        duties.clear()
        dist.destroy_process_group()
        _heed(signal.SIG_DFL)


def _stopped(*_: object) -> None:
    _heed(signal.SIG_IGN)  # once: it must not fall into what is done about it
    raise ProcessError(LOST)


def _heed(how: Any) -> None:
    """What a SIGTERM does from now on, where `join` has a say in it."""
    if signal.getsignal(signal.SIGTERM) is _stopped:
        signal.signal(signal.SIGTERM, how)


#: How many blocks of `alone` this process is in.
_alone = 0


@contextmanager
def alone() -> Iterator[None]:
    """Work without the other processes: within the block nothing is shared out or exchanged."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def on_this_machine() -> int:
    """How many of them are on this machine, as torchrun says, and share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


# ---- who does what -------------------------------------------------------------------------------


def shard(rows: np.ndarray) -> np.ndarray:
    """The share of `rows` [n] that this process does: every `world()`-th from its rank on."""
    return rows[rank() :: world()]


def span(count: int) -> tuple[int, int]:
    """Where the share of this process begins and ends, of `count` things in their order."""
    return count * rank() // world(), count * (rank() + 1) // world()


def owners(costs: Sequence[float]) -> list[int]:
    """Which process does each of some things: the one that has least to do so far.

    The same in every process. With the dearest first the shares are nearly equal.
    """
    loads = [(0.0, process) for process in range(world())]
    found = []
    for cost in costs:
        load, process = loads[0]
        found.append(process)
        heapq.heapreplace(loads, (load + cost, process))
    return found


def share(items: Sequence[T], costs: Sequence[float]) -> list[T]:
    """What this process does of some things, in their order, by what each of them costs."""
    return [item for item, owner in zip(items, owners(costs), strict=True) if owner == rank()]


def rounds(items: Iterable[T]) -> Iterator[list[T]]:
    """Make the items of this process as they are asked for, in rounds after which all meet.

    Every process gets the same number of rounds, some of them empty: between two it may exchange
    what it likes. They take about `ROUND_SECONDS`, as the first process is fast. With one process
    each item is a round.
    """
    if world() == 1:
        for item in items:
            yield [item]
        return
    mine, most = iter(items), 1
    while True:
        start = time.monotonic()
        made = list(islice(mine, most))
        seconds = time.monotonic() - start if rank() == 0 else 0.0
        at_work = float(len(made) == most)
        state = add_up(torch.tensor([at_work, seconds], dtype=torch.float64)).tolist()
        yield made
        if not state[0]:
            return
        # twice as many at most: the first items take longer than those that follow
        most = max(1, min(2 * most, int(most * ROUND_SECONDS / max(state[1], 1e-6))))


# ---- what they tell each other -------------------------------------------------------------------


#: What a process does for the others wherever it waits for them, until all of them wait.
duties: list[Callable[[], None]] = []


@contextmanager
def _exchange() -> Iterator[None]:
    """Do what the others need, and then what all do in the block."""
    with ends_noticed():
        for duty in duties:
            duty()
        yield


@contextmanager
def ends_noticed() -> Iterator[None]:
    """A process that has ended is a `ProcessError`, whatever the library calls it."""
    try:
        yield
    except RuntimeError as error:
        if memory_is_short(error):
            raise
        _heed(signal.SIG_IGN)
        raise ProcessError(LOST) from error


def wait() -> None:
    """Wait until all processes are here."""
    if world() > 1:
        with _exchange():
            dist.barrier()


def _shared(tensor: Tensor) -> Tensor:
    """A tensor as processes exchange it: a whole block of memory, with nccl that of a GPU."""
    tensor = tensor.contiguous()
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def first(values: np.ndarray) -> np.ndarray:
    """The first process's values in all processes, float64.

    What is decided by them is then decided alike everywhere.
    """
    if world() == 1:
        return values
    shared = _shared(torch.from_numpy(np.array(values, dtype=np.float64)))
    with _exchange():
        dist.broadcast(shared, 0)
    return shared.cpu().numpy()


def first_says(fact: bool) -> bool:
    """Whether something holds in the first process."""
    return bool(first(np.array([float(fact)]))[0])


def at_first(work: Callable[[], T]) -> T:
    """Do something in the first process `alone`: all get its result, or its error.

    The result must be one that torch sends to the others.
    """
    if world() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            with alone():
                outcome[0] = work()
        except ProcessError:
            raise
        except Exception as error:
            outcome[1] = error
    sent = [outcome[0], _portable(outcome[1])]
    with _exchange():
        dist.broadcast_object_list(sent, 0)
    result, error = outcome if rank() == 0 else sent
    if error is not None:
        raise error
    return result


def _portable(error: Exception | None) -> Exception | None:
    """An error as the other processes raise it: one of a library's own class in words."""
    if error is None or isinstance(error, ToolkitError | OSError | MemoryError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


@contextmanager
def held_by_first(resource: AbstractContextManager[object]) -> Iterator[None]:
    """Enter a context, a lock, in the first process alone: its error is that of all."""
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(resource)

        at_first(enter)
        yield


def hand_out(tensors: Iterable[Tensor], owner: int) -> None:
    """The owner's tensors in all processes, in place.

    All give as many, with the same shapes and types.
    """
    if world() == 1:
        return
    for tensor in tensors:
        shared = _shared(tensor)
        with _exchange():
            dist.broadcast(shared, owner)
        if shared is not tensor:
            tensor.copy_(shared)


def gathered(pieces: list[T]) -> list[T]:
    """The pieces of all processes in the first one. Nothing in the others."""
    if world() == 1:
        return pieces
    boxes: list[Any] | None = [None] * world() if rank() == 0 else None
    with _exchange():
        dist.gather_object(pieces, boxes, 0)
    return [piece for box in boxes or [] for piece in box]


def told_by_all(known: dict[int, T]) -> dict[int, T]:
    """What each process found of some numbered things, in all processes, in the things' order."""
    if world() == 1:
        return dict(sorted(known.items()))
    pieces = gathered([known])
    return at_first(lambda: dict(sorted(pair for piece in pieces for pair in piece.items())))


def assembled(values: Tensor, places: np.ndarray, count: int) -> Tensor:
    """`[count, ...]` in all processes, of which each has made `values` [k, ...] at its `places`."""
    if world() == 1:
        return values
    whole = torch.zeros(count, *values.shape[1:], dtype=values.dtype, device=values.device)
    whole[torch.from_numpy(places).to(values.device)] = values
    return add_up(whole)


def largest(value: float) -> float:
    """The largest of the processes' numbers."""
    if world() == 1:
        return value
    shared = _shared(torch.tensor([value], dtype=torch.float64))
    with _exchange():
        dist.all_reduce(shared, dist.ReduceOp.MAX)
    return float(shared)


@overload
def add_up(sums: Tensor) -> Tensor: ...


@overload
def add_up(sums: dict[str, Tensor]) -> dict[str, Tensor]: ...


def add_up(sums: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """The sum of a tensor, or of every tensor of a dictionary, over all processes, in place.

    All processes give the same names with the same shapes and types; the order of the names does
    not matter. With one process nothing is done.
    """
    if world() == 1:
        return sums
    # every process must add up the same tensor at the same time, whatever order its names came in
    for tensor in [sums] if isinstance(sums, Tensor) else [sums[name] for name in sorted(sums)]:
        shared = _shared(tensor)
        with _exchange():
            dist.all_reduce(shared)
        if shared is not tensor:
            tensor.copy_(shared)
    return sums


# ---- a call that fails ---------------------------------------------------------------------------


def tells(status: int) -> tuple[bool, int]:
    """Whether this process is the one that tells why the call failed, and the call's exit status.

    The first that fails tells; the others, which fail of its absence or with the same error, end
    with its status. They leave word in the mailbox that torchrun keeps for them.
    """
    _heed(signal.SIG_IGN)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True, status
    environment = os.environ
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    key = "/".join(["lora-influence", *(environment.get(name, "") for name in names)])
    try:
        mailbox = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=MAILBOX_SECONDS),
        )
        if mailbox.add(f"{key}/failed", 1) == 1:
            mailbox.set(f"{key}/status", str(status))
            return True, status
        return False, int(mailbox.get(f"{key}/status"))
    except (RuntimeError, KeyError, ValueError):  # torchrun itself is gone
        return True, status
