"""Changes that are asked of an edit: which training rows go, and which change into what.

They are checked before any work.

The three tasks of LLMEraser (Ding et al. 2024, arXiv 2412.00383) are three kinds of change of one
row:

* `remove` (instance removal): the row is gone.
* `relabel` (response correction): the same prompt, another completion.
* `correct` (query modification): another prompt, another completion, or both; also another text.

A `Change` replaces the rows S by S': `old` holds all of S, `new` those that stay with other
content, in the order of the requests. Requests of several kinds may go into one edit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from influence.errors import DataError, InputError
from influence.progress import say
from influence.row_content import CONTENT_KEYS, ROW_KEYS
from influence.rows import Example, Examples, examples_from_rows
from influence.tokens import TokenizedExamples, Tokens
from unlearn.record.version import Version

#: What may be asked of a row, and the keys that go with its content.
ACTIONS = ("remove", "relabel", "correct")
OTHER_KEYS = tuple(key for key in ROW_KEYS if key not in ("id", "group", *CONTENT_KEYS))


@dataclass(frozen=True)
class Request:
    """One row's change: the row as it is, and as it will be (None: removed)."""

    action: str
    before: Example
    after: Example | None

    def record(self) -> dict[str, Any]:
        """What the record keeps: id, action and content hashes, never the text."""
        after = None if self.after is None else self.after.content_hash
        given = {"id": self.before.id, "action": self.action}
        return {**given, "content_before": self.before.content_hash, "content_after": after}


@dataclass(frozen=True)
class Change:
    """The rows S of a version that go or change, and what takes their place.

    Attributes
    ----------
    version : Version
        The adapter and rows that are changed.
    requests : tuple of Request
        In the order they were made.
    rows : int array [s]
        Positions of S in the version's rows, request by request.
    replaced : bool array [s]
        Which of S change rather than go.
    new : TokenizedExamples
        The `replaced.sum()` new contents S'.
    old_weights, new_weights : float64 arrays
        The objective's weights `w` of S [s] and S'. They keep the fit's N_tok: nothing is
        renormalised.
    """

    version: Version
    requests: tuple[Request, ...]
    rows: np.ndarray
    replaced: np.ndarray
    new: TokenizedExamples
    old_weights: np.ndarray
    new_weights: np.ndarray

    @property
    def kind(self) -> str:
        """`remove`, `relabel`, `correct`, or `mixed`."""
        actions = {request.action for request in self.requests}
        return actions.pop() if len(actions) == 1 else "mixed"

    @property
    def lineage(self) -> dict[str, list[str]]:
        """Ids of the fit's rows that are `removed` and `changed` by now, earlier edits included."""
        removed = self.version.removed | {
            request.before.id for request in self.requests if request.after is None
        }
        changed = self.version.changed | {
            request.before.id for request in self.requests if request.after is not None
        }
        return {"removed": sorted(removed), "changed": sorted(changed - removed)}

    @property
    def old(self) -> TokenizedExamples:
        """The tokens of S."""
        return self.version.tokens.select(self.rows)

    @property
    def contents(self) -> TokenizedExamples:
        """The tokens of S, then those of S'."""
        return TokenizedExamples.joined([self.old, self.new])

    @property
    def edited(self) -> TokenizedExamples:
        """The tokens that an edit is judged by: of the rows that go, then of the new contents."""
        return TokenizedExamples.joined([self.old.select(np.flatnonzero(~self.replaced)), self.new])

    @property
    def rest(self) -> np.ndarray:
        """Positions of the untouched rows in the version's rows."""
        return np.setdiff1d(np.arange(len(self.version.rows)), self.rows)

    @property
    def after(self) -> Examples:
        """The training rows after the edit."""
        changes = {request.before.id: request.after for request in self.requests}
        kept = (changes.get(row.id, row) for row in self.version.rows)
        return Examples(row for row in kept if row is not None)

    @property
    def tokens_after(self) -> TokenizedExamples:
        """The tokens of the training rows after the edit, in the order of `after`."""
        return self._after[0]

    @property
    def weights_after(self) -> np.ndarray:
        """The weights `w` of the training rows after the edit, `[n']`."""
        return self._after[1]

    @property
    def _after(self) -> tuple[TokenizedExamples, np.ndarray]:
        tokens = self.version.tokens
        rows, ids, w = list(tokens), list(tokens.ids), self.version.weights.copy()
        for place, row in enumerate(self.rows[self.replaced].tolist()):
            rows[row], w[row] = self.new[place], self.new_weights[place]
        keep = np.setdiff1d(np.arange(len(rows)), self.rows[~self.replaced])
        return TokenizedExamples([rows[i] for i in keep], [ids[i] for i in keep]), w[keep]


