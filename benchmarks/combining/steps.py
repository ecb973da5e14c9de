"""Whole training steps: forward pass, a gradient for each task, PCGrad, optimizer step."""

from collections.abc import Callable

import torch
from torchjd.aggregation import PCGrad as TorchJDPCGrad
from torchjd.aggregation import PCGradWeighting
from torchjd.autogram import Engine
from torchjd.autojac import backward as torchjd_backward
from torchjd.autojac import jac_to_grad, mtl_backward

from combining.measures import Call
from combining.networks import MultiTask
from combining.peers import textbook
from esper.tolaria.aggregation import MODES, Mode, PCGrad, Refreshed, backward

REFRESHED = "Esper, refreshed every 10"
SUM = "one summed backward"
BOUND = "n passes, one with weight gradients"
Make = Callable[[MultiTask], Call]


def summed(net: MultiTask) -> Call:
    def step() -> None:
        net.optimizer.zero_grad()
        torch.stack(net.losses(net.features())).sum().backward()
        net.optimizer.step()

    return step


def bound(net: MultiTask) -> Call:
    """Do what every method does that pulls each task through the trunk, and nothing else.

    Only one of the n passes forms the gradients of weights, and nothing is combined.
    """

    def step() -> None:
        net.optimizer.zero_grad()
        first = net.trunk[0](net.batch)  # type: ignore[index]
        losses = net.losses(net.trunk[1:](first))  # type: ignore[index]
        for loss in losses[:-1]:
            torch.autograd.grad(loss, [first], retain_graph=True)
        losses[-1].backward()
        net.optimizer.step()

    return step


def esper(mode: Mode, every: int = 1) -> Make:
    def make(net: MultiTask) -> Call:
        parameters = list(net.parameters())
        aggregator = PCGrad() if every == 1 else Refreshed(PCGrad(), every=every)

        def step() -> None:
            net.optimizer.zero_grad()
            losses = {str(task): loss for task, loss in enumerate(net.losses(net.features()))}
            backward(losses, parameters, aggregator, mode=mode)
            net.optimizer.step()

        return step

    return make


def mtl(chunk: int | None, *, gramian: bool) -> Make:
    """Use torchjd's ``mtl_backward``: heads first, then the trunk."""

    def make(net: MultiTask) -> Call:
        trunk, aggregator = list(net.trunk.parameters()), TorchJDPCGrad()

        def step() -> None:
            net.optimizer.zero_grad()
            features = net.features()
            losses = net.losses(features)
            mtl_backward(losses, features=features, parallel_chunk_size=chunk)
            jac_to_grad(trunk, aggregator, optimize_gramian_computation=gramian)
            net.optimizer.step()

        return step

    return make


def autojac(net: MultiTask) -> Call:
    """Use torchjd's ``backward``, which knows no heads."""
    parameters, aggregator = list(net.parameters()), TorchJDPCGrad()

    def step() -> None:
        net.optimizer.zero_grad()
        torchjd_backward(net.losses(net.features()))
        jac_to_grad(parameters, aggregator)
        net.optimizer.step()

    return step


def autogram(net: MultiTask) -> Call:
    """Use torchjd's engine: the Gramian without Jacobians, then one weighted backward pass."""
    engine, weighting = Engine(net.trunk, batch_dim=None), PCGradWeighting()

    def step() -> None:
        net.optimizer.zero_grad()
        losses = torch.stack(net.losses(net.features()))
        losses.backward(weighting(engine.compute_gramian(losses)))
        net.optimizer.step()

    return step


def by_hand(net: MultiTask) -> Call:
    """Do n plain backward passes, then the textbook's vectors; heads are projected along."""
    parameters = list(net.parameters())

    def step() -> None:
        rows = []
        losses = net.losses(net.features())
        for loss in losses:
            net.optimizer.zero_grad()
            loss.backward(retain_graph=True)
            rows.append(
                [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
            )
        orders = torch.rand(len(losses), len(losses)).argsort(1).tolist()
        for parameter, gradient in zip(parameters, textbook(rows, orders), strict=True):
            parameter.grad = gradient
        net.optimizer.step()

    return step


ESPER: dict[str, Make] = {
    **{f"Esper, {mode}": esper(mode) for mode in MODES},
    REFRESHED: esper("sequential", every=10),
}
EXACT = tuple(f"Esper, {mode}" for mode in MODES if mode != "features")
PEERS: dict[str, Make] = {
    "torchjd, mtl_backward": mtl(None, gramian=False),
    "torchjd, mtl_backward, Gramian": mtl(None, gramian=True),
    "torchjd, mtl_backward, Gramian, chunks of 1": mtl(1, gramian=True),
    "torchjd, backward": autojac,
    "torchjd, autogram": autogram,
    "n backward passes, textbook": by_hand,
}
ARMS: dict[str, Make] = {SUM: summed, BOUND: bound, **ESPER, **PEERS}
