"""``esper train``: from settings and a target to a finished run with a report."""

import random
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console

from esper.cli.baselines import compare, require_comparable
from esper.cli.errors import EXIT_INTERRUPTED
from esper.cli.options import gather
from esper.cli.run_directory import EVENTS, create_run, find_run, read_config
from esper.cli.target import build_job
from esper.core.settings import EsperSettings
from esper.leyline import ConfigError, DivergenceError, Sink
from esper.nissa import JsonlSink
from esper.nissa.report import write_report
from esper.nissa.terminal import TerminalSink
from esper.tolaria import TolariaTrainer

BUILT_IN = EsperSettings.model_fields["run"].default.target
# What may differ when a run is continued: all else would change its course.
_FREE_ON_RESUME = {"train.epochs", "train.threads", "run.directory"}


@dataclass(frozen=True)
class TrainRequest:
    """What was asked for on the command line.

    :param config: a TOML file.
    :param flags: value and flag by ``section.key``; the value None means not given.
    :param assignments: texts of the form ``section.key=value``.
    :param resume: path or name of a run to continue.
    :param quiet: print the result only.
    :param baselines: paired seeds to compare growth with models of fixed size by; 0 for none.
    """

    config: Path | None
    flags: dict[str, tuple[Any, str]]
    assignments: Sequence[str]
    resume: str | None
    quiet: bool
    baselines: int = 0


def run_training(request: TrainRequest) -> None:
    """Train to the end, or until asked to stop.

    :raises EsperError: the request, the job or the run cannot be carried out.
    """
    settings, run = _prepare(request)
    seed_generators(settings)
    job = build_job(settings.run.target)
    if request.baselines:
        require_comparable(job, settings.run.target)
    if run is None:
        run = create_run(settings, job.name)
    console = Console(stderr=True, highlight=False)
    sinks: list[Sink] = [JsonlSink(run / EVENTS)]
    if not request.quiet:
        sinks.append(TerminalSink(console))
    trainer = TolariaTrainer.from_job(
        job, config=settings.engine(), directory=run, sinks=sinks, drill=_drills(settings)
    )
    if request.resume is not None:
        trainer.resume()
    try:
        with _stopping_on_signals(trainer, console):
            for _ in trainer.run():
                pass
    except DivergenceError:
        _conclude(trainer, run, console)
        raise
    _conclude(trainer, run, console)
    if request.baselines and trainer.outcome == "completed":
        compare(settings, run, request.baselines, quiet=request.quiet)


def _prepare(request: TrainRequest) -> tuple[EsperSettings, Path | None]:
    if request.resume is None:
        return gather(request.config, request.assignments, request.flags).settings, None
    changed = [
        flag
        for key, (value, flag) in request.flags.items()
        if value is not None and key not in _FREE_ON_RESUME
    ]
    changed += [f"--set {text}" for text in request.assignments]
    changed += ["--config"] if request.config is not None else []
    if changed:
        raise ConfigError(
            f"--resume continues a run with its own settings; leave out {', '.join(changed)}"
        )
    current = gather(None, None, request.flags).settings
    run = find_run(request.resume, current.run.directory)
    saved: dict[str, Any] = read_config(run)
    for key in ("train.epochs", "train.threads"):
        value, _ = request.flags[key]
        if value is not None:
            section, name = key.split(".")
            saved[section][name] = value
    return EsperSettings(**saved), run


def seed_generators(settings: EsperSettings) -> None:
    """Set threads and seeds as a run has them when it builds its job."""
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)
    random.seed(settings.train.seed)
    np.random.seed(settings.train.seed % 2**32)
    torch.manual_seed(settings.train.seed)


def _drills(settings: EsperSettings) -> bool:
    if settings.run.drill is not None:
        return settings.run.drill
    return bool(settings.run.target == BUILT_IN)


@contextmanager
def _stopping_on_signals(trainer: TolariaTrainer, console: Console) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM end the run after its step, and a second one at once."""
    asked = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked:
            sys.exit(EXIT_INTERRUPTED)
        asked = True
        name = signal.Signals(number).name
        console.print(f"{name}: finishing this step and saving; once more ends at once")
        trainer.stop()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _conclude(trainer: TolariaTrainer, run: Path, console: Console) -> None:
    report = write_report(run)
    console.print(f"report  {report}")
    if trainer.outcome == "stopped":
        console.print(f"resume  esper train --resume {run}")
