"""Training again: deterministic, without the rows asked for, loadable, nothing half-written."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import influence
import unlearn
from influence.errors import DataError, InputError, NumericalError
from influence.loss import mean_losses
from tests.conftest import build_base, build_tokenizer
from tests.unlearn.retraining.helpers import (
    QUICK,
    SHORT,
    WEIGHTS,
    load_back,
)
from unlearn.retraining import retrain as retrain_module
from unlearn.retraining.retrain import fresh_adapter, renewed_adapter, train


def test_a_removed_row_is_not_learnt_and_the_result_loads(run, tmp_path):
    recipe = unlearn.Recipe(**QUICK)
    before = run.model.snapshot()
    removed = run.train.ids[3]
    full = unlearn.retrain(run, out=tmp_path / "full", recipe=recipe)
    again = unlearn.retrain(run, out=tmp_path / "again", recipe=recipe)
    without = unlearn.retrain(run, [removed], out=tmp_path / "without", recipe=recipe)
    assert (full / "adapter_model.safetensors").read_bytes() == (
        again / "adapter_model.safetensors"
    ).read_bytes()
    losses = {}
    for folder in (full, without):
        losses[folder.name] = mean_losses(
            influence.from_peft(load_back(folder), run.model.tokenizer), run.tokens
        )
    assert losses["without"][3] > losses["full"][3]  # the row that was left out
    assert json.loads((without / "retrain.json").read_text())["removed"] == [removed]
    assert torch.equal(run.model.snapshot(), before)
    assert not list(tmp_path.glob("*.partial"))


def test_wrong_requests_write_nothing(run, tmp_path):
    ids = run.train.ids
    for remove, error, sentence in (
        (["nobody"], DataError, "no example has the id 'nobody'"),
        ([ids[0], ids[0]], InputError, "given more than once"),
        (ids, InputError, "nothing is left to train on"),
    ):
        with pytest.raises(error, match=sentence):
            unlearn.retrain(run, remove, out=tmp_path / "out", recipe=unlearn.Recipe(**QUICK))
    for options, sentence in (
        (
            {"checkpoints": (0, 3, 9)},
            "checkpoints after epochs 0, 9 were asked for; expected 1 to 4",
        ),
        ({"checkpoints": (4,), "stop_after": 3}, "after epochs 4 were asked for; expected 1 to 3"),
        ({"stop_after": 5}, "stop_after 5 was given; the recipe has epochs 1 to 4"),
    ):
        with pytest.raises(InputError, match=sentence):
            unlearn.retrain(run, out=tmp_path / "out", recipe=SHORT, **options)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file; an adapter is a directory"):
        unlearn.retrain(run, out=tmp_path / "file", recipe=SHORT, overwrite=True)
    assert not (tmp_path / "out").exists()


def oracle(data, recipe, stop_after):
    """Train by the recipe in plain torch: the token mean of a batch, a loop over its tokens."""
    from peft import LoraConfig, get_peft_model

    base = build_base("llama", layers=1)
    config = LoraConfig(
        r=2, lora_alpha=3, lora_dropout=0.25, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(recipe.seed)
        model = get_peft_model(base, config)
    model.eval()
    encode = build_tokenizer()
    items = []
    for example in data:
        prompt, completion = encode(example.prompt).input_ids, encode(example.completion).input_ids
        items.append((prompt + completion + [1], [-100] * len(prompt) + completion + [1]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=1.0, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    per_epoch = int(np.ceil(len(items) / recipe.batch_size))
    step, total, used = 0, recipe.epochs * per_epoch, 0.0
    for _ in range(stop_after):
        order = torch.randperm(len(items), generator=generator).tolist()
        for start in range(0, len(items), recipe.batch_size):
            batch = [items[i] for i in order[start : start + recipe.batch_size]]
            width = max(len(ids) for ids, _ in batch)
            inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
            labels = torch.tensor([target + [-100] * (width - len(target)) for _, target in batch])
            mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
            rate = recipe.lr * (1 - step / total)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            logs = model(input_ids=inputs, attention_mask=mask).logits.log_softmax(
                -1
            )  # their own loss is in float32
            wanted = [
                (i, t) for i in range(len(batch)) for t in range(1, width) if labels[i, t] >= 0
            ]
            loss = -sum(logs[i, t - 1, labels[i, t]] for i, t in wanted) / len(wanted)
            loss.backward()
            optimizer.step()
            step, used = step + 1, used + rate
    state = {"epoch": stop_after, "step": step, "lr": rate, "sum_lr": used, "loss": loss.item()}
    return {
        name: value.detach() for name, value in model.named_parameters() if "lora_" in name
    }, state


def test_equals_a_plain_loop(run, tmp_path):
    recipe = replace(SHORT, dropout=False, seed=3)
    removed = [run.train.ids[0], run.train.ids[5]]
    out = unlearn.retrain(run, removed, out=tmp_path / "out", recipe=recipe, stop_after=3)
    expected, state = oracle([e for e in run.train if e.id not in removed], recipe, 3)
    weights = {name: value for name, value in load_back(out).named_parameters() if "lora_" in name}
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name].detach(), value, rtol=0, atol=1e-10)
    record = json.loads((out / "retrain.json").read_text())
    assert {key: record[key] for key in state} == pytest.approx(state, abs=1e-10)
    assert record["rows"] == 6
    assert record["recipe"] == json.loads(json.dumps(recipe.as_json()))


def test_checkpoints_are_what_a_stopped_training_gives_bit_for_bit(run, tmp_path):
    """With dropout, whose random numbers saving must not use up."""
    plain = unlearn.retrain(run, out=tmp_path / "plain", recipe=SHORT)
    full = unlearn.retrain(run, out=tmp_path / "full", recipe=SHORT, checkpoints=(1, 3))
    short = unlearn.retrain(
        run, out=tmp_path / "short", recipe=SHORT, checkpoints=[3], stop_after=3
    )
    assert sorted(path.name for path in full.glob("epoch-*")) == ["epoch-1", "epoch-3"]
    weights = {
        name: (tmp_path / name / WEIGHTS).read_bytes()
        for name in ("plain", "full", "short", "full/epoch-1")
    }
    assert weights["plain"] == weights["full"]
    assert (
        (full / "epoch-3" / WEIGHTS).read_bytes()
        == weights["short"]
        == (short / "epoch-3" / WEIGHTS).read_bytes()
    )
    assert len(set(weights.values())) == 3
    rates = [2e-2 * (1 - k / 8) for k in range(8)]  # 8 rows in batches of 4, 4 epochs
    for epoch in (1, 3):
        record = json.loads((full / f"epoch-{epoch}" / "retrain.json").read_text())
        assert (record["epoch"], record["step"]) == (epoch, 2 * epoch)
        assert record["lr"] == pytest.approx(rates[2 * epoch - 1], abs=1e-15)
        assert record["sum_lr"] == pytest.approx(sum(rates[: 2 * epoch]), abs=1e-15)
        assert np.isfinite(record["loss"])
        saved = influence.from_peft(load_back(full / f"epoch-{epoch}"), run.model.tokenizer)
        assert saved.adapter_digest == record["adapter_digest"]
    assert not plain.joinpath("epoch-1").exists()


def test_a_renewed_adapter_is_a_fresh_one_and_leaves_the_same_random_numbers(run):
    fresh = fresh_adapter(run.model, 5)
    after = torch.rand(3)
    used = fresh_adapter(run.model, 1)
    train(used, run.tokens, SHORT)
    renewed = renewed_adapter(used, run.model, 5)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(renewed.snapshot(), fresh.snapshot())
    assert renewed.base_digest == run.model.base_digest
    for model in (renewed, fresh):
        train(model, run.tokens, SHORT)
    assert not torch.equal(
        renewed.snapshot(), fresh.snapshot()
    )  # dropout went on from where the first ended
    fresh, used = fresh_adapter(run.model, 5), None
    train(fresh, run.tokens, SHORT)
    renewed = renewed_adapter(renewed, run.model, 5)
    train(renewed, run.tokens, SHORT)
    assert torch.equal(renewed.snapshot(), fresh.snapshot())


def test_the_callers_random_numbers_are_left_alone(run, tmp_path):
    state = torch.get_rng_state()
    unlearn.retrain(run, out=tmp_path / "out", recipe=SHORT)
    unlearn.retrain_subsets(run, unlearn.random_halves(8, 1), out=tmp_path / "t.npz", recipe=SHORT)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_initialisation_that_changes_the_base_is_refused(run):
    config = run.model.model.peft_config["default"]
    config.init_lora_weights = "pissa"
    with pytest.raises(
        InputError, match="init_lora_weights='pissa', which changes the base or reads data"
    ):
        fresh_adapter(run.model, 0)


def test_a_loss_that_is_not_finite_stops_the_training(run):
    model = fresh_adapter(run.model, 0)
    with pytest.raises(
        NumericalError, match=r"the training loss is nan at step .*: lower the recipe's lr"
    ):
        train(model, run.tokens, replace(SHORT, lr=1e300))


def test_a_batch_that_is_too_large_is_split_without_changing_the_training(
    run, tmp_path, monkeypatch
):
    recipe = unlearn.Recipe(epochs=3, batch_size=5, lr=1e-2, dropout=False)
    whole = load_back(unlearn.retrain(run, out=tmp_path / "whole", recipe=recipe))
    monkeypatch.setattr(retrain_module, "MICRO_TOKENS", 12)
    split = load_back(unlearn.retrain(run, out=tmp_path / "split", recipe=recipe))
    pairs = list(zip(whole.named_parameters(), split.named_parameters(), strict=True))
    assert any("lora_" in name for (name, _), _ in pairs)
    for (name, one), (_, other) in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)
