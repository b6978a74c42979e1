"""Free memory is what the machine, or a GPU, can give."""

from __future__ import annotations

import psutil
import torch

from influence.memory import free_memory


def test_free_memory_is_the_machines_or_the_gpus(monkeypatch):
    assert 0 < free_memory() <= psutil.virtual_memory().total
    assert free_memory(torch.device("cpu")) <= psutil.virtual_memory().total
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert free_memory(torch.device("cuda", 0)) == 123
