"""One page on one edit, for people: is it forgotten, what else changed, how exact is it, and how to check it.

Everything on the page comes from DIR/edit.json, the record that an edit leaves beside its adapter. No model is loaded and
nothing is measured here; what the record does not know is said as "not measured". The page is one HTML file with inline
styles and drawings, without scripts and without anything fetched from elsewhere; ids and paths in it are hostile input
and are escaped. The same record gives the same bytes.

The words follow from numbers by these rules and by nothing else (losses are means per completion token, in nats):

* removed row: `forgotten` where after >= 0.9 target; else `partly forgotten` where after - before >= 0.1 (target - before);
  else `not forgotten`, also where `before` is unknown.
* relabelled or corrected row, by the loss of its new content. The goal is the target or, without one, the loss that the
  old content had before the edit: so well did the adapter know what it was taught. `taken up` where after <= goal or
  share >= 0.9, with share = (before - after) / (before - goal); else `partly taken up` where share >= 0.1; else `not taken up`.
* several rows: the same rules on the means over the rows where both losses are known; ` on average` is added where the
  means pass and a single row does not, or cannot be judged.
* `not judged`: what the rule needs is null or not finite.
* still recited: of a removed row, more than half of the text can be extracted; the answer then says so, whatever the loss.
* too far: mean after > 1.25 mean target; the page then warns that a conspicuously high loss is a trace too.
* all other rows: `within the limit` where damage <= max_damage, else `beyond the limit`; without a limit `no limit set`,
  above a rise of 10 % `much lost, no limit set`; `not measured`.
* training again: `agrees` where each measured loss is within 10 % of the retrained adapter's; else `differs`; `not compared`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from influence.console import printable
from influence.errors import InputError, StoreError
from influence.store import read_json

RECORD = "edit.json"
FORMAT = 1
SHOWN = 30  # rows with a line of their own
NOT_MEASURED = "not measured"
_KINDS = {"remove": "removed", "relabel": "relabelled", "correct": "corrected"}


# ---- the record -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Null:
    """A value of this shape, or null."""

    shape: Any


#: Rise of the other rows' loss that is said to be much where no limit was set.
MUCH = 0.1
_TEXT, _NUMBER, _TRUTH = _Null(str), _Null(float), _Null(bool)
_DIGEST = _Null({"digest": _TEXT})
_PLACE = _Null({"path": _TEXT, "digest": _TEXT})
_CHANGE = {"rows": _NUMBER, "before": _NUMBER, "after": _NUMBER}
_SHAPE = {
    "kind": str,
    "created": _TEXT,
    "versions": _Null({}),
    "run": _PLACE,
    "base": _PLACE,
    "adapter": {"before": _PLACE, "after": _DIGEST},
    "data": _Null({"before": _TEXT, "after": _TEXT, "rows_before": _NUMBER, "rows_after": _NUMBER}),
    "tokenizer": _DIGEST,
    "requests": [{"id": str, "action": str, "content_before": _TEXT, "content_after": _TEXT}],
    "method": {"name": _TEXT},
    "residual": _Null(
        {
            "solver": _NUMBER,
            "tolerance": _NUMBER,
            "objective": _Null({"before": _NUMBER, "after": _NUMBER}),
        }
    ),
    "stopped": _TEXT,
    "steps": _Null(
        [{"length": _NUMBER, "predicted": _NUMBER, "measured": _NUMBER, "accepted": _TRUTH}]
    ),
    "delta": _Null({"norm": _NUMBER, "relative": _NUMBER}),
    "losses": {
        "edited": _Null(_CHANGE | {"target": _NUMBER, "predicted": _NUMBER}),
        "retained": _Null(_CHANGE | {"change": _NUMBER, "standard_error": _NUMBER}),
        "heldout": _Null(_CHANGE | {"source": _TEXT}),
    },
    "rows": [
        {
            "id": str,
            "action": str,
            "before": _NUMBER,
            "after": _NUMBER,
            "target": _NUMBER,
            "base": _NUMBER,
            "extraction_before": _NUMBER,
            "extraction_after": _NUMBER,
            "rank": _NUMBER,
        }
    ],
    "comparable": _Null({"source": _TEXT, "rows": _NUMBER}),
    "guard": _Null({"max_damage": _NUMBER, "damage": _NUMBER, "passed": _TRUTH, "forced": _TRUTH}),
    "cost": _Null(
        {
            "row_gradients": _NUMBER,
            "row_forwards": _NUMBER,
            "total": _NUMBER,
            "seconds": _NUMBER,
            "retraining": _NUMBER,
            "ratio": _NUMBER,
        }
    ),
    "agreement": _Null(
        {
            "adapter": _TEXT,
            "edited": _NUMBER,
            "retained": _NUMBER,
            "heldout": _NUMBER,
            "kl": _Null({}),
        }
    ),
    "files": _Null({}),
}


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of an edit, with its keys and types checked.

    Raises
    ------
    InputError
        If the folder is no edit's, or its record has another format than this version reads.
    StoreError
        If the record is damaged: no JSON, a key missing, or a value of the wrong type; the message names it.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise InputError(
            f"{folder} holds no {RECORD}; expected a folder made by unlearn remove, relabel, correct or train: give the --out of "
            "such a command"
        )
    try:
        record = read_json(path)
    except RecursionError:
        raise StoreError(
            f"{path} is nested too deeply to be the record of an edit: it is damaged"
        ) from None
    if "format" not in record:
        raise _damaged(path, "the key format is missing")
    if record["format"] != FORMAT or isinstance(record["format"], bool):
        found = printable(str(record["format"]))[:40]
        raise InputError(
            f"{path} has format {found}; this version reads format {FORMAT}: use the version of the toolkit that made it"
        )
    _check(record, _SHAPE, "", path)
    asked = {request["id"]: request["action"] for request in record["requests"]}
    if not asked:
        raise _damaged(path, "requests is empty; an edit names at least one row")
    if record["kind"] not in (*_KINDS, "mixed"):
        raise _damaged(
            path, f"kind is {record['kind'][:40]!r}; expected {', '.join(_KINDS)} or mixed"
        )
    for place in ("requests", "rows"):
        seen: set[str] = set()
        for index, row in enumerate(record[place]):
            where, id = f"{place}[{index}]", row["id"]
            if row["action"] not in _KINDS:
                raise _damaged(
                    path, f"{where}.action is {row['action'][:40]!r}; expected {', '.join(_KINDS)}"
                )
            if id in seen:
                raise _damaged(
                    path, f"{where} is of the row {id[:40]!r}, which {place} named before"
                )
            if asked.get(id) != row["action"]:
                raise _damaged(
                    path, f"{where} is of the row {id[:40]!r}, which requests does not name so"
                )
            seen.add(id)
            for key in ("old_before", "old_after"):
                _check(row.get(key), _NUMBER, f"{where}.{key}", path)
    return record


def _check(value: Any, shape: Any, where: str, path: Path) -> None:
    """Refuse a value that is not of this shape: a type, {key: shape}, [shape of each], or `_Null`."""
    if isinstance(shape, _Null):
        if value is not None:
            _check(value, shape.shape, where, path)
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            raise _damaged(path, f"{where} is {_called(value)}; expected an object")
        for key, inner in shape.items():
            if key not in value:
                raise _damaged(path, f"the key {where + '.' if where else ''}{key} is missing")
            _check(value[key], inner, f"{where}.{key}" if where else key, path)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise _damaged(path, f"{where} is {_called(value)}; expected a list")
        for index, part in enumerate(value):
            _check(part, shape[0], f"{where}[{index}]", path)
    elif shape is float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or 1e300 < abs(value) < math.inf
        ):
            raise _damaged(path, f"{where} is {_called(value)}; expected a number or null")
    elif not isinstance(value, shape):
        raise _damaged(
            path,
            f"{where} is {_called(value)}; expected {'true or false' if shape is bool else 'a text'}",
        )


def _called(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        type(None): "null",
        bool: "true or false",
    }
    return names.get(type(value), "a number")


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(
        f"{path} is damaged: {printable(what)}; take the record from a backup, or make the edit again"
    )


def _at(record: Mapping[str, Any] | None, *keys: str) -> Any:
    """A value inside the record; null where it or anything above it is null."""
    value: Any = record
    for key in keys:
        value = None if value is None else value.get(key)
    return value


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


# ---- the rules --------------------------------------------------------------------------------------------------


def forgetting(before: float | None, after: float | None, target: float | None) -> str:
    """Verdict on removed rows, from losses in nats: see the module's rules."""
    before, after, target = _finite(before), _finite(after), _finite(target)
    if after is None or target is None:
        return "not judged"
    if after >= 0.9 * target:
        return "forgotten"
    if before is not None and after - before >= 0.1 * (target - before):
        return "partly forgotten"
    return "not forgotten"


