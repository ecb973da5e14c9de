"""``esper emergency``: tell a running job of an emergency, or end one."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import typer

from esper.cli.options import gather
from esper.cli.run_directory import find_run
from esper.leyline import ConfigError, EmergencyLevel, RunError
from esper.tolaria.emergency import EmergencyWord, WordState
from esper.tolaria.listening import WORD
from esper.tolaria.rollback import is_locked

_PATIENCE_S = 1.0
_LOOK_EVERY_S = 0.002


@dataclass(frozen=True)
class EmergencyRequest:
    """What was asked for on the command line.

    :param run: path or name of a run.
    :param level: to raise or lower to; None to leave it.
    :param reason: why.
    :param clear: end the emergency.
    :param runs: folder of the runs.
    """

    run: str
    level: str | None
    reason: str
    clear: bool
    runs: Path | None


def handle_emergency(request: EmergencyRequest) -> None:
    """Show the level of a run, or set it and wait until the run has acted.

    :raises ConfigError: the options contradict each other, or there is no such level.
    :raises RunError: there is no such run, it is not running, or it has not answered in time.
    """
    level = _wanted(request)
    directory = gather(
        None, None, {"run.directory": (request.runs, "--runs")}
    ).settings.run.directory
    run = find_run(request.run, directory)
    if not (run / WORD).is_file():
        raise RunError(f"{run} has no {WORD}; it was not started by this version, or not yet")
    try:
        opened = EmergencyWord(run / WORD)
    except OSError as error:
        raise RunError(f"{run / WORD} cannot be opened: {error}") from error
    with opened as word:
        if level is None:
            typer.echo(_describe(word.read()))
            return
        if not is_locked(run / "checkpoints"):
            raise RunError(f"{run.name} is not running; there is nothing to act on an emergency")
        _set(word, run, level, request.reason)


def _wanted(request: EmergencyRequest) -> EmergencyLevel | None:
    if request.clear:
        if request.level is not None:
            raise ConfigError("--level and --clear contradict each other; leave one of them out")
        return EmergencyLevel.NONE
    if request.level is None:
        if request.reason:
            raise ConfigError("--reason needs a --level, for instance --level critical")
        return None
    try:
        return EmergencyLevel.parse(request.level)
    except ValueError as error:
        raise ConfigError(f"--level: {error}") from error


def _set(word: EmergencyWord, run: Path, level: EmergencyLevel, reason: str) -> None:
    began = time.monotonic_ns()
    sequence = word.set(level, reason or "asked for on the command line", "cli")
    name = "cleared" if level is EmergencyLevel.NONE else level.name.lower()
    allowed_s = min(level.act_within_s, EmergencyLevel.MINOR.act_within_s) + _PATIENCE_S
    while (time.monotonic_ns() - began) / 1e9 < allowed_s:
        acknowledged = word.acknowledged
        if acknowledged is not None and acknowledged[0] == sequence:
            typer.echo(f"{name}: acted on after {(acknowledged[1] - began) / 1e6:.3g} ms")
            return
        if acknowledged is not None and acknowledged[0] > sequence:
            raise RunError(
                f"{run.name} has acted on a later order instead; 'esper emergency {run}' shows it"
            )
        time.sleep(_LOOK_EVERY_S)
    raise RunError(
        f"{run.name} has not acted on it within {allowed_s:g} s; the level is set, and the run "
        "acts before its next optimizer step"
    )


def _describe(state: WordState | None) -> str:
    if state is None:
        return "the emergency word cannot be read at present; try again"
    if state.level is EmergencyLevel.NONE:
        return "no emergency"
    age_s = (time.monotonic_ns() - state.issued_ns) / 1e9
    since = "before this host was started"
    if age_s >= 0:
        since = (datetime.now(UTC) - timedelta(seconds=age_s)).strftime("%Y-%m-%d %H:%M:%S UTC")
    return (
        f"{state.level.name.lower()} since {since} "
        f"({state.origin}, process {state.process}): {state.reason}"
    )
