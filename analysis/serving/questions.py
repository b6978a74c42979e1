"""A question that a person types: the adapter's own answer, and which training rows are behind it.

The question becomes a row of the kind that the adapter was trained on, with the adapter's greedy
answer as its completion. Some of the answer's tokens are explained: the query of the scores is that
row with these tokens as its only targets, and its measurement their mean loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.explorer.blocks import rounded
from influence.answers import describe
from influence.errors import InputError
from influence.generation import generated_tokens
from influence.row_content import is_unicode
from influence.rows import Example, Examples, examples_from_rows
from influence.run import Run
from influence.scorefile import Scores
from influence.tokens import Tokens

#: Characters of a question or of an answer, at most, and tokens of the adapter's answer.
MOST_CHARACTERS, MOST_TOKENS = 8000, 128
#: Rows of either end that an answer is explained by, at most.
MOST_ROWS = 2000
#: What a question is put to the adapter as.
FORMS = ("plain", "chat")
#: The id of what is asked.
ID = "your question"


@dataclass(frozen=True)
class Question:
    """What was typed: the question, and the answer to explain where it is not the adapter's own.

    `form`: `chat` puts it into the chat template as a user's turn, `plain` leaves it as it is.
    Raises `InputError` for what is empty, too long or no text.
    """

    prompt: str
    answer: str | None = None
    form: str = "plain"

    def __post_init__(self) -> None:
        for name, text in (("question", self.prompt), ("answer", self.answer)):
            if text is None and name == "answer":
                continue
            if not isinstance(text, str) or not is_unicode(text):
                raise InputError(f"the {name} is no text")
            if not text.strip():
                raise InputError(f"the {name} is empty: type one")
            if len(text) > MOST_CHARACTERS:
                raise InputError(
                    f"the {name} has {len(text):,} characters; at most {MOST_CHARACTERS:,} are taken"
                )
        if self.form not in FORMS:
            raise InputError(f"form {self.form!r} was given; expected {' or '.join(FORMS)}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Question:
        """The question in a JSON object, with no other keys."""
        if unknown := sorted(set(given) - {"prompt", "answer", "form"}):
            raise InputError(f"keys {', '.join(unknown)} were given; expected prompt, answer, form")
        if "prompt" not in given:
            raise InputError("no question was given: the key prompt is missing")
        return cls(**given)


@dataclass(frozen=True)
class Answered:
    """An answer whose tokens can be explained.

    Attributes
    ----------
    row : Example
        The question with the answer.
    answer : str
        What was answered.
    own : bool
        Whether the adapter says so itself.
    ended : bool
        Whether the answer ended, rather than being cut.
    input_ids, places : int array
        The row's tokens [T], and the positions [K] of those of the answer, its end among them.
    texts : list of str
        The text of each of these K.
    said : int
        How many of these K the answer is: all, or those before an end that the adapter did not come
        to.
    """

    row: Example
    answer: str
    own: bool
    ended: bool
    input_ids: np.ndarray = field(repr=False)
    places: np.ndarray = field(repr=False)
    texts: list[str] = field(repr=False)
    said: int

    def record(self) -> dict[str, Any]:
        """The answer as the page shows it."""
        return {
            "answer": self.answer,
            "own": self.own,
            "ended": self.ended,
            "tokens": self.texts,
            "said": self.said,
        }


def form_of(train: Examples) -> str:
    """What questions are put to the adapter as, unless told otherwise: as its rows are."""
    return "chat" if len(train) and train[0].messages is not None else "plain"


def answered(run: Run, question: Question) -> Answered:
    """The adapter's own answer to a question, by greedy decoding, or the one that was typed."""
    if question.answer is not None:
        row = _row(run.train, question, question.answer)
        tokens = _tokens(run, row)
        return _answered(run, row, question.answer, tokens, None)
    asked = _row(run.train, question, " ?")  # the answer there is not read
    (new,) = generated_tokens(run.model, Examples([asked]), max_new_tokens=MOST_TOKENS)
    text = run.model.tokenizer.decode(new, skip_special_tokens=True)
    if not text.strip():
        raise InputError(
            "the adapter ends at once and answers nothing: put the question as its training rows "
            "do, or type an answer to explain"
        )
    for answer in (text, " " + text):  # some tokenizers leave out a blank that a text begins with
        row = _row(run.train, question, answer)
        tokens = _tokens(run, row)
        targets = tokens.input_ids[tokens.supervised]
        if targets[: len(new)].tolist() == new:
            return _answered(run, row, answer, tokens, new)
    # the text is read as other tokens: those that were said are explained all the same
    prompt = _tokens(run, asked)
    before = prompt.input_ids[: int(prompt.supervised.argmax())]
    end = run.model.tokenizer.eos_token_id
    ends = [end] if len(new) < MOST_TOKENS and end is not None else []
    ids = np.concatenate([before, new, ends]).astype(prompt.input_ids.dtype)
    said = Tokens(ids, np.arange(len(ids)) >= len(before))
    return _answered(run, _row(run.train, question, text), text, said, new)


