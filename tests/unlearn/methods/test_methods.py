"""The methods' table: what each is made of, says of itself and does, by its name or from a file."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import unlearn
from influence.errors import InputError
from tests.conftest import build_model, examples, fit_end
from unlearn.methods import loop, methods, targets, terms
from unlearn.methods.automatic_rate import EVERY, POINTS
from unlearn.methods.combine import Normalised, Sparse, Weighted
from unlearn.methods.finish import Controlled, Negated
from unlearn.methods.methods import METHODS, Method, controlled, method_of
from unlearn.stopping import TrainingRule

# ---- the table -----------------------------------------------------------------------------------


CE, ASCENT, KL = "CE", "-CE", "KL(before || model)"


#: As the papers have them: name, targets, forget term, retain term, how gradients combine, and
#: whether the adapter before is looked at.
TABLE = [
    ("ga", "own", ASCENT, None, "sum", False),
    ("random-labels", "random", CE, None, "sum", False),
    ("adversarial-labels", "adversarial", CE, None, "sum", True),
    ("ga-gd-general", "own", ASCENT, CE, "sum", False),
    ("ga-gd", "own", ASCENT, CE, "sum", False),
    ("ga-kl-general", "own", ASCENT, KL, "sum", True),
    ("ga-kl", "own", ASCENT, KL, "sum", True),
    ("ngdiff", "own", ASCENT, CE, "sum of unit gradients", False),
    ("npo", "own", "NPO(beta=0.1)", CE, "sum", True),
    ("simnpo", "own", "SimNPO(beta=2.5, gamma=0)", CE, "sum", False),
    ("idk-dpo", "refusals", "DPO(beta=0.1)", CE, "sum", True),
    ("task-arithmetic", "own", CE, None, "sum", False),
    ("l1-sparse", "own", None, CE, "retain + 0.0005 (1 - t/T) sign(theta)", False),
    ("datamodel-matching", "predicted", "KL(predicted || model)", KL, "sum", True),
    ("control", "own", ASCENT, None, "sum", False),
]


def test_the_table_has_every_method_once():
    assert [row[0] for row in TABLE] == list(METHODS)


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_methods_are_what_their_papers_say(row):
    name, target, forget, retain, combine, reference = row
    method = METHODS[name]()
    described = method.describe()
    assert method.name == name
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert (described["name"], described["targets"], described["forget"], described["retain"]) == (
        name,
        target,
        forget,
        retain,
    )
    assert (described["combine"], described["needs_reference"]) == (combine, reference)
    assert described["needs_retain"] == (retain is not None)
    general = "general" if name.endswith("general") else "in-distribution"
    assert described["retain_rows"] == (general if retain else None)
    assert described["title"]
    assert "arXiv" in described["source"]
    assert hasattr(torch.optim, described["optimizer"])
    assert described["steps"] >= 1
    assert (described["lr"] == "auto") == (name == "ngdiff")
    TrainingRule.parse(described["until"])


@pytest.mark.parametrize("name", METHODS)
def test_the_general_forms_differ_in_nothing_else(name):
    if not name.endswith("-general"):
        return
    here, there = METHODS[name](0.7), METHODS[name.removesuffix("-general")](0.7)
    differ = {
        part.name
        for part in fields(Method)
        if getattr(here, part.name) != getattr(there, part.name)
    }
    assert differ == {"name", "general", "title"}


NUMBERS = [
    ("npo", {"beta": 0.3, "retain_weight": 2.0}, "NPO(beta=0.3)", Weighted(2.0)),
    (
        "simnpo",
        {"beta": 3.0, "gamma": 0.5, "retain_weight": 0.5},
        "SimNPO(beta=3, gamma=0.5)",
        Weighted(0.5),
    ),
    ("idk-dpo", {"beta": 0.2}, "DPO(beta=0.2)", Weighted(1.0)),
    ("ga-gd", {"retain_weight": 3.0}, ASCENT, Weighted(3.0)),
    ("ga-gd-general", {"retain_weight": 3.0}, ASCENT, Weighted(3.0)),
    ("ga-kl", {"retain_weight": 3.0}, ASCENT, Weighted(3.0)),
    ("ga-kl-general", {"retain_weight": 3.0}, ASCENT, Weighted(3.0)),
    ("datamodel-matching", {"retain_weight": 0.1}, "KL(predicted || model)", Weighted(0.1)),
    ("ngdiff", {}, ASCENT, Normalised()),
    ("l1-sparse", {"penalty": 0.1}, None, Sparse(0.1)),
]


@pytest.mark.parametrize(
    ("name", "numbers", "forget", "combine"), NUMBERS, ids=[row[0] for row in NUMBERS]
)
def test_a_methods_numbers_reach_its_parts(name, numbers, forget, combine):
    method = method_of(name, **numbers)
    assert method.combine == combine
    assert method.describe()["forget"] == forget
    assert method.needs_retain


def test_numbers_of_the_finishes_reach_them():
    assert method_of("task-arithmetic", scale=2.5).finish == Negated(2.5)
    assert method_of("task-arithmetic").finish == Negated(None)
    assert method_of("control", bar=0.8).finish == Controlled(0.8)
    assert (
        method_of("task-arithmetic", scale=2.5).describe()["finish"]
        == "before - 2.5 (after - before)"
    )
    assert "0.8" in method_of("control", bar=0.8).describe()["finish"]


@pytest.mark.parametrize("name", ["npo", "simnpo", "idk-dpo"])
def test_without_a_retain_weight_no_retained_row_is_needed(name):
    method = method_of(name, retain_weight=0)
    assert not method.needs_retain
    assert method.cost[1] == 0
    assert "retain" not in method.describe()["combine"]  # there is none in the sum


def test_a_method_without_terms_is_refused():
    with pytest.raises(InputError, match="method 'empty' has neither a forget nor a retain term"):
        Method("empty")


# ---- what they cost, and whether they do what they say -------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = build_model("gpt2", layers=1)
    return fit_end(model, examples(12), directory=tmp_path_factory.mktemp("methods") / "run")


FORGET, KEPT, STEPS = 4, 4, EVERY + 1


class Counted:
    """Rows that really went through the model by the end of each step, with and without a graph."""

    def __init__(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = {True: 0, False: 0}
        self.after: list[dict[bool, int]] = []
        self.adapters: list[set[str]] = []
        self.active: set[str] = set()
        self.handle = run.model.model.get_base_model().register_forward_pre_hook(
            self._seen, with_kwargs=True
        )
        self.site = run.model.sites[0].layer
        log_entry = loop.log_entry

        def noted(*arguments: Any) -> Any:
            self.after.append(dict(self.rows))
            self.adapters.append(set(self.active))
            return log_entry(*arguments)

        monkeypatch.setattr(loop, "log_entry", noted)

    def _seen(self, _: Any, __: Any, given: dict[str, Any]) -> None:
        self.rows[torch.is_grad_enabled()] += len(given["input_ids"])
        self.active.add(self.site.active_adapters[0])


@pytest.mark.parametrize("name", METHODS)
def test_needs_and_cost_are_what_the_loop_really_does(run, name, monkeypatch):
    """Ten steps after the first (which asks once for what is kept). GeN looks once in ten."""
    counted = Counted(run, monkeypatch)
    options = {
        "until": f"steps={STEPS}",
        "batch_size": FORGET,
        "retain_batch_size": KEPT,
        "lr": 1e-4,
    }
    options |= {"lr": "auto"} if name == "ngdiff" else {}
    try:
        edit = unlearn.train(run, name, [f"r0-{i}" for i in (0, 3, 5, 8)], **options)
    finally:
        counted.handle.remove()
    method, first, last = METHODS[name](), counted.after[0], counted.after[-1]
    assert len(counted.after) == STEPS
    done = {graph: (last[graph] - first[graph]) / (STEPS - 1) for graph in (True, False)}
    forget, retain = method.cost
    sides = FORGET * forget + KEPT * retain
    assert done[True] + done[False] / 3 == pytest.approx(sides, rel=1e-9)
    whole = (FORGET * (2 if name == "idk-dpo" else 1) if method.forget else 0) + (
        KEPT if method.needs_retain else 0
    )
    assert done[True] == whole  # with backward
    assert edit.log[-1]["row_gradients"] - edit.log[0]["row_gradients"] == pytest.approx(
        sides * (STEPS - 1), rel=1e-9
    )
    assert ("before-unlearning" in counted.adapters[-1]) == method.needs_reference
    assert (edit.log[0]["retain_rows"] > 0) == method.needs_retain
    assert (edit.log[0]["forget_rows"] > 0) == (method.forget is not None)
    assert edit.report["cost"]["row_gradients"] >= whole * STEPS


def test_gens_looks_are_in_the_cost():
    """ngdiff runs its retained rows forward at `POINTS` once every `EVERY` steps.

    Each counts a third.
    """
    assert METHODS["ngdiff"]().cost == (1.0, 1 + len(POINTS) / EVERY / 3)
    assert METHODS["ga-gd"]().cost == (1.0, 1.0)
    assert METHODS["ga-kl"]().cost == (1.0, 4 / 3)
    assert METHODS["idk-dpo"]().cost == (2.0, 1.0)
    assert METHODS["l1-sparse"]().cost == (0.0, 1.0)


def test_a_target_need_not_be_a_function(run):
    """`functools.partial` and frozen dataclasses are how parts with numbers are made here."""

    class Mine:
        def __call__(self, setup: targets.Setup) -> targets.Target:
            return targets.random(setup)

    ids, options = ["r0-0", "r0-3"], {"until": "steps=1", "lr": 1e-3}
    for make in (partial(targets.random), Mine()):
        method = Method("mine", forget=terms.descent, target=make)
        json.dumps(method.describe())
        edit = unlearn.train(run, method, ids, **options)
        assert torch.equal(edit.delta, unlearn.train(run, "random-labels", ids, **options).delta)


def test_any_method_can_be_controlled():
    for name in METHODS:
        method = METHODS[name]()
        made = controlled(method, 0.8)
        assert made.finish == Controlled(0.8, method.finish)
        assert replace(made, finish=method.finish, source=method.source) == method
        assert method.source in made.source
        assert made.source.count("2406.09179") >= 1
        assert json.loads(json.dumps(made.describe())) == made.describe()
    assert METHODS["control"]().source.count("2406.09179") == 1
    bare = controlled(Method("mine", forget=terms.ascent))
    assert bare.source == "Wang et al. 2024, arXiv 2406.09179"


# ---- names and files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_found_by_its_name(name):
    assert method_of(name).describe() == METHODS[name]().describe()


def test_a_method_is_itself():
    method = methods.ga()
    assert method_of(method) is method
    with pytest.raises(InputError, match="method ga has no number called beta: it has none"):
        method_of(method, beta=1.0)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("npoo", "npo"),
        ("gagd", "ga-gd"),
        ("task_arithmetic", "task-arithmetic"),
        ("random-label", "random-labels"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, hint):
    with pytest.raises(InputError) as error:
        method_of(name)
    text = str(error.value)
    assert (
        f"method {name!r} was given (did you mean {hint}?); expected one of ga, random-labels,"
        in text
    )
    assert all(method in text for method in METHODS)
    assert "FILE.py:NAME" in text


def test_names_that_are_like_none_get_no_hint():
    with pytest.raises(InputError, match="method 'zzz' was given; expected one of"):
        method_of("zzz")


def test_unknown_numbers_are_refused_with_those_there_are():
    with pytest.raises(
        InputError, match="method npo has no number called beeta: expected beta, retain_weight"
    ):
        method_of("npo", beeta=1.0)
    with pytest.raises(InputError, match="method ga has no number called beta, gamma: it has none"):
        method_of("ga", beta=1.0, gamma=2.0)


IMPOSSIBLE = [
    ("npo", "beta", 0.0),
    ("simnpo", "beta", 0.0),
    ("idk-dpo", "beta", -1.0),
    ("npo", "beta", float("nan")),
]


@pytest.mark.parametrize(("name", "number", "value"), IMPOSSIBLE)
def test_impossible_numbers_are_refused_before_any_work(name, number, value):
    """beta = 0 divides by zero in the first step.

    A negative one turns the term round, and it has no bound.
    """
    with pytest.raises(InputError, match=number):
        method_of(name, **{number: value})


def write(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


PLAIN = """
from unlearn import Method
from unlearn.terms import ascent, descent

