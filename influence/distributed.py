"""Several processes at one piece of work: rows are shared out, sums are added up.

`torchrun` starts them. Without it every function here is that of one process. On CPUs processes
talk by gloo, on GPUs by nccl.
"""

from __future__ import annotations

import os
from typing import overload

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


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
        dist.init_process_group("nccl" if gpu else "gloo")
    return device


def leave() -> None:
    """Wait for the other processes, and leave them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(rows: np.ndarray) -> np.ndarray:
    """The share of `rows` [n] that this process does: every `world()`-th from its rank on."""
    return rows[rank() :: world()]


def first(values: np.ndarray) -> np.ndarray:
    """The first process's values in all processes, float64.

    What is decided by them is then decided alike everywhere.
    """
    if not dist.is_initialized():
        return values
    shared = torch.from_numpy(np.array(values, dtype=np.float64))
    shared = shared.cuda() if dist.get_backend() == "nccl" else shared
    dist.broadcast(shared, 0)
    return shared.cpu().numpy()


@overload
def add_up(sums: Tensor) -> Tensor: ...


@overload
def add_up(sums: dict[str, Tensor]) -> dict[str, Tensor]: ...


def add_up(sums: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """The sum of a tensor, or of every tensor of a dictionary, over all processes, in place.

    All processes give the same names with the same shapes and types; the order of the names does
    not matter. With one process nothing is done.
    """
    if not dist.is_initialized():
        return sums
    # every process must add up the same tensor at the same time, whatever order its names came in
    for tensor in [sums] if isinstance(sums, Tensor) else [sums[name] for name in sorted(sums)]:
        # processes exchange whole blocks of memory, on GPUs those of a GPU
        shared = tensor.contiguous()
        shared = shared.cuda() if dist.get_backend() == "nccl" else shared
        dist.all_reduce(shared)
        if shared is not tensor:
            tensor.copy_(shared)
    return sums
