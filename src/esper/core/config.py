"""What can be set: the sections of the configuration, their defaults and their limits."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


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
    warmup: int = Field(20, ge=4, description="Healthy losses needed before a spike is called.")
    spike_deviations: PositiveFloat = Field(
        8.0, description="A loss this many MADs above the median is a spike."
    )
    spike_patience: PositiveInt = Field(2, description="Spikes in a row that call a divergence.")
    trend_ratio: float = Field(
        1.25, gt=1, description="A loss this many times its exponential average is high ..."
    )
    trend_deviations: PositiveFloat = Field(
        4.0, description="... if it also lies this many MADs above the median."
    )
    trend_patience: PositiveInt = Field(
        3, description="High losses in a row that call a divergence."
    )
    margin: PositiveInt = Field(
        8, description="Steps between a suspicion and the newest state that is trusted."
    )
    max_skips: PositiveInt = Field(
        3, description="Non-finite steps in a row that are skipped before rolling back."
    )
    max_rollbacks: PositiveInt = Field(
        3, description="Rollbacks within the recovery window before training stops."
    )
    recovery_steps: PositiveInt = Field(
        500, description="Committed steps after which the count of rollbacks starts anew."
    )
    rate_cut: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="Learning rate multiplier from the second rollback in a row on."
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
    every: PositiveInt = Field(100, description="Steps between two checkpoints.")
    keep: int = Field(3, ge=2, description="Newest checkpoints that are kept.")


class PolicyConfig(Section):
    """When and how long the policy (Tamiyo) is asked."""

    every: PositiveInt = Field(1, description="Epochs between two questions to the policy.")
    deadline_ms: PositiveFloat = Field(2000.0, description="An answer later than this is dropped.")


class TelemetryConfig(Section):
    """What leaves the loop."""

    enabled: bool = Field(True, description="Record steps, epochs and events.")


class TolariaConfig(Section):
    """Everything the engine can be told, by section."""

    train: TrainConfig = TrainConfig()
    aggregation: AggregationConfig = AggregationConfig()
    guard: GuardConfig = GuardConfig()
    snapshots: SnapshotConfig = SnapshotConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    policy: PolicyConfig = PolicyConfig()
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
