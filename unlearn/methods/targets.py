"""What forget rows are trained towards: their tokens, other labels, refusals, predicted outputs.

A target is made once, before the first step, from a `Setup`. What it says of a row depends on the
seed and the row alone, never on batches or processes. Labels exist for supervised tokens only, so
no masked position ever gets one.

    own            the rows' own tokens
    random         uniform over the vocabulary, drawn once; special tokens stay
                   (Yao et al. 2024, arXiv 2402.15159)
    adversarial    at token t the most probable v != x_t under the reference, given x_<t (ibid.)
    refusals       the rows' own tokens, and beside them the prompts with "I do not know"
                   (Maini et al. 2024, arXiv 2401.06121)
    predicted      the distributions q that a model which never saw the rows might give
                   (Georgiev et al. 2024, arXiv 2410.23232)

A target of your own is a function `(Setup) -> Target`. What it needs beyond the rows and their
tokens it says itself, as a `TargetRule`:

    @partial(TargetRule, reference=True)
    def unlikeliest(setup): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.batches import plan_batches
from influence.errors import InputError
from influence.halving import Steps, in_parts
from influence.loss import check_rows
from influence.rows import Example, Examples
from influence.tokens import Rendering, TokenizedExamples
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
    """What a target is made from.

    Attributes
    ----------
    model : AdaptedModel
        The model, at the adapter before unlearning.
    rows, tokens
        The forget rows, as text and as tokens.
    reference : ReferenceAdapter
        The adapter before unlearning, whose logits and losses may be asked for.
    seed, rendering, token_budget
        Of the training: what draws depend on, how rows become tokens, and how many run at a time.
    predicted : callable
        Gives the function from forget rows to `log q` [N, V]: `of` of an
        `unlearn.unseen_outputs.ExpectedOutputs`.
    """

    model: AdaptedModel
    rows: Examples
    tokens: TokenizedExamples
    reference: ReferenceAdapter
    seed: int
    rendering: Rendering
    token_budget: int
    predicted: Callable[[], Callable[[np.ndarray], Tensor]]


@dataclass(frozen=True, eq=False)
class Target:
    """What the forget rows are trained towards. With no attribute set, their own tokens.

    Attributes
    ----------
    labels : list of int64 Tensor [T_i], optional
        Labels in place of each row's own T_i supervised tokens.
    other : TokenizedExamples, optional
        The same prompts with another completion.
    wanted : callable, optional
        From rows to `log q` [N, V] of their tokens.
    """

    labels: list[Tensor] | None = None
    other: TokenizedExamples | None = None
    wanted: Callable[[np.ndarray], Tensor] | None = None


def checked(target: object, name: str, tokens: TokenizedExamples, vocabulary: int) -> Target:
    """A target as a function made it, for the rows that it was made for.

    Raises `InputError` where it is no `Target`, or where its labels or completions are not one a
    row, its labels not one a supervised token, no whole numbers, or none of the vocabulary's.
    """
    if not isinstance(target, Target):
        raise InputError(
            f"target {name} gave {type(target).__name__}; expected an unlearn.methods.Target"
        )
    for part in ("labels", "other"):
        given = getattr(target, part)
        if given is not None and len(given) != len(tokens):
            raise InputError(
                f"target {name} gave {len(given)} {part} for {len(tokens)} rows; expected one a row"
            )
    for row, labels in enumerate(target.labels or ()):
        count = int(tokens.counts[row])
        whole = isinstance(labels, Tensor) and labels.dtype == torch.int64
        if not whole or tuple(labels.shape) != (count,):
            kind = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else labels
            raise InputError(
                f"target {name} gave the row {tokens.ids[row]!r} labels {kind}; expected int64 "
                f"[{count}], one a supervised token"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < vocabulary:
            raise InputError(
                f"target {name} gave the row {tokens.ids[row]!r} labels from {int(labels.min())} "
                f"to {int(labels.max())}; expected numbers of the vocabulary, 0 to {vocabulary - 1}"
            )
    return target


@dataclass(frozen=True)
class TargetRule:
    """The function that makes a target, with what is asked of it before it is called.

    Attributes
    ----------
    make : callable
        `(Setup) -> Target`.
    reference : bool
        Whether it looks at the adapter before unlearning.
    expected : bool
        Whether it needs the losses expected of a model that never saw the rows.
    paired : bool
        Whether rows get a second completion, so that each costs two gradients a step.
    refuse : callable, optional
        Raises `InputError` for forget rows that it can make no target of, before any work.
    """

    make: Callable[[Setup], Target]
    reference: bool = False
    expected: bool = False
    paired: bool = False
    refuse: Callable[[Iterable[Example]], None] | None = None

    def __call__(self, setup: Setup) -> Target:
        """The target of a setup's rows."""
        return self.make(setup)


