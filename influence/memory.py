"""How much memory there is to be had."""

from __future__ import annotations

import psutil
import torch

from influence import distributed


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that can be had: of a GPU where one is given, else of the machine.

    Of the machine with what caches hold and give back: a run's own files fill those. Processes
    share it.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // distributed.on_this_machine()
