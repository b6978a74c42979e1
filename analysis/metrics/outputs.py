"""What a model says of rows, token by token, and how hard it still pulls on them.

Everything that the metrics of this package need of a model comes from here, `outputs` (one forward
per batch) and `gradient_norms` (one forward and backward), or is said in its own words
(`influence.generation`). The metrics themselves are functions of these arrays.

Shapes: n rows, T_i completion tokens of row i (end token included). Unit: nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.batches import collate, plan_batches
from influence.errors import NumericalError
from influence.gradients import stream_gradients
from influence.halving import Steps, in_parts
from influence.loss import supervised_logits
from influence.measurements import MeanLoss
from influence.tokens import TokenizedExamples

#: Positions whose whole distribution is held in float64 at once.
_POSITIONS = 256


@dataclass(frozen=True, eq=False)
class Outputs:
    """Of every row, what the model gives its completion tokens.

    Attributes
    ----------
    ids : list of str
        The rows' ids.
    loss, sums : array [n]
        Mean and summed cross-entropy over the completion tokens, nats.
    counts : int array [n]
        The completion tokens T_i.
    log_probs : list of array [T_i]
        `log p(token)` of each completion token.
    mean, std : list of array [T_i]
        At each completion token the mean `mu = sum_v p(v) log p(v)` and the standard deviation
        `sigma`, `sigma^2 = sum_v p(v) (log p(v) - mu)^2`, of the log-probability of a token drawn
        from the model: what min-k++ normalises by (Zhang et al. 2024, arXiv 2404.02936, equation
        3).
    right : list of bool array [T_i]
        Whether the most probable token is the row's.
    """

    ids: list[str]
    loss: np.ndarray = field(repr=False)
    sums: np.ndarray = field(repr=False)
    counts: np.ndarray = field(repr=False)
    log_probs: list[np.ndarray] = field(repr=False)
    mean: list[np.ndarray] = field(repr=False)
    std: list[np.ndarray] = field(repr=False)
    right: list[np.ndarray] = field(repr=False)


def outputs(model: AdaptedModel, tokens: TokenizedExamples, *, token_budget: int = 4096) -> Outputs:
    """Run rows forward once, where the model is now.

    Distributions over the vocabulary are reduced and let go.

    Raises `NumericalError` where a row's loss is NaN or infinite.
    """
    by_row: list[list[np.ndarray]] = [[] for _ in tokens]

    def run(rows: np.ndarray, _: Steps) -> list[tuple[Tensor, ...]]:
        batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
        part = supervised_logits(model, batch)
        return [values.cpu().split(part.counts) for values in _reduced(part.logits, part.targets)]

    with model.evaluating(), torch.no_grad():
        for batch in plan_batches(tokens, token_budget):
            for rows, columns in in_parts(model, tokens, batch, run):
                for row, *arrays in zip(rows, *columns, strict=True):
                    by_row[row] = [values.numpy() for values in arrays]
    log_probs, mean, std, right = (list(column) for column in zip(*by_row, strict=True))
    sums = np.array([-values.sum() for values in log_probs])
    if not np.isfinite(sums).all():
        raise NumericalError(
            f"the loss of {int((~np.isfinite(sums)).sum())} rows is NaN or infinite"
        )
    return Outputs(
        list(tokens.ids), sums / tokens.counts, sums, tokens.counts, log_probs, mean, std, right
    )


def _reduced(logits: Tensor, targets: Tensor) -> list[Tensor]:
    """Log-probabilities of targets, mean, deviation and greedy hits of logits `[N, V]`, each `[N]`.

    Float64, the hits bool.
    """
    parts: list[tuple[Tensor, ...]] = []
    for some, labels in zip(logits.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
        logs = some.double().log_softmax(-1)
        probs = logs.exp()
        mean = -torch.special.entr(probs).sum(-1)  # a token of probability 0 adds nothing
        squares = torch.where(probs > 0, (logs - mean[:, None]).square(), 0.0)
        std = (probs * squares).sum(-1).sqrt()
        hit = some.argmax(-1) == labels
        parts.append((logs.gather(-1, labels[:, None]).squeeze(-1), mean, std, hit))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def gradient_norms(
    model: AdaptedModel, tokens: TokenizedExamples, *, token_budget: int = 4096
) -> np.ndarray:
    """Euclidean norm of every row's gradient of its mean loss, `[n]`, nats per token.

    By the LoRA parameters.
    """
    norms = np.zeros(len(tokens))
    for rows, gradients, _ in stream_gradients(
        model, tokens, measurement=MeanLoss(), token_budget=token_budget
    ):
        norms[rows] = gradients.double().norm(dim=1).cpu().numpy()
    return norms
