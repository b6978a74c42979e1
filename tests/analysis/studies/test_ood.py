"""Planted rows, their exposure and cost by hand, the two answers both ways, and the command end to end."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import influence
import unlearn
from analysis.cli import main
from analysis.studies.ood import (
    apart,
    by_difficulty,
    compare,
    correlations,
    exposures,
    leverage,
    lines,
    matched_damage,
    mixtures,
    original_alone,
    steps_to_levels,
    study,
    tables,
    verdict,
    whole_sets,
)
from analysis.studies.pictures import paths_plot
from analysis.studies.planting import KINDS, OUTSIDE, _pieces, plain_rows, plant, write_rows
from influence.errors import InputError, MismatchError
from tests.conftest import (
    WORDS,
    add_lora,
    build_base,
    build_model,
    build_tokenizer,
    examples,
    fit_end,
    rows,
)
from unlearn.difficulty.measured import Measured, Protocol, measure, read_measured
from unlearn.difficulty.optimizers import SGD

HOSTILE = "evil\x1b[2J[red] </script> {{prompt}} <eos> \u202e$\\frac{\n\nforged  "


def planted(**options):
    options = {"per_kind": 3} | options
    return plant(
        examples(8), examples(12, seed=1), examples(9, seed=2), build_tokenizer(), **options
    )


def tokens(text: str) -> list[int]:
    return build_tokenizer()(text)["input_ids"]


# ---- planting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_planted_rows_are_new_matched_and_of_their_kind(seed):
    found = planted(seed=seed)
    held, other, train = examples(12, seed=1), examples(9, seed=2), examples(8)
    assert found.rows[:8] == train
    assert found.original == train.ids
    assert Counter(found.kinds.values()) == dict.fromkeys(KINDS, 3)
    assert found.ids == [f"planted-{kind}-00{j}" for kind in KINDS for j in range(3)]
    rows_ = {id: found.rows[found.rows.index(id)] for id in found.ids}
    for id, row in rows_.items():
        count = (
            len(tokens(row.prompt + row.completion)) - len(tokens(row.prompt)) + 1
        )  # and the end
        assert found.tokens[id] == count
        partner = found.partners[id]
        assert partner == id.replace(found.kinds[id], "in")
        assert abs(count - found.tokens[partner]) <= max(1, 0.1 * found.tokens[partner])
    contents = [row.content_hash for row in rows_.values()]
    assert len(set(contents)) == 12
    assert not set(contents) & {row.content_hash for row in train}

    prompts = {row.prompt: row.completion for row in held}
    for id in found.of("in"):
        assert prompts[rows_[id].prompt].startswith(rows_[id].completion)
    for id in found.of("shuffled"):
        words = rows_[id].completion.split()
        whole = prompts[rows_[id].prompt].split()
        assert not Counter(words) - Counter(whole)
    assert any(
        rows_[id].completion.split() != prompts[rows_[id].prompt].split()
        for id in found.of("shuffled")
    )
    for id in found.of("other"):
        assert any(
            row.prompt == rows_[id].prompt and row.completion.startswith(rows_[id].completion)
            for row in other
        )
    for id in found.of("random"):
        assert set(rows_[id].completion.split()) <= set(WORDS)
        assert 2 not in tokens(rows_[id].completion), "no token is unknown"
        assert len(tokens(rows_[id].prompt)) == max(
            1, len(tokens(rows_[found.partners[id]].prompt))
        )

    used = {rows_[id].prompt for id in (*found.of("in"), *found.of("shuffled"))}
    assert len(found.heldout) == 6
    assert not used & {row.prompt for row in found.heldout} or len(set(prompts)) < 12


def test_a_seed_draws_the_same_rows_and_another_seed_others():
    assert planted(seed=1).rows.digest == planted(seed=1).rows.digest
    assert planted(seed=1).rows.digest != planted(seed=2).rows.digest


def test_repeats_are_copies_and_are_measured_once():
    found = planted(repeats=3)
    assert len(found.rows) == 8 + 36
    assert found.original == examples(8).ids
    assert len(found.ids) == 12
    copies = Counter(row.content_hash for row in found.rows[8:])
    assert set(copies.values()) == {3}
    assert found.rows.ids[8:11] == ["planted-in-000", "planted-in-000#2", "planted-in-000#3"]


def test_rows_that_need_no_cut_are_preferred():
    held = influence.examples_from_rows(
        [
            {"prompt": f"{WORDS[i]}", "completion": " a" * (9 if i % 2 else 1) + f" {WORDS[i]}"}
            for i in range(14)
        ]
    )
    other = influence.examples_from_rows(
        [{"prompt": f"old {WORDS[i]}", "completion": " the dog"} for i in range(4)]
    )
    found = plant(examples(4), held, other, build_tokenizer(), per_kind=3)
    assert {found.tokens[id] for id in found.ids} == {3}
    assert all(
        found.rows[found.rows.index(id)].completion in {row.completion for row in held}
        for id in found.of("in")
    )


def test_what_cannot_be_planted_is_refused():
    tokenizer, train, held, other = (
        build_tokenizer(),
        examples(8),
        examples(12, seed=1),
        examples(9, seed=2),
    )
    with pytest.raises(InputError, match=r"12 of 12 held-out rows .* and 13 are needed"):
        plant(train, held, other, tokenizer, per_kind=6)
    with pytest.raises(InputError, match=r"9 of 9 other rows .* and 10 are needed"):
        plant(train, examples(30, seed=1), other, tokenizer, per_kind=10)
    for files in ((train, other), (held, train)):
        with pytest.raises(InputError, match=r"8 of 8 .* have the content of training rows"):
            plant(train, *files, tokenizer, per_kind=3)
    with pytest.raises(InputError, match="per_kind 1, repeats 1"):
        plant(train, held, other, tokenizer, per_kind=1)
    texts = influence.examples_from_rows(
        [{"text": "the dog"}, {"messages": [{"role": "assistant", "content": "a"}]}]
    )
    with pytest.raises(
        InputError, match="0 of 2 other rows are different prompts with a completion"
    ):
        plant(train, held, texts, tokenizer, per_kind=3)
    short = influence.examples_from_rows([{"prompt": w, "completion": f" {w}"} for w in WORDS])
    uncut = influence.examples_from_rows(
        [{"prompt": w, "completion": f" {w}" + ",a" * 9} for w in WORDS]
    )
    with pytest.raises(
        InputError, match=r"could not be matched in length: planted-other-00\d has 20 .* partner 2"
    ):
        plant(train, short, uncut, tokenizer, per_kind=3)


def test_hostile_rows_are_planted_as_text():
    bad = [
        {"prompt": f"{HOSTILE}{i}", "completion": f" fox {HOSTILE} {'dog ' * (i % 5)}"}
        for i in range(12)
    ]
    train = influence.examples_from_rows(
        [{"id": "planted-in-000", "text": HOSTILE}, {"id": "planted--", "text": "a"}]
    )
    other = influence.examples_from_rows(
        [{"id": HOSTILE, "prompt": "", "completion": "\n\t \u2028 a dog"}, *rows(4)]
    )
    found = plant(train, influence.examples_from_rows(bad), other, build_tokenizer(), per_kind=2)
    assert len(set(found.rows.ids)) == 2 + 8
    assert not set(found.ids) & set(train.ids)
    assert all(row.completion.strip() for row in found.rows[2:])


def test_random_tokens_are_those_that_are_read_as_written():
    """A token that the tokenizer never makes of text (here it splits at the dash) is not drawn."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    known = json.loads(build_tokenizer().backend_tokenizer.to_str())
    known["model"]["vocab"] |= {"un-seen": 25, "no space": 26, "\x07": 27}
    raw = Tokenizer.from_str(json.dumps(known))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    assert {word for _, word in _pieces(tokenizer)} == set(WORDS)


