"""Edits as a whole: the walk and its stopping rules, what they leave untouched, what is saved, and edits after edits."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import influence
import unlearn
from influence.adapter import weight_key
from influence.cost import Cost
from influence.errors import (
    InputError,
    MismatchError,
    NumericalError,
    StoreError,
    ToolkitError,
    WorkError,
)
from influence.loss import mean_losses
from influence.rows import read_examples
from influence.run import Run
from influence.solvers import CG
from influence.tokens import tokenize
from tests.conftest import rows
from tests.influence.test_adapter import save
from tests.influence.test_cli import write_rows
from tests.influence.test_store import contents, untouched
from unlearn import stopping
from unlearn.edits import closed_form, goals, steps
from unlearn.edits.goals import Goals
from unlearn.edits.steps import Rest, walk
from unlearn.record import chain, sample
from unlearn.record import save as saving
from unlearn.record.losses import measure
from unlearn.record.version import version
from unlearn.stopping import Until

ANSWERS = {"r0-2": " warm songs at dawn", "r0-5": " birds sing loud"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with base, adapter, train.jsonl and run, as a user has them; the model, once loaded."""
    at = tmp_path_factory.mktemp("edits")
    base, adapter = save(at, "gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])
    model = influence.load(base, adapter, device="cpu")
    train = read_examples(write_rows(at / "train.jsonl", rows(12)))
    influence.fit(model, train, directory=at / "run")
    return at, model


@pytest.fixture
def run(made, tmp_path):
    """A run of its own to edit."""
    at, model = made
    shutil.copytree(at / "run", tmp_path / "run")
    return Run.open(tmp_path / "run", model=model)


def options_of(**options):
    """Enough steps for these tests, no guard, unless told otherwise."""
    return {"steps": 6, "rest": 4, "max_damage": 1e6} | options


def edit_of(run, **options):
    asked = {key: options.pop(key) for key in ("remove", "relabel", "correct") if key in options}
    return unlearn.edit(run, **(asked or {"remove": ["r0-0", "r0-3"]}), **options_of(**options))


# ---- the walk ------------------------------------------------------------------------------------------------


def test_steps_asked_for_are_steps_taken(run):
    for count in (2, 3):
        found = edit_of(run, until=f"steps={count}", steps=40)
        assert [step["step"] for step in found.report["steps"]] == list(range(1, count + 1))
        assert found.report["stopped"] == f"{count} steps were taken, as asked"
        assert found.report["method"]["until"] == f"steps={count}"
        assert found.report["reached"]


def test_a_move_of_the_asked_length_has_exactly_that_length(run):
    for length in (0.01, 0.3):
        found = edit_of(run, until=f"norm={length}", steps=40)
        assert float(found.delta.double().norm()) == pytest.approx(length, rel=1e-5)
        assert found.report["reached"]
        assert f"the move has the length {length:g}" in found.report["stopped"]


def test_a_loss_asked_for_is_reached_and_measured_afterwards(run):
    ids = ["r0-0", "r0-3"]
    start = edit_of(run, until="steps=1", steps=40).report["losses"]["edited"]["before"]
    found = edit_of(run, remove=ids, until=f"loss={start + 0.3}", steps=60)
    losses = found.report["losses"]["edited"]
    assert found.report["reached"]
    assert losses["target"] == pytest.approx(start + 0.3)
    assert losses["after"] > start + 0.3 - 1.01 * stopping.NEAR * (start + 0.3)
    with run.model.at(found.theta):
        tokens = run.tokens.select([run.train.index(id) for id in ids])
        own = mean_losses(run.model, tokens)
    assert losses["after"] == pytest.approx(own.mean(), rel=1e-6)
    assert [row["after"] for row in found.report["rows"]] == pytest.approx(own.tolist(), rel=1e-6)


def test_expected_edits_end_at_their_goals_or_say_that_they_did_not(run):
    found = edit_of(run, relabel=ANSWERS, remove=["r0-1"], steps=40)
    text = found.report["stopped"]
    assert found.report["reached"] == ("rose to" in text or "at its goal already" in text)
    assert found.report["kind"] == "mixed"
    for row in found.report["rows"]:
        assert ("old_after" in row) == (row["action"] != "remove")
    short = edit_of(run, remove=["r0-1"], until="loss=30", steps=2)
    assert not short.report["reached"]
    assert short.report["stopped"] == "2 steps were not enough: raise --steps"


def test_rows_at_their_goal_are_left_alone(run, monkeypatch):
    seen = []
    monkeypatch.setattr(closed_form, "walk", lambda *a, **k: (seen.append(a[2]), walk(*a, **k))[1])
    tokens = run.tokens.select([0, 3])
    low, high = sorted(zip(mean_losses(run.model, tokens), ["r0-0", "r0-3"], strict=True))
    target = (low[0] + high[0]) / 2
    edit_of(run, remove=["r0-0", "r0-3"], until=f"loss={target}", steps=2)
    assert seen[0].tokens.ids == [low[1]]
    found = edit_of(run, remove=["r0-0", "r0-3"], until=f"loss={low[0] / 2}", steps=2)
    assert len(seen[1].tokens) == 0
    assert not found.delta.any()
    assert (
        found.report["stopped"] == "every row was at its goal already: the adapter stays as it is"
    )


def one_goal(run):
    start = version(run)
    tokens = start.tokens.select([0])
    target = mean_losses(run.model, tokens) + 1
    goals = Goals(tokens, target, np.array([True]), np.array([False]))
    return start, goals, Rest(start.tokens.select([1, 2]), 0, 0, 0.1)


def test_steps_that_raise_m_are_taken_back(run):
    """A preconditioner that turns the direction nearly across the gradient makes the forecast step far too long."""
    start, goals, rest = one_goal(run)
    across = torch.randn(start.theta.shape, generator=torch.Generator().manual_seed(0))

    def precondition(v):
        own = across - (across @ v) / (v @ v) * v
        return own / own.norm() + 1e-6 * v / v.norm()

    found = walk(
        run.model,
        start.theta,
        goals,
        rest,
        precondition,
        until=Until("expected"),
        steps=40,
        token_budget=200,
        cost=Cost(),
    )
    assert torch.equal(found.theta, start.theta)
    assert not found.reached
    assert [step.accepted for step in found.steps] == [False] * steps.RETRIES
    assert all(step.measured <= 0 for step in found.steps)
    lengths = [step.length for step in found.steps]
    np.testing.assert_allclose(np.array(lengths[1:]) / lengths[:-1], 0.4, rtol=1e-6)
    assert found.stopped == "6 steps in a row made things worse and were taken back"


def test_accepted_steps_lower_m_and_stay_in_their_radius(run):
    start, goals, rest = one_goal(run)
    found = walk(
        run.model,
        start.theta,
        goals,
        rest,
        lambda v: v,
        until=Until(),
        steps=60,
        token_budget=200,
        cost=Cost(),
    )
    assert found.reached
    theta, merits = start.theta, []
    assert all(
        step.radius is None or step.length <= step.radius * (1 + 1e-9) for step in found.steps
    )
    with run.model.at(theta):
        merits.append(goals.pull(run.model, token_budget=200, cost=Cost()).merit)
    with run.model.at(found.theta):
        merits.append(goals.pull(run.model, token_budget=200, cost=Cost()).merit)
    fallen = sum(step.measured for step in found.steps if step.accepted)
    assert merits[0] - merits[1] == pytest.approx(fallen, rel=1e-4)
    assert all(step.measured > 0 for step in found.steps if step.accepted)
    assert all(step.predicted <= steps.STRIDE * merits[0] * (1 + 1e-6) for step in found.steps)


def test_without_rest_only_the_changed_rows_are_run(run):
    found = edit_of(run, rest=0, until="steps=3", steps=40)
    assert all(step["damage"] is None for step in found.report["steps"])
    more = edit_of(run, rest=4, until="steps=3", steps=40)
    assert all(step["damage"] is not None for step in more.report["steps"])
    assert more.report["cost"]["row_gradients"] == found.report["cost"]["row_gradients"] + 3 * 4


def test_the_same_seed_gives_the_same_edit_bit_for_bit(run):
    one, two, other = (edit_of(run, until="steps=3", steps=40, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.delta, two.delta)
    assert not torch.equal(one.delta, other.delta)
    differing = {key for key in one.report if one.report[key] != two.report[key]}
    assert differing <= {"created", "cost"}
    assert {k for k, v in one.report["cost"].items() if v != two.report["cost"][k]} <= {
        "seconds",
        "ratio",
    }


class Counter:
    """Rows that the model runs forward, by a hook on its own forward."""

    def __init__(self, model):
        self.rows = 0
        self.handle = model.model.get_base_model().register_forward_pre_hook(
            self.count, with_kwargs=True
        )

    def count(self, _module, args, kwargs):
        self.rows += len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"until": "steps=3", "steps": 40},
        {"until": "steps=2", "steps": 40, "rest": 0, "relabel": ANSWERS, "remove": ["r0-1"]},
        {"steps": 1, "curvature": "identity"},
    ],
)
@pytest.mark.parametrize("with_holdout", [False, True])
def test_the_cost_is_the_rows_that_were_run(run, options, with_holdout):
    holdout = influence.examples_from_rows(rows(5, seed=9)) if with_holdout else None
    run.points  # noqa: B018
    counter = Counter(run.model)
    try:
        found = edit_of(run, holdout=holdout, **options)
    finally:
        counter.handle.remove()
    cost = found.report["cost"]
    assert cost["row_gradients"] + cost["row_forwards"] == counter.rows
    assert cost["total"] == pytest.approx(cost["row_gradients"] + cost["row_forwards"] / 3)


