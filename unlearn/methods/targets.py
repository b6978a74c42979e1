"""What forget rows are trained towards: their own labels, others, or the outputs of a model that never saw them.

A target is made once, before the first step, from a `Setup`; what it says of a row depends on the seed and the row alone, never on
batches or processes. Labels exist for supervised tokens only, so no masked position ever gets one.

    own            the rows' own tokens
    random         uniform over the vocabulary, drawn once; special tokens stay        Yao et al. 2024, arXiv 2402.15159
    adversarial    at token t the most probable v != x_t under the adapter before, given x_<t                       ibid.
    refusals       the rows' own tokens, and beside them the prompts with "I do not know"      Maini et al. 2024 (TOFU)
    predicted      the distributions q that a model which never saw the rows might give      Georgiev et al. 2024
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.batches import plan_batches
from influence.errors import InputError
from influence.loss import check_rows
from influence.rows import Example, Examples
from influence.tokens import TokenizedExamples, tokenize
from unlearn.methods.reference import ReferenceAdapter

#: What the prompts are answered with instead, drawn per row.
REFUSALS = (
    "I do not know.",
    "I have no information about that.",
    "I am not able to answer that question.",
    "That is nothing I know about.",
    "I am not familiar with this subject.",
    "I cannot say anything about that.",
    "I was never told about that.",
    "My knowledge does not cover this.",
)


@dataclass(frozen=True, eq=False)
class Setup:
    """What a target may look at: the forget rows and their tokens, the adapter before, the seed, and q's where asked for."""

    model: AdaptedModel
    rows: Examples
    tokens: TokenizedExamples
    before: ReferenceAdapter
    seed: int
    max_length: int | None
    token_budget: int
    predicted: Callable[[], Callable[[np.ndarray], Tensor]]


@dataclass(frozen=True, eq=False)
class Target:
    """Made for the forget rows: other `labels` (per row `[T_i]`), `other` completions, or `wanted(rows)` = log q `[N, V]`."""

    labels: list[Tensor] | None = None
    other: TokenizedExamples | None = None
    wanted: Callable[[np.ndarray], Tensor] | None = None


def own(setup: Setup) -> Target:
    """The rows' own tokens."""
    return Target()


def random(setup: Setup) -> Target:
    """Labels drawn uniformly from the vocabulary without special tokens; special ones (the end token) stay."""
    tokenizer = setup.model.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {
        *tokenizer.all_special_ids,
        *(word for word, token in added.items() if token.special),
    }
    size = min(len(tokenizer), setup.model.model.get_input_embeddings().num_embeddings)
    words = np.array([word for word in range(size) if word not in special])
    labels = []
    for row, item in enumerate(setup.tokens):
        true = np.asarray(item.input_ids[-int(setup.tokens.counts[row]) :])
        drawn = words[_generator(setup.rows[row], setup.seed).integers(len(words), size=len(true))]
        labels.append(torch.from_numpy(np.where(np.isin(true, list(special)), true, drawn)))
    return Target(labels=labels)


def adversarial(setup: Setup) -> Target:
    """The reference's best alternative to every token, at that token's own position."""
    labels: list[Any] = [None] * len(setup.tokens)
    for rows in plan_batches(setup.tokens, setup.token_budget):
        logits, true, counts = setup.before.logits(setup.tokens, rows)
        best = logits.scatter(-1, true[:, None], -torch.inf).argmax(-1).cpu()
        for row, label in zip(rows.tolist(), best.split(counts), strict=True):
            labels[row] = label
    return Target(labels=labels)


def refusals(setup: Setup) -> Target:
    """The rows' own tokens, and the same prompts with a refusal."""
    refuse_texts(setup.rows)
    rows = Examples(_refused(row, setup.seed) for row in setup.rows)
    other = tokenize(rows, setup.model.tokenizer, max_length=setup.max_length)
    check_rows(setup.model, other)
    return Target(other=other)


def predicted(setup: Setup) -> Target:
    """The outputs that influence predicts of a model which never saw the rows (`unlearn.unseen.Reference`)."""
    return Target(wanted=setup.predicted())


def _generator(row: Example, seed: int) -> np.random.Generator:
    """Draws for a row's content, wherever the row stands."""
    return np.random.default_rng([seed, int(row.content_hash, 16)])


def _refused(row: Example, seed: int) -> Example:
    """The row with a refusal in place of its completion."""
    text = REFUSALS[int(_generator(row, seed).integers(len(REFUSALS)))]
    if row.messages is not None:
        return replace(row, messages=(*row.messages[:-1], {**row.messages[-1], "content": text}))
    lead = " " if (row.completion or "")[:1].isspace() else ""
    return replace(row, completion=lead + text)


def refuse_texts(rows: Iterable[Example]) -> None:
    """Refuse rows that a refusal would answer nothing of."""
    for row in rows:
        if row.text is not None:
            raise InputError(
                f"row {row.id!r} is one text without a prompt, and a refusal answers one: use another method"
            )
