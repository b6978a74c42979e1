"""The real adapter with ground truth from retraining: the commands, and how faithful scores are.

Everything that needs a fit of its 200 rows is slow; the default suite checks its gradients.
"""

from __future__ import annotations

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

import influence
from analysis.metrics.lds import lds, read_truth
from analysis.stats import spearman
from influence.curvature import kfac
from influence.loss import mean_losses
from influence.tokens import tokenize


def run_command(module: str, *arguments: object) -> dict:
    command = [sys.executable, "-m", module, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def fitted(testbed, tmp_path_factory):
    """`influence fit` and `influence score` as commands, with their defaults."""
    run = tmp_path_factory.mktemp("testbed") / "run"
    model = ["--model", testbed / "base", "--adapter", testbed / "adapter"]
    run_command(
        "influence",
        "fit",
        *model,
        "--train",
        testbed / "train.jsonl",
        "--run",
        run,
        "--curvature",
        "ekfac",
    )
    run_command("influence", "score", "--run", run, "--queries", testbed / "query.jsonl")
    return run


@pytest.mark.slow
def test_commands_write_scores_of_every_query_and_row(testbed, fitted):
    with h5py.File(fitted / "scores.h5") as file:
        values = file["scores"][()]
        assert values.shape == (40, 200)
        assert values.dtype == np.float32
        assert file["query_ids"].asstr()[0] == "query-000"
        assert file["train_ids"].asstr()[199] == "train-199"
    model = influence.load(testbed / "base", testbed / "adapter")
    train = influence.read_examples(testbed / "train.jsonl")
    run = influence.Run.open(fitted, model=model, train=train)
    scores = run.score(influence.read_examples(testbed / "query.jsonl")).values
    np.testing.assert_allclose(scores, values, rtol=1e-4, atol=1e-6 * np.abs(values).max())


@pytest.mark.slow
def test_defaults_are_more_faithful_than_the_peers(testbed, fitted):
    """Peers' EK-FAC reaches 0.29 on this adapter; the default 0.461 (0.417 with additive credit),
    and 0.41 leaves room for the sampled labels.
    """
    result = run_command(
        "analysis", "lds", "--scores", fitted / "scores.h5", "--truth", testbed / "truth.npz"
    )
    assert result["lds"] >= 0.41
    assert result["low"] < result["lds"] < result["high"]
    assert result["subsets"] == 40


@pytest.mark.slow
def test_the_end_of_the_path_is_as_faithful_as_the_peers(testbed, tmp_path):
    model = influence.load(testbed / "base", testbed / "adapter")
    train = influence.read_examples(testbed / "train.jsonl")
    run = influence.fit(model, train, directory=tmp_path / "run", path=(1.0,))
    scores = run.score(influence.read_examples(testbed / "query.jsonl"), credit="additive")
    truth = read_truth(testbed / "truth.npz")
    assert 0.28 <= lds(scores.values, truth.masks, truth.query_loss, resamples=10).mean < 0.32


@pytest.mark.slow
def test_factors_in_half_the_memory_are_as_faithful_as_whole_ones(testbed, tmp_path, monkeypatch):
    """LDS within 0.01, additive, at the adapter and at 0.6 of it, with what memory makes of it:
    sides of width 192 whole, sketches of 90 directions of 512.

    Everything sketched at a sixteenth of its width is 0.05 below: spectra are flat here.
    """
    model = influence.load(testbed / "base", testbed / "adapter")
    train = influence.read_examples(testbed / "train.jsonl")
    queries = influence.read_examples(testbed / "query.jsonl")
    truth = read_truth(testbed / "truth.npz")
    whole_bytes = 4 * 4 * (6 * 192**2 + 3 * 512**2 + 2 * 64**2)  # float32, 4 layers
    monkeypatch.setattr(kfac, "device_memory", lambda device: whole_bytes / 2)

    def faithful(name, curvature):
        run = influence.fit(
            model, train, directory=tmp_path / name, path=(0.6, 1.0), curvature=curvature
        )
        kept = {block.wide.shape[1] for block in run.curvature().leaf_blocks}
        found = [run.score(queries, at=at, credit="additive").values for at in ("0.6", "1.0")]
        return kept, [lds(s, truth.masks, truth.query_loss, resamples=10).mean for s in found]

    kept, whole = faithful("whole", influence.EKFAC())
    assert kept == {64, 192, 512}
    kept, half = faithful("half", influence.EKFAC(max_width=64, rank=12, memory_share=1.0))
    assert kept == {64, 192, 90}
    _, few = faithful("few", influence.EKFAC(max_width=64, rank=12, memory_share=0.0))
    assert np.subtract(half, whole) == pytest.approx([0, 0], abs=0.01)
    assert np.all(np.subtract(few, whole) < -0.03)


@pytest.mark.slow
def test_checkpoints_are_more_faithful_still(testbed, fitted, tmp_path):
    """Epochs 1, 3, 6 and 10 of the training, repeated by its recipe by the commands: 0.55."""
    kept = ["--keep-epochs", "1,3,6,10", "--stop-after", 10]
    (tmp_path / "recipe.json").write_text("{}")  # the defaults are how this adapter was trained
    run_command(
        "unlearn",
        "retrain",
        "--run",
        fitted,
        "--all-rows",
        *kept,
        "--recipe",
        tmp_path / "recipe.json",
        "--out",
        tmp_path / "a",
    )
    folders = [tmp_path / "a" / f"epoch-{epoch}" for epoch in (1, 3, 6, 10)]
    model = ["--model", testbed / "base", "--adapter", testbed / "adapter"]
    run = tmp_path / "run"
    run_command(
        "influence",
        "fit",
        *model,
        "--train",
        testbed / "train.jsonl",
        "--run",
        run,
        "--checkpoints",
        *folders,
    )
    run_command("influence", "score", "--run", run, "--queries", testbed / "query.jsonl")
    result = run_command(
        "analysis", "lds", "--scores", run / "scores.h5", "--truth", testbed / "truth.npz"
    )
    assert result["lds"] >= 0.52


@pytest.mark.slow
def test_stored_and_streamed_gradients_give_the_same_scores(testbed, fitted, tmp_path):
    model = influence.load(testbed / "base", testbed / "adapter")
    train = influence.read_examples(testbed / "train.jsonl")
    queries = influence.read_examples(testbed / "query.jsonl")[:5]
    streamed = influence.fit(
        model, train, directory=tmp_path / "run", store="never", token_budget=3000
    )
    expected = influence.Run.open(fitted, model=model, train=train).score(queries).values
    scores = streamed.score(queries).values
    # float32 and other batches: a sampled label may fall on the other side of its boundary once in
    # a while
    assert np.corrcoef(scores.ravel(), expected.ravel())[0, 1] > 0.9999


def test_gradients_agree_with_the_plain_loop(testbed):
    model = influence.load(testbed / "base", testbed / "adapter")
    result = influence.check_gradients(model, influence.read_examples(testbed / "train.jsonl")[:12])
    assert result.ok, str(result)


@pytest.mark.slow
def test_self_influence_forecasts_counterfactual_memorization(testbed, fitted):
    """Mean loss of a row over adapters without it minus those with it; Spearman is about 0.70."""
    model = influence.load(testbed / "base", testbed / "adapter")
    run = influence.Run.open(
        fitted, model=model, train=influence.read_examples(testbed / "train.jsonl")
    )
    truth = read_truth(testbed / "truth.npz")
    masks, losses = truth.masks, truth.train_loss
    memorization = np.array(
        [losses[~masks[:, i], i].mean() - losses[masks[:, i], i].mean() for i in range(200)]
    )
    assert float(spearman(run.self_influence().values, memorization)) > 0.6


@pytest.mark.slow
def test_plain_gradient_products_are_the_weaker_baseline(testbed, fitted):
    model = influence.load(testbed / "base", testbed / "adapter")
    run = influence.Run.open(
        fitted, model=model, train=influence.read_examples(testbed / "train.jsonl")
    )
    scores = run.score(influence.read_examples(testbed / "query.jsonl"), curvature="identity")
    truth = read_truth(testbed / "truth.npz")
    assert 0.10 < lds(scores.values, truth.masks, truth.query_loss, resamples=10).mean < 0.20


@pytest.fixture(scope="module")
def without_author(testbed, fitted, tmp_path_factory):
    """`unlearn remove` of author 0 as a command: by default, and with the forget rows only; what it
    says, and all losses.

    The 64 rows that are measured say +17 % for the latter, all 180 +15 %.
    """
    edits, place = {}, tmp_path_factory.mktemp("edits")
    # the testbed's README has the recipe, which is the default one
    (place / "recipe.json").write_text("{}")
    ids = ",".join(f"train-{i:03d}" for i in range(20))
    for name, options in {"default": [], "alone": ["--rest", 0, "--max-damage", 0.2]}.items():
        out = place / name
        said = run_command(
            "unlearn",
            "remove",
            "--run",
            fitted,
            "--ids",
            ids,
            "--out",
            out,
            "--start",
            "original",
            "--recipe",
            place / "recipe.json",
            *options,
        )
        edited = influence.load(testbed / "base", out)
        tokens = tokenize(influence.read_examples(testbed / "train.jsonl"), edited.tokenizer)
        edits[name] = said, mean_losses(edited, tokens), out
    return fitted, edits


@pytest.mark.slow
def test_an_author_is_forgotten_and_the_others_are_not(without_author):
    """Retraining without rows 0-19 gives 4.71 on them and 0.898 on the others (seeds 1, 2: 4.81,
    4.94), for 2,700 row-gradients. The local retraining takes 2,100 whatever the number of rows, so
    on 200 of them the edit takes more than retraining, which it says.
    """
    _, edits = without_author
    said, losses, _ = edits["default"]
    assert abs(losses[:20].mean() / 4.71 - 1) < 0.10
    assert losses[20:].mean() <= 0.90
    goal = said["expected"]["row_gradients"]
    assert goal == 2100
    assert said["cost"]["total"] - goal <= 0.65 * 2700
    assert said["cost"]["ratio"] > 1
    assert said["reached"]
    said, losses, _ = edits["alone"]
    assert abs(losses[:20].mean() / 4.71 - 1) < 0.10
    # what the guard promises of the rows that it measures holds for all of them: 0.87 before
    assert losses[20:].mean() <= 1.20 * 0.873
    assert said["cost"]["total"] - said["expected"]["row_gradients"] <= 0.65 * 2700


@pytest.mark.slow
def test_edited_adapters_verify_and_merge(testbed, without_author):
    run, edits = without_author
    assert run_command("unlearn", "verify", "--run", run, "--apply")["passed"]
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(testbed / "base")
    model = PeftModel.from_pretrained(base, str(edits["default"][2])).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, before, rtol=0, atol=1e-4)
        assert (
            merged.generate(input_ids=ids, max_new_tokens=5, do_sample=False).shape[1]
            > ids.shape[1]
        )
