"""The points of the path: what a run with several of them predicts, against plain autograd and runs of one point each."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import influence
from influence import scorefile
from influence.errors import AdapterError, InputError, MismatchError
from influence.manifest import CalibrationRecord
from influence.run import Run
from influence.scorefile import Scores
from influence.setting import Setting
from tests.conftest import build_model, examples, fit_end, rows, tokens_of
from tests.influence.test_adapter import edit_config, save
from tests.influence.test_cli import influence as command  # noqa: F401
from tests.influence.test_cli import write_rows

N, PATH = 9, (0.4, 0.8)
SITES = {"layers": 1, "target_modules": ["attn.c_attn"]}


class Double:
    """numpy, with float64 under the name of float32: scores without the rounding of what is stored."""

    float32 = np.float64

    def __getattr__(self, name):
        return getattr(np, name)


@pytest.fixture
def double(monkeypatch):
    """Scores in float64, to be compared with oracles as closely as that."""
    monkeypatch.setattr("influence.scores.np", Double())
    monkeypatch.setattr("influence.scorefile.np", Double())
    monkeypatch.setattr("influence.tokenwise.np", Double())


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", **SITES)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return influence.fit(
        model, examples(N), path=PATH, directory=tmp_path_factory.mktemp("path") / "run"
    )


@contextlib.contextmanager
def b_times(model, c: float):
    """Every B of the live model multiplied by c, in place, by its name."""
    before = {
        name: p.detach().clone() for name, p in model.model.named_parameters() if "lora_" in name
    }
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(c)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.model.named_parameters():
                if name in before:
                    parameter.copy_(before[name])


@contextlib.contextmanager
def differentiable(model):
    """The LoRA matrices require gradients, dropout is off."""
    model.model.eval()
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in model.parameters:
            parameter.requires_grad_(False)


def plain_log_probs(model, item):
    """`log p` [T, V] at one row's supervised tokens and those tokens [T], from a plain forward."""
    ids = torch.as_tensor(np.asarray(item.input_ids, dtype=np.int64))[None]
    wanted = torch.as_tensor(np.asarray(item.supervised, dtype=bool))[1:]
    logits = model.model(input_ids=ids[:, :-1]).logits[0]
    return logits.log_softmax(-1)[wanted], ids[0, 1:][wanted]


def plain_loss(log_probs, targets):
    return -log_probs[torch.arange(len(targets)), targets].sum()


def plain_mean(log_probs, targets):
    return plain_loss(log_probs, targets) / len(targets)


def plain_gradients(model, data, measure=plain_loss) -> torch.Tensor:
    """Gradients `[n, P]` of a function of (log_probs, targets), one row after the other."""
    found = []
    with differentiable(model):
        for item in tokens_of(model, data):
            grads = torch.autograd.grad(measure(*plain_log_probs(model, item)), model.parameters)
            found.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(found)


def kappa(run: Run) -> float:
    """The calibration of a run's default setting."""
    (found,) = run.manifest.calibration.values() or (CalibrationRecord(1.0, "none"),)
    return found.factor


def singles(model, data, queries, folder, path, *, of=None, **options):
    """Scores and self-influences of one run of one point for each scale, with the weights set in place."""
    found = []
    for number, c in enumerate(path):
        with b_times(model, c):
            one = fit_end(model, data, directory=folder / f"single-{number}", **options)
            found.append(
                (one.score(queries, **(of or {})).values, one.self_influence(**(of or {})).values)
            )
    return found


def averaged(found, shares):
    """`sum_p share_p mean(Z) / Z_p score_p`: the documented rule for scores and self-influences."""
    Z = [own.mean() for _, own in found]
    mean = sum(share * z for share, z in zip(shares, Z, strict=True))
    parts = [(share * mean / z, *pair) for share, z, pair in zip(shares, Z, found, strict=True)]
    return sum(a * s for a, s, _ in parts), sum(a * own for a, _, own in parts)


def close(found, expected, tolerance=1e-9):
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


