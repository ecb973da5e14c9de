"""From an exception to what a person at a terminal sees, and to an exit code."""

import sys
import traceback
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from esper.leyline import DivergenceError, EsperError

EXIT_OK = 0
EXIT_USER = 2
EXIT_HALTED = 3
EXIT_INTERRUPTED = 130


def guarded(command: Callable[[], None], *, debug: bool) -> int:
    """Run a command; a deliberate error becomes one line, with a traceback only on request.

    An error that is not deliberate is a defect, and keeps its traceback.

    :returns: the exit code: 0, 2 for an error of the user's, 3 when the guard halted training.
    """
    try:
        command()
    except EsperError as error:
        if debug:
            traceback.print_exc()
        line = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True, soft_wrap=True, highlight=False).print(line)
        return EXIT_HALTED if isinstance(error, DivergenceError) else EXIT_USER
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201 - the terminal is the interface
        return EXIT_INTERRUPTED
    return EXIT_OK
