"""A tripwire: the objective here, beside the losses that the trainer logged.

The training objective is the mean cross-entropy over the rows' supervised tokens. If rows are
rendered, cut or supervised otherwise here than in training, its value at the adapter is another
than what the trainer logged at its end, and its value at the base another than what it logged
first. Both are measured on some rows, and compared within what the trainer's own numbers cannot
tell:

* Rows. The log averages over the rows of some steps, the value here over a sample: three standard
  errors of both, from the spread of the rows' losses.
* Rounding and weights. Batches are averaged as means of their tokens, in 16 bits as often as not:
  5 %, and 0.02 nats.
* Moving weights. A loss is logged before the steps that follow. Until the end every row is seen at
  most once more, and one pass over the rows is worth what the log itself fell over its last epoch:
  the value at the end may be lower by that. The first entry averages over steps that already
  learned: the base may be higher by twice what the log fell from its first to its second entry.
* Routers. A mixture of experts is trained on its load-balancing loss too, which is no part of the
  objective here. Where it is logged (`aux_loss`) it is taken off; where it is not, nothing is
  compared, and that is said.
* Dropout p. It takes p / (1 - p) of what training learned from the logged losses, about: the value
  at the end may be lower by that share of the whole fall. The base has no adapter to drop.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from influence.adapter import AdaptedModel
from influence.chats import SUPERVISE
from influence.errors import ToolkitError
from influence.loss import mean_losses
from influence.progress import say
from influence.rows import Examples
from influence.tokens import Rendering, TokenizedExamples
from influence.trainer_output import Training, TrainingLog

#: Rows that are run for the comparison, at the adapter and at the base.
ROWS = 64
#: Standard errors, share of the loss and nats that a difference may have (see the module).
ERRORS, SHARE, NATS = 3.0, 0.05, 0.02
#: The last share of the training whose logged losses are averaged.
LAST = 0.1
#: A logged loss: its last step, its mean over the steps since the entry before.
Entry = tuple[int, float]


@dataclass(frozen=True)
class Comparison:
    """The objective here and in the log, `at` the training's "end" or "beginning", nats per token.

    The log's is of `steps` (first, last). `low` and `high` bound what it lets expect here.
    """

    at: str
    here: float
    logged: float
    steps: tuple[int, int]
    low: float
    high: float

    @property
    def agrees(self) -> bool:
        """Whether the value here is one that the log lets expect."""
        return self.low <= self.here <= self.high

    def __str__(self) -> str:
        first, last = self.steps
        steps = f"step {last}" if first == last else f"steps {first}-{last}"
        where = "" if self.at == "end" else " at the base"
        return (
            f"objective {self.here:.2f} nats per token here{where}; the trainer logged "
            f"{self.logged:.2f} at its {self.at} ({steps}): "
            f"{'agrees' if self.agrees else 'differs'} (expected {self.low:.2f} to {self.high:.2f})"
        )


@dataclass(frozen=True)
class LossCheck:
    """The comparisons that the log allows, on so many `rows`.

    `otherwise` has the objective at the adapter under other supervisions, by what they are called;
    `router` says how a router's loss may be the reason of a difference.
    """

    rows: int
    comparisons: tuple[Comparison, ...]
    otherwise: Mapping[str, float] = field(default_factory=dict)
    router: str = ""

    @property
    def agrees(self) -> bool:
        """Whether all comparisons agree."""
        return all(comparison.agrees for comparison in self.comparisons)

    def __str__(self) -> str:
        """One line a comparison, and where one differs what may be the reason."""
        lines = [str(comparison) for comparison in self.comparisons]
        if not self.agrees:
            others = "".join(
                f"; {name} gives {value:.2f}" for name, value in self.otherwise.items()
            )
            if self.comparisons[0].agrees:
                others += "; or training started from an adapter that was not fresh"
            lines += [self.router] if self.router else []
            lines.append(
                "rows may be rendered, cut or supervised otherwise than in training, or be others: "
                f"influence check --labels shows what is supervised{others}"
            )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The check for a program."""
        comparisons = [{**asdict(each), "agrees": each.agrees} for each in self.comparisons]
        return {
            "agrees": self.agrees,
            "rows": self.rows,
            "comparisons": comparisons,
            "otherwise": dict(self.otherwise),
        }