def learning(before: float | None, after: float | None, goal: float | None) -> str:
    """Verdict on relabelled or corrected rows, from the losses of their new content: see the module's rules."""
    before, after, goal = _finite(before), _finite(after), _finite(goal)
    if after is None or goal is None:
        return "not judged"
    if after <= goal:
        return "taken up"
    share = 0.0 if before is None or before <= goal else (before - after) / (before - goal)
    return "taken up" if share >= 0.9 else "partly taken up" if share >= 0.1 else "not taken up"


def damage(guard: Mapping[str, Any] | None) -> str:
    """Verdict on all other rows: the relative rise of their loss against the limit that was set."""
    rise, limit = _finite(_at(guard, "damage")), _finite(_at(guard, "max_damage"))
    if rise is None:
        return NOT_MEASURED
    if limit is None:
        return "no limit set" if rise <= MUCH else "much lost, no limit set"
    return "within the limit" if rise <= limit else "beyond the limit"


def agreement(record: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Verdict on the comparison with a retrained adapter, and the sets of rows whose losses differ by more than 10 %."""
    there, apart = False, []
    for name in ("edited", "retained", "heldout"):
        ours = _finite(_at(record, "losses", name, "after"))
        theirs = _finite(_at(record, "agreement", name))
        if ours is not None and theirs is not None:
            there = True
            if abs(ours - theirs) > 0.1 * abs(theirs):
                apart.append(name)
    return ("differs" if apart else "agrees") if there else "not compared", tuple(apart)


#: How bad a verdict is: worst first in tables, and the colour beside the word.
_LEVEL = {
    "not forgotten": 0,
    "not taken up": 0,
    "partly forgotten": 1,
    "partly taken up": 1,
    "not judged": 2,
}
_TONE = {
    "not forgotten": "bad",
    "not taken up": "bad",
    "beyond the limit": "bad",
    "much lost, no limit set": "bad",
    "partly forgotten": "warn",
    "partly taken up": "warn",
    "forgotten on average": "warn",
    "taken up on average": "warn",
    "differs": "warn",
    "forgotten": "good",
    "taken up": "good",
    "within the limit": "good",
    "agrees": "good",
}


@dataclass(frozen=True)
class Row:
    """One edited row: its losses in nats, shares in [0, 1], null where not measured."""

    id: str
    action: str
    before: float | None
    after: float | None
    target: float | None
    base: float | None
    extraction_before: float | None
    extraction_after: float | None
    rank: float | None
    old_before: float | None
    old_after: float | None

    @property
    def goal(self) -> float | None:
        """What `after` is held against: the target; for new content without one, the old content's loss before."""
        return (
            self.target
            if self.action == "remove" or _finite(self.target) is not None
            else self.old_before
        )

    @property
    def verdict(self) -> str:
        """The word for this row, by the module's rules."""
        rule = forgetting if self.action == "remove" else learning
        return rule(self.before, self.after, self.goal)

    @property
    def order(self) -> tuple[int, float]:
        """Least forgotten, or least taken up, first."""
        before, after, goal = _finite(self.before), _finite(self.after), _finite(self.goal)
        way = math.inf
        if after is not None and goal is not None:
            if self.action == "remove":
                way = after / goal if goal else math.inf
            elif before is not None and before > goal:
                way = (before - after) / (before - goal)
        return _LEVEL.get(self.verdict, 3), way


@dataclass(frozen=True)
class Group:
    """The removed rows of an edit, or those with new content."""

    kind: Literal["remove", "change"]
    rows: tuple[Row, ...]

    def mean(self, name: str, *with_: str) -> float | None:
        """Mean of one value over the rows where it, and those `with_` it, are known."""
        known = [[_finite(getattr(row, key)) for key in (name, *with_)] for row in self.rows]
        values = [first for first, *rest in known if first is not None and None not in rest]
        return float(np.mean(values)) if values else None

    def known(self, name: str) -> np.ndarray:
        """The finite values of one field, in the rows' order."""
        values = (_finite(getattr(row, name)) for row in self.rows)
        return np.array([value for value in values if value is not None])

    def count(self, verdict: str) -> int:
        """How many rows have this verdict."""
        return sum(row.verdict == verdict for row in self.rows)

    @property
    def verdict(self) -> str:
        """The word for all of them, by the module's rules."""
        rule = forgetting if self.kind == "remove" else learning
        after, goal = self.mean("after", "goal"), self.mean("goal", "after")
        word = rule(self.mean("before", "after", "goal"), after, goal)
        passed = word in ("forgotten", "taken up")
        return f"{word} on average" if passed and self.count(word) < len(self.rows) else word

    @property
    def recited(self) -> int:
        """Of how many removed rows more than half of the text can still be extracted."""
        return int(np.sum(self.known("extraction_after") > 0.5)) if self.kind == "remove" else 0


def groups(record: Mapping[str, Any]) -> tuple[Group, ...]:
    """The rows that were asked for, removed ones first, with what was measured of each."""
    measured = {row["id"]: row for row in record["rows"]}
    fields = [name for name in Row.__dataclass_fields__ if name not in ("id", "action")]
    rows = []
    for request in record["requests"]:
        found = measured.get(request["id"], {})
        rows.append(
            Row(request["id"], request["action"], **{name: found.get(name) for name in fields})
        )
    removed = tuple(row for row in rows if row.action == "remove")
    changed = tuple(row for row in rows if row.action != "remove")
    return tuple(
        group for group in (Group("remove", removed), Group("change", changed)) if group.rows
    )


# ---- words ------------------------------------------------------------------------------------------------------


def _loss(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "not a finite number"
    return f"{value:.2f}" if 0.0995 <= abs(value) < 1e6 or value == 0 else f"{value:.2g}"


def _share(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "not a finite number"
    percent = 100 * value
    if abs(percent) >= 1e6:
        return f"{percent:.2g}\N{NO-BREAK SPACE}%"
    return f"{percent:,.{0 if abs(percent) >= 10 or percent == round(percent) else 1}f}\N{NO-BREAK SPACE}%"


def _small(value: float | None) -> str:
    return (
        NOT_MEASURED
        if value is None
        else f"{value:.2g}"
        if math.isfinite(value)
        else "not a finite number"
    )


def _arrow(before: str, after: str) -> str:
    space = " " if NOT_MEASURED in (before, after) else "\N{NO-BREAK SPACE}"
    return f"{before}{space}→{space}{after}"


def _count(number: float | None, noun: str = "row") -> str:
    if _finite(number) is None:
        return f"{noun}s ({NOT_MEASURED} how many)"
    assert number is not None
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


def _text(value: Any, limit: int = 240) -> str:
    """Foreign text for the page: control and direction characters become spaces, and it ends somewhere."""
    text = " ".join(printable(str(value)).split("\n"))
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def _title(record: Mapping[str, Any]) -> str:
    counts = {
        action: sum(request["action"] == action for request in record["requests"])
        for action in _KINDS
    }
    parts = [(_KINDS[action], number) for action, number in counts.items() if number]
    first = f"{_count(parts[0][1], 'training row')} {parts[0][0]}"
    return ", ".join([first, *(f"{number:,} {word}" for word, number in parts[1:])])


def _asked(record: Mapping[str, Any]) -> bool:
    """Whether the target is a loss that was asked for, rather than that of rows never seen."""
    return str(_at(record, "method", "until")).startswith("loss=")


def _goal(group: Group, record: Mapping[str, Any]) -> str:
    """What the loss now is held against, in a word."""
    if group.kind == "change" and not group.known("target").size:
        return "goal"
    return "asked for" if _asked(record) else "expected"


def _tile(group: Group) -> str:
    """The means behind the verdict, and what they are as probabilities."""
    before, after = group.mean("before"), group.mean("after")
    said = f"Loss {_loss(before)} before, {_loss(after)} now."
    if before is None or after is None or min(before, after) < 0:
        return said
    chances = [_share(math.exp(-value)) for value in (before, after)]
    return f"{said} Typical probability of the right next token: {_arrow(*chances)}."


def _to_base(record: Mapping[str, Any]) -> bool:
    """Whether the goal was the base model's loss."""
    return record["method"].get("until") == "base"


def _headline(group: Group, record: Mapping[str, Any]) -> str:
    """The answer, in a sentence or two."""
    n, removed = len(group.rows), group.kind == "remove"
    what = ("removed " if removed else "changed ") + ("row" if n == 1 else "rows")
    rows = f"the {what}" if n == 1 else f"the {n:,} {what}"
    verb, unseen = ("is", "a row") if n == 1 else ("are", "rows")
    after, goal, before = (
        group.mean("after", "goal"),
        group.mean("goal", "after"),
        group.mean("before", "after", "goal"),
    )
    word = group.verdict
    passed = word.removesuffix(" on average")
    if word == "not judged":
        was, now = group.mean("before"), group.mean("after")
        why = (
            "their losses were not measured row by row"
            if now is None
            else "the record has no loss to expect"
        )
        said = (
            f"whether {rows} {verb} {'forgotten' if removed else 'taken up'} cannot be said: {why}"
        )
        said += "" if now is None else f". Loss before {_loss(was)}, now {_loss(now)}"
    elif removed and passed == "forgotten" and _asked(record):
        said = f"{rows} {'has' if n == 1 else 'have'} reached the loss asked for: {_loss(after)} against {_loss(goal)}"
    elif removed and passed == "forgotten":
        known = "to the base model" if _to_base(record) else f"{unseen} it never saw"
        said = (
            f"{rows} {verb} now about as unfamiliar to the adapter as {known}: loss {_loss(after)} "
        )
        said += f"against {_loss(goal)}{'' if _to_base(record) else ' expected'}"
    elif removed:
        said = f"{rows} {verb} {word}: loss {_loss(after)}, {_loss(before)} before, against {_loss(goal)} "
        aim = (
            "of the base model"
            if _to_base(record)
            else f"expected of {unseen} the adapter never saw"
        )
        said += "asked for" if _asked(record) else aim
    else:
        said = f"the new content of {rows} is {passed}: loss {_loss(after)}, {_loss(before)} before, against {_loss(goal)} "
        said += "expected" if group.known("target").size else "that the old content had before"
    if word != passed:
        unknown = group.count("not judged")
        short = n - group.count(passed) - unknown
        said = f"on average {said}"
        said += f"; {short:,} of them {'falls' if short == 1 else 'fall'} short" if short else ""
        said += f"; {unknown:,} of them cannot be judged" if unknown else ""
    if group.recited:
        which = "it" if n == 1 else f"{group.recited:,} of them"
        said += f". Of {which} the adapter can still be made to recite more than half"
    return f"{said[0].upper()}{said[1:]}."


def _remarks(group: Group) -> list[str]:
    """What else the rows' numbers say: too far, rank, recital, old content."""
    said, n = [], len(group.rows)
    after, goal = group.mean("after", "goal"), group.mean("goal", "after")
    if group.kind == "remove" and after is not None and goal is not None and after > 1.25 * goal:
        said.append(
            "Their loss is well above what is expected of rows never seen: a conspicuously high loss can itself give away "
            "that something was removed."
        )
    already = sum(forgetting(None, row.before, row.target) == "forgotten" for row in group.rows)
    if group.kind == "remove" and already:
        said.append(f"{_count(already)} had such a loss before the edit already.")
    ranks, recited = group.known("rank"), group.known("extraction_after")
    if group.kind == "remove" and ranks.size:
        low = int(np.sum(ranks < 0.05))
        said.append(
            f"Rank among comparable unseen rows: {_share(float(np.median(ranks)))}{' in the median' if n > 1 else ''} (50 % is "
            "typical of a row never seen)"
            + (
                f"; {low:,} of {ranks.size:,} below 5 %, chance: {0.05 * ranks.size:,.3g}."
                if n > 1
                else "."
            )
        )
    if recited.size:
        highest = (
            f"; mean of {_count(recited.size)}, highest now {_share(float(recited.max()))}"
            if n > 1
            else ""
        )
        said.append(
            f"Recital: given the prompt and the start of the {'text' if group.kind == 'remove' else 'new content'}, the "
            f"adapter can be made to say the last {_share(group.mean('extraction_after'))} of it word for word (before: "
            f"{_share(group.mean('extraction_before'))}{highest})."
        )
    if group.kind == "change":
        both = [(_finite(row.after), _finite(row.old_after)) for row in group.rows]
        both = [(new, old) for new, old in both if new is not None and old is not None]
        prefers = sum(new < old for new, old in both if new is not None and old is not None)
        favour = (
            f"; the adapter now prefers the new to the old in {prefers:,} of {len(both):,}"
            if both
            else ""
        )
        said.append(
            f"Old content: loss {_loss(group.mean('old_before'))} before, {_loss(group.mean('old_after'))} now{favour}."
        )
    base = group.mean("base")
    if base is not None:
        said.append(
            f"Without any adapter, the base model has the loss {_loss(base)} on {'it' if n == 1 else 'them'}."
        )
    names = {
        "rank": "rank among unseen rows",
        "extraction_after": "recital",
        "target": "expected loss",
    }
    if group.kind == "change":
        names = {"extraction_after": "recital"}
    missing = [word for name, word in names.items() if not group.known(name).size]
    if group.kind == "change" and goal is not None and not group.known("target").size:
        said.append(
            "The goal is the loss that the old content had before the edit: so well did the adapter know it."
        )
    return [*said, f"{NOT_MEASURED.capitalize()}: {', '.join(missing)}."] if missing else said


def _others(record: Mapping[str, Any]) -> str:
    """What happened to the rows that nobody asked to change."""
    guard = record["guard"]
    rise, limit, word = (
        _finite(_at(guard, "damage")),
        _finite(_at(guard, "max_damage")),
        damage(guard),
    )
    if rise is None:
        return "What the edit did to the loss of the other training rows was not measured."
    said = f"The loss of the other training rows {'rose' if rise >= 0 else 'fell'} by {_share(abs(rise))}"
    said += f" (limit: {_share(limit)})." if limit is not None else "; no limit was set."
    if _at(guard, "forced"):
        beyond = word == "beyond the limit"
        said += (
            " It was saved all the same, by force."
            if beyond
            else " Force was given and not needed."
        )
    passed = _at(guard, "passed")
    if passed is not None and limit is not None and passed != (word == "within the limit"):
        said += f" The record says that the limit was {'kept' if passed else 'broken'}, which its own numbers deny."
    return said


def _compared(record: Mapping[str, Any]) -> str:
    """What the comparison with training again says."""
    word, apart = agreement(record)
    if word == "not compared":
        return "This edit was not compared with an adapter that was trained again."
    if word == "agrees":
        return "Every loss is within 10 % of that of an adapter trained again."
    names = {"edited": "edited rows", "retained": "retained rows", "heldout": "held-out rows"}
    listed = ", ".join(names[name] for name in apart)
    return f"More than 10 % from an adapter trained again on: {listed}. Two trainings with other seeds differ too."


def _plain(text: str) -> bool:
    """Whether a text can be typed into a command as it is shown."""
    return printable(text) == text and "\n" not in text and len(text) <= 240


def _retrain_command(record: Mapping[str, Any], folder: str) -> str:
    """The commands for the exact answer and its comparison, ready to paste."""
    return (
        f"unlearn retrain --run {_run(record)} \\\n    --edit {folder} --out RETRAINED\n"
        f"analysis report --edit {folder} \\\n    --retrained RETRAINED --out PAGE.html"
    )


def _folder(folder: Any) -> str:
    path = os.path.abspath(folder)
    return shlex.quote(path) if _plain(path) else "DIR"


def _run(record: Mapping[str, Any]) -> str:
    run = _at(record, "run", "path")
    return shlex.quote(run) if run and _plain(run) and not run.startswith("-") else "RUN"


def _method(record: Mapping[str, Any]) -> str:
    """How the new weights were found, in words."""
    method, steps = record["method"], record["steps"]
    accepted = sum(bool(step["accepted"]) for step in steps or ())
    taken = (
        "steps not recorded"
        if steps is None
        else f"{accepted:,} of {len(steps):,} tried steps kept"
    )
    if method["name"] == "one-shot":
        return (
            "One step of the closed formula: the weights moved once, by the inverse curvature of the training loss times "
            "the gradients of the rows in question."
        )
    if method["name"] == "re-linearised":
        return f"The closed formula in several steps, with gradients taken anew at each ({taken})."
    if "steps_taken" in method:
        title = _text(method.get("title") or method["name"] or "gradient steps")
        return f"{_text(method['name'] or '')}: {title}, {_count(method['steps_taken'], 'gradient step')} (steps.jsonl has each)."
    return f"{_text(method['name'] or 'Method not recorded')} ({taken})."


def _setting(value: Any) -> str:
    if (
        isinstance(value, list)
        and value
        and all(isinstance(part, int | float | str) for part in value)
    ):
        return _text(", ".join(_setting(part) for part in value))
    if isinstance(value, float):
        return _small(value)
    return (
        "none" if value is None else _text(value if isinstance(value, str) else json.dumps(value))
    )


# ---- drawings: numbers for the template -------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A loss axis from `low` to `high` nats, drawn `width` pixels wide with `inset` pixels at each end."""

    low: float
    high: float
    ticks: tuple[float, ...]
    width: float
    inset: float = 6.0

    @classmethod
    def over(cls, values: Iterable[float | None], width: float) -> Axis:
        """An axis from 0 (or lower) over these values, with round ticks."""
        known = [value for value in map(_finite, values) if value is not None]
        if not known:
            return cls(0.0, 1.0, (), width)
        low, high = min([0.0, *known]), max([0.0, *known])
        span = (high - low) or 1.0
        step = 10.0 ** math.floor(math.log10(span))
        step *= next((part for part in (0.2, 0.5, 1.0, 2.0) if span / (step * part) <= 5), 5.0)
        first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
        return cls(
            first * step,
            last * step,
            tuple(step * index for index in range(first, last + 1)),
            width,
        )

    def x(self, value: float | None) -> float | None:
        """Where a loss lies, in pixels; null where it is unknown."""
        value = _finite(value)
        if value is None:
            return None
        share = min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        return round(self.inset + (self.width - 2 * self.inset) * share, 2)

    @property
    def labels(self) -> list[tuple[float, str]]:
        """Place and text of each tick."""
        return [(self.x(tick) or self.inset, f"{tick:.3g}") for tick in self.ticks]


def _histogram(
    values: np.ndarray, axis: Axis, height: float, bins: int = 50
) -> list[tuple[float, float, float]]:
    """Left edge, width and height of the bars in pixels; the tallest is `height` high."""
    counts, edges = np.histogram(
        np.clip(values, axis.low, axis.high), bins=bins, range=(axis.low, axis.high)
    )
    lefts = [axis.x(float(edge)) or 0.0 for edge in edges]
    tallest = max(1, int(counts.max()))
    return [
        (
            lefts[i],
            round(lefts[i + 1] - lefts[i], 2),
            round(max(0.7, height * int(count) / tallest), 2),
        )
        for i, count in enumerate(counts)
        if count
    ]


def _distribution(group: Group) -> dict[str, Any]:
    """Histograms on one axis, and a table of quantiles, of the losses of many rows."""
    goal = np.array([v for v in (_finite(row.goal) for row in group.rows) if v is not None])
    series = [("before", group.known("before")), ("now", group.known("after")), ("goal", goal)]
    # one row far out must not squeeze the others together: the last half per cent goes into the last bar
    tops = [float(np.quantile(values, 0.995)) for _, values in series if values.size]
    axis = Axis.over(tops, 560)
    beyond = sum(int(np.sum(values > axis.high)) for _, values in series)
    drawn = [(name, _histogram(values, axis, 26)) for name, values in series if values.size]
    levels = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    table = [
        (name, [_loss(float(value)) for value in np.quantile(values, levels)])
        for name, values in series
        if values.size
    ]
    ranks = group.known("rank")
    if group.kind == "remove" and ranks.size:
        table.append(("rank", [_share(float(value)) for value in np.quantile(ranks, levels)]))
    return {"axis": axis, "drawn": drawn, "table": table, "beyond": beyond}


def _table(group: Group, limit: int) -> dict[str, Any]:
    """The rows with a line of their own, least forgotten first: chart, cells and verdict."""
    shown = sorted(group.rows, key=lambda row: row.order)[:limit]
    values = [value for row in shown for value in (row.before, row.after, row.goal)]
    axis = Axis.over(values, 190)
    known = {
        name: any(getattr(row, name) is not None for row in shown)
        for name in Row.__dataclass_fields__
    }
    change, several = group.kind == "change", len({row.action for row in group.rows}) > 1
    columns: list[tuple[str, str]] = [("before", "before"), ("now", "after")]
    columns += [("goal", "goal")]
    columns += [("rank", "rank")] if known["rank"] and not change else []
    lines = []
    for row in shown:
        cells = [(_share if name == "rank" else _loss)(getattr(row, name)) for _, name in columns]
        if change:
            cells.append(_arrow(_loss(row.old_before), _loss(row.old_after)))
        if known["extraction_after"] or known["extraction_before"]:
            cells.append(_arrow(_share(row.extraction_before), _share(row.extraction_after)))
        marks = {"before": axis.x(row.before), "after": axis.x(row.after), "goal": axis.x(row.goal)}
        action = _KINDS[row.action] if several else ""
        lines.append(
            (_text(row.id), action, marks, cells, row.verdict, _TONE.get(row.verdict, "unknown"))
        )
    headers = [header for header, _ in columns] + (["old content"] if change else [])
    headers += ["recital"] if known["extraction_after"] or known["extraction_before"] else []
    return {"axis": axis, "headers": headers, "lines": lines, "left": len(group.rows) - len(shown)}


# ---- the page ---------------------------------------------------------------------------------------------------


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("analysis.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"small": _small, "foreign": _text}
    return environment.get_template("edit.html")


def page(
    record: Mapping[str, Any], folder: str | os.PathLike[str], digest: str | None = None
) -> str:
    """The HTML of one edit's page.

    Parameters
    ----------
    record : mapping
        From `read_record`.
    folder : path
        The edit's folder, to be named on the page.
    digest : str, optional
        SHA-256 of the record's bytes, which the run's audit.jsonl repeats.

    Returns
    -------
    str
        One self-contained page; a function of the arguments alone.
    """
    parts = groups(record)
    total = sum(len(group.rows) for group in parts)
    sections = []
    for group in parts:
        limit = max(SHOWN // len(parts), SHOWN - (total - len(group.rows)))
        word = group.verdict
        done = ("forgotten", "partly forgotten", "not forgotten")
        if group.kind == "change":
            done = ("taken up", "partly taken up", "not taken up")
        counts = [(verdict, group.count(verdict)) for verdict in (*done, "not judged")]
        sections.append(
            {
                "title": ("Removed row" if group.kind == "remove" else "New content of the row")
                + "s" * (len(group.rows) > 1),
                "kind": group.kind,
                "size": len(group.rows),
                "verdict": word,
                "tone": "warn"
                if group.recited and _TONE.get(word) != "bad"
                else _TONE.get(word, "unknown"),
                "headline": _headline(group, record),
                "counts": ""
                if len(group.rows) == 1
                else "Rows: "
                + ", ".join(f"{number:,} {verdict}" for verdict, number in counts if number),
                "remarks": _remarks(group),
                "many": _distribution(group) if len(group.rows) > limit else None,
                "table": _table(group, limit),
                "tile": _tile(group),
                "goal": _goal(group, record),
            }
        )
    guarded, compared = damage(record["guard"]), agreement(record)[0]
    requests = record["requests"]
    return _template().render(
        record=record,
        folder=os.path.abspath(folder),
        title=_title(record),
        sections=sections,
        others=(guarded, _TONE.get(guarded, "unknown"), _others(record)),
        compared=(compared, _TONE.get(compared, "unknown"), _compared(record)),
        losses=_losses(record),
        retained=_retained(record),
        exact=_exact(record),
        cost=_cost(record),
        command=_retrain_command(record, _folder(folder)),
        run=_run(record),
        quoted=_folder(folder),
        digests=_digests(record, digest),
        settings=[
            (_text(name, 40), _setting(value))
            for name, value in list(record["method"].items())[:40]
        ],
        steps=(record["steps"] or [])[:60],
        requests=requests[:SHOWN],
        versions=[
            f"{_text(name, 40)} {_text(value, 40)}"
            for name, value in list((record["versions"] or {}).items())[:8]
        ],
        reversible="delta.safetensors" in (record["files"] or {}),
    )


def _losses(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of what changed: rows, before, now, change, after training again."""
    names = {"edited": "edited rows", "retained": "other training rows", "heldout": "held-out rows"}
    again = record["agreement"] is not None
    lines: list[tuple[str, ...]] = []
    for name, title in names.items():
        part = record["losses"][name]
        if part is None:
            lines.append((title,))
            continue
        before, after = _finite(part["before"]), _finite(part["after"])
        change = NOT_MEASURED
        if before and after is not None:
            change = ("+" if after >= before else "") + _share(after / before - 1)
        size = NOT_MEASURED if _finite(part["rows"]) is None else f"{part['rows']:,.0f}"
        cells = (title, size, _loss(part["before"]), _loss(part["after"]), change)
        lines.append((*cells, _loss(_at(record, "agreement", name))) if again else cells)
    return lines


def _retained(record: Mapping[str, Any]) -> str:
    """What stands below the table of losses."""
    said = []
    if len({request["action"] == "remove" for request in record["requests"]}) == 2:
        said.append("Edited rows: removed ones and the new content of changed ones in one mean.")
    error = _finite(_at(record, "losses", "retained", "standard_error"))
    if error is not None:
        said.append(f"Standard error of the other rows' mean change: {_small(error)}.")
    if record["losses"]["heldout"] is None:
        said.append(
            "No held-out rows were given, so nothing was measured on text outside the training rows."
        )
    elif _at(record, "losses", "heldout", "source"):
        said.append(f"Held-out rows from {_text(record['losses']['heldout']['source'])}.")
    comparable = record["comparable"]
    if _at(comparable, "source"):
        said.append(
            f"Comparable unseen rows: {_text(comparable['source'])}, {_count(comparable['rows'])}."
        )
    else:
        said.append("Comparable unseen rows: not recorded.")
    return " ".join(said)


def _exact(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How near the edit is to the exact answer: name and text of each fact."""
    residual, tolerance = (
        _finite(_at(record, "residual", "solver")),
        _finite(_at(record, "residual", "tolerance")),
    )
    solved = _small(_at(record, "residual", "solver"))
    if residual is not None and tolerance is not None:
        solved += f", {'within' if residual <= tolerance else 'NOT within'} the tolerance {_small(tolerance)}"
    gradient = [_at(record, "residual", "objective", when) for when in ("before", "after")]
    bound = (
        NOT_MEASURED
        if gradient == [None, None]
        else f"{_small(gradient[0])} before, {_small(gradient[1])} now"
    )
    edited = record["losses"]["edited"]
    forecast = _at(edited, "predicted")
    facts = [
        ("Method", _method(record)),
        ("Why it ended", _text(record["stopped"]) if record["stopped"] else NOT_MEASURED),
        (
            "Equations solved to",
            f"{solved} (worst relative residual)" if residual is not None else solved,
        ),
        (
            "Objective's gradient",
            f"{bound}: norm for the retained rows, 0 only at their optimum (Guo et al. 2020)",
        ),
        ("This move, linearly", f"loss {_loss(forecast)}, measured {_loss(_at(edited, 'after'))}"),
        ("Size of the move", f"{_share(_at(record, 'delta', 'relative'))} of the adapter's length"),
    ]
    facts[3] = facts[3] if bound != NOT_MEASURED else ("Objective's gradient", NOT_MEASURED)
    facts[4] = facts[4] if forecast is not None else ("First-order forecast", NOT_MEASURED)
    facts[5] = (
        facts[5]
        if _at(record, "delta", "relative") is not None
        else ("Size of the move", NOT_MEASURED)
    )
    divergence = _at(record, "agreement", "kl")
    if divergence:
        sets = ", ".join(
            f"{_text(name, 40)} {_setting(value)}" for name, value in list(divergence.items())[:6]
        )
        facts.append(("KL to training again", f"{sets} (nats per token)"))
    return facts


def _cost(record: Mapping[str, Any]) -> str:
    """What the edit took, in passes and time, against training again."""
    cost = record["cost"]
    total, seconds, ratio = (_finite(_at(cost, name)) for name in ("total", "seconds", "ratio"))
    work = (
        NOT_MEASURED
        if total is None
        else f"{total:,.0f} row gradients (forward and backward of one row)"
    )
    time = NOT_MEASURED if seconds is None else f"{seconds:,.1f} s"
    return f"work {work}; time {time}; against training again {_share(ratio)}."


def _digests(record: Mapping[str, Any], digest: str | None) -> list[tuple[str, str, str | None]]:
    """Name, path and digest of everything that the edit was made from and made."""
    data = record["data"]
    sizes = {when: _finite(_at(data, f"rows_{when}")) for when in ("before", "after")}
    named: Sequence[tuple[str, str | None, str | None]] = [
        ("run", _at(record, "run", "path"), _at(record, "run", "digest")),
        ("base model", _at(record, "base", "path"), _at(record, "base", "digest")),
        (
            "adapter before",
            _at(record, "adapter", "before", "path"),
            _at(record, "adapter", "before", "digest"),
        ),
        ("adapter now", None, _at(record, "adapter", "after", "digest")),
        (
            "training rows before",
            None if sizes["before"] is None else _count(sizes["before"]),
            _at(data, "before"),
        ),
        (
            "training rows now",
            None if sizes["after"] is None else _count(sizes["after"]),
            _at(data, "after"),
        ),
        ("this record", None, digest),
        ("tokenizer", None, _at(record, "tokenizer", "digest")),
        *(
            (_text(name, 80), None, str(value))
            for name, value in list((record["files"] or {}).items())[:20]
        ),
    ]
    return [
        (name, "" if where is None else _text(where), None if full is None else _text(full))
        for name, where, full in named
    ]


@dataclass(frozen=True)
class Report:
    """A written page: where it is, the answers on it, and the verdicts by what they are about."""

    path: Path
    kind: str
    title: str
    rows: int
    headlines: tuple[str, ...]
    verdicts: dict[str, str]


def report(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    compared: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Report:
    """Write the page of the edit in `folder` to the HTML file `out`.

    Parameters
    ----------
    folder : path
        Made by `unlearn remove`, `relabel` or `correct`; only its edit.json is read.
    out : path
        Ends in `.html`; its folder is made where it is missing.
    compared : mapping, optional
        From `analysis.report.agreement`, in place of the record's own `agreement`.
    overwrite : bool
        Replace a file that is already there.

    Returns
    -------
    Report
        The file written and what it says.

    Raises
    ------
    InputError
        If the folder is no edit's, the name has another ending, or the file exists.
    StoreError
        If the record is damaged, or the file cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise InputError(
            f"a page was asked for as {out}; expected a file name that ends in .html: rename it"
        )
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists and would be replaced: give another --out, or --overwrite")
    record = read_record(folder)
    if compared is not None:
        record = {**record, "agreement": dict(compared)}
    html = page(record, folder, hashlib.sha256((Path(folder) / RECORD).read_bytes()).hexdigest())
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise StoreError(f"{out} could not be written: {error}") from error
    parts = groups(record)
    verdicts = {
        ("removed" if group.kind == "remove" else "changed"): group.verdict for group in parts
    }
    verdicts |= {"others": damage(record["guard"]), "retraining": agreement(record)[0]}
    headlines = tuple(_headline(group, record) for group in parts)
    return Report(out, record["kind"], _title(record), len(record["requests"]), headlines, verdicts)
