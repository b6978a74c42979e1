"""Batches of the forget rows or the retained rows, and their term's gradient over all processes."""

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
from influence.halving import Steps, in_parts
from influence.loss import mean_losses, supervised_logits, token_losses
from influence.tokens import TokenizedExamples
from unlearn.methods.reference import ReferenceAdapter
from unlearn.methods.targets import Target
from unlearn.methods.terms import Part, Term


@dataclass(frozen=True, eq=False)
class TermGradient:
    """The gradient of a term at one step.

    Attributes
    ----------
    rows : array [b]
        The step's rows.
    vector : Tensor [P]
        The gradient.
    value : float
        The term's value.
    losses : array [b]
        Mean losses of the rows on their own tokens, whatever labels the term has, nats per token.
    loss : float
        The same over all tokens of the step.
    """

    rows: np.ndarray
    vector: Tensor
    value: float
    losses: np.ndarray
    loss: float


@dataclass(eq=False)
class TermBatches:
    """The rows that one term is about, cut into batches.

    Attributes
    ----------
    model, tokens, term, target
        What runs: the rows' tokens, the term, and what the rows are trained towards.
    reference : ReferenceAdapter, optional
        The adapter before unlearning.
    batch_size, token_budget : int
        Rows in a step, and tokens that run at a time.
    seed, stream : int
        What the order of the rows depends on; `stream` differs between forget and retained rows.
    cost : Cost
        Counts the rows that run.
    reference_losses : dict
        Losses `[T_i]` under the reference, by row and whether of its other completion.
    """

    model: AdaptedModel
    tokens: TokenizedExamples
    term: Term
    target: Target
    reference: ReferenceAdapter | None
    batch_size: int
    token_budget: int
    seed: int
    stream: int
    cost: Cost
    reference_losses: dict[tuple[int, bool], Tensor] = field(default_factory=dict)

    def rows(self, step: int) -> np.ndarray:
        """The rows of a step: an epoch's permutation, cut into batches.

        They depend on the seed and the step alone, so that a resumed training has the same.
        """
        n = len(self.tokens)
        steps_per_epoch = -(-n // self.batch_size)
        epoch, place = divmod(step, steps_per_epoch)
        order = np.random.default_rng([self.seed, self.stream, epoch]).permutation(n)
        return order[place * self.batch_size :][: self.batch_size]

    @cached_property
    def _longest(self) -> TokenizedExamples:
        """What batches are planned by: of each row and its other completion the longer."""
        if self.target.other is None:
            return self.tokens
        pairs = zip(self.tokens, self.target.other, strict=True)
        return TokenizedExamples([max(pair, key=len) for pair in pairs], self.tokens.ids)

    def run_reference(self) -> None:
        """Run the reference on all rows at once.

        Its losses depend in the last bits on the batch they are computed in. A training that is
        resumed in the middle of an epoch would first meet other rows together.
        """

        def run(rows: np.ndarray, _: Steps) -> None:
            self._keep_reference_losses(rows, False)
            if self.target.other is not None:
                self._keep_reference_losses(rows, True)

        for rows in plan_batches(self.tokens, self.token_budget):
            for _ in in_parts(self.model, self.tokens, rows, run):
                pass

    def gradient(self, step: int) -> TermGradient:
        """The term's gradient at a step, over all processes."""
        rows = self.rows(step)
        model, places = self.model, distributed.shard(np.arange(len(rows)))
        size = int(self.tokens.counts[rows].sum()) if self.term.per == "token" else len(rows)
        gradient = torch.zeros(model.space.size, dtype=model.dtype, device=model.device)
        # The term's value, the rows that the reference ran, and the mean loss of every row.
        sums = torch.zeros(2 + len(rows), dtype=torch.float64, device=model.device)
        rows_run = 0 if self.reference is None else self.reference.rows_run
        # All rows of the step, not this process's: every process counts the work of all.
        self.cost.gradients += len(rows) * (1 if self.target.other is None else 2)
        if len(places):
            longest = self._longest.select(rows[places])

            def run(batch: np.ndarray, _: Steps) -> tuple[Tensor, Tensor, Tensor]:
                return self._of_batch(rows[places[batch]], size)

            for batch in plan_batches(longest, self.token_budget):
                for part, (value, losses, slope) in in_parts(model, longest, batch, run):
                    gradient += slope
                    sums[0] += value
                    sums[2 + torch.from_numpy(places[part]).to(sums.device)] += losses
        sums[1] = 0 if self.reference is None else self.reference.rows_run - rows_run
        distributed.add_up(gradient)
        distributed.add_up(sums)
        self.cost.forwards += int(sums[1])
        losses = sums[2:].cpu().numpy()
        counts = self.tokens.counts[rows]
        loss = float((losses * counts).sum() / counts.sum())
        if not (np.isfinite(sums.cpu().numpy()).all() and bool(torch.isfinite(gradient).all())):
            raise NumericalError(
                f"the term {self.term.name} or its gradient is NaN or infinite in step {step + 1}: "
                "lower the rate (--stride, --lr)"
            )
        return TermGradient(rows, gradient, float(sums[0]), losses, loss)

    def mean_loss(self, rows: np.ndarray) -> float:
        """Mean cross-entropy per token of some rows where the model is now, over all processes.

        Infinite where one of them is not finite.
        """
        shard = distributed.shard(rows)
        self.cost.forwards += len(rows)
        total = torch.zeros(1, dtype=torch.float64, device=self.model.device)
        if len(shard):
            try:
                losses = mean_losses(
                    self.model, self.tokens.select(shard), token_budget=self.token_budget
                )
                total += float((losses * self.tokens.counts[shard]).sum())
            except NumericalError:  # the other processes wait for the sum
                total += float("inf")
        return float(distributed.add_up(total)) / int(self.tokens.counts[rows].sum())

    def _of_batch(self, rows: np.ndarray, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """A batch's share of the value, the rows' mean losses on their own tokens `[b]`, and its
        share of the gradient `[P]`. Its graph is gone by then.
        """
        wanted = None if self.target.wanted is None else self.target.wanted(rows)
        part, losses = self._part(rows, wanted)
        value = self._values(part).sum() / size
        gradients = torch.autograd.grad(value, self.model.parameters, materialize_grads=True)
        return value.detach().double(), losses, self.model.space.flatten(list(gradients))

    def _part(self, rows: np.ndarray, wanted: Tensor | None) -> tuple[Part, Tensor]:
        """A batch as the term sees it, and the rows' mean losses on their own tokens `[b]`."""
        part, losses = self._completion(self.tokens, rows, self._labels(rows), wanted, False)
        if self.target.other is not None:
            part.other, _ = self._completion(self.target.other, rows, None, None, True)
        return part, losses

    def _completion(
        self,
        tokens: TokenizedExamples,
        rows: np.ndarray,
        labels: Tensor | None,
        wanted: Tensor | None,
        other: bool,
    ) -> tuple[Part, Tensor]:
        """A batch of completions, the rows' own or the other ones, run forward."""
        model = self.model
        batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
        run = supervised_logits(model, batch)
        labels = run.targets if labels is None else labels.to(run.targets.device)
        part = Part(
            run.logits,
            labels,
            run.counts,
            lambda: self._required_reference().logits(tokens, rows)[0],
            lambda: self._reference_losses(rows, other),
            wanted,
        )
        if labels is run.targets:
            losses = part.losses.detach()
        else:
            losses = token_losses(run.logits.detach(), run.targets)
        sums = run.per_example(losses.double())
        return part, sums / torch.tensor(run.counts, device=sums.device)

    def _labels(self, rows: np.ndarray) -> Tensor | None:
        """The labels `[N]` in place of the rows' own tokens, where the target has some."""
        labels = self.target.labels
        return None if labels is None else torch.cat([labels[row] for row in rows])

    def _values(self, part: Part) -> Tensor:
        """The term's values, refused where they are not one per token or row with a gradient."""
        values = self.term.function(part)
        size = len(part.labels) if self.term.per == "token" else len(part.counts)
        if self.term.per not in ("token", "row") or tuple(values.shape) != (size,):
            raise InputError(
                f"the term {self.term.name} gave values of shape {list(values.shape)}; "
                f"expected [{size}], one per {self.term.per} (Term(..., per='token' or 'row'))"
            )
        if not values.requires_grad:
            raise InputError(
                f"the term {self.term.name} gave values without a gradient: "
                "compute them from part.logits by differentiable operations"
            )
        return values

    def _required_reference(self) -> ReferenceAdapter:
        if self.reference is None:
            raise InputError(
                f"the term {self.term.name} asks for the adapter before: "
                "make it with reference=True"
            )
        return self.reference

    def _keep_reference_losses(self, rows: np.ndarray, other: bool) -> None:
        """Run the reference on some rows' labels, or on their other completions."""
        tokens, labels = self.tokens, self._labels(rows)
        if other and self.target.other is not None:
            tokens, labels = self.target.other, None
        losses = self._required_reference().losses(tokens, rows, labels)
        for row, row_losses in zip(rows.tolist(), losses, strict=True):
            self.reference_losses[row, other] = row_losses

    def _reference_losses(self, rows: np.ndarray, other: bool) -> Tensor:
        """The reference's losses of the rows' labels, `[N]`, computed once a row."""
        if any((row, other) not in self.reference_losses for row in rows.tolist()):
            self._keep_reference_losses(rows, other)
        return torch.cat([self.reference_losses[row, other] for row in rows.tolist()])