def test_the_cost_counts_the_products_of_a_matrix_free_curvature(run):
    counter = Counter(run.model)
    try:
        found = edit_of(
            run, steps=1, curvature="ggn", at="0.8", damping="abs:1", solver=CG(tolerance=1e-2)
        )
    finally:
        counter.handle.remove()
    cost = found.report["cost"]
    assert cost["row_gradients"] + cost["row_forwards"] >= counter.rows


def state_of(model):
    flags = [(name, p.requires_grad) for name, p in model.model.named_parameters()]
    return model.snapshot(), flags, [module.training for module in model.model.modules()]


def assert_same(before, after):
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("options", [{"steps": 1}, {"until": "steps=2", "steps": 40}])
def test_the_model_is_as_before_after_an_edit(run, options):
    run.model.model.train()
    next(iter(run.model.parameters)).requires_grad_(True)
    try:
        before = state_of(run.model)
        found = edit_of(run, **options)
        assert_same(before, state_of(run.model))
        assert found.delta.any()
    finally:
        run.model.model.eval()
        next(iter(run.model.parameters)).requires_grad_(False)


@pytest.mark.parametrize("broken", ["pull", "solve", "forecast"])
def test_the_model_is_as_before_after_an_exception(run, monkeypatch, broken):
    def fail(*_arguments, **_options):
        raise NumericalError("broken on purpose")

    if broken == "pull":
        monkeypatch.setattr(goals, "loss_gradient", fail)
    else:
        monkeypatch.setattr(closed_form._Work, broken, fail)
    before = state_of(run.model)
    with untouched(run.directory), pytest.raises(NumericalError, match="on purpose"):
        edit_of(run)
    assert_same(before, state_of(run.model))


