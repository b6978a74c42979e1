"""The documentation site's own pages: those that lie outside docs/, and the reference.

MkDocs calls the functions below (`hooks` in mkdocs.yml). README, LOG, CHANGELOG, CONTRIBUTING and
the README of benchmarks/ and notebooks/ become pages of the site, and links between them and docs/
are turned into links within the site. The reference is made of what the packages hand on, and of
the command lines' own help.
"""

from __future__ import annotations

import importlib
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("influence", "unlearn", "analysis")
#: Pages from outside docs/: the file, and its place in the site.
OUTSIDE = {
    "README.md": "index.md",
    "LOG.md": "log.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "notebooks/README.md": "notebooks.md",
}
#: Links to files that are no pages: the words stay, the link goes.
NO_PAGE = (".ipynb", ".py")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that do not lie in docs/."""
    for source, place in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=relinked(text, source)))
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    for package in PACKAGES:
        files.append(File.generated(config, f"reference/{package}.md", content=reference(package)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn a page's links out of docs/ into links within the site."""
    if page.file.generated_by:
        return markdown
    return relinked(markdown, f"docs/{page.file.src_uri}")


def relinked(text: str, source: str) -> str:
    """The text of the file `source` with every relative link as it is in the site."""
    here = place(source)

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found["words"], found["target"], found["anchor"] or ""
        if "://" in target or not target:
            return found[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if file.endswith(NO_PAGE) or (ROOT / file).is_dir():
            return words
        return (
            f"[{words}]({posixpath.relpath(place(file), posixpath.dirname(here) or '.')}{anchor})"
        )

    pieces = re.split(r"(^```.*?^```\n)", text, flags=re.MULTILINE | re.DOTALL)
    pattern = r"\[(?P<words>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)"
    pieces[::2] = [re.sub(pattern, link, piece) for piece in pieces[::2]]
    return "".join(pieces)


def place(source: str) -> str:
    """Where a file of the repository is in the site."""
    if source in OUTSIDE:
        return OUTSIDE[source]
    return source.removeprefix("docs/")


# ---- reference


def reference(package: str) -> str:
    """The page of a package: what it hands on, each by its docstring."""
    module = importlib.import_module(package)
    about = (module.__doc__ or "").strip().split("\n")[0]
    lines = [f"# {package}", "", about, ""]
    lines += [f"::: {path}\n" for path in sorted(handed_on(module), key=str.casefold)]
    return "\n".join(lines)


def handed_on(module: Any) -> Iterator[str]:
    """The full names of what a package hands on."""
    for home, names in module._HOMES.items():
        for name in names:
            value = getattr(module, name)
            owner = getattr(value, "__module__", None)
            known = owner is not None and owner.split(".")[0] in PACKAGES
            yield f"{owner if known else f'{module.__name__}.{home}'}.{name}"


def commands() -> str:
    """The page of all commands with their options, from the command lines themselves."""
    import typer

    lines = ["# Commands", "", "Each is also `python -m influence ...`, and so on.", ""]
    for package in PACKAGES:
        app = importlib.import_module(f"{package}.cli").app
        group = typer.main.get_command(app)
        for name, command in sorted(group.commands.items()):
            lines += [f"## {package} {name}", "", plain(command.help or ""), ""]
            lines += ["| option | |", "|---|---|"]
            for option in command.params:
                names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
                lines.append(f"| {names} | {plain(getattr(option, 'help', '') or '')} |")
            lines.append("")
    return "\n".join(lines)


def plain(text: str) -> str:
    """A help text as Markdown: on one line, nothing in it read as markup."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", one_line)


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