# ---- the rule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curvature", "reduction"),
    [
        ("ekfac", "token"),
        ("ekfac", "example"),
        ("kfac", "token"),
        ("fisher", "example"),
        ("identity", "token"),
    ],
)
def test_scores_of_several_points_are_the_documented_average(
    model, tmp_path, double, curvature, reduction
):
    spec = {"ekfac": influence.EKFAC, "kfac": influence.KFAC, "fisher": influence.Fisher}
    options = {"curvature": spec.get(curvature, influence.Identity)(), "reduction": reduction}
    data, queries = examples(N), examples(4, seed=1)
    fitted = influence.fit(model, data, path=PATH, directory=tmp_path / "run", **options)
    found = singles(model, data, queries, tmp_path, PATH, **options)
    scores, own = averaged(found, [0.5, 0.5])
    at = {"at": "all"}
    factor = kappa(fitted)
    assert abs(found[0][1].mean() / found[1][1].mean() - 1) > 0.01  # the weights are not equal
    close(fitted.score(queries, **at).values, factor * scores)
    close(fitted.self_influence(**at).values, factor * own)
    for label, (score, self_) in zip(("0.4", "0.8"), found, strict=True):
        close(fitted.score(queries, at=label).values, score)
        close(fitted.self_influence(at=label).values, self_)


def test_another_damping_and_another_curvature_of_several_points(model, run, tmp_path, double):
    queries = examples(3, seed=1)
    for number, of in enumerate(
        ({"damping": "mean:0.5"}, {"curvature": "kfac"}, {"damping": "top:0.3"})
    ):
        found = singles(model, run.train, queries, tmp_path / str(number), PATH, of=of)
        scores, own = averaged(found, [0.5, 0.5])
        close(
            run.score(queries, **of).values, scores
        )  # the calibration is of the default setting only
        close(run.self_influence(**of).values, own)


def test_identity_looks_at_the_end_unless_told_otherwise(model, run, double):
    """Plain gradient products, by autograd with the weights set in place."""
    queries = examples(3, seed=1)
    counts = tokens_of(model, run.train).counts

    def products(c):
        with b_times(model, c):
            g, q = plain_gradients(model, run.train), plain_gradients(model, queries, plain_mean)
        w = 1 / counts.sum()
        return (w * q @ g.T).numpy(), (w * (g * g).sum(1)).numpy() / counts

    scores, own = products(1.0)
    for at in (None, "end"):
        close(run.score(queries, curvature="identity", at=at).values, scores)
        close(run.self_influence(curvature="identity", at=at).values, own)
    scores, own = averaged([products(c) for c in PATH], [0.5, 0.5])
    close(run.score(queries, curvature="identity", at="all").values, scores)
    close(run.self_influence(curvature="identity", at="all").values, own)


def test_a_run_fitted_with_identity_also_looks_at_the_end(model, run, tmp_path, double):
    """`identity` means the same whether the run was fitted with it or holds it besides another."""
    queries = examples(3, seed=1)
    fitted = influence.fit(
        model, run.train, path=PATH, curvature=influence.Identity(), directory=tmp_path / "run"
    )
    expected = run.score(queries, curvature="identity").values
    close(fitted.score(queries, curvature="identity").values, expected)
    close(fitted.score(queries).values, expected)


def test_the_end_needs_factors_there(run, model, tmp_path, double):
    queries = examples(2, seed=1)
    with pytest.raises(
        InputError, match=r"--at end was given, and this run has factors at 0.4, 0.8 only"
    ):
        run.score(queries, at="end")
    with pytest.raises(
        InputError, match=r"expected all, end, or one of the run's points: 0.4, 0.8"
    ):
        run.score(queries, at="0.5")
    whole = influence.fit(model, run.train, path=(0.4, 1.0), directory=tmp_path / "whole")
    expected = fit_end(model, run.train, directory=tmp_path / "end").score(queries).values
    for at in ("end", "1"):
        close(whole.score(queries, at=at).values, expected)


def test_other_queries_of_a_request_change_no_score(run, monkeypatch):
    queries = examples(7, seed=1)
    together = run.score(queries).values
    for chunk in (1, 3, 100):
        monkeypatch.setattr("influence.scores.queries_at_once", lambda *_, chunk=chunk: chunk)
        for number in range(7):
            close(run.score(queries[number : number + 1]).values[0], together[number], 2e-7)
        close(run.score(queries[2:5]).values, together[2:5], 2e-7)
    assert [tuple(run.score(queries[:k]).attributes["factors"]) for k in (1, 7)] == [
        tuple(Setting.of(run).factors)
    ] * 2


