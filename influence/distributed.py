"""Several processes at one piece of work (`torchrun`): rows are shared out, sums are added up once.

Without `torchrun` every function here is that of one process. On CPUs processes talk by gloo, on
GPUs by nccl.
"""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def join(device: str = "auto") -> str:
    """Join the other processes where `torchrun` started this one; gives the device to work on, each process a GPU of its own."""
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
    """The share of some rows that is done here."""
    return rows[rank() :: world()]


def first(values: np.ndarray) -> np.ndarray:
    """The first process's values in all of them, so that what is decided by them is decided alike; float64."""
    if not dist.is_initialized():
        return values
    shared = torch.from_numpy(np.array(values, dtype=np.float64))
    shared = shared.cuda() if dist.get_backend() == "nccl" else shared
    dist.broadcast(shared, 0)
    return shared.cpu().numpy()


def add_up(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
