"""Tier 2: durable checkpoints that survive kills and power cuts, and are verified before use."""

import math
import re
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from esper.core.worker import allocate_shared
from esper.leyline import CheckpointError
from esper.tolaria.rollback.durable import (
    DISK,
    FileSystem,
    WriterLock,
    committed_directory,
    discard_directory,
    make_directory,
    sweep,
)
from esper.tolaria.rollback.generation import (
    CheckpointInfo,
    Label,
    describe,
    generations,
    is_pinned,
    name_of,
    read_generation,
    set_pin,
    step_of,
    verify_generation,
    write_generation,
)
from esper.tolaria.rollback.journal import Entry, Journal
from esper.tolaria.rollback.manifest import Manifest, UnknownFormatError, read_manifest
from esper.tolaria.rollback.retention import Candidate, Retention
from esper.tolaria.rollback.tensor_file import Allocate
from esper.tolaria.state import Capturable, Capture

_DAMAGED = ".damaged"
_REASON_LENGTH = 48


class Content(Protocol):
    """Whatever has a state to save: the live state, or a snapshot of it."""

    def capture(self) -> Capture:
        """Return the state."""
        ...


@dataclass(frozen=True)
class CheckpointReport:
    """Whether one checkpoint can be trusted.

    :param problem: what is wrong with it; empty when nothing is.
    """

    step: int
    path: Path
    problem: str

    @property
    def valid(self) -> bool:
        """Whether everything in it matches its digest."""
        return not self.problem


