"""Writing checkpoints beside training: the state is frozen here, and written by the worker."""

import time
from dataclasses import dataclass

from esper.core.latency import LatencyHistogram
from esper.core.worker import Isolation, check_cancelled
from esper.leyline import CheckpointError, Level
from esper.tolaria.dependency import Answer, Dependency
from esper.tolaria.recorder import Recorder
from esper.tolaria.rollback import CheckpointInfo, CheckpointStore, FastRollbackCache, Snapshot
from esper.tolaria.state import TrainState

_LOOK_EVERY_S = 0.002
_UNLIMITED = float(2**40)


@dataclass(frozen=True)
class Label:
    """What is told about a checkpoint besides its content.

    :param step: steps taken.
    :param healthy: False when the guard doubts the state.
    :param newest: delete what is of later steps, once this one is safe.
    """

    step: int
    healthy: bool = True
    newest: bool = False


class BackgroundSaver:
    """Writes one checkpoint at a time on the worker, from a snapshot that is held meanwhile.

    Training stands still only for the copy in memory. A write that fails is counted and told of;
    one that hangs is given up at its deadline, and has no effect when it goes on later.

    :param store: receives the checkpoints.
    :param cache: takes the snapshots, which are rollback targets besides; without one, or when it
        has no room, memory of its own is used.
    :param writer: carries out the writing.
    :param recorder: told of each checkpoint, and tells the validation metrics.
    """

    def __init__(
        self,
        store: CheckpointStore,
        cache: FastRollbackCache | None,
        writer: Dependency,
        recorder: Recorder,
    ) -> None:
        self.saved = self.failed = 0
        self.stall = LatencyHistogram()
        self._store = store
        self._cache = cache
        self._stage = FastRollbackCache(_UNLIMITED, max_snapshots=1)
        self._writer = writer
        self._recorder = recorder
        self._frozen: Snapshot | None = None
        self._label = Label(-1)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._frozen is not None

    def start(self, state: TrainState, label: Label, fresh: Snapshot | None = None) -> bool:
        """Freeze the state and have it written; return whether that has begun.

        :param fresh: a snapshot of just this state, which saves the copy.
        :raises RuntimeError: a checkpoint is being written.
        """
        if self._frozen is not None:
            raise RuntimeError(f"the checkpoint of step {self._label.step} is still being written")
        began = time.perf_counter()
        snapshot = (fresh or self._freeze(state, label)).hold()
        self._label = label
        arguments = self._store, snapshot, label, self._recorder.validation_at(label.step)
        if self._writer.closed:
            # The program is ending: there is no training left to write beside.
            self._tell(self._writer.call_here(_write, *arguments))
            snapshot.release()
            return True
        asked = self._writer.submit_async(_write, *arguments, isolation=Isolation.THREAD)
        self.stall.add(time.perf_counter() - began)
        if not asked:
            snapshot.release()
            self._note_failure(self._writer.why_not())
            return False
        self._frozen = snapshot
        return True

    def poll(self) -> None:
        """Take note of a checkpoint that is written."""
        if self._frozen is None:
            return
        answer = self._writer.poll()
        if answer is not None:
            self._tell(answer)
        self._let_go()

    def wait(self) -> None:
        """Block until nothing is being written, at most until the deadline."""
        answer = self._writer.wait()
        if answer is not None:
            self._tell(answer)
        self._let_go()

    def cancel(self) -> None:
        """Give up what is being written, and block until that has ended, or has to be abandoned."""
        self._writer.cancel()
        end = time.monotonic() + self._writer.timeout_s
        while self.busy and time.monotonic() < end:
            self._let_go()
            time.sleep(_LOOK_EVERY_S)

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name; what was not measured is absent."""
        metrics = {
            "tolaria.rollback.checkpoints_total": float(self.saved),
            "tolaria.rollback.checkpoint_failures_total": float(self.failed),
        }
        p95 = self.stall.quantile(0.95)
        if self.stall.last_s is not None and p95 is not None:
            metrics["tolaria.rollback.save_stall_ms"] = self.stall.last_s * 1e3
            metrics["tolaria.rollback.save_stall_p95_ms"] = p95 * 1e3
        return metrics

    def _freeze(self, state: TrainState, label: Label) -> Snapshot:
        snapshot = None
        if self._cache is not None:
            snapshot = self._cache.put(label.step, state, healthy=label.healthy)
        snapshot = snapshot or self._stage.put(label.step, state)
        if snapshot is None:
            raise RuntimeError("the memory that checkpoints are written from is still in use")
        return snapshot

    def _let_go(self) -> None:
        """Release the snapshot when its writer has ended; an abandoned one may still read it."""
        if self._frozen is not None and self._writer.idle:
            self._frozen.release()
            self._frozen = None

    def _tell(self, answer: Answer[CheckpointInfo]) -> None:
        step, info = self._label.step, answer.reply
        if info is None:
            self._note_failure(answer.detail)
            return
        self.saved += 1
        self._recorder.event(
            "checkpoint_saved",
            f"checkpoint of step {step}: {info.bytes / 2**20:.2f} MiB in {info.latency_ms:.1f} ms",
            step=step,
            bytes=info.bytes,
            latency_ms=info.latency_ms,
            stall_ms=(self.stall.last_s or 0.0) * 1e3,
        )
        if info.problem:
            message = f"checkpoint of step {step} is safe, but {info.problem}"
            self._recorder.event("checkpoint_trouble", message, Level.WARNING, step=step)

    def _note_failure(self, reason: str) -> None:
        self.failed += 1
        message = f"checkpoint of step {self._label.step} failed: {reason}"
        self._recorder.event(
            "checkpoint_failed", message, Level.CRITICAL, step=self._label.step, reason=reason
        )


def _write(
    store: CheckpointStore, snapshot: Snapshot, label: Label, metrics: dict[str, float]
) -> CheckpointInfo:
    """Write a checkpoint, on the worker's thread.

    :raises CheckpointError: it cannot be written, or what is of later steps cannot be deleted.
    """
    info = store.save(
        snapshot,
        step=label.step,
        healthy=label.healthy,
        metrics=metrics,
        # One that was given up must not turn up after what has been decided without it.
        before_commit=check_cancelled,
    )
    if label.newest:
        try:
            store.discard_after(label.step)
        except CheckpointError as error:
            raise CheckpointError(
                f"it is safe, but those of the course taken back stay: {error}"
            ) from error
    return info
