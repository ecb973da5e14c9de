"""The epoch boundary: validation, the state of the epoch, the policy's turn."""

import time

import psutil

from esper.leyline import GrowthState, SystemState
from esper.tolaria.boundary import Boundary
from esper.tolaria.companions import Companions, NoCompanions
from esper.tolaria.data import ResumableLoader
from esper.tolaria.evaluation import Evaluation
from esper.tolaria.growth import Growth, NoGrowth
from esper.tolaria.recorder import Recorder
from esper.tolaria.recovery_log import RecoveryLog


class Epochs:
    """Closes an epoch when its last batch is done.

    :param data: tells when an epoch has ended.
    :param evaluation: measures the model.
    :param recorder: holds the epoch's means and takes its state.
    :param companions: attended to at each boundary.
    :param log: tells attempt and rollbacks.
    :param growth: measured at each boundary.
    :param boundary: measures how long training stands still, and what else is measured.
    """

    def __init__(
        self,
        data: ResumableLoader,
        evaluation: Evaluation,
        recorder: Recorder,
        companions: Companions | NoCompanions,
        log: RecoveryLog,
        growth: Growth | NoGrowth,
        boundary: Boundary,
    ) -> None:
        self.last: SystemState | None = None
        self._finished: list[SystemState] = []
        self._data = data
        self._evaluation = evaluation
        self._recorder = recorder
        self._companions = companions
        self._update = recorder.update
        self._log = log
        self._growth = growth
        self._boundary = boundary
        self._process = psutil.Process()
        self._began = time.perf_counter()

    def close_when_ended(self) -> None:
        """If the epoch's last batch is done: measure, report, ask the policy, begin the next."""
        if not self._data.epoch_ended:
            return
        seconds = time.perf_counter() - self._began
        validation = self._evaluation.run()
        growth = self._growth.survey()
        began = time.perf_counter()
        state = self._state(self._data.epoch, validation, seconds, growth)
        self._recorder.outlet.emit(state)
        self._recorder.note_validation(state.step, validation)
        self._recorder.meter.reset()
        self._data.start_next_epoch()
        self._companions.attend(state)
        self._finished.append(state)
        self.last = state
        self._boundary.close(state, time.perf_counter() - began)
        self._began = time.perf_counter()

    def take_finished(self) -> list[SystemState]:
        """Return the epochs closed since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def _state(
        self,
        epoch: int,
        validation: dict[str, float],
        seconds: float,
        growth: GrowthState | None,
    ) -> SystemState:
        meter = self._recorder.meter
        return SystemState(
            epoch=epoch,
            step=self._update.progress.step,
            attempt=self._log.attempt,
            time=time.time(),
            losses=meter.means("loss"),
            validation=validation,
            learning_rate=self._update.learning_rate,
            gradient_norm=meter.mean("gradient_norm"),
            conflict_rate=meter.mean("conflict_rate"),
            conflict_share=meter.mean("conflict_share"),
            skipped=meter.skipped,
            rollbacks=self._log.rollbacks,
            samples_per_second=meter.samples / seconds if meter.samples and seconds > 0 else None,
            timings_ms=meter.means("timing"),
            memory_mb=self._process.memory_info().rss / 2**20,
            metrics=self._boundary.metrics(),
            growth=growth,
            reports=self._growth.reports.newest(),
        )
