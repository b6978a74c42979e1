"""Options as dataclass fields: what a command is called with, in which order help lists them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest
import typer
from typer.testing import CliRunner

from influence import console
from influence.errors import InputError
from influence.options import column_map, command, keywords, option, options_of, points


def test_columns_are_typed_key_by_key():
    assert column_map("prompt=question, completion=the answer") == {
        "prompt": "question",
        "completion": "the answer",
    }
    assert column_map("id=a=b") == {"id": "a=b"}
    for text in ("", "prompt", "prompt=", "prompt=a,prompt=b", "prompt=a,"):
        with pytest.raises(InputError, match="expected each key once, as in prompt=question"):
            column_map(text)


@dataclass(frozen=True, kw_only=True)
class Place:
    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"place": ""}

    place: Path = option("Where.", also=["--where"])


@dataclass(frozen=True, kw_only=True)
class Loudness:
    loud: bool = option("Shout.", default=False)
    quiet_for: float | None = option("Seconds.", default=None)


def halves(text: str) -> float:
    if text == "none":
        raise InputError("none was given")
    return float(text) / 2


@dataclass(frozen=True, kw_only=True)
class Call(Place, Loudness):
    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"half": "loud"}

    name: str = option("Who.")
    count: int = option("How often.", default=3, flag="-n")
    half: str | Callable[[], float] | None = option(
        "Twice the value.", default=None, typed=str | None, read=halves
    )
    files: tuple[Path, ...] = option(
        "Files.", default=(), typed=list[Path] | None, read=tuple, several=True
    )
    tags: tuple[str, ...] = option(
        "Tags.", default=("a", "b"), flag="--tag", typed=list[str], read=tuple
    )
    unseen: int = 7


@pytest.fixture
def call():
    """Call the command: the options it received, or the result of a call that failed."""
    app, received = console.app("toys"), []

    @command(app, Call)
    def shout(options: Call) -> None:
        """Say something."""
        received.append(options)

    @command(app, Place, name="self")
    def other(options: Place) -> None:
        """Another one."""

    def run(*arguments: str):
        result = CliRunner().invoke(app, ["shout", *arguments], prog_name="toys")
        return received.pop() if received else result

    return run


def test_a_command_receives_its_dataclass(call):
    given = call("--place", "here", "--name", "fox")
    assert given == Call(place=Path("here"), name="fox")
    given = call(
        *("--place", "here", "--name", "fox", "-n", "5", "--half", "3", "--loud"),
        *("--quiet-for", "2", "--tag", "x", "--tag", "y"),
    )
    assert given == Call(
        place=Path("here"),
        name="fox",
        count=5,
        half=1.5,
        loud=True,
        quiet_for=2.0,
        tags=("x", "y"),
    )


@pytest.mark.parametrize(
    "typed",
    [
        ("--files", "a", "b", "c"),
        ("--files", "a", "--files", "b", "c"),
        ("--files", "a", "--files", "b", "--files=c"),
    ],
)
def test_several_values_may_follow_one_flag(call, typed):
    given = call("--place", "p", *typed, "--name", "fox")
    assert given == Call(place=Path("p"), name="fox", files=(Path("a"), Path("b"), Path("c")))


def test_one_flag_takes_one_value_where_nothing_else_is_declared(call):
    result = call("--place", "p", "--name", "fox", "--tag", "a", "b")
    assert result.exit_code == 2
    assert "unexpected extra argument" in result.output


@pytest.mark.parametrize("typed", [("--where", "there"), ("--where=there",), ("--place=there",)])
def test_another_spelling_is_taken_and_not_listed(call, typed):
    assert call("--name", "fox", *typed).place == Path("there")
    assert "--where" not in call("--help").output


def test_another_spelling_is_no_value(call):
    """A value is left alone unless it is itself the spelling of an option."""
    assert call("--place", "p", "--name", "where=x").name == "where=x"


def test_help_lists_own_options_first_and_moved_ones_where_they_are_put(call):
    lines = call("--help").output.splitlines()
    flags = [line.split()[0] for line in lines if line.startswith("  -")]
    assert flags == [
        *("--place", "--name", "-n", "--files", "--tag", "--loud", "--half", "--quiet-for"),
        "--help",
    ]
    assert list(options_of(Call)) == [
        *("place", "name", "count", "files", "tags", "loud", "half", "quiet_for"),
    ]


def test_help_has_the_types_defaults_and_what_is_required(call):
    text = " ".join(call("--help").output.split())
    assert "--place <path> Where. [required]" in text
    assert "-n <int> How often. [default: 3]" in text
    assert "--half <str> Twice the value." in text
    assert "--tag <list[str]> Tags. [default: a, b]" in text
    assert "--loud Shout." in text
    assert "--no-loud" not in text


def test_a_value_that_cannot_be_read_is_an_error_of_the_call(call):
    result = call("--place", "p", "--name", "fox", "--half", "none")
    assert isinstance(result.exception, InputError)
    result = call("--name", "fox")
    assert result.exit_code == 2
    assert "Missing option '--place'" in result.output


def test_a_field_without_help_is_no_option():
    assert "unseen" not in options_of(Call)
    assert {field.name for field in fields(Call)} - set(options_of(Call)) == {"unseen"}


def test_the_keywords_of_a_base_are_its_fields():
    given = Call(place=Path("p"), name="fox", loud=True)
    assert keywords(Loudness, given) == {"loud": True, "quiet_for": None}
    assert Loudness(**keywords(Loudness, given)) == Loudness(loud=True)


def test_a_type_that_cannot_be_imported_yet_needs_what_is_typed():
    @dataclass(frozen=True, kw_only=True)
    class Later:
        value: str | NotThere = option("Something.", default="x", typed=str)  # noqa: F821

    assert options_of(Later)["value"].typed is str

    @dataclass(frozen=True, kw_only=True)
    class Wrong:
        value: str | NotThere = option("Something.", default="x")  # noqa: F821

    with pytest.raises(NameError):
        options_of(Wrong)


def test_a_command_is_named_after_its_function_or_as_it_is_told():
    app = console.app("toys")

    @command(app, Place, name="self")
    def self_(options: Place) -> None:
        """One."""

    @command(app, Place)
    def other(options: Place) -> None:
        """Two."""

    assert list(typer.main.get_command(app).commands) == ["self", "other"]
    assert inspect.getdoc(self_) == "One."


def test_points_are_numbers_between_commas():
    assert points("0.4,0.6,1") == (0.4, 0.6, 1.0)
    sentence = "--path 'here' was given; expected numbers separated by commas, as in 0.4,0.6,0.8"
    with pytest.raises(InputError, match=sentence):
        points("here")
