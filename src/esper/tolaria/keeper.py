"""When a snapshot or a checkpoint is taken: on schedule, and never of a doubtful state."""

from esper.core.config import CheckpointConfig
from esper.leyline import Level, Verdict
from esper.tolaria.recorder import Recorder
from esper.tolaria.rollback import FastRollbackCache, Snapshot
from esper.tolaria.saving import BackgroundSaver, Label
from esper.tolaria.state import TrainState
from esper.tolaria.update import Progress


class SnapshotSchedule:
    """Takes a snapshot every few steps.

    :param cache: receives the snapshots.
    :param every: steps between two.
    """

    def __init__(self, cache: FastRollbackCache, every: int) -> None:
        self.taken = 0
        self.cache = cache
        self._every = every

    def due(self, step: int) -> bool:
        """Whether a snapshot belongs after this many steps."""
        return step % self._every == 0

    def take(self, step: int, state: TrainState) -> Snapshot | None:
        """Copy the state, if there is room."""
        snapshot = self.cache.put(step, state)
        self.taken += snapshot is not None
        return snapshot

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        return {
            "tolaria.rollback.snapshots_total": float(self.taken),
            "tolaria.rollback.fast_size_bytes": float(self.cache.size_bytes),
        }


class CheckpointSchedule:
    """Has a checkpoint written every few steps, and at the end of epochs where the best are kept.

    :param saver: writes them.
    :param config: when, and whether training waits.
    :param recorder: tells of which steps there are validation metrics.
    """

    def __init__(
        self, saver: BackgroundSaver, config: CheckpointConfig, recorder: Recorder
    ) -> None:
        self.deferred = 0
        self.saver = saver
        self._last_step: int | None = None
        self._config = config
        self._recorder = recorder

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after this many steps."""
        by_metric = self._config.best_metric
        measured = by_metric is not None and by_metric in self._recorder.validation_at(step)
        return step % self._config.every == 0 or measured

    def take(self, step: int, state: TrainState, fresh: Snapshot | None) -> bool:
        """Begin to write one; return False while the one before is being written.

        :param fresh: a snapshot of just this state, if one was taken.
        """
        if self.saver.busy:
            self.deferred += 1
            return False
        if self.saver.start(state, Label(step), fresh):
            self._last_step = step
            if self._config.mode == "wait":
                self.saver.wait()
        return True

    def take_restored(self, step: int, state: TrainState) -> None:
        """Write the state that a rollback led to, then delete what lies after it; wait for it.

        A resume takes the checkpoint of the latest step: after a rollback that would be one of the
        course taken back. When the write fails, the older ones stay: one of them beats none.
        """
        self.saver.cancel()
        self._write(step, state, Label(step, newest=True))

    def take_last(self, step: int, state: TrainState, *, healthy: bool) -> None:
        """Write the state that training ends in, unless that has been done; wait for it."""
        self.saver.wait()
        if self._last_step != step or self.saver.failed:
            self._write(step, state, Label(step, healthy=healthy))

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        deferred = {"tolaria.rollback.checkpoints_deferred_total": float(self.deferred)}
        return deferred | self.saver.metrics()

    def _write(self, step: int, state: TrainState, label: Label) -> None:
        if self.saver.busy:
            message = f"no checkpoint of step {step}: the one before still hangs"
            self._recorder.event("checkpoint_failed", message, Level.CRITICAL, step=step)
            return
        if self.saver.start(state, label):
            self._last_step = step
            self.saver.wait()


Schedule = SnapshotSchedule | CheckpointSchedule


class Keeper:
    """Runs the schedules of both tiers. What falls due in a doubtful moment is made up for later.

    :param state: what is kept.
    :param progress: tells the step.
    :param snapshots: of tier 1; None when none are kept.
    :param checkpoints: of tier 2; None when none are kept.
    """

    def __init__(
        self,
        state: TrainState,
        progress: Progress,
        snapshots: SnapshotSchedule | None,
        checkpoints: CheckpointSchedule | None,
    ) -> None:
        self._state = state
        self._progress = progress
        self._snapshots = snapshots
        self._checkpoints = checkpoints
        self.schedules: list[Schedule] = [s for s in (snapshots, checkpoints) if s is not None]
        self._overdue: list[Schedule] = []

    def keep_when_due(self, verdict: Verdict) -> None:
        """Take what is due after this step, unless the step is suspicious."""
        if self._checkpoints is not None and self._checkpoints.saver.busy:
            self._checkpoints.saver.poll()
        step = self._progress.step
        due = [s for s in self.schedules if s in self._overdue or s.due(step)]
        if not due:
            return
        if verdict.suspicious:
            self._overdue = due
            return
        self._overdue = self._take(step, due)

    def _take(self, step: int, due: list[Schedule]) -> list[Schedule]:
        """Take what is due, snapshots first; return what could not be taken."""
        fresh, left = None, []
        for schedule in due:
            if isinstance(schedule, SnapshotSchedule):
                fresh = schedule.take(step, self._state)
                taken = fresh is not None
            else:
                taken = schedule.take(step, self._state, fresh)
            if not taken:
                left.append(schedule)
        return left

    def keep_first(self) -> None:
        """Take a snapshot before the first step, so that there is something to roll back to."""
        if self._snapshots is not None:
            self._snapshots.take(self._progress.step, self._state)

    def keep_restored(self) -> None:
        """After a rollback: let a resume begin from the restored state."""
        if self._checkpoints is not None:
            self._checkpoints.take_restored(self._progress.step, self._state)

    def keep_last(self, *, healthy: bool) -> None:
        """Write a checkpoint of the state that training ends in, unless it has just been done."""
        if self._checkpoints is not None:
            self._checkpoints.take_last(self._progress.step, self._state, healthy=healthy)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of both schedules by name."""
        metrics: dict[str, float] = {}
        for schedule in self.schedules:
            metrics.update(schedule.metrics())
        return metrics
