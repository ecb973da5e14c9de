"""Options that several commands share, and the settings they add up to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from esper.core.settings import LoadedSettings, load_settings
from esper.leyline import ConfigError

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file; esper.toml when there is one.", metavar="FILE"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any setting, e.g. guard.window=32. Can be repeated.", metavar="KEY=VALUE"
    ),
]
RunsOption = Annotated[
    Path | None, typer.Option("--runs", help="Folder that holds the runs.", metavar="DIR")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def gather(
    config: Path | None,
    assignments: Sequence[str] | None,
    flags: dict[str, tuple[Any, str]],
) -> LoadedSettings:
    """Load the settings with flags on top; a flag that was not given has the value None.

    :param assignments: texts of the form ``section.key=value``.
    :param flags: value and flag by ``section.key``.
    :raises ConfigError: an assignment has no ``=``, or a source is not valid.
    """
    given = {key: pair for key, pair in flags.items() if pair[0] is not None}
    for text in assignments or ():
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--set {text} has no value; write --set section.key=value")
        given[key.strip()] = (value.strip(), f"--set {key.strip()}")
    return load_settings(file=config, flags=given)
