"""Outputs that a model which never saw some rows might give on them.

They lie between the base's and the adapter's. With the logits `z` of both on a row's completion
tokens,

    log q_i = log softmax( (1 - a_i) z_base + a_i z_adapter )

and a_i such that the row's mean loss under q_i is the one that `unlearn.unseen` expects. Where the
estimate were the truth, training on the retained rows and on the removed ones labelled by q has the
retrained model as its stationary point, because labels drawn from a model pull it nowhere.

Why between these two: on tofu-tiny's author 0 the base's outputs are as near to a retrained model's
as two retrained models are to one another (KL 1.35 and 1.31 nats per token), and its loss is not
(4.31 and 4.82; LOG.md, 2026-11-21, "Closed-form edits").
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.batches import collate
from influence.cost import Cost
from influence.loss import supervised_logits
from influence.tokens import TokenizedExamples
from unlearn.record.version import Version
from unlearn.unseen import scaled_to

#: Bytes of outputs that are kept in the host's memory. Those beyond are computed again when they
#: are asked for. A choice.
CACHE_BYTES = 4 << 30

#: How far q may go beyond the base, away from the adapter, where the expected loss is above the
#: base's. A choice: one whole way from the adapter to the base.
BEYOND = -1.0

#: Halvings of the interval that a_i lies in; its last width is 2e-6.
BISECTIONS = 20


@dataclass(eq=False)
class ExpectedOutputs:
    """Log-probabilities `log q_i` [T_i, V] of some rows' completion tokens.

    Attributes
    ----------
    version : Version
        The adapter that saw the rows.
    tokens : TokenizedExamples
        The rows, s of them.
    losses : float64 array [s]
        The mean loss that each row has under its q, nats per completion token.
    cost : Cost
        Where the forwards are counted.
    cache : dict of int to Tensor [T_i, V]
        Rows that were computed, in the host's memory, up to `CACHE_BYTES`.
    bytes : int
        What they take.
    """

    version: Version
    tokens: TokenizedExamples
    losses: np.ndarray
    cost: Cost
    cache: dict[int, Tensor] = field(default_factory=dict)
    bytes: int = 0

    def of(self, rows: np.ndarray) -> Tensor:
        """`log q` of some rows, one after the other, `[N, V]`.

        The model moves meanwhile, and is back where it was then.
        """
        missing = [row for row in rows.tolist() if row not in self.cache]
        by_row = dict(self.cache)
        if missing:
            for row, log_q in zip(missing, self._compute(np.array(missing)), strict=True):
                by_row[row] = log_q
                if not self.full(log_q.nbytes):
                    self.cache[row] = log_q.cpu()
                    self.bytes += log_q.nbytes
        return torch.cat([by_row[row].to(self.version.model.device) for row in rows.tolist()])

    def full(self, more: int = 0) -> bool:
        """Whether `more` bytes would be too many.

        Processes of one machine share its memory.
        """
        return self.bytes + more > CACHE_BYTES // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def _compute(self, rows: np.ndarray) -> list[Tensor]:
        """`log q` of some rows, by two forwards of each."""
        model = self.version.model
        self.cost.forwards += 2 * len(rows)
        with model.at(scaled_to(self.version, 0.0)):
            base, labels, counts = _logits(model, self.tokens, rows)
        with model.at(self.version.theta):
            difference, _, _ = _logits(model, self.tokens, rows)
        difference -= base  # in place: logits [N, V] are the largest tensors of an edit
        losses = torch.from_numpy(self.losses[rows]).to(base)
        shares = _adapter_shares(base, difference, labels, counts, losses)
        by_token = torch.repeat_interleave(shares, torch.tensor(counts, device=base.device))
        mixed = base.addcmul_(difference, by_token[:, None])
        return [part.clone() for part in mixed.log_softmax(-1).split(counts)]


def _adapter_shares(
    base: Tensor, difference: Tensor, labels: Tensor, counts: list[int], losses: Tensor
) -> Tensor:
    """The shares a [b] of the adapter at which the rows' mean losses are `losses` [b].

    By bisection: the loss falls from the base to the adapter on rows that the adapter was taught.
    `base` and `difference` are [N, V], `labels` [N], `counts` the rows' tokens.
    """
    lengths = torch.tensor(counts, device=base.device)
    row_of_token = torch.repeat_interleave(torch.arange(len(counts), device=base.device), lengths)
    low, high = torch.full_like(losses, BEYOND), torch.ones_like(losses)
    for _ in range(BISECTIONS):
        half = (low + high) / 2
        by_token = torch.nn.functional.cross_entropy(
            base + half[row_of_token, None] * difference, labels, reduction="none"
        )
        mean = torch.zeros_like(losses).index_add_(0, row_of_token, by_token) / lengths
        low, high = torch.where(mean > losses, half, low), torch.where(mean > losses, high, half)
    return high


def _logits(
    model: AdaptedModel, tokens: TokenizedExamples, rows: np.ndarray
) -> tuple[Tensor, Tensor, list[int]]:
    """Supervised logits `[N, V]`, float32 at least, labels `[N]` and tokens a row."""
    batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
    with model.evaluating(), torch.no_grad():
        part = supervised_logits(model, batch)
    logits = part.logits if part.logits.dtype == torch.float64 else part.logits.float()
    return logits, part.targets, part.counts
