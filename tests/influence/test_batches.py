"""Batches hold every row once within their budget, and pad on either side."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from influence.batches import collate, padded_tokens, plan_batches
from influence.errors import DataError
from influence.tokens import TokenizedExamples, Tokens
from tests.influence.toy_tokenizers import random_tokens


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("budget", "max_rows"), [(1, None), (64, None), (500, None), (500, 3), (10**6, None)]
)
def test_batches_hold_every_index_once_within_the_budget(seed, budget, max_rows):
    tokens = random_tokens(seed)
    batches = plan_batches(tokens, budget, max_rows=max_rows)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(tokens)))
    sizes = []
    for batch in batches:
        assert batch.dtype == np.int64
        padded = len(batch) * int(tokens.lengths[batch].max())
        assert padded <= budget or len(batch) == 1
        assert max_rows is None or len(batch) <= max_rows
        sizes.append(padded)
    assert sizes == sorted(sizes, reverse=True)  # memory runs out at the first batch or never
    # Rows of a batch are neighbours in length: lengths do not interleave between batches.
    spans = sorted((tokens.lengths[batch].min(), tokens.lengths[batch].max()) for batch in batches)
    assert all(high <= low for (_, high), (low, _) in pairwise(spans))
    again = plan_batches(tokens, budget, max_rows=max_rows)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_batches_are_as_full_as_the_budget_allows():
    tokens = random_tokens(0)
    assert len(plan_batches(tokens, 10**6)) == 1
    # A fifth more than without any padding: what a row too many, and the last batch, leave empty.
    assert len(plan_batches(tokens, 900)) <= 1.2 * tokens.lengths.sum() / 900 + 1
    assert [len(batch) for batch in plan_batches(tokens, 10**6, max_rows=150)] == [150, 50]


def test_a_batch_keeps_the_positions_of_documents():
    ids, targets = np.array([5, 6, 7, 8, 9]), np.array([False, True, False, True, True])
    packed = Tokens(ids, targets, np.array([0, 1, 0, 1, 2]))
    longer = Tokens(np.arange(5, 13), np.arange(8) > 2)
    tokens = TokenizedExamples([packed, longer], ["packed", "longer"])
    batch = collate(tokens, [0, 1])
    assert batch.packed
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5], list(range(8))]
    assert not collate(tokens, [1]).packed
    assert batch.to("cpu").packed
    with pytest.raises(DataError, match="several documents, and padding is 'left'"):
        collate(tokens, [0, 1], padding="left")


def test_batches_refuse_nonsense_and_accept_nothing():
    with pytest.raises(DataError, match="token_budget is 0; it must be at least 1"):
        plan_batches(random_tokens(0), 0)
    with pytest.raises(DataError, match="max_rows is -1; it must be at least 1"):
        plan_batches(random_tokens(0), 10, max_rows=-1)
    assert plan_batches(random_tokens(0)[:0], 10) == []


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_batch_pads_on_either_side(padding):
    rows = [
        Tokens(np.array([5, 6, 7]), np.array([False, True, True])),
        Tokens(np.array([8, 9, 10, 11, 12]), np.array([False, False, False, True, True])),
    ]
    batch = collate(TokenizedExamples(rows, ["a", "b"]), [1, 0], pad_id=99, padding=padding)
    left = padding == "left"
    assert batch.indices.tolist() == [1, 0]
    assert batch.input_ids.tolist() == [
        [8, 9, 10, 11, 12],
        [99, 99, 5, 6, 7] if left else [5, 6, 7, 99, 99],
    ]
    assert batch.attention_mask.tolist() == [[1] * 5, [0, 0, 1, 1, 1] if left else [1, 1, 1, 0, 0]]
    assert batch.supervised.tolist() == [
        [False, False, False, True, True],
        [False, False, False, True, True] if left else [False, True, True, False, False],
    ]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4]
    assert batch.position_ids[1][batch.attention_mask[1] == 1].tolist() == [0, 1, 2]
    assert 0 <= int(batch.position_ids.min()) <= int(batch.position_ids.max()) < 5
    integers = (batch.input_ids, batch.attention_mask, batch.position_ids)
    assert all(tensor.dtype == torch.int64 for tensor in integers)
    assert batch.supervised.dtype == torch.bool


def test_a_batch_moves_to_a_device():
    batch = collate(random_tokens(0), [0, 1], device="meta")
    assert batch.input_ids.device.type == batch.supervised.device.type == "meta"
    moved = collate(random_tokens(0), [0, 1]).to(torch.device("meta"))
    fields = ("input_ids", "attention_mask", "supervised", "position_ids")
    assert all(getattr(moved, name).device.type == "meta" for name in fields)


def test_collate_refuses_nonsense():
    with pytest.raises(DataError, match="at least one index"):
        collate(random_tokens(0), [])
    with pytest.raises(DataError, match="padding is 'middle'"):
        collate(random_tokens(0), [0], padding="middle")


def test_padded_tokens_are_rows_times_the_longest():
    tokens = random_tokens(0)
    plan = plan_batches(tokens, 900)
    expected = [collate(tokens, rows).input_ids.numel() for rows in plan]
    assert padded_tokens(tokens, plan) == expected
