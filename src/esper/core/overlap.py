"""One outside call that runs beside the training loop."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from enum import StrEnum
from queue import SimpleQueue
from typing import Generic, TypeVar

from esper.core.deadline import Deadline

Question = TypeVar("Question")
Reply = TypeVar("Reply")


class CallOutcome(StrEnum):
    """How one call ended."""

    OK = "ok"
    LATE = "late"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Answer(Generic[Reply]):
    """The end of one call.

    :param outcome: ``LATE`` when the deadline passed first; the reply is dropped then.
    :param reply: what the function returned, when it was in time.
    :param error: what it raised.
    """

    outcome: CallOutcome
    reply: Reply | None = None
    error: BaseException | None = None


class OverlappedCall(Generic[Question, Reply]):
    """Calls a function on one thread of its own, one call at a time.

    A function that never returns costs this thread and no more: further questions are refused
    while it runs, and the thread does not keep the process alive.

    :param function: called with the question beside the training loop; it must not touch the model.
    :param name: of the thread.
    """

    def __init__(self, function: Callable[[Question], Reply], *, name: str) -> None:
        self._function = function
        self._name = name
        self._questions: SimpleQueue[tuple[Question, Future[tuple[Reply, float]]] | None]
        self._questions = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._future: Future[tuple[Reply, float]] | None = None
        self._deadline: Deadline | None = None

    @property
    def pending(self) -> bool:
        """Whether an answer is still expected."""
        return self._deadline is not None

    def submit(self, question: Question, deadline: Deadline) -> bool:
        """Ask, and return at once.

        :param deadline: an answer after this is dropped.
        :returns: False when the previous call is still running.
        """
        if self._future is not None and not self._future.done():
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        self._future, self._deadline = Future(), deadline
        self._questions.put((question, self._future))
        return True

    def poll(self) -> Answer[Reply] | None:
        """Return the answer once, as soon as there is one or its deadline has passed."""
        if self._deadline is None or self._future is None:
            return None
        if not self._future.done() and not self._deadline.passed:
            return None
        answer = self._answer(self._future, self._deadline)
        self._deadline = None
        return answer

    def wait(self) -> Answer[Reply] | None:
        """Block until the answer is there or its deadline has passed, and return it."""
        if self._deadline is None or self._future is None:
            return None
        try:
            self._future.exception(timeout=max(0.0, self._deadline.remaining))
        except FutureTimeoutError:
            return Answer(CallOutcome.LATE) if self.poll() is not None else None
        return self.poll()

    def close(self) -> None:
        """Let the thread end once it is idle. A call that still runs is left behind."""
        if self._thread is not None:
            self._questions.put(None)
            self._thread = None

    def _answer(self, future: "Future[tuple[Reply, float]]", deadline: Deadline) -> Answer[Reply]:
        if not future.done():
            return Answer(CallOutcome.LATE)
        error = future.exception()
        if error is not None:
            return Answer(CallOutcome.ERROR, error=error)
        reply, finished = future.result()
        return Answer(CallOutcome.LATE) if finished > deadline.at else Answer(CallOutcome.OK, reply)

    def _serve(self) -> None:
        questions = self._questions
        while (item := questions.get()) is not None:
            question, future = item
            try:
                reply = self._function(question)
            except BaseException as error:  # noqa: BLE001 - handed to whoever polls
                future.set_exception(error)
            else:
                future.set_result((reply, time.monotonic()))
