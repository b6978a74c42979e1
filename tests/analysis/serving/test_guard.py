"""Who is refused: other hosts, other origins, wrong tokens; and what every answer says."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from analysis.serving.guard import Guard

TOKEN, PORT = "a-token-of-the-tests", 8765
HOST = f"127.0.0.1:{PORT}"
OWN = f"http://{HOST}"
ASKED = {"prompt": "the red fox"}
#: What every answer says, refusals too; the application here brings no security policy of its own.
EXPECTED = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
}


@pytest.fixture
def opened():
    """The paths of the requests that came through."""
    return []


@pytest.fixture
def client(opened):
    """A client whose requests are those of the page, and an application that answers anything."""

    def answer(request):
        opened.append(request.url.path)
        return PlainTextResponse("answered")

    methods = ["GET", "POST"]
    app = Starlette(routes=[Route("/{path:path}", answer, methods=methods)])
    found = TestClient(Guard(app, TOKEN, PORT), base_url=f"{OWN}/{TOKEN}")
    found.headers["origin"] = OWN
    return found


def test_the_page_and_its_questions_are_answered(client, opened):
    """The application sees paths without the token."""
    assert client.get("/").text == "answered"
    assert client.post("/api/ask", json=ASKED).text == "answered"
    local = f"localhost:{PORT}"
    headers = {"host": local, "origin": f"http://{local}"}
    assert client.get("/api/meta", headers=headers).text == "answered"
    assert opened == ["/", "/api/ask", "/api/meta"]


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        f"evil.example:{PORT}",
        "127.0.0.1",
        f"127.0.0.1:{PORT + 1}",
        f"127.0.0.1.evil.example:{PORT}",
        f"0.0.0.0:{PORT}",
        "",
    ],
)
def test_another_host_is_refused(client, host):
    """A name that was made to point at this machine brings its own Host."""
    for method in ("GET", "POST"):
        found = client.request(method, "/api/meta", headers={"host": host})
        assert found.status_code == 403
        assert "127.0.0.1 and localhost alone" in found.json()["error"]


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        f"https://{HOST}",
        "http://127.0.0.1",
        f"http://127.0.0.1:{PORT + 1}",
        f"http://localhost:{PORT}",
        OWN + ".evil.example",
    ],
)
def test_another_origin_is_refused(client, opened, origin):
    for method, path in (("POST", "/api/ask"), ("GET", "/api/meta"), ("GET", "/")):
        found = client.request(
            method, path, json=ASKED if method == "POST" else None, headers={"origin": origin}
        )
        assert found.status_code == 403
        assert "another page asked" in found.json()["error"]
        assert "access-control-allow-origin" not in found.headers
    assert not opened


def test_a_post_without_an_origin_is_refused(client, opened):
    for more in ({}, {"origin": OWN, "sec-fetch-site": "cross-site"}):
        del client.headers["origin"]
        assert client.post("/api/ask", json=ASKED, headers=more).status_code == 403
        assert not opened
        client.headers["origin"] = OWN
    assert client.post("/api/ask", headers={"sec-fetch-site": "same-origin"}).text == "answered"
    del client.headers["origin"]
    assert client.get("/api/meta").text == "answered"  # which browsers ask without one


@pytest.mark.parametrize(
    "token", ["", "a", TOKEN + "x", TOKEN[:-1], TOKEN.upper(), "%00", "é", f"x/{TOKEN}"]
)
def test_a_wrong_token_is_refused(client, opened, token):
    """With the address of the server, but not of the page."""
    for method in ("GET", "POST"):
        found = client.request(
            method, f"http://{HOST}/{token}/api/ask", json=ASKED if method == "POST" else None
        )
        assert found.status_code == 403
        assert "lacks the token" in found.json()["error"]
    assert not opened


def test_the_token_without_a_slash_leads_to_the_page(client):
    found = client.get(f"http://{HOST}/{TOKEN}", follow_redirects=False)
    assert (found.status_code, found.headers["location"]) == (308, f"/{TOKEN}/")


def test_every_answer_carries_the_headers(client):
    for found in (
        client.get("/"),
        client.get("/", headers={"host": "evil.example"}),
        client.get(f"http://{HOST}/"),
        client.get(f"http://{HOST}/{TOKEN}", follow_redirects=False),
    ):
        for name, value in EXPECTED.items():
            assert found.headers[name] == value
        assert not [name for name in found.headers if name.startswith("access-control")]
        assert "set-cookie" not in found.headers


def test_a_websocket_is_closed(client):
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), client.websocket_connect(f"ws://{HOST}/{TOKEN}/"):
        pass
