"""A few steps of training with an optimiser, and the checkpoint folder that a Trainer writes."""

from __future__ import annotations

import json
import warnings

import torch


def train(model, optimizer, steps: int = 3) -> list[torch.Tensor]:
    """A few steps on made-up gradients; returns them, flat, in ParamSpace order."""
    generator, history = torch.Generator().manual_seed(5), []
    for _ in range(steps):
        for parameter in model.parameters:
            parameter.grad = torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
        history.append(model.space.flatten([p.grad.clone() for p in model.parameters]))
        optimizer.step()
    return history


def trainer_groups(model) -> list[dict]:
    """The Trainer's groups for a LoRA model: everything decays, and an empty second group."""
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    ours = [p for _, p in model.model.named_parameters() if p.requires_grad]
    return [{"params": ours, "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]


def write(folder, model, optimizer, log=None):
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.model.save_pretrained(folder)
    content = optimizer.state_dict() if hasattr(optimizer, "state_dict") else optimizer
    torch.save(content, folder / "optimizer.pt")
    if log is not None:
        (folder / "trainer_state.json").write_text(json.dumps(log))
    return folder
