"""The arms: models of a fixed size, models that grow by a plan, and by Tamiyo's policies."""

import random
from collections.abc import Callable, Mapping

from esper.core.config import GrowthConfig
from esper.leyline import Planting, Policy, SeedCommand, SeedOperation
from esper.tamiyo import RulesPolicy
from esper.tamiyo.bandit import BanditLimits, BanditPolicy
from esper.tamiyo.fixed import Entry, SchedulePolicy
from growing import rival
from growing.task import Task, parameters
from growing.training import Plan, Run, Setting, train

Arm = Callable[[Task, Setting, int], Run]
SMALL, LARGE = "static, small", "static, large"
GROMO = "GroMo, fixed period"
# The last tenth of the run would be too late for anything that grows.
_LATEST = 0.6


def _static(large: bool) -> Arm:
    return lambda task, setting, seed: train(task, Plan(large=large), setting, seed)


def _growing(policy: Callable[[Task, int], Policy]) -> Arm:
    def run(task: Task, setting: Setting, seed: int) -> Run:
        return train(task, growing_plan(task, policy(task, seed)), setting, seed)

    return run


def growing_plan(task: Task, policy: Policy, **changes: int | float) -> Plan:
    """Return how a small model grows, up to the parameters of the large one.

    :param changes: of Kasmina's configuration.
    """
    settings = {
        "max_parameters": parameters(task.large()),
        "growths_per_slot": task.growth.per_slot,
    }
    return Plan(policy=policy, growth=GrowthConfig.model_validate(settings | changes))


def planting(task: Task, training: str = "shadow") -> Planting:
    """Return how the seeds of a task are planted: isolated at first, or put in at once."""
    return Planting(arguments=dict(task.growth.arguments), training=training)


def _order(task: Task) -> list[str]:
    return [slot for _ in range(task.growth.per_slot) for slot in task.growth.slots]


def _entries(task: Task, epochs: list[int]) -> list[Entry]:
    """Return a schedule that puts one seed in after the other, and keeps each that gains."""
    entries = []
    for slot, epoch in zip(_order(task), epochs, strict=True):
        germinate = SeedCommand(
            slot,
            SeedOperation.GERMINATE,
            task.growth.blueprint,
            planting=planting(task, "insert"),
        )
        entries.append(Entry(germinate, epoch))
        entries.append(Entry(SeedCommand(slot, SeedOperation.ADVANCE), epoch + 1))
    return entries


def fixed_epochs(task: Task) -> list[int]:
    """Return the epochs at which something grows at a fixed period, within half of the run."""
    count = len(_order(task))
    return [task.epochs * (index + 1) // (2 * count + 2) for index in range(count)]


def random_epochs(task: Task, seed: int) -> list[int]:
    """Return random epochs at which something grows, in the first part of the run."""
    drawn = random.Random(seed)
    latest = int(task.epochs * _LATEST)
    return sorted(drawn.randrange(latest) for _ in _order(task))


def _fixed(task: Task, seed: int) -> Policy:
    del seed
    return SchedulePolicy(_entries(task, fixed_epochs(task)), tries=50)


def _random(task: Task, seed: int) -> Policy:
    return SchedulePolicy(_entries(task, random_epochs(task, seed)), tries=50)


def _rules(task: Task, seed: int) -> Policy:
    del seed
    return RulesPolicy(planting=planting(task))


def _inserting_rules(task: Task, seed: int) -> Policy:
    del seed
    return RulesPolicy(planting=planting(task, "insert"))


def _bandit(task: Task, seed: int) -> Policy:
    return BanditPolicy(bandit=BanditLimits(seed=seed), planting=planting(task))


ARMS: Mapping[str, Arm] = {
    SMALL: _static(False),
    LARGE: _static(True),
    "grown at random times": _growing(_random),
    "grown at a fixed period": _growing(_fixed),
    "grown by rules": _growing(_rules),
    "grown by rules, inserted": _growing(_inserting_rules),
    "grown by the bandit": _growing(_bandit),
    GROMO: rival.train,
}


def arms_of(task: Task) -> list[str]:
    """Return the arms that there are for a task."""
    return [name for name in ARMS if name != GROMO or rival.fits(task)]
