"""Evidence of forgetting that an edit did not aim at, beside models that never saw the rows.

An edit moves the changed rows' loss to where it should be and stops there, so that this loss says
no more than that it stopped. Measured besides, under the adapter before and after, and under the
models of the local retraining, which never saw the changed rows as they were
(`unlearn.retraining.local`):

* `generations`: how much of a changed row's old content the model says by itself, greedily, when it
  is given the row's prompt (ROUGE-L recall; `influence.generation` says what a prompt is).
* `membership`: how well changed rows can be told from held-out ones by Min-K % (Shi et al. 2024,
  arXiv 2310.16789): the share of pairs in which the changed row looks more like one that was
  trained on (AUC; 0.5 is chance). Needs held-out rows.
* `probe-losses`, `probe-generations`: mean loss of probe rows, such as paraphrases of changed rows
  and questions about them, and how much of their completions is said. Needs probe rows.

The interval of `after - unseen` is that of the difference to one model trained again without the
rows, by a bootstrap: rows are drawn again (changed and held-out ones each among their own), and each
time such a model is pictured as the mean of the R unseen ones, plus their deviations with normal
weights, which have the variance of one more model about that mean, `(1 + 1/R)` times theirs, plus
what small trainings get wrong, `SYSTEMATIC`.

The verdict, with a margin of 0.1 of ROUGE-L recall, 0.2 of AUC, or a tenth of the unseen models'
loss (`MARGIN`):

* `not settled`: fewer than `FEWEST` rows.
* `as unseen`: the interval lies within the margin on both sides of 0; or it includes 0 and is no
  wider than that.
* `more than unseen`: it lies wholly on the side of remembering.
* `less than unseen`: it lies wholly on the other side. The edit went further than never having seen
  the rows would, which is conspicuous.
* `not settled`: anything else, an interval that is too wide.
* `not compared`: there are no models that never saw the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from influence.at_point import evenly_spaced
from influence.errors import DataError
from influence.generation import continued, openings
from influence.overlap import has_words, rouge
from influence.progress import track
from influence.rows import Examples
from influence.shared_rows import dealt
from unlearn.record.before_after import State, Undertaking
from unlearn.record.edit_record import EvidenceRecord, MeasurementRecord, RowMeasured
from unlearn.record.losses import measure
from unlearn.unseen import FAITHFUL, Expected

#: Coverage that an interval aims at, resamples of the bootstrap, and its seed. Choices.
LEVEL, RESAMPLES, SEED = 0.9, 2000, 0
#: Difference that counts as none, by the unit: of a share, and of a loss over the unseen models'.
#: Choices; two models trained again without tofu-tiny's author 0 differ by 0.26 in the AUC.
MARGIN = {"ROUGE-L recall": 0.1, "AUC of Min-K%": 0.2, "nats per token": 0.1}
#: Standard deviation of the value of a model trained again about the unseen models' mean, besides
#: what rows and models say: of a share, and of a loss over the unseen models'. Found on five models
#: trained again, of tofu-tiny and its mild regime (benchmarks/README.md, "The loss of unseen rows").
SYSTEMATIC = {"ROUGE-L recall": 0.03, "AUC of Min-K%": 0.1, "nats per token": 0.05}
#: Rows without which nothing is settled: intervals of so few are too short. A choice.
FEWEST = 5
#: New tokens of a continuation, at most. A choice.
MOST_TOKENS = 128
#: Rows of each kind whose pairs are looked at, evenly spaced. A choice.
MOST_PAIRED = 1000

#: Whether a model that remembers has a higher value, by the unit.
RISES = {"ROUGE-L recall": True, "AUC of Min-K%": True, "nats per token": False}


@dataclass(frozen=True, eq=False)
class Values:
    """What was measured of n rows, each beside m others; m is 1 where there are none.

    Attributes
    ----------
    before, after : float64 array [n, m]
        Under the two adapters.
    unseen : float64 array [R, n, m]
        Under the R models that never saw the rows, which may be none.
    ids : list of str
        Of the n rows, where they are recorded one by one.
    """

    before: np.ndarray
    after: np.ndarray
    unseen: np.ndarray
    ids: Sequence[str] = field(default=(), repr=False)

    @classmethod
    def of_rows(cls, values: np.ndarray, ids: Sequence[str]) -> Values:
        """From values `[2 + R, n]`: before, after, and under the unseen models."""
        before, after, *unseen = values[:, :, None]
        return cls(before, after, np.reshape(unseen, (len(unseen), *after.shape)), ids)

    @property
    def by_row(self) -> tuple[RowMeasured, ...]:
        """The rows one by one, where they have ids."""
        if not self.ids:
            return ()
        unseen = self.unseen.mean((0, 2)) if len(self.unseen) else [None] * len(self.ids)
        columns = zip(self.ids, self.before.mean(1), self.after.mean(1), unseen, strict=True)
        return tuple(
            RowMeasured(
                id=id,
                before=float(before),
                after=float(after),
                unseen=None if other is None else float(other),
            )
            for id, before, after, other in columns
        )


def gather(
    work: Undertaking, theta: Tensor, before: State, after: State, expected: Expected | None
) -> EvidenceRecord:
    """Measure what an edit did not aim at.

    Every continued row is counted as one forward: each of its positions is computed once, though
    new tokens come one by one and take longer.

    Parameters
    ----------
    work
        The edit. Its model is left as it was.
    theta : Tensor [P]
        The adapter after.
    before, after
        What was measured at the two adapters.
    expected
        Has the models that never saw the rows; None: there are none.
    """
    unseen = [] if expected is None else expected.local.after
    thetas = [work.version.theta, theta, *unseen]
    old = Examples([request.before for request in work.change.requests])
    found = [_generations(work, "generations", old, thetas)]
    if before.heldout is not None and after.heldout is not None:
        found.append(_membership(work, before, after, unseen))
    if work.probes is not None and work.probed is not None:
        losses = np.stack(
            [
                work.version.losses(work.probed, at, work.cost, token_budget=work.budget)
                for at in thetas
            ]
        )
        values = Values.of_rows(losses, work.probed.ids)
        found.append(_record("probe-losses", "nats per token", values))
        found.append(_generations(work, "probe-generations", work.probes, thetas))
    if expected is not None and not FAITHFUL <= expected.faithfulness <= 1 / FAITHFUL:
        found = [_doubted(each, expected.faithfulness) for each in found]
    return EvidenceRecord(
        models=len(unseen),
        level=LEVEL,
        resamples=RESAMPLES,
        seed=SEED,
        probes=None if work.probes is None else work.probes.source,
        measurements=tuple(found),
    )


def forwards_ahead(work: Undertaking, unseen: int) -> int:
    """Forwards that `gather` will count, with so many models that never saw the rows."""
    changed, adapters = len(work.change.rows), 2 + unseen
    total = adapters * min(work.generate, changed)
    if work.heldout is not None:
        paired = min(changed, MOST_PAIRED) + min(len(work.heldout), MOST_PAIRED)
        total += unseen * paired
    if work.probed is not None:
        total += adapters * (len(work.probed) + min(work.generate, len(work.probed)))
    return total


# ---- the measurements ----------------------------------------------------------------------------


def _generations(
    work: Undertaking, name: str, examples: Examples, thetas: Sequence[Tensor]
) -> MeasurementRecord:
    """How much of rows is said under each adapter."""
    if work.generate == 0:
        return _unmeasured(name, "no row was to be continued (generate 0)")
    chosen = examples.select(evenly_spaced(len(examples), work.generate).tolist())
    model = work.version.model
    try:
        found = openings(model, chosen)
    except DataError as error:  # of a template that does not tell where an answer begins
        return _unmeasured(name, str(error).splitlines()[0])
    references = [model.tokenizer.decode(row, skip_special_tokens=True) for row in found.answers]
    able = [place for place, text in enumerate(references) if has_words(text)]
    if not able:
        return _unmeasured(
            name, "no row has a beginning that can be continued and words of a-z or 0-9 after it"
        )
    prompts = found.prompts.select(able)
    limits = np.minimum([len(found.answers[place]) for place in able], MOST_TOKENS)
    values = np.zeros((len(thetas), len(able)))
    for place, theta in enumerate(track(thetas, "continuing prompts")):
        work.cost.forwards += len(able)
        with model.at(theta):
            texts = dealt(
                len(able),
                lambda rows: continued(
                    model, prompts.select(rows), limits[rows], token_budget=work.budget
                ),
            )
        values[place] = rouge([references[row] for row in able], texts).rougeL_recall
    return _record(name, "ROUGE-L recall", Values.of_rows(values, prompts.ids))


def _membership(
    work: Undertaking, before: State, after: State, unseen: Sequence[Tensor]
) -> MeasurementRecord:
    """How well changed rows can be told from held-out ones."""
    assert work.heldout is not None
    assert before.heldout is not None
    assert after.heldout is not None
    pairs = [(state.old.min_k, state.heldout.min_k) for state in (before, after) if state.heldout]
    changed = evenly_spaced(len(work.change.rows), MOST_PAIRED)
    heldout = evenly_spaced(len(work.heldout), MOST_PAIRED)
    first, last = (_wins(old[changed], new[heldout]) for old, new in pairs)
    others = np.zeros((len(unseen), *last.shape))
    sets = (work.change.old.select(changed), work.heldout.select(heldout))
    for place, theta in enumerate(unseen):
        with work.version.model.at(theta) as model:
            scores = [
                measure(model, rows, token_budget=work.budget, cost=work.cost).min_k
                for rows in sets
            ]
        others[place] = _wins(*scores)
    return _record("membership", "AUC of Min-K%", Values(first, last, others))


def _wins(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each member's score is the higher one of each pair, a half where both are equal.

    Scores `[n]` and `[m]`; their mean over pairs `[n, m]` is the AUC.
    """
    return (members[:, None] > others) + 0.5 * (members[:, None] == others)


