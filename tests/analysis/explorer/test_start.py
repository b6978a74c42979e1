"""What a person sees first who has never heard of influence: the page's subject, ways in, an example."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from analysis.explorer import contract, score_tables, start
from analysis.explorer.data import gather
from analysis.explorer.page import write
from tests.analysis.browser import needs_chromium
from tests.analysis.explorer.helpers import rows_of, write_run, write_scores
from tests.analysis.explorer.test_browser import chosen, opened, until

#: What the first screen of a page is at least.
SCREEN = {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def small(world):
    path = world.root / "first-screen.html"
    write(world.explored, path, overwrite=True)
    return path


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A run without anything, in a folder that a shell and a browser could take for something."""
    root = tmp_path_factory.mktemp("bare")
    write_run(root / "<b>it's</b> `a` run", rows_of(2))
    explored = gather(root / "<b>it's</b> `a` run")
    write(explored, root / "page.html")
    return explored, root / "page.html"


def first_shown(folder, values, **options) -> tuple[int, int]:
    """The query that a page of these scores begins with, and of how many it was chosen."""
    write_run(folder / "run", rows_of(values.shape[1]))
    write_scores(folder / "run", values, rows_of(len(values), "query"), **options)
    meta = contract.meta(gather(folder / "run"))
    return meta["first"], meta["first_of"]


VALUES = np.array([[0.1, -9, 0.2], [0.3, 0.2, np.nan], [0.0, -0.4, 0.1], [np.nan] * 3])


@pytest.mark.parametrize(
    ("options", "query"),
    [
        ({}, 1),
        ({"rises": False}, 0),  # a fall is what harms then
        ({"kept": 1, "name": "strongest.h5"}, 1),
        ({"kept": 1, "name": "strongest.h5", "rises": False}, 0),
    ],
)
def test_the_query_that_a_row_helps_most_is_shown_first(tmp_path, options, query):
    values = VALUES if "kept" not in options else np.nan_to_num(VALUES)
    assert first_shown(tmp_path, values, **options) == (query, 4)


def test_a_query_to_begin_with_where_there_is_little_to_choose(tmp_path, monkeypatch):
    assert first_shown(tmp_path / "a", np.full((2, 2), np.nan)) == (0, 0)
    harmed = np.array([[-1.0, -2.0], [-0.5, -2.0]])
    assert first_shown(tmp_path / "harmed", harmed) == (0, 0)
    assert first_shown(tmp_path / "kept", harmed, kept=1, name="strongest.h5") == (0, 0)
    monkeypatch.setattr(score_tables, "AT_ONCE", 4)  # a query of three rows
    assert first_shown(tmp_path / "parts", VALUES) == (1, 4)
    monkeypatch.setattr(score_tables, "LOOKED_AT", 3)
    assert first_shown(tmp_path / "b", VALUES) == (0, 1)
    monkeypatch.setattr(score_tables, "LOOKED_AT", 2)
    assert first_shown(tmp_path / "c", VALUES) == (0, 1)
    strongest = np.nan_to_num(VALUES)
    assert first_shown(tmp_path / "d", strongest, kept=1, name="strongest.h5") == (1, 4)