def test_rows_come_back_from_their_file(tmp_path):
    given = influence.examples_from_rows(
        [
            {
                "id": HOSTILE.replace("\n", "."),
                "group": "g",
                "prompt": HOSTILE,
                "completion": " a\u2028b\x00",
            },
            {
                "messages": [
                    {"role": "user", "content": HOSTILE},
                    {"role": "assistant", "content": "b", "more": [1]},
                ]
            },
            {"text": "\ufefftext"},
        ]
    )
    write_rows(given, tmp_path / "rows.jsonl")
    assert influence.read_examples(tmp_path / "rows.jsonl").digest == given.digest


def test_plain_rows_are_different_rows():
    found = plain_rows(30)
    assert len({row.content_hash for row in found}) == 30
    assert found.digest == plain_rows(30).digest != plain_rows(30, seed=1).digest
    sums = [row for row in found if row.prompt.startswith("Compute")]
    for row in sums:
        total = sum(map(int, row.prompt.removeprefix("Compute ").rstrip(":").split(" + ")))
        assert row.completion.endswith(f"gives {total}.")


# ---- exposure along the way ----------------------------------------------------------------------------------


def measured(
    start, target, losses, retained=None, heldout=None, levels=(0.5, 1.0), names=None
) -> Measured:
    n, c = len(start), len(levels)
    retained = np.zeros((n, c, 2)) if retained is None else np.asarray(retained, dtype=float)
    heldout = np.zeros((n, c, 0)) if heldout is None else np.asarray(heldout, dtype=float)
    before = np.full(heldout.shape[2], 2.0)
    sample = tuple(f"t{j}" for j in range(retained.shape[2]))
    arrays = (np.asarray(one, dtype=float) for one in (start, target, np.zeros(n), losses, levels))
    names = tuple(f"r{i}" for i in range(n)) if names is None else names
    return Measured(names, *arrays, retained, heldout, np.zeros(len(sample)), before, sample, {})


