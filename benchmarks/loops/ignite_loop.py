"""Ignite's engine around the plain step."""

from typing import Any

from ignite.engine import Engine

from loops.task import Task, loss_of


def run(task: Task) -> None:
    def step(_: Engine, batch: Any) -> None:
        task.optimizer.zero_grad()
        loss = loss_of(task.model, batch)
        loss.backward()
        task.optimizer.step()

    Engine(step).run(task.loader, max_epochs=1)