# ---- comparison ----------------------------------------------------------------------------------


def interval(after: np.ndarray, unseen: np.ndarray, systematic: float = 0.0) -> tuple[float, float]:
    """The bootstrap interval of `after - unseen`, of means over all n rows and m others.

    `after` [n, m], and `unseen` [R, n, m], R at least 1; `systematic` is the standard deviation of
    what no row and no model tells.
    """
    rng = np.random.default_rng(SEED)
    n, m = after.shape
    rows, others = (
        rng.multinomial(size, np.full(size, 1 / size), size=RESAMPLES) / size for size in (n, m)
    )
    mean = unseen.mean(0)

    def means(values: np.ndarray) -> np.ndarray:
        """Means of `values` [n, m] over each resample, `[RESAMPLES]`."""
        return np.einsum("bm,bm->b", rows @ values, others)

    drawn = means(after - mean)
    models = len(unseen)
    if models > 1:
        weights = rng.standard_normal((models, RESAMPLES)) * np.sqrt(
            (1 + 1 / models) / (models - 1)
        )
        for weight, values in zip(weights, unseen, strict=True):
            drawn -= weight * means(values - mean)
    drawn += systematic * rng.standard_normal(RESAMPLES)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def verdict(low: float, high: float, margin: float, rows: int, *, rises: bool) -> str:
    """The word for an interval of `after - unseen` over so many rows, by the module's rule.

    `rises`: whether a model that remembers has a higher value.
    """
    if rows < FEWEST:
        return "not settled"
    low, high = (low, high) if rises else (-high, -low)
    if (-margin <= low and high <= margin) or (low <= 0 <= high and high - low <= 2 * margin):
        return "as unseen"
    if low > 0:
        return "more than unseen"
    return "less than unseen" if high < 0 else "not settled"


