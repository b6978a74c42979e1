"""The page as a whole: nothing in a record can do harm, and the same one gives the same bytes."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import math
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

from analysis.cli import main
from analysis.report.page import page, report
from analysis.report.reading import read_edit_record
from influence.errors import ToolkitError
from influence.store import write_json
from tests.analysis.report.helpers import (
    HOSTILE,
    NULLABLE,
    Page,
    drop,
    made,
    paths,
    save,
)

ROOT = Path(__file__).resolve().parents[3]


def test_a_record_of_nulls_claims_nothing(tmp_path):
    record = made()
    for path in NULLABLE:
        if len(path) == 1:
            drop(record, *path)
    record["adapter"] = {"before": None, "after": None}
    record["losses"] = dict.fromkeys(("edited", "retained", "heldout"))
    for row in record["rows"]:
        row.update(dict.fromkeys(key for key in row if key not in ("id", "action")))
    folder = save(tmp_path / "edit", record)
    result = report(folder, tmp_path / "page.html")
    assert result.verdicts == {
        "removed": "not judged",
        "others": "not measured",
        "retraining": "not compared",
    }
    record["rows"] = []  # nothing measured at all
    assert (
        report(save(folder, record), tmp_path / "page.html", overwrite=True).verdicts
        == result.verdicts
    )


TAGS = set(
    [
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "p",
        "bdi",
        "h1",
        "h2",
        "div",
        "span",
        "b",
        "section",
        "table",
        "tr",
        "th",
        "td",
        "svg",
        "circle",
        "line",
        "rect",
        "text",
        "ul",
        "li",
        "dl",
        "dt",
        "dd",
        "code",
        "pre",
        "details",
        "summary",
    ]
)


@pytest.mark.parametrize("kind", ["remove", "mixed"])
def test_hostile_texts_are_text_and_nothing_else(tmp_path, kind):
    record = made(HOSTILE, kind)
    nasty = HOSTILE[2]
    record |= {
        "created": nasty,
        "stopped": nasty,
        "versions": {nasty: nasty},
        "files": {nasty: nasty},
    }
    record["method"] |= {"name": nasty, "until": nasty, nasty: [nasty], "x": {nasty: nasty}}
    for place in ("run", "base"):
        record[place] = {"path": nasty, "digest": nasty}
    record["adapter"]["before"] = {"path": nasty, "digest": nasty}
    record["losses"]["heldout"]["source"] = record["comparable"]["source"] = nasty
    record["requests"][0]["content_before"] = nasty
    record["agreement"] = {
        "adapter": nasty,
        "edited": 4.6,
        "retained": None,
        "heldout": None,
        "kl": {nasty: nasty},
    }
    html_path = report(save(tmp_path / "a<b>&'c", record), tmp_path / "page.html").path
    html = html_path.read_bytes().decode("utf-8")
    parsed = Page(html)
    assert parsed.tags <= TAGS
    names = {name for _, name, _ in parsed.attributes}
    assert not {
        name
        for name in names
        if name.startswith("on") or name in ("src", "href", "style", "srcset", "action")
    }
    assert not [
        value for _, name, value in parsed.attributes if "http" in value and name != "title"
    ]
    assert "<script" not in html.lower()
    assert "url(" not in html
    assert "@import" not in html
    for id in (
        "x" * 200,
        "<script>alert(1)</script>",
        "{{ 7 * 7 }}{% raw %}",
        "a\" onmouseover='alert(1)' b=",
        "$(rm -rf ~)`x`",
    ):
        assert id in parsed.text
    assert not set("\u202e\u2066\x1b\x00\u2028") & set(html)
    assert "(5,000 characters)" in parsed.text
    assert (
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src '
        "'unsafe-inline'\">" in html
    )


@pytest.mark.slow
def test_a_value_of_any_type_anywhere_is_shown_or_refused_and_never_crashes(tmp_path):
    for kind in ("remove", "mixed"):
        whole = made(kind=kind)
        whole["agreement"] = {
            "adapter": "/x",
            "edited": 4.6,
            "retained": 0.2,
            "heldout": 4.8,
            "kl": {"edited": 0.1},
        }
        for path in list(paths(whole))[1:]:
            for value in (
                None,
                True,
                -7,
                10**400,
                1e299,
                math.nan,
                -math.inf,
                "text",
                "",
                [],
                [1],
                {},
                {"a": [None]},
            ):
                record = copy.deepcopy(whole)
                holder = record
                for key in path[:-1]:
                    holder = holder[key]
                holder[path[-1]] = value
                save(tmp_path, record)
                with suppress(ToolkitError):
                    assert "</html>" in page(read_edit_record(tmp_path), tmp_path)


def test_the_page_is_a_function_of_the_record_and_names_its_digest(tmp_path):
    (tmp_path / "edit").mkdir()
    write_json(tmp_path / "edit" / "edit.json", made())
    one = report(tmp_path / "edit", tmp_path / "one.html").path.read_bytes()
    two = report(tmp_path / "edit", tmp_path / "deep" / "er" / "two.html").path.read_bytes()
    assert one == two
    assert (
        hashlib.sha256((tmp_path / "edit" / "edit.json").read_bytes()).hexdigest() in one.decode()
    )
    for digit in "1234567":
        assert digit * 64 in one.decode()  # in full, in the folded part
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "edit", "one.html"]


def test_the_command(tmp_path, run_main):
    folder, out = save(tmp_path / "edit", made()), tmp_path / "page.html"

    def analysis(*arguments):
        return run_main(main, "analysis", "report", *arguments)

    done = analysis("--edit", folder, "--out", out)
    assert done.status == 0
    assert done.out.startswith(
        f"{out}: 3 training rows removed\nThe 3 removed rows are now about as unfamiliar"
    )
    first = out.read_bytes()
    again = analysis("--edit", folder, "--out", out)
    assert again.status == 2
    assert "exists and would be replaced: give another --out, or --overwrite" in again.err
    assert analysis("--edit", folder, "--out", out, "--overwrite", "--json").json() == {
        "out": str(out),
        "kind": "remove",
        "rows": 3,
        "verdicts": {
            "removed": "forgotten",
            "others": "within the limit",
            "retraining": "not compared",
        },
        "headlines": [done.out.strip().split("\n")[1]],
    }
    assert out.read_bytes() == first
    for wrong in (tmp_path / "page.txt", folder / "edit.json", folder):
        refused = analysis("--edit", folder, "--out", wrong, "--overwrite")
        assert (refused.status, "expected a file name that ends in .html" in refused.err) == (
            2,
            True,
        )
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "missing", folder / "edit.json"):
        refused = analysis("--edit", nothing, "--out", tmp_path / "new.html")
        assert (refused.status, "holds no edit.json" in refused.err) == (2, True)
    (tmp_path / "file").write_text("")
    failed = analysis("--edit", folder, "--out", tmp_path / "file" / "page.html")
    assert (failed.status, "could not be written" in failed.err) == (1, True)
    (folder / "edit.json").write_text("{")
    damaged = analysis("--edit", folder, "--out", tmp_path / "new.html")
    assert (damaged.status, "edit.json cannot be read" in damaged.err) == (1, True)
    assert not (tmp_path / "new.html").exists()


def test_the_template_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["analysis.report"]
    package = ROOT / "analysis" / "report"
    templates = [path.relative_to(package) for path in (package / "templates").iterdir()]
    assert templates
    assert [
        path
        for path in templates
        if not any(fnmatch.fnmatch(str(path), pattern) for pattern in patterns)
    ] == []
