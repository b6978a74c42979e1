"""The path's scales and checkpoints: their shares, labels, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import influence
from influence.errors import AdapterError, InputError, MismatchError
from influence.run import Run
from influence.scorefile import Scores
from tests.conftest import build_model, examples, fit_end, rows
from tests.helpers import edit_config, save, write_rows
from tests.oracles import averaged, close, kappa, singles

pytestmark = pytest.mark.usefixtures("credit_when_asked_for")

SITES = {"layers": 1, "target_modules": ["attn.c_attn"]}


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", **SITES)


@pytest.mark.parametrize(
    "path",
    [(0,), (1.5,), (0.4, 0.4), (float("nan"),), (), (-0.5, 0.5), (float("inf"),), (0.5, 0.0)],
)
def test_bad_paths_are_refused_before_anything_is_written(model, tmp_path, path):
    with pytest.raises(InputError, match="path"):
        influence.fit(model, examples(3), path=path, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", [0.4, "0.4,0.6", ("a", "b")])
def test_a_path_of_another_type_is_refused_with_a_sentence(model, tmp_path, path):
    with pytest.raises(InputError, match="path"):
        influence.fit(model, examples(3), path=path, directory=tmp_path / "run")


def test_labels_tell_points_apart(model, tmp_path):
    """Two scales that print alike: `--at` could not say which is meant."""
    data = examples(3)
    try:
        fitted = influence.fit(model, data, path=(0.4, 0.4000001), directory=tmp_path / "run")
    except InputError:
        return
    labels = [point.label for point in fitted.manifest.points]
    assert len(set(labels)) == len(labels)


def checkpoint(folder: Path, model, seed: int, *, trainer=None, retrain=None) -> Path:
    """A PEFT folder with the model's adapter moved a little, and what training recorded there."""
    noise = torch.randn(
        model.space.size, generator=torch.Generator().manual_seed(seed), dtype=model.dtype
    )
    with model.moved(0.1 * noise), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.model.save_pretrained(folder)
    if trainer is not None:
        (folder / "trainer_state.json").write_text(json.dumps(trainer))
    if retrain is not None:
        (folder / "retrain.json").write_text(json.dumps(retrain))
    return folder


def log(step: int, *entries) -> dict:
    return {
        "global_step": step,
        "log_history": [{"step": s, "learning_rate": r} for s, r in entries],
    }


@contextlib.contextmanager
def weights_of(model, folder: Path):
    """The live model with the weights of a PEFT folder, copied by name."""
    stored, before = load_file(folder / "adapter_model.safetensors"), model.snapshot()
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(stored[name.replace(".default", "")])
    try:
        yield
    finally:
        model.restore(before)


def at_checkpoints(model, data, queries, folder, folders):
    pairs = []
    for number, place in enumerate(folders):
        with weights_of(model, place):
            one = fit_end(model, data, directory=folder / f"at-{number}")
            scores = one.score(queries, credit="additive").values
            pairs.append((scores, one.self_influence(credit="additive").values))
    return pairs


def test_checkpoints_count_by_their_learning_rate(model, tmp_path, double, capfd):
    data, queries = examples(6), examples(3, seed=1)
    trainer = log(20, (10, 0.5), (20, 0.3), (30, 0.9))  # the last entry is of a later step
    folders = [
        checkpoint(tmp_path / "a", model, 1, trainer=trainer),
        checkpoint(tmp_path / "b", model, 2, retrain={"lr": 0.1}),
        checkpoint(tmp_path / "c", model, 3, trainer=log(30, (20, 0.3), (30, 0.0))),
    ]
    fitted = influence.fit(model, data, checkpoints=folders, directory=tmp_path / "run")
    assert (
        f"note: {folders[2]} is left out: training had a learning rate of 0 there"
        in capfd.readouterr().err
    )
    assert [point.label for point in fitted.manifest.points] == ["a", "b"]
    pairs = at_checkpoints(model, data, queries, tmp_path, folders[:2])
    scores, self_influence = averaged(pairs, [0.75, 0.25])
    close(fitted.score(queries, credit="additive").values, kappa(fitted) * scores)
    close(fitted.self_influence(credit="additive").values, kappa(fitted) * self_influence)
    close(fitted.score(queries, at="b", credit="additive").values, pairs[1][0])
    with pytest.raises(InputError, match="at every given checkpoint is 0"):
        influence.fit(model, data, checkpoints=folders[2:], directory=tmp_path / "zero")
    assert not (tmp_path / "zero").exists()


