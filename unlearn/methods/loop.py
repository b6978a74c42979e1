"""One loop for every method of gradient-based unlearning.

A step takes a batch of forget rows and one of retained rows, in parts of a token budget (gradient accumulation without a knob) and
shared out over processes, forms both terms' gradients `[P]`, adds them up once, combines them, and hands the result to an
optimizer of torch. Terms are means over all tokens or rows of the step, so neither parts nor processes change them. Dropout is off.

It stops when the forget rows have reached their goal (default: the base model's mean loss on them), the last step shortened by
bisection so that they just have (with batches smaller than the set, the way since they were last seen below it); or when retained
rows have lost `stop_damage`. What it did is measured and recorded like a closed-form edit (`unlearn.record.before_after`),
and saved in the same way; every step's terms, losses, gradient norms and their cosine are in the adapter's `steps.jsonl`.

Which rows a step takes depends on the seed and the step's number alone, so a training that is resumed goes on with the same ones.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from influence import distributed
from influence.adapter import AdaptedModel
from influence.batches import plan_batches
from influence.cost import Cost
from influence.errors import InputError, MismatchError, NumericalError, StoreError
from influence.gradients import checkpointed_layers, replaced_forwards
from influence.loss import mean_losses
from influence.progress import say, track
from influence.rows import Examples
from influence.run import Run, spaced
from influence.tokens import TokenizedExamples
from unlearn.methods import automatic_rate
from unlearn.methods.batches import TermBatches, TermGradient
from unlearn.methods.combine import Step
from unlearn.methods.methods import Method, Trained, method_of
from unlearn.methods.options import Options, optimizer_class
from unlearn.methods.preparation import Work, prepare
from unlearn.methods.reference import ReferenceAdapter, frozen
from unlearn.methods.targets import Setup, Target
from unlearn.methods.terms import Term
from unlearn.record.before_after import State, Targets, refuse_text, report
from unlearn.record.save import Edit
from unlearn.retraining.recipe import Recipe
from unlearn.stopping import NEAR, Walk
from unlearn.unseen import Expected, Reference, expected_losses

#: Forget rows whose loss tells when to stop, where a step does not run all of them, and how often it is looked at.
CHECK_ROWS, CHECK_EVERY = 64, 10
#: Rise of the retained rows' loss that a training is warned of.
MUCH = 0.1
STATE = "state.pt"
#: When a way is shortened: how near to the goal is near enough, relative to it, and after how many halvings it is let be.
CLOSE, SHORTENINGS = 0.005, 14
#: Change of what is minimised, in nats to first order, below which a first step follows rounding.
NOTHING = 1e-6


def train(
    run: Run,
    method: str | Method,
    ids: Sequence[str],
    *,
    retain: Examples | None = None,
    holdout: Examples | None = None,
    checkpoint: str | Path | None = None,
    restart: bool = False,
    **options: Any,
) -> Edit:
    """Unlearn training rows by gradient steps from the run's adapter.

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
    checkpoint
        Folder that the state of the training is kept in: called again after a kill, with the same request, it goes on. Gone when
        the training is complete and the result is `save`d by the caller's `discard`.
    restart
        Begin anew where the folder holds another training, or a damaged one.
    options
        The fields of `Options`.

    Returns the edit; nothing else is written, its `save` does.

    Raises
    ------
    InputError
        For unknown ids, methods or options, retained rows that are forget rows, a method that needs retained rows where none are left.
    MismatchError
        Where `checkpoint` holds the state of another training.
    NumericalError
        Where a term or gradient is NaN or infinite.
    """
    begun = time.monotonic()
    refuse_text(ids)
    chosen = Options(**options)
    work = prepare(run, method_of(method), ids, retain, holdout, chosen)
    before = work.measure(work.version.theta)
    expected = work.expected(before)
    targets = work.targets(expected, before)
    training = Training(
        work,
        before,
        expected,
        targets,
        begun,
        None if checkpoint is None else Path(checkpoint),
        restart,
    )
    found, kept = training.run()
    delta = found.theta - work.version.theta
    theta = work.version.theta + delta
    if not bool(torch.isfinite(theta).all()):
        raise NumericalError(
            "the trained adapter holds NaN or infinity: nothing is written. Lower the rate (--lr)"
        )
    after = work.measure(theta)
    if work.stop.kind != "steps" or work.method.finish is not None:
        found = replace(
            found, reached=bool(np.mean(after.old.loss) >= (1 - NEAR) * np.mean(targets.old))
        )
    else:  # no goal was asked for
        nothing = np.full_like(targets.old, np.nan)
        targets, found = Targets(nothing, targets.new, nothing), replace(found, reached=None)
    linear = work.forecast(delta, theta)
    residual = {"solver": None, "tolerance": None}
    seconds = training.seconds + time.monotonic() - begun
    record = report(
        work,
        work.describe(training.log, kept),
        residual,
        found,
        delta,
        before,
        after,
        expected,
        targets,
        linear,
        seconds,
    )
    damage, rise = record["guard"]["damage"], float(after.old.loss.mean() - before.old.loss.mean())
    if damage is not None and damage > MUCH and distributed.rank() == 0:
        say(f"warning: the retained rows' loss rose by {damage:.1%}")
    if rise < 0 and distributed.rank() == 0:
        say(
            f"warning: the loss of the rows to unlearn fell by {-rise:.2f}: the adapter knows them better than before"
        )
    return Edit(work.change, delta, record, training.log)


@dataclass(eq=False)
class Training:
    """The steps of one training, from its start or from where it was saved."""

    work: Work
    begun: State
    expected: Expected
    targets: Targets
    begun_at: float
    folder: Path | None
    restart: bool
    log: list[dict[str, Any]] = field(default_factory=list)
    anchor: Tensor | None = None  # where the forget rows were last seen below their goal
    seconds: float = 0.0  # of earlier processes

    def run(self) -> tuple[Walk, float | None]:
        """The trained adapter, and the share of the whole move that a finish kept (negative: the other way)."""
        work, model = self.work, self.work.version.model
        with (
            model.at(work.version.theta),
            model.evaluating(model.parameters),
            _gradients_kept(model),
            _checkpointed(model),
            frozen(model) as before,
        ):
            forget, retain = self._sides(before)
            work.cost.forwards += before.asked
            stopped = self._steps(forget, retain)
            theta, kept = model.snapshot(), None
            if work.method.finish is not None:
                end, theta = theta, work.method.finish(self._trained(theta))
                whole = (end - work.version.theta).double()
                kept = float(
                    (theta - work.version.theta).double()
                    @ whole
                    / (whole @ whole).clamp(min=1e-300)
                )
        return Walk(theta, [], stopped, True), kept

    def _sides(self, before: ReferenceAdapter) -> tuple[TermBatches | None, TermBatches | None]:
        work, model, options = self.work, self.work.version.model, self.work.options
        rows = Examples([request.before for request in work.change.requests])
        setup = Setup(
            model,
            rows,
            work.forget,
            before,
            options.seed,
            work.run.manifest["objective"]["max_length"],
            work.budget,
            self._predicted,
        )
        method = work.method

        def side(
            term: Term | None, tokens: TokenizedExamples, target: Target, size: int, stream: int
        ) -> TermBatches | None:
            if term is None:
                return None
            return TermBatches(
                model,
                tokens,
                term,
                target,
                before,
                size,
                work.budget,
                options.seed,
                stream,
                work.cost,
            )

        forget = side(method.forget, work.forget, method.target(setup), options.batch_size, 31)
        if forget is not None and forget.term.reference and not forget.term.logits:
            forget.ask_all()
        return forget, side(method.retain, work.kept, Target(), work.retain_batch_size, 32)

    def _predicted(self) -> Callable[[np.ndarray], Tensor]:
        """`log q` of forget rows, as influence predicts it."""
        work, expected = self.work, self.expected
        if np.isnan(expected.rho):  # the stopping rule did not need it
            expected = expected_losses(
                work.change, expected.now, work.heldout, self.begun.unseen, work.cost
            )
        reference = Reference(work.version, work.forget, expected.expected, work.cost)
        for rows in plan_batches(
            work.forget, work.budget
        ):  # now, so that they do not depend on which step asks first
            if not reference.full():
                reference.of(rows)
        return reference.of

    def _steps(self, forget: TermBatches | None, retain: TermBatches | None) -> str:
        """Steps until a rule holds; says which."""
        work, model, options = self.work, self.work.version.model, self.work.options
        parameters: list[Any] = model.parameters
        make = options.optimizer or work.method.optimizer
        maker = optimizer_class(make) if isinstance(make, str) else make
        optimizer = maker(parameters, lr=1.0)
        saved = self._saved(optimizer)
        if saved is None:
            optimizer = maker(parameters, lr=1.0)
        first, rate = saved or (0, work.lr)
        theta = model.snapshot()
        for number in self._counted(first):
            look = None if forget is None else forget.look(number)
            if why := self._reached(number, look) or self._damaged(number, theta):
                return why
            other = None if retain is None else retain.look(number)
            theta = model.snapshot()
            direction = work.method.combine(
                None if look is None else look.gradient,
                None if other is None else other.gradient,
                Step(number, work.steps, theta),
            )
            if options.max_grad_norm is not None:
                direction = direction * min(
                    1.0, options.max_grad_norm / max(float(direction.norm()), 1e-30)
                )
            if rate is None:
                rate = _rate_of(work.stride, maker(parameters, lr=1.0), model, direction, theta)
            lr = rate
            if not work.automatic:
                recipe = Recipe(lr=rate, schedule=options.schedule, warmup=options.warmup)
                lr = max(float(recipe.rate(number, work.steps)), 0.0)
            move = _moved(optimizer, model, direction, lr, theta)
            if (
                work.automatic
                and retain is not None
                and other is not None
                and number % automatic_rate.EVERY == 0
            ):
                rate = self._looked_ahead(retain, other, theta, move, rate)
                move = move * (rate / lr)
                lr = rate
                model.restore(theta + move)
            self._note(number, lr, look, other, direction, move)
            if self.folder is not None and (number + 1) % options.save_every == 0:
                self._save(optimizer, number + 1, rate)
        last = self._reached(work.steps, None, last=True) or self._damaged(work.steps, theta)
        return last or f"{work.steps} steps were taken"

    def _counted(self, first: int) -> Iterable[int]:
        numbers = range(first, self.work.steps)
        label = f"{self.work.method.name} steps"
        return (
            track(numbers, label, total=self.work.steps, done=first)
            if distributed.rank() == 0
            else numbers
        )

    def _reached(self, number: int, look: TermGradient | None, *, last: bool = False) -> str | None:
        """That the forget rows are at their goal before step `number`, the way there shortened so that they just are; or None."""
        looked = None if self.work.stop.kind == "steps" else self._forget_loss(number, look, last)
        if looked is None:
            return None
        model, (now, goal) = self.work.version.model, looked
        if now < goal:
            self.anchor = model.snapshot()
            return None
        if self.anchor is None:
            raise InputError(
                f"nothing to do: the forget rows' mean loss is {now:.2f} before the first step and their goal is {goal:.2f}; ask for more "
                "(--until loss=X or steps=N)"
            )
        rows = spaced(len(self.work.forget), CHECK_ROWS)
        wanted = self._goal(rows)
        self._shorten(
            self.anchor, lambda: self._measured(self.work.forget, rows) / wanted, above=True
        )
        return f"the forget rows' mean loss reached its goal, {goal:.2f}, in step {number}"

    def _damaged(self, number: int, start: Tensor) -> str | None:
        """That the retained rows have lost more than is allowed before step `number`, the step from `start` shortened; or None."""
        work, allowed = self.work, self.work.options.stop_damage
        if allowed is None or len(work.sample) == 0 or number == 0:
            return None
        limit = float(self.begun.retained.loss.mean()) * (1 + allowed)
        if self._measured(work.version.tokens, work.sample) <= limit:
            return None
        self._shorten(
            start, lambda: self._measured(work.version.tokens, work.sample) / limit, above=False
        )
        return f"the retained rows' mean loss has risen by {allowed:.1%}, all that is allowed, in step {number}"

    def _shorten(self, start: Tensor, loss: Callable[[], float], *, above: bool) -> None:
        """Go back on the line to `start` until `loss()`, relative to its goal or limit, is 1: within `CLOSE` above it, or below."""
        model, end = self.work.version.model, self.work.version.model.snapshot()
        low, high = 0.0, 1.0
        for _ in range(SHORTENINGS):
            share = (low + high) / 2
            model.restore(start + share * (end - start))
            try:
                there = loss()
            except NumericalError:  # so far out that nothing is finite
                there = float("inf")
            low, high = (low, share) if there >= 1 else (share, high)
            if (1 <= there <= 1 + CLOSE) if above else (1 - CLOSE <= there < 1):
                break
        share = high if above else low
        model.restore(start + share * (end - start))
        self.log[-1]["share"] = share

    def _forget_loss(
        self, number: int, look: TermGradient | None, last: bool
    ) -> tuple[float, float] | None:
        """The forget rows' mean loss and its goal: the step's own where it ran all of them, else of a sample, now and then and
        whenever the step's own rows are at their goal.
        """
        if look is not None and len(look.rows) == len(self.work.forget):
            return float(look.losses.mean()), self._goal(look.rows)
        ahead = look is not None and float(look.losses.mean()) >= self._goal(look.rows)
        if number % CHECK_EVERY and not last and not ahead:
            return None
        rows = spaced(len(self.work.forget), CHECK_ROWS)
        return self._measured(self.work.forget, rows), self._goal(rows)

    def _goal(self, rows: np.ndarray) -> float:
        """The mean loss that these forget rows should reach."""
        return float(self.targets.old[rows].mean())

    def _measured(self, tokens: TokenizedExamples, rows: np.ndarray) -> float:
        """The rows' mean loss where the model is now; shared out, so that all processes decide by the same number."""
        self.work.cost.forwards += len(rows)
        model, own = self.work.version.model, distributed.shard(rows)
        total = torch.zeros(1, dtype=torch.float64, device=model.device)
        if len(own):
            try:
                total += float(
                    mean_losses(model, tokens.select(own), token_budget=self.work.budget).sum()
                )
            except NumericalError:  # the other processes wait for the sum
                total += float("inf")
        found = float(distributed.add_up(total)) / len(rows)
        if not np.isfinite(found):
            raise NumericalError(
                "the loss of rows that are measured is NaN or infinite: lower the rate (--stride, --lr)"
            )
        return found

    def _looked_ahead(
        self, retain: TermBatches, other: TermGradient, theta: Tensor, move: Tensor, rate: float
    ) -> float:
        """GeN's rate, from the retained batch's loss along the move."""
        losses = []
        for point in automatic_rate.POINTS:
            retain.model.restore(theta + point * move)
            losses.append(retain.mean_loss(other.rows))
        return automatic_rate.next_rate(
            rate, np.array([*automatic_rate.POINTS, 0.0]), np.array([*losses, other.loss])
        )

    def _trained(self, theta: Tensor) -> Trained:
        """What a finish may measure."""
        work, model = self.work, self.work.version.model

        def loss(tokens: TokenizedExamples, rows: np.ndarray) -> Callable[[Tensor], float]:
            def at(where: Tensor) -> float:
                with model.at(where):
                    return self._measured(tokens, rows)

            return at

        kept, rows = (
            (work.version.tokens, work.sample)
            if len(work.sample)
            else (work.kept, spaced(len(work.kept), CHECK_ROWS))
        )
        return Trained(
            work.version.theta,
            theta,
            loss(work.forget, spaced(len(work.forget), CHECK_ROWS)),
            loss(kept, rows),
            self._goal(spaced(len(work.forget), CHECK_ROWS)),
        )

    def _note(
        self,
        number: int,
        lr: float,
        look: TermGradient | None,
        other: TermGradient | None,
        direction: Tensor,
        move: Tensor,
    ) -> None:
        """A line of the log; losses are those before the step."""
        norms = [None if one is None else float(one.gradient.norm()) for one in (look, other)]
        cosine = None
        if look is not None and other is not None and norms[0] and norms[1]:
            cosine = float(look.gradient.double() @ other.gradient.double()) / (norms[0] * norms[1])
        self.log.append(
            {
                "step": number + 1,
                "lr": lr,
                "forget_term": None if look is None else look.value,
                "retain_term": None if other is None else other.value,
                "forget_loss": None if look is None else look.loss,
                "retain_loss": None if other is None else other.loss,
                "forget_norm": norms[0],
                "retain_norm": norms[1],
                "cosine": cosine,
                "direction_norm": float(direction.norm()),
                "move_norm": float(move.norm()),
                "share": 1.0,  # of the move that was kept
                "forget_rows": 0 if look is None else len(look.rows),
                "retain_rows": 0 if other is None else len(other.rows),
                "row_gradients": self.work.cost.total,
            }
        )

    # -- resuming

    def _save(self, optimizer: torch.optim.Optimizer, done: int, rate: float | None) -> None:
        """Keep where the training stands; a kill leaves this state or the one before."""
        if distributed.rank() != 0 or self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        cost = self.work.cost
        state = {
            "request": json.dumps(self.work.request()),
            "theta": self.work.version.model.snapshot(),
            "anchor": self.anchor,
            "seconds": self.seconds + time.monotonic() - self.begun_at,
            "optimizer": optimizer.state_dict(),
            "done": done,
            "rate": rate,
            "cost": asdict(cost),
            "log": json.dumps(self.log),
        }
        partial = self.folder / (STATE + ".partial")
        try:
            with open(partial, "wb") as handle:
                torch.save(state, handle)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(partial, self.folder / STATE)
        except OSError as error:
            raise StoreError(f"{self.folder} could not be written: {error}") from error

    def _saved(self, optimizer: torch.optim.Optimizer) -> tuple[int, float | None] | None:
        """Take up a saved training: the steps that are done, and the rate; None where it begins anew, with a new optimizer."""
        path = None if self.folder is None else self.folder / STATE
        if path is None or not path.exists():
            return None
        work, now = self.work, self.work.request()
        try:
            state = torch.load(path, map_location=work.version.model.device, weights_only=True)
            known, log, cost = (
                json.loads(state["request"]),
                list(json.loads(state["log"])),
                Cost(**state["cost"]),
            )
            done, theta, anchor, rate_then = (
                int(state["done"]),
                state["theta"],
                state["anchor"],
                state["rate"],
            )
            differences = [key for key in now if known.get(key, ...) != now[key]]
            if not differences:
                optimizer.load_state_dict(state["optimizer"])
                work.version.model.restore(theta)
        except Exception as error:  # whatever a damaged file makes its reader do
            if self.restart:
                return None
            raise StoreError(
                f"{path} is damaged ({type(error).__name__}): delete {self.folder}, or --overwrite, to begin anew"
            ) from error
        if differences and self.restart:
            return None
        if differences:
            moved = " (an edit saved meanwhile moved the start: --start names the adapter to begin with)"
            raise MismatchError(
                f"{self.folder} holds another training: it differs in {', '.join(differences)}{moved if 'adapter' in differences else ''}. "
                "Ask for the same one to go on, give another --out, or --overwrite to begin anew"
            )
        self.anchor, self.seconds = anchor, float(state["seconds"])
        self.log.extend(log)
        work.cost.gradients, work.cost.forwards = cost.gradients, cost.forwards
        if float(distributed.first(np.array([done]))[0]) != done:
            raise StoreError(
                f"the processes hold different states of this training in {self.folder}: give a folder that all see"
            )
        if distributed.rank() == 0:
            say(f"going on after step {done} of {work.steps}")
        return done, rate_then


