"""The options of a fit: refused, resolved and recorded before anything is computed or written."""

from __future__ import annotations

from typing import Any

import pytest

from influence import EKFAC, GGN
from influence.curvature import DEFAULT
from influence.errors import InputError
from influence.manifest import ROW_BYTES
from influence.path import DEFAULT_PATH
from influence.prepared import DISK_BUDGET, Prepared, prepare, say_idle
from tests.conftest import examples
from tests.influence.toy_runs import BUDGET, fit, small_model


def prepared(**changes) -> Prepared:
    """A fit of nine rows as `influence.fit` hands it on."""
    names = ("curvature", "path", "optimizer", "max_length", "supervise", "trainer_output")
    options: dict[str, Any] = dict.fromkeys(names) | {
        "damping": "mean:0.1",
        "reduction": "token",
        "checkpoints": (),
        "geometry": "raw",
        "token_budget": BUDGET,
        "store": "auto",
        "disk_budget": DISK_BUDGET,
        "row_bytes": ROW_BYTES,
        "seed": 0,
    }
    return prepare(small_model(), examples(9), **(options | changes))


def test_wrong_arguments_leave_no_directory(tmp_path):
    directory = tmp_path / "run"
    for options, message in [
        ({"path": (0.5, 1.5)}, "path 0.5,1.5 was given; expected different numbers above 0"),
        ({"path": (0.5, 0.5)}, "path 0.5,0.5 was given"),
        ({"geometry": "flat"}, "geometry 'flat' was given; expected one of raw, function, adam"),
        ({"store": "maybe"}, "store 'maybe' was given; expected auto, full, features, none"),
        (
            {"store": "features", "curvature": GGN()},
            "store features was given, which needs .* and ggn has none: give another store",
        ),
        ({"token_budget": 0}, "token budget 0 was given; expected at least 1"),
        ({"row_bytes": 63}, "row bytes 63 was given; expected at least 64"),
        ({"disk_budget": -1e9}, "disk budget -1 GB was given .--disk.; expected 0 or more"),
        ({"damping": "mean:0"}, "lambda must be positive"),
        ({"damping": "time"}, "no trainer checkpoint that records them"),
        ({"reduction": "row"}, "reduction 'row' was given"),
    ]:
        with pytest.raises(InputError, match=message):
            fit(directory, **options)
    assert not directory.exists()


def test_what_was_not_given_is_resolved():
    found = prepared()
    assert found.curvature == DEFAULT
    assert tuple(place.scale for place in found.places) == DEFAULT_PATH
    assert prepared(token_budget=None).manifest.token_budget == 1024
    assert prepared(store="always").manifest.store == "full"
    assert prepared(store="never").manifest.store == "none"


def test_what_a_run_is_told_by_has_later_options_only_where_they_were_given():
    """Runs from before an option was thought of are told to be the same."""
    plain = prepared().manifest
    assert "row_bytes" not in plain.identity
    assert "rows" not in plain.identity["curvature"]
    bytes_, rows = prepared(row_bytes=100), prepared(curvature=EKFAC(rows=3))
    assert bytes_.manifest.identity["row_bytes"] == 100
    assert rows.manifest.identity["curvature"]["rows"] == 3
    digests = {plain.digest, bytes_.manifest.digest, rows.manifest.digest}
    assert len(digests) == 3
    assert prepared(token_budget=7, disk_budget=1).manifest.digest == plain.digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "x"}, "--optimizer changes nothing without --geometry adam"),
        ({"optimizer": "x", "geometry": "adam"}, ""),
        ({"optimizer": "x", "damping": "time"}, ""),
        ({"disk_budget": 1, "store": "full"}, "--disk-budget changes nothing with --store full"),
        ({"disk_budget": 1, "store": "none"}, "--disk-budget changes nothing with --store none"),
        ({"disk_budget": 1, "store": "features"}, ""),
        ({"disk_budget": 1, "store": "full", "rows": 20_001}, ""),
        ({"disk_budget": 1}, ""),
    ],
)
def test_an_option_that_changes_nothing_is_told(capsys, changes, words):
    options = {"geometry": "raw", "damping": "mean:0.1", "optimizer": None, "store": "auto"}
    say_idle(**({**options, "disk_budget": DISK_BUDGET, "rows": 20_000} | changes))
    said = capsys.readouterr().err
    assert words in said
    assert bool(said) == bool(words)
