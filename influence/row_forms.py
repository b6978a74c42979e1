"""Rows in forms of others, such as ShareGPT and alpaca, as rows with this toolkit's own keys.

::

    {"conversations": [{"from", "value"}, ...]}        -> {"messages": [{"role", "content"}, ...]}
    {"instruction", "input", "output"}                 -> a user turn and an assistant turn
    {"question", "answer"}, {"query", "response"} ...  -> the same
    {"chosen", "rejected"}                             -> refused: which answer was trained on?

Trainers that take such rows as they are make chat turns of them (LLaMA-Factory's alpaca and
ShareGPT converters, TRL's examples for question and answer), so that is what they become here. A
row with its own keys and a column map, which names what is what, is read as it stands.

What a row holds beyond its content is handed on under its own name, refused, or named in a note:
nothing that changes how a row is rendered or weighed is dropped in silence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from influence.errors import BadRow, DataError, UnusableRow
from influence.messages import kind_of, listed
from influence.progress import say
from influence.row_content import TOKEN_KEYS

#: The ways to write a row's content that need no reading: the keys of each.
CANONICAL = (
    ("prompt", "completion"),
    ("messages",),
    ("text",),
    TOKEN_KEYS,
)
#: Of these, the keys without which there is no content.
HEADS = ("prompt", "completion", "messages", "text", "input_ids")
#: Keys that go with content of any kind.
BESIDE = ("id", "group", "system", "tools", "chat_template_kwargs")
#: Keys that mean more than text. A row in which one holds something is refused.
MEDIA = ("images", "videos", "audio")
#: Keys that trainers weigh or render rows by, and that a row's content here does not have.
UNUSED = ("system", "documents", "weight", "train", "chosen", "rejected")
#: Speakers of ShareGPT, and the roles that chat templates know.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Form:
    """A way in which others write a row.

    Attributes
    ----------
    keys : tuple of str
        The keys that a row of this form has.
    more : tuple of str
        Keys that such a row may have, and that go into its turns.
    messages : callable
        Makes the turns of a row, else `UnusableRow`.
    becomes : str
        What that is, for the note.
    """

    keys: tuple[str, ...]
    more: tuple[str, ...]
    messages: Callable[[Mapping[str, Any]], list[dict[str, Any]]]
    becomes: str

    @property
    def all_keys(self) -> tuple[str, ...]:
        """The keys that a row of this form has or may have."""
        return (*self.keys, *self.more)


@dataclass(frozen=True)
class Recognised:
    """A row with canonical keys, what was recognised in it, and its keys that nothing uses."""

    row: Mapping[str, Any]
    form: str | None = None
    unused: tuple[str, ...] = ()


def canonical_row(
    row: Mapping[str, Any], columns: Mapping[str, str] | None = None
) -> Mapping[str, Any]:
    """Return a row with `prompt` and `completion`, `messages`, `text` or `input_ids`.

    A row in no form that is known is returned as it is. `columns` are as in `read_examples`.

    Raises
    ------
    UnusableRow
        For a row that is ambiguous, a preference pair, more than text, or of a known form with
        something in it that cannot be read.
    """
    return recognised(row, checked_columns(columns)).row


def canonical_rows(
    rows: Iterable[tuple[int | str, object]],
    columns: Mapping[str, str],
    source: str,
    *,
    again: bool = False,
) -> Iterator[tuple[int | str, object]]:
    """Yield numbered rows with canonical keys, a BadRow in place of one that cannot be read.

    What was recognised, and which keys are not used, is said once at the end, with counts and
    `source`. With `again`, rows that were read before are read as they were then: without notes,
    and by their canonical keys wherever they have them.

    Errors: DataError at the end where a column that `columns` names was in no row.
    """
    forms: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    missing = dict(columns)
    seen: dict[str, None] = {}
    for number, row in rows:
        if not isinstance(row, Mapping):
            yield number, row
            continue
        missing = {key: column for key, column in missing.items() if column not in row}
        if missing:
            seen |= dict.fromkeys(map(str, row))
        try:
            found = recognised(row, columns, again=again)
        except UnusableRow as error:
            name = row.get(columns.get("id", "id"))
            yield number, BadRow(number, None if name is None else str(name), str(error))
            continue
        forms.update([found.form] if found.form else [])
        unused.update(found.unused)
        yield number, found.row
    if missing and seen:
        refuse_missing(missing, seen, source)
    if not again:
        for text, count in forms.items():
            say(f"note: {_rows(count)}{source} {text}")
        for key, count in unused.items():
            say(f"note: {key!r} of {_rows(count)}{source} is not used")


def recognised(
    row: Mapping[str, Any], columns: Mapping[str, str], *, again: bool = False
) -> Recognised:
    """Read one row, with columns that were checked. See `canonical_row` and `canonical_rows`."""
    named = _renamed(row, columns) if columns else row
    own = [keys for keys in CANONICAL if _heads(named, keys)]
    if again and own:
        return Recognised(_decoded(named)[0])
    for key in MEDIA:
        value = row.get(key)
        if value is not None and not (isinstance(value, (list, tuple)) and not value):
            raise UnusableRow(f"holds {key!r}, and models of text alone are read: leave it out")
    forms = _forms_of(named)
    if len(own) + len(forms) > 1 and forms:
        given = [_heads(named, keys) for keys in own]
        ways = [listed(keys) for keys in (*given, *(form.keys for form in forms))]
        first = (given[0] if given else forms[0].keys)[0]
        raise UnusableRow(
            f"is ambiguous, with {' and '.join(ways)}; say which is meant with --columns, as in "
            f"--columns {first}={first}"
        )
    _refuse_preferences(named)
    used = {*columns.values(), *(forms[0].all_keys if forms else ())}
    unused = tuple(key for key in UNUSED if row.get(key) is not None and key not in used)
    if not forms:
        decoded, what = _decoded(named)
        return Recognised(decoded, what, unused)
    form = forms[0]
    beside = {key: value for key, value in named.items() if key not in form.all_keys}
    decoded, _ = _decoded({**beside, "messages": form.messages(named)})
    return Recognised(decoded, f"with {listed(form.keys)}: {form.becomes}", unused)


# ---- columns -----------------------------------------------------------------------------------


def checked_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """Return a column map that names known keys of one way to write a row, else DataError."""
    if columns is None:
        return {}
    if not isinstance(columns, Mapping) or not all(
        isinstance(text, str) and text for pair in columns.items() for text in pair
    ):
        raise DataError(
            f"columns {columns!r} were given; expected names by key, as in "
            "{'prompt': 'question', 'completion': 'answer'}"
        )
    unknown = [key for key in columns if key not in (*BESIDE, *WRITTEN_KEYS)]
    if unknown:
        raise DataError(
            f"columns name {listed(unknown)}; expected KEY=COLUMN with one of the keys "
            f"{', '.join((*BESIDE, *WRITTEN_KEYS))}"
        )
    content = [key for key in columns if key in WRITTEN_KEYS]
    if content and not _content_keys(columns):
        raise DataError(
            f"columns name {listed(content)}, which are keys of different ways to write a row; "
            "name those of one, as in prompt and completion"
        )
    return dict(columns)


def read_columns(names: Iterable[str], columns: Mapping[str, str] | None, source: str) -> list[str]:
    """Return which columns of a table are read, in their order; all, where `columns` is None.

    Errors: DataError where a named column is missing, or no column holds content.
    """
    names = list(names)
    if columns is None:
        return names
    missing = {key: column for key, column in columns.items() if column not in names}
    if missing:
        refuse_missing(missing, names, source)
    whole = [form for form in FORMS if {*form.keys} <= {*names}]
    if not columns and not whole and not {*names} & {*HEADS, "chosen"}:
        raise DataError(
            f"{source.removeprefix(' of ')} has the columns {listed(names) or '(none)'}; expected "
            "'prompt' and 'completion', or 'messages', or 'text'. Other names are given by "
            "--columns, as in --columns prompt=question,completion=answer"
        )
    wanted = {*BESIDE, *WRITTEN_KEYS, *MEDIA, *UNUSED, *columns.values()}
    return [name for name in names if name in wanted]


def refuse_missing(missing: Mapping[str, str], names: Iterable[str], source: str) -> None:
    """Raise the DataError of columns that are named and not there."""
    named = ", ".join(f"{key}={column}" for key, column in missing.items())
    raise DataError(
        f"--columns {named} was given, and the rows{source} have the columns {listed(names)}; "
        "name one of these"
    )


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under the names of its column map, without content written in another way."""
    content = _content_keys(columns)
    kept = {
        key: value
        for key, value in row.items()
        if key not in columns.values()
        and (not content or key in content or key not in WRITTEN_KEYS)
    }
    if content:
        kept = {key: value for key, value in kept.items() if key not in ("chosen", "rejected")}
    return kept | {key: row.get(column) for key, column in columns.items()}


