"""Options that several `unlearn` commands share: where they may be typed."""

from __future__ import annotations

import typer

from influence.options import RowsOptions, options_of
from unlearn.cli import app
from unlearn.options import ForceOption, HoldoutOption, RecipeOption, StartOption

COMMANDS = typer.main.get_command(app).commands


def taking(options: type) -> set[str]:
    return {name for name, command in COMMANDS.items() if issubclass(command.options, options)}


def test_who_takes_them():
    edits = {"remove", "relabel", "correct", "edit"}
    assert taking(RowsOptions) == {"retrain", "without", "remove", "edit", "train", "difficulty"}
    assert taking(RecipeOption) == edits | {"train", "difficulty", "without"}
    assert taking(StartOption) == taking(ForceOption) == taking(HoldoutOption) == edits | {"train"}


def test_an_adapter_to_start_from_has_a_spelling_that_torchrun_lets_through():
    assert options_of(StartOption)["start"].also == ["--start-from"]
    assert COMMANDS["train"].spellings == {"--run-dir": "--run", "--start-from": "--start"}
