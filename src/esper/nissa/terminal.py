"""What a person sees while training runs: a header, a progress bar, a line per epoch, incidents."""

from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from esper.leyline import Event, Level, Record, StepRecord, SystemState

_STYLES = {Level.INFO: "cyan", Level.WARNING: "yellow", Level.CRITICAL: "bold red"}
_QUIET = {"checkpoint_saved"}
_SEEDS = {"seed_changed", "seed_refused"}
_REFRESHES_PER_SECOND = 5


class TerminalSink:
    """Prints a run as it goes. Without a terminal it prints plain lines and no bar.

    :param console: where to print; standard error output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._steps_per_epoch = 1

    def write(self, record: Record) -> None:
        """Show one record."""
        if isinstance(record, StepRecord):
            self._show_step(record)
        elif isinstance(record, SystemState):
            self._console.print(epoch_line(record))
        elif record.name == "run_started":
            self._start(record.data)
        elif record.name == "run_ended":
            self._stop()
            self._console.print(summary(record))
        elif record.name in _SEEDS:
            self._print(record, f"step {record.step:,}: {seed_line(record)}", soft_wrap=True)
        elif record.name not in _QUIET:
            self._print(record, record.message)

    def close(self) -> None:
        """Take the bar away."""
        self._stop()

    def _print(self, event: Event, text: str, *, soft_wrap: bool = False) -> None:
        mark = "●" if event.level is Level.INFO else "▲"
        style = _STYLES[event.level]
        self._console.print(Text(f"{mark} {text}", style=style), soft_wrap=soft_wrap)

    def _start(self, data: dict[str, Any]) -> None:
        self._console.print(header(data))
        self._steps_per_epoch = data["steps_per_epoch"]
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=_REFRESHES_PER_SECOND,
            transient=True,
        )
        self._progress.add_task(
            "train", total=data["epochs"] * data["steps_per_epoch"], epoch=1, losses=""
        )
        self._progress.start()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _show_step(self, record: StepRecord) -> None:
        if self._progress is None:
            return
        self._progress.update(
            self._progress.task_ids[0],
            completed=record.epoch * self._steps_per_epoch + record.batch + 1,
            epoch=record.epoch + 1,
            losses="  ".join(f"{task} {loss:.3f}" for task, loss in record.losses.items()),
        )


def header(data: dict[str, Any]) -> Table:
    """Return what is known when a run starts."""
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("run", style="dim"), Text(str(data["run"]), style="bold"))
    rows = {
        "model": f"{data['parameters']:,} parameters on {data['device']}",
        "data": f"{data['samples']:,} training and {data['validation_samples']:,} "
        "validation samples",
        "plan": f"{data['epochs']} epochs of {data['steps_per_epoch']} steps, seed {data['seed']}",
    }
    if data["drill"]:
        rows["drill"] = "one batch will be poisoned on purpose (--no-drill turns this off)"
    for name, value in rows.items():
        style = "yellow" if name == "drill" else ""
        table.add_row(Text(name, style="dim"), Text(value, style=style))
    return table


def epoch_line(state: SystemState) -> Text:
    """Return one line about an epoch."""
    parts = [f"epoch {state.epoch + 1:>3}"]
    parts.append("loss " + " ".join(f"{task} {loss:.4f}" for task, loss in state.losses.items()))
    if state.validation:
        parts.append(" ".join(f"{name} {value:.4f}" for name, value in state.validation.items()))
    if state.conflict_share is not None:
        parts.append(f"conflicts {state.conflict_share:4.0%}")
    if state.samples_per_second is not None:
        parts.append(f"{state.samples_per_second:,.0f}/s")
    return Text(" │ ".join(parts))


def seed_line(event: Event) -> str:
    """Return what became of a seed, or of a command that was not carried out, in one line."""
    data, told = event.data, " ".join(event.message.split())
    if event.name == "seed_changed" or "refused" in told:
        return told
    return f"{data.get('operation', 'change')} seed {data.get('seed')!r} refused: {told}"


def summary(ended: Event) -> Panel:
    """Return what became of a run."""
    data = ended.data
    table = Table.grid(padding=(0, 2))
    table.add_row("steps", f"{data['steps']:,} in {data['seconds']:.1f} s")
    for name, value in data["validation"].items():
        table.add_row(name, f"{value:.4f}")
    table.add_row("rollbacks", str(data["rollbacks"]))
    table.add_row("skipped updates", str(data["skipped"]))
    if data["error"]:
        table.add_row("reason", Text(data["error"], style="red"))
    colour = "green" if data["outcome"] in ("completed", "stopped") else "red"
    return Panel(table, title=data["outcome"], border_style=colour, expand=False)
