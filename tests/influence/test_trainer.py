"""From a live trainer: its rows as it batches them, its model, and which trainers are refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import influence
from influence import Run
from influence.errors import InputError
from influence.logged_loss import check_losses, without_router
from influence.loss import token_losses
from influence.tokens import Rendering, tokenize
from influence.trainer import router_factor
from influence.trainer_output import TrainerOutput
from tests.conftest import build_tokenizer, rows
from tests.helpers import save_base
from tests.influence.test_experts import build_moe
from tests.influence.toy_trainers import base_of, plain_trainer, sft_trainer, train


def batched(trainer) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of every row, read off the padded batches that training takes."""
    found = []
    for batch in trainer.get_train_dataloader():
        parts = (batch["input_ids"], batch["labels"], batch["attention_mask"])
        for ids, labels, mask in zip(*parts, strict=True):
            real = mask.bool()
            found.append((ids[real].tolist(), labels[real].tolist()))
    return sorted(found)


def read(trainer) -> list[tuple[list[int], list[int]]]:
    """The same of the rows that `from_trainer` makes."""
    _, found = influence.from_trainer(trainer)
    tokens = tokenize(found, build_tokenizer())
    made = []
    for row, item in zip(found, tokens, strict=True):
        labels = np.where(item.supervised, item.input_ids, -100).tolist()
        assert row.input_ids is not None
        made.append((item.input_ids.tolist(), labels))
    return sorted(made)


@pytest.mark.filterwarnings("ignore:every B is zero")
@pytest.mark.parametrize(
    ("name", "data", "arguments"),
    [
        ("pairs", rows(6), {}),
        ("pairs, all tokens", rows(6), {"completion_only_loss": False}),
        ("texts", [{"text": f"{row['prompt']}{row['completion']}"} for row in rows(6)], {}),
        ("cut", rows(6), {"max_length": 7}),
        ("padded to eight", rows(6), {"pad_to_multiple_of": 8}),
    ],
)
def test_rows_are_those_of_the_trainers_batches(tmp_path, name, data, arguments):
    trainer = sft_trainer(tmp_path, data, **arguments)
    expected = [(ids, [-100, *labels[1:]]) for ids, labels in batched(trainer)]
    assert read(trainer) == expected


@pytest.mark.filterwarnings("ignore:every B is zero")
def test_packed_rows_keep_their_documents(tmp_path):
    """One row of several documents, each with positions from 0; its first token is no target."""
    trainer = sft_trainer(
        tmp_path, rows(6), packing=True, max_length=40, model_init_kwargs=None, padding_free=True
    )
    _, found = influence.from_trainer(trainer)
    items = [trainer.data_collator([trainer.train_dataset[i]]) for i in range(len(found))]
    for row, item, tokens in zip(found, items, tokenize(found, build_tokenizer()), strict=True):
        length = len(tokens.input_ids)
        assert row.input_ids == tuple(item["input_ids"][0].tolist())
        assert tokens.position_ids is not None
        assert tokens.position_ids.tolist() == item["position_ids"][0][:length].tolist()
        assert tokens.supervised.tolist() == (item["labels"][0][:length] != -100).tolist()
    assert found.ids == [str(i) for i in range(len(found))]


@pytest.mark.filterwarnings("ignore:every B is zero")
def test_ids_and_groups_survive_where_they_can(tmp_path, capsys):
    data = [{**row, "group": f"g{i % 2}"} for i, row in enumerate(rows(4))]
    _, found = influence.from_trainer(sft_trainer(tmp_path, data))
    assert found.ids == [row["id"] for row in data]
    assert [row.group for row in found] == ["g0", "g1", "g0", "g1"]
    twice = [{**row, "id": "same"} for row in rows(4)]
    _, found = influence.from_trainer(sft_trainer(tmp_path, twice))
    assert found.ids == ["0", "1", "2", "3"]
    assert "the column 'id' holds more than texts and whole numbers that differ" in (
        capsys.readouterr().err
    )
    for name in ("", "a\0"):
        odd = [{**row, "id": name} if n == 1 else row for n, row in enumerate(rows(3))]
        _, found = influence.from_trainer(sft_trainer(tmp_path, odd))
        assert found.ids == ["0", "1", "2"]
        assert "the column 'id' holds more" in capsys.readouterr().err


