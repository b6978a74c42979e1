"""Losses are the model's own, labels follow its distribution, rows fit its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence import loss
from influence.batches import collate
from influence.errors import DataError
from influence.gradients import batch_uniforms, label_uniforms, tape
from influence.loss import (
    all_finite,
    loss_gradient,
    mean_losses,
    sample_labels,
    sampled_loss_gradient,
    token_losses,
)
from influence.measurements import MeanLoss, MeanMargin, output_gradient
from tests.conftest import build_model, examples, fit_end, rows, tokens_of
from tests.watching import HeldBytes


def test_mean_losses_are_the_models_own(tiny):
    data = examples(5)
    tokens = tokens_of(tiny, data)
    for item, value in zip(tokens, mean_losses(tiny, tokens), strict=True):
        ids = torch.from_numpy(item.input_ids)[None]
        logp = tiny.model(input_ids=ids).logits[0].log_softmax(-1)
        supervised = [t for t in range(ids.shape[1]) if item.supervised[t]]
        expected = -sum(logp[t - 1, ids[0, t]].item() for t in supervised) / len(supervised)
        assert abs(value - expected) < 1e-10


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


@pytest.mark.parametrize("count", [1024, 5_000])
def test_labels_of_large_vocabularies_are_those_of_one_running_sum(count):
    """Of a whole number of blocks, and with a part of one at the end; where nothing has a
    probability nothing is drawn.
    """
    torch.manual_seed(0)
    probs = (6 * torch.randn(300, count, dtype=torch.float64)).softmax(-1)
    probs[:, 100:900] = 0
    uniforms = torch.rand(300, dtype=torch.float64)
    expected = []
    for row, u in zip(probs.tolist(), uniforms.tolist(), strict=True):
        left, label = u * sum(row), 0
        while left >= row[label]:
            left -= row[label]
            label += 1
        expected.append(label)
    assert sample_labels(probs, uniforms).tolist() == expected
    ends = torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)
    drawn = sample_labels(probs[:2].float(), ends)
    assert bool((probs[[0, 1], drawn] > 0).all())


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


# ---- few positions at a time ---------------------------------------------------------------------

TYPES = [torch.float64, torch.float32, torch.bfloat16]


def some_logits(dtype, N: int = 23, V: int = 40):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(N, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(V, (N,), generator=generator), uniforms


@pytest.mark.parametrize("numbers", [1, 200, 1 << 24], ids=["one", "five", "all"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_chunks_of_positions_change_no_bit(dtype, numbers, monkeypatch):
    """Gradients, losses and sampled labels are those of all positions at once."""
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", numbers)
    logits, targets, uniforms = some_logits(dtype)
    wide = logits.double() if dtype == torch.float64 else logits.float()
    probs, places = wide.softmax(-1), torch.arange(len(targets))

    def one_hot(labels):
        return torch.nn.functional.one_hot(labels, logits.shape[1]).to(wide)

    assert torch.equal(loss_gradient(logits, targets), (probs - one_hot(targets)).to(dtype))
    scaled = (probs - one_hot(targets)) * uniforms.to(wide)[:, None]
    assert torch.equal(loss_gradient(logits, targets, uniforms), scaled.to(dtype))
    assert torch.equal(token_losses(logits, targets), -wide.log_softmax(-1)[places, targets])
    cdf = probs.double().cumsum(-1)
    drawn = (cdf > uniforms[:, None] * cdf[:, -1:]).int().argmax(-1)
    assert torch.equal(sampled_loss_gradient(logits, uniforms), (probs - one_hot(drawn)).to(dtype))


@pytest.mark.parametrize("measurement", [None, MeanLoss(), MeanMargin()], ids=str)
def test_a_measurement_has_the_same_gradient_of_few_examples_at_a_time(measurement, monkeypatch):
    logits, targets, _ = some_logits(torch.float64)
    part = loss.Supervised(logits, targets, [3, 9, 1, 10])
    at_once = output_gradient(part, measurement)
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", 10 * 40)
    for got, expected in zip(output_gradient(part, measurement), at_once, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("what", ["sampled", "data", "loss", "margin"])
def test_no_wide_copy_of_all_logits_is_made(what, monkeypatch):
    """bfloat16 logits, a gradient of their type, and chunks: no more, up to the backward's end.

    Where all positions were done at once, `sampled` held 14 bytes a logit, `margin` 22, the others
    10; now logits and gradient take 4.
    """
    V = 4096
    model = wide_vocabulary(V)
    tokens = tokens_of(model, examples(24))
    batch = collate(tokens, np.arange(24), pad_id=model.pad_id)
    N = int(tokens.counts.sum())
    chunk = N * V // 8
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", chunk)
    with tape(model) as recorder, HeldBytes(least=chunk // 4) as held:
        part = recorder.forward(batch)
        assert part.logits.dtype == torch.bfloat16
        if what == "sampled":
            gradient = sampled_loss_gradient(
                part.logits, batch_uniforms(tokens, batch.indices, 0, 0)
            )
        else:
            measurement = {"data": None, "loss": MeanLoss(), "margin": MeanMargin()}[what]
            _, gradient = output_gradient(part, measurement)
        recorder.gradients(part, gradient)
    wide = 20 if what == "margin" else 12  # bytes for each number of a chunk
    assert 4 * N * V <= held.most <= 4 * N * V + chunk * wide


def wide_vocabulary(V: int):
    """A Llama with bfloat16 weights and V tokens, of which the tokenizer knows few."""
    model = build_model("llama", layers=1, dtype=torch.bfloat16, target_modules=["q_proj"])
    base = model.model.get_base_model()
    base.resize_token_embeddings(V, mean_resizing=False)
    return model


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_logits_are_seen(bad):
    logits, _, _ = some_logits(torch.bfloat16)
    assert all_finite(logits)
    assert all_finite(logits[:0])
    logits[7, 3] = bad
    assert not all_finite(logits)
