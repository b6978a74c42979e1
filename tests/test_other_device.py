"""What is done on a device that is not the CPU: nothing is mixed, and the numbers are the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import unlearn
from influence.curvature import EKFAC, Fisher
from tests.conftest import build_model, examples, fit_end, teach
from tests.influence.test_experts import fused
from tests.other_device import PLACE, elsewhere

SKETCHED = EKFAC(max_width=8, rank=4, memory_share=0)


def tiny(kind: str = "llama"):
    model = (
        fused("qwen2_moe") if kind == "experts" else build_model(kind, layers=1, lora_dropout=0.0)
    )
    teach(model, examples(6))
    model.model.get_base_model().config._attn_implementation = "eager"
    return model


def on_both(work, tmp_path, kind: str = "llama"):
    """Arrays that `work(model, folder)` makes on the CPU and elsewhere."""
    here = work(tiny(kind), tmp_path / "here")
    model = tiny(kind)
    with elsewhere(model.model):
        assert model.device == PLACE
        return here, work(model, tmp_path / "elsewhere")


def assert_same(pair):
    here, away = pair
    assert len(here) > 0
    for name, values in here.items():
        np.testing.assert_allclose(away[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def scored(model, folder, **options):
    queries, data = examples(2, seed=1), examples(6)
    run = fit_end(model, data, directory=folder / "run", reduction="example", **options)
    effect = run.without(ids=list(data.ids[:2]), queries=queries)
    return {
        "scores": run.score(queries).values,
        "tokens": run.score(queries, per_token=True, out=folder / "tokens.h5").values,
        "self": run.self_influence().values,
        "without": np.array([query.predicted for query in effect.queries]),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"store": "always", "geometry": "function"}),
        ("llama", {"store": "never", "curvature": SKETCHED, "geometry": "adam"}),
        ("llama", {"store": "never", "curvature": Fisher()}),
        pytest.param("experts", {"store": "never"}, marks=pytest.mark.slow),
    ],
    ids=["stored", "sketched", "fisher", "experts"],
)
def test_scores_are_those_of_the_cpu(kind, options, tmp_path):
    def work(model, folder):
        return scored(model, folder, **options)

    assert_same(on_both(work, tmp_path, kind))


@pytest.mark.slow
def test_similarities_in_files_are_inverted_there(tmp_path, monkeypatch):
    """Tile by tile."""
    monkeypatch.setattr("influence.kernel.WHOLE_ROWS", 2)
    monkeypatch.setattr("influence.matrix_file.GPU_TILE", 4)
    assert_same(on_both(scored, tmp_path))


@pytest.mark.slow
def test_edits_and_forecasts_are_those_of_the_cpu(tmp_path):
    data = examples(6)

    def work(model, folder):
        run = fit_end(model, data, directory=folder)
        ids = list(data.ids[:2])
        shot = unlearn.remove(run, ids, steps=1, max_damage=9, generate=0)
        walk = unlearn.relabel(run, {ids[0]: " dog"}, steps=2, until="steps=2", max_damage=9)
        forecast = unlearn.difficulty.predict(run, ids, sample_rows=3).table
        return {
            "remove": shot.delta.cpu().numpy(),
            "relabel": walk.delta.cpu().numpy(),
            "forecast": forecast[["loss", "damage"]].to_numpy(float),
        }

    assert_same(on_both(work, tmp_path))


@pytest.mark.slow
def test_gradients_of_measurements_are_those_of_the_cpu(tmp_path):
    def work(model, folder):
        run = fit_end(model, examples(3), directory=folder)
        return {
            name: run.score(examples(2, seed=1), measurement=name).values
            for name in ("margin", "sum", "token:0")
        }

    assert_same(on_both(work, tmp_path))


def test_this_device_refuses_what_a_gpu_refuses():
    here = torch.ones(3)
    with elsewhere(torch.nn.Linear(1, 1)):
        away = here.to(PLACE)
        for mixed in (lambda: away + here, lambda: here @ away, lambda: here[away.long()]):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="to numpy"):
            away.numpy()
        assert (away + torch.tensor(1.0)).device == PLACE  # single numbers and copies pass
        assert away[torch.tensor([0, 2])].device == PLACE
        assert here.copy_(2 * away).device.type == "cpu"
        assert away.cpu().numpy().tolist() == [1, 1, 1]
