"""What holds across the packages: which way imports go, docstrings, nothing that runs what it reads."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["influence", "unlearn", "analysis"]  # each may import itself and those before it
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(tree: ast.Module) -> set[str]:
    """Every module a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which way they go"
            found.add(node.module or "")
    return found


def test_there_is_something_to_look_at():
    assert len(FILES) > 20
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    later = {*PACKAGES[PACKAGES.index(package) + 1 :], "notebooks", "benchmarks", "tests"}
    assert {module for module in imported(parse(path)) if module.split(".")[0] in later} == set()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_public_name_has_a_docstring(path):
    tree = parse(path)
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the module"]

    def look(body, prefix: str, inside_class: bool) -> None:
        for node in body:
            if not isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            ) or node.name.startswith("_"):
                continue
            repeated = {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}
            inherited = inside_class and any(
                d.endswith(("overload", "override", ".setter")) for d in repeated
            )
            if not ast.get_docstring(node) and not inherited and "overload" not in repeated:
                missing.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{prefix}{node.name}.", True)

    look(tree.body, "", False)
    assert missing == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_read_is_ever_run(path):
    tree = parse(path)
    modules = {module.split(".")[0] for module in imported(tree)}
    assert (
        modules & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
        == set()
    )
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [ast.unparse(node.func) for node in nodes]
    assert [
        call for call in calls if call in ("eval", "exec", "compile", "__import__", "os.system")
    ] == []
    loads = [ast.unparse(node) for node in nodes if ast.unparse(node.func) == "torch.load"]
    assert [
        call for call in loads if "weights_only=True" not in call
    ] == []  # which unpickles nothing but tensors
    words = [
        keyword
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
    ]
    risky = [k.arg for k in words if isinstance(k.value, ast.Constant) and k.value.value is True]
    assert {"allow_pickle", "shell", "trust_remote_code"} & set(risky) == set()


def test_the_readme_names_every_folder():
    """In its tree, by the folder's own name with a slash, each with a phrase."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## The tree")[1].split("```")[1]
    told = dict(re.findall(r"^ *([\w-]+)/ +(\S.*)$", tree, re.MULTILINE))
    others = ["docs", "notebooks", "benchmarks", "tests"]
    expected = [path.parent.name for path in FILES if path.name == "__init__.py"] + others
    assert set(told) == set(expected)


def test_the_page_of_the_tree_names_every_module():
    """Below the heading of its folder, with a phrase; `python docs/tree.py` writes the page."""
    text = (ROOT / "docs" / "tree.md").read_text(encoding="utf-8")
    told = {
        f"{folder}/{module}"
        for folder, rows in re.findall(
            r"^## (\S+)/\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL
        )
        for module in re.findall(r"^\| `(\w+\.py)` \| \S.* \|$", rows, re.MULTILINE)
    }
    assert told == {name(path) for path in FILES if not path.name.startswith("__")}


def test_pyproject_lists_every_package():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in FILES
        if path.name == "__init__.py"
    }
    assert set(settings["tool"]["setuptools"]["packages"]) == found
    assert {".".join(path.parent.relative_to(ROOT).parts) for path in FILES} == found
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").exists()
    for script, target in settings["project"]["scripts"].items():
        module = ROOT.joinpath(*target.split(":")[0].split(".")).with_suffix(".py")
        assert module.exists(), f"{script} starts {target}, which is not there"
