"""What is explained of a query: a number m(q) of its completion's log-probabilities.

A measurement maps the supervised logits of a batch to one value per query, `[b]`, and says its unit
and whether it rises when the model gets worse. Scores explain the gradient of that value. A new
measurement is one class here and, if it has a name of its own, one line in `MEASUREMENTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from influence.errors import InputError
from influence.loss import (
    Supervised,
    accurate,
    log_probabilities,
    loss_gradient,
    position_chunks,
    token_losses,
)
from influence.rows import Example, Examples
from influence.tokens import TokenizedExamples


class Measurement(Protocol):
    """What is explained of a query: m(q), a function of its supervised (masked) logits."""

    @property
    def name(self) -> str:
        """The measurement's name, for the record."""
        ...

    @property
    def unit(self) -> str:
        """The unit of m(q)."""
        ...

    @property
    def rises(self) -> bool:
        """Whether m(q) rises when the model gets worse at the query, as a loss does.

        A margin falls.
        """
        ...

    def values(self, part: Supervised) -> Tensor:
        """`m(q)` of every example of a batch, `[b]`, differentiable by `part.logits`."""
        ...


@dataclass(frozen=True)
class MeanLoss:
    """Mean cross-entropy over the query's completion tokens, nats. The default measurement."""

    name: str = field(default="loss", init=False)
    unit: str = field(default="nats per token", init=False)
    rises: bool = field(default=True, init=False)

    def values(self, part: Supervised) -> Tensor:
        """Mean loss of every example, `[b]`."""
        sums = part.per_example(token_losses(part.logits, part.targets))
        return sums / torch.tensor(part.counts).to(sums)


@dataclass(frozen=True)
class SumLoss:
    """Summed cross-entropy of the completion, `-log p(completion given prompt)`, nats."""

    name: str = field(default="sum", init=False)
    unit: str = field(default="nats", init=False)
    rises: bool = field(default=True, init=False)

    def values(self, part: Supervised) -> Tensor:
        """Summed loss of every example, `[b]`."""
        return part.per_example(token_losses(part.logits, part.targets))


@dataclass(frozen=True)
class TokenLoss:
    """Cross-entropy of the completion token at `position`, nats.

    Positions count from 0; -1 is the last, the end token.
    """

    position: int = 0
    unit: str = field(default="nats", init=False)
    rises: bool = field(default=True, init=False)

    @property
    def name(self) -> str:
        """`token:POSITION`."""
        return f"token:{self.position}"

    def check(self, queries: TokenizedExamples) -> None:
        """Refuse queries that have no such token."""
        for id, count in zip(queries.ids, queries.counts, strict=True):
            if not self._inside(count):
                raise InputError(
                    f"measurement {self.name} was given; query {id!r} has {count} completion "
                    "tokens (end token included): give a position that every query has, or score "
                    "the others apart"
                )

    def _inside(self, count: int) -> bool:
        return -count <= self.position < count

    def values(self, part: Supervised) -> Tensor:
        """That token's loss in every example, `[b]`.

        Errors: InputError where a completion is too short.
        """
        if not all(self._inside(count) for count in part.counts):
            raise InputError(
                f"measurement {self.name} was given; a query has {min(part.counts)} completion "
                "tokens (end token included): give a position that every query has"
            )
        return torch.stack(
            [
                losses[self.position]
                for losses in token_losses(part.logits, part.targets).split(part.counts)
            ]
        )


@dataclass(frozen=True)
class MeanMargin:
    """Mean log-odds `log p / (1 - p)` of the correct token over the completion.

    Park et al. 2023 (TRAK).
    """

    name: str = field(default="margin", init=False)
    unit: str = field(default="log-odds per token", init=False)
    rises: bool = field(default=False, init=False)

    def values(self, part: Supervised) -> Tensor:
        """Mean margin of every example, `[b]`."""
        logits, targets = accurate(part.logits), part.targets
        correct = logits.gather(-1, targets.unsqueeze(-1))
        others = logits.scatter(-1, targets.unsqueeze(-1), -torch.inf).logsumexp(-1)
        sums = part.per_example(correct.squeeze(-1) - others)
        return sums / torch.tensor(part.counts).to(sums)


