"""A training by gradient steps in the making: how it runs, when it stops, on which rows.

All that can be refused is refused here, before any work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from influence import distributed
from influence.errors import InputError, NumericalError
from influence.loss import mean_losses
from influence.progress import say
from influence.rows import Examples
from influence.run import Run
from influence.tokens import TokenizedExamples
from unlearn.methods.methods import Method, controlled
from unlearn.methods.options import Options
from unlearn.record.before_after import State, Targets, Undertaking
from unlearn.record.change import Change, plan
from unlearn.record.sample import probe_rows, unseen_rows
from unlearn.record.version import version
from unlearn.stopping import TrainingRule
from unlearn.unseen import Expected, expected_losses


@dataclass(eq=False, kw_only=True)
class Work(Undertaking):
    """One training in the making.

    Attributes
    ----------
    method, options, stop
        What runs, how, and until when.
    retained, retained_digest, retained_source
        The rows that a retain term runs, their digest, and the file they are from, where given.
    """

    method: Method
    options: Options
    stop: TrainingRule
    retained: TokenizedExamples
    retained_digest: str
    retained_source: str | None

    @property
    def forget(self) -> TokenizedExamples:
        """The forget rows."""
        return self.change.old

    @property
    def steps(self) -> int:
        """The most steps."""
        if self.stop.kind == "steps":
            return int(self.stop.value or 0)
        return self.options.steps or self.method.steps

    @property
    def automatic(self) -> bool:
        """Whether GeN changes the rate on the way."""
        return self.options.lr == "auto" or (self.options.lr is None and self.method.automatic)

    @property
    def lr(self) -> float | None:
        """The learning rate, where it does not follow from the stride."""
        if isinstance(self.options.lr, float | int):
            return float(self.options.lr)
        return self.method.lr if self.options.stride is None else None

    @property
    def stride(self) -> float:
        """Length of the first step's move over the adapter's."""
        return self.method.stride if self.options.stride is None else self.options.stride

    def expected(self, before: State) -> Expected | None:
        """What a model that never saw the forget rows would lose on them.

        None where neither the stopping rule nor the target looks at it.
        """
        return self.local_expectation(before) if self.needs_expected else None

    @property
    def needs_expected(self) -> bool:
        """Whether the stopping rule or the target looks at the expected losses."""
        return self.stop.kind == "expected" or self.method.target_rule.expected

    def local_expectation(self, before: State) -> Expected:
        """The same, by a local retraining, whoever asks."""
        losses, recipe = before.old.loss, self.recipe
        return expected_losses(self.change, recipe, losses, np.zeros(0), self.cost, seed=self.seed)

    def goals(self, base: np.ndarray, expected: Expected | None, before: State) -> Targets:
        """The losses that the forget rows should reach, from one process for all."""
        goal = np.asarray(distributed.first(np.maximum(before.old.loss, base)))
        if self.stop.kind == "loss" and self.stop.value is not None:
            goal = np.full_like(goal, self.stop.value)
        elif self.stop.kind == "expected" and expected is not None:
            goal = np.asarray(distributed.first(expected.expected))
        return Targets(goal, np.zeros(0), goal)

    @property
    def budget(self) -> int:
        """Tokens that run at a time."""
        return self.options.token_budget or super().budget

    def mean_loss(self, tokens: TokenizedExamples, rows: np.ndarray) -> float:
        """Mean of some rows' mean losses where the model is now, nats per token.

        The rows are shared out, so that all processes decide by the same number. Raises
        `NumericalError` where it is not finite.
        """
        self.cost.forwards += len(rows)
        model, shard = self.version.model, distributed.shard(rows)
        total = torch.zeros(1, dtype=torch.float64, device=model.device)
        if len(shard):
            try:
                losses = mean_losses(model, tokens.select(shard), token_budget=self.budget)
                total += float(losses.sum())
            except NumericalError:  # the other processes wait for the sum
                total += float("inf")
        loss = float(distributed.add_up(total)) / len(rows)
        if not np.isfinite(loss):
            raise NumericalError(
                "the loss of rows that are measured is NaN or infinite: "
                "lower the rate (--stride, --lr)"
            )
        return loss

    def describe(self, log: Sequence[dict[str, Any]], share: float | None) -> dict[str, Any]:
        """The method and how it was run, for the record.

        `share` is that of the whole move which a finish kept.
        """
        options, method = self.options, self.method
        optimizer = options.optimizer or method.optimizer
        return {
            **method.describe(),
            "curvature": None,
            "geometry": None,
            "damping": None,
            "points": None,
            "lambda": None,
            "solver": None,
            "lr": "auto" if self.automatic else self.lr,
            "stride": self.stride if self.lr is None else None,
            "optimizer": optimizer
            if isinstance(optimizer, str)
            else getattr(optimizer, "__name__", str(optimizer)),
            "schedule": options.schedule,
            "warmup": options.warmup,
            "batch_size": options.batch_size,
            "retain_batch_size": self.retain_batch_size,
            "retain": None
            if not method.needs_retain
            else {
                "rows": len(self.retained),
                "digest": self.retained_digest,
                "source": self.retained_source,
            },
            "steps": self.steps,
            "steps_taken": len(log),
            "lr_first": log[0]["lr"] if log else None,
            "lr_last": log[-1]["lr"] if log else None,
            "kept": share,
            "token_budget": self.budget,
            "until": str(self.stop),
            "stop_damage": options.stop_damage,
            "max_damage": options.max_damage,
            "max_grad_norm": options.max_grad_norm,
            "seed": options.seed,
        }

    @property
    def retain_batch_size(self) -> int:
        """Retained rows in a step."""
        return self.options.retain_batch_size or self.options.batch_size


def prepare(
    run: Run,
    method: Method,
    ids: Sequence[str],
    retain: Examples | None,
    holdout: Examples | None,
    probes: Examples | None,
    options: Options,
) -> Work:
    """A training of checked parts. Raises `InputError` for all that can be refused."""
    refuse(method, options, retain is not None)
    if options.control is not None:
        method = controlled(method, options.control)
    stop = _stopping_rule(method, options)
    start = version(run, options.start)
    change = plan(start, list(ids), None, None)
    if method.target_rule.refuse is not None:
        method.target_rule.refuse(request.before for request in change.requests)
    others = _others(change)
    if retain is None:
        if method.general and distributed.rank() == 0:
            say(
                f"warning: {method.name} is meant for general rows (--retain F); without them it "
                "takes the run's other rows, as its in-distribution form does"
            )
        retained, source = start.tokens.select(others), None
        digest = start.rows.select(others.tolist()).digest
    else:
        retained, digest, source = _given_rows(run, change, retain), retain.digest, retain.source
        _refuse_held_out(retain, holdout)
    if method.needs_retain and len(retained) == 0:
        raise InputError(
            "every other row is a row to unlearn word for word, "
            f"and method {method.name} needs some to keep: give them with --retain F"
        )
    return Work(
        version=start,
        change=change,
        holdout=holdout,
        heldout=unseen_rows(start.run, holdout, start.rows, change.after),
        probes=probes,
        probed=probe_rows(start.run, probes, start.rows, change.after),
        generate=options.generate,
        max_damage=float("inf") if options.max_damage is None else options.max_damage,
        seed=options.seed,
        given_recipe=options.recipe,
        method=method,
        options=options,
        stop=stop,
        retained=retained,
        retained_digest=digest,
        retained_source=source,
    )


def _stopping_rule(method: Method, options: Options) -> TrainingRule:
    """The rule that was given, or the method's own, with as many steps as were given."""
    if options.until is not None:
        return TrainingRule.parse(options.until)
    if options.steps is not None and method.until.startswith("steps"):
        return TrainingRule("steps", options.steps)
    return TrainingRule.parse(method.until)


