"""The content of one row, checked: a pair, a text, a conversation, or ready token ids.

`content` takes a row as it is given and returns fields of `influence.rows.Example`. Everything that
changes what a trainer would render or supervise is kept, under the keys of Hugging Face trainers:

==========================================  ====================================================
keys of the row                             what they are
==========================================  ====================================================
`prompt`, `completion`                      two strings, or two lists of turns
`messages`                                  turns, of which the last is the assistant's
`text`                                      a string
`tools`, `chat_template_kwargs`             of a conversation: what its template is given besides
`input_ids`                                 token ids, which are taken in place of other content
`labels`, `completion_mask`,                which of the ids are targets; where several are
`assistant_masks`, `loss_mask`              there, all must say so; none: every one
`position_ids`, `seq_lengths`               the documents that one row of ids holds
`shown`                                     the text before the targets and theirs, for people alone
==========================================  ====================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, SupportsIndex, cast, overload

import numpy as np

from influence.errors import UnusableRow
from influence.messages import kind_of, listed

#: The keys of a row that hold content, of which a row has one kind.
CONTENT_KEYS = ("prompt", "completion", "messages", "text")
#: The masks of a row of token ids beside its `labels`.
MASKS = ("completion_mask", "assistant_masks", "loss_mask")
#: The keys of a row of ready token ids.
TOKEN_KEYS = (
    *("input_ids", "attention_mask", "labels", *MASKS, "position_ids", "seq_lengths", "shown"),
)
#: All keys of a row that are read.
ROW_KEYS = ("id", "group", *CONTENT_KEYS, "tools", "chat_template_kwargs", *TOKEN_KEYS)
#: What a row may hold, for messages.
EXPECTED_CONTENT = "'prompt' and 'completion', or 'messages', or 'text'"
#: Keys of a turn that mark it as no target where they are false or 0.
TURN_FLAGS = ("train", "weight", "loss")
#: The label of a token that is no target.
IGNORED = -100
#: Names that a template cannot be given by a row: the program and its data are not the row's.
_RESERVED = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("tokenizer_kwargs", "processor_kwargs", "sanitize_control_tokens"),
    )
)


def content(row: Mapping[str, Any]) -> dict[str, Any]:
    """Check the content of a row and return it as fields of Example.

    Errors: UnusableRow with the reason.
    """
    if row.get("input_ids") is not None:
        return _token_ids(row)
    given = [key for key in CONTENT_KEYS if row.get(key) is not None]
    forms = {"prompt" if key == "completion" else key for key in given}
    if not forms:
        raise UnusableRow(
            f"has no content, only the keys {listed(row) or '(none)'}; expected {EXPECTED_CONTENT}"
        )
    if len(forms) > 1:
        raise UnusableRow(f"is ambiguous, with {listed(given)}; keep one of: {EXPECTED_CONTENT}")
    if "text" in forms:
        return {"text": _string(row["text"], "'text'")}
    if "messages" in forms:
        return {"messages": _messages(row["messages"]), **_beside_messages(row)}
    for key, partner in (("prompt", "completion"), ("completion", "prompt")):
        if key not in given:
            raise UnusableRow(f"has {partner!r} but no {key!r}")
    if any(isinstance(row[key], (list, tuple)) for key in given):
        return _conversation_in_two_parts(row)
    return {
        "prompt": _string(row["prompt"], "'prompt'", may_be_empty=True),
        "completion": _string(row["completion"], "'completion'"),
    }


# ---- conversations -------------------------------------------------------------------------------


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
        turn = message.get("content")
        if not (turn in (None, "") and message.get("tool_calls")):  # a turn may only call a tool
            last = number == len(messages)
            _string(turn, f"'content' of message {number}", may_be_empty=not last)
        checked.append({str(key): value for key, value in message.items() if value is not None})
    if checked[-1]["role"] != "assistant":
        raise UnusableRow(
            f"the last message is by {checked[-1]['role']!r}; it must be by 'assistant'"
        )
    return tuple(checked)


def _conversation_in_two_parts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Check turns of a prompt and of its completion, which are one conversation."""
    for key in ("prompt", "completion"):
        if not isinstance(row[key], (list, tuple)):
            raise UnusableRow(
                f"{key!r} is {kind_of(row[key])} where the other one is a conversation; give two "
                "strings or two lists of turns"
            )
        if not row[key]:
            raise UnusableRow(f"{key!r} is empty; expected at least one turn")
    turns = [*row["prompt"], *row["completion"]]
    prompt_turns = len(row["prompt"])
    return {"messages": _messages(turns), "prompt_turns": prompt_turns, **_beside_messages(row)}


