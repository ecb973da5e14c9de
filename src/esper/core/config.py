"""What can be set: the sections of the configuration, their defaults and their limits."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)


class Section(BaseModel):
    """A group of settings: frozen, and closed to names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainConfig(Section):
    """The loop itself."""

    epochs: PositiveInt = Field(15, description="Passes over the training data.")
    seed: int = Field(0, ge=0, description="Seeds data order, initialisation and dropout.")
    device: str = Field("auto", description="A torch device, or auto: cuda when there is one.")
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 leaves torch's choice.")
    clip_norm: PositiveFloat | None = Field(
        None, description="Largest norm of the combined gradient; unset means no clipping."
    )


AggregationMode = Literal["sequential", "factored", "batched", "batched-factored", "features"]


class AggregationConfig(Section):
    """How the gradients of several tasks are obtained; see the page docs/aggregation.md."""

    mode: AggregationMode = Field(
        "sequential",
        description="sequential, factored, batched, batched-factored (all exact), or features.",
    )


class GuardConfig(Section):
    """The divergence guard between backward pass and optimizer step."""

    enabled: bool = Field(True, description="Judge every step before it is committed.")
    window: int = Field(64, ge=8, description="Healthy losses that the statistics look back on.")
    warmup: int = Field(32, ge=4, description="Healthy losses needed before a spike is called.")
    spike_deviations: PositiveFloat = Field(
        10.0, description="A loss or gradient norm this many MADs above the median is a spike."
    )
    spike_patience: PositiveInt = Field(
        2, description="Spikes of a loss in a row that call a divergence; earlier ones are skipped."
    )
    trend_ratio: float = Field(
        1.25, gt=1, description="A loss this many times its exponential average is high ..."
    )
    trend_deviations: PositiveFloat = Field(
        3.25, description="... if it also lies this many MADs above the median."
    )
    trend_patience: PositiveInt = Field(
        4, description="High losses in a row that call a divergence."
    )
    margin: PositiveInt = Field(
        8, description="Steps between a suspicion and the newest state that is trusted."
    )
    max_skips: PositiveInt = Field(
        3, description="Updates skipped in a row; non-finite steps after that roll back."
    )
    skip_budget: int = Field(
        20, ge=0, description="Updates skipped for a spike within the recovery window."
    )
    max_rollbacks: PositiveInt = Field(
        3, description="Rollbacks within the recovery window before training stops."
    )
    recovery_steps: PositiveInt = Field(
        500, description="The recovery window: steps after which the budgets start anew."
    )
    rate_cut: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="Learning rate multiplier of a rollback; lasting from the second on."
    )
    rewarm_steps: PositiveInt = Field(
        100, description="Steps in which the rate climbs back after the first rollback."
    )
    pause_steps: int = Field(
        32, ge=0, description="Steps of lenience after a declared change of rate or model."
    )


class SnapshotConfig(Section):
    """Tier 1: copies of the whole training state in memory."""

    enabled: bool = Field(True, description="Keep snapshots to roll back to.")
    every: PositiveInt = Field(10, description="Steps between two snapshots.")
    max_megabytes: PositiveFloat = Field(
        512.0, description="Memory for all snapshots together, in MiB."
    )
    max_snapshots: int = Field(8, ge=2, description="Snapshots kept at the same time.")


class CheckpointConfig(Section):
    """Tier 2: durable checkpoints on disk."""

    enabled: bool = Field(True, description="Write checkpoints when the run has a directory.")
    mode: Literal["overlap", "wait"] = Field(
        "overlap", description="overlap: written beside training; wait: training stands still."
    )
    every: PositiveInt = Field(100, description="Steps between two checkpoints.")
    keep: int = Field(3, ge=2, description="Newest checkpoints that are kept.")
    keep_every: int = Field(
        0, ge=0, description="Checkpoints at multiples of so many steps stay for good; 0: none."
    )
    best_metric: str | None = Field(
        None, description="Validation metric; the epochs that are best by it are kept, too."
    )
    best_direction: Literal["min", "max"] = Field(
        "min", description="Whether the lowest or the highest value of best_metric is the best."
    )
    keep_best: PositiveInt = Field(1, description="How many of the best are kept.")
    save_deadline_ms: PositiveFloat = Field(
        120000.0, description="A checkpoint that is not written by then is given up, and told of."
    )


