"""The manifest says where a run came from."""

from __future__ import annotations

import json
from pathlib import Path

from influence.manifest import LoadingRecord, Manifest, differences
from tests.influence.toy_runs import N_ROWS


def test_the_manifest_tells_where_the_run_came_from(folders):
    manifest = json.loads((folders / "run" / "manifest.json").read_text())
    assert manifest["complete"]
    for name, path in (("base", "base"), ("adapter", "adapter"), ("data", "train.jsonl")):
        assert Path(manifest[name]["path"]) == folders / path
        assert len(manifest[name]["digest"]) == 64
    assert manifest["data"]["rows"] == N_ROWS
    assert manifest["objective"]["N_tok"] == manifest["data"]["supervised_tokens"]
    assert manifest["curvature"]["name"] == "ekfac"
    assert manifest["damping"] == "mean:0.1"
    assert {"torch", "transformers", "peft", "lora-influence"} <= set(manifest["versions"])


def test_how_the_base_was_loaded_is_written_where_it_was_asked_for(folders):
    record = json.loads((folders / "run" / "manifest.json").read_text())
    assert "loading" not in record
    assert Manifest.from_json(record).loading == LoadingRecord()
    asked = {"load_in_4bit": True, "load_in_8bit": False, "attn_implementation": "eager"}
    manifest = Manifest.from_json(record | {"loading": asked})
    assert manifest.loading == LoadingRecord(load_in_4bit=True, attn_implementation="eager")
    assert manifest.as_json()["loading"] == asked


def test_a_whole_identity_differs_by_what_it_lacks():
    there, here = {"base": "x", "attn_implementation": "eager"}, {"base": "x"}
    assert differences(there, here) == []
    assert differences(there, here, whole=True) == [
        "attn_implementation is eager there and null here"
    ]
