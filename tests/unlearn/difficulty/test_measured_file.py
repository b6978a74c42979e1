"""The file of a measurement: it survives a kill, and no other request writes into it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

import influence
from influence.errors import InputError, MismatchError, ProcessError, StoreError
from influence.store import write_file
from tests.conftest import rows
from tests.helpers import statuses
from tests.unlearn.difficulty.helpers import (
    HOLDOUT,
    SHORT_ADAM,
    SHORT_SGD,
    SMALL,
    Forwards,
    data,
    equal,
    same,
)
from unlearn.difficulty import Protocol, measure, read_measured
from unlearn.difficulty import measured as measured_module
from unlearn.difficulty.units import COPIES
from unlearn.retraining.recipe import Recipe

#: Ids that a terminal, a path, a table or HDF5 could trip over.
ODD = ["a/b", "line\nbreak", 'quo"te,comma', "\u202ertl", "🙂", "x" * 3000, "", "tab\t"]


def test_a_killed_measurement_goes_on_and_is_the_same_bit_for_bit(run, tmp_path):
    """Six rows, two at a time, killed in the first part, the second, there again, the third."""
    options = {
        "memory": (2 * COPIES + 2) * 8 * run.model.space.size,
        "ids": run.train.ids[:6],
        "protocol": Protocol("adam", 1e-2, steps=8),
        "sample_rows": 2,
        "holdout": influence.examples_from_rows(rows(1, seed=7)),
    }
    expected = measure(run, **options)
    with Forwards(run) as whole:
        equal(measure(run, out=tmp_path / "whole.h5", **options), expected)
    out, unfinished = tmp_path / "killed.h5", []
    for share in (0.1, 0.5, 0.15, 0.4):  # of all forwards
        with Forwards(run, kill=int(whole.count * share)), pytest.raises(KeyboardInterrupt):
            measure(run, out=out, **options)
        with h5py.File(out) as file:
            unfinished.append(int((file["done"][()] == 0).sum()))
        sentence = f"is unfinished: {unfinished[-1]} units are left; run the same measurement"
        with pytest.raises(StoreError, match=sentence):
            read_measured(out)
    assert unfinished == [6, 4, 4, 2]
    equal(measure(run, out=out, **options), expected)
    equal(read_measured(out), expected)
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_part_that_was_killed_between_its_arrays_and_its_mark_is_done_again(run, tmp_path):
    options = {"protocol": SHORT_ADAM, "ids": ["r0-3", "r0-1"], "sample_rows": 3}
    expected = measure(run, out=tmp_path / "m.h5", **options)
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        file["done"][1] = 0
        file["losses"][1, 1:] = 0  # half written
        file["retained"][1] = 99
    result = measure(run, out=tmp_path / "m.h5", **options)
    same(result, expected, rtol=1e-9, atol=1e-11)


def test_a_kill_while_a_part_is_written_leaves_it_undone(run, tmp_path, monkeypatch):
    calls = []

    def dies(file) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise KeyboardInterrupt

    out = tmp_path / "m.h5"
    options = {"protocol": SHORT_ADAM, "ids": ["r0-3", "r0-1"], "sample_rows": 2}
    with monkeypatch.context() as patch:
        patch.setattr("influence.store.RowFile.flush", dies)
        with pytest.raises(KeyboardInterrupt):
            measure(run, out=out, **options)
    with h5py.File(out) as file:
        assert file["done"][()].tolist() == [0, 0]
    equal(measure(run, out=out, **options), measure(run, **options))


def test_a_finished_file_is_read_and_nothing_climbs(run, tmp_path, measured):
    out = tmp_path / "m.h5"
    with Forwards(run) as first:
        expected = measure(run, protocol=SHORT_ADAM, out=out, **SMALL)
    content = out.read_bytes()
    equal(expected, measured)
    for overwrite in (False, True):
        with Forwards(run) as again:
            result = measure(run, protocol=SHORT_ADAM, out=out, overwrite=overwrite, **SMALL)
        equal(result, expected)
        assert again.graph == 0
        assert again.count <= 2  # the rows' losses under adapter and base are part of the request
        assert first.graph > 10
    assert out.read_bytes() == content
    equal(read_measured(str(out)), expected)


#: Of few steps.
RECIPE = Recipe(lr=1e-2, epochs=2, batch_size=4)


REQUEST = {
    "ids": ["r0-3", "r0-1"],
    "protocol": SHORT_ADAM,
    "sample_rows": 2,
    "holdout": HOLDOUT,
}


@pytest.fixture(scope="module")
def measured_before(run, tmp_path_factory):
    """The file of a request."""
    out = tmp_path_factory.mktemp("measured") / "m.h5"
    measure(run, out=out, **REQUEST)
    return out


@pytest.mark.parametrize(
    "other",
    [
        {"ids": ["r0-1", "r0-3"]},
        {"groups": {"r0-3": ["r0-3"], "r0-1": ["r0-5"]}},
        {"protocol": Protocol("adam", 3e-3, steps=19)},
        {"protocol": Protocol("adam", 4e-3, steps=20)},
        {"protocol": Protocol("sgd", 3e-3, steps=20)},
        {"protocol": Protocol("adam", 3e-3, "unseen", 20, RECIPE)},
        {"sample_rows": 3},
        {"seed": 1, "sample_rows": 2},
        {"holdout": None},
        {"holdout": influence.examples_from_rows(rows(3, seed=5))},
    ],
)
def test_another_request_is_refused_and_the_file_untouched(run, measured_before, tmp_path, other):
    out = tmp_path / "m.h5"
    shutil.copy(measured_before, out)
    content = out.read_bytes()
    changed = REQUEST | {"out": out} | other | ({"ids": None} if "groups" in other else {})
    with pytest.raises(
        MismatchError,
        match=r"m\.h5 has measurements of another request .*give --overwrite to replace",
    ):
        measure(run, **changed)
    assert out.read_bytes() == content
    result = measure(run, overwrite=True, **changed)
    assert out.read_bytes() != content
    equal(result, read_measured(out))
    if "holdout" not in other:
        equal(result, measure(run, **changed | {"out": None}))


def test_another_run_is_another_request(run, tmp_path):
    out, options = tmp_path / "m.h5", {"protocol": SHORT_ADAM, "ids": ["r0-1"], "sample_rows": 2}
    measure(run, out=out, **options)
    other = influence.fit(
        run.model, run.train, curvature=influence.Identity(), directory=tmp_path / "run"
    )
    with pytest.raises(MismatchError, match="another request"):
        measure(other, out=out, **options)


def test_an_unfinished_file_of_another_request_is_refused_too(run, tmp_path):
    out, options = tmp_path / "m.h5", {"ids": ["r0-3", "r0-1"], "sample_rows": 2}
    with Forwards(run, kill=8), pytest.raises(KeyboardInterrupt):
        measure(run, protocol=SHORT_ADAM, out=out, **options)
    content = out.read_bytes()
    with pytest.raises(MismatchError):
        measure(run, protocol=SHORT_SGD, out=out, **options)
    assert out.read_bytes() == content


def test_files_that_are_something_else(run, tmp_path):
    options = {"protocol": SHORT_ADAM, "ids": ["r0-3"], "sample_rows": 2}
    foreign, text, damaged = (tmp_path / name for name in ("scores.h5", "text.h5", "damaged.h5"))
    write_file(foreign, {"values": np.zeros(3)}, attrs={"run_digest": run.digest})
    text.write_text("no HDF5 at all")
    measure(run, out=damaged, **options)
    damaged.write_bytes(damaged.read_bytes()[:500])
    before = {path: path.read_bytes() for path in (foreign, text, damaged)}
    for path in before:
        for overwrite in (False, True):
            with pytest.raises((StoreError, InputError)):
                measure(run, out=path, overwrite=overwrite, **options)
        with pytest.raises(
            StoreError,
            match=r"has no measurements of unlearning difficulty|is damaged, truncated, or not",
        ):
            read_measured(path)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(StoreError, match="does not exist"):
        read_measured(tmp_path / "nowhere.h5")


@pytest.mark.parametrize("missing", ["steps", "retained", "names", "sample", "levels", "protocol"])
def test_a_file_that_lacks_something_is_refused_by_name(run, tmp_path, missing):
    out = tmp_path / "m.h5"
    measure(run, out=out, protocol=SHORT_ADAM, ids=["r0-3"], sample_rows=2)
    with h5py.File(out, "r+") as file:
        del (file.attrs if missing == "protocol" else file)[missing]
    with pytest.raises(StoreError, match=rf"m\.h5.*{missing}"):
        read_measured(out)


def test_a_protocol_that_is_no_json_is_a_damaged_file(run, tmp_path):
    out = tmp_path / "m.h5"
    measure(run, out=out, protocol=SHORT_ADAM, ids=["r0-3"], sample_rows=2)
    with h5py.File(out, "r+") as file:
        file.attrs["protocol"] = "{"
    with pytest.raises(StoreError, match=r"m\.h5"):
        read_measured(out)


def test_odd_ids_and_group_names_come_back(run, tmp_path):
    named = [
        row | {"id": id}
        for row, id in zip(data(), [*ODD[:6], "n", "tab\t", "日本", "p"], strict=True)
    ]
    train = influence.examples_from_rows(named)
    odd = influence.fit(
        run.model, train, curvature=influence.Identity(), directory=tmp_path / "run", store="never"
    )
    result = measure(
        odd, out=tmp_path / "rows.h5", protocol=Protocol("adam", 3e-3, steps=2), sample_rows=10
    )
    assert result.names == tuple(train.ids)
    assert sorted(result.sample) == sorted(train.ids)
    groups = {name: [train.ids[i % 10]] for i, name in enumerate(ODD)}
    result = measure(
        odd, groups=groups, out=tmp_path / "groups.h5", protocol=Protocol("adam", 3e-3, steps=2)
    )
    assert result.names == tuple(ODD)
    with h5py.File(tmp_path / "groups.h5") as file:
        assert json.loads(file.attrs["protocol"])["steps"] == 2


def test_an_id_with_a_null_byte_is_refused_or_comes_back(run, tmp_path):
    out = tmp_path / "m.h5"
    try:
        result = measure(
            run, groups={"a\0b": ["r0-3"]}, out=out, protocol=Protocol("adam", 3e-3, steps=2)
        )
    except StoreError:
        assert list(tmp_path.iterdir()) == []
    else:
        assert result.names == ("a\0b",)


def test_targets_of_another_recipe_are_another_request(run, tmp_path):
    out, unseen = tmp_path / "m.h5", Protocol("adam", 3e-3, "unseen", 20, RECIPE)
    request = {"ids": ["r0-3"], "sample_rows": 2, "out": out}
    first = measure(run, protocol=unseen, **request)
    assert first.protocol["recipe"]["epochs"] == 2
    equal(measure(run, protocol=unseen, **request), first)
    other = replace(unseen, recipe=replace(RECIPE, epochs=3))
    with pytest.raises(MismatchError, match="has measurements of another request"):
        measure(run, protocol=other, **request)
    assert measure(run, protocol=other, overwrite=True, **request).target != first.target


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_a_measurement_killed_and_resumed_by_another_number_of_processes(
    run, tmp_path, before, after
):
    """One is killed after its first part; what is in the file is not measured again."""
    options = {
        "memory": COPIES * 8 * run.model.space.size,  # one unit at a time
        "ids": run.train.ids[:6],
        "protocol": Protocol("adam", 1e-2, steps=4),
        "sample_rows": 2,
        "holdout": influence.examples_from_rows(rows(1, seed=7)),
    }
    expected, out, climbed = measure(run, **options), tmp_path / "measured.h5", []
    real = measured_module.climb_units

    def climb(units, places, protocol):
        if len(climbed) == 1 and torch.distributed.get_rank() == before - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        climbed.append(len(places))
        return real(units, places, protocol)

    def killed(rank: int) -> None:
        measured_module.climb_units = climb
        with pytest.raises(ProcessError, match="with any number of processes"):
            measure(run, out=out, **options)

    assert statuses(killed, tmp_path, before) == [0] * (before - 1) + [-signal.SIGKILL]
    with h5py.File(out) as file:
        done = int(file["done"][()].sum())
    assert 0 < done < 6

    def resumed(rank: int) -> None:
        def count(units, places, protocol):
            climbed.extend(places.tolist())
            return real(units, places, protocol)

        measured_module.climb_units = count
        same(measure(run, out=out, **options), expected, slice(None), rtol=1e-8, atol=1e-10)
        (tmp_path / f"climbed-{rank}").write_text(str(len(climbed)))

    assert statuses(resumed, tmp_path, after) == [0] * after
    again = sum(int((tmp_path / f"climbed-{rank}").read_text()) for rank in range(after))
    assert again == 6 - done
    same(read_measured(out), expected, slice(None), rtol=1e-8, atol=1e-10)


def test_measurements_without_a_file_are_dealt_out(run, tmp_path):
    options = {"ids": run.train.ids[:3], "protocol": SHORT_SGD, "sample_rows": 2}
    expected = measure(run, **options)

    def work(rank: int) -> None:
        same(measure(run, **options), expected, slice(None), rtol=1e-8, atol=1e-10)

    assert statuses(work, tmp_path, 2) == [0, 0]
