"""Threads that never keep the process alive, made on demand and kept for a while."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any

_IDLE_S = 5.0

Job = Callable[[], None]


class DaemonThreads:
    """Runs jobs at once, each on a thread of its own; idle threads are used again.

    The threads of ``concurrent.futures`` are joined when the interpreter exits: one stuck job
    would keep the process from ending. These are daemons. How many run is bounded by who submits.

    :param name: prefix of the threads' names.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._idle: list[_Thread] = []
        self._made = 0
        self._closed = False

    def run(self, job: Job) -> None:
        """Start a job; it must not raise."""
        with self._lock:
            thread = self._idle.pop() if self._idle else None
            if thread is None:
                self._made += 1
                thread = _Thread(self, f"{self._name}-{self._made}")
        thread.give(job)

    def close(self, timeout_s: float = 1.0) -> None:
        """Let threads end as soon as they are idle, and wait for those that are."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for thread in idle:
            thread.give(None)
        for thread in idle:
            thread.join(timeout_s)

    def _park(self, thread: "_Thread") -> bool:
        """Take a thread back; False when it should end."""
        with self._lock:
            if not self._closed:
                self._idle.append(thread)
            return not self._closed

    def _retire(self, thread: "_Thread") -> bool:
        """Let an idle thread go; False when it has just been given a job."""
        with self._lock:
            if thread in self._idle:
                self._idle.remove(thread)
                return True
            return False


class DaemonExecutor(ThreadPoolExecutor):
    """Runs what asyncio gives to its default executor; the type is the one that asyncio demands.

    :param threads: that run it.
    """

    def __init__(self, threads: DaemonThreads) -> None:
        super().__init__(1)
        self._daemons = threads

    def submit(
        self,
        function: Callable[..., Any],
        /,
        *arguments: Any,  # noqa: ANN401
        **options: Any,  # noqa: ANN401
    ) -> Future[Any]:
        """Start ``function(*arguments, **options)``."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                value = function(*arguments, **options)
            except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the result
                future.set_exception(error)
            else:
                future.set_result(value)

        self._daemons.run(run)
        return future


class _Thread(threading.Thread):
    def __init__(self, pool: DaemonThreads, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._pool = pool
        self.start()

    def give(self, job: Job | None) -> None:
        self._jobs.put(job)

    def run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_S)
            except Empty:
                if self._pool._retire(self):
                    return
                continue
            if job is None:
                return
            job()
            # Or it would keep arguments and result alive until the next one.
            del job
            if not self._pool._park(self):
                return
