from __future__ import annotations

from dataclasses import replace

from analysis.explorer import about
from analysis.explorer.data import gather
from influence.manifest import PathRecord
from tests.analysis.explorer.helpers import rows_of, write_run, write_scores


def told(explored) -> dict[str, dict[str, str]]:
    return {
        block["title"]: {fact["label"]: fact["value"] for fact in block["facts"]}
        for block in about.blocks(explored)
    }


def test_what_a_run_was_made_from_in_words(world):
    found = told(world.explored)
    assert found["Made from"]["base model"] == "/nowhere/base"
    assert found["Made from"]["tokens"] == "480 tokens, 108 of them supervised"
    assert found["Digests"]["adapter"] == "a" * 16
    assert found["How"]["curvature"] == "ekfac (samples 1)"
    assert found["How"]["points"] == "0.4, 0.8"
    assert found["How"]["training loss"] == "mean over all supervised tokens"
    assert found["Scores"]["credit"].startswith("shared: rows that teach the same")
    assert "kept" not in found["Scores"]
    assert all(fact["help"] for block in about.blocks(world.explored) for fact in block["facts"])


def test_what_is_not_known_has_no_line(world, tmp_path):
    assert "loss of the rows" not in told(world.explored)["How"]
    path = PathRecord(1.88, 0.5576, (1.0, 0.6), (0.2, 0.2))
    known = replace(world.explored, manifest=replace(world.explored.manifest, path=path))
    assert told(known)["How"]["loss of the rows"] == (
        "1.880 under the base, 0.558 under the adapter, nats per token"
    )
    write_run(tmp_path / "run", rows_of(1))
    assert "Scores" not in told(gather(tmp_path / "run"))


def test_strongest_rows_and_falling_measurements_are_said(tmp_path):
    write_run(tmp_path / "run", rows_of(3))
    write_scores(
        tmp_path / "run",
        world_values(),
        rows_of(2, "query"),
        name="strongest.h5",
        kept=1,
        rises=False,
    )
    (scored,) = (b for b in about.blocks(gather(tmp_path / "run")) if b["title"] == "Scores")
    facts = {fact["label"]: fact for fact in scored["facts"]}
    assert facts["kept"]["value"] == "the 1 strongest of either end"
    assert facts["what of a query"]["help"].startswith("Negative scores")


def world_values():
    import numpy as np

    return np.arange(6, dtype=np.float32).reshape(2, 3)
