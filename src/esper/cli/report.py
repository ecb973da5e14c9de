"""``esper report``: write the report of a run anew."""

from pathlib import Path

from rich.console import Console

from esper.cli.options import gather
from esper.cli.run_directory import find_run
from esper.nissa.report import write_report


def rebuild_report(reference: str, runs: Path | None) -> None:
    """Write ``report.html`` and say where it is.

    :raises RunError: there is no such run, or its events are damaged.
    """
    directory = gather(None, None, {"run.directory": (runs, "--runs")}).settings.run.directory
    path = write_report(find_run(reference, directory))
    Console(highlight=False, soft_wrap=True).print(str(path))