class RollbackConfig(Section):
    """How long going back to a trusted state may take."""

    fast_deadline_ms: PositiveFloat = Field(
        500.0, description="From a snapshot in memory; beyond that, a checkpoint is tried."
    )
    full_deadline_ms: PositiveFloat = Field(
        12000.0, description="From a checkpoint on disk; then the process that reads is killed."
    )


class PolicyConfig(Section):
    """When, how long and where the policy (Tamiyo) is asked."""

    mode: Literal["auto", "overlap", "wait"] = Field(
        "auto",
        description="overlap: train on and take the answer at a later boundary; wait: stand still; "
        "auto: as the policy declares, else overlap.",
    )
    isolation: Literal["auto", "async", "thread", "process"] = Field(
        "auto",
        description="Where the policy runs; auto: as it declares, else where it can be stopped.",
    )

    every: PositiveInt = Field(1, description="Epochs between two questions to the policy.")
    deadline_ms: PositiveFloat = Field(2000.0, description="An answer later than this is dropped.")
    prepare_deadline_ms: PositiveFloat = Field(
        30000.0, description="Time for the executor to prepare a command, beside training."
    )


class GrowthConfig(Section):
    """How seeds grow (Kasmina), where a job has slots; see the page docs/growth.md."""

    shadow_every: PositiveInt = Field(
        1, description="A seed that trains in isolation learns at every so many steps."
    )
    min_training_steps: int = Field(
        100, ge=0, description="Steps that a seed trains in isolation before it may blend."
    )
    ramp_steps: PositiveInt = Field(150, description="Steps in which a seed's share rises to one.")
    rate_factor: PositiveFloat = Field(
        1.0, description="Learning rate of a seed over that of the first parameter group."
    )
    warmup_steps: int = Field(
        20, ge=0, description="Steps in which the learning rate of a new seed rises."
    )
    held_out_batches: int = Field(
        8, ge=2, description="Validation batches that the gain of a seed is measured on."
    )
    embargo_steps: int = Field(
        300, ge=0, description="Steps after a cull before anything germinates there again."
    )
    nonfinite_patience: PositiveInt = Field(
        3, description="Steps in a row without a finite gradient after which a seed is culled."
    )
    max_parameters: PositiveInt | None = Field(
        None, description="Most parameters that the model may have; unset means no limit."
    )
    growths_per_slot: PositiveInt = Field(
        3, description="Seeds that may be fossilised in one slot, one behind the other."
    )
    fold_tolerance: PositiveFloat = Field(
        1e-5, description="Difference of outputs that folding may make, over their largest value."
    )


class BreakerConfig(Section):
    """When a companion that keeps failing is left alone, and for how long."""

    failures: PositiveInt = Field(
        3, description="Failures in a row after which a companion is no longer called."
    )
    cooldown_s: PositiveFloat = Field(
        30.0, allow_inf_nan=False, description="Seconds until it is tried again."
    )
    max_cooldown_s: PositiveFloat = Field(
        300.0,
        allow_inf_nan=False,
        validate_default=True,
        description="The most that failing trials, which double the seconds, stretch them to.",
    )

    @field_validator("max_cooldown_s")
    @classmethod
    def _not_below_cooldown(cls, value: float, info: ValidationInfo) -> float:
        cooldown_s = info.data.get("cooldown_s", 0.0)
        if value < cooldown_s:
            raise ValueError(f"give at least breaker.cooldown_s, which is {cooldown_s:g}")
        return value


class ConservativeConfig(Section):
    """How the engine stops taking risks after trouble, until training is healthy again."""

    healthy_steps: PositiveInt = Field(
        200,
        description="Healthy steps, none refused between, after which conservative mode is left.",
    )
    guard_factor: float = Field(
        0.9, gt=0, le=1, description="The guard's thresholds are multiplied by this meanwhile."
    )


