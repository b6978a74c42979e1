"""What a Hugging Face trainer left in its output directory, read from JSON and safetensors alone.

::

    OUT/                        adapter_config.json, adapter_model.safetensors (trainer.save_model)
    OUT/checkpoint-N/           adapter, trainer_state.json, optimizer.pt
    OUT/influence/              what `influence.TrainingRecord` kept:
        recipe.json             the recipe, as far as it can be expressed (`influence.recipe`)
        training_args.json      the trainer's arguments
        trainer_state.json      learning rate of every step, logged losses
        order.json              the rows of every step, or null with the reason
        epoch-1/ ... end/       adapters of some epochs and of the end, each with its own
                                trainer_state.json and Adam's second moments

TRL and transformers write the training's arguments as a pickle (`training_args.bin`), which is
never opened. Where nothing else records the recipe, it is estimated from `trainer_state.json`: what
is in there, what follows from the learning rates, and what is assumed is said each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from influence.errors import InputError
from influence.messages import listed
from influence.progress import say
from influence.recipe import SCHEDULES, Recipe, Recorded, read_object, recorded_in

if TYPE_CHECKING:
    from influence.rows import Example

#: The folder in the output directory that `influence.TrainingRecord` writes.
RECORD = "influence"
#: The adapter of the training's end, in that folder.
END_FOLDER = "end"
STATE = "trainer_state.json"
#: What is read of a log's entries.
LOGGED = ("learning_rate", "loss", "epoch", "aux_loss")
#: The folders of epochs in it; a name that goes on is one that was being written.
EPOCH = re.compile(r"epoch-\d+(\.\d+)?(e[+-]?\d+)?")
#: More steps than any training has.
MAX_STEPS = 10**8
#: Most checkpoints that are taken as points without being asked for: each is a pass over the rows.
MOST_POINTS = 3
#: Logged rates may differ from a schedule by this much of the peak: they are rounded in the log.
RATE_TOLERANCE = 0.01
#: Warm-ups that are tried at a time.
_WARMUPS = 200


@dataclass(frozen=True)
class TrainingLog:
    """What a `trainer_state.json` says.

    `steps` were made of `max_steps`. `rates` [(step, learning rate)], `losses` [(step, mean loss
    since the entry before, nats per token)], `router` [(step, mean load-balancing loss of a
    mixture of experts)] and `epochs` [(step, epoch)] are in order of steps.
    `batch_size` is that of one forward on one device; None where it is not recorded.
    """

    source: str
    steps: int
    max_steps: int
    epochs_asked: int
    batch_size: int | None
    rates: tuple[tuple[int, float], ...]
    losses: tuple[tuple[int, float], ...]
    epochs: tuple[tuple[int, float], ...]
    router: tuple[tuple[int, float], ...] = ()

    @classmethod
    def read(cls, path: Path) -> TrainingLog:
        """Read a file; one that is no trainer's state is an `InputError`."""
        return cls.of(read_object(path, "trainer state"), str(path))

    @classmethod
    def of(cls, state: Any, source: str) -> TrainingLog:
        """From the state as a mapping."""
        try:
            log = [entry for entry in state["log_history"] if isinstance(entry, dict)]
            steps = int(state["global_step"])
            most = int(state.get("max_steps") or steps)
            asked = int(state.get("num_train_epochs") or 0)
            size = state.get("train_batch_size")
            size = int(size) if size else None
            found = {key: _logged(log, key) for key in LOGGED}
            # a loss is that of the steps before it: at step 0 there are none
            found["loss"] = tuple(entry for entry in found["loss"] if entry[0])
            if not 0 <= steps <= MAX_STEPS or not 0 <= most <= MAX_STEPS:
                raise ValueError(f"{steps} of {most} steps, expected at most {MAX_STEPS}")
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise InputError(
                f"{source} is not a trainer's state ({error!r}): copy the checkpoint again"
            ) from error
        return cls(
            source=source,
            steps=steps,
            max_steps=most,
            epochs_asked=asked,
            batch_size=size,
            rates=found["learning_rate"],
            losses=found["loss"],
            epochs=found["epoch"],
            router=found["aux_loss"],
        )

    @property
    def steps_per_epoch(self) -> float | None:
        """How many steps an epoch had, None where no entry tells."""
        return next((step / epoch for step, epoch in reversed(self.epochs) if epoch > 0), None)


