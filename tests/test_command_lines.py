"""The three command lines: every option is declared once, and can be typed after torchrun."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from itertools import combinations

import pytest
import typer

import analysis.cli
import analysis.evaluation.options
import analysis.evaluation.removal
import analysis.studies.memorization
import analysis.studies.ood
import analysis.studies.options
import analysis.truth
import analysis.tune
import influence
import influence.answers
import influence.cli
import influence.without
import unlearn
import unlearn.cli
import unlearn.difficulty
import unlearn.difficulty.options
import unlearn.edits.options
import unlearn.methods.options
from analysis.metrics import lds
from influence.options import Command, Option, options_of
from unlearn.retraining.options import SUBSET_FRACTION, SUBSET_SEED

APPS = {"influence": influence.cli.app, "unlearn": unlearn.cli.app, "analysis": analysis.cli.app}
COMMANDS = {
    f"{package} {name}": command
    for package, app in APPS.items()
    for name, command in typer.main.get_command(app).commands.items()
}

#: Flags that are declared twice in the same words, and why.
SAME_WORDS = {
    "--max-damage": "an edit allows 0.1 and a training anything",
    "--out": "an edit that is only forecast has none, a training must have one",
}
#: Flags that are declared in nearly the same words, and why.
NEARLY_SAME_WORDS = {
    "-k": "rows, or settings",
    "--ids": "all rows are forecast where none are named",
}
#: Share of the words of two texts that they have in common, above which they say the same.
NEAR = 0.6


def declarations() -> dict[str, dict[tuple[type, str], Option]]:
    """What every flag is declared by: the class and the name of the field."""
    table: dict[str, dict[tuple[type, str], Option]] = {}
    for command in COMMANDS.values():
        for name, each in options_of(command.options).items():
            bases = command.options.__mro__
            owner = next(c for c in bases if name in vars(c).get("__annotations__", {}))
            table.setdefault(each.flag, {})[owner, name] = each
    return table


DECLARED = declarations()


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def alike(text: str, other: str) -> float:
    return len(words(text) & words(other)) / len(words(text) | words(other))


# ---- declared once -------------------------------------------------------------------------------


def test_there_is_something_to_look_at():
    assert len(COMMANDS) == 27
    assert len(DECLARED) > 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_a_field_with_help(name):
    command = COMMANDS[name]
    assert isinstance(command, Command), "registered without influence.options.command"
    assert is_dataclass(command.options)
    assert command.options.__dataclass_params__.frozen
    declared = {
        field: ([each.flag], each.help, each.default is MISSING)
        for field, each in options_of(command.options).items()
    }
    assert declared == {p.name: (p.opts, p.help, p.required) for p in command.params}
    assert all(each.help.endswith((".", "?")) for each in options_of(command.options).values())


def test_an_option_is_declared_once():
    """No flag is declared in two classes with the same words."""
    twice = {
        flag
        for flag, table in DECLARED.items()
        if len({each.help for each in table.values()}) < len(table)
    }
    assert twice == set(SAME_WORDS)
    for flag in SAME_WORDS:
        meanings = [(each.help, each.default) for each in DECLARED[flag].values()]
        assert len(set(meanings)) == len(meanings), f"{flag}: the very same option, declared twice"


def test_one_meaning_has_one_text():
    near = {
        flag
        for flag, table in DECLARED.items()
        for text, other in combinations({each.help for each in table.values()}, 2)
        if alike(text, other) > NEAR
    }
    assert near == set(NEARLY_SAME_WORDS)


def test_held_out_rows_are_called_holdout_everywhere():
    assert "--heldout" not in DECLARED
    old = {"analysis memorization", "analysis ood"}
    assert {name for name, c in COMMANDS.items() if "--heldout" in c.spellings} == old
    for command in COMMANDS.values():
        assert "heldout" not in command.help
        assert all("heldout" not in each.help for each in options_of(command.options).values())


def test_a_default_is_said_by_the_field():
    """Help says it in words only where it depends on something else than a number."""
    said = [
        f"{flag}: {each.help}"
        for flag, table in DECLARED.items()
        for each in table.values()
        if re.search(r"Default:? [\d.]+\.$", each.help)
    ]
    # None tells that these, which go with --subsets or --run only, or not with --measure, were not
    # given
    assert sorted(text.split(":")[0] for text in said) == [
        *("--fraction", "--screen", "--subset-seed", "--subset-seed", "--subsets"),
    ]
    assert f"Default: {unlearn.difficulty.screening.SCREEN}." in "".join(said)
    halves = inspect.signature(unlearn.random_halves).parameters
    assert (halves["fraction"].default, halves["seed"].default) == (SUBSET_FRACTION, SUBSET_SEED)
    truth = inspect.signature(analysis.truth.retrained_truth).parameters
    defaults = (truth["subsets"].default, truth["subset_seed"].default)
    assert defaults == (analysis.cli.SUBSETS, analysis.cli.SUBSET_SEED)


# ---- the Python functions of the same names ------------------------------------------------------


def keywords(function) -> dict[str, object]:
    """Keywords of a function that have a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


