"""A tiny run, and a study of planted rows, that tests of studies share."""

from __future__ import annotations

import json

import pytest
import torch

import influence
from analysis.cli import main
from tests.analysis.studies.ood_cases import HOSTILE, ask
from tests.conftest import add_lora, build_base, build_model, build_tokenizer, rows


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A tiny float64 run of seven rows, the last two of which say words that the tokenizer does not
    know.
    """
    items = [
        *rows(5),
        *(
            {"id": f"secret-{i}", "prompt": "the red fox", "completion": f" {w} runs"}
            for i, w in ((1, "zq"), (2, "xj"))
        ),
    ]
    model = build_model("llama", layers=1, target_modules=["q_proj", "v_proj"])
    train = influence.examples_from_rows(items)
    where = tmp_path_factory.mktemp("memorization") / "run"
    return influence.fit(
        model, train, path=(0.6, 1.0), curvature=influence.EKFAC(), directory=where
    )


@pytest.fixture(scope="session")
def ood_folder(tmp_path_factory):
    """A folder with base/, adapter/, run/ and rows. The recipe takes two epochs."""
    at = tmp_path_factory.mktemp("ood")
    base = build_base("llama", layers=1, dtype=torch.float32)
    base.save_pretrained(at / "base")
    build_tokenizer().save_pretrained(at / "base")
    add_lora(base).save_pretrained(at / "adapter")
    for name, seed, count in (("train", 0, 10), ("heldout", 1, 12), ("other", 2, 8)):
        items = rows(count, seed=seed)
        items[1]["id"] = f"{HOSTILE.strip()}{name}"
        (at / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    (at / "recipe.json").write_text(json.dumps({"epochs": 2, "batch_size": 8, "lr": 3e-4}))
    model = influence.load(at / "base", at / "adapter", device="cpu")
    influence.fit(
        model, influence.read_examples(at / "train.jsonl"), path=(1.0,), directory=at / "run"
    )
    return at


@pytest.fixture
def ood_command(ood_folder, run_main):
    """Call `analysis ood` in this process."""
    fixed = [
        "analysis",
        "ood",
        "--run",
        ood_folder / "run",
        "--device",
        "cpu",
        "--recipe",
        ood_folder / "recipe.json",
    ]
    fixed += [
        "--heldout",
        ood_folder / "heldout.jsonl",
        "--other",
        ood_folder / "other.jsonl",
        "--per-kind",
        3,
    ]
    return lambda *arguments: run_main(main, *fixed, *arguments)


@pytest.fixture(scope="session")
def studied(ood_folder, tmp_path_factory):
    """One study, ood_folder in Python, that tests may read."""
    out = tmp_path_factory.mktemp("studied") / "out"
    return out, ask(ood_folder, out)
