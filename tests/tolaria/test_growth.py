"""Growth in the engine: whole lives, exact resumes, and rollbacks across every change."""

import asyncio
import dataclasses
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.core.config import TolariaConfig
from esper.leyline import (
    Action,
    SeedCommand,
    SeedOperation,
    Stage,
    StateError,
    SystemState,
    Tier,
    Verdict,
)
from esper.tolaria import TolariaTrainer
from esper.tolaria.rollback import CheckpointStore
from esper.tolaria.state import Capture
from support.growth import QUICK, Images, growing_job
from support.jobs import config
from support.sinks import Memory

EPOCHS = 10


def settings(**sections: Any) -> TolariaConfig:
    kept = {"checkpoints": {"keep": 20}, "snapshots": {"max_snapshots": 20}}
    chosen = config(train={"epochs": EPOCHS}, **(kept | sections))
    return chosen.model_copy(
        update={"growth": QUICK.model_copy(update={"ramp_steps": 20, "embargo_steps": 8})}
    )


def trainer(directory: Path | None = None, sink: Memory | None = None, **parts: Any) -> Any:
    return TolariaTrainer.from_job(
        growing_job(**parts),
        config=settings(),
        directory=directory,
        sinks=[] if sink is None else [sink],
    )


def weights(made: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in made.job.model.state_dict().items()}


def stages_told(memory: Memory, seed: str) -> list[str]:
    return [e.data["after"] for e in memory.events("seed_changed") if e.data["seed"] == seed]


def test_seeds_live_their_lives_in_the_engine() -> None:
    memory = Memory()
    made = trainer(sink=memory)
    states = list(made.run())
    for name in ("trunk.6", "head"):
        assert stages_told(memory, name) == [
            "germinated",
            "training",
            "blending",
            "holding",
            "fossilised",
        ]
    assert states[0].growth.seeds["head"].offers["mlp"].parameters > 0
    assert states[-1].growth.version == 4
    assert {r.seed for r in states[-1].reports} == {"trunk.6", "head"}
    assert made.metrics_snapshot()["kasmina.architecture_version"] == 4.0
    assert sum(p.numel() for p in made.job.model.parameters()) > sum(
        p.numel() for p in Images().parameters()
    )
    assert memory.events("run_ended")[0].data["outcome"] == "completed"


