"""``esper config show``: every setting, its value and its origin."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.cli.options import gather
from esper.core.settings import declared_settings, to_toml


def show_config(config: Path | None, assignments: Sequence[str] | None, *, as_toml: bool) -> None:
    """Print the settings that a run started here would have.

    :raises ConfigError: a source is not valid.
    """
    loaded = gather(config, assignments, {})
    console = Console(highlight=False)
    if as_toml:
        console.out(to_toml(loaded.settings), end="", highlight=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("setting", "value", "from", "meaning"):
        table.add_column(column, overflow="fold")
    for setting in declared_settings():
        section, name = setting.key.split(".")
        value = getattr(getattr(loaded.settings, section), name)
        origin = loaded.origins[setting.key]
        style = "dim" if origin == "default" else "cyan"
        table.add_row(
            setting.key,
            Text("-" if value is None else str(value), style="bold"),
            Text(origin, style=style),
            Text(setting.description, style="dim"),
        )
    console.print(table)
