"""EK-FAC influence scores of a LoRA adapter with dattri-llm, timed.

Its Fisher is of the data's own labels: a row's gradient is taken once, and serves the curvature, its
eigenvalues and the scores. Runs in an environment of its own (see README.md beside this file) and
imports nothing of this project.
"""

import argparse
import contextlib
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from dattri_llm import (
    AttributionArguments,
    AttributionTask,
    EKFACAttributor,
    GradientStorageManager,
    HookManagerConfig,
)
from peft import PeftModel
from shared import Batch, Row, by_length, collate, now, parser_of, read_rows, write_record
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer


class Rows(Dataset):
    """Rows of which a batch is padded to its own longest: the library takes no collator here."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> list[Batch]:
        batch = collate([self.rows[place] for place in places])
        return [{key: values[i] for key, values in batch.items()} for i in range(len(places))]


def summed_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Cross-entropy summed over the supervised tokens, with no logits before the first of them."""
    targets = batch["labels"][:, 1:]
    first = int((targets != -100).any(dim=0).nonzero()[0])
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=torch.arange(first, targets.shape[1]),
        use_cache=False,
    ).logits
    return F.cross_entropy(logits.flatten(0, 1), targets[:, first:].flatten(), reduction="sum")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeat", type=int, default=1, help="runs, all alike")
    parser.add_argument("--batch", type=int, default=16, help="rows per batch")
    parser.add_argument("--damping", type=float, default=0.1, help="of the mean eigenvalue")
    parser.add_argument(
        "--keep",
        choices=("memory", "tiered", "disk"),
        default="memory",
        help="where the rows' activations and output gradients are kept",
    )
    return parser.parse_args()


def main() -> None:
    """Fit the factors, score, and write scores and timings."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    # layers that are not trainable are not looked at
    model = PeftModel.from_pretrained(base, args.adapter, is_trainable=True).eval()
    load_seconds = time.perf_counter() - started

    train, queries = read_rows(args.train, tokenizer), read_rows(args.queries, tokenizer)
    train_order, query_order = by_length(train), by_length(queries)
    train = Rows([train[i] for i in train_order])
    queries = Rows([queries[i] for i in query_order])
    # this kind of hook leaves the weights' own gradient out, which nothing here reads
    hooks = HookManagerConfig(invasive_linear_io=[r"lora_"])

    all_scores, times, disk = [], [], []
    rss_before = psutil.Process().memory_info().rss
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            stores = [
                GradientStorageManager(f"{folder}/{name}", residency=args.keep)
                for name in ("train", "queries")
            ]
            attributor = EKFACAttributor(
                AttributionArguments(
                    folder,
                    use_cpu=True,
                    per_device_train_batch_size=args.batch,
                    per_device_eval_batch_size=args.batch,
                ),
                task=AttributionTask(summed_loss, model),
            )
            started = now()
            attributor.collect_gradients(
                attributor.generate_train_rep(train, hook_config=hooks), stores[0]
            )
            factors = attributor.fit(stores[0], f"{folder}/factors")
            fitted = now()
            attributor.collect_gradients(
                attributor.generate_test_rep(queries, hook_config=hooks), stores[1]
            )
            found = attributor.attribute_from_cache(
                *stores, fisher_dir=factors, damping=args.damping, relative_damping=True
            )
            scores = np.empty((len(queries), len(train)), dtype=np.float32)
            scores[np.ix_(query_order, train_order)] = found.scores.numpy().T
            times.append((fitted - started, now() - fitted))
            all_scores.append(scores)
            files = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
            disk.append(sum(files))
            for store in stores:
                store.close()

    write_record(
        args.out,
        all_scores,
        times,
        load_seconds=load_seconds,
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        before=rss_before,
        disk=disk[0],
    )


if __name__ == "__main__":
    main()
