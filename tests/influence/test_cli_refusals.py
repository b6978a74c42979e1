"""The `influence` command where it is called wrongly, or on hostile rows."""

from __future__ import annotations

import pytest

from tests.conftest import rows
from tests.helpers import edit_config, edit_weights, save, save_base, untouched, write_rows
from tests.influence.toy_commands import SITES, fit_arguments, wrong

HOSTILE = [
    "\x1b[2J\x1b[31mred\x1b]0;title\x07 \x9b5A \x08\x08\r\x00 fox",
    "[bold]fox[/bold] [link=file:///etc/passwd]x[/link] [/] [not closed",
    "fox " * 600,
    "‮\u2066שלום עולם\u202c مرحبا fox",
    "\n\n\n fox \n\n\t\v\f\u2028\u2029\x85\n",
    "a\u0301\u200b\ufeff\U0001f98a\U0001f468\u200d\U0001f469\u200d\U0001f467 fox",
]

# ---- wrong calls: status 2, a sentence, nothing written ------------------------------------------


def test_an_empty_file(influence, at):
    (at / "empty.jsonl").touch()
    (at / "blank.jsonl").write_text("\n\n  \n")
    for name in ("empty.jsonl", "blank.jsonl"):
        sentence = f"error: there are no rows of {at / name}; give at least one"
        wrong(influence, at, fit_arguments(at, train=at / name), sentence)
        wrong(influence, at, ["score", "--run", at / "run", "--queries", at / name], sentence)
        wrong(influence, at, ["check", "--adapter", at / "adapter", "--train", at / name], sentence)


def test_missing_keys_are_listed_row_by_row(influence, at):
    bad = write_rows(
        at / "bad.jsonl",
        [
            {"id": "a", "question": "x"},
            {"prompt": "the", "completion": " fox"},
            {"prompt": "the"},
            {"id": "d", "completion": "x"},
        ],
    )
    wrong(
        influence,
        at,
        fit_arguments(at, train=bad),
        f"3 of 4 rows of {bad} cannot be used:",
        "row 1 (id 'a'): has no content, only the keys 'id', 'question'; expected 'prompt' and "
        "'completion'",
        "row 3: has 'prompt' but no 'completion'",
        "row 4 (id 'd'): has 'completion' but no 'prompt'",
    )


def test_a_missing_file(influence, at):
    wrong(
        influence,
        at,
        fit_arguments(at, train=at / "no.jsonl"),
        "no.jsonl does not exist; give a .jsonl, .json, .csv, .tsv or .parquet file",
    )


def test_all_tokens_truncated_away(influence, at):
    data = write_rows(
        at / "long.jsonl", [{"id": "long", "prompt": "the " * 6, "completion": " fox"}, *rows(2)]
    )
    wrong(
        influence,
        at,
        fit_arguments(at, train=data, max_length=6),
        "rows have no supervised token (TRL drops rows that are cut so: leave them out here too):",
        "row 1 (id 'long'): max_length=6 cuts off all 2 supervised tokens of its 8; max_length=7 "
        "keeps the first",
    )
    wrong(influence, at, fit_arguments(at, max_length=1), "max_length is 1; it must be at least 2")


def test_nan_weights(influence, at):
    def spoil(tensors):
        next(iter(tensors.values()))[0, 0] = float("nan")

    edit_weights(at / "adapter" / "adapter_model.safetensors", spoil)
    wrong(
        influence,
        at,
        fit_arguments(at),
        "error: 1 weights hold NaN or infinity (model.layers.0",
        status=1,
    )


def test_an_adapter_for_another_base(influence, at, tmp_path):
    other = save_base(tmp_path / "gpt2", "gpt2", layers=1)
    sentence = "was not made for base", "q_proj: the base has no such layer"
    wrong(influence, at, fit_arguments(at, model=other), *sentence)
    edit_config(at / "adapter", base_model_name_or_path=str(other))
    wrong(
        influence,
        at,
        ["check", "--adapter", at / "adapter", "--train", at / "train.jsonl"],
        *sentence,
    )


