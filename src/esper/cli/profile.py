"""``esper profile``: have a running job record some of its steps, and wait for the trace."""

import time
from dataclasses import dataclass
from pathlib import Path

import typer

from esper.cli.options import gather
from esper.cli.run_directory import find_run
from esper.leyline import ConfigError, RunError
from esper.tolaria.profiler import MOST_STEPS, Reply, RequestBox, RequestError
from esper.tolaria.rollback import is_locked

_LOOK_EVERY_S = 0.05
# Seldom: looking takes the lock for a moment when nobody has it.
_CHECK_EVERY_S = 1.0


@dataclass(frozen=True)
class ProfileRequest:
    """What was asked for on the command line.

    :param run: path or name of a run.
    :param steps: to be recorded.
    :param timeout_s: seconds to wait for the trace.
    :param runs: folder of the runs.
    """

    run: str
    steps: int
    timeout_s: float
    runs: Path | None


def profile_run(request: ProfileRequest) -> None:
    """Ask a run for a profile, wait for it, and print where it is.

    :raises ConfigError: a number is out of range.
    :raises RunError: there is no such run, it is not running or takes no requests, it could not
        record a profile, or has not in time.
    """
    if not 1 <= request.steps <= MOST_STEPS:
        raise ConfigError(f"--steps is {request.steps}; give 1 to {MOST_STEPS}")
    if not 0 < request.timeout_s < float("inf"):
        raise ConfigError(f"--timeout is {request.timeout_s:g}; give seconds above 0")
    directory = gather(
        None, None, {"run.directory": (request.runs, "--runs")}
    ).settings.run.directory
    run = find_run(request.run, directory)
    if not _is_running(run):
        raise RunError(f"{run.name} is not running; there are no steps to profile")
    box = RequestBox(run)
    if not box.folder.is_dir():
        raise RunError(
            f"{run.name} takes no requests: its profiler is off (profiler.enabled), it is about to "
            "end, or it was started by another version"
        )
    try:
        reply = _ask(box, run, request)
    except RequestError as error:
        raise RunError(str(error)) from error
    if reply.error:
        raise RunError(f"{run.name} recorded no profile: {reply.error}")
    # As seen from here: the job may name the directory differently.
    typer.echo(run / "profiles" / Path(reply.path).name)
    typer.echo(
        f"{reply.steps} steps, {reply.bytes / 2**20:.2f} MiB; open it in https://ui.perfetto.dev",
        err=True,
    )


def _ask(box: RequestBox, run: Path, request: ProfileRequest) -> Reply:
    name = box.ask(request.steps, request.timeout_s)
    try:
        return _wait(box, name, run, request.timeout_s)
    finally:
        # Also when interrupted: nobody waits any more.
        box.forget(name)


def _wait(box: RequestBox, name: str, run: Path, timeout_s: float) -> Reply:
    now = time.monotonic()
    end, check_at = now + timeout_s, now + _CHECK_EVERY_S
    running = True
    while now < end:
        reply = box.fetch(name)
        if reply is not None:
            return reply
        if not running:
            raise RunError(f"{run.name} has ended without an answer; nothing was recorded")
        if now >= check_at:
            # Before the next look: a run that ends answers first.
            running, check_at = _is_running(run), now + _CHECK_EVERY_S
        else:
            time.sleep(_LOOK_EVERY_S)
        now = time.monotonic()
    raise RunError(
        f"{run.name} has recorded no profile within {timeout_s:g} s, and the request is taken "
        "back; a run looks for requests between its steps: give a longer --timeout if they take "
        f"long, or see with 'esper emergency {run}' whether it stands still"
    )


def _is_running(run: Path) -> bool:
    return is_locked(run / "checkpoints")