def _content_keys(columns: Mapping[str, str]) -> set[str]:
    """The keys of the ways to write a row that a column map can mean; none: it names no content."""
    content = {key for key in columns if key in WRITTEN_KEYS}
    ways = (*CANONICAL, *(form.all_keys for form in FORMS))
    return {key for keys in ways if content and content <= {*keys} for key in keys}


def _heads(row: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Which of the keys hold content in a row."""
    return [key for key in keys if key in HEADS and row.get(key) is not None]


# ---- forms -------------------------------------------------------------------------------------


def _forms_of(row: Mapping[str, Any]) -> list[Form]:
    """The forms that a row has all keys of, without those whose keys belong to another of them."""
    whole = [form for form in FORMS if all(row.get(key) is not None for key in form.keys)]
    return [
        form
        for form in whole
        if not any(other is not form and {*form.keys} <= {*other.all_keys} for other in whole)
    ]


def _refuse_preferences(row: Mapping[str, Any]) -> None:
    """A pair of answers is no training row, as long as nothing says which was trained on."""
    whole = [keys for keys in CANONICAL[:1] if all(row.get(key) is not None for key in keys)]
    whole += [keys for keys in CANONICAL[1:] if row.get(keys[0]) is not None]
    if row.get("chosen") is None or row.get("rejected") is None or whole or _forms_of(row):
        return
    key = "completion" if row.get("prompt") is not None else "text"
    if not isinstance(row["chosen"], str):
        key = "messages"
    raise UnusableRow(
        "is a pair of answers, 'chosen' and 'rejected', and a training row has one; where the "
        f"adapter was trained on the chosen answers, say so: --columns {key}=chosen"
    )


def _conversation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a row of ShareGPT."""
    system, turns = _system(row), _turns(_json(row["conversations"]), "conversations")
    first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
    if first.get("role") != "system":
        return [*system, *turns]
    if system and system[0]["content"] != first.get("content"):
        raise UnusableRow(
            "has one text under 'system' and another as the first turn of its conversation; keep "
            "one of them"
        )
    return turns


def _turns(turns: Any, key: str) -> list[dict[str, Any]]:
    """Turns with `role` and `content`, of turns with `from` and `value`."""
    if not isinstance(turns, (list, tuple)):
        raise UnusableRow(f"{key!r} must be a list, not {kind_of(turns)}")
    return [_turn(turn, number) for number, turn in enumerate(turns, start=1)]


def _turn(turn: Any, number: int) -> Any:
    """One turn. What is written otherwise is left to the check of messages."""
    if not isinstance(turn, Mapping) or turn.get("role") is not None or turn.get("from") is None:
        return turn
    speaker = str(turn["from"]).lower()
    if speaker not in ROLES:
        raise UnusableRow(f"turn {number} is 'from' {turn['from']!r}; expected one of {_SPEAKERS}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if speaker == "function_call":
        return {"role": "assistant", "tool_calls": _calls(turn.get("value"), number), **rest}
    return {"role": ROLES[speaker], "content": turn.get("value"), **rest}


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """The calls of a turn from `function_call`: one `{"name", "arguments"}`, or a list of them."""
    value = _json(value)
    calls = value if isinstance(value, list) else [value]
    made = []
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise UnusableRow(
                f"turn {number} is from 'function_call', and its value is no JSON object with "
                "'name' and 'arguments', nor a list of them"
            )
        arguments = _json(call.get("arguments", {}))
        function = {"name": call["name"], "arguments": arguments}
        made.append({"type": "function", "function": function})
    return made


def _instruction(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a row of alpaca, as LLaMA-Factory makes them."""
    earlier = []
    for pair in row.get("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UnusableRow("'history' must be a list of pairs, a question and its answer each")
        question, answer = (_text({"history": item}, "history") for item in pair)
        earlier += _exchange(question, answer)
    parts = [_text(row, "instruction"), _text(row, "input")]
    question = "\n".join(part for part in parts if part)
    return [*_system(row), *earlier, *_exchange(question, _text(row, "output"))]


def _question(question: str, answer: str) -> Callable[[Mapping[str, Any]], list[dict[str, Any]]]:
    def turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [*_system(row), *_exchange(_text(row, question), _text(row, answer))]

    return turns


def _exchange(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The system turn, where there is a text for it."""
    text = _text(row, "system")
    return [{"role": "system", "content": text}] if text else []


def _text(row: Mapping[str, Any], key: str) -> str:
    """A text, empty where there is none."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise UnusableRow(f"{key!r} must be a string, not {kind_of(value)}")
    return value or ""


def _decoded(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """The row with `messages` and `tools` that were JSON as text, or ShareGPT's turns, as lists.

    Also what was done, for the note.
    """
    changes: dict[str, Any] = {}
    what = None
    if isinstance(row.get("tools"), str):
        changes["tools"] = _json(row["tools"])
    messages = row.get("messages")
    decoded = _json(messages)
    if isinstance(decoded, list):
        if any(isinstance(turn, Mapping) and turn.get("from") is not None for turn in decoded):
            decoded = _turns(decoded, "messages")
            what = "with 'messages' of turns 'from' someone with a 'value': read as ShareGPT's"
        elif isinstance(messages, str):
            what = "with 'messages' as a text of JSON: read as the list that it says"
    if decoded is not messages:
        changes["messages"] = decoded
    return ({**row, **changes} if changes else row), what


def _json(value: Any) -> Any:
    """What a text says as JSON, where that is an object or a list; else the value itself."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


# ---- the table of forms ------------------------------------------------------------------------

_SPEAKERS = ", ".join(ROLES)
_CHAT = (
    "each is read as a chat, a user turn and an assistant turn. Where the adapter was trained on "
    "another text, give that: --columns prompt={},completion={} joins the two as they stand"
)
_PAIRS = (("question", "answer"), ("query", "response"), ("problem", "solution"))
_PAIRS = (*_PAIRS, ("input", "output"))
#: The forms of others that are read.
FORMS = (
    Form(
        ("conversations",),
        ("system",),
        _conversation,
        "read as ShareGPT's conversations, with the roles user, assistant, system and tool",
    ),
    Form(
        ("instruction", "output"),
        ("input", "system", "history"),
        _instruction,
        "each is read as a chat, as LLaMA-Factory does: the user's turn is the instruction and, "
        "after a line break, the input where there is one. Where the adapter was trained on "
        "another text, such as alpaca's 'Below is an instruction', give rows with 'prompt' and "
        "'completion'",
    ),
    *(
        Form((asked, given), ("system",), _question(asked, given), _CHAT.format(asked, given))
        for asked, given in _PAIRS
    ),
)
#: Every key that content is written with.
WRITTEN_KEYS = tuple(
    dict.fromkeys(
        key
        for keys in (*CANONICAL, *(form.all_keys for form in FORMS))
        for key in keys
        if key not in BESIDE
    )
)
