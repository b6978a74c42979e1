"""What the server answers: the contract's JSON, and refusals in plain words."""

from __future__ import annotations

import html
import json
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from starlette.testclient import TestClient

from analysis.explorer import contract
from analysis.explorer.data import gather
from analysis.explorer.texts import Texts
from analysis.serving.app import MOST_BYTES, MOST_LINES, application, asking
from analysis.serving.desk import Desk
from influence.console import finite
from influence.rows import examples_from_rows
from tests.analysis.explorer.helpers import rows_of, write_run, write_scores
from tests.analysis.serving.conftest import HOST, PORT, TOKEN, ask, wait
from tests.helpers import untouched


def test_every_answer_is_that_of_the_contract(client, served):
    explored = served.explored
    expected = {
        "meta": contract.meta(explored),
        "search?kind=rows&text=fox": contract.search(explored, "rows", "fox"),
        "search?kind=queries&text=": list(range(len(explored.queries))),
        "lines?kind=rows&indices=3,0,3": contract.lines(explored, "rows", [3, 0, 3]),
        "lines?kind=rows&indices=": [],
        "query/1": contract.query(explored, 1),
        "row/2": contract.row(explored, 2),
        "pair/1/2": contract.pair(explored, 1, 2),
        "section/map": contract.section(explored, "map"),
    }
    for path, answer in expected.items():
        found = client.get("/api/" + path)
        assert found.status_code == 200, found.text
        assert found.json() == json.loads(json.dumps(finite(answer))), path
    assert expected["search?kind=rows&text=fox"]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("query/4", 400, "position 4 of queries was given; there are 4"),
        ("query/-1", 404, "nothing at this address"),
        ("query/x", 404, "nothing at this address"),
        ("row/20", 400, "position 20 of rows was given; there are 20"),
        ("lines?kind=rows&indices=1,x", 400, "no whole numbers"),
        ("lines?kind=secrets&indices=1", 400, "kind 'secrets' was given"),
        ("lines?kind=rows&indices=" + ",".join(["1"] * (MOST_LINES + 1)), 400, "2,001 lines"),
        ("section/..%2Fsecret", 404, "nothing at this address"),
        ("section/nothing", 400, "section 'nothing' was asked for"),
        ("../../etc/passwd", 403, "lacks the token"),
    ],
)
def test_what_is_not_there_is_said(client, path, status, words):
    found = client.get("/api/" + path)
    assert found.status_code == status
    assert words in found.json()["error"]


@pytest.mark.parametrize("path", ["/", "/api/meta", "/api/nothing", "/api/query/999"])
def test_every_answer_has_a_security_policy(client, path):
    found = client.get(path)
    policy = found.headers["content-security-policy"]
    assert "default-src 'self'" in policy or "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe-inline" not in policy
    assert found.headers["cache-control"] == "no-store"


def test_a_get_changes_nothing(client, served, opened):
    """Neither a file nor the desk, whatever is asked and in whatever way."""
    with untouched(served.folder):
        for path in (
            "/",
            "/api/meta",
            "/api/ask?prompt=x",
            "/api/explain",
            "/api/asked",
            "/api/row/1",
        ):
            for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"):
                found = client.request(method, path)
                assert found.status_code in (200, 405), (method, path)
                if method in ("PUT", "DELETE", "PATCH", "TRACE") or "ask?" in path:
                    assert found.status_code == 405
    assert client.get("/api/asked").json() == {"job": 0, "state": "idle"}
    assert not opened


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no JSON"),
        (b"[1]", "no JSON object"),
        (b"{", "no JSON"),
        (b"[" * 5000, "no JSON"),
        (b"{}", "the key prompt is missing"),
        (b'{"prompt": 5}', "the question is no text"),
        (b'{"prompt": "  "}', "the question is empty"),
        (b'{"prompt": "\\ud800"}', "the question is no text"),
        (b'{"prompt": "a", "answer": ""}', "the answer is empty"),
        (b'{"prompt": "a", "form": "exe"}', "form 'exe' was given"),
        (b'{"prompt": "a", "path": "/etc"}', "keys path were given"),
        (json.dumps({"prompt": "a" * 8001}).encode(), "8,001 characters; at most 8,000"),
    ],
)
def test_a_bad_question_is_refused_before_any_work(client, opened, body, words):
    found = client.post("/api/ask", content=body, headers={"content-type": "application/json"})
    assert found.status_code == 400
    assert words in found.json()["error"]
    assert client.get("/api/asked").json()["state"] == "idle"
    assert not opened


