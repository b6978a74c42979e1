"""Reading rows from every kind of file, folder and data set, and every one that cannot be read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from types import SimpleNamespace

import pyarrow
import pytest
from datasets import Dataset, load_dataset
from pyarrow import parquet

import influence
from influence.errors import DataError
from influence.row_files import place_of, read_again, read_examples
from influence.rows import examples_from_rows
from tests.influence.toy_tokenizers import chat, pair, write_jsonl

FORMS = "'prompt' and 'completion', or 'messages', or 'text'"
ROWS = [
    pair(id="0", completion=" café \u2028 two"),
    pair("line\none", ' "quoted", and a comma', id="007", group="1e5"),
    pair("NA", "nan", id="NA"),
]


def jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows, delimiter=",") -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["id", "group", "prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


#: The same rows, by the name of a file.
TEXTS = {
    "rows.jsonl": jsonl(ROWS),
    "rows.JSONL": jsonl(ROWS),
    "rows.ndjson": jsonl(ROWS),
    "rows.json": jsonl(ROWS),
    "array.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "array.jsonl": " \n\n" + json.dumps(ROWS, indent=2) + "\n\n",
    "array a line.json": "[" + ",\n".join(json.dumps(row) for row in ROWS) + "]",
    "bom.json": "\ufeff" + json.dumps(ROWS, ensure_ascii=False),
    "objects.json": "\n" + "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "rows.csv": table(ROWS),
    "rows.tsv": table(ROWS, "\t"),
    "unix.csv": "\ufeff" + table(ROWS).replace("\r\n", "\n") + "\n",
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", TEXTS)
def test_every_text_file_holds_the_same_rows(name, packed, tmp_path, capfd):
    path = tmp_path / (name + ".gz" * packed)
    data = TEXTS[name].encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read_examples(path) == examples_from_rows(ROWS)
    assert capfd.readouterr().err == ""  # nothing was guessed, so nothing is said


def test_cells_are_text_as_they_stand(tmp_path):
    """What pandas would make numbers, dates and missing values of; with its unnamed index."""
    cells = ["0", "1e5", "007", "NA", "null", "True", " x ", "=1+1", "2024-01-01", "1" * 30]
    lines = [f"{i},{cell},{cell},{cell}" for i, cell in enumerate(cells)]
    path = tmp_path / "rows.csv"
    path.write_text(",id,prompt,completion\n" + "\n".join(lines))
    examples = read_examples(path)
    assert examples.ids == cells
    assert [row.prompt for row in examples] == cells
    long = "word " * 100_000  # the csv module takes 131,072 characters unless told otherwise
    path.write_text(f"prompt,completion\n,x\np,{long}\n")
    before, limit = csv.field_size_limit(1000), 1000
    with pytest.raises(DataError, match="row 2: has 'completion' but no 'prompt'") as error:
        read_examples(path)
    assert len(error.value.rows) == 1
    assert csv.field_size_limit(before) == limit


def test_a_table_is_numbered_by_the_lines_its_rows_begin_at(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\n"a\nb",c\nd\n\ne,\nf,g\n')
    with pytest.raises(DataError) as error:
        read_examples(path)
    assert [(bad.number, bad.reason) for bad in error.value.rows] == [
        (4, "has 1 cells, and the header has 2"),
        (6, "has 'prompt' but no 'completion'"),
    ]


def test_json_lines_are_numbered_as_an_editor_numbers_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(pair(completion=" caf\u00e9 \u2028 two"), ensure_ascii=False).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b"",
        b'{"prompt": "p",}',
        good,
        b'{"text": "\xff"}',
        b"[" * 100_000,
        good,
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as error:
        read_examples(path)
    numbers, reasons = zip(*((bad.number, bad.reason) for bad in error.value.rows), strict=True)
    assert numbers == (3, 5, 6)
    assert reasons[0].startswith("not JSON (")
    assert reasons[0].endswith(", at character 16)")
    assert reasons[1] == "not UTF-8 (byte 11: invalid start byte)"
    assert reasons[2].startswith("not JSON")
    path.write_bytes(b"\n".join([lines[0], b"", good]))
    assert [row.completion for row in read_examples(path)] == [" caf\u00e9 \u2028 two"] * 2


def failing(error):
    def load(*args, **kwargs):
        raise error

    return load


#: Files that cannot be read, by name and content, and what is said of them.
UNREADABLE = {
    "empty.jsonl": (b"\n\n", "there are no rows of {}; give at least one"),
    "empty.json": (b"[]", "there are no rows of {}; give at least one"),
    "empty.csv": (b"prompt,completion\n", "there are no rows of {}; give at least one"),
    "nothing.csv": (b"", "{} has the columns (none); expected " + FORMS),
    "rows.xlsx": (b"PK", "{} has the suffix '.xlsx', which is not read; give a .jsonl, .json"),
    "rows.parquet": (b"PAR1 and then nothing", "{} is not a readable Parquet file: "),
    "rows.parquet.gz": (b"", "{} has the suffix '.gz', which is not read"),
    "rows.jsonl.gz": (b"not packed", "{} cannot be read: Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(b"x" * 999)[:-4], "{} cannot be read: Compressed file ended"),
    "array.json": (b'\n[{"text": "a"}\n {"text": "b"}]', "not JSON (Expecting ',' delimiter, at"),
    "open.json": (b'[{"text": "a"},', "not JSON (Expecting ']', at line 1, character 16)"),
    "comma.json": (b'[{"text": "a"},,{"text": "b"}]', "not JSON (Expecting value, at line 1"),
    "latin.json": (b'[\n{"text": "\xff"}]', "{} is not UTF-8 (line 2: invalid start byte)"),
    "deep.json": (b"[" + b'{"a":' * 100_000, "{} is not JSON that can be read ("),
    "latin.csv": (b"text\n\xff\n", "{} is not UTF-8 (line 2, byte 1: invalid start byte)"),
    "open.csv": (b'text\n"a\n', "{} is not a readable table: unexpected end of data"),
    "twice.csv": (b"text,text\na,b\n", "{} has several columns 'text'; keep one of each"),
    "other.csv": (b"question,note\na,b\n", "{} has the columns 'question', 'note'; expected "),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_cannot_be_read_say_why(name, tmp_path):
    data, sentence = UNREADABLE[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=re.escape(sentence.format(path))):
        read_examples(path)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "folder").mkdir()
    for source, sentence in (
        (tmp_path / "none.jsonl", "none.jsonl does not exist; give a .jsonl, .json, .csv"),
        (tmp_path / "none" / "train", "train does not exist; give "),
        ("rows/train.jsonl", "rows/train.jsonl does not exist; give "),
        (tmp_path / "folder", "a folder without a saved dataset (it has no state.json)"),
        (f"{tmp_path / 'folder'}:train", "a folder without a saved dataset"),
    ):
        with pytest.raises(DataError, match=re.escape(sentence)):
            read_examples(source)
    with pytest.raises(DataError, match="not a list; rows in memory are read by "):
        read_examples([pair()])  # pyright: ignore[reportArgumentType]


def test_parquet_and_a_datasets_folder_equal_json_lines(tmp_path):
    from datasets import Dataset, DatasetDict, Features, List, Value

    pairs = [pair(id=f"p{i}", completion=f" {i}", group=f"g{i % 2}", note=i) for i in range(2500)]
    chats = [chat(f"hello {i}", "yes") for i in range(3)]
    chats[1]["messages"][0]["name"] = (
        "ann"  # the other rows get a null here, which is no name at all
    )
    mixed = [pair(), {"text": "only text"}, pair()]  # nulls in every row, and duplicates
    message = {"role": Value("string"), "content": Value("string"), "name": Value("string")}
    kinds = {
        "pairs": (pairs, None),
        "chats": (chats, Features({"messages": List(message)})),
        "mixed": (
            mixed,
            Features({key: Value("string") for key in ("prompt", "completion", "text")}),
        ),
    }
    for kind, (rows, features) in kinds.items():
        expected = read_examples(write_jsonl(tmp_path / f"{kind}.jsonl", rows))
        assert len(expected) == len(rows)
        assert expected.source == str((tmp_path / f"{kind}.jsonl").resolve())
        keys = list(features) if features else list(rows[0])
        full = [{key: row.get(key) for key in keys} for row in rows]
        if kind == "chats":
            full = [{"messages": [{"name": None, **m} for m in row["messages"]]} for row in full]
        dataset = Dataset.from_list(full, features=features)
        dataset.to_parquet(tmp_path / f"{kind}.parquet")
        dataset.save_to_disk(tmp_path / kind)
        for other in (read_examples(tmp_path / f"{kind}.parquet"), read_examples(tmp_path / kind)):
            assert other == expected
            assert other.digest == expected.digest
        DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / f"{kind}-splits")

    splits = tmp_path / "pairs-splits"
    with pytest.raises(DataError) as error:
        read_examples(splits)
    assert str(error.value) == (
        f"{splits} is a DatasetDict with the splits 'train', 'test'; give one of them, for "
        f"example {splits / 'train'}"
    )
    assert len(read_examples(splits / "train")) == 2500
    Dataset.from_list([{"question": "q"}]).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match=re.escape(f"has the columns 'question'; expected {FORMS}")):
        read_examples(tmp_path / "other.parquet")


def test_nulls_that_arrow_fills_into_arguments_stay_and_those_of_turns_are_no_keys(tmp_path):
    """Two rows whose messages hold different arguments: one struct, filled with nulls."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"days": 2}}}
    made = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "calls": [one]}]
        for one in (call, other)
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns} for turns in made]), path)
    for row, arguments in zip(
        read_examples(path),
        ({"city": "Rome", "days": None}, {"city": None, "days": 2}),
        strict=True,
    ):
        asked, answer = row.messages or ()
        assert asked == {"role": "user", "content": "a"}
        assert answer["calls"][0]["function"]["arguments"] == arguments


