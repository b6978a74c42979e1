"""Who may ask the server anything: nobody but a page that was opened by its own address.

A page of another site can send requests to this machine. So the address holds a random token, the
`Host` must be this machine's (a name that was rebound to it is not), what another page sends is
refused by its `Origin`, and nothing here answers to another origin: no header allows it.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Names of this machine that a browser may have in the address.
NAMES = ("127.0.0.1", "localhost")
#: Headers of every answer. `no-referrer`: the address holds the token.
HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
#: The security policy of an answer that brings none of its own.
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
#: What a browser says of a request that a page of this very address makes, or that a person typed.
OWN = ("same-origin", "none")


class Guard:
    """Answers for an application only what came to the right address, and sets the headers.

    Parameters
    ----------
    app
        Sees paths without the token.
    token
        What every path begins with.
    port
        The port that is listened on.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token = app, token.encode()
        self.hosts = {f"{name}:{port}" for name in NAMES}
        if port == 80:
            self.hosts |= set(NAMES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":  # nothing here is a websocket
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Content-Security-Policy", POLICY)
            await send(message)

        answer = self._refusal(scope) or self._inside(scope)
        if isinstance(answer, Response):
            await answer(scope, receive, with_headers)
        else:
            await self.app(answer, receive, with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        """Why a request is not answered; None where it may be."""
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return refused("this server answers to 127.0.0.1 and localhost alone", 403)
        own = f"http://{hosts[0].lower()}"
        if any(origin.lower() != own for origin in origins):
            return refused("another page asked; this server answers to its own page alone", 403)
        if scope["method"] == "POST":
            if len(origins) != 1:
                return refused("a POST must say its Origin, as every browser does", 403)
            if any(site not in OWN for site in headers.getlist("sec-fetch-site")):
                return refused("another page asked; this server answers to its own page alone", 403)
        return None

    def _inside(self, scope: Scope) -> Scope | Response:
        """The request with the token taken off its path, or why it is refused."""
        first, slash, rest = scope["path"].removeprefix("/").partition("/")
        if not hmac.compare_digest(first.encode("utf-8", "surrogatepass"), self.token):
            return refused(
                "this address lacks the token: open the address that analysis serve printed", 403
            )
        if not slash:
            return RedirectResponse(f"/{first}/", 308)
        path = f"/{rest}"
        return {**scope, "path": path, "raw_path": path.encode("utf-8", "surrogatepass")}


def refused(why: str, status: int) -> JSONResponse:
    """An answer that says in plain words why there is no other."""
    return JSONResponse({"error": why}, status)
