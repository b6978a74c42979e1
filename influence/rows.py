"""Rows as they are used: one row, rows by id, and the checks of what is in them.

::

    source -> numbered rows (`row_files`) -> canonical keys (`row_forms`) -> Example -> Examples

`checked_examples` checks every row by the same rules, wherever it came from, and lists all that
cannot be used at once.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from numbers import Integral
from typing import Any, SupportsIndex, cast, overload

import numpy as np

from influence.errors import BadRow, DataError, UnusableRow
from influence.messages import kind_of, listed, one_line
from influence.row_content import CONTENT_KEYS, EXPECTED_CONTENT, IGNORED, content, is_unicode
from influence.row_forms import canonical_rows, checked_columns, read_columns

#: Keys of an answer that belong to what it said: another answer does not have them.
_OF_THE_ANSWER = ("tool_calls", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Example:
    """One row: an id, an optional group, and exactly one kind of content.

    Content is `prompt` with `completion`, or `messages` (mappings with at least `role` and, but for
    a turn that only calls a tool, `content`, the last one the assistant's), or `text`, or
    `input_ids`. Anything else is a DataError.

    Attributes
    ----------
    tools, template_options
        What the chat template of `messages` is given besides: JSON schemas, and keyword arguments.
    prompt_turns
        How many of the `messages` are the prompt, where the row says so.
    targets
        Whether each of the `input_ids` is a target. None: all are.
    document_lengths
        Lengths of the documents that the `input_ids` hold one after the other. None: they are one.
    shown
        The text before the targets of `input_ids` and theirs, for people alone: two rows that
        differ in it are equal.
    """

    id: str
    group: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = field(default=None, hash=False)
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] | None = field(default=None, hash=False)
    template_options: Mapping[str, Any] | None = field(default=None, hash=False)
    prompt_turns: int | None = None
    input_ids: Sequence[int] | None = None
    targets: Sequence[int] | None = None
    document_lengths: tuple[int, ...] | None = None
    shown: tuple[str, str] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        kinds = (*CONTENT_KEYS, "input_ids")
        given = tuple(key for key in kinds if getattr(self, key) not in (None, ()))
        if given not in (("prompt", "completion"), *((key,) for key in kinds[2:])):
            raise DataError(
                f"example {self.id!r} has {listed(given) or 'no content'}; give it {EXPECTED_CONTENT}"
            )

    @cached_property
    def content_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the content, without id and group."""
        return sha256_of_text(canonical_json(self.content()))[:16]

    def content(self) -> dict[str, Any]:
        """The content as a row of a file has it: `examples_from_rows` makes the same of it."""
        found: dict[str, Any] = {}
        if self.input_ids is not None:
            found["input_ids"] = list(self.input_ids)
            if self.targets is not None:
                targets, ids = np.asarray(self.targets, dtype=bool), np.asarray(self.input_ids)
                found["labels"] = np.where(targets, ids, IGNORED).tolist()
            if self.document_lengths is not None:
                found["seq_lengths"] = list(self.document_lengths)
        elif self.messages is not None:
            turns = [dict(message) for message in self.messages]
            if self.prompt_turns is None:
                found["messages"] = turns
            else:
                found["prompt"] = turns[: self.prompt_turns]
                found["completion"] = turns[self.prompt_turns :]
            if self.tools is not None:
                found["tools"] = [dict(tool) for tool in self.tools]
            if self.template_options is not None:
                found["chat_template_kwargs"] = dict(self.template_options)
        else:
            given = ((key, getattr(self, key)) for key in CONTENT_KEYS)
            found = {key: value for key, value in given if value is not None}
        return found

    @property
    def answer(self) -> str | None:
        """The completion, or what the last turn says. None for a text or token ids."""
        if self.messages is not None:
            return str(self.messages[-1].get("content", ""))
        return self.completion

    def answering(self, answer: str) -> Example:
        """The row with another answer. A row without one (`answer` is None) is a DataError."""
        if self.answer is None:
            kind = "one text" if self.text is not None else "token ids"
            raise DataError(f"row {self.id!r} is {kind}, without an answer that could be another")
        if self.messages is None:
            return replace(self, completion=answer)
        last = {key: value for key, value in self.messages[-1].items() if key not in _OF_THE_ANSWER}
        return replace(self, messages=(*self.messages[:-1], {**last, "content": answer}))

    def preview(self, width: int = 60) -> str:
        """Return the content as one line `prompt → completion` of at most `width` characters.

        Control characters become spaces, so a row cannot move a terminal's cursor.
        """
        if self.input_ids is not None and self.shown is None:
            first = " ".join(map(str, self.input_ids[:width]))
            return one_line(f"{len(self.input_ids)} token ids: {first}", width)
        if self.text is not None:
            return one_line(self.text, width)
        if self.shown is not None:
            head, tail = self.shown
        elif self.messages is not None:
            *earlier, tail = [_said(message) for message in self.messages]
            head = earlier[-1] if earlier else ""
        else:
            head, tail = self.prompt or "", self.completion or ""
        room = width - len(" → ")
        if not head.strip() or room < 4:
            return one_line(tail, width)
        head = one_line(head, max(room // 2, room - len(one_line(tail, room))))
        return f"{head} → {one_line(tail, room - len(head))}"


def _said(turn: Mapping[str, Any]) -> str:
    """What a turn says: its content, or the tool calls of one that only calls tools."""
    return str(turn.get("content") or canonical_json(turn.get("tool_calls", "")))


class Examples(Sequence[Example]):
    """An immutable sequence of examples, whose slices are `Examples` too."""

    def __init__(
        self,
        examples: Iterable[Example] = (),
        *,
        source: str | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self._examples = tuple(examples)
        #: What the rows are all of, so that `read_examples` opens it from anywhere: an absolute
        #: path, or the name of a data set of the hub with its commit.
        self.source = source
        #: The column map that they were read by.
        self.columns = columns

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self._examples[index])
        return self._examples[operator.index(index)]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    def __contains__(self, value: object) -> bool:
        return value in self._positions if isinstance(value, str) else value in self._examples

    def __eq__(self, other: object) -> bool:
        return self._examples == other._examples if isinstance(other, Examples) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._examples)

    def __repr__(self) -> str:
        return f"Examples({len(self)} rows, digest {self.digest[:12]})"

    @property
    def ids(self) -> list[str]:
        """The id of every example, in order."""
        return [example.id for example in self._examples]

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, over every id, content hash and group, in order."""
        found, between = hashlib.sha256(), b""
        for example in self._examples:
            line = canonical_json([example.id, example.content_hash, example.group])
            found.update(between + line.encode("utf-8"))
            between = b"\n"
        return found.hexdigest()

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {example.id: at for at, example in reversed(list(enumerate(self._examples)))}

    def index(self, id: str) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the position of the example with this id.

        An unknown id is a DataError that names the nearest ones.
        """
        if id in self._positions:
            return self._positions[id]
        near = get_close_matches(str(id), self._positions, n=3)
        hint = (
            f"the nearest are {listed(near)}"
            if near
            else f"there are {listed(self.ids[:3])} and others"
        )
        raise DataError(f"no example has the id {id!r}, among {len(self)}; {hint}")

    def select(self, indices: Iterable[SupportsIndex]) -> Examples:
        """Return the examples at these positions, in this order. A position may repeat."""
        return Examples(self._examples[operator.index(i)] for i in indices)


def examples_from_rows(
    rows: Iterable[Mapping[str, Any]], *, columns: Mapping[str, str] | None = None
) -> Examples:
    """Make examples from Python rows, by the rules and with the errors of `read_examples`.

    Rows may be mappings or a `datasets.Dataset`.
    """
    if isinstance(rows, (str, bytes, Mapping)):
        advice = "put a single row in a list, and read a file with read_examples"
        if hasattr(rows, "num_rows"):
            advice = f"give one of its splits, {listed(rows)}"
        raise DataError(f"expected an iterable of rows, got one {type(rows).__name__}; {advice}")
    named = checked_columns(columns)
    numbered: Iterable[tuple[int | str, object]] = enumerate(rows, start=1)
    if hasattr(rows, "with_format"):
        numbered = dataset_rows(rows, named, "")
    return Examples(checked_examples(canonical_rows(numbered, named, ""), ""))


def dataset_rows(
    dataset: Any, columns: Mapping[str, str] | None, source: str
) -> Iterator[tuple[int, object]]:
    """Yield (row number, row) of a `datasets.Dataset`, or of one that is streamed.

    A transform set on it (`with_transform`) is applied, as trainers do. `columns` are as in
    `read_columns`.
    """
    if not hasattr(dataset, "num_rows"):
        yield from enumerate(dataset.with_format(None), start=1)
        return
    if dataset.format["type"] == "custom":
        yield from enumerate(dataset, start=1)
        return
    wanted = read_columns(dataset.column_names, columns, source)
    # as Arrow holds them: nothing is decoded (audio), and no format makes arrays of lists
    table = dataset.select_columns(wanted).with_format("arrow")
    yield from arrow_rows(table.iter(batch_size=1000))


def arrow_rows(batches: Iterable[Any]) -> Iterator[tuple[int, object]]:
    """Yield (row number, row) of Arrow tables, a BadRow in place of one with JSON that is none.

    Arrow fills the objects of a column up to one set of keys, with nulls. They stay: chat templates
    print those inside tool calls and schemas, so trainers train on them. Columns of Arrow's type
    JSON, in which `datasets` keeps objects of different keys, become the objects.
    """
    number = 0
    for batch in batches:
        encoded = {field.name: field.type for field in batch.schema if _holds_json(field.type)}
        for row in batch.to_pylist():
            number += 1
            try:
                decoded = {key: _json_decoded(row[key], kind) for key, kind in encoded.items()}
            except (ValueError, RecursionError) as error:
                yield number, BadRow(number, None, f"a column of JSON holds no JSON ({error})")
                continue
            yield number, row | decoded


def _holds_json(kind: Any) -> bool:
    """Whether an Arrow type is JSON, or a list or struct with JSON in it."""
    if hasattr(kind, "key_type"):  # a map, which is a list of pairs and no object
        return False
    inner = (kind.field(k).type for k in range(kind.num_fields))
    return _is_json(kind) or any(map(_holds_json, inner))


def _is_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.json"


def _json_decoded(value: Any, kind: Any) -> Any:
    """A value of an Arrow type, with the JSON in it parsed."""
    if value is None or not _holds_json(kind):
        return value
    if _is_json(kind):
        return json.loads(value)
    if isinstance(value, dict):
        return {key: _json_decoded(item, kind.field(key).type) for key, item in value.items()}
    return [_json_decoded(item, kind.value_type) for item in value]


def checked_examples(rows: Iterable[tuple[int | str, object]], source: str) -> Iterator[Example]:
    """Turn numbered rows with canonical keys into examples, or list all unusable ones.

    `source` is named in the headline of the error.
    """
    parsed: list[Example | None] = []  # a row without an id has "" until all are read
    bad: list[BadRow] = []
    first_with: dict[str, int | str] = {}
    for number, row in rows:
        parsed.append(None)
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        name = None
        try:
            if not isinstance(row, Mapping):
                raise UnusableRow(
                    f"not an object but {kind_of(row)}; expected an object with {EXPECTED_CONTENT}"
                )
            name = _label(row, "id")
            if name is not None and first_with.setdefault(name, number) != number:
                raise UnusableRow(
                    f"its id is already that of row {first_with[name]}; "
                    "ids must differ: use `group` for what several rows share"
                )
            example = Example(id=name or "", group=_label(row, "group"), **content(row))
            try:
                _ = example.content_hash
            # a date, bytes, or a lone surrogate, inside a message
            except (TypeError, ValueError) as error:
                raise UnusableRow(f"a message holds what JSON cannot: {error}") from error
            parsed[-1] = example
        except UnusableRow as error:
            bad.append(BadRow(number, name, str(error)))
    if not parsed:
        raise DataError(f"there are no rows{source}; give at least one")
    if bad:
        raise DataError(f"{len(bad)} of {len(parsed)} rows{source} cannot be used:", bad)
    return _with_ids(cast(list[Example], parsed), first_with)


def _with_ids(examples: Iterable[Example], taken: Container[str]) -> Iterator[Example]:
    """Give every example without an id its content hash, with `#2`, `#3` where that is taken."""
    copies: Counter[str] = Counter()
    for example in examples:
        if example.id:
            yield example
            continue
        content_hash = example.content_hash
        name = None
        while name is None or name in taken:
            copies[content_hash] += 1
            copy = copies[content_hash]
            name = content_hash if copy == 1 else f"{content_hash}#{copy}"
        yield replace(example, id=name)


def _label(row: Mapping[str, Any], key: str) -> str | None:
    """Return `id` or `group` as a string."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, Integral)):
        raise UnusableRow(f"{key!r} must be a string or an integer, not {kind_of(value)}")
    if value == "":
        raise UnusableRow(f"{key!r} is empty; leave it out or give it a value")
    label = str(value)
    if "\0" in label or not is_unicode(label):
        raise UnusableRow(f"{key!r} holds a NUL or a lone surrogate, which no score file can store")
    return label


def is_label(value: Any) -> bool:
    """Whether a value can be an `id` or `group`."""
    try:
        return _label({"label": value}, "label") is not None
    except UnusableRow:
        return False


def canonical_json(value: object) -> str:
    """JSON with sorted keys and without spaces, so that equal values have equal hashes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def sha256_of_text(text: str) -> str:
    """SHA-256 of the text in UTF-8, 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
