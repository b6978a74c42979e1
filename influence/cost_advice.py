"""What would make a fit cheaper, in sentences with numbers, and nothing that would not.

Advice is given where it saves at least `LEAST_SHARE` of the time and `LEAST_SECONDS`, or where the
fit as it stands would fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from influence.fit_plan import FEATURES, FULL, NONE, FitPlan, size
from influence.progress import duration

#: What advice must save to be worth a sentence.
LEAST_SHARE, LEAST_SECONDS = 0.15, 20.0
#: Rows of which a curvature is formed where there are more of them.
ENOUGH_ROWS = 4_096
#: Share of the free memory that a larger token budget may fill.
MEMORY_SHARE = 0.7


@dataclass(frozen=True)
class Situation:
    """A fit that is planned, and what it would be with one thing changed.

    Attributes
    ----------
    plan, seconds, disk_bytes, memory_bytes
        What it does and takes.
    disk_free, memory_free : int
        What there is, in bytes.
    token_budget : int
        Tokens of a batch.
    rows_retrained : int or None
        Rows that training again reads by the adapter's recipe, None where none is known.
    devices : int
        GPUs of the machine, or 1.
    takes_rows : bool
        Whether the curvature can be formed of some of the rows.
    plan_of : callable
        What the fit does with another store.
    seconds_of, score_seconds_of : callable
        Seconds of the fit, and of the scores after it, with another plan.
    seconds_with_budget : callable
        Seconds of the fit with another token budget.
    """

    plan: FitPlan
    seconds: float
    disk_bytes: int
    disk_free: int
    memory_bytes: int
    memory_free: int
    token_budget: int
    rows_retrained: int | None
    devices: int
    takes_rows: bool
    plan_of: Callable[[str], FitPlan]
    seconds_of: Callable[[FitPlan], float]
    score_seconds_of: Callable[[FitPlan], float]
    seconds_with_budget: Callable[[int], float]


def advice(situation: Situation) -> Iterator[str]:
    """The sentences that help here, what would fail first."""
    yield from _too_little(situation)
    yield from _fewer_points(situation)
    yield from _fewer_draws(situation)
    yield from _fewer_rows(situation)
    yield from _store(situation)
    yield from _larger_batches(situation)
    yield from _processes(situation)
    yield from _retraining(situation)


def _worth(before: float, after: float) -> bool:
    return before - after >= max(LEAST_SECONDS, LEAST_SHARE * before)


def _too_little(at: Situation) -> Iterator[str]:
    if at.disk_bytes > at.disk_free:
        words = (
            f"The disk is too small: {size(at.disk_bytes)} are needed and {size(at.disk_free)} are "
            "free. Give another --run"
        )
        if at.plan.store == FULL and not at.plan.keeps_rows:
            without = duration(at.seconds_of(at.plan_of(NONE)))
            words += f", or --store none, which leaves the rows' gradients out: {without}"
        yield f"{words}."
    if at.memory_bytes > at.memory_free:
        yield (
            f"The memory is too small: {size(at.memory_bytes)} are needed and "
            f"{size(at.memory_free)} are there. --checkpointing, --dtype bfloat16 and a "
            f"--token-budget below {at.token_budget} take less."
        )


def _fewer_points(at: Situation) -> Iterator[str]:
    if at.plan.points < 2:
        return
    less = at.seconds_of(replace(at.plan, points=1))
    if _worth(at.seconds, less):
        yield (
            f"One point of the path instead of {at.plan.points} (--path 0.6) takes "
            f"{duration(less)} instead of {duration(at.seconds)}; it follows retraining a little "
            "less well."
        )


def _fewer_draws(at: Situation) -> Iterator[str]:
    if at.plan.draws < 2:
        return
    # what a draw costs is a backward of the first pass, and of a second one
    plan = replace(at.plan, draws=1)
    share = plan.work / at.plan.work
    less = at.seconds * share
    if _worth(at.seconds, less):
        yield (
            f"One draw of labels a row instead of {at.plan.draws} (--samples 1) takes about "
            f"{duration(less)} instead of {duration(at.seconds)}."
        )


def _fewer_rows(at: Situation) -> Iterator[str]:
    plan = at.plan
    if not at.takes_rows or plan.sample <= ENOUGH_ROWS:
        return
    less = at.seconds_of(replace(plan, sample=ENOUGH_ROWS, sampled=False))
    if _worth(at.seconds, less):
        yield (
            f"A curvature of {ENOUGH_ROWS:,} rows drawn from the {plan.rows:,} "
            f"(--curvature-rows {ENOUGH_ROWS}) takes {duration(less)} instead of "
            f"{duration(at.seconds)}; all rows are scored as before."
        )


def _store(at: Situation) -> Iterator[str]:
    plan = at.plan
    if plan.stored:
        return
    for kind in (FULL, FEATURES):
        if kind == FEATURES and not plan.whitens:
            continue
        stored = at.plan_of(kind)
        if stored.kept_bytes + stored.passing_bytes > at.disk_free:
            continue
        before, after = at.score_seconds_of(plan), at.score_seconds_of(stored)
        if _worth(before, after):
            yield (
                f"--store {kind} keeps {size(stored.gradient_bytes)}, and every scoring then takes "
                f"{duration(after)} instead of {duration(before)}: it passes over no training row."
            )
        return


def _larger_batches(at: Situation) -> Iterator[str]:
    budget = 2 * at.token_budget
    if at.memory_bytes > MEMORY_SHARE * at.memory_free / 2:
        return
    less = at.seconds_with_budget(budget)
    if _worth(at.seconds, less):
        yield (
            f"--token-budget {budget} instead of {at.token_budget} takes {duration(less)} instead "
            f"of {duration(at.seconds)}, with up to twice the memory of a batch."
        )


def _processes(at: Situation) -> Iterator[str]:
    if at.devices < 2 or not _worth(at.seconds, at.seconds / at.devices):
        return
    yield (
        f"{at.devices} GPUs are here: torchrun --nproc-per-node {at.devices} -m -- influence fit "
        f"... takes about {duration(at.seconds / at.devices)} instead of {duration(at.seconds)}."
    )


def _retraining(at: Situation) -> Iterator[str]:
    if at.rows_retrained is None:
        return
    read = round(at.plan.work * at.plan.rows)
    if at.rows_retrained < read and at.seconds >= LEAST_SECONDS:
        yield (
            f"To take rows out once, unlearn retrain is cheaper: by the adapter's recipe it reads "
            f"{at.rows_retrained:,} rows forward and backward, and this fit as much as {read:,}."
        )
