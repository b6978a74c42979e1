"""Examples and their tokens: reading, rendering, label masks, content ids, length-bucketed batches.

::

    read_examples(path) -> Examples -> tokenize(examples, tokenizer) -> TokenizedExamples
                                         plan_batches(tokens, budget) -> collate(tokens, indices) -> Batch

Every row becomes one token sequence of which a suffix is *supervised*: the completion with its
end-of-sequence token, the last assistant turn, or a whole text. Where that suffix starts is found from
character positions in the rendered string, never by comparing token ids, so a tokenizer whose padding token
is its end-of-sequence token needs no special case, and a token merged across the end of the prompt is
supervised because it spells part of the completion. The suffix reaches the end of the sequence, so no token
is kept after the last supervised one.

Shapes: n examples, T tokens in one of them (or in the longest of a batch), b rows in a batch.
"""

from __future__ import annotations

import hashlib
import json
import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from difflib import get_close_matches
from functools import cached_property
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, cast, overload

import numpy as np
import torch

from influence.errors import BadRow, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Batch",
    "Example",
    "Examples",
    "TokenizedExamples",
    "Tokens",
    "collate",
    "examples_from_rows",
    "plan_batches",
    "read_examples",
    "tokenize",
    "tokenizer_digest",
]

_CONTENT = ("prompt", "completion", "messages", "text")
_FORMATS = "a .jsonl, .json or .parquet file, or a folder saved by Dataset.save_to_disk"
_FORMS = "'prompt' and 'completion', or 'messages', or 'text'"
_ROWS_PER_CALL = 2048  # rows given to the tokenizer at once: enough for its threads, little memory


# ------------------------------------------------------------------------------------------------ examples


