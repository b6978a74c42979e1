"""Length-bucketed batches of rows, padded.

A plan says which rows go together; `collate` makes one of its batches. A row's tokens are the same
in every batch, so no result depends on the plan.

Shapes: b rows in a batch, T tokens in the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from influence.errors import DataError
from influence.tokens import TokenizedExamples


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded rows, ready for a model.

    `indices` int64 [b]: the rows' positions in the tokenised examples; `input_ids` int64 [b, T];
    `attention_mask` int64 [b, T]: 1 for a token, 0 for padding; `supervised` bool [b, T]: is it a
    target; `position_ids` int64 [b, T]: 0, 1, ... over each row's own tokens, on whichever side it
    is padded, and over each of its documents where a row holds several; `packed`: whether one does.
    """

    indices: np.ndarray
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    supervised: torch.Tensor
    position_ids: torch.Tensor
    packed: bool = False

    def to(self, device: str | torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            supervised=self.supervised.to(device),
            position_ids=self.position_ids.to(device),
        )


def plan_batches(
    tokens: TokenizedExamples, token_budget: int, *, max_rows: int | None = None
) -> list[np.ndarray]:
    """Group examples of similar length into batches of at most `token_budget` tokens.

    Padding counts. Returns the indices int64 [b] of each batch: every index once, rows x longest <=
    token_budget, and at most `max_rows` rows; an example longer than the budget is a batch of its
    own. The batch with the most padded tokens comes first, so that memory runs out at once or not
    at all. The plan depends on the lengths, counts and order of the examples alone.

    Errors: DataError for a budget or `max_rows` below 1.
    """
    for name, value in (("token_budget", token_budget), ("max_rows", max_rows)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")
    order = np.lexsort((np.arange(len(tokens)), -tokens.counts, -tokens.lengths))
    lengths = tokens.lengths[order]
    batches: list[tuple[int, np.ndarray]] = []
    start = 0
    while start < len(order):
        longest = max(int(lengths[start]), 1)
        rows = max(token_budget // longest, 1)
        batch = order[start : start + (rows if max_rows is None else min(rows, max_rows))]
        batches.append((len(batch) * longest, batch.astype(np.int64)))
        start += len(batch)
    return [batch for _, batch in sorted(batches, key=lambda sized: -sized[0])]


def padded_tokens(tokens: TokenizedExamples, batches: Sequence[np.ndarray]) -> list[int]:
    """Tokens of each batch with its padding, `[batches]`: what the time of a batch goes by."""
    return [len(rows) * max(int(tokens.lengths[rows].max()), 1) for rows in batches]


def collate(
    tokens: TokenizedExamples,
    indices: Sequence[int] | np.ndarray,
    *,
    pad_id: int = 0,
    padding: Literal["right", "left"] = "right",
    device: str | torch.device = "cpu",
) -> Batch:
    """Pad the examples at `indices` to the longest of them.

    Padding is masked by position, so any `pad_id` in the vocabulary does, the end-of-sequence id
    included.
    """
    if padding not in ("right", "left"):
        raise DataError(f"padding is {padding!r}; it must be 'right' or 'left'")
    at = np.asarray(indices, dtype=np.int64)
    if at.ndim != 1 or not len(at):
        raise DataError(f"a batch needs a list of at least one index, got the shape {at.shape}")
    rows = [tokens[i] for i in at]
    packed = any(row.position_ids is not None for row in rows)
    if packed and padding == "left":
        raise DataError(
            "a row holds several documents, and padding is 'left': models tell documents apart in "
            "rows that are padded on the right"
        )
    shape = len(rows), max(len(row) for row in rows)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    supervised = np.zeros(shape, dtype=bool)
    position_ids = np.tile(np.arange(shape[1], dtype=np.int64), (shape[0], 1))
    for r, row in enumerate(rows):
        start = shape[1] - len(row) if padding == "left" else 0
        span = slice(start, start + len(row))
        input_ids[r, span] = row.input_ids
        attention_mask[r, span] = 1
        supervised[r, span] = row.supervised
        position_ids[r] = np.maximum(position_ids[r] - start, 0)
        if row.position_ids is not None:  # what is padded goes on with the last document
            end = int(row.position_ids[-1]) + 1
            position_ids[r, : len(row)] = row.position_ids
            position_ids[r, len(row) :] = np.arange(end, end + shape[1] - len(row))
    return Batch(
        indices=at,
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        supervised=torch.from_numpy(supervised),
        position_ids=torch.from_numpy(position_ids),
        packed=packed,
    ).to(device)