def test_the_scale_is_of_some_training_rows(run, monkeypatch, double, model, tmp_path):
    """Of at most SCALE_ROWS rows, evenly spaced: here 3 of 9."""
    queries = examples(3, seed=1)
    found = singles(model, run.train, queries, tmp_path, PATH)
    Z = [own[[0, 4, 8]].mean() for _, own in found]
    expected = sum(0.5 * np.mean(Z) / z * score for z, (score, _) in zip(Z, found, strict=True))
    monkeypatch.setattr("influence.run.SCALE_ROWS", 3)
    opened = Run.open(run.directory, model=model, train=run.train)
    close(opened.score(queries).values, kappa(run) * expected)


def test_order_store_batches_and_reopening_change_nothing(model, run, tmp_path, double):
    queries = examples(4, seed=1)
    expected, own = run.score(queries).values, run.self_influence().values
    opened = Run.open(run.directory, model=model, train=run.train)
    assert np.array_equal(opened.score(queries).values, expected)
    assert np.array_equal(opened.self_influence().values, own)
    for number, options in enumerate(
        ({"path": PATH[::-1]}, {"store": "never"}, {"store": "always"}, {"token_budget": 20})
    ):
        other = influence.fit(
            model, run.train, **({"path": PATH} | options), directory=tmp_path / str(number)
        )
        assert other.gradients_stored == (options.get("store") != "never")
        close(other.score(queries).values, expected, 1e-8)
        close(other.self_influence().values, own, 1e-8)


@pytest.mark.parametrize("geometry", ["function", "adam"])
def test_geometries_do_not_depend_on_the_store_or_the_order(model, tmp_path, double, geometry):
    data, queries = examples(6), examples(3, seed=1)
    found = []
    for number, (path, store) in enumerate(
        ((PATH, "always"), (PATH, "never"), (PATH[::-1], "never"))
    ):
        fitted = influence.fit(
            model,
            data,
            path=path,
            store=store,
            geometry=geometry,
            reduction="example",
            token_budget=20,
            directory=tmp_path / str(number),
        )
        found.append((fitted.score(queries).values, fitted.self_influence().values))
    for scores, own in found[1:]:
        close(scores, found[0][0], 1e-8)
        close(own, found[0][1], 1e-8)


@pytest.mark.parametrize("geometry", ["function", "adam"])
def test_the_geometry_of_the_end_is_that_of_the_end(model, tmp_path, double, geometry):
    """`identity` at the end of a run that has no factors there: the geometry there, not that of its first point."""
    data, queries = examples(6), examples(3, seed=1)
    expected = fit_end(model, data, geometry=geometry, directory=tmp_path / "end")
    for number, path in enumerate((PATH, PATH[::-1])):
        fitted = influence.fit(
            model, data, path=path, geometry=geometry, directory=tmp_path / str(number)
        )
        found = fitted.score(queries, curvature="identity").values
        close(found, expected.score(queries, curvature="identity").values, 1e-8)


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


def test_the_model_is_untouched(model, run):
    before = model.snapshot()
    run.score(examples(2, seed=1))
    with pytest.raises(InputError):
        run.score(examples(2, seed=1), measurement="token:99")
    assert torch.equal(model.snapshot(), before)


# ---- the file of a request -------------------------------------------------------------------------------------


class Interruption(Exception):
    """Stands for a kill."""


def test_a_calibrated_score_of_one_point_is_calibrated_once(model, tmp_path, monkeypatch):
    """Killed after the sum was made and before the file was moved into place: it must not be multiplied again."""
    fitted = fit_end(model, examples(5), directory=tmp_path / "run")
    known = {Setting.of(fitted).name: CalibrationRecord(3.0, "by hand")}
    fitted.manifest = replace(fitted.manifest, calibration=known)
    queries = examples(2, seed=1)
    expected = fitted.score(queries).values

    def killed(self, result, run):
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(scorefile.ScoresInTheMaking, "seal", killed)
        with pytest.raises(Interruption):
            fitted.score(queries, out=tmp_path / "s.h5")
    np.testing.assert_array_equal(fitted.score(queries, out=tmp_path / "s.h5").values, expected)


