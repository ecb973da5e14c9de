"""Small models that grow, and what growing them needs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from esper.core.config import GrowthConfig
from esper.kasmina import Kasmina
from esper.leyline import (
    FieldReport,
    Planting,
    SeedCommand,
    SeedOperation,
    Stage,
    SystemState,
)
from esper.tolaria.job import TrainingJob

QUICK = GrowthConfig(
    min_training_steps=0, ramp_steps=4, warmup_steps=2, embargo_steps=3, growths_per_slot=1
)


class Images(nn.Module):
    """A small convolutional network with everything that may be disturbed: buffers and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(4 * 36, 12),
            nn.ReLU(),
        )
        self.head = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, batch by 3."""
        logits: Tensor = self.head(self.trunk(images))
        return logits


def batch(seed: int = 0, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return images and labels that can be learnt: which third of the image is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (size,), generator=generator)
    images = torch.rand(size, 1, 6, 6, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.4
    return images, labels


def loss(model: nn.Module, content: Sequence[Tensor]) -> Tensor:
    """Return the cross-entropy."""
    return functional.cross_entropy(model(content[0]), content[1])


class Loop:
    """A training loop of one's own with a growing model.

    :param slots: where it may grow.
    :param optimizer: makes one of the parameters.
    """

    def __init__(
        self,
        slots: Sequence[str] = ("trunk.6",),
        optimizer: Callable[..., Any] = torch.optim.Adam,
        *,
        config: GrowthConfig = QUICK,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.model = Images()
        self.optimizer = optimizer(self.model.parameters(), lr=1e-2)
        self.kasmina = Kasmina(
            self.model, self.optimizer, slots=slots, sample=batch()[0], config=config
        )
        self.steps = 0

    def step(self, count: int = 1) -> list[FieldReport]:
        """Take so many steps."""
        reports = []
        for _ in range(count):
            content = batch(self.steps)
            # Two loops in one program draw from one stream.
            torch.manual_seed(self.steps)
            self.optimizer.zero_grad()
            loss(self.model, content).backward()
            self.kasmina.train_seeds(lambda content=content: loss(self.model, content))
            self.optimizer.step()
            reports += self.kasmina.settle()
            self.steps += 1
        return reports

    def survey(self) -> Any:
        """Measure on eight held-out batches."""
        held_out = [batch(1000 + index, 256) for index in range(8)]
        return self.kasmina.survey(lambda content: loss(self.model, content), held_out, None)

    def ask(
        self, operation: SeedOperation, seed: str = "trunk.6", blueprint: str = "", **more: Any
    ) -> FieldReport:
        """Give one command."""
        return self.kasmina.apply(SeedCommand(seed, operation, blueprint, **more))

    def plant(self, seed: str = "trunk.6", blueprint: str = "mlp", **planting: Any) -> FieldReport:
        """Germinate, and let it begin to train."""
        report = self.ask(SeedOperation.GERMINATE, seed, blueprint, planting=Planting(**planting))
        if report.applied:
            self.step()
        return report

    def blend(self, seed: str = "trunk.6", limit: int = 400) -> None:
        """Train a seed until it may blend, then until it holds.

        :raises RuntimeError: it does not get there.
        """
        for _ in range(limit // 10):
            self.step(10)
            self.survey()
            if self.ask(SeedOperation.ADVANCE, seed).applied:
                break
        self.step(10)
        if self.kasmina.stages[seed] is not Stage.HOLDING:
            raise RuntimeError(f"the seed is {self.kasmina.stages[seed]}")


def facts(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all that a model holds, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Gardener:
    """Lets seeds germinate in turn, and advance as soon as they gain."""

    mode = "wait"
    isolation = "thread"

    def __init__(self, blueprint: str = "mlp") -> None:
        self._blueprint = blueprint

    def decide(self, state: SystemState) -> SeedCommand | None:
        growth = state.growth
        for name, seed in {} if growth is None else growth.seeds.items():
            if seed.stage is Stage.DORMANT and state.epoch >= 1:
                return SeedCommand(name, SeedOperation.GERMINATE, self._blueprint)
            gains = seed.gain is not None and seed.gain.low > 0
            if seed.stage in (Stage.TRAINING, Stage.HOLDING) and gains:
                return SeedCommand(name, SeedOperation.ADVANCE)
        return None


def growing_job(
    slots: Sequence[str] = ("trunk.6", "head"), policy: Any = None, seed: int = 0
) -> TrainingJob:
    """Return a job whose model grows in its first epochs."""
    torch.manual_seed(seed)
    model = Images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    training, held_out = batch(1, 512), batch(2, 256)
    return TrainingJob(
        model=model,
        optimizer=optimizer,
        data=TensorDataset(*training),
        loss=loss,
        validation=TensorDataset(*held_out),
        scheduler=scheduler,
        batch_size=32,
        policy=policy or Gardener(),
        executor=Kasmina(
            model, optimizer, slots=slots, sample=training[0][:32], scheduler=scheduler
        ),
        name="growing",
    )
