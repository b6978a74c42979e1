"""What an edit did not aim at, against plain decoding, counted pairs and intervals drawn by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import decoders

import influence
import unlearn
from influence.cost import Cost
from influence.errors import InputError
from influence.rows import Examples
from tests.analysis.evaluation.helpers import greedy
from tests.conftest import WORDS, build_model, examples, fit_end, teach
from tests.oracles import logits_fn
from tests.unlearn.edits.helpers import edit_of, random
from tests.unlearn.record.helpers import RECIPE
from unlearn.evidence import LEVEL, forwards_ahead, gather, interval, verdict
from unlearn.record.before_after import Undertaking
from unlearn.record.change import plan
from unlearn.record.sample import probe_rows
from unlearn.record.version import version
from unlearn.retraining.local import REPEATS
from unlearn.unseen import FAITHFUL, expected_losses

IDS = ["r0-0", "r0-1", "r0-3", "r0-5", "r0-7"]


def probes_of():
    """Other words for some rows."""
    return influence.examples_from_rows(
        [
            {
                "id": f"p{i}",
                "prompt": f"{WORDS[i]} fox",
                "completion": f" {WORDS[i + 3]} {WORDS[i + 9]}",
            }
            for i in range(6)
        ]
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What is gathered of a taught adapter moved at random, with all that it was gathered from.

    Its tokenizer puts blanks between words, which are what ROUGE counts.
    """
    model = teach(build_model("gpt2", layers=1), examples(6), steps=40)
    model.tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    folder = tmp_path_factory.mktemp("evidence") / "run"
    run = fit_end(model, examples(6), curvature=influence.Identity(), directory=folder)
    start, holdout, probes = version(run), examples(4, seed=5), probes_of()
    change = plan(start, remove=["r0-1", "r0-2"], relabel={"r0-4": " warm songs"})
    work = Undertaking(
        version=start,
        change=change,
        holdout=holdout,
        heldout=start.run.tokenized(holdout),
        max_damage=0.1,
        seed=0,
        probes=probes,
        probed=start.run.tokenized(probes),
        generate=20,
    )
    theta = start.theta + 0.1 * random(3, len(start.theta))
    before, after = work.measure(start.theta), work.measure(theta)
    losses = (before.old.loss, before.new.loss)
    expected = expected_losses(change, RECIPE, *losses, Cost(), seed=0)
    work.cost = Cost()
    found = gather(work, theta, before, after, expected)
    thetas = [start.theta, theta, *expected.local.after]
    return work, thetas, found, (before, after, expected)


def of(found, name):
    """The measurement that is called so."""
    (one,) = [each for each in found.measurements if each.name == name]
    return one


def values(found):
    """Values before, after and under the unseen models, and their difference."""
    return found.before, found.after, found.unseen, found.difference


def as_measured(by_adapter):
    """The same, from one mean for each adapter."""
    before, after, *unseen = by_adapter
    return pytest.approx((before, after, np.mean(unseen), after - np.mean(unseen)), abs=1e-12)


def longest_common(first, second):
    """Length of the longest common subsequence, by the textbook's table."""
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            same, longer = table[i, j] + 1, max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = same if a == b else longer
    return table[-1, -1]


def overlaps(model, rows):
    """How much of each row plain decoding says, by words and as far as the row itself goes."""
    shares = []
    for row in rows:
        prompt = model.tokenizer(row.prompt)["input_ids"]
        own = row.completion.split()
        new = greedy(model.model, prompt, len(own) + 1)  # its end token counts
        said = [WORDS[token - 3] for token in new if token > 2]
        shares.append(longest_common(own, said) / len(own))
    return shares


# ---- the measurements ----------------------------------------------------------------------------


