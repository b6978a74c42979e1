"""From token ids to supervised logits and losses: the only place that shifts and masks.

Token t is predicted from the tokens before it, so the logits of position t - 1 are matched with token t, and
only positions whose *next* token is supervised reach the LM head. All results are flat over supervised
positions, example after example: N of them in a batch of b examples, `counts[i]` of them in example i.

Losses are cross-entropies in nats. `l_i` is the **sum** over example i's supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel, accepts
from influence.data import Batch, Examples, TokenizedExamples, collate, plan_batches
from influence.errors import BadRow, DataError, InputError, NumericalError

REDUCTIONS = ("token", "example")


@dataclass(frozen=True)
class Supervised:
    """The supervised positions of a batch.

    `logits` [N, V] (attached to the graph), `targets` [N], `counts` [b] (sum N), in example order.
    """

    logits: Tensor
    targets: Tensor
    counts: list[int]

    def per_example(self, values: Tensor) -> Tensor:
        """Sum token values `[N]` over each example: `[b]`."""
        return torch.stack([part.sum() for part in values.split(self.counts)])


def supervised_logits(model: AdaptedModel, batch: Batch) -> Supervised:
    """Run the model on a batch and return the logits that predict its supervised tokens.

    Right padding needs no attention mask in a causal model (no real token sees it); left padding gets its mask
    and positions. Raises `NumericalError` if a logit is NaN.
    """
    inputs = {"input_ids": batch.input_ids[:, :-1]}
    if not bool(batch.attention_mask[:, 0].all()):
        inputs["attention_mask"] = batch.attention_mask[:, :-1]
        if accepts(model.model, "position_ids"):
            inputs["position_ids"] = batch.position_ids[:, :-1]
    mask = batch.supervised[:, 1:]
    if accepts(model.model, "use_cache"):
        inputs["use_cache"] = False  # type: ignore[assignment]
    with _only_supervised_reach_head(model, mask) as selected:
        logits = model.model.get_base_model()(**inputs).logits
    logits = logits.flatten(0, -2) if selected else logits[mask]
    return Supervised(logits, batch.input_ids[:, 1:][mask], mask.sum(1).tolist())


@contextmanager
def _only_supervised_reach_head(model: AdaptedModel, mask: Tensor) -> Iterator[bool]:
    """Hand the LM head only the hidden states `[b, T, d]` under `mask` `[b, T]`, as `[1, N, d]`.

    What follows the head (soft-capping, scaling) acts element by element and is unchanged by this.
    """
    head = model.model.get_output_embeddings()
    if head is None:
        yield False
        return
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][mask].unsqueeze(0), *args[1:]))
    try:
        yield True
    finally:
        handle.remove()


def check_rows(model: AdaptedModel, tokens: TokenizedExamples) -> None:
    """Refuse rows that the model cannot take: longer than its positions, or ids beyond its embedding."""
    config = model.model.get_base_model().config
    positions = getattr(config, "max_position_embeddings", None)
    vocabulary = model.model.get_input_embeddings().num_embeddings
    bad = []
    for number, (id, item) in enumerate(zip(tokens.ids, tokens, strict=True), start=1):
        if positions and len(item.input_ids) - 1 > positions:  # the last token is only a target
            bad.append(BadRow(number, id, f"{len(item.input_ids)} tokens, and the model has {positions} positions"))
        elif int(item.input_ids.max()) >= vocabulary:
            bad.append(BadRow(number, id, f"token id {int(item.input_ids.max())}, and the model embeds {vocabulary}"))
    if bad:
        raise DataError(
            f"{len(bad)} of {len(tokens)} rows do not fit the model: truncate long ones with --max-length, and use the "
            "tokenizer that the model was trained with:",
            bad,
        )


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each supervised token, `-log softmax(logits)[target]`, `[N]`, nats, at least float32."""
    return torch.nn.functional.cross_entropy(_accurate(logits), targets, reduction="none")


def log_probabilities(logits: Tensor) -> Tensor:
    """`log softmax(logits)`, `[N, V]`, at least float32, attached to the graph."""
    return _accurate(logits).log_softmax(-1)


def probabilities(logits: Tensor) -> Tensor:
    """`softmax(logits)` detached, `[N, V]`, at least float32."""
    return _accurate(logits.detach()).softmax(-1)


