"""Recording runs: losses and gradient norms of each step, healthy or with a fault."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from divergence_runs.faults import FAULTS, Fault
from divergence_runs.setups import SETUPS, Setup, draw

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


def healthy_runs(seeds: int, steps: int) -> Iterator[Trace]:
    """Record healthy runs of every setup."""
    for setup in SETUPS:
        for seed in range(seeds):
            yield record(setup, HEALTHY, seed, -1, steps)


def faulty_runs(seeds: int, after: int) -> Iterator[Trace]:
    """Record runs of every setup under every fault; onsets are spread over 200 to 500 steps."""
    for number, fault in enumerate(FAULTS):
        for place, setup in enumerate(SETUPS):
            for seed in range(seeds):
                onset = 200 + (97 * number + 53 * place + 131 * seed) % 300
                yield record(setup, fault, 100 + seed, onset, onset + after)