def rule_of(target: Callable[[Setup], Target]) -> TargetRule:
    """A target as a rule. A plain function needs nothing but the rows and their tokens."""
    return target if isinstance(target, TargetRule) else TargetRule(target)


def refuse_texts(rows: Iterable[Example]) -> None:
    """Refuse texts and token ids: they have no prompt that a refusal could answer."""
    for row in rows:
        if row.answer is None:
            kind = "one text" if row.text is not None else "token ids"
            raise InputError(
                f"row {row.id!r} is {kind} without a prompt, and a refusal answers one: "
                "use another method"
            )


@TargetRule
def own(setup: Setup) -> Target:
    """The rows' own tokens."""
    return Target()


@TargetRule
def random(setup: Setup) -> Target:
    """Labels drawn uniformly from the vocabulary without special tokens, which themselves stay."""
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
        true = item.input_ids[item.supervised]
        drawn = words[_generator(setup.rows[row], setup.seed).integers(len(words), size=len(true))]
        labels.append(torch.from_numpy(np.where(np.isin(true, list(special)), true, drawn)))
    return Target(labels=labels)


@partial(TargetRule, reference=True)
def adversarial(setup: Setup) -> Target:
    """The reference's best alternative to every token, at that token's own position."""
    labels: list[Any] = [None] * len(setup.tokens)

    def run(rows: np.ndarray, _: Steps) -> tuple[Tensor, ...]:
        logits, true, counts = setup.reference.logits(setup.tokens, rows)
        return logits.scatter(-1, true[:, None], -torch.inf).argmax(-1).cpu().split(counts)

    for batch in plan_batches(setup.tokens, setup.token_budget):
        for rows, best in in_parts(setup.model, setup.tokens, batch, run):
            for row, label in zip(rows.tolist(), best, strict=True):
                labels[row] = label
    return Target(labels=labels)


@partial(TargetRule, paired=True, refuse=refuse_texts)
def refusals(setup: Setup) -> Target:
    """The rows' own tokens, and the same prompts with a refusal."""
    refuse_texts(setup.rows)
    rows = Examples(_with_refusal(row, setup.seed) for row in setup.rows)
    # what is to be said is the refusal alone, whatever of a conversation the training supervised
    answers = replace(setup.rendering, supervise="last")
    other = answers.tokenize(rows, setup.model.tokenizer)
    check_rows(setup.model, other)
    return Target(other=other)


@partial(TargetRule, reference=True, expected=True)
def predicted(setup: Setup) -> Target:
    """The outputs that a local retraining expects of a model which never saw the rows."""
    return Target(wanted=setup.predicted())


def _generator(row: Example, seed: int) -> np.random.Generator:
    """Draws for a row's content, wherever the row stands."""
    return np.random.default_rng([seed, int(row.content_hash, 16)])


def _with_refusal(row: Example, seed: int) -> Example:
    """The row with a refusal in place of its completion."""
    text = REFUSALS[int(_generator(row, seed).integers(len(REFUSALS)))]
    lead = " " if (row.completion or "")[:1].isspace() else ""  # so that tokens split as before
    return row.answering(lead + text)
