"""Child processes that can be killed, whatever the code in them does."""

import asyncio
import errno
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from esper.core.worker import fork_server
from esper.core.worker.call import Call, Isolation
from esper.core.worker.child import RemoteError
from esper.core.worker.threads import Job
from esper.core.worker.transport import Message, Packet, encode, receive
from esper.leyline import ChildDied

_REAPING_S = 5.0
_WARM_UP_S = 60.0
_BITE_S = 0.02


class Child:
    """A process that carries out one call after another.

    :param connection: to it.
    :param number: its process id.
    :param process: a descriptor of the process, which cannot come to mean another one.
    :param status: a pipe with its wait status, once it has been reaped.
    """

    def __init__(self, connection: socket.socket, number: int, process: int, status: int) -> None:
        self.number = number
        self._connection = connection
        self._process = process
        self._status = status
        self._lock = threading.Lock()
        self._gone = False

    def waits(self) -> bool:
        """Whether it waits for a call; one that has ended, or talks unasked, does not."""
        return not _readable(self._connection.fileno(), 0.0)

    def ask(self, packet: Packet, deadline: float = math.inf) -> Message:
        """Send a packet and return the answer.

        :raises TimeoutError: there is none by the deadline.
        :raises EOFError, ConnectionError: the child has ended.
        """
        packet.send(self._connection, deadline)
        return receive(self._connection, deadline)

    def kill(self) -> None:
        """End it at once; it cannot refuse."""
        with self._lock:
            if not self._gone:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._process, signal.SIGKILL)

    def bury(self) -> str:
        """Kill it, wait until it has been reaped, and free what is held of it.

        :returns: how it ended.
        """
        self.kill()
        ended = _readable(self._status, _REAPING_S)
        data = os.read(self._status, fork_server.STATUS.size) if ended else b""
        with self._lock:
            self._gone = True
            self._connection.close()
            os.close(self._process)
            os.close(self._status)
        return _describe(data)


