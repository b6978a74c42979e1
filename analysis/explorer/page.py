"""The page as one file: nothing is fetched, no script runs but its own, training text is inert."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from analysis.explorer.data import Explored
from analysis.explorer.options import DETAIL
from analysis.explorer.packing import blocks, embedded_json, packed
from analysis.explorer.sections import SECTIONS
from analysis.page_file import checked_page, write_page
from influence.errors import InputError
from influence.progress import say

TEMPLATES = Path(__file__).parent / "templates"
#: The parts of the page's script, in order, around the source.
PACKED, FILE_SOURCE = "packed.js", "file_source.js"
SCRIPTS = ("parts.js", "lists.js", "plots.js", "blocks.js", "pairs.js", "explorer.js", "main.js")
#: Bytes of a file above which it is said that it is large.
LARGE = 30_000_000
#: What style attributes and elements may hold beside the page's own style: nothing. plotly makes an
#: empty element, and adds its rules by script.
EMPTY = ""


@dataclass(frozen=True)
class Page:
    """A page: its `text`, HTML, and the security `policy` that it states."""

    text: str
    policy: str


@dataclass(frozen=True)
class Written:
    """A page that was written: where, its size in bytes, and the sections that it has."""

    path: Path
    size: int
    sections: tuple[str, ...]


def write(
    explored: Explored,
    out: str | os.PathLike[str],
    *,
    detail: int = DETAIL,
    overwrite: bool = False,
) -> Written:
    """Write the page of a run to the HTML file `out`.

    Parameters
    ----------
    explored
        From `analysis.explorer.data.gather`.
    out
        Ends in `.html`; its folder is made where it is missing.
    detail
        Rows of either end of each query whose scores are split over tokens and modules.
    overwrite
        Replace a file that is already there.

    Raises
    ------
    InputError
        If the name has another ending, or the file exists.
    StoreError
        If the file cannot be written.
    """
    out = checked_page(out, overwrite)
    meta, data = blocks(explored, detail=detail)
    write_page(out, built(meta, SECTIONS["about"].blocks(explored), data).text)
    size = out.stat().st_size
    if size > LARGE:
        say(f"note: {out} has {size / 1e6:.0f} MB; analysis serve shows a large run without a file")
    return Written(out, size, tuple(name for name, _ in meta["sections"]))


def built(
    meta: Mapping[str, Any],
    about: Sequence[Mapping[str, Any]],
    data: Mapping[str, str],
    *,
    source: str | None = None,
    connect: str = "'none'",
    scripts: Sequence[str] = (),
) -> Page:
    """The page.

    Parameters
    ----------
    meta
        From `analysis.explorer.contract.meta`, or `packing.blocks`.
    about
        The blocks of the section `about`, which are there before any script runs.
    data
        Packed blocks by name, for the file's source; none where a server answers.
    source
        Script that ends in `const source = {...};` (`analysis.explorer.contract`). Default: the
        file's, which reads `data`.
    connect
        What the security policy lets scripts fetch from: `'self'` for a server.
    scripts
        More scripts, which run after the page's own, in the same scope.
    """
    source = _template_text(FILE_SOURCE) if source is None else source
    parts = [_template_text(PACKED), source, *map(_template_text, SCRIPTS), *scripts]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"
    style = _template_text("explorer.css")
    library, library_hash, styled = _plotly()
    # `<!--` begins a text in which `</script` ends nothing
    for mark in ("</script", "<!--"):
        if mark in script.lower():
            raise InputError(f"a script of the page holds {mark}, as HTML reads it: write it apart")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_hash(script)}' '{library_hash}'",
            f"style-src '{_hash(style)}' 'unsafe-hashes' '{_hash(EMPTY)}'",
            "img-src data:",
            f"connect-src {connect}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    text = _template().render(
        policy=policy,
        meta=meta,
        about=about,
        style=style,
        script=script,
        embedded=embedded_json(meta),
        data={**data, "plotly": library},
        styled=styled,
    )
    return Page(text, policy)


def _hash(text: str) -> str:
    """A source of a security policy: the SHA-256 of an inline script or style."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


@cache
def _plotly() -> tuple[str, str, tuple[str, ...]]:
    """plotly.js, packed, the hash that lets it run, and the ids of style elements that it would add.

    These are of maps, which the page has none of; it adds none where the id is taken.
    """
    from plotly.offline import get_plotlyjs

    text = get_plotlyjs().replace("\r\n", "\n")
    styled = re.findall(r'getElementById\("([0-9a-f]{40,})"\)', text)
    return packed(text.encode("utf-8")), _hash(text), tuple(dict.fromkeys(styled))


def _template_text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    """The page's template. Whatever is put into it is escaped, but its own script and style."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("explorer.html")