def test_a_forecast_tells_what_the_one_shot_edit_predicts_and_writes_nothing(run):
    with untouched(run.directory):
        before = state_of(run.model)
        found = unlearn.forecast(run, remove=["r0-0", "r0-3"], steps=1)
        assert_same(before, state_of(run.model))
        made = edit_of(run, steps=1)
    assert found["losses"]["edited"]["linear"] == pytest.approx(
        made.report["losses"]["edited"]["predicted"], rel=1e-6
    )
    assert found["losses"]["edited"]["before"] == made.report["losses"]["edited"]["before"]
    assert found["requests"] == made.report["requests"]
    assert all(row["after"] is None for row in found["rows"])
    json.dumps(found)


def test_a_small_linear_edit_is_forecast_to_first_order(run):
    """The predicted loss is the measured one, up to a square of the move."""
    found = edit_of(run, steps=1, damping="abs:30")
    losses = found.report["losses"]["edited"]
    moved = losses["after"] - losses["before"]
    assert losses["predicted"] - losses["before"] == pytest.approx(moved, rel=0.1)
    assert moved > 0


def test_all_rows_relabelled_leaves_no_retained_row_and_still_works(run):
    found = unlearn.relabel(run, {id: " at dawn the" for id in run.train.ids}, steps=2)
    assert found.report["losses"]["retained"]["rows"] == 0
    assert found.report["guard"]["damage"] is None
    assert found.passed
    before = np.mean(
        [row["old_before"] for row in found.report["rows"]]
    )  # there is no retained row to be like
    assert [row["target"] for row in found.report["rows"]] == pytest.approx([before] * 12, rel=1e-6)
    assert found.report["data"]["rows_after"] == 12


# ---- saving --------------------------------------------------------------------------------------------------


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}


