"""Training again: deterministic, without the rows asked for, loadable anywhere, nothing half-written, resumable."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import influence
import unlearn
from influence.errors import DataError, InputError, MismatchError, NumericalError, StoreError
from influence.loss import mean_losses
from influence.tokens import tokenize
from tests.conftest import add_lora, build_base, build_model, build_tokenizer, examples, rows
from unlearn.cli import main
from unlearn.retraining.recipe import recipe_of
from unlearn.retraining.retrain import fresh_adapter, renewed_adapter, train

MODULE = sys.modules[
    "unlearn.retraining.retrain"
]  # `unlearn.retraining.retrain` is the function of that name
QUICK = {"epochs": 30, "batch_size": 4, "lr": 2e-2, "dropout": False}
SHORT = unlearn.Recipe(epochs=4, batch_size=4, lr=2e-2)  # with dropout
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def run(tmp_path):
    return influence.fit(
        build_model("llama", layers=1), examples(8), directory=tmp_path / "run", store="never"
    )


def load_back(folder):
    from peft import PeftModel

    model = PeftModel.from_pretrained(build_base("llama", layers=1), str(folder))
    model.double()
    return model


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


# ---- training ----------------------------------------------------------------------------------------------


def oracle(data, recipe, stop_after):
    """Train by the recipe in plain torch: the token mean over a right-padded batch, a loop over its tokens."""
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
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        own, lr=1.0, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay
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
    found = {"epoch": stop_after, "step": step, "lr": rate, "sum_lr": used, "loss": loss.item()}
    return {
        name: value.detach() for name, value in model.named_parameters() if "lora_" in name
    }, found


def test_equals_a_plain_loop(run, tmp_path):
    recipe = replace(SHORT, dropout=False, seed=3)
    removed = [run.train.ids[0], run.train.ids[5]]
    out = unlearn.retrain(run, removed, out=tmp_path / "out", recipe=recipe, stop_after=3)
    expected, state = oracle([e for e in run.train if e.id not in removed], recipe, 3)
    found = {name: value for name, value in load_back(out).named_parameters() if "lora_" in name}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=0, atol=1e-10)
    record = json.loads((out / "retrain.json").read_text())
    assert {key: record[key] for key in state} == pytest.approx(state, abs=1e-10)
    assert record["rows"] == 6
    assert record["recipe"] == json.loads(json.dumps(asdict(recipe)))


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


# ---- recipes -----------------------------------------------------------------------------------------------


def test_recipes_are_checked(tmp_path):
    with pytest.raises(InputError, match="schedule 'step' was given; expected one of linear"):
        unlearn.Recipe(schedule="step")
    for text, sentence in (
        ('{"learning_rate": 1}', "unknown keys: learning_rate"),
        ("[1]", "holds no JSON object"),
        ("{", "cannot be read"),
        ('{"lr": "high"}', "recipe .*recipe.json: a recipe needs whole epochs"),
        ('{"lr": NaN}', "finite"),
        ('{"epochs": 2.5}', "whole epochs"),
        ('{"dropout": 1}', "dropout true or false"),
        ('{"betas": 0.9}', "betas 0.9; expected two numbers"),
        ('{"lr": 0}', "lr and eps above 0"),
        ('{"betas": [0.9, 1.5]}', r"betas in \[0, 1\)"),
        ('{"weight_decay": -1}', "weight_decay of at least 0"),
    ):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(InputError, match=sentence):
            unlearn.Recipe.read(tmp_path / "recipe.json")


TRAINER = {
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-7,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "max_steps": -1,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch",
    "seed": 42,
}


def test_the_recipe_is_the_recorded_one(run, tmp_path, capsys):
    assert recipe_of(run) == unlearn.Recipe()
    assert "may not be how this adapter was trained" in capsys.readouterr().err
    folder = tmp_path / "adapter"
    folder.mkdir()
    run.manifest["adapter"]["path"] = str(folder)
    (folder / "trainer_state.json").write_text(
        '{"epoch": 3.0, "train_batch_size": 2}'
    )  # not enough: no guess
    assert recipe_of(run) == unlearn.Recipe()
    (folder / "training_args.json").write_text(json.dumps(TRAINER))
    expected = unlearn.Recipe(1e-3, 0.0, (0.9, 0.98), 1e-7, 3, 8, "cosine", 0, 1.0, True, 42)
    capsys.readouterr()
    assert recipe_of(run) == expected
    assert "not in which order it saw the rows" in capsys.readouterr().err
    (folder / "retrain.json").write_text(json.dumps({"recipe": asdict(SHORT), "epoch": 4}))
    assert recipe_of(run) == SHORT
    (folder / "retrain.json").write_text(json.dumps({"recipe": asdict(SHORT), "epoch": 3}))
    with pytest.raises(InputError, match="stopped after epoch 3 of 4: give the recipe"):
        recipe_of(run)
    (folder / "recipe.json").write_text('{"epochs": 2, "lr": 0.5}')
    assert recipe_of(run) == unlearn.Recipe(epochs=2, lr=0.5)
    out = unlearn.retrain(run, out=tmp_path / "out")
    assert json.loads((out / "retrain.json").read_text())["recipe"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"optim": "adafactor"}, "a recipe cannot express optim='adafactor'"),
        ({"max_steps": 100}, "cannot express max_steps=100"),
        ({"packing": True}, "cannot express packing=True"),
        ({"dataloader_drop_last": True}, "cannot express dataloader_drop_last=True"),
        ({"warmup_ratio": 0.1}, "cannot express warmup_ratio=0.1"),
        ({"lr_scheduler_type": "polynomial"}, "schedule 'polynomial' was given"),
        ({"num_train_epochs": 2.5}, "whole epochs"),
        ({"per_device_train_batch_size": "4"}, "it lacks per_device_train_batch_size"),
        ({"seed": ...}, "it lacks seed"),
    ],
)
def test_training_arguments_that_a_recipe_cannot_follow(change, sentence):
    changed = {key: value for key, value in {**TRAINER, **change}.items() if value is not ...}
    with pytest.raises(InputError, match=sentence):
        unlearn.Recipe.of_training_arguments(changed, "training_args.json")


# ---- subsets -----------------------------------------------------------------------------------------------


def test_random_halves():
    masks = unlearn.random_halves(9, 200, 1)
    assert masks.dtype == bool
    assert (masks.sum(axis=1) == 4).all()
    assert np.abs(masks.mean(axis=0) - 4 / 9).max() < 0.15
    np.testing.assert_array_equal(unlearn.random_halves(9, 3, 1), masks[:3])
    assert not np.array_equal(unlearn.random_halves(9, 3, 2), masks[:3])
    groups = ["a", "b", "a", "c", "b", "d", "c", "d", "a"]
    grouped = unlearn.random_halves(9, 20, 1, groups)
    for label in "abcd":
        inside = grouped[:, [g == label for g in groups]]
        assert (inside.all(axis=1) | ~inside.any(axis=1)).all()
    assert set(grouped[:, [0, 1, 3, 5]].sum(axis=1)) == {2}
    assert (unlearn.random_halves(10, 5, fraction=0.8).sum(axis=1) == 8).all()
    for arguments, options in (
        ((1, 2), {}),
        ((9, 0), {}),
        ((9, 2), {"fraction": 1.0}),
        ((4, 2, 0, "aaaa"), {}),
    ):
        with pytest.raises(InputError, match="which keeps something and leaves something out"):
            unlearn.random_halves(*arguments, **options)
    with pytest.raises(InputError, match="2 groups were given for 9 rows"):
        unlearn.random_halves(9, 2, 0, "ab")


def queries():
    return examples(3, seed=9)


@pytest.fixture
def masks():
    return unlearn.random_halves(8, 4)


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def test_subsets_are_retrainings_without_the_other_rows(run, masks, tmp_path):
    seeds = [0, 0, 7, 0]
    done = unlearn.retrain_subsets(
        run, masks, queries(), out=tmp_path, recipe=SHORT, seeds=seeds, keep_adapters=True
    )
    assert done.path == tmp_path / "truth.npz"
    asked = tokenize(queries(), run.model.tokenizer)
    for k, (mask, seed) in enumerate(zip(masks, seeds, strict=True)):
        removed = [id for id, kept in zip(run.train.ids, mask, strict=True) if not kept]
        one = unlearn.retrain(
            run, removed, out=tmp_path / f"one-{k}", recipe=replace(SHORT, seed=seed)
        )
        assert (one / WEIGHTS).read_bytes() == (tmp_path / f"subset-{k:03d}" / WEIGHTS).read_bytes()
        model = influence.from_peft(load_back(one), run.model.tokenizer)
        np.testing.assert_allclose(
            done.query_loss[k], mean_losses(model, asked), rtol=0, atol=1e-12
        )
        np.testing.assert_allclose(
            done.train_loss[k], mean_losses(model, run.tokens), rtol=0, atol=1e-12
        )
    found = arrays(done.path)
    np.testing.assert_array_equal(found["masks"], masks)
    np.testing.assert_array_equal(found["query_loss"], done.query_loss)
    np.testing.assert_array_equal(found["train_loss"], done.train_loss)
    assert found["train_ids"].tolist() == run.train.ids
    assert found["query_ids"].tolist() == queries().ids
    assert found["seeds"].tolist() == seeds
    assert found["done"].all()
    assert str(found["run_digest"]) == run.digest
    assert json.loads(str(found["request"]))["recipe's lr"] == SHORT.lr


class Killed(BaseException):
    pass


def dying(monkeypatch, after, error):
    """Let `after` trainings through and raise in the next one, half-way."""
    count = iter(range(100))

    def once(model, tokens, recipe, **options):
        loss = train(model, tokens, recipe, **options)
        if next(count) == after:
            raise error
        return loss

    monkeypatch.setattr(MODULE, "train", once)


def test_killed_and_called_again_gives_the_same_file(run, masks, tmp_path, monkeypatch):
    whole = unlearn.retrain_subsets(run, masks, queries(), out=tmp_path / "whole.npz", recipe=SHORT)
    for after in (0, 2):
        path = tmp_path / f"killed-{after}.npz"
        with monkeypatch.context() as patch:
            dying(patch, after, Killed())
            with pytest.raises(Killed):
                unlearn.retrain_subsets(run, masks, queries(), out=path, recipe=SHORT)
        assert path.exists() == (after > 0)
        if after:
            half = arrays(path)
            assert half["done"].tolist() == [True, True, False, False]
            np.testing.assert_array_equal(half["query_loss"], whole.query_loss[:2])
            np.testing.assert_array_equal(half["masks"], masks[:2])
        trained = []
        with monkeypatch.context() as patch:
            patch.setattr(
                MODULE, "train", lambda m, t, r, seen=trained: seen.append(t.ids) or train(m, t, r)
            )
            again = unlearn.retrain_subsets(run, masks, queries(), out=path, recipe=SHORT)
        assert trained == [
            [run.train.ids[i] for i in np.flatnonzero(mask)] for mask in masks[after:]
        ]
        np.testing.assert_array_equal(again.query_loss, whole.query_loss)
        np.testing.assert_array_equal(again.train_loss, whole.train_loss)
        assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    with monkeypatch.context() as patch:
        dying(patch, 0, AssertionError("a finished one trains nothing"))
        finished = unlearn.retrain_subsets(run, masks, queries(), out=path, recipe=SHORT)
    np.testing.assert_array_equal(finished.query_loss, whole.query_loss)
    assert not list(tmp_path.glob("*.partial"))


def test_a_kill_while_writing_leaves_the_last_complete_file(run, masks, tmp_path, monkeypatch):
    path = tmp_path / "truth.npz"
    savez = np.savez
    written = []

    def half(handle, **parts):
        savez(handle, **parts)
        written.append(1)
        if len(written) == 2:
            handle.truncate(100)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half)
        with pytest.raises(Killed):
            unlearn.retrain_subsets(run, masks, queries(), out=path, recipe=SHORT)
    assert arrays(path)["done"].tolist() == [True, False, False, False]
    assert unlearn.retrain_subsets(
        run, masks, queries(), out=path, recipe=SHORT
    ).query_loss.shape == (4, 3)


def test_another_request_is_refused_by_name(run, masks, tmp_path):
    path = tmp_path / "truth.npz"
    recipe = replace(SHORT, epochs=1)
    unlearn.retrain_subsets(run, masks, queries(), out=path, recipe=recipe)
    before = path.read_bytes()
    other = influence.fit(
        build_model("llama", layers=1), examples(8, seed=1), directory=tmp_path / "o", store="never"
    )
    for given, difference in (
        ((run, ~masks, queries(), recipe, None), "masks is"),
        ((run, masks[:3], queries(), recipe, None), "number of subsets is 4, now 3"),
        ((run, masks, queries()[:2], recipe, None), "queries is"),
        ((run, masks, None, recipe, None), "queries is"),
        (
            (run, masks, queries(), replace(recipe, lr=1e-3), None),
            r"recipe's lr is 0.02, now 0.001\. Ask",
        ),
        (
            (run, masks, queries(), recipe, [1, 2, 3, 4]),
            r"seeds is \[0, 0, 0, 0\], now \[1, 2, 3, 4\]",
        ),
        ((other, masks, queries(), recipe, None), "training rows is"),
    ):
        *where, how, seeds = given
        with pytest.raises(MismatchError, match=f"holds other subsets: .*{difference}"):
            unlearn.retrain_subsets(*where, out=path, recipe=how, seeds=seeds)
    assert path.read_bytes() == before
    unlearn.retrain_subsets(run, ~masks, queries(), out=path, recipe=recipe, overwrite=True)
    np.testing.assert_array_equal(arrays(path)["masks"], ~masks)


def test_foreign_and_damaged_files_are_kept(run, masks, tmp_path):
    np.savez(tmp_path / "foreign.npz", masks=masks, query_loss=np.zeros((4, 3)))
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 and then nothing")
    np.save(tmp_path / "array.npy", masks)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "pickled.npz", request=np.array([{}], dtype=object))
    for name, error, sentence in (
        ("foreign", InputError, "was not written by retraining subsets"),
        ("damaged", StoreError, "is damaged or no .npz"),
        ("array", StoreError, "is damaged or no .npz"),
        ("pickled", StoreError, "is damaged or no .npz"),
    ):
        path = tmp_path / f"{name}.npz"
        before = path.read_bytes()
        with pytest.raises(error, match=sentence):
            unlearn.retrain_subsets(run, masks, queries(), out=path, recipe=SHORT)
        assert path.read_bytes() == before
    unlearn.retrain_subsets(
        run, masks, None, out=path, recipe=replace(SHORT, epochs=1), overwrite=True
    )
    assert arrays(path)["query_loss"].shape == (4, 0)


def test_a_subset_that_diverges_is_named_and_the_others_are_saved(
    run, masks, tmp_path, monkeypatch
):
    path = tmp_path / "truth.npz"
    whole = unlearn.retrain_subsets(run, masks, queries(), out=tmp_path / "whole.npz", recipe=SHORT)
    sentence = "1 of 4 subsets have no finite losses .subset 1: lower.*; the 3 others are in"
    with monkeypatch.context() as patch:
        dying(patch, 1, NumericalError("lower the recipe's lr"))
        with pytest.raises(NumericalError, match=sentence):
            unlearn.retrain_subsets(run, masks, queries(), out=path, recipe=SHORT)
    found = arrays(path)
    assert found["done"].tolist() == [True, False, True, True]
    np.testing.assert_array_equal(found["query_loss"], whole.query_loss[[0, 2, 3]])
    np.testing.assert_array_equal(found["masks"], masks[[0, 2, 3]])
    unlearn.retrain_subsets(run, masks, queries(), out=path, recipe=SHORT)
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_a_loss_that_is_not_finite_stops_the_training(run):
    model = fresh_adapter(run.model, 0)
    with pytest.raises(
        NumericalError, match=r"the training loss is nan at step .*: lower the recipe's lr"
    ):
        train(model, run.tokens, replace(SHORT, lr=1e300))


def test_masks_are_checked(run, masks, tmp_path):
    for wrong in (masks.astype(int), masks[:, :7], masks[0], masks[:0]):
        with pytest.raises(InputError, match=r"expected bool \[subsets, 8\]"):
            unlearn.retrain_subsets(run, wrong, out=tmp_path / "t.npz", recipe=SHORT)
    with pytest.raises(InputError, match="subsets 1 keep no row"):
        unlearn.retrain_subsets(
            run,
            masks & np.array([True, False, True, True])[:, None],
            out=tmp_path / "t.npz",
            recipe=SHORT,
        )
    with pytest.raises(InputError, match="2 seeds were given for 4 subsets"):
        unlearn.retrain_subsets(run, masks, out=tmp_path / "t.npz", recipe=SHORT, seeds=[1, 2])
    assert not (tmp_path / "t.npz").exists()


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with base/, adapter/, train.jsonl, queries.jsonl, recipe.json and run/."""
    at = tmp_path_factory.mktemp("retrain")
    base = build_base("llama", layers=1, dtype=torch.float32)
    base.save_pretrained(at / "base")
    build_tokenizer().save_pretrained(at / "base")
    add_lora(base).save_pretrained(at / "adapter")
    for name, items in (("train", rows(8)), ("queries", rows(3, seed=9))):
        (at / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    (at / "recipe.json").write_text('{"epochs": 3, "batch_size": 4, "lr": 0.02}')
    model = influence.load(at / "base", at / "adapter", device="cpu")
    influence.fit(
        model,
        influence.read_examples(at / "train.jsonl"),
        curvature=influence.Identity(),
        directory=at / "run",
    )
    return at


@pytest.fixture
def command(made, run_main):
    """Call `unlearn retrain` in this process: status, standard output, standard error."""
    fixed = [
        "unlearn",
        "retrain",
        "--run",
        made / "run",
        "--recipe",
        made / "recipe.json",
        "--device",
        "cpu",
    ]
    return lambda *arguments: run_main(main, *fixed, *arguments)


def test_the_command_trains_without_rows_or_on_all_and_keeps_epochs(command, tmp_path):
    result = command("--ids", "r0-1,r0-2", "--out", tmp_path / "without")
    assert (result.status, result.out) == (
        0,
        f"{tmp_path / 'without'}: trained without 2 rows\n",
    ), result.err
    result = command(
        "--all-rows", "--keep-epochs", "2,1", "--stop-after", 2, "--out", tmp_path / "all", "--json"
    )
    assert json.loads(result.out) == {
        "out": str(tmp_path / "all"),
        "removed": [],
        "checkpoints": [1, 2],
    }
    assert (tmp_path / "all" / "epoch-2" / WEIGHTS).read_bytes() == (
        tmp_path / "all" / WEIGHTS
    ).read_bytes()


def test_the_command_retrains_subsets_and_says_how_long_it_takes(command, made, tmp_path):
    arguments = [
        "--subsets",
        3,
        "--subset-seed",
        4,
        "--queries",
        made / "queries.jsonl",
        "--out",
        tmp_path / "t.npz",
    ]
    result = command(*arguments, "--fraction", 0.75)
    assert result.status == 0, result.err
    assert (
        result.out
        == f"{tmp_path / 't.npz'}: losses of 3 queries and 8 rows under 3 retrained adapters\n"
    )
    assert "retrained subset 0: 1 of 3 done, about " in result.err
    np.testing.assert_array_equal(
        arrays(tmp_path / "t.npz")["masks"], unlearn.random_halves(8, 3, 4, fraction=0.75)
    )
    again = command(*arguments, "--fraction", 0.75)
    assert (again.status, again.out) == (0, result.out)
    assert "retrained subset" not in again.err
    other = command(*arguments)
    assert (other.status, other.out) == (2, "")
    assert "holds other subsets: masks is" in other.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            [],
            "give exactly one of --ids A,B,C, --ids-file FILE (one id per line), --all-rows, --edit DIR and --subsets N: none of",
        ),
        (["--ids", "r0-1", "--subsets", 3], "--ids and --subsets was given"),
        (["--ids", "r0-1", "--all-rows"], "--ids and --all-rows was given"),
        (["--ids", " , "], "no ids were given"),
        (["--ids", "r0-1", "--queries", "q"], "--queries goes with --subsets N only"),
        (
            ["--all-rows", "--fraction", 0.3, "--subset-seed", 0],
            "--fraction, --subset-seed goes with --subsets N only",
        ),
        (["--subsets", 3, "--keep-epochs", "1"], "--keep-epochs cannot go with --subsets"),
        (["--subsets", 3], "name their file with --queries FILE"),
        (
            ["--all-rows", "--keep-epochs", "one"],
            "--keep-epochs 'one' was given; expected whole numbers",
        ),
        (
            ["--all-rows", "--keep-epochs", "4"],
            "checkpoints after epochs 4 were asked for; expected 1 to 3",
        ),
        (["--all-rows", "--stop-after", 0], "stop_after 0 was given; the recipe has epochs 1 to 3"),
    ],
)
def test_wrong_calls_exit_with_two_and_write_nothing(command, tmp_path, arguments, sentence):
    result = command(*arguments, "--out", tmp_path / "new")
    assert result.status == 2
    assert sentence in " ".join(result.err.split())
    assert result.out == ""
    assert not list(tmp_path.iterdir())


