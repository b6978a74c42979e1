"""The loop of gradient-based unlearning against plain torch, and what changes none of its steps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import influence
from influence.row_files import read_examples
from influence.run import Run
from tests.helpers import in_two_processes
from tests.unlearn.methods.helpers import (
    FORGET,
    KEPT,
    RECIPE,
    Oracle,
    RowCounter,
    close,
    cut,
    opened,
    oracle_options,
    some_slow,
    train,
    unit,
)
from unlearn.methods.batches import TermBatches
from unlearn.methods.methods import METHODS, Method, method_of
from unlearn.methods.terms import divergence

COMPOSED = {
    "ga": ("ascent", None),
    "ga-gd": ("ascent", "descent"),
    "ga-kl": ("ascent", "divergence"),
    "npo": ("npo", "descent"),
    "simnpo": ("simnpo", "descent"),
}


HOW = [
    {"lr": 0.01},
    {"lr": 0.3, "optimizer": "SGD", "schedule": "cosine", "warmup": 2, "max_grad_norm": 0.7},
    {"lr": 0.02, "optimizer": "AdamW", "schedule": "linear", "warmup": 1, "max_grad_norm": 0.1},
]


@pytest.mark.parametrize("how", HOW, ids=["Adam", "SGD", "AdamW"])
@pytest.mark.parametrize("name", COMPOSED)
def test_steps_are_those_of_plain_torch(run, name, how):
    """Five steps on two forget rows of three and four kept rows of nine, beyond the end of the
    forget rows' epochs.
    """
    edit = train(run, name, until="steps=5", batch_size=2, retain_batch_size=4, **how)
    oracle = Oracle(run)
    forget, retain = COMPOSED[name]
    some, kept, seen = cut(FORGET, 2, 31), cut(KEPT, 4, 32), []

    def direction(step, theta):
        value = getattr(oracle, forget)(some(step))
        g = oracle.gradient(value)
        other = None
        if retain is not None:
            other = getattr(oracle, retain)(kept(step))
            h = oracle.gradient(other)
            g = g + h
        seen.append(
            (
                float(value.detach()),
                None if other is None else float(other.detach()),
                float(g.norm()),
            )
        )
        return g

    start = oracle.theta()
    end = oracle.walk(direction, 5, **oracle_options(how))
    assert float((end - start).norm()) > 1e-3
    close(edit.theta, end)
    close(edit.delta, end - start)
    for entry, (value, other, norm) in zip(edit.log, seen, strict=True):
        assert entry["forget_term"] == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert entry["retain_term"] == (
            None if other is None else pytest.approx(other, rel=1e-9, abs=1e-12)
        )
        clip = how.get("max_grad_norm") or math.inf
        assert entry["direction_norm"] == pytest.approx(min(norm, clip), rel=1e-9)


@pytest.mark.parametrize("seed", [0, 5])
def test_ngdiff_at_a_fixed_rate_is_plain_torch(run, seed):
    edit = train(
        run, "ngdiff", until="steps=4", lr=0.1, batch_size=2, retain_batch_size=4, seed=seed
    )
    oracle = Oracle(run)
    some, kept = cut(FORGET, 2, 31, seed), cut(KEPT, 4, 32, seed)
    norms, cosines = [], []

    def direction(step, theta):
        g_f, g_r = (
            oracle.gradient(oracle.descent(some(step))),
            oracle.gradient(oracle.descent(kept(step))),
        )
        norms.append((float(g_f.norm()), float(g_r.norm())))
        cosines.append(-float(unit(g_f) @ unit(g_r)))
        return unit(g_r) - unit(g_f)

    close(edit.theta, oracle.walk(direction, 4, "SGD", 0.1))
    assert [(e["forget_norm"], e["retain_norm"]) for e in edit.log] == [
        pytest.approx(pair) for pair in norms
    ]
    assert [e["cosine"] for e in edit.log] == pytest.approx(cosines)


def test_ngdiff_with_its_automatic_rate_is_plain_torch(run):
    """Twelve steps: the rate, at first such that the move has `stride`, is found at the first and
    the eleventh step.
    """
    edit = train(run, "ngdiff", until="steps=12", batch_size=2, retain_batch_size=4)
    oracle = Oracle(run)
    some, kept = cut(FORGET, 2, 31), cut(KEPT, 4, 32)
    rate, rates = None, []
    for step in range(12):
        g_f, g_r = (
            oracle.gradient(oracle.descent(some(step))),
            oracle.gradient(oracle.descent(kept(step))),
        )
        theta, u = oracle.theta(), -(unit(g_r) - unit(g_f))
        if rate is None:
            rate = METHODS["ngdiff"]().stride * float(theta.norm() / u.norm())
        if step % 10 == 0:
            points, losses = np.array([-1, -0.5, 0, 0.5, 1]), []
            for s in points:
                oracle.put(theta + s * rate * u)
                losses.append(float(oracle.mean(kept(step)).detach()))
            c, b, a = np.polyfit(points, losses, 2)
            explained = 1 - ((losses - np.polyval([c, b, a], points)) ** 2).sum() / (
                5 * np.var(losses)
            )
            if b < 0 < c and explained >= 0.95:
                rate *= math.sqrt(min(max(-b / (2 * c), 0.5), 2.0))
        rates.append(rate)
        oracle.put(theta + rate * u)
    assert len(set(rates)) > 1
    assert [entry["lr"] for entry in edit.log] == pytest.approx(rates, rel=1e-9)
    close(edit.theta, oracle.theta())
    assert edit.report["method"]["lr"] == "auto"


def test_l1_sparse_is_plain_torch(run):
    """No forget row is run. The penalty of step t of T is c (1 - t/T)."""
    method = method_of("l1-sparse", penalty=0.05)
    edit = train(run, method, until="steps=4", lr=0.02, optimizer="SGD", retain_batch_size=4)
    oracle, kept = Oracle(run), cut(KEPT, 4, 32)
    end = oracle.walk(
        lambda k, theta: (
            oracle.gradient(oracle.descent(kept(k))) + 0.05 * (1 - k / 4) * torch.sign(theta)
        ),
        4,
        "SGD",
        0.02,
    )
    close(edit.theta, end)
    assert all(entry["forget_rows"] == 0 and entry["forget_term"] is None for entry in edit.log)


def test_datamodel_matching_is_plain_torch(run):
    """The local retraining, Q, both terms and the steps are the oracle's own."""
    options = {"until": "steps=4", "lr": 0.02, "batch_size": 2, "retain_batch_size": 4}
    edit = train(run, "datamodel-matching", recipe=RECIPE, **options)
    oracle = Oracle(run)
    some, kept = cut(FORGET, 2, 31), cut(KEPT, 4, 32)
    goals, log_q = oracle.expected(RECIPE)
    assert edit.record.expected.loss == pytest.approx(np.mean(list(goals.values())), rel=1e-9)
    assert any(goals[row.id] > row.before + 0.01 for row in edit.record.rows)

    def direction(step, theta):
        return oracle.gradient(oracle.matching(some(step), log_q)) + oracle.gradient(
            oracle.divergence(kept(step))
        )

    close(edit.theta, oracle.walk(direction, 4, lr=0.02))


