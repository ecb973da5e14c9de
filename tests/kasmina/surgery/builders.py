"""Optimizers and schedulers of every kind, and all there is to know about a pair of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lr
from torch.optim.swa_utils import SWALR

Facts = list[Any]


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed + 31 * math.prod(shape))
    return nn.Parameter(torch.randn(shape, generator=generator))


def facts(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """Return everything that can be told about a value: order, types, identities, bits."""
    if isinstance(value, Tensor):
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        return (type(value).__name__, id(value), value.dtype, tuple(value.shape), bits)
    if isinstance(value, Optimizer) or id(value) in seen:
        return id(value)
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return [(facts(key, seen), facts(item, seen)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(facts(item, seen) for item in value)]
    if isinstance(value, lr.LRScheduler):
        return [type(value).__name__, facts(vars(value), seen | {id(value)})]
    return (type(value).__name__, str(value))


def all_facts(optimizer: Optimizer, scheduler: lr.LRScheduler | None = None) -> Facts:
    state = {key: dict(entries) for key, entries in optimizer.state.items()}
    return [facts(optimizer.param_groups), facts(state), facts(scheduler)]


def step(optimizer: Optimizer, number: int) -> None:
    """Take a step on gradients that depend on the step and the shape only."""
    for group in optimizer.param_groups:
        for held in group["params"]:
            held.grad = gradient_of(optimizer, held, number)
    loss = torch.tensor(1.0 / (number + 1))
    optimizer.step(lambda: loss)  # type: ignore[arg-type, return-value]


def gradient_of(optimizer: Optimizer, held: Tensor, number: int) -> Tensor:
    gradient = parameter(*held.shape, seed=1000 + number).detach().to(held.dtype)
    return gradient.to_sparse() if isinstance(optimizer, torch.optim.SparseAdam) else gradient


@dataclass(frozen=True)
class Scheduled:
    """A kind of schedule, and what it needs.

    :ivar make: builds it for an optimizer with two groups.
    :ivar any_share: whether a group may have another rate than the first one.
    """

    make: Callable[[Optimizer], lr.LRScheduler]
    any_share: bool = True
    optimizer: Callable[[Any], Optimizer] = field(
        default=lambda groups: torch.optim.SGD(groups, momentum=0.9)
    )


def _warm_then_cosine(optimizer: Optimizer) -> lr.SequentialLR:
    parts = [lr.LinearLR(optimizer, 0.1, total_iters=4), lr.CosineAnnealingLR(optimizer, 9)]
    return lr.SequentialLR(optimizer, parts, [4])


def _sequence_of_three(optimizer: Optimizer) -> lr.SequentialLR:
    parts: list[lr.LRScheduler] = [
        lr.LambdaLR(optimizer, lambda epoch: 0.5 + epoch / 10),
        lr.CosineAnnealingWarmRestarts(optimizer, 3),
        lr.PolynomialLR(optimizer, total_iters=10),
    ]
    return lr.SequentialLR(optimizer, parts, [5, 9])


def _chained_with_a_sequence(optimizer: Optimizer) -> lr.ChainedScheduler:
    parts = [_warm_then_cosine(optimizer), lr.ExponentialLR(optimizer, 0.9)]
    return lr.ChainedScheduler(parts, optimizer=optimizer)


def _chained(optimizer: Optimizer) -> lr.ChainedScheduler:
    return lr.ChainedScheduler(
        [
            lr.ConstantLR(optimizer, 0.3, total_iters=6),
            lr.ExponentialLR(optimizer, 0.9),
            lr.MultiStepLR(optimizer, [3, 8]),
        ],
        optimizer=optimizer,
    )


def _adam(groups: Any) -> Optimizer:
    return torch.optim.Adam(groups)


SCHEDULES: dict[str, Scheduled] = {
    "LambdaLR": Scheduled(lambda o: lr.LambdaLR(o, lambda epoch: 1 / (1 + epoch))),
    "LambdaLR, two": Scheduled(
        lambda o: lr.LambdaLR(o, [lambda epoch: 0.9**epoch, lambda epoch: 1 + epoch])
    ),
    "MultiplicativeLR": Scheduled(lambda o: lr.MultiplicativeLR(o, lambda _: 0.9)),
    "StepLR": Scheduled(lambda o: lr.StepLR(o, 3, 0.5)),
    "MultiStepLR": Scheduled(lambda o: lr.MultiStepLR(o, [2, 5, 5, 11], 0.5)),
    "ConstantLR": Scheduled(lambda o: lr.ConstantLR(o, 0.25, total_iters=6)),
    "LinearLR": Scheduled(lambda o: lr.LinearLR(o, 0.1, total_iters=9)),
    "LinearLR, down": Scheduled(lambda o: lr.LinearLR(o, 1.0, 0.2, total_iters=9)),
    "ExponentialLR": Scheduled(lambda o: lr.ExponentialLR(o, 0.8)),
    "PolynomialLR": Scheduled(lambda o: lr.PolynomialLR(o, total_iters=10, power=2.0)),
    "CosineAnnealingLR": Scheduled(lambda o: lr.CosineAnnealingLR(o, 6)),
    "CosineAnnealingLR, floor": Scheduled(
        lambda o: lr.CosineAnnealingLR(o, 6, eta_min=0.01), any_share=False
    ),
    "CosineAnnealingWarmRestarts": Scheduled(
        lambda o: lr.CosineAnnealingWarmRestarts(o, 3, T_mult=2)
    ),
    "CosineAnnealingWarmRestarts, floor": Scheduled(
        lambda o: lr.CosineAnnealingWarmRestarts(o, 4, eta_min=0.01), any_share=False
    ),
    "SequentialLR": Scheduled(_warm_then_cosine),
    "SequentialLR, three": Scheduled(_sequence_of_three),
    "ChainedScheduler": Scheduled(_chained),
    "ChainedScheduler, nested": Scheduled(_chained_with_a_sequence),
    "ChainedScheduler, one twice": Scheduled(
        lambda o: lr.ChainedScheduler([lr.StepLR(o, 4, 0.5)] * 2, optimizer=o)
    ),
    "CyclicLR": Scheduled(lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=3)),
    "CyclicLR, Adam": Scheduled(
        lambda o: lr.CyclicLR(o, [0.01, 0.02], [0.1, 0.3], step_size_up=3, mode="triangular2"),
        optimizer=_adam,
    ),
    "CyclicLR, rates only": Scheduled(
        lambda o: lr.CyclicLR(
            o, 0.01, 0.1, step_size_up=2, mode="exp_range", gamma=0.9, cycle_momentum=False
        )
    ),
    "OneCycleLR": Scheduled(lambda o: lr.OneCycleLR(o, 0.2, total_steps=20)),
    "OneCycleLR, Adam": Scheduled(
        lambda o: lr.OneCycleLR(
            o, [0.2, 0.1], total_steps=20, three_phase=True, anneal_strategy="linear"
        ),
        optimizer=_adam,
    ),
    "ReduceLROnPlateau": Scheduled(
        lambda o: lr.ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=0.01)
    ),
    "ReduceLROnPlateau, two": Scheduled(
        lambda o: lr.ReduceLROnPlateau(o, factor=0.5, patience=0, min_lr=[0.01, 0.02])
    ),
    "SWALR": Scheduled(lambda o: SWALR(o, 0.02, anneal_epochs=5)),
    "SWALR, linear": Scheduled(
        lambda o: SWALR(o, swa_lr=0.3, anneal_epochs=8, anneal_strategy="linear")
    ),
}


def two_groups(kind: Scheduled) -> tuple[Optimizer, lr.LRScheduler]:
    """Build an optimizer with groups at 0.1 and 0.04, scheduled."""
    groups = [
        {"params": [parameter(2, 3)], "lr": 0.1},
        {"params": [parameter(4)], "lr": 0.04},
    ]
    optimizer = kind.optimizer(groups)
    return optimizer, kind.make(optimizer)


def advance(optimizer: Optimizer, scheduler: lr.LRScheduler, number: int) -> None:
    """Take an optimizer step and move the schedule on."""
    step(optimizer, number)
    if isinstance(scheduler, lr.ReduceLROnPlateau):
        scheduler.step(1.0 if number % 5 else 0.5 / (number + 1))
    else:
        scheduler.step()


Optimizing = Callable[[list[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Optimizing] = {
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, weight_decay=0.1),
    "Adam, foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "Adam, tensor rate": lambda p: torch.optim.Adam(p, torch.tensor(0.01)),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.01),
    "SGD, momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "RMSprop, all": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.9),
    "RMSprop, foreach": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.1),
    "Adagrad, foreach": lambda p: torch.optim.Adagrad(p, 0.01, foreach=True),
    "Adagrad, fused": lambda p: torch.optim.Adagrad(p, 0.01, fused=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 0.01),
    "Adadelta, foreach": lambda p: torch.optim.Adadelta(p, 0.01, foreach=True),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "Adamax, foreach": lambda p: torch.optim.Adamax(p, 0.01, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "NAdam, foreach": lambda p: torch.optim.NAdam(p, 0.01, foreach=True),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01),
    "RAdam, foreach": lambda p: torch.optim.RAdam(p, 0.01, foreach=True),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.01),
    "ASGD, averaging, foreach": lambda p: torch.optim.ASGD(p, 0.01, t0=2, foreach=True),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "Rprop, foreach": lambda p: torch.optim.Rprop(p, 0.01, foreach=True),
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, 0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "Adafactor, foreach": lambda p: torch.optim.Adafactor(p, 0.01, foreach=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.01),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon(p, 0.01)
# Updates that look at single entries only, and kernels whose rounding does not depend on where in
# memory an entry lies; fused ones round the last few entries differently.
ELEMENTWISE = [
    name
    for name in OPTIMIZERS
    if "fused" not in name and name.split(",")[0] not in ("Adafactor", "LBFGS", "Muon")
]
