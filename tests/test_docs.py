"""README and docs/: every command and every Python block is executed, in order, on a tiny world.

A page's fenced blocks without a language or with `bash` are commands, with `python` Python; `text`
blocks are trees. The commands of the three packages run in this process, everything else in a
shell. A page runs in a folder of its own that holds `demo/` as `make demo` leaves it, only smaller,
and, but for README, which makes it, `run`. A page that speaks of `trainer` has one, trained on
`demo/`, that left `out/`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from influence.errors import ToolkitError

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "LOG.md", "CHANGELOG.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "notebooks")),
]
PACKAGES = ("influence", "unlearn", "analysis")

#: Commands that are not executed, by how they begin, and why.
SKIPPED = {
    "make demo": "trains a base model for minutes; tests/analysis/demo runs it smaller",
    "make test": "this is it",
    ". .venv/bin/activate": "the tests run in that environment",
    "analysis serve": "answers until it is interrupted; tests/analysis/serving",
    "python benchmarks/": "takes hours and a world with retrained adapters; tests/benchmarks",
}
#: Words of a command that are replaced here, so that it takes seconds.
REDUCED = {
    "--subsets 40": "--subsets 8",  # adapters to train; 8 is the least that tune takes
    "--calibrate 40": "--calibrate 20 --lr 1e-3",  # rows, 20 is the least; shorter ascents
    "--per-kind 4": "--per-kind 2 --references 1 --optimizer sgd",  # rows, adapters, steps
    "--out adapter-p": "--out adapter-p --until steps=3",  # of 200
    "analysis tune --run run": "analysis tune --run run --damping mean:0.1",  # of four dampings
    "analysis removal": "analysis removal --share 0.05 --draws 1",  # of 13 trainings
    "analysis memorization": "analysis memorization --resamples 50",  # of 1,000 resamples
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its lines, and the number of the first."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    language, first, lines = None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, first, lines = line[3:].strip(), number + 1, []
        else:
            yield Block(page, first, language, "\n".join(lines) + "\n")
            language = None
    assert language is None, f"{page}: the block of line {first} has no end"


def commands(text: str) -> Iterator[str]:
    """The commands of a block, with continued lines and here-documents in one piece."""
    waiting, end = "", None
    for line in text.splitlines():
        waiting += line + "\n"
        if end is not None:
            if line != end:
                continue
        elif here := re.search(r"<<'(\w+)'", line):
            end = here[1]
            continue
        elif line.endswith("\\"):
            continue
        if waiting.strip() and not waiting.lstrip().startswith("#"):
            yield waiting.strip().replace("\\\n", " ")
        waiting, end = "", None
    assert not waiting.strip(), f"unfinished command: {waiting}"


def reduced(command: str) -> str:
    """The command as it runs here."""
    plain = " ".join(shlex.split(command, comments=True))
    for words, fewer in REDUCED.items():
        if words in plain:
            return plain.replace(words, fewer)
    return command


@dataclass
class Reader:
    """A person who follows a page from top to bottom."""

    run_main: Any
    namespace: dict[str, Any]

    def follow(self, block: Block) -> None:
        """Execute a block, whatever it is."""
        if block.language in ("", "bash"):
            for command in commands(block.text):
                self.type(command, block.place)
        elif block.language == "python":
            self.run_python(block)
        else:
            assert block.language == "text", f"{block.place}: nothing runs {block.language!r}"

    def type(self, command: str, place: str) -> None:
        """Execute a command; it must succeed."""
        if any(command.startswith(start) for start in SKIPPED):
            return
        words = shlex.split(reduced(command), comments=True)
        if words[0] == "torchrun":
            words = self.launched(words[1:])
        if words[0] in PACKAGES:
            main = importlib.import_module(f"{words[0]}.cli").main
            done = self.run_main(main, *words)
            assert done.status == 0, f"{place}: {command}\n{done.err}\n{done.out}"
        else:
            assert words[0] in ("printf", "cat", "grep", "head"), (
                f"{place}: nothing runs {command!r}"
            )
            subprocess.run(["bash", "-ec", command], check=True)

    @staticmethod
    def launched(arguments: list[str]) -> list[str]:
        """The command that torchrun starts in every process, by torchrun's own parser."""
        from torch.distributed.run import parse_args

        call = parse_args(arguments)
        assert call.module
        return [call.training_script, *call.training_script_args]

    def run_python(self, block: Block) -> None:
        """Execute a Python block; one that begins with `# name.py` is that file too."""
        if "(trainer)" in block.text:
            self.namespace.setdefault("trainer", trained())
        if file := re.match(r"# (\w+\.py)\n", block.text):
            Path(file[1]).write_text(block.text, encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), self.namespace)


