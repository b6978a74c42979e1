"""The server's answers: the page, what it asks of the run, and questions that a person types.

    GET  /                      the page
    GET  /api/...               what analysis.explorer.contract says, and nothing that changes
    GET  /api/asking            how questions are put, the limits, and a question as an example
    GET  /api/asked             what became of the last question
    POST /api/ask               {"prompt", "answer"?, "form"?}: begin to answer; {"job"}
    POST /api/explain           {"job", "tokens"}: begin to explain tokens of that answer; {"job"}

Errors are `{"error": "..."}`. Every path stands behind the token (`analysis.serving.guard`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from analysis.explorer import contract, page
from analysis.explorer.data import Explored
from analysis.explorer.sections import SECTIONS
from analysis.serving.desk import Busy, Desk
from analysis.serving.guard import Guard, refused
from analysis.serving.questions import (
    FORMS,
    MOST_CHARACTERS,
    Question,
    form_of,
)
from influence.console import finite
from influence.errors import InputError, ToolkitError, WorkError
from influence.progress import say

TEMPLATES = Path(__file__).parent / "templates"
#: Bytes of what is posted, at most.
MOST_BYTES = 100_000
#: Lines that are asked for at once, at most; the page asks for what is seen.
MOST_LINES = 2000
#: Characters of the example of a question.
EXAMPLE = 200


class TooLarge(InputError):
    """What was posted is longer than the limit."""


def application(explored: Explored, desk: Desk, *, token: str, port: int) -> ASGIApp:
    """The application of a run, behind its token."""
    answers: dict[str, Callable[[Request], Any]] = {
        "/api/meta": lambda r: contract.meta(explored),
        "/api/search": lambda r: contract.search(
            explored,
            r.query_params.get("kind", ""),
            r.query_params.get("text", "")[:MOST_CHARACTERS],
        ),
        "/api/lines": lambda r: contract.lines(
            explored, r.query_params.get("kind", ""), _indices(r)
        ),
        "/api/query/{q:int}": lambda r: contract.query(explored, r.path_params["q"]),
        "/api/row/{i:int}": lambda r: contract.row(explored, r.path_params["i"]),
        "/api/pair/{q:int}/{i:int}": lambda r: contract.pair(
            explored, r.path_params["q"], r.path_params["i"]
        ),
        "/api/section/{name}": lambda r: contract.section(explored, r.path_params["name"]),
        "/api/asking": lambda r: asking(explored),
        "/api/asked": lambda r: desk.status(),
    }
    posted: dict[str, Callable[[dict[str, Any]], int]] = {
        "/api/ask": lambda given: desk.ask(Question.of(given)),
        "/api/explain": lambda given: desk.explain(*_explanation(given)),
    }
    routes = [
        Route("/", _page(explored), methods=["GET"]),
        *(Route(path, _answered(answer), methods=["GET"]) for path, answer in answers.items()),
        *(Route(path, _begun(begin), methods=["POST"]) for path, begin in posted.items()),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_such})
    return Guard(app, token, port)


def asking(explored: Explored) -> dict[str, Any]:
    """How questions are put to the adapter.

    `form`, a question as an `example`, how many `characters` it may have, and a `note` on which
    adapter answers, mostly empty.
    """
    train, edited = explored.rows.examples, explored.manifest.now
    note = (
        ""
        if edited is None
        else ("The adapter that this run was fitted on answers, as it was before the edits since.")
    )
    found = {"characters": MOST_CHARACTERS, "note": note}
    if train is None or not len(train):
        return {**found, "form": FORMS[0], "example": ""}
    first = train[0]
    asked = [turn.get("content") for turn in first.messages or () if turn.get("role") == "user"]
    example = str(asked[-1] or "") if asked else first.prompt or ""
    return {**found, "form": form_of(train), "example": example[:EXAMPLE]}


def _page(explored: Explored) -> Callable[[Request], Response]:
    """The page with a source that asks this server, made once."""
    scripts = [(TEMPLATES / name).read_text(encoding="utf-8") for name in ("source.js", "ask.js")]
    found = page.built(
        contract.meta(explored),
        SECTIONS["about"].blocks(explored),
        {},
        source=scripts[0],
        connect="'self'",
        scripts=scripts[1:],
    )
    headers = {"Content-Security-Policy": f"{found.policy}; frame-ancestors 'none'"}
    return lambda request: HTMLResponse(found.text, headers=headers)


def _answered(answer: Callable[[Request], Any]) -> Callable[[Request], Response]:
    """An endpoint that reads and changes nothing; starlette runs it in a thread."""

    def endpoint(request: Request) -> Response:
        try:
            return _json(answer(request))
        except ToolkitError as error:
            return refused(str(error), 400)
        except Exception as error:  # none goes further: a traceback could hold a row's text
            return _internal(error)

    return endpoint


def _begun(begin: Callable[[dict[str, Any]], int]) -> Callable[[Request], Any]:
    """An endpoint that begins a job."""

    async def endpoint(request: Request) -> Response:
        try:
            given = await _posted(request)
            return _json({"job": await run_in_threadpool(begin, given)}, 202)
        except TooLarge as error:
            return refused(str(error), 413)
        except Busy as error:
            return refused(str(error), 409)
        except WorkError as error:
            return refused(str(error), 410)
        except ToolkitError as error:
            return refused(str(error), 400)
        except Exception as error:
            return _internal(error)

    return endpoint


async def _posted(request: Request) -> dict[str, Any]:
    """The JSON object that was posted, read no further than the limit."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise InputError("what was posted is no JSON: say Content-Type: application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise TooLarge(f"more than {MOST_BYTES:,} bytes were posted: ask something shorter")
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError("what was posted is no JSON") from error
    if not isinstance(given, dict):
        raise InputError("what was posted is no JSON object")
    return given


def _explanation(given: dict[str, Any]) -> tuple[int, list[int]]:
    """The job and the tokens of an explanation."""
    job, tokens = given.get("job"), given.get("tokens")
    whole = isinstance(tokens, list) and all(type(token) is int for token in tokens)
    if type(job) is not int or not whole or set(given) != {"job", "tokens"}:
        raise InputError('expected {"job": number, "tokens": [numbers]}')
    return job, tokens  # pyright: ignore[reportReturnType]


def _indices(request: Request) -> list[int]:
    text = request.query_params.get("indices", "")
    if not re.fullmatch(r"([0-9]{1,9}(,[0-9]{1,9})*)?", text):
        raise InputError("indices are no whole numbers with commas between them")
    found = [int(part) for part in text.split(",") if part]
    if len(found) > MOST_LINES:
        raise InputError(f"{len(found):,} lines were asked for; at most {MOST_LINES:,} at once")
    return found


def _json(value: Any, status: int = 200) -> Response:
    """A value as JSON, NaN and infinity as null."""
    text = json.dumps(finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Response(text, status, media_type="application/json")


def _no_such(request: Request, error: Exception) -> Response:
    """What starlette itself refuses."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    words = {404: "there is nothing at this address", 405: "this address takes another method"}
    return JSONResponse({"error": words.get(status, "this cannot be answered")}, status)


def _internal(error: Exception) -> Response:
    """What should not happen. The terminal is told the kind alone: texts are private."""
    say(f"note: a request failed ({type(error).__name__})")
    return JSONResponse({"error": f"this failed ({type(error).__name__})"}, 500)
