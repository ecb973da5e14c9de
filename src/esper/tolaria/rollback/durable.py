"""Writing so that what was acknowledged survives a kill and a power cut.

A directory is committed by renaming it: its files are synced first, then the directory itself, and
after the rename the directory that holds it.
"""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import xxhash

from esper.leyline import CheckpointError

_TEMPORARY = ".tmp-"
_TRASH = ".trash-"
_CHUNK = 1 << 20


@contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing; on leaving, its content is on the disk."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Bring the entries of a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents; the way to it is on the disk afterwards."""
    path.mkdir(parents=True, exist_ok=True)
    for parent in path.resolve().parents:
        # What this run may not write into, it has made no entry in.
        if not os.access(parent, os.R_OK | os.W_OK):
            break
        sync_directory(parent)


@contextmanager
def committed_directory(final: Path) -> Iterator[Path]:
    """Give a temporary directory to fill; on leaving without an error it becomes ``final``.

    ``final`` must not exist. Every file must have been written through :func:`synced_file`. After
    an error nothing is left behind.
    """
    temporary = final.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        sync_directory(temporary)
        temporary.rename(final)
        sync_directory(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def discard_directory(path: Path) -> None:
    """Take a directory away, with a rename first, so that no half of it is ever seen."""
    trash = path.parent / f"{_TRASH}{uuid.uuid4().hex}"
    try:
        path.rename(trash)
    except FileNotFoundError:
        # A reader, who needs no lock, has set it aside.
        return
    shutil.rmtree(trash, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Remove what killed writers have left. Only the holder of the lock may do this."""
    for entry in directory.iterdir():
        if entry.name.startswith((_TEMPORARY, _TRASH)):
            shutil.rmtree(entry, ignore_errors=True)


def digest_file(path: Path) -> str:
    """Return the xxh3-128 digest of a file, in hexadecimal digits."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


class WriterLock:
    """Keeps a second process from writing into a directory.

    :param directory: holds the lock file.
    :raises CheckpointError: another process holds the lock.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "LOCK"
        self._owner = os.getpid()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise CheckpointError(
                f"{directory} is being written by process {holder or 'unknown'}; "
                "end that run, or use another run directory"
            ) from error
        except OSError:
            os.close(self._descriptor)
            raise
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(self._owner).encode(), 0)

    def release(self) -> None:
        """Let others write, also while forked children still hold the file open."""
        if os.getpid() == self._owner:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


def is_locked(directory: Path) -> bool:
    """Whether a living process writes into a directory."""
    path = directory / "LOCK"
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
