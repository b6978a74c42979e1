"""One question at a time, the model loaded once, and what the page is told meanwhile."""

from __future__ import annotations

import threading

import pytest

from analysis.serving.desk import Busy, Desk
from analysis.serving.questions import Question
from influence.errors import InputError, WorkError
from tests.analysis.serving.conftest import ask, wait


def test_the_model_is_loaded_with_the_first_question_and_once(client, opened, served):
    assert client.get("/api/asked").json() == {"job": 0, "state": "idle"}
    assert not opened
    first = ask(client, prompt="the red fox runs")
    assert first["result"]["own"]
    begun = client.post("/api/explain", json={"job": first["job"], "tokens": [0]})
    assert begun.status_code == 202
    done = wait(client)
    assert (done["job"], done["state"]) == (2, "done")
    assert sorted(done["result"]["rows"]) == list(range(20))
    assert done["result"]["unit"] == "nats per token"
    ask(client, prompt="the red fox runs")
    assert len(opened) == 1


def test_one_question_at_a_time(served):
    going, go = threading.Event(), threading.Event()

    def slow():
        going.set()
        go.wait(20)
        raise InputError("this run is gone")

    desk = Desk(slow)
    desk.ask(Question("the red fox"))
    going.wait(20)
    assert desk.busy
    told = desk.status()
    assert (told["state"], told["doing"]) == ("working", "loading the model, once")
    with pytest.raises(Busy, match="another question is being answered"):
        desk.ask(Question("a lazy dog"))
    go.set()
    for _ in range(2000):
        if not desk.busy:
            break
        threading.Event().wait(0.01)
    assert desk.status()["doing"] == "this run is gone"
    assert desk.status()["state"] == "failed"


def test_a_busy_desk_is_said_over_http(client, monkeypatch):
    def busy(*given):
        raise Busy("another question is being answered: wait until that is done")

    monkeypatch.setattr(Desk, "ask", busy)
    found = client.post("/api/ask", json={"prompt": "a"})
    assert found.status_code == 409
    assert "wait until that is done" in found.json()["error"]


def test_only_the_last_answer_can_be_explained(client):
    found = client.post("/api/explain", json={"job": 1, "tokens": [0]})
    assert found.status_code == 410
    assert "ask again" in found.json()["error"]
    first, second = (ask(client, prompt=text)["job"] for text in ("the red", "a lazy"))
    assert client.post("/api/explain", json={"job": first, "tokens": [0]}).status_code == 410
    for tokens in ([], [999], [-1]):
        assert (
            client.post("/api/explain", json={"job": second, "tokens": tokens}).status_code == 202
        )
        assert wait(client)["state"] == "failed"
    for wrong in (
        {"job": second},
        {"job": "1", "tokens": [0]},
        {"job": second, "tokens": [0.5]},
        {"job": second, "tokens": [True]},
    ):
        assert client.post("/api/explain", json=wrong).status_code == 400
    with pytest.raises(WorkError, match="not at hand"):
        Desk(lambda: None).explain(1, [0])  # type: ignore[arg-type]


def test_whatever_a_model_raises_ends_the_question_alone(served):
    """Also what is no `Exception`: a question that never ends would keep all others waiting."""

    def ends():
        raise SystemExit("gone")

    desk = Desk(ends)
    for _ in range(2):
        desk.ask(Question("the red fox"))
        for _ in range(500):
            if not desk.busy:
                break
            threading.Event().wait(0.01)
        assert (desk.status()["state"], desk.status()["doing"]) == ("failed", "SystemExit: gone")
