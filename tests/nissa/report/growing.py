"""Records of runs that grow: one written by hand, and real ones."""

import math
from pathlib import Path
from typing import Any

import msgspec
import torch

from esper.core.config import TolariaConfig
from esper.leyline import (
    Event,
    FieldReport,
    Gain,
    Gate,
    GateResult,
    GrowthState,
    Record,
    SeedState,
    Stage,
    StepRecord,
    SystemState,
)
from esper.tolaria import TolariaTrainer
from support.growth import QUICK, growing_job
from support.jobs import config
from support.sinks import Memory


def step(number: int, attempt: int = 0) -> StepRecord:
    return StepRecord(
        step=number, attempt=attempt, epoch=number // 50, batch=number % 50, time=1e9 + number / 50,
        action="commit", loss=1.0, losses={"loss": math.exp(-number / 100)}, learning_rate=0.1,
    )  # fmt: skip


def event(name: str, at: int, attempt: int = 0, **data: Any) -> Event:
    return Event(name, 1e9, f"{name} at {at}", step=at, attempt=attempt, data=data)


def changed(at: int, seed: str, before: str, after: str, *, attempt: int = 0, **more: Any) -> Event:
    given: dict[str, Any] = {"command": "engine", "detail": f"seed {seed!r}: {before} -> {after}"}
    report = FieldReport(
        applied=True, seed=seed, before=Stage(before), after=Stage(after), step=at,
        **(given | {"blueprint": "mlp"} | more),
    )  # fmt: skip
    return event("seed_changed", at, attempt, **msgspec.to_builtins(report))


def germinated(at: int, seed: str, added: int, **more: Any) -> Event:
    gate = GateResult(Gate.G0, True, f"{added} parameters more", {"added": float(added)})
    command = {"command": "seed", "operation": "germinate", "gates": [gate]}
    return changed(at, seed, "dormant", "germinated", **(command | more))


def decided(at: int, rule: str, reason: str, *, attempt: int = 0, **more: Any) -> Event:
    given: dict[str, Any] = {"decision": "seed", "rule": rule, "reason": reason}
    return event("policy_decided", at, attempt, **(given | more))


def state(at: int, parameters: int, attempt: int = 0, **seeds: SeedState) -> SystemState:
    return SystemState(
        epoch=at // 50 - 1, step=at, attempt=attempt, time=1e9, losses={"loss": 0.5},
        growth=GrowthState(version=0, seeds=seeds, parameters=parameters),
    )  # fmt: skip


DORMANT = SeedState(Stage.DORMANT)
GAIN = Gain(0.5, 0.25, 0.75, 8)
FOSSILISING = GateResult(Gate.G4, True, "gain on held-out data 0.5 (0.25 to 0.75)")


def records() -> list[Record]:
    """A run of 300 steps: a grows and stays; b begins to blend, diverges, and is culled later."""
    result: list[Record] = [event("run_started", 0, **STARTED)]
    result += [*map(step, range(50)), state(50, 1000, a=DORMANT, b=DORMANT)]
    result += [
        decided(50, "no change", "too early", decision="no_change"),
        decided(50, "germinate", "it under-fits; 'mlp' in 'a'", values={"gap": 0.1, "x": 2.0},
                thresholds={"gap": 0.3, "y": 1.5}, otherwise="gap above 0.3"),
        germinated(50, "a", 200),
        changed(51, "a", "germinated", "training"),
    ]  # fmt: skip
    training = SeedState(Stage.TRAINING, blueprint="mlp", parameters=200, gain=GAIN)
    result += [*map(step, range(50, 100)), state(100, 1200, a=training, b=DORMANT)]
    result += [
        decided(100, "blend", "seed 'a' gains"),
        changed(100, "a", "training", "blending", command="seed", operation="advance"),
        germinated(100, "b", 30, blueprint="bad"),
        changed(101, "b", "germinated", "training", blueprint="bad"),
    ]
    ramping = SeedState(Stage.BLENDING, blueprint="mlp", alpha=0.25, parameters=200, gain=GAIN)
    learning = SeedState(Stage.TRAINING, blueprint="bad", parameters=30)
    result += [*map(step, range(100, 150)), state(150, 1230, a=ramping, b=learning)]
    result += [changed(180, "a", "blending", "holding"), *map(step, range(150, 190))]
    result.append(
        changed(185, "b", "training", "blending", blueprint="bad", command="seed",
                operation="advance"),
    )  # fmt: skip
    result.append(changed(160, "b", "blending", "training", blueprint="bad", command="rollback"))
    result.append(event("rollback", 160, 1, from_step=189, to_step=160, latency_ms=1.0))
    result += [step(number, 1) for number in range(160, 200)]
    holding = SeedState(Stage.HOLDING, blueprint="mlp", alpha=1.0, parameters=200, gain=GAIN)
    result += [
        changed(181, "a", "blending", "holding", attempt=1),
        state(200, 1230, 1, a=holding, b=learning),
        decided(200, "fossilise", "seed 'a' pays", attempt=1),
        changed(200, "a", "holding", "fossilised", attempt=1, command="seed",
                operation="advance", gates=[FOSSILISING]),
        decided(200, "cull", "seed 'b' is harmful", attempt=1),
        changed(200, "b", "training", "culled", attempt=1, command="seed", operation="cull",
                blueprint="bad"),
        changed(201, "b", "culled", "embargoed", attempt=1, blueprint="bad"),
        *(step(number, 1) for number in range(200, 300)),
        event("run_ended", 300, 1, outcome="completed", skipped=0, rollbacks=1),
    ]  # fmt: skip
    return result


STARTED: dict[str, Any] = {
    "run": "r", "job": "growing", "parameters": 1000, "samples": 20, "validation_samples": 5,
    "epochs": 6, "steps_per_epoch": 50, "device": "cpu", "seed": 3, "drill": False,
    "versions": {"esper": "0.1", "torch": "2.13"},
}  # fmt: skip


def settings() -> TolariaConfig:
    growth = QUICK.model_copy(update={"ramp_steps": 20, "embargo_steps": 8})
    return config(train={"epochs": 10}).model_copy(update={"growth": growth})


def real_run(directory: Path, *, spoil: bool = False) -> tuple[Memory, dict[str, Stage]]:
    """Train a model that grows; return its records, and the stages of its slots at the end.

    :param spoil: whether to fill a blending seed with NaN, so that it is taken back.
    """
    memory = Memory()
    trainer = TolariaTrainer.from_job(
        growing_job(), config=settings(), directory=directory, sinks=[memory]
    )
    executor: Any = trainer.job.executor
    for _ in trainer.steps():
        blending = [name for name, at in executor.stages.items() if at is Stage.BLENDING]
        if spoil and blending and float(executor._garden.slot(blending[0]).alpha) > 0.3:
            spoil = False
            with torch.no_grad():
                for weight in executor._garden.slot(blending[0]).own_parameters():
                    weight.fill_(math.nan)
    return memory, executor.stages
