"""Rows as they are given: one row, rows by id, and reading them from files.

::

    file or Python rows -> numbered rows -> content checked -> Example -> Examples

A reader of a format yields `(number, row)`: the number that a person sees (the line in JSON lines)
and the row as a mapping, or a `BadRow` where it cannot be decoded. `_examples` then checks every
row by the same rules and lists all that cannot be used at once. A new format is one more reader
and one more line in `read_examples`.
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
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex, cast, overload

from influence.errors import BadRow, DataError, UnusableRow
from influence.messages import kind_of, listed, one_line

#: The keys of a row that hold content, of which a row has one kind.
_CONTENT = ("prompt", "completion", "messages", "text")
#: What may be given to `read_examples`, for messages.
_FORMATS = "a .jsonl, .json or .parquet file, or a folder saved by Dataset.save_to_disk"
#: What a row may hold, for messages.
_FORMS = "'prompt' and 'completion', or 'messages', or 'text'"


@dataclass(frozen=True)
class Example:
    """One row: an id, an optional group, and exactly one kind of content.

    Content is `prompt` with `completion`, or `messages` (mappings with at least `role` and
    `content`, the last one the assistant's), or `text`. Anything else is a DataError.
    """

    id: str
    group: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = field(default=None, hash=False)
    text: str | None = None

    def __post_init__(self) -> None:
        given = tuple(key for key in _CONTENT if getattr(self, key) not in (None, ()))
        if given not in (("prompt", "completion"), ("messages",), ("text",)):
            raise DataError(
                f"example {self.id!r} has {listed(given) or 'no content'}; give it {_FORMS}"
            )

    @cached_property
    def content_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the content, without id and group."""
        return sha256_of_text(canonical_json(self.content()))[:16]

    def content(self) -> dict[str, Any]:
        """The content as a row of a file has it: `examples_from_rows` makes the same of it."""
        if self.messages is not None:
            return {"messages": [dict(message) for message in self.messages]}
        given = ((key, getattr(self, key)) for key in _CONTENT)
        return {key: value for key, value in given if value is not None}

    def preview(self, width: int = 60) -> str:
        """Return the content as one line `prompt → completion` of at most `width` characters.

        Control characters become spaces, so a row cannot move a terminal's cursor.
        """
        if self.text is not None:
            return one_line(self.text, width)
        if self.messages is not None:
            *earlier, tail = [str(message["content"]) for message in self.messages]
            head = earlier[-1] if earlier else ""
        else:
            head, tail = self.prompt or "", self.completion or ""
        room = width - len(" → ")
        if not head.strip() or room < 4:
            return one_line(tail, width)
        head = one_line(head, max(room // 2, room - len(one_line(tail, room))))
        return f"{head} → {one_line(tail, room - len(head))}"


class Examples(Sequence[Example]):
    """An immutable sequence of examples, whose slices are `Examples` too."""

    def __init__(self, examples: Iterable[Example] = (), *, source: str | None = None) -> None:
        self._examples = tuple(examples)
        self.source = source  #: absolute path the rows were read from, if they are all of a file

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
        lines = (
            canonical_json([example.id, example.content_hash, example.group])
            for example in self._examples
        )
        return sha256_of_text("\n".join(lines))

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


def read_examples(path: str | PathLike[str]) -> Examples:
    """Read examples from JSON lines (.jsonl, .json), Parquet, or a folder saved by `datasets`.

    A row is `{"prompt", "completion"}` (strings), or `{"messages": [{"role", "content"}, ...]}`
    whose last message is the assistant's, or `{"text"}`; `id` (string or integer) and `group` are
    optional, other keys are ignored, and null means absent. A row without an id gets its content
    hash as id, the second of equal rows the hash with `#2`, the third `#3`.

    Errors: DataError for a missing, empty or unreadable file and for an unknown format; one
    DataError that lists every unusable row (its line number in JSON lines, else its row number)
    with the reason.
    """
    source = Path(path)
    if source.is_dir():
        rows = _dataset_rows(source)
    elif not source.exists():
        raise DataError(f"{source} does not exist; give {_FORMATS}")
    elif source.suffix.lower() in (".jsonl", ".json"):
        rows = _json_rows(source)
    elif source.suffix.lower() == ".parquet":
        rows = _parquet_rows(source)
    else:
        raise DataError(
            f"{source} has the suffix {source.suffix!r}, which is not read; give {_FORMATS}"
        )
    return Examples(_examples(rows, f" of {source}"), source=str(source.resolve()))


def examples_from_rows(rows: Iterable[Mapping[str, Any]]) -> Examples:
    """Make examples from Python rows, by the rules and with the errors of `read_examples`."""
    if isinstance(rows, (str, bytes, Mapping)):
        raise DataError(
            f"expected an iterable of rows, got one {type(rows).__name__}; "
            "put a single row in a list, and read a file with read_examples"
        )
    return _examples(enumerate(rows, start=1), "")


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line number, row), a BadRow in place of a line that does not decode.

    Blank lines are skipped and counted, so numbers are those of an editor.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text.startswith("[") and number == 1:
                    raise DataError(
                        f"{path} starts with '[': one JSON array; write one JSON object per line "
                        'instead, for example with jq -c ".[]"'
                    )
                if text:
                    yield number, json.loads(text)
                continue
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 (byte {error.start + 1}: {error.reason})"
            except json.JSONDecodeError as error:
                reason = f"not JSON ({error.msg}, at character {error.colno})"
            # a number of 5,000 digits, or 100,000 brackets
            except (ValueError, RecursionError) as error:
                reason = f"not JSON that can be read ({error})"
            yield number, BadRow(number, None, reason)


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (row number, row) of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow.names, path)
            batches = file.iter_batches(columns=columns)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def _dataset_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (row number, row) of a folder saved by `Dataset.save_to_disk`."""
    split_file = path / "dataset_dict.json"
    if split_file.exists():
        try:
            splits = json.loads(split_file.read_text(encoding="utf-8"))["splits"]
        except (ValueError, KeyError, TypeError, OSError):
            splits = sorted(child.name for child in path.iterdir() if child.is_dir())
        first = f"; give one of them, for example {path / splits[0]}" if splits else ""
        raise DataError(f"{path} is a DatasetDict with the splits {listed(splits)}{first}")
    if not (path / "state.json").exists():
        raise DataError(
            f"{path} is a folder without a saved dataset (it has no state.json); give {_FORMATS}"
        )
    import datasets

    try:
        dataset = cast(datasets.Dataset, datasets.load_from_disk(str(path)))
    except Exception as error:  # whatever a damaged folder makes of `datasets`
        raise DataError(f"{path} is not a readable `datasets` folder: {error}") from error
    dataset = dataset.with_format(None).select_columns(_columns(dataset.column_names, path))
    number = 0
    for batch in dataset.iter(batch_size=1000):
        columns = cast(Mapping[str, list[Any]], batch)
        for values in zip(*columns.values(), strict=True):
            number += 1
            yield number, dict(zip(columns, values, strict=True))


def _columns(names: Sequence[str], path: Path) -> list[str]:
    """Return the columns that are read. Names without content are a DataError."""
    if not set(names) & set(_CONTENT):
        raise DataError(f"{path} has the columns {listed(names) or '(none)'}; expected {_FORMS}")
    return [name for name in names if name in (*_CONTENT, "id", "group")]


def _examples(rows: Iterable[tuple[int, object]], source: str) -> Examples:
    """Turn numbered rows into examples, or list all unusable ones.

    `source` is named in the headline of the error.
    """
    parsed: list[Example | None] = []  # a row without an id has "" until all are read
    bad: list[BadRow] = []
    first_with: dict[str, int] = {}
    for number, row in rows:
        parsed.append(None)
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        name = None
        try:
            if not isinstance(row, Mapping):
                raise UnusableRow(
                    f"not an object but {kind_of(row)}; expected an object with {_FORMS}"
                )
            name = _label(row, "id")
            if name is not None and first_with.setdefault(name, number) != number:
                raise UnusableRow(
                    f"its id is already that of row {first_with[name]}; "
                    "ids must differ: use `group` for what several rows share"
                )
            example = Example(id=name or "", group=_label(row, "group"), **_content(row))
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
    return Examples(_with_ids(cast(list[Example], parsed), first_with))


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
    if "\0" in label or not _is_unicode(label):
        raise UnusableRow(f"{key!r} holds a NUL or a lone surrogate, which no score file can store")
    return label


def _content(row: Mapping[str, Any]) -> dict[str, Any]:
    """Check the content of a row and return it as fields of Example."""
    given = [key for key in _CONTENT if row.get(key) is not None]
    forms = {"prompt" if key == "completion" else key for key in given}
    if not forms:
        raise UnusableRow(
            f"has no content, only the keys {listed(row) or '(none)'}; expected {_FORMS}"
        )
    if len(forms) > 1:
        raise UnusableRow(f"is ambiguous, with {listed(given)}; keep one of: {_FORMS}")
    if "text" in forms:
        return {"text": _string(row["text"], "'text'")}
    if "messages" in forms:
        return {"messages": _messages(row["messages"])}
    for key in given:
        if isinstance(row[key], (list, tuple, Mapping)):
            raise UnusableRow(
                f"{key!r} is a conversation, not a string; put all its turns in 'messages'"
            )
    for key, partner in (("prompt", "completion"), ("completion", "prompt")):
        if key not in given:
            raise UnusableRow(f"has {partner!r} but no {key!r}")
    return {
        "prompt": _string(row["prompt"], "'prompt'", may_be_empty=True),
        "completion": _string(row["completion"], "'completion'"),
    }


def _messages(messages: object) -> tuple[dict[str, Any], ...]:
    """Check a conversation.

    Keys beyond role and content are kept for the chat template, nulls are dropped.
    """
    if not isinstance(messages, (list, tuple)):
        raise UnusableRow(f"'messages' must be a list, not {kind_of(messages)}")
    if not messages:
        raise UnusableRow(
            "'messages' is empty; expected turns of which the last is the assistant's"
        )
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise UnusableRow(f"message {number} must be an object, not {kind_of(message)}")
        _string(message.get("role"), f"'role' of message {number}")
        last = number == len(messages)
        _string(message.get("content"), f"'content' of message {number}", may_be_empty=not last)
        checked.append({str(key): value for key, value in message.items() if value is not None})
    if checked[-1]["role"] != "assistant":
        raise UnusableRow(
            f"the last message is by {checked[-1]['role']!r}; it must be by 'assistant'"
        )
    return tuple(checked)


def _string(value: object, name: str, may_be_empty: bool = False) -> str:
    if value is None:
        raise UnusableRow(f"{name} is missing")
    if not isinstance(value, str):
        raise UnusableRow(f"{name} must be a string, not {kind_of(value)}")
    if not value and not may_be_empty:
        raise UnusableRow(f"{name} is empty; there is nothing to supervise")
    if not _is_unicode(value):
        raise UnusableRow(f"{name} holds a lone surrogate, which is not text")
    return str(value)


def canonical_json(value: object) -> str:
    """JSON with sorted keys and without spaces, so that equal values have equal hashes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def sha256_of_text(text: str) -> str:
    """SHA-256 of the text in UTF-8, 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