class CheckpointStore:
    """A directory of checkpoints with one writer. It is not for several threads at a time.

    :param directory: made when the first checkpoint is saved.
    :param keep: which checkpoints are kept; a number keeps so many of the newest, and the newest
        healthy one always.
    :param disk: carries out what changes the disk.
    :raises ConfigError: ``keep`` is below 1.
    """

    def __init__(
        self, directory: Path, *, keep: int | Retention = 3, disk: FileSystem = DISK
    ) -> None:
        self.directory = directory
        self._retention = keep if isinstance(keep, Retention) else Retention(keep)
        self._disk = disk
        self._lock: WriterLock | None = None
        self._journal = Journal(directory, disk)
        self._journal_open = False

    def open(self) -> str:
        """Take the directory for writing now, instead of at the first save.

        :returns: what keeps it from being written; empty when nothing does.
        :raises CheckpointError: another process writes there.
        """
        try:
            self._acquire()
        except OSError as error:
            return f"{self.directory} cannot be written: {error}"
        return ""

    def save(
        self,
        state: Content,
        *,
        step: int | None = None,
        healthy: bool = True,
        metrics: Mapping[str, float] | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> CheckpointInfo:
        """Write a checkpoint; when this returns, it is on the disk and was read back.

        :param state: the live state, or a snapshot that is held.
        :param step: steps taken so far; a checkpoint of the same step is replaced. By default one
            more than the newest has.
        :param healthy: False when the divergence guard doubts the state.
        :param metrics: validation metrics of the state; one that is not finite is left out.
        :param before_commit: called when all is on the disk but the name; what it raises undoes it.
        :raises CheckpointError: it could not be written; older checkpoints are untouched.
        """
        began = time.perf_counter()
        label = _label(self.directory, step, healthy, metrics or {})
        try:
            self._acquire()
            final, manifest = self._write(state, label, before_commit)
        except OSError as error:
            self._tell("failed", step=label.step, reason=str(error))
            raise CheckpointError(
                f"cannot save a checkpoint in {self.directory}: {error}"
            ) from error
        latency_ms = (time.perf_counter() - began) * 1e3
        problem = self._tell("saved", final, label.step, data={"latency_ms": latency_ms})
        return describe(final, manifest, latency_ms, self._retire(final) or problem)

    def load_latest(self, state: Capturable, *, before_step: int | None = None) -> CheckpointInfo:
        """Restore the newest valid checkpoint; damaged ones are set aside and passed over.

        Everything is verified before the live state is touched.

        :param before_step: only checkpoints of this step or an earlier one are considered.
        :raises CheckpointError: there is none, naming what was tried.
        :raises StateError: the checkpoint is of another model or optimizer.
        """
        info, capture = self.read_latest(before_step=before_step)
        state.restore(capture)
        return info

    def read_latest(
        self, *, before_step: int | None = None, allocate: Allocate | None = None
    ) -> tuple[CheckpointInfo, Capture]:
        """Read the newest valid checkpoint without restoring it; see :meth:`load_latest`.

        :param allocate: gives the memory for the tensors; this process's own by default.
        :raises CheckpointError: there is none, naming what was tried.
        """
        began = time.perf_counter()
        problems: dict[Path, str] = {}
        while path := _newest(self.directory, before_step, problems):
            try:
                manifest, capture = read_generation(path, allocate)
            except CheckpointError as error:
                # What a newer Esper wrote is not ours to move; only damage is set aside.
                foreign = isinstance(error, UnknownFormatError)
                problems[path] = str(error) + ("" if foreign else self._set_aside(path, error))
                continue
            return describe(path, manifest, (time.perf_counter() - began) * 1e3), capture
        tried = "; ".join(problems.values()) or "there is none"
        limit = "" if before_step is None else f" of step {before_step} or earlier"
        raise CheckpointError(f"no valid checkpoint{limit} in {self.directory}: {tried}")

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: they belong to a course that was taken back.

        :raises CheckpointError: one cannot be deleted.
        """
        if problem := self.open():
            raise CheckpointError(problem)
        for path in generations(self.directory):
            if step_of(path) > step:
                problem = self._delete(path, f"training went back to step {step}")
                if problem:
                    raise CheckpointError(problem)

    def pin(self, step: int, *, pinned: bool = True) -> CheckpointInfo:
        """Keep the newest checkpoint of a step for good, or let it go again.

        :raises CheckpointError: there is none of this step, or it cannot be marked.
        """
        for info in self.list():
            if info.step == step:
                break
        else:
            raise CheckpointError(f"there is no checkpoint of step {step} in {self.directory}")
        try:
            self._acquire()
            set_pin(info.path, pinned, self._disk)
        except OSError as error:
            raise CheckpointError(f"cannot mark {info.path}: {error}") from error
        problem = self._tell("pinned" if pinned else "unpinned", info.path, step)
        return describe(info.path, read_manifest(info.path), 0.0, problem)

    def verify(self) -> list[CheckpointReport]:
        """Check every checkpoint against its digests, newest first; nothing is changed."""
        return [
            CheckpointReport(step_of(path), path, _problem(path))
            for path in generations(self.directory)
        ]

    def list(self) -> list[CheckpointInfo]:
        """List the checkpoints whose manifest can be read, newest first."""
        infos = []
        for path in generations(self.directory):
            # verify() is what tells about damage.
            with suppress(CheckpointError):
                infos.append(describe(path, read_manifest(path), 0.0))
        return infos

    def history(self) -> Sequence[Entry]:
        """Return what has happened to checkpoints of this directory, oldest first.

        :raises CheckpointError: the journal is there and cannot be read.
        """
        try:
            return self._journal.read()
        except OSError as error:
            raise CheckpointError(f"the journal cannot be read: {error}") from error

    def close(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            self._journal_open = False

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(
        self, state: Content, label: Label, before_commit: Callable[[], None] | None
    ) -> tuple[Path, Manifest]:
        same = [path for path in generations(self.directory) if step_of(path) == label.step]
        final = self.directory / name_of(label.step, same)
        with committed_directory(final, self._disk, before_commit=before_commit) as directory:
            manifest = write_generation(directory, state.capture(), label, self._disk)
            # Whatever is deleted later, this checkpoint is known to be good by then.
            _read_back(directory)
        return final, manifest

    def _acquire(self) -> None:
        if self._lock is None:
            make_directory(self.directory, self._disk)
            self._lock = WriterLock(self.directory)
            sweep(self.directory, self._disk)

    def _tell(
        self,
        event: str,
        path: Path | None = None,
        step: int = -1,
        reason: str = "",
        data: dict[str, float] | None = None,
    ) -> str:
        """Add a line to the journal; return what kept it from being written.

        The directories are the truth: a line that is missing is made up for at the next one.
        """
        if self._lock is None:
            return ""
        name = "" if path is None else path.name
        try:
            if not self._journal_open:
                there = {p.name: step_of(p) for p in generations(self.directory) if p != path}
                self._journal.open(there)
            self._journal_open = True
            self._journal.append(event, name, step, reason=reason, data=data or {})
        except OSError as error:
            self._journal_open = False
            return f"the journal cannot be written: {error}"
        return ""

    def _delete(self, path: Path, reason: str) -> str:
        """Delete a checkpoint; return what kept it from being deleted."""
        try:
            discard_directory(path, self._disk)
        except OSError as error:
            return f"cannot delete {path}: {error}"
        return self._tell("deleted", path, step_of(path), reason)

    def _retire(self, saved: Path) -> str:
        """Delete what is not kept; return what kept something from being deleted."""
        same = [
            path
            for path in generations(self.directory)
            if step_of(path) == step_of(saved) and path != saved and not is_pinned(path)
        ]
        problems = [self._delete(path, "it was saved again") for path in same]
        candidates = [
            Candidate(info.path, info.step, info.healthy, info.pinned, info.metrics)
            for info in self.list()
        ]
        problems += [
            self._delete(path, "newer ones are kept")
            for path in self._retention.superfluous(candidates, saved)
        ]
        return next(filter(None, problems), "")

    def _set_aside(self, path: Path, problem: CheckpointError) -> str:
        """Rename a damaged checkpoint; return what to add to its problem if that fails."""
        try:
            self._disk.rename(path, _aside(path, str(problem)))
        except OSError as error:
            return f" (and it cannot be set aside: {error})"
        self._tell("set aside", path, step_of(path), reason=str(problem))
        return ""


def read_checkpoint(directory: Path, before_step: int) -> tuple[CheckpointInfo, Capture]:
    """Read a checkpoint as :meth:`CheckpointStore.read_latest` does, for another process."""
    store = CheckpointStore(directory)
    return store.read_latest(before_step=before_step, allocate=allocate_shared)


def _newest(directory: Path, before_step: int | None, tried: Container[Path]) -> Path | None:
    """Look for the next candidate in the directory as it is: a writer may be at work."""
    limit = math.inf if before_step is None else before_step
    return next(
        (path for path in generations(directory) if path not in tried and step_of(path) <= limit),
        None,
    )


def _label(directory: Path, step: int | None, healthy: bool, metrics: Mapping[str, float]) -> Label:
    if step is None:
        step = max(map(step_of, generations(directory)), default=-1) + 1
    if step < 0:
        raise CheckpointError(f"cannot save step {step}; give the number of steps taken")
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return Label(step, healthy, finite)


def _read_back(directory: Path) -> Manifest:
    try:
        return verify_generation(directory)
    except CheckpointError as error:
        raise CheckpointError(
            f"what was written in {directory.parent} cannot be read back: {error}"
        ) from error


def _aside(path: Path, problem: str) -> Path:
    """Return a free name for a damaged checkpoint, which tells what is wrong with it."""
    text = problem.replace(str(path), "").lower()
    reason = re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:_REASON_LENGTH].strip("-")
    name = f"{path.name}{_DAMAGED}"
    earlier = sum(entry.name.startswith(name) for entry in path.parent.iterdir())
    return path.with_name(f"{name}-{reason}" + (f"-{earlier}" if earlier else ""))


def _problem(path: Path) -> str:
    try:
        verify_generation(path)
    except CheckpointError as error:
        return str(error)
    return ""
