"""A small growth process: losses fall towards a floor, and each seed moves that floor by its gain.

The rules of a slot's life are those of the real executor: gates, ramps, embargo, one report for
each command.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from esper.leyline import (
    AdaptationCommand,
    FieldReport,
    Gain,
    Gate,
    GateResult,
    GrowthState,
    NoChange,
    Offer,
    Policy,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
    SeedState,
    Stage,
    SystemState,
)

RAMP_STEPS = 150
EMBARGO_STEPS = 300
LEAST_TRAINING = 100
HELD_OUT_BATCHES = 8
T_95 = 2.365
BLENDED = (Stage.BLENDING, Stage.HOLDING)


@dataclass
class Slot:
    """One slot, and what each blueprint would really gain in it, as a share of the first loss."""

    gains: dict[str, float]
    residual: float = 1.0
    stage: Stage = Stage.DORMANT
    since: int = 0
    blueprint: str = ""
    alpha: float = 0.0
    start: float = 0.0
    target: float = 0.0
    fading: bool = False
    born: int = 0

    def share(self, clock: int) -> float:
        """Return what the seed gains when it is blended in wholly, having learned so far."""
        learned = 1 - math.exp(-(clock - self.born) / 60) if self.blueprint else 0.0
        return self.gains.get(self.blueprint, 0.0) * learned


@dataclass
class GrowthProcess:
    """A run with slots.

    :ivar gap: share of the held-out loss that is over-fitting, by epoch.
    """

    slots: dict[str, Slot]
    first: float = 4.5
    floor: float = 1.5
    tau_epochs: float = 4.0
    noise: float = 0.01
    gap: float = 0.0
    epochs: int = 15
    steps_per_epoch: int = 188
    parameters: int = 4000
    offer: Offer = field(default_factory=lambda: Offer(800, 20_000.0))
    budget: int | None = None
    seed: int = 0
    step: int = 0
    epoch: int = -1
    version: int = 0
    kept: float = 0.0
    reports: list[FieldReport] = field(default_factory=list)
    applied: list[tuple[int, str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def train(self) -> SystemState:
        """Train for an epoch and return its state."""
        for _ in range(self.steps_per_epoch):
            self.step += 1
            for slot in self.slots.values():
                self.follow(slot)
        self.epoch += 1
        return self.state()

    def follow(self, slot: Slot) -> None:
        """Let a stage follow that follows by itself."""
        age = self.step - slot.since
        if slot.stage is Stage.GERMINATED:
            self.go(slot, Stage.TRAINING)
        elif slot.stage is Stage.BLENDING:
            slot.alpha = slot.start + (slot.target - slot.start) * min(1.0, age / RAMP_STEPS)
            if age >= RAMP_STEPS and slot.fading:
                self.uproot(slot)
            elif age >= RAMP_STEPS:
                self.go(slot, Stage.HOLDING)
        elif slot.stage is Stage.CULLED:
            self.go(slot, Stage.EMBARGOED)
        elif slot.stage is Stage.EMBARGOED and age >= EMBARGO_STEPS:
            slot.blueprint = ""
            self.go(slot, Stage.DORMANT)

    def uproot(self, slot: Slot) -> None:
        self.version += 1
        slot.fading = False
        self.go(slot, Stage.CULLED)

    def go(self, slot: Slot, stage: Stage) -> None:
        slot.stage, slot.since = stage, self.step

    def state(self) -> SystemState:
        """Measure."""
        progress = math.exp(-(self.epoch + 1) / self.tau_epochs)
        blended = sum(
            s.alpha * s.share(self.step) for s in self.slots.values() if s.stage in BLENDED
        )
        size = self.floor + (self.first - self.floor) * progress
        held = size * (1 - self.kept - blended) * (1 + self.random.normal(0, self.noise))
        seeds = {name: self.describe(slot, size) for name, slot in self.slots.items()}
        growth = GrowthState(
            version=self.version,
            seeds=seeds,
            parameters=self.parameters + sum(s.parameters for s in seeds.values()),
            parameter_budget=self.budget,
            held_out={"left": held / 2, "right": held / 2},
            steps_left=(self.epochs - self.epoch - 1) * self.steps_per_epoch,
        )
        training = held * (1 - self.gap)
        return SystemState(
            epoch=self.epoch,
            step=self.step,
            attempt=0,
            time=float(self.step),
            losses={"left": training / 2, "right": training / 2},
            growth=growth,
            reports=self.reports[-64:],
        )

    def describe(self, slot: Slot, size: float) -> SeedState:
        live = slot.stage in (Stage.GERMINATED, Stage.TRAINING, *BLENDED)
        return SeedState(
            stage=slot.stage,
            age=self.step - slot.since,
            blueprint=slot.blueprint,
            alpha=slot.alpha if slot.stage in BLENDED else 0.0,
            parameters=self.offer.parameters if live else 0,
            flops=self.offer.flops if live else None,
            residual=slot.residual,
            gain=self.measure(slot, size),
            fading=slot.fading,
            embargo_left=(
                EMBARGO_STEPS - (self.step - slot.since) if slot.stage is Stage.EMBARGOED else 0
            ),
            offers=dict.fromkeys(slot.gains, self.offer) if slot.stage is Stage.DORMANT else {},
        )

    def measure(self, slot: Slot, size: float) -> Gain | None:
        if slot.stage not in (Stage.TRAINING, *BLENDED):
            return None
        alpha = slot.alpha if slot.stage in BLENDED else 1.0
        true = alpha * slot.share(self.step) * size
        pairs = true + self.random.normal(0, self.noise * size, HELD_OUT_BATCHES)
        reach = T_95 * pairs.std(ddof=1) / math.sqrt(HELD_OUT_BATCHES)
        mean = float(pairs.mean())
        return Gain(mean, mean - float(reach), mean + float(reach), HELD_OUT_BATCHES)

    def apply(self, command: AdaptationCommand, state: SystemState) -> None:
        """Carry out a command that answers a state, or refuse it."""
        if isinstance(command, NoChange):
            return
        if isinstance(command, ScaleLearningRate):
            self.applied.append((self.epoch, "rate", "", f"{command.factor:g}"))
            return
        assert state.growth is not None
        slot = self.slots[command.seed]
        before, results = slot.stage, self.gates(command, state)
        refused = [result for result in results if not result.passed]
        if command.version not in (-1, self.version):
            refused = [GateResult(Gate.G0, False, "stale")]
            results = []
        if not refused:
            self.carry_out(command, slot)
            self.applied.append((self.epoch, command.operation.value, command.seed, slot.blueprint))
        self.reports.append(
            FieldReport(
                "seed",
                applied=not refused,
                detail="; ".join(result.reason for result in refused) or "done",
                seed=command.seed,
                operation=command.operation.value,
                blueprint=slot.blueprint or command.blueprint,
                before=before,
                after=slot.stage,
                version=self.version,
                step=self.step,
                gates=results,
            )
        )

    def gates(self, command: SeedCommand, state: SystemState) -> list[GateResult]:
        """Check what the executor checks."""
        assert state.growth is not None
        slot, gain = self.slots[command.seed], state.growth.seeds[command.seed].gain
        sure = gain is not None and gain.low > 0
        match command.operation, slot.stage:
            case SeedOperation.GERMINATE, Stage.DORMANT:
                passed = command.blueprint in slot.gains
                return [GateResult(Gate.G0, passed, "fits")]
            case SeedOperation.ADVANCE, Stage.TRAINING:
                passed = sure and self.step - slot.since >= LEAST_TRAINING
                return [GateResult(Gate.G2, passed, "gains")]
            case SeedOperation.ADVANCE, Stage.HOLDING:
                return [GateResult(Gate.G4, sure and slot.alpha >= 1, "worthwhile")]
            case SeedOperation.HOLD, Stage.BLENDING:
                return []
            case SeedOperation.RETARGET, Stage.HOLDING:
                return []
            case SeedOperation.CULL, (
                Stage.GERMINATED | Stage.TRAINING | Stage.BLENDING | Stage.HOLDING
            ):
                return []
        return [GateResult(Gate.G0, False, f"{command.operation} at {slot.stage}")]

    def carry_out(self, command: SeedCommand, slot: Slot) -> None:
        match command.operation:
            case SeedOperation.GERMINATE:
                slot.blueprint, slot.born, slot.alpha = command.blueprint, self.step, 0.0
                self.version += 1
                self.go(slot, Stage.GERMINATED)
            case SeedOperation.ADVANCE if slot.stage is Stage.TRAINING:
                slot.start, slot.target = 0.0, 1.0
                self.go(slot, Stage.BLENDING)
            case SeedOperation.ADVANCE:
                self.kept += slot.share(self.step)
                self.parameters += self.offer.parameters
                self.version += 1
                self.go(slot, Stage.FOSSILISED)
            case SeedOperation.HOLD:
                self.go(slot, Stage.HOLDING)
            case SeedOperation.RETARGET:
                slot.start, slot.target = slot.alpha, command.target
                self.go(slot, Stage.BLENDING)
            case SeedOperation.CULL if slot.stage in BLENDED and slot.alpha > 0:
                slot.start, slot.target, slot.fading = slot.alpha, 0.0, True
                self.go(slot, Stage.BLENDING)
            case SeedOperation.CULL:
                self.uproot(slot)


def follow(
    process: GrowthProcess, policy: Policy, *, late: bool = False
) -> list[AdaptationCommand]:
    """Run a process to its end under a policy; return its answers.

    :param late: apply each answer at the next boundary, as while training goes on meanwhile.
    """
    answers: list[AdaptationCommand] = []
    waiting: tuple[AdaptationCommand, SystemState] | None = None
    for _ in range(process.epochs):
        state = process.train()
        if waiting is not None:
            process.apply(*waiting)
        answer = policy.decide(state)
        assert isinstance(answer, AdaptationCommand)
        answers.append(answer)
        if late:
            waiting = answer, state
        else:
            process.apply(answer, state)
    return answers
