"""TOFU's published evaluation logs, row by row and as aggregates, from losses, token counts and
texts alone.

How the published numbers are made, found here: `avg_*_loss` and `average_perturb_loss` are the sums
divided by the row's own token count, and everything is made from them. `truth_ratio` is
exp(avg_paraphrased_loss - mean of average_perturb_loss), in float32. `normalized_gt_loss` is -log
of the right answer's share among the options (all length-normalised). Real authors and world facts
have no paraphrase; their `paraphrased_loss` is the right answer's, in another forward pass.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from analysis.metrics import (
    UtilitySet,
    answer_probability,
    forget_quality,
    model_utility,
    option_probability,
    rouge,
    truth_ratio,
)

MODELS = ["llama2-7b_full", "llama2-7b_retain90", "phi_full", "phi_retain90"]
FILES = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}


@pytest.fixture(scope="module")
def tofu():
    """Per model and set, every field as an array (texts as lists), rows in the order of the log."""
    folder = os.environ.get("LORA_INFLUENCE_TOFU")
    if not folder:
        pytest.skip("set LORA_INFLUENCE_TOFU to the folder of TOFU, with its eval_logs")
    logs = {}
    for model in MODELS:
        whole = json.loads(
            (Path(folder) / "eval_logs" / f"{model}.json").read_text(encoding="utf-8")
        )
        logs[model] = {name: fields_of(whole[file]) for name, file in FILES.items()}
    return logs


def fields_of(log):
    keys = list(log["gt_loss"])
    assert all(list(values) == keys for values in log.values())
    rows = {name: [values[key] for key in keys] for name, values in log.items()}
    return {
        name: values if name == "generated_text" else np.array(values)
        for name, values in rows.items()
    }


@pytest.mark.parametrize("model", MODELS)
def test_mean_losses_are_sums_over_token_counts(tofu, model):
    for log in tofu[model].values():
        for mean, total, count in (
            ("avg_gt_loss", "gt_loss", "num_token_gt"),
            ("avg_paraphrased_loss", "paraphrased_loss", "num_token_paraphrased"),
            ("average_perturb_loss", "perturb_loss", "num_token_perturb"),
        ):
            np.testing.assert_allclose(log[total] / log[count], log[mean], rtol=1e-7)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", FILES)
def test_truth_ratios_of_every_row(tofu, model, name):
    log = tofu[model][name]
    found = truth_ratio(
        log["paraphrased_loss"] / log["num_token_paraphrased"],
        log["perturb_loss"] / log["num_token_perturb"],
    )
    np.testing.assert_allclose(
        found, log["truth_ratio"], rtol=2e-6
    )  # theirs is the exponential of a float32


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["real_authors", "world_facts"])
def test_option_probability_of_every_row(tofu, model, name):
    log = tofu[model][name]
    found = -np.log(option_probability(log["avg_gt_loss"], log["average_perturb_loss"]))
    np.testing.assert_allclose(found, log["normalized_gt_loss"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_rouge_of_every_row(tofu, model):
    for log in tofu[model].values():
        found = rouge(
            [row[2] for row in log["generated_text"]], [row[1] for row in log["generated_text"]]
        )
        np.testing.assert_allclose(found.rouge1_recall, log["rouge1_recall"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.rougeL_recall, log["rougeL_recall"], rtol=0, atol=1e-12)


def utility_of(logs):
    sets = {}
    for name in ("retain", "real_authors", "world_facts"):
        log = logs[name]
        right, wrong = log["avg_gt_loss"], log["average_perturb_loss"]
        probability = (
            answer_probability(right) if name == "retain" else option_probability(right, wrong)
        )
        sets[name] = UtilitySet(
            probability, log["rougeL_recall"], truth_ratio(log["avg_paraphrased_loss"], wrong)
        )
    return model_utility(sets)


@pytest.mark.parametrize(
    ("model", "published"), [("llama2-7b_full", 0.6226773637), ("phi_full", 0.5220737132)]
)
def test_published_model_utility(tofu, model, published):
    result = utility_of(tofu[model])
    assert result.value == pytest.approx(published, rel=1e-6)
    assert result.missing == ()


def ratios(logs):
    return truth_ratio(
        logs["forget"]["avg_paraphrased_loss"], logs["forget"]["average_perturb_loss"]
    )


def test_published_forget_quality(tofu):
    full, retained = ratios(tofu["llama2-7b_full"]), ratios(tofu["llama2-7b_retain90"])
    result = forget_quality(full, retained)
    assert result.value == pytest.approx(1.834066e-21, rel=1e-6)
    assert (result.n, result.m) == (300, 300)
    assert result.floor < 1e-170 < result.value
    assert forget_quality(1 / full, 1 / retained).value == pytest.approx(
        result.value, rel=1e-12
    )  # as they compute it
    assert forget_quality(retained, retained).value == 1


def test_what_was_trained_on_has_smaller_truth_ratios(tofu):
    """The sign: the model that saw the forget set finds the truth likelier than one that did
    not.
    """
    for name in ("llama2-7b", "phi"):
        assert np.median(ratios(tofu[f"{name}_full"])) < np.median(ratios(tofu[f"{name}_retain90"]))
