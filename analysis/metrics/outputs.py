"""What a model says of rows: token by token, in its own words, and how hard it still pulls on them.

Everything that the metrics of this package need of a model comes from here: `outputs` (one forward
per batch), `generate` (greedy continuations) and `gradient_norms` (one forward and backward). The
metrics themselves are functions of these arrays.

Shapes: n rows, T_i completion tokens of row i (end token included). Unit: nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.batches import Batch, collate, plan_batches
from influence.errors import BadRow, DataError, InputError, NumericalError
from influence.gradients import stream_gradients
from influence.loss import supervised_logits
from influence.measurements import MeanLoss
from influence.positions import most_positions
from influence.rows import Examples
from influence.tokens import TokenizedExamples, Tokens, tokenize

#: Positions whose whole distribution is held in float64 at once.
_POSITIONS = 256


@dataclass(frozen=True, eq=False)
class Outputs:
    """Of every row, what the model gives its completion tokens.

    Attributes
    ----------
    ids : list of str
        The rows' ids.
    loss, sums : array [n]
        Mean and summed cross-entropy over the completion tokens, nats.
    counts : int array [n]
        The completion tokens T_i.
    log_probs : list of array [T_i]
        `log p(token)` of each completion token.
    mean, std : list of array [T_i]
        At each completion token the mean `mu = sum_v p(v) log p(v)` and the standard deviation
        `sigma`, `sigma^2 = sum_v p(v) (log p(v) - mu)^2`, of the log-probability of a token drawn
        from the model: what min-k++ normalises by (Zhang et al. 2024, arXiv 2404.02936, equation
        3).
    right : list of bool array [T_i]
        Whether the most probable token is the row's.
    """

    ids: list[str]
    loss: np.ndarray = field(repr=False)
    sums: np.ndarray = field(repr=False)
    counts: np.ndarray = field(repr=False)
    log_probs: list[np.ndarray] = field(repr=False)
    mean: list[np.ndarray] = field(repr=False)
    std: list[np.ndarray] = field(repr=False)
    right: list[np.ndarray] = field(repr=False)


def outputs(model: AdaptedModel, tokens: TokenizedExamples, *, token_budget: int = 4096) -> Outputs:
    """Run rows forward once, where the model is now.

    Distributions over the vocabulary are reduced and let go.

    Raises `NumericalError` where a row's loss is NaN or infinite.
    """
    by_row: list[list[np.ndarray]] = [[] for _ in tokens]
    with model.evaluating(), torch.no_grad():
        for rows in plan_batches(tokens, token_budget):
            part = supervised_logits(
                model, collate(tokens, rows, pad_id=model.pad_id, device=model.device)
            )
            columns = [
                values.cpu().split(part.counts) for values in _reduced(part.logits, part.targets)
            ]
            for row, *arrays in zip(rows, *columns, strict=True):
                by_row[row] = [values.numpy() for values in arrays]
    log_probs, mean, std, right = (list(column) for column in zip(*by_row, strict=True))
    sums = np.array([-values.sum() for values in log_probs])
    if not np.isfinite(sums).all():
        raise NumericalError(
            f"the loss of {int((~np.isfinite(sums)).sum())} rows is NaN or infinite"
        )
    return Outputs(
        list(tokens.ids), sums / tokens.counts, sums, tokens.counts, log_probs, mean, std, right
    )


def _reduced(logits: Tensor, targets: Tensor) -> list[Tensor]:
    """Log-probabilities of targets, mean, deviation and greedy hits of logits `[N, V]`, each `[N]`.

    Float64, the hits bool.
    """
    parts: list[tuple[Tensor, ...]] = []
    for some, labels in zip(logits.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
        logs = some.double().log_softmax(-1)
        probs = logs.exp()
        mean = -torch.special.entr(probs).sum(-1)  # a token of probability 0 adds nothing
        squares = torch.where(probs > 0, (logs - mean[:, None]).square(), 0.0)
        std = (probs * squares).sum(-1).sqrt()
        hit = some.argmax(-1) == labels
        parts.append((logs.gather(-1, labels[:, None]).squeeze(-1), mean, std, hit))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def gradient_norms(
    model: AdaptedModel, tokens: TokenizedExamples, *, token_budget: int = 4096
) -> np.ndarray:
    """Euclidean norm of every row's gradient of its mean loss, `[n]`, nats per token.

    By the LoRA parameters.
    """
    norms = np.zeros(len(tokens))
    for rows, gradients, _ in stream_gradients(
        model, tokens, measurement=MeanLoss(), token_budget=token_budget
    ):
        norms[rows] = gradients.double().norm(dim=1).cpu().numpy()
    return norms


# ---- generation ----------------------------------------------------------------------------------


def generate(
    model: AdaptedModel, examples: Examples, *, max_new_tokens: int = 128, token_budget: int = 4096
) -> list[str]:
    """The greedy continuation of every row's prompt, as text.

    It ends at an end token, after `max_new_tokens`, or at the last position.

    The prompt is what training put before the completion: the row's tokens before its first
    supervised one, chat template included. Plain greedy decoding: penalties and sampling that the
    base's generation configuration asks for are left out. Special tokens are not part of the text.

    Raises `InputError` for `max_new_tokens` below 1; `DataError` that lists the rows which cannot
    be continued (`continuable`).
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} was given; expected at least 1")
    able = continuable(model, examples)
    if not able.all():
        why = "no prompt (a text, or an empty one), or one that takes all of the model's positions"
        bad = [BadRow(int(at) + 1, examples[at].id, why) for at in np.flatnonzero(~able)]
        raise DataError(
            f"{len(bad)} of {len(examples)} rows cannot be continued; leave them out:", bad
        )
    prompts = _prompts(model, examples)
    limits = np.minimum(max_new_tokens, _room(model, prompts))
    texts = [""] * len(examples)
    for limit in np.unique(limits).tolist():
        rows = np.flatnonzero(limits == limit)
        for row, text in zip(
            rows, _continued(model, prompts.select(rows), limit, token_budget), strict=True
        ):
            texts[row] = text
    return texts