def token_rows(n: int = 6) -> list[dict[str, list[int]]]:
    """Rows of ids and labels for a plain trainer, one of them without a target."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(n):
        ids = torch.randint(3, 25, (5 + number % 3,), generator=generator).tolist()
        labels = [-100, -100, *ids[2:]] if number != 1 else [-100] * len(ids)
        made.append({"input_ids": ids, "labels": labels})
    return made


def collate(items):
    """Pads on the left: a mask tells which tokens are a row's own."""
    longest = max(len(item["input_ids"]) for item in items) + 2
    pads = [longest - len(item["input_ids"]) for item in items]

    def padded(key, fill):
        values = [[fill] * p + item[key] for p, item in zip(pads, items, strict=True)]
        return torch.tensor(values)

    mask = [[0] * p + [1] * (longest - p) for p in pads]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


@pytest.mark.filterwarnings("ignore:every B is zero")
def test_a_plain_trainer_with_padding_on_the_left(tmp_path, capsys):
    """Its padding is taken off; a row that no token of is supervised is left out, and said."""
    data = token_rows()
    _, found = influence.from_trainer(plain_trainer(tmp_path, data, collator=collate))
    assert found.ids == ["0", "2", "3", "4", "5"]  # the position in the data set
    assert [list(row.input_ids) for row in found] == [
        row["input_ids"] for at, row in enumerate(data) if at != 1
    ]
    assert "1 of 6 rows have no supervised token, and are left out" in capsys.readouterr().err


def test_the_objective_is_the_loss_that_the_trainer_computes(tmp_path):
    """Both in float32: the mean over a batch's labels, by its model, and by the rows made of it."""
    trainer = train(sft_trainer(tmp_path, rows(4), lora={"lora_dropout": 0.0}))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        expected = float(trainer.model(**batch).loss)
    model, found = influence.from_trainer(trainer)
    tokens = tokenize(found, model.tokenizer)
    total = count = 0.0
    for item in tokens:
        logits = model.model(input_ids=torch.tensor(item.input_ids)[None]).logits[0, :-1]
        targets = torch.tensor(item.input_ids)[1:]
        chosen = torch.tensor(item.supervised[1:])
        total += float(token_losses(logits, targets)[chosen].detach().sum())
        count += float(chosen.sum())
    assert total / count == pytest.approx(expected, abs=1e-5)


class WithLoss:
    """Mixed into a trainer: a loss of its own."""

    def compute_loss(self, *arguments, **options):
        return super().compute_loss(*arguments, **options)  # type: ignore[misc]


def test_trainers_that_are_refused(tmp_path):
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    data = token_rows()

    def refused(sentence, trainer):
        with pytest.raises(InputError, match=sentence):
            influence.from_trainer(trainer)

    refused("a dict was given, without model, args", {})
    smooth = plain_trainer(tmp_path, data, collator=collate, label_smoothing_factor=0.1)
    refused("label_smoothing_factor=0.1", smooth)
    noisy = plain_trainer(tmp_path, data, collator=collate, neftune_noise_alpha=5.0)
    refused("training adds noise to the embeddings", noisy)
    func = {"compute_loss_func": lambda outputs, labels, **_: outputs.loss}
    refused("compute_loss_func", plain_trainer(tmp_path, data, collator=collate, more=func))
    refused("train_dataset is None", plain_trainer(tmp_path, None, collator=collate))
    own = type("Mine", (WithLoss, Trainer), {})
    refused("Mine computes its loss by itself", plain_trainer(tmp_path, data, kind=own))
    dpo = type("DPOTrainer", (Trainer,), {"__module__": "trl.trainer.dpo_trainer"})
    refused("a DPOTrainer minimises another objective", plain_trainer(tmp_path, data, kind=dpo))
    masked = DataCollatorForLanguageModeling(build_tokenizer(), mlm=False)
    masked.mlm = True
    refused("masks tokens at random", plain_trainer(tmp_path, data, collator=masked))
    bare = Trainer(base_of(), TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=data)
    refused("a LlamaForCausalLM and no PeftModel", bare)

    def drawn(items):
        batch = collate(items)
        batch["input_ids"] = torch.randint(3, 25, batch["input_ids"].shape)
        return batch

    refused("draws at random", plain_trainer(tmp_path, data, collator=drawn))
    refused("makes no input_ids", plain_trainer(tmp_path, data, collator=lambda items: {"x": 1}))


