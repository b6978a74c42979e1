"""Rows in a model's own words: greedy continuations of their prompts.

Plain greedy decoding in batches that are padded on the left, with the keys and values of what was
read already kept. Nothing of the model is changed.

Shapes: n rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from influence.adapter import AdaptedModel
from influence.batches import Batch, collate, plan_batches
from influence.errors import BadRow, DataError, InputError
from influence.halving import Steps, in_parts
from influence.positions import most_positions
from influence.rows import Example, Examples
from influence.tokens import TokenizedExamples, Tokens, tokenize


@dataclass(frozen=True, eq=False)
class Openings:
    """What rows begin with, and how each goes on by itself.

    Attributes
    ----------
    rows : int array [n]
        Positions, among those that were asked about, of the rows that can be continued.
    prompts : TokenizedExamples
        The tokens that each begins with.
    answers : list of int array
        The tokens that each has after them.
    """

    rows: np.ndarray
    prompts: TokenizedExamples
    answers: list[np.ndarray]


def openings(model: AdaptedModel, examples: Examples) -> Openings:
    """The beginning of every row that has one, and what the row itself says then.

    A prompt is what training put before the row's last answer, chat template included. A text has
    no prompt: its first half stands for one, and so it is for token ids whose labels leave out no
    more than the first of them. Rows of several documents, and those whose beginning takes all of
    the model's positions, are left out.
    """
    tokens = _by_last_answer(model, examples)
    rows, prompts, answers = [], [], []
    for place, (example, item) in enumerate(zip(examples, tokens, strict=True)):
        first = int(item.supervised.argmax())
        if not _has_prompt(example) and first <= 1:
            first = len(item) // 2
        if item.position_ids is None:
            rows.append(place)
            prompts.append(_beginning(item, first))
            answers.append(item.input_ids[first:])
    found = TokenizedExamples(prompts, [tokens.ids[row] for row in rows])
    able = np.flatnonzero(_room(model, found) >= 1)
    return Openings(
        np.array(rows, dtype=int)[able], found.select(able), [answers[place] for place in able]
    )


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
    found = generated_tokens(
        model, examples, max_new_tokens=max_new_tokens, token_budget=token_budget
    )
    return [model.tokenizer.decode(new, skip_special_tokens=True) for new in found]


def generated_tokens(
    model: AdaptedModel, examples: Examples, *, max_new_tokens: int = 128, token_budget: int = 4096
) -> list[list[int]]:
    """The tokens of `generate`, without the end token. Errors as there."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} was given; expected at least 1")
    able = continuable(model, examples)
    if not able.all():
        why = "no prompt (a text, or an empty one), or one that takes all of the model's positions"
        bad = [BadRow(int(at) + 1, examples[at].id, why) for at in np.flatnonzero(~able)]
        raise DataError(
            f"{len(bad)} of {len(examples)} rows cannot be continued; leave them out:", bad
        )
    limits = np.full(len(examples), max_new_tokens)
    return _continued(model, _prompts(model, examples), limits, token_budget)


def continuable(model: AdaptedModel, examples: Examples) -> np.ndarray:
    """Whether each row has a prompt that leaves the model a position to go on, bool `[n]`."""
    able = np.array([_has_prompt(example) for example in examples], dtype=bool)
    places = np.flatnonzero(able)
    if len(places):
        able[places] = _room(model, _prompts(model, examples.select(places))) >= 1
    return able


def continued(
    model: AdaptedModel, prompts: TokenizedExamples, limits: np.ndarray, *, token_budget: int = 4096
) -> list[str]:
    """At most `limits` [n] new tokens for each prompt, by greedy decoding, as text.

    Prompts of one batch go on as long as the longest of them may, and what is beyond a prompt's own
    limit is cut: greedy decoding says the same tokens first, however many follow. Only the model's
    positions, which a prompt must not pass, part prompts.
    """
    found = _continued(model, prompts, limits, token_budget)
    return [model.tokenizer.decode(new, skip_special_tokens=True) for new in found]


def _continued(
    model: AdaptedModel, prompts: TokenizedExamples, limits: np.ndarray, token_budget: int
) -> list[list[int]]:
    """The tokens of `continued`."""
    most = np.minimum(int(limits.max(initial=0)), _room(model, prompts))
    tokens: list[list[int]] = [[]] * len(prompts)
    for longest in np.unique(most).tolist():
        rows = np.flatnonzero(most == longest)
        found = _new_tokens(model, prompts.select(rows), longest, token_budget)
        for row, new in zip(rows, found, strict=True):
            tokens[row] = new[: limits[row]]
    return tokens


def _has_prompt(example: Example) -> bool:
    """Whether a row is asked something."""
    return bool(example.prompt) or example.messages is not None


def _by_last_answer(model: AdaptedModel, examples: Examples) -> TokenizedExamples:
    """The tokens of rows whose last answer alone is supervised."""
    last = Examples(
        replace(row, prompt_turns=None) for row in examples
    )  # of several in a completion
    return tokenize(last, model.tokenizer)


def _prompts(model: AdaptedModel, examples: Examples) -> TokenizedExamples:
    """Each row up to the first token of its last answer."""
    tokens = _by_last_answer(model, examples)
    cut = [_beginning(row, int(row.supervised.argmax())) for row in tokens]
    return TokenizedExamples(cut, tokens.ids)


def _beginning(row: Tokens, length: int) -> Tokens:
    """The first tokens of a row, none of which is a target."""
    return Tokens(row.input_ids[:length], np.zeros(length, dtype=bool))


def _room(model: AdaptedModel, prompts: TokenizedExamples) -> np.ndarray:
    """How many tokens the model can add to each prompt, `[n]`."""
    positions = most_positions(model.model.get_base_model().config)
    return (positions or np.iinfo(np.int64).max) - prompts.lengths


def _new_tokens(
    model: AdaptedModel, prompts: TokenizedExamples, limit: int, token_budget: int
) -> list[list[int]]:
    """At most `limit` new tokens for each prompt."""
    found: list[list[int]] = [[]] * len(prompts)
    # what stays of a token are its keys and values, a fraction of what a forward holds
    most = max(1, 4 * token_budget // (int(prompts.lengths.max()) + limit))

    def run(rows: np.ndarray, _: Steps) -> list[list[int]]:
        batch = collate(prompts, rows, pad_id=model.pad_id, padding="left", device=model.device)
        return _continuations(base, batch)

    with model.evaluating(), torch.no_grad(), _plain_greedy(model, limit) as base:
        for rows in plan_batches(prompts, token_budget, max_rows=most):
            for part, continuations in in_parts(model, prompts, rows, run):
                for row, new in zip(part, continuations, strict=True):
                    found[row] = new
    return found


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