def test_a_saved_edit_is_an_adapter_that_peft_loads_and_merges(run, made, tmp_path):
    at, model = made
    inputs = [at / "base", at / "adapter"]
    before = [hashes(folder) for folder in inputs]
    found = edit_of(run, relabel=ANSWERS, remove=["r0-1"])
    out = found.save(tmp_path / "out")
    assert [hashes(folder) for folder in inputs] == before
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(at / "base", dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, str(out)).eval()
        ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
        with torch.no_grad():
            plain = loaded(input_ids=ids).logits
            merged = loaded.merge_and_unload()(input_ids=ids).logits
            with model.at(found.theta):
                expected = model.model(input_ids=ids).logits
            assert not torch.allclose(expected, model.model(input_ids=ids).logits, atol=1e-4)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    again = influence.load(at / "base", out, device="cpu")
    assert again.adapter_digest == found.report["adapter"]["after"]["digest"]
    assert torch.equal(again.snapshot(), found.theta)


def test_old_plus_delta_is_new_bit_for_bit(run, made, tmp_path):
    found = edit_of(run)
    out = found.save(tmp_path / "out")
    old, delta, new = (
        load_file(folder / name)
        for folder, name in (
            (made[0] / "adapter", "adapter_model.safetensors"),
            (out, "delta.safetensors"),
            (out, "adapter_model.safetensors"),
        )
    )
    assert (
        old.keys()
        == delta.keys()
        == new.keys()
        == {weight_key(leaf) for leaf in run.model.space.leaves}
    )
    for key in old:
        assert torch.equal(old[key] + delta[key], new[key])
        assert delta[key].any()
    assert unlearn.verify(run.directory, apply=True).passed


KEYS = [
    "format",
    "kind",
    "created",
    "versions",
    "run",
    "base",
    "adapter",
    "data",
    "tokenizer",
    "requests",
    "method",
    "residual",
    "stopped",
    "steps",
    "delta",
    "losses",
    "rows",
    "comparable",
    "guard",
    "cost",
    "agreement",
    "files",
]
PARTS = {
    "run": "path digest",
    "base": "path digest",
    "adapter": "before after",
    "data": "before after rows_before rows_after",
    "method": "name curvature geometry damping points lambda solver steps until seed",
    "residual": "solver tolerance objective",
    "delta": "norm relative",
    "losses": "edited retained heldout",
    "guard": "max_damage damage passed forced",
    "cost": "row_gradients row_forwards total seconds retraining ratio",
    "comparable": "source rows",
}
LOSSES = {
    "edited": "rows before after target predicted",
    "retained": "rows before after change standard_error",
    "heldout": "rows before after source",
}


def test_the_record_has_every_key_that_is_promised(run, tmp_path):
    holdout = read_examples(write_rows(tmp_path / "heldout.jsonl", rows(5, seed=9)))
    found = edit_of(run, relabel=ANSWERS, remove=["r0-1"], holdout=holdout)
    out = found.save(tmp_path / "out")
    record = json.loads(
        (out / "edit.json").read_text(encoding="utf-8"),
        parse_constant=lambda name: pytest.fail(name),
    )
    assert set(KEYS) <= set(record)
    for key, names in PARTS.items():
        assert set(names.split()) <= set(record[key]), key
    for key, names in LOSSES.items():
        assert set(names.split()) <= set(record["losses"][key]), key
    step = "step length radius predicted measured accepted forget"
    assert all(set(step.split()) <= set(own) for own in record["steps"])
    row = "id action before after target base extraction_before extraction_after rank"
    assert all(set(row.split()) <= set(own) for own in record["rows"])
    assert [own["id"] for own in record["rows"]] == ["r0-1", "r0-2", "r0-5"]
    assert all(0 <= own["rank"] <= 1 for own in record["rows"])
    assert all({"old_before", "old_after"} <= set(own) for own in record["rows"][1:])
    assert record["losses"]["heldout"]["source"] == str(tmp_path / "heldout.jsonl")
    assert record["data"]["rows_before"] - record["data"]["rows_after"] == 1
    files = {name: value for name, value in hashes(out).items() if name != "edit.json"}
    assert record["files"] == files
    assert "changed_rows.jsonl" in files
    assert record["run"]["digest"] == run.digest


def test_the_steps_of_a_record_have_the_retained_loss(run):
    assert all("retained" in step for step in edit_of(run).report["steps"])


