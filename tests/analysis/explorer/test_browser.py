"""The page in Debian's Chromium: search, ticks, export, keys, themes, widths, hostile text, print."""

from __future__ import annotations

import json
import re
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.explorer import contract, packing, sections
from analysis.explorer.blocks import axis, column, table
from analysis.explorer.data import gather
from analysis.explorer.page import write
from influence.row_ids import read_ids
from tests.analysis.browser import needs_chromium
from tests.analysis.explorer.conftest import write_csv
from tests.analysis.explorer.helpers import hostile_rows, rows_of, write_run, write_scores

pytestmark = [needs_chromium, pytest.mark.slow]
#: What a page does that it must not: breaks of its policy, errors, requests.
WATCH = """
window.broken = [];
document.addEventListener("securitypolicyviolation", (e) =>
  window.broken.push(`${e.violatedDirective} ${e.blockedURI}`));
"""
#: Hovers over every point of every figure, and says what stood there; an error where it is a link.
HOVER = """async () => {
  const said = [];
  for (const node of document.querySelectorAll(".plot")) {
    for (const [curveNumber, trace] of node.data.entries()) {
      const count = trace.z ? trace.z.length : trace.x.length;
      for (let k = 0; k < count; k++) {
        const pointNumber = trace.z ? [k, k % trace.z[0].length] : k;
        Plotly.Fx.hover(node, [{ curveNumber, pointNumber }]);
        await new Promise((resolve) => setTimeout(resolve, 60)); // plotly shows no more than that
        if (node.querySelector("a")) throw new Error("a link");
        said.push(node.querySelector(".hoverlayer").textContent);
      }
    }
  }
  return said;
}"""


@contextmanager
def opened(browser, path: Path, **options):
    """A page that is ready. At the end nothing was asked of a network and nothing went wrong."""
    options = {"viewport": {"width": 1200, "height": 900}} | options
    context = browser.new_context(**options)
    context.set_default_timeout(120_000)  # milliseconds: other tests share the machine
    page = context.new_page()
    wrong: list[str] = []
    page.on("request", lambda request: wrong.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: said.type in ("error", "warning") and wrong.append(said.text))
    page.add_init_script(WATCH)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    yield page
    local = [each for each in wrong if not each.startswith((path.as_uri(), "blob:", "data:"))]
    assert local == []
    assert page.evaluate("window.broken") == []
    context.close()


def until(page, condition) -> None:
    """Wait until an expression of the page, or a function here, is true.

    `wait_for_function` would need `unsafe-eval`.
    """
    end = time.monotonic() + 90
    while not (condition() if callable(condition) else page.evaluate(condition)):
        assert time.monotonic() < end, f"never came true: {condition}"
        page.wait_for_timeout(20)


def draw_everything(page, *, figures: bool = True) -> None:
    """Scroll until every section was filled, and every figure drawn."""
    for node in page.locator("section").all():
        node.scroll_into_view_if_needed()
        page.wait_for_timeout(30)
    for node in page.locator(".plot").all() if figures else ():
        node.scroll_into_view_if_needed()
        while "waiting" in node.get_attribute("class"):
            page.wait_for_timeout(20)


def chosen(page, name: str) -> str:
    return page.locator(f"#{name} [aria-selected=true] .id").inner_text()


@pytest.fixture(scope="module")
def small(world):
    path = world.root / "browser.html"
    write(world.explored, path, overwrite=True)
    return path


@pytest.fixture(scope="module")
def full(browser, small):
    """A page on which everything was drawn, for tests that change nothing of it."""
    with opened(browser, small, color_scheme="dark") as page:
        draw_everything(page)
        yield page


def test_search_by_keys(browser, small, world):
    with opened(browser, small) as page:
        page.keyboard.press("/")
        page.keyboard.type("kind 2")
        until(page, "document.getElementById('left-count').textContent === '1 query'")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#right-title').textContent.endsWith('query-2')")
        best = int(np.argmax(world.values[2]))
        assert chosen(page, "right") == f"row-{best}"
        assert f"{world.values[2, best]:.3g}" in page.locator(".score-line").inner_text()
        page.keyboard.press("Tab")
        page.focus("#right")
        page.keyboard.press("End")
        until(page, "document.querySelector('.score-line .neg') !== null")
        assert chosen(page, "right") == f"row-{np.argmin(world.values[2])}"
        assert page.locator("#pair article h4").all_inner_texts() == [
            "Query query-2",
            f"Training row row-{np.argmin(world.values[2])}",
        ]