def test_a_stream_of_rows_is_refused(tmp_path):
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(token_rows())

    trainer = plain_trainer(tmp_path, Stream(), collator=collate, max_steps=2)
    with pytest.raises(InputError, match="its rows are a stream"):
        influence.from_trainer(trainer)


def test_several_reasons_are_told_at_once(tmp_path):
    trainer = plain_trainer(tmp_path, None, collator=collate, label_smoothing_factor=0.1)
    with pytest.raises(InputError, match=r"(?s)train_dataset is None.*label_smoothing_factor"):
        influence.from_trainer(trainer)


# ---- a newcomer ----------------------------------------------------------------------------------


def test_three_lines_after_training(tmp_path, capsys):
    """And the run opens by itself, and by the commands, without the trainer."""
    base = base_of(save_base(tmp_path / "base", layers=1))
    trainer = train(sft_trainer(tmp_path / "out", base=base))
    capsys.readouterr()

    model, found = influence.from_trainer(trainer)
    run = influence.fit(model, found, directory=tmp_path / "run", store="always")
    proponents, _ = run.score(found[:1]).top(0)

    assert proponents[0].id == found[0].id  # a row's own influence is the largest
    said = capsys.readouterr().err
    assert "agrees" in said
    assert "differs" not in said
    again = Run.open(tmp_path / "run", device="cpu")
    assert again.train == found
    assert " → " in again.train[0].preview()  # tables show what the tokens say
    np.testing.assert_array_equal(again.score(found[:2]).values, run.score(found[:2]).values)
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (recipe["lr"], recipe["epochs"], recipe["batch_size"]) == (0.05, 3, 4)


def test_two_commands_after_training(tmp_path, influence):
    """From the trainer's files alone, with rows of the trainer's data set as a file."""
    base = base_of(save_base(tmp_path / "base", layers=1))
    out, data, run = tmp_path / "out", tmp_path / "rows.jsonl", tmp_path / "run"
    train(sft_trainer(out, base=base, save_strategy="epoch"))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    done = influence("fit", "--trainer-output", out, "--train", data, "--run", run)
    assert done.status == 0, done.err
    assert f"the adapter is {out / 'checkpoint-9'}" in done.err
    assert "points are checkpoint-3, checkpoint-6 of" in done.err
    assert "agrees" in done.err
    assert influence("score", "--run", run, "--queries", data).status == 0
    shown = influence("top", "--run", run, "--query", "0", "-k", "2")
    assert shown.status == 0
    assert "r0-0" in shown.out
    assert json.loads((run / "recipe.json").read_text())["lr"] == pytest.approx(0.05)


def test_a_check_tells_rows_that_are_supervised_otherwise(tmp_path, influence):
    """Trained on completions, checked as texts: the loss of prompts was never learned."""
    base = base_of(save_base(tmp_path / "base", layers=1))
    lora = {"target_modules": "all-linear", "r": 8}
    arguments = {"save_strategy": "epoch", "num_train_epochs": 20, "learning_rate": 0.02}
    train(sft_trainer(tmp_path / "out", base=base, lora=lora, **arguments))
    for name, row in (
        ("same.jsonl", lambda row: row),
        ("other.jsonl", lambda row: {"text": row["prompt"] + row["completion"]}),
    ):
        lines = "".join(json.dumps(row(each)) + "\n" for each in rows(12))
        (tmp_path / name).write_text(lines)
    call = ("check", "--trainer-output", tmp_path / "out", "--train")
    done = influence(*call, tmp_path / "same.jsonl", "--json")
    assert (done.status, done.json()["losses"]["agrees"]) == (0, True)
    done = influence(*call, tmp_path / "other.jsonl")
    assert done.status == 1
    assert "differs (expected" in done.out
    assert "rendered, cut or supervised otherwise than in training" in done.out


