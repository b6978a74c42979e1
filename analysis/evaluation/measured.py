"""What is measured of one set of rows under one adapter: arrays with an entry for each row.

A further metric is a function of the `Outputs` of a set, plain arrays, that returns `PerRow`: the
value of each row and the aggregate. `evaluate(..., metrics={"name": function})` calls it for every
set under every adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from analysis.evaluation.answers import answering, completion
from analysis.evaluation.options import Options
from analysis.evaluation.sets import PreparedSet
from analysis.metrics import tofu
from analysis.metrics.extraction import exact_memorization, extraction_strength
from analysis.metrics.likelihood import PerRow
from analysis.metrics.outputs import Outputs, gradient_norms, outputs
from influence.adapter import AdaptedModel
from influence.errors import InputError
from influence.generation import generate
from influence.loss import check_rows, mean_losses
from influence.overlap import rouge
from influence.rows import Examples
from influence.tokens import tokenize

#: A metric that a caller adds: arrays of a set under one adapter in, a value for each row out.
Metric = Callable[[Outputs], PerRow]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with the adapters that are evaluated on it, and how.

    Attributes
    ----------
    model : AdaptedModel
    thetas : mapping of str to Tensor [P]
        Parameters of `adapter`, of `base` (zeros), and of `reference` where there is one.
    options : Options
    token_budget : int
        Tokens per batch, padding included.
    metrics : mapping of str to Metric
        What the caller measures besides.
    """

    model: AdaptedModel
    thetas: Mapping[str, Tensor]
    options: Options
    token_budget: int
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    @property
    def adapters(self) -> list[str]:
        """`adapter`, and `reference` where there is one."""
        return [name for name in ("adapter", "reference") if name in self.thetas]


@dataclass(frozen=True, eq=False)
class Measurement:
    """What was measured of one set of n rows under one adapter.

    Attributes
    ----------
    outputs : Outputs
        Losses and log-probabilities, nats.
    gradient_norms : array [n] or None
        None where no membership attack needs them.
    generated : dict of int to str
        Continuations, by the row's position.
    rouge1, rougeL, truth_ratios : array [n]
        NaN where a row was not continued, or has no other answers.
    exact_memorization, extraction_strength : array [n]
        Shares, 0 to 1.
    metrics : dict of str to PerRow
        The caller's own.
    """

    outputs: Outputs
    gradient_norms: np.ndarray | None
    generated: dict[int, str]
    rouge1: np.ndarray
    rougeL: np.ndarray
    truth_ratios: np.ndarray
    exact_memorization: np.ndarray
    extraction_strength: np.ndarray
    metrics: dict[str, PerRow]


def measured(subject: Subject, rows: PreparedSet, *, norms: bool) -> Measurement:
    """Measure a set where the model is now. `norms`: its gradient norms too."""
    model, options, budget = subject.model, subject.options, subject.token_budget
    out = outputs(model, rows.tokens, token_budget=budget)
    gradients = gradient_norms(model, rows.tokens, token_budget=budget) if norms else None
    rouge1, rougeL = np.full((2, len(rows.tokens)), np.nan)
    generated: dict[int, str] = {}
    if len(rows.continued):
        examples = rows.rows.examples.select(rows.continued)
        texts = generate(
            model, examples, max_new_tokens=options.max_new_tokens, token_budget=budget
        )
        generated = dict(zip(rows.continued.tolist(), texts, strict=True))
        recall = rouge([completion(example) for example in examples], texts)
        rouge1[rows.continued] = recall.rouge1_recall
        rougeL[rows.continued] = recall.rougeL_recall
    return Measurement(
        out,
        gradients,
        generated,
        rouge1,
        rougeL,
        truth_ratios(subject, rows),
        exact_memorization(out.right),
        extraction_strength(out.right),
        {name: _by(metric, name, out) for name, metric in subject.metrics.items()},
    )


def truth_ratios(subject: Subject, rows: PreparedSet) -> np.ndarray:
    """Truth ratios `[n]` of a set where the model is now. NaN for rows without other answers."""
    ratios = np.full(len(rows.tokens), np.nan)
    able = [place for place, wrong in enumerate(rows.rows.perturbed) if wrong]
    if not able:
        return ratios
    answers = [
        answering(rows.rows.examples[place], text)
        for place in able
        for text in (str(rows.rows.paraphrased[place]), *rows.rows.perturbed[place])
    ]
    model = subject.model
    tokens = tokenize(Examples(answers), model.tokenizer, max_length=subject.options.max_length)
    check_rows(model, tokens)
    losses = iter(mean_losses(model, tokens, token_budget=subject.token_budget).tolist())
    for place in able:
        paraphrased = next(losses)
        wrong = [next(losses) for _ in rows.rows.perturbed[place]]
        ratios[place] = tofu.truth_ratio([paraphrased], [wrong])[0]
    return ratios


def defined(values: np.ndarray) -> np.ndarray | None:
    """The values that are not NaN. None where there is none."""
    numbers = values[~np.isnan(values)]
    return numbers if len(numbers) else None


def _by(metric: Metric, name: str, out: Outputs) -> PerRow:
    """What a caller's metric says of a set. `InputError` unless it has a value for each row."""
    result = metric(out)
    if np.shape(result.values) != (len(out.ids),):
        raise InputError(
            f"the metric {name!r} returned values of shape {np.shape(result.values)} for "
            f"{len(out.ids)} rows; expected one number for each row"
        )
    return result
