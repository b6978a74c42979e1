"""Who is refused: other hosts, other origins, wrong tokens; and what every answer says."""

from __future__ import annotations

import pytest

from analysis.serving.guard import HEADERS
from tests.analysis.serving.conftest import HOST, PORT, TOKEN

OWN = f"http://{HOST}"
ASKED = {"prompt": "the red fox"}


def test_the_page_and_its_questions_are_answered(client):
    for path in ("/", "/api/meta", "/api/asked"):
        assert client.get(path).status_code == 200
    assert (
        client.get(
            "/", headers={"host": f"localhost:{PORT}", "origin": f"http://localhost:{PORT}"}
        ).status_code
        == 200
    )


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
    del client.headers["origin"]
    assert client.get("/api/meta").status_code == 200
    assert client.post("/api/ask", json=ASKED).status_code == 403
    assert (
        client.post(
            "/api/ask", json=ASKED, headers={"origin": OWN, "sec-fetch-site": "cross-site"}
        ).status_code
        == 403
    )
    assert not opened


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


@pytest.mark.parametrize("path", ["/", "/api/meta", "/api/nothing", "/api/query/999", "/../x"])
def test_every_answer_carries_the_headers(client, path):
    for found in (client.get(path), client.get(path, headers={"host": "evil.example"})):
        for name, value in HEADERS.items():
            assert found.headers[name] == value
        policy = found.headers["content-security-policy"]
        assert "default-src 'self'" in policy or "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe-inline" not in policy
        assert not [name for name in found.headers if name.startswith("access-control")]
        assert "set-cookie" not in found.headers
