"""Outputs that a model which never saw some rows might give on them.

With `p_now` the adapter's outputs on a row's completion tokens, and `p_before`, `p_after` those of
the local retrainings with and without the change (`unlearn.retraining.local`),

    log q = log mean_r p_after,r + a (log p_now - log p_before) + constant

At a = 0 it is what the local trainings say. At a = 1 it is the adapter, moved by what the change
does locally: right where a small training knows less than the run's own (few epochs at a small
rate), and noisy where both know everything. So a in [0, 1], one for all rows, is where the mean
loss under q is nearest to the expected one (`unlearn.unseen`), which neither of them decides.

Why a mean over trainings: two retrained models differ, and their mean is nearer to a third
(LOG.md, 2026-11-28, "What a model that never saw the rows would say").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.adapter import AdaptedModel
from influence.batches import collate, plan_batches
from influence.cost import Cost
from influence.halving import Steps, in_parts
from influence.loss import supervised_logits
from influence.memory import block_bytes
from influence.tokens import TokenizedExamples
from unlearn.record.version import Version
from unlearn.retraining.local import LocalRetraining

#: Bytes of outputs that are kept in the host's memory. Those beyond are computed again when they
#: are asked for. A choice.
CACHE_BYTES = 4 << 30

#: The values of a that are tried.
EXPONENTS = tuple(i / 10 for i in range(11))


@dataclass(eq=False)
class ExpectedOutputs:
    """Log-probabilities `log q_i` [T_i, V] of some rows' completion tokens.

    Attributes
    ----------
    version : Version
        The adapter that saw the rows.
    tokens : TokenizedExamples
        The rows, m of them.
    losses : float64 array [m]
        Their expected losses, nats per completion token.
    local : LocalRetraining
        The adapters trained on few rows.
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
    local: LocalRetraining
    cost: Cost
    cache: dict[int, Tensor] = field(default_factory=dict)
    bytes: int = 0

    def of(self, rows: np.ndarray) -> Tensor:
        """`log q` of some rows, one after the other, `[N, V]`.

        The model moves meanwhile, and is back where it was then.
        """
        exponent = self.exponent
        missing = [row for row in rows.tolist() if row not in self.cache]
        by_row = dict(self.cache)
        if missing:

            def run(rows: np.ndarray, _: Steps) -> tuple[Tensor, ...]:
                after, correction, _labels, counts = self._parts(rows)
                return after.add_(correction, alpha=exponent).log_softmax(-1).split(counts)

            for some, log_q in in_parts(self.version.model, self.tokens, np.array(missing), run):
                for row, part in zip(some.tolist(), log_q, strict=True):
                    by_row[row] = part.clone()
                    if not self.full(part.nbytes):
                        self.cache[row] = by_row[row].cpu()
                        self.bytes += part.nbytes
        return torch.cat([by_row[row].to(self.version.model.device) for row in rows.tolist()])

    def full(self, more: int = 0) -> bool:
        """Whether `more` bytes would be too many.

        Processes of one machine share its memory.
        """
        return self.bytes + more > block_bytes(CACHE_BYTES) // distributed.on_this_machine()

    @cached_property
    def exponent(self) -> float:
        """The a at which the mean loss under q is nearest to the expected one."""
        return self._exponent_of(self._loss_sums(np.arange(len(self.tokens))))

    def share_exponent(self) -> None:
        """Find the `exponent`, unless it is known, where several processes share the rows out."""
        if "exponent" in vars(self) or distributed.world() == 1:
            return
        spent = self.cost.forwards
        sums = self._loss_sums(distributed.shard(np.arange(len(self.tokens))))
        forwards = np.array([self.cost.forwards - spent])
        *sums, forwards = distributed.add_up(torch.from_numpy(np.append(sums, forwards))).tolist()
        self.cost.forwards = spent + int(forwards)
        vars(self)["exponent"] = self._exponent_of(np.array(sums))

    def _exponent_of(self, sums: np.ndarray) -> float:
        """The exponent by the sums of the rows' losses under each of them, `[EXPONENTS]`."""
        distance = np.abs(sums / len(self.tokens) - self.losses.mean())
        return EXPONENTS[int(distance.argmin())]

    def _loss_sums(self, among: np.ndarray) -> np.ndarray:
        """Sums of the mean losses of the rows `among` under q, for each of the `EXPONENTS`."""
        sums = np.zeros(len(EXPONENTS))
        if not len(among):
            return sums

        def run(rows: np.ndarray, _: Steps) -> np.ndarray:
            after, correction, labels, counts = self._parts(rows)
            share = np.repeat(1 / self.tokens.counts[rows], counts)
            found = np.zeros(len(EXPONENTS))
            for place, exponent in enumerate(EXPONENTS):
                log_q = torch.add(after, correction, alpha=exponent)
                losses = torch.nn.functional.cross_entropy(log_q, labels, reduction="none")
                found[place] = float(losses.double().cpu().numpy() @ share)
            return found

        for places in plan_batches(self.tokens.select(among), self.version.run.token_budget):
            for _, found in in_parts(self.version.model, self.tokens, among[places], run):
                sums += found
        return sums

    def _parts(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """`log mean p_after` and `log p_now - log p_before` [N, V], labels `[N]`, tokens a row."""
        local, model = self.local, self.version.model
        self.cost.forwards += (2 + len(local.after)) * len(rows)

        def log_p(theta: Tensor) -> tuple[Tensor, Tensor, list[int]]:
            """Log-probabilities with the adapter at `theta`."""
            with model.at(theta):
                logits, labels, counts = _logits(model, self.tokens, rows)
            return logits.log_softmax(-1), labels, counts

        first, *others = local.after
        after, labels, counts = log_p(first)
        for theta in others:
            after = torch.logaddexp(after, log_p(theta)[0])
        after -= math.log(len(local.after))
        correction = log_p(self.version.theta)[0].sub_(log_p(local.before)[0])
        return after, correction, labels, counts


def _logits(
    model: AdaptedModel, tokens: TokenizedExamples, rows: np.ndarray
) -> tuple[Tensor, Tensor, list[int]]:
    """Supervised logits `[N, V]`, float32 at least, labels `[N]` and tokens a row."""
    batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
    with model.evaluating(), torch.no_grad():
        part = supervised_logits(model, batch)
    logits = part.logits if part.logits.dtype == torch.float64 else part.logits.float()
    return logits, part.targets, part.counts