def test_changed_rows_are_kept_and_removed_ones_are_not(run, tmp_path):
    gone = run.train[1]
    found = edit_of(run, relabel=ANSWERS, remove=["r0-1"], correct={"r0-7": {"prompt": "old cats"}})
    out = found.save(tmp_path / "out")
    for name, data in contents(out).items():
        for text in (gone.prompt + gone.completion, json.dumps(gone.prompt)[1:-1] + '"'):
            assert text.encode() not in data, name
    again = read_examples(out / "changed_rows.jsonl")
    assert again.ids == ["r0-2", "r0-5", "r0-7"]
    assert [row.content_hash for row in again] == [
        request["content_after"]
        for request in found.report["requests"]
        if request["action"] != "remove"
    ]
    assert again[0].completion == ANSWERS["r0-2"]
    assert (again[2].prompt, again[2].completion) == ("old cats", run.train[7].completion)
    later = edit_of(run, remove=["r0-9"]).save(
        tmp_path / "second"
    )  # tells all rows that are changed by then
    assert read_examples(later / "changed_rows.jsonl").ids == ["r0-2", "r0-5", "r0-7"]
    only = edit_of(run, remove=["r0-9"], start="original").save(tmp_path / "third")
    assert not (only / "changed_rows.jsonl").exists()


def test_the_folders_of_earlier_edits_may_go(run, tmp_path):
    """Erasure must not be held up by the record: a row relabelled first and removed later is nowhere after that."""
    first = edit_of(run, relabel=ANSWERS).save(tmp_path / "first")
    second = edit_of(run, remove=["r0-2"]).save(tmp_path / "second")
    shutil.rmtree(first)
    now = version(run)
    assert now.removed == {"r0-2"}
    assert now.changed == set(ANSWERS) - {"r0-2"}
    assert now.path == str(second)
    assert all(ANSWERS["r0-2"].encode() not in data for data in contents(second).values())
    edit_of(run, remove=["r0-9"]).save(tmp_path / "third")
    assert any("first" in problem for problem in unlearn.verify(run.directory).problems)


def test_two_edits_from_one_start_do_not_undo_one_another(run, tmp_path):
    one, other = edit_of(run, remove=["r0-1"]), edit_of(run, remove=["r0-2"])
    one.save(tmp_path / "one")
    with (
        untouched(tmp_path),
        pytest.raises(MismatchError, match=r"another edit was saved .* while this one was made"),
    ):
        other.save(tmp_path / "other")
    assert version(run).removed == {"r0-1"}
    edit_of(run, remove=["r0-2"], start="original").save(tmp_path / "branch")  # asked for
    assert unlearn.verify(run.directory, apply=True).passed


def test_recorded_edits_and_the_rows_are_never_overwritten(run, tmp_path):
    at = tmp_path / "edits"
    edit_of(run, remove=["r0-1"]).save(at / "one")
    again = edit_of(run, remove=["r0-2"])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    for place, sentence in (
        (at, "holds, or lies in"),
        (at / "one" / "in", "holds, or lies in"),
        (tmp_path / "notes", "other"),
    ):
        with untouched(tmp_path), pytest.raises(InputError, match=sentence):
            again.save(place, overwrite=True)


def test_a_manifest_that_knows_an_edit_the_chain_does_not_is_a_problem(run, tmp_path):
    edit_of(run, remove=["r0-1"]).save(tmp_path / "out")
    (run.directory / "audit.jsonl").unlink()
    path = run.directory / "manifest.json"
    path.write_text(
        json.dumps(
            {key: value for key, value in json.loads(path.read_text()).items() if key != "audit"}
        )
    )
    assert any("taken away" in problem for problem in unlearn.verify(run.directory).problems)


def test_the_guard_refuses_to_save_and_force_saves_and_says_so(run, tmp_path):
    found = edit_of(run, steps=1, damping="abs:1e-2", max_damage=0.01)
    assert not found.passed
    assert found.report["guard"]["damage"] > 0.01
    with (
        untouched(tmp_path),
        pytest.raises(
            WorkError,
            match=r"the edit raises the retained rows.* nothing was written\. Ask for less .*--force",
        ),
    ):
        found.save(tmp_path / "out")
    out = found.save(tmp_path / "out", force=True)
    guard = json.loads((out / "edit.json").read_text())["guard"]
    assert (guard["passed"], guard["forced"]) == (False, True)
    assert guard["damage"] == found.report["losses"]["retained"]["change"]
    fine = edit_of(run, remove=["r0-5"], start="original").save(tmp_path / "fine", force=True)
    guard = json.loads((fine / "edit.json").read_text())["guard"]
    assert (guard["passed"], guard["forced"]) == (True, False)


def fail(*_arguments, **_options):
    raise OSError("the disk is full")


