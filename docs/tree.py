"""Write docs/tree.md: every folder and module of the packages, with its docstring's first line.

python docs/tree.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("influence", "unlearn", "analysis")
HEADER = """# The tree, module by module

Imports go one way, `influence` <- `unlearn` <- `analysis`; inside `unlearn`, edits, methods and
difficulty import nothing of one another. Each phrase is the first line of the module's docstring;
`python docs/tree.py` writes this page. What to change for what is in
[CONTRIBUTING](../CONTRIBUTING.md).
"""


def first_line(path: Path) -> str:
    """The first line of a module's docstring, ready for a table."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n", 1)[0].replace("|", "\\|")


def folder_section(folder: Path) -> str:
    """A heading, what the folder is, and its modules."""
    title = str(folder.relative_to(ROOT))
    modules = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("__")]
    rows = [f"| `{path.name}` | {first_line(path)} |" for path in modules]
    about = first_line(folder / "__init__.py")
    return "\n".join([f"## {title}/", "", about, "", "| module | |", "|---|---|", *rows, ""])


def page() -> str:
    """The whole page."""
    folders = [path.parent for name in PACKAGES for path in (ROOT / name).rglob("__init__.py")]
    order = {name: number for number, name in enumerate(PACKAGES)}
    folders.sort(key=lambda folder: (order[folder.relative_to(ROOT).parts[0]], folder))
    return "\n".join([HEADER, *map(folder_section, folders)])


if __name__ == "__main__":
    (ROOT / "docs" / "tree.md").write_text(page(), encoding="utf-8")
