"""Execute notebooks and keep their outputs clean: `python notebooks/execute.py [NAME.ipynb ...]`, in place.

The kernel starts in notebooks/ and finds its worlds by the environment (`analysis.demo.world`). What is kept is what a reader wants
to see again: standard output, pictures, tables. Left out: standard error, times, and what a machine calls its folders and
versions, so that the same code and numbers give the same file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(
    path: Path, *, environment: Mapping[str, str] | None = None, timeout: int = 600
) -> NotebookNode:
    """Run every cell of a notebook in a fresh kernel and return it with clean outputs; nothing is written.

    `environment` replaces this process's. Raises `nbclient.exceptions.CellExecutionError` where a cell fails, with its traceback.
    """
    notebook = nbformat.read(Path(path), as_version=4)
    resources = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=timeout, record_timing=False, resources=resources
    )
    client.execute(env=dict(os.environ if environment is None else environment))
    return cleaned(notebook)


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The notebook without standard error, times and versions; cells are named by their place."""
    notebook.metadata = NotebookNode(
        kernelspec=NotebookNode(KERNEL), language_info=NotebookNode(name="python")
    )
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs)
    return notebook


def kept(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Standard output in one piece; of a picture the PNG alone, of anything else its plain text."""
    found: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stdout":
            if found and found[-1].output_type == "stream":
                found[-1].text += output.text
            else:
                found.append(output)
        elif "data" in output:
            kind = "image/png" if "image/png" in output.data else "text/plain"
            found.append(
                NotebookNode(
                    output, data=NotebookNode({kind: output.data[kind]}), metadata=NotebookNode()
                )
            )
    return found


def main() -> None:
    """Execute the notebooks that are named, or all, and write them back."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of this folder")
    for path in parser.parse_args().notebooks or sorted(HERE.glob("*.ipynb")):
        nbformat.write(execute(path), path)
        print(path)


if __name__ == "__main__":
    main()
