"""Retraining on subsets: what single retrainings give, resumable, refused by name."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import influence
import unlearn
from influence.errors import InputError, MismatchError, NumericalError, ProcessError, StoreError
from influence.loss import mean_losses
from influence.tokens import tokenize
from tests.conftest import build_model, examples
from tests.helpers import statuses
from tests.unlearn.retraining.helpers import (
    SHORT,
    WEIGHTS,
    arrays,
    load_back,
    queries,
)
from unlearn.retraining import subsets as subsets_module
from unlearn.retraining.retrain import train


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


def test_subsets_are_retrainings_without_the_other_rows(run, masks, tmp_path):
    seeds = [0, 0, 7, 0]
    done = unlearn.retrain_subsets(
        run, masks, queries(), out=tmp_path, recipe=SHORT, seeds=seeds, keep_adapters=True
    )
    assert done.path == tmp_path / "truth.npz"
    query_tokens = tokenize(queries(), run.model.tokenizer)
    for k, (mask, seed) in enumerate(zip(masks, seeds, strict=True)):
        removed = [id for id, kept in zip(run.train.ids, mask, strict=True) if not kept]
        one = unlearn.retrain(
            run, removed, out=tmp_path / f"one-{k}", recipe=replace(SHORT, seed=seed)
        )
        assert (one / WEIGHTS).read_bytes() == (tmp_path / f"subset-{k:03d}" / WEIGHTS).read_bytes()
        model = influence.from_peft(load_back(one), run.model.tokenizer)
        np.testing.assert_allclose(
            done.query_loss[k], mean_losses(model, query_tokens), rtol=0, atol=1e-12
        )
        np.testing.assert_allclose(
            done.train_loss[k], mean_losses(model, run.tokens), rtol=0, atol=1e-12
        )
    stored = arrays(done.path)
    np.testing.assert_array_equal(stored["masks"], masks)
    np.testing.assert_array_equal(stored["query_loss"], done.query_loss)
    np.testing.assert_array_equal(stored["train_loss"], done.train_loss)
    assert stored["train_ids"].tolist() == run.train.ids
    assert stored["query_ids"].tolist() == queries().ids
    assert stored["seeds"].tolist() == seeds
    assert stored["done"].all()
    assert str(stored["run_digest"]) == run.digest
    assert json.loads(str(stored["request"]))["recipe's lr"] == SHORT.lr


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

    monkeypatch.setattr(subsets_module, "train", once)


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
                subsets_module,
                "train",
                lambda m, t, r, seen=trained: seen.append(t.ids) or train(m, t, r),
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
    stored = arrays(path)
    assert stored["done"].tolist() == [True, False, True, True]
    np.testing.assert_array_equal(stored["query_loss"], whole.query_loss[[0, 2, 3]])
    np.testing.assert_array_equal(stored["masks"], masks[[0, 2, 3]])
    unlearn.retrain_subsets(run, masks, queries(), out=path, recipe=SHORT)
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()


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


def test_processes_deal_subsets_out_and_go_on_in_another_number(run, masks, tmp_path):
    """One is killed in its second training; what was collected is not trained again."""
    asked = {"recipe": SHORT, "keep_adapters": True}
    whole = unlearn.retrain_subsets(run, masks, queries(), out=tmp_path / "whole", **asked)
    place, trained = tmp_path / "shared", []

    def once(model, tokens, recipe, **options):
        if len(trained) == 1 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        trained.append(tokens.ids)
        return train(model, tokens, recipe, **options)

    def killed(rank: int) -> None:
        subsets_module.train = once
        with pytest.raises(ProcessError):
            unlearn.retrain_subsets(run, masks, queries(), out=place, **asked)

    assert statuses(killed, tmp_path, 2) == [0, -signal.SIGKILL]
    assert arrays(place / "truth.npz")["done"].tolist() == [True, True, False, False]

    def resumed(rank: int) -> None:
        subsets_module.train = once
        found = unlearn.retrain_subsets(run, masks, queries(), out=place, **asked)
        np.testing.assert_array_equal(found.query_loss, whole.query_loss)
        np.testing.assert_array_equal(found.train_loss, whole.train_loss)
        assert len(trained) == [1, 1, 0][rank]

    assert statuses(resumed, tmp_path, 3) == [0] * 3
    assert (place / "truth.npz").read_bytes() == (tmp_path / "whole" / "truth.npz").read_bytes()
    for k in range(4):
        one, other = (at / f"subset-{k:03d}" / WEIGHTS for at in (tmp_path / "whole", place))
        assert one.read_bytes() == other.read_bytes()


def test_a_subset_that_diverges_in_one_process_is_told_by_all(run, masks, tmp_path):
    def work(rank: int) -> None:
        def diverging(model, tokens, recipe, **options):
            if tokens.ids == [run.train.ids[i] for i in np.flatnonzero(masks[1])]:
                raise NumericalError("the training loss is nan")
            return train(model, tokens, recipe, **options)

        subsets_module.train = diverging
        with pytest.raises(NumericalError, match="1 of 4 subsets have no finite losses"):
            unlearn.retrain_subsets(run, masks, queries(), out=tmp_path / "t.npz", recipe=SHORT)

    assert statuses(work, tmp_path, 2) == [0, 0]
    assert arrays(tmp_path / "t.npz")["done"].tolist() == [True, False, True, True]


@pytest.mark.slow
def test_the_testbed_is_retrained(testbed, tmp_path):
    """By the default recipe all rows give the shipped adapter, a half gives the recorded losses.

    Measured: losses of the whole within 1.6e-4 per row (relative distance of the parameters
    3.8e-4), of halves within 5e-5.
    """
    model = influence.load(testbed / "base", testbed / "adapter", device="cpu")
    data = influence.read_examples(testbed / "train.jsonl")
    query_rows = influence.read_examples(testbed / "query.jsonl")
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
        run,
        recorded["masks"][3:4],
        query_rows,
        out=tmp_path / "truth.npz",
        recipe=unlearn.Recipe(),
    )
    np.testing.assert_allclose(half.query_loss[0], recorded["query_loss"][3], rtol=0, atol=0.02)
    np.testing.assert_allclose(half.train_loss[0], recorded["train_loss"][3], rtol=0, atol=0.02)
