"""The recipe of a run: how its adapter was trained, and where that is recorded."""

from __future__ import annotations

from pathlib import Path

from influence.errors import InputError
from influence.progress import say
from influence.recipe import SCHEDULES, Recipe, Recorded, recorded_in
from influence.run import Run
from influence.trainer_output import recipe_near

__all__ = ["SCHEDULES", "Recipe", "given_or_recorded", "recipe_at", "recipe_of", "recorded_recipe"]


def recipe_of(run: Run) -> Recipe:
    """The recipe of the run's adapter as it is recorded, else estimated, else the defaults.

    Read, the first that is there: `recipe.json` in the run's directory (`fit` writes it of a
    trainer's training); `recipe.json`, `retrain.json` or `training_args.json` in the adapter's
    folder (`influence.recipe.recorded_in`), or what `influence.TrainingRecord` kept beside it; an
    estimate from the `trainer_state.json` in the adapter's folder, its parent, or the newest
    checkpoint of either. It is said which, and what is assumed; the defaults come with a warning.
    Raises `InputError` for a record that cannot be read or followed.
    """
    found = _recorded(run.directory, run.manifest.adapter.path, len(run.train))
    if found is None:
        recipe = Recipe()
        say(
            "warning: no recipe was given, and none is recorded beside the adapter, nor a "
            f"trainer_state.json to estimate one from: training by {recipe}, which are defaults "
            "and hardly how this adapter was trained (say how by --recipe FILE.json, or influence fit "
            "--trainer-output DIR, the folder that the trainer wrote)"
        )
        return recipe
    if found.about:
        say(f"note: {found.source}: {found.about}")
    say(f"training by {found.source}: {found.recipe}")
    return found.recipe


def given_or_recorded(run: Run, given: str | Path | Recipe | None) -> Recipe | None:
    """The recipe that was given (itself, or its file), else the recorded one, else None.

    Raises `InputError` for a file that is none.
    """
    return recorded_recipe(run) if given is None else recipe_at(given)


def recipe_at(given: str | Path | Recipe) -> Recipe:
    """A recipe that was given as it is, or by its file."""
    return given if isinstance(given, Recipe) else Recipe.read(given)


def recorded_recipe(run: Run, *, exact: bool = False) -> Recipe | None:
    """The recipe of the run's adapter, or None where none that can be followed is recorded.

    `exact`: only one that gives this very adapter again. A trainer's own order of the rows, and an
    estimate, do not. Prints nothing, other than `recipe_of`.
    """
    try:
        found = _recorded(run.directory, run.manifest.adapter.path, len(run.train))
    except InputError:
        return None
    return None if found is None or (exact and found.about) else found.recipe


def _recorded(directory: Path, adapter: str | None, rows: int) -> Recorded | None:
    """The recipe in the run's directory, or else that of the adapter's folder."""
    if (directory / "recipe.json").is_file():
        return recorded_in(directory)
    return recipe_near(Path(adapter), rows) if adapter else None
