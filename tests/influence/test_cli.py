"""The `influence` command: what it prints, how it exits, and what it leaves on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from influence.cli import main
from tests.conftest import rows
from tests.helpers import (
    contents,
    edit_config,
    edit_weights,
    save,
    save_base,
    untouched,
    write_rows,
)

SITES = {"layers": 1, "target_modules": ["q_proj", "v_proj"]}
HOSTILE = [
    "\x1b[2J\x1b[31mred\x1b]0;title\x07 \x9b5A \x08\x08\r\x00 fox",
    "[bold]fox[/bold] [link=file:///etc/passwd]x[/link] [/] [not closed",
    "fox " * 600,
    "‮\u2066שלום עולם\u202c مرحبا fox",
    "\n\n\n fox \n\n\t\v\f\u2028\u2029\x85\n",
    "a\u0301\u200b\ufeff\U0001f98a\U0001f468\u200d\U0001f469\u200d\U0001f467 fox",
]


@pytest.fixture
def influence(command):
    """The `influence` command."""
    return command


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with base/, adapter/, train.jsonl, queries.jsonl, and run/ with scores and self-influence."""
    at = tmp_path_factory.mktemp("cli")
    save(at, **SITES)
    write_rows(at / "train.jsonl", rows(20))
    write_rows(at / "queries.jsonl", rows(4, seed=9))
    with pytest.MonkeyPatch.context() as patch:
        for arguments in (
            [
                "fit",
                "--adapter",
                at / "adapter",
                "--train",
                at / "train.jsonl",
                "--run",
                at / "run",
            ],
            ["score", "--run", at / "run", "--queries", at / "queries.jsonl"],
            ["self", "--run", at / "run"],
        ):
            patch.setattr(sys, "argv", ["influence", *map(str, arguments)])
            with pytest.raises(SystemExit) as end:
                main()
            assert not end.value.code
    return at