def test_exposures_by_hand():
    """Row 0 goes from 1 to 3 nats, row 1 stops between its levels, row 2 began beyond its target."""
    losses = [[1, 2.5, 3.5, np.nan], [1, 2.2, 2.4, 2.5], [4, np.nan, np.nan, np.nan]]
    heldout = [[[2.5, 4], [3, 5]], [[1, 1], [np.nan, np.nan]], [[2, 2], [2, 2]]]
    found = exposures(
        measured([1, 1, 4], [3, 5, 3], losses, heldout=heldout), [[2, 3, 4], [4, 3, 4]]
    )
    np.testing.assert_array_equal(found.levels, [0, 0.5, 1])
    np.testing.assert_array_equal(found.losses, [[1, 2, 3], [1, np.nan, np.nan], [4, 4, 4]])

    def bits(loss: float, others: list[float]) -> float:
        return -loss / math.log(2) - math.log2(
            sum(math.exp(-other) for other in others) / len(others)
        )

    for level, loss in enumerate([1, 2, 3]):
        assert found.generalized[0, level] == pytest.approx(bits(loss, [2, 4]), rel=1e-12)
        assert found.relative[0, level] == pytest.approx(
            bits(loss, [[2, 2], [2.5, 4], [3, 5]][level]), rel=1e-12
        )
    assert found.generalized[1, 0] == pytest.approx(2 / math.log(2))
    assert np.isnan(found.generalized[1, 1:]).all()
    assert np.isnan(found.relative[1, 1:]).all()
    np.testing.assert_allclose(found.generalized[2], 0, atol=1e-12)
    with pytest.raises(InputError, match="losses of 2 rows; expected 3"):
        exposures(measured([1, 1, 4], [3, 5, 3], losses), [[2, 3]])


def test_exposure_without_heldout_rows():
    found = exposures(measured([1], [3], [[1, 4]]), [[2]])
    assert np.isnan(found.relative).all()
    np.testing.assert_allclose(found.generalized[0] * math.log(2), [1, 0, -1], atol=1e-12)


def test_steps_to_levels_by_hand():
    losses = [[1, 1.5, 3.5, np.nan], [1, 2, 2.2, 2.5], [4, np.nan, np.nan, np.nan]]
    found = steps_to_levels(measured([1, 1, 4], [3, 5, 3], losses))
    np.testing.assert_allclose(found, [[0, 1.25, 1.75], [0, np.nan, np.nan], [0, 0, 0]])