@pytest.mark.parametrize("stop", [20, 45, 52, 70, 90, 120])
def test_a_resume_at_any_stage_is_exact(stop: int, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    list(whole.run())
    first = trainer(tmp_path / "parts")
    steps = first.steps()
    for _ in range(stop):
        next(steps)
    steps.close()
    second = trainer(tmp_path / "parts", seed=99)
    second.resume()
    list(second.run())
    expected = weights(whole)
    found = weights(second)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert second.job.executor.stages == whole.job.executor.stages


def _copied(made: Any) -> Capture:
    capture = made.state.capture()
    return Capture({n: t.clone() for n, t in capture.tensors.items()}, capture.values)


@pytest.mark.parametrize("tier", [Tier.MEMORY, Tier.DISK])
@pytest.mark.parametrize(("kept", "until"), [(30, 50), (40, 75), (30, 110), (60, 110), (80, 100)])
def test_a_rollback_crosses_growth_to_the_bit(
    kept: int, until: int, tier: Tier, tmp_path: Path
) -> None:
    memory = Memory()
    made = trainer(tmp_path, sink=memory)
    steps = made.steps()
    then = None
    for step in range(1, until + 1):
        next(steps)
        if step == kept:
            then = _copied(made)
    assert then is not None
    before = made.job.executor.stages
    verdict = Verdict(
        Action.ROLLBACK, "test", True, first_suspect=until, before_step=kept, tier=tier
    )
    result = made._parts.run.rescue._recovery.roll_back(verdict).rollback
    assert (result.tier, result.step, result.error) == (tier, kept, "")
    now = made.state.capture()
    model = {n: t for n, t in now.tensors.items() if n.startswith("model/")}
    saved = {n: t for n, t in then.tensors.items() if n.startswith("model/")}
    assert model.keys() == saved.keys()
    assert all(torch.equal(model[name], tensor) for name, tensor in saved.items())
    moments = {n: t for n, t in then.tensors.items() if n.startswith("optimizer/")}
    assert all(torch.equal(now.tensors[name], tensor) for name, tensor in moments.items())
    assert now.values["structure"]["changes"] == then.values["structure"]["changes"]
    assert now.values["components"]["kasmina"] == then.values["components"]["kasmina"]
    told = [r for r in made._parts.run.growth.reports.newest() if r.command == "rollback"]
    changed = {n for n, s in before.items() if made.job.executor.stages[n] is not s}
    assert changed <= {report.seed for report in told}
    for _ in steps:
        pass
    assert memory.events("run_ended")[0].data["outcome"] == "completed"


def test_a_grown_state_needs_the_executor_that_it_was_grown_with(tmp_path: Path) -> None:
    list(trainer(tmp_path).run())
    plain = TolariaTrainer.from_job(
        dataclasses.replace(growing_job(), executor=None), config=settings(), directory=tmp_path
    )
    with pytest.raises(StateError, match="give the job the executor"):
        plain.resume()


def test_a_seed_that_diverges_while_it_blends_is_taken_back(tmp_path: Path) -> None:
    memory = Memory()
    made = trainer(tmp_path, sink=memory)
    spoilt = False
    for _ in made.steps():
        executor = made.job.executor
        blending = [n for n, s in executor.stages.items() if s is Stage.BLENDING]
        if blending and not spoilt and float(executor._garden.slot(blending[0]).alpha) > 0.3:
            spoilt = True
            with torch.no_grad():
                for weight in executor._garden.slot(blending[0]).own_parameters():
                    weight.fill_(float("nan"))
    assert spoilt
    assert memory.events("rollback")
    told = [e for e in memory.events("seed_changed") if e.data["command"] == "rollback"]
    assert told
    assert memory.events("run_ended")[0].data["outcome"] == "completed"
    assert all(bool(torch.isfinite(t).all()) for t in weights(made).values())


class Hangs:
    """Never answers."""

    async def decide(self, state: SystemState) -> None:
        await asyncio.sleep(3600)


def test_a_policy_that_hangs_leaves_training_as_it_is() -> None:
    with_it = trainer(policy=Hangs())
    list(with_it.run())
    alone = dataclasses.replace(growing_job(), policy=None)
    plain = TolariaTrainer.from_job(alone, config=settings())
    list(plain.run())
    assert all(map(torch.equal, weights(with_it).values(), weights(plain).values()))


class Nonsense:
    mode = "wait"
    isolation = "thread"

    def __init__(self) -> None:
        self.answers: Iterator[Any] = iter(
            [
                SeedCommand("no such slot", SeedOperation.GERMINATE, "mlp"),
                SeedCommand("head", SeedOperation.GERMINATE, "no such blueprint"),
                SeedCommand("head", SeedOperation.ADVANCE),
                SeedCommand("head", SeedOperation.RETARGET, target=float("nan")),
                SeedCommand("head", SeedOperation.CULL),
                SeedCommand("head", SeedOperation.GERMINATE, "mlp", version=17),
            ]
        )

    def decide(self, state: SystemState) -> Any:
        return next(self.answers, None)


def test_commands_that_make_no_sense_change_nothing() -> None:
    memory = Memory()
    odd = trainer(sink=memory, policy=Nonsense())
    list(odd.run())
    plain = trainer(policy=Hangs())
    list(plain.run())
    told = memory.events("seed_refused") + memory.events("kasmina_error")
    assert len(told) >= 6
    assert all(map(torch.equal, weights(odd).values(), weights(plain).values()))


@pytest.mark.fault
@pytest.mark.timeout(300)
def test_kills_in_the_middle_of_growth_lose_nothing(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    list(whole.run())
    expected = weights(whole)
    chance = random.Random(4)
    kills = 0
    for _ in range(60):
        child = os.fork()
        if child == 0:
            _live(tmp_path / "killed")
        seconds = chance.uniform(0.05, 1.0)
        kills += _end(child, seconds)
        if (tmp_path / "killed" / "weights.pt").exists():
            break
    else:
        pytest.fail("the run never ended in 60 lives")
    assert kills >= 2
    found = torch.load(tmp_path / "killed" / "weights.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _live(directory: Path) -> None:
    made = TolariaTrainer.from_job(
        growing_job(), config=settings(checkpoints={"every": 3}), directory=directory
    )
    if CheckpointStore(directory / "checkpoints").list():
        made.resume()
    list(made.run())
    torch.save(weights(made), directory / "weights.tmp")
    os.replace(directory / "weights.tmp", directory / "weights.pt")
    os._exit(0)


def _end(child: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True
