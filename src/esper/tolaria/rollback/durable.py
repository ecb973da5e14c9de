"""Writing so that what was acknowledged survives a kill and a power cut.

A directory is committed by renaming it: its files are synced first, then the directory itself, and
after the rename the directory that holds it.
"""

import ctypes
import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from esper.leyline import CheckpointError

_TEMPORARY = ".tmp-"
_TRASH = ".trash-"
_CHUNK = 1 << 20
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV}


class FileSystem:
    """Every operation that changes the disk, one method each, so that faults can be put in."""

    def make_directory(self, path: Path) -> None:
        """Make a directory that does not exist."""
        path.mkdir()

    def create(self, path: Path, size: int = 0) -> BinaryIO:
        """Open a new file for writing.

        :param size: bytes that will be written, when known: their space is set aside at once, and
            a full disk is noticed here.
        """
        file = path.open("xb", buffering=_CHUNK)
        try:
            if size >= _CHUNK:
                _set_aside(file.fileno(), size)
        except BaseException:
            file.close()
            raise
        return file

    def append(self, path: Path, data: bytes) -> None:
        """Add bytes to the end of a file, made when it is missing, and bring them to the disk."""
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def start_sync(self, file: BinaryIO, start: int, size: int) -> None:
        """Let the disk begin with a part of a file while more is written; a hint, no promise."""
        file.flush()
        if _sync_file_range is not None:
            _sync_file_range(file.fileno(), start, size, _SYNC_FILE_RANGE_WRITE)

    def sync(self, file: BinaryIO) -> None:
        """Bring the content of a file to the disk."""
        file.flush()
        os.fsync(file.fileno())

    def sync_directory(self, path: Path) -> None:
        """Bring the entries of a directory to the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or directory another name."""
        source.rename(target)

    def unlink(self, path: Path) -> None:
        """Take a file away."""
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        """Take an empty directory away."""
        path.rmdir()


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Return the call of Linux that starts writing back, where there is one."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function


_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = _find_sync_file_range()
DISK = FileSystem()


@contextmanager
def synced_file(path: Path, disk: FileSystem = DISK, *, size: int = 0) -> Iterator[BinaryIO]:
    """Open a new file for writing; on leaving, its content is on the disk.

    :param size: bytes that will be written, when known.
    """
    file = disk.create(path, size)
    try:
        yield file
        if size and file.tell() < size:
            file.truncate()
        disk.sync(file)
    finally:
        # After an error, closing would try to write once more what the disk has just refused.
        with suppress(OSError):
            file.close()


def make_directory(path: Path, disk: FileSystem = DISK) -> None:
    """Make a directory and its missing parents; the way to it is on the disk afterwards."""
    path.mkdir(parents=True, exist_ok=True)
    for parent in path.resolve().parents:
        # What this run may not write into, it has made no entry in.
        if not os.access(parent, os.R_OK | os.W_OK):
            break
        disk.sync_directory(parent)


@contextmanager
def committed_directory(
    final: Path, disk: FileSystem = DISK, *, before_commit: Callable[[], None] | None = None
) -> Iterator[Path]:
    """Give a temporary directory to fill; on leaving without an error it becomes ``final``.

    ``final`` must not exist. Every file must have been written through :func:`synced_file`. After
    an error nothing is left behind.

    :param before_commit: called when all is on the disk but the name; what it raises undoes it.
    """
    temporary = final.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    disk.make_directory(temporary)
    renamed = False
    try:
        yield temporary
        disk.sync_directory(temporary)
        if before_commit is not None:
            before_commit()
        disk.rename(temporary, final)
        renamed = True
        disk.sync_directory(final.parent)
    except BaseException:
        # Whether a rename reached the disk cannot be told when syncing it failed: it is undone, so
        # that what was not acknowledged is not found later.
        remove_tree(final if renamed else temporary, disk)
        raise


def discard_directory(path: Path, disk: FileSystem = DISK) -> None:
    """Take a directory away, with a rename first, so that no half of it is ever seen."""
    trash = path.parent / f"{_TRASH}{uuid.uuid4().hex}"
    try:
        disk.rename(path, trash)
    except FileNotFoundError:
        # A reader, who needs no lock, has set it aside.
        return
    remove_tree(trash, disk)


def remove_tree(path: Path, disk: FileSystem = DISK) -> None:
    """Remove a file, or a directory with all it holds; what cannot be, the next sweep will."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            disk.unlink(path)
            return
        for entry in list(path.iterdir()):
            remove_tree(entry, disk)
        disk.remove_directory(path)


def sweep(directory: Path, disk: FileSystem = DISK) -> None:
    """Remove what killed writers have left. Only the holder of the lock may do this."""
    for entry in list(directory.iterdir()):
        if entry.name.startswith((_TEMPORARY, _TRASH)):
            remove_tree(entry, disk)


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


def _set_aside(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