def test_the_way_is_that_of_the_ascent(tmp_path):
    model = build_model(layers=1, target_modules=["q_proj", "v_proj"])
    run = fit_end(model, examples(8), directory=tmp_path / "run", store="never")
    found = measure(run, run.train.ids[:3], protocol=Protocol(lr=0.03, steps=10), sample_rows=5)
    np.testing.assert_allclose(
        steps_to_levels(found)[:, -1], np.where(np.isinf(found.steps), np.nan, found.steps)
    )
    exposed = exposures(found, found.target[None])
    np.testing.assert_array_equal(np.isnan(exposed.generalized[:, -1]), np.isinf(found.steps))
    assert np.isfinite(found.steps).any()
    np.testing.assert_allclose(np.nan_to_num(np.minimum(exposed.generalized[:, -1], 0)), 0, atol=2)
    known = run.train.ids
    assert original_alone(found, known).damage.tolist() == found.damage.tolist()
    some = found.sample[:3]
    kept = original_alone(found, some)
    np.testing.assert_allclose(kept.damage, np.nanmean(found.retained[:, -1, :3], axis=1))
    with pytest.raises(InputError, match="none of the 5 training rows"):
        original_alone(found, ["nobody"])


def test_leverage_is_that_of_a_dense_solve(tmp_path):
    """Gradients by one backward a row, the curvature column by column."""
    model = build_model(layers=1, target_modules=["q_proj", "v_proj"])
    run = influence.fit(model, examples(6), path=(0.5, 0.8), directory=tmp_path / "run")
    new = examples(4, seed=3)
    found = leverage(run, new)
    point = run.points[-1]
    size = model.space.size
    matrix = point.operator().matvec(torch.eye(size, dtype=torch.float64)).numpy()
    with model.at(point.place.theta):
        for row, value in zip(run.tokenized(new), found, strict=True):
            for parameter in model.parameters:
                parameter.requires_grad_(True)
            ids = torch.from_numpy(row.input_ids)[None]
            losses = torch.nn.functional.cross_entropy(
                model.model(ids).logits[0, :-1], ids[0, 1:], reduction="none"
            )
            gradients = torch.autograd.grad(
                losses[torch.from_numpy(row.supervised[1:])].mean(), model.parameters
            )
            g = model.space.flatten(list(gradients)).numpy()
            assert value == pytest.approx(g @ np.linalg.solve(matrix, g), rel=1e-8)
    assert (found > 0).all()


# ---- the two answers -----------------------------------------------------------------------------------------


def synthetic(effects: dict[str, tuple[float, float]], n: int = 12, seed: int = 0) -> pd.DataFrame:
    """`in` rows of about 10 steps and damage 0.1; every other kind with its factor of the steps and its shift of the damage."""
    rng = np.random.default_rng(seed)
    made = []
    for kind, (factor, shift) in {"in": (1.0, 0.0), **effects}.items():
        for j in range(n):
            steps, damage = factor * (10 + rng.normal()), 0.1 + shift + 0.01 * rng.normal()
            one = {
                "id": f"{kind}-{j}",
                "kind": kind,
                "partner": f"in-{j}",
                "steps": steps,
                "damage": damage,
            }
            made.append(
                one | {"area": damage / 2, "gap": 2.0, "matched": damage, "matched_partner": 0.1}
            )
    return pd.DataFrame(made)


@pytest.mark.parametrize(
    ("effects", "steps", "damage"),
    [
        ({"other": (2, -0.05), "shuffled": (1.5, -0.05), "random": (3, -0.02)}, "yes", "yes"),
        ({"other": (0.5, 0.05), "shuffled": (0.6, 0.05), "random": (0.4, 0.02)}, "no", "no"),
        ({"other": (1, 0), "shuffled": (1, 0), "random": (1, 0)}, "undecided", "undecided"),
        (
            {"other": (0.5, 0.05), "shuffled": (3, -0.2), "random": (3, -0.2)},
            "undecided",
            "undecided",
        ),
    ],
    ids=["both", "neither", "equal", "one kind says the contrary"],
)
def test_answers_both_ways(effects, steps, damage):
    found = compare(synthetic(effects), 200, resamples=300)
    assert [(one["kind"], one["measure"]) for one in found][:3] == [
        (OUTSIDE[0], m) for m in ("steps", "damage", "area")
    ]
    assert (verdict(found, "steps"), verdict(found, "damage")) == (steps, damage)
    assert (verdict(found, "area"), verdict(found, "per_nat"), verdict(found, "matched")) == (
        damage,
        damage,
        damage,
    )
    for one in found:
        assert one["low"] <= one["value"] <= one["high"]
        assert one["pairs"] == 12


