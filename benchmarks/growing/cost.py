"""What slots and seeds cost a step: the same model several times, taken in turns.

A few steps of each way make one measurement, and the ways take turns in an order that changes.
Ratios are taken within a round. The time is that of the processor, since others may use it, too.
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from esper.core.config import GrowthConfig
from esper.kasmina import Kasmina
from esper.leyline import Planting, SeedCommand, SeedOperation
from growing.figures import middle, table
from growing.task import parameters
from growing.text import CONTEXT, Decoder

Batch = tuple[Tensor, Tensor]
HOST = "host"
_STEPS = 4
_IDLE, _SHADOW = 1.01, 1.5


@dataclass(frozen=True)
class Host:
    """A model to put slots into.

    :param early: a module near the input; ``middle`` and ``late`` alike.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    blueprint: str
    early: str
    middle: str
    late: str


class Way:
    """A model of its own that takes the same kind of steps.

    :param host: which model.
    :param slot: where a slot is; empty for none.
    :param training: ``shadow`` or ``insert`` lets a seed grow there.
    :param every: steps between two in which an isolated seed learns.
    """

    def __init__(self, host: Host, slot: str = "", training: str = "", every: int = 1) -> None:
        torch.manual_seed(0)
        self.model, self.batch = host.model(), host.batch()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.kasmina: Kasmina | None = None
        if slot:
            config = GrowthConfig(shadow_every=every, min_training_steps=0)
            self.kasmina = Kasmina(
                self.model, self.optimizer, slots=[slot], sample=self.batch[0], config=config
            )
        if self.kasmina is not None and training:
            report = self.kasmina.apply(
                SeedCommand(
                    slot,
                    SeedOperation.GERMINATE,
                    host.blueprint,
                    planting=Planting(training=training),
                )
            )
            if not report.applied:
                raise RuntimeError(f"{host.name}: {report.detail}")

    def loss(self) -> Tensor:
        outputs = self.model(self.batch[0])
        return functional.cross_entropy(outputs.flatten(0, -2), self.batch[1].flatten())

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        if self.kasmina is not None:
            self.kasmina.train_seeds(self.loss)
        self.optimizer.step()
        if self.kasmina is not None:
            self.kasmina.settle()


def cost(rounds: int, names: Sequence[str] = ()) -> str:
    """Return the table of ratios to the host's step.

    :param rounds: measurements of each way.
    :param names: of the hosts; all by default.
    """
    hosts = [host for host in HOSTS if not names or host.name in names]
    found = {host.name: ratios(host, rounds) for host in hosts}
    head = ["step, in multiples of the host's", *found, "goal"]
    ways = list(next(iter(found.values())))
    rows = []
    for way in ways:
        if way == HOST:
            cells = [f"{1000 * found[name][way][0]:.2f} ms" for name in found]
            rows.append([f"**{way}**", *cells, ""])
            continue
        medians = [middle(found[name][way]) for name in found]
        goal = _IDLE if "dormant" in way else _SHADOW if way in _GOALS else None
        told = "" if goal is None else f"{goal}: {_reached(medians, goal)}"
        rows.append([way, *(f"{median:.3f}" for median in medians), told])
    sizes = ", ".join(f"{host.name}: {parameters(host.model()):,}" for host in hosts)
    return f"{table(head, rows)}\n\nParameters of the hosts: {sizes}."


def ratios(host: Host, rounds: int) -> dict[str, list[float]]:
    """Return the ratios of each way to the host by round; the host's own entry is its seconds."""
    ways = _ways(host)
    order, shuffle = list(ways), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name in order:
            step = ways[name].step
            began = time.process_time()
            for _ in range(_STEPS):
                step()
            if turn > 1:
                times[name].append((time.process_time() - began) / _STEPS)
        shuffle(order)
    base = times[HOST]
    found = {
        name: [taken / floor for taken, floor in zip(times[name], base, strict=True)]
        for name in ways
    }
    return found | {HOST: [statistics.median(base)]}


def _ways(host: Host) -> dict[str, Way]:
    slots = {"early": host.early, "middle": host.middle, "late": host.late}
    ways = {HOST: Way(host), "the host again": Way(host)}
    ways["a dormant slot"] = Way(host, host.middle)
    for place, slot in slots.items():
        ways[f"a seed in isolation, {place}"] = Way(host, slot, "shadow")
    for every in (2, 4):
        ways[f"... in the middle, every {every} steps"] = Way(host, host.middle, "shadow", every)
    for place, slot in slots.items():
        ways[f"a seed put in at once, {place}"] = Way(host, slot, "insert")
    return ways


_GOALS = tuple(f"a seed in isolation, {place}" for place in ("early", "middle", "late"))


def _reached(medians: Sequence[float], goal: float) -> str:
    return ", ".join("reached" if median <= goal else "missed" for median in medians)


def _convolution() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((3, 16, 16, 32, 32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def _perceptron() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((128, 512, 512, 512, 512)):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.decoder, self.out = Decoder(width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.out(self.decoder(h))


def _transformer() -> nn.Module:
    layers = [_Layer(96) for _ in range(4)]
    return nn.Sequential(nn.Embedding(100, 96), *layers, nn.LayerNorm(96), nn.Linear(96, 100))


def _labelled(shape: tuple[int, ...]) -> Batch:
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=source)
    return inputs, torch.randint(10, shape[:1], generator=source)


def _characters() -> Batch:
    source = torch.Generator().manual_seed(0)
    drawn = torch.randint(100, (16, CONTEXT + 1), generator=source)
    return drawn[:, :-1], drawn[:, 1:]


HOSTS = (
    Host("convolution", _convolution, partial(_labelled, (32, 3, 16, 16)), "conv", "2", "8", "14"),
    Host("perceptron", _perceptron, partial(_labelled, (128, 128)), "mlp", "1", "3", "7"),
    Host("transformer", _transformer, _characters, "mlp", "1", "2", "4"),
)