def test_objects_of_different_keys_that_datasets_keeps_as_json(tmp_path):
    """`load_dataset` of JSON lines whose turns differ makes a column of Arrow's type JSON."""
    calls = [{"function": {"name": "f", "arguments": one}} for one in ({"a": 1}, {"b": None})]
    made = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [one]}]}
        for one in calls
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    loaded = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert "Json" in str(loaded.features)
    loaded.save_to_disk(str(tmp_path / "saved"))
    loaded.to_parquet(tmp_path / "rows.parquet")
    expected = read_examples(path)
    assert read_examples(tmp_path / "saved") == expected == examples_from_rows(loaded)
    assert read_examples(tmp_path / "rows.parquet") == expected
    assert examples_from_rows(loaded.to_iterable_dataset()) == expected
    broken = pyarrow.array(['[{"role"', json.dumps(made[0]["messages"])]).cast(pyarrow.json_())
    parquet.write_table(pyarrow.table({"messages": broken}), tmp_path / "broken.parquet")
    with pytest.raises(DataError, match=r"1 of 2 rows .*\n  row 1: a column of JSON holds no JSON"):
        read_examples(tmp_path / "broken.parquet")


def test_a_transform_of_a_dataset_is_applied():
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    loud = Dataset.from_list(rows).with_transform(
        lambda batch: {key: [text.upper() for text in texts] for key, texts in batch.items()}
    )
    assert [row.completion for row in examples_from_rows(loud)] == ["B", "D"]


