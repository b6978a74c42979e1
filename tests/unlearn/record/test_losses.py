"""Losses and extraction strengths, against one token after the other."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import examples, tokens_of
from tests.oracles import logits_fn
from unlearn.record.losses import measure


def test_extraction_strength_is_that_of_greedy_decoding(small):
    """Decoded one token after the other from the prompt and the first k completion tokens."""
    tokens = tokens_of(small, examples(6))
    measured = measure(small, tokens, token_budget=20)
    for i, item in enumerate(tokens):
        ids = torch.from_numpy(item.input_ids)
        first, length = int(item.supervised.argmax()), len(item.input_ids)
        for k in range(length - first + 1):
            text = ids[: first + k]
            while len(text) < length:
                logits = small.model(input_ids=text[None]).logits[0, -1]
                text = torch.cat([text, logits.argmax().reshape(1)])
            if torch.equal(text, ids):
                break
        assert measured.extraction[i] == pytest.approx(1 - k / (length - first))
        f, targets = logits_fn(small, item)
        expected = torch.nn.functional.cross_entropy(f(small.snapshot()), targets)
        assert measured.loss[i] == pytest.approx(float(expected), rel=1e-12)
