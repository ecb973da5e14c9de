"""What a bad seed, a bad policy and a killed process do to the model they meet."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from calls.policies import Awaits, Spins
from esper.core.config import CheckpointConfig, GrowthConfig, PolicyConfig, TolariaConfig
from esper.core.config import TrainConfig as Train
from esper.core.worker import make_worker
from esper.kasmina import Kasmina
from esper.kasmina.slot import slots_of
from esper.leyline import DivergenceError, Policy, SeedCommand, SeedOperation, Stage
from esper.tamiyo.fixed import Entry, NoPolicy, SchedulePolicy
from esper.tolaria import TolariaTrainer
from growing.arms import planting
from growing.figures import table
from growing.meter import Meter
from growing.task import Task
from growing.training import Notes, Plan, Setting, make_job

_SETTING, _SEED, EPOCHS = Setting(1e-2, 0.0), 0, 12
_FAULT_STEP = 250
PROGRAM = Path(__file__).parents[1] / "growth.py"


@dataclass
class Ending:
    """What became of one run.

    :ivar accuracy: on the validation set.
    :ivar digest: of all weights of the host.
    :ivar stages: that its slots were in at the end.
    """

    accuracy: float
    digest: str
    stages: list[Stage] = field(default_factory=list)
    rollbacks: int = 0
    note: str = ""


def robust(task: Task) -> str:
    """Return the table of accuracies with and without each fault."""
    task = replace(task, epochs=EPOCHS)
    calm = ending_of(task, NoPolicy())
    healthy = ending_of(task, one_seed(task, "shadow"))
    inserted = ending_of(task, one_seed(task, "insert"))
    blended = ending_of(task, one_seed(task, "shadow", blend=True))
    poison = poison_seed(Stage.TRAINING)
    cases = [
        ("a seed in isolation, at its own rate", calm, healthy),
        (
            "... at 100 times the rate",
            calm,
            ending_of(task, one_seed(task, "shadow"), rate=100.0),
        ),
        ("... that becomes NaN", calm, ending_of(task, one_seed(task, "shadow"), fault=poison)),
        (
            "a seed put in at once, at 100 times the rate",
            inserted,
            ending_of(task, one_seed(task, "insert"), rate=100.0),
        ),
        (
            "a seed that becomes NaN once it is blended",
            blended,
            ending_of(
                task,
                one_seed(task, "shadow", blend=True),
                fault=poison_seed(Stage.BLENDING, Stage.HOLDING),
            ),
        ),
        ("a policy that spins", calm, ending_of(task, Spins())),
        ("a policy that awaits for ever", calm, ending_of(task, Awaits())),
        ("a process killed while a seed trains", *_killed(Stage.TRAINING)),
        ("... while it blends", *_killed(Stage.BLENDING)),
    ]
    head = ["fault", "without, %", "with, %", "same to the bit", "what Esper did"]
    return table(head, [_row(name, *endings) for name, *endings in cases])


def _row(name: str, without: Ending, with_it: Ending) -> list[str]:
    same = "yes" if without.digest == with_it.digest else "no"
    did = with_it.note or ", ".join(sorted({str(stage) for stage in with_it.stages}))
    if with_it.rollbacks:
        did += f", {with_it.rollbacks} rollbacks"
    return [name, f"{without.accuracy:.1%}", f"{with_it.accuracy:.1%}", same, did]


def one_seed(task: Task, training: str, blend: bool = False) -> Policy:
    """Return a policy that plants one seed, and lets it blend or leaves it as it is."""
    slot = task.growth.slots[-1]
    first = SeedCommand(
        slot,
        SeedOperation.GERMINATE,
        task.growth.blueprint,
        planting=planting(task, training),
    )
    entries = [Entry(first, 2)]
    if blend:
        entries.append(Entry(SeedCommand(slot, SeedOperation.ADVANCE), 4))
    return SchedulePolicy(entries, tries=50)


def poison_seed(*stages: Stage) -> Callable[[nn.Module, Kasmina, int], bool]:
    """Return what makes the seed NaN, once, as soon as it is in one of these stages."""

    def fault(model: nn.Module, kasmina: Kasmina, step: int) -> bool:
        hit = [name for name, stage in kasmina.stages.items() if stage in stages]
        if step < _FAULT_STEP or not hit:
            return False
        with torch.no_grad():
            for parameter in slots_of(model)[hit[0]].seed.parameters():
                parameter.fill_(float("nan"))
        return True

    return fault


def ending_of(
    task: Task,
    policy: Policy,
    *,
    rate: float = 1.0,
    fault: Callable[[nn.Module, Kasmina, int], bool] | None = None,
    directory: Path | None = None,
) -> Ending:
    """Train with a fault, and look at the host's weights afterwards."""
    torch.manual_seed(_SEED)
    model, notes, note = task.small(), Notes(), ""
    growth = GrowthConfig(rate_factor=rate, ramp_steps=60)
    job = make_job(task, Plan(policy=policy, growth=growth), _SETTING, model, Meter())
    config = TolariaConfig(
        train=Train(epochs=task.epochs, seed=_SEED, device="cpu", threads=1),
        growth=growth,
        policy=PolicyConfig(deadline_ms=200),
        checkpoints=CheckpointConfig(every=20, mode="wait"),
    )
    worker = make_worker(config.worker)
    trainer = TolariaTrainer.from_job(
        job, config=config, sinks=[notes], worker=worker, directory=directory
    )
    if directory is not None and any(directory.rglob("*.safetensors")):
        print(f"resumed {trainer.resume()}", flush=True)
    kasmina, hit = job.executor, False
    if not isinstance(kasmina, Kasmina):
        raise TypeError(f"the executor is a {type(kasmina).__name__}")
    try:
        for record in trainer.steps():
            if fault is not None and not hit:
                hit = fault(model, kasmina, record.step)
            if directory is not None:
                print(record.step, *kasmina.stages.values(), flush=True)
    except DivergenceError as error:
        note = f"stopped: {error}"
    if fault is not None and not hit:
        raise RuntimeError(f"the fault was never injected; the slots are {kasmina.stages}")
    worker.shutdown(0.0)
    rollbacks = notes.states[-1].rollbacks if notes.states else 0
    stages = list(kasmina.stages.values())
    accuracy = task.evaluate(model, task.data().validation)
    return Ending(accuracy, _digest(model), stages, rollbacks, note)