def _record(name: str, unit: str, values: Values) -> MeasurementRecord:
    """What was measured, compared with the models that never saw the rows where there are any."""
    (rows, others), after = values.after.shape, float(values.after.mean())
    unseen, low, high, margin, word = None, None, None, None, "not compared"
    reason: str | None = "no models that never saw the rows were trained for this edit"
    if len(values.unseen):
        unseen = float(values.unseen.mean())
        scale = 1.0 if RISES[unit] else unseen  # a share is as it is, a loss over the unseen one
        low, high = interval(values.after, values.unseen, SYSTEMATIC[unit] * scale)
        margin = MARGIN[unit] * scale
        fewest = rows if name != "membership" else min(rows, others)
        word, reason = verdict(low, high, margin, fewest, rises=RISES[unit]), None
    return MeasurementRecord(
        name=name,
        unit=unit,
        rows=rows,
        heldout=others if name == "membership" else None,
        before=float(values.before.mean()),
        after=after,
        unseen=unseen,
        difference=None if unseen is None else after - unseen,
        low=low,
        high=high,
        margin=margin,
        verdict=word,
        reason=reason,
        by_row=values.by_row,
    )


def _doubted(found: MeasurementRecord, faithfulness: float) -> MeasurementRecord:
    """The same without a verdict: the models that it is held against are not like the adapter."""
    if found.unseen is None:
        return found
    reason = (
        f"the small models learnt {max(0.0, faithfulness):.0%} of what the adapter knows of the "
        "rows: they do not say what unseen is"
    )
    return replace(found, verdict="not settled", reason=reason)


def _unmeasured(name: str, reason: str) -> MeasurementRecord:
    """That something could not be measured, and why."""
    return MeasurementRecord(
        name=name,
        unit=None,
        rows=None,
        heldout=None,
        before=None,
        after=None,
        unseen=None,
        difference=None,
        low=None,
        high=None,
        margin=None,
        verdict="not measured",
        reason=reason,
        by_row=(),
    )
