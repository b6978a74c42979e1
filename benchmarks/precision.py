"""Per-example gradients by number type, against float64, on an adapter that has learnt its rows.

    python benchmarks/precision.py --model BASE --train TRAIN --queries QUERIES [--adapter ADAPTER]
        [--rows 20] [--epochs 160]

Without `--adapter` one is trained on the first rows, one step an epoch, to a loss near 0.01. The
truth is the same model with its weights as they are held, computed in float64. Printed are, for each
type and what it computes in: the relative error of the rows' gradients, the rank correlation of
gradient products with the queries with those of the truth, and processor seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

import influence
from influence.adapter import AdaptedModel
from influence.batches import collate
from influence.gradient_check import relative_errors
from influence.gradients import stream_gradients
from influence.precision import computing_in
from influence.tokens import TokenizedExamples, tokenize


def learnt_adapter(base: str, rows: influence.Examples, epochs: int) -> AdaptedModel:
    """An adapter of rank 8 on all linear layers, trained on all rows at once in float32."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).train()
    tokens = tokenize(rows, tokenizer)
    batch = collate(tokens, np.arange(len(tokens)), pad_id=0)
    labels = torch.where(batch.supervised, batch.input_ids, -100)
    weights = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.01)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - epoch / epochs)
        mask = batch.attention_mask
        peft(input_ids=batch.input_ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return influence.from_peft(peft, tokenizer)


def gradients(model: AdaptedModel, tokens: TokenizedExamples) -> tuple[torch.Tensor, float]:
    """Every row's gradient `[n, P]`, and the processor seconds that they took."""
    out = torch.empty(len(tokens), model.space.size, dtype=model.dtype)
    start = time.process_time()
    for rows, part, _ in stream_gradients(model, tokens, token_budget=1024):
        out[torch.from_numpy(rows)] = part
    return out, time.process_time() - start


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("model", "train", "queries"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=160)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train = influence.read_examples(args.train)[: args.rows]
    queries = influence.read_examples(args.queries)[:10]
    adapter = args.adapter
    if adapter is None:
        adapter = Path("learnt")
        learnt_adapter(args.model, train, args.epochs).model.save_pretrained(str(adapter))
    print(f"{'held in':9} {'computed':9} {'median':>8} {'worst':>8} {'order':>6} {'s':>6}")
    for dtype in ("bfloat16", "float16", "float32"):
        for compute in ("own", "float32") if dtype != "float32" else ("own",):
            model = influence.load(args.model, adapter, dtype=dtype, compute=compute)
            rows, asked = (tokenize(part, model.tokenizer) for part in (train, queries))
            found, seconds = gradients(model, rows)
            products = gradients(model, asked)[0].double() @ found.double().T
            with computing_in(model, torch.float64):
                exact = gradients(model, rows)[0]
                truth = gradients(model, asked)[0] @ exact.T
            errors = relative_errors(found, exact)
            order = float(
                np.mean([spearmanr(a, b)[0] for a, b in zip(products, truth, strict=True)])
            )
            print(
                f"{dtype:9} {compute:9} {errors.median():8.1e} {errors.max():8.1e} {order:6.3f} "
                f"{seconds:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
