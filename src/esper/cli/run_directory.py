"""Run directories: made, found by name, and read for their outcome."""

import difflib
import os
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from esper.core.settings import EsperSettings, to_toml
from esper.leyline import RunError
from esper.nissa import read_records
from esper.nissa.report import Story

CONFIG = "config.toml"
EVENTS = "events.jsonl"


@dataclass(frozen=True)
class RunSummary:
    """What a list of runs shows.

    :param outcome: of the last attempt; ``running`` only while its writer lives, and
        ``interrupted`` when it ended without a word.
    :param steps: steps taken; None when no ending and no epoch was recorded.
    """

    name: str
    job: str
    started: datetime | None
    outcome: str
    steps: int | None
    rollbacks: int
    validation: dict[str, float]


def create_run(settings: EsperSettings, job_name: str) -> Path:
    """Make the directory of a new run and write its configuration.

    :raises RunError: the directory cannot be made.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    wanted = settings.run.name or f"{stamp}-{job_name}"
    try:
        path = _make_unique(settings.run.directory, wanted)
        temporary = path / f"{CONFIG}.tmp"
        temporary.write_text(to_toml(settings), encoding="utf-8")
        temporary.replace(path / CONFIG)
    except OSError as error:
        raise RunError(
            f"cannot make a run directory in {settings.run.directory}: {error}"
        ) from error
    return path


def find_run(reference: str, runs: Path) -> Path:
    """Return the directory of a run.

    :param reference: a path, or a name below ``runs``.
    :raises RunError: there is no such run, naming the nearest.
    """
    for candidate in (Path(reference), runs / reference):
        if (candidate / CONFIG).is_file():
            return candidate
    names = [path.name for path in list_runs(runs)]
    nearest = difflib.get_close_matches(reference, names, n=1, cutoff=0.3)
    hint = f"did you mean {nearest[0]}?" if nearest else f"'esper runs --runs {runs}' lists them"
    raise RunError(f"there is no run {reference!r} in {runs}; {hint}")


def list_runs(runs: Path) -> list[Path]:
    """Return the run directories below ``runs``, newest first."""
    if not runs.is_dir():
        return []
    found = [path for path in runs.iterdir() if (path / CONFIG).is_file()]
    return sorted(found, key=lambda path: (path / CONFIG).stat().st_mtime, reverse=True)


def read_config(run: Path) -> dict[str, Any]:
    """Return the saved configuration by section.

    :raises RunError: it cannot be read.
    """
    try:
        return tomllib.loads((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"{run / CONFIG} cannot be read: {error}") from error


def summarise(run: Path) -> RunSummary:
    """Read the outcome of a run from its events.

    :raises RunError: the events are damaged.
    """
    story = Story.of(read_records(run / EVENTS)) if (run / EVENTS).is_file() else Story()
    started, last = story.started, story.epochs[-1] if story.epochs else None
    ended = story.ended.data if story.ended is not None else {}
    return RunSummary(
        name=run.name,
        job=str(started.data["job"]) if started else "-",
        started=datetime.fromtimestamp(started.time, UTC) if started else None,
        outcome=_outcome(run, story),
        steps=ended.get("steps", last.step if last else None),
        rollbacks=ended.get("rollbacks", len(story.named("rollback"))),
        validation=story.validation,
    )


def _outcome(run: Path, story: Story) -> str:
    if story.ended is not None:
        return story.outcome
    from esper.tolaria.rollback import is_locked

    return "running" if is_locked(run / "checkpoints") else story.outcome


def _make_unique(directory: Path, name: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 1000):
        path = directory / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise RunError(f"{directory} holds a thousand runs named {name}; choose another name")


def is_writable(path: Path) -> bool:
    """Whether files can be made in a directory, or in the nearest one above it that exists."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    return existing.is_dir() and os.access(existing, os.W_OK)
