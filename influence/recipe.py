"""Recipes: how an adapter was trained, as a value.

A recipe is written as JSON with the fields of `Recipe`, and `about`, a sentence for people that
says where it is from and what of it is assumed. Where recipes are recorded and which one counts for
a run is said in `unlearn.retraining.recipe` and `influence.trainer_output`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from influence.errors import InputError
from influence.messages import one_line

#: How the rate falls after the warm-up.
SCHEDULES = ("linear", "constant", "cosine")
#: Characters of a recipe's `about` that are kept.
ABOUT = 800


@dataclass(frozen=True)
class Recipe:
    """How an adapter was trained: AdamW on shuffled batches.

    `schedule` multiplies `lr` at step k of K (after `warmup` steps of a linear rise): `linear` by 1
    - k / K, `cosine` by (1 + cos(pi k / K)) / 2, `constant` by 1. `max_grad_norm` clips the
    gradient's norm, None does not. `max_steps` ends the training after so many steps, within an
    epoch too, whatever `epochs` says; None ends it after the last epoch.
    """

    lr: float = 5e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    epochs: int = 15
    batch_size: int = 16
    schedule: str = "linear"
    warmup: int = 0
    max_grad_norm: float | None = None
    dropout: bool = True
    seed: int = 0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"schedule {self.schedule!r} was given; expected one of {', '.join(SCHEDULES)}"
            )
        counts = ["epochs", "batch_size", "warmup", "seed"]
        counts += ["max_steps"] * (self.max_steps is not None)
        whole = all(type(getattr(self, name)) is int for name in counts)
        numbers = (self.lr, self.weight_decay, self.eps, *self.betas, self.max_grad_norm or 1.0)
        real = all(map(_finite, numbers))
        if not (whole and real and type(self.dropout) is bool):
            raise InputError(
                "a recipe needs whole epochs, batch_size, warmup, seed and max_steps, dropout true "
                f"or false, and else finite numbers: {self}"
            )
        in_range = (
            self.lr > 0
            and self.eps > 0
            and self.epochs >= 1
            and self.batch_size >= 1
            and self.warmup >= 0
            and (self.max_steps is None or self.max_steps >= 1)
            and self.weight_decay >= 0
            and all(0 <= beta < 1 for beta in self.betas)
        )
        if not in_range:
            raise InputError(
                "a recipe needs lr and eps above 0, epochs, batch_size and max_steps of at least "
                f"1, warmup and weight_decay of at least 0, betas in [0, 1): {self}"
            )

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe from a JSON file with this class's fields, or raise an `InputError`."""
        return cls.of(read_object(Path(path), "recipe"), f"recipe {path}")

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> Recipe:
        """Make a recipe from a mapping with this class's fields; `about` is for people.

        Raises `InputError` that names `source` for unknown fields and values of a wrong type.
        """
        values = {key: value for key, value in values.items() if key != "about"}
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise InputError(
                f"{source} has unknown keys: {', '.join(unknown)}; expected "
                f"{', '.join(sorted(names))}"
            )
        betas = values.get("betas", cls.betas)
        if not (isinstance(betas, list | tuple) and len(betas) == 2):
            raise InputError(
                f"{source} has betas {betas!r}; expected two numbers, as in [0.9, 0.999]"
            )
        try:
            return cls(**{**values, "betas": tuple(betas)})
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def of_training_arguments(
        cls, arguments: Mapping[str, Any], source: str, *, steps: int | None = None
    ) -> Recipe:
        """Translate Hugging Face `TrainingArguments` (its `to_json_string`), for one device.

        Only the numbers: a trainer draws the order of the rows in its own way, so the retrained
        adapter is one of another order. `steps` is how many steps the training had in all, where
        that is known: only with it can parts of an epoch, a number of steps and a share of warm-up
        be followed. What a recipe cannot express, and a key that is missing, is an `InputError`
        that lists them.
        """
        problems = _no_numbers(arguments)
        if not problems:
            arguments = _with_steps(arguments, steps)
            problems = _untranslatable(arguments, () if steps is None else ("max_steps",))
        if problems:
            raise InputError(
                f"{source} cannot be followed: {'; '.join(problems)}. Give a recipe (--recipe "
                "FILE.json)"
            )
        epochs = arguments["num_train_epochs"]
        if isinstance(epochs, float) and epochs.is_integer():
            epochs = int(epochs)
        batch_size, accumulated = (arguments[name] for name in _BATCH)
        schedule = str(arguments["lr_scheduler_type"])
        # the trainer's `constant` has no warm-up, whatever warmup_steps says
        warmup = 0 if schedule == "constant" else arguments.get("warmup_steps") or 0
        return cls.of(
            {
                **{name: arguments[theirs] for name, theirs in _RENAMED.items()},
                "schedule": schedule.removesuffix("_with_warmup"),
                "betas": (arguments["adam_beta1"], arguments["adam_beta2"]),
                "epochs": epochs,
                "batch_size": batch_size * accumulated,
                "max_grad_norm": arguments["max_grad_norm"] or None,
                "warmup": warmup,
                "max_steps": arguments.get("max_steps") if steps is not None else None,
            },
            source,
        )

    def as_json(self) -> dict[str, Any]:
        """The fields by name; without `max_steps` where there is none, as recipes had it before."""
        values = asdict(self)
        if self.max_steps is None:
            del values["max_steps"]
        return values

    def steps(self, rows: int) -> int:
        """How many steps a training on so many rows has."""
        per_epoch = -(-rows // self.batch_size)
        return self.epochs * per_epoch if self.max_steps is None else self.max_steps

    def rows_read(self, rows: int) -> int:
        """How many rows a training on so many reads, each as often as it comes."""
        if self.max_steps is None:
            return self.epochs * rows
        epochs, more = divmod(self.max_steps, -(-rows // self.batch_size))
        return epochs * rows + more * self.batch_size

    def for_rows(self, rows: int, fewer: int) -> Recipe:
        """The recipe of a training on `rows` rows, for one on `fewer` of them.

        Each row is read as often, at the same rates. Batches are smaller by the root of the rows'
        ratio: as large ones would take few steps, in which an adapter learns less of what all rows
        have in common, and as many steps as before would give each row too much of every step.
        """
        batch_size = max(1, round(self.batch_size * min(1.0, fewer / rows) ** 0.5))
        smaller = replace(self, batch_size=batch_size)
        if self.max_steps is not None:
            epochs = self.max_steps / -(-rows // self.batch_size)
            smaller = replace(smaller, max_steps=max(1, round(epochs * -(-fewer // batch_size))))
        share = smaller.steps(fewer) / self.steps(rows)
        return replace(smaller, warmup=round(self.warmup * share))

    def shortened(self, share: float, rows: int) -> Recipe:
        """The recipe of a training on `rows` rows with `share` of its steps, in whole passes.

        So every row is read as often as any other. Where that takes less than a pass, batches are
        larger.
        """
        passes = max(1.0, share * self.steps(rows)) / -(-rows // self.batch_size)
        epochs = max(1, round(passes))
        return replace(
            self,
            epochs=epochs,
            max_steps=None,
            batch_size=max(1, round(self.batch_size * epochs / passes)),
            warmup=round(self.warmup * share),
        )

    def last_epoch(self, rows: int) -> int:
        """The epoch, from 1, in which a training on so many rows ends."""
        return -(-self.steps(rows) // -(-rows // self.batch_size))

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        shares = {"linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2, "constant": 1.0}
        return self.lr * shares[self.schedule]


#: Fields of a recipe that training arguments hold under another name, and all they need besides.
_RENAMED = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "eps": "adam_epsilon",
    "seed": "seed",
}
_OTHERS = ("lr_scheduler_type", "adam_beta1", "adam_beta2", "num_train_epochs", "max_grad_norm")
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
#: Training arguments that a recipe cannot express, with the values that ask for nothing.
_IDLE = {
    "warmup_ratio": 0,
    "max_steps": -1,
    "label_smoothing_factor": 0,
    "neftune_noise_alpha": 0,
    "packing": 0,
    "dataloader_drop_last": 0,
    "group_by_length": 0,  # of transformers 4; 5 names the order instead:
    "train_sampling_strategy": "random",
    "lr_scheduler_kwargs": {},
    "optim_target_modules": 0,  # parameters that GaLore and its like update otherwise
}
#: Training arguments that are numbers where they are given, as a recipe's steps are made from them.
_NUMBERS = ("num_train_epochs", "max_steps", "warmup_steps", "warmup_ratio")


def _finite(value: Any) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _no_numbers(arguments: Mapping[str, Any]) -> list[str]:
    """Which training arguments are no finite numbers, though they must be."""
    return [
        f"{name}={one_line(repr(value), 60)} is no finite number"
        for name in _NUMBERS
        if (value := arguments.get(name)) is not None and not _finite(value)
    ]


def _with_steps(arguments: Mapping[str, Any], steps: int | None) -> dict[str, Any]:
    """The arguments with a training's number of steps in place of what only it makes expressible.

    These are a number of steps (`max_steps` above 0), parts of an epoch, and a warm-up as a share
    of the steps (`warmup_ratio`, or `warmup_steps` below 1).
    """
    arguments = dict(arguments)
    if steps is None:
        return arguments
    epochs, limit = arguments.get("num_train_epochs"), arguments.get("max_steps") or -1
    arguments["max_steps"] = steps if limit > 0 else None
    if isinstance(epochs, float) and not epochs.is_integer():
        arguments["max_steps"] = steps
        arguments["num_train_epochs"] = max(1, math.ceil(epochs))
    share = arguments.get("warmup_steps") or arguments.get("warmup_ratio") or 0
    if 0 < share < 1:
        arguments["warmup_steps"] = math.ceil(steps * share)
    arguments["warmup_ratio"] = 0
    return arguments


def _untranslatable(arguments: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """What training arguments lack for a recipe, and what of them no recipe can express.

    `known` are those that a recipe can express after all.
    """
    missing = [name for name in (*_RENAMED.values(), *_OTHERS, "optim") if name not in arguments]
    missing += [name for name in _BATCH if type(arguments.get(name)) is not int]
    strange = [
        f"{name}={arguments[name]!r}"
        for name, idle in _IDLE.items()
        if (arguments.get(name) or 0) not in (0, idle) and name not in known
    ]
    if arguments.get("loss_type") not in (None, "nll"):
        strange.append(f"loss_type={arguments['loss_type']!r}")
    if not str(arguments.get("optim", "adamw")).startswith("adamw"):
        strange.append(f"optim={arguments['optim']!r}")
    problems = [f"it lacks {', '.join(missing)}"] if missing else []
    return problems + ([f"a recipe cannot express {', '.join(strange)}"] if strange else [])


@dataclass(frozen=True)
class Recorded:
    """A recipe that was found: where (a file, for messages), and what is to be said of it."""

    recipe: Recipe
    source: str
    about: str = ""


def recorded_in(folder: Path) -> Recorded | None:
    """The recipe that is recorded in a folder, the first that is there, or None.

    `recipe.json` (the fields of `Recipe`), `retrain.json` (which `unlearn retrain` writes),
    `training_args.json` (a trainer's arguments as JSON, with the number of steps of a
    `trainer_state.json` beside it; its pickled `.bin` is never opened). Raises `InputError` for one
    that cannot be read or followed.
    """
    if (path := folder / "recipe.json").is_file():
        values = read_object(path, "recipe")
        about = one_line(str(values.get("about", "")), ABOUT)
        return Recorded(Recipe.of(values, f"recipe {path}"), str(path), about)
    if (path := folder / "retrain.json").is_file():
        record = read_object(path, "record")
        recipe = Recipe.of(record.get("recipe") or {}, f"record {path}")
        number, last = record.get("epoch"), f"epoch {record.get('epoch')} of {recipe.epochs}"
        whole = recipe.epochs
        if recipe.max_steps is not None:
            number, whole = record.get("step"), recipe.max_steps
            last = f"step {number} of {whole}"
        if number != whole:
            raise InputError(
                f"{path} says that this adapter's training stopped after {last}: give the recipe "
                "to train by (--recipe FILE.json)"
            )
        return Recorded(recipe, str(path))
    if (path := folder / "training_args.json").is_file():
        arguments = read_object(path, "training arguments")
        about = "it says how the adapter was trained, but not in which order it saw the rows"
        recipe = Recipe.of_training_arguments(arguments, str(path), steps=_steps_in(folder))
        return Recorded(recipe, str(path), about)
    return None


def _steps_in(folder: Path) -> int | None:
    """The number of steps that a `trainer_state.json` in the folder records."""
    path = folder / "trainer_state.json"
    steps = read_object(path, "trainer state").get("max_steps") if path.is_file() else None
    return steps if type(steps) is int and steps > 0 else None


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file, or an `InputError` that names `what` where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{what} {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{what} {path} holds no JSON object; expected one, as in {{...}}")
    return value
