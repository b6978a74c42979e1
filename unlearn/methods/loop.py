"""One loop for every method of gradient-based unlearning.

A step takes a batch of forget rows and one of retained rows, in parts of a token budget (gradient
accumulation without a knob) and shared out over processes, forms both terms' gradients `[P]`, adds
them up once, combines them, and hands the result to an optimizer of torch. Terms are means over all
tokens or rows of the step, so neither parts nor processes change them. Dropout is off.

It stops when the forget rows have reached their goal (default: the base model's mean loss on them),
the last step shortened so that they just have, or when retained rows have lost `stop_damage`
(`unlearn.methods.stop_rules`). What it did is measured and recorded like an edit by influence
(`unlearn.record.before_after`), and saved in the same way. Every step's terms, losses, gradient
norms and their cosine are in the adapter's `steps.jsonl`.

Which rows a step takes depends on the seed and the step's number alone, so a training that is
resumed (`unlearn.methods.resume`) goes on with the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from influence import distributed
from influence.adapter import AdaptedModel
from influence.at_point import evenly_spaced
from influence.batches import plan_batches
from influence.errors import NumericalError
from influence.gradients import checkpointed_layers, replaced_forwards
from influence.progress import say, track
from influence.rows import Examples
from influence.run import Run
from influence.tokens import TokenizedExamples
from unlearn.evidence import gather
from unlearn.methods import automatic_rate
from unlearn.methods.batches import TermBatches, TermGradient
from unlearn.methods.combine import Step
from unlearn.methods.finish import Trained, name_of
from unlearn.methods.methods import Method, method_of
from unlearn.methods.options import Options, optimizer_class
from unlearn.methods.preparation import Work, prepare
from unlearn.methods.reference import ReferenceAdapter, frozen
from unlearn.methods.resume import Checkpoint, Progress
from unlearn.methods.stop_rules import CHECK_ROWS, Stopped, StopRules
from unlearn.methods.targets import Setup, Target, checked
from unlearn.methods.terms import Term
from unlearn.options import GENERATED
from unlearn.record.before_after import State, Targets, report
from unlearn.record.change import refuse_text
from unlearn.record.save import Edit
from unlearn.retraining.recipe import Recipe
from unlearn.retraining.retrain import gradients_kept
from unlearn.stopping import NEAR, Ending
from unlearn.unseen import Expected
from unlearn.unseen_outputs import ExpectedOutputs

#: Rise of the retained rows' loss, relative, that a training is warned of. A choice.
MUCH = 0.1
#: Change of what is minimised, in nats to first order, below which a first step follows rounding.
#: A choice, far below any gradient at which something is left to do.
NOTHING = 1e-6
#: Streams of random numbers for the order of forget rows and of retained rows.
FORGET_STREAM, RETAIN_STREAM = 31, 32


def train(
    run: Run,
    method: str | Method,
    ids: Sequence[str],
    *,
    retain: Examples | None = None,
    holdout: Examples | None = None,
    probes: Examples | None = None,
    checkpoint: str | Path | None = None,
    restart: bool = False,
    start: str | Path | None = None,
    until: str | None = None,
    recipe: str | Path | Recipe | None = None,
    lr: float | str | None = None,
    stride: float | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    retain_batch_size: int | None = None,
    optimizer: str | Callable[..., torch.optim.Optimizer] | None = None,
    schedule: str = "constant",
    warmup: int = 0,
    max_grad_norm: float | None = None,
    stop_damage: float | None = None,
    control: float | None = None,
    max_damage: float | None = None,
    token_budget: int | None = None,
    save_every: int = 25,
    seed: int = 0,
    generate: int = GENERATED,
) -> Edit:
    """Unlearn training rows by gradient steps from the run's adapter.

    `Options` says what the keywords from `start` on mean.

    Parameters
    ----------
    run
        The run whose adapter is changed.
    method
        A name of `unlearn.METHODS`, `FILE.py:NAME`, or a `Method`.
    ids
        The rows to unlearn.
    retain
        Rows to keep; without them the run's other rows.
    holdout
        Rows that the adapter never saw; measured before and after.
    probes
        Other words for what the rows taught, such as paraphrases of them and questions about them:
        is it still known (`unlearn.evidence`)?
    checkpoint
        Folder that the state of the training is kept in: called again after a kill, with the same
        request, it goes on. The caller deletes it with `unlearn.methods.resume.discard` when the
        result is saved.
    restart
        Begin anew where the folder holds another training, or a damaged one.

    Returns
    -------
    Edit
        The trained adapter with its record. Nothing else is written; its `save` does.

    Raises
    ------
    InputError
        For unknown ids, methods or options, retained rows that are forget rows, a method that needs
        retained rows where none are left.
    MismatchError
        Where `checkpoint` holds the state of another training.
    NumericalError
        Where a term or gradient is NaN or infinite.
    """
    begun_at = time.monotonic()
    refuse_text(ids)
    options = Options(
        start=start,
        until=until,
        recipe=recipe,
        lr=lr,
        stride=stride,
        steps=steps,
        batch_size=batch_size,
        retain_batch_size=retain_batch_size,
        optimizer=optimizer,
        schedule=schedule,
        warmup=warmup,
        max_grad_norm=max_grad_norm,
        stop_damage=stop_damage,
        control=control,
        max_damage=max_damage,
        token_budget=token_budget,
        save_every=save_every,
        seed=seed,
        generate=generate,
    )
    work = prepare(run, method_of(method), ids, retain, holdout, probes, options)
    folder = None if checkpoint is None else Path(checkpoint)
    return _measured_training(work, Checkpoint(work, folder, restart, begun_at))


def _measured_training(work: Work, checkpoint: Checkpoint) -> Edit:
    """Train, measure the rows before and after, and put it all on record."""
    before = work.measure(work.version.theta)
    expected = work.expected(before)
    base = work.base_losses(work.change.contents) if expected is None else expected.base
    goals = work.goals(base, expected, before)
    training = Training(work, before, expected, goals, checkpoint)
    ending, share = training.run()
    # As it is saved: old + delta, which may differ in the last bit from where the steps ended.
    delta = ending.theta - work.version.theta
    theta = work.version.theta + delta
    if not bool(torch.isfinite(theta).all()):
        raise NumericalError(
            "the trained adapter holds NaN or infinity: nothing is written. Lower the rate (--lr)"
        )
    after = work.measure(theta)
    goals, ending = _judged(work, goals, ending, after)
    log = training.progress.log
    linear = work.forecast(delta, theta)
    evidence = gather(work, theta, before, after, expected)
    record = report(
        work,
        work.describe(log, share),
        {"solver": None, "tolerance": None},
        ending,
        delta,
        before,
        after,
        base,
        expected,
        goals,
        linear,
        evidence,
        training.progress.seconds + time.monotonic() - checkpoint.begun_at,
    )
    if distributed.rank() == 0:
        _warn(record.guard.damage, before, after)
    return Edit(work.change, delta, record, log)


def _judged(work: Work, goals: Targets, ending: Ending, after: State) -> tuple[Targets, Ending]:
    """The goals and the ending, with whether they were reached.

    Where only steps were asked for there are none.
    """
    if work.stop.kind == "steps" and work.method.finish is None:
        unknown = np.full_like(goals.old, np.nan)
        return Targets(unknown, goals.new, unknown), replace(ending, reached=None)
    reached = bool(np.mean(after.old.loss) >= (1 - NEAR) * np.mean(goals.old))
    return goals, replace(ending, reached=reached)


def _warn(damage: float | None, before: State, after: State) -> None:
    """Say what nobody wants of a training: damage, or forget rows that are known better."""
    if damage is not None and damage > MUCH:
        say(f"warning: the retained rows' loss rose by {damage:.1%}")
    rise = float(after.old.loss.mean() - before.old.loss.mean())
    if rise < 0:
        say(
            f"warning: the loss of the rows to unlearn fell by {-rise:.2f}: "
            "the adapter knows them better than before"
        )


@dataclass(eq=False)
class Training:
    """The steps of one training, from its start or from where it was saved.

    Attributes
    ----------
    work : Work
        What is trained, and how.
    before, expected, goals
        The rows' losses: measured before, expected of a model that never saw the forget rows (None
        where nothing looks at them), and those that the forget rows should reach.
    checkpoint : Checkpoint
        Where its state is kept.
    progress : Progress
        How far it is.
    """

    work: Work
    before: State
    expected: Expected | None
    goals: Targets
    checkpoint: Checkpoint
    progress: Progress = field(default_factory=Progress)

    def run(self) -> tuple[Ending, float | None]:
        """Where the training ended, and the share of the whole move that a finish kept.

        The share is negative where a finish goes the other way.
        """
        work, model = self.work, self.work.version.model
        rules = StopRules(work, self.before, self.goals)
        with (
            model.at(work.version.theta),
            model.evaluating(model.parameters),
            gradients_kept(model),
            _layers_recomputed(model),
            frozen(model) as reference,
        ):
            forget, retain = self._batches(reference)
            # What targets and kept losses ran; from here on each gradient counts its own.
            work.cost.forwards += reference.rows_run
            stopped = self._steps(forget, retain, rules)
            theta, share = model.snapshot(), None
            if work.method.finish is not None:
                end, theta = theta, work.method.finish(self._trained(theta, rules))
                whole = (end - work.version.theta).double()
                move = (theta - work.version.theta).double()
                share = float(move @ whole / (whole @ whole).clamp(min=1e-300))
        return Ending(theta, [], stopped, True), share

    def _batches(
        self, reference: ReferenceAdapter
    ) -> tuple[TermBatches | None, TermBatches | None]:
        """The forget rows and the retained rows, each with its term where it has one."""
        work, model, options = self.work, self.work.version.model, self.work.options
        setup = Setup(
            model,
            Examples([request.before for request in work.change.requests]),
            work.forget,
            reference,
            options.seed,
            work.run.manifest.objective.rendering,
            work.budget,
            self._expected_outputs,
        )

        def batches(
            term: Term | None, tokens: TokenizedExamples, target: Target, size: int, stream: int
        ) -> TermBatches | None:
            """The batches of a term, where there is one."""
            if term is None:
                return None
            how = (size, work.budget, options.seed, stream, work.cost)
            return TermBatches(model, tokens, term, target, reference, *how)

        rule = work.method.target_rule
        vocabulary = model.model.get_input_embeddings().num_embeddings
        target = checked(rule.make(setup), name_of(rule.make), work.forget, vocabulary)
        size = options.batch_size
        forget = batches(work.method.forget, work.forget, target, size, FORGET_STREAM)
        if forget is not None and forget.term.reference and not forget.term.logits:
            forget.run_reference()
        size = work.retain_batch_size
        return forget, batches(work.method.retain, work.retained, Target(), size, RETAIN_STREAM)

    def _expected_outputs(self) -> Callable[[np.ndarray], Tensor]:
        """`log q` of forget rows: what a model that never saw them might say."""
        work, expected = self.work, self.expected
        if expected is None:  # neither the stopping rule nor the target said so before
            expected = work.local_expectation(self.before)
        outputs = ExpectedOutputs(
            work.version, work.forget, expected.expected, expected.local, work.cost
        )
        # All at once, so that they do not depend on which rows a step has first.
        for rows in plan_batches(work.forget, work.budget):
            if not outputs.full():
                outputs.of(rows)
        return outputs.of

    def _steps(
        self, forget: TermBatches | None, retain: TermBatches | None, rules: StopRules
    ) -> str:
        """Take steps until a rule stops them, and say which."""
        work, model, options = self.work, self.work.version.model, self.work.options
        optimizer, new_optimizer = self._take_up(rules)
        # Steps are numbered from the start of the training, not of this process: batches, schedule,
        # measurements and saves then fall on the same steps after a kill.
        rate, theta = self.progress.rate, model.snapshot()
        for number in self._numbers():
            forget_gradient = None if forget is None else forget.gradient(number)
            # The forget gradient has the losses that tell whether the step before was the last.
            stopped = rules.reached(number, forget_gradient) or rules.damaged(number, theta)
            if stopped is not None:
                return self._stop(stopped)
            retain_gradient = None if retain is None else retain.gradient(number)
            theta = model.snapshot()
            direction = self._direction(number, forget_gradient, retain_gradient, theta)
            if rate is None:
                rate = rate_of_stride(work.stride, new_optimizer(), model, direction, theta)
            lr = rate if work.automatic else self._scheduled(rate, number)
            move = take_step(optimizer, model, direction, lr, theta)
            looks_ahead = work.automatic and number % automatic_rate.EVERY == 0
            if looks_ahead and retain is not None and retain_gradient is not None:
                rate = automatic_rate.rate_along(retain, retain_gradient, theta, move, rate)
                # The step is taken again at the new rate; the optimizer's state stays as it is.
                move = move * (rate / lr)
                lr = rate
                model.restore(theta + move)
            entry = log_entry(number, lr, forget_gradient, retain_gradient, direction, move)
            self.progress.log.append({**entry, "row_gradients": work.cost.total})
            if (number + 1) % options.save_every == 0:
                self.progress.steps_done, self.progress.rate = number + 1, rate
                self.progress.anchor = rules.anchor
                self.checkpoint.save(optimizer, self.progress)
        stopped = rules.reached(work.steps, None, last=True) or rules.damaged(work.steps, theta)
        return f"{work.steps} steps were taken" if stopped is None else self._stop(stopped)

    def _take_up(
        self, rules: StopRules
    ) -> tuple[torch.optim.Optimizer, Callable[[], torch.optim.Optimizer]]:
        """The optimizer, where the training was saved or fresh, and what makes a fresh one."""
        make = self.work.options.optimizer or self.work.method.optimizer
        maker = optimizer_class(make) if isinstance(make, str) else make
        parameters: list[Any] = self.work.version.model.parameters
        new_optimizer = partial(maker, parameters, lr=1.0)
        optimizer = new_optimizer()
        progress = self.checkpoint.take_up(optimizer)
        if progress is None:
            self.progress = Progress(rate=self.work.lr)
            return new_optimizer(), new_optimizer
        self.progress, rules.anchor = progress, progress.anchor
        return optimizer, new_optimizer

    def _numbers(self) -> Iterable[int]:
        """The numbers of the steps that are left, with a bar on one process."""
        first, steps = self.progress.steps_done, self.work.steps
        numbers = range(first, steps)
        if distributed.rank() != 0:
            return numbers
        return track(numbers, f"{self.work.method.name} steps", total=steps, done=first)

    def _direction(
        self,
        number: int,
        forget: TermGradient | None,
        retain: TermGradient | None,
        theta: Tensor,
    ) -> Tensor:
        """The combined gradient `[P]`, clipped."""
        direction = self.work.method.combine(
            None if forget is None else forget.vector,
            None if retain is None else retain.vector,
            Step(number, self.work.steps, theta),
        )
        largest = self.work.options.max_grad_norm
        if largest is None:
            return direction
        return direction * min(1.0, largest / max(float(direction.norm()), 1e-30))

    def _scheduled(self, rate: float, number: int) -> float:
        """The rate of a step by the schedule."""
        options = self.work.options
        recipe = Recipe(lr=rate, schedule=options.schedule, warmup=options.warmup)
        return max(float(recipe.rate(number, self.work.steps)), 0.0)

    def _stop(self, stopped: Stopped) -> str:
        """Note the last step's share, and give why the training stopped."""
        self.progress.log[-1]["share"] = stopped.share
        return stopped.reason

    def _trained(self, theta: Tensor, rules: StopRules) -> Trained:
        """The two ends, and what a finish may measure."""
        work, model = self.work, self.work.version.model

        def loss_of(tokens: TokenizedExamples, rows: np.ndarray) -> Callable[[Tensor], float]:
            """Mean loss of some rows as a function of the adapter."""

            def loss(place: Tensor) -> float:
                """Mean loss at an adapter `[P]`."""
                with model.at(place):
                    return work.mean_loss(tokens, rows)

            return loss

        if len(work.sample):
            retain_loss = loss_of(work.version.tokens, work.sample)
        else:
            retain_loss = loss_of(work.retained, evenly_spaced(len(work.retained), CHECK_ROWS))
        return Trained(
            work.version.theta,
            theta,
            loss_of(work.forget, rules.checked_rows),
            retain_loss,
            rules.goal(rules.checked_rows),
        )