def _logged(log: Sequence[dict[str, Any]], key: str) -> tuple[tuple[int, float], ...]:
    """The finite values of a key by step, the last where a step has several."""
    values = {
        int(entry["step"]): float(entry[key]) for entry in log if key in entry and "step" in entry
    }
    if any(not 0 <= step <= MAX_STEPS for step in values):
        raise ValueError(f"{key} at step {min(values)}, expected steps from 0 to {MAX_STEPS}")
    return tuple((step, value) for step, value in sorted(values.items()) if np.isfinite(value))


# ---- a recipe from the log -----------------------------------------------------------------------


def estimated_recipe(log: TrainingLog, rows: int | None) -> Recorded | None:
    """The recipe that a log tells of a training on so many rows, None where it has no rates.

    `about` says what is taken from the log, what follows from it, and what is assumed.
    """
    per_epoch = log.steps_per_epoch
    rates = [(step, rate) for step, rate in log.rates if rate > 0]
    if not rates or per_epoch is None or log.max_steps < 1:
        return None
    shape = _schedule(log)
    size, unsure = log.batch_size, []
    if rows and size:
        size *= max(1, round(rows / (size * per_epoch)))
    elif rows:
        size = max(1, round(rows / per_epoch))
    if not size:
        return None
    if not shape.fits:
        unsure.append(f"the schedule (no {', '.join(SCHEDULES)} one has these rates)")
    whole = max(1, log.epochs_asked)
    ends = abs(log.max_steps - whole * per_epoch) < 0.5
    recipe = Recipe(
        lr=shape.peak,
        weight_decay=0.0,
        epochs=whole,
        batch_size=size,
        schedule=shape.name,
        warmup=shape.warmup,
        max_grad_norm=1.0,
        seed=42,
        max_steps=None if ends else log.max_steps,
    )
    unsure += ["AdamW without weight decay", "betas 0.9 and 0.999", "eps 1e-08"]
    unsure += ["gradients clipped at norm 1", "seed 42", "the order of the rows"]
    about = (
        "estimated: epochs, steps, rates and batch size are logged there; "
        f"assumed, as trainers do unless told otherwise: {', '.join(unsure)}"
    )
    return Recorded(recipe, log.source, about)


@dataclass(frozen=True)
class _Schedule:
    """A schedule that explains logged rates: `peak` at its height; `fits` where it does."""

    name: str
    warmup: int
    peak: float
    error: float

    @property
    def fits(self) -> bool:
        return self.error <= RATE_TOLERANCE