@dataclass(frozen=True)
class Custom:
    """Your own m(q), computed from a query's log-probabilities.

    `function(log_probs [T, V], targets [T]) -> scalar` is called for each query with its T
    supervised tokens.

    `log_probs` are the model's log-probabilities at these tokens, in at least float32; the function
    must be differentiable by them. `name` goes on record and tells two functions apart. `rises`:
    whether it rises when the model gets worse, which says who is a proponent.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    name: str
    unit: str = "as the function gives it"
    rises: bool = True

    def values(self, part: Supervised) -> Tensor:
        """The function's value for every example, `[b]`."""
        log_probs = log_probabilities(part.logits)
        pairs = zip(log_probs.split(part.counts), part.targets.split(part.counts), strict=True)
        values = [self.function(of_query, targets) for of_query, targets in pairs]
        for value in values:
            if not (isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad):
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(
                    f"measurement {self.name!r} returned {shape}; expected a scalar tensor "
                    "computed from log_probs by differentiable operations"
                )
        return torch.stack(values)


@dataclass(frozen=True)
class Contrast:
    """What made it say A rather than B: `m(q) = log p(B) - log p(A)`, nats.

    A is the query, B its row in `against`.

    As with a loss, positive scores belong to rows that favour A: removing them moves the odds
    towards B.
    """

    against: Examples
    name: str = field(default="contrast", init=False)
    unit: str = field(default="nats", init=False)
    rises: bool = field(default=True, init=False)

    def check(self, queries: Examples) -> None:
        """Refuse rows that do not pair up with the queries: another number, or another prompt.

        What precedes an answer is its prompt, the turns before it with their tools, or the token
        ids before the first target.
        """
        if len(self.against) != len(queries):
            raise InputError(
                f"{len(queries)} queries and {len(self.against)} rows to contrast them with were "
                "given; expected one for each query, in the same order"
            )
        for number, (query, partner) in enumerate(zip(queries, self.against, strict=True), start=1):
            if _before_answer(query) != _before_answer(partner):
                what = "prompt" if query.messages is None else "conversation before its answer"
                raise InputError(
                    f"row {number} of the contrast ({partner.id!r}) has another {what} than query "
                    f"{query.id!r}; give the same prompts, in the same order, with the other "
                    "completions"
                )


def _before_answer(row: Example) -> object:
    """What a row's answer follows, as a value that compares."""
    if row.input_ids is not None:
        targets = row.targets or (True,) * len(row.input_ids)
        first = max(targets.index(True) if True in targets else len(targets), 1)
        return row.input_ids[:first], row.document_lengths
    if row.messages is not None:
        turns = row.messages[
            : len(row.messages) - 1 if row.prompt_turns is None else row.prompt_turns
        ]
        return turns, row.tools, row.template_options
    return row.prompt


#: Measurements by the name that `--measurement` takes; `token:K` and the contrast have options.
MEASUREMENTS: dict[str, Measurement] = {
    "loss": MeanLoss(),
    "sum": SumLoss(),
    "margin": MeanMargin(),
}


# ---- its gradient --------------------------------------------------------------------------------


def output_gradient(part: Supervised, measurement: Measurement | None) -> tuple[Tensor, Tensor]:
    """Value `[b]` and gradient by the logits `[N, V]` of a measurement.

    None is the summed loss.
    """
    if measurement is None or isinstance(measurement, MeanLoss):  # without a graph
        sums = part.per_example(token_losses(part.logits.detach(), part.targets))
        if measurement is None:
            return sums, loss_gradient(part.logits, part.targets)
        lengths = torch.tensor(part.counts, device=part.logits.device)
        share = torch.repeat_interleave(
            1 / lengths.double(), lengths, output_size=len(part.targets)
        )
        return sums / lengths.to(sums), loss_gradient(part.logits, part.targets, share)
    values, gradient, done = [], torch.empty_like(part.logits), 0
    for counts in _examples_at_once(part):
        at = slice(done, done := done + sum(counts))
        logits = part.logits.detach()[at].requires_grad_(True)
        with torch.enable_grad():
            value = measurement.values(Supervised(logits, part.targets[at], counts))
            (gradient[at],) = torch.autograd.grad(value.sum(), logits)
        values.append(value.detach())
    return torch.cat(values), gradient


def _examples_at_once(part: Supervised) -> Iterator[list[int]]:
    """The counts of the examples of a batch, few at a time.

    A measurement holds several wide copies of its logits, so that it gets those of whole examples
    that make no more than one chunk of positions, or those of one.
    """
    most = position_chunks(part.logits)[0].stop
    some: list[int] = []
    for count in part.counts:
        if some and sum(some) + count > most:
            yield some
            some = []
        some.append(count)
    yield some
