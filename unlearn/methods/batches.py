"""One side of a step, the forget rows or the retained rows: its batches, its term, and its gradient over all processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.adapter import AdaptedModel
from influence.batches import collate, plan_batches
from influence.cost import Cost
from influence.errors import InputError, NumericalError
from influence.loss import mean_losses, supervised_logits, token_losses
from influence.tokens import TokenizedExamples
from unlearn.methods.reference import ReferenceAdapter
from unlearn.methods.targets import Target
from unlearn.methods.terms import Part, Term


@dataclass(frozen=True, eq=False)
class TermGradient:
    """A side's term at a step: its gradient `[P]`, its value, and the rows' mean losses on their own tokens `[b]`."""

    rows: np.ndarray
    gradient: Tensor
    value: float
    losses: np.ndarray
    loss: float


@dataclass(eq=False)
class TermBatches:
    """The forget rows or the retained rows: their term and their batches."""

    model: AdaptedModel
    tokens: TokenizedExamples
    term: Term
    target: Target
    before: ReferenceAdapter | None
    batch_size: int
    token_budget: int
    seed: int
    stream: int
    cost: Cost
    known: dict[tuple[int, bool], Tensor] = field(default_factory=dict)

    def rows(self, step: int) -> np.ndarray:
        """The rows of a step: an epoch's permutation, cut into batches."""
        n = len(self.tokens)
        each = -(-n // self.batch_size)
        order = np.random.default_rng([self.seed, self.stream, step // each]).permutation(n)
        return order[(step % each) * self.batch_size :][: self.batch_size]

    @cached_property
    def _longest(self) -> TokenizedExamples:
        """What batches are planned by: of each row and its other completion the longer."""
        if self.target.other is None:
            return self.tokens
        pairs = zip(self.tokens, self.target.other, strict=True)
        return TokenizedExamples([max(pair, key=len) for pair in pairs], self.tokens.ids)

    def ask_all(self) -> None:
        """Ask the adapter before for all rows' losses now, so that they do not depend on which step asks first."""
        for rows in plan_batches(self.tokens, self.token_budget):
            self._ask(rows, False)
            if self.target.other is not None:
                self._ask(rows, True)

    def look(self, step: int) -> TermGradient:
        """The term's gradient at a step, over all processes."""
        rows = self.rows(step)
        model, own = self.model, distributed.shard(np.arange(len(rows)))
        size = int(self.tokens.counts[rows].sum()) if self.term.per == "token" else len(rows)
        gradient = torch.zeros(model.space.size, dtype=model.dtype, device=model.device)
        told = torch.zeros(
            2 + len(rows), dtype=torch.float64, device=model.device
        )  # value, rows asked, rows' losses
        asked = 0 if self.before is None else self.before.asked
        self.cost.gradients += len(rows) * (1 if self.target.other is None else 2)
        for some in (
            plan_batches(self._longest.select(rows[own]), self.token_budget) if len(own) else []
        ):
            places = own[some]
            value, losses = self._add(rows[places], size, gradient)
            told[0] += value
            told[2 + torch.from_numpy(places).to(told.device)] += losses
        told[1] = 0 if self.before is None else self.before.asked - asked
        distributed.add_up(gradient)
        distributed.add_up(told)
        self.cost.forwards += int(told[1])
        losses = told[2:].cpu().numpy()
        counts = self.tokens.counts[rows]
        loss = float((losses * counts).sum() / counts.sum())
        if not (np.isfinite(told.cpu().numpy()).all() and bool(torch.isfinite(gradient).all())):
            raise NumericalError(
                f"the term {self.term.name} or its gradient is NaN or infinite in step {step + 1}: lower the rate (--stride, --lr)"
            )
        return TermGradient(rows, gradient, float(told[0]), losses, loss)

    def _add(self, rows: np.ndarray, size: int, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Add a batch's share to the gradient `[P]`; its share of the value, and the rows' losses `[b]`. Its graph is gone then."""
        wanted = None if self.target.wanted is None else self.target.wanted(rows)
        part, losses = self._part(rows, wanted)
        value = self._values(part).sum() / size
        gradient += self.model.space.flatten(
            list(torch.autograd.grad(value, self.model.parameters, materialize_grads=True))
        )  # type: ignore[arg-type]
        return value.detach().double(), losses

    def _part(self, rows: np.ndarray, wanted: Tensor | None) -> tuple[Part, Tensor]:
        """A batch as the term sees it, and the rows' mean losses on their own tokens `[b]`."""
        other = self.target.other
        labels = self._labels(rows)
        part, own = self._one(self.tokens, rows, labels, wanted, False)
        if other is not None:
            part.other, _ = self._one(other, rows, None, None, True)
        return part, own

    def _one(
        self,
        tokens: TokenizedExamples,
        rows: np.ndarray,
        labels: Tensor | None,
        wanted: Tensor | None,
        other: bool,
    ) -> tuple[Part, Tensor]:
        model = self.model
        run = supervised_logits(
            model, collate(tokens, rows, pad_id=model.pad_id, device=model.device)
        )
        labels = run.targets if labels is None else labels.to(run.targets.device)
        part = Part(
            run.logits,
            labels,
            run.counts,
            lambda: self._asked().logits(tokens, rows)[0],
            lambda: self._kept_losses(rows, other),
            wanted,
        )
        losses = (
            part.losses.detach()
            if labels is run.targets
            else token_losses(run.logits.detach(), run.targets)
        )
        sums = run.per_example(losses.double())
        return part, sums / torch.tensor(run.counts, device=sums.device)

    def _labels(self, rows: np.ndarray) -> Tensor | None:
        """The rows' other labels `[N]`, where the target has some."""
        return (
            None
            if self.target.labels is None
            else torch.cat([self.target.labels[row] for row in rows])
        )

    def _ask(self, rows: np.ndarray, other: bool) -> None:
        """Keep the reference's losses of some rows' labels."""
        tokens = self.target.other if other and self.target.other is not None else self.tokens
        found = self._asked().losses(tokens, rows, None if other else self._labels(rows))
        for row, own in zip(rows.tolist(), found, strict=True):
            self.known[row, other] = own

    def _kept_losses(self, rows: np.ndarray, other: bool) -> Tensor:
        """The reference's losses of the rows' labels, `[N]`: asked once a row."""
        if any((row, other) not in self.known for row in rows.tolist()):
            self._ask(rows, other)
        return torch.cat([self.known[row, other] for row in rows.tolist()])

    def _asked(self) -> ReferenceAdapter:
        if self.before is None:
            raise InputError(
                f"the term {self.term.name} asks for the adapter before: make it with reference=True"
            )
        return self.before

    def _values(self, part: Part) -> Tensor:
        values = self.term.function(part)
        wanted = len(part.labels) if self.term.per == "token" else len(part.counts)
        if self.term.per not in ("token", "row") or tuple(values.shape) != (wanted,):
            raise InputError(
                f"the term {self.term.name} gave values of shape {list(values.shape)}; expected [{wanted}], one per {self.term.per} "
                "(Term(..., per='token' or 'row'))"
            )
        if not values.requires_grad:
            raise InputError(
                f"the term {self.term.name} gave values without a gradient: compute them from part.logits by differentiable operations"
            )
        return values

    def mean_loss(self, rows: np.ndarray) -> float:
        """The rows' mean cross-entropy per token where the model is now, over all processes; infinite where one has none."""
        own = distributed.shard(rows)
        self.cost.forwards += len(rows)
        total = torch.zeros(1, dtype=torch.float64, device=self.model.device)
        if len(own):
            try:
                losses = mean_losses(
                    self.model, self.tokens.select(own), token_budget=self.token_budget
                )
                total += float((losses * self.tokens.counts[own]).sum())
            except NumericalError:  # the other processes wait for the sum
                total += float("inf")
        return float(distributed.add_up(total)) / int(self.tokens.counts[rows].sum())
