"""Rows whose gradients pull against others: the user's good rows, or their own kind.

The effect of removing row i alone on row j's mean loss follows from what credit is shared by
(`influence.credit`; t_p the points' factors, s the strength, T_j supervised tokens):

    effect[j, i] = - sum_p t_p / s  sqrt(w_i / w_j) / T_j  P_ji / P_ii          (i not j)

Positive: row i helped row j. *Against* is the share of a row's effects on others that is negative,
`sum of |effect| where < 0 / sum of |effect|`, between 0 and 1: unlike the mean effect it does not
hang on the row's size, and it found planted wrong rows better (average precision 0.88 and 0.57 on
the demo and tofu-tiny, by the mean 0.69 and 0.35; benchmarks/cleaning.py, 2026-11-29).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from analysis.cleaning.findings import RELABEL, REMOVE, Finding, Found, ranked
from analysis.cleaning.texts import AT_ONCE, Nearest, Said, pairwise, plain, vectors
from influence.credit import Credit
from influence.rows import Examples

#: Of each training row the positions of the good rows that it is compared with, `[k]`.
Kin = list[np.ndarray]

#: Rows of its own group that a row is compared with, the nearest by their questions; and, of a row
#: without a group, the nearest of all. A choice.
MATES, STRANGERS = 50, 20
#: Share of a row's pull against its mates from which on its answer is in doubt: of what it listed
#: 13 of 18 were planted on the demo and 6 of 8 on tofu-tiny (benchmarks/cleaning.py, 2026-11-29).
DOUBTFUL = 0.2
#: Good rows that a row of no group of theirs is compared with; and the share of its pull against those
#: of its kind from which on it is listed, by its gain. On all good rows a gain drowns in those that
#: have nothing to do with the row: average precision 0.25 and 0.32, on its kind 0.59 and 0.57 (30 and
#: 20 good rows of the demo and tofu-tiny, rows with a group; benchmarks/cleaning.py, 2026-11-29).
NEAREST_GOOD, HARMFUL = 5, 0.7
#: A better answer is one on which the two rows that a row opposes most agree: each takes at least
#: this share of its pull, and their answers' cosine is at least the other.
MUCH, AGREE = 0.1, 0.8


def share_against(effects: np.ndarray) -> np.ndarray:
    """The share of effects `[k, ...]` that is negative, by their size, `[...]`; 0 of none."""
    total = np.abs(effects).sum(axis=0)
    negative = -np.minimum(effects, 0).sum(axis=0)
    return np.divide(negative, total, out=np.zeros(total.shape), where=total > 0)


def kin(rows: Examples, queries: Examples, texts: Sequence[Said], asked: Sequence[Said]) -> Kin:
    """The good rows that each training row is compared with: of its group, else the nearest by text.

    `texts` and `asked` are what both say.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for place, query in enumerate(queries):
        if query.group is not None:
            members[query.group].append(place)
    own = [members.get(row.group or "", []) if row.group is not None else [] for row in rows]
    lonely = [row for row, each in enumerate(own) if not each]
    if lonely:
        words = vectors([each.whole for each in [*texts, *asked]])
        turned, count = words[len(texts) :].T.tocsr(), min(NEAREST_GOOD, len(asked))
        for start in range(0, len(lonely), AT_ONCE):
            part = lonely[start : start + AT_ONCE]
            near = np.asarray((words[part] @ turned).todense())
            for row, each in zip(part, np.argsort(-near, axis=1, kind="stable"), strict=True):
                own[row] = each[:count].tolist()
    return [np.array(each, dtype=np.int64) for each in own]


def harms(scores: np.ndarray, compared: Kin, query_ids: Sequence[str]) -> Found:
    """Rows that oppose the good rows of their kind.

    `scores` [query, train] are of mean losses, nats per token; `compared` has the good rows that each
    row is compared with. Score, and gain: the predicted fall of their mean loss if the row alone goes.
    """
    values = scores.astype(np.float64)
    gains, findings = np.zeros(len(compared)), []
    for row, own in enumerate(compared):
        effects = values[own, row]
        against, gains[row] = float(share_against(effects)), -effects.mean()
        if against < HARMFUL:
            continue
        worst = int(own[effects.argmin()])
        evidence = (
            f"{against:.0%} of its pull on {len(own)} good rows of its kind is against them; "
            f"most against {query_ids[worst]!r}, which would gain {-effects.min():.3g} nats a token"
        )
        gain = float(gains[row])
        findings.append(Finding(row, "harms", gain, evidence, gain, None, REMOVE))
    rule = (
        f"at least {HARMFUL:.0%} of its pull on the good rows of its group, or on the "
        f"{NEAREST_GOOD} that say most alike, is against them"
    )
    return Found("harms", rule, gains, ranked(findings))


