"""Bringing an incident to the disk, beside training: whole, or not at all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from esper.leyline import CheckpointError
from esper.tolaria.incident.batch_file import write_batch
from esper.tolaria.incident.record import (
    FOLDER,
    RECORD,
    STATE,
    BatchEntry,
    Incident,
    StateReference,
    Unrecorded,
)
from esper.tolaria.rollback import CheckpointStore, FileSystem, Snapshot
from esper.tolaria.rollback.durable import DISK, committed_directory, make_directory, synced_file

_CHECKPOINTS = "checkpoints"

# Identity and content.
NamedBatch = tuple[BatchEntry, Any]


@dataclass
class Evidence:
    """What is written besides the record itself.

    :param snapshot: a healthy state that is held; let go of when it has been written.
    :param wanted_step: a state of this step or an earlier one would serve.
    :param batches: identity and content of each batch.
    :param max_batch_bytes: largest content of all batches together.
    :param note: why there is no snapshot.
    """

    snapshot: Snapshot | None
    wanted_step: int
    batches: list[NamedBatch]
    max_batch_bytes: int
    note: str = ""

    def let_go(self) -> None:
        """Release snapshot and batches."""
        if self.snapshot is not None:
            self.snapshot.release()
            self.snapshot = None
        self.batches = []


@dataclass(frozen=True)
class Written:
    """What has become of writing.

    :param incident: the record as it is on the disk.
    :param problem: why nothing was written; empty when all was.
    """

    incident: Incident
    problem: str = ""


def write_new(
    run: Path, incident: Incident, evidence: Evidence, disk: FileSystem = DISK
) -> Written:
    """Write a new incident with its evidence; the directory appears when all is in it."""
    final = run / FOLDER / incident.id
    try:
        make_directory(final.parent, disk)
        with committed_directory(final, disk) as directory:
            state = _write_state(directory, run, evidence, disk)
            batches = _write_batches(directory, evidence, disk)
            complete = msgspec.structs.replace(incident, state=state, batches=batches)
            with synced_file(directory / RECORD, disk) as file:
                file.write(_text_of(complete))
    except (OSError, CheckpointError) as error:
        return Written(incident, f"{final} cannot be written: {error}")
    except Exception as error:  # noqa: BLE001 - whatever the user's batch raises, training goes on
        return Written(incident, f"{final}: {type(error).__name__}: {error}")
    finally:
        evidence.let_go()
    return Written(complete)


def rewrite(run: Path, incident: Incident, further: Evidence, disk: FileSystem = DISK) -> Written:
    """Put a new version of a record in the place of the old one.

    :param further: batches that are added to those that are there.
    """
    path = run / FOLDER / incident.id / RECORD
    try:
        added = _write_batches(path.parent, further, disk)
        complete = msgspec.structs.replace(incident, batches=[*incident.batches, *added])
        _replace(path, _text_of(complete), disk)
    except OSError as error:
        return Written(incident, f"{path} cannot be written: {error}")
    except Exception as error:  # noqa: BLE001 - whatever the user's batch raises, training goes on
        return Written(incident, f"{path}: {type(error).__name__}: {error}")
    finally:
        further.let_go()
    return Written(complete)


def write_unrecorded(path: Path, unrecorded: Unrecorded, disk: FileSystem = DISK) -> str:
    """Write how many incidents were only counted; return what kept it from being written."""
    try:
        _replace(path, msgspec.json.encode(unrecorded), disk)
    except OSError as error:
        return f"{path} cannot be written: {error}"
    return ""


def _write_state(
    directory: Path, run: Path, evidence: Evidence, disk: FileSystem
) -> StateReference:
    snapshot = evidence.snapshot
    if snapshot is not None:
        with CheckpointStore(directory / STATE, keep=1, disk=disk) as store:
            info = store.save(snapshot, step=snapshot.step, healthy=snapshot.healthy)
        return StateReference(info.step, STATE, info.bytes)
    # The run's own checkpoints are not copied: whether they are kept is the run's affair.
    for info in CheckpointStore(run / _CHECKPOINTS).list():
        if info.healthy and info.step <= evidence.wanted_step:
            note = f"{evidence.note}; the run's own checkpoint of step {info.step} is named instead"
            return StateReference(info.step, f"../../{_CHECKPOINTS}", info.bytes, note)
    return StateReference(note=f"{evidence.note}, and no checkpoint is old enough")


def _write_batches(directory: Path, evidence: Evidence, disk: FileSystem) -> list[BatchEntry]:
    left, entries = evidence.max_batch_bytes, []
    for entry, content in evidence.batches:
        written = write_batch(directory, entry, content, left, disk)
        left -= written.bytes if written.file else 0
        entries.append(written)
    return entries


def _replace(path: Path, text: bytes, disk: FileSystem) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with synced_file(temporary, disk) as file:
        file.write(text)
    disk.rename(temporary, path)
    disk.sync_directory(path.parent)


def _text_of(incident: Incident) -> bytes:
    return msgspec.json.format(msgspec.json.encode(incident), indent=1)
