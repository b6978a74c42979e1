"""Losses are the model's own, labels follow its distribution, rows fit its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence.errors import DataError
from influence.gradients import label_uniforms
from influence.loss import mean_losses, sample_labels
from tests.conftest import build_model, examples, fit_end, rows, tokens_of


def test_mean_losses_are_the_models_own(tiny):
    data = examples(5)
    tokens = tokens_of(tiny, data)
    for item, loss in zip(tokens, mean_losses(tiny, tokens), strict=True):
        ids = torch.from_numpy(item.input_ids)[None]
        logp = tiny.model(input_ids=ids).logits[0].log_softmax(-1)
        supervised = [t for t in range(ids.shape[1]) if item.supervised[t]]
        expected = -sum(logp[t - 1, ids[0, t]].item() for t in supervised) / len(supervised)
        assert abs(loss - expected) < 1e-10


def test_sampled_labels_follow_the_model_and_the_key_alone():
    probs = torch.tensor([[0.1, 0.0, 0.6, 0.3]], dtype=torch.float64).expand(40_000, 4)
    uniforms = torch.from_numpy(label_uniforms(0, 0, "a", 40_000))
    share = torch.bincount(sample_labels(probs, uniforms), minlength=4) / 40_000
    assert share[1] == 0
    assert (share - probs[0]).abs().max() < 0.01  # 4 standard errors
    assert np.array_equal(label_uniforms(0, 0, "a", 5), label_uniforms(0, 0, "a", 9)[:5])
    assert not np.array_equal(label_uniforms(0, 0, "a", 5), label_uniforms(0, 0, "b", 5))
    assert not np.array_equal(label_uniforms(0, 0, "a", 5), label_uniforms(0, 1, "a", 5))
    assert not np.array_equal(label_uniforms(0, 0, "a", 5), label_uniforms(1, 0, "a", 5))


def test_rows_that_do_not_fit_the_model_are_listed(tmp_path):
    small = build_model("gpt2", layers=1, target_modules=["attn.c_attn"])
    small.model.get_base_model().config.max_position_embeddings = 5
    long = influence.examples_from_rows(
        [{"id": "ok", "prompt": "fox", "completion": " runs"}, *rows(3)]
    )
    with pytest.raises(
        DataError, match=r"(?s)rows do not fit the model.*tokens, and the model has 5 positions"
    ):
        fit_end(small, long, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_token_that_the_base_lacks_is_named_with_what_to_do(tiny):
    tiny.tokenizer.add_tokens(["<new>"])
    new = influence.examples_from_rows(
        [
            {"id": "ok", "prompt": "fox", "completion": " runs"},
            {"id": "x", "text": "fox <new> runs"},
        ]
    )
    with pytest.raises(DataError) as caught:
        influence.check_gradients(tiny, new)
    said = str(caught.value)
    assert "row 2 (id 'x'): token id 25 ('<new>'), and the model embeds 25 tokens" in said
    assert "save_embedding_layers=True" in said
    assert "--max-length" not in said
    assert "'ok'" not in said


def test_rare_labels_of_a_large_vocabulary_can_be_drawn():
    """float32 sums would lose the tail of 150,000 labels, drawn by uniforms near 1."""
    probs = torch.full((1, 150_000), 1 / 150_000)
    label = sample_labels(probs, torch.tensor([1 - 2e-6], dtype=torch.float64))
    assert int(label) == 149_999
