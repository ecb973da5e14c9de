"""``esper train --baselines N``: whether a grown model is worth more than one of a fixed size.

Each training is a run of its own below ``RUN/baselines``, in a process of its own, with the
settings of the run but for its seed and the drill. What they came to is kept in
``RUN/baselines.json``.
"""

import importlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from esper.cli.errors import EXIT_HALTED
from esper.cli.run_directory import CONFIG
from esper.core.settings import EsperSettings, to_toml
from esper.leyline import JobError, RunError
from esper.nissa.report import write_report
from esper.nissa.report.comparison import (
    ARMS,
    COMPLETED,
    GROWN,
    LARGE,
    SMALL,
    ArmRun,
    Comparison,
    difference_text,
    failures,
    interval_text,
    measures,
    verdicts,
    write_comparison,
)
from esper.tolaria import TrainingJob

FOLDER = "baselines"
RESULT = "result.json"
_AT_ONCE = 2
_STATIC = {SMALL: "build_small", LARGE: "build_large"}


def require_comparable(job: TrainingJob, target: str) -> None:
    """Make sure that a job can be compared, before anything is trained.

    :param job: as built from the target.
    :raises JobError: it has no validation data, or its module does not name arms of fixed size.
    """
    if job.validation is None:
        raise JobError(
            f"--baselines compares validation metrics, but {target} has no validation data; give "
            "the job validation="
        )
    targets_of(target)


def targets_of(target: str) -> dict[str, str]:
    """Return what to train, by arm.

    :param target: ``module:function`` of the arm that grows, from which a job was built.
    :raises JobError: its module does not name the arms of fixed size.
    """
    name = target.partition(":")[0]
    module = importlib.import_module(name)
    missing = [each for each in _STATIC.values() if not callable(getattr(module, each, None))]
    if missing:
        raise JobError(
            f"--baselines compares with models of fixed size, but module {name} has no "
            f"{' and no '.join(missing)}; add build_small() and build_large() that return the job "
            "with a small and with a large model, without an executor"
        )
    return {GROWN: target} | {arm: f"{name}:{function}" for arm, function in _STATIC.items()}