def test_from_a_row_to_the_queries_that_it_moves(browser, small, world):
    with opened(browser, small) as page:
        page.check("input[value=rows]")
        page.fill("#search", "row-7")
        until(page, "document.getElementById('left-count').textContent === '1 training row'")
        page.locator("#left .line").click()
        until(page, "document.querySelector('#right-title').textContent.endsWith('row-7')")
        order = np.argsort(-world.values[:, 7], kind="stable")
        shown = page.locator("#right .id").all_inner_texts()
        assert shown == [f"query-{q}" for q in order]
        page.locator("#right .line").nth(2).click()
        until(page, f"location.hash === '#q={order[2]}&r=7'")
        page.locator(".drives button").first.click()
        strongest = np.argmax(np.abs(world.values[:, 7]))
        until(page, f"location.hash === '#q={strongest}&r=7'")
        assert page.is_checked("input[value=queries]")


def test_ticked_ids_are_exported_as_unlearn_reads_them(browser, tmp_path):
    rows = hostile_rows()
    rows[0]["id"], rows[1]["id"], rows[2]["id"] = ' "quoted" ', "two\nlines", "plain-1"
    write_run(tmp_path / "run", rows)
    write_scores(tmp_path / "run", np.ones((1, len(rows))), rows_of(1, "query"))
    write(gather(tmp_path / "run"), tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        assert page.is_disabled("#export")
        page.focus("#right")
        for _ in rows:
            page.keyboard.press(" ")
            page.keyboard.press("ArrowDown")
            page.wait_for_timeout(20)
        until(page, "document.getElementById('export').textContent === 'Export 8 ids'")
        page.locator("#right .tick").nth(3).click()
        assert page.inner_text("#export") == "Export 7 ids"
        with page.expect_download() as download:
            page.click("#export")
        assert re.fullmatch(r"ids-[0-9a-f]{4}-\d{4}\.txt", download.value.suggested_filename)
        download.value.save_as(tmp_path / "ids.txt")
        from influence.row_files import read_examples

        train = read_examples(tmp_path / "run-train.jsonl")
        assert read_ids(tmp_path / "ids.txt", train) == [
            row["id"] for k, row in enumerate(rows) if k != 3
        ]
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert page.inner_text("#export") == "Export 7 ids"
        page.click("#untick")
        assert page.is_disabled("#export")


def test_the_cleaning_list_by_reason(browser, small):
    with opened(browser, small) as page:
        page.locator("#cleaning").scroll_into_view_if_needed()
        page.wait_for_selector("#cleaning-list .line")
        assert page.locator("#cleaning-list .line").count() == 4
        page.select_option("#reason", "duplicate")
        until(page, "document.querySelectorAll('#cleaning-list .line').length === 2")
        page.click("text=Tick these")
        assert page.inner_text("#export") == "Export 2 ids"
        assert page.locator("#cleaning-list [aria-checked=true]").count() == 2
        page.click("#untick")
        page.select_option("#reason", "")
        page.click("text=Tick those to remove")
        assert page.inner_text("#export") == "Export 1 id"
        page.click("text=Tick these")  # a row that the run does not have takes no tick
        assert page.inner_text("#export") == "Export 2 ids"


@pytest.mark.parametrize("form", ["float32", "bytes", "strongest"])
def test_the_file_answers_what_the_functions_answer(browser, world, monkeypatch, form):
    """Whatever scores are kept as, but for those that a page says are rounded or not kept."""
    if form != "float32":
        monkeypatch.setattr(packing, "EXACT", 10)
        monkeypatch.setattr(packing, "BYTES", 1000 if form == "bytes" else 20)
        monkeypatch.setattr(packing, "STRONGEST", 3)
    path = world.root / f"{form}.html"
    write(world.explored, path, overwrite=True)
    html = path.read_text(encoding="utf-8")
    meta, data = packing.blocks(world.explored)
    assert meta["form"]["name"] == form
    source = re.search(r"const source = .*?\}\)\(\);\n", html, re.DOTALL)[0]
    packed = re.search(r"// Packed blocks.*?\n}\n", html, re.DOTALL)[0]
    bare = html.split("<script>")[0].split("<meta http-equiv")[0] + "</head><body>"
    bare += f'<script type="application/json" id="meta">{packing.embedded_json(meta)}</script>'
    bare += "".join(
        f'<script type="text/plain" id="data-{k}">{v}</script>' for k, v in data.items()
    )
    bare += f"<script>{packed}\n{source}\nwindow.source = source;</script></body></html>"
    (world.root / "bare.html").write_text(bare, encoding="utf-8")
    page = browser.new_page()
    page.goto((world.root / "bare.html").as_uri())
    ask = lambda call: page.evaluate(f"window.source.{call}")  # noqa: E731
    explored = world.explored
    for kind, text in (
        ("rows", ""),
        ("rows", "group 1 KIND"),
        ("queries", "kind 3"),
        ("rows", "no"),
    ):
        expected = contract.search(explored, kind, text)
        assert ask(f"search({json.dumps(kind)}, {json.dumps(text)})") == expected
    assert ask("lines('rows', [7, 0])") == contract.lines(explored, "rows", [7, 0])
    for name, _ in meta["sections"]:
        if name != "queries":
            assert ask(f"section({json.dumps(name)})") == contract.section(explored, name)
    for q in range(4):
        same(ask(f"query({q})"), contract.query(explored, q), "rows", form)
    for i in range(12):
        same(ask(f"row({i})"), contract.row(explored, i), "queries", form)
    if form == "float32":
        found, expected = ask("pair(1, 2)"), contract.pair(explored, 1, 2)
        assert [name for name, _ in found["modules"]] == [name for name, _ in expected["modules"]]
        parts = [[value for _, value in each["modules"]] for each in (found, expected)]
        np.testing.assert_allclose(parts[0], parts[1], atol=1.1e-3 * np.abs(parts[1]).max())
    page.close()


def same(found, expected, places: str, form: str) -> None:
    exact = found.pop("exact")
    scores = dict(zip(found.pop(places), found.pop("scores"), strict=True))
    other = dict(zip(expected.pop(places), expected.pop("scores"), strict=True))
    assert found == expected
    if form == "float32":
        assert list(scores.items()) == list(other.items())
        assert all(exact)
    known = {place for place, sure in zip(scores, exact, strict=True) if sure}
    assert {k: scores[k] for k in known} == {k: other[k] for k in known}
    if form == "bytes":
        assert set(scores) == set(other)
        assert not all(exact) or places == "queries"
        largest = max(map(abs, other.values()))
        assert all(abs(scores[k] - other[k]) < 0.02 * largest + 0.15 * abs(other[k]) for k in other)
    if form == "strongest":
        assert known == set(scores)
        assert len(scores) < len(other) or places == "queries"


def test_hostile_text_is_inert(browser, tmp_path):
    """Ids, groups, texts, reasons, evidence, answers, names of files: nothing runs, nothing loads."""
    rows = hostile_rows(16)
    write_run(tmp_path / "run", rows)
    rng = np.random.default_rng(0)
    write_scores(
        tmp_path / "run",
        rng.normal(size=(8, 16)),
        hostile_rows(8, "query"),
        self_influence=np.exp(rng.normal(size=16)),
    )
    listed = [[r["id"], r["group"], 0.5, r["prompt"], r["prompt"]] for r in rows]
    write_csv(
        tmp_path / "rows.csv", ["id", "reason", "score", "evidence", "<b>decision</b>"], listed
    )
    forecast = [[r["id"], k + 1, 0.1, r["prompt"], r["prompt"]] for k, r in enumerate(rows)]
    write_csv(tmp_path / "d.csv", ["id", "steps", "damage", "recommended", "reason"], forecast)
    said = [{**r, "generated": {r["prompt"]: r["prompt"]}} for r in rows[:8]]
    odd = "<img src=x onerror=document.title=1>.json"
    (tmp_path / odd).write_text(
        json.dumps({"sets": {rows[0]["id"]: {"adapter": {"loss": 1}}}, "rows": said})
    )
    explored = gather(
        tmp_path / "run",
        cleaning=tmp_path / "rows.csv",
        difficulty=tmp_path / "d.csv",
        evaluations=[tmp_path / odd],
    )
    write(explored, tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        title = page.title()
        draw_everything(page)
        for summary in page.locator("details summary").all():
            summary.click()
        hovered = page.evaluate(HOVER)
        assert any("<a href='https://evil.example/'>click</a>" in text for text in hovered)
        page.focus("#left")
        page.keyboard.press("Home")
        for k in range(8):
            until(page, f"location.hash.startsWith('#q={k}&')")
            page.keyboard.press("ArrowDown")
        assert page.title() == title
        inert = "main script, main img, main a:not(.ways a), main b, main iframe, svg a"
        assert page.locator(inert).count() == 0
        until(page, "document.querySelector('#pair .said').textContent.includes('verylongword')")


def test_dark_and_light(browser, small):
    ink = "getComputedStyle(document.body).color"
    with opened(browser, small, color_scheme="dark") as page:
        dark = page.evaluate(ink)
        page.click("#theme")
        assert page.inner_text("#theme") == "Theme: light"
        light = page.evaluate(ink)
        page.click("#theme")
        assert page.inner_text("#theme") == "Theme: dark"
        assert page.evaluate(ink) == dark != light
        page.reload()
        assert page.inner_text("#theme") == "Theme: dark"
    with opened(browser, small, color_scheme="light") as page:
        assert page.evaluate(ink) == light


#: Whether texts of a figure lie upon one another.
OVERLAP = """(node) => {
  const box = (name) => node.querySelector(name)?.getBoundingClientRect();
  const [title, legend] = [box(".g-xtitle"), box(".legend")];
  return Boolean(title && legend && title.top < legend.bottom - 1 && legend.top < title.bottom - 1);
}"""


@pytest.mark.parametrize("width", [360, 1200])
def test_heads_of_tables_and_titles_of_axes_stand_apart(full, width):
    full.set_viewport_size({"width": width, "height": 740})
    try:
        units = full.locator("th .unit")
        assert units.count() > 3
        assert max(units.evaluate_all("nodes => nodes.map((n) => n.offsetHeight)")) < 24
        full.wait_for_timeout(300)
        assert full.locator(".plot").evaluate_all(f"nodes => nodes.filter({OVERLAP}).length") == 0
        assert full.locator(".plot .legend").count() > 0
    finally:
        full.set_viewport_size({"width": 1200, "height": 900})


def test_long_titles_are_not_cut_off(browser, small, world, monkeypatch):
    """Of an axis and of a table that is wider than the screen: they take several lines."""
    long = "rise of the mean loss of the rows that the edit was asked to make the adapter forget"
    series = {"name": "edits", "x": [1.0, 2.0], "y": [1.0, 2.0], "names": ["a", "b"]}
    plot = {"kind": "plot", "plot": "scatter", "title": "a", "help": "", "series": [series]}
    plot |= {"x": axis(long, "nats"), "y": axis(long, "nats")}
    wide = table(long, [column(f"column {k}", "number") for k in range(12)], [[1.5] * 12])
    section = replace(sections.SECTIONS["map"], blocks=lambda explored: [plot, wide])
    monkeypatch.setitem(sections.SECTIONS, "map", section)  # pyright: ignore[reportArgumentType]
    write(world.explored, world.root / "titles.html", overwrite=True)
    with opened(
        browser, world.root / "titles.html", viewport={"width": 360, "height": 740}
    ) as page:
        draw_everything(page)
        figure = page.locator("#map .plot").bounding_box()
        for title in (".xtitle", ".ytitle", "caption span"):
            box = page.locator(f"#map {title}").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360
            if title != "caption span":
                assert box["y"] >= figure["y"]
                assert box["y"] + box["height"] <= figure["y"] + figure["height"]


def test_short_logarithmic_axes_have_ticks(full):
    """At 1, 2 and 5, in full: the steps of the small run are 1.5 to 12.5."""
    ticks = full.locator("#map .xtick text").all_text_contents()
    assert ticks == ["2", "5", "10"]


@pytest.mark.parametrize("width", [360, 768])
def test_narrow_screens_need_no_scrolling_sideways(full, width):
    full.set_viewport_size({"width": width, "height": 740})
    try:
        until(full, f"document.documentElement.scrollWidth === {width}")
        wide = full.evaluate(
            "[...document.querySelectorAll('main *')].filter((n) => "
            "!n.closest('.scroll, .plot, .hidden') && "
            "n.getBoundingClientRect().right > innerWidth + 1).map((n) => n.className || n.tagName)"
        )
        assert wide == []
    finally:
        full.set_viewport_size({"width": 1200, "height": 900})


def test_everything_can_be_reached_and_seen_with_the_keyboard(full):
    full.evaluate("window.scrollTo(0, 0)")
    full.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(120):
        full.keyboard.press("Tab")
        found = full.evaluate(
            "(() => { const n = document.activeElement; const s = getComputedStyle(n);"
            "return [n.id || n.textContent.slice(0, 20), s.outlineStyle, n.tagName] })()"
        )
        reached.append(found)
        if found[2] == "BODY":
            break
    assert {"theme", "left", "right", "search", "order", "filter", "reason", "cleaning-list"} <= {
        name for name, _, _ in reached
    }
    assert [name for name, outline, tag in reached if outline == "none" and tag != "BODY"] == []
    term = full.locator("dt[data-tip]").first
    term.focus()
    full.keyboard.press("Shift+Tab")
    full.keyboard.press("Tab")
    assert full.inner_text("#tip") == term.get_attribute("data-tip")
    full.keyboard.press("Escape")
    assert "hidden" in full.get_attribute("#tip", "class")


def test_lists_have_roles_and_numbers_have_units(full):
    assert full.locator("[role=listbox]:not([aria-label])").count() == 0
    first = full.locator("#right [role=option]").first.get_attribute("aria-label")
    assert first.count("nats per token") == 1
    bare = full.locator("main .n").evaluate_all(
        "nodes => nodes.filter((n) => !n.closest('[data-tip]') && n.textContent "
        "&& n.tagName !== 'TH').map((n) => n.outerHTML)"
    )
    assert bare == []
    heads = full.locator("th button")
    assert heads.count() > 5
    assert heads.evaluate_all("nodes => nodes.filter((n) => !n.dataset.tip).length") == 0


def test_tables_are_sorted_by_their_heads(full):
    def cells():
        return full.locator("#map tbody td:first-child").all_inner_texts()

    group = full.locator("#map th").first
    group.locator("button").click()
    assert (cells(), group.get_attribute("aria-sort")) == (sorted(cells()), "ascending")
    group.locator("button").click()
    assert (cells(), group.get_attribute("aria-sort")) == (
        sorted(cells(), reverse=True),
        "descending",
    )


def test_all_is_drawn_before_it_is_printed(browser, small):
    """By the keys as by the button; where a browser prints by itself, what is missing is said."""
    missing = ".blocks:not([data-filled])"
    with opened(browser, small, viewport={"width": 1200, "height": 300}) as page:
        assert page.locator(missing).count() > 0
        page.emulate_media(media="print")
        said = f"getComputedStyle(document.querySelector('{missing}'), '::after').content"
        assert "Not drawn yet" in page.evaluate(said)
        page.emulate_media(media="screen")
        count = "document.querySelectorAll('{}').length"
        counts = ", ".join(count.format(each) for each in (missing, ".plot.waiting", ".plot"))
        # A value that is a function would be called at once.
        page.evaluate(f"() => {{ window.print = () => {{ window.printed = [{counts}]; }}; }}")
        page.keyboard.press("Control+p")
        until(page, "window.printed !== undefined")
        assert page.evaluate("window.printed.slice(0, 2)") == [0, 0]
        assert page.evaluate("window.printed[2]") > 0


def test_print_shows_sections_without_controls(full, tmp_path):
    full.emulate_media(media="print")
    full.evaluate("dispatchEvent(new Event('beforeprint'))")
    full.wait_for_timeout(100)
    for hidden in ("nav", ".tools", "#search", "footer"):
        assert not full.locator(hidden).first.is_visible()
    lines = full.locator("#right .line")
    assert lines.count() == 12
    tops = lines.evaluate_all("nodes => nodes.map((n) => n.getBoundingClientRect().top)")
    assert tops == sorted(set(tops))
    assert full.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    middle = "document.querySelector('#heatmap .plot').data[0].colorscale[1][1]"
    until(full, f"{middle} === '#fff'")
    folded = "document.querySelectorAll('.answers details:not([open])').length"
    assert full.evaluate(folded) == 0
    full.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 10_000
    full.emulate_media(media="screen")
    full.evaluate("dispatchEvent(new Event('afterprint'))")
    until(full, f"{middle} !== '#fff'")
    assert full.evaluate(folded) == full.locator(".answers details").count() == 1


def test_paper_does_not_scroll(browser, tmp_path):
    """Bars are printed to the last one, and of a long list it is said how much of it is printed."""
    n, layers = 20, 60
    write_run(tmp_path / "run", rows_of(n))
    modules = np.ones((1, layers, n)) * np.arange(1, n + 1) / layers
    write_scores(tmp_path / "run", modules.sum(1), rows_of(1, "query"), modules=modules)
    write(gather(tmp_path / "run"), tmp_path / "page.html")
    hidden = "(() => { const n = document.querySelector('.bars'); return n.scrollHeight - n.clientHeight })()"
    with opened(browser, tmp_path / "page.html") as page:
        assert page.evaluate(hidden) > 0
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        until(page, "document.querySelectorAll('#right .line').length === 15")
        assert page.evaluate(hidden) == 0
        said = "getComputedStyle(document.getElementById('{}'), '::after').content"
        assert page.evaluate(said.format("right")) == '"The first 15 of 20 are printed."'
        assert page.evaluate(said.format("left")) == "none"


@pytest.mark.parametrize("rows", [1, 3])
def test_runs_of_one_row_and_without_scores(browser, tmp_path, rows):
    write_run(tmp_path / "run", rows_of(rows))
    if rows == 1:
        write_scores(tmp_path / "run", np.array([[0.01]]), rows_of(1, "query"))
    write(gather(tmp_path / "run"), tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        text = page.inner_text("main")
        assert ("No scores yet" in text) == (rows == 3)
        assert page.locator("#pair article").count() == (2 if rows == 1 else 0)


@pytest.mark.slow
def test_ten_thousand_rows_and_five_hundred_queries(browser, tmp_path):
    n, q = 10_000, 500
    rng = np.random.default_rng(0)
    rows = rows_of(n, groups=30)
    for row in rows:
        row["completion"] = " " + " ".join(map(str, rng.integers(0, 5000, 60)))
    write_run(tmp_path / "run", rows)
    values = (rng.standard_t(3, (q, n)) * 1e-3).astype(np.float32)
    own = np.exp(rng.normal(size=n))
    write_scores(tmp_path / "run", values, rows_of(q, "query", 30), self_influence=own)
    written = write(gather(tmp_path / "run"), tmp_path / "page.html")
    assert written.size < 30e6
    with opened(browser, tmp_path / "page.html") as page:
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        assert page.evaluate(paint) < 2000
        assert page.locator("#right .line").count() < 40
        page.fill("#search", "query-499")
        until(page, "document.getElementById('left-count').textContent === '1 query'")
        page.locator("#left .line").click()
        until(page, "document.querySelector('#right-title').textContent.endsWith('query-499')")
        order = np.argsort(-values[499], kind="stable")
        until(page, f"document.querySelector('#right .id').textContent === 'row-{order[0]}'")
        page.focus("#right")
        page.keyboard.press("End")
        until(page, f"location.hash === '#q=499&r={order[-1]}'")
        page.fill("#filter", f"row-{order[5000]}")
        until(page, "document.querySelectorAll('#right .line').length === 1")
        shown = page.locator("#right .score").inner_text()
        assert shown.startswith("≈")
        draw_everything(page)


def test_tokens_and_layers_of_a_pair(browser, tmp_path):
    """Each token's part is the span's colour, sign and hover text; a row that is weak has none."""
    n = 5
    write_run(tmp_path / "run", rows_of(n))
    values = np.array([[4.0, 1, 0.5, -0.5, -3]])
    tokens = np.zeros((1, 3 * n), np.float32)
    tokens[0, :3] = [5, -1, 0]
    layers = np.stack([1.5 * values, -0.5 * values], 1)
    write_scores(
        tmp_path / "run",
        values,
        rows_of(1, "query"),
        tokens=tokens,
        token_ids=np.tile(np.arange(3, dtype=np.int32), n),
        offsets=np.arange(0, 3 * n + 1, 3),
        modules=layers,
    )
    words = (" <b>one</b>", "two", " مرحبا")
    explored = replace(gather(tmp_path / "run"), tokens=lambda id: words[id])
    write(explored, tmp_path / "page.html", detail=1)
    with opened(browser, tmp_path / "page.html") as page:
        spans = page.locator(".tokens span")
        shown = spans.evaluate_all("nodes => nodes.map((n) => [n.textContent, n.className])")
        assert shown == [[words[0], "pos-token"], [words[1], "neg-token"], [words[2], ""]]
        tips = spans.evaluate_all("nodes => nodes.map((n) => n.dataset.tip)")
        assert tips[0].startswith("+5 nats per token")
        shares = spans.evaluate_all(
            "nodes => nodes.map((n) => n.style.getPropertyValue('--share'))"
        )
        assert shares == ["1.00", "0.20", "0.00"]
        bars = page.locator(".bars li")
        assert bars.all_inner_texts() == ["layers.0.q_proj\n+6", "layers.1.q_proj\n−2"]
        widths = bars.locator(".fill").evaluate_all("nodes => nodes.map((n) => n.style.width)")
        assert [float(each.rstrip("%")) for each in widths] == pytest.approx([50, 50 / 3], rel=2e-3)
        page.locator("#right .line").nth(1).click()
        until(page, "document.querySelectorAll('#pair .note').length === 1")
        assert page.locator(".tokens").count() == page.locator(".bars").count() == 0