class ForkServer:
    """The process that children are forked from, started when the first one is needed.

    :param preload: modules that it imports once, if they are installed.
    """

    def __init__(self, preload: Sequence[str]) -> None:
        self._preload = list(preload)
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        # The ends of a child that was asked for and has not come: whoever is next gets it.
        self._expected: tuple[socket.socket, int] | None = None
        self._closed = False

    def fork(self, call: Call) -> Child:
        """Return a new child for a call.

        :raises TimeoutError: the server was not ready by the call's deadline.
        :raises asyncio.CancelledError: the call was cancelled meanwhile.
        :raises ChildDied: the server cannot be started.
        """
        self._wait(call, lambda bite: self._lock.acquire(timeout=bite))
        try:
            try:
                return self._ask(call)
            except ConnectionError:
                # Somebody killed it, and its children with it; one new start is worth a try.
                self._stop()
                return self._ask(call)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChildDied(f"the server that forks processes does not work: {error}") from error
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the server; children that are left are killed with it."""
        self._closed = True
        server = self._server
        if server is not None:
            server.kill()
        with self._lock:
            self._stop()

    def _wait(self, call: Call, attempt: Callable[[float], bool]) -> None:
        """Repeat an attempt that blocks for at most so many seconds, until the call is to stop."""
        while not attempt(max(0.0, min(_BITE_S, call.deadline - time.monotonic()))):
            if self._closed:
                raise ChildDied("the worker is closed")
            if call.cancel_asked:
                raise asyncio.CancelledError(f"{call.name} was cancelled")
            if time.monotonic() >= call.deadline:
                raise TimeoutError

    def _ask(self, call: Call) -> Child:
        if self._closed:
            raise ChildDied("the worker is closed")
        control = self._control or self._start()
        if self._expected is None:
            self._expected = self._request(control)
        self._wait(call, lambda bite: _readable(control.fileno(), bite))
        answer, descriptors, _, _ = socket.recv_fds(control, fork_server.ANSWER.size, 1)
        if not answer:
            raise ConnectionError("the server has ended")
        (connection, status), self._expected = self._expected, None
        (number,) = fork_server.ANSWER.unpack(answer)
        if number < 0 or not descriptors:
            connection.close()
            os.close(status)
            # None comes along where the program can open no more files.
            problem = -number if number < 0 else errno.EMFILE
            raise OSError(problem, os.strerror(problem))
        child = Child(connection, number, descriptors[0], status)
        try:
            Packet(encode((sys.path, _directory()))).send(connection)
        except OSError:
            raise ChildDied(f"a new process {child.bury()}") from None
        return child

    def _request(self, control: socket.socket) -> tuple[socket.socket, int]:
        ours, theirs = socket.socketpair()
        status, told = os.pipe()
        try:
            socket.send_fds(control, [fork_server.REQUEST], [theirs.fileno(), told])
        except OSError:
            ours.close()
            os.close(status)
            raise
        finally:
            theirs.close()
            os.close(told)
        return ours, status

    def _start(self) -> socket.socket:
        control, theirs = socket.socketpair()
        # Not with -m: the package imports this module, and it would then exist twice. The search
        # path comes first: the program may have found the package along one of its own.
        path = f"import sys; sys.path[:] = {[str(place) for place in sys.path]!r}"
        code = f"{path}; from {fork_server.__name__} import main; main()"
        command = [sys.executable, "-c", code, str(theirs.fileno()), *self._preload]
        with theirs:
            self._server = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, process_group=0
            )
        self._control = control
        return control

    def _stop(self) -> None:
        if self._expected is not None:
            self._expected[0].close()
            os.close(self._expected[1])
            self._expected = None
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None


class ProcessLane:
    """Carries out calls in children; one that has to be killed is replaced in the background.

    :param preload: modules that each child finds imported.
    :param run_beside: runs a job on a thread of its own.
    """

    def __init__(self, preload: Sequence[str], run_beside: Callable[[Job], None]) -> None:
        self._server = ForkServer(preload)
        self._run_beside = run_beside
        self._lock = threading.Lock()
        self._idle: list[Child] = []
        self._count = 0
        self._replacing = False
        self._closed = False

    @property
    def children(self) -> int:
        """Processes that exist, idle ones included."""
        return self._count

    def carry_out(self, call: Call, packet: Packet) -> Any:  # noqa: ANN401
        """Send a call to a child and return the result.

        :raises TimeoutError: the deadline passed; the child has been killed and reaped.
        :raises asyncio.CancelledError: the call was cancelled; likewise.
        :raises ChildDied: the child ended before it answered.
        :raises Exception: whatever the function raised.
        """
        child = self._idle_child() or self._new_child(call)
        call.on_cancel(child.kill)
        try:
            answer = child.ask(packet, call.deadline)
        except BaseException as problem:  # noqa: BLE001 - whatever it is, the child is lost
            raise self._lose(child, call, problem) from None
        if call.off_cancel():
            self._give_back(child)
        else:
            # The order to kill it may be on its way.
            self._lose(child, call, EOFError())
        try:
            value, error = answer.decode()
        except Exception as problem:
            raise RemoteError(f"the answer of {call.name} cannot be read: {problem!r}") from problem
        if error is None:
            return value
        try:
            raise error
        finally:
            # It knows this frame: without the name there is no cycle to be collected.
            del error

    def warm_up(self) -> None:
        """Start the server and one child in the background."""
        self._replace()

    def stop_replacing(self) -> None:
        """Keep no more children than are busy."""
        self._closed = True

    def close(self) -> None:
        """Kill every idle child and the server, and with it the children that are busy."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for child in idle:
            child.kill()
        for child in idle:
            self._bury(child)
        self._server.close()

    def _idle_child(self) -> Child | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                child = self._idle.pop()
            if child.waits():
                return child
            # Somebody else has killed it.
            self._bury(child)

    def _new_child(self, call: Call) -> Child:
        child = self._server.fork(call)
        with self._lock:
            self._count += 1
        return child

    def _give_back(self, child: Child) -> None:
        with self._lock:
            closed = self._closed
            if not closed:
                self._idle.append(child)
        if closed:
            self._bury(child)

    def _lose(self, child: Child, call: Call, problem: BaseException) -> BaseException:
        """Bury a child and return what to tell of the call."""
        ending = self._bury(child)
        if not self._closed:
            self._replace()
        if call.cancel_asked:
            return asyncio.CancelledError(f"{call.name} was cancelled")
        if isinstance(problem, EOFError | ConnectionError):
            return ChildDied(f"the process of {call.name} {ending} before it answered")
        return problem

    def _bury(self, child: Child) -> str:
        ending = child.bury()
        with self._lock:
            self._count -= 1
        return ending

    def _replace(self) -> None:
        with self._lock:
            if self._idle or self._replacing:
                return
            self._replacing = True
        try:
            self._run_beside(self._add_idle)
        except RuntimeError:
            # There are no more threads to be had; whoever needs a child next starts one.
            self._replacing = False

    def _add_idle(self) -> None:
        call = Call("warm-up", Isolation.PROCESS, _WARM_UP_S, 0.0, None)
        try:
            child = self._new_child(call)
        except (TimeoutError, ChildDied):
            # Whoever needs a child next starts one, and is told if that does not work.
            return
        finally:
            self._replacing = False
        self._give_back(child)


def _readable(descriptor: int, timeout_s: float) -> bool:
    """Wait until there is something to read, or the other end is gone; False when there is not."""
    # Unlike select, it takes descriptors of any number.
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(math.ceil(timeout_s * 1e3)))


def _directory() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return ""


def _describe(status: bytes) -> str:
    if len(status) != fork_server.STATUS.size:
        return "ended"
    (code,) = fork_server.STATUS.unpack(status)
    if os.WIFSIGNALED(code):
        number = os.WTERMSIG(code)
        known = number in set(signal.Signals)
        name = signal.Signals(number).name if known else f"signal {number}"
        hint = " (the system kills so when memory runs out)" if number == signal.SIGKILL else ""
        return f"was ended by {name}{hint}"
    return f"exited with status {os.waitstatus_to_exitcode(code)}"