@pytest.mark.parametrize("broken", ["save_file", "seal", "replace"])
def test_a_failed_save_leaves_nothing_and_the_next_one_works(run, tmp_path, monkeypatch, broken):
    found, out, real = edit_of(run), tmp_path / "out", os.replace
    places = {"save_file": (saving, "save_file", fail), "seal": (saving, "seal", fail)}
    move = lambda a, b: fail() if Path(b) == out else real(a, b)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(*places.get(broken, (os, "replace", move)))
        with untouched(run.directory), pytest.raises(OSError, match="the disk is full"):
            found.save(out)
    assert not out.exists()
    assert chain.entries(run.directory) == []
    assert found.save(out) == out
    assert unlearn.verify(run.directory, apply=True).passed
    assert not out.with_name("out.partial").exists()
    assert len(chain.entries(run.directory)) == 1


@pytest.mark.parametrize("moment", ["seal", "replace"])
def test_a_killed_save_leaves_no_directory_and_the_next_one_works(run, tmp_path, moment):
    found, out, real = edit_of(run), tmp_path / "out", os.replace
    child = os.fork()
    if child == 0:  # dies before pytest could see anything of it
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        if moment == "seal":
            saving.seal = die
        else:
            os.replace = lambda a, b: die() if Path(b) == out else real(a, b)
        try:
            found.save(out)
        finally:
            os._exit(3)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not out.exists()
    assert found.save(out) == out
    assert unlearn.verify(run.directory).passed


def test_a_save_whose_audit_line_could_not_be_written_can_be_done_again(run, tmp_path, monkeypatch):
    found, out = edit_of(run), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(saving, "append", fail)
        with pytest.raises(OSError, match="the disk is full"):
            found.save(out)
    found.save(out)
    assert unlearn.verify(run.directory).passed


def test_what_is_there_is_overwritten_only_when_asked(run, tmp_path):
    first = edit_of(run).save(tmp_path / "out")
    again = edit_of(run, remove=["r0-5"], start="original")
    with (
        untouched(tmp_path),
        pytest.raises(InputError, match="is not empty: give another directory, or --overwrite"),
    ):
        again.save(first)
    (tmp_path / "file").write_text("mine")
    with (
        untouched(tmp_path),
        pytest.raises(InputError, match="is a file; an adapter is a directory"),
    ):
        again.save(tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    edit_of(run, remove=["r0-6"], start="original").save(tmp_path / "empty")
    (first / "mine.txt").write_text("mine")
    assert again.save(first, overwrite=True) == first
    assert not (first / "mine.txt").exists()
    assert json.loads((first / "edit.json").read_text())["requests"][0]["id"] == "r0-5"
    assert unlearn.verify(run.directory).passed
    assert version(run).removed == {"r0-5"}


def test_sources_are_never_written_over(run, made):
    found = edit_of(run)
    at = made[0]
    for place in (run.directory, at / "adapter", at / "base", at, run.directory.parent):
        with (
            untouched(run.directory, at),
            pytest.raises(
                InputError, match=r"is, or holds, or lies in .* which the edit is made from"
            ),
        ):
            found.save(place, overwrite=True)


@pytest.mark.parametrize("inside", ["run", "base", "adapter"])
def test_nothing_is_written_inside_a_source(run, tmp_path, monkeypatch, inside):
    place = run.directory if inside == "run" else tmp_path / inside
    place.mkdir(exist_ok=True)
    if inside != "run":
        monkeypatch.setitem(run.manifest, inside, run.manifest[inside] | {"path": str(place)})
    found = edit_of(run)
    with pytest.raises(InputError, match="the edit is made from"):
        found.save(place / "out")


def test_a_place_through_a_link_or_dots_is_the_same_place(run, made, tmp_path):
    found = edit_of(run)
    (tmp_path / "link").symlink_to(made[0] / "adapter")
    for place in (tmp_path / "link", made[0] / "base" / ".." / "adapter"):
        with untouched(made[0]), pytest.raises(InputError, match="which the edit is made from"):
            found.save(place, overwrite=True)


# ---- edits after edits ---------------------------------------------------------------------------------------


def test_the_manifest_knows_the_chain_and_where_the_run_now_stands(run, tmp_path):
    found = edit_of(run)
    out = found.save(tmp_path / "out")
    manifest = json.loads((run.directory / "manifest.json").read_text())
    line = json.loads((run.directory / "audit.jsonl").read_text())
    assert manifest["audit"] == {"entries": 1, "head": line["hash"]}
    assert manifest["now"] == {
        "adapter": {"path": str(out), "digest": found.report["adapter"]["after"]["digest"]},
    }
    assert line["edit"] == str(out)
    again = Run.open(run.directory, model=run.model)
    assert again.score(again.train[:2]).values.shape == (
        2,
        12,
    )  # the run is still of the adapter it was fitted on


def test_what_others_wrote_to_the_manifest_since_stays(run, tmp_path):
    found = edit_of(run)
    path = run.directory / "manifest.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text()) | {"tuned": None, "calibration": {"of": "another process"}}
        )
    )
    found.save(tmp_path / "out")
    assert json.loads(path.read_text())["calibration"] == {"of": "another process"}


