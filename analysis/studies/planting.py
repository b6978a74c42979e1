"""Rows planted among training rows, in and outside their distribution, of matched lengths.

No model saw any of them before.

    in         rows of a held-out file: the same domain, other subjects
    other      rows of another domain
    shuffled   rows of the held-out file with the words of the completion in random order
    random     prompt and completion of random tokens

Every row of the other kinds has a partner among `in` with nearly as many completion tokens, and as
many copies.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from influence.errors import InputError
from influence.rows import Example, Examples, examples_from_rows
from influence.store import write_text
from influence.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("in", "other", "shuffled", "random")
OUTSIDE = KINDS[1:]
#: Partners may differ by so many completion tokens, or by this share of them.
TOKENS_APART, SHARE_APART = 1, 0.1


@dataclass(frozen=True, eq=False)
class Planted:
    """Training rows with others among them that no model saw yet.

    Attributes
    ----------
    rows : Examples
        The training rows, then the planted ones, `repeats` times each.
    kinds, partners : dict of str to str
        For every planted id (of the first copy), its kind, and the `in` row of its length (an `in`
        row's is itself).
    tokens : dict of str to int
        Completion tokens of every planted id, the end included.
    holdout : Examples
        Held-out rows that were not planted, for comparison.
    repeats : int
    """

    rows: Examples = field(repr=False)
    kinds: dict[str, str] = field(repr=False)
    partners: dict[str, str] = field(repr=False)
    tokens: dict[str, int] = field(repr=False)
    holdout: Examples = field(repr=False)
    repeats: int

    @property
    def ids(self) -> list[str]:
        """The planted ids, kind by kind."""
        return list(self.kinds)

    @property
    def planted_rows(self) -> Examples:
        """The planted rows, one copy each, kind by kind."""
        return Examples(self.rows[self.rows.index(id)] for id in self.ids)

    @property
    def original(self) -> list[str]:
        """Ids of the rows that were there before."""
        return self.rows.ids[: len(self.rows) - self.repeats * len(self.kinds)]

    def of(self, kind: str) -> list[str]:
        """The planted ids of one kind."""
        return [id for id, other in self.kinds.items() if other == kind]


def plant(
    rows: Examples,
    holdout: Examples,
    other: Examples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    per_kind: int = 8,
    repeats: int = 1,
    max_length: int | None = None,
    seed: int = 0,
) -> Planted:
    """Add `per_kind` rows of each kind to the training rows. See the module for the kinds.

    Completions are cut at the end of a word where the lengths ask for it: those of `other` and
    `shuffled` first, those of `in` only where no longer rows of another kind are left. Rows that
    are no prompt with a completion are passed over.

    Parameters
    ----------
    rows
        The training rows.
    holdout
        Rows of the same domain that no model saw: at least `2 * per_kind + 1` different ones, for
        `in`, `shuffled` and comparison.
    other
        Rows of another domain, at least `per_kind`.
    tokenizer, max_length
        As the run has them; lengths are counted by them.
    repeats
        How often each planted row stands among the training rows.

    Raises `InputError` where rows are too few, are training rows word for word, or have lengths
    that cannot be matched.
    """
    if per_kind < 2 or repeats < 1 or seed < 0:
        raise InputError(
            f"per_kind {per_kind}, repeats {repeats} and seed {seed} were given; expected at least "
            "2, 1 and 0"
        )
    rng = np.random.default_rng([seed, per_kind])
    outside = _cuts(_pool(other, rows, "other", per_kind, rng), tokenizer, max_length)
    most = sorted((line[-1][0] for line in outside), reverse=True)[per_kind - 1]
    inside = _cuts(_pool(holdout, rows, "held-out", 2 * per_kind + 1, rng), tokenizer, max_length)
    inside.sort(key=lambda line: line[-1][0] > most)  # rows that need no cut come first
    rows_in, spare = inside[:per_kind], [line[-1][1] for line in inside[per_kind:]]
    partners = [
        max((c for c in line if c[0] <= most), key=lambda c: c[0], default=line[0])
        for line in rows_in
    ]
    lengths = [count for count, _ in partners]
    chosen = {"in": [row for _, row in partners]}
    chosen["other"] = _matched(outside, lengths)[1]
    words = _cuts([_shuffled(row, rng) for row in spare], tokenizer, max_length)
    used, chosen["shuffled"] = _matched(words, lengths)
    left = [row for place, row in enumerate(spare) if place not in used]
    chosen["random"] = _canaries(chosen["in"], lengths, tokenizer, max_length, rng)
    return _assembled(rows, chosen, Examples(left), tokenizer, max_length, repeats)


def _pool(
    candidates: Examples, rows: Examples, what: str, least: int, rng: np.random.Generator
) -> list[Example]:
    """Different rows of a prompt and a completion, none of them a training row, in random order."""
    trained = {row.content_hash for row in rows}
    seen = [row.id for row in candidates if row.content_hash in trained]
    if seen:
        raise InputError(
            f"{len(seen)} of {len(candidates)} {what} rows have the content of training rows (the "
            f"first is {seen[0]!r}): give rows that the adapter never saw"
        )
    usable = {
        row.content_hash: row
        for row in candidates
        if row.completion is not None and row.completion.strip()
    }
    if len(usable) < least:
        raise InputError(
            f"{len(usable)} of {len(candidates)} {what} rows are different prompts with a "
            f"completion, and {least} are needed: give more of them, or plant fewer of each kind"
        )
    rows_ = list(usable.values())
    return [rows_[i] for i in rng.permutation(len(rows_))]


def _shuffled(row: Example, rng: np.random.Generator) -> Example:
    """The row with the words of its completion in random order, another one where there is one."""
    assert row.completion is not None
    words = row.completion.split()
    order = list(words)
    while order == words and len(set(words)) > 1:
        order = [words[i] for i in rng.permutation(len(words))]
    return replace(row, completion=f" {' '.join(order)}")


def _cuts(
    rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[list[tuple[int, Example]]]:
    """Beginnings of every row that end with a word, (completion tokens, row), all of it last."""
    lines = []
    for row in rows:
        text = row.completion or ""
        ends = [i for i in range(1, len(text)) if text[i].isspace() and not text[i - 1].isspace()]
        lines.append([replace(row, completion=text[:end]) for end in ends] + [row])
    counts = iter(_counts([row for line in lines for row in line], tokenizer, max_length))
    return [[(next(counts), row) for row in line] for line in lines]


def _counts(
    rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[int]:
    return tokenize(Examples(rows), tokenizer, max_length=max_length).counts.tolist()


def _matched(
    lines: Sequence[Sequence[tuple[int, Example]]], lengths: Sequence[int]
) -> tuple[set[int], list[Example]]:
    """For every length the unused row, whole or cut, that is nearest.

    The longest length chooses first.
    """
    used: set[int] = set()
    matched: dict[int, Example] = {}
    for wanted in sorted(range(len(lengths)), key=lambda j: -lengths[j]):
        best = min(
            (abs(count - lengths[wanted]), line[-1][0] - count, place, cut)
            for place, line in enumerate(lines)
            if place not in used
            for cut, (count, _) in enumerate(line)
        )
        used.add(best[2])
        matched[wanted] = lines[best[2]][best[3]][1]
    return used, [matched[j] for j in range(len(lengths))]


def _canaries(
    partners: Sequence[Example],
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    rng: np.random.Generator,
) -> list[Example]:
    """Rows of random tokens, as many in prompt and completion as the partners have."""
    pieces = _pieces(tokenizer)
    prompts = tokenize(Examples(partners), tokenizer, max_length=max_length)
    word = pieces[0][1]
    ends = (
        _counts([Example("", prompt=word, completion=f" {word}")], tokenizer, None)[0] - 1
    )  # an end of sequence
    canaries = []
    for row, length, prompt in zip(
        partners, lengths, (prompts.lengths - prompts.counts).tolist(), strict=True
    ):
        texts = [
            _random_text(pieces, max(1, size), tokenizer, rng) for size in (prompt, length - ends)
        ]
        canaries.append(replace(row, prompt=texts[0].strip(), completion=texts[1]))
    return canaries


def _pieces(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    """Tokens that are words: written after a space they are read as that one token."""
    special = set(tokenizer.all_special_ids)
    words = {
        id: str(tokenizer.decode([id])).strip() for id in range(len(tokenizer)) if id not in special
    }
    printable = {
        id: word
        for id, word in words.items()
        if word and word.isprintable() and "\ufffd" not in word
    }
    read = tokenizer([f" {word}" for word in printable.values()], add_special_tokens=False)[
        "input_ids"
    ]
    pieces = [
        (id, word)
        for (id, word), ids in zip(printable.items(), read, strict=True)
        if list(ids) == [id]
    ]
    if len(pieces) < 2:
        raise InputError(
            "no token of this tokenizer is written after a space and read as itself: no random "
            "rows are possible"
        )
    return pieces


def _random_text(
    pieces: Sequence[tuple[int, str]],
    size: int,
    tokenizer: PreTrainedTokenizerBase,
    rng: np.random.Generator,
) -> str:
    """Words of `size` random tokens, each after a space, that are read as just these."""
    for _ in range(100):
        drawn = [pieces[i] for i in rng.integers(len(pieces), size=size)]
        text = "".join(f" {word}" for _, word in drawn)
        if list(tokenizer(text, add_special_tokens=False)["input_ids"]) == [id for id, _ in drawn]:
            return text
    raise InputError(
        f"this tokenizer reads {size} random tokens as others in 100 tries: no random rows are "
        "possible"
    )


def _assembled(
    rows: Examples,
    chosen: Mapping[str, Sequence[Example]],
    holdout: Examples,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    repeats: int,
) -> Planted:
    """Name the planted rows, and check lengths and contents."""
    prefix = "planted"
    while any(id.startswith(prefix) for id in rows.ids):
        prefix += "-"
    named = {
        f"{prefix}-{kind}-{j:03d}": row for kind in KINDS for j, row in enumerate(chosen[kind])
    }
    named = {id: replace(row, id=id, group=None) for id, row in named.items()}
    kinds = {f"{prefix}-{kind}-{j:03d}": kind for kind in KINDS for j in range(len(chosen[kind]))}
    partners = {id: f"{prefix}-in-{id.rpartition('-')[2]}" for id in named}
    tokens = dict(zip(named, _counts(list(named.values()), tokenizer, max_length), strict=True))
    apart = {id: abs(tokens[id] - tokens[partner]) for id, partner in partners.items()}
    far = [
        id
        for id, gap in apart.items()
        if gap > max(TOKENS_APART, SHARE_APART * tokens[partners[id]])
    ]
    if far:
        worst = max(far, key=apart.__getitem__)
        raise InputError(
            f"{len(far)} of {len(named)} planted rows could not be matched in length: {worst} has "
            f"{tokens[worst]} completion tokens and its partner {tokens[partners[worst]]}. Give "
            "more held-out and other rows, or plant fewer of each kind"
        )
    contents = [row.content_hash for row in rows]
    same = [id for id, row in named.items() if row.content_hash in set(contents)]
    hashes = [row.content_hash for row in named.values()]
    if same or len(set(hashes)) < len(hashes):
        raise InputError(
            f"cut to equal lengths, {len(same) or 'some'} planted rows are a training row or each "
            "other word for word: give other rows, or another seed"
        )
    copies = [
        row if k == 0 else replace(row, id=f"{row.id}#{k + 1}")
        for row in named.values()
        for k in range(repeats)
    ]
    left = Examples(row for row in holdout if row.content_hash not in set(hashes))
    return Planted(Examples([*rows, *copies]), kinds, partners, tokens, left, repeats)


def plain_rows(count: int = 48, seed: int = 0) -> Examples:
    """Rows that are of no study's domain: sums told step by step, and recipes.

    For want of a file of other rows.
    """
    rng = random.Random(f"plain {seed}")
    foods, ways = (
        ("rice", "lentils", "onions", "pasta", "beans", "carrots"),
        ("Boil", "Fry", "Steam", "Bake", "Soak"),
    )
    made = []
    for number in range(count):
        parts = [rng.randrange(11, 99) for _ in range(rng.randrange(2, 6))]
        if number % 2:
            prompt = f"Compute {' + '.join(map(str, parts))}:"
            sums = [
                f" {sum(parts[:k])} plus {parts[k]} gives {sum(parts[: k + 1])}."
                for k in range(1, len(parts))
            ]
            answer = "".join(sums)
        else:
            uses = [
                (way, rng.choice(foods), size)
                for way, size in zip(rng.sample(ways, len(parts)), parts, strict=True)
            ]
            prompt = f"Recipe {number} for {rng.randrange(2, 9)}:"
            answer = "".join(f" {way} {size} grams of {food}." for way, food, size in uses)
        made.append({"id": f"plain-{number:03d}", "prompt": prompt, "completion": answer})
    return examples_from_rows(made)


def write_rows(rows: Examples, path: Path) -> None:
    """Write rows as JSON lines that `influence.read_examples` reads as the same rows."""
    keys = ("id", "group", "prompt", "completion", "messages", "text")
    lines = [
        {key: getattr(row, key) for key in keys if getattr(row, key) is not None} for row in rows
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