def test_a_dora_adapter(influence, at, tmp_path):
    _, dora = save(tmp_path / "dora", use_dora=True, **SITES)
    wrong(
        influence,
        at,
        fit_arguments(at, adapter=dora),
        "use_dora: DoRA also trains a magnitude per output",
    )


def test_a_merged_adapter(influence, at):
    wrong(
        influence,
        at,
        fit_arguments(at, adapter=at / "base"),
        "is a full model",
        "a merged adapter has no LoRA parameters",
    )


@pytest.mark.parametrize(
    ("damping", "sentence"),
    [
        (
            "mean:0",
            "damping mean:0 was given; lambda must be positive: a LoRA curvature has at least r^2 "
            "exact null",
        ),
        ("abs:0", "damping abs:0 was given; lambda must be positive"),
        ("top:-1", "damping top:-1 was given; lambda must be positive"),
        ("mean:nan", "damping mean:nan was given; lambda must be positive"),
        ("0", "damping '0' was given; expected mean:X, top:X, abs:X or time:T, as in mean:0.1"),
        ("half", "damping 'half' was given; expected mean:X, top:X, abs:X or time:T"),
        ("median:1", "damping rule 'median' was given; expected mean:X, top:X, abs:X or time:T"),
    ],
)
def test_damping_zero(influence, at, damping, sentence):
    wrong(influence, at, fit_arguments(at, damping=damping), sentence)
    arguments = [
        "score",
        "--run",
        at / "run",
        "--queries",
        at / "queries.jsonl",
        "--out",
        at / "o.h5",
        "--damping",
        damping,
    ]
    wrong(influence, at, arguments, sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"curvature": "newton"},
            "curvature 'newton' was given; expected one of ekfac, kfac, fisher, ggn, hessian, "
            "identity",
        ),
        ({"reduction": "row"}, "reduction 'row' was given; expected"),
        ({"store": "maybe"}, "store 'maybe' was given; expected auto, full, features, none"),
        ({"path": "0,1"}, "path 0,1 was given; expected different numbers above 0"),
        ({"path": "here"}, "--path 'here' was given; expected numbers separated by commas"),
        (
            {"dtype": "int4"},
            "dtype 'int4' was given; expected one of float32, bfloat16, float16, float64",
        ),
        ({"device": "abacus"}, "device 'abacus' was given; expected auto, cpu"),
        ({"samples": 0}, "--samples 0 was given; ekfac needs at least 1"),
        ({"samples": -1, "curvature": "fisher"}, "--samples -1 was given; fisher needs at least 0"),
        ({"token_budget": 0}, "token budget 0 was given; expected at least 1"),
        ({"token_budget": "many"}, "Invalid value for '--token-budget'"),
        ({"adapter": "./nowhere"}, "adapter './nowhere' is not a folder"),
        ({"model": "./nowhere"}, "base model './nowhere' could not be loaded"),
    ],
)
def test_wrong_options_of_fit(influence, at, options, sentence):
    wrong(influence, at, fit_arguments(at, **options), sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--solver", "magic"], "solver 'magic' was given; expected one of direct, cg, pcg"),
        (
            ["--measurement", "vibes"],
            "measurement 'vibes' was given; expected one of loss, sum, margin, token:K",
        ),
        (
            ["--curvature", "newton"],
            "curvature 'newton' was asked of a run fitted with 'ekfac', which does not hold it",
        ),
        (["--curvature", "fisher"], "curvature 'fisher' was asked of a run fitted with 'ekfac'"),
    ],
)
def test_wrong_options_of_score(influence, at, options, sentence):
    wrong(
        influence,
        at,
        [
            "score",
            "--run",
            at / "run",
            "--queries",
            at / "queries.jsonl",
            "--out",
            at / "o.h5",
            *options,
        ],
        sentence,
    )


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_of_rows_below_one(influence, at, number):
    sentence = f"{number} was given; expected at least 1"
    wrong(influence, at, ["top", "--run", at / "run", "--query", 0, "-k", number], f"-k {sentence}")
    wrong(influence, at, ["self", "--run", at / "run", "-k", number], f"-k {sentence}")
    check = ["check", "--adapter", at / "adapter", "--train", at / "train.jsonl", "--rows", number]
    wrong(influence, at, check, f"--rows {sentence}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["top", "--run", "AT", "--query", 0], "is not a run directory (no manifest.json)"),
        (
            ["top", "--run", "AT/run", "--scores", "AT/no.h5", "--query", 0],
            "no.h5 does not exist: make it",
        ),
        (["score", "--run", "AT/no", "--queries", "AT/queries.jsonl"], "is not a run directory"),
        (["fit", "--adapter", "AT/adapter"], "Missing option"),
        (["guess"], "No such command"),
    ],
)
def test_other_wrong_calls(influence, at, arguments, sentence):
    wrong(influence, at, [str(argument).replace("AT", str(at)) for argument in arguments], sentence)