def test_missing_rates_make_checkpoints_equal(model, tmp_path, double, capfd):
    data, queries = examples(6), examples(3, seed=1)
    folders = [
        checkpoint(tmp_path / "a", model, 1, retrain={"lr": 0.1}),
        checkpoint(tmp_path / "b", model, 2),
    ]
    fitted = influence.fit(model, data, checkpoints=folders, directory=tmp_path / "run")
    assert (
        "not every checkpoint records its learning rate; all checkpoints count equally"
        in capfd.readouterr().err
    )
    scores, _ = averaged(at_checkpoints(model, data, queries, tmp_path, folders), [0.5, 0.5])
    close(fitted.score(queries, credit="additive").values, kappa(fitted) * scores)


def test_checkpoints_and_scales_share(model, tmp_path, double):
    """Two checkpoints of rates 3 : 1 and one scale: 1/2, 1/6, 1/3; and the run needs no folder
    afterwards.
    """
    data, queries = examples(6), examples(3, seed=1)
    folders = [
        checkpoint(tmp_path / "a", model, 1, retrain={"lr": 0.3}),
        checkpoint(tmp_path / "b", model, 2, retrain={"lr": 0.1}),
    ]
    fitted = influence.fit(
        model, data, checkpoints=folders, path=(0.8,), directory=tmp_path / "run"
    )
    assert [point.share for point in fitted.manifest.points] == pytest.approx([1 / 2, 1 / 6, 1 / 3])
    pairs = at_checkpoints(model, data, queries, tmp_path / "x", folders)
    pairs += singles(model, data, queries, tmp_path / "y", (0.8,))
    scores, self_influence = averaged(pairs, [1 / 2, 1 / 6, 1 / 3])
    for folder in folders:
        shutil.rmtree(folder)
    for opened in (fitted, Run.open(tmp_path / "run", model=model, train=data)):
        close(opened.score(queries, credit="additive").values, kappa(fitted) * scores)
        close(opened.self_influence(credit="additive").values, kappa(fitted) * self_influence)


def test_a_checkpoint_that_is_left_out_takes_no_share(model, tmp_path):
    """One checkpoint that counts and one scale: half each, as there are two points."""
    folders = [
        checkpoint(tmp_path / "a", model, 1, retrain={"lr": 0.3}),
        checkpoint(tmp_path / "b", model, 2, retrain={"lr": 0.0}),
    ]
    fitted = influence.fit(
        model, examples(4), checkpoints=folders, path=(0.8,), directory=tmp_path / "run"
    )
    assert [point.share for point in fitted.manifest.points] == pytest.approx([0.5, 0.5])


def test_another_checkpoint_is_another_run(model, tmp_path):
    data = examples(4)
    folders = [checkpoint(tmp_path / "a", model, 1), checkpoint(tmp_path / "other" / "a", model, 2)]
    first = influence.fit(model, data, checkpoints=folders[:1], directory=tmp_path / "run")
    for given in ({"checkpoints": folders[1:]}, {"checkpoints": folders}, {"path": (0.5,)}):
        with pytest.raises(MismatchError, match="points"):
            influence.fit(model, data, directory=tmp_path / "run", **given)
    again = influence.fit(model, data, checkpoints=folders[:1], directory=tmp_path / "run")
    assert again.digest == first.digest


def test_checkpoints_of_one_name_are_told_apart(model, tmp_path):
    """`one/checkpoint-10` and `two/checkpoint-10`: `--at checkpoint-10` cannot mean both."""
    folders = [
        checkpoint(tmp_path / name / "checkpoint-10", model, n)
        for n, name in enumerate(("one", "two"))
    ]
    try:
        fitted = influence.fit(model, examples(4), checkpoints=folders, directory=tmp_path / "run")
    except InputError:
        return
    labels = [point.label for point in fitted.manifest.points]
    assert len(set(labels)) == len(labels)


def refused(model, folder, *sentences):
    with pytest.raises(AdapterError) as error:
        influence.fit(model, examples(3), checkpoints=[folder], directory=folder.parent / "run")
    assert str(folder) in str(error.value)
    for sentence in sentences:
        assert sentence in str(error.value)
    assert not (folder.parent / "run").exists()


