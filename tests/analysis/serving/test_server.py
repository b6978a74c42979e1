"""The port, the address, and a real server asked over a real connection."""

from __future__ import annotations

import re
import socket
import time

import httpx
import pytest

from analysis.serving.server import bound, prepared
from influence.errors import InputError


def test_the_address_holds_a_token_that_nobody_guesses(served):
    addresses = set()
    for _ in range(2):
        serving = prepared(served.explored, lambda: served.run)
        serving.listening.close()
        assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+/[\w-]{43}/", serving.address)
        addresses.add(serving.address.split("/")[3])
    assert len(addresses) == 2


def test_only_this_machine_reaches_it(running):
    name = running.listening.getsockname()
    assert name[0] == "127.0.0.1"
    other = socket.socket()
    other.settimeout(2)
    with pytest.raises(OSError):
        other.connect(("127.0.0.2", name[1]))  # where a server of all addresses would answer
    other.close()


def test_it_answers_its_page_and_refuses_others(running, capfd):
    host = running.address.split("/")[2]
    with httpx.Client(trust_env=False) as web:
        page = web.get(running.address)
        assert page.status_code == 200
        assert "server" not in page.headers
        assert web.get(running.address + "api/meta").json()["rows"] == 20
        assert web.get(f"http://{host}/").status_code == 403
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            found = web.post(running.address + "api/ask", json={"prompt": "a"}, headers=headers)
            assert found.status_code == 403
        allowed = web.post(
            running.address + "api/ask", json={"prompt": "a"}, headers={"Origin": f"http://{host}"}
        )
        assert allowed.status_code == 202
        end = time.monotonic() + 20
        while running.desk.busy and time.monotonic() < end:
            time.sleep(0.02)
        assert running.desk.status()["state"] == "done"
    told = "".join(capfd.readouterr())
    assert running.address.split("/")[3] not in told


def test_a_port_that_is_taken(served):
    first = bound(0)
    port = first.getsockname()[1]
    with pytest.raises(
        InputError, match=rf"port {port} of 127\.0\.0\.1 is in use by another program: give another"
    ):
        prepared(served.explored, lambda: served.run, port=port)
    first.close()
    again = bound(port)
    assert again.getsockname() == ("127.0.0.1", port)
    again.close()


@pytest.mark.parametrize("port", [-1, 65536])
def test_what_is_no_port(port):
    with pytest.raises(InputError, match=f"--port {port} was given; expected 0"):
        bound(port)
