"""The server itself: a port of this machine alone, the address with its token, and its end."""

from __future__ import annotations

import errno
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.explorer.data import Explored
from analysis.serving.app import application
from analysis.serving.desk import Desk
from influence.errors import InputError
from influence.run import Run

if TYPE_CHECKING:
    import uvicorn

#: The only address that is listened on: nothing outside this machine reaches it.
HOST = "127.0.0.1"
#: Random bytes of the token.
TOKEN_BYTES = 32
#: Seconds that open connections have at the end.
GRACE = 2


@dataclass(frozen=True)
class Prepared:
    """A server whose port is open: its `address` with the token, and the desk of its questions."""

    server: uvicorn.Server
    listening: socket.socket
    address: str
    desk: Desk

    def run(self) -> None:
        """Answer until it is interrupted, or `server.should_exit` is set."""
        try:
            self.server.run(sockets=[self.listening])
        except KeyboardInterrupt:  # which uvicorn hands on when it has closed everything
            pass
        finally:
            self.listening.close()


def prepared(explored: Explored, open_run: Callable[[], Run], *, port: int = 0) -> Prepared:
    """A server of the explorer of a run.

    Parameters
    ----------
    explored
        What the page shows.
    open_run
        Opens the run with its model, when the first question is asked.
    port
        0 chooses a free one.

    Raises `InputError` where the port is not free.
    """
    import uvicorn

    listening = bound(port)
    number = listening.getsockname()[1]
    token = secrets.token_urlsafe(TOKEN_BYTES)
    desk = Desk(open_run)
    config = uvicorn.Config(
        application(explored, desk, token=token, port=number),
        access_log=False,  # addresses hold the token, and searches what is in the rows
        log_level="critical",  # a traceback could hold a row's text
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE,
    )
    return Prepared(uvicorn.Server(config), listening, f"http://{HOST}:{number}/{token}/", desk)


def bound(port: int) -> socket.socket:
    """A socket that listens on a port of this machine alone.

    Raises `InputError` where the port is no port, or is not free.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port} was given; expected 0 (which chooses one) to 65535")
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a server that has just ended
    try:
        found.bind((HOST, port))
        found.listen(128)
    except OSError as error:
        found.close()
        why = {
            errno.EADDRINUSE: "is in use by another program",
            errno.EACCES: "may not be used by this user",
        }.get(error.errno or 0, f"cannot be used ({error.strerror})")
        raise InputError(
            f"port {port} of {HOST} {why}: give another --port, or none, which chooses a free one"
        ) from error
    return found
