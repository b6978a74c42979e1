"""Comparisons of sets and adapters, against merged models and counts of pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

import influence
from analysis.evaluation.table import table
from tests.analysis.evaluation.helpers import logs_of, losses_of, merged, plain, read
from tests.conftest import tokens_of


def test_the_record_compares_the_sets(evaluated):
    """AUC by counting pairs.

    PrivLeak by its formula. Exposures, divergence and truth ratios from merged models.
    """
    folder, model, record = evaluated
    data = {name: read(folder, name) for name in ("forget", "retain", "holdout")}
    who = {where: merged(folder, where) for where in ("adapter", "reference")}
    losses = {
        where: {
            name: np.array(losses_of(one, model.tokenizer, part)) for name, part in data.items()
        }
        for where, one in who.items()
    }
    auc = {
        where: np.mean([(a < b) + (a == b) / 2 for a in own["forget"] for b in own["holdout"]])
        for where, own in losses.items()
    }
    attacks = record["membership"]["attacks"]
    assert set(attacks) == {
        "loss",
        "zlib",
        "min_k",
        "min_40",
        "min_k_plus_plus",
        "base",
        "gradient_norm",
    }
    for where in auc:
        assert attacks["loss"][where]["auc"] == pytest.approx(auc[where])
        assert attacks["loss"][where]["low"] <= auc[where] <= attacks["loss"][where]["high"]
        assert set(attacks["loss"][where]["tpr"]) == {"0.01", "0.1"}
    assert attacks["loss"]["privleak"] == pytest.approx(
        100 * (auc["reference"] - auc["adapter"]) / (1 - auc["reference"])
    )
    assert (record["membership"]["members"], record["membership"]["non_members"]) == (5, 6)
    difference = (losses["reference"]["forget"] - losses["adapter"]["forget"]) / math.log(2)
    assert record["generalized_exposure"] == pytest.approx(difference.mean(), rel=1e-5)
    for where, own in losses.items():
        comparable = math.log2(np.exp(-own["holdout"]).mean())
        relative = (-own["forget"] / math.log(2) - comparable).mean()
        assert record["relative_exposure"][where] == pytest.approx(relative, rel=1e-5)
    for name, part in data.items():
        kl = []
        for row in part:
            ids = [*model.tokenizer(row["prompt"] + row["completion"])["input_ids"], 1]
            first = len(model.tokenizer(row["prompt"])["input_ids"])
            reference, own = (
                logs_of(who[where], ids)[first - 1 :] for where in ("reference", "adapter")
            )
            kl.append(float((reference.exp() * (reference - own)).sum(-1).mean()))
        assert record["kl"][name] == pytest.approx(np.mean(kl), rel=1e-5)
    for where, one in who.items():
        found = [row[where]["truth_ratio"] for row in record["rows"] if row["set"] == "forget"]
        for row, ratio in zip(data["forget"], found, strict=True):
            right, *wrong = losses_of(
                one,
                model.tokenizer,
                [
                    {"prompt": row["prompt"], "completion": text}
                    for text in (row["paraphrased_completion"], *row["perturbed_completions"])
                ],
            )
            assert ratio == pytest.approx(
                math.prod(math.exp(-loss) for loss in wrong) ** (1 / 3) / math.exp(-right), rel=1e-5
            )
        assert record["sets"]["forget"][where]["truth_ratio"]["median"] == pytest.approx(
            np.median(found)
        )
        truthful = np.mean([max(0, 1 - ratio) for ratio in found])
        assert record["sets"]["forget"][where]["truth_ratio"]["truthful"] == pytest.approx(truthful)
    retained = [row["adapter"]["truth_ratio"] for row in record["rows"] if row["set"] == "retain"]
    assert [ratio is None for ratio in retained] == [False, True, True, True, True]
    assert record["sets"]["retain"]["adapter"]["truth_ratio"]["rows"] == 1
    assert record["sets"]["holdout"]["adapter"]["truth_ratio"] is None
    assert 0 < record["forget_quality"]["value"] <= 1
    assert record["forget_quality"]["rows"] == 5


def test_every_row_has_its_scores(evaluated):
    """Loss, min-k++ (rows of at most 6 tokens: the lowest one) and loss below the base's from
    merged models; every AUC by pairs.
    """
    folder, model, record = evaluated
    one, base = merged(folder, "adapter"), merged(folder, None)
    for name in ("forget", "holdout"):
        own = [row for row in record["rows"] if row["set"] == name]
        tokens = tokens_of(model, influence.read_examples(folder / f"{name}.jsonl"))
        for row, here, there in zip(own, plain(one, tokens), plain(base, tokens), strict=True):
            scores = row["adapter"]["membership"]
            p, logs = here["logs"].exp().numpy(), here["logs"].numpy()
            mu = (p * logs).sum(1)
            sigma = np.sqrt((p * logs**2).sum(1) - mu**2)
            assert scores["loss"] == pytest.approx(here["own"].mean(), rel=1e-6)
            assert scores["base"] == pytest.approx(
                here["own"].mean() - there["own"].mean(), rel=1e-5, abs=1e-7
            )
            assert scores["min_k"] == pytest.approx(here["own"].min(), rel=1e-6)
            assert scores["min_k_plus_plus"] == pytest.approx(
                ((here["own"] - mu) / sigma).min(), rel=1e-5
            )
    assert all(
        row["adapter"]["membership"] is None for row in record["rows"] if row["set"] == "retain"
    )
    for where in ("adapter", "reference"):
        for key, found in record["membership"]["attacks"].items():
            members, others = (
                [row[where]["membership"][key] for row in record["rows"] if row["set"] == name]
                for name in ("forget", "holdout")
            )
            pairs = np.mean([(a > b) + (a == b) / 2 for a in members for b in others])
            assert found[where]["auc"] == pytest.approx(pairs)


def test_what_else_to_know_is_remarked(evaluated):
    """A reference at less than half of the base's loss on the forget rows has seen them.

    Ten rows a side are few.
    """
    _, _, record = evaluated
    remarks = {name for name in record["notes"] if name.startswith("remark.")}
    base, loss = (record["sets"]["forget"][where]["loss"] for where in ("base", "reference"))
    assert ("remark.reference" in remarks) == (loss < 0.5 * base)
    few = min(record["membership"]["members"], record["membership"]["non_members"]) < 10
    assert ("remark.membership" in remarks) == few
    assert sum(line.startswith("note: ") for line in table(record).splitlines()) == len(remarks)
    assert not any("remark" in line for line in table(record).splitlines())