def test_a_second_edit_starts_from_the_first(run, tmp_path):
    first = edit_of(run, remove=["r0-1"], relabel=ANSWERS)
    first.save(tmp_path / "one")
    reopened = Run.open(run.directory, model=run.model)
    for own in (run, reopened):
        start = version(own)
        assert torch.equal(start.theta, first.theta)
        assert start.rows.ids == [id for id in run.train.ids if id != "r0-1"]
        assert start.removed == {"r0-1"}
        assert start.changed == set(ANSWERS)
        assert start.edits == 1
        assert start.rows[start.rows.index("r0-2")].completion == ANSWERS["r0-2"]
        tokens = tokenize(start.rows, own.model.tokenizer)
        for mine, right in zip(start.tokens, tokens, strict=True):
            np.testing.assert_array_equal(mine.input_ids, right.input_ids)
        np.testing.assert_allclose(start.weights, 1 / run.manifest["objective"]["N_tok"])
    with pytest.raises(
        InputError,
        match=r"'r0-1' was removed by an earlier edit .*start from an adapter before that edit",
    ):
        edit_of(reopened, remove=["r0-1"])
    with pytest.raises(InputError, match="relabel of 'r0-2' changes nothing"):
        edit_of(reopened, relabel={"r0-2": ANSWERS["r0-2"]})
    second = edit_of(reopened, remove=["r0-4"])
    assert second.report["adapter"]["before"] == {
        "path": str(tmp_path / "one"),
        "digest": first.report["adapter"]["after"]["digest"],
    }
    assert second.report["data"]["before"] == first.report["data"]["after"]
    second.save(tmp_path / "two")
    assert unlearn.verify(run.directory, apply=True).passed
    assert version(reopened).removed == {"r0-1", "r0-4"}
    assert version(reopened).edits == 2
    assert version(reopened, tmp_path / "one").removed == {"r0-1"}
    assert version(reopened, "original").edits == 0


def test_relabelling_back_is_an_edit_of_its_own(run, tmp_path):
    there = edit_of(run, relabel=ANSWERS, steps=1)
    there.save(tmp_path / "there")
    back = edit_of(
        run, relabel={id: run.train[run.train.index(id)].completion for id in ANSWERS}, steps=1
    )
    assert back.report["data"]["after"] == run.train.digest
    assert (
        back.delta + there.delta
    ).norm() > 1e-3 * there.delta.norm()  # not the way back: losses are not quadratic
    back.save(tmp_path / "back")
    now = version(run)
    assert now.rows == run.train
    assert now.changed == set(ANSWERS)
    assert unlearn.verify(run.directory).passed


def test_the_original_can_be_edited_again(run, tmp_path):
    edit_of(run, remove=["r0-1"]).save(tmp_path / "one")
    for start in ("original", run.manifest["adapter"]["path"]):
        other = edit_of(run, remove=["r0-1"], start=start)
        assert other.report["data"]["rows_before"] == 12
        assert other.report["adapter"]["before"]["digest"] == run.manifest["identity"]["adapter"]
    other.save(tmp_path / "two")
    assert version(run).edits == 1
    assert unlearn.verify(run.directory, apply=True).passed
    assert version(run, tmp_path / "one").path == str(tmp_path / "one")


def test_an_edit_that_moves_nothing_still_takes_its_rows_out(run, tmp_path):
    low = float(mean_losses(run.model, run.tokens.select([1])).min())
    still = edit_of(run, remove=["r0-1"], until=f"loss={low / 2}")
    assert not still.delta.any()
    out = still.save(tmp_path / "still")
    assert version(run).removed == {"r0-1"}
    assert torch.equal(version(run).theta, run.model.snapshot())
    assert (
        load_file(out / "delta.safetensors").keys()
        == load_file(out / "adapter_model.safetensors").keys()
    )
    assert unlearn.verify(run.directory, apply=True).passed
    edit_of(run, remove=["r0-4"]).save(tmp_path / "next")
    assert version(run).removed == {"r0-1", "r0-4"}
    edit_of(run, remove=["r0-4"], start="original").save(tmp_path / "branch")
    assert version(run).removed == {
        "r0-4"
    }  # started before the still edit, though the adapter is the same
    assert unlearn.verify(run.directory, apply=True).passed


