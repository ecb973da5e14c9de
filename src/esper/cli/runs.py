"""``esper runs``: what runs there are and what became of them."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.cli.options import gather
from esper.cli.run_directory import RunSummary, list_runs, summarise

_COLOURS = {"completed": "green", "running": "cyan", "stopped": "yellow", "interrupted": "yellow"}


def show_runs(runs: Path | None) -> None:
    """Print a table of all runs, newest first.

    :raises RunError: the events of a run are damaged.
    """
    directory = gather(None, None, {"run.directory": (runs, "--runs")}).settings.run.directory
    console = Console(highlight=False)
    found = list_runs(directory)
    if not found:
        console.print(f"no runs in {directory}; start one with: esper train")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "started", "job", "outcome"):
        table.add_column(column, no_wrap=column != "job")
    for column in ("steps", "rollbacks"):
        table.add_column(column, justify="right")
    table.add_column("validation", no_wrap=True)
    for path in found:
        table.add_row(*_cells(summarise(path)))
    console.print(table)


def _cells(run: RunSummary) -> tuple[str | Text, ...]:
    return (
        run.name,
        run.started.strftime("%Y-%m-%d %H:%M:%S") if run.started else "-",
        run.job,
        Text(run.outcome, style=_COLOURS.get(run.outcome, "red")),
        "-" if run.steps is None else f"{run.steps:,}",
        str(run.rollbacks),
        "\n".join(f"{name} {value:.4f}" for name, value in run.validation.items()) or "-",
    )