def _others(change: Change) -> np.ndarray:
    """The untouched rows without word-for-word copies of rows to unlearn.

    A training would both raise and lower the loss of such a copy.
    """
    rows, gone = change.version.rows, {request.before.content_hash for request in change.requests}
    copies = [int(row) for row in change.rest if rows[int(row)].content_hash in gone]
    if copies and distributed.rank() == 0:
        ids = ", ".join(rows[row].id for row in copies[:3])
        more = ", ..." if len(copies) > 3 else ""
        plural = "s" * (len(copies) > 1)
        say(
            f"warning: the text of rows to unlearn stands in {len(copies)} other row{plural} too "
            f"({ids}{more}): not retained here, but not removed either; "
            "name such rows too if they must go"
        )
    return np.setdiff1d(change.rest, copies)


def refuse(method: Method, options: Options, retain: bool) -> None:
    """Refuse what does not go together, before anything is loaded.

    `retain` says whether retained rows are given.
    """
    if options.control is not None:
        controlled(method, options.control)
    if retain and not method.needs_retain:
        raise InputError(
            f"method {method.name} looks at no retained rows, and some were given: leave them out"
        )
    automatic = options.lr == "auto" or (options.lr is None and method.automatic)
    if automatic and not method.needs_retain:
        raise InputError(
            f"lr auto reads the retained rows' loss, and method {method.name} runs none: "
            "give a number"
        )
    if automatic and options.schedule != "constant":
        raise InputError(
            f"lr auto and schedule {options.schedule!r} were given: leave one of them out"
        )
    if automatic and options.warmup:
        raise InputError(f"lr auto and warmup {options.warmup} were given: leave one of them out")
    if options.until is not None and options.steps is not None:
        stop = TrainingRule.parse(options.until)
        if stop.kind == "steps" and stop.value != options.steps:
            raise InputError(
                f"until {stop} and steps {options.steps} were given: leave one of them out"
            )


def _given_rows(run: Run, change: Change, retain: Examples) -> TokenizedExamples:
    """The tokens of given retained rows, refused where there are none or forget rows among them."""
    if len(retain) == 0:
        raise InputError("the file of retained rows has no rows: give some, or leave it out")
    removed_ids = {request.before.content_hash: request.before.id for request in change.requests}
    both = [removed_ids[row.content_hash] for row in retain if row.content_hash in removed_ids]
    if both:
        more = ", ..." if len(both) > 3 else ""
        raise InputError(
            f"{len(both)} retained rows are rows to unlearn, word for word "
            f"({', '.join(both[:3])}{more}): take them out of the retained rows"
        )
    return run.tokenized(retain)


def _refuse_held_out(retain: Examples, holdout: Examples | None) -> None:
    """Refuse retained rows that are held-out rows, which the training would see."""
    unseen = set() if holdout is None else {row.content_hash for row in holdout}
    both = [row.id for row in retain if row.content_hash in unseen]
    if both:
        raise InputError(
            f"{len(both)} retained rows are held-out rows, word for word "
            f"(the first is {both[0]!r}), and the training would see them: "
            "give every row to one of them"
        )