def test_an_ancestor_is_not_overwritten(run, tmp_path):
    edit_of(run, remove=["r0-1"]).save(tmp_path / "one")
    edit_of(run, remove=["r0-2"]).save(tmp_path / "two")
    third = edit_of(run, remove=["r0-4"])
    try:
        third.save(tmp_path / "one", overwrite=True)
    except InputError:
        return
    assert version(run).removed == {"r0-1", "r0-2", "r0-4"}


@pytest.mark.parametrize("what", ["adapter_model.safetensors", "edit.json", "gone"])
def test_a_damaged_earlier_edit_cannot_be_built_on(run, tmp_path, what):
    out = edit_of(run).save(tmp_path / "out")
    if what == "gone":
        shutil.rmtree(out)
    else:
        data = bytearray((out / what).read_bytes())
        data[-9] ^= 1
        (out / what).write_bytes(bytes(data))
    with pytest.raises(
        (StoreError, MismatchError), match=r"edit 1 cannot be followed: .*Restore its folder"
    ):
        version(run)
    assert not unlearn.verify(run.directory).passed
    assert version(run, "original").edits == 0


def test_one_shot_fisher_edits_know_the_curvature_of_all_edits_so_far(made, tmp_path):
    """The second edit's solve against a fit on the rows that are left, at the same parameters and labels."""
    _, model = made
    train = read_examples(made[0] / "train.jsonl")
    spec = {"curvature": influence.Fisher(samples=0), "path": (1.0,), "damping": "abs:0.05"}
    run = influence.fit(model, train, directory=tmp_path / "run", **spec)
    edit_of(run, remove=["r0-1"], relabel={"r0-2": ANSWERS["r0-2"]}, steps=1).save(tmp_path / "one")
    found = edit_of(run, remove=["r0-4"], steps=1)
    start = version(run)
    left = influence.Examples(row for row in start.rows if row.id != "r0-4")
    point, tokens = run.points[0], tokenize(left, model.tokenizer)
    F = point.query_gradients(tokens, influence.measurements.SumLoss()).double() / np.sqrt(
        run.manifest["objective"]["N_tok"]
    )
    gone = run.tokens.select([4])
    with model.at(start.theta):
        rhs = (
            next(influence.stream_gradients(model, gone))[1][0].double()
            / run.manifest["objective"]["N_tok"]
        )
    C = F.T @ F + 0.05 * torch.eye(F.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(C, rhs)
    assert (found.delta.double() - expected).norm() / expected.norm() < 1e-3


def test_every_error_of_an_edit_is_one_of_the_toolkit(run):
    for asked in (
        {"remove": ["nobody"]},
        {"relabel": {"r0-1": ""}},
        {"correct": {"r0-1": {"text": "a"}}},
    ):
        with pytest.raises(ToolkitError):
            unlearn.edit(run, **asked)


def test_losses_in_the_record_are_those_of_a_plain_measure(run):
    found = edit_of(run, steps=1, relabel=ANSWERS)
    change = found.change
    with run.model.at(found.theta):
        new, old = measure(run.model, change.new), measure(run.model, change.old)
    entries = found.report["rows"]
    assert [entry["after"] for entry in entries] == pytest.approx(new.loss.tolist(), rel=1e-5)
    assert [entry["old_after"] for entry in entries] == pytest.approx(old.loss.tolist(), rel=1e-5)
    assert [entry["extraction_after"] for entry in entries] == new.extraction.tolist()


def test_edits_of_the_same_rows_measure_the_same_untouched_ones(run, monkeypatch):
    """Removing r0-0 or r0-3 leaves samples of 5 that differ by those rows at most; another seed draws others."""
    monkeypatch.setattr(sample, "GUARD_ROWS", 5)
    rows, n = run.train, len(run.train)
    samples = [
        set(sample.guard_sample(rows, np.setdiff1d(np.arange(n), gone), 0).tolist())
        for gone in ([0], [3])
    ]
    whole = set(sample.guard_sample(rows, np.arange(n), 0).tolist())
    assert all(len(sample) == 5 for sample in samples)
    assert samples[0] >= whole - {0}
    assert samples[1] >= whole - {3}
    assert any(
        set(sample.guard_sample(rows, np.arange(n), seed).tolist()) != whole for seed in (1, 2, 3)
    )
    copied = min(whole)  # a row with this content is changed: its copies are no measure of damage
    assert (
        copied
        not in sample.guard_sample(rows, np.arange(n), 0, {rows[copied].content_hash}).tolist()
    )
