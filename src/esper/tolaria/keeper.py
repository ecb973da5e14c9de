"""When a snapshot or a checkpoint is taken: on schedule, and never of a doubtful state."""

from esper.leyline import CheckpointError, Level, Verdict
from esper.tolaria.recorder import Recorder
from esper.tolaria.rollback import CheckpointStore, FastRollbackCache
from esper.tolaria.state import TrainState
from esper.tolaria.update import Progress


class SnapshotSchedule:
    """Takes a snapshot every few steps.

    :param cache: receives the snapshots.
    :param every: steps between two.
    """

    def __init__(self, cache: FastRollbackCache, every: int) -> None:
        self.taken = 0
        self._cache = cache
        self._every = every

    def due(self, step: int) -> bool:
        """Whether a snapshot belongs after this many steps."""
        return step % self._every == 0

    def take(self, step: int, state: TrainState) -> None:
        """Copy the state."""
        self._cache.put(step, state)
        self.taken += 1


class CheckpointSchedule:
    """Writes a checkpoint every few steps. A failed save is reported and does not stop training.

    :param store: receives the checkpoints.
    :param every: steps between two.
    :param recorder: told of each save.
    """

    def __init__(self, store: CheckpointStore, every: int, recorder: Recorder) -> None:
        self.saved = self.failed = 0
        self.last_step: int | None = None
        self._store = store
        self._every = every
        self._recorder = recorder

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after this many steps."""
        return step % self._every == 0

    def take(self, step: int, state: TrainState, *, healthy: bool = True) -> None:
        """Write the state to disk.

        :param healthy: False when the guard doubts it.
        """
        try:
            info = self._store.save(state, step=step, healthy=healthy)
        except CheckpointError as error:
            self.failed += 1
            message = f"checkpoint of step {step} failed: {error}"
            self._recorder.event("checkpoint_failed", message, Level.CRITICAL, step=step)
            return
        self.saved += 1
        self.last_step = step
        self._recorder.event(
            "checkpoint_saved",
            f"checkpoint of step {step}: {info.bytes / 2**20:.2f} MiB in {info.latency_ms:.1f} ms",
            step=step,
            bytes=info.bytes,
            latency_ms=info.latency_ms,
        )

    def take_restored(self, step: int, state: TrainState) -> None:
        """Write the state that a rollback led to, then delete what lies after it.

        A resume takes the checkpoint of the latest step: after a rollback that would be one of the
        course taken back. When the write fails, the older ones stay: one of them beats none.
        """
        failed = self.failed
        self.take(step, state)
        if self.failed > failed:
            return
        try:
            self._store.discard_after(step)
        except CheckpointError as error:
            self._recorder.event("checkpoint_failed", str(error), Level.CRITICAL, step=step)


Schedule = SnapshotSchedule | CheckpointSchedule


class Keeper:
    """Runs the schedules of both tiers. What falls due in a doubtful moment is made up for later.

    :param state: what is kept.
    :param progress: tells the step.
    :param schedules: those in force; none when nothing is kept.
    """

    def __init__(self, state: TrainState, progress: Progress, schedules: list[Schedule]) -> None:
        self._state = state
        self._progress = progress
        self.schedules = schedules
        self._overdue: list[Schedule] = []

    def keep_when_due(self, verdict: Verdict) -> None:
        """Take what is due after this step, unless the step is suspicious."""
        step = self._progress.step
        due = [s for s in self.schedules if s in self._overdue or s.due(step)]
        if not due:
            return
        if verdict.suspicious:
            self._overdue = due
            return
        self._overdue = []
        for schedule in due:
            schedule.take(step, self._state)

    def keep_first(self) -> None:
        """Take a snapshot before the first step, so that there is something to roll back to."""
        for schedule in self.schedules:
            if isinstance(schedule, SnapshotSchedule):
                schedule.take(self._progress.step, self._state)

    def keep_restored(self) -> None:
        """After a rollback: let a resume begin from the restored state."""
        for schedule in self.schedules:
            if isinstance(schedule, CheckpointSchedule):
                schedule.take_restored(self._progress.step, self._state)

    def keep_last(self, *, healthy: bool) -> None:
        """Write a checkpoint of the state that training ends in, unless it has just been done."""
        step = self._progress.step
        for schedule in self.schedules:
            if isinstance(schedule, CheckpointSchedule) and schedule.last_step != step:
                schedule.take(step, self._state, healthy=healthy)
