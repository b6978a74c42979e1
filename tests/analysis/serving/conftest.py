"""A tiny run that is served, and a client that asks as its own page would."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

import influence
from analysis.explorer.data import gather
from analysis.serving.app import application
from analysis.serving.desk import Desk
from analysis.serving.server import prepared
from tests.influence.toy_commands import make_folder

TOKEN, PORT = "a-token-of-the-tests", 8765
HOST = f"127.0.0.1:{PORT}"


@pytest.fixture(scope="package")
def served(tmp_path_factory):
    """A folder with a run and its scores, what the page shows of it, and the opened run."""
    folder = make_folder(tmp_path_factory.mktemp("served"))
    run = influence.Run.open(folder / "run", device="cpu")
    return SimpleNamespace(folder=folder, explored=gather(folder / "run"), run=run)


@pytest.fixture
def opened():
    """How often the run was opened."""
    return []


@pytest.fixture
def client(served, opened):
    """A client whose requests are those of the page."""

    def open_run():
        opened.append(1)
        return served.run

    app = application(served.explored, Desk(open_run), token=TOKEN, port=PORT)
    found = TestClient(app, base_url=f"http://{HOST}/{TOKEN}")
    found.headers["origin"] = f"http://{HOST}"
    return found


@pytest.fixture
def running(served):
    serving = prepared(served.explored, lambda: served.run)
    thread = threading.Thread(target=serving.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not serving.server.started and time.monotonic() < end:
        time.sleep(0.01)
    yield serving
    serving.server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def wait(client) -> dict:
    """What became of the last question."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        found = client.get("/api/asked").json()
        if found["state"] != "working":
            return found
        time.sleep(0.02)
    raise AssertionError("the question was not answered")


def ask(client, **question) -> dict:
    """The answer to a question, whose state must be done."""
    begun = client.post("/api/ask", json=question)
    assert begun.status_code == 202, begun.text
    found = wait(client)
    assert found["state"] == "done", found
    assert found["job"] == begun.json()["job"]
    return found