def _digest(model: nn.Module) -> str:
    """Return a digest of all that the host holds; seeds that are not part of it are left out."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "esper_slot" not in name:
            found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()


def victim(task: Task, directory: Path) -> None:
    """Train in a directory, telling the step and the stages, and at the end what came of it."""
    ending = ending_of(
        replace(task, epochs=EPOCHS), one_seed(task, "shadow", blend=True), directory=directory
    )
    print(json.dumps([ending.accuracy, ending.digest, ending.rollbacks]), flush=True)


def _killed(stage: Stage) -> tuple[Ending, Ending]:
    """Return the endings of a run in a process of its own, undisturbed, and killed at a stage."""
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        calm = _ending(_lines(Path(folder, "calm")))
        hurt = Path(folder, "hurt")
        list(_lines(hurt, stop=lambda line: str(stage) in line.split()))
        lines = list(_lines(hurt))
        ending = _ending(lines)
        ending.note = f"killed, {lines[0]}"
    return calm, ending


def _lines(directory: Path, stop: Callable[[str], bool] | None = None) -> Iterator[str]:
    """Yield what a run in its own process tells; kill it soon after a line that asks for it."""
    command = [sys.executable, str(PROGRAM), "victim", "--folder", str(directory)]
    left = -1
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None:
            raise RuntimeError("the process has no output")
        for line in process.stdout:
            yield line.strip()
            left = 30 if left < 0 and stop is not None and stop(line) else left - (left > 0)
            if left == 0:
                os.kill(process.pid, signal.SIGKILL)
    wanted = 0 if stop is None else -signal.SIGKILL
    if process.returncode != wanted:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")


def _ending(lines: Iterator[str] | list[str]) -> Ending:
    accuracy, digest, rollbacks = json.loads(list(lines)[-1])
    return Ending(accuracy, digest, rollbacks=rollbacks)
