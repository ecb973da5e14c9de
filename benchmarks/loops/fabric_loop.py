"""Lightning Fabric: the plain loop with its three calls replaced."""

from lightning.fabric import Fabric

from loops.task import Task, loss_of


def run(task: Task) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(task.model, task.optimizer)
    loader = fabric.setup_dataloaders(task.loader)
    for batch in loader:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        fabric.backward(loss)
        optimizer.step()