def test_wrong_numbers_of_subsets(command, made, tmp_path):
    for options, sentence in (
        (["--subsets", 0], "0 subsets of 0.5 of 8 rows"),
        (["--subsets", 2, "--fraction", 1], "2 subsets of 1 of 8 rows"),
    ):
        result = command(*options, "--queries", made / "queries.jsonl", "--out", tmp_path / "t.npz")
        assert result.status == 2
        assert sentence in result.err
    assert not list(tmp_path.iterdir())


# ---- real data ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_testbed_is_retrained(testbed, tmp_path):
    """Its recipe is the default one: all rows give the shipped adapter, a half gives the recorded losses.

    Measured: losses of the whole within 1.6e-4 per row (relative distance of the parameters 3.8e-4), of halves within 5e-5.
    """
    model = influence.load(testbed / "base", testbed / "adapter", device="cpu")
    data = influence.read_examples(testbed / "train.jsonl")
    asked = influence.read_examples(testbed / "query.jsonl")
    run = influence.fit(
        model, data, curvature=influence.Identity(), directory=tmp_path / "run", store="never"
    )
    recorded = arrays(testbed / "truth.npz")
    whole = influence.load(
        testbed / "base",
        unlearn.retrain(run, out=tmp_path / "all", recipe=unlearn.Recipe()),
        device="cpu",
    )
    distance = (whole.snapshot() - model.snapshot()).norm() / model.snapshot().norm()
    assert float(distance) < 5e-3
    shipped = mean_losses(model, run.tokens)
    np.testing.assert_allclose(shipped, recorded["full_train_loss"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(mean_losses(whole, run.tokens), shipped, rtol=0, atol=2e-3)
    half = unlearn.retrain_subsets(
        run, recorded["masks"][3:4], asked, out=tmp_path / "truth.npz", recipe=unlearn.Recipe()
    )
    np.testing.assert_allclose(half.query_loss[0], recorded["query_loss"][3], rtol=0, atol=0.02)
    np.testing.assert_allclose(half.train_loss[0], recorded["train_loss"][3], rtol=0, atol=0.02)


def test_a_batch_that_is_too_large_is_split_without_changing_the_training(
    run, tmp_path, monkeypatch
):
    recipe = unlearn.Recipe(epochs=3, batch_size=5, lr=1e-2, dropout=False)
    whole = load_back(unlearn.retrain(run, out=tmp_path / "whole", recipe=recipe))
    monkeypatch.setattr(sys.modules["unlearn.retraining.retrain"], "MICRO_TOKENS", 12)
    split = load_back(unlearn.retrain(run, out=tmp_path / "split", recipe=recipe))
    pairs = list(zip(whole.named_parameters(), split.named_parameters(), strict=True))
    assert any("lora_" in name for (name, _), _ in pairs)
    for (name, one), (_, other) in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)
