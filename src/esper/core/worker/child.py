"""What a child process does: receive a call, run it, send back what came of it."""

import asyncio
import inspect
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from esper.core.worker.call import Call, Isolation, current_call
from esper.core.worker.transport import Message, Packet, encode, receive

# What a child receives: first a search path and a directory, then one of these after another.
Task = tuple[str, float, Callable[..., Any], tuple[Any, ...]]


class RemoteError(Exception):
    """Stands for an exception that cannot be sent between processes; its text tells all of it."""


def serve(connection: socket.socket) -> None:
    """Carry out one call after another, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        search_path, directory = receive(connection).decode()
        sys.path[:] = search_path
        with suppress(OSError):  # it may have been removed
            os.chdir(directory)
        while True:
            _answer(*_run(receive(connection))).send(connection)
    except (EOFError, ConnectionError):
        return


def _run(message: Message) -> tuple[Any, BaseException | None]:
    token = None
    try:
        task: Task = message.decode()
        name, deadline, function, arguments = task
        # The monotonic clock is the machine's: the deadline means the same in every process.
        call = Call(name, Isolation.PROCESS, deadline - time.monotonic(), 0.0, None)
        token = current_call.set(call)
        value = function(*arguments)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
    except BaseException as error:  # noqa: BLE001 - sent to whoever asked for the call
        return None, error
    finally:
        if token is not None:
            current_call.reset(token)
        _flush()
    return value, None


def _answer(value: object, error: BaseException | None) -> Packet:
    if error is None:
        try:
            return Packet(encode((value, None)))
        except TypeError as problem:
            error = TypeError(f"the result {problem}")
        except (OSError, MemoryError) as problem:
            error = problem
    text = "".join(traceback.format_exception(error))
    try:
        error.add_note(f"in the child process:\n{text}")
        message = encode((None, error.with_traceback(None)))
        # Many an exception can be taken apart but not put together again.
        message.decode()
    except Exception:  # noqa: BLE001 - its class may do anything
        message = encode((None, RemoteError(text)))
    return Packet(message)


def _flush() -> None:
    """Write out what was printed: a child that is killed does not come to it."""
    for stream in (sys.stdout, sys.stderr):
        # The function may have closed or replaced it.
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
