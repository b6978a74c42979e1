"""Recipes: how an adapter was trained, as a value, and where that is recorded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from influence.errors import InputError
from influence.progress import say
from influence.run import Run

#: How the rate falls after the warm-up.
SCHEDULES = ("linear", "constant", "cosine")


@dataclass(frozen=True)
class Recipe:
    """How an adapter was trained: AdamW on shuffled batches.

    `schedule` multiplies `lr` at step k of K (after `warmup` steps of a linear rise): `linear` by 1
    - k / K, `cosine` by (1 + cos(pi k / K)) / 2, `constant` by 1. `max_grad_norm` clips the
    gradient's norm, None does not.
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

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"schedule {self.schedule!r} was given; expected one of {', '.join(SCHEDULES)}"
            )
        whole = all(
            type(getattr(self, name)) is int for name in ("epochs", "batch_size", "warmup", "seed")
        )
        numbers = (self.lr, self.weight_decay, self.eps, *self.betas, self.max_grad_norm or 1.0)
        real = all(type(value) in (int, float) and np.isfinite(value) for value in numbers)
        if not (whole and real and type(self.dropout) is bool):
            raise InputError(
                "a recipe needs whole epochs, batch_size, warmup and seed, dropout true or false, "
                "and "
                f"else finite numbers: {self}"
            )
        in_range = (
            self.lr > 0
            and self.eps > 0
            and self.epochs >= 1
            and self.batch_size >= 1
            and self.warmup >= 0
            and self.weight_decay >= 0
            and all(0 <= beta < 1 for beta in self.betas)
        )
        if not in_range:
            raise InputError(
                "a recipe needs lr and eps above 0, epochs and batch_size of at least 1, warmup "
                "and "
                f"weight_decay of at least 0, betas in [0, 1): {self}"
            )

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe from a JSON file with this class's fields, or raise an `InputError`."""
        return cls.of(_read_object(Path(path), "recipe"), f"recipe {path}")

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> Recipe:
        """Make a recipe from a mapping with this class's fields.

        Raises `InputError` that names `source` for unknown fields and values of a wrong type.
        """
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
    def of_training_arguments(cls, arguments: Mapping[str, Any], source: str) -> Recipe:
        """Translate Hugging Face `TrainingArguments` (its `to_json_string`), for one device.

        Only the numbers: a trainer draws the order of the rows in its own way, so the retrained
        adapter is one of another order. What a recipe cannot express, and a key that is missing, is
        an `InputError` that lists them.
        """
        problems = _untranslatable(arguments)
        if problems:
            raise InputError(
                f"{source} cannot be followed: {'; '.join(problems)}. Give a recipe (--recipe "
                "FILE.json)"
            )
        epochs = arguments["num_train_epochs"]
        if isinstance(epochs, float) and epochs.is_integer():
            epochs = int(epochs)
        batch_size, accumulated = (arguments[name] for name in _BATCH)
        return cls.of(
            {
                **{name: arguments[theirs] for name, theirs in _RENAMED.items()},
                "betas": (arguments["adam_beta1"], arguments["adam_beta2"]),
                "epochs": epochs,
                "batch_size": batch_size * accumulated,
                "max_grad_norm": arguments["max_grad_norm"] or None,
                "warmup": arguments.get("warmup_steps") or 0,
            },
            source,
        )

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
    "schedule": "lr_scheduler_type",
    "seed": "seed",
}
_OTHERS = ("adam_beta1", "adam_beta2", "num_train_epochs", "max_grad_norm", "optim")
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
#: Training arguments that a recipe cannot express, with the values that ask for nothing.
_IDLE = {
    "warmup_ratio": 0,
    "max_steps": -1,
    "label_smoothing_factor": 0,
    "neftune_noise_alpha": 0,
    "packing": 0,
    "dataloader_drop_last": 0,
    "group_by_length": 0,
}


def _untranslatable(arguments: Mapping[str, Any]) -> list[str]:
    """What training arguments lack for a recipe, and what of them no recipe can express."""
    missing = [name for name in (*_RENAMED.values(), *_OTHERS) if name not in arguments]
    missing += [name for name in _BATCH if type(arguments.get(name)) is not int]
    strange = [
        f"{name}={arguments[name]!r}"
        for name, idle in _IDLE.items()
        if (arguments.get(name) or 0) not in (0, idle)
    ]
    if arguments.get("loss_type") not in (None, "nll"):
        strange.append(f"loss_type={arguments['loss_type']!r}")
    if not str(arguments.get("optim", "adamw")).startswith("adamw"):
        strange.append(f"optim={arguments['optim']!r}")
    problems = [f"it lacks {', '.join(missing)}"] if missing else []
    return problems + ([f"a recipe cannot express {', '.join(strange)}"] if strange else [])


def recipe_of(run: Run) -> Recipe:
    """The recipe of the run's adapter, as recorded in its folder.

    Without one the defaults of `Recipe`, with a warning.

    Read, the first that is there: `recipe.json` (the fields of `Recipe`), `retrain.json` (which
    `retrain` writes), `training_args.json` (a trainer's arguments as JSON; its pickled `.bin` is
    never opened). Raises `InputError` for one that cannot be read or followed.
    """
    recorded = _recorded(run)
    if recorded is None:
        recipe = Recipe()
        say(
            f"warning: no recipe was given; training by {recipe}, which may not be how this "
            "adapter "
            "was trained"
        )
        return recipe
    recipe, path = recorded
    if path.name == "training_args.json":
        say(
            f"note: {path} says how the adapter was trained, but not in which order it saw the rows"
        )
    say(f"training by {path}: {recipe}")
    return recipe


def recorded_recipe(run: Run) -> Recipe | None:
    """The recipe recorded in the adapter's folder, or None without one that can be followed.

    Prints nothing, other than `recipe_of`.
    """
    try:
        recorded = _recorded(run)
    except InputError:
        return None
    return None if recorded is None else recorded[0]


def _recorded(run: Run) -> tuple[Recipe, Path] | None:
    """The recipe in the adapter's folder, and the file that it was read from."""
    folder = Path(run.manifest.adapter.path or os.devnull)
    if (path := folder / "recipe.json").is_file():
        return Recipe.read(path), path
    if (path := folder / "retrain.json").is_file():
        record = _read_object(path, "record")
        recipe = Recipe.of(record.get("recipe") or {}, f"record {path}")
        if record.get("epoch") != recipe.epochs:
            raise InputError(
                f"{path} says that this adapter's training stopped after epoch "
                f"{record.get('epoch')} "
                f"of {recipe.epochs}: give the recipe to train by (--recipe FILE.json)"
            )
        return recipe, path
    if (path := folder / "training_args.json").is_file():
        arguments = _read_object(path, "training arguments")
        return Recipe.of_training_arguments(arguments, str(path)), path
    return None


def _read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file, or an `InputError` where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{what} {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{what} {path} holds no JSON object; expected one, as in {{...}}")
    return value
