"""Losses of retrained adapters, and plain forwards of one row."""

from __future__ import annotations

import numpy as np
import torch

from analysis.metrics.lds import Truth
from analysis.studies.memorization import DAMPINGS

DAMPED = [f"self_influence {rule}" for rule in DAMPINGS if rule != "mean:0.1"]


def subsets(n: int = 7, models: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Losses [K, n] and masks: row 0 is in every subset, row 1 in none, row 2 in all but one."""
    rng = np.random.default_rng(seed)
    masks = rng.random((models, n)) < 0.5
    masks[:, 0], masks[:, 1], masks[:, 2] = True, False, np.arange(models) > 0
    return rng.gamma(2, 1, (models, n)), masks


def truth_of(run, *, named: bool = True) -> Truth:
    losses, masks = subsets()
    extra = {"train_ids": np.array(run.train.ids)} if named else {}
    return Truth(masks, losses[:, :2], losses, extra)


def plain(model, example, tokenizer) -> tuple[list[float], list[bool]]:
    """Losses and greedy hits of every completion token, from a single row's logits."""
    ids = tokenizer(example.prompt + example.completion)["input_ids"] + [1]
    first = len(tokenizer(example.prompt)["input_ids"])
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    at = range(first, len(ids))
    return [-float(logs[t - 1, ids[t]]) for t in at], [
        int(logs[t - 1].argmax()) == ids[t] for t in at
    ]