def test_comparisons_by_hand():
    """Two pairs of each of two kinds; one row never arrived, and its damage is unknown."""
    table = pd.DataFrame(
        [
            ("i0", "in", "i0", 4.0, 0.2, 0.1, 2.0, 0.2, 0.2),
            ("i1", "in", "i1", 6.0, 0.4, 0.2, 2.0, 0.4, 0.4),
            ("o0", "other", "i0", 8.0, 0.1, 0.3, 4.0, 0.05, 0.2),
            ("o1", "other", "i1", np.inf, np.nan, np.nan, 4.0, np.nan, 0.4),
            ("s0", "shuffled", "i0", 2.0, 0.3, 0.5, 1.0, 0.3, 0.1),
            ("s1", "shuffled", "i1", 2.0, 0.5, 0.5, -1.0, 0.0, 0.0),
        ],
        columns=[
            "id",
            "kind",
            "partner",
            "steps",
            "damage",
            "area",
            "gap",
            "matched",
            "matched_partner",
        ],
    )
    found = {(one["kind"], one["measure"]): one for one in compare(table, 20, resamples=20)}
    assert {kind for kind, _ in found} == {"other", "shuffled", "all"}
    expected = {
        ("other", "steps"): (28 / 10, 2),
        ("other", "damage"): (0.1 - 0.2, 1),
        ("other", "area"): (0.2, 1),
        ("other", "per_nat"): (0.1 / 4 - 0.2 / 2, 1),
        ("other", "matched"): (0.05 - 0.2, 1),
        ("shuffled", "steps"): (0.4, 2),
        ("shuffled", "damage"): (0.1, 2),
        ("shuffled", "per_nat"): (0.8 / 1 - 0.6 / 4, 2),
        ("shuffled", "matched"): (0.15 - 0.05, 2),
        ("all", "steps"): ((5 + 11) / 10, 2),
        ("all", "damage"): (0.2 - 0.2, 1),
        ("all", "matched"): (0.175 - 0.15, 1),
    }
    for key, (value, pairs) in expected.items():
        assert (found[key]["value"], found[key]["pairs"]) == (
            pytest.approx(value, abs=1e-12),
            pairs,
        ), key


def test_an_interval_without_numbers_decides_nothing():
    table = synthetic({"other": (2, 0.1)}, n=3).assign(damage=np.nan, area=np.nan)
    found = compare(table, 200, resamples=20)
    assert verdict(found, "steps") == "yes"
    assert verdict(found, "damage") == "undecided"
    assert np.isnan(next(one["low"] for one in found if one["measure"] == "damage"))


def test_matched_damage_by_hand():
    """Row 1 went 4 nats, its partner 2: at 2 nats row 1 was half way, with damage 0.1; row 0 has no damage left to go."""
    curve = np.array([[0, 0.2, 0.6], [0, 0.1, 0.9], [0, 0.3, 0.5]])
    gap = np.array([2.0, 4.0, -1.0])
    own, theirs = matched_damage(np.array([0, 0.5, 1]), gap, curve, np.array([0, 0, 0]))
    np.testing.assert_allclose(own[:2], [0.6, 0.1])
    np.testing.assert_allclose(theirs, [0.6, 0.6, 0])


def test_correlations_over_all_rows_and_within_kinds():
    n = 8
    within = np.concatenate([np.arange(n)[::-1] + 100 * k for k in range(4)]).astype(float)
    table = pd.DataFrame(
        {"kind": np.repeat(KINDS, n), "base_loss": within, "leverage": np.tile(np.arange(n), 4)}
    )
    table["steps"] = np.concatenate([np.arange(n) + 100.0 * k for k in range(4)])
    table["damage"] = table["area"] = -table["steps"]
    table.loc[31, "steps"] = np.inf
    found = {(one["forecast"], one["measure"]): one for one in correlations(table, resamples=50)}
    first = found["base_loss", "steps"]
    assert first["spearman"] > 0.85
    assert first["within"] == pytest.approx(-1)
    assert first["low"] <= first["spearman"] <= first["high"]
    assert found["leverage", "steps"]["within"] == pytest.approx(1)
    assert found["base_loss", "damage"]["spearman"] < -0.85


