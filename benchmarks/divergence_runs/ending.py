"""What faults do to the result: final accuracy of the same run, unprotected and under Esper."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from divergence_runs.faults import Fault
from divergence_runs.setups import Setup, draw
from esper.leyline import DivergenceError
from esper.tolaria import GuardedTraining


@dataclass(frozen=True)
class Ending:
    """What became of one run.

    :param accuracy: on the validation set.
    :param note: what Esper did.
    """

    accuracy: float
    note: str = ""


def train(
    setup: Setup, fault: Fault, seed: int, onset: int, steps: int, *, protected: bool
) -> Ending:
    """Train to the end, or until the guard stops, and return what became of it.

    Faults follow the batches; a rate that is too high follows the schedule, which a rollback
    takes back.
    """
    if fault.needs_bf16:
        setup = dataclasses.replace(setup, bf16=True)
    torch.manual_seed(seed)
    model = setup.model()
    optimizer = setup.optimizer(model)
    schedule = LambdaLR(optimizer, lambda step: fault.rate if 0 <= onset <= step else 1.0)
    source = torch.Generator().manual_seed(seed)
    guarded = GuardedTraining(model, optimizer, scheduler=schedule) if protected else None
    note = ""
    for number in range(steps):
        batch = draw(setup.single, source)
        if 0 <= onset <= number:
            batch = fault.batch(batch, number - onset)
            fault.model(model, number - onset)
        losses = setup.losses(model, batch)
        torch.stack(list(losses.values())).sum().backward()
        try:
            _step(losses, guarded, optimizer, schedule)
        except DivergenceError:
            note = f", stopped at step {number}"
            break
    if guarded is not None:
        note = f"{guarded.skipped} skipped, {guarded.rollbacks} rollbacks{note}"
    return Ending(setup.accuracy(_finite(model)), note)


def _step(
    losses: dict[str, Tensor],
    guarded: GuardedTraining | None,
    optimizer: Optimizer,
    schedule: LambdaLR,
) -> None:
    if guarded is not None:
        guarded.step(losses)
        return
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


def _finite(model: nn.Module) -> nn.Module:
    """Let a model of NaN name every digit 0, as argmax does on some machines and not on others."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_(0.0, 0.0, 0.0)
    return model
