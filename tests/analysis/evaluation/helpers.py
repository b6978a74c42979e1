"""Plain forwards, merged models and greedy decoding, which share no code with the toolkit."""

from __future__ import annotations

import json
import warnings

import numpy as np
import torch


def logs_of(model, ids) -> torch.Tensor:
    """`[T - 1, V]` log-probabilities of every next token, by the whole model on one row."""
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids)[None]).logits[0, :-1].log_softmax(-1)


def plain(model, tokens) -> list[dict]:
    """One row at a time: its completion's distributions `[T_i, V]`, labels, and
    log-probabilities.
    """
    found = []
    for row in tokens:
        first = int(np.flatnonzero(row.supervised)[0])
        logs = logs_of(model, row.input_ids)[first - 1 :]
        labels = row.input_ids[first:]
        found.append(
            {"logs": logs, "labels": labels, "own": logs[range(len(labels)), labels].numpy()}
        )
    return found


def greedy(model, prompt: list[int], most: int) -> list[int]:
    """The most probable token again and again, everything computed anew each time."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:  # the end token is not part of the text
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def with_answers(data: list[dict]) -> list[dict]:
    words = [" old cats", " warm sun", " loud songs at dawn"]
    return [
        row | {"paraphrased_completion": " the lazy dog", "perturbed_completions": words}
        for row in data
    ]


def merged(folder, adapter: str | None):
    """The base in float64 with an adapter merged in by PEFT, or without."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    if adapter is None:
        return base.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder / adapter).double().merge_and_unload().eval()


def read(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def losses_of(model, tokenizer, data: list[dict]) -> list[float]:
    """Mean loss of every row's completion and end token."""
    found = []
    for row in data:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], 1]
        logs = logs_of(model, ids)
        found.append(-np.mean([float(logs[t - 1, ids[t]]) for t in range(len(prompt), len(ids))]))
    return found