def test_parts_of_another_request_are_not_taken_for_this_ones(run, tmp_path, monkeypatch):
    """A is killed at its end; B is killed while it lays out its files over A's; A is asked for again."""
    A, B = examples(3, seed=1), examples(3, seed=2)
    expected, out = run.score(A).values, tmp_path / "s.h5"

    def killed(*_arguments):
        raise Interruption

    for queries, target, name in (
        (A, scorefile.ScoresInTheMaking, "seal"),
        (B, scorefile, "_lay_out"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, killed)
            with pytest.raises(Interruption):
                run.score(queries, out=out)
    np.testing.assert_array_equal(run.score(A, out=out).values, expected)


def test_a_finished_run_that_takes_another_damping_scores_as_a_new_one(model, tmp_path):
    """The damping is no part of the factors; what a fit returns must not depend on what lay there before."""
    data, queries = examples(6), examples(3, seed=1)
    influence.fit(model, data, path=PATH, directory=tmp_path / "one")
    again = influence.fit(model, data, path=PATH, damping="mean:0.5", directory=tmp_path / "one")
    new = influence.fit(model, data, path=PATH, damping="mean:0.5", directory=tmp_path / "two")
    close(again.score(queries).values, new.score(queries).values, 1e-6)


# ---- checkpoints -------------------------------------------------------------------------------------------------


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
    found = []
    for number, place in enumerate(folders):
        with weights_of(model, place):
            one = fit_end(model, data, directory=folder / f"at-{number}")
            found.append((one.score(queries).values, one.self_influence().values))
    return found


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
    found = at_checkpoints(model, data, queries, tmp_path, folders[:2])
    scores, own = averaged(found, [0.75, 0.25])
    close(fitted.score(queries).values, kappa(fitted) * scores)
    close(fitted.self_influence().values, kappa(fitted) * own)
    close(fitted.score(queries, at="b").values, found[1][0])
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
    close(fitted.score(queries).values, kappa(fitted) * scores)


def test_checkpoints_and_scales_share(model, tmp_path, double):
    """Two checkpoints of rates 3 : 1 and one scale: 1/2, 1/6, 1/3; and the run needs no folder afterwards."""
    data, queries = examples(6), examples(3, seed=1)
    folders = [
        checkpoint(tmp_path / "a", model, 1, retrain={"lr": 0.3}),
        checkpoint(tmp_path / "b", model, 2, retrain={"lr": 0.1}),
    ]
    fitted = influence.fit(
        model, data, checkpoints=folders, path=(0.8,), directory=tmp_path / "run"
    )
    assert [point.share for point in fitted.manifest.points] == pytest.approx(
        [1 / 2, 1 / 6, 1 / 3]
    )
    found = at_checkpoints(model, data, queries, tmp_path / "x", folders)
    found += singles(model, data, queries, tmp_path / "y", (0.8,))
    scores, own = averaged(found, [1 / 2, 1 / 6, 1 / 3])
    for folder in folders:
        shutil.rmtree(folder)
    for opened in (fitted, Run.open(tmp_path / "run", model=model, train=data)):
        close(opened.score(queries).values, kappa(fitted) * scores)
        close(opened.self_influence().values, kappa(fitted) * own)


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


def test_the_command_takes_checkpoints_in_both_ways(command, tmp_path):  # noqa: F811
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
    found = {}
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
        found[name] = Scores.load(tmp_path / name / "scores.h5").values
    assert np.array_equal(found["one"], found["two"])
    assert np.array_equal(found["one"], found["three"])
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


def test_a_finished_fit_computes_nothing_again(model, run, tmp_path, monkeypatch):
    """Not the scales of its points, nor its calibration, though nothing is stored."""
    options = {"path": PATH, "directory": tmp_path / "run", "store": "never"}
    expected = influence.fit(model, run.train, **options).manifest
    monkeypatch.setattr("influence.run.stream_gradients", None)
    assert influence.fit(model, run.train, **options).manifest == expected
