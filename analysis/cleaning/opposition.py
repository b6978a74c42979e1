"""Rows whose gradients pull against others: the user's good rows, or their own kind.

The effect of removing row i alone on row j's mean loss follows from what credit is shared by
(`influence.credit`; t_p the points' factors, s the strength, T_j supervised tokens):

    effect[j, i] = - sum_p t_p / s  sqrt(w_i / w_j) / T_j  P_ji / P_ii          (i not j)

Positive: row i helped row j. *Against* is the share of a row's effects on others that is negative,
`sum of |effect| where < 0 / sum of |effect|`, between 0 and 1: unlike the mean effect it does not
hang on the row's size, and it found planted wrong rows better (average precision 0.88 and 0.57 on
the demo and tofu-tiny, by the mean 0.69 and 0.35; benchmarks/cleaning.py, 2026-11-29).

Everything here was chosen on those two, whose adapters know their rows by heart. On SmolLM2, where
nothing was chosen, *against* found wrong rows with average precision 0.36, and the base's loss 0.66.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from analysis.cleaning.findings import RELABEL, REMOVE, Finding, Found, ranked
from analysis.cleaning.outliers import FAR, modified_z
from analysis.cleaning.texts import Nearest, Said, pairwise, rows_at_once, vectors
from influence.credit import Credit
from influence.memory import block_bytes
from influence.rows import Examples

#: Rows of its own group that a row is compared with, the nearest by their questions; and, of a row
#: without a group, the nearest of all. A choice.
MATES, STRANGERS = 50, 20
#: Share of a row's pull against its mates from which on its answer is in doubt: of what it listed
#: 13 of 19 were planted on the demo and 6 of 8 on tofu-tiny, and 3 of 15 on SmolLM2, where it was not
#: chosen (benchmarks/cleaning.py, 2026-11-29).
DOUBTFUL = 0.2
#: Good rows that a row of no group of theirs is compared with; and the share of its pull against those
#: of its kind from which on it is listed, by its gain. On all good rows a gain drowns in those that
#: have nothing to do with the row: average precision 0.25 and 0.32, on its kind 0.59 and 0.57 (30 and
#: 20 good rows of the demo and tofu-tiny, rows with a group; benchmarks/cleaning.py, 2026-11-29).
NEAREST_GOOD, HARMFUL = 5, 0.7
#: Bytes of the effects of some rows on all others that are held at a time, three arrays of them.
BLOCK_BYTES = 256 << 20
#: A better answer is one on which the two rows that a row opposes most agree: each takes at least
#: this share of its pull, and their answers' cosine is at least the other.
MUCH, AGREE = 0.1, 0.8


def share_against(effects: np.ndarray) -> np.ndarray:
    """The share of effects `[k, ...]` that is negative, by their size, `[...]`; 0 of none."""
    total = np.abs(effects).sum(axis=0)
    negative = -np.minimum(effects, 0).sum(axis=0)
    return np.divide(negative, total, out=np.zeros(total.shape), where=total > 0)


def kin(
    rows: Examples, queries: Examples, texts: Sequence[Said], asked: Sequence[Said]
) -> list[np.ndarray]:
    """The good rows that each training row is compared with: of its group, else the nearest by text.

    `texts` and `asked` are what both say. Positions among the good rows, [k] for each row.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for place, query in enumerate(queries):
        if query.group is not None:
            members[query.group].append(place)
    # rows of a group hold one and the same array
    shared = {group: np.array(each, dtype=np.int64) for group, each in members.items()}
    own = [shared.get(row.group) if row.group is not None else None for row in rows]
    lonely = [row for row, each in enumerate(own) if each is None]
    if lonely:
        words = vectors([each.whole for each in [*texts, *asked]])
        turned, count = words[len(texts) :].T.tocsr(), min(NEAREST_GOOD, len(asked))
        step = rows_at_once(len(asked))
        for start in range(0, len(lonely), step):
            part = lonely[start : start + step]
            near = np.asarray((words[part] @ turned).todense())
            for row, each in zip(part, np.argsort(-near, axis=1, kind="stable"), strict=True):
                own[row] = each[:count].copy()  # not a view that keeps all of them
    return [each for each in own if each is not None]