MINE = Method("mine", forget=ascent, lr=0.25)
NUMBER = 3


def made(share=0.5):
    return Method(f"made-{share:g}", forget=ascent, retain=descent)


def wrong():
    return 3
"""


def test_a_method_of_ones_own_file(tmp_path):
    path = write(tmp_path, PLAIN)
    assert method_of(f"{path}:MINE").name == "mine"
    assert method_of(f"{path}:MINE").lr == 0.25
    assert method_of(f"{path}:made").name == "made-0.5"
    assert method_of(f"{path}:made", share=0.75).name == "made-0.75"
    with pytest.raises(InputError, match="has no number called part: expected share"):
        method_of(f"{path}:made", part=1.0)
    with pytest.raises(InputError, match="has no number called share: it has none"):
        method_of(f"{path}:MINE", share=1.0)


def test_a_file_without_that_method_is_refused(tmp_path):
    path = write(tmp_path, PLAIN)
    for name in ("YOURS", "NUMBER"):
        with pytest.raises(
            InputError, match=f"has no method '{name}': expected an unlearn.Method, or a function"
        ):
            method_of(f"{path}:{name}")
    with pytest.raises(InputError, match=r"there is no file .*nowhere\.py: give FILE\.py:NAME"):
        method_of(f"{tmp_path}/nowhere.py:MINE")


def test_a_function_that_makes_no_method_is_refused(tmp_path):
    path = write(tmp_path, PLAIN)
    with pytest.raises(InputError, match="wrong"):
        method_of(f"{path}:wrong")


def test_a_file_may_hold_dataclasses_in_the_style_of_this_project(tmp_path):
    """With annotations as strings, `dataclass` looks its own module up by name: it must be known by
    then.
    """
    path = write(
        tmp_path,
        """
from __future__ import annotations

from dataclasses import dataclass

from unlearn import Method
from unlearn.terms import ascent


@dataclass(frozen=True)
class Part:
    share: float = 0.5

    def __call__(self, forget, retain, step):
        return self.share * forget


MINE = Method("mine", forget=ascent, combine=Part())
""",
    )
    method = method_of(f"{path}:MINE")
    combined = method.combine(torch.ones(2), None, None)  # type: ignore[arg-type]
    assert combined.tolist() == [0.5, 0.5]
