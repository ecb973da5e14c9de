"""How careful the engine is at present: conservative mode, and what it does to the guard."""

from collections.abc import Callable

from esper.leyline import Action, Verdict
from esper.tolaria.conservative import ConservativeMode
from esper.tolaria.guard import Guard, NullGuard
from esper.tolaria.update import Progress


class Caution:
    """Enters conservative mode on trouble and lets healthy steps lead out of it.

    :param mode: whether risks are taken.
    :param guard: made stricter meanwhile.
    :param progress: tells the step.
    :param prepare: called on entering: what comes next may need a process.
    """

    def __init__(
        self,
        mode: ConservativeMode,
        guard: Guard | NullGuard,
        progress: Progress,
        prepare: Callable[[], None],
    ) -> None:
        self.mode = mode
        self._guard = guard
        self._progress = progress
        self._prepare = prepare

    def enter(self, reason: str) -> None:
        """Take no risks from here on."""
        if not self.mode.active:
            self._prepare()
        self.mode.enter(reason, self._progress.step)
        self._guard.strictness = self.mode.guard_factor

    def note(self, verdict: Verdict) -> None:
        """Count the step that has just been decided."""
        committed = verdict.action is Action.COMMIT
        healthy = None if committed and verdict.suspicious else committed
        self.mode.note_step(healthy, self._progress.step)
        self._guard.strictness = self.mode.guard_factor
