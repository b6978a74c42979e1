"""Rows that are there twice, and rows that answer one question in two ways, by their text.

Questions count as one where their vectors' cosine is at least `SAME_QUESTION` and they name the
same numbers, and, where both rows have a group, it is the same. So do answers, from `SAME_ANSWER`
on. Between that and nothing in common an answer is another one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.cleaning.findings import RELABEL, REMOVE, Finding, Found, ranked
from analysis.cleaning.texts import Nearest, Said, pairwise, plain, vectors

#: Cosine from which on two questions, or two answers, are the same. Planted near copies had 0.88 to
#: 0.97, other questions at most 0.81 (benchmarks/cleaning.py on the demo and tofu-tiny, 2026-11-29).
SAME_QUESTION, SAME_ANSWER = 0.85, 0.85
#: Rows with the very same question that are compared with one another, at most: a prompt that more
#: rows share is a template, and asks for many answers.
TEMPLATE = 20


@dataclass(frozen=True, eq=False)
class Repeats:
    """Pairs of rows that ask the same, and how alike they answer.

    `pairs` [p, 2] are positions, the earlier row first; `questions` and `answers` [p] cosines;
    `same` bool [p], whether the answers are.
    """

    pairs: np.ndarray = field(repr=False)
    questions: np.ndarray = field(repr=False)
    answers: np.ndarray = field(repr=False)
    same: np.ndarray = field(repr=False)


def repeats(
    texts: Sequence[Said], groups: Sequence[str | None], near: Nearest, asking: Any
) -> Repeats:
    """Compare rows that ask the same: the very same question, or one of the nearest (`near`).

    `asking` [n, features] are the vectors of what is `asked`, by which the nearest were found. Texts
    that ask nothing are compared with one another alone.
    """
    n = len(texts)
    questions = [plain(each.question) for each in texts]
    answers = [plain(each.answer) for each in texts]
    keys = [q or f"\0{a}" for q, a in zip(questions, answers, strict=True)]
    asked: dict[str, list[int]] = defaultdict(list)
    whole: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in range(n):
        asked[keys[row]].append(row)
        whole[keys[row], answers[row]].append(row)
    pairs: set[tuple[int, int]] = set()
    for rows in whole.values():  # every exact copy, beside the first
        pairs |= {(rows[0], row) for row in rows[1:]}
    for rows in asked.values():
        if len(rows) <= TEMPLATE:
            pairs |= {(a, b) for at, a in enumerate(rows) for b in rows[at + 1 :]}
    numbers = [re.findall(r"\d+", q) for q in questions]
    for row, column in np.argwhere(near.cosines >= SAME_QUESTION).tolist():
        other = int(near.rows[row, column])
        a, b = min(row, other), max(row, other)
        crowded = len(asked[keys[a]]) > TEMPLATE or len(asked[keys[b]]) > TEMPLATE
        apart = None not in (groups[a], groups[b]) and groups[a] != groups[b]
        asks_as_well = bool(questions[a]) == bool(questions[b])
        if asks_as_well and numbers[a] == numbers[b] and not (crowded or apart):
            pairs.add((a, b))
    chosen = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    alike = pairwise(vectors(answers), *chosen.T)
    exact = np.array([answers[a] == answers[b] for a, b in chosen.tolist()], dtype=bool)
    digits = [re.findall(r"\d+", answer) for answer in answers]
    equal = np.array([digits[a] == digits[b] for a, b in chosen.tolist()], dtype=bool)
    return Repeats(
        chosen,
        pairwise(asking, *chosen.T),
        np.where(exact, 1.0, alike),
        exact | (equal & (alike >= SAME_ANSWER)),
    )


def duplicates(found: Repeats, ids: Sequence[str]) -> Found:
    """Copies of earlier rows, of which `ids` [n] are the names.

    Score: the smaller cosine of their questions and their answers, at most 1; -inf of no copy.
    """
    scores, first = np.full(len(ids), -np.inf), {}
    each = zip(found.pairs.tolist(), found.questions, found.answers, found.same, strict=True)
    for (a, b), question, answer, same in each:
        score = min(float(question), float(answer), 1.0)
        if same and score > scores[b]:
            scores[b], first[b] = score, a
    findings = []
    for row, other in first.items():
        exact = scores[row] > 1 - 1e-6
        what = "says the same as" if exact else f"says nearly the same ({scores[row]:.2f}) as"
        findings.append(
            Finding(
                row, "duplicate", float(scores[row]), f"{what} {ids[other]!r}", None, other, REMOVE
            )
        )
    rule = f"question and answer as another row's, cosine at least {SAME_ANSWER:g}"
    return Found("duplicate", rule, scores, ranked(findings))


def contradictions(
    found: Repeats,
    texts: Sequence[Said],
    ids: Sequence[str],
    against: np.ndarray,
) -> Found:
    """Rows that answer otherwise than another row that asks the same, both of them.

    Score: the questions' cosine times what the answers do not share, 1 less their cosine; -inf of a
    row that no other contradicts. `ids` [n] are the rows' names. Where most rows that ask the
    same give one answer, it is suggested to the others. Else the one is suggested for removal whose
    share of the pull `against` [n] its own group is larger, which is 0 where it is none to speak of.
    """
    scores, other = np.full(len(ids), -np.inf), {}
    asks_same: dict[int, set[int]] = defaultdict(set)
    says_same: dict[int, set[int]] = defaultdict(set)
    each = zip(found.pairs.tolist(), found.questions, found.answers, found.same, strict=True)
    for (a, b), question, answer, same in each:
        asks_same[a].add(b)
        asks_same[b].add(a)
        if same:
            says_same[a].add(b)
            says_same[b].add(a)
            continue
        for row, opposite in ((a, b), (b, a)):
            score = float(question) * (1 - float(answer))
            if score > scores[row]:
                scores[row], other[row] = score, opposite
    findings = []
    for row, opposite in other.items():
        better = majority(row, asks_same, says_same)
        evidence, suggested, answer = f"answers otherwise than {ids[opposite]!r}", "", None
        if better is not None:
            times = 1 + len(says_same[better])
            evidence += f"; {times} rows that ask the same answer as {ids[better]!r}"
            suggested, answer, opposite = RELABEL, texts[better].answer, better
        elif not says_same[row] and against[row] > against[opposite]:
            evidence += f"; it pulls against its own group ({against[row]:.0%}), that one less"
            suggested = REMOVE
        findings.append(
            Finding(
                row,
                "contradiction",
                float(scores[row]),
                evidence,
                None,
                opposite,
                suggested,
                answer,
            )
        )
    rule = f"asks as another row does, cosine at least {SAME_QUESTION:g}, and answers otherwise"
    return Found("contradiction", rule, scores, ranked(findings))


def majority(
    row: int, asks_same: dict[int, set[int]], says_same: dict[int, set[int]]
) -> int | None:
    """The first row whose answer most of the rows that ask as `row` does give, and it does not.

    None where no answer is given by two rows or more, and by more than half of all.
    """
    circle = {row, *asks_same[row]}
    votes = Counter({each: 1 + len(says_same[each] & circle) for each in circle})
    most = max(votes.values())
    if most < 2 or 2 * most <= len(circle):
        return None
    best = min(each for each in circle if votes[each] == most)
    return None if best == row or best in says_same[row] else best
