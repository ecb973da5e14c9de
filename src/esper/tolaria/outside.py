"""Everything outside of the loop that a run calls, each under a name of its own."""

from dataclasses import dataclass

from esper.core.config import TolariaConfig
from esper.core.worker import AsyncWorker
from esper.tolaria.caution import Caution
from esper.tolaria.dependency import Announce, Dependency, Surroundings


@dataclass(frozen=True)
class Outside:
    """The dependencies of one run.

    :param worker: carries out their calls.
    :param tamiyo: the policy.
    :param kasmina: the executor of commands that change the model.
    :param checkpoint: writes checkpoints.
    :param rollback: reads checkpoints back.
    :param emergency: takes emergencies to whoever has to know.
    """

    worker: AsyncWorker
    tamiyo: Dependency
    kasmina: Dependency
    checkpoint: Dependency
    rollback: Dependency
    emergency: Dependency

    @property
    def dependencies(self) -> list[Dependency]:
        """All of them."""
        return [self.tamiyo, self.kasmina, self.checkpoint, self.rollback, self.emergency]


def open_outside(
    config: TolariaConfig, worker: AsyncWorker, announce: Announce, caution: Caution
) -> Outside:
    """Make the dependencies; trouble with any of them makes the engine careful."""
    surroundings = Surroundings(worker, config.breaker, announce, caution.enter)
    timeouts_ms = {
        "tamiyo": config.policy.deadline_ms,
        "kasmina": config.policy.prepare_deadline_ms,
        "checkpoint": config.checkpoints.save_deadline_ms,
        "rollback": config.rollback.full_deadline_ms,
        "emergency": config.emergency.broadcast_deadline_ms,
    }
    made = {
        name: Dependency(name, timeout_ms / 1e3, surroundings)
        for name, timeout_ms in timeouts_ms.items()
    }
    outside = Outside(worker, **made)
    for dependency in outside.dependencies:
        caution.mode.keep_while(dependency.held_open)
    return outside
