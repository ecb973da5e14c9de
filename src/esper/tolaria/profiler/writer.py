"""From a recording to a file: written beside training, complete or not there at all."""

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from esper.core.worker import AsyncWorker, WorkerHandle
from esper.leyline import ConfigError, WorkerClosed, WorkerFull
from esper.tolaria.profiler.names import trace_name
from esper.tolaria.profiler.recording import ProfilerError, Recording

_TAIL = 64
# File systems without hard links answer so.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace on disk.

    :param path: the file, in Chrome's JSON format.
    :param steps: that were recorded.
    :param bytes: its size.
    :param milliseconds: that writing it took.
    """

    path: Path
    steps: int
    bytes: int
    milliseconds: float


Done = Callable[[Trace | ProfilerError], None]


class TraceWriter:
    """Writes one trace at a time.

    :param directory: receives the traces; made if it is missing.
    :param run: goes into their names.
    :param worker: writes them on one of its threads; without one the caller's thread does.
    :param timeout_s: seconds that the worker has for one.
    :raises ConfigError: there is no directory, or nothing can be written into it.
    """

    def __init__(
        self,
        directory: Path | str | None,
        run: str,
        worker: AsyncWorker | None = None,
        *,
        timeout_s: float = 60.0,
    ) -> None:
        self.directory = _usable(directory)
        self._sequence = 0
        self._run = run
        self._worker = worker
        self._timeout_s = timeout_s
        self._under_way: tuple[WorkerHandle[Trace], Done] | None = None

    @property
    def busy(self) -> bool:
        """Whether a trace is being written."""
        return self._under_way is not None

    def write(self, recording: Recording, done: Done) -> None:
        """Write what was recorded; ``done`` is called with what came of it, by this or a poll.

        :raises RuntimeError: the trace before is still being written.
        """
        if self._under_way is not None:
            raise RuntimeError("a trace is handed over while the one before is being written")
        path = self.directory / trace_name(self._run, self._sequence)
        self._sequence += 1
        handle = self._submit(recording, path)
        if handle is None:
            done(_outcome_of(lambda: write_trace(recording, path)))
        else:
            self._under_way = handle, done

    def poll(self) -> None:
        """Tell what came of the trace that was being written, once that is known."""
        if self._under_way is not None and self._under_way[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait until the trace has been written, at most until its deadline, and tell."""
        if self._under_way is None:
            return
        handle, done = self._under_way
        self._under_way = None
        done(_outcome_of(handle.result))

    def _submit(self, recording: Recording, path: Path) -> WorkerHandle[Trace] | None:
        if self._worker is None:
            return None
        try:
            return self._worker.submit(
                write_trace,
                recording,
                path,
                timeout_s=self._timeout_s,
                name="tolaria.profiler",
                isolation="thread",
            )
        except (WorkerFull, WorkerClosed):
            # Standing still for the writing is better than losing what was recorded.
            return None


def write_trace(recording: Recording, path: Path) -> Trace:
    """Write a trace under a temporary name, see that it is whole, and give it its name.

    :raises ProfilerError: it could not be written; nothing is left behind.
    """
    began = time.perf_counter()
    temporary = path.with_name(f".{path.name}")
    try:
        recording.save(temporary)
        size = _bring_to_disk(temporary)
        _give_name(temporary, path)
    except (OSError, RuntimeError) as error:
        raise ProfilerError(f"{path} cannot be written: {error}") from error
    finally:
        # Kineto writes under a further name, this one and an ending.
        for left in path.parent.glob(f"{temporary.name}*"):
            with suppress(OSError):
                left.unlink()
    return Trace(path, recording.steps, size, (time.perf_counter() - began) * 1e3)


def _bring_to_disk(path: Path) -> int:
    """Return the size of a file that is whole: kineto does not say so when a write fails."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise OSError(f"torch wrote nothing into {path.parent}; {_space(path.parent)}") from None
    try:
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, _TAIL, max(0, size - _TAIL))
        if not tail.rstrip().endswith(b"}"):
            raise OSError(f"torch wrote only {size:,} bytes of it; {_space(path.parent)}")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size


def _give_name(temporary: Path, path: Path) -> None:
    try:
        # Unlike a rename it takes nobody else's place.
        path.hardlink_to(temporary)
        temporary.unlink()
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        temporary.rename(path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _space(directory: Path) -> str:
    if not directory.is_dir():
        return "the directory is gone"
    status = os.statvfs(directory)
    return f"{status.f_bavail * status.f_frsize:,} bytes are free"


def _outcome_of(work: Callable[[], Trace]) -> Trace | ProfilerError:
    try:
        return work()
    except ProfilerError as error:
        return error
    except Exception as error:  # noqa: BLE001 - whatever is raised is told, and training goes on
        failure = ProfilerError(f"the trace was not written: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure


def _usable(directory: Path | str | None) -> Path:
    if directory is None:
        raise ConfigError("a profiler needs a directory for its traces; for instance 'profiles'")
    path = Path(directory).absolute()
    probe = path / f".probe-{os.getpid()}-{time.time_ns()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"traces cannot be written into {path}: {error}; give the profiler another directory"
        ) from error
    return path