def test_fit_into_a_directory_that_is_taken(influence, at):
    taken = "holds a run made from something else: curvature is"
    wrong(influence, at, fit_arguments(at, run=at / "run", curvature="kfac"), taken)
    wrong(
        influence,
        at,
        fit_arguments(at, run=at / "base"),
        "is not empty and holds no run (no manifest.json)",
    )


def test_a_second_self_call_changes_nothing(influence, at):
    with untouched(at):
        assert influence("self", "--run", at / "run").status == 0


# ---- hostile text --------------------------------------------------------------------------------


def harmless(text: str) -> None:
    """Nothing in it moves a cursor, hides text, or turns the direction of reading."""
    assert [c for c in text if not (c.isprintable() or c == "\n")] == []


def test_hostile_rows_are_printed_harmlessly(influence, at):
    items = [
        {"id": f"{i} {text[:40]}".replace("\0", ""), "prompt": text, "completion": f" {text}"}
        for i, text in enumerate(HOSTILE)
    ]
    items[3]["completion"] += "x" * 20000  # one word
    data = write_rows(at / "hostile.jsonl", items)
    result = influence(*fit_arguments(at, train=data))
    assert result.status == 0, result.err
    assert influence("score", "--run", at / "new", "--queries", data).status == 0
    for command in (
        ["self"],
        ["top", "--query", 0],
        ["top", "--query", 1],
        ["top", "--query", items[3]["id"]],
    ):
        result = influence(*command, "--run", at / "new")
        assert result.status == 0, result.err
        harmless(result.out + result.err)
        assert max(map(len, result.out.splitlines())) <= 120
        parsed = influence(*command, "--run", at / "new", "--json")
        assert parsed.json()
    text = "".join(influence("self", "--run", at / "new").out.split())
    assert "[bold]fox[/bold]" in text  # shown as it is, not read as markup


def test_hostile_ids_in_an_error_are_printed_harmlessly(influence, at):
    queries = write_rows(
        at / "hostile.jsonl",
        [{"id": text[:40].replace("\0", ""), "text": "the red fox"} for text in HOSTILE],
    )
    assert influence("score", "--run", at / "run", "--queries", queries, "--overwrite").status == 0
    result = influence("top", "--run", at / "run", "--query", "\x1b[2Jnobody")
    assert result.status == 2
    harmless(result.err)


def test_hostile_ids_of_bad_rows_are_printed_harmlessly(influence, at):
    data = write_rows(
        at / "bad.jsonl",
        [{"id": text[:40].replace("\0", ""), "\x1b[31mkey": 1} for text in HOSTILE],
    )
    result = influence(*fit_arguments(at, train=data))
    assert result.status == 2
    harmless(result.err)
