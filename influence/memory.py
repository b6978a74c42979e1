"""How much memory there is to be had."""

from __future__ import annotations

import psutil
import torch

from influence import distributed
from influence.errors import memory_is_short


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that can be had: of a GPU where one is given, else of the machine.

    Of the machine with what caches hold and give back: a run's own files fill those. Processes
    share it.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // distributed.on_this_machine()


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """An empty tensor that is written over again and again; None where memory is too small."""
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        if not memory_is_short(error):
            raise
        return None