def harms(scores: np.ndarray, compared: Sequence[np.ndarray], query_ids: Sequence[str]) -> Found:
    """Rows that oppose the good rows of their kind.

    `scores` [query, train] are of mean losses, nats per token; `compared` has the good rows that each
    row is compared with. Score, and gain: the predicted fall of their mean loss if the row alone goes.
    """
    gains, findings = np.zeros(len(compared)), []
    for row, own in enumerate(compared):
        effects = scores[own, row].astype(np.float64)
        against, gains[row] = float(share_against(effects)), -effects.mean()
        if against < HARMFUL:
            continue
        worst = int(own[effects.argmin()])
        evidence = (
            f"{against:.0%} of its pull on {len(own)} good row{'s' * (len(own) > 1)} of its kind is "
            f"against; most against {query_ids[worst]!r}, which would gain {-effects.min():.3g} nats a token"
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
    chosen = [np.sort(nearest[:strangers]) for nearest in near.rows]
    for group, rows in members.items():
        own = np.array(rows)
        for place, row in enumerate(rows if len(rows) > 1 else ()):
            if len(own) <= most + 1:
                chosen[row] = np.delete(own, place)
            else:
                nearest = [int(each) for each in near.rows[row] if groups[each] == group]
                chosen[row] = _filled_up(nearest[:most], own, place, most)
    return chosen


def _filled_up(nearest: list[int], own: np.ndarray, place: int, most: int) -> np.ndarray:
    """The `nearest` and those of a group's rows `own` that stand next to the one at `place`, [most].

    Looked at are no more of them than may be needed on either side, as groups may be large.
    """
    aside = most + len(nearest)
    around = own[max(0, place - aside) : place + aside + 1]
    rest = np.setdiff1d(around, [own[place], *nearest])
    rest = rest[np.argsort(np.abs(rest - own[place]), kind="stable")]
    return np.sort([*nearest, *rest[: most - len(nearest)].tolist()])


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


def effects_of(credit: Credit, counts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Predicted changes of all rows' mean losses `[k, n]` if each of `rows` [k] alone goes, nats per
    token.

    `counts` [n] are the rows' supervised tokens. What a row does to itself is not among it: its own
    entry means nothing.
    """
    weights, chosen = credit.weights, np.zeros((len(rows), len(counts)))
    chosen[np.arange(len(rows)), rows] = 1
    found = np.zeros(chosen.shape)
    for factor, inverse in zip(credit.factors, credit.inverses, strict=True):
        part = inverse.apply(chosen)
        part *= (factor / inverse.diagonal[rows])[:, None]
        found -= part
    roots = np.sqrt(np.divide(1, weights, out=np.zeros(len(weights)), where=weights > 0))
    found *= np.sqrt(weights[rows])[:, None]
    found *= roots / (credit.path.strength * counts)
    return found


def pulls(credit: Credit, counts: np.ndarray, compared: Sequence[np.ndarray]) -> Pull:
    """What every row does to those that it is `compared` with; `counts` as in `effects_of`.

    So many rows are looked at together as a block holds, as inverses may lie in files.
    """
    n = len(compared)
    against, gains = np.zeros(n), np.zeros(n)
    opposed: list[list[int]] = [[] for _ in range(n)]
    shares: list[list[float]] = [[] for _ in range(n)]
    having = np.flatnonzero([len(others) > 0 for others in compared])
    step = max(1, block_bytes(BLOCK_BYTES) // (3 * 8 * max(n, 1)))
    for start in range(0, len(having), step):
        rows = having[start : start + step]
        for row, every in zip(rows.tolist(), effects_of(credit, counts, rows), strict=True):
            others, effects = compared[row], every[compared[row]]
            total = np.abs(effects).sum()
            against[row], gains[row] = share_against(effects), -effects.mean()
            worst = [at for at in np.argsort(effects, kind="stable")[:2] if effects[at] < 0]
            opposed[row] = [int(others[at]) for at in worst]
            shares[row] = [float(-effects[at] / total) for at in worst]
    return Pull(against, gains, opposed, shares)


#: Rows whose shares tell what is usual, at least: one of fewer cannot stand out by 3.5.
BULK = 5


def unusual(scores: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the shares `scores` [n] are above what is usual in the run: a modified z-score, `[n]`;
    and how many rows told what is usual, `[n]`.

    `sizes` [n]: how many others each share is of; of none nothing is unusual. Most rows are right, so
    that their shares say how large one gets by chance (an empirical null: Efron 2004, "Large-scale
    simultaneous hypothesis testing"). A share of few effects varies more than one of many: the bulk
    of a row are those that are compared with half to twice as many others.
    """
    found, counts = np.zeros(len(scores)), np.zeros(len(scores), dtype=np.int64)
    for size in np.unique(sizes[sizes > 0]):
        rows, alike = sizes == size, (sizes >= size / 2) & (sizes <= 2 * size)
        found[rows] = modified_z(scores[rows], scores[alike])
        counts[rows] = alike.sum()
    return found, counts


def telling(pull: Pull, compared: Sequence[np.ndarray]) -> np.ndarray:
    """The shares of the pull that are against a row's own kind where they are at least `DOUBTFUL` and
    unusual, else 0, `[n]`.
    """
    above, _ = unusual(pull.against, np.array([len(others) for others in compared]))
    return np.where((above > FAR) & (pull.against >= DOUBTFUL), pull.against, 0.0)


def doubtful(
    pull: Pull, compared: Sequence[np.ndarray], texts: Sequence[Said], ids: Sequence[str]
) -> Found:
    """Rows whose answer is in doubt, as they pull against their own group or those that ask alike.

    Score: the share of the pull that is against them. Nothing is suggested of a row whose share is
    usual in this run (`unusual`).
    """
    sizes = np.array([len(others) for others in compared])
    scores = np.where(sizes > 0, pull.against, -np.inf)
    above, told = unusual(scores, sizes)
    rows = np.flatnonzero(scores >= DOUBTFUL)
    agreed = _agreed(pull, rows, texts)
    findings = []
    for row in rows.tolist():
        better, suggested, answer = agreed.get(row), "", None
        first = pull.opposed[row][0]
        evidence = (
            f"{scores[row]:.0%} of its pull on {len(compared[row])} "
            f"row{'s' * (len(compared[row]) > 1)} of its kind is against, most against {ids[first]!r}"
        )
        if better is not None:
            evidence += f", which answers as {ids[pull.opposed[row][1]]!r} does"
        if told[row] < BULK:
            evidence += (
                f"; nothing is suggested, as {told[row]} rows do not tell what is usual here"
            )
        elif above[row] <= FAR:
            evidence += f"; that is usual here (z {above[row]:.1f}), so nothing is suggested"
        elif better is None:
            suggested = REMOVE
        else:
            suggested, answer = RELABEL, texts[better].answer
        findings.append(
            Finding(
                row,
                "label",
                float(scores[row]),
                evidence,
                float(pull.gains[row]),
                first,
                suggested,
                answer,
            )
        )
    rule = (
        f"at least {DOUBTFUL:.0%} of its pull on its group, or on those that ask alike, is against; "
        f"suggested where that is unusual in the run, a modified z-score above {FAR:g}"
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
    # words are weighted by how common they are among these few answers, not among all
    involved = sorted({each for pair in pairs.values() for each in pair})
    answers = vectors([texts[each].answer for each in involved])
    alike = pairwise(answers, *np.searchsorted(involved, list(pairs.values())).T)
    return {
        row: pair[0] for (row, pair), cos in zip(pairs.items(), alike, strict=True) if cos >= AGREE
    }
