"""The desk at which questions are answered: one at a time, in a thread, with what it is at.

The model is loaded with the first question. A page asks now and then how far its question is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from analysis.serving.questions import Answered, Question, answered, explained, ranking
from influence.errors import ToolkitError, WorkError
from influence.progress import say
from influence.run import Run


class Busy(WorkError):
    """Another question is being answered."""


@dataclass(frozen=True)
class Job:
    """A question or explanation: `state` is `working`, `done` or `failed`.

    `doing` says what it is at or why it failed, `began` and `ended` are seconds of a clock, `result`
    is what came out.
    """

    number: int
    state: str
    doing: str
    began: float
    ended: float | None = None
    result: Mapping[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """The job as the page reads it."""
        seconds = (time.monotonic() if self.ended is None else self.ended) - self.began
        return {
            "job": self.number,
            "state": self.state,
            "doing": self.doing,
            "seconds": round(seconds, 1),
            "result": self.result,
        }


class Desk:
    """Answers questions about a run, which is opened by `open_run` with the first of them."""

    def __init__(self, open_run: Callable[[], Run]) -> None:
        self._open_run = open_run
        self._run: Run | None = None
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._answered: tuple[int, Answered] | None = None

    @property
    def busy(self) -> bool:
        """Whether it is at work."""
        return self._job is not None and self._job.state == "working"

    def status(self) -> dict[str, Any]:
        """What became of the last question; `idle` where there was none."""
        job = self._job
        return {"job": 0, "state": "idle"} if job is None else job.record()

    def ask(self, question: Question) -> int:
        """Begin to answer a question; the number of the job."""

        def work(number: int) -> dict[str, Any]:
            found = answered(self._opened(number), question)
            self._answered = number, found
            return found.record()

        return self._begin("reading the question", "answering", work)

    def explain(self, of: int, chosen: list[int]) -> int:
        """Begin to explain some tokens of the answer that job `of` gave; the number of the job.

        Raises `WorkError` where that is not the last answer.
        """
        last = self._answered  # read once: another question may be answered meanwhile
        if last is None or last[0] != of:
            raise WorkError("that answer is not at hand any more: ask again")
        found = last[1]

        def work(number: int) -> dict[str, Any]:
            return ranking(explained(self._opened(number), found, chosen))

        return self._begin("reading the answer", "looking for the rows behind the answer", work)

    def _opened(self, number: int) -> Run:
        """The run with its model, loaded where it is not."""
        if self._run is None:
            self._change(number, doing="loading the model, once")
            self._run = self._open_run()
        self._change(number, doing=self._after_loading)
        return self._run

    def _begin(self, first: str, then: str, work: Callable[[int], dict[str, Any]]) -> int:
        with self._lock:
            if self._job is not None and self._job.state == "working":
                raise Busy("another question is being answered: wait until that is done")
            number = 1 if self._job is None else self._job.number + 1
            self._job = Job(number, "working", first, time.monotonic())
            self._after_loading = then
        thread = threading.Thread(target=self._work, args=(number, work), daemon=True)
        thread.start()
        return number

    def _work(self, number: int, work: Callable[[int], dict[str, Any]]) -> None:
        """Do the work of a job. Whatever goes wrong ends the job, and never the server."""
        try:
            result = work(number)
        except ToolkitError as error:
            self._fail(number, str(error), error)
        except BaseException as error:  # SystemExit too, which a model's own code may raise
            self._fail(number, f"{type(error).__name__}: {error}", error)
        else:
            self._change(number, state="done", doing="", result=result, ended=time.monotonic())

    def _fail(self, number: int, why: str, error: BaseException) -> None:
        """Tell the page why, and the terminal only what kind of error it was: texts are private."""
        say(f"note: question {number} failed ({type(error).__name__}); the page says why")
        self._change(number, state="failed", doing=why, ended=time.monotonic())

    def _change(self, number: int, **changes: Any) -> None:
        with self._lock:
            if self._job is not None and self._job.number == number:
                self._job = replace(self._job, **changes)
