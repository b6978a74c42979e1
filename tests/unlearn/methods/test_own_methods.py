"""Methods of one's own: one file, with parts of any kind, is all that one needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import unlearn
from influence.errors import InputError, MismatchError
from tests.unlearn.methods.helpers import (
    FORGET,
    KEPT,
    RECIPE,
    Oracle,
    RowCounter,
    close,
    train,
)
from unlearn.methods import loop, targets, terms
from unlearn.methods.methods import Method
from unlearn.methods.targets import Target, TargetRule
from unlearn.methods.terms import Term, descent


def test_a_method_of_ones_own(run):
    """Any composition runs: a capped ascent, with a retain gradient that grows over the steps."""
    capped = Term("capped", lambda part: -part.losses.clamp(max=3.0))

    def combine(forget, retain, step):
        return forget + (1 + step.number / step.steps) * retain

    edit = train(run, Method("mine", forget=capped, retain=descent, combine=combine, lr=0.02))
    oracle = Oracle(run)

    def direction(k, _):
        losses = torch.cat([oracle.losses(id) for id in FORGET]).clamp(max=3.0)
        return oracle.gradient(-losses.mean()) + (1 + k / 3) * oracle.gradient(oracle.descent(KEPT))

    close(edit.theta, oracle.walk(direction, 3, lr=0.02))
    assert edit.report["method"]["name"] == "mine"


@dataclass(frozen=True)
class Shifted:
    """A target that is a value, as the package's own parts are."""

    by: int = 1

    def __call__(self, setup) -> Target:
        counts = setup.tokens.counts
        return Target(labels=[torch.full((int(count),), self.by) for count in counts])


def test_a_target_may_be_a_value(run):
    method = Method("mine", forget=descent, target=Shifted(3), lr=0.02)
    assert train(run, method).delta.any()


@pytest.mark.parametrize(
    "values",
    [lambda part: part.losses[:-1], lambda part: part.losses.sum(), lambda part: part.logits],
)
def test_a_term_of_the_wrong_shape_is_told(run, values):
    with pytest.raises(
        InputError, match=r"the term odd gave values of shape .*; expected \[\d+\], one per token"
    ):
        train(run, Method("mine", forget=Term("odd", values)))


def test_a_term_that_asks_for_nothing_it_said_is_served_all_the_same(run):
    """`reference` tells the cost, but the adapter before is there for every term."""
    quiet = Term("quiet", lambda part: part.reference_losses - part.losses)
    assert (
        float((train(run, Method("mine", forget=quiet)).delta - train(run, "ga").delta).norm())
        < 1e-12
    )


# ---- one file with a method that the package knows nothing of ------------------------------------

#: All four parts are its own; the target asks the adapter before for its losses.
MINE = '''"""Ascent on the tokens that the adapter is surest of, half of the move taken back."""

from dataclasses import dataclass
from functools import partial

import torch

from unlearn import Method, Term, terms
from unlearn.methods import Target, TargetRule


@partial(TargetRule, reference=True)
def surest(setup):
    """Every token the row's own, or word 3 where the adapter before gives its own little chance."""
    labels = []
    for row in range(len(setup.tokens)):
        (losses,) = setup.reference.losses(setup.tokens, [row])
        item = setup.tokens[row]
        true = torch.as_tensor(item.input_ids)[torch.as_tensor(item.supervised)]
        labels.append(torch.where(losses.cpu() > 3.0, 3, true))
    return Target(labels=labels)


@dataclass(frozen=True)
class Falling:
    """Both gradients, the forget term's weight falling over the steps."""

    first: float = 2.0

    def __call__(self, forget, retain, step):
        return self.first * (1 - step.number / step.steps) * forget + retain


def half(trained):
    """Half of the way."""
    return trained.at(0.5)


def method(power: float = 2.0) -> Method:
    term = Term("power", lambda part: -(part.losses**power))
    return Method(
        "half-surest", forget=term, retain=terms.descent, target=surest, combine=Falling(),
        finish=half, lr=0.02, until="steps=6",
    )
'''


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path / 'mine.py'}:method"