@pytest.fixture
def at(made, tmp_path):
    """A copy of `made` to spoil; the manifest records the paths of the original."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def fit_arguments(at: Path, **changes) -> list:
    options = {
        "model": at / "base",
        "adapter": at / "adapter",
        "train": at / "train.jsonl",
        "run": at / "new",
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return ["fit", *(part for name, value in options.items() for part in (f"--{name}", value))]


# ---- the happy path ------------------------------------------------------------------------------


def test_fit_says_what_it_did_and_a_second_one_returns_at_once(influence, at):
    first = influence(*fit_arguments(at))
    assert first.status == 0
    assert first.out.startswith(f"{at / 'new'}: ekfac on 20 rows (")
    assert "gradients stored" in first.out
    with untouched(at / "new"):
        again = influence(*fit_arguments(at), "--json")
    assert again.status == 0
    assert again.json()["manifest"]["complete"] is True
    assert again.json()["run"] == str(at / "new")


def test_the_base_defaults_to_the_one_the_adapter_records(influence, made):
    manifest = json.loads((made / "run" / "manifest.json").read_text())
    assert manifest["base"]["path"] == str(made / "base")


@pytest.mark.parametrize("curvature", ["kfac", "fisher", "ggn", "hessian", "identity"])
def test_fit_and_score_with_every_curvature(influence, at, curvature):
    assert (
        influence(
            *fit_arguments(at, curvature=curvature, damping="mean:1000", dtype="float64")
        ).status
        == 0
    )
    solver = "cg" if curvature in ("ggn", "hessian") else "direct"
    result = influence(
        "score",
        "--run",
        at / "new",
        "--queries",
        at / "queries.jsonl",
        "--solver",
        solver,
        "--json",
    )
    assert result.status == 0, result.err
    assert result.json()["not_converged"] == 0
    with h5py.File(at / "new" / "scores.h5") as file:
        assert file["scores"].shape == (4, 20)
        assert file.attrs["curvature"] == curvature


def test_score_writes_into_the_run_and_prints_the_shape(influence, at):
    (at / "run" / "scores.h5").unlink()
    result = influence("score", "--run", at / "run", "--queries", at / "queries.jsonl")
    assert result.status == 0
    start = (
        f"{at / 'run' / 'scores.h5'}: scores [4 queries, 20 rows]; raw ekfac, damping mean:0.1, "
        "points 0.4, 0.6, 0.8, size "
    )
    assert result.out.startswith(start)
    assert "calibrated" in result.out
    options = ["--measurement", "margin", "--solver", "pcg", "--damping", "top:0.1", "--json"]
    arguments = ["--run", at / "run", "--queries", at / "queries.jsonl", "--out", at / "a" / "b.h5"]
    result = influence("score", *arguments, *options)
    assert result.status == 0
    assert result.json()["shape"] == [4, 20]
    with h5py.File(at / "a" / "b.h5") as file:
        assert (file.attrs["measurement"], file.attrs["solver"], file.attrs["damping"]) == (
            "margin",
            "pcg",
            "top:0.1",
        )


def test_scores_of_other_queries_are_replaced_with_overwrite_only(influence, at):
    other = write_rows(at / "other.jsonl", rows(2, seed=5))
    with untouched(at):
        result = influence("score", "--run", at / "run", "--queries", other)
    assert result.status == 2
    assert (
        "holds other scores (another query_digest): give another --out, or --overwrite"
        in result.err
    )
    assert influence("score", "--run", at / "run", "--queries", other, "--overwrite").status == 0
    with h5py.File(at / "run" / "scores.h5") as file:
        assert file["scores"].shape == (2, 20)
        assert file["self_influence"].shape == (20,)


def test_self_lists_the_highest_rows(influence, at):
    result = influence("self", "--run", at / "run", "-k", 3)
    assert result.status == 0
    assert "the 3 rows with the highest self-influence of 20" in " ".join(result.out.split())
    result = influence("self", "--run", at / "run", "-k", 3, "--json").json()
    with h5py.File(at / "run" / "scores.h5") as file:
        values, ids = file["self_influence"][()], file["train_ids"].asstr()[()]
    order = np.argsort(-values)[:3]
    assert [row["id"] for row in result["top"]] == [ids[i] for i in order]
    assert [row["self_influence"] for row in result["top"]] == [float(values[i]) for i in order]


def test_top_lists_proponents_and_opponents_by_id_or_position(influence, made):
    by_id = influence("top", "--run", made / "run", "--query", "r9-1", "-k", 2, "--json")
    by_position = influence("top", "--run", made / "run", "--query", 1, "-k", 2, "--json")
    assert by_id.status == by_position.status == 0
    assert by_id.json() == by_position.json()
    with h5py.File(made / "run" / "scores.h5") as file:
        row, ids = file["scores"][1], file["train_ids"].asstr()[()]
    found = by_id.json()
    assert found["query"] == "r9-1"
    assert [entry["id"] for entry in found["proponents"]] == [ids[i] for i in np.argsort(-row)[:2]]
    assert [entry["id"] for entry in found["opponents"]] == [ids[i] for i in np.argsort(row)[:2]]
    assert all(
        entry["score"] == float(row[entry["index"]])
        for entry in found["proponents"] + found["opponents"]
    )
    text = influence("top", "--run", made / "run", "--query", "r9-1", "-k", 2)
    assert text.status == 0
    assert "proponents of r9-1" in text.out
    assert "opponents of r9-1" in text.out
    assert all(entry["id"] in text.out for entry in found["proponents"] + found["opponents"])


def test_top_needs_no_model_but_the_rows_it_was_fitted_on(influence, at):
    manifest = at / "run" / "manifest.json"
    record = json.loads(manifest.read_text())
    record["base"]["path"] = record["adapter"]["path"] = "gone"
    record["data"]["path"] = str(at / "train.jsonl")
    manifest.write_text(json.dumps(record))
    assert influence("top", "--run", at / "run", "--query", 0).status == 0
    write_rows(at / "train.jsonl", rows(20, seed=1))
    result = influence("top", "--run", at / "run", "--query", 0)
    assert result.status == 2
    assert "has changed since" in result.err
    (at / "train.jsonl").unlink()
    assert (
        influence("top", "--run", at / "run", "--query", 0).status == 0
    )  # ids and scores are still shown


def test_check_agrees(influence, at):
    result = influence(
        "check", "--adapter", at / "adapter", "--train", at / "train.jsonl", "--rows", 3
    )
    assert result.status == 0
    assert "agree on 3 examples" in result.out
    result = influence(
        "check",
        "--adapter",
        at / "adapter",
        "--train",
        at / "train.jsonl",
        "--json",
        "--dtype",
        "float64",
    )
    assert result.json()["ok"] is True
    assert len(result.json()["errors"]) == 4


# ---- wrong calls: status 2, a sentence, nothing written ------------------------------------------


def wrong(influence, at, arguments, *sentences, status=2) -> None:
    """The call exits with this status, says all sentences in one error without a traceback, writes nothing."""
    with untouched(at):
        result = influence(*arguments)
    assert result.status == status, result.err
    text = " ".join(result.err.split())
    for sentence in sentences:
        assert sentence in text
    assert result.out == ""
    assert "Traceback" not in result.err
    assert not (at / "new").exists()


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
        "no.jsonl does not exist; give a .jsonl, .json or .parquet",
    )


def test_all_tokens_truncated_away(influence, at):
    data = write_rows(
        at / "long.jsonl", [{"id": "long", "prompt": "the " * 6, "completion": " fox"}, *rows(2)]
    )
    wrong(
        influence,
        at,
        fit_arguments(at, train=data, max_length=6),
        "rows have no supervised token:",
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


@pytest.mark.parametrize("query", ["r9-99", "4", "-1", "", "0.5"])
def test_an_unknown_query(influence, at, query):
    sentence = (
        f"query {query!r} was given; there are 4 scored queries: give a position 0..3 or one of "
        "the ids r9-0, r9-1"
    )
    wrong(influence, at, ["top", "--run", at / "run", f"--query={query}"], sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"curvature": "newton"},
            "curvature 'newton' was given; expected one of ekfac, kfac, fisher, ggn, hessian, "
            "identity",
        ),
        ({"reduction": "row"}, "reduction 'row' was given; expected"),
        ({"store": "maybe"}, "store 'maybe' was given; expected auto, always or never"),
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


def test_top_refuses_scores_of_another_run(influence, at):
    influence(*fit_arguments(at, seed=1))
    with untouched(at):
        result = influence(
            "top", "--run", at / "new", "--scores", at / "run" / "scores.h5", "--query", 0
        )
    assert result.status == 2
    assert "belongs to another run than" in result.err


def test_a_run_with_self_influence_only_has_no_scores_to_show(influence, at):
    influence("self", "--run", at / "run", "--out", at / "self.h5")
    wrong(
        influence,
        at,
        ["top", "--run", at / "run", "--scores", at / "self.h5", "--query", 0],
        "it lacks scores",
        status=1,
    )


# ---- work that fails: status 1 -------------------------------------------------------------------


def test_a_truncated_file_exits_with_one(influence, at):
    for name, command in (
        ("scores.h5", ["top", "--query", 0]),
        ("factors.h5", ["self"]),
        ("gradients.h5", ["self", "--out", at / "again.h5"]),
    ):
        path = at / "run" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:1000])
        sentence = f"{name} is damaged, truncated, or not an HDF5 file"
        wrong(influence, at, [*command, "--run", at / "run"], sentence, status=1)
        path.write_bytes(whole)


def test_columns_that_do_not_converge_exit_with_one_and_are_written(influence, at):
    assert (
        influence(
            *fit_arguments(at, curvature="hessian", damping="abs:1e-12", dtype="float32")
        ).status
        == 0
    )
    result = influence(
        "score", "--run", at / "new", "--queries", at / "queries.jsonl", "--solver", "cg", "--json"
    )
    assert result.status == 1
    assert result.json()["not_converged"] > 0
    assert "raise the damping" in result.err
    with h5py.File(at / "new" / "scores.h5") as file:
        assert not file["converged"][()].all()


def test_an_unwritable_place_exits_with_one(influence, at):
    (at / "file").touch()
    result = influence(
        "score",
        "--run",
        at / "run",
        "--queries",
        at / "queries.jsonl",
        "--out",
        at / "file" / "s.h5",
    )
    assert result.status == 1
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err


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


# ---- the process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["fit"], ["score"], ["self"], ["top"], ["check"]])
def test_help_does_not_wait_for_torch(command):
    code = (
        "import sys\n"
        "from influence.cli import main\n"
        f"sys.argv = ['influence', *{command!r}, '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "slow = {'torch', 'transformers', 'peft', 'datasets', 'scipy', 'h5py', 'numpy'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Usage: influence" in result.stdout
    if command:
        assert "--run" in result.stdout or command == ["check"]


def test_the_console_script_and_the_module_are_the_command(made):
    script = Path(sys.executable).with_name("influence")
    outputs = []
    for start in ([str(script)], [sys.executable, "-m", "influence"]):
        if not Path(start[0]).exists():
            pytest.skip("the package is not installed with its scripts")
        arguments = ["top", "--run", made / "run", "--query", "nobody"]
        result = subprocess.run(
            [*start, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 2
        assert result.stderr.startswith(
            "error: query 'nobody' was given; there are 4 scored queries"
        )
        outputs.append((result.stdout, result.stderr))
    assert outputs[0] == outputs[1]


def test_json_is_all_there_is_on_standard_output(influence, at):
    for arguments in (
        fit_arguments(at),
        ["score", "--run", at / "new", "--queries", at / "queries.jsonl"],
        ["self", "--run", at / "new"],
        ["top", "--run", at / "new", "--query", 0],
        ["check", "--adapter", at / "adapter", "--train", at / "train.jsonl"],
    ):
        result = influence(*arguments, "--json")
        assert result.status == 0
        assert isinstance(result.json(), dict)
        assert result.out.count("\n") == 1
    numbered = [
        f"{name}{number}.h5" for name in ("factors", "gradients") for number in ("-2", "-3", "")
    ]
    assert sorted(contents(at / "new")) == [*numbered, "manifest.json", "scores.h5"]
