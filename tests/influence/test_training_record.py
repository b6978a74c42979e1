"""The callback that records a training: what it keeps is true, and the training is not changed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import influence
from influence.errors import InputError
from influence.loading import from_peft
from influence.optimizer_state import second_moments
from influence.recipe import Recipe
from influence.trainer_output import TrainerOutput, TrainingLog
from influence.training_record import batches_of
from tests.conftest import build_tokenizer
from tests.influence.toy_trainers import plain_trainer, train, weights

WEIGHTS = "adapter_model.safetensors"


def token_rows(n: int = 10):
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(n):
        ids = torch.randint(3, 25, (6,), generator=generator).tolist()
        made.append({"input_ids": [3 + number, *ids], "labels": [-100, *ids]})
    return made


class Seen:
    """A collator that notes which rows it is given, by their first token."""

    def __init__(self):
        self.batches: list[list[int]] = []

    def __call__(self, items):
        self.batches.append([item["input_ids"][0] - 3 for item in items])
        parts = ("input_ids", "labels")
        return {key: torch.tensor([item[key] for item in items]) for key in parts}


def recorded(folder, *, epochs=(0.5, 1, 2), record=True, lora=None, **options):
    """A trained trainer, and its collator."""
    callbacks = [influence.TrainingRecord(epochs=epochs)] * record
    trainer = plain_trainer(
        folder, token_rows(), collator=(seen := Seen()), callbacks=callbacks, **options
    )
    return train(trainer), seen


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}])
def test_the_training_is_not_changed(tmp_path, options):
    """The same weights and the same batches, bit for bit, with dropout and a shuffled order."""
    one, first = recorded(tmp_path / "with", **options)
    other, second = recorded(tmp_path / "without", record=False, **options)
    assert first.batches == second.batches
    for (name, value), expected in zip(weights(one).items(), weights(other).values(), strict=True):
        assert torch.equal(value, expected), name
    assert one.state.log_history[-1]["train_loss"] == other.state.log_history[-1]["train_loss"]


@pytest.mark.parametrize(
    ("options", "accumulated"),
    [
        ({}, 1),
        ({"gradient_accumulation_steps": 2}, 2),
        ({"dataloader_drop_last": True, "gradient_accumulation_steps": 3}, 3),
        ({"max_steps": 5}, 1),
        ({"num_train_epochs": 1.5, "data_seed": 5}, 1),
        ({"train_sampling_strategy": "sequential"}, 1),
    ],
)
def test_the_rows_of_every_step_are_those_that_were_batched(tmp_path, options, accumulated):
    trainer, seen = recorded(tmp_path, **options)
    order = json.loads((tmp_path / "influence" / "order.json").read_text())
    expected, left = [], list(seen.batches)
    per_epoch = len(trainer.get_train_dataloader())
    while left and len(expected) < trainer.state.global_step:
        epoch, left = left[:per_epoch], left[per_epoch:]
        for start in range(0, len(epoch), accumulated):
            expected.append([row for batch in epoch[start : start + accumulated] for row in batch])
    assert order == {"rows": expected[: trainer.state.global_step], "unknown": ""}


def test_an_order_that_cannot_be_known_is_null(tmp_path):
    recorded(tmp_path, train_sampling_strategy="group_by_length")
    order = json.loads((tmp_path / "influence" / "order.json").read_text())
    assert order["rows"] is None
    assert "LengthGroupedSampler" in order["unknown"]
    loader = torch.utils.data.DataLoader(list(range(4)), batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    found, why = batches_of(loader, 0)
    assert found is None
    assert "RandomSampler" in why
    assert torch.equal(torch.get_rng_state(), before)


def test_adapters_rates_and_moments_are_those_of_their_step(tmp_path):
    """Against the trainer's own checkpoints at the same steps."""
    trainer, _ = recorded(tmp_path, epochs=(1, 2), save_strategy="epoch")
    steps = {"epoch-1": 3, "epoch-2": 6, "end": 9}
    model = from_peft(trainer.model, build_tokenizer())
    for name, step in steps.items():
        ours, theirs = tmp_path / "influence" / name, tmp_path / f"checkpoint-{step}"
        one, other = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        kept, read = second_moments(ours, model), second_moments(theirs, model)
        torch.testing.assert_close(kept.v, read.v, rtol=1e-6, atol=0)
        assert (kept.steps, kept.sum_lr) == (step, pytest.approx(read.sum_lr))
        log = TrainingLog.read(ours / "trainer_state.json")
        assert [rate for _, rate in log.rates] == pytest.approx(
            [0.05 * (1 - k / 9) for k in range(step)]
        )
    logged = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    kept = TrainingLog.read(tmp_path / "influence" / "trainer_state.json")
    assert [loss for _, loss in kept.losses] == logged
    assert not list(tmp_path.rglob("*.partial"))


