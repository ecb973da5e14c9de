"""A training run that is killed again and again, each life forked from one warm process."""

import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from esper.leyline import Event, Record
from esper.tolaria import TolariaTrainer
from esper.tolaria.rollback import CheckpointStore
from support.jobs import config, two_task_job

SETTINGS = {"train": {"epochs": 12}, "snapshots": {"every": 3}}


class Acknowledged:
    """Tells through a pipe which checkpoints the run has reported as saved."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def write(self, record: Record) -> None:
        if isinstance(record, Event) and record.name == "checkpoint_saved":
            os.write(self._pipe, f"{record.data['step']}\n".encode())

    def close(self) -> None:
        pass


@dataclass
class Lives:
    """What became of the lives of runs.

    :param kills: lives that were ended by a kill.
    :param completed: runs that came to their end all the same.
    """

    kills: int = 0
    completed: int = 0


def train(directory: Path, pipe: int) -> list[torch.Tensor]:
    """Train one life: from the newest checkpoint, if there is one, to the end."""
    torch.manual_seed(5)
    settings = config(**SETTINGS, checkpoints={"every": 2, "mode": "overlap"})
    trainer = TolariaTrainer.from_job(
        two_task_job(), config=settings, directory=directory, sinks=[Acknowledged(pipe)]
    )
    if CheckpointStore(directory / "checkpoints").list():
        trainer.resume()
    list(trainer.steps())
    return [parameter.detach() for parameter in trainer.job.model.parameters()]


def live(directory: Path, seconds: float) -> tuple[bool, int]:
    """Fork one life and kill it after some time; return whether it ended first, and its word."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        torch.save(train(directory, writing), directory / "weights.pt")
        os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + seconds
    ended = 0
    while time.monotonic() < deadline and not ended:
        time.sleep(0.0005)
        ended, _ = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        words = [int(line) for line in pipe if line.endswith("\n")]
    return bool(ended), max(words, default=0)


def warm_up() -> None:
    """Import what the first optimizer step imports, so that no life has to."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.SGD([parameter], lr=0.1, momentum=0.9).step()


def main(place: Path, kills: int) -> None:
    """Kill lives of runs until there were so many; compare what each run ends in with ``whole``."""
    seed, lives = random.Random(0), Lives()
    warm_up()
    (place / "whole").mkdir()
    began = time.monotonic()
    assert live(place / "whole", 600)[0]
    longest = time.monotonic() - began
    whole = torch.load(place / "whole" / "weights.pt", weights_only=True)
    while lives.kills < kills:
        directory = place / f"{lives.completed}"
        directory.mkdir()
        newest, ended = 0, False
        while not ended:
            ended, acknowledged = live(directory, seed.uniform(0.0, longest))
            newest = max(newest, acknowledged)
            lives.kills += not ended
            infos = CheckpointStore(directory / "checkpoints").list()
            found = max((info.step for info in infos), default=0)
            assert found >= newest, f"step {newest} was acknowledged, step {found} is found"
            assert all(r.valid for r in CheckpointStore(directory / "checkpoints").verify())
        lives.completed += 1
        weights = torch.load(directory / "weights.pt", weights_only=True)
        same = all(torch.equal(a, b) for a, b in zip(weights, whole, strict=True))
        assert same, "the run ended in other weights than one that was never killed"
    sys.stdout.write(json.dumps(vars(lives)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
