"""What is found in a trainer's output directory, and the recipe that its log tells."""

from __future__ import annotations

import json
import math

import pytest

from influence.errors import InputError
from influence.recipe import Recipe
from influence.rows import examples_from_rows
from influence.trainer_output import TrainerOutput, TrainingLog, estimated_recipe, log_near


def rate(step: int, name: str, warmup: int, total: int, peak: float) -> float:
    """The rate of a step (from 1) by the schedules of transformers, written down again."""
    done = step - 1
    if done < warmup:
        return peak * done / max(1, warmup)
    share = (done - warmup) / max(1, total - warmup)
    falls = {"linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share)), "constant": 1.0}
    return peak * falls[name]


def state(
    name="linear",
    *,
    warmup=0,
    total=60,
    peak=2e-4,
    every=1,
    rows=80,
    batch=8,
    late=0,
    digits=12,
    **changes,
) -> dict:
    """The log of a training on so many rows; `late` logs the rate of the step that follows."""
    per_epoch = -(-rows // batch)
    log = [
        {
            "step": step,
            "epoch": step / per_epoch,
            "learning_rate": float(f"{rate(step + late, name, warmup, total, peak):.{digits}g}"),
            "loss": 3.0 - step / total,
        }
        for step in range(every, total + 1, every)
    ]
    found = {"global_step": total, "max_steps": total, "num_train_epochs": total // per_epoch}
    return {**found, "train_batch_size": 4, "log_history": log, **changes}


def estimate(rows=80, **how) -> Recipe:
    found = estimated_recipe(TrainingLog.of(state(rows=rows, **how), "it"), rows)
    assert found is not None
    return found.recipe


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize(
    ("name", "warmup"),
    [("linear", 0), ("linear", 12), ("cosine", 0), ("cosine", 12), ("constant", 0)],
)
def test_peak_schedule_and_warmup_follow_from_the_rates(name, warmup, every, late):
    recipe = estimate(name=name, warmup=warmup, every=every, late=late)
    assert recipe.schedule == name
    assert recipe.lr == pytest.approx(2e-4, rel=1e-3)
    assert abs(recipe.warmup - warmup) <= 1
    assert (recipe.epochs, recipe.batch_size, recipe.max_steps) == (6, 8, None)


def test_rounded_rates_and_long_warmups():
    recipe = estimate(name="cosine", warmup=700, total=9000, every=50, digits=4, rows=12000)
    assert (recipe.schedule, recipe.epochs) == ("cosine", 6)
    assert recipe.lr == pytest.approx(2e-4, rel=1e-3)
    assert abs(recipe.warmup - 700) <= 5


def test_batches_and_steps_follow_from_the_epochs():
    """The size of a forward times the accumulation that the number of rows tells."""
    assert estimate(batch=16, total=15).batch_size == 16  # 4 logged
    assert estimate(train_batch_size=None).batch_size == 8
    short = estimate(total=25)  # 2.5 epochs of 10 steps
    assert (short.max_steps, short.batch_size) == (25, 8)


def test_what_is_assumed_is_said():
    about = estimated_recipe(TrainingLog.of(state(), "it"), 80).about
    for words in ("AdamW without weight decay", "betas 0.9 and 0.999", "norm 1", "seed 42"):
        assert words in about
    assert "schedule" not in about.split("assumed")[1]
    odd = state()
    for entry in odd["log_history"]:
        entry["learning_rate"] = 2e-4 if entry["step"] % 2 else 1e-4
    assert "the schedule (no linear, constant, cosine" in (
        estimated_recipe(TrainingLog.of(odd, "it"), 80).about
    )


def test_a_log_without_rates_gives_no_estimate():
    silent = state()
    silent["log_history"] = [{"step": 60, "epoch": 6.0, "train_loss": 2.0}]
    assert estimated_recipe(TrainingLog.of(silent, "it"), 80) is None
    zero = state()
    zero["log_history"] = [{"step": 60, "epoch": 6.0, "learning_rate": 0.0}]
    assert estimated_recipe(TrainingLog.of(zero, "it"), 80) is None


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "{}",
        '{"log_history": 3, "global_step": 1}',
        '{"log_history": [], "global_step": "many"}',
        '{"log_history": [{"step": 1, "loss": "x"}], "global_step": 1}',
        '{"log_history": [], "global_step": 1e300}',
        '{"log_history": [{"step": -3, "loss": 1}], "global_step": 1}',
        '{"log_history": [], "global_step": 1, "max_steps": 999999999999}',
    ],
)
def test_damaged_states_are_refused(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(InputError, match=r"trainer_state\.json"):
        TrainingLog.read(tmp_path / "trainer_state.json")


# ---- folders -------------------------------------------------------------------------------------


def adapter(folder, log=None, optimizer=False):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text("")
    if log is not None:
        (folder / "trainer_state.json").write_text(json.dumps(log))
    if optimizer:
        (folder / "optimizer.pt").write_text("")
    return folder


def stopped(step: int) -> dict:
    whole = state()
    log = [entry for entry in whole["log_history"] if entry["step"] <= step]
    return {**whole, "global_step": step, "log_history": log}


def test_the_last_adapter_and_the_checkpoints_before_it(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        TrainerOutput.find(tmp_path / "nowhere")
    (tmp_path / "logs").mkdir()
    with pytest.raises(InputError, match=r"holds no adapter, .*it has the folders 'logs'"):
        TrainerOutput.find(tmp_path)
    places = [adapter(tmp_path / f"checkpoint-{n}", stopped(n), n > 10) for n in (9, 20, 60)]
    (tmp_path / "checkpoint-70").mkdir()  # without an adapter: it was being written
    output = TrainerOutput.find(tmp_path)
    assert (output.adapter, output.optimizer) == (places[2], places[2])
    assert output.checkpoints == tuple(places[:2])
    assert output.log is not None
    assert output.log.steps == 60
    adapter(tmp_path / "influence" / "end", stopped(60))
    assert TrainerOutput.find(tmp_path).adapter == tmp_path / "influence" / "end"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("")
    assert TrainerOutput.find(tmp_path).adapter == tmp_path
    # one checkpoint: what came after it is not of its training
    early = TrainerOutput.find(places[1])
    assert (early.adapter, early.checkpoints) == (places[1], (places[0],))
    assert early.log is not None
    assert early.log.steps == 20
    assert early.optimizer == places[1]


def test_points_are_few_and_early(tmp_path):
    def names():
        return [place.name for place in TrainerOutput.find(tmp_path).points()]

    for step in (10, 20, 30, 60):
        adapter(tmp_path / f"checkpoint-{step}", stopped(step))
    assert names() == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    for step in (1, 5, 40, 50):
        adapter(tmp_path / f"checkpoint-{step}", stopped(step))
    assert names() == ["checkpoint-1", "checkpoint-10", "checkpoint-30"]  # of the first half
    adapter(tmp_path / "influence" / "epoch-1", stopped(10))
    assert len(names()) == 3  # the step that is there twice counts once


def test_points_have_a_learning_rate(tmp_path):
    adapter(tmp_path / "checkpoint-20")
    cold = stopped(10)
    cold["log_history"][-1]["learning_rate"] = 0.0
    adapter(tmp_path / "checkpoint-10", cold)
    adapter(tmp_path / "checkpoint-60", stopped(60))
    assert TrainerOutput.find(tmp_path).points() == ()


def test_the_log_is_that_of_the_adapter_or_the_longest_near_it(tmp_path):
    assert log_near(tmp_path) is None
    adapter(tmp_path / "checkpoint-20", stopped(20))
    adapter(tmp_path / "checkpoint-60", stopped(60))
    final = adapter(tmp_path / "final")
    for folder, steps in ((tmp_path, 60), (final, 60), (tmp_path / "checkpoint-20", 20)):
        found = log_near(folder)
        assert found is not None
        assert found.steps == steps


def test_a_recipe_that_cannot_be_followed_is_said(tmp_path, capsys):
    adapter(tmp_path / "checkpoint-60", stopped(60))
    training = TrainerOutput.find(tmp_path).training(80)
    assert training.recipe is not None
    assert training.recipe.recipe.epochs == 6
    (tmp_path / "checkpoint-60" / "recipe.json").write_text('{"optimizer": "lion"}')
    training = TrainerOutput.find(tmp_path).training(80)
    assert training.recipe is None
    assert "the recipe of the training is not kept: recipe" in capsys.readouterr().err


def test_a_recorded_recipe_of_other_rates_is_said(tmp_path):
    place = adapter(tmp_path / "checkpoint-60", state(name="cosine"))
    recipe = Recipe(lr=2e-4, epochs=6, batch_size=8, schedule="cosine")
    for schedule, other in (("cosine", False), ("linear", True)):
        values = {**recipe.as_json(), "schedule": schedule}
        (place / "recipe.json").write_text(json.dumps(values))
        found = TrainerOutput.find(tmp_path).training(80).recipe
        assert found is not None
        assert ("the rates that" in found.about) == other


def test_half_written_epochs_are_no_checkpoints(tmp_path):
    record = tmp_path / "influence"
    adapter(record / "end", stopped(60))
    whole = [adapter(record / f"epoch-{name}", stopped(n)) for name, n in (("0.5", 5), ("2", 20))]
    for name in ("epoch-4.partial", "epoch-4.replaced", "epoch-last"):
        adapter(record / name, stopped(40), optimizer=True)
    (record / "epoch-3").mkdir()
    output = TrainerOutput.find(tmp_path)
    assert output.checkpoints == tuple(whole)
    assert output.optimizer is None


TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PAIR = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "arguments", "expected"),
    [
        (PAIR, {}, (1024, "last")),
        (TALK, {}, (1024, "all")),
        (PAIR, {"completion_only_loss": False, "max_length": None}, (None, "all")),
        (TALK, {"assistant_only_loss": True, "max_length": 9}, (9, "assistant")),
        (PAIR, {"packing": True, "packing_strategy": "wrapped"}, (None, "last")),
        (PAIR, {"packing": True, "packing_strategy": "bfd"}, (1024, "last")),
        (PAIR, {"padding_free": True}, (None, "last")),
        (PAIR, {"truncation_mode": "keep_end"}, (None, "last")),
        (PAIR, None, (None, None)),
    ],
)
def test_rows_are_cut_and_supervised_as_recorded(tmp_path, capsys, row, arguments, expected):
    adapter(tmp_path / "influence" / "end", stopped(60))
    path = tmp_path / "influence" / "training_args.json"
    trl = {"max_length": 1024, "completion_only_loss": None, "assistant_only_loss": False}
    if arguments is not None:
        path.write_text(json.dumps(trl | arguments))
    found = TrainerOutput.find(tmp_path).rendering(examples_from_rows([row]))
    assert found == expected
    assert ("rows are cut to" in capsys.readouterr().err) == (arguments is not None)
    path.write_text('{"learning_rate": 1}')  # no trainer of TRL
    assert TrainerOutput.find(tmp_path).rendering(examples_from_rows([row])) == (None, None)