def trained() -> Any:
    """A trainer of transformers that trained an adapter on the demo's rows, and left `out/`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    import influence
    from influence.tokens import tokenize

    def collate(items: list[Any]) -> dict[str, torch.Tensor]:
        padded = torch.nn.utils.rnn.pad_sequence
        ids, labels = ([torch.tensor(item[key]) for item in items] for key in ("ids", "labels"))
        return {
            "input_ids": padded(ids, batch_first=True),
            "labels": padded(labels, batch_first=True, padding_value=-100),
            "attention_mask": padded([torch.ones_like(row) for row in ids], batch_first=True),
        }

    tokenizer = AutoTokenizer.from_pretrained("demo/base")
    rows = tokenize(influence.read_examples("demo/train.jsonl"), tokenizer)
    labels = [np.where(row.supervised, row.input_ids, -100) for row in rows]
    data = [
        {"ids": row.input_ids.tolist(), "labels": label.tolist()}
        for row, label in zip(rows, labels, strict=True)
    ]
    options: dict[str, Any] = {
        "num_train_epochs": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "epoch",
        "remove_unused_columns": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        base = AutoModelForCausalLM.from_pretrained("demo/base")
        trainer = Trainer(
            get_peft_model(base, lora),
            TrainingArguments("out", **options),
            collate,
            data,  # pyright: ignore[reportArgumentType]
            processing_class=tokenizer,
        )
        trainer.train()
    return trainer


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two people of the demo and its odd rows, a model of one layer, a run, eight adapters."""
    import influence
    import unlearn
    from analysis.demo.corpus import make_corpus
    from analysis.demo.training import train_adapter, train_base

    folder = tmp_path_factory.mktemp("docs")
    demo, corpus = folder / "demo", make_corpus(0)
    demo.mkdir()
    train = [row for row in corpus.train if row["id"].startswith(("p07", "p08", "odd"))]
    write_lines(demo / "train.jsonl", train)
    write_lines(
        demo / "queries.jsonl", [q for q in corpus.queries if q["id"].startswith(("p07", "p08"))]
    )
    write_lines(demo / "heldout.jsonl", list(corpus.heldout[:8]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_base(
            corpus.base_texts[:300],
            demo / "base",
            width=32,
            layers=1,
            vocabulary=400,
            epochs=6,
            lr=8e-3,
        )
        train_adapter(demo / "base", train, demo / "adapter", rank=4, epochs=20, lr=2e-2)
        model = influence.load(str(demo / "base"), str(demo / "adapter"), device="cpu")
        rows = influence.read_examples(demo / "train.jsonl")
        run = influence.fit(model, rows, directory=folder / "run")
        queries = influence.read_examples(demo / "queries.jsonl")
        run.score(queries, out=run.directory / "scores.h5")
        unlearn.retrain_subsets(
            run,
            unlearn.random_halves(len(rows), 8),
            queries,
            out=folder / "truth.npz",
            recipe=unlearn.Recipe(epochs=4),
        )
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of the world, as the working directory."""
    folder = tmp_path / "here"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    for name in ("TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "false" if name.startswith("TOK") else "1"))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_a_page_can_be_followed_from_top_to_bottom(page, here, run_main):
    if page.name == "README.md":
        shutil.rmtree(here / "run")
        (here / "truth.npz").unlink()
    if page.name == "faithfulness.md":
        (here / "truth.npz").unlink()
    reader = Reader(run_main, {"__name__": "page"})
    for block in blocks(page):
        reader.follow(block)


# ---- the reader itself


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("bash", "influence score --run nowhere --queries demo/queries.jsonl\n"),
        ("bash", "influence fit --no-such-option\n"),
        ("bash", "python analysis.py\n"),
        ("bash", "torchrun --nproc-per-node 2 -m unlearn train --run run --method ga\n"),
        ("python", "import influence\n\ninfluence.Run.open('nowhere')\n"),
        ("console", "$ influence fit\n"),
    ],
)
def test_a_block_that_does_not_work_fails(language, text, here, run_main):
    reader = Reader(run_main, {})
    with pytest.raises((AssertionError, SystemExit, ToolkitError)):
        reader.follow(Block(ROOT / "README.md", 1, language, text))


def test_what_is_not_run_is_on_a_page():
    typed = [
        command
        for page in PAGES
        for block in blocks(page)
        if block.language in ("", "bash")
        for command in commands(block.text)
    ]
    assert [s for s in SKIPPED if not any(command.startswith(s) for command in typed)] == []
    plain = [" ".join(shlex.split(command, comments=True)) for command in typed]
    assert [words for words in REDUCED if not any(words in command for command in plain)] == []


# ---- keys of files


def section(page: Path, heading: str) -> str:
    """A heading's text, down to the next heading that is not below it."""
    level = heading.split(" ")[0]
    text = page.read_text(encoding="utf-8").split(f"\n{heading}\n")[1]
    return re.split(rf"^#{{1,{len(level)}}} ", text, flags=re.MULTILINE)[0]


def names_in(text: str) -> set[str]:
    """What stands in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


def first_cells(text: str) -> set[str]:
    """Names in the first cells of tables.

    `a.b` and then `.c` are a.b and a.c; below the head "key of `x`" all are keys of x.
    """
    keys: set[str] = set()
    inside = parent = ""
    for line in text.splitlines():
        cell = line.split(" | ")[0].strip("| ")
        if head := re.fullmatch(r"(?:key|column|data set)(?: of `(.+)`)?", cell):
            inside = f"{head[1]}." if head[1] else ""
        for token in re.findall(r"`([^`]+)`", cell) if line.startswith("| `") else ():
            if token.startswith("."):
                token = parent + token
            parent = token.rpartition(".")[0]
            keys.add(inside + token)
    return keys


def leaves(value: Any, prefix: str = "", opaque: frozenset[str] = frozenset()) -> set[str]:
    """The keys of a JSON value down to what is no object: `losses.edited.before`, `rows[].id`."""
    if prefix not in opaque and isinstance(value, dict):
        parts = [(f"{prefix}.{key}".lstrip("."), part) for key, part in value.items()]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        parts = [(f"{prefix}[]", part) for part in value]
    else:
        return {prefix}
    return set().union(*(leaves(part, name, opaque) for name, part in parts))


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """The world with every kind of file in it, each made in as few steps as possible."""
    folder = tmp_path_factory.mktemp("files") / "made"
    shutil.copytree(world, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_every_file()
    return folder


def make_every_file() -> None:
    import influence
    import unlearn
    from unlearn import difficulty

    run = influence.Run.open("run")
    unseen, queries = (
        influence.read_examples(f"demo/{name}.jsonl") for name in ("heldout", "queries")
    )
    changes = {"p07-pet-a": " A grey parrot."}
    edit = unlearn.relabel(run, changes, holdout=unseen, until="steps=1", max_damage=9.0)
    edit.save("edited")
    unlearn.train(run, "ga-gd", ids=["p08-pet-a"], until="steps=1", holdout=unseen).save("trained")
    unlearn.retrain(run, ["p08-pet-a"], out="retrained", recipe=unlearn.Recipe(epochs=1))
    run.score(queries[:1], out="scores.h5", per_token=True, per_module=True)
    run.self_influence(out="scores.h5")
    difficulty.predict(run, ids=["p07-book-a"]).with_measured(np.ones(1), np.ones(1)).write(
        "difficulty.csv"
    )


def test_every_key_is_documented(made):
    """Both ways: no key is missing on the page, and none there is out of date."""
    page = ROOT / "docs" / "files.md"
    opaque = frozenset(
        {"versions", "files", "method.retain", "method.cost_per_step", "expected.recipe"}
    )
    records = [
        json.loads((made / name / "edit.json").read_text()) for name in ("edited", "trained")
    ]
    assert records[0]["losses"]["heldout"] is not None
    keys = set().union(*(leaves(record, opaque=opaque) for record in records))
    keys -= {"steps", "expected"}  # null in the second record, and an object in the first
    assert first_cells(section(page, "### `edit.json`")) - {"method.*", "steps[]"} == keys

    manifest = json.loads((made / "run" / "manifest.json").read_text())
    assert first_cells(section(page, "### `manifest.json`")) == {
        *manifest,
        *("tuned", "loading", "compute", "precision", "features_stored", "row_bytes"),
        *("growable", "grown"),
    }
    line = json.loads((made / "run" / "audit.jsonl").read_text().splitlines()[0])
    assert first_cells(section(page, "### `audit.jsonl`")) == set(line)
    step = json.loads((made / "trained" / "steps.jsonl").read_text().splitlines()[0])
    assert names_in(section(page, "### `steps.jsonl`")) == set(step)
    retrained = json.loads((made / "retrained" / "retrain.json").read_text())
    assert set(retrained) | {"edit"} <= names_in(section(page, "### `retrain.json`"))
    with np.load(made / "truth.npz") as truth:
        assert set(truth) <= names_in(section(page, "### `truth.npz`"))


def test_every_part_of_a_score_file_is_documented(made):
    text = section(ROOT / "docs" / "files.md", "## The score file")
    with h5py.File(made / "scores.h5") as file:
        assert {f"/{name}" for name in file} == first_cells(text)
        assert set(file.attrs) - names_in(text) == set()


def test_every_column_of_the_difficulty_table_is_documented(made):
    text = section(ROOT / "docs" / "difficulty.md", "## The table")
    head = (made / "difficulty.csv").read_text(encoding="utf-8").splitlines()[0]
    assert first_cells(text) == set(head.split(","))


# ---- the pages as texts


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    wrong = []
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    folders = "influence|unlearn|analysis|tests|docs|benchmarks|notebooks"
    named = re.findall(rf"`((?:{folders})/[\w./]*)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_names_of_the_table_of_changes_exist():
    """The functions and classes that CONTRIBUTING says to write or look at."""
    rows = section(ROOT / "CONTRIBUTING.md", "## To change X: this room, this test").splitlines()
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in (*PACKAGES, "tests")
        for path in (ROOT / folder).rglob("*.py")
    )
    named = {name for row in rows for text in names_in(row) for name in re.findall(r"\w{3,}", text)}
    paths = {part for path in ROOT.rglob("*.py") for part in path.relative_to(ROOT).parts}
    known = set(re.findall(r"\w+", source)) | {part.split(".")[0] for part in paths}
    assert named - known - {"json", "docs", "edit"} == set()


def test_the_readme_is_short_and_has_one_picture():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(re.findall(r"!\[.+?\]\(", text)) == 1


def test_entries_of_the_log_are_short_and_newest_first():
    entries = (ROOT / "LOG.md").read_text(encoding="utf-8").split("\n## ")[1:]
    dates = [entry[:10] for entry in entries]
    assert dates == sorted(dates, reverse=True)
    for entry in entries:
        lines = [line for line in entry.splitlines() if line]
        assert len(lines) <= 12, lines[0]
        for word in ("*Expected*:", "*Came out*:", "*Decided*:"):
            assert any(line.startswith(word) for line in lines), f"{lines[0]}: {word}"
