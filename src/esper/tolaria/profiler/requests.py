"""How another process asks a run for a profile: files in a directory of their own.

The request of each asker is a file with a name of its own, so that several queue up. It stays until
the asker goes or has been answered, and so tells whether anybody still waits.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from esper.leyline import EsperError

FOLDER = Path("profiles") / "requests"
MOST_STEPS = 1000
_REQUEST = re.compile(r"request-(\d+-\d+)\.json")


class Request(msgspec.Struct, frozen=True):
    """What is asked for.

    :param steps: to be recorded.
    :param expires: seconds since the Unix epoch after which nobody waits any more.
    """

    steps: int
    expires: float


class Reply(msgspec.Struct, frozen=True):
    """What came of it.

    :param path: of the trace; empty when there is none.
    :param steps: that it holds.
    :param bytes: its size.
    :param error: why there is no trace.
    """

    path: str = ""
    steps: int = 0
    bytes: int = 0
    error: str = ""


class RequestError(EsperError):
    """A request cannot be left, read or answered."""


class RequestBox:
    """The directory of one run through which profiles are asked for.

    :param run: directory of the run.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER

    def open(self) -> None:
        """Make the directory, and take away answers that nobody has fetched.

        :raises OSError: it cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for answer in self.folder.glob("answer-*"):
            if not self._request(answer.stem.removeprefix("answer-")).exists():
                answer.unlink(missing_ok=True)

    def close(self) -> None:
        """Take the directory away, and that of the traces, where there is nothing in them."""
        with suppress(OSError):
            self.folder.rmdir()
            self.folder.parent.rmdir()

    def ask(self, steps: int, timeout_s: float) -> str:
        """Leave a request; return the name it goes by.

        :raises RequestError: it cannot be written.
        """
        name = f"{time.time_ns()}-{os.getpid()}"
        request = Request(steps, time.time() + timeout_s)
        try:
            self._put(self._request(name), request)
        except OSError as error:
            raise RequestError(f"no request can be left in {self.folder}: {error}") from error
        return name

    def fetch(self, name: str) -> Reply | None:
        """Return the answer to a request, once there is one.

        :raises RequestError: it cannot be read.
        """
        try:
            return msgspec.json.decode(self._answer(name).read_bytes(), type=Reply)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise RequestError(f"{self._answer(name)} cannot be read: {error}") from error

    def forget(self, name: str) -> None:
        """Take back a request, and its answer if there is one."""
        self._request(name).unlink(missing_ok=True)
        self._answer(name).unlink(missing_ok=True)

    def waiting(self) -> list[str]:
        """Return the names of the requests that are there, oldest first.

        :raises OSError: the directory cannot be read.
        """
        with os.scandir(self.folder) as entries:
            return sorted(self._names(entry.name for entry in entries))

    def read(self, name: str) -> Request | None:
        """Return a request; None when nobody waits for it any more.

        :raises RequestError: it is no valid request; it is taken away.
        """
        path = self._request(name)
        try:
            request = msgspec.json.decode(path.read_bytes(), type=Request)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise RequestError(f"{path} cannot be read: {error}") from error
        if time.time() > request.expires:
            self.forget(name)
            return None
        return request

    def answer(self, name: str, reply: Reply) -> None:
        """Say what came of a request, if anybody still waits.

        :raises RequestError: it cannot be written.
        """
        request = self._request(name)
        try:
            if request.exists():
                self._put(self._answer(name), reply)
                request.unlink(missing_ok=True)
        except OSError as error:
            raise RequestError(f"{request} cannot be answered: {error}") from error

    def _put(self, path: Path, content: Request | Reply) -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(content))
        temporary.rename(path)

    def _request(self, name: str) -> Path:
        return self.folder / f"request-{name}.json"

    def _answer(self, name: str) -> Path:
        return self.folder / f"answer-{name}.json"

    @staticmethod
    def _names(entries: Iterable[str]) -> Iterator[str]:
        for entry in entries:
            match = _REQUEST.fullmatch(entry)
            if match is not None:
                yield match[1]
