"""Rows that carry other answers to their prompts, as TOFU's truth ratio needs them.

A paraphrase of the right answer, and wrong ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from influence.errors import BadRow, DataError
from influence.row_files import raw_rows, read_examples
from influence.rows import Example, Examples, examples_from_rows

#: Names under which a row may carry a paraphrase of its completion, and wrong ones: ours, then
#: TOFU's.
PARAPHRASED, PERTURBED = (
    ("paraphrased_completion", "paraphrased_answer"),
    ("perturbed_completions", "perturbed_answer"),
)


@dataclass(frozen=True, eq=False)
class Rows:
    """Examples and, where they carry them, other answers to their prompts.

    `paraphrased[i]` says what row i's completion says in other words, `perturbed[i]` are wrong
    answers of the paraphrase's form; None and () where row i has none.
    """

    examples: Examples
    paraphrased: tuple[str | None, ...] = field(repr=False)
    perturbed: tuple[tuple[str, ...], ...] = field(repr=False)

    def select(self, indices: Sequence[int]) -> Rows:
        """Some of the rows."""
        return Rows(
            self.examples.select(indices),
            tuple(self.paraphrased[i] for i in indices),
            tuple(self.perturbed[i] for i in indices),
        )


def read_rows(path: str | Path, columns: Mapping[str, str] | None = None) -> Rows:
    """Read rows as `influence.read_examples` does, and the other answers that they carry."""
    return _with_answers(read_examples(path, columns=columns), raw_rows(path))


def rows(records: Iterable[Mapping[str, Any]]) -> Rows:
    """Rows from Python records, with other answers.

    `paraphrased_completion` (string) and `perturbed_completions` (strings) stand where the
    completion does, as they are. Under TOFU's names, `paraphrased_answer` and `perturbed_answer`,
    they get the white space that the completion begins with. A row has both or neither. Raises
    `DataError` that lists every other row.
    """
    listed = list(records)
    return _with_answers(examples_from_rows(listed), listed)


def without_answers(examples: Examples) -> Rows:
    """Rows that carry other answers to their prompts, as TOFU's truth ratio needs them.

    A paraphrase of the right answer, and wrong ones.
    """
    return Rows(examples, (None,) * len(examples), ((),) * len(examples))


def _with_answers(examples: Examples, records: Iterable[Any]) -> Rows:
    paraphrased: list[str | None] = []
    perturbed: list[tuple[str, ...]] = []
    bad: list[BadRow] = []
    for number, (example, record) in enumerate(zip(examples, records, strict=True), start=1):
        (paraphrase, lead), (wrong, leads) = (
            _answer(example, record, names) for names in (PARAPHRASED, PERTURBED)
        )
        wrong_list = [wrong] if isinstance(wrong, str) else wrong
        if paraphrase is None and wrong_list is None:
            paraphrased.append(None)
            perturbed.append(())
        elif example.answer is None:
            kind = "a text has" if example.text is not None else "token ids have"
            reason = f"{kind} no completion that other answers could replace"
            bad.append(BadRow(number, example.id, reason))
        elif not (isinstance(paraphrase, str) and paraphrase and _strings(wrong_list)):
            bad.append(
                BadRow(
                    number,
                    example.id,
                    f"expected a string {PARAPHRASED[0]!r} and a list of strings "
                    f"{PERTURBED[0]!r}, all non-empty, or neither of them",
                )
            )
        else:
            paraphrased.append(lead + paraphrase)
            perturbed.append(tuple(leads + text for text in wrong_list))
    if bad:
        raise DataError(
            f"{len(bad)} of {len(examples)} rows have other answers that cannot be used:", bad
        )
    return Rows(examples, tuple(paraphrased), tuple(perturbed))


def _answer(example: Example, record: Mapping[str, Any], names: tuple[str, str]) -> tuple[Any, str]:
    """The value under the first name that is there, and what to put before it."""
    ours, theirs = (record.get(name) for name in names)
    if ours is not None or theirs is None:
        return ours, ""
    text = completion(example)
    return theirs, text[: len(text) - len(text.lstrip())]


def _strings(values: Any) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(text, str) and text for text in values)
    )


def completion(example: Example) -> str:
    """The text of a row that it is judged by: its completion, its last answer, or all of it.

    Empty for token ids.
    """
    return example.answer if example.answer is not None else example.text or ""


def answering(example: Example, text: str) -> Example:
    """The row with another completion."""
    return example.answering(text)
