"""What the peers' programs share: rows as they read and sort them, arguments, and the clock.

Imports nothing of this project.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

Batch = dict[str, torch.Tensor]
Row = dict[str, list[int]]


def read_rows(path: Path, tokenizer: Any) -> list[Row]:
    """Tokenize the rows of a JSON lines file.

    Parameters
    ----------
    path
        File whose rows have a ``prompt`` and a ``completion``, or ready ``input_ids`` and
        ``labels`` (-100: not supervised), which are taken as they are.
    tokenizer
        Fast tokenizer of the base model.

    Returns
    -------
    list of dict
        ``input_ids`` of prompt + completion + end of sequence, and ``labels``: the same with the
        prompt's tokens replaced by -100.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "input_ids" in row:
            rows.append({"input_ids": row["input_ids"], "labels": row["labels"]})
            continue
        encoded = tokenizer(
            row["prompt"] + row["completion"], add_special_tokens=False, return_offsets_mapping=True
        )
        ids = [*encoded["input_ids"], tokenizer.eos_token_id]
        ends = [end for _, end in encoded["offset_mapping"]]
        supervised = [*(end > len(row["prompt"]) for end in ends), True]
        labels = [token if keep else -100 for token, keep in zip(ids, supervised, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows: list[Row]) -> Batch:
    """Right-pad rows to the longest of them."""
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], -100) for row in rows]),
    }


def by_length(rows: list[Row]) -> np.ndarray:
    """Order that sorts rows by length, so that batches need little padding."""
    return np.argsort([len(row["input_ids"]) for row in rows], kind="stable")


def parser_of(described: str) -> argparse.ArgumentParser:
    """The arguments that every program takes. The first line of `described` says what it does."""
    parser = argparse.ArgumentParser(description=described.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument(
        "--adapter", type=Path, required=True, help="folder of the PEFT LoRA adapter"
    )
    parser.add_argument("--train", type=Path, required=True, help="training rows, JSON lines")
    parser.add_argument("--queries", type=Path, required=True, help="query rows, JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="NumPy .npz file to write")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    return parser


def now() -> np.ndarray:
    """Wall and CPU seconds."""
    return np.array([time.perf_counter(), time.process_time()])
