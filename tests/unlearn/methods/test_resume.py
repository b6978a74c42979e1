"""A training that was killed and goes on: bit for bit, and with nothing but its own state."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import influence
from influence.errors import InputError, MismatchError, StoreError
from tests.conftest import rows
from tests.helpers import untouched
from tests.unlearn.methods.helpers import RECIPE, opened, some_slow, train
from unlearn.methods import loop, resume

RESUMED = [
    ("ga", {"until": "steps=9", "schedule": "cosine", "warmup": 3, "lr": 0.01, "batch_size": 2}),
    ("ngdiff", {"until": "steps=23", "batch_size": 2, "retain_batch_size": 4}),
    (
        "npo",
        {
            "until": "steps=9",
            "lr": 0.01,
            "batch_size": 1,
            "retain_batch_size": 2,
            "optimizer": "AdamW",
        },
    ),
    ("datamodel-matching", {"until": "steps=6", "lr": 0.01}),
    ("idk-dpo", {"until": "loss=3.5", "steps": 12, "lr": 0.01, "stop_damage": 5.0}),
    ("ga", {"until": "base", "steps": 30, "stride": 0.003}),
    ("task-arithmetic", {"until": "steps=6", "lr": 0.01}),
]


def stripped(log):
    return [{key: value for key, value in entry.items() if key != "row_gradients"} for entry in log]


@pytest.mark.parametrize(
    ("name", "options"),
    some_slow(RESUMED, RESUMED[:2]),
    ids=[f"{name} {options['until']}" for name, options in RESUMED],
)
def test_stopped_at_any_step_and_resumed_is_the_same_bit_for_bit(
    single, tmp_path, monkeypatch, name, options
):
    whole = train(single, name, **options)
    total = len(whole.log)
    for stop_at in sorted({1, 2, total // 2 + 1, total - 1}):
        folder = tmp_path / f"state {stop_at}"
        with monkeypatch.context() as patch:
            moved, seen = loop.take_step, []

            def interrupted(*arguments, seen=seen, moved=moved, stop_at=stop_at):
                seen.append(1)
                if len(seen) > stop_at:
                    raise KeyboardInterrupt
                return moved(*arguments)

            patch.setattr(loop, "take_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(
                    single, name, checkpoint=folder, save_every=2 if stop_at > 2 else 1, **options
                )
        again = train(single, name, checkpoint=folder, **options)
        assert torch.equal(again.delta, whole.delta)
        assert stripped(again.log) == stripped(whole.log)
        assert again.report["losses"] == whole.report["losses"]
        assert again.report["stopped"] == whole.report["stopped"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["npo", "datamodel-matching"])
def test_resumed_in_the_middle_of_an_epoch_it_is_the_same_bit_for_bit(
    single, tmp_path, monkeypatch, name
):
    """Batches of two of three forget rows: the rows that are looked at first together differ after
    a resume.
    """
    options = {"until": "steps=9", "lr": 0.01, "batch_size": 2}
    whole = train(single, name, **options)
    for stop_at in (1, 2, 4, 5, 7):
        moved, seen = loop.take_step, []

        def interrupted(*arguments, seen=seen, moved=moved, stop_at=stop_at):
            seen.append(1)
            if len(seen) > stop_at:
                raise KeyboardInterrupt
            return moved(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "take_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(single, name, checkpoint=tmp_path / str(stop_at), save_every=1, **options)
        assert torch.equal(
            train(single, name, checkpoint=tmp_path / str(stop_at), **options).delta, whole.delta
        )


def test_a_resumed_training_does_not_begin_anew(single, tmp_path, monkeypatch, capfd):
    options = {"until": "steps=9", "lr": 0.01}
    moved, seen = loop.take_step, []
    with monkeypatch.context() as patch:

        def count(*arguments):
            seen.append(1)
            if len(seen) == 6:
                raise KeyboardInterrupt
            return moved(*arguments)

        patch.setattr(loop, "take_step", count)
        with pytest.raises(KeyboardInterrupt):
            train(single, checkpoint=tmp_path / "state", save_every=2, **options)
        capfd.readouterr()
        train(single, checkpoint=tmp_path / "state", save_every=2, **options)
    assert "going on after step 4 of 9" in capfd.readouterr().err
    assert len(seen) == 6 + 5


@pytest.mark.parametrize("where", ["replace", "fsync", "save"])
def test_killed_in_a_save_it_goes_on_from_the_one_before(single, tmp_path, where):
    """A process of its own ends by SIGKILL in its third save: at its start, before the file is
    moved, before it is on disk.
    """
    options = {
        "until": "steps=8",
        "lr": 0.01,
        "schedule": "linear",
        "save_every": 2,
        "checkpoint": tmp_path / "state",
    }
    whole = train(single, **{**options, "checkpoint": None})

    def killed():
        owner, name = {"replace": (os, "replace"), "fsync": (os, "fsync"), "save": (torch, "save")}[
            where
        ]
        real, seen = getattr(owner, name), []

        def dies(*arguments, **named):
            seen.append(1)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        setattr(owner, name, dies)
        train(single, **options)

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    state = torch.load(tmp_path / "state" / "state.pt", weights_only=True)
    assert state["done"] == 4
    again = train(single, **options)
    assert torch.equal(again.delta, whole.delta)
    assert stripped(again.log) == stripped(whole.log)


@pytest.fixture(scope="module")
def state(fitted, tmp_path_factory):
    """A folder with the state of four steps of eight, and the call that made it."""
    folder = tmp_path_factory.mktemp("halfway")
    options = {"until": "steps=8", "lr": 0.01, "save_every": 4, "checkpoint": folder / "state"}
    train(opened(fitted, folder, "float32"), **options)
    assert (folder / "state" / "state.pt").exists()
    return options


@pytest.fixture
def halfway(state, tmp_path):
    """The same with a copy of that folder."""
    shutil.copytree(state["checkpoint"], tmp_path / "state")
    return state | {"checkpoint": tmp_path / "state"}


OTHER = [
    ({"lr": 0.02}, "lr"),
    ({"lr": None, "stride": 0.02}, "lr, stride"),
    ({"until": "steps=9"}, "steps, until"),
    ({"until": "base"}, "steps, until"),
    ({"batch_size": 2}, "batch_size"),
    ({"seed": 1}, "seed"),
    ({"optimizer": "SGD"}, "optimizer"),
    ({"schedule": "cosine"}, "schedule"),
    ({"warmup": 2}, "warmup"),
    ({"max_grad_norm": 1.0}, "max_grad_norm"),
    ({"stop_damage": 1.0}, "stop_damage"),
    ({"control": 0.5}, "finish"),
    ({"method": "ga-gd"}, "name"),
    ({"method": "npo"}, "forget"),
    ({"ids": ["r0-1", "r0-4"]}, "rows"),
]


@pytest.mark.parametrize(("change", "named"), OTHER)
def test_the_state_of_another_training_is_refused_by_what_differs(single, halfway, change, named):
    with (
        untouched(halfway["checkpoint"]),
        pytest.raises(MismatchError, match="holds another training: it differs in") as error,
    ):
        train(single, **{**halfway, **change})
    listed = str(error.value).split("differs in ")[1].split(". Ask")[0]
    assert set(named.split(", ")) <= set(listed.split(", "))
    began = train(single, **{**halfway, **change}, restart=True)
    assert torch.equal(
        began.delta, train(single, **{**halfway, **change, "checkpoint": None}).delta
    )


def test_what_does_not_matter_is_not_compared(single, halfway, capfd):
    train(single, **{**halfway, "save_every": 3, "max_damage": 0.5})
    assert "going on after step 8" in capfd.readouterr().err


def test_other_held_out_rows_make_another_training(single, tmp_path):
    options = {
        "until": "expected",
        "steps": 4,
        "save_every": 2,
        "lr": 1e-4,
        "checkpoint": tmp_path / "state",
    }
    train(single, holdout=influence.examples_from_rows(rows(9, seed=9)), **options)
    with pytest.raises(MismatchError, match="differs in"):
        train(single, holdout=influence.examples_from_rows(rows(9, seed=8)), **options)


@pytest.mark.parametrize(
    ("method", "until"), [("ga", "expected"), ("datamodel-matching", "steps=4")]
)
def test_another_recipe_of_the_adapter_makes_another_training(single, tmp_path, method, until):
    options = {"until": until, "steps": 4, "save_every": 2, "lr": 1e-4, "recipe": RECIPE}
    options["checkpoint"] = tmp_path / "state"
    train(single, method, **options)
    other = options | {"recipe": replace(RECIPE, epochs=5)}
    with pytest.raises(MismatchError, match=r"differs in recipe\."):
        train(single, method, **other)
    single_file = single.directory / "recipe.json"  # where none is given, the recorded one counts
    single_file.write_text(json.dumps(RECIPE.as_json()))
    train(single, method, **options | {"recipe": None})


def test_a_recipe_that_nothing_looks_at_is_not_compared(single, halfway, capfd):
    train(single, **{**halfway, "recipe": RECIPE})
    assert "going on after step 8" in capfd.readouterr().err


def test_other_retained_rows_make_another_training(single, tmp_path):
    options = {
        "until": "steps=4",
        "save_every": 2,
        "checkpoint": tmp_path / "state",
        "method": "ga-gd",
    }
    train(single, retain=influence.examples_from_rows(rows(9, seed=9)), **options)
    for retain in (None, influence.examples_from_rows(rows(9, seed=8))):
        with pytest.raises(MismatchError, match=r"differs in .*retain"):
            train(single, retain=retain, **options)


class Evil:
    """Would run code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "flipped", "json", "evil", "lacking"])
