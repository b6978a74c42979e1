"""Options that several `analysis` commands share."""

from __future__ import annotations

import typer

from analysis.cli import app
from analysis.options import RecipeOption, ResamplesOption

COMMANDS = typer.main.get_command(app).commands


def test_who_draws_bootstraps():
    taking = {name for name, c in COMMANDS.items() if issubclass(c.options, ResamplesOption)}
    assert taking == {"clean", "lds", "memorization", "removal"}


def test_who_trains_by_a_recipe():
    taking = {name for name, c in COMMANDS.items() if issubclass(c.options, RecipeOption)}
    assert taking == {"clean", "ood", "removal"}