def continuable(model: AdaptedModel, examples: Examples) -> np.ndarray:
    """Whether each row has a prompt that leaves the model a position to go on, bool `[n]`."""
    able = np.array(
        [bool(example.prompt) or example.messages is not None for example in examples], dtype=bool
    )
    places = np.flatnonzero(able)
    if len(places):
        able[places] = _room(model, _prompts(model, examples.select(places))) >= 1
    return able


def _prompts(model: AdaptedModel, examples: Examples) -> TokenizedExamples:
    """Each row up to the first token of its last answer."""
    last = Examples(
        replace(row, prompt_turns=None) for row in examples
    )  # of several in a completion
    tokens = tokenize(last, model.tokenizer)
    cut = [row.input_ids[: int(row.supervised.argmax())] for row in tokens]
    return TokenizedExamples(
        [Tokens(ids, np.zeros(len(ids), dtype=bool)) for ids in cut], tokens.ids
    )


def _room(model: AdaptedModel, prompts: TokenizedExamples) -> np.ndarray:
    """How many tokens the model can add to each prompt, `[n]`."""
    positions = most_positions(model.model.get_base_model().config)
    return (positions or np.iinfo(np.int64).max) - prompts.lengths


def _continued(
    model: AdaptedModel, prompts: TokenizedExamples, limit: int, token_budget: int
) -> list[str]:
    """At most `limit` new tokens for each prompt, as text."""
    texts = [""] * len(prompts)
    # what stays of a token are its keys and values, a fraction of what a forward holds
    most = max(1, 4 * token_budget // (int(prompts.lengths.max()) + limit))
    with model.evaluating(), torch.no_grad(), _plain_greedy(model, limit) as base:
        for rows in plan_batches(prompts, token_budget, max_rows=most):
            batch = collate(prompts, rows, pad_id=model.pad_id, padding="left", device=model.device)
            for row, new in zip(rows, _continuations(base, batch), strict=True):
                texts[row] = model.tokenizer.decode(new, skip_special_tokens=True)
    return texts


@contextmanager
def _plain_greedy(model: AdaptedModel, max_new_tokens: int) -> Iterator[Any]:
    """The base with its adapter, whose `generate` takes the most probable token.

    Its own configuration afterwards.
    """
    from transformers import GenerationConfig

    base = model.model.get_base_model()
    before = base.generation_config
    ends = {model.tokenizer.eos_token_id}
    of_base = before.eos_token_id  # of a chat model often several
    ends |= set(of_base) if isinstance(of_base, list | tuple) else {of_base}
    plain = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=model.pad_id,
        eos_token_id=sorted(end for end in ends if end is not None) or None,
    )
    base.generation_config = plain
    try:
        yield base
    finally:
        base.generation_config = before


def _continuations(base: Any, batch: Batch) -> list[list[int]]:
    """What `base` adds to each prompt of a left-padded batch, cut after its first end token."""
    out = base.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    ends = set(base.generation_config.eos_token_id or ())
    continuations = []
    for new in out[:, batch.input_ids.shape[1] :].tolist():
        last = next((place for place, token in enumerate(new) if token in ends), len(new))
        continuations.append(new[:last])
    return continuations
