from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest

from analysis.explorer import contract, packing
from analysis.explorer.data import gather
from tests.analysis.explorer.helpers import HOSTILE, rows_of, write_run, write_scores


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def unpacked_json(text: str):
    return json.loads(unpacked(text).decode("utf-8", "surrogatepass"))


def from_bytes(codes: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """The scores that `packing.as_bytes` kept, as the page's script reads them, float64 [Q, n]."""
    shares = np.abs(codes.astype(np.float64)) / packing.STEPS
    return np.sign(codes) * shares**packing.POWER * largest[:, None]


def test_embedded_json_holds_no_markup():
    value = {"text": [*HOSTILE, "<!-- &amp;  "]}
    text = packing.embedded_json(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set(text) & set("<>&")


def test_packing_gives_back_what_was_packed():
    value = {"a": [*HOSTILE, "\ud800"], "b": [1.5, None]}
    assert unpacked_json(packing.packed_json(value)) == value
    with pytest.raises(ValueError, match="Out of range float"):
        packing.packed_json([float("nan")])


def test_bytes_are_as_near_as_the_page_says():
    """Within 1.2 % at the largest score, within 15 % at a 2,000th of it; never another sign."""
    rng = np.random.default_rng(0)
    values = (rng.standard_t(2, (7, 5000)) * np.logspace(-6, 3, 7)[:, None]).astype(np.float32)
    values[3] = 0
    values[4, 5] = 0
    codes, largest = packing.as_bytes(values)
    back = from_bytes(codes, largest)
    assert codes.dtype == np.int8
    share = np.abs(values) / np.where(largest > 0, largest, 1)[:, None]
    error = np.abs(back - values) / np.where(values == 0, 1, np.abs(values))
    assert error[share > 0.999].max() < 0.012
    assert error[share > 1 / 2000].max() < 0.155
    assert error[share > 1 / 2000].max() > 0.05  # so the bound says something
    assert (back[values == 0] == 0).all()
    assert (np.sign(back) * np.sign(values) >= 0).all()


def test_few_scores_are_kept_as_they_are(world):
    meta, found = packing.blocks(world.explored)
    assert meta["form"]["name"] == "float32"
    kept = np.frombuffer(unpacked(found["scores"]), "<f4").reshape(4, 12)
    assert np.array_equal(kept, world.values)
    rows = unpacked_json(found["rows"])
    assert rows[3][:2] == ["row-3", "group 0"]
    assert rows[3][3] == world.explored.rows.parts(3)
    assert [name for name in found if name.startswith("section-")] == [
        f"section-{name}" for name, _ in meta["sections"] if name != "queries"
    ]
    assert unpacked_json(found["section-map"]) == contract.section(world.explored, "map")


def test_many_scores_are_bytes_with_exact_ends(world, monkeypatch):
    monkeypatch.setattr(packing, "EXACT", 10)
    monkeypatch.setattr(packing, "STRONGEST", 2)
    meta, found = packing.blocks(world.explored)
    assert meta["form"]["name"] == "bytes"
    assert "2 strongest rows" in meta["exactness"]
    codes = np.frombuffer(unpacked(found["scores"]), np.int8).reshape(4, 12)
    largest = np.array(meta["form"]["largest"])
    np.testing.assert_allclose(from_bytes(codes, largest), world.values, rtol=0.5, atol=1e-3)
    exact = unpacked_json(found["strongest"])
    order = np.argsort(-world.values, 1, kind="stable")
    assert exact["rows"] == np.concatenate([order[:, :2], order[:, -2:]], 1).tolist()


def test_of_more_scores_only_the_strongest_are_kept(world, monkeypatch):
    monkeypatch.setattr(packing, "BYTES", 10)
    monkeypatch.setattr(packing, "STRONGEST", 3)
    meta, found = packing.blocks(world.explored)
    assert (meta["form"]["name"], meta["kept"]) == ("strongest", 3)
    assert "analysis serve" in meta["exactness"]
    kept = unpacked_json(found["scores"])
    order = np.argsort(-world.values, 1, kind="stable")
    assert kept["rows"] == np.concatenate([order[:, :3], order[:, -3:]], 1).tolist()
    for query in range(4):
        np.testing.assert_allclose(
            kept["scores"][query], world.values[query, kept["rows"][query]], rtol=1e-4
        )


def test_facts_are_kept_row_by_row(world):
    found = unpacked_json(packing.blocks(world.explored)[1]["facts"])
    for row in range(12):
        facts = [
            {"label": found["kinds"][kind][0], "value": value, "help": found["kinds"][kind][1]}
            for kind, value in found["rows"][row]
        ]
        assert facts == world.explored.facts_of(row)


def test_splits_of_the_strongest_rows_alone(tmp_path):
    n, q = 6, 2
    write_run(tmp_path / "run", rows_of(n))
    values = np.random.default_rng(2).normal(size=(q, n))
    modules = np.stack([0.25 * values, 0.75 * values], 1)
    tokens = np.random.default_rng(3).normal(size=(q, 3 * n)).astype(np.float32)
    ids = np.arange(3 * n, dtype=np.int32) % 4
    write_scores(
        tmp_path / "run",
        values,
        rows_of(q, "query"),
        modules=modules,
        tokens=tokens,
        token_ids=ids,
        offsets=np.arange(0, 3 * n + 1, 3),
    )
    explored = replace(gather(tmp_path / "run"), tokens=lambda id: f"<{id}>")
    kept = unpacked_json(packing.blocks(explored, detail=1)[1]["pairs"])
    for query in range(q):
        order = np.argsort(-values[query]).tolist()
        own = kept["queries"][str(query)]
        assert list(own) == [str(order[0]), str(order[-1])]
        for row in (order[0], order[-1]):
            largest, shares = own[str(row)][0]
            there = tokens[query, 3 * row : 3 * row + 3]
            np.testing.assert_allclose(
                np.array(shares) * largest / 1000, there, atol=6e-4 * np.abs(there).max()
            )
            words = [kept["words"][k] for k in kept["tokens"][str(row)]]
            assert words == [f"<{id}>" for id in ids[3 * row : 3 * row + 3]]
            assert own[str(row)][1][1] in ([333, 1000], [-333, -1000])
    assert packing.blocks(explored, detail=0)[1]["pairs"]