# ---- groups of one difficulty --------------------------------------------------------------------------------


def test_groups_by_difficulty_and_mixtures():
    names = list("abcdefg")
    groups = by_difficulty(names, [3, np.inf, 1, 2, 7, 5, 4], parts=3)
    assert groups == {"part 1": ["c", "d", "a"], "part 2": ["g", "f"], "part 3": ["e", "b"]}
    mixed = mixtures(groups, count=2)
    assert list(mixed) == [f"mixture {m}, part {k}" for m in (1, 2) for k in (1, 2, 3)]
    for m in (1, 2):
        parts = [mixed[f"mixture {m}, part {k}"] for k in (1, 2, 3)]
        assert [len(part) for part in parts] == [3, 2, 2]
        assert sorted(name for part in parts for name in part) == names
    assert mixed["mixture 1, part 1"] != mixed["mixture 2, part 1"]
    for steps, parts in (([1, 2], 2), ([1, 2, np.nan], 2), ([1, 2, 3], 4), ([1, 2, 3], 1)):
        with pytest.raises(InputError, match="expected"):
            by_difficulty(["a", "b", "c"], steps, parts)


@pytest.mark.parametrize(("shift", "answer"), [(-0.3, "yes"), (0.3, "no"), (0.0, "undecided")])
def test_groups_apart_both_ways(shift, answer):
    rng = np.random.default_rng(0)
    names = (
        "part 1",
        "part 2",
        "mixture 1, part 1",
        "mixture 1, part 2",
        "mixture 2, part 1",
        "mixture 2, part 2",
    )
    rise = np.repeat(1 + 0.05 * rng.normal(size=(1, 1, 10)), 7, axis=0)
    rise[0, 0] += np.tile([0.1, -0.1], 5)
    rise[:2] += shift
    found = apart(
        measured(
            [0] * 7, [1] * 7, np.zeros((7, 1)), rise, levels=(1.0,), names=(*names, "together")
        )
    )
    assert found["helps"] == answer
    assert found["homogeneous"] == pytest.approx(rise[:2].mean(2).sum())
    assert found["mixed"] == pytest.approx(rise[2:6].mean(2).sum() / 2)
    assert found["together"] == pytest.approx(rise[6].mean())
    assert found["difference"] == pytest.approx(found["homogeneous"] - found["mixed"])
    assert (found["parts"], found["mixtures"]) == (2, 2)


def test_a_group_that_never_arrived_decides_nothing():
    rise = np.ones((4, 1, 3))
    rise[0] = np.nan
    found = apart(
        measured(
            [0] * 4,
            [1] * 4,
            np.zeros((4, 1)),
            rise,
            levels=(1.0,),
            names=("part 1", "part 2", "mixture 1, part 1", "mixture 1, part 2"),
        )
    )
    assert found["helps"] == "undecided"


def test_whole_sets_by_hand():
    rise = np.array([[[1, 3, 2]], [[2, 5, 3]], [[1, 3, 2]], [[np.nan] * 3]])
    names = ("kind in", "kind other", "kind random", "kind shuffled")
    found = whole_sets(
        measured([0] * 4, [1] * 4, np.zeros((4, 1)), rise, levels=(1.0,), names=names),
        {"in": 5, "other": 5, "shuffled": 4, "random": 5},
    ).set_index("kind")
    assert found.index.tolist() == ["in", "other", "shuffled", "random"]
    assert found["rows"].tolist() == [5, 5, 4, 5]
    np.testing.assert_allclose(found["damage"], [2, 10 / 3, np.nan, 2])
    assert found.loc["other", "more"] == pytest.approx(4 / 3)
    assert 1 <= found.loc["other", "low"] < found.loc["other", "high"] <= 2
    assert found.loc["random", ["more", "low", "high"]].tolist() == [0, 0, 0]
    assert np.isnan(found.loc["shuffled", "low"])