def _beside_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """Check what a chat template is given beside the turns. A JSON string of it is parsed."""
    found: dict[str, Any] = {}
    tools = _parsed(row.get("tools"), "'tools'")
    if tools is not None:
        if not isinstance(tools, (list, tuple)):
            raise UnusableRow(f"'tools' must be a list of JSON schemas, not {kind_of(tools)}")
        for number, tool in enumerate(tools, start=1):
            if not isinstance(tool, Mapping):
                raise UnusableRow(f"tool {number} must be an object, not {kind_of(tool)}")
        found["tools"] = tuple(tools)
    options = _parsed(row.get("chat_template_kwargs"), "'chat_template_kwargs'")
    if options is not None:
        if not isinstance(options, Mapping):
            raise UnusableRow(f"'chat_template_kwargs' must be an object, not {kind_of(options)}")
        if taken := sorted(set(map(str, options)) & _RESERVED):
            raise UnusableRow(
                f"'chat_template_kwargs' has {listed(taken)}, which no row can set; leave it out"
            )
        found["template_options"] = {str(key): value for key, value in options.items()}
    return found


def _parsed(value: object, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UnusableRow(f"{name} is a string that is no JSON ({error})") from error


def _string(value: object, name: str, may_be_empty: bool = False) -> str:
    if value is None:
        raise UnusableRow(f"{name} is missing")
    if not isinstance(value, str):
        raise UnusableRow(f"{name} must be a string, not {kind_of(value)}")
    if not value and not may_be_empty:
        raise UnusableRow(f"{name} is empty; there is nothing to supervise")
    if not is_unicode(value):
        raise UnusableRow(f"{name} holds a lone surrogate, which is not text")
    return str(value)


def is_unicode(text: str) -> bool:
    """Whether a string is text: it holds no lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ---- token ids -----------------------------------------------------------------------------------


class PerToken(Sequence[int]):
    """A whole number, or a boolean, for each token of a row: an array that nothing can change.

    It equals, and hashes as, the tuple of its values.
    """

    def __init__(self, values: np.ndarray) -> None:
        small = values.dtype.kind != "b" and not (values >> 31).any()
        self._array = values.astype(np.int32 if small else values.dtype)
        self._array.setflags(write=False)

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> PerToken: ...

    def __getitem__(self, index: SupportsIndex | slice) -> int | PerToken:
        found = self._array[index]
        return PerToken(found) if isinstance(index, slice) else found.item()

    def __iter__(self) -> Iterator[int]:
        return iter(self._array.tolist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PerToken):
            return np.array_equal(self._array, other._array)
        return self._array.tolist() == list(other) if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._array, dtype) if copy else np.asarray(self._array, dtype)


def _token_ids(row: Mapping[str, Any]) -> dict[str, Any]:
    """Check a row of token ids. Its other content is what they were made from, and unread."""
    ids = _integers(row["input_ids"], "input_ids")
    if not len(ids):
        raise UnusableRow("'input_ids' is empty; there is nothing to supervise")
    if ids.min() < 0:
        raise UnusableRow(f"'input_ids' holds {ids.min()}; token ids are at least 0")
    targets = np.ones(len(ids), dtype=bool)
    for key in ("labels", *MASKS):
        if row.get(key) is not None:
            values = _integers(row[key], key, len(ids))
            targets &= _labelled(values, ids) if key == "labels" else values != 0
    if row.get("attention_mask") is not None:
        seen = _integers(row["attention_mask"], "attention_mask", len(ids))
        end = int(np.flatnonzero(targets)[-1]) + 1 if targets.any() else 0
        if not seen[:end].all():
            raise UnusableRow(
                "'attention_mask' hides tokens before the last target; give ids without padding"
            )
    lengths = _documents(row, len(ids))
    shown = row.get("shown")
    if shown is not None and not (
        isinstance(shown, (list, tuple)) and [type(text) for text in shown] == [str, str]
    ):
        raise UnusableRow("'shown' must be two strings, the text before the targets and theirs")
    return {
        "input_ids": PerToken(ids),
        "targets": None if targets.all() else PerToken(targets),
        "shown": None if shown is None else tuple(shown),
        "document_lengths": None if lengths is None or len(lengths) == 1 else lengths,
    }


def _labelled(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Which labels are targets. A label that is another token than its input is an error."""
    others = np.flatnonzero((labels != ids) & (labels != IGNORED))
    if len(others):
        place = others[0]
        raise UnusableRow(
            f"'labels' has {labels[place]} at position {place}, where 'input_ids' has "
            f"{ids[place]}; expected the same id, or {IGNORED} where it is no target (they are "
            "shifted by the loss)"
        )
    return labels != IGNORED


def _documents(row: Mapping[str, Any], length: int) -> tuple[int, ...] | None:
    """The lengths of the documents in a row of `length` ids. None where it does not say."""
    found = None
    if row.get("seq_lengths") is not None:
        found = tuple(_integers(row["seq_lengths"], "seq_lengths").tolist())
        if any(size < 1 for size in found) or sum(found) != length:
            raise UnusableRow(
                f"'seq_lengths' are {list(found)[:5]} and sum to {sum(found)}; expected positive "
                f"lengths that sum to the {length} of 'input_ids'"
            )
    if row.get("position_ids") is not None:
        positions = _integers(row["position_ids"], "position_ids", length)
        starts = np.union1d(0, np.flatnonzero(positions == 0))
        sizes = np.diff(starts, append=length)
        if not np.array_equal(positions, np.arange(length) - np.repeat(starts, sizes)):
            raise UnusableRow(
                "'position_ids' do not count 0, 1, 2 ... from the start of each document"
            )
        lengths = tuple(sizes.tolist())
        if found is not None and found != lengths:
            raise UnusableRow("'position_ids' and 'seq_lengths' tell of different documents")
        found = lengths
    return found


def _integers(values: object, name: str, length: int | None = None) -> np.ndarray:
    """A list of whole numbers as int64, of this length if one is given. Masks may be booleans."""
    array = None
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iub":
        array = values if np.can_cast(values.dtype, np.int64) else None
    if array is None and hasattr(values, "tolist"):  # an array of something else, or a tensor
        values = values.tolist()  # type: ignore[attr-defined]
    if array is None and not isinstance(values, (list, tuple)):
        raise UnusableRow(f"{name!r} must be a list of integers, not {kind_of(values)}")
    items = array if array is not None else cast(Sequence[Any], values)
    # one look at each kind of value, where a look at each value takes seconds
    kinds = {array.dtype.type} if array is not None else {*map(type, items)}
    refused = {
        kind
        for kind in kinds
        if not issubclass(kind, (Integral, np.bool_))
        or (issubclass(kind, (bool, np.bool_)) and name not in ("attention_mask", *MASKS))
    }
    for place, value in enumerate(items if refused else ()):
        if type(value) in refused:
            kind = kind_of(value.item() if isinstance(value, np.generic) else value)
            raise UnusableRow(f"{name!r} has {kind} at position {place}, not an integer")
    if length is not None and len(items) != length:
        raise UnusableRow(f"{name!r} has {len(items)} entries for {length} of 'input_ids'")
    for bound in (max(items, default=0), min(items, default=0)) if array is None else ():
        if not -(2**63) <= bound < 2**63:
            raise UnusableRow(f"{name!r} holds {bound}; expected less than 2^63 in magnitude")
    return np.array(items, dtype=np.int64)