def loss_gradient(probs: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the summed cross-entropy by the logits, `p - onehot(target)`, `[N, V]`."""
    gradient = probs.clone()
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
    return gradient


def sample_labels(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one label per position from the model's own distribution by inverting its cumulative sum.

    `probs` [N, V], `uniforms` [N] in [0, 1): label = the first v with cdf[v] > u. Returns `[N]`.
    """
    out = torch.empty(len(probs), dtype=torch.int64, device=probs.device)
    for start in range(0, len(probs), 256):  # float64 sums, or rare labels of a large vocabulary would be lost
        cdf = probs[start : start + 256].cumsum(-1, dtype=torch.float64)
        u = uniforms[start : start + 256].to(cdf) * cdf[:, -1]
        out[start : start + 256] = torch.searchsorted(cdf, u.unsqueeze(-1), right=True).squeeze(-1)
    return out.clamp_(max=probs.shape[-1] - 1)


def weights(counts: np.ndarray, reduction: str) -> np.ndarray:
    """The training objective's weights `w_i`, `[n]` float64, from the supervised token counts T_i.

    `J = sum_i w_i l_i`: `token` gives `1 / N_tok` (what Hugging Face trainers minimise), `example` gives
    `1 / (n T_i)`.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if reduction == "token":
        return np.full(len(counts), 1.0 / counts.sum())
    if reduction == "example":
        return 1.0 / (len(counts) * counts)
    raise InputError(f"reduction {reduction!r} was given; expected token or example")


def mean_losses(model: AdaptedModel, tokens: TokenizedExamples, *, token_budget: int = 4096) -> np.ndarray:
    """Mean cross-entropy per supervised token of every example, `[n]` float64, nats."""
    out = np.empty(len(tokens))
    with model.evaluating(), torch.no_grad():
        for rows in plan_batches(tokens, token_budget):
            part = supervised_logits(model, collate(tokens, rows, pad_id=model.pad_id, device=model.device))
            sums = part.per_example(token_losses(part.logits, part.targets).double())
            out[rows] = sums.cpu().numpy() / tokens.counts[rows]
    if not np.isfinite(out).all():
        raise NumericalError(f"the loss of {int((~np.isfinite(out)).sum())} rows is NaN or infinite")
    return out


# ---- measurements --------------------------------------------------------------------------------------------


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
        """Whether m(q) rises when the model gets worse at the query, as a loss does (a margin falls)."""
        ...

    def values(self, part: Supervised) -> Tensor:
        """`m(q)` of every example of a batch, `[b]`, differentiable by `part.logits`."""
        ...


@dataclass(frozen=True)
class MeanLoss:
    """The default measurement m(q): mean cross-entropy over the query's completion tokens, nats."""

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
    """Cross-entropy of one completion token, nats: the one at `position` (from 0; -1 is the last, the end token)."""

    position: int = 0
    unit: str = field(default="nats", init=False)
    rises: bool = field(default=True, init=False)

    @property
    def name(self) -> str:
        """`token:POSITION`."""
        return f"token:{self.position}"

    def check(self, queries: TokenizedExamples) -> None:
        """Refuse queries that have no such token."""
        short = [(id, count) for id, count in zip(queries.ids, queries.counts, strict=True) if not self._inside(count)]
        if short:
            raise InputError(
                f"measurement {self.name} was given; query {short[0][0]!r} has {short[0][1]} completion tokens (end token "
                "included): give a position that every query has, or score the others apart"
            )

    def _inside(self, count: int) -> bool:
        return -count <= self.position < count

    def values(self, part: Supervised) -> Tensor:
        """That token's loss in every example, `[b]`; an `InputError` where one is too short."""
        if not all(self._inside(count) for count in part.counts):
            raise InputError(
                f"measurement {self.name} was given; a query has {min(part.counts)} completion tokens (end token included): "
                "give a position that every query has"
            )
        return torch.stack([own[self.position] for own in token_losses(part.logits, part.targets).split(part.counts)])


@dataclass(frozen=True)
class MeanMargin:
    """Mean correct-class log-odds `log p / (1 - p)` over the completion tokens (Park et al. 2023, TRAK)."""

    name: str = field(default="margin", init=False)
    unit: str = field(default="log-odds per token", init=False)
    rises: bool = field(default=False, init=False)

    def values(self, part: Supervised) -> Tensor:
        """Mean margin of every example, `[b]`."""
        logits, targets = _accurate(part.logits), part.targets
        correct = logits.gather(-1, targets.unsqueeze(-1))
        others = logits.scatter(-1, targets.unsqueeze(-1), -torch.inf).logsumexp(-1)
        sums = part.per_example(correct.squeeze(-1) - others)
        return sums / torch.tensor(part.counts).to(sums)


@dataclass(frozen=True)
class Custom:
    """Your own m(q): `function(log_probs [T, V], targets [T]) -> scalar` for each query's T supervised tokens.

    `log_probs` are the model's log-probabilities at these tokens, in at least float32; the function must be
    differentiable by them. `name` goes on record and tells two functions apart. `rises`: whether it rises when the model
    gets worse, which says who is a proponent.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    name: str
    unit: str = "as the function gives it"
    rises: bool = True

    def values(self, part: Supervised) -> Tensor:
        """The function's value for every example, `[b]`."""
        log_probs = log_probabilities(part.logits)
        pairs = zip(log_probs.split(part.counts), part.targets.split(part.counts), strict=True)
        values = [self.function(own, targets) for own, targets in pairs]
        for value in values:
            if not (isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad):
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(
                    f"measurement {self.name!r} returned {shape}; expected a scalar tensor computed from log_probs by "
                    "differentiable operations"
                )
        return torch.stack(values)


@dataclass(frozen=True)
class Contrast:
    """What made it say A rather than B: `m(q) = log p(B) - log p(A)`, nats; A is the query, B its row in `against`.

    As with a loss, positive scores belong to rows that favour A: removing them moves the odds towards B.
    """

    against: Examples
    name: str = field(default="contrast", init=False)
    unit: str = field(default="nats", init=False)
    rises: bool = field(default=True, init=False)

    def check(self, queries: Examples) -> None:
        """Refuse rows that do not pair up with the queries: another number, or another prompt."""
        if len(self.against) != len(queries):
            raise InputError(
                f"{len(queries)} queries and {len(self.against)} rows to contrast them with were given; expected one for "
                "each query, in the same order"
            )
        for number, (query, other) in enumerate(zip(queries, self.against, strict=True), start=1):
            if query.prompt != other.prompt:
                raise InputError(
                    f"row {number} of the contrast ({other.id!r}) has another prompt than query {query.id!r}; give the same "
                    "prompts, in the same order, with the other completions"
                )


MEASUREMENTS: dict[str, Measurement] = {"loss": MeanLoss(), "sum": SumLoss(), "margin": MeanMargin()}


def _accurate(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