@contextmanager
def _layers_recomputed(model: AdaptedModel) -> Iterator[None]:
    """Recompute checkpointed layers in the backward, in evaluation mode too, within the block."""
    layers = checkpointed_layers(model)
    with replaced_forwards(
        {layer: partial(recomputed, layer.forward, use_reentrant=False) for layer in layers}
    ):
        yield


def rate_of_stride(
    stride: float,
    optimizer: torch.optim.Optimizer,
    model: AdaptedModel,
    direction: Tensor,
    theta: Tensor,
) -> float:
    """The rate at which a fresh optimizer's first move has `stride` of the adapter's length.

    The model stays at `theta` [P]. Where the gradient `direction` [P] is nothing but rounding, the
    rate is as if each coordinate moved by one.
    """
    move = take_step(optimizer, model, direction, 1.0, theta)
    model.restore(theta)
    length, wanted = float(move.norm()), stride * float(theta.norm())
    # Adam takes rounding for a direction, SGD would be thrown far off along it.
    if length == 0 or abs(float(direction @ move)) * wanted / length < NOTHING:
        length = len(theta) ** 0.5
    return wanted / length


def take_step(
    optimizer: torch.optim.Optimizer,
    model: AdaptedModel,
    direction: Tensor,
    lr: float,
    theta: Tensor,
) -> Tensor:
    """Take the optimizer's step along a gradient `[P]` from `theta`, and give the move `[P]`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    for parameter, gradient in zip(model.parameters, model.space.split(direction), strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.snapshot() - theta


def log_entry(
    number: int,
    lr: float,
    forget: TermGradient | None,
    retain: TermGradient | None,
    direction: Tensor,
    move: Tensor,
) -> dict[str, Any]:
    """A line of `steps.jsonl`, with the losses before the step."""
    forget_norm = None if forget is None else float(forget.vector.norm())
    retain_norm = None if retain is None else float(retain.vector.norm())
    cosine = None
    if forget is not None and retain is not None and forget_norm and retain_norm:
        product = float(forget.vector.double() @ retain.vector.double())
        cosine = product / (forget_norm * retain_norm)
    return {
        "step": number + 1,
        "lr": lr,
        "forget_term": None if forget is None else forget.value,
        "retain_term": None if retain is None else retain.value,
        "forget_loss": None if forget is None else forget.loss,
        "retain_loss": None if retain is None else retain.loss,
        "forget_norm": forget_norm,
        "retain_norm": retain_norm,
        "cosine": cosine,
        "direction_norm": float(direction.norm()),
        "move_norm": float(move.norm()),
        "share": 1.0,  # of the move that was kept
        "forget_rows": 0 if forget is None else len(forget.rows),
        "retain_rows": 0 if retain is None else len(retain.rows),
    }
