"""A program of its own: forks children that have the heavy imports behind them.

It is a process of one thread that imports what it is told and then forks a child for each request,
in milliseconds instead of the seconds that importing torch takes. Python's own fork server is one
for the whole program, whose imports somebody else may have chosen; each of its children runs the
main script anew, which trains a second time where that script has no guard; and its children live
on when the program is killed.

A request is one byte with two descriptors: the child's socket, and a pipe that gets the child's
wait status when it has been reaped. The answer is the child's number and a descriptor of it.
"""

import contextlib
import ctypes
import errno
import importlib
import importlib.util
import os
import select
import signal
import socket
import struct
import sys
import warnings
from types import FrameType

REQUEST = b"f"
ANSWER = struct.Struct("<i")
STATUS = struct.Struct("<i")
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the other end of the control socket is closed, or the program has ended.

    The arguments are the descriptor of that socket and the modules to import.
    """
    descriptor, *preload = sys.argv[1:]
    # Ctrl-C and a group's SIGTERM are for the program to answer; this ends when the program does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _import_installed(preload)
    control = socket.socket(fileno=int(descriptor))
    # A process that the program has forked holds the other end of the socket, too.
    program = os.pidfd_open(os.getppid())
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, _wake_only)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    statuses: dict[int, int] = {}
    # Unlike select, it takes descriptors of any number, and the program may have many open.
    poll = select.poll()
    for each in (control.fileno(), ended, program):
        poll.register(each, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if ended in ready:
            os.read(ended, 4096)
            _reap(statuses)
        if program in ready:
            break
        if control.fileno() in ready and not _answer(control, statuses, [ended, wake, program]):
            break
    for child in statuses:
        _kill_group(child)


def _import_installed(names: list[str]) -> None:
    for name in names:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)


def _answer(control: socket.socket, statuses: dict[int, int], own: list[int]) -> bool:
    """Fork one child; False when nobody is there to ask for one."""
    request, descriptors, _, _ = socket.recv_fds(control, 1, 2)
    if request != REQUEST or len(descriptors) != 2:
        return False
    connection, status = descriptors
    server = os.getpid()
    try:
        child = _fork()
    except OSError as error:
        # Too many processes, or no memory: the calls that run in others go on.
        os.close(connection)
        os.close(status)
        control.send(ANSWER.pack(-(error.errno or errno.EAGAIN)))
        return True
    if child == 0:
        try:
            _become_child(server, control, [*own, status, *statuses.values()])
            _serve_calls(connection)
        finally:
            os._exit(0)
    os.close(connection)
    statuses[child] = status
    process = os.pidfd_open(child)
    with contextlib.suppress(OSError):  # nobody is there any more; the next request shows it
        socket.send_fds(control, [ANSWER.pack(child)], [process])
    os.close(process)
    return True


def _fork() -> int:
    with warnings.catch_warnings():
        # Threads of a numerical library exist, and know about forks; Python has one thread here.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _become_child(server: int, control: socket.socket, descriptors: list[int]) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A child in an endless loop cannot notice that its program was killed; the kernel does.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)
    # What it starts is in its group, and is killed with it.
    os.setpgid(0, 0)
    control.close()
    for descriptor in descriptors:
        os.close(descriptor)


def _serve_calls(connection: int) -> None:
    from esper.core.worker.child import serve

    serve(socket.socket(fileno=connection))


def _reap(statuses: dict[int, int]) -> None:
    while statuses:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return
        # Before it is reaped: until then its number means no other group.
        _kill_group(ended.si_pid)
        child, status = os.waitpid(ended.si_pid, 0)
        pipe = statuses.pop(child, None)
        if pipe is not None:
            with contextlib.suppress(OSError):  # the program no longer wants to know
                os.write(pipe, STATUS.pack(status))
            os.close(pipe)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _wake_only(number: int, frame: FrameType | None) -> None:
    """Do nothing: the wakeup descriptor has told already."""