# ---- shards ------------------------------------------------------------------------------------


def shards(folder, names, rows=None):
    """Files of one row each, in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        row = (rows or {}).get(name, pair(id=f"r{number}", completion=f" {number}"))
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist([row]), folder / name)
        else:
            write_jsonl(folder / name, [row])
    return folder


SETS = [
    ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
    ["train-00000-of-00001-a09b74b3ef9c3b56.parquet"],
    [f"part-{i}.jsonl" for i in range(12)],
    ["0000.parquet", "0001.parquet"],
    ["part-00000-d0c1-c000.snappy.parquet", "part-00001-d0c1-c000.snappy.parquet"],
    ["rows.jsonl"],
]


@pytest.mark.parametrize("below", ["", "data"], ids=["here", "data"])
@pytest.mark.parametrize("names", SETS, ids=lambda names: names[0])
def test_shards_are_read_in_their_order(names, below, tmp_path):
    shards(tmp_path / below, names)
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("x")
    examples = read_examples(tmp_path)
    assert examples.ids == [f"r{i}" for i in range(len(names))]
    assert examples.source == str(tmp_path.resolve())


def test_splits_of_shards_are_named(tmp_path):
    names = ["test-00000-of-00001.parquet", *SETS[0]]
    shards(tmp_path / "data", names)
    with pytest.raises(DataError, match=re.escape("'test', 'train'; give one of them, for examp")):
        read_examples(tmp_path)
    examples = read_examples(f"{tmp_path}:train")
    assert examples.ids == ["r1", "r2"]
    assert examples.source == f"{tmp_path.resolve()}:train"
    assert read_again(examples.source) == examples
    assert place_of(examples.source) == tmp_path.resolve()
    with pytest.raises(DataError, match="shards of the names 'test', 'train'; give one of them"):
        read_examples(f"{tmp_path}:validation")


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (SETS[0][:1], "has 1 shards 'train', which say that there are 00002"),
        ([*SETS[0], "train-00000-of-00001.parquet"], "which say that there are "),
        (["part-0.jsonl", "part-1.parquet"], "'part-0.jsonl', 'part-1.parquet', files of several"),
    ],
)
def test_sets_of_shards_that_are_not_whole_are_refused(names, sentence, tmp_path):
    shards(tmp_path, names)
    with pytest.raises(DataError, match=re.escape(sentence)):
        read_examples(tmp_path)


def test_rows_of_shards_are_numbered_by_file(tmp_path):
    first = {"part-0.jsonl": pair(id="a"), "part-1.jsonl": pair(id="a", completion=" x")}
    shards(tmp_path, list(first), first)
    with pytest.raises(DataError) as error:
        read_examples(tmp_path)
    assert (
        str(error.value)
        .splitlines()[1]
        .startswith("  row part-1.jsonl:1 (id 'a'): its id is already that of row part-0.jsonl:1;")
    )


# ---- the hub -----------------------------------------------------------------------------------

COMMIT = "7b6d24c440a36b6815f21b70d25016731768db1f"


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A hub with one data set, in place of `datasets.load_dataset`, and its calls."""
    import datasets

    calls = []
    made = datasets.Dataset.from_list([pair(id="a"), pair(id="b", completion=" x")])
    # as `datasets` caches what it loads
    cache = tmp_path_factory.mktemp("cache") / "org___name" / "default" / "0.0.0" / COMMIT
    made.save_to_disk(cache)
    loaded = datasets.Dataset.load_from_disk(cache)
    state = SimpleNamespace(calls=calls, splits={"train": loaded, "test": loaded}, loaded=loaded)

    def load_dataset(path, name=None, *, split=None, revision=None):
        calls.append((path, name, split, revision))
        return datasets.DatasetDict(state.splits) if split is None else state.loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


