"""The manifest says where a run came from."""

from __future__ import annotations

import json
from pathlib import Path

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