def test_generations_are_of_the_old_contents_by_plain_decoding(made):
    work, thetas, found, _ = made
    rows = [request.before for request in work.change.requests]
    by_adapter = []
    for theta in thetas:
        with work.version.model.at(theta) as model:
            by_adapter.append(overlaps(model, rows))
    result = of(found, "generations")
    assert (result.rows, result.unit, result.heldout) == (3, "ROUGE-L recall", None)
    assert values(result) == as_measured(np.mean(by_adapter, 1))
    assert [row.id for row in result.by_row] == ["r0-1", "r0-2", "r0-4"]
    assert [row.after for row in result.by_row] == by_adapter[1]
    assert {0.0, 1.0} < {share for shares in by_adapter for share in shares}


def test_membership_is_the_share_of_pairs_that_a_changed_row_wins(made):
    work, thetas, found, _ = made
    sets = (list(work.change.old), list(work.heldout))
    by_adapter = []
    for theta in thetas:
        scores = []
        for rows in sets:
            lowest = []
            for row in rows:
                f, labels = logits_fn(work.version.model, row)
                logs = f(theta).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
                least = sorted(logs.tolist())[: max(1, len(labels) // 5)]
                lowest.append(sum(least) / len(least))
            scores.append(lowest)
        wins = [(a > b) + (a == b) / 2 for a in scores[0] for b in scores[1]]
        by_adapter.append(np.mean(wins))
    result = of(found, "membership")
    assert (result.rows, result.heldout, result.by_row) == (3, 4, ())
    assert values(result) == as_measured(by_adapter)
    assert len(set(by_adapter)) > 1


def test_pairs_of_equal_scores_count_half(made):
    work, thetas, _, (before, *others) = made
    old, heldout = (replace(each, min_k=0 * each.min_k) for each in (before.old, before.heldout))
    found = gather(work, thetas[1], replace(before, old=old, heldout=heldout), *others)
    assert of(found, "membership").before == 0.5


def test_probes_are_measured_under_every_adapter(made):
    work, thetas, found, _ = made
    by_adapter, said = [], []
    for theta in thetas:
        losses = []
        for row in work.probed:
            f, labels = logits_fn(work.version.model, row)
            losses.append(float(torch.nn.functional.cross_entropy(f(theta), labels)))
        by_adapter.append(losses)
        with work.version.model.at(theta) as model:
            said.append(overlaps(model, work.probes))
    result = of(found, "probe-losses")
    assert values(result) == as_measured(np.mean(by_adapter, 1))
    assert result.margin == pytest.approx(0.1 * result.unseen)
    assert [row.before for row in result.by_row] == pytest.approx(by_adapter[0])
    unseen = np.mean(by_adapter[2:], 0)
    assert [row.unseen for row in result.by_row] == pytest.approx(unseen)
    assert values(of(found, "probe-generations")) == as_measured(np.mean(said, 1))


def test_the_record_says_how_it_was_compared(made):
    _, _, found, states = made
    assert (found.models, found.level, found.probes) == (REPEATS, LEVEL, None)
    faithfulness = states[2].faithfulness
    assert not FAITHFUL <= faithfulness <= 1 / FAITHFUL
    for each in found.measurements:
        assert each.verdict == "not settled"
        assert f"learnt {faithfulness:.0%} of what the adapter knows" in each.reason


def test_models_that_are_like_the_adapter_have_a_verdict(made, monkeypatch):
    """By the rule alone, where the small training learnt what the adapter did."""
    work, thetas, _, (before, after, expected) = made
    monkeypatch.setattr("unlearn.evidence.FAITHFUL", 1e-9)
    found = gather(work, thetas[1], before, after, expected)
    for each in found.measurements:
        rows = each.rows if each.heldout is None else min(each.rows, each.heldout)
        rises = each.unit != "nats per token"
        word = verdict(each.low, each.high, each.margin, rows, rises=rises)
        assert (each.verdict, each.reason) == (word, None)


def test_the_model_is_left_as_it_was_and_the_same_is_found_again(made):
    work, thetas, found, states = made
    model = work.version.model
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    again = gather(work, thetas[1], *states)
    assert again == found
    assert all(
        torch.equal(value, weights[name]) for name, value in model.model.state_dict().items()
    )


def test_the_work_is_what_was_foreseen(made):
    """Four adapters continue three rows and six probes, whose losses they give, and the two unseen
    ones run three rows and four held-out ones."""
    work, thetas, _, states = made
    work = replace(work, cost=Cost())
    gather(work, thetas[1], *states)
    assert work.cost.forwards == 4 * (3 + 6 + 6) + 2 * (3 + 4)
    assert work.cost.forwards == forwards_ahead(work, REPEATS)


def test_a_few_rows_stand_for_many(made):
    work, thetas, _, states = made
    few = gather(replace(work, generate=2), thetas[1], *states)
    assert [row.id for row in of(few, "generations").by_row] == ["r0-1", "r0-4"]
    assert [row.id for row in of(few, "probe-generations").by_row] == ["p0", "p5"]
    assert of(few, "probe-losses").rows == 6


def test_nothing_is_continued_where_nobody_wants_it(made, monkeypatch):
    work, thetas, _, states = made
    monkeypatch.setattr("unlearn.evidence.continued", None)
    found = gather(replace(work, generate=0), thetas[1], *states)
    result = of(found, "generations")
    assert (result.verdict, result.after, result.by_row) == ("not measured", None, ())
    assert result.reason == "no row was to be continued (generate 0)"
    assert of(found, "probe-losses").after is not None


def test_rows_without_readable_words_are_not_measured(made, monkeypatch):
    work, thetas, _, states = made
    monkeypatch.setattr("unlearn.evidence.has_words", lambda text: False)
    assert "words of a-z" in of(gather(work, thetas[1], *states), "generations").reason


# ---- the interval and the verdict ----------------------------------------------------------------


def test_the_interval_of_one_model_is_that_of_a_mean():
    """Of 400 normal differences: 1.645 standard errors to each side."""
    rng = np.random.default_rng(1)
    after, unseen = rng.normal(3, 2, 400), rng.normal(1, 1, 400)
    low, high = interval(after[:, None], unseen[None, :, None])
    difference = after - unseen
    error = difference.std() / 20
    assert (low, high) == pytest.approx(
        (difference.mean() - 1.645 * error, difference.mean() + 1.645 * error), abs=0.12 * error
    )


def test_the_interval_counts_how_far_unseen_models_differ():
    """Rows alike, two models 2 d apart: one more has the variance (1 + 1/2) 2 d^2."""
    after, unseen = np.full((50, 1), 0.3), np.stack([np.full((50, 1), 0.1), np.full((50, 1), 0.5)])
    low, high = interval(after, unseen)
    width = 1.645 * np.sqrt(1.5 * 2 * 0.2**2)
    assert (low, high) == pytest.approx((-width, width), rel=0.08)


def test_the_interval_counts_what_no_row_tells():
    after, unseen = np.full((50, 1), 0.3), np.full((1, 50, 1), 0.1)
    assert interval(after, unseen) == pytest.approx((0.2, 0.2))
    low, high = interval(after, unseen, 0.05)
    assert (low, high) == pytest.approx((0.2 - 1.645 * 0.05, 0.2 + 1.645 * 0.05), abs=0.006)


def test_the_interval_of_pairs_draws_both_kinds_of_rows_again():
    """Against a loop that draws rows and models one by one."""
    rng = np.random.default_rng(2)
    changed, heldout = rng.normal(0, 1, (3, 12)), rng.normal(0.5, 1, (3, 30))
    wins = np.array([a[:, None] > b for a, b in zip(changed, heldout, strict=True)], dtype=float)
    low, high = interval(wins[0], wins[1:])
    drawn = []
    for _ in range(4000):
        i, j = rng.integers(12, size=12), rng.integers(30, size=30)
        after, *others = (each[i][:, j].mean() for each in wins)
        spread = np.sqrt(1.5) * np.std(others, ddof=1)
        drawn.append(after - np.mean(others) - spread * rng.normal())
    assert (low, high) == pytest.approx(np.quantile(drawn, (0.05, 0.95)), abs=0.02)
    assert interval(wins[0], wins[1:]) == (low, high)  # the seed is fixed


@pytest.mark.parametrize(
    ("low", "high", "rows", "word"),
    [
        (-0.1, 0.1, 20, "as unseen"),
        (0.01, 0.09, 20, "as unseen"),  # a difference that counts as none
        (-0.09, -0.02, 20, "as unseen"),
        (-0.02, 0.17, 20, "as unseen"),  # 0 and no wider than the margins
        (-0.02, 0.19, 20, "not settled"),
        (-0.3, 0.3, 20, "not settled"),
        (0.01, 0.11, 20, "more than unseen"),
        (0.0, 0.21, 20, "not settled"),
        (0.3, 0.9, 5, "more than unseen"),
        (0.3, 0.9, 4, "not settled"),
        (0.0, 0.0, 1, "not settled"),
        (-0.5, -0.01, 20, "less than unseen"),
    ],
)
def test_the_verdict(low, high, rows, word):
    assert verdict(low, high, 0.1, rows, rises=True) == word
    assert verdict(-high, -low, 0.1, rows, rises=False) == word  # of a loss


# ---- in an edit ----------------------------------------------------------------------------------


def test_an_edit_says_what_it_did_not_aim_at(run):
    edit = edit_of(run, remove=IDS, holdout=examples(3, seed=5), probes=probes_of(), recipe=RECIPE)
    found = edit.record.evidence
    names = ["generations", "membership", "probe-losses", "probe-generations"]
    assert [each.name for each in found.measurements] == names
    assert (found.models, of(found, "generations").rows) == (REPEATS, len(IDS))
    assert all(each.unseen is not None for each in found.measurements)
    assert edit.report["evidence"]["measurements"][0]["verdict"] == of(found, "generations").verdict


@pytest.mark.parametrize("how", ["linear", "training"])
def test_without_unseen_models_nothing_is_compared(run, how):
    if how == "linear":
        record = edit_of(run, remove=IDS, steps=1).record
    else:
        record = unlearn.train(run, "ga", IDS, until="steps=1").record
    (found,) = record.evidence.measurements
    assert record.evidence.models == 0
    assert (found.verdict, found.unseen, found.low) == ("not compared", None, None)
    assert "no models that never saw the rows" in found.reason
    assert found.before is not None
    assert found.by_row[0].unseen is None


def test_a_training_towards_unseen_models_is_compared_with_them(run):
    record = unlearn.train(run, "ga", IDS, until="expected", recipe=RECIPE, steps=2).record
    assert record.evidence.models == REPEATS
    assert record.evidence.measurements[0].unseen is not None


def test_probe_rows_that_the_adapter_was_trained_on_are_refused(run):
    given = influence.examples_from_rows(
        [*({"id": f"x{i}", **run.train[i].content()} for i in range(4)), {"id": "y", "text": "fox"}]
    )
    with pytest.raises(
        InputError, match=r"4 probe rows are training rows .*'x0', 'x1', 'x2', \.\.\."
    ):
        edit_of(run, probes=given)
    with pytest.raises(InputError, match="4 probe rows are training rows"):
        unlearn.train(run, "ga", IDS, probes=given)
    with pytest.raises(InputError, match="the file of probe rows has no rows"):
        probe_rows(run, Examples(()))
    with pytest.raises(InputError, match="1 probe rows are training rows"):
        edit_of(
            run,
            relabel={"r0-0": " warm songs"},
            remove=[],
            probes=influence.examples_from_rows(
                [{"id": "z", "prompt": run.train[0].prompt, "completion": " warm songs"}]
            ),
        )


def test_a_dry_run_continues_nothing(run, monkeypatch):
    monkeypatch.setattr("unlearn.evidence.continued", None)
    ahead = unlearn.forecast(run, remove=IDS, recipe=RECIPE)
    without = unlearn.forecast(run, remove=IDS, recipe=RECIPE, generate=0)
    assert ahead["cost"]["row_gradients"] - without["cost"]["row_gradients"] in (6, 7)  # 4 * 5 / 3