def mates(
    groups: Sequence[str | None], near: Nearest, most: int = MATES, strangers: int = STRANGERS
) -> list[np.ndarray]:
    """The rows that each row is compared with: of its group, else those that ask most alike.

    `near` is by the rows' questions. In a group of more than `most`, these are the nearest ones
    that `near` knows, filled up with those that stand nearest in the training set.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        if group is not None:
            members[group].append(row)
    chosen = []
    for row, group in enumerate(groups):
        own = members.get(group or "", []) if group is not None else []
        if len(own) < 2:
            chosen.append(np.sort(near.rows[row, :strangers]))
            continue
        if len(own) <= most + 1:
            chosen.append(np.array([each for each in own if each != row]))
            continue
        nearest = [int(each) for each in near.rows[row] if groups[each] == group]
        rest = np.array([each for each in own if each != row and each not in nearest])
        rest = rest[np.argsort(np.abs(rest - row), kind="stable")]
        chosen.append(np.sort(np.array([*nearest, *rest.tolist()][:most])))
    return chosen


@dataclass(frozen=True, eq=False)
class Pull:
    """What every row does to its mates.

    `against` [n] is the share of its pull that is against them, `gains` [n] the predicted fall of
    their mean loss if it goes, nats per token; `opposed` has of each row the mates that it opposes
    most, at most two, and `shares` how much of its pull goes against each.
    """

    against: np.ndarray = field(repr=False)
    gains: np.ndarray = field(repr=False)
    opposed: list[list[int]] = field(repr=False)
    shares: list[list[float]] = field(repr=False)


def effects_on(credit: Credit, counts: np.ndarray, row: int, others: np.ndarray) -> np.ndarray:
    """Predicted changes of the mean losses of `others` [k] if `row` alone goes, nats per token.

    `counts` [n] are the rows' supervised tokens.
    """
    weights, rows = credit.weights, np.array([row, *others.tolist()])
    ratio = np.divide(
        weights[row], weights[others], out=np.zeros(len(others)), where=weights[others] > 0
    )
    found = np.zeros(len(others))
    for factor, inverse in zip(credit.factors, credit.inverses, strict=True):
        block = inverse.block(rows)
        found -= factor * block[1:, 0] / block[0, 0]
    return found * np.sqrt(ratio) / (credit.path.strength * counts[others])


def pulls(credit: Credit, counts: np.ndarray, compared: Sequence[np.ndarray]) -> Pull:
    """What every row does to those that it is `compared` with."""
    n = len(compared)
    against, gains = np.zeros(n), np.zeros(n)
    opposed: list[list[int]] = [[] for _ in range(n)]
    shares: list[list[float]] = [[] for _ in range(n)]
    for row, others in enumerate(compared):
        if not len(others):
            continue
        effects = effects_on(credit, counts, row, others)
        total = np.abs(effects).sum()
        against[row], gains[row] = share_against(effects), -effects.mean()
        worst = [at for at in np.argsort(effects, kind="stable")[:2] if effects[at] < 0]
        opposed[row] = [int(others[at]) for at in worst]
        shares[row] = [float(-effects[at] / total) for at in worst]
    return Pull(against, gains, opposed, shares)


def doubtful(
    pull: Pull, compared: Sequence[np.ndarray], texts: Sequence[Said], ids: Sequence[str]
) -> Found:
    """Rows whose answer is in doubt, as they pull against their own group or those that ask alike.

    Score: the share of the pull that is against them.
    """
    has = np.array([len(others) > 0 for others in compared], dtype=bool)
    scores = np.where(has, pull.against, -np.inf)
    rows = np.flatnonzero(scores >= DOUBTFUL)
    agreed = _agreed(pull, rows, texts)
    findings = []
    for row in rows.tolist():
        better = agreed.get(row)
        first = pull.opposed[row][0]
        evidence = (
            f"{scores[row]:.0%} of its pull on {len(compared[row])} rows of its kind is against "
            f"them, most against {ids[first]!r}"
        )
        if better is not None:
            evidence += f", which answers as {ids[pull.opposed[row][1]]!r} does"
        answer = None if better is None else texts[better].answer
        findings.append(
            Finding(
                row,
                "label",
                float(scores[row]),
                evidence,
                float(pull.gains[row]),
                first,
                REMOVE if better is None else RELABEL,
                answer,
            )
        )
    rule = (
        f"at least {DOUBTFUL:.0%} of its pull on its group, or on those that ask alike, is against"
    )
    return Found("label", rule, scores, ranked(findings))


def _agreed(pull: Pull, rows: np.ndarray, texts: Sequence[Said]) -> dict[int, int]:
    """Of some rows the one whose answer is better, where the two most opposed rows agree on it."""
    doubted = set(rows.tolist())
    pairs = {
        row: pull.opposed[row]
        for row in doubted
        if len(pull.opposed[row]) == 2
        and min(pull.shares[row]) >= MUCH
        and not doubted & set(pull.opposed[row])
    }
    if not pairs:
        return {}
    involved = sorted({each for pair in pairs.values() for each in pair})
    place = {each: at for at, each in enumerate(involved)}
    answers = vectors([plain(texts[each].answer) for each in involved])
    first, second = (np.array([place[pair[k]] for pair in pairs.values()]) for k in (0, 1))
    alike = pairwise(answers, first, second)
    return {
        row: pair[0] for (row, pair), cos in zip(pairs.items(), alike, strict=True) if cos >= AGREE
    }