def test_task_arithmetic_goes_the_other_way(run):
    """As far as brings the forget rows to the base's loss (here by halves of 1/128), or by a
    number.
    """
    fixed = train(run, method_of("task-arithmetic", scale=0.7), until="steps=3", lr=0.02)
    oracle = Oracle(run)
    start = oracle.theta()
    tuned = oracle.walk(lambda k, _: oracle.gradient(oracle.descent(FORGET)), 3, lr=0.02) - start
    close(fixed.delta, -0.7 * tuned)
    edit = train(run, "task-arithmetic", until="steps=3", lr=0.02)
    share = -float(edit.delta @ tuned / (tuned @ tuned))
    close(edit.delta, -share * tuned, 1e-8)
    goal = np.mean([max(row["before"], row["base"]) for row in edit.report["rows"]])

    def loss(a):
        oracle.put(start - a * tuned)
        with torch.no_grad():
            return np.mean([float(oracle.losses(id).mean()) for id in FORGET])

    step = 1 / 128 if share <= 1 else 2 ** (math.ceil(math.log2(share)) - 1) / 128
    assert loss(share) >= goal - 1e-6 or share == 16
    assert loss(share - 1.01 * step) < goal or share == 16


def test_control_keeps_the_retained_likelihood(run):
    """Ascent far enough to break the bar, mixed back until it just holds."""
    free = train(run, "ga", until="steps=6", lr=0.05)
    edit = train(run, "ga", until="steps=6", lr=0.05, control=0.97)
    share = float(edit.delta @ free.delta / (free.delta @ free.delta))
    close(edit.delta, share * free.delta, 1e-8)
    allowed = edit.report["losses"]["retained"]["before"] - math.log(0.97)
    assert free.report["losses"]["retained"]["after"] > allowed
    assert 0 < share < 1
    assert edit.report["losses"]["retained"]["after"] <= allowed
    with run.model.at(run.model.snapshot() + (share + 1.01 / 128) * free.delta):
        tokens = run.tokens.select([i for i, id in enumerate(run.train.ids) if id in KEPT])
        assert influence.loss.mean_losses(run.model, tokens).mean() > allowed