@needs_chromium
def test_of_how_many_the_first_query_was_chosen_is_said(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(score_tables, "LOOKED_AT", 6)
    write_run(tmp_path / "run", rows_of(3))
    write_scores(tmp_path / "run", np.nan_to_num(VALUES), rows_of(4, "query"))
    write(gather(tmp_path / "run"), tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        said = "4 queries; chosen first: the one of the first 2 that a row helps most"
        assert page.inner_text("#left-count") == said
    monkeypatch.undo()
    write_run(tmp_path / "harmed", rows_of(2))
    write_scores(tmp_path / "harmed", np.array([[-1.0, -2.0]] * 2), rows_of(2, "query"))
    write(gather(tmp_path / "harmed"), tmp_path / "harmed.html")
    with opened(browser, tmp_path / "harmed.html") as page:
        assert page.inner_text("#left-count") == "2 queries"


@pytest.mark.parametrize("name", ["line\nend", "turned\u202eround", "-x y", "old ids.txt"])
def test_a_command_names_the_run_or_leaves_it_to_the_reader(tmp_path, name):
    """A name that cannot be seen as it is would be copied as another one."""
    write_run(tmp_path / name, rows_of(2))
    explored = gather(tmp_path / name)
    shown = f"--run '{tmp_path / name}'" if name.isprintable() else "--run RUN"
    assert start.after_export(explored) == (f"unlearn remove {shown} --ids-file ", " --dry-run")
    assert shown in "".join(start.how(explored, "queries"))


def test_three_ways_in(world, bare):
    ways = contract.meta(world.explored)["ways"]
    assert [way["section"] for way in ways] == ["queries", "cleaning", None]
    assert ways[1]["says"][0].startswith("4 entries, with reasons.")
    assert ways[2]["says"][1].startswith("unlearn remove --run ")
    for count, says in ((0, "The list is empty"), (1, "1 entry, with")):
        listed = replace(world.explored, cleaning=[*world.explored.cleaning][:count])
        assert contract.meta(listed)["ways"][1]["says"][0].startswith(says)
    lacking = contract.meta(bare[0])
    assert [way["section"] for way in lacking["ways"]] == [None] * 3
    assert not set(lacking["missing"]) & set(start.WAYS)  # said once


def test_settings_stand_below_what_is_decided_by(world):
    names = [name for name, _ in contract.meta(world.explored)["sections"]]
    assert (names[0], names[-1]) == ("queries", "about")


@needs_chromium
def test_a_query_and_its_strongest_rows_are_in_sight(browser, small, world):
    query = int(world.values.max(1).argmax())
    best = int(world.values[query].argmax())
    assert query != 0  # it is chosen, not the first by chance
    with opened(browser, small, viewport=SCREEN) as page:
        assert chosen(page, "left") == f"query-{query}"
        assert chosen(page, "right") == f"row-{best}"
        assert page.evaluate("scrollY") == 0
        lines = page.locator("#right .line").evaluate_all(
            "nodes => nodes.map((n) => n.getBoundingClientRect().bottom)"
        )
        assert sum(bottom <= SCREEN["height"] for bottom in lines) >= 5
        assert page.inner_text("#right-of").startswith(f"What is number {query} of the query")
        assert (
            page.inner_text("#left-count")
            == "4 queries; chosen first: the one that a row helps most"
        )
        lead = page.inner_text(".lead")
        for word in ("tiny-adapter", "12 rows", "4 queries", "question"):
            assert word in lead
        expert = ("damping", "curvature", "geometry", "SHA", "solver", "digest")
        seen = page.evaluate(
            "[...document.querySelectorAll('main *')].filter((n) => !n.children.length && "
            "n.getBoundingClientRect().top < innerHeight).map((n) => n.textContent).join(' ')"
        )
        assert [word for word in expert if word in seen] == []
        assert page.locator("#about dt", has_text="damping").count() == 1
        page.fill("#search", "query")
        until(page, "document.getElementById('left-count').textContent === '4 queries'")


@needs_chromium
def test_an_address_goes_before_the_query_to_begin_with(browser, small):
    with opened(browser, small) as page:
        page.goto(small.as_uri() + "#q=0&r=3")
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert (chosen(page, "left"), chosen(page, "right")) == ("query-0", "row-3")


@needs_chromium
def test_what_a_number_means_stands_before_the_first_one(browser, small, tmp_path):
    with opened(browser, small, viewport=SCREEN) as page:
        said = page.locator("#queries > p").first
        text = said.inner_text()
        for word in (
            "+ blue: the row helps",
            "− red: it harms",
            "nats per token",
            "halves",
            "if that row alone",
        ):
            assert word in text
        first = page.locator("#right .score").first.bounding_box()
        assert said.bounding_box()["y"] < first["y"] < SCREEN["height"]
    values = np.array([[1.0, -2.0]])
    write_run(tmp_path / "run", rows_of(2))
    write_scores(
        tmp_path / "run", values, rows_of(1, "query"), rises=False, measurement="odds", unit="bits"
    )
    write(gather(tmp_path / "run"), tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        text = page.locator("#queries > p").first.inner_text()
        for word in ("− blue: the row helps", "+ red: it harms", "the query's odds", "in bits"):
            assert word in text
        assert "halves" not in text
        assert page.locator("#right .score").first.inner_text().startswith("−2")


@needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", ["queries", "cleaning", "map", "about"])
def test_a_jump_ends_where_it_should(browser, small, width, name):
    """Also where what stands above is filled on the way; by keys; and until the reader moves on."""
    with opened(browser, small, viewport={"width": width, "height": 740}) as page:
        page.locator(f".ways [href='#{name}'], nav [href='#{name}']").first.focus()
        page.keyboard.press("Enter")
        place = f"document.getElementById('{name}').getBoundingClientRect().top"
        end = "document.documentElement.scrollHeight - scrollY - innerHeight"
        page.wait_for_timeout(700)  # what is filled on the way is filled, and figures are drawn
        top, bottom = page.evaluate(place), page.evaluate(end)
        assert -1 <= top < 110 or (top > 0 and bottom < 2)
        page.mouse.move(100, 400)
        page.mouse.wheel(0, -150)
        page.wait_for_timeout(300)
        page.evaluate("document.getElementById('start').style.paddingBottom = '60px'")
        page.wait_for_timeout(200)
        assert page.evaluate(place) > top + 40  # it is not pulled back


@needs_chromium
def test_what_a_run_lacks_is_said_with_its_command(browser, bare):
    explored, path = bare
    quoted = str(explored.directory).replace("'", "'\"'\"'")
    with opened(browser, path, viewport=SCREEN) as page:
        ways = page.locator(".ways li")
        assert page.locator(".ways a, .ways b").count() == 0
        commands = ways.locator("code:first-of-type").all_inner_texts()
        assert commands == [
            f"influence score --run '{quoted}' --queries QUERIES",
            f"analysis clean --run '{quoted}' --queries GOOD --out DIR",
            f"unlearn remove --run '{quoted}' --ids-file FILE --out ADAPTER",
        ]
        assert "2 rows. This page tells what each of them did. Nothing" in page.inner_text(".lead")
        assert page.locator("#about code").count() > 2


@needs_chromium
def test_one_row_and_one_query_are_one(browser, tmp_path):
    write_run(tmp_path / "run", rows_of(1))
    write_scores(tmp_path / "run", np.array([[0.5]]), rows_of(1, "query"))
    write(gather(tmp_path / "run"), tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        lead = page.inner_text(".lead")
        assert "1 row. This page tells what that row did to 1 query: a question with its" in lead
        assert page.inner_text("#left-count") == "1 query"


@needs_chromium
def test_after_ids_are_saved_the_next_command_is_said(browser, small, world):
    with opened(browser, small) as page:
        for button in ("#export", "#untick", "#next"):
            assert not page.is_visible(button)
        page.locator("#right .tick").first.click()
        assert page.is_visible("#export")
        assert not page.is_visible("#next")
        names = []
        for number in (0, 1):  # another choice has another name
            if number:
                page.locator("#right .tick").nth(number).click()
            with page.expect_download() as download:
                page.click("#export")
            names.append(download.value.suggested_filename)
            until(page, "!document.getElementById('next').hidden")
            run = str(world.directory.resolve())
            command = f"unlearn remove --run {run} --ids-file {names[-1]} --dry-run"
            assert command in page.inner_text("#next")
        assert names[0] != names[1]
        page.click("#untick")
        assert not page.is_visible("#next")
        assert page.evaluate("document.activeElement.id") == "theme"


@needs_chromium
def test_on_a_narrow_screen_ids_are_exported_from_where_rows_are_ticked(browser, small):
    with opened(browser, small, viewport={"width": 360, "height": 640}) as page:
        page.locator("#right .tick").first.click()
        assert page.evaluate("scrollY") > 0  # the head is above
        for part in ("#export", "#next"):
            box = page.locator(part).bounding_box()
            assert box["y"] > 0
            assert box["y"] + box["height"] <= 640
            with page.expect_download():
                page.click("#export")
            until(page, "!document.getElementById('next').hidden")


@needs_chromium
def test_reasons_are_said_in_words(browser, small):
    with opened(browser, small) as page:
        page.locator("#cleaning").scroll_into_view_if_needed()
        page.wait_for_selector("#cleaning-list .line")
        options = page.locator("#reason option").all_inner_texts()
        assert options[1] == "duplicate: says the same as another row (2)"
        tip = page.locator("#cleaning-list .chip").first.get_attribute("data-tip")
        assert tip == "says the same as another row"
