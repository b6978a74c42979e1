"""What holds across the packages: which way imports go, docstrings, nothing that runs what it reads."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["influence", "unlearn", "analysis"]  # each may import itself and those before it
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module", params=FILES, ids=name)
def path(request) -> Path:
    """A file of the packages. All tests of one follow one another, and it is parsed once for them."""
    return request.param


@functools.lru_cache(maxsize=1)
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


def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    later = {*PACKAGES[PACKAGES.index(package) + 1 :], "notebooks", "benchmarks", "tests"}
    assert {module for module in imported(parse(path)) if module.split(".")[0] in later} == set()


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


# ---- walls ---------------------------------------------------------------------------------------

#: Rooms of `unlearn` that import nothing of one another.
APART = ("unlearn.edits", "unlearn.methods", "unlearn.difficulty")
#: Names of concrete curvatures, specified and fitted, as code and as text.
CONCRETE = {"EKFAC", "KFAC", "Fisher", "GGN", "Hessian", "Identity", "Kronecker", "Moments"}
CONCRETE |= {"SampleSpaceFisher", "UpdatedFisher", "GGNOperator", "HessianOperator"}
CONCRETE |= {"IdentityCurvature"}
CURVATURE_NAMES = {"ekfac", "kfac", "fisher", "ggn", "hessian", "identity"}
#: Where concrete curvatures may be named: their own folder, the front door, the command lines.
NAMING = ("influence/curvature/", "influence/__init__.py", "influence/cli.py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_edits_methods_and_difficulty_are_apart(path):
    room = next((room for room in APART if module_of(path).startswith(room)), None)
    others = tuple(f"{other}." for other in APART if other != room)
    reached = {f"{module}." for module in imported(parse(path))}
    assert room is None or [module for module in reached if module.startswith(others)] == []


def test_no_curvature_is_named_outside_its_room(path):
    """Neither imported nor compared with: what differs between curvatures, they say themselves."""
    if name(path).startswith(NAMING):
        return
    nodes = list(ast.walk(parse(path)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {a.name for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names}
    compared = [
        constant.value
        for node in nodes
        if isinstance(node, ast.Compare | ast.Dict | ast.MatchValue)
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant) and constant.value in CURVATURE_NAMES
    ]
    assert (names & CONCRETE, compared) == (set(), [])


def test_the_manifest_is_indexed_in_its_own_file_alone(path):
    text = path.read_text(encoding="utf-8")
    assert path.name == "manifest.py" or "manifest[" not in text


def test_no_private_name_crosses_a_file(path):
    """Neither `from m import _x` nor `m._x` of an imported module."""
    tree = parse(path)
    modules, private = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            private += [f"{node.module}.{a.name}" for a in node.names if is_private(a.name)]
            below = ROOT.joinpath(*(node.module or "").split("."))
            modules |= {
                a.asname or a.name
                for a in node.names
                if (below / a.name).is_dir() or (below / f"{a.name}.py").exists()
            }
    reached = [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
        and is_private(node.attr)
    ]
    assert private + reached == []


def is_private(text: str) -> bool:
    return text.startswith("_") and not text.startswith("__")


def test_every_module_has_its_test_file(path):
    if path.name in ("__init__.py", "__main__.py"):
        return
    parts = path.relative_to(ROOT).parts
    assert ROOT.joinpath("tests", *parts[:-1], f"test_{path.name}").exists()


def test_no_file_is_longer_than_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


@pytest.mark.parametrize("package", PACKAGES)
def test_front_doors_say_the_same_thing_thrice(package):
    """What type checkers see, what is handed on, and `__all__`; and every name is really there."""
    import importlib

    door = importlib.import_module(package)
    homes, modules = door._HOMES, {}
    tree = parse(ROOT / package / "__init__.py")
    seen = {
        a.asname or a.name
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        for inner in node.body
        if isinstance(inner, ast.ImportFrom)
        for a in inner.names
    }
    call = tree.body[-1]
    assert isinstance(call, ast.Assign)
    if isinstance(call.value, ast.Call) and len(call.value.args) == 3:
        modules = ast.literal_eval(call.value.args[2])
    handed_on = {name for names in homes.values() for name in names} | set(modules)
    assert seen == handed_on == set(door.__all__)
    assert all(getattr(door, name) is not None for name in handed_on)


@pytest.mark.parametrize("package", PACKAGES)
def test_help_does_not_wait_for_torch(package):
    import subprocess
    import sys

    code = (
        "import sys; from importlib import import_module; "
        f"import_module('{package}.cli'); "
        "heavy = {'torch', 'transformers', 'peft', 'pandas', 'scipy', 'datasets', 'sklearn'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