@dataclass(frozen=True)
class Example:
    """One row: an id, an optional group, and exactly one kind of content.

    Content is `prompt` with `completion`, or `messages` (mappings with at least `role` and `content`, the
    last one the assistant's), or `text`. Anything else is a DataError.
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
            raise DataError(f"example {self.id!r} has {_listed(given) or 'no content'}; give it {_FORMS}")

    @cached_property
    def content_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the content as canonical JSON, without id and group."""
        if self.messages is not None:
            content: dict[str, Any] = {"messages": [dict(message) for message in self.messages]}
        else:
            content = {key: getattr(self, key) for key in _CONTENT if getattr(self, key) is not None}
        return _sha256(_canonical(content))[:16]

    def preview(self, width: int = 60) -> str:
        """Return the content as one readable line of at most `width` characters, `prompt → completion`.

        Control characters become spaces, so a row cannot move a terminal's cursor.
        """
        if self.text is not None:
            return _clip(self.text, width)
        if self.messages is not None:
            *earlier, tail = [str(message["content"]) for message in self.messages]
            head = earlier[-1] if earlier else ""
        else:
            head, tail = self.prompt or "", self.completion or ""
        room = width - len(" → ")
        if not head.strip() or room < 4:
            return _clip(tail, width)
        head = _clip(head, max(room // 2, room - len(_clip(tail, room))))
        return f"{head} → {_clip(tail, room - len(head))}"


class Examples(Sequence[Example]):
    """An immutable sequence of examples; a slice of it is again `Examples`."""

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
        lines = (_canonical([example.id, example.content_hash, example.group]) for example in self._examples)
        return _sha256("\n".join(lines))

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {example.id: at for at, example in reversed(list(enumerate(self._examples)))}

    def index(self, id: str) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the position of the example with this id; an unknown one is a DataError with the nearest."""
        if id in self._positions:
            return self._positions[id]
        near = get_close_matches(str(id), self._positions, n=3)
        hint = f"the nearest are {_listed(near)}" if near else f"there are {_listed(self.ids[:3])} and others"
        raise DataError(f"no example has the id {id!r}, among {len(self)}; {hint}")

    def select(self, indices: Iterable[SupportsIndex]) -> Examples:
        """Return the examples at these positions, in this order; a position may repeat."""
        return Examples(self._examples[operator.index(i)] for i in indices)


# ------------------------------------------------------------------------------------------------ reading


def read_examples(path: str | PathLike[str]) -> Examples:
    """Read examples from JSON lines (.jsonl, .json), Parquet, or a folder saved by `datasets`.

    A row is `{"prompt", "completion"}` (strings), or `{"messages": [{"role", "content"}, ...]}` whose last
    message is the assistant's, or `{"text"}`; `id` (string or integer) and `group` are optional, other keys
    are ignored, and null means absent. A row without an id gets its content hash as id, the second of equal
    rows the hash with `#2`, the third `#3`.

    Errors: DataError for a missing, empty or unreadable file and for an unknown format; one DataError that
    lists every unusable row (its line number in JSON lines, else its row number) with the reason.
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
        raise DataError(f"{source} has the suffix {source.suffix!r}, which is not read; give {_FORMATS}")
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
    """Yield (line number, row), the row a BadRow if its line does not decode; blank lines are skipped."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text.startswith("[") and number == 1:
                    raise DataError(
                        f"{path} starts with '[': one JSON array; write one JSON object per line instead, "
                        'for example with jq -c ".[]"'
                    )
                if text:
                    yield number, json.loads(text)
            except UnicodeDecodeError as error:
                yield number, BadRow(number, None, f"not UTF-8 (byte {error.start + 1}: {error.reason})")
            except json.JSONDecodeError as error:
                yield number, BadRow(number, None, f"not JSON ({error.msg}, at character {error.colno})")
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
                yield number, BadRow(number, None, f"not JSON that can be read ({error})")


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
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
    split_file = path / "dataset_dict.json"
    if split_file.exists():
        try:
            splits = json.loads(split_file.read_text(encoding="utf-8"))["splits"]
        except (ValueError, KeyError, TypeError, OSError):
            splits = sorted(child.name for child in path.iterdir() if child.is_dir())
        first = f"; give one of them, for example {path / splits[0]}" if splits else ""
        raise DataError(f"{path} is a DatasetDict with the splits {_listed(splits)}{first}")
    if not (path / "state.json").exists():
        raise DataError(f"{path} is a folder without a saved dataset (it has no state.json); give {_FORMATS}")
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
    """Keep the columns that are read; none that holds content is an error."""
    if not set(names) & set(_CONTENT):
        raise DataError(f"{path} has the columns {_listed(names) or '(none)'}; expected {_FORMS}")
    return [name for name in names if name in (*_CONTENT, "id", "group")]


def _examples(rows: Iterable[tuple[int, object]], source: str) -> Examples:
    """Turn numbered rows into examples, or list all unusable ones; `source` is named in the headline."""
    parsed: list[Example | None] = []  # id "" = still without
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
                raise _UnusableError(f"not an object but {_kind(row)}; expected an object with {_FORMS}")
            name = _label(row, "id")
            if name is not None and first_with.setdefault(name, number) != number:
                raise _UnusableError(
                    f"its id is already that of row {first_with[name]}; "
                    "ids must differ: use `group` for what several rows share"
                )
            example = Example(id=name or "", group=_label(row, "group"), **_content(row))
            try:
                _ = example.content_hash
            except (TypeError, ValueError) as error:  # a date, bytes, or a lone surrogate, inside a message
                raise _UnusableError(f"a message holds what JSON cannot: {error}") from error
            parsed[-1] = example
        except _UnusableError as error:
            bad.append(BadRow(number, name, str(error)))
    if not parsed:
        raise DataError(f"there are no rows{source}; give at least one")
    if bad:
        raise DataError(f"{len(bad)} of {len(parsed)} rows{source} cannot be used:", bad)

    copies: Counter[str] = Counter()
    examples = []
    for example in cast(list[Example], parsed):
        if not example.id:
            content_hash = example.content_hash
            name = None
            while name is None or name in first_with:
                copies[content_hash] += 1
                copy = copies[content_hash]
                name = content_hash if copy == 1 else f"{content_hash}#{copy}"
            example = replace(example, id=name)
        examples.append(example)
    return Examples(examples)


class _UnusableError(Exception):
    """Why one row cannot be used."""


def _label(row: Mapping[str, Any], key: str) -> str | None:
    """Return `id` or `group` as a string."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, Integral)):
        raise _UnusableError(f"{key!r} must be a string or an integer, not {_kind(value)}")
    if value == "":
        raise _UnusableError(f"{key!r} is empty; leave it out or give it a value")
    label = str(value)
    if "\0" in label or not _is_unicode(label):
        raise _UnusableError(f"{key!r} holds a NUL or a lone surrogate, which no score file can store")
    return label


def _content(row: Mapping[str, Any]) -> dict[str, Any]:
    """Check the content of a row and return it as fields of Example."""
    given = [key for key in _CONTENT if row.get(key) is not None]
    forms = {"prompt" if key == "completion" else key for key in given}
    if not forms:
        raise _UnusableError(f"has no content, only the keys {_listed(row) or '(none)'}; expected {_FORMS}")
    if len(forms) > 1:
        raise _UnusableError(f"is ambiguous, with {_listed(given)}; keep one of: {_FORMS}")
    if "text" in forms:
        return {"text": _string(row["text"], "'text'")}
    if "messages" in forms:
        return {"messages": _messages(row["messages"])}
    for key in given:
        if isinstance(row[key], (list, tuple, Mapping)):
            raise _UnusableError(f"{key!r} is a conversation, not a string; put all its turns in 'messages'")
    for key, other in (("prompt", "completion"), ("completion", "prompt")):
        if key not in given:
            raise _UnusableError(f"has {other!r} but no {key!r}")
    return {
        "prompt": _string(row["prompt"], "'prompt'", may_be_empty=True),
        "completion": _string(row["completion"], "'completion'"),
    }


def _messages(messages: object) -> tuple[dict[str, Any], ...]:
    """Check a conversation; keys beyond role and content are kept for the template, nulls dropped."""
    if not isinstance(messages, (list, tuple)):
        raise _UnusableError(f"'messages' must be a list, not {_kind(messages)}")
    if not messages:
        raise _UnusableError("'messages' is empty; expected turns of which the last is the assistant's")
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise _UnusableError(f"message {number} must be an object, not {_kind(message)}")
        _string(message.get("role"), f"'role' of message {number}")
        last = number == len(messages)
        _string(message.get("content"), f"'content' of message {number}", may_be_empty=not last)
        checked.append({str(key): value for key, value in message.items() if value is not None})
    if checked[-1]["role"] != "assistant":
        raise _UnusableError(f"the last message is by {checked[-1]['role']!r}; it must be by 'assistant'")
    return tuple(checked)


def _string(value: object, name: str, may_be_empty: bool = False) -> str:
    if value is None:
        raise _UnusableError(f"{name} is missing")
    if not isinstance(value, str):
        raise _UnusableError(f"{name} must be a string, not {_kind(value)}")
    if not value and not may_be_empty:
        raise _UnusableError(f"{name} is empty; there is nothing to supervise")
    if not _is_unicode(value):
        raise _UnusableError(f"{name} holds a lone surrogate, which is not text")
    return str(value)


# ------------------------------------------------------------------------------------------------ tokenising


@dataclass(frozen=True, eq=False)
class Tokens:
    """One tokenised example.

    `input_ids` int64 [T]; `supervised` bool [T]: is token t a target. `supervised[0]` is False, because
    nothing precedes it to predict it from, and the last token is always supervised.
    """

    input_ids: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


class TokenizedExamples(Sequence[Tokens]):
    """The tokens of a sequence of examples, in the same order; a slice of it is again `TokenizedExamples`.

    `lengths` int64 [n]: tokens of each; `counts` int64 [n]: supervised tokens of each (the T_i of the
    convention, at least 1); `ids`: the examples' ids; `truncated`: how many lost supervised tokens to
    `max_length`.
    """

    def __init__(self, tokens: Iterable[Tokens], ids: Iterable[str], cut: Iterable[bool] = ()) -> None:
        self._tokens = tuple(tokens)
        self.ids = list(ids)
        self._cut = list(cut) or [False] * len(self._tokens)
        self.lengths = np.array([len(row.input_ids) for row in self._tokens], dtype=np.int64)
        self.counts = np.array([np.count_nonzero(row.supervised) for row in self._tokens], dtype=np.int64)

    @property
    def truncated(self) -> int:
        """How many of these examples lost some, not all, of their supervised tokens to `max_length`."""
        return sum(self._cut)

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Tokens: ...

    @overload
    def __getitem__(self, index: slice) -> TokenizedExamples: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Tokens | TokenizedExamples:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return self._tokens[operator.index(index)]

    def __iter__(self) -> Iterator[Tokens]:
        return iter(self._tokens)

    def select(self, indices: Iterable[SupportsIndex]) -> TokenizedExamples:
        """Return the examples at these positions, in this order; a position may repeat."""
        at = [operator.index(i) for i in indices]
        return TokenizedExamples(
            tokens=[self._tokens[i] for i in at],
            ids=[self.ids[i] for i in at],
            cut=[self._cut[i] for i in at],
        )


@dataclass(frozen=True)
class _Rendered:
    """A row as one string, and how to read it.

    Tokens that end after character `boundary` are supervised (-1: all are); a `chat` already carries its
    special tokens and its end of turn as text.
    """

    text: str
    boundary: int
    chat: bool


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> TokenizedExamples:
    """Render and tokenise examples, and mark the tokens that are targets.

    * prompt and completion: concatenated and tokenised once, as one string, with the special tokens the
      tokenizer adds; supervised from the first token that ends beyond the prompt; end-of-sequence appended
      and supervised, unless the last token is one already.
    * text: the same with every token supervised but the first.
    * messages: rendered by the tokenizer's chat template and tokenised without adding anything; supervised
      from where the template's own generation prompt ends or, if the template writes something else there
      before an answer, from where the answer starts. Templates that print today's date get 26 July 2024
      (the default of the Llama 3 templates), so that tokens do not depend on the day.

    A tokenizer without offsets (a slow one) supervises from the first token at which prompt and whole differ.
    `max_length` (tokens, the appended one included) cuts on the right.

    Errors: DataError without a chat template when a row has messages; one DataError that lists every row that
    its template refuses, and one that lists every row left without a supervised token. Warnings: a tokenizer
    without an end-of-sequence token; rows that lose some of their supervised tokens.
    """
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length is {max_length}; it must be at least 2, because a first token is never a target")
    rendered = _render(examples, tokenizer)
    if tokenizer.eos_token_id is None and not all(row.chat for row in rendered):
        warnings.warn(
            "the tokenizer has no end-of-sequence token, so none is appended; "
            "set tokenizer.eos_token if the adapter was trained with one",
            stacklevel=2,
        )
    tokens: list[Tokens] = []
    cut: list[bool] = []
    bad: list[BadRow] = []
    longest = 0
    for number, (ids, first) in enumerate(_encode(rendered, tokenizer), start=1):
        first = max(first, 1)
        length = len(ids)
        if first >= length or (max_length is not None and first >= max_length):
            bad.append(BadRow(number, examples[number - 1].id, _unsupervised(length, first, max_length)))
            continue
        cut.append(max_length is not None and length > max_length)
        longest = max(longest, length)
        input_ids = np.array(ids[:max_length], dtype=np.int64)
        tokens.append(Tokens(input_ids, np.arange(len(input_ids)) >= first))
    if bad:
        raise DataError(f"{len(bad)} of {len(examples)} rows have no supervised token:", bad)
    if any(cut):
        warnings.warn(
            f"{sum(cut)} of {len(examples)} rows are longer than max_length={max_length} and lose supervised "
            f"tokens at their end; max_length={longest} keeps them all",
            stacklevel=2,
        )
    return TokenizedExamples(tokens, examples.ids, cut)


def _unsupervised(length: int, first: int, max_length: int | None) -> str:
    """Say why a row of `length` tokens, supervised from position `first`, has no target left."""
    if first < length:
        return (
            f"max_length={max_length} cuts off all {length - first} supervised tokens of its {length}; "
            f"max_length={first + 1} keeps the first of them, max_length={length} all"
        )
    if length < 2:
        return f"it becomes {length} token{'s' * (length != 1)}, and a first token is never a target"
    return f"none of its {length} tokens lies after its prompt"


def _render(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[_Rendered]:
    """Write every example as one string."""
    conversations = sum(example.messages is not None for example in examples)
    if conversations:
        try:
            tokenizer.get_chat_template()
        except (ValueError, AttributeError) as error:
            raise DataError(
                f"{conversations} of {len(examples)} rows have messages, but the tokenizer has no chat "
                "template; set tokenizer.chat_template, load a tokenizer saved with one, or give the rows as "
                "prompt and completion"
            ) from error
    rendered: list[_Rendered] = []
    bad: list[BadRow] = []
    for number, example in enumerate(examples, start=1):
        if example.text is not None:
            rendered.append(_Rendered(example.text, -1, chat=False))
        elif example.messages is None:
            prompt, completion = cast(str, example.prompt), cast(str, example.completion)
            rendered.append(_Rendered(prompt + completion, len(prompt), chat=False))
        else:
            try:
                rendered.append(_render_chat(example.messages, tokenizer))
            except _UnusableError as error:
                bad.append(BadRow(number, example.id, str(error)))
    if bad:
        raise DataError(f"{len(bad)} of {len(examples)} rows cannot be rendered by the chat template:", bad)
    return rendered


def _render_chat(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> _Rendered:
    """Render a conversation and find where its last answer starts."""
    program = _without_clock(cast(str, tokenizer.get_chat_template()))

    def template(turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        return cast(
            str,
            tokenizer.apply_chat_template(
                cast(list[dict[str, str]], [dict(turn) for turn in turns]),
                chat_template=program,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            ),
        )

    # A template is a program of the model's author: it may refuse a conversation with any exception.
    try:
        whole = template(messages)
    except Exception as error:
        raise _UnusableError(f"the chat template refuses it: {error or type(error).__name__}") from error
    try:
        before = template(messages[:-1], add_generation_prompt=True)
    except Exception:  # many refuse a conversation without a user's turn
        before = None
    if before is not None and whole.startswith(before):
        return _Rendered(whole, len(before), chat=True)

    # Where would another answer stand? Asking the template is exact where searching for a short answer is not
    # ("end" occurs in "<|im_end|>"), and works for templates that strip or rewrite what they print.
    answer, marker = str(messages[-1]["content"]), "b1946ac92492d2347c6235b4d2611184"
    try:
        before, found, _ = template([*messages[:-1], {**messages[-1], "content": marker}]).partition(marker)
    except Exception:
        before, found = "", ""
    if found and whole.startswith(before):
        return _Rendered(whole, len(before), chat=True)
    boundary = whole.rfind(answer.strip() or answer)
    if boundary < 0:
        raise _UnusableError("the chat template does not print the last message, so its tokens are unknown")
    return _Rendered(whole, boundary, chat=True)


def _without_clock(program: str) -> str:
    """Give a chat template a fixed day: a macro of its own hides the clock that transformers lends it.

    The line break after the macro is eaten by the block before it, so a template renders as it did.
    """
    if "strftime_now" not in program:
        return program
    day = datetime(2024, 7, 26)
    replaced = "".join(f" | replace('%{d}', '{day.strftime('%' + d)}')" for d in "aAbBdeFHIjmMpSTyY")
    replaced += " | replace('%-d', '26') | replace('%-m', '7')"
    return "{%- macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}\n" + program


def _encode(rendered: Sequence[_Rendered], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], int]]:
    """Tokenise strings in large calls; return ids and the position of the first supervised token of each."""
    encoded: list[tuple[list[int], int]] = [([], 0)] * len(rendered)
    eos = cast("int | None", tokenizer.eos_token_id)
    for chat in (False, True):
        rows = [i for i, row in enumerate(rendered) if row.chat is chat]
        for start in range(0, len(rows), _ROWS_PER_CALL):
            part = rows[start : start + _ROWS_PER_CALL]
            found = _encode_part([rendered[i] for i in part], tokenizer)
            for i, (ids, first) in zip(part, found, strict=True):
                if not chat and eos is not None:
                    if not ids or ids[-1] != eos:
                        ids = [*ids, eos]
                    first = min(first, len(ids) - 1)
                encoded[i] = ids, first
    return encoded


def _encode_part(rendered: Sequence[_Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], int]]:
    """Tokenise rows of one kind in one call (two without offsets); as `_encode`, nothing appended yet."""

    def call(texts: list[str], offsets: bool = False) -> Mapping[str, Any]:
        return tokenizer(
            texts,
            add_special_tokens=not rendered[0].chat,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )

    if tokenizer.is_fast:
        out = call([row.text for row in rendered], offsets=True)
        for row, ids, spans in zip(rendered, out["input_ids"], out["offset_mapping"], strict=True):
            # Added special tokens span (0, 0): before the completion they do not count, after it they follow.
            ends_after = (t for t, (_, end) in enumerate(spans) if end > row.boundary)
            yield ids, next(ends_after, len(ids))
        return
    wholes = call([row.text for row in rendered])["input_ids"]
    prompts = call([row.text[: max(row.boundary, 0)] for row in rendered])["input_ids"]
    for row, ids, prompt in zip(rendered, wholes, prompts, strict=True):
        differs = (t for t, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b)
        yield ids, 0 if row.boundary < 0 else next(differs, min(len(ids), len(prompt)))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256, in hex, of everything that decides token ids or rendering.

    That is the tokenizer's own JSON (the sorted vocabulary of one that has none), the special token ids, the
    chat template, and what it makes of a probe with and without special tokens. Not the class, the name, or
    the truncation and padding state, which every call changes.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
    if backend is not None:
        rules: Any = json.loads(backend.to_str())
        for state in ("truncation", "padding"):
            rules.pop(state, None)
    else:
        rules = sorted(tokenizer.get_vocab().items())
    probe = "The 1st probe: naïve,\n  don't? 東京 🙂"
    calls = [
        tokenizer(probe, add_special_tokens=special, padding=False, truncation=False)["input_ids"]
        for special in (True, False)
    ]
    special_ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
    return _sha256(_canonical([rules, special_ids, getattr(tokenizer, "chat_template", None), calls]))


# ------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded rows, ready for a model.

    `indices` int64 [b]: the rows' positions in the tokenised examples; `input_ids` int64 [b, T];
    `attention_mask` int64 [b, T]: 1 for a token, 0 for padding; `supervised` bool [b, T]: is it a target;
    `position_ids` int64 [b, T]: 0, 1, ... over each row's own tokens, on whichever side it is padded.
    """

    indices: np.ndarray
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    supervised: torch.Tensor
    position_ids: torch.Tensor

    def to(self, device: str | torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        return Batch(
            indices=self.indices,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            supervised=self.supervised.to(device),
            position_ids=self.position_ids.to(device),
        )


def plan_batches(tokens: TokenizedExamples, token_budget: int, *, max_rows: int | None = None) -> list[np.ndarray]:
    """Group examples of similar length into batches of at most `token_budget` tokens, padding included.

    Returns the indices int64 [b] of each batch: every index once, rows x longest <= token_budget, and at most
    `max_rows` rows; an example longer than the budget is a batch of its own. The batch with the most padded
    tokens comes first, so that memory runs out at once or not at all. The plan depends on the lengths, counts
    and order of the examples alone.

    Errors: DataError for a budget or `max_rows` below 1.
    """
    for name, value in (("token_budget", token_budget), ("max_rows", max_rows)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")
    order = np.lexsort((np.arange(len(tokens)), -tokens.counts, -tokens.lengths))
    lengths = tokens.lengths[order]
    batches: list[tuple[int, np.ndarray]] = []
    start = 0
    while start < len(order):
        longest = max(int(lengths[start]), 1)
        rows = max(token_budget // longest, 1)
        batch = order[start : start + (rows if max_rows is None else min(rows, max_rows))]
        batches.append((len(batch) * longest, batch.astype(np.int64)))
        start += len(batch)
    return [batch for _, batch in sorted(batches, key=lambda sized: -sized[0])]


def collate(
    tokens: TokenizedExamples,
    indices: Sequence[int] | np.ndarray,
    *,
    pad_id: int = 0,
    padding: Literal["right", "left"] = "right",
    device: str | torch.device = "cpu",
) -> Batch:
    """Pad the examples at `indices` to the longest of them.

    Padding is masked by position, so any `pad_id` in the vocabulary does, the end-of-sequence id included.
    """
    if padding not in ("right", "left"):
        raise DataError(f"padding is {padding!r}; it must be 'right' or 'left'")
    at = np.asarray(indices, dtype=np.int64)
    if at.ndim != 1 or not len(at):
        raise DataError(f"a batch needs a list of at least one index, got the shape {at.shape}")
    rows = [tokens[i] for i in at]
    shape = len(rows), max(len(row) for row in rows)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    supervised = np.zeros(shape, dtype=bool)
    position_ids = np.tile(np.arange(shape[1], dtype=np.int64), (shape[0], 1))
    for r, row in enumerate(rows):
        start = shape[1] - len(row) if padding == "left" else 0
        span = slice(start, start + len(row))
        input_ids[r, span] = row.input_ids
        attention_mask[r, span] = 1
        supervised[r, span] = row.supervised
        position_ids[r] = np.maximum(position_ids[r] - start, 0)
    return Batch(
        indices=at,
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        supervised=torch.from_numpy(supervised),
        position_ids=torch.from_numpy(position_ids),
    ).to(device)


# ------------------------------------------------------------------------------------------------ small tools


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _listed(names: Iterable[object]) -> str:
    return ", ".join(repr(name) for name in names)


def _kind(value: object) -> str:
    """Name a value's type in words of the file, not of Python."""
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, Mapping):
        return "an object"
    names = {str: "a string", int: "an integer", float: "a number", list: "a list", tuple: "a list"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _clip(text: str, width: int) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else line[: max(width - 1, 0)].rstrip() + "…"
