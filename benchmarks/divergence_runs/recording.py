"""Recording runs: losses and gradient norms of each step, healthy or with a fault."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from divergence_runs.faults import FAULTS, Fault
from divergence_runs.setups import Setup, draw

HEALTHY = Fault("healthy")


@dataclass
class Trace:
    """What a rule gets to see of a run.

    :param onset: the step that the fault begins at; -1 in a healthy run.
    """

    name: str
    fault: str
    onset: int
    losses: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def totals(self) -> list[float]:
        """Return the sum of the losses of each step."""
        return [sum(losses.values()) for losses in self.losses]


def record(setup: Setup, fault: Fault, seed: int, onset: int, steps: int) -> Trace:
    """Train unprotected and return the trace."""
    if fault.needs_bf16:
        setup = dataclasses.replace(setup, bf16=True)
    torch.manual_seed(seed)
    model = setup.model()
    optimizer = setup.optimizer(model)
    source = torch.Generator().manual_seed(seed)
    trace = Trace(f"{setup.name}, seed {seed}", fault.name, onset)
    for step in range(steps):
        batch = draw(setup.single, source)
        if 0 <= onset <= step:
            batch = fault.batch(batch, step - onset)
            fault.model(model, step - onset)
            if step == onset:
                for group in optimizer.param_groups:
                    group["lr"] *= fault.rate
        losses = setup.losses(model, batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        trace.losses.append({task: loss.item() for task, loss in losses.items()})
        trace.norms.append(gradient_norm(model))
        optimizer.step()
    return trace


def gradient_norm(model: nn.Module) -> float:
    """Return the norm of the gradient of all parameters."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).item()


def onset_of(fault: int, setup: int, seed: int) -> int:
    """Return the step that a fault begins at, spread over 200 to 500 by their numbers."""
    return 200 + (97 * fault + 53 * setup + 131 * seed) % 300


def healthy_runs(setups: Sequence[Setup], seeds: Sequence[int], steps: int) -> Iterator[Trace]:
    """Record healthy runs of every setup."""
    for setup in setups:
        for seed in seeds:
            yield record(setup, HEALTHY, seed, -1, steps)


def faulty_runs(setups: Sequence[Setup], seeds: Sequence[int], after: int) -> Iterator[Trace]:
    """Record runs of every setup under every fault, up to some steps after its onset."""
    for number, fault in enumerate(FAULTS):
        for place, setup in enumerate(setups):
            for seed in seeds:
                onset = onset_of(number, place, seed)
                yield record(setup, fault, 100 + seed, onset, onset + after)