class EmergencyConfig(Section):
    """Emergencies: how often they are repeated, and how long telling about one may take."""

    repeats_per_minute: PositiveInt = Field(
        60, description="Repeats of a level that are passed on; rising levels always are."
    )
    broadcast_deadline_ms: PositiveFloat = Field(
        2000.0, description="Time for one broadcast; it is repeated until it has succeeded."
    )


class IncidentConfig(Section):
    """Records of what went wrong, with all that is needed to go through it again."""

    enabled: bool = Field(True, description="Record incidents when the run has a directory.")
    max_records: PositiveInt = Field(
        20, description="Records of a run; what comes after the first ones is counted only."
    )
    max_batch_megabytes: float = Field(
        64.0, ge=0, description="Batch content kept with a record, in MiB; of more, the shapes are."
    )
    max_state_megabytes: float = Field(
        512.0, ge=0, description="State kept with a record, in MiB; else a checkpoint is named."
    )
    write_deadline_ms: PositiveFloat = Field(
        60000.0, description="A record that is not written by then is given up, and told of."
    )


class WorkerConfig(Section):
    """The worker that carries out every call to the outside under a deadline."""

    max_concurrency: PositiveInt = Field(8, description="Calls that may run at the same time.")
    shutdown_timeout_s: float = Field(
        5.0, ge=0, description="Seconds that closing waits for calls to end."
    )
    grace_ms: float = Field(
        50.0, ge=0, description="Time past its deadline for a call to end before it is abandoned."
    )
    max_loop_lag_ms: PositiveFloat = Field(
        100.0, description="A call that blocks the worker's event loop for longer is named."
    )


class ProfilerConfig(Section):
    """Profiles of a few steps; see the page docs/profiling.md."""

    enabled: bool = Field(
        True, description="Record a profile when asked for, on schedule, and when steps are slow."
    )
    wait: int = Field(0, ge=0, description="Steps before each scheduled recording.")
    warmup: int = Field(
        1, ge=0, description="Steps with the profiler on before each scheduled recording."
    )
    active: int = Field(0, ge=0, description="Steps of each; 0 means that none is scheduled.")
    repeat: PositiveInt = Field(1, description="Recordings that are scheduled.")
    slow_step_factor: float = Field(
        3.0, gt=1, description="A step this many times slower than the median is slow; inf: none."
    )
    slow_step_patience: PositiveInt = Field(
        3, description="Slow steps in a row that raise an alarm, and are profiled."
    )
    slow_step_cooldown: PositiveInt = Field(
        1000, description="Steps after an alarm in which there is no other."
    )
    max_traces: PositiveInt = Field(8, description="Traces that a run keeps; no more are recorded.")


class TelemetryConfig(Section):
    """What leaves the loop."""

    enabled: bool = Field(True, description="Record steps, epochs and events.")
    epoch_boundary_ms: PositiveFloat = Field(
        18.0, description="An epoch boundary that takes longer, validation aside, raises an alarm."
    )


class TolariaConfig(Section):
    """Everything the engine can be told, by section."""

    train: TrainConfig = TrainConfig()
    aggregation: AggregationConfig = AggregationConfig()
    guard: GuardConfig = GuardConfig()
    snapshots: SnapshotConfig = SnapshotConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    rollback: RollbackConfig = RollbackConfig()
    policy: PolicyConfig = PolicyConfig()
    growth: GrowthConfig = GrowthConfig()
    breaker: BreakerConfig = BreakerConfig()
    conservative: ConservativeConfig = ConservativeConfig()
    emergency: EmergencyConfig = EmergencyConfig()
    incidents: IncidentConfig = IncidentConfig()
    worker: WorkerConfig = WorkerConfig()
    profiler: ProfilerConfig = ProfilerConfig()
    telemetry: TelemetryConfig = TelemetryConfig()


class RunConfig(Section):
    """Where runs live and what they are made of."""

    target: str = Field(
        "esper.jobs.digits:build", description="The job: module:function returning a TrainingJob."
    )
    directory: Path = Field(Path("runs"), description="Folder that holds a folder for each run.")
    name: str | None = Field(None, description="Name of the run; unset means UTC time and job.")
    drill: bool | None = Field(
        None, description="Inject one divergence; unset means only in the built-in job."
    )
