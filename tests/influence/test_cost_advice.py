"""Advice: said with numbers where it helps, and not said where it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from influence.cost_advice import Situation, advice
from influence.fit_plan import FitPlan

PLAN = FitPlan(
    rows=1000,
    tokens=50_000,
    parameters=10_000,
    leaves=4,
    points=2,
    draws=1,
    itemsize=4,
    store="full",
    sampled=True,
    keeps_rows=False,
    looks_again=True,
    shares_credit=True,
    closed=True,
    whitens=True,
    sample=1000,
)
GB = 10**9


def situation(plan: FitPlan = PLAN, **changes) -> Situation:
    """A fit whose seconds are a tenth of its work in rows, on a machine with room for all."""

    def seconds_of(changed: FitPlan) -> float:
        return changed.work * changed.rows / 10

    options = {
        "plan": plan,
        "seconds": seconds_of(plan),
        "disk_bytes": GB,
        "disk_free": 100 * GB,
        "memory_bytes": 8 * GB,
        "memory_free": 10 * GB,
        "token_budget": 1024,
        "rows_retrained": None,
        "devices": 1,
        "takes_rows": True,
        "plan_of": lambda kind: replace(plan, store=kind, sampled=kind == "full"),
        "seconds_of": seconds_of,
        "seconds_with_budget": lambda budget: seconds_of(plan),
        "score_seconds_of": lambda changed: 1.0 if changed.stored else 100.0,
    }
    return Situation(**(options | changes))


def said(at: Situation) -> str:
    return "\n".join(advice(at))


def test_one_point_instead_of_two_is_told_by_both_times():
    at = situation()
    one, two = (replace(PLAN, points=points).work * 100 for points in (1, 2))
    assert at.seconds == pytest.approx(two)
    assert said(at) == (
        f"One point of the path instead of 2 (--path 0.6) takes {one / 60:.0f} min instead of "
        f"{two / 60:.0f} min; it follows retraining a little less well."
    )
    assert said(situation(replace(PLAN, points=1))) == ""
    assert said(replace(at, seconds_of=lambda plan: two - 10)) == ""  # not worth a word
    assert said(replace(at, seconds=12, seconds_of=lambda plan: 4)) == ""  # nobody waits for it


ONE = replace(PLAN, points=1)


def test_fewer_draws():
    three = replace(ONE, draws=3)
    text = said(situation(three))
    less = situation(three).seconds * replace(three, draws=1).work / three.work
    assert "--samples 1" in text
    now = situation(three).seconds
    assert f"about {less / 60:.0f} min instead of {now / 60:.0f} min" in text
    assert "--samples" not in said(situation(ONE))


def test_a_store_is_advised_where_scores_gain_and_the_disk_has_room():
    never = replace(ONE, store="none", sampled=False)
    text = said(situation(never))
    assert text == (
        "--store full keeps 40 MB, and every scoring then takes 1.0 s instead of 2 min: it "
        "passes over no training row."
    )
    # 40 MB of gradients, as many at sampled labels for a while, 4 MB of similarities; features 5
    features = said(situation(never, disk_free=83e6, disk_bytes=10**6))
    assert features.startswith("--store features keeps 5.0 MB, and every scoring then takes 1.0 s")
    assert said(situation(never, disk_free=84e6, disk_bytes=10**6)) == text
    assert said(situation(never, disk_free=8e6, disk_bytes=10**6)) == ""
    plain = replace(never, whitens=False)
    assert said(situation(plain, disk_free=83e6, disk_bytes=10**6)) == ""
    assert said(situation(never, score_seconds_of=lambda plan: 100.0)) == ""


def test_a_curvature_of_some_rows_where_there_are_many_and_it_saves():
    many = replace(ONE, rows=100_000, sample=100_000, store="features", sampled=False)
    less, all_rows = (replace(many, sample=rows).work * 10_000 for rows in (4_096, 100_000))
    assert said(situation(many)) == (
        "A curvature of 4,096 rows drawn from the 100,000 (--curvature-rows 4096) takes "
        f"{less / 3600:.1f} h instead of {all_rows / 3600:.1f} h; all rows are scored as before."
    )
    assert said(situation(many, takes_rows=False)) == ""
    for few in (replace(many, sample=4_096), replace(many, rows=4_000, sample=4_000)):
        assert said(situation(few, seconds_of=lambda plan: 0.0, seconds=1e4)) == ""
    assert said(situation(many, seconds_of=lambda plan: all_rows)) == ""


def test_larger_batches_where_they_help_and_memory_has_room():
    at = situation(ONE, memory_bytes=3 * GB, seconds_with_budget=lambda budget: budget / 100)
    assert said(at).startswith("--token-budget 2048 instead of 1024 takes 20 s instead of")
    assert said(replace(at, memory_bytes=4 * GB)) == ""
    assert said(replace(at, seconds_with_budget=lambda budget: at.seconds)) == ""


def test_more_processes_where_there_are_more_devices():
    seconds = situation(ONE).seconds
    text = said(situation(ONE, devices=4))
    assert text.startswith("4 GPUs are here: torchrun --nproc-per-node 4 -m -- influence fit ...")
    assert f"takes about {seconds / 4:.0f} s instead of" in text
    assert said(situation(ONE, devices=1)) == ""


@pytest.mark.parametrize(("rows", "cheaper"), [(1500, True), (3000, False)])
def test_retraining_where_it_reads_fewer_rows(rows, cheaper):
    """This fit works as much as 2,667 rows forward and backward: 5/3 each and three losses."""
    text = said(situation(ONE, rows_retrained=rows))
    assert ("unlearn retrain is cheaper" in text) == cheaper
    assert ("reads 1,500 rows forward" in text) == cheaper
    assert (f"as much as {round(ONE.work * 1000):,}." in text) == cheaper


def test_what_would_fail_is_told_first():
    text = said(situation(disk_free=10**8, memory_free=10**9)).splitlines()
    assert text[0].startswith("The disk is too small: 1.0 GB are needed and 100 MB are free. Give")
    assert "--store none, which leaves the rows' gradients out: " in text[0]
    assert text[1].startswith("The memory is too small: 8.0 GB are needed and 1.0 GB are there.")


def test_what_is_done_already_is_not_advised():
    never = replace(ONE, store="none", sampled=False)
    text = said(situation(never, disk_free=10**8, score_seconds_of=lambda plan: 1.0))
    assert text.endswith("are free. Give another --run.")