def test_checkpoints_of_another_shape_are_refused_by_name(model, tmp_path):
    refused(model, tmp_path / "nowhere", "there is no checkpoint folder")
    wider = build_model("gpt2", **SITES, r=3)
    refused(
        model,
        checkpoint(tmp_path / "wider", wider, 1),
        "r is 3 there and 2 in the adapter",
        "has shape (3, 16)",
    )
    other = build_model("gpt2", layers=1, target_modules=["mlp.c_proj"])
    refused(model, checkpoint(tmp_path / "other", other, 1), "is missing", "is not in the adapter")
    edit_config(checkpoint(tmp_path / "alpha", model, 1), lora_alpha=5)
    refused(model, tmp_path / "alpha", "lora_alpha is 5 there and 3 in the adapter")
    edit_config(checkpoint(tmp_path / "rs", model, 1), use_rslora=True)
    refused(model, tmp_path / "rs", "use_rslora is True there")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (checkpoint(tmp_path / name, model, 1) / name).unlink()
        refused(model, tmp_path / name, name)
    tensors = load_file(checkpoint(tmp_path / "nan", model, 1) / "adapter_model.safetensors")
    save_file(
        {key: t * float("nan") for key, t in tensors.items()},
        tmp_path / "nan" / "adapter_model.safetensors",
    )
    refused(model, tmp_path / "nan", "NaN or infinite")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_model.safetensors", b"garbage"),
        ("adapter_model.safetensors", b""),
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b"\xff\xfe"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(model, tmp_path, name, content):
    (checkpoint(tmp_path / "c", model, 1) / name).write_bytes(content)
    refused(model, tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", "{"),
        ("trainer_state.json", "[]"),
        ("trainer_state.json", '{"log_history": 3, "global_step": 1}'),
        (
            "trainer_state.json",
            '{"log_history": [{"step": 1, "learning_rate": "x"}], "global_step": 1}',
        ),
        (
            "trainer_state.json",
            '{"log_history": [{"step": 1, "learning_rate": NaN}], "global_step": 1}',
        ),
        ("retrain.json", '{"lr": -0.1}'),
        ("retrain.json", "[1]"),
    ],
)
def test_damaged_training_states_are_refused_by_name(model, tmp_path, name, content):
    (checkpoint(tmp_path / "c", model, 1) / name).write_text(content)
    with pytest.raises(InputError) as error:
        influence.fit(model, examples(3), checkpoints=[tmp_path / "c"], directory=tmp_path / "run")
    assert str(tmp_path / "c") in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_command_takes_checkpoints_in_both_ways(command, tmp_path):
    base, adapter = save(tmp_path, "gpt2", **SITES)
    live = influence.load(base, adapter, device="cpu")
    write_rows(tmp_path / "train.jsonl", rows(6))
    write_rows(tmp_path / "queries.jsonl", rows(2, seed=9))
    A, B = (
        checkpoint(tmp_path / name, live, n, retrain={"lr": 0.1}) for n, name in enumerate("AB")
    )
    shared = ["--adapter", adapter, "--train", tmp_path / "train.jsonl"]
    ways = {
        "one": [*shared, "--checkpoints", A, B, "--run", tmp_path / "one"],
        "two": ["--checkpoints", A, *shared, "--checkpoints", B, "--run", tmp_path / "two"],
        "three": ["--run", tmp_path / "three", *shared, "--checkpoints", A, B],
    }
    values = {}
    for name, arguments in ways.items():
        made = command("fit", *arguments, "--json")
        assert made.status == 0, made.err
        assert [point["label"] for point in made.json()["manifest"]["points"]] == ["A", "B"]
        assert (
            command(
                "score", "--run", tmp_path / name, "--queries", tmp_path / "queries.jsonl"
            ).status
            == 0
        )
        values[name] = Scores.load(tmp_path / name / "scores.h5").values
    assert np.array_equal(values["one"], values["two"])
    assert np.array_equal(values["one"], values["three"])
    both = command(
        "fit", *shared, "--path", "0.8,1", "--checkpoints", A, "--run", tmp_path / "both", "--json"
    )
    assert [point["label"] for point in both.json()["manifest"]["points"]] == ["A", "0.8", "1"]
    assert (
        command(
            "score",
            "--run",
            tmp_path / "both",
            "--queries",
            tmp_path / "queries.jsonl",
            "--at",
            "A",
        ).status
        == 0
    )
    for path in ("0.4,x", "2", "", "nan"):
        wrong = command("fit", *shared, "--path", path, "--run", tmp_path / "wrong")
        assert wrong.status == 2, wrong.err
        assert "Traceback" not in wrong.err
        assert not (tmp_path / "wrong").exists()
