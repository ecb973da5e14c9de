"""A directory that appears whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esper.leyline import GrowthError


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that holds something.

    :raises GrowthError: it is no directory, or it is not empty and must not be overwritten.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise GrowthError(f"{target} is no directory; give another one")
    if any(target.iterdir()) and not overwrite:
        raise GrowthError(
            f"{target} is not empty; give another directory, or overwrite=True to replace it"
        )


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Give a directory to fill; on leaving without an error it takes the place of ``target``.

    After an error nothing is left behind, and what was at ``target`` is as it was.

    :raises GrowthError: the disk refuses.
    """
    mark = uuid.uuid4().hex
    fresh, old = (target.with_name(f".{target.name}.{kind}-{mark}") for kind in ("new", "old"))
    try:
        fresh.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        try:
            yield fresh
            _sync(fresh)
            _put_in_place(fresh, target, old)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise GrowthError(f"{target} cannot be written: {error}") from error
    shutil.rmtree(old, ignore_errors=True)


def _put_in_place(fresh: Path, target: Path, old: Path) -> None:
    if target.exists():
        target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _sync_one(target.parent)


def _sync(directory: Path) -> None:
    for path in (*directory.iterdir(), directory):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
