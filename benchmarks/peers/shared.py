"""What the peers' programs share: rows as they read and sort them, arguments, the clock, the record.

Imports nothing of this project.
"""

import argparse
import json
import time
from collections.abc import Sequence
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


def write_record(
    out: Path,
    scores: Sequence[np.ndarray],
    seconds: Sequence[Sequence[np.ndarray]],
    *,
    load_seconds: Any,
    peak: int,
    before: int,
    disk: int,
    command_seconds: Sequence[float] = (),
) -> None:
    """Write what was measured to `out`, and print its medians.

    Parameters
    ----------
    scores
        Of every run, [query, train].
    seconds
        Of every run: those of the fit and of the scores, each the clock's and the processor's.
    load_seconds
        Of loading the model, once or of every run.
    peak, before, disk
        Bytes held at most, bytes held before the work, and bytes that one run left in files.
    command_seconds
        Of the command line, where it was timed too.
    """
    (fit, score), (fit_cpu, score_cpu) = np.array(seconds).T
    timed = {
        "fit_seconds": fit,
        "score_seconds": score,
        "fit_cpu_seconds": fit_cpu,
        "score_cpu_seconds": score_cpu,
        "load_seconds": load_seconds,
    }
    if len(command_seconds):
        timed["command_seconds"] = command_seconds
    sizes = {"peak_rss_bytes": peak, "rss_before_bytes": before, "disk_bytes": disk}
    np.savez(out, scores=scores[0], scores_per_run=np.stack(scores), **timed, **sizes)
    medians = {name: round(float(np.median(each)), 3) for name, each in timed.items()}
    print(json.dumps({**medians, **sizes, "threads": torch.get_num_threads()}))
