"""Several changes that stand or fall together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Undo = Callable[[], None]


class Undoing:
    """Collects how each of several changes is taken back."""

    def __init__(self) -> None:
        self._steps: list[Undo] = []

    def append(self, undo: Undo) -> None:
        """Remember how the change just made is taken back."""
        self._steps.append(undo)

    def __call__(self) -> None:
        """Take all of them back, the last one first."""
        while self._steps:
            self._steps.pop()()


@contextmanager
def whole() -> Iterator[Undoing]:
    """Make several changes; when one raises, those before it are taken back."""
    undoing = Undoing()
    try:
        yield undoing
    except BaseException:
        undoing()
        raise