def test_an_optimizer_of_ones_own_and_a_callable(run):
    """`optimizer` may make anything that takes parameters and lr."""
    make = partial(torch.optim.SGD, momentum=0.9)
    edit = train(run, "ga", until="steps=4", lr=0.05, optimizer=make)
    oracle = Oracle(run)
    v, theta = 0, oracle.theta()
    for _ in range(4):
        v = 0.9 * v + oracle.gradient(oracle.ascent(FORGET))
        theta = theta - 0.05 * v
        oracle.put(theta)
    close(edit.theta, theta)


@pytest.mark.parametrize(
    "optimizer",
    some_slow(
        ["Adam", "AdamW", "SGD", "RMSprop", "Adadelta", "Adagrad", "NAdam", "Adamax"],
        ["Adam", "SGD"],
    ),
)
def test_a_stride_is_the_first_moves_share_of_the_adapters_length(run, optimizer):
    """Whatever the optimizer does with a gradient.

    The steps after it run at the rate that was found.
    """
    edit = train(run, "ga", until="steps=3", optimizer=optimizer, stride=0.02)
    length = float(run.model.snapshot().norm())
    assert edit.log[0]["move_norm"] == pytest.approx(0.02 * length, rel=1e-9)
    assert len({entry["lr"] for entry in edit.log}) == 1
    oracle = Oracle(run)
    end = oracle.walk(
        lambda k, _: oracle.gradient(oracle.ascent(FORGET)), 3, optimizer, edit.log[0]["lr"]
    )
    close(edit.theta, end)


@pytest.mark.parametrize(
    "name", some_slow([name for name in METHODS if name != "ngdiff"], ["ga", "npo"])
)
def test_without_a_rate_the_methods_own_stride_is_taken(run, name):
    edit = train(run, name, until="steps=1")
    stride = METHODS[name]().stride
    assert edit.log[0]["move_norm"] == pytest.approx(
        stride * float(run.model.snapshot().norm()), rel=1e-9
    )
    assert edit.report["method"]["stride"] == stride
    assert edit.report["method"]["lr"] is None


def test_a_stride_is_the_whole_rates_where_it_warms_up(run):
    """The schedule multiplies the rate whose first move would have the stride."""
    plain = train(run, "ga", until="steps=4", stride=0.02)
    edit = train(run, "ga", until="steps=4", stride=0.02, schedule="linear", warmup=2)
    rate = plain.log[0]["lr"]
    assert [entry["lr"] for entry in edit.log] == pytest.approx([rate / 2, rate, rate, rate / 2])


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_where_nothing_pulls_nothing_is_thrown_far_off(run, optimizer):
    """KL on its own has no gradient at the adapter before: wherever a training goes, it does not go
    many lengths away.
    """
    edit = train(run, Method("still", retain=divergence, optimizer=optimizer), until="steps=3")
    assert float(edit.delta.norm()) < float(run.model.snapshot().norm())


# ---- what changes nothing ------------------------------------------------------------------------


CASES = [
    "ga-gd",
    "ga-kl",
    "npo",
    "idk-dpo",
    "adversarial-labels",
    "random-labels",
    "datamodel-matching",
    "ngdiff",
]


@pytest.mark.parametrize("name", some_slow(CASES, ["ga-kl", "idk-dpo", "datamodel-matching"]))
def test_parts_and_order_change_nothing(run, name, monkeypatch):
    """One row at a time, or all at once.

    Kept rows and forget rows in another order, where a step runs all of them.
    """
    options = {"until": "steps=3", "batch_size": 32, "lr": 0.02}
    whole = train(run, name, **options).delta
    assert float(whole.norm()) > 1e-3
    parts = []
    each = TermBatches._part
    monkeypatch.setattr(
        TermBatches,
        "_part",
        lambda self, rows, *a: (parts.append(len(rows)), each(self, rows, *a))[1],
    )
    run.manifest = replace(run.manifest, token_budget=1)
    close(train(run, name, **options).delta, whole)
    assert set(parts) == {1}
    run.manifest = replace(run.manifest, token_budget=4096)
    monkeypatch.setattr(
        TermBatches, "rows", lambda self, step: np.arange(len(self.tokens))[::-1].copy()
    )
    close(train(run, name, **options).delta, whole)