@contextmanager
def _checkpointed(model: AdaptedModel) -> Iterator[None]:
    """Within the block layers for which checkpointing is enabled are recomputed in the backward, in evaluation mode too."""
    layers = checkpointed_layers(model)
    with replaced_forwards(
        {layer: partial(checkpoint, layer.forward, use_reentrant=False) for layer in layers}
    ):
        yield


@contextmanager
def _gradients_kept(model: AdaptedModel) -> Iterator[None]:
    """Within the block the parameters' `.grad` is the training's; afterwards what it was."""
    before = [parameter.grad for parameter in model.parameters]
    try:
        yield
    finally:
        for parameter, gradient in zip(model.parameters, before, strict=True):
            parameter.grad = gradient


def _rate_of(
    stride: float,
    optimizer: torch.optim.Optimizer,
    model: AdaptedModel,
    direction: Tensor,
    theta: Tensor,
) -> float:
    """The rate at which a fresh optimizer's first move has `stride` of the adapter's length; the model stays where it is."""
    move = _moved(optimizer, model, direction, 1.0, theta)
    model.restore(theta)
    length, wanted = float(move.norm()), stride * float(theta.norm())
    if length == 0 or abs(float(direction @ move)) * wanted / length < NOTHING:
        length = (
            len(theta) ** 0.5
        )  # nothing to follow but rounding: as if each coordinate moved by one
    return wanted / length


def _moved(
    optimizer: torch.optim.Optimizer,
    model: AdaptedModel,
    direction: Tensor,
    lr: float,
    theta: Tensor,
) -> Tensor:
    """Take the optimizer's step along a gradient `[P]`; how the parameters moved, `[P]`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    for parameter, gradient in zip(model.parameters, model.space.split(direction), strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.snapshot() - theta


def discard(checkpoint: str | Path) -> None:
    """Delete the state of a training whose result is saved, and its folder where nothing else lies in it."""
    folder = Path(checkpoint)
    for name in (STATE, STATE + ".partial"):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
