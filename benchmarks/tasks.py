"""The four questions that `faithfulness.py` asks of scores, and the adapters that two of them need.

Scores are `[Q, n]`, positive = proponent, of the query's **mean** loss. Each question is a plain
function of them and returns `Measured` values with bootstrap intervals:

* linear datamodeling score: `analysis.metrics.lds`, on the testbed's own retrained halves
  (resampled: the halves);
* `retrieval`: the rank of the training row that a query paraphrases (resampled: the queries);
* `mislabelled`: rows that got another author's facts (`plant`), found by how much they oppose the
  clean queries about their own author, and by self-influence (resampled: the rows);
* `leave_one_out`: the measured change of every query's loss when one row's slot is left empty
  (`left_out`), against that row's column of scores (resampled: the rows).

What is trained here is made once and kept in a work folder; a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

import influence
from analysis.stats import bootstrap_interval, spearman
from influence.adapter import AdaptedModel
from influence.batches import collate
from influence.loss import mean_losses, supervised_logits, token_losses
from influence.progress import say
from influence.rows import Examples
from influence.tokens import TokenizedExamples, tokenize
from unlearn.retraining.recipe import Recipe
from unlearn.retraining.retrain import fresh_adapter, retrain, train

#: How the testbed's adapters were trained.
RECIPE = Recipe()

#: Rows with wrong facts, and rows that are left out one at a time. A choice.
PLANTED, LEFT_OUT = 20, 12


@dataclass(frozen=True)
class Measured:
    """A number with the ends of its 95 % bootstrap interval, NaN where it is undefined."""

    value: float
    low: float
    high: float


def measured(statistic: Callable[[np.ndarray], float], n: int) -> Measured:
    """`statistic(indices)` at all n units, and its bootstrap interval over resampled ones."""
    interval = bootstrap_interval(statistic, n)
    return Measured(float(statistic(np.arange(n))), interval.low, interval.high)


# ---- what is trained -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Testbed:
    """A base, an adapter, its rows and queries, and the folder `work` for what is made of them."""

    base: Path
    adapter: Path
    train: Path
    queries: Path
    heldout: Path
    work: Path

    @classmethod
    def open(cls, folder: Path, work: Path) -> Testbed:
        """The testbed in `folder`.

        Its work folder is named after the contents, so two testbeds never share one.
        """
        files = (
            folder / "base",
            folder / "adapter",
            folder / "train.jsonl",
            folder / "query.jsonl",
        )
        files += (folder / "heldout.jsonl",)
        weights = sorted(path for part in files[:2] for path in part.glob("*.safetensors"))
        digest = hashlib.sha256()
        for path in (*weights, *files[2:]):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        work_folder = work / digest.hexdigest()[:12]
        work_folder.mkdir(parents=True, exist_ok=True)
        return cls(*files, work_folder)

    def load(self) -> tuple[AdaptedModel, Examples, Examples]:
        """The adapter, its training rows and the queries."""
        model = influence.load(str(self.base), str(self.adapter), device="cpu")
        return model, influence.read_examples(self.train), influence.read_examples(self.queries)


def plant(
    testbed: Testbed, paraphrased: np.ndarray, count: int = PLANTED, seed: int = 0
) -> tuple[Testbed, np.ndarray]:
    """An adapter trained on the same rows, of which `count` answer with another author's facts.

    The wrong rows are some of those that a query paraphrases, so that there is a clean question on
    each; their completions are those of authors that nobody trained on, at the same place in the
    author's list of questions: fluent and of the right kind. (A completion borrowed within the
    training set would be seen twice there and learnt better.) Returns the testbed around it, whose
    queries are the old ones and then the training rows themselves, and which rows are wrong, bool
    `[n]`. Made once; later calls read it.
    """
    rows = [json.loads(line) for line in testbed.train.read_text(encoding="utf-8").splitlines()]
    others = [json.loads(line) for line in testbed.heldout.read_text(encoding="utf-8").splitlines()]
    rng = np.random.default_rng(seed)
    wrong = np.zeros(len(rows), bool)
    wrong[rng.choice(paraphrased, count, replace=False)] = True
    for i in np.flatnonzero(wrong):
        rows[i]["completion"] = others[(i + 20 * int(rng.integers(10))) % len(others)]["completion"]
    folder = testbed.work / f"wrong-{count}-{seed}"
    folder.mkdir(exist_ok=True)
    planted = replace(
        testbed,
        adapter=folder / "adapter",
        train=folder / "train.jsonl",
        queries=folder / "asked.jsonl",
        work=folder,
    )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    planted.train.write_text(text, encoding="utf-8")
    planted.queries.write_text(testbed.queries.read_text(encoding="utf-8") + text, encoding="utf-8")
    if not planted.adapter.exists():
        say(f"training an adapter with {count} wrong rows")
        model, _, _ = testbed.load()
        fresh = fresh_adapter(model, RECIPE.seed)
        train(fresh, tokenize(influence.read_examples(planted.train), model.tokenizer), RECIPE)
        partial = folder / "adapter.partial"
        fresh.model.save_pretrained(str(partial), save_embedding_layers=False)
        partial.rename(planted.adapter)
    return planted, wrong


def replayed(testbed: Testbed, epochs: tuple[int, ...], seed: int = 0) -> list[Path]:
    """Adapters after these epochs of the training repeated by the testbed's recipe.

    Another seed gives another start and another order.
    """
    folder = testbed.work / f"replayed-{'-'.join(map(str, epochs))}-{seed}"
    if not folder.exists():
        say(f"training again with seed {seed}, keeping epochs {epochs}")
        model, rows, _ = testbed.load()
        with tempfile.TemporaryDirectory() as scratch:
            run = influence.fit(
                model,
                rows,
                directory=scratch,
                curvature=influence.Identity(),
                path=(1.0,),
                store="never",
            )
            recipe = replace(RECIPE, seed=seed)
            retrain(run, out=folder, recipe=recipe, checkpoints=epochs, stop_after=max(epochs))
    return [folder / f"epoch-{epoch}" for epoch in epochs]


def left_out(
    testbed: Testbed, paraphrased: np.ndarray, count: int = LEFT_OUT, seed: int = 0
) -> dict[int, np.ndarray]:
    """Measured change of every query's loss `[Q]`, in nats, when one row's slot is left empty.

    One entry per row; the rows are `count` of the `paraphrased` ones. Everything but the one row is
    as in the training on all rows, which is repeated here too, so that the difference is due to the
    row alone.
    """
    model, rows, queries = testbed.load()
    tokens, query_tokens = tokenize(rows, model.tokenizer), tokenize(queries, model.tokenizer)
    # Fewer rows are the first of more, so that a larger count goes on where a smaller one was.
    chosen = np.random.default_rng(seed).permutation(paraphrased)[:count]
    losses = {}
    for row in (None, *chosen.tolist()):
        path = testbed.work / ("trained-on-all.npy" if row is None else f"without-{row}.npy")
        if not path.exists():
            say(f"training again on all rows{'' if row is None else f' but number {row}'}")
            fresh = fresh_adapter(model, RECIPE.seed)
            train_with_empty_slots(fresh, tokens, RECIPE, () if row is None else (row,))
            partial = path.with_suffix(".partial.npy")
            np.save(partial, mean_losses(fresh, query_tokens))
            partial.rename(path)
        losses[row] = np.load(path, allow_pickle=False)
    return {row: after - losses[None] for row, after in losses.items() if row is not None}


def train_with_empty_slots(
    model: AdaptedModel, tokens: TokenizedExamples, recipe: Recipe, absent: Collection[int]
) -> None:
    """Train the adapter in place as `unlearn.retraining` does, the slots of `absent` rows empty.

    They keep their place in the order and their tokens in the batch's denominator, but add nothing
    to its loss: `sum over the rows present of l_i / tokens of all rows of the batch`.
    """
    parameters = model.parameters
    for parameter in parameters:
        parameter.requires_grad_(True)
    model.model.train(recipe.dropout)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        betas=recipe.betas,
        eps=recipe.eps,
    )
    present = torch.ones(len(tokens))
    present[list(absent)] = 0
    order = torch.Generator().manual_seed(recipe.seed)
    epochs = [
        torch.randperm(len(tokens), generator=order).split(recipe.batch_size)
        for _ in range(recipe.epochs)
    ]
    batches = [rows for epoch in epochs for rows in epoch]
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, len(batches))
        part = supervised_logits(model, collate(tokens, rows.numpy(), pad_id=model.pad_id))
        losses = part.per_example(token_losses(part.logits, part.targets))
        optimizer.zero_grad(set_to_none=True)
        ((losses * present[rows]).sum() / len(part.targets)).backward()
        optimizer.step()
    model.model.eval()
    for parameter in parameters:
        parameter.requires_grad_(False)


# ---- what is asked -------------------------------------------------------------------------------


def retrieval(scores: np.ndarray, paraphrased: np.ndarray) -> dict[str, Measured]:
    """Whether each query's row `paraphrased` [Q] ranks first, and the mean reciprocal of its rank.

    Rows with the same score share the lowest rank among them, so a constant score finds nothing.
    """
    ranks = np.array([(scores[q] >= scores[q, i]).sum() for q, i in enumerate(paraphrased)])
    return {
        "recall@1": measured(lambda q: float((ranks[q] == 1).mean()), len(ranks)),
        "mrr": measured(lambda q: float((1 / ranks[q]).mean()), len(ranks)),
    }


def opposition(
    scores: np.ndarray, groups: list[str | None], query_groups: list[str | None]
) -> np.ndarray:
    """How much each row opposes the queries about its group, `[n]`: minus its mean score there.

    `groups` [n] of the rows, `query_groups` [Q] of the queries.
    """
    same = np.array([[query == row for row in groups] for query in query_groups])
    return -np.where(same, scores, 0).sum(0) / same.sum(0)


def mislabelled(values: np.ndarray, wrong: np.ndarray) -> dict[str, Measured]:
    """How well the highest `values` [n] find the `wrong` rows: average precision, area under ROC.

    By chance average precision is about the share of wrong rows (a little more in small samples)
    and the area 0.5. Both are NaN where all values are the same or no row is wrong.
    """
    return {
        "ap": measured(lambda rows: average_precision(values[rows], wrong[rows]), len(wrong)),
        "auc": measured(lambda rows: roc_area(values[rows], wrong[rows]), len(wrong)),
    }


def average_precision(values: np.ndarray, wanted: np.ndarray) -> float:
    """Mean, over the wanted rows, of the precision at their rank.

    Tied rows count as if all were ranked last.
    """
    if constant(values) or not wanted.any():
        return float("nan")
    above = values[:, None] >= values[None, wanted]  # [row, wanted row]
    return float(((above & wanted[:, None]).sum(0) / above.sum(0)).mean())


def roc_area(values: np.ndarray, wanted: np.ndarray) -> float:
    """Probability that a wanted row is above another one, ties counting half."""
    if constant(values) or wanted.all() or not wanted.any():
        return float("nan")
    k, ranks = int(wanted.sum()), rankdata(values)
    return float((ranks[wanted].sum() - k * (k + 1) / 2) / (k * (len(values) - k)))


def constant(values: np.ndarray) -> bool:
    """Whether all values are the same up to rounding, as a cosine of everything with itself is."""
    return bool(np.ptp(values) <= 1e-4 * np.abs(values).max())


def leave_one_out(scores: np.ndarray, changes: dict[int, np.ndarray]) -> dict[str, Measured]:
    """Predicted against measured changes of the queries' losses, for the rows of `left_out`.

    `spearman`: over the queries, for each row, averaged over the rows. `pearson`: over all (row,
    query) pairs.
    """
    predicted = np.stack([scores[:, row] for row in changes]).astype(np.float64)
    true = np.stack(list(changes.values()))
    by_row = spearman(predicted, true)

    def pooled(rows: np.ndarray) -> float:
        x, y = predicted[rows].ravel(), true[rows].ravel()
        return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else float("nan")

    return {
        "spearman": measured(lambda rows: float(by_row[rows].mean()), len(by_row)),
        "pearson": measured(pooled, len(by_row)),
    }
