"""The notebooks: run from beginning to end on the demo's world, and what is stored is a clean, complete run of them."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError

from analysis.demo.world import demo_world
from analysis.studies import pictures
from notebooks.execute import cleaned, execute

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
#: Folders that only one machine has.
ABSOLUTE = re.compile(
    r"(?<![\w.:/])/(home|root|work|tmp|Users|usr|opt|mnt|var|srv|data|workspace)/|\b[A-Z]:\\",
    re.IGNORECASE,
)
LONGEST = 6


def name(path: Path) -> str:
    return path.name


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def source(cell) -> ast.Module:
    return ast.parse(
        "\n".join("" if line.startswith(("%", "!")) else line for line in cell.source.splitlines())
    )


def images(notebook) -> int:
    return sum(
        "image/png" in output.get("data", {}) for cell in code(notebook) for output in cell.outputs
    )


# ---- run -----------------------------------------------------------------------------------------------------


def surroundings(worlds: Path, testbed: Path | None = None) -> dict[str, str]:
    found = {
        key: value for key, value in os.environ.items() if not key.startswith("LORA_INFLUENCE_")
    }
    found |= {"LORA_INFLUENCE_WORLDS": str(worlds), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return found if testbed is None else found | {"LORA_INFLUENCE_TESTBED": str(testbed)}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> list[Path]:
    """The demo's world, made once, and a copy: a run directory has one writer at a time, and two notebooks run at once."""
    folders = [tmp_path_factory.mktemp("worlds") for _ in range(2)]
    demo_world(folders[0] / "demo").run()
    shutil.copytree(folders[0] / "demo", folders[1] / "demo")
    return folders


@contextmanager
def runs(worlds: list[Path], testbed: Path | None = None) -> Iterator[Mapping[Path, Future]]:
    """Every notebook's run, two at a time, the same ones that the tests wait for."""
    free: Queue[Path] = Queue()
    for folder in worlds:
        free.put(folder)

    def run(path: Path) -> Any:
        folder = free.get()
        try:
            return execute(path, environment=surroundings(folder, testbed), timeout=1200)
        finally:
            free.put(folder)

    with ThreadPoolExecutor(len(worlds)) as pool:
        yield {
            path: pool.submit(run, path) for path in reversed(NOTEBOOKS)
        }  # the longest one is the last


@pytest.fixture(scope="module")
def executed(worlds):
    with runs(worlds) as found:
        yield found


@pytest.fixture(scope="module")
def executed_on_both(worlds, testbed):
    with runs(worlds, testbed) as found:
        yield found


def check_run(path: Path, run: Callable[[], Any]) -> None:
    before = path.read_bytes()
    notebook = run()
    assert images(notebook) >= 1
    assert path.read_bytes() == before, "a test never changes a notebook"
    stored = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    assert [cell.source for cell in notebook.cells] == stored


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_every_claim_holds_in_the_demo(path, executed):
    check_run(path, executed[path].result)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_every_claim_holds_on_the_testbed_too(path, executed_on_both):
    check_run(path, executed_on_both[path].result)


def test_a_claim_that_fails_fails_the_run_and_outputs_are_cleaned(tmp_path):
    cells = [
        nbformat.v4.new_code_cell(
            "import sys\nprint('a')\nprint('noise', file=sys.stderr)\nprint('b')\n3"
        )
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "good.ipynb")
    found = execute(tmp_path / "good.ipynb")
    assert [output.get("text") or output["data"] for output in found.cells[0].outputs] == [
        "a\nb\n",
        {"text/plain": "3"},
    ]
    assert found.cells[0].metadata == {}
    assert found == cleaned(found)
    cells.append(nbformat.v4.new_code_cell("assert 1 > 2, 'one is less'"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "bad.ipynb")
    with pytest.raises(CellExecutionError, match="one is less"):
        execute(tmp_path / "bad.ipynb")


# ---- what is stored ------------------------------------------------------------------------------------------


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_outputs_are_kept_of_one_run_from_beginning_to_end(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(
        range(1, len(code(notebook)) + 1)
    )
    kinds = {output.output_type for cell in code(notebook) for output in cell.outputs}
    assert kinds <= {"stream", "execute_result", "display_data"}, "an error is no result"
    assert images(notebook) >= 1
    assert notebook == cleaned(nbformat.read(path, as_version=4)), (
        "run `python notebooks/execute.py`"
    )
    shown = {
        kind
        for cell in code(notebook)
        for output in cell.outputs
        for kind in output.get("data", {})
    }
    assert shown <= {"image/png", "text/plain"}, (
        "rows are somebody else's text: no HTML of theirs is stored"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_it_asserts_what_it_claims_and_holds_no_long_function(path):
    nodes = [
        node for cell in code(nbformat.read(path, as_version=4)) for node in ast.walk(source(cell))
    ]
    assert any(isinstance(node, ast.Assert) for node in nodes)
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > LONGEST]
    assert long == [], "what is worth a function lives in a package"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_nothing_of_one_machine_is_stored(path):
    notebook = nbformat.read(path, as_version=4)
    texts = [cell.source for cell in notebook.cells]
    texts += [
        str(output.get("text", output.get("data", {}).get("text/plain", "")))
        for cell in code(notebook)
        for output in cell.outputs
    ]
    assert [match[0] for text in texts for match in ABSOLUTE.finditer(text)] == []
    assert [text for text in texts if str(ROOT) in text or str(Path.home()) + os.sep in text] == []
    assert len(path.read_bytes()) < 1_500_000


# ---- pictures ------------------------------------------------------------------------------------------------


def test_text_of_rows_is_drawn_as_it_is():
    tokens = ["$\\frac{", "</script>", "\x1b[2J", "\n", "$"]
    figure = pictures.tokens_plot(
        {"$\\oops$ \x07": (tokens, np.array([1.0, -2, 0, 0.5, 3]))}, "title"
    )
    figure.savefig(io.BytesIO())
    letters = {text.get_text() for text in figure.axes[0].texts}
    assert {"$", "\u21b5", "\u00b7"} <= letters
    assert not any("\x1b" in letter for letter in letters)
