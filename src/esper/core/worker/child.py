"""What a child process does: receive a call, run it, send back what came of it."""

import asyncio
import inspect
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from esper.core.worker.call import Call, Isolation, current_call
from esper.core.worker.transport import Message, Packet, encode, receive

# The first object that a child receives.
Place = tuple[list[str], str]
# Each one after that.
Task = tuple[str, float, Callable[..., Any], tuple[Any, ...]]


class RemoteError(Exception):
    """Stands for an exception that cannot be sent between processes; its text tells all of it."""


def serve(connection: socket.socket) -> None:
    """Carry out one call after another, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        search_path, directory = receive(connection)
        sys.path[:] = search_path
        os.chdir(directory)
        while True:
            Packet(_answer(_run(receive(connection)))).send(connection)
    except (EOFError, ConnectionError):
        return


def _run(task: "Task | BaseException") -> tuple[Any, BaseException | None]:
    if isinstance(task, BaseException):
        return None, task
    name, deadline, function, arguments = task
    # The monotonic clock is the machine's: the deadline means the same in every process.
    token = current_call.set(Call(name, Isolation.PROCESS, deadline, 0.0, None))
    try:
        value = function(*arguments)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
    except BaseException as error:  # noqa: BLE001 - sent to whoever asked for the call
        return None, error
    finally:
        current_call.reset(token)
    return value, None


def _answer(ended: tuple[Any, BaseException | None]) -> Message:
    value, error = ended
    if error is None:
        try:
            return encode((value, None))
        except TypeError as problem:
            return encode((None, TypeError(f"the result {problem}")))
    text = "".join(traceback.format_exception(error))
    error.add_note(f"in the child process:\n{text}")
    try:
        message = encode((None, error.with_traceback(None)))
    except TypeError:
        return encode((None, RemoteError(text)))
    return message
