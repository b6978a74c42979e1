"""What a model says of rows, against plain forwards of one row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from analysis.metrics import outputs as module
from analysis.metrics.outputs import gradient_norms, outputs
from influence.errors import NumericalError
from tests.analysis.evaluation.helpers import logs_of, plain
from tests.conftest import build_model, examples, tokens_of


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_outputs_are_those_of_a_plain_forward(kind, monkeypatch):
    monkeypatch.setattr(module, "_POSITIONS", 3)  # distributions are reduced in several pieces
    model = build_model(kind, layers=1)
    tokens = tokens_of(model, examples(7))
    tokens[2].input_ids[-1] = int(
        logs_of(model.model, tokens[2].input_ids)[-1].argmax()
    )  # one that is guessed
    found = outputs(model, tokens, token_budget=25)
    assert found.ids == tokens.ids
    for i, row in enumerate(plain(model.model, tokens)):
        p, logs = row["logs"].exp(), row["logs"]
        mean = [
            sum(float(a) * float(b) for a, b in zip(*pair, strict=True))
            for pair in zip(p, logs, strict=True)
        ]
        square = [
            sum(float(a) * float(b) ** 2 for a, b in zip(*pair, strict=True))
            for pair in zip(p, logs, strict=True)
        ]
        np.testing.assert_allclose(found.log_probs[i], row["own"], rtol=1e-9)
        np.testing.assert_allclose(found.loss[i], -row["own"].mean(), rtol=1e-9)
        np.testing.assert_allclose(found.sums[i], -row["own"].sum(), rtol=1e-9)
        np.testing.assert_allclose(found.mean[i], mean, rtol=1e-9)
        np.testing.assert_allclose(
            found.std[i], np.sqrt(np.array(square) - np.square(mean)), rtol=1e-7
        )
        assert found.right[i].tolist() == [
            int(log.argmax()) == label for log, label in zip(logs, row["labels"], strict=True)
        ]
        assert found.counts[i] == len(row["labels"])
    assert found.right[2][-1]
    assert not all(right.all() for right in found.right)


def test_of_a_flat_and_of_a_cut_distribution():
    """V equal tokens: log p = -log V everywhere, no spread. (2, 1, 1, never)/4: mean (2 log 1/2 + 2
    log 1/4)/4 = -1.5 log 2, spread sqrt(1/2 (1/2)^2 + 1/2 (1/2)^2) log 2 = log 2 / 2; the token
    that is never said adds nothing.
    """
    logits = torch.zeros(1, 8)
    own, mean, std, right = module._reduced(logits, torch.tensor([5]))
    assert (float(own), float(mean), float(std)) == (
        pytest.approx(-math.log(8)),
        pytest.approx(-math.log(8)),
        pytest.approx(0, abs=1e-12),
    )
    logits = torch.tensor([[math.log(2), 0.0, 0.0, -math.inf]], dtype=torch.float64)
    own, mean, std, right = module._reduced(logits, torch.tensor([0]))
    assert float(own) == pytest.approx(-math.log(2))
    assert float(mean) == pytest.approx(-1.5 * math.log(2))
    assert float(std) == pytest.approx(math.log(2) / 2)
    assert bool(right)


def test_outputs_of_a_broken_model_are_refused(tiny):
    tiny.sites[0].B.weight.data.fill_(math.nan)
    with pytest.raises(NumericalError, match="the loss of 3 rows"):
        outputs(tiny, tokens_of(tiny, examples(3)))


def test_gradient_norms_are_those_of_autograd():
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, examples(5))
    found = gradient_norms(model, tokens, token_budget=30)
    parameters = [p for name, p in model.model.named_parameters() if "lora_" in name]
    for p in parameters:
        p.requires_grad_(True)
    for i, row in enumerate(tokens):
        ids, first = torch.from_numpy(row.input_ids), int(row.supervised.argmax())
        loss = nn.functional.cross_entropy(
            model.model(input_ids=ids[None]).logits[0, first - 1 : -1], ids[first:]
        )
        grads = torch.autograd.grad(loss, parameters)
        assert found[i] == pytest.approx(
            math.sqrt(sum(float((g**2).sum()) for g in grads)), rel=1e-9
        )