def test_a_damaged_state_is_refused_or_begun_anew(single, halfway, tmp_path, damage):
    path = halfway["checkpoint"] / "state.pt"
    data = path.read_bytes()
    trap = tmp_path / "trap"
    if damage == "evil":
        torch.save({"request": Evil(trap)}, path)
    elif damage == "lacking":
        torch.save({"request": "{}"}, path)
    elif damage == "flipped":
        place = data.index(b"archive/data.pkl") if b"archive/data.pkl" in data else len(data) // 3
        path.write_bytes(data[:place] + bytes(64) + data[place + 64 :])
    else:
        damaged = {
            "empty": b"",
            "cut": data[: len(data) // 2],
            "noise": os.urandom(500),
            "json": b'{"request": 1}',
        }
        path.write_bytes(damaged[damage])
    with pytest.raises(StoreError, match=r"(?s)state.pt is damaged.*or --overwrite, to begin anew"):
        train(single, **halfway)
    again = train(single, **halfway, restart=True)
    assert torch.equal(again.delta, train(single, **{**halfway, "checkpoint": None}).delta)
    assert not trap.exists()


def test_nobody_is_told_to_unpickle_a_damaged_state(single, halfway, tmp_path):
    torch.save({"request": Evil(tmp_path / "trap")}, halfway["checkpoint"] / "state.pt")
    with pytest.raises(StoreError) as error:
        train(single, **halfway)
    assert "weights_only" not in str(error.value)
    assert "\x1b" not in str(error.value)


LOST = "a state that is sound as a file but lacks its parts ends in a KeyError or TypeError"


@pytest.mark.parametrize(
    "lost",
    ["theta"] + [pytest.param(name) for name in ("optimizer", "log")],
)
def test_a_state_with_the_wrong_parts_is_refused_in_a_sentence(single, halfway, lost):
    """Sound as a file, of the same request, but of another shape."""
    path = halfway["checkpoint"] / "state.pt"
    state = torch.load(path, weights_only=True)
    state |= {
        "theta": {"theta": torch.zeros(3)},
        "optimizer": {"optimizer": {}},
        "log": {"log": "7"},
    }[lost]
    torch.save(state, path)
    with pytest.raises((StoreError, MismatchError, InputError)):
        train(single, **halfway)


def test_discard_takes_the_state_away(single, halfway):
    resume.discard(halfway["checkpoint"])
    assert not halfway["checkpoint"].exists()
    resume.discard(halfway["checkpoint"])