def half_surest(run) -> torch.Tensor:
    """The same by plain torch: three forget rows and nine retained rows in each of six steps."""
    oracle = Oracle(run)
    start, labels = oracle.theta(), {}
    for id in FORGET:
        true = oracle.labels(id)
        rare = oracle.losses(id, oracle.before[id]) > 3.0
        labels[id] = torch.where(rare, 3, true)
    assert any(bool((labels[id] != oracle.labels(id)).any()) for id in FORGET)

    def direction(k, _):
        logs = [-oracle.logs(id).gather(1, labels[id][:, None])[:, 0] for id in FORGET]
        forget = oracle.gradient(-(torch.cat(logs) ** 2).mean())
        return 2.0 * (1 - k / 6) * forget + oracle.gradient(oracle.descent(KEPT))

    return start + 0.5 * (oracle.walk(direction, 6, lr=0.02) - start)


def test_a_method_in_a_file_of_its_own_is_run_resumed_saved_and_verified(
    run, mine, tmp_path, monkeypatch
):
    expected = half_surest(run)
    take_step, steps_begun = loop.take_step, []

    def killed(*arguments):
        steps_begun.append(1)
        if len(steps_begun) == 5:
            raise KeyboardInterrupt
        return take_step(*arguments)

    options = {"checkpoint": tmp_path / "state", "save_every": 2}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", killed)
        with pytest.raises(KeyboardInterrupt):
            unlearn.train(run, mine, FORGET, **options)
        edit = unlearn.train(run, mine, FORGET, **options)
    assert len(steps_begun) == 5 + 2  # the last two of six, after the four that were saved
    close(edit.theta, expected)
    method = edit.report["method"]
    assert (method["name"], method["targets"]) == ("half-surest", "surest")
    assert (method["forget"], method["finish"]) == ("power", "half")
    assert method["kept"] == pytest.approx(0.5, rel=1e-12)
    assert method["needs_reference"]
    edit.save(tmp_path / "out")
    assert unlearn.verify(run.directory, apply=True).passed


def test_a_method_of_its_own_is_refused_its_state_where_its_file_changed(run, mine, tmp_path):
    """The file's digest is part of the method's source, so that a state is of one text alone."""
    options = {"checkpoint": tmp_path / "state", "save_every": 2}
    unlearn.train(run, mine, FORGET, **options)
    file = tmp_path / "mine.py"
    file.write_text(
        file.read_text()
        .replace("2.0 *", "2.5 *")
        .replace("first: float = 2.0", "first: float = 3.0")
    )
    with pytest.raises(MismatchError, match=r"holds another training: it differs in source"):
        unlearn.train(run, mine, FORGET, **options)


# ---- targets that say what they need -------------------------------------------------------------


def test_a_target_says_whether_it_needs_the_adapter_before():
    plain = Method("mine", forget=descent, target=lambda setup: Target())
    assert not plain.needs_reference
    asking = replace(plain, target=TargetRule(plain.target, reference=True))
    assert asking.needs_reference
    assert asking.describe()["needs_reference"] is True


def test_a_target_says_that_its_rows_are_run_twice():
    """A second completion costs a second gradient. Its name in the table is the function's."""

    def twice(setup):
        return Target(other=setup.tokens)

    method = Method("mine", forget=terms.dpo(), target=TargetRule(twice, paired=True))
    assert method.cost == (2.0, 0.0)
    assert method.describe()["targets"] == "twice"
    assert replace(method, target=twice).cost == (1.0, 0.0)


def test_a_target_says_that_it_needs_the_expected_losses(run):
    """They are then on record, though the stopping rule asks for none."""
    rule = TargetRule(targets.predicted.make, expected=True)
    method = Method("mine", forget=terms.matching, target=rule, lr=0.01)
    record = train(run, method, recipe=RECIPE).record
    built_in = train(run, replace(method, target=targets.predicted), recipe=RECIPE).record
    assert record.expected == built_in.expected
    assert record.expected.recipe == RECIPE.as_json()
    assert all(row.low < row.high for row in record.rows)
    # served all the same, but not recorded
    quiet = train(run, replace(method, target=rule.make), recipe=RECIPE).record
    assert quiet.expected is None
    assert all(row.low is None and row.high is None for row in quiet.rows)
    assert quiet.delta == record.delta
    assert quiet.cost.row_gradients == record.cost.row_gradients


def test_a_target_refuses_rows_before_any_work(run, monkeypatch):
    def no_first_row(rows):
        if any(row.id == "r0-1" for row in rows):
            raise InputError("not this one")

    rule = TargetRule(lambda setup: Target(), refuse=no_first_row)
    method = Method("mine", forget=descent, target=rule, lr=0.01)
    counter = RowCounter(run.model)
    with pytest.raises(InputError, match="not this one"):
        train(run, method)
    assert counter.rows == 0
    counter.handle.remove()
    assert train(run, method, ["r0-4"]).delta.any()
