from __future__ import annotations

import hashlib
import re
from base64 import b64encode

import pytest

from analysis.explorer import page
from analysis.explorer.data import gather
from analysis.explorer.packing import blocks
from analysis.explorer.sections import SECTIONS
from influence.errors import InputError, StoreError
from tests.analysis.explorer.helpers import hostile_rows, write_run


def hashed(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@pytest.fixture(scope="module")
def html(world):
    out = world.root / "page.html"
    written = page.write(world.explored, out, overwrite=True)
    assert written.size == out.stat().st_size
    return out.read_text(encoding="utf-8")


def policy(html: str) -> dict[str, list[str]]:
    content = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    parts = (part.split() for part in content.replace("&#39;", "'").split(";"))
    return {name: values for name, *values in parts}


def test_the_policy_lets_nothing_in_but_what_is_on_the_page(html):
    found = policy(html)
    assert found["default-src"] == found["connect-src"] == found["base-uri"] == ["'none'"]
    assert found["form-action"] == ["'none'"]
    assert "unsafe-inline" not in str(found)
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert len(scripts) == len(styles) == 1
    assert hashed(scripts[0]) in found["script-src"]
    assert found["style-src"] == [hashed(styles[0]), "'unsafe-hashes'", hashed("")]
    assert len(found["script-src"]) == 2  # the other is plotly's


def test_nothing_is_loaded_from_elsewhere(html):
    text = re.sub(r'<script type="text/plain".*?</script>', "", html, flags=re.DOTALL)
    assert re.findall(r"(?:src|href)=[\"'](?!#)[^\"']*", text) == []
    assert "url(" not in text
    assert "@import" not in text


def test_what_the_run_is_stands_there_without_a_script(html):
    assert "tiny-adapter" in html.split("<script")[0]
    assert "mean:0.1" in html.split("<script")[0]


def test_a_server_brings_its_own_source(world, html):
    meta, _ = blocks(world.explored)
    about = SECTIONS["about"].blocks(world.explored)
    built = page.built(
        meta, about, {}, source="const source = {};", connect="'self'", scripts=["more();"]
    )
    text = built.text
    assert policy(text)["connect-src"] == ["'self'"]
    assert policy(text) == policy(f'Content-Security-Policy" content="{built.policy}"')
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    assert "const source = {};" in script
    assert script.rstrip().endswith("more();\n})();")
    of_file = (page.TEMPLATES / page.FILE_SOURCE).read_text(encoding="utf-8")
    assert (of_file in html, of_file in text) == (True, False)
    held = [
        re.findall(r'<script type="text/plain" id="data-([\w-]+)"', each) for each in (html, text)
    ]
    assert "rows" in held[0]
    assert held[1] == ["plotly"]
    for mark in ("</script", "<!--"):
        with pytest.raises(InputError, match=f"holds {mark}"):
            page.built(meta, about, {}, source=f"'{mark}>'")


def test_hostile_names_are_escaped(tmp_path):
    write_run(tmp_path / "run", hostile_rows())
    explored = gather(tmp_path / "run")
    meta, data = blocks(explored)
    meta["title"] = "<img src=x onerror=alert(1)>"
    about = [
        {"title": "<b>", "facts": [{"label": "<i>", "value": "</dd><script>", "help": '"><x>'}]}
    ]
    text = page.built(meta, about, data).text
    assert "&lt;img" in text
    assert "<img" not in text
    assert "<x>" not in text
    assert text.count("<script>") == 1


def test_files_that_are_there_or_cannot_be_written(world, tmp_path):
    with pytest.raises(InputError, match=r"ends in \.html"):
        page.write(world.explored, tmp_path / "page.txt")
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        page.write(world.explored, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="could not be written"):
        page.write(world.explored, tmp_path / "file" / "page.html")
    page.write(world.explored, tmp_path / "new" / "page.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_a_large_file_is_said(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "LARGE", 1000)
    page.write(world.explored, tmp_path / "page.html")
    assert "analysis serve" in capsys.readouterr().err


def test_the_same_run_gives_the_same_bytes(world, tmp_path):
    for name in ("one.html", "two.html"):
        page.write(world.explored, tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_the_command_writes_the_page(world, tmp_path, run_main):
    from analysis.cli import main

    out = tmp_path / "page.html"
    line = ["analysis", "report", "--run", world.directory, "--out", out, "--json"]
    line += ["--cleaning", world.root / "clean", "--lds", world.root / "lds.json"]
    done = run_main(main, *line)
    assert done.status == 0, done.err
    assert done.json()["sections"] == [
        *("queries", "cleaning", "heatmap", "map", "faithfulness", "about"),
    ]
    assert done.json()["bytes"] == out.stat().st_size
    again = run_main(main, *line)
    assert (again.status, "--overwrite" in again.err) == (2, True)
    wrong = run_main(
        main, *line[:4], "--out", tmp_path / "b.html", "--scores", tmp_path / "none.h5"
    )
    assert wrong.status == 2
    assert "influence score" in wrong.err
    assert not (tmp_path / "b.html").exists()


def luminance(colour: str) -> float:
    """Relative luminance of a colour #rrggbb (WCAG 2.2)."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1, 2])
def test_texts_can_be_read_on_what_is_behind_them(theme):
    """At least 4.5 to 1 (WCAG 2.2, 1.4.3), light, dark by choice, and dark by the system."""
    css = (page.TEMPLATES / "explorer.css").read_text(encoding="utf-8")
    blocks_ = re.findall(r"--page: #\w{6};.*?}", css, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks_[theme]))
    for front in ("ink", "muted", "pos", "neg", "good", "warn"):
        for behind in ("page", "card", "chosen"):
            high, low = sorted(luminance(colours[each]) for each in (front, behind))[::-1]
            assert (high + 0.05) / (low + 0.05) >= 4.5, (front, behind)