def test_a_resumed_training_goes_on_with_what_was_logged(tmp_path):
    """Rates of the steps before are the trainer's own; the order of a part is not told."""
    recorded(tmp_path, save_strategy="epoch")
    again = plain_trainer(
        tmp_path,
        token_rows(),
        collator=Seen(),
        callbacks=[influence.TrainingRecord(epochs=(2,))],
        save_strategy="epoch",
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    log = TrainingLog.read(tmp_path / "influence" / "trainer_state.json")
    assert [step for step, _ in log.rates] == list(range(1, 10))
    assert [rate for _, rate in log.rates] == pytest.approx([0.05 * (1 - k / 9) for k in range(9)])
    order = json.loads((tmp_path / "influence" / "order.json").read_text())
    assert order == {"rows": None, "unknown": "the training was resumed at step 3"}


def test_early_epochs_and_every_epoch(tmp_path):
    recorded(tmp_path / "some", epochs=(0.5, 2.5, 7))
    kept = sorted(p.name for p in (tmp_path / "some" / "influence").iterdir() if p.is_dir())
    assert kept == ["end", "epoch-0.5", "epoch-2.5"]
    log = TrainingLog.read(tmp_path / "some" / "influence" / "epoch-0.5" / "trainer_state.json")
    assert log.steps == 2  # the first step that reaches it: of three steps an epoch
    recorded(tmp_path / "all", epochs=None)
    kept = sorted(p.name for p in (tmp_path / "all" / "influence").iterdir() if p.is_dir())
    assert kept == ["end", "epoch-1", "epoch-2", "epoch-3"]
    with pytest.raises(InputError, match="expected numbers above 0"):
        influence.TrainingRecord(epochs=(0, 1))


def test_the_recipe_is_the_trainers(tmp_path, capsys):
    recorded(
        tmp_path,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.1,
        adam_beta2=0.98,
        gradient_accumulation_steps=2,
        max_steps=7,
        seed=11,
    )
    recipe = Recipe.read(tmp_path / "influence" / "recipe.json")
    expected = Recipe(0.05, 0.1, (0.9, 0.98), 1e-8, 4, 8, "cosine", 2, 1.0, True, 11, 7)
    assert recipe == Recipe(**{**expected.as_json(), "epochs": recipe.epochs})
    arguments = json.loads((tmp_path / "influence" / "training_args.json").read_text())
    assert arguments["learning_rate"] == 0.05
    capsys.readouterr()
    recorded(tmp_path / "other", optim="adafactor")
    assert not (tmp_path / "other" / "influence" / "recipe.json").exists()
    assert "TrainingRecord keeps no recipe" in capsys.readouterr().err
    assert not list((tmp_path / "other" / "influence").rglob("second_moments*"))  # no Adam


def test_a_folder_that_cannot_be_written_does_not_stop_the_training(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("influence.training_record.save_live_adapter", full)
    trainer, _ = recorded(tmp_path)
    assert trainer.state.global_step == 9
    assert "could not keep epoch-1: no space left" in capsys.readouterr().err


def test_another_process_than_the_first_writes_nothing(tmp_path):
    from transformers import TrainerState, TrainingArguments

    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    record, state = influence.TrainingRecord(), TrainerState(is_world_process_zero=False)
    record.on_train_begin(arguments, state, None)
    record.on_train_end(arguments, state, None, model=None)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_training_is_no_part_of_the_record(tmp_path, capsys):
    """Its adapters are moved aside, whole; those of a training that is resumed stay."""
    recorded(tmp_path, epochs=(0.5, 2))
    early = load_file(tmp_path / "influence" / "epoch-0.5" / WEIGHTS)
    recorded(tmp_path, epochs=(1, 2), learning_rate=0.001, save_strategy="epoch")
    record, aside = tmp_path / "influence", tmp_path / "influence" / "earlier-1"
    assert "moved what an earlier training left" in capsys.readouterr().err
    found = TrainerOutput.find(tmp_path)
    assert {place.name for place in found.checkpoints if place.parent == record} == {
        "epoch-1",
        "epoch-2",
    }
    kept = load_file(aside / "epoch-0.5" / WEIGHTS)
    assert all(torch.equal(kept[key], early[key]) for key in early)
    names = {"recipe.json", "training_args.json", "trainer_state.json", "order.json"}
    assert {place.name for place in aside.iterdir()} == {"end", "epoch-0.5", "epoch-2", *names}
    again = plain_trainer(
        tmp_path,
        token_rows(),
        collator=Seen(),
        callbacks=[influence.TrainingRecord(epochs=(3,))],
        save_strategy="epoch",
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    there = {place.name for place in record.iterdir() if place.is_dir()}
    assert there == {"earlier-1", "earlier-2", "end", "epoch-1", "epoch-3"}
    assert (record / "earlier-2" / "epoch-2").is_dir()