EXACT = [
    (
        unlearn.edits.options.Options,
        unlearn.edit,
        {"remove", "relabel", "correct", "holdout", "probes"},
    ),
    (
        unlearn.edits.options.Options,
        unlearn.forecast,
        {"remove", "relabel", "correct", "holdout", "probes"},
    ),
    (unlearn.edits.options.Options, unlearn.remove, {"holdout", "probes"}),
    (unlearn.edits.options.Options, unlearn.relabel, {"holdout", "probes"}),
    (unlearn.edits.options.Options, unlearn.correct, {"holdout", "probes"}),
    (
        unlearn.methods.options.Options,
        unlearn.train,
        {"retain", "holdout", "probes", "checkpoint", "restart"},
    ),
]


@pytest.mark.parametrize(
    ("options", "function", "others"), EXACT, ids=[f.__name__ for _, f, _ in EXACT]
)
def test_the_keywords_are_the_options(options, function, others):
    given = keywords(function)
    assert others <= set(given)
    expected = {field.name: field.default for field in fields(options)}
    assert {name: value for name, value in given.items() if name not in others} == expected


#: Options whose defaults a function does not share, and why.
DIFFERENT = {
    "predict": {"screen": "None tells that it was not given, beside --measure"},
    "fit": {
        "curvature": "a name stands for an object",
        "disk_budget": "gigabytes are typed, bytes are given",
    },
    "without": {"ids": "a text stands for a sequence, which is empty where none is given"},
}


@pytest.mark.parametrize(
    ("options", "function"),
    [
        (influence.cli.Fit, influence.fit),
        (influence.cli.Fit, influence.load),
        (influence.cli.Check, influence.load),
        (influence.cli.Check, influence.check_gradients),
        (influence.cli.Score, influence.score),
        (influence.cli.Self, influence.self_influence),
        (influence.answers.Without, influence.without.without),
        (influence.answers.Without, influence.Run.open),
        (influence.cli.Score, influence.Run.open),
        (unlearn.difficulty.options.Difficulty, unlearn.difficulty.Protocol),
        (unlearn.difficulty.options.Difficulty, unlearn.difficulty.predict),
        (analysis.cli.Lds, lds),
        (analysis.evaluation.options.Removal, analysis.evaluation.removal.removal),
        (analysis.cli.Tune, analysis.tune.tune),
        (analysis.studies.options.Memorization, analysis.studies.memorization.memorization),
        (analysis.studies.options.Ood, analysis.studies.ood.study),
    ],
    ids=lambda part: part.__name__,
)
def test_a_command_has_the_defaults_of_its_function(options, function):
    given = keywords(function)
    shared = {
        field.name: field.default
        for field in fields(options)
        if field.name in given and field.default is not MISSING
    }
    assert shared
    differ = {name for name, value in shared.items() if given[name] != value}
    assert differ == set(DIFFERENT.get(function.__name__, ()))


# ---- torchrun ------------------------------------------------------------------------------------


def after_torchrun(*line: str) -> list[str]:
    """What torchrun's own parser hands on of a line; SystemExit where it dies of it."""
    from torch.distributed.run import parse_args

    parsed = parse_args(["--nproc-per-node", "2", "-m", *line])
    assert parsed.training_script == "unlearn"
    return parsed.training_script_args


@pytest.mark.parametrize("flag", DECLARED)
def test_torchrun_hands_every_option_on(flag):
    """With `--` before the command always; without it an option of its own is in the way of few.

    These have another spelling that is not.
    """
    for typed in ([flag, "x"], [f"{flag}=x"]):
        line = ["unlearn", "train", *typed, "--json"]
        assert after_torchrun("--", *line) == line[1:]
        try:
            assert after_torchrun(*line) == line[1:]
        except SystemExit:
            for each in DECLARED[flag].values():
                assert each.also, f"torchrun takes {flag} for its own: give it another spelling"
                line = ["unlearn", "train", each.also[0], *typed[1:], "--json"]
                assert after_torchrun(*line) == line[1:]


@pytest.mark.parametrize("flag", ["--run", "--start"])
def test_what_torchrun_takes_for_its_own(flag, capsys):
    """The fault that the other spellings are for, of argparse as Python 3.11 has it."""
    try:
        after_torchrun("unlearn", "train", flag, "x")
    except SystemExit:
        assert f"ambiguous option: {flag} could match" in capsys.readouterr().err
    else:
        pytest.skip("this Python's parser hands it on")