@pytest.mark.parametrize("name", ["ga", "npo", "datamodel-matching"])
def test_the_order_of_the_ids_changes_nothing(run, name):
    close(train(run, name, FORGET[::-1]).delta, train(run, name).delta)


@pytest.mark.parametrize("name", ["random-labels", "idk-dpo"])
def test_what_is_drawn_for_a_row_depends_on_the_seed_and_the_row_alone(run, name):
    drawn = train(run, name).delta
    close(train(run, name, FORGET[::-1]).delta, drawn)
    assert (train(run, name, seed=1).delta - drawn).norm() > 0.01 * drawn.norm()


def test_left_padding_changes_nothing(run, monkeypatch):
    expected = train(run, "ga-kl", lr=0.02).delta
    from influence.batches import collate
    from unlearn.methods import batches, reference

    def left(tokens, rows, *, pad_id, device):
        batch = collate(tokens, rows, pad_id=pad_id, device=device)
        lengths = batch.attention_mask.sum(1)
        width = batch.attention_mask.shape[1]
        places = (torch.arange(width)[None] - (width - lengths)[:, None]) % width
        moved = {
            name: getattr(batch, name).gather(1, places)
            for name in ("input_ids", "attention_mask", "supervised")
        }
        positions = (moved["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
        return replace(batch, **moved, position_ids=positions)

    for module in (batches, reference):
        monkeypatch.setattr(module, "collate", left)
    close(train(run, "ga-kl", lr=0.02).delta, expected)


SHARED = [
    ("ga", {"ids": ["r0-1"]}),  # one row: the second process has none
    ("ga-gd", {"batch_size": 2, "retain_batch_size": 1}),
    ("ga-kl", {"batch_size": 1, "retain_batch_size": 4}),
    ("npo", {"batch_size": 2, "retain_batch_size": 5}),
    ("idk-dpo", {"batch_size": 3, "retain_batch_size": 3}),
    ("ngdiff", {"until": "steps=12", "batch_size": 2, "retain_batch_size": 4}),
    ("ngdiff", {"until": "steps=2", "ids": ["r0-1"], "retain_batch_size": 1}),
    ("l1-sparse", {"retain_batch_size": 3}),
    ("datamodel-matching", {"batch_size": 1, "retain_batch_size": 2}),
    ("control", {"until": "steps=4", "lr": 0.05}),
    ("ga", {"until": "base", "steps": 30, "lr": 0.05}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"), some_slow([("float64", 1e-9), ("float32", 1e-5)], [("float64", 1e-9)])
)
def test_two_processes_change_nothing(fitted, tmp_path, dtype, tolerance):
    run = opened(fitted, tmp_path, dtype)

    def work(rank):
        for number, (name, options) in enumerate(SHARED):
            edit = train(run, name, **options)
            text = json.dumps(
                {
                    "log": edit.log,
                    "stopped": edit.report["stopped"],
                    "losses": edit.report["losses"],
                }
            )
            (tmp_path / f"{number}.{rank}.json").write_text(text)
            torch.save(edit.delta, tmp_path / f"{number}.{rank}.pt")

    in_two_processes(work, tmp_path)
    for number, (name, options) in enumerate(SHARED):
        alone = train(run, name, **options)
        first, second = (
            torch.load(tmp_path / f"{number}.{rank}.pt", weights_only=True) for rank in range(2)
        )
        assert torch.equal(first, second), name
        torch.testing.assert_close(
            first, alone.delta, rtol=0, atol=tolerance, msg=lambda text, name=name: name + text
        )
        there = json.loads((tmp_path / f"{number}.0.json").read_text())
        assert there["stopped"] == alone.report["stopped"]
        assert len(there["log"]) == len(alone.log)
        for entry, other in zip(there["log"], alone.log, strict=True):
            for key in (
                "forget_term",
                "retain_term",
                "forget_loss",
                "retain_loss",
                "forget_norm",
                "lr",
                "forget_rows",
            ):
                if other[key] is None:
                    assert entry[key] is None
                else:
                    assert entry[key] == pytest.approx(
                        other[key], rel=100 * tolerance, abs=100 * tolerance
                    ), (name, key)


@pytest.mark.parametrize(
    "name",
    some_slow(["ga-gd", "ga-kl", "ngdiff", "adversarial-labels", "datamodel-matching"], ["ga-kl"]),
)
def test_two_processes_cost_what_one_does(run, tmp_path, name):
    def work(rank):
        (tmp_path / f"{rank}.json").write_text(json.dumps(train(run, name).report["cost"]["total"]))

    in_two_processes(work, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second == pytest.approx(train(run, name).report["cost"]["total"])


# ---- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", some_slow(list(METHODS), ["ga-kl", "npo", "ngdiff", "idk-dpo", "task-arithmetic"])
)
def test_the_cost_is_the_rows_that_were_run(run, name):
    options = {"until": "steps=2"} if name != "ngdiff" else {"until": "steps=11"}
    run.points  # noqa: B018
    counter = RowCounter(run.model)
    try:
        edit = train(run, name, batch_size=2, retain_batch_size=3, **options)
    finally:
        counter.handle.remove()
    cost = edit.report["cost"]
    assert cost["row_gradients"] + cost["row_forwards"] == counter.rows
    assert cost["total"] == pytest.approx(cost["row_gradients"] + cost["row_forwards"] / 3)
    assert edit.log[-1]["row_gradients"] < cost["total"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("task-arithmetic", "control")]
)
def test_the_methods_table_tells_the_cost_of_a_step(run, name):
    """Between the second step and the twelfth: ten steps, in which targets and references are known
    already.
    """
    edit = train(
        run,
        name,
        until="steps=13",
        lr=None if name == "ngdiff" else 1e-4,
        batch_size=3,
        retain_batch_size=3,
    )
    spent = edit.log[12]["row_gradients"] - edit.log[2]["row_gradients"]
    forget, retain = METHODS[name]().cost
    assert spent / 10 == pytest.approx(forget * 3 + retain * 3, rel=1e-6)


# ---- types and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", some_slow(["ga-kl", "npo", "ngdiff", "datamodel-matching"], ["ga-kl"])
)
def test_a_bfloat16_base_trains_float32_matrices(fitted, tmp_path, name):
    folder, _ = fitted
    half = influence.load(folder / "base", folder / "adapter", dtype="bfloat16", device="cpu")
    influence.fit(
        half, read_examples(folder / "train.jsonl"), directory=tmp_path / "half", path=(0.6,)
    )
    run = Run.open(tmp_path / "half", model=half)
    weights = {key: value.clone() for key, value in half.model.state_dict().items()}
    edit = train(run, name, until="steps=4", lr=0.01)
    assert edit.delta.dtype == torch.float32
    assert bool(torch.isfinite(edit.delta).all())
    assert all(torch.equal(value, weights[key]) for key, value in half.model.state_dict().items())
    full = train(opened(fitted, tmp_path, "float32"), name, until="steps=4", lr=0.01)
    cosine = float(edit.delta @ full.delta / (edit.delta.norm() * full.delta.norm()))
    assert cosine > 0.8, cosine
    for entry in edit.log:
        assert all(value is None or math.isfinite(value) for value in entry.values())


@pytest.mark.parametrize("name", some_slow(["ga-kl", "npo", "idk-dpo", "ngdiff"], ["ga-kl"]))
def test_activation_checkpointing_changes_nothing(fitted, tmp_path, monkeypatch, name):
    folder, _ = fitted
    run = opened(fitted, tmp_path, "float32")
    plain = train(run, name, until="steps=3", lr=0.01)
    model = influence.load(folder / "base", folder / "adapter", device="cpu", checkpointing=True)
    other = Run.open(run.directory, model=model)
    calls, inside = [], []
    layer = type(model.model.get_base_model().model.layers[0])
    real, add = layer.forward, TermBatches._of_batch

    def counted(
        side, *arguments
    ):  # in the steps alone: what is measured before and after has a tape of its own
        inside.append(1)
        try:
            return add(side, *arguments)
        finally:
            inside.pop()

    monkeypatch.setattr(
        layer, "forward", lambda self, *a, **k: (calls.append(len(inside)), real(self, *a, **k))[1]
    )
    monkeypatch.setattr(TermBatches, "_of_batch", counted)
    edit = train(other, name, until="steps=3", lr=0.01)
    again = sum(calls)
    calls.clear()
    train(run, name, until="steps=3", lr=0.01)
    assert again > sum(calls) > 0  # layers are run again in the backward
    torch.testing.assert_close(edit.delta, plain.delta, rtol=0, atol=1e-6)