@pytest.mark.parametrize(
    ("source", "call", "resolved"),
    [
        ("org/name:train", ("org/name", None, "train", None), f"org/name@{COMMIT}:train"),
        ("org/name@v1:train", ("org/name", None, "train", "v1"), f"org/name@{COMMIT}:train"),
        (
            "org/name@refs/pr/1:small:test",
            ("org/name", "small", "test", "refs/pr/1"),
            f"org/name@{COMMIT}:small:test",
        ),
        (
            "org/name:train[:10]",
            ("org/name", None, "train[:10]", None),
            f"org/name@{COMMIT}:train[:10]",
        ),
    ],
)
def test_data_sets_of_the_hub_with_their_commit(source, call, resolved, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = read_examples(source)
    assert hub.calls == [call]
    assert (examples.ids, examples.source) == (["a", "b"], resolved)
    assert read_again(resolved) == examples
    assert hub.calls[1][3] == COMMIT
    (tmp_path / "org").mkdir()  # no reason not to find a run's rows
    assert place_of(resolved) is None
    assert read_again(resolved) == examples


def test_a_data_set_of_one_split_needs_none(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="org/name has the splits 'train', 'test'; give one of"):
        read_examples("org/name")
    del hub.splits["test"]
    assert read_examples("org/name").source == f"org/name@{COMMIT}:train"
    loaded = hub.loaded.to_list()  # from where no commit is known
    hub.splits["train"] = Dataset.from_list(loaded)
    assert read_examples("org/name@v1").source == "org/name@v1:train"
    assert read_examples("org/name").source == "org/name:train"


def test_what_the_hub_refuses_is_an_error_with_its_cause(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    cause = ConnectionError("no network")
    monkeypatch.setattr(datasets, "load_dataset", failing(cause))
    with pytest.raises(DataError, match="org/name is no file or folder here, and could not be re"):
        read_examples("org/name")
    with pytest.raises(DataError) as error:
        read_examples("org/name:train")
    assert error.value.__cause__ is cause
    monkeypatch.setattr(datasets, "load_dataset", failing(AssertionError("asked the hub")))
    (tmp_path / "rows").mkdir()
    for slip in (
        "rows/train",
        "rows/train.jsonl",
        "other/train.csv.gz",
        "./org/name",
        "a/b/c",
        "o/n.arrow",
    ):
        with pytest.raises(DataError, match=re.escape(f"{slip} does not exist; give ")):
            read_examples(slip)


# ---- columns, and what is read again -------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "folder"])
def test_columns_of_other_names_in_every_kind_of_file(name, tmp_path):
    from datasets import Dataset

    made = [{"key": "a", "asked": "p", "said": " c", "prompt": "not this"}]
    path = tmp_path / name
    if name == "rows.jsonl":
        write_jsonl(path, made)
    elif name == "rows.csv":
        path.write_text("key,asked,said,prompt\na,p, c,not this\n")
    elif name == "rows.parquet":
        Dataset.from_list(made).to_parquet(path)
    else:
        Dataset.from_list(made).save_to_disk(path)
    columns = {"id": "key", "prompt": "asked", "completion": "said"}
    examples = read_examples(path, columns=columns)
    assert examples == examples_from_rows([pair("p", " c", id="a")])
    assert examples.columns == columns
    with pytest.raises(
        DataError,
        match=r"--columns completion=answer was given, and the rows of .* have the columns 'key', "
        "'asked', 'said', 'prompt'; name one of these",
    ):
        read_examples(path, columns={"prompt": "asked", "completion": "answer"})


def test_rows_are_read_again_as_they_were_read_without_a_word(tmp_path, capfd):
    """A row that is ambiguous now was read by its own keys before there were forms."""
    row = {"text": "t", "instruction": "i", "output": "o", "images": ["x"], "weight": 2}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match="holds 'images'"):
        read_examples(path)
    assert read_again(str(path)).digest == examples_from_rows([{"text": "t"}]).digest
    form = write_jsonl(tmp_path / "form.jsonl", [{"question": "q", "answer": "a"}])
    first = read_examples(form)
    assert "note: 1 row of" in capfd.readouterr().err
    assert read_again(str(form)) == first
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_long_file_is_not_held_twice(tmp_path):
    """The peak while reading is near what the examples themselves take."""
    import tracemalloc

    rows = [pair(f"question {i} " * 20, f" answer {i}" * 20, id=str(i)) for i in range(20_000)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    del rows
    for name in (path, tmp_path / "rows.parquet"):
        tracemalloc.start()
        examples = read_examples(name)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(examples) == 20_000
        assert peak < 1.5 * held


def test_the_front_door():
    assert influence.read_examples is read_examples
