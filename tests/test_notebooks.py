"""The notebooks: run from beginning to end on the demo's world, and what is stored is a clean,
complete run of them.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from analysis.demo.world import World
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


# ---- run -----------------------------------------------------------------------------------------


def surroundings(worlds: Path, testbed: Path | None = None) -> dict[str, str]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("LORA_INFLUENCE_")
    }
    environment |= {
        "LORA_INFLUENCE_WORLDS": str(worlds),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return (
        environment if testbed is None else environment | {"LORA_INFLUENCE_TESTBED": str(testbed)}
    )


@contextmanager
def runs(
    paths: list[Path], demo: World, folder: Path, testbed: Path | None = None
) -> Iterator[Callable[[Path], Any]]:
    """Runs of notebooks, each on a copy of the demo's world: those of `paths` at once, two by two.

    One that is not among `paths` runs when it is asked for.
    """

    def run(path: Path) -> Any:
        worlds = folder / path.stem
        shutil.copytree(demo.folder, worlds / "demo")
        try:
            return execute(path, environment=surroundings(worlds, testbed), timeout=1200)
        finally:
            shutil.rmtree(worlds)

    with ThreadPoolExecutor(2) as pool:
        # the later, the longer: those begin first
        started = {path: pool.submit(run, path) for path in reversed(paths)}
        yield lambda path: started[path].result() if path in started else run(path)


def asked_for(session: pytest.Session, test: str) -> list[Path]:
    """Notebooks that a test of this session will run: of one process, as a file's tests are."""
    items = [item for item in session.items if getattr(item, "originalname", "") == test]
    return [item.callspec.params["path"] for item in items]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="module")
def run_in_demo(request, demo_world, tmp_path_factory):
    paths = asked_for(request.session, "test_every_claim_holds_in_the_demo")
    with runs(paths, demo_world, tmp_path_factory.mktemp("worlds")) as run:
        yield run


@pytest.fixture(scope="module")
def run_on_both(request, demo_world, testbed, tmp_path_factory):
    paths = asked_for(request.session, "test_every_claim_holds_on_the_testbed_too")
    with runs(paths, demo_world, tmp_path_factory.mktemp("worlds"), testbed) as run:
        yield run


def check_run(path: Path, run: Callable[[Path], Any]) -> None:
    before = path.read_bytes()
    notebook = run(path)
    assert images(notebook) >= 1
    assert path.read_bytes() == before, "a test never changes a notebook"
    stored = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    assert [cell.source for cell in notebook.cells] == stored


@pytest.mark.slow  # a demo and six studies take three minutes of one core (2026-11-28)
@pytest.mark.skipif(
    bool(os.environ.get("LORA_INFLUENCE_TESTBED")), reason="run on both worlds below"
)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_every_claim_holds_in_the_demo(path, run_in_demo):
    check_run(path, run_in_demo)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_every_claim_holds_on_the_testbed_too(path, run_on_both):
    check_run(path, run_on_both)


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


# ---- what is stored ------------------------------------------------------------------------------


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
