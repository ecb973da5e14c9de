"""The plain PyTorch loop that the others are held against."""

from loops.task import Task, loss_of


def run(task: Task) -> None:
    for batch in task.loader:
        task.optimizer.zero_grad()
        loss = loss_of(task.model, batch)
        loss.backward()
        task.optimizer.step()