def explained(run: Run, found: Answered, chosen: Sequence[int]) -> Scores:
    """Scores [1, train] of the mean loss of some of an answer's tokens, by their positions in it.

    Raises `InputError` where none is chosen, or one is not there.
    """
    return run.score(Examples([query_of(found, chosen)]))


def query_of(found: Answered, chosen: Sequence[int]) -> Example:
    """The row of an answer with the chosen ones of its tokens as the only targets."""
    wanted = sorted(set(chosen))
    if not wanted:
        raise InputError("no token of the answer was chosen: tick at least one")
    if not all(type(k) is int and 0 <= k < len(found.places) for k in wanted):
        raise InputError(f"tokens {wanted[:5]} were given; expected 0 to {len(found.places) - 1}")
    targets = np.zeros(len(found.input_ids), dtype=bool)
    targets[found.places[wanted]] = True
    return Example(ID, input_ids=found.input_ids.tolist(), targets=targets.tolist())


def ranking(scores: Scores) -> dict[str, Any]:
    """The rows behind an answer as the page shows them.

    `rows` by position with their `scores`, proponents first, how many are `left_out` in the middle,
    and in words what the scores were made with.
    """
    values = scores.values[0]
    rises = bool(scores.attributes.get("rises", True))
    order = np.argsort(-values if rises else values, kind="stable")
    left_out = max(len(order) - 2 * MOST_ROWS, 0)
    if left_out:
        order = np.concatenate([order[:MOST_ROWS], order[-MOST_ROWS:]])
    return {
        "rows": order.tolist(),
        "scores": rounded(values[order]),
        "left_out": left_out,
        "unit": str(scores.attributes.get("unit", "")),
        "rises": rises,
        "how": describe(scores.attributes),
        "converged": bool(np.all(scores.converged)),
    }


def _row(train: Examples, question: Question, answer: str) -> Example:
    """The question with an answer, in the form of the training rows."""
    row: dict[str, Any] = {"id": ID, "prompt": question.prompt, "completion": answer}
    if question.form == "chat":
        turns = [
            {"role": "user", "content": question.prompt},
            {"role": "assistant", "content": answer},
        ]
        row = {"id": ID, "messages": [*_system_of(train), *turns]}
        first = train[0] if len(train) else None
        if first is not None and first.template_options:
            row["chat_template_kwargs"] = dict(first.template_options)
    return examples_from_rows([row])[0]


def _system_of(train: Examples) -> list[dict[str, Any]]:
    """The system turn that all of the first training rows have; none where they differ."""
    found = []
    for row in train[:100]:
        turns = row.messages or ()
        found.append(dict(turns[0]) if turns and turns[0].get("role") == "system" else None)
    if not found or found[0] is None or any(each != found[0] for each in found):
        return []
    return [found[0]]


def _tokens(run: Run, row: Example) -> Tokens:
    """A row as training has it, with its answer's tokens as the targets."""
    (tokens,) = run.query_tokens(Examples([row]))
    return tokens


def _answered(
    run: Run, row: Example, answer: str, tokens: Tokens, new: Sequence[int] | None
) -> Answered:
    """The answer with its tokens, of which the adapter itself said `new`."""
    places = np.flatnonzero(tokens.supervised)
    ended = new is None or len(new) < MOST_TOKENS
    return Answered(
        row,
        answer,
        new is not None,
        ended,
        tokens.input_ids,
        places,
        _texts(run.model.tokenizer, tokens.input_ids, places),
        len(places) if ended or new is None else min(len(new), len(places)),
    )


def _texts(tokenizer: Any, ids: np.ndarray, places: np.ndarray) -> list[str]:
    """What each token adds to the text before it; of a special one its name."""
    special = set(tokenizer.all_special_ids)
    found = []
    for place in places.tolist():
        if int(ids[place]) in special:
            found.append(str(tokenizer.convert_ids_to_tokens(int(ids[place]))))
            continue
        start = max(0, place - 4)
        before, now = (tokenizer.decode(ids[start:end]) for end in (place, place + 1))
        found.append(now[len(before) :] if now.startswith(before) else tokenizer.decode(ids[place]))
    return found