def _schedule(log: TrainingLog) -> _Schedule:
    """The schedule and warm-up whose rates are nearest to the logged ones, by least squares.

    A version of transformers logs the rate of the step, or that of the step that follows: both are
    tried. Equally good ones: the shorter warm-up, `linear` before `constant` before `cosine`.
    """
    steps = np.array([step for step, _ in log.rates], dtype=float)
    rates = np.array([rate for _, rate in log.rates])
    highest = int(steps[min(len(steps) - 1, int(rates.argmax()) + 1)])  # it ends before this one
    low, high, best = 0, min(highest, log.max_steps), None
    while True:
        stride = max(1, -(-(high - low) // _WARMUPS))
        tried = [
            _fitted(name, warmup, steps - late, rates, log.max_steps)
            for warmup in range(low, high + 1, stride)
            for name in SCHEDULES
            for late in (1, 0)
        ]
        best = min(tried, key=lambda found: round(found.error, 9))
        if stride == 1:
            return best
        low, high = max(0, best.warmup - stride), min(high, best.warmup + stride)


def _fitted(name: str, warmup: int, done: np.ndarray, rates: np.ndarray, total: int) -> _Schedule:
    """One schedule with the peak that suits it best; `done` [m] are the steps before each rate."""
    shape = _shape(name, warmup, done, total)
    squares = float((shape * shape).sum())
    peak = float((shape * rates).sum() / squares) if squares > 0 else 0.0
    if peak <= 0:
        return _Schedule(name, warmup, float(rates.max()), float("inf"))
    error = float(np.sqrt(np.mean((rates - peak * shape) ** 2)) / peak)
    return _Schedule(name, warmup, peak, error)


def _shape(name: str, warmup: int, done: np.ndarray, total: int) -> np.ndarray:
    """A schedule's rates by their peak, as transformers has them, after `done` [m] steps."""
    falls = np.clip((done - warmup) / max(1, total - warmup), 0, 1)
    after = {"linear": 1 - falls, "cosine": (1 + np.cos(np.pi * falls)) / 2}.get(name, 1.0)
    return np.where(done < warmup, done / max(1, warmup), after)


def has_rates(recipe: Recipe, log: TrainingLog) -> bool:
    """Whether the logged rates are a recipe's, of the step or the step that follows."""
    if not log.rates:
        return True
    steps = np.array([step for step, _ in log.rates], dtype=float)
    rates = np.array([rate for _, rate in log.rates])
    shapes = (
        _shape(recipe.schedule, recipe.warmup, steps - late, log.max_steps) for late in (1, 0)
    )
    errors = [np.sqrt(np.mean((rates / recipe.lr - shape) ** 2)) for shape in shapes]
    return bool(min(errors) <= RATE_TOLERANCE)


def recipe_near(adapter: Path, rows: int | None) -> Recorded | None:
    """The recipe that is recorded in an adapter's folder or near it, or else estimated, or None.

    Near is what `influence.TrainingRecord` kept; estimated is from the log (`log_near`). Raises
    `InputError` for a record that cannot be read or followed.
    """
    places = [adapter, adapter / RECORD, adapter.parent / RECORD]
    places += [adapter.parent] * (adapter.parent.name == RECORD)
    recorded = (recorded_in(place) for place in places)
    found = next((each for each in recorded if each is not None), None)
    log = log_near(adapter)
    if log is None:
        return found
    if found is not None and not has_rates(found.recipe, log):
        other = f"the rates that {log.source} has are others"
        found = replace(found, about=f"{found.about}; {other}" if found.about else other)
    found = found or estimated_recipe(log, rows)
    if found is not None and log.steps < log.max_steps:
        stopped = f"this adapter's training stopped at step {log.steps} of {log.max_steps}"
        return replace(found, about=f"{found.about}; {stopped}" if found.about else stopped)
    return found


def log_near(adapter: Path) -> TrainingLog | None:
    """The log of an adapter's training: its folder's, or the longest of that, else its parent.

    Of a folder count its own `trainer_state.json`, that of `influence.TrainingRecord`, and those of
    its checkpoints. Raises `InputError` for a damaged one.
    """
    for folder in (adapter, adapter.parent):
        places = [folder, folder / RECORD, *checkpoints_in(folder)]
        files = [path for place in places if (path := place / STATE).is_file()]
        if files:
            return max((TrainingLog.read(path) for path in files), key=lambda log: log.steps)
    return None


# ---- the output directory ------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How an adapter was trained, as far as that is known: what `fit` keeps and compares with.

    `log` is what the trainer logged, None where it logged nothing; `recipe` how to train so again,
    None where no recipe is recorded that can be followed. `router` is the factor of the router's
    load-balancing loss where the trainer says it; None: that of the model's configuration.
    """

    log: TrainingLog | None
    recipe: Recorded | None
    router: float | None = None


@dataclass(frozen=True)
class TrainerOutput:
    """An output directory: the adapter that training ended with, and the checkpoints before it.

    `checkpoints` are folders with an adapter in order of their steps, without `adapter` itself;
    `optimizer` the newest folder with Adam's state; `log` that of the whole training.
    """

    folder: Path
    adapter: Path
    checkpoints: tuple[Path, ...]
    optimizer: Path | None
    log: TrainingLog | None

    @classmethod
    def find(cls, folder: str | Path) -> TrainerOutput:
        """Look into an output directory, or into one of its checkpoints.

        Raises `InputError` where there is no adapter in it.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(
                f"there is no folder {str(folder)!r}: give the trainer's output_dir "
                "(--trainer-output)"
            )
        number = _number(folder)
        top = folder if number is None else folder.parent
        record = top / RECORD
        kept = [*epochs_in(record), *checkpoints_in(top)]
        ends = [folder, record / END_FOLDER, *reversed(checkpoints_in(folder))]
        if number is not None:
            ends, kept = [folder], [place for place in kept if step_of(place) <= number]
        adapter = next((place for place in ends if has_adapter(place)), None)
        if adapter is None:
            inside = [place.name for place in _folders(folder)]
            raise InputError(
                f"{folder} holds no adapter, and no checkpoint-N with one (adapter_config.json and "
                f"adapter_model.safetensors); it has the folders {listed(inside) or '(none)'}: "
                "give the output_dir of a trainer that trained a PEFT model"
            )
        states = [*kept, *ends]
        return cls(
            folder,
            adapter,
            tuple(sorted((place for place in kept if place != adapter), key=step_of)),
            max((place for place in states if has_optimizer(place)), key=step_of, default=None),
            log_near(folder),
        )

    def training(self, rows: int | None) -> Training:
        """The training on so many rows. A recipe that cannot be followed is said, not raised."""
        router = None
        try:
            factor = self._arguments()[1].get("router_aux_loss_coef")
            if isinstance(factor, float | int) and np.isfinite(factor):
                router = float(factor)
            return Training(self.log, recipe_near(self.adapter, rows), router)
        except InputError as error:
            say(f"note: the recipe of the training is not kept: {error}")
            return Training(self.log, None, router)

    def _arguments(self) -> tuple[Path | None, dict[str, Any]]:
        """The file of the trainer's arguments, as far as JSON has them, and what it holds."""
        parent = self.folder.parent
        places = [self.folder / RECORD, parent / RECORD, *[parent] * (parent.name == RECORD)]
        paths = (place / "training_args.json" for place in places)
        path = next((path for path in paths if path.is_file()), None)
        return path, {} if path is None else read_object(path, "training arguments")

    def rendering(self, rows: Sequence[Example]) -> tuple[int | None, str | None]:
        """`max_length` and `supervise` of rows as a TRL trainer's recorded arguments have them.

        Said in a note. None each where no `training_args.json` of TRL is there, and no length where
        rows were packed otherwise than cut, or not cut at their end. Raises `InputError` for a
        damaged file.
        """
        path, arguments = self._arguments()
        if path is None or "completion_only_loss" not in arguments or not rows:
            return None, None
        first, given = rows[0], arguments["completion_only_loss"]
        pairs = first.prompt is not None or first.prompt_turns is not None  # TRL asks the first too
        supervise = "last" if (pairs if given is None else given) else "all"
        if arguments.get("assistant_only_loss"):
            supervise = "assistant"
        length, packed = arguments.get("max_length"), arguments.get("packing")
        cuts = arguments.get("packing_strategy") == "bfd" if packed else True
        cuts = cuts and (packed or not arguments.get("padding_free"))
        cuts = cuts and arguments.get("truncation_mode") in (None, "keep_start")
        length = length if cuts and type(length) is int and length >= 2 else None
        say(
            f"note: as {path} says, rows are cut to {length or 'no'} tokens and supervised by "
            f"{supervise!r}{', and were packed in training' * bool(packed)}: --max-length or "
            "--supervise say otherwise"
        )
        return length, supervise

    def points(self) -> tuple[Path, ...]:
        """The checkpoints to look at: at most `MOST_POINTS`, spread over the early training.

        Those at a learning rate above 0 and before the end. More than enough: of the first half of
        the training, if that has as many; else the earliest ones.
        """
        last = self.log.steps if self.log is not None else None
        usable = {}
        for place in self.checkpoints:
            log = TrainingLog.read(place / STATE) if (place / STATE).is_file() else None
            if log is None or not log.rates or (last is not None and log.steps >= last):
                continue
            if log.rates[-1][1] > 0:
                usable.setdefault(log.steps, place)
        steps = sorted(usable)
        early = [step for step in steps if last is None or step <= last / 2]
        pool = early if len(early) >= MOST_POINTS else steps[:MOST_POINTS]
        places = np.unique(np.linspace(0, len(pool) - 1, MOST_POINTS).round().astype(int))
        return tuple(usable[pool[at]] for at in places) if pool else ()


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders `checkpoint-N` with an adapter, by N."""
    found = [place for place in _folders(folder) if _number(place) is not None]
    return sorted((place for place in found if has_adapter(place)), key=step_of)


def epochs_in(record: Path) -> list[Path]:
    """The folders `epoch-E` with an adapter of a `TrainingRecord`; one half-written is none."""
    named = [place for place in _folders(record) if EPOCH.fullmatch(place.name)]
    return [place for place in named if has_adapter(place)]


def has_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter as PEFT saves it."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return all((folder / name).is_file() for name in names)


def has_optimizer(folder: Path) -> bool:
    """Whether a folder holds an optimiser's state, the trainer's or that of a `TrainingRecord`."""
    return any((folder / name).is_file() for name in ("optimizer.pt", "second_moments.safetensors"))


def _folders(folder: Path) -> list[Path]:
    return sorted(place for place in folder.iterdir() if place.is_dir()) if folder.is_dir() else []


def _number(folder: Path) -> int | None:
    """N of `checkpoint-N`, None for another folder."""
    match = re.fullmatch(r"checkpoint-(\d{1,9})", folder.name)
    return int(match[1]) if match else None


def step_of(folder: Path) -> int:
    """The step at which a folder was saved; 0 where that is not recorded."""
    number = _number(folder)
    if number is not None:
        return number
    return TrainingLog.read(folder / STATE).steps if (folder / STATE).is_file() else 0
