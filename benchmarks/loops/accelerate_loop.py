"""Accelerate: the plain loop with prepared objects."""

from accelerate import Accelerator

from loops.task import Task, loss_of


def run(task: Task) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(task.model, task.optimizer, task.loader)
    for batch in loader:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        optimizer.step()
