"""Builds the parts of a run from a job and a configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esper.core.config import GuardConfig, TolariaConfig
from esper.core.worker import AsyncWorker, shared_worker
from esper.leyline import Grower, Level, Sink, Stateful
from esper.nissa import NullHub, TelemetryHub
from esper.tolaria.aggregation import PCGrad
from esper.tolaria.boundary import Boundary, Measured
from esper.tolaria.brake import Brake
from esper.tolaria.caution import Caution
from esper.tolaria.companions import Companions, NoCompanions
from esper.tolaria.conservative import ConservativeMode
from esper.tolaria.data import DataPlan, ResumableLoader, plan_data
from esper.tolaria.drill import POSITION, SCALE, Drill, NoDrill
from esper.tolaria.ending import Ending
from esper.tolaria.epochs import Epochs
from esper.tolaria.evaluation import Evaluation
from esper.tolaria.growth import Growth, NoGrowth
from esper.tolaria.guard import Guard, NullGuard
from esper.tolaria.incident import Sources, open_incidents
from esper.tolaria.job import TrainingJob
from esper.tolaria.listening import open_emergency
from esper.tolaria.loop import Run
from esper.tolaria.objective import Objective
from esper.tolaria.outside import Outside, open_outside
from esper.tolaria.placement import placer, resolve_device
from esper.tolaria.profiler import open_watch
from esper.tolaria.recorder import Recorder
from esper.tolaria.recovery import Recovery
from esper.tolaria.recovery_log import RecoveryLog
from esper.tolaria.rescue import Rescue
from esper.tolaria.rollback import TwoTierRollback
from esper.tolaria.state import TrainState
from esper.tolaria.tiers import open_keeper, open_rollback
from esper.tolaria.update import Update


@dataclass(frozen=True)
class Surroundings:
    """What a run is embedded in.

    :param directory: run directory; without one nothing is written to disk.
    :param sinks: receive the records.
    :param drill: whether to inject one divergence.
    :param worker: carries out calls to the outside; the process's own by default.
    """

    directory: Path | None = None
    sinks: Sequence[Sink] = ()
    drill: bool = False
    worker: AsyncWorker | None = None


@dataclass(frozen=True)
class Assembly:
    """A run, and what its owner has to hold besides."""

    run: Run
    state: TrainState
    hub: TelemetryHub | NullHub
    rollback: TwoTierRollback
    companions: Companions | NoCompanions
    outside: Outside
    caution: Caution
    boundary: Boundary
    log: RecoveryLog
    plan: DataPlan
    evaluation: Evaluation


def assemble(job: TrainingJob, config: TolariaConfig, surroundings: Surroundings) -> Assembly:
    """Wire the parts of one run.

    :raises DataError: the job's data cannot be iterated resumably.
    :raises ConfigError: the device is not available.
    """
    place = placer(_move_model(job, config))
    plan = plan_data(job.data, batch_size=job.batch_size, shuffle=True, role="training")
    data = ResumableLoader(plan, seed=config.train.seed, epochs=config.train.epochs)
    update = _update(job, config)
    guard: Guard | NullGuard = Guard(config.guard) if config.guard.enabled else NullGuard()
    hub = TelemetryHub(surroundings.sinks) if config.telemetry.enabled else NullHub()
    log = RecoveryLog()
    recorder = Recorder(hub, update, log)
    worker = surroundings.worker or shared_worker(config.worker)
    mode = ConservativeMode(config.conservative, recorder.announce)
    caution = Caution(mode, guard, update.progress, prepare=worker.warm_up)
    outside = open_outside(config, worker, recorder.announce, caution)
    companions = _companions(job, config, recorder, outside, mode)
    objective = _objective(job, config)
    evaluation = _evaluation(job, place)
    growth = _growth(job, config, objective, evaluation, data, recorder)
    state = _state(job, objective)
    rollback = open_rollback(state, config, surroundings.directory, outside, recorder)
    recovery = Recovery(rollback, data, update, guard, log, growth)
    keeper = open_keeper(state, config, rollback.tiers, outside, recorder)
    ending = Ending()
    emergency = open_emergency(job.broadcast, surroundings.directory, outside, config, recorder)
    profiler = open_watch(config.profiler, surroundings.directory, worker, recorder)
    sources: list[Measured] = [*outside.dependencies, mode, emergency, profiler, growth]
    boundary = Boundary(config.telemetry.epoch_boundary_ms, recorder, sources, emergency)
    known = Sources(job.model, data, guard, rollback.tiers.memory)
    incidents = open_incidents(surroundings.directory, job.name, config, known, worker, recorder)
    rescue = Rescue(recovery, keeper, recorder, ending, caution, emergency, incidents)
    run = Run(
        data=data,
        place=place,
        drill=_drill(surroundings, data, recorder),
        objective=objective,
        guard=guard,
        brake=Brake(emergency, recovery, caution, ending, recorder, config.guard),
        growth=growth,
        update=update,
        recorder=recorder,
        rescue=rescue,
        epochs=Epochs(data, evaluation, recorder, companions, log, growth, boundary),
        keeper=keeper,
        profiler=profiler,
        ending=ending,
    )
    parts = Assembly(
        run, state, hub, rollback, companions, outside, caution, boundary, log, plan, evaluation
    )
    _register_state(parts, recovery)
    _declare_changes(parts, config.guard)
    return parts


def _move_model(job: TrainingJob, config: TolariaConfig) -> torch.device:
    device = resolve_device(config.train.device)
    job.model.to(device)
    return device


def _register_state(parts: Assembly, recovery: Recovery) -> None:
    """Make every part that has a memory of its own part of the training state."""
    run = parts.run
    components: dict[str, Stateful] = {
        "progress": run.update.progress,
        "data": run.data,
        "guard": run.guard,
        "guard_history": run.guard.history,
        "recovery": parts.log,
        "caution": parts.caution.mode,
        "emergency": run.brake.controller,
        "trail": recovery.trail,
        "meter": run.recorder.meter,
        "companions": parts.companions,
        "drill": run.drill,
        "field_reports": run.growth.reports,
    }
    if isinstance(run.growth, Growth):
        components["kasmina"] = run.growth.grower
    for name, component in components.items():
        parts.state.add(name, component)
    if isinstance(parts.companions, Companions):
        parts.companions.on_model_change = parts.state.refresh


def _declare_changes(parts: Assembly, config: GuardConfig) -> None:
    """Let the guard be lenient after every change that was made on purpose."""

    def settle(change: str) -> None:
        parts.run.guard.pause(config.pause_steps, change)

    def settle_seeds() -> None:
        parts.state.refresh()
        settle("a seed was removed")

    parts.state.on_refresh = parts.run.objective.refresh
    if isinstance(parts.run.growth, Growth):
        parts.run.growth.on_structure = settle_seeds
    parts.run.update.on_skip = parts.run.objective.running.put_back
    parts.run.update.on_rate_jump = lambda: settle("the schedule has changed the learning rate")
    if isinstance(parts.companions, Companions):
        parts.companions.on_change = settle
        if isinstance(parts.run.growth, Growth):
            parts.companions.on_report = parts.run.growth.tell


def _update(job: TrainingJob, config: TolariaConfig) -> Update:
    return Update(
        job.optimizer,
        scheduler=job.scheduler,
        scaler=job.scaler,
        clip_norm=config.train.clip_norm,
    )


def _objective(job: TrainingJob, config: TolariaConfig) -> Objective:
    return Objective(
        job.model,
        job.loss,
        aggregator=job.aggregator or PCGrad(),
        scaler=job.scaler,
        mode=config.aggregation.mode,
        measure_norm=config.guard.enabled or config.train.clip_norm is not None,
    )


def _state(job: TrainingJob, objective: Objective) -> TrainState:
    parts = {
        "scheduler": job.scheduler,
        "scaler": job.scaler,
        "aggregator": objective.aggregator,
    }
    stateful = {name: part for name, part in parts.items() if isinstance(part, Stateful)}
    grower = job.executor if isinstance(job.executor, Grower) else None
    return TrainState(job.model, job.optimizer, stateful, structure=grower)


def _growth(
    job: TrainingJob,
    config: TolariaConfig,
    objective: Objective,
    evaluation: Evaluation,
    data: ResumableLoader,
    recorder: Recorder,
) -> Growth | NoGrowth:
    if not isinstance(job.executor, Grower):
        return NoGrowth()
    growth = Growth(job.executor, objective, job.scaler, evaluation, data, recorder)
    growth.configure(config.growth)
    return growth


def _companions(
    job: TrainingJob,
    config: TolariaConfig,
    recorder: Recorder,
    outside: Outside,
    mode: ConservativeMode,
) -> Companions | NoCompanions:
    if job.policy is None:
        return NoCompanions()
    return Companions(job.policy, job.executor, outside, config.policy, recorder, mode)


def _drill(
    surroundings: Surroundings, data: ResumableLoader, recorder: Recorder
) -> Drill | NoDrill:
    if not surroundings.drill:
        return NoDrill()

    batches = data.plan.batches
    epoch, number = divmod(int(POSITION * data.epochs * batches), batches)
    # The second one belongs to the same epoch.
    number = max(0, min(number, batches - 2))

    def announce() -> None:
        message = (
            f"drill: batches {number} and {number + 1} of epoch {epoch} are poisoned on purpose "
            f"(inputs x {-SCALE:g}, out of order); --no-drill turns this off"
        )
        recorder.event(
            "drill_injected",
            message,
            Level.WARNING,
            step=recorder.update.progress.step,
            kind="poisoned batch",
        )

    return Drill(epoch, number, announce)


def _evaluation(job: TrainingJob, place: Callable[[Any], Any]) -> Evaluation:
    plan = None
    if job.validation is not None:
        size = job.batch_size
        plan = plan_data(job.validation, batch_size=size, shuffle=False, role="validation")
    return Evaluation(job.model, plan, metrics=job.metrics, loss=job.loss, place=place)
