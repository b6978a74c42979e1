"""The objective beside the trainer's log: what agrees, what differs, and by which allowances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence.logged_loss import Measured, at_beginning, at_end, check_losses
from influence.tokens import Rendering
from influence.trainer_output import Training, TrainingLog
from tests.conftest import build_model, examples, tokens_of


def log(losses, *, every=1, per_epoch=10.0, batch=4) -> TrainingLog:
    steps = [every * (k + 1) for k in range(len(losses))]
    history = [
        {"step": step, "loss": loss, "epoch": step / per_epoch, "learning_rate": 1e-3}
        for step, loss in zip(steps, losses, strict=True)
    ]
    state = {"global_step": steps[-1], "max_steps": steps[-1], "train_batch_size": batch}
    return TrainingLog.of({**state, "log_history": history}, "it")


def measured(mean: float, *, spread=0.0, rows=8, total=None) -> Measured:
    signs = np.where(np.arange(rows) % 2, 1.0, -1.0)
    return Measured(np.ones(rows), mean + spread * signs, rows if total is None else total)


def test_the_end_is_the_last_tenth_of_the_steps():
    """A mean over steps, each entry for those since the entry before."""
    found = at_end(log([3.0, 2.0, 1.0, 0.5], every=10), measured(0.5), 4, 0.0)
    assert (found.logged, found.steps) == (0.5, (31, 40))
    many = at_end(log([2.0 - 0.01 * k for k in range(100)]), measured(1.0), 4, 0.0)
    assert many.steps == (91, 100)
    assert many.logged == pytest.approx(np.mean([2.0 - 0.01 * k for k in range(90, 100)]))


def test_the_allowance_at_the_end_is_what_the_module_says():
    entries = [3.0 - 0.1 * k for k in range(20)]  # an epoch is ten steps
    logged = float(np.mean(entries[18:]))
    found = at_end(log(entries), measured(1.0, spread=0.4, rows=8, total=16), 4, 0.2)
    # two steps of four rows are 8 logged rows; the rows here are 8 of 16
    error = np.sqrt(0.4**2 / 8 + 0.4**2 / 8)
    noise = 3 * error + 0.05 * logged + 0.02
    fall = (entries[9] - logged) + (entries[0] - logged) * 0.2 / 0.8
    assert found.high == pytest.approx(logged + noise)
    assert found.low == pytest.approx(max(0.0, logged - noise - fall))


def test_the_first_entry_may_lie_below_the_base_where_it_averages_steps():
    one = at_beginning(log([3.0, 2.0]), measured(3.0), 4)
    several = at_beginning(log([3.0, 2.0], every=10), measured(3.0), 4)
    assert one.high == pytest.approx(3.0 + 0.17)
    assert several.high == pytest.approx(3.0 + 0.17 + 2.0)
    assert one.low == several.low == pytest.approx(3.0 - 0.17)
    assert several.steps == (1, 10)


def objective(model, tokens) -> float:
    """The mean loss over all supervised tokens, row by row, by the model's own logits."""
    total = count = 0.0
    for item in tokens:
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor(item.input_ids)[None]).logits[0, :-1]
        chosen = torch.tensor(item.supervised[1:])
        logp = logits.log_softmax(-1)[torch.arange(len(logits)), torch.tensor(item.input_ids[1:])]
        total -= float(logp[chosen].sum())
        count += float(chosen.sum())
    return total / count


def test_the_objective_here_and_at_the_base_are_the_models_own():
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, examples(10))
    check = check_losses(model, examples(10), Rendering(), Training(log([9.0, 9.0]), None))
    assert check is not None
    here = objective(model, tokens)
    with model.model.disable_adapter():
        base = objective(model, tokens)
    assert [each.here for each in check.comparisons] == pytest.approx([here, base], rel=1e-9)
    assert not check.agrees
    every = objective(model, tokens_of(model, examples(10), supervise="all"))
    assert check.otherwise == {"--supervise all": pytest.approx(every, rel=1e-9)}
    assert f"--supervise all gives {every:.2f}" in str(check)
    assert "differs (expected" in str(check)
    record = check.as_json()
    assert record["agrees"] is False
    assert [each["at"] for each in record["comparisons"]] == ["end", "beginning"]


def test_a_log_that_agrees():
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, examples(10))
    before = model.snapshot()
    here = objective(model, tokens)
    with model.model.disable_adapter():
        base = objective(model, tokens)
    check = check_losses(
        model, examples(10), Rendering(), Training(log([base, (base + here) / 2, here]), None)
    )
    assert check is not None
    assert check.agrees
    assert check.otherwise == {}  # costs nothing where nothing differs
    assert torch.equal(model.snapshot(), before)


def test_only_the_beginning_may_be_of_another_adapter():
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, examples(10))
    here = objective(model, tokens)
    check = check_losses(model, examples(10), Rendering(), Training(log([here, here]), None))
    assert check is not None
    if not check.agrees:
        assert "training started from an adapter that was not fresh" in str(check)


@pytest.mark.parametrize(("every", "places"), [(2, ["end", "beginning"]), (3, ["end"])])
def test_a_first_entry_of_more_than_an_epoch_tells_nothing_of_the_base(every, places):
    model = build_model("llama", layers=1)
    training = Training(log([2.0, 1.0], every=every), None)  # batches of four of ten rows
    check = check_losses(model, examples(10), Rendering(), training)
    assert check is not None
    assert [each.at for each in check.comparisons] == places


def test_nothing_is_compared_without_a_log():
    model = build_model("llama", layers=1)
    assert check_losses(model, examples(10), Rendering(), None) is None
    assert check_losses(model, examples(10), Rendering(), Training(None, None)) is None


def test_a_loss_before_the_first_step_is_of_no_steps():
    state = {"global_step": 5, "max_steps": 5, "log_history": [{"step": 0, "loss": 2.0}]}
    assert TrainingLog.of(state, "it").losses == ()
