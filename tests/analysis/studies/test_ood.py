"""A study of planted rows is what its parts say."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import load_file

import influence
import unlearn
from analysis.studies.ood_statistics import verdict
from unlearn.difficulty.measured import read_measured


def test_a_study_is_what_its_parts_say(ood_folder, studied, tmp_path):
    out, found = studied
    rows_ = influence.read_examples(out / "train.jsonl")
    kinds = json.loads((out / "kinds.json").read_text())
    assert len(rows_) == 10 + 12
    assert list(kinds["kinds"]) == found.table["id"].tolist()

    # the adapter is what training on these rows gives, the references what training on the original
    # ones gives
    own = influence.Run.open(out / "run", device="cpu")
    assert own.train.digest == rows_.digest
    recipe = unlearn.Recipe.read(ood_folder / "recipe.json")
    unlearn.retrain(own, out=tmp_path / "again", recipe=recipe)
    for folder, same in (("again", tmp_path / "again"), ("adapter", out / "adapter")):
        assert (same / "adapter_model.safetensors").exists(), folder
    one, two = (
        load_file(place / "adapter_model.safetensors")
        for place in (tmp_path / "again", out / "adapter")
    )
    for key, value in one.items():
        torch.testing.assert_close(two[key], value)
    first = influence.Run.open(ood_folder / "run", device="cpu")
    for k in (1, 2):
        unlearn.retrain(first, out=tmp_path / f"r{k}", recipe=replace(recipe, seed=k - 1))
    models = [
        influence.load(ood_folder / "base", place, device="cpu")
        for place in (tmp_path / "r1", tmp_path / "r2")
    ]
    planted_rows = influence.Examples(rows_[rows_.index(id)] for id in found.table["id"])

    def losses(model) -> np.ndarray:
        values = []
        for row in first.tokenized(planted_rows):
            ids = torch.from_numpy(row.input_ids)[None]
            each = torch.nn.functional.cross_entropy(
                model.model(ids).logits[0, :-1], ids[0, 1:], reduction="none"
            )
            values.append(float(each[torch.from_numpy(row.supervised[1:])].mean()))
        return np.array(values)

    with torch.no_grad():
        reference = np.array([losses(model) for model in models])
        with own.model.model.disable_adapter():
            base = losses(own.model)
        start = losses(own.model)
    table = found.table
    np.testing.assert_allclose(table["base_loss"], base, rtol=1e-4)
    np.testing.assert_allclose(table["start"], start, rtol=1e-4)
    np.testing.assert_allclose(table["target"], base, rtol=1e-4)
    expected = -(start + np.log(np.exp(-reference).mean(0))) / math.log(2)
    np.testing.assert_allclose(table["genex_start"], expected, atol=1e-4)
    assert (table["steps"] > 0).any()
    for name in ("steps", "damage"):
        assert found.verdicts[name] == verdict(found.comparisons, name)
    assert found.steps.shape == found.exposure.shape == found.damage.shape == (12, 5)


def test_damage_is_told_by_original_rows(ood_folder, studied):
    """Planted rows are in the sample of `difficulty`, and would change the damage."""
    out, found = studied
    whole = read_measured(out / "difficulty.h5")
    counted = [j for j, id in enumerate(whole.sample) if not id.startswith("planted-")]
    assert 0 < len(counted) < len(whole.sample)
    np.testing.assert_allclose(
        found.table["damage"], whole.retained[:, -1, counted].mean(1), rtol=1e-6
    )
