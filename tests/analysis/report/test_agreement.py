"""The comparison with a retrained adapter, against plain losses and a plain KL."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
import unlearn
from analysis.report.agreement import agreement, divergence
from influence.errors import MismatchError
from influence.loss import mean_losses
from influence.path import read_parameters
from tests.conftest import build_model, examples
from tests.oracles import logits_fn
from unlearn.record.version import version

RECIPE = unlearn.Recipe(epochs=2, batch_size=4, lr=1e-2, dropout=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, an edit that removes a row and relabels another, and its rows trained on again."""
    folder = tmp_path_factory.mktemp("agreement")
    model = build_model("gpt2", layers=1, target_modules=["attn.c_attn"])
    model.model.save_pretrained(folder / "adapter")
    run = influence.fit(model, examples(8), directory=folder / "run")
    edit = unlearn.edit(
        run, remove=["r0-1"], relabel={"r0-4": " warm songs"}, until="steps=2", max_damage=10.0
    ).save(folder / "edit")
    retrained = unlearn.retrain(run, out=folder / "retrained", recipe=RECIPE, edit=edit)
    return run, edit, retrained


def kl(model, tokens, reference, other) -> float:
    """Mean over rows of the mean over tokens of sum_v p (log p - log q), a token at a time."""
    rows = []
    for item in tokens:
        logits, _ = logits_fn(model, item)
        pairs = zip(logits(reference).softmax(-1), logits(other).softmax(-1), strict=True)
        rows.append(np.mean([float((p * (p / q).log()).sum()) for p, q in pairs]))
    return float(np.mean(rows))


def test_losses_and_divergences_of_three_sets(made):
    run, edit, retrained = made
    holdout = examples(3, seed=7)
    comparison = agreement(run, edit, retrained, holdout)
    after, theta = version(run, edit), read_parameters(run.model, retrained)
    before = version(run, "original")
    edited = [before.tokens[1], after.tokens[after.rows.index("r0-4")]]
    others = [row for row, id in enumerate(after.rows.ids) if id != "r0-4"]
    sets = {
        "edited": influence.tokens.TokenizedExamples(edited, ["r0-1", "r0-4"]),
        "retained": after.tokens.select(others),  # fewer than are sampled
        "heldout": run.tokenized(holdout),
    }
    assert comparison["adapter"] == str(retrained)
    for name, tokens in sets.items():
        with run.model.at(theta) as model:
            losses = mean_losses(model, tokens)
        assert comparison[name] == pytest.approx(losses.mean(), rel=1e-12)
        assert comparison["kl"][name] == pytest.approx(kl(run.model, tokens, theta, after.theta))
        assert comparison["kl"][name] > 0
    without = agreement(run, edit, retrained)
    assert (without["heldout"], without["kl"]["heldout"]) == (None, None)
    assert without["edited"] == comparison["edited"]


def test_an_adapter_is_at_no_distance_from_itself(made):
    run, edit, _ = made
    comparison = agreement(run, edit, edit)
    assert comparison["kl"]["retained"] == pytest.approx(0, abs=1e-12)
    tokens, theta = run.tokens.select([0, 2]), run.model.snapshot()
    assert divergence(run.model, tokens, theta, theta) == pytest.approx(0, abs=1e-12)
    moved = theta + 0.1 * torch.ones_like(theta)
    one, other = (divergence(run.model, tokens, a, b) for a, b in ((theta, moved), (moved, theta)))
    assert one != pytest.approx(other, rel=1e-3)  # KL is not symmetric


def test_an_adapter_of_other_rows_is_refused(made, tmp_path):
    run, edit, _ = made
    for options, gone in (({"remove": ["r0-1"]}, 1), ({}, 0)):
        other = unlearn.retrain(run, out=tmp_path / f"without-{gone}", recipe=RECIPE, **options)
        with pytest.raises(
            MismatchError, match=f"was trained without {gone} rows, and after the edit 1 rows are"
        ):
            agreement(run, edit, other)


def test_removed_rows_are_compared_by_their_ids(made, tmp_path):
    """A retraining by ids records no digest of the rows: the ids tell whether it is right."""
    run, _, _ = made
    options = {"start": "original", "until": "steps=1", "steps": 40, "max_damage": 10.0}
    edit = unlearn.remove(run, ["r0-2"], **options).save(tmp_path / "edit")
    right = unlearn.retrain(run, ["r0-2"], out=tmp_path / "right", recipe=RECIPE)
    assert agreement(run, edit, right)["edited"] > 0
    wrong = unlearn.retrain(run, ["r0-3"], out=tmp_path / "wrong", recipe=RECIPE)
    with pytest.raises(
        MismatchError, match="was trained without 1 rows, and after the edit 1 rows"
    ):
        agreement(run, edit, wrong)
