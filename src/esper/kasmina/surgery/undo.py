"""Taking operations back, the last one first."""

from collections.abc import Callable

from esper.leyline import GrowthError


class Undo:
    """Takes one operation back, once.

    :ivar operation: what was done, in words.
    """

    def __init__(self, operation: str, journal: "Journal", back: Callable[[], None]) -> None:
        self.operation = operation
        self._journal = journal
        self._back = back

    def undo(self) -> None:
        """Put back what the operation has changed.

        :raises GrowthError: a later operation has to be undone first, or this one cannot be undone
            any more. Nothing was changed then.
        """
        self._journal.take_back(self, self._back)


class Journal:
    """The operations that can still be taken back, oldest first."""

    def __init__(self) -> None:
        self._open: list[Undo] = []

    @property
    def operations(self) -> list[str]:
        """What can be taken back, in words, oldest first."""
        return [undo.operation for undo in self._open]

    def enter(self, operation: str, back: Callable[[], None]) -> Undo:
        """Note an operation that was carried out.

        :param operation: what was done, in words.
        :param back: takes it back, given that everything later was.
        """
        undo = Undo(operation, self, back)
        self._open.append(undo)
        return undo

    def take_back(self, undo: Undo, back: Callable[[], None]) -> None:
        """Take ``undo``'s operation back.

        :raises GrowthError: it is not the last one.
        """
        if all(candidate is not undo for candidate in self._open):
            raise GrowthError(
                f"{undo.operation} cannot be undone: it was undone or committed before; "
                "keep one Undo for each operation and use it once, before commit()"
            )
        last = self._open[-1]
        if last is not undo:
            raise GrowthError(
                f"{undo.operation} cannot be undone before {last.operation}, which came later; "
                "undo in reverse order"
            )
        back()
        self._open.pop()

    def clear(self) -> None:
        """Let go of every operation, and of the tensors kept for taking it back."""
        self._open.clear()
