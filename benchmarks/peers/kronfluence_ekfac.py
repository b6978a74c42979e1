"""EK-FAC influence scores of a LoRA adapter with kronfluence, timed.

Runs in an environment of its own (see README.md beside this file) and imports nothing of this
project.
"""

import argparse
import logging
import math
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from peft import PeftModel
from shared import Batch, by_length, collate, now, parser_of, read_rows, write_record
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


class CompletionLoss(Task):
    """Summed cross-entropy of the completion's tokens, over the LoRA layers.

    Parameters
    ----------
    modules
        Names of the layers to track.
    """

    def __init__(self, modules: list[str]) -> None:
        self.modules = modules

    def compute_train_loss(
        self, batch: Batch, model: nn.Module, sample: bool = False
    ) -> torch.Tensor:
        """Summed loss of a batch, with labels drawn from the model if ``sample``."""
        targets = batch["labels"][:, 1:]
        first = int(
            (targets != -100).any(dim=0).nonzero()[0]
        )  # no logits for positions that predict nothing
        positions = torch.arange(first, targets.shape[1])
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_to_keep=positions,
            use_cache=False,
        ).logits.flatten(0, 1)
        targets = targets[:, first:].flatten()
        if sample:
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(dim=-1), num_samples=1).squeeze(1)
            targets = torch.where(targets == -100, targets, drawn)
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)

    def compute_measurement(self, batch: Batch, model: nn.Module) -> torch.Tensor:
        """Summed loss of a batch of queries."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """Names of the tracked layers."""
        return self.modules

    def get_attention_mask(self, batch: Batch) -> torch.Tensor:
        """Mask of the tokens that are not padding."""
        return batch["attention_mask"]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeat", type=int, default=1, help="runs; run r has seed SEED + r")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit-batch", type=int, default=16, help="rows per batch while fitting")
    parser.add_argument(
        "--score-batch", type=int, default=16, help="training rows per batch while scoring"
    )
    parser.add_argument(
        "--query-batch", type=int, default=8, help="queries per batch while scoring"
    )
    parser.add_argument(
        "--damping", type=float, help="damping (default: 0.1 of the mean eigenvalue)"
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
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    load_seconds = time.perf_counter() - started

    train, queries = read_rows(args.train, tokenizer), read_rows(args.queries, tokenizer)
    train_order, query_order = by_length(train), by_length(queries)
    train, queries = [train[i] for i in train_order], [queries[i] for i in query_order]
    names = [
        name
        for name, leaf in model.named_modules()
        if isinstance(leaf, nn.Linear) and "lora_" in name
    ]
    task = CompletionLoss(names)
    model = prepare_model(model, task)
    loader = DataLoaderKwargs(collate_fn=collate)
    score_args = ScoreArguments(  # all queries at once: a single pass over the training rows
        damping_factor=args.damping,
        query_gradient_accumulation_steps=math.ceil(len(queries) / args.query_batch),
    )

    all_scores, times = [], []
    rss_before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "ekfac",
            model,
            task,
            cpu=True,
            log_level=logging.ERROR,
            disable_tqdm=True,
            output_dir=folder,
        )
        for run in range(args.repeat):
            torch.manual_seed(args.seed + run)
            started = now()
            analyzer.fit_all_factors(
                f"run{run}",
                train,
                per_device_batch_size=args.fit_batch,
                dataloader_kwargs=loader,
                factor_args=FactorArguments(strategy="ekfac"),
            )
            fitted = now()
            analyzer.compute_pairwise_scores(
                f"run{run}",
                f"run{run}",
                query_dataset=queries,
                train_dataset=train,
                per_device_query_batch_size=args.query_batch,
                per_device_train_batch_size=args.score_batch,
                dataloader_kwargs=loader,
                score_args=score_args,
            )
            found = analyzer.load_pairwise_scores(f"run{run}")
            times.append((fitted - started, now() - fitted))
            scores = np.empty((len(queries), len(train)), dtype=np.float32)
            scores[np.ix_(query_order, train_order)] = found["all_modules"].numpy()
            all_scores.append(scores)
        files = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]

    write_record(
        args.out,
        all_scores,
        times,
        load_seconds=load_seconds,
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        before=rss_before,
        disk=sum(files) // args.repeat,
    )


if __name__ == "__main__":
    main()
