"""The command: a list and its table, what a person decides, and the measured gain."""

from __future__ import annotations

import csv
import json

from analysis.cleaning import applied, cleaning
from analysis.cli import main


def test_batches_hold_what_the_user_allows(run_main, made, world, monkeypatch):
    """Of a list and of what is applied, in place of what the fit recorded."""
    asked = []
    for module, name in (
        (cleaning, "mean_losses"),
        (cleaning, "outputs"),
        (applied, "mean_losses"),
    ):
        plain = getattr(module, name)

        def told(*a, token_budget, plain=plain):
            asked.append(token_budget)
            return plain(*a, token_budget=token_budget)

        monkeypatch.setattr(module, name, told)
    bounds = ["--token-budget", 48, "--memory", 64]
    listed = ["--run", made / "run", "--out", world / "list", "--overwrite"]
    assert run_main(main, "analysis", "clean", *listed, *bounds).status == 0
    assert asked == [48, 48, 48]
    (world / "list" / "rows.csv").write_text("id,decision\ncopy,remove\n")
    typed = ["--apply", world / "list", "--recipe", made / "recipe.json"]
    typed += ["--holdout", made / "heldout.jsonl", "--resamples", 5]
    done = run_main(main, "analysis", "clean", *typed, *bounds)
    assert done.status == 0, done.err
    assert asked == [48] * 5


def test_a_list_is_made_decided_and_applied(run_main, made, tmp_path):
    out = tmp_path / "list"
    typed = ["--run", made / "run", "--queries", made / "good.jsonl", "--out", out, "--most", 4]
    listed = run_main(main, "analysis", "clean", *typed)
    assert listed.status == 0, listed.err
    assert "duplicate: 1 rows (question and answer as another row's" in listed.out
    assert f"{out}/rows.csv: write remove, keep or relabel" in listed.out
    again = run_main(main, "analysis", "clean", *typed)
    assert again.status == 2
    assert "holds a list already" in again.err
    record = run_main(main, "analysis", "clean", *typed, "--overwrite", "--json").json()
    assert record["most"] == 4
    assert record["reasons"]["personal"]["listed"] == 1

    text = (out / "rows.csv").read_text(encoding="utf-8")
    lines = list(csv.DictReader(text.splitlines()))
    for line in lines:
        line["decision"] = "remove" if line["id"] == "copy" else ""
    with (out / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    typed = ["--apply", out, "--recipe", made / "recipe.json", "--holdout", made / "heldout.jsonl"]
    applied = run_main(main, "analysis", "clean", *typed, "--resamples", 20)
    assert applied.status == 0, applied.err
    assert "good rows (4)" in applied.out
    assert "held-out rows (3)" in applied.out
    assert "1 rows removed, 0 relabelled, 12 trained on; 1 seed, each" in applied.out
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    shown = run_main(main, "analysis", "clean", *typed, "--overwrite", "--json").json()
    assert shown == json.loads((out / "applied.json").read_text())
