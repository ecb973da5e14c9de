"""Which commands are carried out: known sender, known architecture, in time, and once."""

import time
from collections import deque
from collections.abc import Iterable

from esper.core.signing import is_signed
from esper.leyline import SeedCommand

_REMEMBERED = 1024


class Admission:
    """Refuses what must not be carried out, and remembers what was.

    :param key: that commands have to be signed with; None takes unsigned ones.
    """

    def __init__(self, key: bytes | None) -> None:
        self._key = key
        self._done: deque[str] = deque(maxlen=_REMEMBERED)

    def refusal(self, command: SeedCommand, version: int) -> str:
        """Return why a command is not carried out; empty when it may be.

        :param version: of the architecture as it is.
        """
        if self._key is not None and not is_signed(command, self._key):
            return "it is not signed with this run's key"
        if command.id and command.id in self._done:
            return f"command {command.id!r} was carried out before"
        if command.version not in (-1, version):
            return f"it is meant for architecture version {command.version}; there is {version}"
        if command.deadline and time.time() > command.deadline:
            return f"it came {time.time() - command.deadline:.3g} s after its deadline"
        return ""

    def note(self, command: SeedCommand) -> None:
        """Remember that a command was carried out."""
        if command.id:
            self._done.append(command.id)

    def state_dict(self) -> list[str]:
        """Return the ids of what was carried out, oldest first."""
        return list(self._done)

    def load_state_dict(self, ids: Iterable[str]) -> None:
        """Continue from :meth:`state_dict`."""
        self._done = deque(ids, maxlen=_REMEMBERED)