def plan(
    version: Version,
    remove: Sequence[str] = (),
    relabel: Mapping[str, str] | None = None,
    correct: Mapping[str, Mapping[str, Any]] | None = None,
) -> Change:
    """Check what is asked and find its rows.

    Raises
    ------
    DataError
        For an unknown id, naming the nearest, or unusable new content.
    InputError
        For a row that is asked for twice, was removed by an earlier edit or would not change, or
        where no training row would be left.
    """
    relabel, correct = relabel or {}, correct or {}
    actions = [
        *((id, "remove") for id in remove),
        *((id, "relabel") for id in relabel),
        *((id, "correct") for id in correct),
    ]
    if not actions:
        raise InputError("no change was asked for: name at least one row")
    ids = [id for id, _ in actions]
    repeated = sorted(id for id, times in Counter(ids).items() if times > 1)
    if repeated:
        raise InputError(f"ids are given more than once: {_first(repeated)}; name each row once")
    gone = [id for id in ids if id in version.removed]
    if gone:
        raise InputError(
            f"{_first(gone)} {'was' if len(gone) == 1 else 'were'} removed by an earlier edit and "
            "no training row any more: leave it out, or start from an adapter before that edit "
            "(--start original, or its directory)"
        )
    rows = np.array([version.rows.index(id) for id in ids])
    requests = []
    for id, action in actions:
        before = version.rows[version.rows.index(id)]
        after = None
        if action == "relabel":
            after = _relabelled(before, relabel[id])
        elif action == "correct":
            after = _corrected(before, correct[id])
        if after is not None and after.content_hash == before.content_hash:
            raise InputError(
                f"{action} of {id!r} changes nothing: the row has this content already; leave it "
                "out"
            )
        requests.append(Request(action, before, after))
    if len(remove) == len(version.rows):
        raise InputError(
            "all rows would be removed: nothing that the adapter was trained on would be left"
        )
    replaced = np.array([request.after is not None for request in requests])
    contents = Examples(request.after for request in requests if request.after is not None)
    new = version.run.tokenized(contents)
    tokens = version.tokens.select(rows[replaced])
    pairs = zip(new.ids, tokens, new, strict=True)
    same = [id for id, before, after in pairs if _same_tokens(before, after)]
    if same:
        raise InputError(
            f"the change of {_first(same)} changes no token that the adapter is trained on (the "
            "tokenizer writes both the same way, or truncation cuts the difference off): leave it "
            "out"
        )
    return Change(
        version,
        tuple(requests),
        rows,
        replaced,
        new,
        version.weights[rows],
        version.run.row_weights.changed(version.positions[rows[replaced]], new.counts),
    )


def say_copies(change: Change) -> None:
    """Name the rows that stay and have the very content of rows that are removed."""
    rows = change.version.rows
    kept: dict[str, list[str]] = {}
    asked = {request.before.id for request in change.requests}
    for row in rows:
        if row.id not in asked:
            kept.setdefault(row.content_hash, []).append(row.id)
    removed = [request.before for request in change.requests if request.after is None]
    copied = [row for row in removed if row.content_hash in kept]
    for row in copied[:10]:
        copies = kept[row.content_hash]
        what = "its identical copy" if len(copies) == 1 else f"its {len(copies)} identical copies"
        verb = "stays" if len(copies) == 1 else "stay"
        say(
            f"note: {row.id!r} is removed, and {what} {_first(copies)} {verb}: the adapter is "
            "still trained on that content. Name both where the content is to go"
        )
    if len(copied) > 10:
        say(f"note: {len(copied) - 10} more removed rows have identical copies that stay")


def refuse_text(ids: Sequence[str] | str) -> None:
    """Refuse ids that were given as one string, whose letters would be taken for ids."""
    if isinstance(ids, str):
        raise InputError(f"ids {ids!r} were given as one string; expected a list, as in [{ids!r}]")


def _first(ids: Sequence[str]) -> str:
    """The first ten ids, as a sentence lists them."""
    return ", ".join(map(repr, ids[:10]))


def _same_tokens(first: Tokens, second: Tokens) -> bool:
    """Whether two rows have the same tokens, and the same ones supervised."""
    pairs = ((getattr(first, part), getattr(second, part)) for part in vars(first))
    return all(a is b or np.array_equal(a, b) for a, b in pairs)


def _relabelled(row: Example, completion: Any) -> Example:
    """The row with another completion, or an error where it cannot have it."""
    if not isinstance(completion, str):
        raise DataError(f"the new completion of {row.id!r} is {completion!r}; expected a string")
    if row.answer is None:
        kind, key = ("a text", "text") if row.text is not None else ("token ids", "input_ids")
        raise InputError(
            f'{row.id!r} is {kind} without a completion: correct it with {{"id", "{key}"}} instead'
        )
    return _corrected(row, {"completion": completion})


def _corrected(row: Example, content: Mapping[str, Any]) -> Example:
    """The row with other content, checked by the rules of training rows."""
    if not isinstance(content, Mapping) or not set(content) & {*CONTENT_KEYS, "input_ids"}:
        raise DataError(
            f"the change of {row.id!r} is {content!r}; expected new "
            f"{', '.join(CONTENT_KEYS[:-1])} or text"
        )
    keys = (*CONTENT_KEYS, *OTHER_KEYS)
    content = {key: value for key, value in content.items() if key in keys and value is not None}
    if row.messages is not None:
        given = set(content) & set(CONTENT_KEYS)
        if given == {"completion"} and isinstance(content["completion"], str):
            content = row.answering(content.pop("completion")).content() | content
        elif given in ({"messages"}, {"prompt", "completion"}):  # tools and options stay
            kept = {key: value for key, value in row.content().items() if key in OTHER_KEYS}
            content = kept | content
        elif "input_ids" not in content:
            raise InputError(
                f'{row.id!r} is a conversation: give its new "messages", or a "completion" for its '
                "last answer"
            )
    elif row.prompt is not None:
        content = {"prompt": row.prompt, "completion": row.completion} | content
    named = {"id": row.id, **({} if row.group is None else {"group": row.group})}
    return replace(examples_from_rows([{**named, **content}])[0], id=row.id, group=row.group)