def test_an_adapter_must_be_named(tmp_path, influence):
    (tmp_path / "rows.jsonl").write_text('{"text": "the red fox"}\n')
    done = influence("fit", "--train", tmp_path / "rows.jsonl", "--run", tmp_path / "run")
    assert done.status == 2
    assert "trainer-output DIR" in done.err


# ---- routers -------------------------------------------------------------------------------------


def test_the_loss_of_a_router_is_said_and_taken_off(tmp_path, capsys):
    """With a factor so large that the logged losses are mostly it: the rest agrees."""
    moe = build_moe("gpt_oss", dtype=torch.float32)
    trainer = sft_trainer(
        tmp_path, base=moe, router_aux_loss_coef=2.0, callbacks=[influence.TrainingRecord()]
    )
    train(trainer)
    model, found = influence.from_trainer(trainer)
    said = capsys.readouterr().err
    assert "minimises the router's load-balancing loss too, 2 times" in said
    check = check_losses(model, found, Rendering(), model.training)
    assert check is not None
    assert check.agrees
    assert "2 times the logged aux_loss is taken off" in capsys.readouterr().err
    logged = {e["step"]: e for e in trainer.state.log_history if "loss" in e}
    assert model.training is not None
    assert model.training.log is not None
    alone, _ = without_router(model.training.log, model.model.config, model.training)
    for step, value in alone.losses:
        assert value == pytest.approx(logged[step]["loss"] - 2 * logged[step]["aux_loss"])
    # from files the same
    output = TrainerOutput.find(tmp_path).training(len(found))
    assert output.router == 2.0
    check = check_losses(model, found, Rendering(), output)
    assert check is not None
    assert check.agrees


def test_the_loss_of_a_router_that_is_not_logged_is_not_compared(tmp_path, capsys):
    moe = build_moe("mixtral", dtype=torch.float32)
    off = sft_trainer(tmp_path, base=moe, router_aux_loss_coef=0.0)
    assert router_factor(off) == 0
    trainer = train(plain_trainer(tmp_path, token_rows(), collator=collate, base=moe_logged()))
    model, found = influence.from_trainer(trainer)
    assert "load-balancing loss too, 0.001 times" in capsys.readouterr().err
    assert check_losses(model, found, Rendering(), model.training) is None
    assert "do not tell how much of it: they are not compared" in capsys.readouterr().err


def moe_logged():
    """A mixture of experts whose own loss holds its router's."""
    base = build_moe("mixtral", dtype=torch.float32)
    base.config.output_router_logits = True
    return base


def test_rates_of_another_schedule_are_not_kept_as_the_recipe(tmp_path, capsys):
    """An optimiser and a schedule that are given are none of the arguments'."""
    trainer = plain_trainer(tmp_path, token_rows(), collator=collate)
    optimizer: Any = trainer.create_optimizer()
    steps = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step // 2))
    trainer.lr_scheduler = steps
    train(trainer)
    model, _ = influence.from_trainer(trainer)
    assert model.training is not None
    assert model.training.recipe is None
    assert "not those of its arguments" in capsys.readouterr().err


def test_commands_cut_and_supervise_as_the_trainer_recorded(tmp_path, influence):
    from influence import TrainingRecord

    base = base_of(save_base(tmp_path / "base", layers=1))
    out, data = tmp_path / "out", tmp_path / "rows.jsonl"
    record, options = TrainingRecord(), {"completion_only_loss": False, "max_length": 64}
    train(sft_trainer(out, base=base, callbacks=[record], **options))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    call = ("fit", "--trainer-output", out, "--train", data, "--path", "1.0", "--json", "--run")
    done = influence(*call, tmp_path / "a")
    assert done.status == 0, done.err
    assert "rows are cut to 64 tokens and supervised by 'all'" in done.err
    assert "agrees" in done.err
    objective = json.loads(done.out)["manifest"]["objective"]
    assert (objective["max_length"], objective["supervise"]) == (64, "all")
    done = influence(*call, tmp_path / "b", "--supervise", "last")
    assert "rows are cut to" not in done.err
    assert json.loads(done.out)["manifest"]["objective"]["max_length"] is None