# ---- the study and its command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with base/, adapter/, run/ and rows; the recipe takes two epochs."""
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
def command(made, run_main):
    """Call `analysis ood` in this process."""
    fixed = [
        "analysis",
        "ood",
        "--run",
        made / "run",
        "--device",
        "cpu",
        "--recipe",
        made / "recipe.json",
    ]
    fixed += ["--heldout", made / "heldout.jsonl", "--other", made / "other.jsonl", "--per-kind", 3]
    return lambda *arguments: run_main(main, *fixed, *arguments)


@pytest.fixture(scope="module")
def studied(made, tmp_path_factory):
    """One study, made in Python, that tests may read."""
    out = tmp_path_factory.mktemp("studied") / "out"
    return out, ask(made, out)


def ask(made, out, **options):
    run = influence.Run.open(made / "run", device="cpu")
    files = [influence.read_examples(made / f"{name}.jsonl") for name in ("heldout", "other")]
    options = {
        "recipe": unlearn.Recipe.read(made / "recipe.json"),
        "per_kind": 3,
        "resamples": 50,
    } | options
    return study(run, *files, out, **options)


def test_a_study_is_what_its_parts_say(made, studied, tmp_path):
    out, found = studied
    rows_ = influence.read_examples(out / "train.jsonl")
    kinds = json.loads((out / "kinds.json").read_text())
    assert len(rows_) == 10 + 12
    assert list(kinds["kinds"]) == found.table["id"].tolist()

    # the adapter is what training on these rows gives, the references what training on the original ones gives
    own = influence.Run.open(out / "run", device="cpu")
    assert own.train.digest == rows_.digest
    recipe = unlearn.Recipe.read(made / "recipe.json")
    unlearn.retrain(own, out=tmp_path / "again", recipe=recipe)
    for folder, same in (("again", tmp_path / "again"), ("adapter", out / "adapter")):
        assert (same / "adapter_model.safetensors").exists(), folder
    one, two = (
        load_file(place / "adapter_model.safetensors")
        for place in (tmp_path / "again", out / "adapter")
    )
    for key, value in one.items():
        torch.testing.assert_close(two[key], value)
    first = influence.Run.open(made / "run", device="cpu")
    for k in (1, 2):
        unlearn.retrain(first, out=tmp_path / f"r{k}", recipe=replace(recipe, seed=k - 1))
    models = [
        influence.load(made / "base", place, device="cpu")
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


def test_damage_is_told_by_original_rows(made, studied):
    """Planted rows are in the sample of `difficulty`, and would change the damage."""
    out, found = studied
    whole = read_measured(out / "difficulty.h5")
    counted = [j for j, id in enumerate(whole.sample) if not id.startswith("planted-")]
    assert 0 < len(counted) < len(whole.sample)
    np.testing.assert_allclose(
        found.table["damage"], whole.retained[:, -1, counted].mean(1), rtol=1e-6
    )


def test_what_is_finished_is_used_again(made, studied):
    out, found = studied
    kept = [
        "adapter/adapter_model.safetensors",
        "reference-1/retrain.json",
        "difficulty.h5",
        "groups.h5",
        "train.jsonl",
    ]
    before = {name: (out / name).stat().st_mtime_ns for name in kept}
    again = ask(made, out)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == before
    pd.testing.assert_frame_equal(again.table, found.table)
    assert again.verdicts == found.verdicts
    for options in ({"seed": 1}, {"per_kind": 2}, {"recipe": unlearn.Recipe(epochs=1)}):
        with pytest.raises(MismatchError, match=r"is of another study: (rows|recipe) differ"):
            ask(made, out, **options)
    with pytest.raises(MismatchError, match="measurements of another request"):
        ask(made, out, protocol=Protocol(optimizer="sgd"))
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == before


def test_the_command_as_json_files_and_overwriting(made, command, tmp_path, monkeypatch):
    monkeypatch.setattr(SGD, "rate", 0.1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("")
    result = command("--out", out, "--references", 1, "--json", "--overwrite")
    assert result.status == 0, result.err
    found = result.json()
    assert set(found["verdicts"].values()) <= {"yes", "no", "undecided"}
    assert set(found["kinds"]) == set(KINDS)
    kept = json.loads((out / "ood.json").read_text())
    assert kept["verdicts"] == found["verdicts"]
    table = pd.read_csv(out / "ood.csv")
    names = "id kind partner tokens steps damage area base_loss leverage genex_start genex_end relex_start relex_end"
    assert set(names.split()) <= set(table.columns)
    assert len(table) == 12
    assert (out / "ood.png").read_bytes().startswith(b"\x89PNG")
    adapter = (out / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    result = command("--out", out, "--references", 1, "--optimizer", "sgd")
    assert (result.status, "--overwrite" in result.err) == (2, True)
    result = command("--out", out, "--references", 1, "--optimizer", "sgd", "--overwrite")
    assert result.status == 0, result.err
    assert json.loads((out / "ood.json").read_text())["protocol"]["optimizer"] == "sgd"
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == adapter
    assert not list(out.rglob("*partial*"))
    assert (out / "thesis.txt").exists(), "what is not of a study stays"


def test_the_command_for_people(made, studied, command):
    out, _ = studied
    result = command("--out", out)
    assert result.status == 0, result.err
    assert "do rows from outside need more steps? " in result.out
    assert "is their trade-off better (less damage at the goal)? " in result.out
    assert "\x1b" not in result.out
    table = result.out.partition("do rows from outside")[0]
    assert max(map(len, table.splitlines())) <= 100
    assert all(kind in table for kind in KINDS)


def test_the_command_refuses(made, command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    for arguments, message in (
        (["--out", tmp_path / "mine"], "is not empty and holds no study"),
        (["--out", tmp_path / "o", "--per-kind", 6], "12 of 12 held-out rows"),
        (["--out", tmp_path / "o", "--references", 0], "references 0 was given"),
        (["--out", tmp_path / "o", "--optimizer", "lion"], "expected adam or sgd"),
        (["--out", tmp_path / "o", "--seed", -1], "--seed -1 was given"),
        (
            ["--out", tmp_path / "o", "--heldout", made / "train.jsonl"],
            "have the content of training rows",
        ),
    ):
        result = command(*arguments)
        assert (result.status, message in result.err) == (2, True), result.err
    assert not (tmp_path / "o").exists()
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_what_somebody_else_made_is_never_replaced(made, command, tmp_path):
    """`--out` next to somebody's own adapter, run and rows: their names are those that a study writes."""
    for name in ("adapter", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("")
    result = command("--out", tmp_path, "--overwrite")
    assert (result.status, "adapter, run of something else" in result.err) == (2, True), result.err
    for text, status in (('{"kinds": 1}', 2), ("{", 1)):
        other = tmp_path / f"other-{status}"
        other.mkdir()
        (other / "kinds.json").write_text(text)
        result = command("--out", other, "--overwrite")
        assert result.status == status, result.err
        assert (other / "kinds.json").read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("mine")) == ["mine", "mine"]


def test_a_study_killed_before_its_rows_were_written_goes_on(made, studied, tmp_path):
    out, found = studied
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "kinds.json").write_bytes((out / "kinds.json").read_bytes())
    for name in ("adapter", "reference-1", "run"):
        shutil.copytree(out / name, tmp_path / "o" / name)
    for name in ("difficulty.h5", "groups.h5"):
        shutil.copy(out / name, tmp_path / "o")
    assert (
        ask(made, tmp_path / "o", references=1).table["steps"].tolist()
        == found.table["steps"].tolist()
    )


def test_tables_and_lines_take_rows_that_never_arrived(studied):
    _, found = studied
    late = found.table.assign(steps=np.inf, damage=np.nan)
    made = replace(found, table=late)
    assert len(tables(made)) == 2
    assert len(lines(made)) >= 4
    json.dumps(made.record()["kinds"])


def test_ways_are_drawn_without_warnings(tmp_path):
    x = np.array([[0, 1, 2], [0, 2, np.nan]], dtype=float)
    empty = np.full((2, 3), np.nan)
    ways = {"a": {"in": (x, x), "other": (empty, empty)}, "b": {"in": (x, -x)}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = paths_plot(ways, "title", labels=(("x", "y"), ("u", "v")))
        figure.savefig(tmp_path / "a.png")
    line = figure.axes[0].containers[0][0]
    np.testing.assert_allclose(line.get_xydata(), [[0, 0], [1.5, 1.5], [2, 2]])