def test_a_form_that_another_page_could_send_is_refused(client, opened):
    """Without a preflight a page of another site can post these types alone."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        found = client.post("/api/ask", content=b'{"prompt": "a"}', headers={"content-type": kind})
        assert found.status_code == 400
        assert "Content-Type: application/json" in found.json()["error"]
    assert not opened


def test_too_long_a_body_is_not_read(client, opened):
    def endless():
        for _ in range(MOST_BYTES):
            yield b"a" * 1000

    found = client.post("/api/ask", content=endless(), headers={"content-type": "application/json"})
    assert found.status_code == 413
    assert "100,000 bytes" in found.json()["error"]
    assert not opened


def test_hostile_text_comes_back_as_text(client, capfd):
    """And neither it nor the answer is told on the terminal."""
    text = 'the red <script>alert("x")</script> fox \u202e'
    found = ask(client, prompt=text, answer=text)
    assert found["result"]["answer"] == text
    raw = client.get("/api/asked")
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["x-content-type-options"] == "nosniff"
    told = "".join(capfd.readouterr())
    assert "script" not in told
    assert "fox" not in told


def test_hostile_names_are_text_on_the_page(served):
    """What of the run is in the page itself, before its script asks for anything."""
    name = "<img src=x onerror=alert(1)>"
    manifest = served.explored.manifest
    manifest = replace(manifest, adapter=replace(manifest.adapter, path=f"/adapters/{name}"))
    found = page_of(replace(served.explored, manifest=manifest))
    assert found.text.count("&lt;img src=x onerror=alert(1)&gt;") >= 3  # title, heading, fact
    assert "<img" not in found.text


def test_the_policy_of_the_page_is_its_header_too(served):
    found = page_of(served.explored)
    header = found.headers["content-security-policy"]
    inside = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', found.text)
    assert inside is not None
    assert header == html.unescape(inside[1]) + "; frame-ancestors 'none'"
    assert "connect-src 'self'" in header


def page_of(explored):
    """The page that is served of a run."""
    app = application(explored, Desk(lambda: None), token=TOKEN, port=PORT)  # type: ignore[arg-type]
    return TestClient(app, base_url=f"http://{HOST}/{TOKEN}").get("/")


def test_what_fails_is_told_to_the_page_alone(client, served, monkeypatch, capfd):
    def fails(*given, **how):
        raise RuntimeError("with the red fox in it")

    monkeypatch.setattr("analysis.serving.desk.answered", fails)
    client.post("/api/ask", json={"prompt": "the red fox"})
    found = wait(client)
    assert (found["state"], found["doing"]) == ("failed", "RuntimeError: with the red fox in it")
    monkeypatch.setattr("analysis.explorer.contract.row", fails)
    answer = client.get("/api/row/1")
    assert (answer.status_code, answer.json()) == (500, {"error": "this failed (RuntimeError)"})
    told = "".join(capfd.readouterr())
    assert "fox" not in told
    assert "question 1 failed (RuntimeError)" in told


def test_questions_are_put_as_the_rows_are(served):
    chat = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Q?"},
            {"role": "assistant", "content": "A"},
        ]
    }
    explored = served.explored
    for row, form, example in (
        (chat, "chat", "Q?"),
        ({"prompt": "P" * 300, "completion": "c"}, "plain", "P" * 200),
        ({"text": "t"}, "plain", ""),
    ):
        found = asking(replace(explored, rows=Texts.of(examples_from_rows([row]))))
        assert (found["form"], found["example"], found["note"]) == (form, example, "")
    assert asking(replace(explored, rows=Texts.named(["a"])))["form"] == "plain"
    edited = replace(explored.manifest, now=object())
    assert "before the edits" in asking(replace(explored, manifest=edited))["note"]


def test_scores_are_read_as_they_are_asked_for(tmp_path):
    """Never the whole matrix: what is held at most is far less than it."""
    count, queries = 4000, 500
    write_run(tmp_path / "run", rows_of(count))
    values = np.random.default_rng(0).normal(size=(queries, count)).astype(np.float32)
    write_scores(tmp_path / "run", values, rows_of(queries, "query"))
    app = application(gather(tmp_path / "run"), Desk(lambda: None), token=TOKEN, port=PORT)  # type: ignore[arg-type]
    client = TestClient(app, base_url=f"http://{HOST}/{TOKEN}")
    client.get("/api/query/0")
    tracemalloc.start()
    for path in ("query/499", "row/3999", "lines?kind=rows&indices=5,6", "pair/1/2"):
        assert client.get("/api/" + path).status_code == 200
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < values.nbytes / 2
    found = client.get("/api/query/7").json()
    np.testing.assert_allclose(found["scores"], np.sort(values[7])[::-1], rtol=1e-4)