def compare(settings: EsperSettings, run: Path, count: int, *, quiet: bool = False) -> Comparison:
    """Train every arm with so many seeds, print what they came to, and keep it with the run.

    :param settings: of the run; its seed is the first one.
    :param run: its directory.
    :param count: of paired seeds.
    :param quiet: print the result only.
    :raises JobError: the target's module does not name the arms of fixed size.
    :raises RunError: a directory cannot be made or written to.
    """
    console = Console(stderr=True, highlight=False)
    targets = targets_of(settings.run.target)
    seeds = [settings.train.seed + index for index in range(count)]
    comparison = Comparison(targets, seeds, directions=_directions(settings))
    trainings = [_prepare(settings, run, arm, targets[arm], seed) for seed in seeds for arm in ARMS]
    epochs = len(trainings) * settings.train.epochs
    with (
        _progress(console, epochs, quiet=quiet) as tick,
        closing(_carry_out(trainings, tick)) as results,
    ):
        for found in results:
            comparison = msgspec.structs.replace(comparison, runs=[*comparison.runs, found])
            write_comparison(run, comparison)
            if not quiet:
                console.print(_line(found, len(comparison.runs), len(trainings)), soft_wrap=True)
    show_comparison(comparison, console)
    console.print(f"report  {write_report(run)}", soft_wrap=True)
    return comparison


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print means with their intervals, paired differences, and what they show in words."""
    found = measures(comparison)
    means = _table("", *ARMS)
    for measure in found:
        means.add_row(measure.name, *(interval_text(measure.intervals[arm]) for arm in ARMS))
    console.print(means)
    differences = _table("", "grown minus small, 95 %", "grown minus large, 95 %")
    for measure in found:
        told = (difference_text(difference.interval) for difference in measure.differences)
        differences.add_row(measure.name, *told)
    console.print(differences)
    for sentence in verdicts(comparison):
        console.print(Text(sentence), soft_wrap=True)
    for sentence in failures(comparison):
        console.print(Text(f"▲ {sentence}", style="yellow"), soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@dataclass
class _Training:
    """One training to be carried out.

    :ivar process: that carries it out, while it runs.
    """

    arm: str
    seed: int
    directory: Path
    process: "subprocess.Popen[str] | None" = None
    given_up: threading.Event = field(default_factory=threading.Event)

    def run(self, tick: Callable[[], None]) -> ArmRun:
        """Train in a process, and return what came of it.

        :param tick: called at the end of each epoch.
        """
        errors = self.directory / "errors.txt"
        own = str(os.getpid())
        command = [sys.executable, "-m", "esper.cli.arm", self.arm, str(self.directory), own]
        with errors.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=file, text=True, errors="replace"
            )
            if self.given_up.is_set():
                self.process.kill()
            with self.process:
                for line in self.process.stdout or ():
                    if line.startswith("epoch "):
                        tick()
        # Of all these trainings only what they came to is of use.
        shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)
        if self.process.returncode != 0:
            return self._failed(self.process.returncode, errors.read_text(errors="replace"))
        return msgspec.json.decode((self.directory / RESULT).read_bytes(), type=ArmRun)

    def stop(self) -> None:
        """Give the training up."""
        self.given_up.set()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()

    def _failed(self, code: int, errors: str) -> ArmRun:
        lines = [line for line in errors.splitlines() if line.strip()]
        told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        reason = (told or lines or ["it left no word"])[-1]
        how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
        outcome = "was halted" if code == EXIT_HALTED else "failed"
        return ArmRun(self.arm, self.seed, outcome, error=f"{reason} ({how}, {self.directory})")


def _prepare(settings: EsperSettings, run: Path, arm: str, target: str, seed: int) -> _Training:
    """Make the directory of one training, in place of an earlier one."""
    directory = run / FOLDER / f"{arm}-{seed}"
    # Side by side, each has its share of the cores.
    threads = settings.train.threads or max(1, (os.cpu_count() or 1) // _at_once())
    train = settings.train.model_copy(update={"seed": seed, "threads": threads})
    named = {"target": target, "name": directory.name, "drill": False}
    own = settings.model_copy(update={"train": train, "run": settings.run.model_copy(update=named)})
    try:
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
        (directory / CONFIG).write_text(to_toml(own), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot make {directory}: {error}") from error
    return _Training(arm, seed, directory)


def _carry_out(
    trainings: list[_Training], tick: Callable[[], None]
) -> Generator[ArmRun, None, None]:
    """Yield what each training came to, as they end; give up the others when left early."""
    with ThreadPoolExecutor(_at_once()) as pool:
        futures: list[Future[ArmRun]] = [pool.submit(each.run, tick) for each in trainings]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            for training in trainings:
                training.stop()


def _at_once() -> int:
    return max(1, min(_AT_ONCE, os.cpu_count() or 1))


def _directions(settings: EsperSettings) -> dict[str, str]:
    """Return whether less or more is better of the metric that checkpoints are chosen by."""
    checkpoints = settings.checkpoints
    metric = checkpoints.best_metric
    return {} if metric is None else {metric: checkpoints.best_direction}


@contextmanager
def _progress(console: Console, epochs: int, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """Show how many epochs are done; without a terminal, only each training's end is told."""
    if quiet or not console.is_terminal:
        yield lambda: None
        return
    bar = Progress(
        TextColumn("[bold]baselines, epochs"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("baselines", total=epochs)
    with bar:
        yield lambda: bar.advance(task)


def _line(run: ArmRun, done: int, total: int) -> Text:
    place = f"baseline {done} of {total}: {run.arm}, seed {run.seed}"
    if run.outcome != COMPLETED:
        return Text(f"▲ {place} {run.outcome}: {run.error}", style="yellow")
    metrics = " ".join(f"{name} {value:.4f}" for name, value in run.validation.items())
    return Text(f"● {place}: {metrics}, {run.parameters:,} parameters, {run.seconds:.1f} s", "cyan")
