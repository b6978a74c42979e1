"""Which tokens of a training row did it: scores split over the row's positions.

A row's gradient is a sum over its positions, leaf by leaf `sum_t g_t x_t^T` with the input x_t and
the output gradient g_t at position t (`influence.gradients`). So a score is a sum over positions
too (Grosse et al. 2023, arXiv 2308.03296, section 5.3.3):

    score[q, i] = sum_t w_i <X_q, g_t x_t^T>,         X_q = (C + lambda I)^-1 grad m(q)

Position t is where token t is read and token t + 1 predicted: it carries the loss of predicting t +
1 *and* what later tokens' losses send back to it through attention. The last token is never read;
its entry is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.at_point import AtPoint
from influence.batches import collate, padded_tokens, plan_batches
from influence.errors import AdapterError, InputError
from influence.gradients import Tape, tape
from influence.halving import Steps, in_parts
from influence.loss import loss_gradient
from influence.progress import track
from influence.run import Run
from influence.tokens import TokenizedExamples


@dataclass
class Tokenwise:
    """Scores of every position of every training row, rows one after the other (ragged).

    `values` float32 [query, all positions]; row i has the columns `offsets[i]:offsets[i + 1]`;
    `token_ids` [all positions] are the rows' tokens.
    """

    values: np.ndarray = field(repr=False)
    offsets: np.ndarray = field(repr=False)
    token_ids: np.ndarray = field(repr=False)

    @classmethod
    def empty(cls, run: Run, queries: int) -> Tokenwise:
        """Zeros for all rows of a run."""
        offsets = np.concatenate([[0], np.cumsum(run.tokens.lengths)]).astype(np.int64)
        ids = np.concatenate([item.input_ids for item in run.tokens]).astype(np.int32)
        return cls(np.zeros((queries, int(offsets[-1])), np.float32), offsets, ids)

    def row(self, query: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `[T]` and scores `[T]` of one training row for one query, both by position."""
        if not (0 <= query < len(self.values) and 0 <= row < len(self.offsets) - 1):
            raise InputError(
                f"query {query} and row {row} were given; there are {len(self.values)} queries and "
                f"{len(self.offsets) - 1} rows"
            )
        part = slice(self.offsets[row], self.offsets[row + 1])
        return self.token_ids[part], self.values[query, part]

    def add(
        self, point: AtPoint, queries: np.ndarray, solutions: Tensor, factors: np.ndarray
    ) -> None:
        """Add the scores at one point times each row's factor, `factors` [n], for the `solutions`
        [K, P] of these queries [K].

        Each process runs its share of the rows; all have the sum.
        """
        run, model = point.run, point.model
        columns = model.space.split(point.geometry.adjoint(solutions))
        plan = plan_batches(run.tokens, run.token_budget)
        plan = distributed.share(plan, padded_tokens(run.tokens, plan))
        added = np.zeros((len(queries), self.values.shape[1]), np.float32)
        with model.at(point.place.theta), tape(model) as recorder:
            _refuse_apart(recorder)
            counts, sizes = [len(rows) for rows in plan], padded_tokens(run.tokens, plan)
            label = "training rows, token by token"
            scale = factors * run.weights

            def look(rows: np.ndarray, _: Steps) -> np.ndarray:
                found = _token_products(recorder, run.tokens, rows, solutions, columns)
                return found.double().cpu().numpy() * scale[rows][:, None]

            for batch in track(plan, label, counts=counts, sizes=sizes):
                for rows, scaled in in_parts(model, run.tokens, batch, look):
                    for place, row in enumerate(rows.tolist()):
                        start = self.offsets[row]
                        length = int(run.tokens.lengths[row]) - 1
                        added[:, start : start + length] = scaled[:, place, :length]
        self.values[queries] += distributed.add_up(torch.from_numpy(added)).numpy()


def _token_products(
    recorder: Tape,
    tokens: TokenizedExamples,
    rows: np.ndarray,
    solutions: Tensor,
    columns: list[Tensor],
) -> Tensor:
    """Products `[K, b, T - 1]` of the `solutions` [K, P], leaf by leaf in `columns`, with what each
    token adds to its row's gradient.
    """
    model = recorder.model
    batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
    part = recorder.forward(batch)
    _refuse_apart(recorder)  # which a forward may have found
    b, T = batch.input_ids.shape[0], batch.input_ids.shape[1] - 1
    found = torch.zeros(len(solutions), b, T, dtype=solutions.dtype, device=solutions.device)
    reads = batch.supervised[:, 1:]  # the positions that the LM head sees

    def show(leaf: int, x: Tensor, g: Tensor, valid: Tensor) -> None:
        products = _products(x.to(solutions), g.to(solutions), columns[leaf])
        if leaf in recorder.slots:  # k of them for every token
            found.add_(products.unflatten(-1, (reads.shape[1], -1)).sum(-1))
        elif valid is recorder.valid:
            found.add_(products)
        else:  # an adapted LM head sees supervised positions only, in order
            found[:, reads] += products[:, valid]

    recorder.backward(part.logits, loss_gradient(part.logits, part.targets), show)
    return found


def _refuse_apart(recorder: Tape) -> None:
    """Refuse an adapter whose layers do not tell which token is at which place."""
    if recorder.apart:
        raise AdapterError(
            "scores per token were asked for, and this adapter has experts that see "
            "tokens without their places: ask for scores per row"
        )


def _products(x: Tensor, g: Tensor, columns: Tensor) -> Tensor:
    """`<X_k, g_t x_t^T>` `[K, b, T]` for `x` [b, T, d_in], `g` [b, T, d_out], `columns` [K,
    d_out, d_in].
    """
    K, out, into = columns.shape
    if out <= into:  # through the narrow side
        inner = (x @ columns.reshape(K * out, into).T).unflatten(-1, (K, out))
        return (inner * g.unsqueeze(2)).sum(-1).movedim(-1, 0)
    inner = (g @ columns.movedim(1, 0).reshape(out, K * into)).unflatten(-1, (K, into))
    return (inner * x.unsqueeze(2)).sum(-1).movedim(-1, 0)