def check_losses(
    model: AdaptedModel,
    train: Examples,
    rendering: Rendering,
    training: Training | None,
) -> LossCheck | None:
    """Compare the objective on at most `ROWS` of the rows with the log, None where there is no log.

    Runs them at the adapter, and at the base where the first logged losses are of one epoch at most,
    forward only; where something differs, also under the other supervisions that a rendering knows.
    """
    log = None if training is None else training.log
    if log is None or not log.losses:
        return None
    log, router = without_router(log, model.model.get_base_model().config, training)
    if not log.losses:
        return None
    drawn = np.random.default_rng(0).permutation(len(train))[:ROWS]
    rows = train.select(np.sort(drawn))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the rows, which were all tokenized before
        sample = rendering.tokenize(rows, model.tokenizer)
    batch = 1
    if training is not None and training.recipe is not None:
        batch = training.recipe.recipe.batch_size
    elif log.batch_size:
        batch = log.batch_size
    config = model.model.peft_config[model.model.active_adapters[0]]
    dropout = float(getattr(config, "lora_dropout", 0.0) or 0.0)
    measured = Measured(sample.counts, mean_losses(model, sample), len(train))
    found = [at_end(log, measured, batch, dropout)]
    if log.losses[0][0] * batch <= len(train):  # else rows were learnt before they were logged
        without = model.snapshot()
        for leaf in model.space.leaves:
            if not leaf.is_A:
                without[leaf.slice] = 0
        with model.at(without):
            measured = Measured(sample.counts, mean_losses(model, sample), len(train))
        found.append(at_beginning(log, measured, batch))
    check = LossCheck(len(sample), tuple(found), router=router)
    if check.agrees:
        return check
    values = {}
    for word in SUPERVISE:
        with suppress(ToolkitError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = replace(rendering, supervise=word).tokenize(rows, model.tokenizer)
            if not np.array_equal(tokens.counts, sample.counts):
                values[f"--supervise {word}"] = objective(model, tokens)
    return replace(check, otherwise=values)


def without_router(
    log: TrainingLog, config: Any, training: Training | None
) -> tuple[TrainingLog, str]:
    """The log with losses of the cross-entropy alone, none where they cannot be had, which is said.

    With them comes a sentence on how the router's loss may be in them still.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    factor = None if training is None else training.router
    if factor is None:
        factor = float(getattr(config, "router_aux_loss_coef", None) or 0.0)
    alone = "scores are of the cross-entropy alone"
    aux = dict(log.router)
    if log.router and factor and all(step in aux for step, _ in log.losses):
        say(
            f"note: the logged losses hold the router's load-balancing loss: {factor:g} times the "
            f"logged aux_loss is taken off, and {alone}"
        )
        losses = tuple((step, value - factor * aux[step]) for step, value in log.losses)
        return replace(log, losses=losses), (
            f"the router's loss was taken off with router_aux_loss_coef={factor:g}: it may have "
            "been another in training"
        )
    if log.router or (factor and getattr(config, "output_router_logits", False)):
        say(
            "note: the logged losses hold the router's load-balancing loss, and do not tell how much "
            f"of it: they are not compared; {alone}"
        )
        return replace(log, losses=()), ""
    return log, (
        "the logged losses may hold the router's load-balancing loss (router_aux_loss_coef="
        f"{factor:g})" * bool(factor)
    )


@dataclass(frozen=True)
class Measured:
    """Losses of a sample of `total` rows: supervised tokens `[m]` and mean losses `[m]`, nats."""

    counts: np.ndarray
    losses: np.ndarray
    total: int

    @property
    def mean(self) -> float:
        """The mean over all supervised tokens."""
        return float(np.average(self.losses, weights=self.counts))

    def error(self, rows: int) -> float:
        """Standard error of the difference between this mean and one over so many logged rows."""
        weights = self.counts / self.counts.sum()
        spread = float((weights**2 * (self.losses - self.mean) ** 2).sum()) * len(weights)
        # all rows are no sample of them
        here = 0.0 if len(weights) == self.total else spread / len(weights)
        return float(np.sqrt(here + spread / max(1, min(rows, self.total))))


def at_end(log: TrainingLog, here: Measured, batch: int, dropout: float) -> Comparison:
    """The value at the adapter against the last logged losses."""
    last = log.losses[-1][0]
    tail = [step for step, _ in log.losses if step > last - LAST * last]
    start, logged = _average(log.losses, len(tail) or 1)
    before = [value for step, value in log.losses if step <= last - (log.steps_per_epoch or last)]
    earlier = before[-1] if before else log.losses[0][1]
    noise = ERRORS * here.error((last - start + 1) * batch) + SHARE * logged + NATS
    learned = max(0.0, log.losses[0][1] - logged)
    fall = max(0.0, earlier - logged) + learned * dropout / max(1e-3, 1 - dropout)
    low = max(0.0, logged - noise - fall)
    return Comparison("end", here.mean, logged, (start, last), low, logged + noise)


def at_beginning(log: TrainingLog, here: Measured, batch: int) -> Comparison:
    """The value at the base against the first logged losses."""
    step, logged = log.losses[0]
    following = log.losses[1][1] if len(log.losses) > 1 else logged
    noise = ERRORS * here.error(step * batch) + SHARE * logged + NATS
    fall = 2 * max(0.0, logged - following) if step > 1 else 0.0
    low = max(0.0, logged - noise)
    return Comparison("beginning", here.mean, logged, (1, step), low, logged + noise + fall)


def _average(entries: Sequence[Entry], count: int) -> tuple[int, float]:
    """The first step of the last `count` entries, and their mean over steps."""
    bounds = [0, *(step for step, _ in entries)]
    spans = np.diff(bounds)[-count:]
    values = [value for _, value in entries[-count:]]
    return int(bounds[-count - 1]) + 1, float(np.average(values, weights=spans))


def objective(model: AdaptedModel, tokens: TokenizedExamples) -> float:
    """The mean loss over all supervised tokens of the rows, nats."""
    return Measured(tokens.counts, mean_losses(model, tokens), len(tokens)).mean
